"""Files on the disk: their hashes, and names that they get once they are complete."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

_CHUNK = 1 << 18  # bytes; more do not stay in a core's cache between reading and hashing


def digest(path: Path, hasher: Any = None) -> str:
    """Hexadecimal digest of a file's content.

    Args:
        path: the file.
        hasher: one of hashlib's, which may hold something already; None for sha256.
    """
    hasher = hashlib.sha256() if hasher is None else hasher
    buffer = memoryview(bytearray(_CHUNK))
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(buffer):
            hasher.update(buffer[:count])
    return str(hasher.hexdigest())


def sync(path: Path) -> None:
    """Bring a file's content to the disk."""
    with path.open("rb+") as file:
        os.fsync(file.fileno())


def rename(temporary: Path, path: Path) -> None:
    """Give a complete file that is on the disk its name, for good."""
    os.replace(temporary, path)
    if os.name == "posix":
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            with suppress(OSError):  # network file systems may have no such call, nor need for it
                os.fsync(folder)
        finally:
            os.close(folder)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary name, ``<path>.new``, whose file takes the place of ``path`` in the end.

    It is brought to the disk first; after an exception it is gone, and ``path`` is what it was.
    """
    temporary = path.with_name(path.name + ".new")
    try:
        yield temporary
        sync(temporary)
        rename(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
