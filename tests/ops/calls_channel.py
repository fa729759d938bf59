"""Calls of channel attention at the shapes of released models, for tests of its kernels."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from harness import random_maps
from torch import Tensor

Call = tuple[dict[str, Tensor], dict[str, Any]]


def _maps(
    size: tuple[int, int],
    heads: int,
    batch: int,
    least: int = 1,
    head_dim: int = 32,
    mode: str = "davit",
) -> Callable[[torch.dtype, torch.device, bool], Call]:
    """Views of one projection; ``least`` images still run what ``batch`` runs on a card."""

    def make(dtype: torch.dtype, device: torch.device, tiny: bool) -> Call:
        maps, _ = random_maps(size, dtype, least if tiny else batch, heads, head_dim)
        packed = torch.stack(list(maps.values()), 3).to(device).unbind(3)
        leaves = {k: x.requires_grad_() for k, x in zip(maps, packed, strict=True)}
        return leaves, {"mode": mode}

    return make


CALLS: dict[str, Callable[[torch.dtype, torch.device, bool], Call]] = {
    "davit_t stage 1": _maps((56, 56), 3, 16),
    "davit_t stage 2, many images": _maps((28, 28), 6, 176, least=6),
    "davit_t stage 3": _maps((14, 14), 12, 32),
    "davit_t stage 4": _maps((7, 7), 24, 32),
    "ragged": _maps((100, 152), 3, 1),
    "florence": _maps((24, 24), 8, 16, head_dim=64, mode="florence"),
    "head_dim 24": _maps((27, 31), 4, 8, head_dim=24),
    "head_dim 128": _maps((14, 14), 4, 8, head_dim=128),
}
