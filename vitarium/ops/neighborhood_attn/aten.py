"""Neighborhood attention in ordinary torch functions, fast on a CPU.

Tiles of queries attend to their halos of keys (see `tiles`), part after part, so that what is
gathered stays in cache. On small maps, tiles as wide as the map pay: their queries and keys are
slices and need no gathering. Training does not keep halos or masks: the backward pass gathers
them again. All this is one op of the dispatcher: it counts as the FLOPs of its mathematics, and
torch.compile calls it as it is. Exported programs, which shall run without vitarium, hold the same
tiles as ordinary functions in one part.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vitarium.ops import _dispatch, _select
from vitarium.ops.neighborhood_attn import gather, tiles

if TYPE_CHECKING:
    from vitarium.ops.neighborhood_attn.op import Call


def unsupported(call: Call) -> str | None:
    """None: runs everywhere."""
    return None


def run(call: Call) -> Tensor:
    """Attend tile by tile; with a gradient that gathers again where one is needed."""
    if _select.is_exporting():
        return _traced(call)
    tensors = (call.query, call.key, call.value, call.bias, call.pad)
    out: Tensor = _attention(*tensors, call.kernel_size, call.dilation, call.scale)
    return out


# The eager computation.


def _key_rows(geometry: tiles.Geometry, x: Tensor, pad: Tensor | None) -> Tensor:
    """Like `_rows`; on a padded map every image has the padded position's row behind its own."""
    if pad is None or not geometry.padded:
        return gather.rows(x)
    flat = x.flatten(1, 2)
    return torch.cat([flat, pad.expand(len(x), 1, -1, -1)], 1).flatten(2).flatten(0, 1)


def _masks(geometry: tiles.Geometry, bias: Tensor | None, like: Tensor) -> Tensor:
    """Additive masks [heads or 1, kinds, Lq, Lk]: the bias, minus infinity outside windows."""
    if bias is None:
        bias = like.new_zeros(1, 1, geometry.entries)
    table = F.pad(bias.flatten(1), (0, 1), value=float("-inf"))
    return table.index_select(1, geometry.entry.flatten()).view(-1, *geometry.entry.shape)


def _geometry(
    query: Tensor, pad: Tensor | None, kernel_size: list[int], dilation: list[int]
) -> tiles.Geometry:
    batch, height, width, heads, _ = query.shape
    (kh, kw), (dh, dw) = kernel_size, dilation
    size = padded = (height, width)
    if pad is not None:
        padded = tiles.padded_size(size, (kh, kw), (dh, dw))
    maps = (size, padded, (kh, kw), (dh, dw))
    return tiles.geometry(*maps, tiles.best_tile(batch * heads, *maps), query.device)


def _forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None,
    pad: Tensor | None,
    kernel_size: list[int],
    dilation: list[int],
    scale: float,
) -> Tensor:
    out = torch.empty_like(query, memory_format=torch.contiguous_format)
    if len(query) == 0:
        return out
    geometry = _geometry(query, pad, kernel_size, dilation)
    masks = _masks(geometry, bias, query)
    if geometry.strips is not None:
        _attend_strips(geometry.strips, scale, query, key, value, masks, out)
        return out
    batch, heads = query.shape[0], query.shape[3]
    pad_key, pad_value = (None, None) if pad is None else pad[1:]
    queries, keys = gather.rows(query), _key_rows(geometry, key, pad_key)
    values, outs = _key_rows(geometry, value, pad_value), gather.rows(out)
    attend = _attend if torch.finfo(query.dtype).bits >= 32 else _attend_fused
    buffers = None
    for group, at, near, parts in gather.groups(geometry, batch, len(keys) // batch, keys.shape[1]):
        q = gather.take(queries[at], group.query, heads)
        attended = torch.empty_like(q)
        if buffers is None:
            longest = group.key[parts[0]].numel()
            buffers = [x.new_empty(longest, x.shape[1]) for x in (keys, values)]
        for part in parts:
            index = group.key[part]
            k, v = (
                gather.take(x[near], index, heads, buffer)
                for x, buffer in zip((keys, values), buffers, strict=True)
            )
            attend(q[part], k, v, masks, group.kind[part], scale, attended[part])
        torch.index_select(attended.view(-1, outs.shape[1]), 0, group.slot, out=outs[at])
    return out


def _attend_strips(
    strips: tuple[tiles.Strip, ...],
    scale: float,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    masks: Tensor,
    out: Tensor,
) -> None:
    """Attend where tiles are slices of the map, and write to ``out``."""
    q, k, v, o = (x.flatten(1, 2).transpose(1, 2) for x in (query, key, value, out))
    masks = masks[None]
    for at, near, kind in strips:
        attended = F.scaled_dot_product_attention(
            q.narrow(2, *at),
            k.narrow(2, *near),
            v.narrow(2, *near),
            masks.select(2, kind),
            scale=scale,
        )
        o.narrow(2, *at).copy_(attended)


def _attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    masks: Tensor,
    kind: Tensor,
    scale: float,
    out: Tensor,
) -> None:
    """Attend in every tile, [N, L, heads, head_dim]: a head at a time, without copies."""
    heads = zip(*(x.unbind(2) for x in (query, key, value, out)), strict=True)
    for head, (q, k, v, o) in enumerate(heads):
        o.copy_(torch.bmm(_weights(q, k, masks[head % len(masks)], kind, scale), v))


def _weights(query: Tensor, key: Tensor, masks: Tensor, kind: Tensor, scale: float) -> Tensor:
    """Attention weights of one head, [N, Lq, Lk]."""
    weights = masks.index_select(0, kind)
    weights.baddbmm_(query, key.transpose(1, 2), alpha=scale)
    return torch.softmax(weights, -1, out=weights)


def _attend_fused(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    masks: Tensor,
    kind: Tensor,
    scale: float,
    out: Tensor,
) -> None:
    """The same in half precision, where scores must not be rounded to it."""
    mask = masks.index_select(1, kind).transpose(0, 1)
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    out.copy_(F.scaled_dot_product_attention(q, k, v, mask, scale=scale).transpose(1, 2))


def _backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None,
    pad: Tensor | None,
    kernel_size: list[int],
    dilation: list[int],
    scale: float,
) -> tuple[Tensor, ...]:
    """Gradients of query, key, value, bias and pad; half precision accumulates in float32.

    It gathers and attends again, part by part. The gradient of what is None has no elements.
    """
    if len(query) == 0:
        return tuple(x.zero_() for x in _fake_backward(grad, query, key, value, bias, pad))
    geometry = _geometry(query, pad, kernel_size, dilation)
    batch, heads = query.shape[0], query.shape[3]
    exact = torch.promote_types(query.dtype, torch.float32)
    pad_key, pad_value = (None, None) if pad is None else pad[1:]
    queries, grads = gather.rows(query), gather.rows(grad)
    keys, values = _key_rows(geometry, key, pad_key), _key_rows(geometry, value, pad_value)
    sums = [torch.zeros_like(x, dtype=exact) for x in (queries, keys, values)]
    masks = _masks(geometry, bias, query).to(exact)
    mask_sums = torch.zeros_like(masks) if bias is not None else None
    for group, at, near, parts in gather.groups(geometry, batch, len(keys) // batch, keys.shape[1]):
        q, g = (gather.take(x[at], group.query, heads).to(exact) for x in (queries, grads))
        if group.real is not None:
            g = g * group.real[..., None, None]  # a repeated query counts once
        grad_q = torch.empty_like(q)
        for part in parts:
            index, kind = group.key[part], group.kind[part]
            k, v = (gather.take(x[near], index, heads).to(exact) for x in (keys, values))
            grad_k, grad_v = torch.empty_like(k), torch.empty_like(v)
            of_heads = (x.unbind(2) for x in (q[part], k, v, g[part], grad_q[part], grad_k, grad_v))
            for head, (hq, hk, hv, hg, gq, gk, gv) in enumerate(zip(*of_heads, strict=True)):
                weights = _weights(hq, hk, masks[head % len(masks)], kind, scale)
                gv.copy_(torch.bmm(weights.mT, hg))
                scores = torch.bmm(hg, hv.mT)
                scores = torch._softmax_backward_data(scores, weights, -1, exact)
                gq.copy_(torch.bmm(scores, hk))
                gk.copy_(torch.bmm(scores.mT, hq))
                if mask_sums is not None:
                    mask_sums[head].index_add_(0, kind, scores)
            for total, x in ((sums[1], grad_k), (sums[2], grad_v)):
                total[near].index_add_(0, index.flatten(), x.flatten(2).flatten(0, 1))
        torch.index_select(grad_q.view(-1, queries.shape[1]), 0, group.slot, out=sums[0][at])
    sums[0] *= scale
    sums[1] *= scale
    grad_bias, grad_pad = _like(bias, query), _like(pad, query).zero_()
    if mask_sums is not None:
        table = masks.new_zeros(heads, geometry.entries + 1)
        table.index_add_(1, geometry.entry.flatten(), mask_sums.flatten(1))
        grad_bias.copy_(table[:, :-1].view(grad_bias.shape))
    if pad is not None and geometry.padded:
        for i in (1, 2):
            grad_pad[i] = sums[i].view(batch, -1, *pad.shape[1:])[:, -1].sum(0)
    maps = (x.view(batch, -1, x.shape[1])[:, : len(geometry.slot)] for x in sums)
    found = (x.reshape(query.shape).to(query.dtype).contiguous() for x in maps)
    return *found, grad_bias, grad_pad


def _like(x: Tensor | None, query: Tensor) -> Tensor:
    """Memory for the gradient of an optional tensor."""
    return query.new_empty(0 if x is None else x.shape)


def _fake_forward(query: Tensor, *_: Any) -> Tensor:
    return query.new_empty(query.shape)


def _fake_backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None,
    pad: Tensor | None,
    *_: Any,
) -> tuple[Tensor, ...]:
    return tuple(_like(x, query) for x in (query, key, value, bias, pad))


def _flops(query: Sequence[int], *rest: Any, **_: Any) -> int:
    """Scores and mixing of the real positions' windows: queries and keys of padding are free."""
    kernel_size = rest[4]
    return 4 * math.prod(query) * math.prod(kernel_size)


def _flops_backward(grad: Sequence[int], *rest: Any, **_: Any) -> int:
    """As torch counts scaled_dot_product_attention: five products, the scores once more."""
    return 10 * math.prod(grad) * math.prod(rest[5])


_ARGUMENTS = (
    "Tensor query, Tensor key, Tensor value, Tensor? bias, Tensor? pad, int[2] kernel_size, "
    "int[2] dilation, float scale"
)
_attention_backward = _dispatch.define(
    "neighborhood_attention_aten_backward",
    f"(Tensor grad, {_ARGUMENTS}) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _backward,
    _fake_backward,
    _flops_backward,
)


_attention = _dispatch.define(
    "neighborhood_attention_aten",
    f"({_ARGUMENTS}) -> Tensor",
    _forward,
    _fake_forward,
    _flops,
    *_dispatch.from_inputs(_attention_backward, 5),
)


# Exported: the same tiles, all in one call, nothing cached or read.


def _traced(call: Call) -> Tensor:
    batch, height, width, heads, _ = call.query.shape
    size = padded = (height, width)
    key, value = (x.flatten(3).flatten(1, 2) for x in (call.key, call.value))
    if call.pad is not None:
        # whether a map needs it or not: one program for both
        padded = tiles.padded_size(size, call.kernel_size, call.dilation)
        fill = call.pad.flatten(1)[:, None, None].expand(-1, batch, -1, -1)
        key, value = torch.cat([key, fill[1]], 1), torch.cat([value, fill[2]], 1)
    traced = tiles.traced(size, padded, call.kernel_size, call.dilation, call.query.device)
    entry = tiles.entries(traced.rows.entry, traced.columns.entry, call.kernel_size)
    bias = call.bias
    if bias is None:
        bias = call.query.new_zeros(1, 2 * call.kernel_size[0] - 1, 2 * call.kernel_size[1] - 1)
    table = F.pad(bias.flatten(1), (0, 1), value=float("-inf"))
    mask = table[:, entry].transpose(0, 1)  # [tiles, heads or 1, Lq, Lk]
    out = F.scaled_dot_product_attention(
        gather.tiles_of(call.query.flatten(3).flatten(1, 2), traced.query, heads),
        gather.tiles_of(key, traced.key, heads),
        gather.tiles_of(value, traced.key, heads),
        attn_mask=mask.repeat(batch, 1, 1, 1),
        scale=call.scale,
    )
    return gather.map_of(out, batch, traced)
