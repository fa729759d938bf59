"""Window attention as exported programs hold it: plain functions that fit maps of any size."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from vitarium.ops import _select
from vitarium.ops.window_attn import windows

if TYPE_CHECKING:
    from vitarium.ops.window_attn.op import Call


class _Axis(NamedTuple):
    """One axis, of a length that may be unknown while tracing.

    position [count, w]: where places stand on the map, its length for padding. region
    [count, w]. live [w]: false for places beyond a window that is clamped to the map, which
    no query sees. number, place [length]: in which window, and where in it, positions stand.
    """

    position: Tensor
    region: Tensor
    live: Tensor
    number: Tensor
    place: Tensor


def _axis(
    length: int, window: int, shift: int, semantics: str, shorter: int, device: torch.device
) -> _Axis:
    """Cut an axis; ``shorter`` is the map's shorter side."""
    least = length if semantics == "timm" else shorter  # what windows are clamped to
    used = window
    if semantics == "authors_padded":
        used = _select.smaller(window, shorter)
    count = 1 if window is length else (length + used - 1) // used
    padded = count * used
    if not isinstance(count, int):
        count = _select.larger(count, 2)  # torch makes programs of their own for sizes of one
    inner = torch.arange(window, device=device)
    slot = inner + used * torch.arange(count, device=device)[:, None]
    index = torch.arange(length, device=device)
    live = torch.ones_like(inner, dtype=torch.bool)
    moved = torch.full((1,), shift, device=device)
    if semantics in ("timm", "authors_padded"):
        live = inner < least
        # a map that is no larger than the window is not shifted
        moved = moved * (torch.full((1,), window, device=device) < least)
    region = (slot >= padded - used).long() + (slot >= padded - moved).long()
    region = region * (moved > 0)
    if semantics in windows.PADDED_FIRST:
        position = (slot + moved) % padded
        index = (index - moved + padded) % padded
    else:
        position = torch.where(slot < length, (slot + moved) % length, length)
        index = (index - moved + length) % length
    return _Axis(position.clamp(max=length), region, live, index // used, index % used)


def run(call: Call) -> Tensor:
    """All windows in one call; a map of unknown size keeps the window that it was given."""
    (batch, height, width), tail = call.query.shape[:3], call.query.shape[3:]
    device, semantics = call.query.device, call.semantics
    window, shift = call.window_size, call.shift_size
    known = isinstance(height, int) and isinstance(width, int)
    if known or semantics == "authors":
        window, shift = windows.clamped((height, width), window, shift, semantics)
    table = windows.full((height, width), call.window_size)
    window = windows.full((height, width), window)
    shorter = _select.smaller(height, width)
    rows, columns = (
        _axis(n, w, s, semantics, shorter, device)
        for n, w, s in zip((height, width), window, shift, strict=True)
    )
    across = columns.position.shape[0]
    count, (wh, ww) = rows.position.shape[0] * across, window
    # by index: merging axes of unknown sizes would compare them
    order, inner = torch.arange(count, device=device), torch.arange(wh * ww, device=device)
    at, place = (order // across)[:, None], inner // ww
    beside, next_place = (order % across)[:, None], inner % ww
    row, column = rows.position[at, place], columns.position[beside, next_place]
    inside = (row < height) & (column < width)
    position = torch.where(inside, row * width + column, height * width)

    mask = None
    alike = known and shift == (0, 0)
    if not alike:
        region = 3 * rows.region[at, place] + columns.region[beside, next_place]
        mask = torch.where(region[:, :, None] != region[:, None], windows.MASKED, 0.0)[:, None]
        live = rows.live[place] & columns.live[next_place]
        mask = mask.masked_fill(~live, float("-inf"))
    if call.bias is not None:
        entry = windows.entries(window, table, device)
        bias = call.bias.flatten(1)[:, entry][None]
        mask = bias if mask is None else mask + bias
    if mask is not None:
        mask = mask.to(call.query.dtype)
        mask = mask if alike else mask.repeat(batch, 1, 1, 1)

    query, key, value = (x.flatten(1, 2) for x in (call.query, call.key, call.value))
    if not known or height % wh or width % ww:
        pad = call.query.new_zeros(3, *tail) if call.pad is None else call.pad
        query, key, value = (
            torch.cat([x, fill.expand(batch, 1, -1, -1)], 1)
            for x, fill in zip((query, key, value), pad, strict=True)
        )
    scale = call.scale
    if call.factor is not None:
        scale, exact = 1.0, call.factor.dtype
        query, key = (F.normalize(x.to(exact), dim=-1) for x in (query, key))
        query = (query * call.factor[:, None]).to(value.dtype)
        key = key.to(value.dtype)
    # images and windows share an axis: of five-dimensional attention inductor makes nonsense
    query, key, value = (x[:, position].flatten(0, 1).transpose(1, 2) for x in (query, key, value))
    out = F.scaled_dot_product_attention(query, key, value, mask, scale=scale)
    number = rows.number[:, None] * across + columns.number
    out = out.transpose(1, 2).unflatten(0, (batch, count))
    return out[:, number, rows.place[:, None] * ww + columns.place]
