"""Scores and mixing by their definition; windows are those of `neighborhood_attention`.

With n(i, m) for neighbor m of position i: ``scores[i, m] = query[i] . key[n(i, m)] + bias[...]``
and ``mix[i] = sum_m weights[i, m] value[n(i, m)]``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from vitarium.ops.neighborhood_attn.reference import neighbors

if TYPE_CHECKING:
    from vitarium.ops.neighborhood_parts.op import MixCall, ScoresCall


def unsupported(call: MixCall | ScoresCall) -> str | None:
    """None: the definition has no limits."""
    return None


def _windows(call: MixCall | ScoresCall, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Every position's neighbors in float64, and their bias entries of rows and columns."""
    axes = zip(x.shape[1:3], call.kernel_size, call.dilation, strict=True)
    (rows, row_bias), (columns, column_bias) = (neighbors(n, n, k, d) for n, k, d in axes)
    gathered = x.double()[:, rows[:, None, :, None], columns[:, None, :]]  # [B, H, W, kh, kw, ...]
    return gathered.flatten(3, 4), row_bias[:, None, :, None], column_bias[:, None, :]


def scores(call: ScoresCall) -> Tensor:
    """Gather every query's keys, in float64."""
    keys, row_bias, column_bias = _windows(call, call.key)
    out = torch.einsum("bhwnd,bhwmnd->bhwnm", call.query.double(), keys)
    if call.bias is not None:
        out = out + call.bias.double()[:, row_bias, column_bias].flatten(3).permute(1, 2, 0, 3)
    return out.to(call.query.dtype)


def mix(call: MixCall) -> Tensor:
    """Gather every position's values, in float64."""
    values, *_ = _windows(call, call.value)
    out = torch.einsum("bhwnm,bhwmnd->bhwnd", call.weights.double(), values)
    return out.to(call.value.dtype)
