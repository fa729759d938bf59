"""``vitarium bench convert``: time and memory of converting a large checkpoint."""

from __future__ import annotations

import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import timm
import torch
from rich.console import Console
from rich.progress import Progress

from vitarium.tools import bench

_ENTRY = "dinat_large"
_PLAIN = "torch.load, save_file, two sha256"
_OURS = "vitarium convert"
_GOALS = {"seconds": 1.2, "memory": 1.3}  # of the plain way's seconds, of the file's size
_PAUSE = 0.002  # seconds between two looks at the memory
_STATUS = Path("/proc/self/status")


def measure(console: Console, rounds: int, entry: str = _ENTRY) -> list[dict[str, Any]]:
    """Convert a checkpoint in fresh processes, ours and the plain way taking turns.

    The checkpoint has random weights in the authors' wrapper. Seconds are wall-clock time of the
    work, imports aside; ours includes the model's description, the comparison, the card and
    waiting for the disk. Memory is the highest amount of private (anonymous) memory of the whole
    process, imports included; pages of mapped files can be dropped at any time and do not count.

    Args:
        console: where the table goes.
        rounds: turns of each; medians count.
        entry: the model.

    Returns:
        A row for each way: seconds, their ratio, private MiB at the peak and before the work,
        MiB of the file, their ratio, and whether both goals are ``met``. None where the system
        does not tell.

    Raises:
        ValueError: too little space for temporary files.
    """
    num_bytes = sum(x.nbytes for x in timm.create_model(entry, device="meta").state_dict().values())
    with tempfile.TemporaryDirectory(prefix="vitarium-bench-") as folder:
        free = shutil.disk_usage(folder).free
        if free < 3 * num_bytes:
            raise ValueError(f"needs {3 * num_bytes:,} bytes in {folder}, which has {free:,}")
        source = Path(folder) / f"{entry}.pth"
        torch.manual_seed(0)
        torch.save({"model": timm.create_model(entry).state_dict()}, source)
        size = source.stat().st_size / 2**20
        found: dict[str, list[dict[str, Any]]] = {_PLAIN: [], _OURS: []}
        with Progress(console=Console(stderr=True), transient=True) as progress:
            for _ in progress.track(range(rounds), description=""):
                for way, runs in found.items():
                    runs.append(_fresh_process(way, entry, source))
    rows = [_row(way, runs, size) for way, runs in found.items()]
    rows[1]["time_ratio"] = round(rows[1]["wall_s"] / rows[0]["wall_s"], 3)
    memory = rows[1]["memory_ratio"]
    in_time = rows[1]["time_ratio"] <= _GOALS["seconds"]
    rows[1]["met"] = in_time and (memory is None or memory <= _GOALS["memory"])
    _show(console, rows, size)
    return rows


def _row(way: str, runs: list[dict[str, Any]], size: float) -> dict[str, Any]:
    seconds = [run["seconds"] for run in runs]
    row: dict[str, Any] = {
        "way": way,
        "runs": len(runs),
        "wall_s": round(statistics.median(seconds), 3),
        "wall_s_min": round(min(seconds), 3),
        "wall_s_max": round(max(seconds), 3),
        "time_ratio": None,
        "peak_mib": None,
        "imports_mib": None,
        "file_mib": round(size, 1),
        "memory_ratio": None,
        "met": None,
    }
    if runs[0]["peak"] is not None:
        peak = statistics.median(run["peak"] for run in runs)
        row["peak_mib"] = round(peak, 1)
        row["imports_mib"] = round(statistics.median(run["before"] for run in runs), 1)
        row["memory_ratio"] = round(peak / size, 3)
    return row


def _show(console: Console, rows: list[dict[str, Any]], size: float) -> None:
    def known(value: float | None, digits: int) -> str:
        return "-" if value is None else f"{value:.{digits}f}"

    table = [
        [
            row["way"],
            f"{row['wall_s']:.2f}",
            known(row["time_ratio"], 2),
            known(row["peak_mib"], 0),
            known(row["imports_mib"], 0),
            known(row["memory_ratio"], 2),
            {True: "met", False: "MISSED", None: ""}[row["met"]],
        ]
        for row in rows
    ]
    columns = ["", "wall s", "ratio", "private MiB", "of imports", "of the file", ""]
    console.print(
        f"a checkpoint of {size:.0f} MiB, fresh processes, medians of {rows[0]['runs']}; goals: "
        f"{_GOALS['seconds']} of the plain way's seconds, {_GOALS['memory']} of the file's size"
    )
    bench.show(console, "", columns, table)
    if rows[0]["peak_mib"] is None:
        console.print("memory is measured on Linux only")


def _fresh_process(way: str, entry: str, source: Path) -> dict[str, Any]:
    out = source.with_name("out.safetensors")
    code = f"from vitarium.tools import bench_convert; bench_convert.{_CHILDREN[way].__name__}"
    child = subprocess.run(
        [sys.executable, "-c", f"{code}({entry!r}, {os.fspath(source)!r}, {os.fspath(out)!r})"],
        check=True,
        stdout=subprocess.PIPE,
        text=True,
    )
    for file in (out, out.with_suffix(".json")):
        file.unlink(missing_ok=True)
    result: dict[str, Any] = json.loads(child.stdout)
    return result


def plain(entry: str, source: str, out: str) -> None:
    """In a process of its own: the plain way, without a look at names. Prints its costs."""
    import hashlib

    from safetensors.torch import save_file

    def work() -> None:
        save_file(torch.load(source, weights_only=True)["model"], out)
        for path in (source, out):
            digest = hashlib.sha256()
            with open(path, "rb") as file:
                while chunk := file.read(1 << 20):
                    digest.update(chunk)

    _print_costs(work)


def converted(entry: str, source: str, out: str) -> None:
    """In a process of its own: our way. Prints its costs."""
    from vitarium.checkpoints.cards import write
    from vitarium.checkpoints.conversion import plan

    _print_costs(lambda: write(plan(entry, source), source, out))


_CHILDREN = {_PLAIN: plain, _OURS: converted}


def _print_costs(work: Callable[[], object]) -> None:
    with _PrivateMemory() as memory:
        start = time.perf_counter()
        work()
        seconds = time.perf_counter() - start
    print(json.dumps({"seconds": seconds, "peak": memory.peak, "before": memory.before}))


class _PrivateMemory:
    """Watches this process's anonymous memory, in MiB, inside a ``with``."""

    before: float | None = None
    peak: float | None = None

    def __enter__(self) -> _PrivateMemory:
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch)
        if _STATUS.exists():
            self.before = self.peak = _anonymous()
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        if self._thread.ident is not None:
            self._thread.join()

    def _watch(self) -> None:
        while not self._done.wait(_PAUSE):
            self.peak = max(self.peak or 0.0, _anonymous())


def _anonymous() -> float:
    lines = _STATUS.read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon:")) / 1024
