"""Weights on this machine: shipped, cached or downloaded, and verified every time."""

from __future__ import annotations

import hashlib
import http.client
import json
import os
import shutil
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch.hub
from filelock import FileLock

from vitarium.checkpoints.errors import CheckpointError
from vitarium.checkpoints.files import KINDS, check_structure, kind_of
from vitarium.checkpoints.weights import Weight, checked_name

_PACKAGED = Path(__file__).resolve().parent.parent / "backbones" / "weights"
_SUFFIXES = (".safetensors", ".pth", ".pt", ".bin", ".ckpt")
_CHUNK = 1 << 20
_HEAD = 512  # bytes that tell what a file is; less may be a broken connection
_TIMEOUT = 30.0  # seconds without a byte
_PAUSES = (0.5, 2.0)  # seconds before the second and the third attempt at one address
_LONGEST_PAUSE = 20.0  # seconds, where a server asks for more
_TRANSIENT = {408, 425, 429, 500, 502, 503, 504}


def fetch(weight: Weight, name: str, progress: bool | None = None) -> Path:
    """A local file that holds ``weight``, verified.

    A file that ships with the package is used where it is. Any other comes from the cache,
    ``torch.hub.get_dir()/checkpoints/vitarium`` (``TORCH_HOME`` moves it), without touching the
    network, or is downloaded into it: to a temporary name, checked for length, hash and kind,
    and only then renamed. Size and sha256 are checked at every call; where none is published,
    the first complete download records them in ``<file>.json``, which later calls check. A
    cached file that fails is renamed to ``<file>.bad``. Processes that want the same file wait
    for one download. ``HF_HUB_OFFLINE=1`` keeps everything off the network; proxies are taken
    from the environment.

    Args:
        weight: where the file is and what is known about it.
        name: the file's name in the cache, without a suffix: ``nat_tiny.shi_in1k``.
        progress: whether to show a progress bar on stderr; None means where that is a terminal.

    Raises:
        CheckpointError: the file cannot be had, or what came is not it; the message names the
            addresses and what each one answered.
    """
    checked_name(name, "name")
    if weight.file is not None:
        packaged = _PACKAGED / weight.file
        fault = _fault(packaged, weight.size, weight.sha256)
        if fault is not None:
            raise CheckpointError(f"{name}: {packaged}: {fault}; install the package again")
        return packaged
    if weight.unreleased is not None:
        raise CheckpointError(f"{name}: not released: {weight.unreleased}")
    if weight.url is None:
        raise CheckpointError(
            f"{name}: no program can fetch this file. {weight.manual}. "
            f"Then pass it as pretrained_cfg_overlay=dict(file=...)"
        )
    path = _cache_path(weight.url, name)
    if path.exists() and _cached_fault(path, weight) is None:
        return path
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{path}.lock"):
            return _replace(path, weight, name, progress)
    except OSError as error:
        raise CheckpointError(
            f"{name}: cannot write to the cache {path.parent}: {error}"
        ) from error


def _cache_path(url: str, name: str) -> Path:
    """Where the cache holds this address's file; another address never takes its place."""
    suffix = Path(urllib.parse.urlsplit(url).path).suffix.lower()
    digest = hashlib.sha256(url.encode()).hexdigest()[:8]
    folder = Path(torch.hub.get_dir()) / "checkpoints" / "vitarium"
    return folder / f"{name}-{digest}{suffix if suffix in _SUFFIXES else ''}"


def _replace(path: Path, weight: Weight, name: str, progress: bool | None) -> Path:
    """With the lock held: use what another process has just downloaded, or download."""
    aside = ""
    if path.exists():
        fault = _cached_fault(path, weight)
        if fault is None:
            return path
        bad = path.with_name(path.name + ".bad")
        os.replace(path, bad)
        aside = f"; the cached file was bad ({fault}) and is now {bad}"
    offline = _offline()
    if offline is not None:
        raise CheckpointError(
            f"{name}: not in the cache ({path}), and {offline} forbids a download{aside}"
        )
    part = path.with_name(path.name + ".part")
    try:
        failures = []
        for url in weight.addresses:
            try:
                _download(url, part, weight, name, progress)
                break
            except CheckpointError as error:
                failures.append(f"{url}: {error}")
        else:
            raise CheckpointError(f"{name}: cannot be downloaded{aside}. {'; '.join(failures)}")
        if weight.sha256 is None:
            _record(path, part)
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)
    if aside:
        warnings.warn(f"{name}: downloaded anew{aside}", stacklevel=3)
    return path


def _offline() -> str | None:
    """The variable that forbids the network, read as huggingface_hub reads it, or None."""
    for variable in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"):
        if os.environ.get(variable, "").upper() in ("1", "ON", "YES", "TRUE"):
            return variable
    return None


def _cached_fault(path: Path, weight: Weight) -> str | None:
    """What is wrong with a cached file, or None."""
    if weight.sha256 is not None:
        return _fault(path, weight.size, weight.sha256)
    try:
        record = json.loads(_record_path(path).read_text())
        recorded = Weight(weight.url, size=record["size"], sha256=record["sha256"])
    except (OSError, ValueError, KeyError, TypeError):
        recorded = weight
    if recorded.size is None or recorded.sha256 is None:
        return "no record tells which bytes it should hold"
    if weight.size not in (None, recorded.size):
        return f"expected {weight.size} bytes, got {recorded.size}"
    return _fault(path, recorded.size, recorded.sha256)


def _fault(path: Path, size: int | None, sha256: str | None) -> str | None:
    try:
        actual = path.stat().st_size
        if size is not None and actual != size:
            return f"expected {size} bytes, got {actual}"
        if sha256 is not None:
            digest = _sha256(path)
            if digest != sha256:
                return f"expected sha256 {sha256}, got {digest}"
    except OSError as error:
        return f"cannot be read: {error.strerror}"
    return None


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def _record_path(path: Path) -> Path:
    return path.with_name(path.name + ".json")


def _record(path: Path, part: Path) -> None:
    """Write down what the finished download ``part`` holds, before it becomes ``path``."""
    record = {"size": part.stat().st_size, "sha256": _sha256(part)}
    target = _record_path(path)
    temporary = target.with_name(target.name + ".part")
    temporary.write_text(json.dumps(record) + "\n")
    os.replace(temporary, target)


class _TransientError(Exception):
    """Worth another attempt, after ``pause`` seconds if the server asked for them."""

    def __init__(self, message: str, pause: float = 0.0) -> None:
        super().__init__(message)
        self.pause = pause


class _Redirects(urllib.request.HTTPRedirectHandler):
    """Redirects that stay on the web, and on https once there."""

    def redirect_request(
        self, req: Any, fp: Any, code: Any, msg: Any, headers: Any, newurl: Any
    ) -> Any:
        schemes = ("https",) if req.type == "https" else ("http", "https")
        if urllib.parse.urlsplit(newurl).scheme not in schemes:
            raise CheckpointError(f"redirects to {newurl}, which is not followed")
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def _download(url: str, part: Path, weight: Weight, name: str, progress: bool | None) -> None:
    """Download one address to ``part`` and check what came."""
    for pause in (*_PAUSES, None):
        try:
            _transfer(url, part, weight, name, progress)
            break
        except _TransientError as error:
            if pause is None:
                raise CheckpointError(f"{error} ({len(_PAUSES) + 1} attempts)") from error
            time.sleep(min(max(pause, error.pause), _LONGEST_PAUSE))
    check_structure(part)
    fault = _fault(part, weight.size, weight.sha256)
    if fault is not None:
        raise CheckpointError(f"sent the wrong file: {fault}")


def _transfer(url: str, part: Path, weight: Weight, name: str, progress: bool | None) -> None:
    with _open(url) as response, part.open("wb") as file:
        expected = weight.size if response.length is None else response.length
        with _progress(name, expected, progress) as advance:
            received = 0
            for chunk in _chunks(response):
                if received == 0 and len(chunk) >= _HEAD:
                    _check_start(chunk, expected, weight, part)
                received += len(chunk)
                if expected is not None and received > expected:
                    raise CheckpointError(f"sends more than the expected {expected} bytes")
                file.write(chunk)
                advance(len(chunk))
        if expected is not None and received != expected:
            raise _TransientError(f"the connection ended after {received} of {expected} bytes")
        file.flush()
        os.fsync(file.fileno())


def _open(url: str) -> http.client.HTTPResponse:
    request = urllib.request.Request(url, headers={"User-Agent": "vitarium"})
    opener = urllib.request.build_opener(_Redirects())
    try:
        return opener.open(request, timeout=_TIMEOUT)
    except urllib.error.HTTPError as error:
        with error:
            answer = f"HTTP {error.code} {error.reason}"
            if error.code in _TRANSIENT:
                raise _TransientError(answer, _retry_after(error)) from error
            raise CheckpointError(answer) from error
    except urllib.error.URLError as error:
        raise _TransientError(f"cannot be reached: {error.reason}") from error
    except (OSError, http.client.HTTPException) as error:
        raise _TransientError(f"the connection broke: {error!r}") from error


def _chunks(response: http.client.HTTPResponse) -> Iterator[bytes]:
    try:
        while chunk := response.read(_CHUNK):
            yield chunk
    except TimeoutError as error:
        raise _TransientError(f"no byte for {_TIMEOUT:g} seconds") from error
    except (OSError, http.client.HTTPException) as error:
        raise _TransientError(f"the connection broke: {error!r}") from error


def _check_start(chunk: bytes, expected: int | None, weight: Weight, part: Path) -> None:
    """Refuse what is seen to be wrong from its first bytes and its announced length."""
    kind = kind_of(chunk)
    if kind not in KINDS:
        raise CheckpointError(f"sent {kind} instead of a checkpoint")
    if weight.size is not None and expected != weight.size:
        raise CheckpointError(f"sent the wrong file: expected {weight.size} bytes, got {expected}")
    free = shutil.disk_usage(part.parent).free
    if expected is not None and expected > free:
        raise CheckpointError(f"needs {expected} bytes, and {part.parent} has {free} left")


def _retry_after(error: urllib.error.HTTPError) -> float:
    value = error.headers.get("Retry-After", "")
    return float(value) if value.isdecimal() else 0.0


@contextmanager
def _progress(name: str, total: int | None, show: bool | None) -> Iterator[Any]:
    """A function that advances a progress bar on stderr, or does nothing."""
    if not (sys.stderr.isatty() if show is None else show):
        yield lambda count: None
        return
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task(name, total=total)
        yield lambda count: bar.advance(task, count)
