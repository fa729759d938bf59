"""A progress bar on stderr, or none."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


class Meter:
    """Counts bytes; this one shows nothing."""

    def begin(self, done: int, total: int | None) -> None:
        """Start, or start again, with ``done`` of ``total`` bytes."""

    def advance(self, count: int) -> None:
        """Count further bytes."""


class _Bar(Meter):
    def __init__(self, bar: Any, name: str) -> None:
        self._bar = bar
        self._task = bar.add_task(name, total=None)

    def begin(self, done: int, total: int | None) -> None:
        self._bar.reset(self._task, total=total, completed=done)

    def advance(self, count: int) -> None:
        self._bar.advance(self._task, count)


def wanted(progress: bool | None) -> bool:
    """Whether to show anything: what the caller says, or where stderr is a terminal."""
    # A program without a console has no stderr.
    return sys.stderr is not None and (sys.stderr.isatty() if progress is None else progress)


@contextmanager
def meter(name: str, progress: bool | None) -> Iterator[Meter]:
    """A bar with bytes, rate and time left where that is wanted."""
    if not wanted(progress):
        yield Meter()
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
        yield _Bar(bar, name)
