"""What ``vitarium bench ops --device cuda`` says: the head, rows, tables, and verdicts on goals."""

from __future__ import annotations

import shlex
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version

import torch
from rich.console import Console

from vitarium.tools import bench
from vitarium.tools.bench import Row
from vitarium.tools.bench_case import Cost, OpCase

# Goals. The ceiling is the copy, or the product where an op computes for longer than it moves.
CEILING = 50.0  # percent of the ceiling that a forward pass is to reach
PEER, OR_CEILING = 1.5, 80.0  # times the best peer, or else percent of the ceiling
TRAINING = 1.3  # times the best peer, forward and backward

_QUERY = ("driver_version", "clocks.max.sm", "clocks.max.mem", "power.limit")


def head(device: torch.device, argv: list[str] | None = None) -> str:
    """What `bench.machine` does not say of a GPU, and the command: two lines."""
    about = ", ".join(f"{name} {_version(name)}" for name in ("triton", "natten"))
    command = shlex.join(sys.argv[1:] if argv is None else argv)
    return f"{_card(device)}, {about}\nvitarium {command}"


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "absent"


def _card(device: torch.device) -> str:
    if device.type != "cuda":
        return str(device)
    card = torch.cuda.get_device_properties(device)
    return (
        f"{card.total_memory / 2**30:.0f} GiB, {card.multi_processor_count} multiprocessors, "
        f"L2 {card.L2_cache_size / 2**20:.0f} MiB, CUDA {torch.version.cuda}, {_driver(card)}"
    )


def _driver(card: object) -> str:
    """Version of the driver, highest clocks and limit of power, where nvidia-smi tells."""
    identity = getattr(card, "uuid", None)
    command = ["nvidia-smi", f"--query-gpu={','.join(_QUERY)}", "--format=csv,noheader"]
    command += [] if identity is None else [f"--id=GPU-{identity}"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True)
    except (OSError, subprocess.SubprocessError):
        return "driver unknown (no nvidia-smi)"
    values = done.stdout.splitlines()[0].split(", ")
    return ", ".join(f"{name} {x}" for name, x in zip(_NAMES, values, strict=False))


_NAMES = ("driver", "SM up to", "memory up to", "power up to")


def row(
    case: OpCase, biased: bool, backward: bool, name: str, cost: Cost, copy: float, product: float
) -> Row:
    """A row of the results before its candidate has run; ``complete`` ends it.

    ``first_s`` is the first call's time: of compiling, and of timing configurations unless these
    are known from before. ``bytes`` and ``flops`` are the least that a call can do. ``gb_s``,
    ``tflop_s`` and the percents of a copy and of a bfloat16 product, both measured in the same run,
    are by these.
    """
    return {
        "op": case.op,
        "case": case.title,
        "batch": cost.shape[0],
        "dtype": str(case.dtype).removeprefix("torch."),
        "pass": ("forward+backward" if backward else "forward") + (", bias" if biased else ""),
        "implementation": name,
        "auto": False,
        **dict.fromkeys(("ms", "over_auto", "gb_s", "tflop_s", "copy_percent", "product_percent")),
        **dict.fromkeys(("peak_mib", "max_error", "first_s", "timed")),
        "note": "",
        "bytes": cost.bytes,
        "flops": cost.flops,
        "copy_gb_s": round(copy, 1),
        "product_tflop_s": round(product, 1),
        "device": str(case.device),
    }


def complete(rows: list[Row]) -> None:
    """Enter what follows from the times of one pass's rows."""
    ours = _auto(rows)
    for each in rows:
        if each["ms"] is None:
            continue
        seconds = each["ms"] / 1e3
        each["ms"] = round(each["ms"], 6)
        each["gb_s"] = round(each["bytes"] / seconds / 1e9, 1)
        each["tflop_s"] = round(each["flops"] / seconds / 1e12, 2)
        each["copy_percent"] = round(100 * each["gb_s"] / each["copy_gb_s"], 1)
        each["product_percent"] = round(100 * each["tflop_s"] / each["product_tflop_s"], 1)
        if ours["ms"] is not None:
            each["over_auto"] = round(each["ms"] / ours["ms"], 3)


def _auto(rows: list[Row]) -> Row:
    """The row of what a user gets."""
    return next(each for each in rows if each["auto"])


def show(console: Console, rows: list[Row]) -> None:
    """Print one pass's rows, the fastest first, and why others did not run."""
    columns = {
        "ms": ("ms", ".4f"),
        "x auto": ("over_auto", ".2f"),
        "GB/s": ("gb_s", ",.0f"),
        "% copy": ("copy_percent", ".0f"),
        "TFLOP/s": ("tflop_s", ".1f"),
        "% product": ("product_percent", ".1f"),
        "peak extra MiB": ("peak_mib", ".1f"),
        "max error": ("max_error", ".0e"),
        "first call s": ("first_s", ".1f"),
        "timed": ("timed", ""),
    }
    table = [
        [
            each["implementation"] + " (auto)" * each["auto"],
            *("" if each[x] is None else f"{each[x]:{form}}" for x, form in columns.values()),
        ]
        for each in sorted(rows, key=lambda each: each["ms"] or 0)
        if each["ms"] is not None
    ]
    first = rows[0]
    title = (
        f"{_title(first)}; at least {first['bytes'] / 1e6:,.1f} MB, {first['flops'] / 1e9:,.2f} "
        "GFLOP"
    )
    bench.show(console, title, ["", *columns], table)
    for each in rows:
        if each["note"]:
            said = "not run" if each["ms"] is None else "note"
            console.print(f"  {said}: {each['implementation']}: {each['note']}")


def _title(each: Row) -> str:
    shape = f"{each['op']} {each['case']}, batch {each['batch']}"
    return f"{shape}, {each['dtype']}, {each['pass']}"


def verdicts(rows: list[Row]) -> list[list[str]]:
    """Title, what was reached, the goal, and whether it is met, for each goal of one pass.

    They are about what `auto` runs. Its peers are all others but our own kernels.
    """
    ours = _auto(rows)
    name = ours["implementation"]
    own = ("triton", name)
    peers = [
        each
        for each in rows
        if each["ms"] is not None and each["implementation"].partition(",")[0] not in own
    ]
    best = min(peers, key=lambda each: each["ms"], default=None)
    title = f"{_title(ours)}: {name}"
    if ours["ms"] is None:
        return [[title, f"not run: {ours['note']}", "", "MISSED"]]
    percent, ceiling = max((ours["copy_percent"], "copy"), (ours["product_percent"], "product"))
    ratio = None if best is None else best["ms"] / ours["ms"]
    reached = "no peer ran" if best is None else f"{ratio:.2f} x {best['implementation']}"
    if "backward" in ours["pass"]:
        met = None if ratio is None else ratio >= TRAINING
        return [[title, reached, f">= {TRAINING:g} x best peer", _said(met)]]
    beaten = True if percent >= OR_CEILING else None if ratio is None else ratio >= PEER
    return [
        [
            title,
            f"{percent:.0f} % of {ceiling}",
            f">= {CEILING:g} % of {ceiling}",
            _said(percent >= CEILING),
        ],
        [
            title,
            f"{reached}, {percent:.0f} % of {ceiling}",
            f">= {PEER:g} x best peer or {OR_CEILING:g} % of {ceiling}",
            _said(beaten),
        ],
    ]


def _said(met: bool | None) -> str:
    return {True: "met", False: "MISSED", None: ""}[met]


def judge(console: Console, found: list[list[str]]) -> None:
    """Print all verdicts, and how many goals are met."""
    if found:
        met = sum(line[-1] == "met" for line in found)
        judged = sum(line[-1] != "" for line in found)
        title = f"Goals, of what `auto` runs: {met} of {judged} met"
        bench.show(console, title, ["", "", "goal", ""], found)
