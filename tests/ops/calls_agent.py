"""Calls of agent attention whose kernels are compiled and timed: maps of the released models."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor


def _make(
    dtype: torch.dtype,
    device: torch.device,
    tiny: bool,
    *,
    batch: int,
    size: tuple[int, int],
    heads: int,
    head_dim: int,
    agents: int,
    classes: int = 0,
    biased: bool = True,
    split: bool = False,
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Views of one projection, or with ``split`` of two, with class tokens in front of the map.

    ``tiny`` leaves one image of a small map, whose rows of biases are aligned like the large one's.
    """
    if tiny:
        batch, size = 1, (2 * agents, 14 if math.prod(size) % 16 else 8)
    generator = torch.Generator(device).manual_seed(0)

    def normal(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(shape, generator=generator, device=device).to(dtype)

    positions, n = math.prod(size), agents**2
    tokens = classes + positions
    if split:
        q = normal(batch, tokens, 1, heads, head_dim, dtype=dtype)
        maps = (*q.unbind(2), *normal(batch, tokens, 2, heads, head_dim, dtype=dtype).unbind(2))
    else:
        maps = normal(batch, tokens, 3, heads, head_dim, dtype=dtype).unbind(2)
    names = ("query", "key", "value")
    leaves = {k: x[:, classes:].unflatten(1, size) for k, x in zip(names, maps, strict=True)}
    rest: dict[str, Any] = {"agent_size": agents}
    if classes:
        rest["prefix"] = tuple(x[:, :classes] for x in maps)
    if biased:
        leaves["agent_bias"] = normal(heads, n, tokens)
        leaves["token_bias"] = normal(heads, n, tokens).mT
    return {name: x.requires_grad_() for name, x in leaves.items()}, rest


Make = Callable[[torch.dtype, torch.device, bool], tuple[dict[str, Tensor], dict[str, Any]]]
CALLS: dict[str, Make] = {
    "swin-t stage 1": partial(_make, batch=32, size=(56, 56), heads=3, head_dim=32, agents=3),
    "swin-t stage 2": partial(_make, batch=32, size=(28, 28), heads=6, head_dim=32, agents=4),
    "swin-t stage 3": partial(_make, batch=32, size=(14, 14), heads=12, head_dim=32, agents=7),
    "deit-t": partial(_make, batch=32, size=(14, 14), heads=3, head_dim=64, agents=7, classes=1),
    "pvt stage 1": partial(
        _make, batch=32, size=(56, 56), heads=1, head_dim=64, agents=3, split=True
    ),
    "cswin-b stage 1": partial(_make, batch=16, size=(96, 96), heads=4, head_dim=24, agents=3),
    "ragged, head_dim 48": partial(
        _make, batch=8, size=(50, 76), heads=4, head_dim=48, agents=4, biased=False
    ),
    "dense": partial(_make, batch=2, size=(100, 152), heads=6, head_dim=32, agents=12),
}
