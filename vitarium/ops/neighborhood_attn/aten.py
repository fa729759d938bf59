"""Neighborhood attention in ordinary torch functions, fast on a CPU.

The map is cut into tiles of queries. A tile's windows lie inside its halo, a rectangle of keys
that is only a little larger than one window, so attention becomes a batch of small dense
attentions with a mask: the relative position bias inside the windows, minus infinity outside.
Tiles in the interior of the map all share one mask; only those near a border differ. Tiles with
the same mask ("kinds") are attended to in one call, so masks are never repeated.

A dilated map is ``dh * dw`` independent maps, one per pair of residue classes: their tiles are
more tiles of the same kinds. Everything about geometry is a table of indices (`_axis`).

Eager training does not keep halos or masks: the backward pass gathers them again.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from vitarium.ops import _select

if TYPE_CHECKING:
    from vitarium.ops.neighborhood_attn.op import Call

_CHUNK = 1 << 18  # elements that are worked on at a time, so that they stay in cache
_TRACED_TILE = (4, 7)


def unsupported(call: Call) -> str | None:
    """None: runs everywhere."""
    return None


def run(call: Call) -> Tensor:
    """Attend tile by tile; with a gradient that gathers again where one is needed."""
    if call.query.shape[0] == 0:
        return torch.zeros_like(call.query, memory_format=torch.contiguous_format)
    if _select.is_tracing():
        return _traced(call)
    tensors = (call.query, call.key, call.value, call.bias, call.pad)
    geometry = _geometry(call)
    if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors):
        return _Attention.apply(geometry, call.scale, *tensors)
    return _forward(geometry, call.scale, *tensors)


# Geometry: where the queries and keys of every tile stand, and which bias entry joins them.


def _axis(length: int, padded: int, kernel: int, dilation: int, tile: int, device: torch.device):
    """Tables of one axis: its tiles' queries, keys and bias entries.

    Args:
        length: positions with queries.
        padded: positions with keys, at least ``kernel * dilation``.
        kernel: window size.
        dilation: number of residue classes.
        tile: queries per tile.
        device: where the tables live.

    Returns:
        query [tiles, tile]: positions; a ragged tile repeats its last one. real [tiles, tile]:
        false for repetitions. key [tiles, halo]: positions on the padded axis. entry
        [tiles, tile, halo]: bias entry, or -1 outside the query's window. slot [length]: where
        in the flattened queries a position stands.
    """
    residue = torch.arange(dilation, device=device)[:, None]
    members = (padded - residue + dilation - 1) // dilation
    queries = ((length - residue + dilation - 1) // dilation).clamp(min=1)
    longest_queries = (length + dilation - 1) // dilation
    longest = (padded + dilation - 1) // dilation
    tiles = (longest_queries + tile - 1) // tile
    halo = min(tile + kernel - 1, longest)

    first = torch.arange(tiles, device=device) * tile  # [tiles]
    rank = first[:, None] + torch.arange(tile, device=device)
    real = (rank < queries[..., None]) & (residue[..., None] < length)
    rank = torch.minimum(rank, queries[..., None] - 1)  # [dilation, tiles, tile]
    start = torch.minimum((first - kernel // 2).clamp(min=0), (members - halo).clamp(min=0))
    key_rank = start[..., None] + torch.arange(halo, device=device)  # [dilation, tiles, halo]
    window = torch.minimum((rank - kernel // 2).clamp(min=0), members[..., None] - kernel)
    offset = key_rank[..., None, :] - window[..., None]
    inside = (offset >= 0) & (offset < kernel)
    entry = torch.where(inside, key_rank[..., None, :] - rank[..., None] + kernel - 1, -1)
    query = (residue[..., None] + rank * dilation).clamp(max=length - 1)
    key = (residue[..., None] + key_rank * dilation).clamp(max=padded - 1)
    position = torch.arange(length, device=device)
    slot = (position % dilation) * (tiles * tile) + position // dilation
    return query.flatten(0, 1), real.flatten(0, 1), key.flatten(0, 1), entry.flatten(0, 1), slot


def _join(rows: Tensor, columns: Tensor, width: int) -> Tensor:
    """Row-major index of every pair: [R, *], [C, *] -> [R, C, rows of a tile, columns of it]."""
    return rows[:, None, :, None] * width + columns[None, :, None, :]


def _join_keys(rows: Tensor, columns: Tensor, height: int, width: int) -> Tensor:
    """Like `_join`; a key on the padding gets the index behind the map's last."""
    pair_rows, pair_columns = rows[:, None, :, None], columns[None, :, None, :]
    on_map = (pair_rows < height) & (pair_columns < width)
    return torch.where(on_map, pair_rows * width + pair_columns, height * width)


def _join_entries(rows: Tensor, columns: Tensor, kernel: tuple[int, int]) -> Tensor:
    """Index into a flattened bias: [R, C, queries, keys]; the entry behind the last masks."""
    stride = 2 * kernel[1] - 1
    pair_rows, pair_columns = rows[:, None, :, None, :, None], columns[None, :, None, :, None, :]
    inside = (pair_rows >= 0) & (pair_columns >= 0)
    entry = torch.where(inside, pair_rows * stride + pair_columns, (2 * kernel[0] - 1) * stride)
    return entry.flatten(4, 5).flatten(2, 3)


@dataclass(frozen=True)
class _Kind:
    """Tiles that share a mask: queries [tiles, Lq], keys [tiles, Lk], entries [Lq, Lk]."""

    query: Tensor
    key: Tensor
    entry: Tensor
    real: Tensor | None  # [tiles, Lq] where some tile repeats a query, else None
    runs: tuple[tuple[slice, slice], ...] | None  # the tiles as slices, where they are such


@dataclass(frozen=True)
class _Slices:
    """Where consecutive positions of some images stand."""

    images: slice
    positions: slice


_At = Tensor | _Slices  # rows [N, L] of the flattened map, or slices of it


def _runs(query: Tensor, key: Tensor) -> tuple[tuple[slice, slice], ...] | None:
    """Slices for tiles whose queries and keys are consecutive (undilated, full-width tiles)."""
    if bool((query.diff(dim=1) != 1).any()) or bool((key.diff(dim=1) != 1).any()):
        return None
    return tuple(
        (slice(q, q + query.shape[1]), slice(k, k + key.shape[1]))
        for q, k in zip(query[:, 0].tolist(), key[:, 0].tolist(), strict=True)
    )


@dataclass(frozen=True)
class _Geometry:
    entries: int  # entries of a head's bias
    padded: bool
    kinds: tuple[_Kind, ...]
    entry: Tensor  # the kinds' entries, all in one


def _geometry(call: Call) -> _Geometry:
    batch, height, width, heads, _ = call.query.shape
    padded = call.padded_size
    tile = _tile(batch * heads, (height, width), padded, call.kernel_size, call.dilation)
    return _tables(
        (height, width), padded, call.kernel_size, call.dilation, tile, call.query.device
    )


def _cost(per_axis: list[tuple[int, int, int, int]], attentions: int) -> int:
    """Rough time of a tiling, in multiply-adds of a query with a key (2 ns on a 2024 core)."""
    (rows, tile_h, halo_h, kinds_h), (columns, tile_w, halo_w, kinds_w) = per_axis
    queries, keys = tile_h * tile_w, halo_h * halo_w
    blocks = -(-queries // 32)  # the attention kernel works on 32 queries at a time
    one = queries * keys + blocks * (600 + 12 * keys)
    return attentions * rows * columns * one + kinds_h * kinds_w * 15_000


@lru_cache(maxsize=256)
def _tile(
    attentions: int,
    size: tuple[int, int],
    padded: tuple[int, int],
    kernel: tuple[int, int],
    dilation: tuple[int, int],
) -> tuple[int, int]:
    """The tile with the least estimated time for ``attentions`` (batch x heads) maps."""
    options = []
    for length, full, k, d in zip(size, padded, kernel, dilation, strict=True):
        queries, keys = -(-length // d), -(-full // d)
        axis = []
        for tile in range(1, min(queries, 32) + 1):
            count = -(-queries // tile)
            kinds = min(count, 2 * -(-(k // 2) // tile) + 1 + (queries % tile > 0))
            axis.append((count * d, tile, min(tile + k - 1, keys), kinds))
        options.append(axis)
    pairs = [[h, w] for h in options[0] for w in options[1] if h[1] * w[1] <= 64]
    best = min(pairs, key=lambda pair: _cost(pair, attentions))
    return best[0][1], best[1][1]


@lru_cache(maxsize=64)
def _tables(
    size: tuple[int, int],
    padded: tuple[int, int],
    kernel: tuple[int, int],
    dilation: tuple[int, int],
    tile: tuple[int, int],
    device: torch.device,
) -> _Geometry:
    axes = []
    for args in zip(size, padded, kernel, dilation, tile, strict=True):
        query, real, key, entry, _ = _axis(*args, torch.device("cpu"))
        _, kind = entry.flatten(1).unique(dim=0, return_inverse=True)
        axes.append((query, real, key, entry, [kind == i for i in range(int(kind.max()) + 1)]))
    (rows, columns), kinds = axes, []
    for row_kind in rows[4]:
        for column_kind in columns[4]:
            query_h, real_h, key_h, entry_h = (x[row_kind] for x in rows[:4])
            query_w, real_w, key_w, entry_w = (x[column_kind] for x in columns[:4])
            query = _join(query_h, query_w, size[1]).flatten(2).flatten(0, 1)
            real = (real_h[:, None, :, None] & real_w[None, :, None, :]).flatten(2).flatten(0, 1)
            used = real.any(1)
            if not used.any():
                continue
            key = _join_keys(key_h, key_w, *size).flatten(2).flatten(0, 1)
            entry = _join_entries(entry_h[:1], entry_w[:1], kernel)[0, 0]
            query, key, real = query[used], key[used], real[used]
            kinds.append(
                _Kind(
                    query.to(device),
                    key.to(device),
                    entry.to(device),
                    None if real.all() else real.to(device),
                    _runs(query, key) if real.all() else None,
                )
            )
    entries = (2 * kernel[0] - 1) * (2 * kernel[1] - 1)
    entry = torch.cat([kind.entry.flatten() for kind in kinds])
    return _Geometry(entries, padded != size, tuple(kinds), entry)


# The eager computation.


class _Map:
    """A map's channels, by flattened position: gathered by index or sliced.

    Args:
        x: ``[B, H, W, heads, head_dim]``, viewed and not copied where its strides allow.
        pad: ``[heads, head_dim]``, one more position behind the map's own.
    """

    def __init__(self, x: Tensor, pad: Tensor | None = None):
        batch, height, width, heads, head_dim = x.shape
        if pad is not None:
            flat = x.reshape(batch, height * width, heads, head_dim)
            x = torch.cat([flat, pad.expand(batch, 1, -1, -1)], 1)
        self.rows = x.reshape(-1, heads * head_dim)
        self.positions = self.rows.shape[0] // batch
        self.heads = self.rows.view(batch, self.positions, heads, head_dim).transpose(1, 2)

    def take(self, at: _At) -> Tensor:
        """What stands there, [N, heads, L, head_dim]."""
        if isinstance(at, _Slices):
            return self.heads[at.images, :, at.positions]
        taken = self.rows.index_select(0, at.flatten())
        return taken.view(*at.shape, *self.heads.shape[1::2]).transpose(1, 2)

    def put(self, at: _At, x: Tensor) -> None:
        """Write [N, heads, L, head_dim] there."""
        if isinstance(at, _Slices):
            self.heads[at.images, :, at.positions] = x
        else:
            self.rows.index_copy_(0, at.flatten(), _flat(x))

    def add(self, at: _At, x: Tensor) -> None:
        """Add [N, heads, L, head_dim] there."""
        if isinstance(at, _Slices):
            self.heads[at.images, :, at.positions] += x
        else:
            self.rows.index_add_(0, at.flatten(), _flat(x))


def _flat(x: Tensor) -> Tensor:
    """[N, heads, L, head_dim] -> [N * L, heads * head_dim]."""
    return x.transpose(1, 2).reshape(-1, x.shape[1] * x.shape[3])


def _maps(geometry: _Geometry, key: Tensor, value: Tensor, pad: Tensor | None) -> tuple[_Map, _Map]:
    if pad is None or not geometry.padded:
        return _Map(key), _Map(value)
    return _Map(key, pad[1]), _Map(value, pad[2])


def _masks(geometry: _Geometry, bias: Tensor | None, like: Tensor) -> list[Tensor]:
    """Additive mask of each kind of tiles, [heads or 1, Lq, Lk]: bias, or minus infinity."""
    if bias is None:
        bias = like.new_zeros(1, 1, geometry.entries)
    table = F.pad(bias.flatten(1), (0, 1), value=float("-inf"))
    shapes = [(kind.query.shape[1], kind.key.shape[1]) for kind in geometry.kinds]
    parts = table.index_select(1, geometry.entry).split([q * k for q, k in shapes], 1)
    return [part.unflatten(1, shape) for part, shape in zip(parts, shapes, strict=True)]


def _parts(
    kind: _Kind, batch: int, positions: int, keys: int, weight: int
) -> Iterator[tuple[_At, _At, Tensor | None]]:
    """Tiles of a kind in parts that stay in cache: where queries and keys stand, and what is real.

    ``positions`` and ``keys`` are an image's rows in the two maps; ``weight`` is the number of
    elements that a tile puts into memory.
    """
    if kind.runs is not None:
        step = max(1, _CHUNK // weight)
        for image in range(0, batch, step):
            images = slice(image, image + step)
            for query, key in kind.runs:
                yield _Slices(images, query), _Slices(images, key), None
        return
    tiles = kind.key.shape[0]
    images = max(1, _CHUNK // (tiles * weight))
    step = max(1, _CHUNK // weight) if images == 1 else tiles
    for image in range(0, batch, images):
        index = torch.arange(image, min(batch, image + images), device=kind.query.device)
        for tile in range(0, tiles, step):
            part = slice(tile, tile + step)
            query = (kind.query[part] + index[:, None, None] * positions).flatten(0, 1)
            key = (kind.key[part] + index[:, None, None] * keys).flatten(0, 1)
            yield query, key, None if kind.real is None else kind.real[part].repeat(len(index), 1)


def _forward(
    geometry: _Geometry,
    scale: float,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None,
    pad: Tensor | None,
) -> Tensor:
    queries, (keys, values) = _Map(query), _maps(geometry, key, value, pad)
    out = torch.empty_like(query, memory_format=torch.contiguous_format)
    outs = _Map(out)
    masks = _masks(geometry, bias, query)
    for kind, mask in zip(geometry.kinds, masks, strict=True):
        weight = kind.key.shape[1] * keys.rows.shape[1]
        for at, near, _ in _parts(kind, len(query), queries.positions, keys.positions, weight):
            attended = F.scaled_dot_product_attention(
                queries.take(at), keys.take(near), values.take(near), mask[None], scale=scale
            )
            outs.put(at, attended)
    return out


class _Attention(torch.autograd.Function):
    """`_forward` with a backward pass that gathers and attends again, part by part."""

    @staticmethod
    def forward(
        ctx: Any,
        geometry: _Geometry,
        scale: float,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        bias: Tensor | None,
        pad: Tensor | None,
    ) -> Tensor:
        ctx.save_for_backward(query, key, value, bias, pad)
        ctx.geometry, ctx.scale = geometry, scale
        return _forward(geometry, scale, query, key, value, bias, pad)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, bias, pad = ctx.saved_tensors
        grads = _backward(ctx.geometry, ctx.scale, grad, query, key, value, bias, pad)
        wanted = ctx.needs_input_grad[2:]
        return None, None, *(g if want else None for g, want in zip(grads, wanted, strict=True))


def _backward(
    geometry: _Geometry,
    scale: float,
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None,
    pad: Tensor | None,
) -> tuple[Tensor | None, ...]:
    """Gradients of query, key, value, bias and pad; half precision accumulates in float32."""
    heads = query.shape[3]
    exact = torch.promote_types(query.dtype, torch.float32)
    queries, (keys, values), grads = _Map(query), _maps(geometry, key, value, pad), _Map(grad)

    def zeros(like: _Map) -> _Map:
        shape = (len(query), like.positions, 1, *query.shape[3:])
        return _Map(torch.zeros(shape, dtype=exact, device=query.device))

    grad_queries, grad_keys, grad_values = zeros(queries), zeros(keys), zeros(values)
    grad_table = torch.zeros(heads, geometry.entries + 1, dtype=exact, device=query.device)
    masks = _masks(geometry, bias, query)
    for kind, mask in zip(geometry.kinds, masks, strict=True):
        weight = mask[0].numel() * heads
        for at, near, real in _parts(kind, len(query), queries.positions, keys.positions, weight):
            q, k, v, g = (
                source.take(where).to(exact).flatten(0, 1)
                for source, where in ((queries, at), (keys, near), (values, near), (grads, at))
            )
            q = q * scale
            if real is not None:
                g = g * real.repeat_interleave(heads, 0)[..., None]
            scores = torch.bmm(q, k.transpose(1, 2))
            by_head = (-1, heads, *scores.shape[1:])
            scores.view(by_head).add_(mask)
            weights = scores.softmax(-1)
            grad_weights = torch.bmm(g, v.transpose(1, 2))
            grad_scores = torch._softmax_backward_data(grad_weights, weights, -1, exact)
            grad_q = torch.bmm(grad_scores, k).mul_(scale)
            grad_k = torch.bmm(grad_scores.transpose(1, 2), q)
            grad_v = torch.bmm(weights.transpose(1, 2), g)
            # a repeated query adds the zero that its gradient was masked to
            for total, where, part in (
                (grad_queries, at, grad_q),
                (grad_keys, near, grad_k),
                (grad_values, near, grad_v),
            ):
                total.add(where, part.view(-1, heads, *part.shape[1:]))
            if bias is not None:
                summed = grad_scores.view(by_head).sum(0).flatten(1)
                grad_table.index_add_(1, kind.entry.flatten(), summed)
    grad_pad = None
    if pad is not None:
        grad_pad = torch.zeros_like(pad)
        if geometry.padded:
            for i, x in enumerate((grad_keys, grad_values)):
                grad_pad[i + 1] = x.heads[:, :, -1].sum(0)
    size = queries.positions
    return (
        *(
            x.heads[:, :, :size].transpose(1, 2).reshape(query.shape).to(query.dtype)
            for x in (grad_queries, grad_keys, grad_values)
        ),
        None if bias is None else grad_table[:, :-1].reshape(bias.shape).to(bias.dtype),
        grad_pad,
    )


# The traced computation: the same tiles, all in one call, nothing cached or read.


def _traced(call: Call) -> Tensor:
    batch, height, width, heads, head_dim = call.query.shape
    padded = call.padded_size
    axes = []
    for length, full, k, d, tile in zip(
        (height, width), padded, call.kernel_size, call.dilation, _TRACED_TILE, strict=True
    ):
        axes.append(_axis(length, full, k, d, tile, call.query.device))
    (query_h, _, key_h, entry_h, slot_h), (query_w, _, key_w, entry_w, slot_w) = axes
    at = _join(query_h, query_w, width).flatten(2).flatten(0, 1)
    near = _join_keys(key_h, key_w, height, width).flatten(2).flatten(0, 1)
    entry = _join_entries(entry_h, entry_w, call.kernel_size).flatten(0, 1)

    key, value = (x.flatten(3).flatten(1, 2) for x in (call.key, call.value))
    if call.pad is not None and padded != (height, width):
        fill = call.pad.flatten(1)[:, None, None].expand(-1, batch, -1, -1)
        key, value = torch.cat([key, fill[1]], 1), torch.cat([value, fill[2]], 1)

    def take(x: Tensor, index: Tensor) -> Tensor:
        taken = x.index_select(1, index.flatten()).view(batch, *index.shape, heads, head_dim)
        return taken.transpose(2, 3)  # [B, tiles, heads, L, head_dim]

    bias = call.bias
    if bias is None:
        bias = call.query.new_zeros(1, 2 * call.kernel_size[0] - 1, 2 * call.kernel_size[1] - 1)
    table = F.pad(bias.flatten(1), (0, 1), value=float("-inf"))
    mask = table[:, entry].transpose(0, 1)  # [tiles, heads or 1, Lq, Lk]
    out = F.scaled_dot_product_attention(
        take(call.query.flatten(3).flatten(1, 2), at),
        take(key, near),
        take(value, near),
        attn_mask=mask,
        scale=call.scale,
    )
    # tiles are [rows of tiles, columns of tiles], queries in them [rows, columns]
    (th, tw), columns = _TRACED_TILE, query_w.shape[0]
    row_tile, row = slot_h[:, None] // th, slot_h[:, None] % th
    column_tile, column = slot_w[None] // tw, slot_w[None] % tw
    slot = ((row_tile * columns + column_tile) * th + row) * tw + column
    out = out.transpose(2, 3).reshape(batch, -1, heads * head_dim)
    return out.index_select(1, slot.flatten()).view(batch, height, width, heads, head_dim)
