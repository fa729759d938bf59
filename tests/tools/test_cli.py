import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import vitarium
import vitarium_cli

_ROOT = Path(vitarium_cli.__file__).parent


def _python(*argv: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *argv],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(_ROOT)},
        check=False,
    )


@pytest.mark.parametrize("argv", [["--help"], ["--version"], ["list"], ["info", "nat_tiny"]])
def test_the_quick_commands_import_nothing_heavy(argv):
    code = (
        "import sys, vitarium_cli\n"
        "try:\n"
        f"    vitarium_cli.main({argv})\n"
        "except SystemExit: pass\n"
        "print(sorted({'torch', 'timm', 'numpy', 'PIL', 'vitarium'} & sys.modules.keys()))\n"
    )
    result = _python("-c", code)
    assert result.stderr == ""
    assert result.stdout.splitlines()[-1] == "[]"
    assert len(result.stdout.splitlines()) > 1


def test_version_is_the_package_s(program):
    assert program("--version") == (0, f"vitarium {vitarium.__version__}\n", "")
    declared = (_ROOT / "pyproject.toml").read_text(encoding="utf-8")
    assert f'version = "{vitarium.__version__}"' in declared.splitlines()


def test_without_a_command_it_helps(program):
    status, out, err = program()
    assert (status, err) == (2, "")
    commands = ("list", "info", "predict", "features", "visualize", "doctor", "bench", "demo")
    for command in (*commands, "download", "digits", "export-hub"):
        assert re.search(rf"\n    {command}\s", out)


@pytest.mark.parametrize(
    ("argv", "line"),
    [
        (["lst"], "argument COMMAND: invalid choice: 'lst'"),
        (["predict", "a.png"], "one of the arguments --model --config is required"),
        (["predict", "--model", "nat_atto", "--topk", "0", "a.png"], "expected a positive integer"),
        (["features", "a.png", "--model", "nat_atto", "--size", "big"], "expected a positive"),
        (["visualize", "a.png", "--model", "nat_atto", "--pixel", "3"], "expected X,Y in pixels"),
        (["visualize", "a.png", "--model", "nat_atto", "--pixel", "a,b"], "expected X,Y in pixel"),
        (
            ["features", "a.png", "--model", "nat_atto", "--random", "--checkpoint", "f"],
            "not allowed",
        ),
        (["list", "--params", "3"], "unrecognized arguments: --params"),
        (["bench"], "the following arguments are required: ops|models"),
        (["digits", "tset"], "invalid choice: 'tset'"),
        (["export-hub", "nat_atto"], "the following arguments are required: DIR"),
        (["export-hub", "nat_atto", "x", "--img-size", "64x"], "expected N or HxW in pixels, got"),
    ],
)
def test_arguments_that_do_not_parse_are_one_line(argv, line, capsys):
    with pytest.raises(SystemExit) as stopped:
        vitarium_cli.main(argv)
    out, err = capsys.readouterr()
    assert stopped.value.code == 2
    assert out == ""
    assert err.startswith("vitarium: error: ")
    assert err.count("\n") == 1
    assert line in err


def _broken(error: BaseException) -> Callable[[str], Any]:
    def run(args: object) -> int:
        raise error

    return lambda name: SimpleNamespace(run=run)


@pytest.mark.parametrize(
    ("error", "status", "line"),
    [
        (ValueError("size: expected 1,\n  got 2"), 1, "size: expected 1, got 2"),
        (OSError("no route"), 1, "no route"),
        (PermissionError(13, "Permission denied", "/x/y"), 1, "/x/y: Permission denied"),
        (KeyboardInterrupt(), 130, "interrupted"),
    ],
)
def test_errors_of_the_user_are_one_line(error, status, line, monkeypatch, program):
    monkeypatch.setattr(vitarium_cli, "_tool", _broken(error))
    assert program("doctor") == (status, "", f"vitarium: error: {line}\n")


def test_errors_of_ours_keep_their_traceback(monkeypatch):
    monkeypatch.setattr(vitarium_cli, "_tool", _broken(KeyError("ours")))
    with pytest.raises(KeyError, match="ours"):
        vitarium_cli.main(["doctor"])


def test_a_reader_that_goes_away_is_no_error():
    process = subprocess.Popen(
        [sys.executable, "-m", "vitarium_cli", "list", "--json"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=os.environ | {"PYTHONPATH": str(_ROOT)},
    )
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.close()
    assert process.stderr.read() == b""
    assert process.wait() == 1
    process.stderr.close()
