"""The unfinished part of a download, and what is known of where it came from."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import BinaryIO


@dataclass(frozen=True)
class Origin:
    """Where a part's bytes come from.

    Attributes:
        url: the address that was asked.
        size: of the whole file, as the server announced it.
        validator: a strong ETag or a Last-Modified date, which changes whenever the file does.
        synced: how many bytes are known to be on the disk, whatever stopped the machine.
    """

    url: str
    size: int | None
    validator: str | None
    synced: int = 0


class Part:
    """``<file>.part`` and its record ``<file>.part.json``; never loaded, only completed.

    Only the process that holds the file's lock may touch them.
    """

    def __init__(self, target: Path) -> None:
        self.path = target.with_name(target.name + ".part")
        self._record = target.with_name(target.name + ".part.json")

    @property
    def size(self) -> int:
        """In bytes; 0 where there is none."""
        return self.path.stat().st_size if self.path.exists() and not self._linked() else 0

    def origin(self) -> Origin | None:
        """The record; None where there is none that can be read."""
        try:
            found = Origin(**json.loads(self._record.read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError, RecursionError):
            return None
        sizes = (found.synced, 0 if found.size is None else found.size)
        validator = "" if found.validator is None else found.validator
        good = (
            all(type(size) is int and size >= 0 for size in sizes)
            and isinstance(validator, str)
            and re.fullmatch("[ -~\x80-\xff]*", validator)  # what a header may hold
        )
        return found if good else None

    def resumable(self, url: str, size: int | None, hashed: bool) -> int:
        """How many of its bytes a download of ``url`` may keep.

        Args:
            url: the address to be asked.
            size: of the whole file, where that is known beforehand.
            hashed: whether the whole file's sha256 is known. Then any bytes will do, as the
                whole is checked; else only those that are on the disk for certain and came from
                the same address with a validator.
        """
        origin, present = self.origin(), self.size
        if size is None and origin is not None:
            size = origin.size
        kept = present
        if not hashed:
            certain = (
                origin is not None
                and origin.url == url
                and None
                not in (
                    origin.size,
                    origin.validator,
                )
            )
            kept = origin.synced if origin is not None and certain else 0
        if kept > present or (size is not None and kept > size):
            return 0
        # The last byte is always asked for: the answer says whether the file is still the same.
        return kept if kept != size else kept - 1

    @contextmanager
    def writing(self, offset: int, origin: Origin) -> Iterator[_Writer]:
        """Keep the first ``offset`` bytes and write behind them."""
        if self._linked():
            self.path.unlink()
        with self.path.open("r+b" if offset else "wb") as file:
            file.truncate(offset)
            file.seek(offset)
            writer = _Writer(file, self._record, origin)
            writer.sync()
            try:
                yield writer
            finally:
                writer.sync()

    def _linked(self) -> bool:
        """Whether someone has put a link in its place, through which nothing may be written."""
        return self.path.is_symlink()

    def discard(self) -> None:
        """Remove both files."""
        self.path.unlink(missing_ok=True)
        self.forget()

    def forget(self) -> None:
        """Remove the record, once the part has become the file."""
        self._record.unlink(missing_ok=True)


class _Writer:
    def __init__(self, file: BinaryIO, record: Path, origin: Origin) -> None:
        self._file = file
        self._record = record
        self._origin = origin

    def write(self, data: bytes) -> None:
        self._file.write(data)

    def sync(self) -> None:
        """Bring all that was written to the disk, then say so in the record."""
        self._file.flush()
        os.fsync(self._file.fileno())
        origin = replace(self._origin, synced=self._file.tell())
        temporary = self._record.with_name(self._record.name + ".new")
        temporary.write_text(json.dumps(asdict(origin)) + "\n", encoding="utf-8")
        os.replace(temporary, self._record)
