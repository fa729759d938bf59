"""Bi-level routing attention in ordinary torch functions, fast on a CPU.

Maps are cut into regions once; then, some regions of queries at a time, the keys and values that
they chose are gathered, attended to and forgotten. The gradient keeps the output and the softmax's
logarithmic sums, and gathers again. All this is one op of the dispatcher: it counts as the FLOPs
of its mathematics, and torch.compile calls it as it is. Exported programs, which shall run without
vitarium, hold the same in ordinary functions, all regions at once.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from vitarium.ops import _dispatch, _select
from vitarium.ops.routing_attn.regions import Axis, cuts, product_flops

if TYPE_CHECKING:
    from vitarium.ops.routing_attn.op import Call

CHUNK = 1 << 17  # elements of keys and values that are gathered at a time


def unsupported(call: Call) -> str | None:
    """None: runs everywhere."""
    return None


def run(call: Call) -> Tensor:
    """Attend some regions at a time; with a gradient that gathers again where one is needed."""
    if _select.is_exporting():
        return _traced(call)
    chosen = weights = None
    if call.soft_routing:
        chosen, weights = _soft(call)
    tensors = (call.query, call.key, call.value, call.pad, chosen, weights)
    out: Tensor = _attention(*tensors, call.num_regions, call.topk, call.scale)[0]
    return out


# The eager computation. Regions are [B * R, L, heads, head_dim], images one after the other.


def _exact(dtype: torch.dtype) -> torch.dtype:
    """What sums over many elements are computed in."""
    return dtype if dtype.itemsize >= 4 else torch.float32


def _axes(query: Tensor, pad: Tensor | None, num_regions: Sequence[int]) -> tuple[Axis, Axis]:
    return cuts(query.shape[1:3], num_regions, pad is not None)


def _cut(x: Tensor, counts: Sequence[int], axes: tuple[Axis, Axis], fill: Any = 0) -> Tensor:
    """A map [B, H, W, ...] as so many regions along its axes; padding holds ``fill``."""
    batch, height, width = x.shape[:3]
    rows, columns = (count * cut.size for count, cut in zip(counts, axes, strict=True))
    if (rows, columns) != (height, width):
        grown = x.new_empty(batch, rows, columns, *x.shape[3:])
        grown[:, :height, :width] = x
        grown[:, :height, width:] = fill
        grown[:, height:] = fill
        x = grown
    x = x.contiguous()  # two copies are faster than one of a view in seven parts
    x = x.unflatten(2, (counts[1], -1)).unflatten(1, (counts[0], -1)).transpose(2, 3)
    return x.reshape(batch * counts[0] * counts[1], axes[0].size * axes[1].size, *x.shape[5:])


def _joined(x: Tensor, counts: Sequence[int], axes: tuple[Axis, Axis]) -> Tensor:
    """Regions as a map again, padding included: the inverse of `_cut`."""
    x = x.unflatten(1, (axes[0].size, -1)).unflatten(0, (-1, *counts)).transpose(2, 3)
    return x.flatten(3, 4).flatten(1, 2)


def _even(head_dim: int, *maps: Tensor) -> Iterator[Tensor]:
    """Maps with zeros behind the channels of those that have fewer than ``head_dim``."""
    for x in maps:
        missing = head_dim - x.shape[-1]
        yield F.pad(x, (0, missing)) if missing else x


def _choose(query: Tensor, key: Tensor, share: Tensor | None, batch: int, topk: int) -> Tensor:
    """The regions of keys that each region of queries attends to, [B, R, topk].

    Zeros that complete a region change its mean by a positive factor: ``share`` undoes that for
    the keys; for the queries it makes no difference.
    """
    queries, keys = (
        x.mean(1, dtype=_exact(x.dtype)).flatten(1).unflatten(0, (batch, -1)) for x in (query, key)
    )
    scores = queries @ keys.mT
    if share is not None:
        scores = scores / share
    return torch.topk(scores, topk, sorted=False).indices


def _parts(chosen: Tensor, images: int, region: int) -> Iterator[tuple[slice, Tensor]]:
    """Some regions of queries at a time, and the regions of keys that these chose.

    Args:
        chosen: [B, R, topk].
        images: regions of keys in an image.
        region: elements of a region of keys.
    """
    batch, count, topk = chosen.shape
    first = torch.arange(batch, device=chosen.device)[:, None, None] * images
    near = (chosen + first).flatten(0, 1)
    step = max(1, CHUNK // (topk * region))
    for i in range(0, batch * count, step):
        yield slice(i, i + step), near[i : i + step].flatten()


def _take(regions: Tensor, near: Tensor, count: int, weights: Tensor | None) -> Tensor:
    """Chosen regions of keys or values, [count, heads, topk * L, head_dim]."""
    taken = regions.index_select(0, near)
    if weights is not None:
        taken *= weights.flatten()[:, None, None, None]
    return taken.view(count, -1, *regions.shape[2:]).transpose(1, 2)


def _attend(query: Tensor, key: Tensor, value: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Attention of [N, heads, L, head_dim], and its logarithmic sums [N, heads, L]."""
    if query.device.type == "cpu":
        flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        out, sums = flash(query, key, value, 0.0, False, scale=scale)
        return out, sums
    exact = _exact(query.dtype)
    scores = (query.to(exact) * scale) @ key.to(exact).mT
    sums = scores.logsumexp(-1)
    return ((scores - sums[..., None]).exp() @ value.to(exact)).to(query.dtype), sums


def _attend_backward(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, sums: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query, key and value in `_attend`."""
    if query.device.type == "cpu":
        flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
        gq, gk, gv = flash(grad, query, key, value, out, sums, 0.0, False, scale=scale)
        return gq, gk, gv
    weights = ((query * scale) @ key.mT - sums[..., None]).exp()
    scores = grad @ value.mT - (grad * out).sum(-1, keepdim=True)
    scores = scores * weights * scale
    return scores @ key, scores.mT @ query, weights.mT @ grad


def _forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    pad: Tensor | None,
    chosen: Tensor | None,
    weights: Tensor | None,
    num_regions: Sequence[int],
    topk: int,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """The output, logarithmic sums [B, H, W, heads] and chosen regions [B, R, topk]."""
    batch, height, width = query.shape[:3]
    head_dim = value.shape[4]
    if batch == 0:
        return _fake_forward(query, key, value, pad, chosen, weights, num_regions, topk)
    axes = _axes(query, pad, num_regions)
    real, every = [cut.real for cut in axes], [cut.total for cut in axes]
    widest = max(head_dim, query.shape[4])
    fills = (0, 0, 0) if pad is None else pad.unbind()
    maps = zip(_even(widest, query, key, value), (real, every, every), fills, strict=True)
    q, k, v = (_cut(x, counts, axes, fill) for x, counts, fill in maps)
    if chosen is None:
        share = _real_share(axes, query) if pad is None else None
        chosen = _choose(q, k, share, batch, topk)
    out = torch.empty_like(q)
    sums = q.new_empty(q.shape[:3], dtype=_exact(q.dtype))
    for part, near in _parts(chosen, every[0] * every[1], k[0].numel()):
        w = None if weights is None else weights.flatten(0, 1)[part]
        x = q[part].transpose(1, 2)
        nk, nv = (_take(regions, near, len(x), w) for regions in (k, v))
        for found, whole in zip(_attend(x, nk, nv, scale), (out, sums), strict=True):
            whole[part] = found.transpose(1, 2)
    out, sums = (_joined(x, real, axes)[:, :height, :width] for x in (out, sums))
    return out[..., :head_dim].contiguous(), sums.contiguous(), chosen.clone()


def _real_share(axes: tuple[Axis, Axis], query: Tensor) -> Tensor:
    """Share of each region that is no padding, [R], where zeros complete the last ones."""
    shares = []
    for cut, length in zip(axes, query.shape[1:3], strict=True):
        share = torch.ones(cut.total, dtype=_exact(query.dtype), device=query.device)
        share[-1] = (length - cut.size * (cut.total - 1)) / cut.size
        shares.append(share)
    return torch.outer(*shares).flatten()


def _backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    pad: Tensor | None,
    out: Tensor,
    sums: Tensor,
    chosen: Tensor,
    weights: Tensor | None,
    num_regions: Sequence[int],
    scale: float,
) -> tuple[Tensor, ...]:
    """Gradients of query, key, value, pad and weights; half precision accumulates in float32.

    The gradient of what is None has no elements.
    """
    if query.shape[0] == 0:
        fakes = _fake_backward(grad, query, key, value, pad, out, sums, chosen, weights)
        return tuple(x.zero_() for x in fakes)
    height, width = query.shape[1:3]
    axes = _axes(query, pad, num_regions)
    real, every = [cut.real for cut in axes], [cut.total for cut in axes]
    widest = max(value.shape[4], query.shape[4])
    fills = (0, 0, 0) if pad is None else pad.to(sums.dtype).unbind()
    q, k, v, g, o = _even(widest, *(x.to(sums.dtype) for x in (query, key, value, grad, out)))
    q, g, o = (_cut(x, real, axes) for x in (q, g, o))
    k, v = (_cut(x, every, axes, fill) for x, fill in ((k, fills[1]), (v, fills[2])))
    logs = _cut(sums, real, axes, math.inf)  # padded queries have no weights, so no gradients
    grad_q, grad_k, grad_v = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
    grad_weights = _like(weights, sums)
    for part, near in _parts(chosen, every[0] * every[1], k[0].numel()):
        w = None if weights is None else weights.flatten(0, 1)[part].to(sums.dtype)
        x, gx, ox, logarithms = (y[part].transpose(1, 2) for y in (q, g, o, logs))
        nk, nv = (_take(regions, near, len(x), w) for regions in (k, v))
        gq, *grads = _attend_backward(gx, x, nk, nv, ox, logarithms, scale)
        grad_q[part] = gq.transpose(1, 2)
        of_regions = [y.transpose(1, 2).reshape(len(near), *k.shape[1:]) for y in grads]
        if w is not None:
            products = [
                (y * x[near]).flatten(1).sum(1) for y, x in zip(of_regions, (k, v), strict=True)
            ]
            grad_weights.flatten(0, 1)[part] = (products[0] + products[1]).view_as(w)
            of_regions = [y * w.flatten()[:, None, None, None] for y in of_regions]
        for whole, y in zip((grad_k, grad_v), of_regions, strict=True):
            whole.index_add_(0, near, y)
    found = [
        _joined(x, counts, axes) for x, counts in ((grad_q, real), (grad_k, every), (grad_v, every))
    ]
    grad_pad = _like(pad, query).zero_()
    if pad is not None:
        for i in (1, 2):
            below, right = found[i][:, height:], found[i][:, :height, width:]
            grad_pad[i] = below.sum((0, 1, 2)) + right.sum((0, 1, 2))
    dims = (x.shape[4] for x in (query, key, value))
    maps = (
        x[:, :height, :width, :, :dim].to(query.dtype).contiguous()
        for x, dim in zip(found, dims, strict=True)
    )
    return *maps, grad_pad, grad_weights.to(query.dtype)


def _like(x: Tensor | None, other: Tensor) -> Tensor:
    """Memory for the gradient of an optional tensor."""
    return other.new_empty(0 if x is None else x.shape)


def _fake_forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    pad: Tensor | None,
    chosen: Tensor | None,
    weights: Tensor | None,
    num_regions: Sequence[int],
    topk: int,
    *_: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    rows, columns = _axes(query, pad, num_regions)
    shape = (query.shape[0], rows.real * columns.real, topk)
    return (
        value.new_empty(value.shape),
        query.new_empty(query.shape[:4], dtype=_exact(query.dtype)),
        query.new_empty(shape, dtype=torch.long),
    )


def _fake_backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    pad: Tensor | None,
    out: Tensor,
    sums: Tensor,
    chosen: Tensor,
    weights: Tensor | None,
    *_: Any,
) -> tuple[Tensor, ...]:
    return tuple(_like(x, query) for x in (query, key, value, pad, weights))


def _flops(query: Sequence[int], *rest: Any, **_: Any) -> int:
    _, value, pad, _, _, num_regions, topk, _ = rest
    return sum(product_flops(query, value, num_regions, pad is not None, topk))


def _flops_backward(grad: Sequence[int], *rest: Any, **_: Any) -> int:
    """As torch counts scaled_dot_product_attention: five products, the scores once more."""
    query, _, value, pad, _, _, chosen, _, num_regions, _ = rest
    scores, mixing = product_flops(query, value, num_regions, pad is not None, chosen[2])
    return 3 * scores + 2 * mixing


_MAPS = "Tensor query, Tensor key, Tensor value, Tensor? pad"
_attention_backward = _dispatch.define(
    "routing_attention_aten_backward",
    f"(Tensor grad, {_MAPS}, Tensor out, Tensor sums, Tensor chosen, Tensor? weights, "
    "int[2] num_regions, float scale) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _backward,
    _fake_backward,
    _flops_backward,
)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *maps, _, weights, ctx.num_regions, _, ctx.scale = inputs
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(*maps, *output, weights)


def _gradient(ctx: Any, grad: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    grads = _attention_backward(grad, *ctx.saved_tensors, ctx.num_regions, ctx.scale)
    query, key, value, pad, weights = (
        g if ctx.needs_input_grad[i] else None for i, g in zip((0, 1, 2, 3, 5), grads, strict=True)
    )
    return query, key, value, pad, None, weights, None, None, None


_attention = _dispatch.define(
    "routing_attention_aten",
    f"({_MAPS}, Tensor? chosen, Tensor? weights, int[2] num_regions, int topk, float scale) -> "
    "(Tensor, Tensor, Tensor)",
    _forward,
    _fake_forward,
    _flops,
    _keep,
    _gradient,
)


# Exported, and where routing has a gradient: tables of positions, which fit maps of every size.


class _Tables(NamedTuple):
    """Positions count along the map's rows; the one behind the last is padding.

    Every region has one token more than it should, which nobody attends to: torch traces sizes
    that may be one only if they are.
    """

    position: Tensor  # [R, L + 1]: position of each token of the regions
    counted: Tensor  # [R, L + 1]: which tokens count in a region's mean, 1 or 0
    mask: Tensor  # [L + 1]: what is added to scores of keys
    slot: Tensor  # [H, W]: where the map's tokens are in the regions


def _tables(call: Call) -> _Tables:
    rows, columns = call.axes
    height, width = call.query.shape[1:3]
    device = call.query.device
    length = rows.size * columns.size
    token = torch.arange(length + 1, device=device)
    region = torch.arange(rows.total * columns.total, device=device)[:, None]
    row = region // columns.total * rows.size + token // columns.size
    column = region % columns.total * columns.size + token % columns.size
    inside = token < length
    real = (row < height) & (column < width) & inside
    position = (row * width + column).where(real, height * width)
    counted = real if call.pad is None else inside.expand_as(real)
    mask = torch.zeros_like(token, dtype=call.query.dtype).masked_fill(~inside, -math.inf)
    row = torch.arange(height, device=device)[:, None]
    column = torch.arange(width, device=device)
    region = row // rows.size * columns.total + column // columns.size
    token = row % rows.size * columns.size + column % columns.size
    exact = counted.to(_exact(call.query.dtype))
    return _Tables(position, exact, mask, region * (length + 1) + token)


def _taken(call: Call, index: int, tables: _Tables) -> Tensor:
    """Query, key or value (by its index) in regions, [B, R, L, channels]."""
    x = (call.query, call.key, call.value)[index].flatten(3).flatten(1, 2)
    fill = x.new_zeros(x.shape[2]) if call.pad is None else call.pad[index].flatten()
    x = torch.cat([x, fill.expand(x.shape[0], 1, -1)], 1)
    return x[:, tables.position]


def _routed(call: Call, query: Tensor, key: Tensor, tables: _Tables) -> tuple[Tensor, Tensor]:
    """Chosen regions, [B, R, topk], and their weights in soft routing."""
    share = (tables.counted / tables.counted.sum(1, keepdim=True))[..., None]
    queries, keys = ((x * share).sum(2) for x in (query, key))
    if not call.diff_routing:
        queries, keys = queries.detach(), keys.detach()
    scores, chosen = torch.topk(queries @ keys.mT, call.topk)
    return chosen, (call.scale * scores).softmax(-1).to(query.dtype)


def _soft(call: Call) -> tuple[Tensor, Tensor]:
    """The same, of the regions that hold any real query."""
    tables = _tables(call)
    query, key = (_taken(call, i, tables) for i in (0, 1))
    rows, columns = call.axes
    found = (x.unflatten(1, (rows.total, columns.total)) for x in _routed(call, query, key, tables))
    chosen, weights = (x[:, : rows.real, : columns.real].flatten(1, 2) for x in found)
    return chosen, weights


def _traced(call: Call) -> Tensor:
    tables = _tables(call)
    query, key, value = (_taken(call, i, tables) for i in range(3))
    chosen, weights = _routed(call, query, key, tables)
    batch, count = query.shape[:2]
    image = torch.arange(batch, device=chosen.device)[:, None, None]
    near = (chosen + image * count).flatten(0, 1)  # [B * R, topk]
    key, value = (x.flatten(0, 1)[near] for x in (key, value))  # [B * R, topk, L, channels]
    if call.soft_routing:
        key, value = (x * weights.flatten(0, 1)[..., None, None] for x in (key, value))
    heads = call.query.shape[3]
    # images and regions share an axis: of five-dimensional attention inductor makes nonsense
    q, k, v = (
        x.unflatten(2, (heads, x.shape[2] // heads)).transpose(1, 2)
        for x in (query.flatten(0, 1), key.flatten(1, 2), value.flatten(1, 2))
    )
    mask = tables.mask.repeat(call.topk).expand(1, 1, 1, -1)
    out = F.scaled_dot_product_attention(q, k, v, mask, scale=call.scale)
    out = out.transpose(1, 2).reshape(batch, -1, heads, v.shape[3])
    return out[:, tables.slot]
