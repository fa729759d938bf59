"""Weights on this machine: shipped, cached, adopted or downloaded, and verified every time."""

from __future__ import annotations

import hashlib
import os
import shutil
import sys
import urllib.parse
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

import torch.hub
from filelock import FileLock, Timeout

from vitarium.checkpoints import lock
from vitarium.checkpoints.disk import digest, rename
from vitarium.checkpoints.errors import CheckpointError
from vitarium.checkpoints.files import check_structure, read
from vitarium.checkpoints.hub import cached_hub_file
from vitarium.checkpoints.parts import Part
from vitarium.checkpoints.progress import Meter, meter, wanted
from vitarium.checkpoints.transport import WrongFileError, endpoint_address, transfer
from vitarium.checkpoints.weights import Weight, checked_name

_PathLike: TypeAlias = str | os.PathLike[str]

_PACKAGED = Path(__file__).resolve().parent.parent / "backbones" / "weights"
_SUFFIXES = (".safetensors", ".pth", ".pt", ".bin", ".ckpt")
_CHUNK = 1 << 20


def fetch(
    weight: Weight,
    name: str,
    progress: bool | None = None,
    cache_dir: _PathLike | None = None,
    lock_file: _PathLike | None = None,
) -> Path:
    """A local file that holds ``weight``, verified.

    A file that ships with the package is used where it is. Any other comes from the cache without
    touching the network, or is downloaded into it: to ``<file>.part``, which a later call
    resumes, checked for length, hash and kind, and only then renamed. Size and sha256 are checked
    at every call; where none is published, the first complete download records them in the lock
    file, which later calls check. A cached file that fails is renamed to ``<file>.bad``. Processes
    that want the same file wait for one download. A file of https://huggingface.co that
    huggingface_hub has in its own cache is used from there.

    ``HF_ENDPOINT`` takes the place of https://huggingface.co, ``HF_HUB_OFFLINE=1`` keeps
    everything off the network, proxies are taken from the environment.

    Args:
        weight: where the file is and what is known about it.
        name: the file's name in the cache, without a suffix: ``nat_tiny.shi_in1k``.
        progress: whether to show a progress bar on stderr; None means where that is a terminal.
        cache_dir: the cache folder; None means ``torch.hub.get_dir()/checkpoints/vitarium``, which
            ``TORCH_HOME`` moves. Its lock file is ``vitarium.lock.json``.
        lock_file: a second lock file, which counts more; None means the one that
            ``VITARIUM_LOCK`` names, if any.

    Raises:
        CheckpointError: the file cannot be had, or what came is not it; the message names the
            addresses and what each one answered.
    """
    checked_name(name, "name")
    if weight.file is not None:
        packaged = _PACKAGED / weight.file
        fault = _fault(packaged, _Expected(weight.size, weight.sha256))
        if fault is not None:
            raise CheckpointError(f"{name}: {packaged}: {fault}; install the package again")
        return packaged
    place = _Place(weight, name, cache_dir, lock_file)
    present = os.path.exists(place.path)  # False too where the folder is closed to us
    if present and place.fault() is None:
        return place.path
    if weight.url is None and not present:
        raise CheckpointError(_instructions(weight, name))
    kept = None if present else cached_hub_file(place.key, cache_dir)
    if kept is not None and _fault(kept, place.expected()) is None:
        return kept
    with place.held(progress):
        return _replace(place, progress)


def adopt(
    weight: Weight,
    name: str,
    file: _PathLike,
    cache_dir: _PathLike | None = None,
    lock_file: _PathLike | None = None,
) -> Path:
    """Copy a local file into the cache as ``weight``; from then on `fetch` finds it there.

    Args:
        weight: what the file should be; its size and sha256 are checked where they are known,
            published or in a lock file, and recorded there where not.
        name: the file's name in the cache, as for `fetch`.
        file: the local file, a checkpoint; it stays.
        cache_dir: as for `fetch`.
        lock_file: as for `fetch`.

    Returns:
        The file in the cache.

    Raises:
        CheckpointError: it cannot be read, is no checkpoint or not this one, or the weight has no
            place in the cache: it ships with the package, or was never released.
    """
    checked_name(name, "name")
    if weight.file is not None:
        raise CheckpointError(f"{name}: ships with the package, and no file can take its place")
    place = _Place(weight, name, cache_dir, lock_file)
    source, copy = Path(file), place.path.with_name(place.path.name + ".new")
    with place.held(progress=None):
        try:
            _copy(source, copy)
            place.keep(copy, place.checked(copy))
        except CheckpointError as error:
            raise CheckpointError(f"{name}: {source}: {error}") from error
        finally:
            copy.unlink(missing_ok=True)
        Part(place.path).discard()
    place.notice(stacklevel=2)
    return place.path


@dataclass(frozen=True)
class _Expected:
    """What a file should be, and the lock file that says so, if one does."""

    size: int | None
    sha256: str | None
    lock_file: Path | None = None

    def fault(self, size: int, sha256: str | None) -> str | None:
        """What is wrong with a file of this size and hash, or None."""
        said = "" if self.lock_file is None else f" as {self.lock_file} records"
        if self.size is not None and size != self.size:
            return f"expected {self.size} bytes{said}, got {size}"
        if self.sha256 is not None and sha256 != self.sha256:
            return f"expected sha256 {self.sha256}{said}, got {sha256}"
        return None


class _Place:
    """One file's place in the cache, its lock and its records."""

    def __init__(
        self, weight: Weight, name: str, cache_dir: _PathLike | None, lock_file: _PathLike | None
    ) -> None:
        if weight.unreleased is not None:
            raise CheckpointError(f"{name}: not released: {weight.unreleased}")
        folder = (
            Path(torch.hub.get_dir()) / "checkpoints" / "vitarium"
            if cache_dir is None
            else Path(cache_dir).expanduser()
        )
        self.weight = weight
        self.name = name
        # Another address never takes this one's place; what has none goes by its name alone.
        self.key = f"manual:{name}" if weight.url is None else weight.url
        short = hashlib.sha256(self.key.encode()).hexdigest()[:8]
        suffix = Path(urllib.parse.urlsplit(weight.url or "").path).suffix.lower()
        self.path = folder / f"{name}-{short}{suffix if suffix in _SUFFIXES else ''}"
        self.lock_files = lock.lock_files(folder, lock_file)

    def expected(self) -> _Expected:
        """What is published counts most, then the user's lock file, then the cache's."""
        weight = self.weight
        if weight.sha256 is not None:
            return _Expected(weight.size, weight.sha256)
        found = lock.find(self.key, self.lock_files)
        if found is None:
            return _Expected(weight.size, None)
        recorded, file = found
        return _Expected(weight.size or recorded.size, recorded.sha256, file)

    def fault(self) -> str | None:
        """What is wrong with the cached file, or None."""
        expected = self.expected()
        if expected.sha256 is None:
            return "no record tells which bytes it should hold"
        fault = _fault(self.path, expected)
        if fault is None and expected.size is not None:
            self._record(expected.size, expected.sha256)
        return fault

    def checked(self, file: Path, linked: str | None = None) -> str:
        """The sha256 of a file that is to be kept here.

        Args:
            file: complete, under a temporary name.
            linked: its sha256 as the Hugging Face hub states it, if it does.

        Raises:
            CheckpointError: it is no checkpoint, or not the one that is expected.
        """
        kind = check_structure(file)
        expected, sha256 = self.expected(), digest(file)
        fault = expected.fault(file.stat().st_size, sha256)
        if fault is not None and expected.lock_file is not None:
            fault += "; if it was replaced on purpose, remove its entry there"
        if expected.sha256 is None and linked not in (None, sha256):
            fault = f"the hub states sha256 {linked}, got {sha256}"
        if fault is not None:
            raise CheckpointError(f"the wrong file: {fault}")
        if expected.sha256 is None and kind == "pickle":
            # Only who reads all of torch's format before 1.6 knows that it is whole.
            read(file)
        return sha256

    def keep(self, file: Path, sha256: str) -> None:
        """Give a checked file its place."""
        self._record(file.stat().st_size, sha256)
        rename(file, self.path)

    def _record(self, size: int, sha256: str) -> None:
        if self.weight.sha256 is None:
            lock.record(self.key, lock.Record(self.name, size, sha256), self.lock_files)

    def set_aside(self, fault: str) -> str:
        """Rename the cached file; returns what to say about it."""
        bad = self.path.with_name(self.path.name + ".bad")
        os.replace(self.path, bad)
        return f"; the cached file was bad ({fault}) and is now {bad}"

    @contextmanager
    def held(self, progress: bool | None) -> Iterator[None]:
        """Keep other processes from downloading it; those that wait say so."""
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            held = FileLock(f"{self.path}.lock")
            try:
                held.acquire(timeout=0)
            except Timeout:
                if wanted(progress):
                    print(f"{self.name}: waiting for another process' download", file=sys.stderr)
                held.acquire()
            try:
                yield
            finally:
                held.release()
        except OSError as error:
            raise CheckpointError(
                f"{self.name}: cannot write to the cache {self.path.parent}: {error}"
            ) from error

    def notice(self, stacklevel: int) -> None:
        """Tell whoever has just got the file what its licence withholds."""
        if self.weight.notice is not None:
            warnings.warn(f"{self.name}: {self.weight.notice}", stacklevel=stacklevel + 1)


def _instructions(weight: Weight, name: str) -> str:
    cls = weight.task == "cls"
    argument = "pretrained_cfg_overlay=dict(file=...)" if cls else "FeatureBackbone's checkpoint"
    return (
        f"{name}: no program can fetch this file. {(weight.manual or '').rstrip('. ')}. Then run "
        f"`vitarium download {name} --file FILE`, or pass it as {argument}"
    )


def _replace(place: _Place, progress: bool | None) -> Path:
    """With the lock held: use what another process has just downloaded, or download."""
    weight, name, path = place.weight, place.name, place.path
    aside = ""
    if path.exists():
        fault = place.fault()
        if fault is None:
            return path
        aside = place.set_aside(fault)
    if weight.url is None:
        raise CheckpointError(f"{_instructions(weight, name)}{aside}")
    offline = _offline()
    if offline is not None:
        raise CheckpointError(
            f"{name}: not in the cache ({path}), and {offline} forbids a download{aside}"
        )
    expected, part, failures = place.expected(), Part(path), []
    try:
        with meter(name, progress) as shown:
            for url in weight.addresses:
                try:
                    sha256 = _download(url, part, place, expected, shown)
                    break
                except CheckpointError as error:
                    failures.append(f"{endpoint_address(url)}: {error}")
            else:
                raise CheckpointError(f"{name}: cannot be downloaded{aside}. {'; '.join(failures)}")
        place.keep(part.path, sha256)
    finally:
        hashed = expected.sha256 is not None
        addresses = map(endpoint_address, weight.addresses)
        if not any(part.resumable(address, expected.size, hashed) for address in addresses):
            part.discard()
    if aside:
        warnings.warn(f"{name}: downloaded anew{aside}", stacklevel=3)
    place.notice(stacklevel=3)
    return path


def _download(url: str, part: Part, place: _Place, expected: _Expected, shown: Meter) -> str:
    """Complete the part from one address and check what came; returns its sha256."""
    for last in (False, True):
        try:
            arrival = transfer(url, part, expected.size, expected.sha256 is not None, shown)
        except WrongFileError:
            part.discard()
            raise
        try:
            return place.checked(part.path, arrival.sha256)
        except CheckpointError:
            part.discard()
            # The fault may be in the bytes that were there before: once more, from the start.
            if last or not arrival.resumed:
                raise
    raise AssertionError("unreachable")


def _offline() -> str | None:
    """The variable that forbids the network, read as huggingface_hub reads it, or None."""
    for variable in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"):
        if os.environ.get(variable, "").upper() in ("1", "ON", "YES", "TRUE"):
            return variable
    return None


def _fault(path: Path, expected: _Expected) -> str | None:
    """What is wrong with a file, or None; it is only hashed where its size is right."""
    try:
        size = path.stat().st_size
        fault = _Expected(expected.size, None, expected.lock_file).fault(size, None)
        return fault or expected.fault(size, digest(path))
    except OSError as error:
        return f"cannot be read: {error.strerror}"


def _copy(source: Path, copy: Path) -> None:
    try:
        check_structure(source)
        with source.open("rb") as original, copy.open("wb") as file:
            shutil.copyfileobj(original, file, _CHUNK)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise CheckpointError(f"cannot be copied into the cache: {error}") from error
