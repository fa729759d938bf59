"""Eager computations as single ops of torch's dispatcher: with a shape, a gradient, a FLOP count.

What looks at a program op by op (`torch.utils.flop_counter`, fake and meta tensors, dispatch
modes) then sees what an op computes, not the parts that it happens to be computed in.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import torch

# Imported where torch has CUDA but there is no Triton, the counter warns of Triton's kernels.
_log = logging.getLogger("torch.utils.flop_counter")
_was_disabled, _log.disabled = _log.disabled, True
from torch.utils.flop_counter import register_flop_formula  # noqa: E402

_log.disabled = _was_disabled


def define(
    name: str,
    schema: str,
    kernel: Callable[..., Any],
    fake: Callable[..., Any],
    flops: Callable[..., int],
    setup_context: Callable[..., None] | None = None,
    backward: Callable[..., Any] | None = None,
) -> Callable[..., Any]:
    """Define ``vitarium::name`` for every device.

    Args:
        name: the op's name.
        schema: its arguments and results, ``(Tensor query, ...) -> Tensor``.
        kernel: what computes it; autocast is off inside.
        fake: what gives its results' shapes and strides for fake and meta tensors.
        flops: FLOPs of a call, 2 per multiply-add; it gets shapes in the place of tensors.
        setup_context: what the gradient keeps, as `torch.library.register_autograd` has it.
        backward: the gradient; without one, to differentiate the op raises a RuntimeError.

    Returns:
        The op, to be called with all arguments.
    """
    qualified = f"vitarium::{name}"

    def run(*args: Any) -> Any:
        device = args[0].device.type
        if not torch.is_autocast_enabled(device):
            return kernel(*args)
        with torch.autocast(device, enabled=False):  # kernels choose each product's precision
            return kernel(*args)

    torch.library.define(qualified, schema)
    torch.library.impl(qualified, "default", run)
    torch.library.register_fake(qualified, fake)

    def refuse(*_: Any) -> None:
        raise RuntimeError(
            f"{qualified} has no gradient; impl='reference' has derivatives of every order"
        )

    torch.library.register_autograd(qualified, backward or refuse, setup_context=setup_context)
    packet = getattr(torch.ops.vitarium, name)
    register_flop_formula(packet)(flops)
    op: Callable[..., Any] = packet.default
    return op


def from_inputs(
    backward: Callable[..., Any], tensors: int
) -> tuple[Callable[..., None], Callable[..., Any]]:
    """``setup_context`` and ``backward`` of an op whose gradient computes again from its inputs.

    Args:
        backward: gets the gradient and all inputs, and gives the gradients of the tensors.
        tensors: how many of the inputs, the first ones, are tensors or None.
    """

    def keep(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        del output
        ctx.save_for_backward(*inputs[:tensors])
        ctx.rest = inputs[tensors:]

    def gradient(ctx: Any, grad: Any) -> tuple[Any, ...]:
        grads = backward(grad, *ctx.saved_tensors, *ctx.rest)
        wanted = ctx.needs_input_grad[:tensors]
        found = (g if want else None for g, want in zip(grads, wanted, strict=True))
        return *found, *(None for _ in ctx.rest)

    return keep, gradient
