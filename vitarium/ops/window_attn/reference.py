"""Window attention by its definition.

On an axis of length L with window w and shift s, the padded length P is the next multiple of w.
On the rolled, padded axis positions [0, P - w) are region 0, [P - w, P - s) region 1 and the
rest region 2; a pair of positions is masked where their regions differ on either axis. An axis
that is not shifted is one region.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from vitarium.ops.window_attn import windows

if TYPE_CHECKING:
    from vitarium.ops.window_attn.op import Call


def unsupported(call: Call) -> str | None:
    """None: the definition has no limits."""
    return None


def run(call: Call) -> Tensor:
    """Roll, pad, cut, attend, and undo it all, in float64."""
    height, width, heads, head_dim = call.query.shape[1:]
    (wh, ww), shift = windows.clamped(
        (height, width), call.window_size, call.shift_size, call.semantics
    )
    rows, columns = -(-height // wh), -(-width // ww)
    back = (-shift[0], -shift[1])
    padded_first = call.semantics in windows.PADDED_FIRST

    def cut(x: Tensor, fill: Tensor) -> Tensor:
        """[B, H, W, ...] -> [B, windows, L, ...]."""
        if not padded_first:
            x = x.roll(back, (1, 2))
        tail = x.shape[3:]
        below = fill.expand(len(x), rows * wh - height, width, *tail)
        right = fill.expand(len(x), rows * wh, columns * ww - width, *tail)
        x = torch.cat([torch.cat([x, below], 1), right], 2)
        if padded_first:
            x = x.roll(back, (1, 2))
        x = x.unflatten(2, (columns, ww)).unflatten(1, (rows, wh)).transpose(2, 3)
        return x.flatten(3, 4).flatten(1, 2)

    pad = call.query.new_zeros(3, heads, head_dim) if call.pad is None else call.pad
    maps = (call.query, call.key, call.value)
    query, key, value = (cut(x.double(), fill.double()) for x, fill in zip(maps, pad, strict=True))
    if call.factor is None:
        query = query * call.scale
    else:
        query, key = (torch.nn.functional.normalize(x, dim=-1) for x in (query, key))
        query = query * call.factor.double()[:, None]
    scores = torch.einsum("bwihd,bwjhd->bwhij", query, key)
    if call.bias is not None:
        scores = scores + _bias(call.bias.double(), (wh, ww))
    regions = _regions((rows, columns), (wh, ww), shift).to(query.device)
    scores = scores - 100.0 * (regions[:, None, :, None] != regions[:, None, None, :])
    out = torch.einsum("bwhij,bwjhd->bwihd", scores.softmax(-1), value)

    out = out.unflatten(2, (wh, ww)).unflatten(1, (rows, columns)).transpose(2, 3)
    out = out.flatten(3, 4).flatten(1, 2)
    if padded_first:
        out = out.roll(shift, (1, 2))[:, :height, :width]
    else:
        out = out[:, :height, :width].roll(shift, (1, 2))
    return out.to(call.query.dtype).contiguous()


def _bias(table: Tensor, window: tuple[int, int]) -> Tensor:
    """Bias of every pair in a window: [heads, 2*wh-1, 2*ww-1] of the full one -> [heads, L, L]."""
    at = []
    for size, entries in zip(window, table.shape[1:], strict=True):
        position = torch.arange(size)
        at.append(position[:, None] - position + entries // 2)
    rows, columns = at
    return table[:, rows[:, None, :, None], columns[None, :, None, :]].flatten(3).flatten(1, 2)


def _regions(counts: tuple[int, int], window: tuple[int, int], shift: tuple[int, int]) -> Tensor:
    """Region of every position: [windows, L]."""
    labels = []
    for count, size, s in zip(counts, window, shift, strict=True):
        label = torch.zeros(count * size, dtype=torch.long)
        if s > 0:
            label[-size:] = 1
            label[-s:] = 2
        labels.append(label.view(count, size))
    rows, columns = labels
    return (3 * rows[:, None, :, None] + columns[None, :, None, :]).flatten(2).flatten(0, 1)
