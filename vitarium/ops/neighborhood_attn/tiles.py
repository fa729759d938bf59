"""Tiles of a map for neighborhood attention: which queries, which keys, which bias entries.

The map is cut into tiles of queries. A tile's windows lie inside its halo, a rectangle of keys
that is only a little larger than one window, so attention becomes a batch of small dense
attentions with a mask: the relative position bias inside the windows, minus infinity outside.
Tiles in the interior of the map all share one mask, only those near a border differ: there are
few kinds of masks.

A dilated map is ``dh * dw`` independent maps, one per pair of residue classes: their tiles are
more tiles of the same kinds. Everything is a table of indices, so what attends need not know of
borders, classes or padding.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from vitarium.ops import _select

Pair = tuple[int, int]
Strip = tuple[Pair, Pair, int]  # first query and number, first key and number, kind
_TRACED_TILE = (4, 7)


class Axis(NamedTuple):
    """Tables of one axis of a map.

    query [tiles, tile]: positions; a ragged tile repeats its last one. real [tiles, tile]: false
    for repetitions. key [tiles, halo]: positions on the padded axis. entry [tiles, tile, halo]:
    bias entry, or -1 outside the query's window. slot [length]: where in the flattened queries
    a position stands.
    """

    query: Tensor
    real: Tensor
    key: Tensor
    entry: Tensor
    slot: Tensor


def padded_size(size: Pair, kernel: Pair, dilation: Pair) -> Pair:
    """The smallest map from ``size`` on that holds every class's window."""
    height, width = (
        _select.larger(n, k * d) for n, k, d in zip(size, kernel, dilation, strict=True)
    )
    return height, width


def count(length: int, dilation: int, tile: int) -> int:
    """Tiles that the longest class of an axis takes."""
    return ((length + dilation - 1) // dilation + tile - 1) // tile


def axis(
    length: int,
    padded: int,
    kernel: int,
    dilation: int,
    tile: int,
    tiles: int,
    halo: int,
    device: torch.device,
) -> Axis:
    """Cut one axis into tiles; sizes may be unknown while tracing, so no shape is merged or split.

    Args:
        length: positions with queries.
        padded: positions with keys, at least ``kernel * dilation``.
        kernel: window size.
        dilation: number of residue classes.
        tile: queries per tile.
        tiles: tiles of a class, `count` or more.
        halo: keys per tile: ``tile + kernel - 1``, or what a class has at the most.
        device: where the tables live.
    """
    index = torch.arange(dilation * tiles, device=device)
    residue, first = (index // tiles)[:, None], (index % tiles)[:, None] * tile
    members = (padded - residue + dilation - 1) // dilation
    queries = ((length - residue + dilation - 1) // dilation).clamp(min=1)

    rank = first + torch.arange(tile, device=device)  # [tiles, tile]
    real = (rank < queries) & (residue < length)
    rank = torch.minimum(rank, queries - 1)
    start = torch.minimum((first - kernel // 2).clamp(min=0), (members - halo).clamp(min=0))
    key_rank = start + torch.arange(halo, device=device)  # [tiles, halo]
    window = torch.minimum((rank - kernel // 2).clamp(min=0), members - kernel)
    offset = key_rank[:, None] - window[..., None]  # [tiles, tile, halo]
    inside = (offset >= 0) & (offset < kernel)
    entry = torch.where(inside, key_rank[:, None] - rank[..., None] + kernel - 1, -1)
    query = (residue + rank * dilation).clamp(max=length - 1)
    key = (residue + key_rank * dilation).clamp(max=padded - 1)
    position = torch.arange(length, device=device)
    slot = (position % dilation) * (tiles * tile) + position // dilation
    return Axis(query, real, key, entry, slot)


def pair(rows: Tensor, columns: Tensor) -> tuple[Tensor, Tensor]:
    """Every row of tiles with every column of tiles, row-major: [R, *], [C, *] -> [R * C, *]."""
    across = columns.shape[0]
    index = torch.arange(rows.shape[0] * across, device=rows.device)
    return rows[index // across], columns[index % across]


def positions(rows: Tensor, columns: Tensor, size: Pair) -> Tensor:
    """Row-major positions on a map of ``size``: [R, m], [C, n] -> [R * C, m * n].

    Those beyond the map, on its padding, get the position behind the last.
    """
    i, j = pair(rows, columns)
    i, j = i[:, :, None], j[:, None]
    on_map = (i < size[0]) & (j < size[1])
    return torch.where(on_map, i * size[1] + j, size[0] * size[1]).flatten(1)


def entries(rows: Tensor, columns: Tensor, kernel: Pair) -> Tensor:
    """Index into a flattened bias: [R, m, k], [C, n, l] -> [R * C, m * n, k * l].

    What is outside of a window gets the entry behind the last, which masks.
    """
    i, j = pair(rows, columns)
    i, j = i[:, :, None, :, None], j[:, None, :, None]
    stride = 2 * kernel[1] - 1
    entry = torch.where((i >= 0) & (j >= 0), i * stride + j, (2 * kernel[0] - 1) * stride)
    return entry.flatten(3).flatten(1, 2)


def windows(rows: Tensor, columns: Tensor, kernel: Pair) -> Tensor:
    """Where in its halo a query's neighbors stand: [R, m, k], [C, n, l] -> [R * C, m * n, kh * kw].

    The arguments are bias entries, as for `entries`: of windows' first keys on, -1 before.
    """
    across = columns.shape[2]
    i, j = pair(*((x >= 0).int().argmax(-1) for x in (rows, columns)))
    i = i[:, :, None, None] + torch.arange(kernel[0], device=rows.device)
    j = j[:, None, :, None] + torch.arange(kernel[1], device=rows.device)
    return (i[..., None] * across + j[..., None, :]).flatten(3).flatten(1, 2)


class Traced(NamedTuple):
    """Tiles of a map whose sizes may be unknown: every tile with its own mask and windows."""

    rows: Axis
    columns: Axis
    query: Tensor  # [tiles, Lq]: positions
    key: Tensor  # [tiles, Lk]: positions; one behind the last is the padded position
    slot: Tensor  # [H, W]: where in the flattened queries


def traced(size: Pair, padded: Pair, kernel: Pair, dilation: Pair, device: torch.device) -> Traced:
    """Cut a map as exported programs do, into tiles that fit every size."""
    axes = []
    th, tw = _TRACED_TILE
    for length, full, k, d, tile in zip(size, padded, kernel, dilation, (th, tw), strict=True):
        # at least two: torch makes programs of their own for sizes of one
        number = _select.larger(count(length, d, tile), 2)
        axes.append(axis(length, full, k, d, tile, number, tile + k - 1, device))
    rows, columns = axes
    query = positions(rows.query, columns.query, size)
    key = positions(rows.key, columns.key, size)
    # tiles are [rows of tiles, columns of tiles], queries in them [rows, columns]
    index = (rows.slot // th)[:, None] * columns.query.shape[0] + columns.slot // tw
    slot = (index * th + (rows.slot % th)[:, None]) * tw + columns.slot % tw
    return Traced(rows, columns, query, key, slot)


@dataclass(frozen=True)
class Geometry:
    """Tiles of a map, and the masks that they share."""

    query: Tensor  # [tiles, Lq]: positions
    slot: Tensor  # [positions]: where in the flattened queries
    key: Tensor  # [tiles, Lk]: positions; one behind the last is the padded position
    kind: Tensor  # [tiles]: which mask
    entry: Tensor  # [kinds, Lq, Lk]: index into a head's flattened bias; behind the last: masked
    window: Tensor  # [kinds, Lq, kh * kw]: where in the keys a query's neighbors stand
    real: Tensor | None  # [tiles, Lq], where some tile repeats a query; else None
    strips: tuple[Strip, ...] | None  # if tiles are slices of the map
    entries: int  # entries of a head's bias
    padded: bool


@lru_cache(maxsize=256)
def best_tile(
    attentions: int,
    size: Pair,
    padded: Pair,
    kernel: Pair,
    dilation: Pair,
) -> Pair:
    """The tile with the least estimated time for ``attentions`` (batch x heads) maps.

    Times are in picoseconds on one core of a 2024 server, fitted to measured ones.
    """
    options = []
    for length, full, k, d in zip(size, padded, kernel, dilation, strict=True):
        queries, keys = -(-length // d), -(-full // d)
        tiles = range(1, min(queries, 32) + 1)
        options.append([(-(-queries // t) * d, t, min(t + k - 1, keys)) for t in tiles])

    def time(rows: tuple[int, int, int], columns: tuple[int, int, int]) -> int:
        count, queries, keys = rows[0] * columns[0], rows[1] * columns[1], rows[2] * columns[2]
        if _is_strip(columns[1], size, padded, dilation):
            # one call each; the attention kernel works on 32 queries at a time
            blocks = -(-queries // 32)
            one = 1_600 * queries * keys + blocks * (600_000 + 12_000 * keys)
            return count * (attentions * one + 15_000_000)
        keys = _aligned(keys)
        return count * attentions * (2_600 * queries * keys + 10_000 * keys + 940_000) + 100_000_000

    pairs = [(h, w) for h in options[0] for w in options[1] if h[1] * w[1] <= 64]
    best = min(pairs, key=lambda pair: time(*pair))
    return best[0][1], best[1][1]


def _is_strip(tile_width: int, size: Pair, padded: Pair, dilation: Pair) -> bool:
    """Whether a tile's queries and keys are consecutive positions of the map."""
    return tile_width == size[1] and padded == size and dilation == (1, 1)


def _aligned(keys: int) -> int:
    """Keys of a tile in memory: whole vectors make a softmax twice as fast."""
    return -(-keys // 16) * 16


@lru_cache(maxsize=64)
def geometry(
    size: Pair,
    padded: Pair,
    kernel: Pair,
    dilation: Pair,
    tile: Pair,
    device: torch.device,
) -> Geometry:
    """Cut a map of ``size``, padded to ``padded``, into tiles of ``tile`` queries."""
    axes, kinds, of_axis = [], [], []
    for length, full, k, d, t in zip(size, padded, kernel, dilation, tile, strict=True):
        halo = min(t + k - 1, -(-full // d))
        axes.append(axis(length, full, k, d, t, count(length, d, t), halo, torch.device("cpu")))
        unique, index = axes[-1].entry.unique(dim=0, return_inverse=True)
        kinds.append(unique)
        of_axis.append(index)
    rows, columns = axes
    query = positions(rows.query, columns.query, size)
    key = positions(rows.key, columns.key, size)
    real_rows, real_columns = pair(rows.real, columns.real)
    real = (real_rows[:, :, None] & real_columns[:, None]).flatten(1)
    entry, window = (x(kinds[0], kinds[1], kernel) for x in (entries, windows))
    row_kind, column_kind = pair(*of_axis)
    kind = row_kind * len(kinds[1]) + column_kind
    used = real.any(1)
    query, real, key, kind = query[used], real[used], key[used], kind[used]

    slot = torch.empty(size[0] * size[1], dtype=torch.long)
    slot[query[real]] = torch.arange(query.numel()).view_as(query)[real]
    masked = (2 * kernel[0] - 1) * (2 * kernel[1] - 1)
    strips = None
    if _is_strip(tile[1], size, padded, dilation) and bool(real.all()):
        strips = tuple(
            ((q, query.shape[1]), (k, key.shape[1]), m)
            for q, k, m in zip(query[:, 0].tolist(), key[:, 0].tolist(), kind.tolist(), strict=True)
        )
    else:
        idle = _aligned(key.shape[1]) - key.shape[1]
        key = torch.cat([key, key[:, :1].expand(-1, idle)], 1)
        entry = F.pad(entry, (0, idle), value=masked)
    return Geometry(
        query.to(device),
        slot.to(device),
        key.to(device),
        kind.to(device),
        entry.to(device),
        window.to(device),
        None if bool(real.all()) else real.to(device),
        strips,
        masked,
        padded != size,
    )
