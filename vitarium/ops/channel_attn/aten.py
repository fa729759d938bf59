"""Channel attention in ordinary torch functions, fast on a CPU.

Matrix products take the heads of one image, or the images of one head, as they lie in memory:
nothing is copied but what they give. Only the maps and the small [head_dim, head_dim] weights
are kept for the backward pass. All this is one op of the dispatcher; exported programs hold
scaled_dot_product_attention with channels in the place of tokens.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vitarium.ops import _dispatch, _select

if TYPE_CHECKING:
    from vitarium.ops.channel_attn.op import Call


def unsupported(call: Call) -> str | None:
    """None: runs everywhere."""
    return None


def run(call: Call) -> Tensor:
    """Multiply image by image or head by head."""
    if _select.is_exporting():
        return _traced(call)
    out: Tensor = _attention(*call.operands, call.scale)[0]
    return out


def _pieces(*maps: Tensor) -> Iterator[list[Tensor]]:
    """Batches of matrices [tokens, head_dim]: of images or of heads, whichever are fewer."""
    batch, _, _, heads, _ = maps[0].shape
    maps = tuple(x.flatten(1, 2) for x in maps)
    if batch <= heads:
        for images in zip(*(x.unbind(0) for x in maps), strict=True):
            yield [x.transpose(0, 1) for x in images]
    else:
        for of_head in zip(*(x.unbind(2) for x in maps), strict=True):
            yield list(of_head)


def _pieces_of(weights: Tensor) -> Iterator[Tensor]:
    """The weights [B, heads, head_dim, head_dim] that belong to each of the `_pieces`."""
    batch, heads = weights.shape[:2]
    return iter(weights.unbind(0 if batch <= heads else 1))


def _scale(left: Tensor, scale: float | None) -> float:
    return float((left.shape[1] * left.shape[2]) ** -0.5) if scale is None else scale


def _forward(
    left: Tensor, right: Tensor, mixed: Tensor, scale: float | None
) -> tuple[Tensor, Tensor]:
    """The map, and the weights that the backward pass needs; half precision computes in float32."""
    out, weights = _fake_forward(left)
    scale = _scale(left, scale)
    for (x, y, z, o), w in zip(_pieces(left, right, mixed, out), _pieces_of(weights), strict=True):
        scores = torch.bmm(x.to(w.dtype).mT, y.to(w.dtype)).mul_(scale)
        w.copy_(torch.softmax(scores, -1, out=scores))
        o.copy_(torch.bmm(z.to(w.dtype), scores.mT))
    return out, weights


def _backward(
    grad: Tensor, left: Tensor, right: Tensor, mixed: Tensor, weights: Tensor, scale: float | None
) -> tuple[Tensor, ...]:
    """Gradients of left, right and mixed."""
    grads = _fake_backward(left)
    scale = _scale(left, scale)
    for pieces, w in zip(
        _pieces(grad, left, right, mixed, *grads), _pieces_of(weights), strict=True
    ):
        g, x, y, z = (piece.to(w.dtype) for piece in pieces[:4])
        grad_x, grad_y, grad_z = pieces[4:]
        grad_z.copy_(torch.bmm(g, w))
        scores = torch._softmax_backward_data(torch.bmm(g.mT, z), w, -1, w.dtype).mul_(scale)
        grad_x.copy_(torch.bmm(y, scores.mT))
        grad_y.copy_(torch.bmm(x, scores))
    return grads


def _fake_forward(left: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    batch, heads, head_dim = left.shape[0], left.shape[3], left.shape[4]
    exact = torch.promote_types(left.dtype, torch.float32)
    weights = left.new_empty(batch, heads, head_dim, head_dim, dtype=exact)
    return left.new_empty(left.shape), weights


def _fake_backward(left: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return left.new_empty(left.shape), left.new_empty(left.shape), left.new_empty(left.shape)


def _flops(left: Sequence[int], *_: Any, **__: Any) -> int:
    """Scores and mixing."""
    return 4 * math.prod(left) * left[-1]


def _flops_backward(grad: Sequence[int], *_: Any, **__: Any) -> int:
    """Two products for each of them: the weights are kept."""
    return 8 * math.prod(grad) * grad[-1]


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(*inputs[:3], output[1])
    ctx.scale = inputs[3]


def _gradient(ctx: Any, grad: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
    grads = _attention_backward(grad, *ctx.saved_tensors, ctx.scale)
    found = (g if want else None for g, want in zip(grads, ctx.needs_input_grad, strict=False))
    return *found, None


_attention_backward = _dispatch.define(
    "channel_attention_aten_backward",
    "(Tensor grad, Tensor left, Tensor right, Tensor mixed, Tensor weights, float? scale) "
    "-> (Tensor, Tensor, Tensor)",
    _backward,
    lambda grad, left, *_: _fake_backward(left),
    _flops_backward,
)
_attention = _dispatch.define(
    "channel_attention_aten",
    "(Tensor left, Tensor right, Tensor mixed, float? scale) -> (Tensor, Tensor)",
    _forward,
    _fake_forward,
    _flops,
    _keep,
    _gradient,
)


def _traced(call: Call) -> Tensor:
    batch, height, width, heads, _ = call.query.shape
    left, right, mixed = (x.flatten(1, 2).permute(0, 2, 3, 1) for x in call.operands)
    # a factor of the map, because the attention function takes no symbolic scale
    left = left * ((height * width) ** -0.5 if call.scale is None else call.scale)
    out = F.scaled_dot_product_attention(left, right, mixed, scale=1.0)
    return out.permute(0, 3, 1, 2).reshape(batch, height, width, heads, -1)
