"""The lock file, and local files that are adopted into the cache."""

from __future__ import annotations

import hashlib
import json
import os
import threading
from pathlib import Path

import pytest
import torch
from safetensors.torch import save
from servers import Reply, Server

from vitarium.checkpoints import CheckpointError, Weight, adopt, fetch, lock

pytestmark = [
    pytest.mark.usefixtures("cache"),
    pytest.mark.filterwarnings("ignore:.*no licence is stated"),
]

DATA = save({"a.weight": torch.arange(5000.0)})
OTHER = save({"a.weight": torch.arange(5000.0) + 1})
RECORD = {"name": "toy.tag", "size": len(DATA), "sha256": hashlib.sha256(DATA).hexdigest()}
ANOTHER = RECORD | {"sha256": hashlib.sha256(OTHER).hexdigest()}
MANUAL = Weight(manual="Sign in at example.org")


@pytest.fixture
def user(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The lock file that the user names."""
    path = tmp_path / "project" / "weights.json"
    path.parent.mkdir()
    monkeypatch.setenv("VITARIUM_LOCK", str(path))
    return path


@pytest.fixture
def local(tmp_path: Path) -> Path:
    path = tmp_path / "local.pth"
    path.write_bytes(DATA)
    return path


def written(url: str, record: object) -> str:
    return json.dumps({"version": 1, "files": {url: record}})


def files(path: Path) -> dict[str, object]:
    content = json.loads(path.read_text())
    assert content.keys() == {"version", "files"}
    assert content["version"] == 1
    return content["files"]


def test_a_first_download_is_recorded_in_both_lock_files(cache, user):
    with Server({"/x.pth": Reply(DATA), "/a.pth": Reply(OTHER)}) as server:
        fetch(Weight(url=server.url("/x.pth")), "toy.tag")
        fetch(Weight(url=server.url("/a.pth")), "toy.other")
        expected = {
            server.url("/x.pth"): RECORD,
            server.url("/a.pth"): ANOTHER | {"name": "toy.other"},
        }
    for path in (user, cache / "vitarium.lock.json"):
        assert files(path) == expected
        assert path.read_text() == json.dumps(json.loads(path.read_text()), indent=2) + "\n"
        assert list(files(path)) == sorted(expected)


def test_a_lock_file_behind_a_link_is_written_where_it_is(user, tmp_path, monkeypatch):
    link = tmp_path / "link.json"
    link.symlink_to(user)
    monkeypatch.setenv("VITARIUM_LOCK", str(link))
    with Server({"/x.pth": Reply(DATA)}) as server:
        fetch(Weight(url=server.url("/x.pth")), "toy.tag")
        assert files(user) == {server.url("/x.pth"): RECORD}
    assert link.is_symlink()


def test_a_published_hash_needs_no_record(cache):
    with Server({"/x.pth": Reply(DATA)}) as server:
        weight = Weight(url=server.url("/x.pth"), sha256=RECORD["sha256"])
        path = fetch(weight, "toy")
        (cache / "vitarium.lock.json").write_text(written(weight.url, ANOTHER))
        assert fetch(weight, "toy") == path
        assert len(server.requests) == 1


def test_a_cached_file_is_recorded_in_a_lock_file_that_is_named_later(cache, tmp_path):
    with Server({"/x.pth": Reply(DATA)}) as server:
        weight = Weight(url=server.url("/x.pth"))
        path = fetch(weight, "toy.tag")
        assert fetch(weight, "toy.tag", lock_file=tmp_path / "mine.json") == path
        assert files(tmp_path / "mine.json") == {weight.url: RECORD}
        assert len(server.requests) == 1


def test_a_lock_file_is_not_written_where_nothing_changes(cache, user):
    with Server({"/x.pth": Reply(DATA)}) as server:
        weight = Weight(url=server.url("/x.pth"))
        fetch(weight, "toy")
        before = [path.stat().st_mtime_ns for path in (user, cache / "vitarium.lock.json")]
        fetch(weight, "toy")
        assert [p.stat().st_mtime_ns for p in (user, cache / "vitarium.lock.json")] == before


def test_a_download_that_disagrees_with_a_lock_file_is_refused(cache, user):
    with Server({"/x.pth": Reply(DATA)}) as server:
        weight = Weight(url=server.url("/x.pth"))
        user.write_text(written(weight.url, ANOTHER))
        with pytest.raises(CheckpointError, match="wrong file: expected sha256") as caught:
            fetch(weight, "toy.tag")
        assert f"as {user} records" in str(caught.value)
        assert "remove its entry there" in str(caught.value)
        assert files(user) == {weight.url: ANOTHER}
        user.unlink()
        path = fetch(weight, "toy.tag")
        path.unlink()
    with Server({"/x.pth": Reply(OTHER)}) as other:  # what was once recorded binds, too
        (cache / "vitarium.lock.json").write_text(written(other.url("/x.pth"), RECORD))
        user.unlink()
        with pytest.raises(CheckpointError, match=r"as .*vitarium\.lock\.json records"):
            fetch(Weight(url=other.url("/x.pth")), "toy.tag")


def test_a_cached_file_that_disagrees_with_a_lock_file_is_set_aside(cache, user):
    with Server({"/x.pth": [Reply(DATA), Reply(OTHER)]}) as server:
        weight = Weight(url=server.url("/x.pth"))
        path = fetch(weight, "toy.tag")
        user.write_text(written(weight.url, ANOTHER))
        with pytest.warns(UserWarning, match=rf"as {user} records, got .*{path.name}\.bad"):
            assert fetch(weight, "toy.tag").read_bytes() == OTHER
        assert path.with_name(path.name + ".bad").read_bytes() == DATA
        assert files(cache / "vitarium.lock.json") == {weight.url: ANOTHER}


@pytest.mark.parametrize("published", [{}, {"size": len(DATA)}])
def test_a_cached_file_without_a_record_is_not_trusted(published, cache):
    with Server({"/x.pth": Reply(DATA)}) as server:
        weight = Weight(url=server.url("/x.pth"), **published)
        fetch(weight, "toy.tag")
        (cache / "vitarium.lock.json").unlink()
        with pytest.warns(UserWarning, match="no record tells"):
            fetch(weight, "toy.tag")
        assert len(server.requests) == 2
        assert files(cache / "vitarium.lock.json") == {weight.url: RECORD}


@pytest.mark.parametrize(
    "content",
    [
        "",
        "[]",
        "{",
        "<<<<<<< ours",
        '{"files": {}}',
        '{"version": 2, "files": {}}',
        '{"version": 1, "files": []}',
        "[" * 100_000,
        written("u", {}),
        written("u", 3),
        written("u", RECORD | {"size": 0}),
        written("u", RECORD | {"size": "1"}),
        written("u", RECORD | {"size": True}),
        written("u", RECORD | {"sha256": "0"}),
        written("u", RECORD | {"sha256": None}),
        written("u", RECORD | {"name": None}),
        written("u", RECORD | {"url": "v"}),
        b"\xff\xfe",
    ],
)
def test_a_damaged_lock_file_is_named_and_left_as_it_is(content, user, cache):
    content = content if isinstance(content, bytes) else content.encode()
    user.write_bytes(content)
    with Server({"/x.pth": Reply(DATA)}) as server:
        with pytest.raises(CheckpointError, match=rf"{user}: (damaged|cannot read)"):
            fetch(Weight(url=server.url("/x.pth")), "toy")
        assert not server.requests
    assert user.read_bytes() == content
    assert not list(cache.glob("*.pth"))


def test_a_lock_file_that_cannot_be_written_is_named(tmp_path, cache):
    path = tmp_path / "lock.json"
    (tmp_path / "lock.json.new").mkdir()
    with Server({"/x.pth": Reply(DATA)}) as server:
        weight = Weight(url=server.url("/x.pth"))
        with pytest.raises(CheckpointError, match=f"{path}: cannot write this lock file"):
            fetch(weight, "toy", lock_file=path)
        assert not list(cache.glob("toy*.pth"))
        (tmp_path / "lock.json.new").rmdir()
        assert fetch(weight, "toy", lock_file=path).read_bytes() == DATA


def test_many_writers_lose_no_record(tmp_path):
    path = tmp_path / "lock.json"
    records = {
        f"https://example.org/{i}": lock.Record(f"toy{i}", i + 1, "0" * 64) for i in range(8)
    }
    threads = [
        threading.Thread(target=lock.record, args=(url, record, [path]))
        for url, record in records.items()
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert {url: lock.find(url, [path])[0] for url in records} == records
    assert not list(tmp_path.glob("*.new"))


def test_a_manual_file_is_adopted_and_then_found(local, cache, monkeypatch):
    path = adopt(MANUAL, "toy.tag", local)
    assert path.parent == cache
    assert path.read_bytes() == local.read_bytes() == DATA
    assert files(cache / "vitarium.lock.json") == {"manual:toy.tag": RECORD}
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert fetch(MANUAL, "toy.tag") == path
    with pytest.raises(CheckpointError, match="vitarium download toy.other --file"):
        fetch(MANUAL, "toy.other")


def test_an_adopted_file_that_is_damaged_is_set_aside_and_named(local):
    path = adopt(MANUAL, "toy.tag", local)
    path.write_bytes(OTHER)
    with pytest.raises(CheckpointError, match=rf"Sign in .*{path.name}\.bad"):
        fetch(MANUAL, "toy.tag")
    assert not path.exists()
    assert adopt(MANUAL, "toy.tag", local) == path
    assert fetch(MANUAL, "toy.tag") == path


def test_any_address_may_be_adopted_and_is_then_not_asked(local, tmp_path):
    with Server({}) as server:
        weight = Weight(url=server.url("/x.safetensors"), sha256=RECORD["sha256"])
        path = adopt(weight, "toy", os.fspath(local), cache_dir=tmp_path / "mine")
        assert path == fetch(weight, "toy", cache_dir=tmp_path / "mine")
        assert path.parent == tmp_path / "mine"
        assert not server.requests


@pytest.mark.parametrize(
    ("content", "weight", "message"),
    [
        (OTHER, Weight(manual="ask", sha256=RECORD["sha256"]), "wrong file: expected sha256"),
        (DATA, Weight(manual="ask", size=9), "wrong file: expected 9 bytes, got 20080"),
        (DATA[:9000], MANUAL, "truncated"),
        (b"<html></html>", MANUAL, "web page"),
        (None, MANUAL, "no such file"),
        (..., MANUAL, "got a folder"),
        (DATA, Weight(unreleased="lost"), "not released: lost"),
        (DATA, Weight(file="toy.safetensors"), "ships with the package"),
    ],
)
def test_what_is_not_the_file_is_not_adopted(content, weight, message, local, cache, tmp_path):
    if isinstance(content, bytes):
        local.write_bytes(content)
    else:
        local = tmp_path if content is ... else tmp_path / "missing.pth"
    with pytest.raises(CheckpointError, match=f"^toy.tag: .*{message}"):
        adopt(weight, "toy.tag", local)
    assert not [path for path in cache.glob("*") if path.suffix != ".lock"]


def test_a_local_file_that_cannot_be_read_is_blamed_and_not_the_cache(local, monkeypatch):
    def refused(*args):
        raise PermissionError(13, "Permission denied", str(local))

    monkeypatch.setattr("vitarium.checkpoints.download.check_structure", refused)
    with pytest.raises(CheckpointError, match=r"local\.pth: cannot be copied .*Permission denied"):
        adopt(MANUAL, "toy.tag", local)


def test_adopting_another_file_than_recorded_is_refused_and_the_first_one_stays(local, tmp_path):
    path = adopt(MANUAL, "toy.tag", local)
    other = tmp_path / "other.pth"
    other.write_bytes(OTHER)
    with pytest.raises(CheckpointError, match="vitarium.lock.json records, got .*remove its entry"):
        adopt(MANUAL, "toy.tag", other)
    assert path.read_bytes() == DATA
    assert fetch(MANUAL, "toy.tag") == path


def test_adopting_completes_what_a_download_began(local, cache):
    cut = Reply(DATA, cut=9000, headers={"ETag": '"1"'})
    with Server({"/x.pth": [cut, Reply(status=500)]}) as server:
        weight = Weight(url=server.url("/x.pth"))
        with pytest.raises(CheckpointError, match="HTTP 500"):
            fetch(weight, "toy.tag")
        assert list(cache.glob("*.part"))
        adopt(weight, "toy.tag", local)
    assert not list(cache.glob("*.part*"))


def test_a_licence_is_told_where_a_file_is_adopted(local):
    with pytest.warns(UserWarning, match="toy.tag: no licence is stated") as shown:
        adopt(MANUAL, "toy.tag", local)
    assert shown[0].filename == __file__
