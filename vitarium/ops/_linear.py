"""Linear layers, and MLPs where no gradient is wanted: fewer passes over memory, less of it held.

In float32 on a CPU, torch multiplies matrices with its BLAS library, and activations and residuals
are passes of their own. oneDNN, which torch has on board for its compiler, takes them along, and on
processors for which that BLAS is not tuned its products are faster by half. Both functions are ops
of the dispatcher, so that they count as FLOPs and torch.compile calls them as they are.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vitarium.ops import _dispatch

# Elements of the hidden layer at a time. What is in work stays in cache, and small products,
# which are slow where other programs use the same cache, are avoided.
CHUNK = 1 << 21

# Terms of the sums in a gradient that oneDNN takes: it adds longer ones less exactly than BLAS.
_SHORT = 384

_POINTWISE = getattr(torch.ops.mkldnn, "_linear_pointwise", None)


def _has_onednn(x: Tensor) -> bool:
    return (
        _POINTWISE is not None
        and x.device.type == "cpu"
        and x.dtype == torch.float32
        and bool(torch.backends.mkldnn.is_available())
        and bool(torch.backends.mkldnn.enabled)
    )


def _product(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    gelu: bool = False,
    residual: Tensor | None = None,
) -> Tensor:
    """``x`` [..., in] times ``weight`` [out, in], and what follows."""
    if not _has_onednn(x) or x.numel() == 0:
        out = F.linear(x, weight, bias)
        if gelu:
            return torch.ops.aten.gelu_(out)
        return out if residual is None else out.add_(residual)
    assert _POINTWISE is not None
    if residual is not None:
        return _POINTWISE.binary(x, residual, weight, bias, "add")
    attribute, algorithm = ("gelu", "none") if gelu else ("none", "")
    return _POINTWISE(x, weight, bias, attribute, [], algorithm)


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None) -> Tensor:
    return _product(x.contiguous(), weight, bias, residual=_contiguous(residual))


def _contiguous(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.contiguous()


def _mlp(
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    eps: float,
    norm_first: bool,
    weight1: Tensor,
    bias1: Tensor | None,
    weight2: Tensor,
    bias2: Tensor | None,
) -> Tensor:
    rows = x.contiguous().view(-1, x.shape[-1])
    shape = (x.shape[-1],)

    def branch(part: Tensor) -> Tensor:
        if norm_first:
            y = F.layer_norm(part, shape, norm_weight, norm_bias, eps)
            hidden = _product(y, weight1, bias1, gelu=True)
            return _product(hidden, weight2, bias2, residual=part)
        hidden = _product(part, weight1, bias1, gelu=True)
        y = F.layer_norm(_product(hidden, weight2, bias2), shape, norm_weight, norm_bias, eps)
        return y.add_(part)

    step = max(1, CHUNK // len(weight1)) if x.device.type == "cpu" else len(rows)
    if len(rows) <= step:
        return branch(rows).view(x.shape)
    out = torch.empty_like(rows)
    for part, to in zip(rows.split(step), out.split(step), strict=True):
        to.copy_(branch(part))
    return out.view(x.shape)


def _linear_flops(x: Sequence[int], weight: Sequence[int], *_: Any, **__: Any) -> int:
    return 2 * math.prod(x) * weight[0]


def _mlp_flops(x: Sequence[int], *rest: Any, **_: Any) -> int:
    return 4 * math.prod(x) * int(rest[4][0])


def _fake_linear(x: Tensor, weight: Tensor, *_: Any) -> Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


def _fake_mlp(x: Tensor, *_: Any) -> Tensor:
    return x.new_empty(x.shape)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, _, _ = inputs
    ctx.save_for_backward(x, weight)


def _transposed(grad: Tensor, weight: Tensor) -> Tensor:
    out: Tensor = _linear_op(grad, weight.t(), None, None)
    return out


def _gradients(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, weight = ctx.saved_tensors
    of_x, of_weight, of_bias, of_residual = ctx.needs_input_grad
    rows = grad.flatten(0, -2)
    product = _transposed if len(weight) <= _SHORT else torch.matmul
    return (
        product(grad, weight) if of_x else None,
        rows.t() @ x.flatten(0, -2) if of_weight else None,  # where oneDNN is no faster
        rows.sum(0) if of_bias else None,
        grad if of_residual else None,
    )


_linear_op = _dispatch.define(
    "linear_aten",
    "(Tensor x, Tensor weight, Tensor? bias, Tensor? residual) -> Tensor",
    _linear,
    _fake_linear,
    _linear_flops,
    _setup,
    _gradients,
)
_mlp_op = _dispatch.define(
    "mlp_aten",
    "(Tensor x, Tensor norm_weight, Tensor norm_bias, float eps, bool norm_first, "
    "Tensor weight1, Tensor? bias1, Tensor weight2, Tensor? bias2) -> Tensor",
    _mlp,
    _fake_mlp,
    _mlp_flops,
)


def linear(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, residual: Tensor | None = None
) -> Tensor:
    """``x @ weight.T + bias + residual``, with gradients of every order.

    Args:
        x: ``[..., in]``.
        weight: ``[out, in]``.
        bias: ``[out]``.
        residual: ``[..., out]``.

    Returns:
        ``[..., out]``, contiguous; its own memory.
    """
    out: Tensor = _linear_op(x, weight, bias, residual)
    return out


def residual_mlp(
    x: Tensor,
    norm: tuple[Tensor, Tensor, float],
    layers: Sequence[tuple[Tensor, Tensor | None]],
    norm_first: bool,
) -> Tensor:
    """``x + mlp(norm(x))``, or ``x + norm(mlp(x))``, without a gradient; the MLP has a GELU.

    Args:
        x: ``[..., C]``; it stays as it is.
        norm: weight, bias and eps of a LayerNorm over C.
        layers: weight and bias of two linear layers.
        norm_first: whether the norm precedes the MLP or follows it.

    Returns:
        ``[..., C]``, contiguous; its own memory.
    """
    (weight1, bias1), (weight2, bias2) = layers
    out: Tensor = _mlp_op(x, *norm, norm_first, weight1, bias1, weight2, bias2)
    return out
