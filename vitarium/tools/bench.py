"""``vitarium bench``: what runs how fast, side by side in one run.

All candidates of a case take turns, round after round, and medians are compared: a machine that
slows down for a while slows all of them. On one CPU thread the clock is the process's own CPU
time, which other load disturbs least.
"""

from __future__ import annotations

import csv
import os
import platform
import shutil
import statistics
import sys
import time
from argparse import Namespace
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

Function = Callable[[], Any]


def run(args: Namespace) -> int:
    """Run the benchmark that the command line names; returns the exit status."""
    if args.device != "cpu":
        raise ValueError(f"--device: this benchmark runs on the cpu for now, got {args.device!r}")
    if args.csv is not None and not Path(args.csv).absolute().parent.is_dir():
        raise ValueError(f"--csv: no folder {Path(args.csv).parent}")
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler complains of absent GPUs
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 120)
    with threads(args.threads):
        console.print(machine(args.threads))
        if args.what == "ops":
            from vitarium.tools import bench_ops

            rows = bench_ops.measure(console, args.names, args.rounds, args.quick)
        elif args.what == "startup":
            from vitarium.tools import bench_startup

            rows = bench_startup.measure(console, args.rounds)
        else:
            from vitarium.tools import bench_models

            rows = bench_models.measure(console, args.names, args.rounds, args.quick)
    if args.csv is not None:
        write_csv(Path(args.csv), rows, machine(args.threads))
        console.print(f"wrote {args.csv}")
    return 0


def machine(num_threads: int) -> str:
    """One line about where figures come from."""
    from importlib.metadata import version

    processor = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        processor = next((x.split(":")[1].strip() for x in lines if "model name" in x), processor)
    clock = "process time" if num_threads == 1 else "wall clock"
    return (
        f"{processor}, {torch.backends.cpu.get_cpu_capability()}, {num_threads} thread(s), "
        f"{clock}, torch {torch.__version__}, timm {version('timm')}, "
        f"Python {platform.python_version()}"
    )


@contextmanager
def threads(count: int) -> Iterator[None]:
    """Compute with that many threads inside the block."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def interleaved(
    functions: Mapping[str, Function], rounds: int, seconds: float, progress: Progress | None = None
) -> dict[str, float]:
    """Median milliseconds of each function, taking turns.

    Args:
        functions: name -> what to time. A turn begins with a call that does not count and
            repeats a short one for about 20 ms: all are timed on caches of their own making.
        rounds: how many turns each has at the most.
        seconds: a function that has used this much time sits out the later rounds, but not
            before its third turn.
        progress: a bar to advance.
    """
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter

    def timed(function: Function, repeats: int) -> float:
        start = clock()
        for _ in range(repeats):
            function()
        return (clock() - start) / repeats

    repeats = {}
    for name, function in functions.items():
        timed(function, 1)
        repeats[name] = min(100, 1 + int(0.02 / max(timed(function, 1), 1e-6)))
    times: dict[str, list[float]] = {name: [] for name in functions}
    task = progress.add_task("", total=rounds) if progress else None
    for number in range(rounds):
        for name, function in functions.items():
            if number < 3 or sum(times[name]) * repeats[name] < seconds:
                function()  # the one before has emptied the caches
                times[name].append(timed(function, repeats[name]))
        if progress and task is not None:
            progress.advance(task)
    if progress and task is not None:
        progress.remove_task(task)
    return {name: statistics.median(t) * 1e3 for name, t in times.items()}


def peak_memory(function: Function) -> float:
    """MiB that a call holds at its peak beyond what was there before, on a CPU."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        result = function()
    del result
    held = peak = 0
    # the profiler's public tables hold totals; a peak needs the sequence of allocations
    for event in record.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    return peak / 2**20


def has_compiler() -> bool:
    """Whether torch.compile can build CPU code here."""
    return any(shutil.which(name) for name in ("c++", "g++", "clang++"))


def show(console: Console, title: str, columns: Sequence[str], rows: list[list[str]]) -> None:
    """Print one table; the first column is text, the others are numbers."""
    table = Table(title=title, title_justify="left", box=None, pad_edge=False)
    for i, name in enumerate(columns):
        table.add_column(name, justify="left" if i == 0 else "right", no_wrap=True)
    for row in rows:
        table.add_row(*row)
    console.print(table)
    console.print()


def write_csv(path: Path, rows: list[dict[str, Any]], head: str) -> None:
    """Write rows, with the machine in a comment line, in one go."""
    temporary = path.with_name(path.name + ".part")
    with temporary.open("w", newline="") as file:
        file.write(f"# {head}\n")
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    temporary.replace(path)
