"""What a run can go on from: written whole or not at all, the newest whole one counts."""

from __future__ import annotations

import re
import warnings
from pathlib import Path
from typing import Any

import torch

from vitarium.checkpoints import CheckpointError, read
from vitarium.checkpoints.disk import replacing

_NAME = re.compile(r"step-([0-9]{9})\.pt")


class Snapshots:
    """Files ``step-<update>.pt`` in a folder.

    Args:
        folder: where they are.
        keep: how many stay; one is removed only once a newer one is complete.
    """

    def __init__(self, folder: Path, keep: int) -> None:
        self._folder = folder
        self._keep = keep

    def save(self, update: int, content: dict[str, Any]) -> None:
        """Write the snapshot of an update: tensors and plain data.

        Raises:
            OSError: it cannot be written; the others stay as they are.
        """
        self._folder.mkdir(parents=True, exist_ok=True)
        for half in self._folder.glob("step-*.new"):  # of a process that was killed
            half.unlink(missing_ok=True)
        path = self._folder / f"step-{update:09}.pt"
        try:
            with replacing(path) as temporary, temporary.open("wb") as file:
                torch.save(content, file)
        except RuntimeError as error:  # what torch makes of a disk that is full
            raise OSError(f"{path}: cannot be written: {error}") from error
        for _, old in self._found()[self._keep :]:
            old.unlink(missing_ok=True)

    def newest(self) -> dict[str, Any] | None:
        """The newest snapshot that is whole, or None where there is none; damaged ones are named.

        Raises:
            ValueError: there are snapshots, and none of them can be read.
        """
        found = self._found()
        for _, path in found:
            try:
                return read(path)
            except CheckpointError as error:
                warnings.warn(f"passed over: {error}", stacklevel=2)
        if found:
            raise ValueError(f"{self._folder}: expected a whole snapshot, all are damaged")
        return None

    def _found(self) -> list[tuple[int, Path]]:
        """Updates and files, the newest first."""
        matches = [(_NAME.fullmatch(path.name), path) for path in self._folder.glob("step-*.pt")]
        return sorted(((int(m[1]), path) for m, path in matches if m is not None), reverse=True)
