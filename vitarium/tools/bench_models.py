"""``vitarium bench models``: whole networks side by side, ours and timm's, at inference."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import timm
import torch
from rich.console import Console
from rich.progress import Progress
from torch.utils.flop_counter import FlopCounterMode

from vitarium.ops import use_impl
from vitarium.tools import _common, bench

_DEFAULT = ("nat_mini", "swin_tiny_patch4_window7_224", "convnext_tiny")


def measure(
    console: Console, names: Sequence[str], rounds: int, quick: bool
) -> list[dict[str, Any]]:
    """Time the named models (nat_mini and its timm peers if none), batch 8 at 224 pixels.

    Weights are random: speed does not depend on them. GFLOPs are multiply-adds as the papers
    count them, counted on the definition of each op, whatever implementation is timed.
    """
    batch, size = (1 if quick else 8), 224
    image = torch.randn(batch, 3, size, size)
    models = {}
    for name in names or _DEFAULT:
        _common.check_model(name, pretrained=False)
        models[name] = timm.create_model(name).eval()
    rows: list[dict[str, Any]] = []
    with torch.inference_mode(), Progress(console=Console(stderr=True), transient=True) as bar:
        steps = {name: (lambda model=model: model(image)) for name, model in models.items()}
        for name, model in models.items():
            with use_impl("reference"), FlopCounterMode(display=False) as counter:
                model(image[:1])
            rows.append(
                {
                    "model": name,
                    "batch_size": batch,
                    "img_size": size,
                    "param_count": round(sum(p.numel() for p in model.parameters()) / 1e6, 2),
                    "gmacs": round(counter.get_total_flops() / 2e9, 3),
                    "peak_mib": round(bench.peak_memory(steps[name]), 1),
                }
            )
        times = bench.interleaved(steps, rounds, 60.0, bar)
    for row in rows:
        row["step_ms"] = round(times[row["model"]], 2)
        row["samples_per_sec"] = round(batch / times[row["model"]] * 1e3, 2)
        row["samples_per_sec_per_gmac"] = round(row["samples_per_sec"] / row["gmacs"], 2)
    columns = ["", "params M", "GFLOPs", "images/s", "images/s per GFLOP", "peak extra MiB"]
    table = [
        [
            row["model"],
            f"{row['param_count']:.1f}",
            f"{row['gmacs']:.2f}",
            f"{row['samples_per_sec']:.1f}",
            f"{row['samples_per_sec_per_gmac']:.2f}",
            f"{row['peak_mib']:.0f}",
        ]
        for row in rows
    ]
    bench.show(console, f"inference, batch {batch}, {size} x {size}, fp32", columns, table)
    return rows
