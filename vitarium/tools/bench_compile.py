"""``vitarium bench compile``: into how many programs torch.compile turns a model, on a CPU."""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import filter as matching
from itertools import pairwise
from typing import Any

import timm
import torch
from rich.console import Console
from rich.progress import Progress
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch._dynamo.utils import counters

from vitarium.backbones._blocks import NeighborhoodAttention
from vitarium.backbones._registry import entries
from vitarium.tools import _common, bench

Shape = tuple[int, int, int, int]

_BATCHES = (1, 2, 3, 5)
_STEP = 32
_MAX_ERROR = 1e-5


def measure(console: Console, names: Sequence[str]) -> list[dict[str, Any]]:
    """Count the programs of each model at changing shapes, and compare their numbers with eager's.

    The graphs run as they were traced (backend ``eager``), so no C++ compiler is needed: what is
    counted does not depend on what a backend makes of a graph. A model that takes any size is
    measured at sizes where no map is padded to a window, and then at smaller ones, where it may
    have a program for each set of padded levels. Sizes change at a batch of 2: for single images
    torch itself picks a convolution by the map's size and compiles once for each pick.

    Args:
        console: where the table goes.
        names: models, or patterns of ours such as ``nat_*``; every ``*_atto`` if none.

    Returns:
        A row for each model and each change: the shapes in their order, ``graphs`` and
        ``graph_breaks`` of the first, ``recompiles`` caused by the others and how many are our
        goal, ``max_error`` relative to the logits' standard deviation, and whether all is ``met``.

    Raises:
        ValueError: no model has this name, or none of ours fits the pattern.
    """
    rows: list[dict[str, Any]] = []
    with torch.no_grad(), Progress(console=Console(stderr=True), transient=True) as progress:
        for name in progress.track(_models(names), description=""):
            rows += _rows(name)
    columns = ["", "graphs", "breaks", "recompiles", "goal", "max error", "", "note"]
    table = [
        [
            f"{row['model']}, {row['change']}",
            str(row["graphs"]),
            str(row["graph_breaks"]),
            str(row["recompiles"]),
            "" if row["goal"] is None else f"<= {row['goal']}",
            f"{row['max_error']:.0e}",
            "met" if row["met"] else "MISSED",
            row["note"],
        ]
        for row in rows
    ]
    bench.show(console, "torch.compile, inference, goal 0 breaks", columns, table)
    return rows


def _models(names: Sequence[str]) -> list[str]:
    found: list[str] = []
    for name in names or ("*_atto",):
        ours = matching(entries(), name)
        if not ours and "*" in name:
            raise ValueError(f"bench compile: no model of vitarium fits {name!r}")
        if not ours:
            _common.check_model(name, pretrained=False)
        found += ours or [name]
    return [*dict.fromkeys(found)]


def _rows(name: str) -> list[dict[str, Any]]:
    model: Any = timm.create_model(name).eval()
    cfg = model.pretrained_cfg
    channels, height, width = cfg["input_size"]
    changes = {"batch": [(batch, channels, height, width) for batch in _BATCHES]}
    goals: dict[str, int | None] = {"batch": 1, "H x W": 2, "padded maps": None}
    if not cfg["fixed_input_size"]:
        smallest, n = _smallest_side(cfg), unpadded_side(timm.create_model(name, device="meta"))
        sizes = [(n, n), (n + 32, n + 32), (n + 32, n), (n, n + 64), (n + 1, n + 13)]
        changes["H x W"] = [(2, channels, *size) for size in sizes]
        if n > smallest:
            sizes = [(smallest, smallest), (smallest + 5, n + 32)]
            changes["padded maps"] = [(2, channels, *size) for size in sizes]
    rows = []
    for change, shapes in changes.items():
        row = {"model": name, "change": change, **programs(model, shapes)}
        row["goal"] = goals[change]
        fewer = row["goal"] is None or row["recompiles"] <= row["goal"]
        row["met"] = fewer and not row["graph_breaks"] and row["max_error"] <= _MAX_ERROR
        if cfg["fixed_input_size"]:
            row["note"] = "H x W are fixed" + (row["note"] and f"; {row['note']}")
        rows.append(row)
    return rows


def _smallest_side(cfg: dict[str, Any]) -> int:
    side: int = (cfg["min_input_size"] or cfg["input_size"])[-1]
    return side


def unpadded_side(model: nn.Module) -> int:
    """The smallest square image, in steps of 32 pixels, no map of which is padded to a window.

    Args:
        model: one of ours, or a feature extractor around it; on the meta device it costs nothing.
    """
    cfg: Any = model.pretrained_cfg
    device = next(model.parameters()).device
    padded: list[bool] = []

    def look(module: NeighborhoodAttention, args: tuple[torch.Tensor, ...]) -> None:
        padded.append(min(args[0].shape[1:3]) < module.kernel_size * module.dilation)

    hooks = [
        module.register_forward_pre_hook(look)
        for module in model.modules()
        if isinstance(module, NeighborhoodAttention)
    ]
    side = _smallest_side(cfg)
    while True:
        padded.clear()
        model(torch.empty(1, cfg["input_size"][0], side, side, device=device))
        if not any(padded):
            break
        side += _STEP
    for hook in hooks:
        hook.remove()
    return side


def programs(model: nn.Module, shapes: Sequence[Shape]) -> dict[str, Any]:
    """What compiling the model for these shapes, one after the other, takes and gives."""
    torch.compiler.reset()
    counters.clear()
    counter = CompileCounterWithBackend("eager")
    compiled = torch.compile(model, backend=counter)
    graphs, errors = [], []
    for shape in shapes:
        x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
        expected = model(x)
        errors.append(float((compiled(x) - expected).abs().max() / expected.std()))
        graphs.append(counter.frame_count)
    reasons = [reason.splitlines()[0] for reason in counters["graph_break"]]
    return {
        "shapes": " ".join("x".join(map(str, shape)) for shape in shapes),
        "graphs": graphs[0],
        "graph_breaks": max(graphs[0] - 1, 0),
        "recompiles": sum(b > a for a, b in pairwise(graphs)),
        "max_error": max(errors),
        "note": "; ".join(reasons),
    }
