"""Calls of bi-level routing attention at shapes of released models, for tests of its kernels."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from harness import random_maps
from torch import Tensor

Call = tuple[dict[str, Tensor], dict[str, Any]]
Form = tuple[tuple[int, int], tuple[int, int]]  # the map and the regions a side


def _call(
    batch: int,
    real: Form,
    least: Form,
    heads: int,
    topk: int,
    head_dim: int = 32,
    value_dim: int | None = None,
    padded: bool = False,
) -> Callable[[torch.dtype, torch.device, bool], Call]:
    """Views of one projection; ``least`` is the smallest map that runs what ``real`` runs."""

    def make(dtype: torch.dtype, device: torch.device, tiny: bool) -> Call:
        size, num_regions = least if tiny else real
        maps, normal = random_maps(size, dtype, 1 if tiny else batch, heads, head_dim)
        packed = torch.stack(list(maps.values()), 3).to(device).unbind(3)
        leaves = dict(zip(maps, packed, strict=True))
        if value_dim is not None:
            leaves["value"] = normal(*leaves["value"].shape[:4], value_dim).to(device)
        if padded:  # a parameter; rounded, or its rounding would change which regions are near
            leaves["pad"] = normal(3, heads, head_dim).float().to(device)
        leaves = {name: x.requires_grad_() for name, x in leaves.items()}
        return leaves, {"num_regions": num_regions, "topk": topk}

    return make


CALLS: dict[str, Callable[[torch.dtype, torch.device, bool], Call]] = {
    "biformer_s stage 1": _call(16, ((56, 56), (7, 7)), ((16, 16), (2, 2)), 2, 1),
    "biformer_s stage 2": _call(16, ((28, 28), (7, 7)), ((8, 12), (2, 3)), 4, 4),
    "biformer_s stage 3": _call(16, ((14, 14), (7, 7)), ((8, 10), (4, 5)), 8, 16),
    "detection stage 1": _call(2, ((200, 304), (7, 7)), ((15, 23), (2, 2)), 2, 1, padded=True),
    "detection stage 3": _call(2, ((50, 76), (16, 16)), ((15, 22), (4, 5)), 8, 16, padded=True),
    "ragged, masked": _call(8, ((13, 14), (7, 7)), ((7, 10), (4, 5)), 3, 16, 48, padded=True),
    "completed with zeros": _call(8, ((31, 45), (4, 7)), ((15, 13), (2, 2)), 3, 3, 48),
    "few channels of queries": _call(8, ((28, 21), (7, 7)), ((16, 9), (4, 3)), 4, 3, 24, 40),
    "all regions, head_dim 128": _call(8, ((28, 28), (2, 2)), ((12, 12), (2, 2)), 2, 4, 128),
}
