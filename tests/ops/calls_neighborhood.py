"""Calls of neighborhood attention that its kernels are compiled, tested and timed with."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from harness import random_maps
from torch import Tensor

Call = tuple[dict[str, Tensor], dict[str, Any]]


def call(
    dtype: torch.dtype,
    device: torch.device,
    tiny: bool,
    *,
    size: tuple[int, int],
    small: tuple[int, int],
    heads: int,
    batch: int = 16,
    kernel: tuple[int, int] = (7, 7),
    dilation: tuple[int, int] = (1, 1),
    head_dim: int = 32,
    biased: bool = True,
    padded: bool = False,
) -> Call:
    """Views of one projection; ``small`` is the tiny call's map, where steps are of 2 at most."""
    leaves, normal = random_maps(
        small if tiny else size, dtype, 1 if tiny else batch, 2 if tiny else heads, head_dim
    )
    heads = leaves["query"].shape[3]
    if tiny:
        dilation = (min(dilation[0], 2), min(dilation[1], 2))
    if biased:
        leaves["bias"] = normal(heads, 2 * kernel[0] - 1, 2 * kernel[1] - 1).float()
    if padded:
        leaves["pad"] = normal(3, heads, head_dim)
    leaves = {name: x.to(device).requires_grad_() for name, x in leaves.items()}
    return leaves, {"kernel_size": kernel, "dilation": dilation}


CALLS: dict[str, Callable[[torch.dtype, torch.device, bool], Call]] = {
    "nat stage 1": partial(call, size=(56, 56), small=(14, 9), heads=2),
    "nat stage 3": partial(call, size=(14, 14), small=(8, 8), heads=8, batch=32),
    "nat stage 4": partial(call, size=(7, 7), small=(7, 7), heads=16, batch=32),
    "dinat stage 1": partial(call, size=(56, 56), small=(14, 14), heads=2, dilation=(8, 8)),
    "dinat stage 2, rows": partial(call, size=(28, 30), small=(14, 7), heads=4, dilation=(4, 1)),
    "detection, no bias": partial(
        call, size=(50, 76), small=(9, 11), heads=4, batch=8, biased=False
    ),
    "wide, head_dim 24": partial(
        call, size=(28, 28), small=(13, 13), heads=4, kernel=(13, 13), head_dim=24
    ),
    "odd, head_dim 48": partial(
        call, size=(30, 40), small=(6, 10), heads=4, kernel=(3, 9), dilation=(2, 1), head_dim=48
    ),
    "padded": partial(call, size=(5, 9), small=(5, 6), heads=4, batch=32, padded=True),
}
