"""Bi-level routing attention by its definition.

The padded map [H', W'] is cut into R regions of L tokens each, in raster order. Region r chooses
the k regions s of largest ``mean_r(q) . mean_s(k)``, a dot product over heads and channels; its
queries attend to the k * L keys of these regions as if there were no others. With soft routing
the keys and values of the j-th choice are multiplied by ``softmax_j(scale * score[r, s_j])``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from vitarium.ops.routing_attn.op import Call
    from vitarium.ops.routing_attn.regions import Axis


def unsupported(call: Call) -> str | None:
    """None: the definition has no limits."""
    return None


def run(call: Call) -> Tensor:
    """Gather every region's keys and values, in float64."""
    batch, height, width = call.query.shape[:3]
    rows, columns = axes = call.axes
    maps = [x.double() for x in (call.query, call.key, call.value)]
    fills = [None] * 3 if call.pad is None else list(call.pad.double())
    query, key, value = (_regions(x, y, axes) for x, y in zip(maps, fills, strict=True))
    counted = maps[0].new_ones(1, height, width, 1, 1)
    full = None if call.pad is None else counted.new_ones(1, 1)
    share = _regions(counted, full, axes)  # whether a token counts in its region's mean
    share = share / share.sum(2, keepdim=True)
    queries, keys = ((x * share).sum(2).flatten(2) for x in (query, key))  # [B, R, C]
    scores, chosen = (queries @ keys.mT).topk(call.topk)  # [B, R, k]

    image = torch.arange(batch, device=chosen.device)[:, None, None]
    keys, values = key[image, chosen], value[image, chosen]  # [B, R, k, L, heads, head_dim]
    if call.soft_routing:
        weights = (call.scale * scores).softmax(-1)[..., None, None, None]
        weights = weights if call.diff_routing else weights.detach()
        keys, values = keys * weights, values * weights
    scores = torch.einsum("brind,brjnd->brnij", query * call.scale, keys.flatten(2, 3))
    out = torch.einsum("brnij,brjnd->brind", scores.softmax(-1), values.flatten(2, 3))
    out = out.unflatten(2, (rows.size, columns.size)).unflatten(1, (rows.total, columns.total))
    out = out.transpose(2, 3).reshape(batch, rows.padded, columns.padded, *out.shape[5:])
    return out[:, :height, :width].to(call.query.dtype).contiguous()


def _regions(x: Tensor, fill: Tensor | None, axes: tuple[Axis, Axis]) -> Tensor:
    """[B, H, W, heads, head_dim] -> [B, R, L, heads, head_dim]; padding holds ``fill``, or 0."""
    batch, height, width = x.shape[:3]
    rows, columns = axes
    fill = x.new_zeros(x.shape[3:]) if fill is None else fill
    right = fill.expand(batch, height, columns.padded - width, -1, -1)
    below = fill.expand(batch, rows.padded - height, columns.padded, -1, -1)
    x = torch.cat([torch.cat([x, right], 2), below], 1)
    x = x.unflatten(2, (columns.total, columns.size)).unflatten(1, (rows.total, rows.size))
    return x.transpose(2, 3).flatten(3, 4).flatten(1, 2)
