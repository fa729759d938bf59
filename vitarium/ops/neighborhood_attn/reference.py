"""Neighborhood attention by its definition.

Per axis of length L, kernel K and dilation d, position i has residue g = i mod d and rank
p = i div d within its class, which holds Lg = ceil((L - g) / d) positions. Its window starts at
rank s = clamp(p - (K - 1) / 2, 0, Lg - K), so neighbor a stands at index g + (s + a) d, and its
bias is entry (s + a) - p + K - 1. The 2-D window is the product of both axes' windows.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from vitarium.ops.neighborhood_attn.op import Call


def unsupported(call: Call) -> str | None:
    """None: the definition has no limits."""
    return None


def neighbors(length: int, padded: int, kernel: int, dilation: int) -> tuple[Tensor, Tensor]:
    """Neighbors of the first ``length`` positions of an axis: indices and bias entries [L, K]."""
    index = torch.arange(length)
    residue, rank = index % dilation, index // dilation
    members = (padded - residue + dilation - 1) // dilation
    start = torch.minimum((rank - kernel // 2).clamp(min=0), members - kernel)
    window = start[:, None] + torch.arange(kernel)
    return residue[:, None] + window * dilation, window - rank[:, None] + kernel - 1


def run(call: Call) -> Tensor:
    """Gather every query's keys and values, in float64."""
    query, key, value = (x.double() for x in (call.query, call.key, call.value))
    height, width = query.shape[1:3]
    padded_height, padded_width = call.padded_size
    if call.pad is not None and (padded_height, padded_width) != (height, width):
        pad = call.pad.double()
        below = (key.shape[0], padded_height - height, width, *key.shape[3:])
        right = (key.shape[0], padded_height, padded_width - width, *key.shape[3:])
        key, value = (
            torch.cat([torch.cat([x, fill.expand(below)], 1), fill.expand(right)], 2)
            for x, fill in ((key, pad[1]), (value, pad[2]))
        )
    rows, row_bias = neighbors(height, padded_height, call.kernel_size[0], call.dilation[0])
    columns, column_bias = neighbors(width, padded_width, call.kernel_size[1], call.dilation[1])
    rows, columns = rows[:, None, :, None], columns[None, :, None, :]  # [H, W, kh, kw]
    neighbors_k, neighbors_v = key[:, rows, columns], value[:, rows, columns]
    scores = torch.einsum("bhwnd,bhwklnd->bnhwkl", query * call.scale, neighbors_k)
    if call.bias is not None:
        scores = scores + call.bias.double()[:, row_bias[:, None, :, None], column_bias[:, None, :]]
    weights = scores.flatten(-2).softmax(-1).view_as(scores)
    out = torch.einsum("bnhwkl,bhwklnd->bhwnd", weights, neighbors_v)
    return out.to(call.query.dtype)
