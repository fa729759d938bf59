"""``vitarium bench``: what runs how fast, side by side in one run.

All candidates of a case take turns, round after round, and medians are compared: a machine that
slows down for a while slows all of them. On one CPU thread the clock is the process's own CPU
time, which other load disturbs least.
"""

from __future__ import annotations

import csv
import inspect
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

import timm
import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from torch import nn

from vitarium.tools._common import pick_device, require_matplotlib

Function = Callable[[], Any]
Row = dict[str, Any]
CPU = torch.device("cpu")
_CLOCKS = {"convert": "wall clock of fresh processes", "embed": "wall clock"}


def run(args: Namespace) -> int:
    """Run the benchmark that the command line names; returns the exit status.

    Raises:
        ValueError: an argument outside of what the benchmark takes.
        KeyboardInterrupt: Ctrl-C; its message says what was not measured.
    """
    if args.what == "plot":
        from vitarium.tools import bench_plots

        out = Path(args.out)
        out.mkdir(parents=True, exist_ok=True)
        for file in bench_plots.draw(bench_plots.read(args.files), out):
            print(f"wrote {file}")
        return 0
    device = _checked(args)
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler complains of absent GPUs
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 140)
    on_gpu = args.what == "ops" and device.type == "cuda"
    head = machine(args.threads, device, _CLOCKS.get(args.what))
    if device.type == "cuda":
        from vitarium.tools import bench_gpu_report

        head += f"\n{bench_gpu_report.head(device)}"
    if on_gpu:
        from vitarium.tools import bench_gpu

        ceilings = bench_gpu.ceilings(device)
        head += f"\n{ceilings}"

    def save(rows: list[Row]) -> None:
        if args.csv is not None and rows:
            write_csv(Path(args.csv), rows, head)

    with threads(args.threads):
        console.print(head)
        if on_gpu:
            rows = bench_gpu.measure(console, args, device, ceilings, save)
        elif args.what == "ops":
            from vitarium.tools import bench_ops

            rows = bench_ops.measure(console, args.names, args.rounds, args.quick)
        elif args.what == "models":
            from vitarium.tools import bench_models

            rows = bench_models.measure(console, args, device, save)
        elif args.what == "compile":
            from vitarium.tools import bench_compile

            rows = bench_compile.measure(console, args.names)
        elif args.what == "convert":
            from vitarium.tools import bench_convert

            rows = bench_convert.measure(console, args.rounds)
        elif args.what == "digits":
            from vitarium.tools import bench_digits

            rows = bench_digits.measure(console, args.names, args.jobs, save)
        elif args.what == "embed":
            from vitarium.tools import bench_embed

            rows = bench_embed.measure(console, args, device)
        else:
            from vitarium.tools import bench_startup

            rows = bench_startup.measure(console, args.rounds)
    save(rows)
    if args.csv is not None and rows:
        console.print(f"wrote {args.csv}")
    if args.plot is not None:
        from vitarium.tools import bench_digits, bench_op_plots, bench_plots

        draw = {"ops": bench_op_plots.draw, "digits": bench_digits.draw}.get(
            args.what, bench_plots.draw
        )
        for file in draw(rows, Path(args.plot)):
            console.print(f"wrote {file}")
    return 0


def _checked(args: Namespace) -> torch.device:
    """The device, if what the benchmarks share makes sense."""
    for option, value in (("--rounds", args.rounds), ("--threads", args.threads)):
        if value is not None and value < 1:
            raise ValueError(f"{option}: expected a positive number, got {value}")
    if args.csv is not None and not Path(args.csv).absolute().parent.is_dir():
        raise ValueError(f"--csv: no folder {Path(args.csv).parent}")
    if args.plot is not None:
        require_matplotlib()
        if not Path(args.plot).is_dir():
            raise ValueError(f"--plot: no folder {args.plot}")
    device = pick_device(args.device)
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"--device: expected cpu or cuda, got {args.device!r}")
    if args.what == "ops" and device.type == "cpu":
        for option in ("dtype", "sizes"):
            if getattr(args, option):
                raise ValueError(f"--{option}: expected it with --device cuda only")
    return device


def machine(num_threads: int, device: torch.device = CPU, clock: str | None = None) -> str:
    """One line about where figures come from; ``clock`` is by what, if not as `interleaved`."""
    from importlib.metadata import version

    processor = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        processor = next((x.split(":")[1].strip() for x in lines if "model name" in x), processor)
    processor += f", {torch.backends.cpu.get_cpu_capability()}, {num_threads} thread(s)"
    if device.type == "cuda":
        processor = f"{torch.cuda.get_device_name(device)}, {processor}"
    clock = clock or clock_name(num_threads, device)
    return (
        f"{processor}, {clock}, torch {torch.__version__}, "
        f"timm {version('timm')}, Python {platform.python_version()}"
    )


def clock_name(num_threads: int, device: torch.device = CPU) -> str:
    """What `interleaved` measures on this device with so many threads."""
    if device.type == "cuda":
        return "CUDA events"
    return "process time" if num_threads == 1 else "wall clock"


class OtherLoad:
    """Watches what other programs do, from its making on."""

    def __init__(self) -> None:
        self._before = self._seconds()

    def cores(self) -> float | None:
        """How many CPU cores they kept busy on average; None where the system does not tell."""
        now = self._seconds()
        if now is None or self._before is None:
            return None
        others, wall = (b - a for a, b in zip(self._before, now, strict=True))
        return round(max(0.0, others / max(wall, 1e-3)), 2)

    @staticmethod
    def _seconds() -> tuple[float, float] | None:
        """CPU seconds of all but this process, and the wall clock."""
        statistics_of_cpus = Path("/proc/stat")
        if not statistics_of_cpus.exists():
            return None
        user, nice, system, _, _, *more = statistics_of_cpus.read_text().split()[1:9]
        ticks = sum(int(x) for x in (user, nice, system, *more))
        busy = ticks / os.sysconf("SC_CLK_TCK")
        return busy - time.process_time(), time.perf_counter()


def built(name: str, size: tuple[int, int]) -> nn.Module:
    """A model for images of a size, in pixels."""
    model: nn.Module = timm.create_model(name)
    if any("img_size" in inspect.signature(c).parameters for c in type(model).mro()):
        model = timm.create_model(name, img_size=size)
    return model


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
    functions: Mapping[str, Function],
    rounds: int,
    seconds: float,
    progress: Progress | None = None,
    device: torch.device = CPU,
) -> dict[str, float]:
    """Median milliseconds of each function, taking turns.

    Args:
        functions: name -> what to time. A turn begins with a call that does not count and
            repeats a short one for about 20 ms: all are timed on caches of their own making.
        rounds: how many turns each has at the most.
        seconds: a function that has used this much time sits out the later rounds, but not
            before its third turn.
        progress: a bar to advance.
        device: where the functions compute; it is the current one if it is a CUDA device.
    """
    repeats = {}
    for name, function in functions.items():
        timed(function, 1, device)
        repeats[name] = min(100, 1 + int(0.02 / max(timed(function, 1, device), 1e-6)))
    times: dict[str, list[float]] = {name: [] for name in functions}
    task = progress.add_task("", total=rounds) if progress else None
    for number in range(rounds):
        for name, function in functions.items():
            if number < 3 or sum(times[name]) * repeats[name] < seconds:
                function()  # the one before has emptied the caches
                times[name].append(timed(function, repeats[name], device))
        if progress and task is not None:
            progress.advance(task)
    if progress and task is not None:
        progress.remove_task(task)
    return {name: statistics.median(t) * 1e3 for name, t in times.items()}


def timed(function: Function, repeats: int, device: torch.device = CPU) -> float:
    """Seconds of a call: of the device, or of the process where it computes on one thread."""
    if device.type == "cuda":
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        for _ in range(repeats):
            function()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1e3 / repeats
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    start = clock()
    for _ in range(repeats):
        function()
    return (clock() - start) / repeats


def peak_memory(function: Function, device: torch.device = CPU) -> float:
    """MiB that a call holds at its peak beyond what was there before, on the device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        result = function()
        torch.cuda.synchronize(device)
        del result
        return (torch.cuda.max_memory_allocated(device) - before) / 2**20
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


def write_csv(path: Path, rows: list[Row], head: str) -> None:
    """Write rows, with the machine in comment lines, in one go."""
    temporary = path.with_name(path.name + ".part")
    with temporary.open("w", newline="") as file:
        file.writelines(f"# {line}\n" for line in head.splitlines())
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    temporary.replace(path)
