"""The lock file: size and sha256 of every weight file, by its address, from its first download."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock

from vitarium.checkpoints.disk import replacing
from vitarium.checkpoints.errors import CheckpointError

_NAME = "vitarium.lock.json"
_VERSION = 1


@dataclass(frozen=True)
class Record:
    """What is written down about one file: its name in the zoo, size in bytes and sha256."""

    name: str
    size: int
    sha256: str

    def agrees(self, other: Record | None) -> bool:
        """Whether both describe the same bytes."""
        return other is not None and (self.size, self.sha256) == (other.size, other.sha256)


def lock_files(folder: Path, chosen: str | os.PathLike[str] | None = None) -> list[Path]:
    """The lock files that count, the first most: the user's, if there is one, and the cache's.

    Args:
        folder: the cache folder, which always has one.
        chosen: the user's; None means the one that ``VITARIUM_LOCK`` names, if any.
    """
    user = chosen or os.environ.get("VITARIUM_LOCK")
    # What a link leads to is written, not the link.
    named = [Path(os.path.realpath(Path(user).expanduser()))] if user else []
    return [*named, folder / _NAME]


def find(url: str, files: Sequence[Path]) -> tuple[Record, Path] | None:
    """The record of an address in the first file that has one, and which file that is.

    Raises:
        CheckpointError: a file is there but is no lock file.
    """
    for file in files:
        found = _read(file).get(url)
        if found is not None:
            return found, file
    return None


def record(url: str, new: Record, files: Sequence[Path]) -> None:
    """Write down what an address holds, in every file that does not say so already.

    Raises:
        CheckpointError: a file is there but is no lock file, or cannot be written.
    """
    for file in files:
        if new.agrees(_read(file).get(url)):
            continue
        try:
            with FileLock(f"{file}.lock"):
                _write(file, {**_read(file), url: new})
        except OSError as error:
            raise CheckpointError(f"{file}: cannot write this lock file: {error}") from error


def _read(file: Path) -> dict[str, Record]:
    try:
        text = file.read_text(encoding="utf-8")
    except FileNotFoundError:
        return {}
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{file}: cannot read this lock file: {error}") from error
    try:
        content = json.loads(text)
        if content["version"] != _VERSION:
            raise ValueError(f"expected version {_VERSION}, got {content['version']!r}")
        return {url: _parsed(url, entry) for url, entry in content["files"].items()}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(
            f"{file}: damaged lock file ({type(error).__name__}: {error}); mend it, or remove it "
            f"to have every file downloaded and recorded anew"
        ) from error


def _parsed(url: str, entry: Any) -> Record:
    found = Record(**entry)
    if (
        type(found.size) is not int
        or found.size <= 0
        or not isinstance(found.name, str)
        or not re.fullmatch("[0-9a-f]{64}", found.sha256)
    ):
        raise ValueError(f"expected name, size and sha256 of {url}, got {entry}")
    return found


def _write(file: Path, records: dict[str, Record]) -> None:
    content = {"version": _VERSION, "files": {url: asdict(entry) for url, entry in records.items()}}
    text = json.dumps(content, indent=2, sort_keys=True) + "\n"
    with replacing(file) as temporary:
        temporary.write_text(text, encoding="utf-8", newline="\n")
