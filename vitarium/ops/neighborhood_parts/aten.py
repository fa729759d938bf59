"""Scores and mixing in ordinary torch functions, fast on a CPU.

Tiles of queries meet their halos of keys in dense products, as in neighborhood attention: scores
are then gathered from the halo's products, weights are scattered into the halo's. Three products
are closed under differentiation, to any order: ``scores(q, k)``, ``mix(w, v)`` and
``spread(w, x)``, which sends every position's x to its neighbors and so transposes mix.
Each is one op of the dispatcher; exported programs hold ordinary functions.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from vitarium.ops import _dispatch, _select
from vitarium.ops.neighborhood_attn import gather, tiles

if TYPE_CHECKING:
    from vitarium.ops.neighborhood_parts.op import MixCall, ScoresCall

_Pair = tiles.Pair


def unsupported(call: MixCall | ScoresCall) -> str | None:
    """None: runs everywhere."""
    return None


def scores(call: ScoresCall) -> Tensor:
    """Dot products tile by tile, then the bias."""
    product = _traced_scores if _select.is_exporting() else _scores
    out: Tensor = product(call.query, call.key, call.kernel_size, call.dilation)
    if call.bias is not None:
        size = (call.key.shape[1], call.key.shape[2])
        find = _bias_entries if _select.is_tracing() else _kept_bias_entries
        rows, columns = find(size, call.kernel_size, call.dilation, call.key.device)
        bias = call.bias.index_select(1, rows.flatten()).index_select(2, columns.flatten())
        bias = bias.unflatten(2, columns.shape).unflatten(1, rows.shape)
        out += bias.permute(1, 3, 0, 2, 4).flatten(3)
    return out


def mix(call: MixCall) -> Tensor:
    """Weighted sums tile by tile."""
    product = _traced_mix if _select.is_exporting() else _mix
    out: Tensor = product(call.weights, call.value, call.kernel_size, call.dilation)
    return out


def _bias_entries(
    size: _Pair, kernel: _Pair, dilation: _Pair, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Per position of an axis, its neighbors' bias entries: [H, kh] and [W, kw]."""
    found = []
    for length, k, d in zip(size, kernel, dilation, strict=True):
        cut = tiles.axis(length, length, k, d, 1, tiles.count(length, d, 1), k, device)
        found.append(cut.entry[cut.slot, 0])
    return found[0], found[1]


@lru_cache(maxsize=64)
def _kept_bias_entries(
    size: _Pair, kernel: _Pair, dilation: _Pair, device: torch.device
) -> tuple[Tensor, Tensor]:
    with torch.inference_mode(False):  # gradients of later calls keep these tables
        return _bias_entries(size, kernel, dilation, device)


# The eager computation. Half precision accumulates in float32.


def _walk(
    maps: Tensor, kernel_size: Sequence[int], dilation: Sequence[int]
) -> Iterator[tuple[tiles.Geometry, gather.Group, slice, list[slice]]]:
    """Cut the work on ``maps`` into groups of images, and those into parts of tiles."""
    batch, height, width, heads, _ = maps.shape
    (kh, kw), (dh, dw) = kernel_size, dilation
    shape = ((height, width), (height, width), (kh, kw), (dh, dw))
    geometry = tiles.geometry(*shape, tiles.best_tile(batch * heads, *shape), maps.device)
    channels = maps[0, 0, 0].numel()
    for group, at, _, parts in gather.groups(geometry, batch, height * width, channels):
        yield geometry, group, at, parts


def _scores_kernel(
    query: Tensor, key: Tensor, kernel_size: Sequence[int], dilation: Sequence[int]
) -> Tensor:
    out = _fake_scores(query, key, kernel_size)
    if len(query) == 0:
        return out
    queries, keys, outs = (gather.rows(x) for x in (query, key, out))
    heads, exact = query.shape[3], torch.promote_types(query.dtype, torch.float32)
    for geometry, group, at, parts in _walk(key, kernel_size, dilation):
        q = gather.take(queries[at], group.query, heads).to(exact)
        found = out.new_empty(*q.shape[:3], out.shape[-1])
        for part in parts:
            k = gather.take(keys[at], group.key[part], heads).to(exact)
            window = geometry.window.index_select(0, group.kind[part])
            of_heads = (x.unbind(2) for x in (q[part], k, found[part]))
            for hq, hk, ho in zip(*of_heads, strict=True):
                ho.copy_(torch.bmm(hq, hk.mT).gather(2, window))
        torch.index_select(found.view(-1, outs.shape[1]), 0, group.slot, out=outs[at])
    return out


def _mix_kernel(
    weights: Tensor, value: Tensor, kernel_size: Sequence[int], dilation: Sequence[int]
) -> Tensor:
    out = _fake_mix(weights, value)
    if len(value) == 0:
        return out
    weightings, values, outs = (gather.rows(x) for x in (weights, value, out))
    heads, exact = value.shape[3], torch.promote_types(value.dtype, torch.float32)
    for geometry, group, at, parts in _walk(value, kernel_size, dilation):
        w = gather.take(weightings[at], group.query, heads).to(exact)
        found = out.new_empty(*w.shape[:3], out.shape[-1])
        for part in parts:
            v = gather.take(values[at], group.key[part], heads).to(exact)
            window = geometry.window.index_select(0, group.kind[part])
            halo = w.new_zeros(*window.shape[:2], v.shape[1])
            of_heads = (x.unbind(2) for x in (w[part], v, found[part]))
            for hw, hv, ho in zip(*of_heads, strict=True):
                ho.copy_(torch.bmm(halo.scatter_(2, window, hw), hv))
        torch.index_select(found.view(-1, outs.shape[1]), 0, group.slot, out=outs[at])
    return out


def _spread_kernel(
    weights: Tensor, source: Tensor, kernel_size: Sequence[int], dilation: Sequence[int]
) -> Tensor:
    if len(source) == 0:
        return _fake_mix(weights, source)
    weightings, sources = gather.rows(weights), gather.rows(source)
    heads, exact = source.shape[3], torch.promote_types(source.dtype, torch.float32)
    sums = torch.zeros_like(sources, dtype=exact)
    for geometry, group, at, parts in _walk(source, kernel_size, dilation):
        w = gather.take(weightings[at], group.query, heads).to(exact)
        x = gather.take(sources[at], group.query, heads).to(exact)
        if group.real is not None:
            x = x * group.real[..., None, None]  # a repeated query counts once
        for part in parts:
            index = group.key[part]
            window = geometry.window.index_select(0, group.kind[part])
            halo = w.new_zeros(*window.shape[:2], index.shape[1])
            sent = w.new_empty(*index.shape, heads, x.shape[-1])
            for hw, hx, hs in zip(
                w[part].unbind(2), x[part].unbind(2), sent.unbind(2), strict=True
            ):
                hs.copy_(torch.bmm(halo.scatter_(2, window, hw).mT, hx))
            sums[at].index_add_(0, index.flatten(), sent.flatten(2).flatten(0, 1))
    return sums.view(source.shape).to(source.dtype)


# The dispatcher's ops.


def _fake_scores(query: Tensor, key: Tensor, kernel_size: Sequence[int], *_: Any) -> Tensor:
    return query.new_empty(*query.shape[:4], math.prod(kernel_size))


def _fake_mix(weights: Tensor, value: Tensor, *_: Any) -> Tensor:
    return value.new_empty(value.shape)


def _flops(first: object, second: Sequence[int], kernel: Sequence[int], *_: Any, **__: Any) -> int:
    del first
    return 2 * math.prod(second) * math.prod(kernel)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    del output
    ctx.save_for_backward(*inputs[:2])
    ctx.shape = inputs[2:]


def _gradient(
    first: Callable[[Tensor, Tensor, Tensor], tuple[Any, Tensor, Tensor]],
    second: Callable[[Tensor, Tensor, Tensor], tuple[Any, Tensor, Tensor]],
) -> Callable[..., tuple[Tensor | None, ...]]:
    """The gradient of a product from those of its factors, (op, its two factors)."""

    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        found: list[Tensor | None] = [None, None]
        for i, formula in enumerate((first, second)):
            if ctx.needs_input_grad[i]:
                op, *factors = formula(grad, *ctx.saved_tensors)
                found[i] = op(*factors, *ctx.shape)
        return *found, None, None

    return backward


_SCHEMA = "(Tensor {}, Tensor {}, int[2] kernel_size, int[2] dilation) -> Tensor"
_scores: Callable[..., Any] = _dispatch.define(
    "neighborhood_scores_aten",
    _SCHEMA.format("query", "key"),
    _scores_kernel,
    _fake_scores,
    _flops,
    _keep,
    _gradient(lambda g, q, k: (_mix, g, k), lambda g, q, k: (_spread, g, q)),
)
_mix: Callable[..., Any] = _dispatch.define(
    "neighborhood_mix_aten",
    _SCHEMA.format("weights", "value"),
    _mix_kernel,
    _fake_mix,
    _flops,
    _keep,
    _gradient(lambda g, w, v: (_scores, g, v), lambda g, w, v: (_spread, w, g)),
)
_spread: Callable[..., Any] = _dispatch.define(
    "neighborhood_spread_aten",
    _SCHEMA.format("weights", "source"),
    _spread_kernel,
    _fake_mix,
    _flops,
    _keep,
    _gradient(lambda g, w, x: (_scores, x, g), lambda g, w, x: (_mix, w, g)),
)


# Exported: the same products over tiles of one size, nothing cached or read.


def _traced(
    like: Tensor, kernel: _Pair, dilation: _Pair
) -> tuple[tiles.Traced, Tensor, Callable[[Tensor, Tensor], Tensor]]:
    """Tiles of ``like``'s map, every query's window [B * tiles, heads, Lq, kh * kw], gathering."""
    batch, height, width, heads, _ = like.shape
    traced = tiles.traced((height, width), (height, width), kernel, dilation, like.device)
    window = tiles.windows(traced.rows.entry, traced.columns.entry, kernel)
    window = window.repeat(batch, 1, 1)[:, None].expand(-1, heads, -1, -1)

    def take(x: Tensor, index: Tensor) -> Tensor:
        return gather.tiles_of(x.flatten(3).flatten(1, 2), index, heads)

    return traced, window, take


def _traced_scores(query: Tensor, key: Tensor, kernel: _Pair, dilation: _Pair) -> Tensor:
    traced, window, take = _traced(key, kernel, dilation)
    products = take(query, traced.query) @ take(key, traced.key).mT
    return gather.map_of(products.gather(3, window), key.shape[0], traced)


def _traced_mix(weights: Tensor, value: Tensor, kernel: _Pair, dilation: _Pair) -> Tensor:
    traced, window, take = _traced(value, kernel, dilation)
    w, v = take(weights, traced.query), take(value, traced.key)
    halo = w.new_zeros(*w.shape[:3], v.shape[2]).scatter(3, window, w)
    return gather.map_of(halo @ v, value.shape[0], traced)
