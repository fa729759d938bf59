"""What the README shows works as it stands."""

import re
import shlex
from pathlib import Path

import pytest

import vitarium_cli

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    found = re.findall(r"^```(\w*)\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)
    return [text for name, text in found if name == language]


def test_python(tmp_path, monkeypatch):
    """All blocks in one session, as a reader would paste them."""
    monkeypatch.chdir(tmp_path)
    code = blocks("python")
    assert len(code) >= 4
    session = {}
    for block in code:
        exec(compile(block, "README.md", "exec"), session)


@pytest.fixture(scope="module")
def after_demo(tmp_path_factory):
    folder = tmp_path_factory.mktemp("readme")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert vitarium_cli.main(["demo", "--updates", "0"]) == 0
    return folder


COMMANDS = [x for b in blocks("") for x in b.splitlines() if x.startswith("vitarium ")]


@pytest.mark.parametrize("command", COMMANDS)
def test_program(command, after_demo, monkeypatch, capsys):
    monkeypatch.chdir(after_demo)
    assert vitarium_cli.main(shlex.split(command)[1:]) == 0
    assert capsys.readouterr().out


def test_commands_are_found():
    assert len(COMMANDS) >= 6
