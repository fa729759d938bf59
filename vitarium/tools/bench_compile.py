"""``vitarium bench compile``: into how many programs torch.compile turns a model, on a CPU."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import timm
import torch
from rich.console import Console
from rich.progress import Progress
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch._dynamo.utils import counters

from vitarium.backbones._registry import entries
from vitarium.tools import _common, bench

Shape = tuple[int, int, int, int]

_BATCHES = (1, 2, 3, 5)
_MAX_ERROR = 1e-5


def measure(console: Console, names: Sequence[str]) -> list[dict[str, Any]]:
    """Count the programs of each model at changing shapes, and compare their numbers with eager's.

    The graphs run as they were traced (backend ``eager``), so no C++ compiler is needed: what is
    counted does not depend on what a backend makes of a graph. Sizes are square and not, odd, and
    so small that maps are padded to a window. They change at a batch of 2: for single images torch
    itself picks a convolution by the map's size and compiles once for each pick.

    Args:
        console: where the table goes.
        names: models of vitarium or timm, or globs; every ``*_atto`` of ours if none.

    Returns:
        A row for each model and each change: the shapes in their order, ``graphs`` and
        ``graph_breaks`` of the first, ``recompiles`` caused by the others and how many are our
        goal, ``max_error`` relative to the logits' standard deviation, and whether all is ``met``.

    Raises:
        ValueError: no model has this name, or none matches the glob.
    """
    attos = [name for name in entries() if name.endswith("_atto")]
    models = _common.model_names(names or attos)
    rows: list[dict[str, Any]] = []
    with torch.no_grad(), Progress(console=Console(stderr=True), transient=True) as progress:
        for name in progress.track(models, description=""):
            rows += _rows(name)
    columns = ["", "graphs", "breaks", "recompiles", "goal", "max error", "", "note"]
    table = [
        [
            f"{row['model']}, {row['change']}",
            str(row["graphs"]),
            str(row["graph_breaks"]),
            str(row["recompiles"]),
            f"<= {row['goal']}",
            f"{row['max_error']:.0e}",
            "met" if row["met"] else "MISSED",
            row["note"],
        ]
        for row in rows
    ]
    bench.show(console, "torch.compile, inference, goal 0 breaks", columns, table)
    return rows


def _rows(name: str) -> list[dict[str, Any]]:
    model: Any = timm.create_model(name).eval()
    cfg = model.pretrained_cfg
    channels, height, width = cfg["input_size"]
    changes = {"batch": [(batch, channels, height, width) for batch in _BATCHES]}
    goals = {"batch": 1, "H x W": 2}
    if not cfg["fixed_input_size"]:
        least = (cfg["min_input_size"] or cfg["input_size"])[-1]
        sizes = [(height, width), (height + 32, width + 32), (height + 32, width)]
        sizes += [(height, width + 64), (least + 5, width + 13), (least, least)]
        changes["H x W"] = [(2, channels, *size) for size in sizes]
    rows = []
    for change, shapes in changes.items():
        row = {"model": name, "change": change, **programs(model, shapes)}
        row["goal"] = goals[change]
        few = row["recompiles"] <= row["goal"] and not row["graph_breaks"]
        row["met"] = few and row["max_error"] <= _MAX_ERROR
        if cfg["fixed_input_size"]:
            row["note"] = "H x W are fixed" + (row["note"] and f"; {row['note']}")
        rows.append(row)
    return rows


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
