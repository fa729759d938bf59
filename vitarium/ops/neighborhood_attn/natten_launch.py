"""Neighborhood attention by the natten package: an oracle and a peer for bias-free calls."""

from __future__ import annotations

from importlib.util import find_spec
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from vitarium.ops.neighborhood_attn.op import Call


def unsupported(call: Call) -> str | None:
    """Why natten cannot run this call, or None."""
    if call.bias is not None:
        return "natten takes no position bias since 0.20"
    if call.padded_size != tuple(call.query.shape[1:3]):
        return "natten attends on no padded map"
    if find_spec("natten") is None:
        return "the package natten is not installed (pip install natten --no-build-isolation)"
    if call.query.device.type == "cpu":
        head_dim = call.query.shape[-1]
        if call.query.dtype not in (torch.float32, torch.bfloat16, torch.float16):
            return f"natten runs float32 and half precision on a CPU, got {call.query.dtype}"
        if head_dim < 8 or head_dim & (head_dim - 1):
            return f"natten needs a head_dim that is a power of two from 8 on, got {head_dim}"
        if torch.is_grad_enabled() and any(
            x.requires_grad for x in (call.query, call.key, call.value)
        ):
            return "natten has no gradient on a CPU"
    return None


def run(call: Call) -> Tensor:
    """Hand the call to ``natten.na2d`` with its default backend."""
    from natten.functional import na2d

    query, key, value = call.query, call.key, call.value
    if not torch.is_grad_enabled():
        # natten refuses tensors that require a gradient even where none is recorded
        query, key, value = query.detach(), key.detach(), value.detach()
    return na2d(
        query, key, value, kernel_size=call.kernel_size, dilation=call.dilation, scale=call.scale
    )
