"""Windows of a map: which positions each holds, and which pairs of them its mask separates.

Almost all windows of a map are alike. Only the last ones of a shifted axis have a mask, and only
windows at the far borders hold padding, so windows come in a few runs of one kind each.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

Pair = tuple[int, int]
SEMANTICS = ("timm", "timm_fixed", "authors", "authors_padded", "dense")
PADDED_FIRST = ("authors_padded", "dense")  # the others roll the map, then pad it
MASKED = -100.0


def full(size: Pair, window: Pair) -> Pair:
    """The window that was given, where 0 is the whole axis."""
    return window[0] or size[0], window[1] or size[1]


def clamped(size: Pair, window: Pair, shift: Pair, semantics: str) -> tuple[Pair, Pair]:
    """Window and shift that a map of ``size`` gets."""
    window = full(size, window)
    if semantics.startswith("authors") and min(size) <= min(window):
        return (min(size), min(size)), (0, 0)
    if semantics == "timm":
        small = [n <= w for n, w in zip(size, window, strict=True)]
        height, width = (n if s else w for n, w, s in zip(size, window, small, strict=True))
        down, right = (0 if s else n for n, s in zip(shift, small, strict=True))
        return (height, width), (down, right)
    return window, shift


def divides(size: Pair, window: Pair) -> None:
    """Demand a map that the authors' windows cut without a rest."""
    (wh, ww), _ = clamped(size, window, (0, 0), "authors")
    if size[0] % wh or size[1] % ww:
        raise ValueError(
            f"window_size: expected windows that divide the map {size[0]}x{size[1]} with "
            f"semantics='authors', got {wh}x{ww}"
        )


class Axis(NamedTuple):
    """Windows of one axis: positions [count, w], -1 for padding, and regions [count, w]."""

    position: Tensor
    region: Tensor


def axis(length: int, window: int, shift: int, semantics: str, device: torch.device) -> Axis:
    """Cut one axis."""
    padded = -(-length // window) * window
    slot = torch.arange(padded, device=device)
    if semantics in PADDED_FIRST:
        position = (slot + shift) % padded
        position = torch.where(position < length, position, -1)
    else:
        position = torch.where(slot < length, (slot + shift) % length, -1)
    region = torch.zeros_like(slot)
    if shift > 0:
        region = (slot >= padded - window).long() + (slot >= padded - shift).long()
    return Axis(position.view(-1, window), region.view(-1, window))


class Run(NamedTuple):
    """Windows of one kind."""

    positions: Tensor  # [windows, L]: row-major; 0 for padding
    kind: int  # which mask
    real: Tensor | None  # places in a window that are no padding, where some are
    padded: Tensor | None  # the other places


@dataclass(frozen=True)
class Partition:
    """All windows of a map."""

    runs: tuple[Run, ...]
    mask: Tensor  # [kinds, L, L]: 0 or -100
    entry: Tensor  # [L, L]: index into a head's flattened bias
    masked: bool


@lru_cache(maxsize=64)
def partition(
    size: Pair, window_size: Pair, shift_size: Pair, semantics: str, device: torch.device
) -> Partition:
    """Cut a map of ``size``."""
    window, shift = clamped(size, window_size, shift_size, semantics)
    rows, columns = (axis(*x, semantics, device) for x in zip(size, window, shift, strict=True))
    i, j = rows.position[:, None, :, None], columns.position[None, :, None, :]
    position = torch.where((i >= 0) & (j >= 0), i * size[1] + j, -1).flatten(2).flatten(0, 1)
    region = 3 * rows.region[:, None, :, None] + columns.region[None, :, None, :]
    region = region.flatten(2).flatten(0, 1)
    masks = (region[:, :, None] != region[:, None, :]).unique(dim=0, return_inverse=True)
    paddings = (position < 0).unique(dim=0, return_inverse=True)

    runs = []
    for kind in range(len(masks[0])):
        for padding, is_padded in enumerate(paddings[0]):
            index = position[(masks[1] == kind) & (paddings[1] == padding)]
            if len(index) == 0:
                continue
            places = (~is_padded).nonzero()[:, 0], is_padded.nonzero()[:, 0]
            real, padded = places if is_padded.any() else (None, None)
            runs.append(Run(index.clamp(min=0), kind, real, padded))
    mask = torch.where(masks[0], MASKED, 0.0)
    entry = entries(window, full(size, window_size), device)
    return Partition(tuple(runs), mask, entry, bool(masks[0].any()))


def entries(window: Pair, table: Pair, device: torch.device) -> Tensor:
    """Index into the flattened bias of a ``table`` window for every pair of ``window``: [L, L]."""
    places = (torch.arange(n, device=device) for n in window)
    i, j = (x[:, None] - x + n - 1 for x, n in zip(places, table, strict=True))
    return (i[:, None, :, None] * (2 * table[1] - 1) + j[None, :, None, :]).flatten(2).flatten(0, 1)
