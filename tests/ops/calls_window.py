"""Calls of window attention that released models make."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

Size = tuple[int, int]
Call = tuple[dict[str, Tensor], dict[str, Any]]


def _call(
    dtype: torch.dtype,
    device: torch.device,
    tiny: bool,
    *,
    real: tuple[int, Size, int],
    small: Size,
    head_dim: int = 32,
    window: Any = 7,
    shift: int = 0,
    biased: bool = True,
    cosine: bool = False,
    padded: bool = False,
    semantics: str = "timm",
) -> Call:
    """Views of one projection: ``real`` is (batch, map, heads), ``small`` the map where tiny."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    batch, size, heads = (1, small, 2) if tiny else real
    maps = normal(batch, *size, 3, heads, head_dim).to(device, dtype).unbind(3)
    leaves = dict(zip(("query", "key", "value"), maps, strict=True))
    if biased:
        wh, ww = (window, window) if isinstance(window, int) else window
        leaves["bias"] = normal(heads, 2 * wh - 1, 2 * ww - 1).to(device)
    if cosine:
        leaves["logit_scale"] = (normal(heads) + 2).to(device)
    if padded:
        leaves["pad"] = normal(3, heads, head_dim).to(device, dtype)
    rest = {"window_size": window, "shift_size": shift, "semantics": semantics}
    return {name: x.requires_grad_() for name, x in leaves.items()}, rest


CALLS: dict[str, Callable[[torch.dtype, torch.device, bool], Call]] = {
    "swin_t": partial(_call, real=(32, (56, 56), 3), small=(14, 14)),
    "swin_t_shifted": partial(_call, real=(32, (56, 56), 3), small=(14, 14), shift=3),
    "swin_t_dense": partial(
        _call, real=(2, (200, 304), 3), small=(9, 12), shift=3, padded=True, semantics="dense"
    ),
    "swin_b_384": partial(_call, real=(8, (96, 96), 4), small=(24, 24), window=12, shift=6),
    "swinv2_w8": partial(
        _call, real=(32, (64, 64), 3), small=(16, 16), window=8, shift=4, cosine=True
    ),
    "swinv2_w16_ragged": partial(
        _call, real=(8, (64, 72), 3), small=(16, 20), window=16, shift=8, cosine=True, padded=True
    ),
    "davit_t": partial(_call, real=(32, (56, 56), 3), small=(14, 14), biased=False),
    "stripes": partial(
        _call, real=(16, (56, 56), 2), small=(20, 14), head_dim=24, window=(None, 7), biased=False
    ),
}
