import hashlib
import json
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save
from servers import Reply, Server

from vitarium.checkpoints import Weight
from vitarium.tools import download as tool

pytestmark = pytest.mark.usefixtures("cache")

DATA = save({"a.weight": torch.arange(5000.0)})
SHA256 = hashlib.sha256(DATA).hexdigest()


@pytest.fixture
def server(monkeypatch):
    """A zoo of one family on a server."""
    with Server({"/fine.pth": Reply(DATA), "/free.pth": Reply(DATA)}) as server:
        weights = {
            "toy_tiny.in1k": Weight(url=server.url("/fine.pth")),
            "toy_tiny.in22k": Weight(url=server.url("/free.pth"), licence="MIT"),
            "toy_tiny.det": Weight(url=server.url("/gone.pth"), task="det", licence="MIT"),
            "toy_large.in1k": Weight(manual="Sign in at example.org.\nDownload it"),
            "toy_huge.in1k": Weight(unreleased="its authors lost it"),
        }
        family = SimpleNamespace(_WEIGHTS=weights)
        zoo = dict.fromkeys(("toy_tiny", "toy_large", "toy_huge", "toy_atto"), family)
        monkeypatch.setattr(tool, "entries", lambda: zoo)
        monkeypatch.setattr(tool, "get_pretrained_cfg", lambda entry: SimpleNamespace(tag="in1k"))
        yield server


def test_an_entry_means_its_default_tag_and_is_downloaded_once(server, program, cache):
    for _ in range(2):
        status, out, err = program("download", "toy_tiny", "toy_tiny.in1k")
        assert status == 0
        (path,) = map(cache.joinpath, out.splitlines())
        assert path.name.startswith("toy_tiny.in1k-")
        assert path.read_bytes() == DATA
    assert err == ""
    assert server.requests == ["/fine.pth"]


def test_a_licence_that_is_not_stated_is_told_at_the_download(server, program):
    err = program("download", "toy_tiny.in1k", "toy_tiny.in22k").err
    assert err.startswith("vitarium: toy_tiny.in1k: no licence is stated")
    assert err.count("\n") == 1


def test_globs_skip_what_no_program_can_fetch_but_say_so(server, program):
    status, out, err = program("download", "toy_*.in*")
    assert status == 0
    assert len(out.splitlines()) == 2
    manual, unreleased = err.splitlines()[1:]
    assert manual.startswith(
        "vitarium: error: toy_large.in1k: no program can fetch this file. Sign"
    )
    assert "`vitarium download toy_large.in1k --file FILE`" in manual
    assert unreleased == "vitarium: error: toy_huge.in1k: not released: its authors lost it"
    assert program("download", "toy_h*", "toy_tiny").status == 0
    assert program("download", "toy_h*", "toy_huge").status == 1


@pytest.mark.parametrize("task", ["det", "all"])
def test_globs_mean_detectors_where_that_is_asked_for(task, server, program):
    status, out, err = program("download", "toy_*.d*", "--task", task)
    assert (status, out) == (1, "")
    assert err.startswith("vitarium: error: toy_tiny.det: cannot be downloaded. http://127.0.0.1")
    assert server.requests == ["/gone.pth"]


@pytest.mark.parametrize(
    ("name", "line"),
    [
        ("toy_large", "toy_large.in1k: no program can fetch this file. Sign in"),
        ("toy_huge", "toy_huge.in1k: not released: its authors lost it"),
        ("toy_atto", "toy_atto: no weights are known"),
        ("toy_tinny", "unknown model 'toy_tinny'; did you mean toy_tiny"),
        ("toy_tiny.in1", "unknown model 'toy_tiny.in1'; did you mean toy_tiny.in1k"),
        ("toy_s*", "no weights match 'toy_s*' (--task cls); did you mean toy_"),
        ("toy_tiny.det", "toy_tiny.det: cannot be downloaded. http://127.0.0.1"),
        ("toy_*.det", "no weights match 'toy_*.det' (--task cls); did you mean toy_tiny.det"),
    ],
)
def test_a_failure_is_one_line_and_the_others_are_done(name, line, server, program):
    status, out, err = program("download", name, "toy_tiny.in22k")
    assert status == 1
    assert len(out.splitlines()) == 1
    assert err.startswith(f"vitarium: error: {line}")
    assert err.count("\n") == 1


def test_a_local_file_takes_the_place_of_a_download(server, program, tmp_path):
    local = tmp_path / "local.pth"
    local.write_bytes(DATA)
    adopted = program("download", "toy_large", "--file", local)
    assert adopted.status == 0
    assert program("download", "toy_large.in1k") == (0, adopted.out, "")
    local.write_bytes(b"<html>")
    status, out, err = program("download", "toy_tiny", "--file", local)
    assert (status, out) == (1, "")
    assert err.startswith(f"vitarium: error: toy_tiny.in1k: {local}: expected safetensors or")
    for names in (["toy_tiny", "toy_large"], ["toy_*"]):
        err = program("download", *names, "--file", local).err
        assert err.startswith("vitarium: error: --file: expected one name with it, got toy_")
    assert not server.requests


def test_cache_and_lock_file_are_where_the_user_wants_them(server, program, tmp_path, cache):
    folder, lock = tmp_path / "mine", tmp_path / "lock.json"
    argv = ("download", "toy_tiny.in22k", "--cache-dir", folder, "--lock", lock)
    status, out, err = program(*argv)
    assert (status, err) == (0, "")
    assert folder.joinpath(out.strip()).parent == folder
    record = {"name": "toy_tiny.in22k", "size": len(DATA), "sha256": SHA256}
    assert json.loads(lock.read_text())["files"] == {server.url("/free.pth"): record}
    assert not cache.exists()


@pytest.mark.parametrize(("quiet", "shown"), [([], True), (["--quiet"], False)])
def test_progress_is_shown_on_a_terminal_unless_quiet(quiet, shown, server, program, monkeypatch):
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    result = program("download", "toy_tiny.in22k", *quiet)
    assert result.status == 0
    assert ("toy_tiny.in22k" in result.err) == shown


def test_every_entry_of_the_zoo_has_weights_that_it_knows():
    weights = tool._weights()
    assert weights["nat_tiny.shi_in1k"].url
    assert tool._matching("nat_tiny", weights, "cls") == ["nat_tiny.shi_in1k"]
    for name, weight in weights.items():
        assert isinstance(weight, Weight)
        assert tool._matching(name, weights, "cls") == [name]
