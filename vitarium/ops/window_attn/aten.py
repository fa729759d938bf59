"""Window attention in ordinary torch functions, fast on a CPU.

Rolling, padding and cutting are one gather of rows per run of equal windows, undoing them is one
scatter that leaves the padding out; between the two, part after part, the windows stay in cache
and attend with their bias and mask as one additive mask, which all windows of a run share.
Training keeps the inputs alone: the backward pass gathers and attends again. All this is one op
of the dispatcher: it counts as the FLOPs of its mathematics, and torch.compile calls it as it is.
Exported programs, which shall run without vitarium, hold ordinary functions.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from vitarium.ops import _dispatch, _select
from vitarium.ops.window_attn import schema, traced, windows
from vitarium.ops.window_attn.windows import Partition, Run

if TYPE_CHECKING:
    from vitarium.ops.window_attn.op import Call

CHUNK = 1 << 20  # elements that are worked on at a time, so that they stay in cache
_EPS = 1e-12  # the least norm, of torch.nn.functional.normalize


def unsupported(call: Call) -> str | None:
    """None: runs everywhere."""
    return None


def run(call: Call) -> Tensor:
    """Attend run by run; with a gradient that gathers again where one is needed."""
    if _select.is_exporting():
        return traced.run(call)
    tensors = (call.query, call.key, call.value, call.bias, call.factor, call.pad)
    shape = (call.window_size, call.shift_size, call.scale, call.semantics)
    out: Tensor = _attention(*tensors, *shape)
    return out


# The eager computation.


def _partition(
    query: Tensor, window_size: list[int], shift_size: list[int], semantics: str
) -> Partition:
    (height, width), (wh, ww), (sh, sw) = query.shape[1:3], window_size, shift_size
    return windows.partition((height, width), (wh, ww), (sh, sw), semantics, query.device)


def _rows(x: Tensor) -> Tensor:
    """[B, H, W, ...] -> [B * H * W, channels], a view where its strides allow."""
    return x.flatten(3).flatten(0, 2)


def _sources(query: Tensor, key: Tensor, value: Tensor) -> list[Tensor]:
    """Rows to gather from: those of the projection that all three are views of, or three."""
    stride, width = query.stride(), query.shape[3] * query.shape[4]
    joined = stride[3:] == (query.shape[4], 1) and all(
        x.stride() == stride
        and x.untyped_storage().data_ptr() == query.untyped_storage().data_ptr()
        and x.storage_offset() == query.storage_offset() + i * width
        for i, x in enumerate((query, key, value))
    )
    if not joined:
        return [_rows(x) for x in (query, key, value)]
    projection = query.as_strided((*query.shape[:3], 3 * width), (*stride[:3], 1))
    return [_rows(projection)]


def _parts(run: Run, query: Tensor) -> Iterator[Tensor]:
    """Cut the windows [N, L] of a run in all images into parts that stay in cache."""
    count, length = run.positions.shape
    batch, height, width, heads, head_dim = query.shape
    step = max(1, CHUNK // (length * heads * (7 * head_dim + 2 * length)))  # the gradient's need
    images = max(1, step // count)
    for first in range(0, batch, images):
        image = torch.arange(first, min(first + images, batch), device=query.device)
        index = (run.positions + image[:, None, None] * (height * width)).flatten(0, 1)
        yield from index.split(step)


def _take(sources: list[Tensor], index: Tensor, query: Tensor) -> list[Tensor]:
    """Rows of windows [N, L], those of a projection as three: each [N, L, heads, head_dim]."""
    taken = (x.index_select(0, index.flatten()) for x in sources)
    return [part for x in taken for part in x.view(*index.shape, -1, *query.shape[3:]).unbind(2)]


def _put(rows: Tensor, run: Run, index: Tensor, x: Tensor) -> None:
    """Write windows [N, L, heads, head_dim] to the rows of their positions; padding has none."""
    if run.real is not None:
        index, x = index.index_select(1, run.real), x.index_select(1, run.real)
    rows.index_copy_(0, index.flatten(), x.flatten(2).flatten(0, 1))


def _fill(run: Run, pad: Tensor | None, *maps: Tensor) -> None:
    """Give padded positions of windows [N, L, heads, head_dim] their value."""
    if run.padded is None:
        return
    for i, x in enumerate(maps):
        if pad is None:
            x.index_fill_(1, run.padded, 0)
        else:
            x.index_copy_(1, run.padded, pad[i].expand(len(x), len(run.padded), -1, -1))


def _masks(partition: Partition, bias: Tensor | None, like: Tensor) -> Tensor | None:
    """Additive masks [kinds, heads or 1, L, L], if there is anything to add."""
    if bias is None:
        return partition.mask[:, None].to(like.dtype) if partition.masked else None
    length = len(partition.entry)
    table = bias.flatten(1).index_select(1, partition.entry.flatten()).view(-1, length, length)
    return table + partition.mask[:, None].to(bias.dtype) if partition.masked else table[None]


def _forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None,
    factor: Tensor | None,
    pad: Tensor | None,
    window_size: list[int],
    shift_size: list[int],
    scale: float,
    semantics: str,
) -> Tensor:
    out = torch.empty_like(query, memory_format=torch.contiguous_format)
    if len(query) == 0:
        return out
    partition = _partition(query, window_size, shift_size, semantics)
    masks = _masks(partition, bias, query)
    if masks is not None and query.device.type != "cpu":
        masks = masks.to(query.dtype)  # the CPU's kernel alone takes float32 beside half precision
    rows, sources = _rows(out), _sources(query, key, value)
    scale = scale if factor is None else 1.0
    for run in partition.runs:
        mask = None if masks is None else masks[run.kind : run.kind + 1]
        for index in _parts(run, query):
            taken = _take(sources, index, query)
            _fill(run, pad, *taken)
            q, k, v = (x.transpose(1, 2) for x in taken)
            if factor is not None:
                q, k = (F.normalize(x.to(factor.dtype).contiguous(), dim=-1) for x in (q, k))
                q, k = ((q * factor[:, None, None]).to(v.dtype), k.to(v.dtype))
            attended = F.scaled_dot_product_attention(q, k, v, mask, scale=scale)
            _put(rows, run, index, attended.transpose(1, 2))
    return out


def _backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None,
    factor: Tensor | None,
    pad: Tensor | None,
    window_size: list[int],
    shift_size: list[int],
    scale: float,
    semantics: str,
) -> tuple[Tensor, ...]:
    """Gradients of all tensors; half precision computes in float32.

    It gathers and attends again, part by part. The gradient of what is None has no elements.
    """
    found = schema.fake_backward(grad, query, key, value, bias, factor, pad)
    grad_bias, grad_factor, grad_pad = (x.zero_() for x in found[3:])
    if len(query) == 0:
        return found
    exact = torch.promote_types(query.dtype, torch.float32)
    partition = _partition(query, window_size, shift_size, semantics)
    masks = _masks(partition, bias, grad.new_empty(0, dtype=exact))
    heads, length, scale = query.shape[3], len(partition.entry), scale if factor is None else 1.0
    sources, grads, outs = _sources(query, key, value), _rows(grad), [_rows(x) for x in found[:3]]
    score_sum = None if bias is None else bias.new_zeros(heads, length, length)
    for run in partition.runs:
        mask = None if masks is None else masks[run.kind]
        for index in _parts(run, query):
            taken = _take([*sources, grads], index, query)
            _fill(run, pad, *taken[:3])
            _fill(run, None, taken[3])  # no output, no gradient
            q, k, v, g = (x.transpose(1, 2).to(exact).contiguous().flatten(0, 1) for x in taken)
            if factor is not None:
                units, norms = zip(*(_normalized(x) for x in (q, k)), strict=True)
                factors = factor.repeat(len(index))[:, None, None]
                q, k = units[0] * factors, units[1]

            weights = _weights(q, k, mask, scale)
            grad_v = torch.bmm(weights.mT, g)
            scores = torch.bmm(g, v.mT)
            torch._softmax_backward_data(scores, weights, -1, exact, grad_input=scores)
            if score_sum is not None:
                score_sum += scores.unflatten(0, (-1, heads)).sum(0)
            scores *= scale
            grad_q, grad_k = torch.bmm(scores, k), torch.bmm(scores.mT, q)

            if factor is not None:
                grad_factor += (grad_q * units[0]).sum((1, 2)).unflatten(0, (-1, heads)).sum(0)
                grad_q = _through_norm(grad_q * factors, units[0], norms[0])
                grad_k = _through_norm(grad_k, units[1], norms[1])
            windowed = [
                x.unflatten(0, (-1, heads)).transpose(1, 2) for x in (grad_q, grad_k, grad_v)
            ]
            if pad is not None and run.padded is not None:
                for to, x in zip(grad_pad[1:], windowed[1:], strict=True):
                    to += x.index_select(1, run.padded).sum((0, 1))
            for to, x in zip(outs, windowed, strict=True):
                _put(to, run, index, x.to(to.dtype))
    if score_sum is not None:
        grad_bias.flatten(1).index_add_(1, partition.entry.flatten(), score_sum.flatten(1))
    return found


def _weights(query: Tensor, key: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """Attention weights [N * heads, L, L] under a mask [heads or 1, L, L]."""
    if mask is None:
        scores = torch.bmm(query, key.mT).mul_(scale)
    else:
        scores = mask.repeat(len(query) // len(mask), 1, 1)
        scores.baddbmm_(query, key.mT, alpha=scale)
    return torch.softmax(scores, -1, out=scores)


def _normalized(x: Tensor) -> tuple[Tensor, Tensor]:
    """Vectors along the last axis divided by their norms, and the norms."""
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    return x / norm.clamp(min=_EPS), norm


def _through_norm(grad: Tensor, unit: Tensor, norm: Tensor) -> Tensor:
    """Gradient of what became ``unit``; below the least norm the divisor is a constant."""
    along = (grad * unit).sum(-1, keepdim=True) * (norm >= _EPS)
    return (grad - unit * along) / norm.clamp(min=_EPS)


_attention_backward = _dispatch.define(
    "window_attention_aten_backward",
    f"(Tensor grad, {schema.ARGUMENTS}) -> {schema.GRADIENTS}",
    _backward,
    schema.fake_backward,
    schema.flops_backward,
)

_attention = _dispatch.define(
    "window_attention_aten",
    f"({schema.ARGUMENTS}) -> Tensor",
    _forward,
    schema.fake_forward,
    schema.flops,
    *_dispatch.from_inputs(_attention_backward, 6),
)
