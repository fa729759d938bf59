"""Downloads from a server that misbehaves: the right file or a clear error, nothing else."""

from __future__ import annotations

import hashlib
import io
import json
import os
import signal
import subprocess
import sys
import threading
import time
import warnings
from dataclasses import replace
from email.utils import formatdate
from pathlib import Path
from typing import NamedTuple
from unittest.mock import ANY

import pytest
import timm
import torch
from safetensors.torch import save
from servers import Reply, Server

from vitarium.checkpoints import CheckpointError, Weight, download, fetch, transport

pytestmark = [
    pytest.mark.usefixtures("cache"),
    pytest.mark.filterwarnings("ignore:.*no licence is stated"),
]

DATA = save({"a.weight": torch.arange(5000.0)})
SHA256 = hashlib.sha256(DATA).hexdigest()
OTHER = save({"a.weight": torch.arange(5000.0) + 1})
LONGER = save({"a.weight": torch.arange(6000.0)})
FLIPPED = DATA[:-9] + bytes([DATA[-9] ^ 1]) + DATA[-8:]
PAGE = b"<!DOCTYPE html><html><body>Sign in to continue</body></html>"
KNOWN = {"size": len(DATA), "sha256": SHA256}

ENV = os.environ | {"PYTHONPATH": str(Path(__file__).parent.parent), "OMP_NUM_THREADS": "1"}

FINE = Reply(DATA, ranges=True, headers={"ETag": '"1"'})
CUT = replace(FINE, cut=9000)
REST = "bytes=9000-"


def weights(folder: Path) -> list[Path]:
    """Files in the cache that would be loaded."""
    others = (".lock", ".json", ".bad", ".part")
    return [path for path in folder.glob("*") if path.suffix not in others]


def taken(folder: Path) -> bytes:
    """What the one part in the cache holds; it is removed, with its record."""
    (part,) = folder.glob("*.part")
    content = part.read_bytes()
    part.unlink()
    part.with_name(part.name + ".json").unlink()
    return content


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
    monkeypatch.setattr(transport.urllib.request, "build_opener", None)
    assert fetch(weight, "toy.tag") == path


class Fault(NamedTuple):
    """What a server answers in turn, and what must come of it: the file's bytes or an error.

    ``second`` is the Range header of the second request; both come with and without a known hash.
    """

    replies: list[Reply]
    known: bytes | str = DATA
    unknown: bytes | str = DATA
    second: tuple[str | None, str | None] = (None, None)


def both(error: str, *replies: Reply) -> Fault:
    return Fault(list(replies), error, error)


def redirect(location: str) -> Reply:
    return Reply(PAGE, status=302, headers={"Location": location})


def part_of(body: bytes, start: int, total: int, **headers: str) -> Reply:
    content_range = f"bytes {start}-{total - 1}/{total}"
    return Reply(body[start:], 206, {"Content-Range": content_range, **headers})


FAULTS = {
    "truncated": Fault([CUT, FINE], second=(REST, REST)),
    "truncated twice": Fault([CUT, CUT, FINE], second=(REST, REST)),
    "truncated, no validator": Fault([replace(CUT, headers={}), FINE], second=(REST, None)),
    "truncated, weak validator": Fault(
        [replace(CUT, headers={"ETag": 'W/"1"'}), FINE], second=(REST, None)
    ),
    "reset": Fault([replace(CUT, end="reset"), FINE], second=(ANY, ANY)),
    "stall": Fault([replace(CUT, end="stall"), FINE], second=(REST, REST)),
    "trickle": Fault([replace(CUT, step=1, pause=0.01), FINE], second=(ANY, ANY)),
    "no byte": Fault([replace(FINE, cut=0), FINE]),
    "announced too long": Fault(
        [replace(FINE, announce=len(DATA) + 1)] * 7,
        r"expected 20080 bytes, got 20081",
        r"ended after 20080 of 20081 bytes \(4 attempts\)",
        second=(ANY, "bytes=20080-"),
    ),
    "announced too short": Fault(
        [replace(FINE, announce=9000)], "expected 20080 bytes, got 9000", "truncated"
    ),
    "wrong length": Fault([Reply(LONGER)], "expected 20080 bytes, got 24080", LONGER),
    "wrong length, unannounced": Fault(
        [Reply(LONGER, announce="nothing")], "more than the expected 20080 bytes", LONGER
    ),
    "truncated, unannounced": Fault(
        [Reply(DATA[:9000], announce="nothing")] * 4,
        r"ended after 9000 of 20080 bytes \(4 attempts\)",
        "truncated",
        second=(REST, None),
    ),
    "wrong bytes": Fault([Reply(FLIPPED)], "wrong file: expected sha256", FLIPPED),
    "404": both("HTTP 404", Reply(b"gone", status=404)),
    "403": both("HTTP 403", Reply(b"no", status=403)),
    "204": both("HTTP 204", Reply(status=204)),
    "206 unasked": both("HTTP 206", Reply(DATA, status=206)),
    "429, then fine": Fault([Reply(b"slow down", status=429), FINE]),
    "500, then fine": Fault([Reply(b"oops", status=500), FINE]),
    "500 for ever": both(r"HTTP 500 .*\(4 attempts\)", *[Reply(b"oops", status=500)] * 4),
    "redirected": Fault([redirect("/y.pth")]),
    "redirected in a circle": both("redirects more than 10 times", *[redirect("/x.pth")] * 10),
    "redirected to a file": both("file:///x, which is not followed", redirect("file:///x")),
    "redirected to ftp": both("ftp://127.0.0.1/x, which is not", redirect("ftp://127.0.0.1/x")),
    "redirected nowhere": both("no address", redirect("http://[")),
    "redirected to no host": both("is no address", redirect("http://a..b/x")),
    "HTML page": both("web page", Reply(PAGE)),
    "HTML page, long": both("web page", Reply(PAGE * 100)),
    "HTML page, unannounced": both("web page", Reply(PAGE, announce="nothing")),
    "HTML page, truncated": both("web page", Reply(PAGE, announce=len(DATA))),
    "JSON": both("JSON", Reply(b'{"message": "rate limit"}')),
    "empty": both("empty", Reply(b"")),
    "encoded": both("encoded as 'gzip'", replace(FINE, headers={"Content-Encoding": "gzip"})),
    "range ignored": Fault([CUT, replace(FINE, ranges=False)], second=(REST, REST)),
    "range refused": Fault([CUT, Reply(status=416), FINE], second=(REST, REST)),
    "wrong range": Fault(
        [CUT, part_of(DATA, 8000, len(DATA), ETag='"1"'), FINE], second=(REST, REST)
    ),
    "range of another place": Fault(
        [
            CUT,
            Reply(DATA[9000:], 206, {"Content-Range": "bytes 8000-20079/20080", "ETag": '"1"'}),
            FINE,
        ],
        second=(REST, REST),
    ),
    "range without its place": Fault([CUT, Reply(DATA[9000:], 206), FINE], second=(REST, REST)),
    "range of another length": Fault(
        [CUT, part_of(DATA + b"x", 9000, len(DATA) + 1, ETag='"1"'), FINE], second=(REST, REST)
    ),
    "changed meanwhile": Fault(
        [replace(CUT, body=OTHER, headers={"ETag": '"0"'}), FINE], second=(REST, REST)
    ),
    "changed meanwhile, If-Range ignored": Fault(
        [
            replace(CUT, body=OTHER, headers={"ETag": '"0"'}),
            part_of(DATA, 9000, len(DATA), ETag='"1"'),
            FINE,
        ],
        second=(REST, REST),
    ),
}


@pytest.mark.parametrize("known", [True, False], ids=["sha256", "no sha256"])
@pytest.mark.parametrize("fault", FAULTS.values(), ids=FAULTS.keys())
def test_every_fault_ends_in_the_right_file_or_a_clear_error(fault, known, cache, monkeypatch):
    monkeypatch.setattr(transport, "_TIMEOUT", 0.3)
    monkeypatch.setattr(transport, "_WINDOW", 0.2)
    outcome, second = (fault.known if known else fault.unknown), fault.second[not known]
    too_many = Reply(b"one request too many", status=418)
    with Server({"/x.pth": [*fault.replies, too_many], "/y.pth": FINE}) as server:
        weight = Weight(url=server.url("/x.pth"), **(KNOWN if known else {}))
        if isinstance(outcome, bytes):
            path = fetch(weight, "toy")
            assert path.read_bytes() == outcome
            assert fetch(weight, "toy") == path
            assert weights(cache) == [path]
            assert server.requests.count("/x.pth") == len(fault.replies)
        else:
            with pytest.raises(CheckpointError, match=outcome) as caught:
                fetch(weight, "toy.tag")
            assert str(caught.value).startswith("toy.tag: ")
            assert weight.url in str(caught.value)
            assert not weights(cache)
            if "attempts" in outcome and second is not None:
                assert DATA.startswith(taken(cache))
        assert server.ranges[1:2] in ([], [second])


def test_what_a_lasting_fault_left_is_completed_by_the_next_call(cache):
    with Server({"/x.pth": [CUT, *[Reply(status=500)] * 3, FINE]}) as server:
        weight = Weight(url=server.url("/x.pth"))
        with pytest.raises(CheckpointError, match=r"HTTP 500 .*\(4 attempts\)"):
            fetch(weight, "toy")
        assert not weights(cache)
        assert fetch(weight, "toy").read_bytes() == DATA
        assert server.ranges == [None, *[REST] * 4]
        assert server.headers[-1]["If-Range"] == '"1"'
        assert server.headers[0]["Accept-Encoding"] == "identity"


@pytest.mark.parametrize("known", [{}, KNOWN], ids=["no sha256", "sha256"])
def test_a_page_in_place_of_the_rest_does_not_cost_what_is_there(known):
    with Server({"/x.pth": [CUT, Reply(PAGE), FINE]}) as server:
        weight = Weight(url=server.url("/x.pth"), **known)
        with pytest.raises(CheckpointError, match="web page"):
            fetch(weight, "toy")
        assert fetch(weight, "toy").read_bytes() == DATA
        assert server.ranges == [None, REST, REST]


@pytest.mark.parametrize("announce", ["nothing", 9000])
def test_the_old_format_cut_short_is_never_recorded(announce, cache):
    file = io.BytesIO()
    torch.save({"a.weight": torch.arange(5000.0)}, file, _use_new_zipfile_serialization=False)
    whole = file.getvalue()
    cut = Reply(whole[:9000], announce=announce)
    with Server({"/x.pth": [cut, Reply(whole)]}) as server:
        weight = Weight(url=server.url("/x.pth"))
        with pytest.raises(CheckpointError, match="truncated"):
            fetch(weight, "toy")
        assert not weights(cache)
        assert fetch(weight, "toy").read_bytes() == whole


def test_what_an_interrupt_left_is_completed_by_the_next_call(cache, monkeypatch):
    def interrupted(*args):
        raise KeyboardInterrupt

    moments = (
        "vitarium.checkpoints.progress.Meter.advance",  # one chunk is written
        "vitarium.checkpoints.lock.record",  # the part is complete
    )
    with Server({"/x.pth": [replace(FINE, step=9000, pause=0.1), FINE]}) as server:
        weight = Weight(url=server.url("/x.pth"))
        for moment in moments:
            with monkeypatch.context() as patch:
                patch.setattr(moment, interrupted)
                with pytest.raises(KeyboardInterrupt):
                    fetch(weight, "toy")
            assert not weights(cache)
        assert fetch(weight, "toy").read_bytes() == DATA
        first, second, third = server.ranges
        assert first is None
        assert 0 < int(second[len("bytes=") : -1]) <= 9000
        assert third == f"bytes={len(DATA) - 1}-"


KILLED = """
import sys, threading
from vitarium.checkpoints import Weight, fetch, transport
transport._SYNC = 0.0
urls, sha256 = sys.argv[1:3], sys.argv[3]
weights = {"known": Weight(urls[0], sha256=sha256), "unknown": Weight(urls[1])}
for name, weight in weights.items():
    threading.Thread(target=fetch, args=(weight, name)).start()
"""


def test_what_a_killed_process_left_is_completed_by_the_next(cache):
    slow = replace(FINE, step=1000, pause=0.1)
    with Server({"/known.pth": [slow, FINE], "/unknown.pth": [slow, FINE]}) as server:
        urls = [server.url("/known.pth"), server.url("/unknown.pth")]
        child = subprocess.Popen(
            [sys.executable, "-c", KILLED, *urls, SHA256],
            env=ENV | {"TORCH_HOME": os.environ["TORCH_HOME"]},
        )
        deadline = time.monotonic() + 60
        while len(grown(cache)) < 2 and time.monotonic() < deadline:
            time.sleep(0.01)
        child.send_signal(signal.SIGKILL)
        assert child.wait() == -signal.SIGKILL
        assert not weights(cache)
        for name, url in zip(("known", "unknown"), urls, strict=True):
            weight = Weight(url=url, sha256=SHA256 if name == "known" else None)
            assert fetch(weight, name).read_bytes() == DATA
            start = int(server.ranges[-1].removeprefix("bytes=").removesuffix("-"))
            assert 1000 <= start < len(DATA)
        assert len(server.requests) == 4


def grown(folder: Path) -> list[Path]:
    """Parts that hold more than their record promises at first."""
    records = [json.loads(path.read_text()) for path in folder.glob("*.part.json")]
    return [record for record in records if record["synced"] >= 1000]


def test_a_bad_end_of_a_resumed_file_is_downloaded_once_more_from_the_start(cache):
    lying = replace(CUT, body=OTHER)
    with Server({"/x.pth": [lying, FINE, FINE]}) as server:
        weight = Weight(url=server.url("/x.pth"), **KNOWN)
        assert fetch(weight, "toy").read_bytes() == DATA
        assert server.ranges == [None, REST, None]
    with Server({"/y.pth": [CUT, *[replace(FINE, body=OTHER)] * 2]}) as server:
        with pytest.raises(CheckpointError, match="expected sha256"):
            fetch(Weight(url=server.url("/y.pth"), **KNOWN), "toy")
        assert server.ranges == [None, REST, None]


@pytest.mark.parametrize("known", [True, False], ids=["sha256", "no sha256"])
def test_a_mirror_completes_a_part_only_where_the_hash_is_known(known):
    with Server({"/a.pth": [CUT, Reply(status=500)], "/b.pth": FINE}) as server:
        weight = Weight(
            url=server.url("/a.pth"),
            mirrors=(server.url("/b.pth"),),
            sha256=SHA256 if known else None,
        )
        assert fetch(weight, "toy").read_bytes() == DATA
        assert server.requests == ["/a.pth"] * 4 + ["/b.pth"]
        assert server.ranges[-1] == (REST if known else None)
        assert "If-Range" not in server.headers[-1]


@pytest.mark.parametrize(("age", "second"), [(3600, REST), (1, None)])
def test_a_date_is_a_validator_once_it_has_settled(age, second):
    dated = {"Last-Modified": formatdate(time.time() - age, usegmt=True)}
    replies = [replace(CUT, headers=dated), replace(FINE, headers=dated)]
    with Server({"/x.pth": replies}) as server:
        assert fetch(Weight(url=server.url("/x.pth")), "toy").read_bytes() == DATA
        assert server.ranges == [None, second]
        assert server.headers[-1].get("If-Range") == (dated["Last-Modified"] if second else None)


def damaged(validator: object) -> str:
    return json.dumps({"url": "URL", "size": len(DATA), "validator": validator, "synced": 9000})


@pytest.mark.parametrize(
    "damage",
    ["", "{", "[]", '{"url": 1}', "no file", "[" * 100_000]
    + [damaged(validator) for validator in ([], "1\r\nX: y", "\u2603")],
)
def test_a_part_without_a_good_record_is_started_again(damage, cache):
    with Server({"/x.pth": [CUT, *[Reply(status=500)] * 3, FINE]}) as server:
        weight = Weight(url=server.url("/x.pth"))
        with pytest.raises(CheckpointError):
            fetch(weight, "toy")
        (record,) = cache.glob("*.part.json")
        if damage == "no file":
            record.unlink()
        else:
            record.write_text(damage.replace("URL", weight.url))
        assert fetch(weight, "toy").read_bytes() == DATA
        assert server.ranges[-1] is None


def test_nothing_is_written_through_a_link_in_the_part_s_place(cache, tmp_path):
    precious = tmp_path / "precious"
    precious.write_bytes(DATA[:9000])
    with Server({"/x.pth": FINE}) as server:
        for known in ({}, KNOWN):
            weight = Weight(url=server.url("/x.pth"), **known)
            path = fetch(weight, "toy")
            path.unlink()
            path.with_name(path.name + ".part").symlink_to(precious)
            assert fetch(weight, "toy").read_bytes() == DATA
            assert not path.is_symlink()
            path.unlink()
        assert server.ranges == [None] * 4
    assert precious.read_bytes() == DATA[:9000]


def test_bytes_that_may_not_have_reached_the_disk_are_asked_for_again(cache):
    with Server({"/x.pth": [CUT, *[Reply(status=500)] * 3, FINE]}) as server:
        weight = Weight(url=server.url("/x.pth"))
        with pytest.raises(CheckpointError):
            fetch(weight, "toy")
        (part,) = cache.glob("*.part")
        with part.open("ab") as file:
            file.write(bytes(len(DATA)))  # as after a power cut
        assert fetch(weight, "toy").read_bytes() == DATA
        assert server.ranges[-1] == REST


def test_attempts_count_anew_after_a_stride(monkeypatch):
    monkeypatch.setattr(transport, "_STRIDE", 2000)
    with Server({"/x.pth": replace(FINE, cut=2000)}) as server:
        assert fetch(Weight(url=server.url("/x.pth")), "toy").read_bytes() == DATA
        assert server.ranges == [None, *[f"bytes={start}-" for start in range(2000, 20080, 2000)]]


@pytest.mark.parametrize(
    ("value", "least", "most"),
    [
        ("7", 7, 7),
        ("9" * 400, 60, 60),
        (lambda: formatdate(time.time() + 30, usegmt=True), 28, 30),
        (lambda: formatdate(time.time() - 30, usegmt=True), 0.7, 1.3),
        ("soon", 0.7, 1.3),
    ],
)
def test_pauses_grow_and_a_server_may_ask_for_more(value, least, most, monkeypatch):
    pauses = []
    monkeypatch.setattr(transport, "_PAUSES", (1.0, 2.0, 4.0))
    monkeypatch.setattr(transport.time, "sleep", pauses.append)
    headers = {"Retry-After": value() if callable(value) else value}
    busy = Reply(status=503, headers=headers)
    with Server({"/x.pth": [busy, Reply(status=500), Reply(status=500), FINE]}) as server:
        fetch(Weight(url=server.url("/x.pth")), "toy")
    first, second, third = pauses
    assert least <= first <= most
    assert 1.5 <= second <= 2.5
    assert 3 <= third <= 5


@pytest.mark.parametrize(
    ("replies", "message"),
    [
        (replace(CUT, end="stall"), r"no byte for 0\.2 seconds"),
        (replace(FINE, step=600, pause=0.1), r"too slow: \d+ bytes per second"),
    ],
)
def test_a_server_that_stalls_or_trickles_is_given_up(replies, message, cache, monkeypatch):
    monkeypatch.setattr(transport, "_TIMEOUT", 0.2)
    monkeypatch.setattr(transport, "_WINDOW", 0.3)
    monkeypatch.setattr(transport, "_SLOWEST", 100_000)
    monkeypatch.setattr(transport, "_PAUSES", (0.0,))
    with Server({"/x.pth": replies}) as server:
        with pytest.raises(CheckpointError, match=rf"{message} \(2 attempts\)"):
            fetch(Weight(url=server.url("/x.pth")), "toy")
        assert len(server.requests) == 2
    assert not weights(cache)
    assert DATA.startswith(taken(cache))


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
    if list(cache.glob("*.part")):  # an end without an announced length may be a broken connection
        assert len(taken(cache)) < known["size"]


def test_redirects_on_the_web_are_followed():
    replies = {
        "/x.pth": Reply(status=302, headers={"Location": "/y"}),
        "/y": Reply(DATA),
    }
    with Server(replies) as server:
        assert fetch(Weight(url=server.url("/x.pth")), "toy").read_bytes() == DATA


def test_a_redirect_never_leaves_https():
    assert transport._redirected("http://a.org/x", "https://b.org/y z") == "https://b.org/y%20z"
    assert transport._redirected("https://a.org/x", "/y") == "https://a.org/y"
    as_read = "/é".encode().decode("latin-1")
    assert transport._redirected("https://a.org/x", as_read) == "https://a.org/%C3%A9"
    with pytest.raises(CheckpointError, match="not followed"):
        transport._redirected("https://a.org/x.pth", "http://a.org/y")


HUB = "https://huggingface.co/org/model/resolve/main/x.safetensors"
PLACE = "/hub/org/model/resolve/main/x.safetensors"


@pytest.mark.parametrize("where", ["redirect", "answer"])
@pytest.mark.parametrize("stated", [SHA256, "0" * 64, SHA256[:40]])
def test_what_the_hub_states_is_checked(stated, where, monkeypatch):
    linked = {"X-Linked-Etag": f'"{stated}"'}
    replies = {
        "redirect": {
            PLACE: Reply(status=302, headers={**linked, "Location": "/cdn/x"}),
            "/cdn/x": FINE,
        },
        "answer": {PLACE: replace(FINE, headers=linked)},
    }
    with Server(replies[where]) as server:
        monkeypatch.setenv("HF_ENDPOINT", server.url("/hub/"))
        if stated == "0" * 64:
            with pytest.raises(CheckpointError, match="the hub states sha256 0000"):
                fetch(Weight(url=HUB), "toy")
        else:
            path = fetch(Weight(url=HUB), "toy")
            assert path.read_bytes() == DATA
            monkeypatch.delenv("HF_ENDPOINT")  # neither the cache nor the lock file depends on it
            assert fetch(Weight(url=HUB), "toy") == path


def test_only_the_hub_may_state_a_hash(monkeypatch):
    linked = {"X-Linked-Etag": "0" * 64}
    with Server({"/cdn/x": replace(FINE, headers=linked)}) as other:
        away = Reply(status=302, headers={"Location": other.url("/cdn/x")})
        with Server({PLACE: away}) as server:
            monkeypatch.setenv("HF_ENDPOINT", server.url("/hub"))
            assert fetch(Weight(url=HUB), "toy").read_bytes() == DATA
    with Server({"/x.pth": replace(FINE, headers=linked)}) as server:
        assert fetch(Weight(url=server.url("/x.pth")), "toy").read_bytes() == DATA
    with Server({"/hub/x.pth": Reply(status=404)}) as server:
        monkeypatch.setenv("HF_ENDPOINT", "ftp://example.org")
        with pytest.raises(CheckpointError, match="HF_ENDPOINT: expected an http or https"):
            fetch(Weight(url=HUB), "other")
        monkeypatch.setenv("HF_ENDPOINT", "http://[bad")
        with pytest.raises(CheckpointError, match=r"http://\[bad/org/.* is no address"):
            fetch(Weight(url=HUB), "other")


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


def test_a_process_that_waits_says_so(cache, capsys, monkeypatch):
    started, go_on = threading.Event(), threading.Event()
    original = download.transfer

    def transfer(*args):
        started.set()
        assert go_on.wait(10)
        return original(*args)

    monkeypatch.setattr(download, "transfer", transfer)
    monkeypatch.setattr("sys.stderr.isatty", lambda: False, raising=False)
    with Server({"/x.pth": FINE}) as server:
        weight = Weight(url=server.url("/x.pth"))
        threads = [threading.Thread(target=fetch, args=(weight, "toy"))]
        threads[0].start()
        assert started.wait(10)
        for progress in (None, True):
            threads.append(threading.Thread(target=fetch, args=(weight, "toy", progress)))
            threads[-1].start()
        deadline = time.monotonic() + 10
        err = ""
        while "waiting" not in err and time.monotonic() < deadline:
            time.sleep(0.01)
            err += capsys.readouterr().err
        go_on.set()
        for thread in threads:
            thread.join()
        assert len(server.requests) == 1
    assert err.count("toy: waiting for another process") == 1


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


def test_what_no_program_can_fetch_comes_with_instructions(cache):
    with pytest.raises(CheckpointError, match=r"sign in at example\.org\. Then run") as caught:
        fetch(Weight(manual="To get it, sign in at example.org."), "toy.tag")
    assert "`vitarium download toy.tag --file FILE`" in str(caught.value)
    assert "pretrained_cfg_overlay=dict(file=...)" in str(caught.value)
    with pytest.raises(CheckpointError, match="or pass it as FeatureBackbone's checkpoint"):
        fetch(Weight(manual="Sign in", task="det"), "toy.tag")
    assert not cache.exists()


def test_what_was_never_released_is_called_so():
    with pytest.raises(CheckpointError, match="toy: not released: its authors lost it"):
        fetch(Weight(unreleased="its authors lost it"), "toy")


def test_the_cache_moves_where_it_is_told(cache, tmp_path, monkeypatch):
    with Server({"/x.pth": FINE}) as server:
        path = fetch(Weight(url=server.url("/x.pth")), "toy", cache_dir=tmp_path / "mine")
        assert path.parent == tmp_path / "mine"
        assert (tmp_path / "mine" / "vitarium.lock.json").exists()
        assert not cache.exists()
        monkeypatch.setenv("HOME", str(tmp_path))
        assert fetch(Weight(url=server.url("/x.pth")), "toy", cache_dir="~/mine") == path


@pytest.mark.parametrize(
    ("licence", "said"),
    [
        ("none stated", "no licence is stated"),
        ("for non commercial use", "forbids commercial use"),
        ("research use only", "forbids commercial use"),
        ("CC-BY-NC-4.0", "CC-BY-NC-4.0, forbids commercial use"),
        ("cc-by-nc-sa-4.0", "forbids commercial use"),
        ("MIT", None),
        ("Apache-2.0", None),
    ],
)
def test_a_licence_that_withholds_something_is_said_at_the_download_only(licence, said):
    with Server({"/x.pth": FINE}) as server, warnings.catch_warnings(record=True) as shown:
        warnings.simplefilter("always")
        weight = Weight(url=server.url("/x.pth"), licence=licence)
        fetch(weight, "toy.tag")
        fetch(weight, "toy.tag")
    messages = [str(warning.message) for warning in shown]
    assert len(messages) == (said is not None)
    for warning in shown:
        assert str(warning.message).startswith("toy.tag: ")
        assert said in str(warning.message)
        assert warning.filename == __file__


def test_a_cache_that_cannot_be_written_is_a_clear_error(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "file"))
    with (
        Server({"/x.pth": Reply(DATA)}) as server,
        pytest.raises(CheckpointError, match="cannot write"),
    ):
        fetch(Weight(url=server.url("/x.pth")), "toy")
    assert not server.requests


def test_a_cache_that_cannot_be_looked_into_is_a_clear_error(cache, monkeypatch):
    def refused(*args, **kwargs):
        raise PermissionError(13, "Permission denied")

    with monkeypatch.context() as patch:
        patch.setattr("pathlib.Path.stat", refused)
        patch.setattr("pathlib.Path.mkdir", refused)
        with pytest.raises(CheckpointError, match="cannot write to the cache .*Permission denied"):
            fetch(Weight(url="http://127.0.0.1:9/x.pth"), "toy")


def test_a_program_without_a_console_downloads_too(monkeypatch):
    monkeypatch.setattr("sys.stderr", None)
    with Server({"/x.pth": FINE}) as server:
        for name, progress in (("a", None), ("b", True)):
            fetch(Weight(url=server.url("/x.pth"), licence="MIT"), name, progress=progress)


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


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_who_survives_a_killed_download_has_the_right_weights():
    storm = Path(__file__).with_name("download_storm.py")
    argv = [sys.executable, str(storm), "--rounds", "2", "--processes", "3"]
    result = subprocess.run(argv, capture_output=True, text=True, env=ENV, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "2 of 2 rounds right: 4 of 4 survivors" in result.stdout
