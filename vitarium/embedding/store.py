"""A folder of shards: each is written whole or not at all, by one process at a time."""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any, NamedTuple

import torch
from filelock import FileLock, Timeout
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from vitarium.checkpoints.disk import replacing

FORMATS = ("safetensors", "parquet")
_MANIFEST = "manifest.json"
_CLAIMS = ".claims"
_FACTS = "facts"  # versions and the like: what a restart may change
_KEY = "shard"  # of a file's metadata; one alone, for safetensors shuffles them
_HEADER_LIMIT = 90_000_000  # bytes; safetensors reads no header of more than 100 MB


class Shard(NamedTuple):
    """What is stored of a range of the list of images.

    Attributes:
        names: of the images that have a row.
        embeddings: [rows, ...].
        failed: (name, why) of those that have none.
    """

    names: list[str]
    embeddings: Tensor
    failed: list[tuple[str, str]]


class Outcome(NamedTuple):
    """How many rows a shard has, and which images have none, and why."""

    rows: int
    failed: list[tuple[str, str]]


@dataclass(frozen=True)
class Store:
    """Shards ``shard-<number>.<format>`` and ``manifest.json`` in a folder.

    `open` comes first. Everything else may be asked by any number of processes at once.

    Args:
        folder: where they are.
        manifest: all that the embeddings depend on, as JSON; it has ``images``, ``shard_size``,
            ``format``, and ``facts``, which may differ from run to run.
    """

    folder: Path
    manifest: Mapping[str, Any]

    def __post_init__(self) -> None:
        if self.manifest["format"] == "parquet":
            _pyarrow()

    @property
    def shards(self) -> int:
        """How many there are going to be."""
        return -(-int(self.manifest["images"]) // int(self.manifest["shard_size"]))

    def indices(self, number: int) -> range:
        """The places in the list of images that a shard holds."""
        size = self.manifest["shard_size"]
        return range(number * size, min((number + 1) * size, self.manifest["images"]))

    def open(self) -> None:
        """Write the manifest, or see that the folder's is the same.

        Raises:
            ValueError: it is another one, or the folder holds something else.
            OSError: the folder cannot be written.
        """
        there = {x.name for x in self.folder.iterdir()} if self.folder.is_dir() else set()
        others = there - {_CLAIMS, f"{_MANIFEST}.new"}
        if others and _MANIFEST not in there:
            raise ValueError(
                f"--out: expected embeddings, or an empty folder, got {self.folder} with "
                f"{min(others)}"
            )
        claims = self.folder / _CLAIMS
        claims.mkdir(parents=True, exist_ok=True)
        path = self.folder / _MANIFEST
        with FileLock(claims / "manifest"):
            if not path.exists():
                _write(path, (json.dumps(self.manifest, indent=2) + "\n").encode())
            before = json.loads(path.read_text(encoding="utf-8"))
        self._compare(before)

    def _compare(self, before: dict[str, Any]) -> None:
        was, now = _flat(before), _flat(self.manifest)
        changed = [key for key in {**was, **now} if was.get(key) != now.get(key)]
        firm = [key for key in changed if not key.startswith(f"{_FACTS}.")]
        if firm:
            key = firm[0]
            raise ValueError(
                f"{self.folder}: its embeddings are of something else: {key} was {was.get(key)!r}, "
                f"is {now.get(key)!r}; --out names another folder"
            )
        for key in changed:
            name = key.partition(".")[2]
            warnings.warn(f"{name} was {was.get(key)}, is {now.get(key)}", stacklevel=3)

    @property
    def _run(self) -> str:
        """Tells the shards of this run from others."""
        firm = {key: value for key, value in self.manifest.items() if key != _FACTS}
        return hashlib.sha256(json.dumps(firm, sort_keys=True).encode()).hexdigest()

    def path(self, number: int) -> Path:
        """Where a shard is, or is going to be."""
        return self.folder / f"shard-{number:06}.{self.manifest['format']}"

    def claim(self, number: int) -> FileLock | None:
        """The right to write a shard, until it is released; None where another process has it.

        The operating system releases what a process that died has claimed.
        """
        lock = FileLock(self.folder / _CLAIMS / str(number))
        try:
            lock.acquire(timeout=0)
        except Timeout:
            return None
        return lock

    def count(self) -> int:
        """How many images the shards hold that are there by now, whoever made them."""
        ending = f".{self.manifest['format']}"
        names = {x.name for x in self.folder.iterdir() if x.suffix == ending}
        last = self.path(self.shards - 1).name in names
        missing = self.shards * self.manifest["shard_size"] - self.manifest["images"]
        return len(names) * int(self.manifest["shard_size"]) - last * int(missing)

    def outcome(self, number: int) -> Outcome | None:
        """What a shard holds, by its header; None where it is missing, or damaged, which is told.

        A shard has its name only once all of it is on the disk, so its header speaks for it.
        """
        path = self.path(number)
        if not path.exists():
            return None
        try:
            rows, metadata = _HEADERS[path.suffix[1:]](path)
            facts = json.loads(metadata[_KEY])
            if (facts["run"], facts["shard"]) == (self._run, number):
                failed = [(name, why) for name, why in facts["failed"]]
                if rows + len(failed) == len(self.indices(number)):
                    return Outcome(rows, failed)
        except (SafetensorError, OSError, ValueError, KeyError):
            pass
        warnings.warn(f"{path} is damaged, or not of these embeddings: made anew", stacklevel=2)
        return None

    def write(self, number: int, shard: Shard) -> None:
        """Write a shard that is claimed.

        Raises:
            OSError: it cannot be written; all others stay as they are.
        """
        facts = {"run": self._run, "shard": number, "failed": shard.failed}
        path = self.path(number)
        _write(path, _CONTENTS[path.suffix[1:]](shard, facts))

    def tidy(self) -> None:
        """Remove all claims once every shard is there: who claims one now finds it made."""
        for number in range(self.shards):
            with suppress(OSError):  # of systems that keep a file that is open elsewhere
                (self.folder / _CLAIMS / str(number)).unlink(missing_ok=True)


def _flat(content: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in content.items():
        nested = isinstance(value, dict)
        found |= _flat(value, f"{prefix}{key}.") if nested else {prefix + key: value}
    return found


def _write(path: Path, content: bytes | memoryview) -> None:
    try:
        with replacing(path) as temporary:
            temporary.write_bytes(content)
    except OSError as error:  # that of a full disk names no file
        raise OSError(error.errno, f"cannot be written: {error.strerror}", str(path)) from error


def _safetensors(shard: Shard, facts: Mapping[str, Any]) -> bytes:
    metadata = json.dumps({**facts, "names": shard.names})
    if len(metadata) > _HEADER_LIMIT:
        raise ValueError(
            f"--shard-size: expected less than {_HEADER_LIMIT:,} bytes of names in a shard, got "
            f"{len(metadata):,}"
        )
    content: bytes = save({"embeddings": shard.embeddings.contiguous()}, {_KEY: metadata})
    return content


def _safetensors_header(path: Path) -> tuple[int, dict[str, str]]:
    with safe_open(path, framework="numpy") as file:
        return file.get_slice("embeddings").get_shape()[0], file.metadata() or {}


def _pyarrow() -> Any:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise ValueError('pyarrow is not installed: pip install "vitarium[train]"') from error
    return pyarrow


def _parquet(shard: Shard, facts: Mapping[str, Any]) -> memoryview:
    pa = _pyarrow()
    values = shard.embeddings
    if values.dtype == torch.bfloat16:  # Arrow has no such type
        values = values.float()
    column = pa.array(values.flatten().numpy())
    for size in reversed(values.shape[1:]):
        column = pa.FixedSizeListArray.from_arrays(column, size)
    # A file's name need not be text, a column of names must be.
    named = [name.encode("utf-8", "backslashreplace").decode() for name in shard.names]
    names = pa.array(named, pa.string())
    table = pa.table({"name": names, "embedding": column})
    table = table.replace_schema_metadata({_KEY: json.dumps(facts)})
    file = BytesIO()
    pa.parquet.write_table(table, file)
    return file.getbuffer()


def _parquet_header(path: Path) -> tuple[int, dict[str, str]]:
    found = _pyarrow().parquet.read_metadata(path)
    return found.num_rows, {k.decode(): v.decode() for k, v in (found.metadata or {}).items()}


_CONTENTS: Mapping[str, Callable[[Shard, Mapping[str, Any]], bytes | memoryview]] = {
    "safetensors": _safetensors,
    "parquet": _parquet,
}
_HEADERS = {"safetensors": _safetensors_header, "parquet": _parquet_header}
