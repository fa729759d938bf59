"""Downloads from a server that misbehaves: the right file or a clear error, nothing else."""

from __future__ import annotations

import hashlib
import io
import json
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import save
from servers import Reply, Server

from vitarium.checkpoints import CheckpointError, Weight, download, fetch

DATA = save({"a.weight": torch.arange(5000.0)})
SHA256 = hashlib.sha256(DATA).hexdigest()
OTHER = save({"a.weight": torch.arange(5000.0) + 1})
FLIPPED = DATA[:-9] + bytes([DATA[-9] ^ 1]) + DATA[-8:]
PAGE = b"<!DOCTYPE html><html><body>Sign in to continue</body></html>"


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty cache of one's own, no waiting, and nothing but the file in it afterwards."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    for variable in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setattr(download, "_PAUSES", (0.0, 0.0))
    monkeypatch.setattr(download, "_TIMEOUT", 5.0)
    folder = tmp_path / "torch" / "hub" / "checkpoints" / "vitarium"
    yield folder
    assert not list(folder.glob("*.part"))


def weights(folder: Path) -> list[Path]:
    """Files in the cache that would be loaded."""
    return [path for path in folder.glob("*") if path.suffix not in (".lock", ".json", ".bad")]


def test_a_file_is_downloaded_once_and_then_found_without_a_network(cache, monkeypatch):
    with Server({"/a/x.safetensors": Reply(DATA)}) as server:
        weight = Weight(url=server.url("/a/x.safetensors"), size=len(DATA), sha256=SHA256)
        path = fetch(weight, "toy.tag")
        assert path.parent == cache
        assert path.name.startswith("toy.tag-")
        assert path.suffix == ".safetensors"
        assert path.read_bytes() == DATA
        assert fetch(weight, "toy.tag") == path
        assert server.requests == ["/a/x.safetensors"]
    monkeypatch.setattr(download.urllib.request, "build_opener", None)
    assert fetch(weight, "toy.tag") == path


FAULTS = {
    "truncated": Reply(DATA[:9000], announce=len(DATA)),
    "reset": Reply(DATA[:9000], announce=len(DATA), end="reset"),
    "nothing at all": Reply(b"", announce=len(DATA)),
    "500": Reply(b"oops", status=500),
    "503": Reply(b"busy", status=503, headers={"Retry-After": "0"}),
    "429": Reply(b"slow down", status=429),
}


@pytest.mark.parametrize("fault", FAULTS.values(), ids=FAULTS.keys())
def test_a_passing_fault_is_retried(fault):
    with Server({"/x.pth": [fault, fault, Reply(DATA)]}) as server:
        path = fetch(Weight(url=server.url("/x.pth"), sha256=SHA256), "toy")
        assert path.read_bytes() == DATA
        assert len(server.requests) == 3


@pytest.mark.parametrize("known", [True, False], ids=["sha256", "no sha256"])
@pytest.mark.parametrize(
    ("reply", "message", "attempts"),
    [
        (FAULTS["truncated"], r"ended after 9000 of \d+ bytes \(3 attempts\)", 3),
        (FAULTS["reset"], "3 attempts", 3),
        (FAULTS["500"], "HTTP 500", 3),
        (Reply(b"gone", status=404), "HTTP 404", 1),
        (Reply(b"no", status=403), "HTTP 403", 1),
        (Reply(PAGE), "web page", 1),
        (Reply(PAGE * 100, headers={"Content-Type": "text/html"}), "web page", 1),
        (Reply(b'{"message": "rate limit"}'), "JSON", 1),
        (Reply(b""), "empty", 1),
        (Reply(DATA[:9000], announce="nothing"), r"truncated|ended after", None),
        (Reply(status=302, headers={"Location": "file:///etc/hostname"}), "not allowed", 1),
        (Reply(status=302, headers={"Location": "ftp://127.0.0.1/x"}), "not followed", 1),
        (Reply(status=302, headers={"Location": "/x.pth"}), "HTTP 302", None),
    ],
)
def test_a_lasting_fault_is_a_clear_error_and_leaves_no_file(
    reply, message, attempts, known, cache
):
    with Server({"/x.pth": reply}) as server:
        known_size = {"size": len(DATA), "sha256": SHA256} if known else {}
        weight = Weight(url=server.url("/x.pth"), **known_size)
        with pytest.raises(CheckpointError, match=message) as caught:
            fetch(weight, "toy.tag")
        assert attempts in (None, len(server.requests))
    assert "toy.tag" in str(caught.value)
    assert server.url("/x.pth") in str(caught.value)
    assert not weights(cache)


def test_a_server_that_stalls_is_given_up(cache, monkeypatch):
    monkeypatch.setattr(download, "_TIMEOUT", 0.2)
    with Server({"/x.pth": Reply(DATA[:9000], announce=len(DATA), end="stall")}) as server:
        with pytest.raises(CheckpointError, match=r"no byte for 0\.2 seconds \(3 attempts\)"):
            fetch(Weight(url=server.url("/x.pth")), "toy")
        assert len(server.requests) == 3
    assert not weights(cache)


@pytest.mark.parametrize(
    ("body", "known", "message"),
    [
        (FLIPPED, {"sha256": SHA256}, "sha256"),
        (OTHER, {"sha256": SHA256, "size": len(DATA)}, "sha256"),
        (save({"a": torch.ones(999)}), {"sha256": SHA256, "size": len(DATA)}, r"(expected|of) 200"),
        (DATA + b"x", {"size": len(DATA)}, r"(expected|of) 200"),
        (DATA, {"size": len(DATA) + 1}, r"(expected|of) 200"),
    ],
)
@pytest.mark.parametrize("announce", [None, "nothing"])
def test_the_wrong_bytes_are_refused(body, known, message, announce, cache):
    with (
        Server({"/x.pth": Reply(body, announce=announce)}) as server,
        pytest.raises(CheckpointError, match=message),
    ):
        fetch(Weight(url=server.url("/x.pth"), **known), "toy")
    assert not weights(cache)


def test_redirects_on_the_web_are_followed():
    replies = {
        "/x.pth": Reply(status=302, headers={"Location": "/y"}),
        "/y": Reply(DATA),
    }
    with Server(replies) as server:
        assert fetch(Weight(url=server.url("/x.pth")), "toy").read_bytes() == DATA


def test_a_redirect_never_leaves_https():
    request = download.urllib.request.Request("https://example.org/x.pth")
    with pytest.raises(CheckpointError, match="not followed"):
        download._Redirects().redirect_request(request, None, 302, "", {}, "http://example.org/y")


def test_proxies_are_taken_from_the_environment(monkeypatch):
    url = "http://example.invalid/x.pth"
    with Server({url: Reply(DATA)}) as server:
        monkeypatch.setenv("http_proxy", server.url(""))
        assert fetch(Weight(url=url), "toy").read_bytes() == DATA


def test_mirrors_are_tried_in_order_and_held_to_the_same_hash():
    replies = {"/b.pth": Reply(FLIPPED), "/c.pth": Reply(DATA), "/d.pth": Reply(DATA)}
    with Server(replies) as server:
        mirrors = tuple(server.url(path) for path in ("/b.pth", "/c.pth", "/d.pth"))
        weight = Weight(url=server.url("/a.pth"), mirrors=mirrors, sha256=SHA256)
        assert fetch(weight, "toy").read_bytes() == DATA
        assert server.requests == ["/a.pth", "/b.pth", "/c.pth"]


def test_an_unreachable_server_is_a_clear_error():
    with Server({}) as server:
        url = server.url("/x.pth")
    with pytest.raises(CheckpointError, match="cannot be reached"):
        fetch(Weight(url=url), "toy")


@pytest.mark.parametrize("known", [{}, {"size": len(DATA)}, {"sha256": SHA256}])
@pytest.mark.parametrize("damage", ["flip", "truncate"])
def test_a_damaged_cached_file_is_set_aside_named_and_replaced(known, damage, cache):
    with Server({"/x.pth": Reply(DATA)}) as server:
        weight = Weight(url=server.url("/x.pth"), **known)
        path = fetch(weight, "toy")
        path.write_bytes(FLIPPED if damage == "flip" else DATA[:9000])
        with pytest.warns(UserWarning, match=rf"{path.name}\.bad"):
            assert fetch(weight, "toy") == path
        assert len(server.requests) == 2
    assert path.read_bytes() == DATA
    assert path.with_name(path.name + ".bad").exists()


def test_a_first_download_without_a_hash_is_recorded(cache):
    with Server({"/x.pth": Reply(DATA)}) as server:
        path = fetch(Weight(url=server.url("/x.pth")), "toy")
        record = path.with_name(path.name + ".json")
        assert json.loads(record.read_text()) == {"size": len(DATA), "sha256": SHA256}
        assert record.parent == cache
        for damaged in ("", "[]", "{}", '{"size": 20080, "sha256": null}'):
            record.write_text(damaged)
            with pytest.warns(UserWarning, match="no record tells"):
                fetch(Weight(url=server.url("/x.pth")), "toy")
            assert json.loads(record.read_text())["sha256"] == SHA256


@pytest.mark.parametrize("variable", ["HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"])
def test_offline_uses_the_cache_and_never_asks(variable, cache, monkeypatch):
    with Server({"/x.pth": Reply(DATA), "/y.pth": Reply(DATA)}) as server:
        weight = Weight(url=server.url("/x.pth"))
        path = fetch(weight, "toy")
        monkeypatch.setenv(variable, "1")
        assert fetch(weight, "toy") == path
        with pytest.raises(CheckpointError, match=variable):
            fetch(Weight(url=server.url("/y.pth")), "toy")
        path.write_bytes(FLIPPED)
        with pytest.raises(CheckpointError, match=rf"{path.name}\.bad"):
            fetch(weight, "toy")
        assert server.requests == ["/x.pth"]
    assert not weights(cache)


def test_two_addresses_never_share_a_cached_file():
    with Server({"/x.pth": Reply(DATA), "/y.pth": Reply(OTHER)}) as server:
        first = fetch(Weight(url=server.url("/x.pth")), "toy")
        second = fetch(Weight(url=server.url("/y.pth")), "toy")
        assert first.read_bytes() == DATA
        assert second.read_bytes() == OTHER


def test_many_at_once_share_one_download():
    paths = []
    with Server({"/x.pth": Reply(DATA)}) as server:
        weight = Weight(url=server.url("/x.pth"))
        threads = [
            threading.Thread(target=lambda: paths.append(fetch(weight, "toy"))) for _ in range(6)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(server.requests) == 1
    assert len(paths) == 6
    assert len(set(paths)) == 1


def test_what_a_killed_download_left_is_written_over(cache):
    with Server({"/x.pth": Reply(DATA)}) as server:
        weight = Weight(url=server.url("/x.pth"))
        path = fetch(weight, "toy")
        path.unlink()
        path.with_name(path.name + ".part").write_bytes(DATA * 2)
        assert fetch(weight, "toy").read_bytes() == DATA


@pytest.mark.parametrize(
    "name", ["..", "a/b", "a\\b", "C:x", "a\0b", "a..b", "../x", "", ".hidden", "a b", "x" * 300]
)
def test_names_that_leave_the_cache_are_refused(name):
    with pytest.raises(CheckpointError, match="name"):
        fetch(Weight(url="http://127.0.0.1:9/x.pth"), name)
    with pytest.raises(CheckpointError, match="file"):
        Weight(file=name)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({}, "expected one of url"),
        ({"url": "https://example.org/x.pth", "manual": "ask"}, "expected one of url"),
        ({"url": "https://example.org/x.pth", "task": "depth"}, "task"),
        ({"url": "file:///etc/passwd"}, "url"),
        ({"url": "ftp://example.org/x.pth"}, "url"),
        ({"url": "https://example.org/a b.pth"}, "url"),
        ({"url": "https://[/x.pth"}, "url"),
        ({"url": "https://"}, "url"),
        ({"mirrors": ("https://example.org/x.pth",)}, "mirrors"),
        ({"url": "https://example.org/x.pth", "mirrors": ("x.pth",)}, "url"),
        ({"url": "https://example.org/x.pth", "size": 0}, "size"),
        ({"url": "https://example.org/x.pth", "sha256": "b"}, "sha256"),
        ({"url": "https://example.org/x.pth", "wrapper": "net"}, "wrapper"),
    ],
)
def test_a_weight_is_checked_when_it_is_written_down(kwargs, message):
    with pytest.raises(ValueError, match=message):
        Weight(**kwargs)


def test_a_packaged_file_is_used_where_it_is_and_verified(tmp_path, monkeypatch):
    monkeypatch.setattr(download, "_PACKAGED", tmp_path)
    (tmp_path / "toy.safetensors").write_bytes(DATA)
    weight = Weight(file="toy.safetensors", size=len(DATA), sha256=SHA256)
    assert fetch(weight, "toy") == tmp_path / "toy.safetensors"
    (tmp_path / "toy.safetensors").write_bytes(FLIPPED)
    with pytest.raises(CheckpointError, match="sha256"):
        fetch(weight, "toy")
    with pytest.raises(CheckpointError, match="cannot be read"):
        fetch(Weight(file="none.safetensors"), "toy")


def test_what_no_program_can_fetch_comes_with_instructions():
    with pytest.raises(CheckpointError, match=r"sign in at example\.org"):
        fetch(Weight(manual="To get it, sign in at example.org"), "toy")


def test_a_cache_that_cannot_be_written_is_a_clear_error(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "file"))
    with (
        Server({"/x.pth": Reply(DATA)}) as server,
        pytest.raises(CheckpointError, match="cannot write"),
    ):
        fetch(Weight(url=server.url("/x.pth")), "toy")
    assert not server.requests


def test_progress_is_shown_where_asked_for(capsys):
    with Server({"/x.pth": Reply(DATA)}) as server:
        fetch(Weight(url=server.url("/x.pth")), "quiet")
        assert capsys.readouterr() == ("", "")
        fetch(Weight(url=server.url("/x.pth")), "shown", progress=True)
    out, err = capsys.readouterr()
    assert not out
    assert "shown" in err
    assert "100%" in err or "20." in err


def test_a_zoo_model_is_created_from_a_url_and_then_without_a_network(cache, monkeypatch):
    torch.manual_seed(0)
    state = timm.create_model("nat_atto").state_dict()
    file = io.BytesIO()
    torch.save({"model": state}, file)

    def create(url: str) -> torch.nn.Module:
        overlay = {"url": url}
        return timm.create_model("nat_atto", pretrained=True, pretrained_cfg_overlay=overlay)

    replies = {"/nat.pth": Reply(file.getvalue()), "/bad.pth": Reply(PAGE)}
    with Server(replies) as server:
        url = server.url("/nat.pth")
        loaded = create(url).state_dict()
        assert all(torch.equal(loaded[name], state[name]) for name in state)
        with pytest.raises(CheckpointError, match="web page"):
            create(server.url("/bad.pth"))
        assert len(weights(cache)) == 1
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    loaded = create(url).state_dict()
    assert all(torch.equal(loaded[name], state[name]) for name in state)
