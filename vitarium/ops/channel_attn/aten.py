"""Channel attention in ordinary torch functions, fast on a CPU.

Matrix products take the heads of one image, or the images of one head, as they lie in memory:
nothing is copied but what they give. Only the maps and the small [head_dim, head_dim] weights
are kept for the backward pass. All this is one op of the dispatcher; exported programs hold
scaled_dot_product_attention with channels in the place of tokens.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vitarium.ops import _dispatch, _select
from vitarium.ops.channel_attn import formulas

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


def _by_image(batch: int, heads: int) -> bool:
    """Whether to take the heads of an image at once: faster, until there are many small images."""
    return batch <= 4 * heads


def _pieces(x: Tensor) -> tuple[Tensor, ...]:
    """Batches of matrices [tokens, head_dim]: the heads of an image, or the images of a head."""
    x = x.flatten(1, 2)
    return x.transpose(1, 2).unbind(0) if _by_image(x.shape[0], x.shape[2]) else x.unbind(2)


def _products(left: Tensor, right: Tensor) -> Tensor:
    """Sums over tokens of what left's channels and right's give: [B, heads, head_dim, head_dim]."""
    sums = _fake_forward(left)[1]
    for x, y, total in zip(_pieces(left), _pieces(right), _weights(sums), strict=True):
        total.copy_(torch.bmm(x.to(sums.dtype).mT, y.to(sums.dtype)))
    return sums


def _mix(mixed: Tensor, weights: Tensor, out: Tensor) -> None:
    """Write ``mixed @ weights`` to ``out``, head by head."""
    for x, w, o in zip(_pieces(mixed), _weights(weights), _pieces(out), strict=True):
        if o.is_contiguous() and o.dtype == w.dtype:
            torch.bmm(x, w, out=o)
        else:
            o.copy_(torch.bmm(x.to(w.dtype), w))


def _weights(weights: Tensor) -> tuple[Tensor, ...]:
    """The weights [B, heads, head_dim, head_dim] that belong to each of the `_pieces`."""
    return weights.unbind(0 if _by_image(*weights.shape[:2]) else 1)


def _forward(
    left: Tensor, right: Tensor, mixed: Tensor, scale: float | None
) -> tuple[Tensor, Tensor]:
    """The map, and the weights that the backward pass needs; half precision computes in float32."""
    weights = _products(left, right).mul_(formulas.factor(left, scale))
    torch.softmax(weights, -1, out=weights)
    out = left.new_empty(left.shape)
    _mix(mixed, weights.mT, out)
    return out, weights


def _backward(
    grad: Tensor, left: Tensor, right: Tensor, mixed: Tensor, weights: Tensor, scale: float | None
) -> tuple[Tensor, ...]:
    """Gradients of left, right and mixed."""
    grads = _fake_backward(left)
    scores = torch._softmax_backward_data(_products(grad, mixed), weights, -1, weights.dtype)
    scores.mul_(formulas.factor(left, scale))
    _mix(right, scores.mT, grads[0])
    _mix(left, scores, grads[1])
    _mix(grad, weights, grads[2])
    return grads


def _fake_forward(left: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    batch, heads, head_dim = left.shape[0], left.shape[3], left.shape[4]
    exact = torch.promote_types(left.dtype, torch.float32)
    weights = left.new_empty(batch, heads, head_dim, head_dim, dtype=exact)
    return left.new_empty(left.shape), weights


def _fake_backward(left: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Heads first, as matrix products give them: what follows copies gradients anyway."""
    batch, height, width, heads, head_dim = left.shape
    shape = (batch, heads, height, width, head_dim)
    x, y, z = (left.new_empty(shape).permute(0, 2, 3, 1, 4) for _ in range(3))
    return x, y, z


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
    formulas.flops_backward,
)
_attention = _dispatch.define(
    "channel_attention_aten",
    "(Tensor left, Tensor right, Tensor mixed, float? scale) -> (Tensor, Tensor)",
    _forward,
    _fake_forward,
    formulas.flops,
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
