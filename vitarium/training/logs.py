"""What a run says while it goes on: lines on the terminal, a CSV file, TensorBoard's events."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor

from vitarium.training.config import Config
from vitarium.training.runs import RunFolder


class Log:
    """The log of one process; only the main one says anything.

    Args:
        folder: where the files go, or None.
        main: whether this process says anything.
        config: of the run.
        updates: of the whole run.
        epoch: updates of one pass over the data.
        images: of one update, over all processes.
    """

    def __init__(
        self,
        folder: RunFolder | None,
        config: Config,
        updates: int,
        epoch: float,
        images: int,
        main: bool,
    ) -> None:
        self._folder = folder if main else None
        self._main = main
        self._config = config
        self._updates = updates
        self._epoch = epoch
        self._images = images
        self._board: Any = None
        self._sums: dict[str, Tensor] = {}
        self._counted = 0
        self._named: set[str] = set()
        self._unsaid: list[tuple[int, str, str]] = []
        self._since = (0, 0.0)

    @contextmanager
    def running(self, update: int) -> Iterator[None]:
        """Everything between the first update, whose number this is, and the last."""
        self._since = update, time.monotonic()
        if self._folder is not None and self._config.train.tensorboard:
            self._board = _board(self._folder, update)
        try:
            yield
        finally:
            if self._board is not None:
                self._board.close()
            if self._named and self._folder is not None:
                self._say(f"{len(self._named)} images could not be read: unreadable.csv names them")

    def count(self, losses: Mapping[str, Tensor]) -> None:
        """Add an update's losses up, on their device."""
        for name, loss in losses.items():
            self._sums[name] = self._sums.get(name, 0) + loss
        self._counted += 1

    def mean(self) -> dict[str, Tensor]:
        """Means of the losses since this was asked before."""
        means = {name: total / self._counted for name, total in self._sums.items()}
        self._sums, self._counted = {}, 0
        return means

    def losses(self, update: int, means: Mapping[str, float], groups: Sequence[Any]) -> None:
        """Tell how far it is, and how fast.

        Raises:
            ValueError: a loss is not finite.
        """
        bad = {name: value for name, value in means.items() if not math.isfinite(value)}
        if bad:
            name, value = next(iter(bad.items()))
            raise ValueError(
                f"{name}: expected a finite number up to update {update}, got {value}; lower "
                f"optimizer.lr, or use bf16 or fp32"
            )
        done, then = self._since
        rate = (update - done) / max(time.monotonic() - then, 1e-9)
        left = timedelta(seconds=round((self._updates - update) / rate))
        lr = max(group["lr"] for group in groups)
        row = {"lr": lr, **means, "images_per_second": rate * self._images}
        shown = "  ".join(f"{name} {value:.4g}" for name, value in row.items())
        self._say(
            f"epoch {update / self._epoch:.2f}  {update}/{self._updates}  {shown}  {left} left"
        )
        self._write(update, row)

    def measures(self, update: int, measures: Mapping[str, float]) -> None:
        """Tell what a validation found."""
        shown = "  ".join(f"{name} {value:.4g}" for name, value in measures.items())
        self._say(
            f"epoch {update / self._epoch:.2f}  {update}/{self._updates}  validation: {shown}"
        )
        self._write(update, {f"val_{name}": value for name, value in measures.items()})

    def unreadable(self, update: int, failures: Sequence[tuple[str, str]]) -> None:
        """Note images that this process could not read, for `unsaid`."""
        self._unsaid += [(update, *failure) for failure in failures]

    def unsaid(self) -> list[tuple[int, str, str]]:
        """What was noted since this was asked before."""
        found, self._unsaid = self._unsaid, []
        return found

    def name(self, failures: Sequence[tuple[int, str, str]]) -> None:
        """Name each image that some process could not read, once."""
        for update, name, why in failures:
            if name not in self._named:
                self._named.add(name)
                name, why = (x if x.isprintable() else repr(x)[1:-1] for x in (name, why))
                self._say(f"cannot be read: {name}: {why}")
                if self._folder is not None:  # one line, whatever a file's name may be
                    self._folder.unreadable(update, name, why)

    def finite(self) -> bool:
        """Whether all losses since the last line are."""
        return all(bool(torch.isfinite(total)) for total in self._sums.values())

    def _write(self, update: int, row: Mapping[str, float]) -> None:
        if self._folder is None:
            return
        for name, value in row.items():
            self._folder.log(
                {"update": update, "epoch": update / self._epoch, "name": name, "value": value}
            )
            if self._board is not None:
                self._board.add_scalar(name, value, update)

    def _say(self, text: str) -> None:
        if self._main:
            print(text, file=sys.stderr, flush=True)


def _board(folder: RunFolder, update: int) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise ValueError(
            'train.tensorboard: tensorboard is not installed: pip install "vitarium[train]"'
        ) from error
    return SummaryWriter(str(folder.path / "tensorboard"), purge_step=update)
