"""One address over HTTP into a part: resumed where that is safe, retried, given up in time."""

from __future__ import annotations

import http.client
import os
import random
import re
import shutil
import ssl
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from email.message import Message
from email.utils import mktime_tz, parsedate_tz
from itertools import chain
from string import punctuation
from typing import Any

from vitarium.checkpoints.errors import CheckpointError
from vitarium.checkpoints.files import KINDS, kind_of
from vitarium.checkpoints.parts import Origin, Part
from vitarium.checkpoints.progress import Meter

_HUB = "https://huggingface.co/"
_CHUNK = 1 << 18
_HEAD = 512  # bytes that tell what a file is
_NAMED = 9  # bytes without which nothing can be told
_TIMEOUT = 10.0  # seconds to connect, and without a byte
_WINDOW = 30.0  # seconds over which the rate is taken
_SLOWEST = 1024  # bytes per second
_SYNC = 1.0  # seconds between two moments at which all is known to be on the disk
_PAUSES = (0.5, 2.0, 8.0)  # seconds before the second, third and fourth attempt
_STRIDE = 8 << 20  # bytes further than ever before, after which attempts are counted anew
_LONGEST_PAUSE = 60.0  # seconds, where a server asks for more
_SETTLED = 60.0  # seconds after which a file's date counts as a validator
_HOPS = 10
_REDIRECTS = {301, 302, 303, 307, 308}
_TRANSIENT = {408, 425, 429, 500, 502, 503, 504}
_RANGE = re.compile(r"bytes ([0-9]{1,18})-([0-9]{1,18})/([0-9]{1,18})")
_LINKED = re.compile('"?([0-9a-f]{64})"?')


class WrongFileError(CheckpointError):
    """What was written is not the file: nothing of it is worth keeping."""


class _TransientError(Exception):
    """Worth another attempt, after ``pause`` seconds if the server asked for them."""

    def __init__(self, message: str, pause: float = 0.0) -> None:
        super().__init__(message)
        self.pause = pause


@dataclass(frozen=True)
class Arrival:
    """How a complete part came about.

    Attributes:
        resumed: whether some of its bytes are from an earlier download.
        sha256: what the Hugging Face hub says that it holds, if it does.
    """

    resumed: bool
    sha256: str | None


def endpoint_address(url: str) -> str:
    """The address to ask: ``HF_ENDPOINT`` takes the place of https://huggingface.co.

    Raises:
        CheckpointError: that variable is no http or https address.
    """
    endpoint = os.environ.get("HF_ENDPOINT", "").rstrip("/")
    if not endpoint or not url.startswith(_HUB):
        return url
    if not re.fullmatch(r"https?://[!-~]+", endpoint):
        raise CheckpointError(f"HF_ENDPOINT: expected an http or https address, got {endpoint!r}")
    return f"{endpoint}/{url.removeprefix(_HUB)}"


def transfer(url: str, part: Part, size: int | None, hashed: bool, meter: Meter) -> Arrival:
    """Complete ``part`` with what an address sends.

    Args:
        url: the address; of the hub, ``HF_ENDPOINT`` counts.
        part: what an earlier download left is kept where it is safe.
        size: in bytes, where it is known.
        hashed: whether the caller knows the file's sha256 and checks it.
        meter: is told how far it is.

    Raises:
        WrongFileError: what came and was written is not the file.
        CheckpointError: the address refuses, sends something else from the first bytes on, or
            fails again and again; the part stays.
        OSError: the disk cannot be written.
    """
    furthest = part.size
    attempts = failures = 0
    while True:
        attempts += 1
        try:
            return _attempt(url, part, size, hashed, meter)
        except _TransientError as error:
            if part.size >= furthest + _STRIDE:
                furthest, failures = part.size, 0
            if failures == len(_PAUSES):
                raise CheckpointError(f"{error} ({attempts} attempts)") from error
            pause = max(_PAUSES[failures] * random.uniform(0.75, 1.25), error.pause)
            failures += 1
            time.sleep(min(pause, _LONGEST_PAUSE))


@dataclass(frozen=True)
class _Answer:
    response: http.client.HTTPResponse
    sha256: str | None


def _attempt(url: str, part: Part, size: int | None, hashed: bool, meter: Meter) -> Arrival:
    address = endpoint_address(url)
    offset = part.resumable(address, size, hashed)
    origin = part.origin()
    answer = _open(url, offset, origin)
    if offset and not _continues(answer.response, offset, origin, size, hashed):
        offset = 0
        if answer.response.status in (206, 416):
            answer.response.close()
            answer = _open(url)
    with answer.response as response:
        _check_answer(response, offset)
        _receive(response, address, part, offset, size, meter)
    return Arrival(offset > 0, answer.sha256)


def _receive(
    response: http.client.HTTPResponse,
    address: str,
    part: Part,
    offset: int,
    size: int | None,
    meter: Meter,
) -> None:
    """Write the body behind the part's first ``offset`` bytes, unless it is seen to be wrong."""
    announced = None if response.length is None else offset + response.length
    total = size if announced is None else announced
    chunks = _chunks(response)
    head = b""
    if not offset:
        head = _head(chunks)
        _check_kind(head, total)
    if size is not None and total != size:
        raise CheckpointError(f"sent the wrong file: expected {size} bytes, got {total}")
    needed = (total or 0) - part.size
    free = shutil.disk_usage(part.path.parent).free
    if needed > free:
        raise CheckpointError(f"needs {needed} bytes, and {part.path.parent} has {free} left")
    meter.begin(offset, total)
    received = offset
    with part.writing(offset, Origin(address, announced, _validator(response.headers))) as writer:
        synced = time.monotonic()
        for chunk in chain([head], chunks):
            received += len(chunk)
            if total is not None and received > total:
                raise WrongFileError(f"sends more than the expected {total} bytes")
            writer.write(chunk)
            meter.advance(len(chunk))
            if time.monotonic() - synced > _SYNC:
                writer.sync()
                synced = time.monotonic()
    if total is not None and received != total:
        raise _TransientError(f"the connection ended after {received} of {total} bytes")


def _continues(
    response: http.client.HTTPResponse,
    offset: int,
    origin: Origin | None,
    size: int | None,
    hashed: bool,
) -> bool:
    """Whether an answer is the rest of the very file whose beginning is there."""
    range_ = _RANGE.fullmatch(response.headers.get("Content-Range", ""))
    if response.status != 206 or range_ is None:
        return False
    first, last, total = map(int, range_.groups())
    return (
        first == offset
        and last == total - 1
        and response.length == total - offset
        and total == (size or (origin and origin.size) or total)
        and (hashed or (origin is not None and _validator(response.headers) == origin.validator))
    )


def _validator(headers: Message) -> str | None:
    """What changes whenever the file does, as If-Range wants it: ETag or Last-Modified."""
    etag, modified = headers.get("ETag", ""), headers.get("Last-Modified")
    if re.fullmatch('"[!#-~\x80-\xff]*"', etag):
        return etag
    # A file that has just been written may be written again without another date.
    then, now = _seconds(modified), _seconds(headers.get("Date"))
    settled = then is not None and now is not None and now - then >= _SETTLED
    return modified if settled else None


def _seconds(date: str | None) -> float | None:
    """An HTTP date in seconds since 1970."""
    parsed = parsedate_tz(date or "")
    try:
        return None if parsed is None else float(mktime_tz(parsed))
    except (ValueError, OverflowError):
        return None


def _open(url: str, offset: int = 0, origin: Origin | None = None) -> _Answer:
    """Ask for a file, or for its rest, and follow redirects; the answer may be an error page."""
    address = first = endpoint_address(url)
    headers = {"User-Agent": "vitarium", "Accept-Encoding": "identity"}
    if offset:
        headers["Range"] = f"bytes={offset}-"
        if origin is not None and origin.url == address and origin.validator is not None:
            headers["If-Range"] = origin.validator
    sha256 = None
    for _ in range(_HOPS):
        response = _request(address, headers)
        host = urllib.parse.urlsplit(address).netloc
        if url.startswith(_HUB) and host == urllib.parse.urlsplit(first).netloc:
            linked = _LINKED.fullmatch(response.headers.get("X-Linked-Etag", ""))
            sha256 = linked[1] if linked is not None else sha256
        if response.status not in _REDIRECTS:
            return _Answer(response, sha256)
        with response:
            address = _redirected(address, response.headers.get("Location", ""))
    raise CheckpointError(f"redirects more than {_HOPS} times")


def _redirected(address: str, location: str) -> str:
    """Where a redirect leads: on the web, and on https once there."""
    # Headers are read as Latin-1; the bytes are what the server means.
    quoted = urllib.parse.quote(location, safe=punctuation, encoding="latin-1")
    try:
        target = urllib.parse.urljoin(address, quoted)
        scheme = urllib.parse.urlsplit(target).scheme
    except ValueError as error:
        raise CheckpointError(f"redirects to {location!r}, which is no address") from error
    if scheme not in (("https",) if address.startswith("https:") else ("http", "https")):
        raise CheckpointError(f"redirects to {target}, which is not followed")
    return target


class _Answers(urllib.request.HTTPErrorProcessor):
    """Every answer is returned as it is: redirects and errors too."""

    def http_response(self, request: Any, response: Any) -> Any:
        return response

    https_response = http_response


def _request(address: str, headers: dict[str, str]) -> http.client.HTTPResponse:
    opener = urllib.request.build_opener(_Answers())
    try:
        request = urllib.request.Request(address, headers=headers)
        response: http.client.HTTPResponse = opener.open(request, timeout=_TIMEOUT)
    except urllib.error.URLError as error:
        if isinstance(error.reason, ssl.SSLCertVerificationError):
            raise CheckpointError(f"cannot be trusted: {error.reason}") from error
        raise _TransientError(f"cannot be reached: {error.reason}") from error
    except TimeoutError as error:
        raise _TransientError(f"no byte for {_TIMEOUT:g} seconds") from error
    except (OSError, http.client.HTTPException) as error:
        raise _TransientError(f"the connection broke: {error!r}") from error
    except (ValueError, OverflowError) as error:  # of a host's name or a port's number
        raise CheckpointError(f"{address} is no address: {error}") from error
    return response


def _check_answer(response: http.client.HTTPResponse, offset: int) -> None:
    """Refuse all but the file, or its rest where that was asked for."""
    if response.status != (206 if offset else 200):
        message = f"HTTP {response.status} {response.reason}"
        if response.status in _TRANSIENT:
            raise _TransientError(message, _retry_after(response.headers))
        raise CheckpointError(message)
    encoding = response.headers.get("Content-Encoding", "identity").strip().lower()
    if encoding != "identity":
        raise CheckpointError(f"sent it encoded as {encoding!r}, which was not asked for")


def _retry_after(headers: Message) -> float:
    value = headers.get("Retry-After", "").strip()
    if value.isdecimal():
        return float(value)
    date = _seconds(value)
    return 0.0 if date is None else max(0.0, date - time.time())


def _chunks(response: http.client.HTTPResponse) -> Iterator[bytes]:
    """The body as it comes, as long as it comes fast enough."""
    started, received = time.monotonic(), 0
    try:
        while chunk := response.read1(_CHUNK):
            yield chunk
            received += len(chunk)
            elapsed = time.monotonic() - started
            if elapsed > _WINDOW:
                if received < _SLOWEST * elapsed:
                    rate = received / elapsed
                    raise _TransientError(f"too slow: {rate:.0f} bytes per second")
                started, received = time.monotonic(), 0
    except TimeoutError as error:
        raise _TransientError(f"no byte for {_TIMEOUT:g} seconds") from error
    except (OSError, http.client.HTTPException) as error:
        raise _TransientError(f"the connection broke: {error!r}") from error


def _head(chunks: Iterator[bytes]) -> bytes:
    """The body's first bytes: enough to tell what it is, or all there are."""
    head = b""
    for chunk in chunks:
        head += chunk
        if len(head) >= _HEAD:
            break
    return head


def _check_kind(head: bytes, total: int | None) -> None:
    kind = kind_of(head)
    # A connection may break after a few bytes: then only what is plainly text is called so.
    cut = len(head) < _HEAD and len(head) != total
    text = len(head) >= _NAMED and head.lstrip().startswith((b"<", b"{", b"["))
    if kind not in KINDS and (text or not cut):
        raise CheckpointError(f"sent {kind} instead of a checkpoint")
