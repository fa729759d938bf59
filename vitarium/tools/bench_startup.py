"""``vitarium bench startup``: what the program and the package cost before they do anything."""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import time
from typing import Any

from rich.console import Console

from vitarium.tools import bench

_PROGRAM = (sys.executable, "-c", "import sys, vitarium_cli; sys.exit(vitarium_cli.main())")
_COMMANDS = {
    "vitarium --help": (*_PROGRAM, "--help"),
    "vitarium list": (*_PROGRAM, "list"),
    "import timm": (sys.executable, "-c", "import timm"),
    "import vitarium": (sys.executable, "-c", "import vitarium"),
}


def measure(console: Console, rounds: int) -> list[dict[str, Any]]:
    """Time fresh processes, taking turns; an import counts CPU time, which is less noisy."""
    wall: dict[str, list[float]] = {name: [] for name in _COMMANDS}
    cpu: dict[str, list[float]] = {name: [] for name in _COMMANDS}
    for _ in range(rounds):
        for name, command in _COMMANDS.items():
            start, before = time.perf_counter(), os.times()
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
            after = os.times()
            wall[name].append(time.perf_counter() - start)
            user = after.children_user - before.children_user
            cpu[name].append(user + after.children_system - before.children_system)
    found = {
        name: (statistics.median(wall[name]), statistics.median(cpu[name])) for name in _COMMANDS
    }
    table = [[name, *(f"{seconds:.2f}" for seconds in times)] for name, times in found.items()]
    bench.show(console, "fresh processes, medians", ["", "wall s", "CPU s"], table)
    ratio = found["import vitarium"][1] / found["import timm"][1]
    console.print(f"import vitarium over import timm: {ratio:.2f}")
    return [
        {"command": name, "wall_s": round(a, 3), "cpu_s": round(b, 3)}
        for name, (a, b) in found.items()
    ]
