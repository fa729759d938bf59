"""Files from a hub, against one on loopback: transfer, cache, verification and its failures."""

import hashlib
import json
import os
import warnings

import huggingface_hub
import pytest
import torch
from hubs import COMMIT, Hub, large
from huggingface_hub import constants, file_download
from safetensors.torch import save
from servers import Server

from vitarium.checkpoints import CheckpointError, Weight, fetch, hub_file
from vitarium.checkpoints.hub import cached_hub_file

WEIGHTS = save({"x": torch.arange(1000.0)})
PICKLE = b"\x80\x02}q\x00."
FILES = {"model.safetensors": WEIGHTS, "pytorch_model.bin": PICKLE, "config.json": b'{"a": 1}'}
FILES |= {"folder/..x.pth": b"?"}
REPO = "someone/name"


@pytest.fixture
def hub(tmp_path, monkeypatch):
    with Hub({REPO: FILES, "someone/pickle": {"pytorch_model.bin": PICKLE}}) as server:
        point_at(server.url, monkeypatch)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_TELEMETRY", True)
        monkeypatch.setattr(huggingface_hub.utils._http.time, "sleep", lambda seconds: None)
        yield server


def point_at(url, monkeypatch):
    """What HF_ENDPOINT does when huggingface_hub is imported."""
    template = url + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "ENDPOINT", url)
    for module in (constants, file_download):  # the second in older versions
        monkeypatch.setattr(module, "HUGGINGFACE_CO_URL_TEMPLATE", template, raising=False)


def damage(path):
    """Flip a bit of what lies behind the path; the name and the length stay."""
    blob = path.resolve()
    content = bytearray(blob.read_bytes())
    content[-3] ^= 1
    blob.write_bytes(content)
    return blob


def test_a_file_is_downloaded_once(hub, tmp_path):
    path = hub_file(REPO)
    assert path.read_bytes() == WEIGHTS
    assert path.is_relative_to(tmp_path / "cache")
    head, get = hub.requests
    assert head == f"HEAD {REPO}/resolve/main/model.safetensors"
    assert get == f"GET {large(WEIGHTS)}"
    for revision in (None, "main", COMMIT):
        assert hub_file(REPO, revision=revision) == path
    assert len(hub.requests) == 2
    assert hub_file(REPO, revision="v1") == path
    assert hub.requests[2:] == [f"HEAD {REPO}/resolve/v1/model.safetensors"]


def test_which_file(hub):
    assert hub_file("someone/pickle").read_bytes() == PICKLE
    assert hub_file("someone/pickle").name == "pytorch_model.bin"
    assert hub.requests.count("HEAD someone/pickle/resolve/main/model.safetensors") == 1
    for name in ("config.json", "folder/..x.pth"):
        assert hub_file(REPO, name, "refs/pr/1").read_bytes() == FILES[name]


def test_another_folder(hub, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    path = hub_file(REPO, cache_dir="~/elsewhere")
    assert path.is_relative_to(tmp_path / "elsewhere")
    before = len(hub.requests)
    assert hub_file(REPO, cache_dir=tmp_path / "elsewhere") == path
    assert len(hub.requests) == before


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"], ids=["sha256", "git"])
def test_a_damaged_file_is_set_aside_and_downloaded_again(hub, name):
    blob = damage(hub_file(REPO, name))
    with pytest.warns(UserWarning, match=rf"downloaded anew.*expected the hash .*{blob}\.bad"):
        path = hub_file(REPO, name)
    assert path.read_bytes() == FILES[name]
    assert blob.with_name(blob.name + ".bad").exists()
    assert sum(request.startswith("GET") for request in hub.requests) == 2
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert hub_file(REPO, name) == path


def test_a_truncated_file_is_bad(hub):
    path = hub_file(REPO)
    os.truncate(path.resolve(), 100)
    with pytest.warns(UserWarning, match="downloaded anew"):
        assert hub_file(REPO).read_bytes() == WEIGHTS


def test_a_store_behind_the_cache_s_names(hub, tmp_path):
    """Where huggingface_hub keeps files of several repositories once, under hashes of its own."""
    path = hub_file(REPO)
    blob, store = path.resolve(), tmp_path / "cache" / "blobs" / "ff" / ("f" * 64)
    store.parent.mkdir(parents=True)
    blob.rename(store)
    blob.symlink_to(os.path.relpath(store, blob.parent))
    before = list(hub.requests)
    assert hub_file(REPO) == path
    assert hub.requests == before
    damage(path)
    with pytest.warns(UserWarning, match=rf"downloaded anew.*is now {store}\.bad"):
        assert hub_file(REPO).read_bytes() == WEIGHTS


def test_wrong_bytes_are_never_accepted(hub):
    wrong = WEIGHTS[:-1] + b"\x01"
    hub.sends[large(WEIGHTS)] = [wrong]
    with pytest.warns(UserWarning, match="downloaded anew"):
        assert hub_file(REPO).read_bytes() == WEIGHTS
    hub.sends[large(WEIGHTS)] = [wrong, wrong]
    damage(hub_file(REPO))
    with pytest.raises(
        CheckpointError, match="is not what the hub announces; the cached file was bad"
    ):
        hub_file(REPO)
    assert cached_hub_file(f"https://huggingface.co/{REPO}/resolve/main/model.safetensors") is None


def test_offline(hub, monkeypatch):
    path = hub_file(REPO)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    before = list(hub.requests)
    assert hub_file(REPO) == path
    with pytest.raises(CheckpointError, match=r"pickle: not in .*cache \(.*HF_HUB_OFFLINE forbids"):
        hub_file("someone/pickle")
    blob = damage(path)
    with pytest.raises(CheckpointError, match=rf"HF_HUB_OFFLINE.*expected the hash.*{blob}\.bad"):
        hub_file(REPO)
    assert hub.requests == before


def test_a_server_that_is_gone(hub, monkeypatch):
    path = hub_file(REPO)
    point_at("http://127.0.0.1:9", monkeypatch)
    assert hub_file(REPO) == path
    with pytest.raises(
        CheckpointError, match=r"pickle: cannot be had from http://127\.0\.0\.1:9: "
    ):
        hub_file("someone/pickle")


@pytest.mark.parametrize(
    ("status", "code", "words"),
    [
        (401, "RepoNotFound", r"has no such repository, or a private one, .*HF_TOKEN$"),
        (403, "GatedRepo", r"access must be asked for at http.*/someone/closed; .*HF_TOKEN$"),
        (404, "RevisionNotFound", "has no such revision$"),
        (404, "EntryNotFound", r"has no file model\.safetensors or pytorch_model\.bin$"),
        (401, "", r"answers HTTP 401$"),
        (500, "", r"answers HTTP 500$"),
        (429, "", r"answers HTTP 429$"),
    ],
)
def test_what_a_hub_may_answer(hub, status, code, words):
    hub.answers["someone/closed"] = (status, code)
    with pytest.raises(CheckpointError, match=f"^someone/closed@v1: .*{words}") as caught:
        hub_file("someone/closed", revision="v1")
    assert caught.value.__cause__ is not None or code == "EntryNotFound"
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "arguments",
    [
        *[("a/b/c",), ("../x",), (REPO, "../config.json"), (REPO, "a/.."), (REPO, "./a")],
        *[(REPO, "a//b"), (REPO, "/a"), (REPO, "a\\b"), (REPO, "c:/a"), (REPO, "a\0b"), (REPO, "")],
        *[(REPO, "a", "../main"), (REPO, "a", "refs/..")],
    ],
)
def test_names_that_no_hub_has(hub, arguments):
    with pytest.raises(CheckpointError, match="^" + arguments[0]):
        hub_file(*arguments)
    assert hub.requests == []


def test_another_server_than_a_hub(monkeypatch, hub):
    with Server({}) as server:
        point_at(server.url(""), monkeypatch)
        with pytest.raises(CheckpointError, match=f"^{REPO}: "):
            hub_file(REPO)


# Addresses of files that a hub has


URL = f"https://huggingface.co/{REPO}/resolve/main/model.safetensors"


def test_cached_files_are_found_by_their_address(hub):
    assert cached_hub_file(URL) is None
    path = hub_file(REPO)
    before = list(hub.requests)
    assert cached_hub_file(URL) == path
    assert cached_hub_file(f"{URL}?download=true") == path
    assert cached_hub_file(URL.replace("main", COMMIT)) == path
    others = [("main", "v2"), ("model.s", "other.s"), ("someone", ".."), ("huggingface", "example")]
    others += [("model.s", "%2e%2e/model.s"), ("/main/", "/%2e%2e/")]
    for old, new in others:
        assert cached_hub_file(URL.replace(old, new)) is None
    damage(path)
    assert cached_hub_file(URL) is None
    assert path.exists()
    assert hub.requests == before


def test_a_download_is_spared_where_the_hub_s_cache_has_the_file(hub, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")  # vitarium's own downloads
    path = hub_file(REPO)
    assert fetch(Weight(URL), "a") == path
    assert fetch(Weight(URL, size=len(WEIGHTS)), "a") == path
    for wrong in (Weight(URL, size=7), Weight(URL, sha256="0" * 64)):
        with pytest.raises(CheckpointError, match="not in the cache"):
            fetch(wrong, "a")


# Caches without names


@pytest.fixture
def plain_files(hub, tmp_path, monkeypatch):
    """A cache of plain files, as huggingface_hub has it where there are no symbolic links."""
    monkeypatch.setattr(file_download, "are_symlinks_supported", lambda folder: False)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    return tmp_path / "torch" / "hub" / "checkpoints" / "vitarium" / "vitarium.lock.json"


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"], ids=["sha256", "git"])
def test_without_links_the_lock_file_tells(hub, plain_files, name):
    hub.sends[large(WEIGHTS)] = [WEIGHTS[:-1] + b"\x01"] if name == "model.safetensors" else []
    with warnings.catch_warnings(record=True) as told:
        path = hub_file(REPO, name)
    assert ["downloaded anew" in str(warning.message) for warning in told] == (
        [True] if name == "model.safetensors" else []
    )
    assert not path.is_symlink()
    assert path.read_bytes() == FILES[name]
    assert json.loads(plain_files.read_text())["files"] == {
        f"https://huggingface.co/{REPO}/resolve/{COMMIT}/{name}": {
            "name": f"{REPO}/{name}",
            "size": len(FILES[name]),
            "sha256": hashlib.sha256(FILES[name]).hexdigest(),
        }
    }
    before = list(hub.requests)
    assert hub_file(REPO, name) == path
    assert hub.requests == before
    damage(path)
    with pytest.warns(UserWarning, match=rf"downloaded anew.*{path}\.bad"):
        assert hub_file(REPO, name).read_bytes() == FILES[name]


def test_a_file_of_unknown_hash_is_taken_as_it_is_seen_first(hub, plain_files):
    path = hub_file(REPO)
    plain_files.unlink()
    assert cached_hub_file(URL) is None
    with pytest.warns(UserWarning, match=f"{path}: its hash is not known, and {plain_files} now"):
        assert hub_file(REPO) == path
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert hub_file(REPO) == path
    assert cached_hub_file(URL) == path
    plain_files.unlink()
    os.truncate(path, 100)
    with pytest.warns(UserWarning, match="downloaded anew.*truncated or damaged"):
        assert hub_file(REPO).read_bytes() == WEIGHTS


def test_a_damaged_lock_file_is_no_fault_of_the_file(hub, plain_files):
    path = hub_file(REPO)
    plain_files.write_text("{")
    with pytest.raises(CheckpointError, match=f"{plain_files}: damaged lock file"):
        hub_file(REPO)
    assert path.read_bytes() == WEIGHTS
