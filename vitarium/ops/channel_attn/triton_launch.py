"""Channel attention in Triton kernels: one pass over the maps for scores, one for mixing.

Only the maps and the [head_dim, head_dim] weights are kept for the backward pass.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from vitarium.ops import _dispatch, _triton
from vitarium.ops.channel_attn import formulas

if TYPE_CHECKING:
    from vitarium.ops.channel_attn.op import Call

_PER_PROCESSOR = 4  # programs of a multiprocessor that keep its memory busy
_ALONE = 1 << 14  # elements of a head for which several programs cost more than they save
_ALIGNED = 8  # elements: 16 bytes in half precision

# Tokens of a block, warps and stages, by the block of head_dim: what registers can hold.
_HALF = {
    32: [(64, 4, 3), (128, 4, 2), (128, 4, 3), (64, 4, 4), (64, 2, 3), (32, 1, 4)],
    64: [(64, 4, 3), (64, 8, 3), (128, 8, 2), (64, 4, 2), (64, 4, 4)],
    128: [(16, 8, 3), (32, 8, 3), (64, 8, 2)],
}
_SINGLE = {
    32: [(32, 4, 2), (16, 4, 2), (32, 8, 2)],
    64: [(16, 4, 2), (16, 8, 2)],
    128: [(16, 8, 2)],
}


def unsupported(call: Call) -> str | None:
    """Whatever kernels cannot take."""
    return _triton.unsupported(call.query)


def reserved(call: Call) -> str | None:
    """Nothing of its own."""
    return _triton.reserved(call.query)


def run(call: Call) -> Tensor:
    """Read the maps as they lie in memory."""
    keep = torch.is_grad_enabled() and any(x.requires_grad for x in call.operands)
    out: Tensor = _attention(*call.operands, call.scale, keep)[0]
    return out


def _tokens(x: Tensor) -> Tensor:
    """[B, N, heads, head_dim], a copy only where no view is."""
    return _triton.readable(x).flatten(1, 2)


def _parts(x: Tensor) -> tuple[int, int]:
    """Into how many parts to divide the tokens of each head, and tokens of a part."""
    batch, tokens, heads, head_dim = x.shape
    missing = _PER_PROCESSOR * _triton.processors(x.device) // (batch * heads)
    if tokens * head_dim <= _ALONE or missing <= 1:
        return 1, tokens
    # what a part reads is several times the products that it writes
    least = max(128, 4 * head_dim)
    chunk = -(-tokens // min(missing, -(-tokens // least)))
    chunk = -(-chunk // 128) * 128  # whole blocks
    return -(-tokens // chunk), chunk


def _arguments(maps: dict[str, Tensor]) -> dict[str, Any]:
    """Pointers, strides and sizes of maps [B, N, heads, head_dim], by the kernels' names."""
    first = next(iter(maps.values()))
    block = _triton.block(first.shape[3])
    aligned = all(s % _ALIGNED == 0 for x in maps.values() for s in x.stride()[:3])
    unit = _ALIGNED if aligned else 1
    found: dict[str, Any] = {f"{name}_ptr": x for name, x in maps.items()}
    for name, x in maps.items():
        for axis, stride in zip("bnh", x.stride(), strict=False):
            found[f"{name}_stride_{axis}"] = stride // unit
    return found | {
        "tokens": first.shape[1],
        "heads": first.shape[2],
        "HEAD_DIM": first.shape[3],
        "BLOCK_D": block,
        "UNIT": unit,
        # such wide operands of tf32 products do not fit every device's shared memory
        "PRECISION": "ieee" if block > 64 else _triton.precision(first.dtype),
    }


def _configs(x: Tensor) -> list[_triton.Config]:
    """For passes over maps [B, N, heads, head_dim]."""
    found = _SINGLE if x.dtype == torch.float32 else _HALF
    blocks = found[_triton.block(x.shape[3], least=32)]
    return [_triton.Config({"BLOCK_M": m}, warps, stages) for m, warps, stages in blocks]


def _launch(kernel: Any, maps: dict[str, Tensor], parts: int, chunk: int, **rest: Any) -> None:
    """Run a program for every part of every head."""
    x = next(iter(maps.values()))
    programs = x.shape[0] * parts * x.shape[2]
    arguments = _arguments(maps) | {"parts": parts, "chunk": chunk} | rest
    key = [k for k in ("HEAD_DIM", "UNIT", "PRECISION", "FUSED") if k in arguments]
    _triton.launch(kernel, lambda _: (programs,), arguments, _configs(x), key)


def _partials(x: Tensor, parts: int) -> Tensor:
    """[parts, B, heads, head_dim, head_dim] for what the parts give."""
    batch, _, heads, head_dim = x.shape
    return x.new_empty(parts, batch, heads, head_dim, head_dim, dtype=torch.float32)


def _products(x: Tensor, y: Tensor, parts: int, chunk: int) -> Tensor:
    """Sums over the tokens of each part: [parts, B, heads, head_dim, head_dim]."""
    from vitarium.ops.channel_attn import triton_kernels as kernels

    partials = _partials(x, parts)
    rest = {"partials_ptr": partials, "batch": x.shape[0]}
    _launch(kernels._channel_products_kernel, {"x": x, "y": y}, parts, chunk, **rest)
    return partials


def _summed(partials: Tensor, scale: float, weights: Tensor | None = None) -> Tensor:
    """Weights from the products' parts, or the gradient of the products through these weights."""
    from vitarium.ops.channel_attn import triton_kernels as kernels

    parts, batch, heads, head_dim, _ = partials.shape
    out = torch.empty_like(partials[0])
    blocks = {"BLOCK_P": 16, "BLOCK_R": max(1, 128 // _triton.block(head_dim))}
    arguments = {
        "partials_ptr": partials,
        "weights_ptr": out if weights is None else weights,
        "out_ptr": out,
        "scale": scale,
        "parts": parts,
        "pieces": batch * heads,
        "HEAD_DIM": head_dim,
        "BLOCK_D": _triton.block(head_dim),
        "BACKWARD": weights is not None,
    }
    _triton.launch(
        kernels._channel_weights_kernel,
        lambda meta: (batch * heads * -(-head_dim // meta["BLOCK_R"]),),
        arguments,
        [_triton.Config(blocks, 4, 1)],
    )
    return out


def _forward(
    left: Tensor, right: Tensor, mixed: Tensor, scale: float | None, keep: bool
) -> tuple[Tensor, Tensor]:
    """The map, and the weights if they are to be kept."""
    from vitarium.ops.channel_attn import triton_kernels as kernels

    out, weights = _fake_forward(left, right, mixed, scale, keep)
    if left.shape[0] == 0:
        return out, weights
    scale = formulas.factor(left, scale)
    x, y, z = (_tokens(m) for m in (left, right, mixed))
    parts, chunk = _parts(x)
    used = weights if parts == 1 else _summed(_products(x, y, parts, chunk), scale)
    maps = {"left": x, "right": y, "mixed": z, "out": out.flatten(1, 2)}
    fused = {"FUSED": parts == 1, "KEEP": parts == 1 and keep}
    rest = {"weights_ptr": used, "scale": scale, **fused}
    _launch(kernels._channel_fwd_kernel, maps, parts, chunk, **rest)
    return out, used if keep else weights


def _fake_forward(
    left: Tensor, right: Tensor, mixed: Tensor, scale: float | None, keep: bool
) -> tuple[Tensor, Tensor]:
    batch, _, _, heads, head_dim = left.shape
    shape = (batch, heads, head_dim, head_dim) if keep else (0,)
    return left.new_empty(left.shape), left.new_empty(shape, dtype=torch.float32)


def _backward(
    grad: Tensor, left: Tensor, right: Tensor, mixed: Tensor, weights: Tensor, scale: float | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of left, right and mixed."""
    from vitarium.ops.channel_attn import triton_kernels as kernels

    grads = _fake_backward(left)
    if left.shape[0] == 0:
        return grads
    scale = formulas.factor(left, scale)
    g, x, y, z = (_tokens(m) for m in (grad, left, right, mixed))
    parts, chunk = _parts(x)
    dx, dy, dz = (m.flatten(1, 2) for m in grads)
    scores = weights
    if parts > 1:
        partials = _partials(x, parts)
        maps = {"grad": g, "mixed": z, "dmixed": dz}
        rest = {"weights_ptr": weights, "partials_ptr": partials, "batch": x.shape[0]}
        _launch(kernels._channel_bwd_products_kernel, maps, parts, chunk, **rest)
        scores = _summed(partials, scale, weights)
    maps = {"left": x, "right": y, "mixed": z, "grad": g}
    maps |= {"dleft": dx, "dright": dy, "dmixed": dz}
    rest = {"weights_ptr": weights, "scores_ptr": scores, "scale": scale, "FUSED": parts == 1}
    _launch(kernels._channel_bwd_kernel, maps, parts, chunk, **rest)
    return grads


def _fake_backward(left: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    x, y, z = (left.new_empty(left.shape) for _ in range(3))
    return x, y, z


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(*inputs[:3], output[1])
    ctx.scale, ctx.kept = inputs[3:]


def _gradient(ctx: Any, grad: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
    *maps, weights = ctx.saved_tensors
    if not ctx.kept:  # recorded where nothing wanted a gradient
        weights = _attention(*maps, ctx.scale, True)[1]
    grads = _attention_backward(grad, *maps, weights, ctx.scale)
    found = (g if want else None for g, want in zip(grads, ctx.needs_input_grad, strict=False))
    return *found, None, None


_attention_backward = _dispatch.define(
    "channel_attention_triton_backward",
    "(Tensor grad, Tensor left, Tensor right, Tensor mixed, Tensor weights, float? scale) "
    "-> (Tensor, Tensor, Tensor)",
    _backward,
    lambda grad, left, *_: _fake_backward(left),
    formulas.flops_backward,
)
_attention = _dispatch.define(
    "channel_attention_triton",
    "(Tensor left, Tensor right, Tensor mixed, float? scale, bool keep) -> (Tensor, Tensor)",
    _forward,
    _fake_forward,
    formulas.flops,
    _keep,
    _gradient,
)
