"""Launches the Triton kernels of bi-level routing attention.

One kernel gives the means of all regions, torch chooses by them, and one attends: chosen keys and
values are read where they lie, never gathered. The gradient of the queries runs over the same
regions; that of keys and values over the list of the regions of queries that chose theirs, so that
no sum has an order that could change.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from vitarium.ops import _dispatch, _select, _triton
from vitarium.ops.routing_attn.regions import Axis, cuts, product_flops

if TYPE_CHECKING:
    from vitarium.ops.routing_attn.op import Call

_SPAN = 256  # tokens of a region that one program adds up
_LEAST = 16  # rows of a product: a region of fewer tokens is as much work
_IMAGES = 65535  # that a grid holds
_KEY = (
    *("HEADS", "HEAD_DIM", "VALUE_DIM", "UNIT", "DENSE", "MASKED", "RAGGED", "PADDED", "WHOLE"),
    *("ONCE", "BLOCK_M"),
)


def unsupported(call: Call) -> str | None:
    """Why no kernel runs a call, or None."""
    if call.soft_routing:
        return "kernels choose regions without weights, got soft_routing"
    images = call.query.shape[0]
    if not _select.is_exporting() and images > _IMAGES:  # an exported batch shall stay unbounded
        return f"kernels take up to {_IMAGES} images, got {images}"
    return _triton.unsupported(call.query, call.value)


def reserved(call: Call) -> str | None:
    """Why ``auto`` leaves a call that kernels could run, or None."""
    return _triton.reserved(call.query)


def run(call: Call) -> Tensor:
    """Choose regions and attend to them."""
    maps = (call.query, call.key, call.value, call.pad)
    out: Tensor = _attention(*maps, call.num_regions, call.topk, call.scale)[0]
    return out


def _length(cut: tuple[Axis, Axis]) -> int:
    return cut[0].size * cut[1].size


def _totals(cut: tuple[Axis, Axis]) -> tuple[int, int]:
    """Regions of queries, and of keys."""
    return cut[0].real * cut[1].real, cut[0].total * cut[1].total


def _dense(cut: tuple[Axis, Axis], topk: int) -> bool:
    """Whether kernels multiply all tokens of an image and mask what was not chosen.

    They do where that is no more work, for products have a least size.
    """
    length, count = _length(cut), _totals(cut)[1]
    return topk == count or (length > 1 and length * count <= _LEAST * topk)


def _side(dtype: torch.dtype, widest: int) -> int:
    """Slots of a block: fewer where products take a thread's registers, not a tensor core."""
    if dtype == torch.float32:
        return 16 if widest > 32 else 32
    return 64


def _strides(**maps: Tensor) -> dict[str, int]:
    """Strides in the largest unit that divides all of them, up to 16 bytes; and the unit."""
    itemsize = next(iter(maps.values())).itemsize
    unit = math.gcd(16 // itemsize, *(n for x in maps.values() for n in x.stride()[:4]))
    found = {"UNIT": unit}
    for name, x in maps.items():
        strides = zip("bhwn", x.stride()[:4], strict=True)
        found |= {f"{name}_stride_{axis}": n // unit for axis, n in strides}
    return found


def _over(divisor: int) -> int:
    """What kernels divide by: a factor of 32 bits, and above it how far its product is shifted.

    One more, for then it has more than 32 bits, and the same type whatever the divisor.
    """
    shift = (divisor - 1).bit_length()
    return shift + 1 << 32 | -(-(1 << 31 + shift) // divisor)


def _arguments(
    query: Tensor, value: Tensor, pad: Tensor | None, cut: tuple[Axis, Axis], topk: int
) -> dict[str, Any]:
    """What kernels that attend know of maps and regions, and the modes they have."""
    rows, columns = cut
    height, width, heads, head_dim = query.shape[1:]
    queries, keys = _totals(cut)
    ragged = (rows.padded, columns.padded) != (height, width)
    dense = _dense(cut, topk)
    masked = dense and topk < keys
    length = rows.size * columns.size
    side = _side(query.dtype, max(head_dim, value.shape[4]))
    return {
        "pad_ptr": query if pad is None else pad,
        "height": height,
        "width": width,
        "region_height": rows.size,
        "region_width": columns.size,
        "query_columns": columns.real,
        "key_columns": columns.total,
        "query_regions": queries,
        "key_regions": keys,
        "over_length": _over(length),
        "over_width": _over(columns.size),
        "over_query_columns": _over(columns.real),
        "over_key_columns": _over(columns.total),
        "HEADS": heads,
        "HEAD_DIM": head_dim,
        "VALUE_DIM": value.shape[4],
        "TOPK": topk,
        "DENSE": dense,
        "MASKED": masked,
        "RAGGED": ragged,
        "PADDED": ragged and pad is not None,
        "WHOLE": not dense and length <= side,
        "PRECISION": _triton.precision(query.dtype),
        "BLOCK_D": _triton.block(head_dim),
        "BLOCK_E": _triton.block(value.shape[4]),
        "BLOCK_R": _triton.block(-(-side // length)) if masked else 16,
        "BLOCK_M": side if dense else min(side, _triton.block(length)),
    }


def _blocks(arguments: Mapping[str, Any], owners: str) -> int:
    """Blocks of the slots of an image's regions, of which there are ``arguments[owners]``."""
    count, length = arguments[owners], arguments["region_height"] * arguments["region_width"]
    side = arguments["BLOCK_M"]
    if arguments["MASKED"]:
        return -(-count // (side // length))
    return -(-count * length // side) if arguments["DENSE"] else count * -(-length // side)


def _launch(kernel: Any, arguments: Mapping[str, Any]) -> None:
    """Run a kernel whose programs own queries."""
    batch, heads = len(arguments["q_ptr"]), arguments["HEADS"]
    count = arguments["key_regions"] if arguments["DENSE"] else arguments["TOPK"]
    slots = count * arguments["region_height"] * arguments["region_width"]
    widest = max(arguments["HEAD_DIM"], arguments["VALUE_DIM"])
    side = _side(arguments["q_ptr"].dtype, widest)
    once = slots <= side
    if once:
        n, group, warps = _triton.block(slots), math.gcd(heads, 4), _warps(arguments)
        forms = [(n, group, warps, 2), (n, group, warps, 3), (n, 1, warps, 1), (n, 1, 4, 1)]
        forms += [(n, math.gcd(heads, 2), warps, 2), (n, math.gcd(heads, 8), warps, 2)]
    else:
        forms = [(n, 1, w, stages) for n, w, stages in _forms(arguments, side, widest > 64)]
    configs = [
        _triton.Config({"BLOCK_N": n, "GROUP": group}, w, stages)
        for n, group, w, stages in dict.fromkeys(forms)
    ]
    blocks = _blocks(arguments, "query_regions")

    def grid(meta: Mapping[str, Any]) -> tuple[int, int]:
        return blocks * heads // meta["GROUP"], batch

    _triton.launch(kernel, grid, {**arguments, "ONCE": once}, configs, _KEY)


def _warps(arguments: Mapping[str, Any]) -> int:
    """One for 16 rows, which is what a tensor core takes; without tensor cores as many as help."""
    warps: int = arguments["BLOCK_M"] // 16
    return 4 if arguments["q_ptr"].dtype == torch.float32 else warps


def _forms(arguments: Mapping[str, Any], side: int, small: bool) -> list[tuple[int, int, int]]:
    """Slots, warps and stages of loops over many blocks, which are better ``small`` or not."""
    warps = _warps(arguments)
    forms = [(side, warps, 2), (side, warps, 3), (side, 2 * warps, 2)]
    if arguments["MASKED"]:  # blocks of keys are those of the masks
        return forms
    wide = max(arguments["HEAD_DIM"], arguments["VALUE_DIM"]) > 64
    halves = [(max(16, side // 2), warps << wide, stages) for stages in (2, 3)]
    return halves + forms if small else forms + halves


def _masks(chosen: Tensor, arguments: Mapping[str, Any]) -> Tensor:
    """What is added to scores of a region's queries with a region's keys: [B, R, blocks * BLOCK_R].

    Regions of keys are in blocks of as many as the kernels'.
    """
    whole = arguments["BLOCK_M"] // (arguments["region_height"] * arguments["region_width"])
    width = arguments["BLOCK_R"]
    blocks = _blocks(arguments, "key_regions")
    found = chosen.new_full((*chosen.shape[:2], blocks * width), -1e38, dtype=torch.bfloat16)
    places = chosen if whole == width else chosen // whole * width + chosen % whole
    return found.scatter_(2, places, 0)


def _choose(
    query: Tensor, key: Tensor, pad: Tensor | None, cut: tuple[Axis, Axis], topk: int
) -> Tensor:
    """The regions of keys that each region of queries attends to, [B, R, topk]."""
    from vitarium.ops.routing_attn import triton_kernels

    batch, height, width, heads, head_dim = query.shape
    rows, columns = cut
    channels, length, count = heads * head_dim, _length(cut), _totals(cut)[1]
    parts = -(-length // _SPAN)
    block_n, block_c = min(32, _triton.block(length, 1)), min(128, _triton.block(channels))
    means = query.new_empty((batch, parts, 2, count, channels), dtype=torch.float32)
    arguments = {
        **_strides(q=query, k=key),
        "q_ptr": query,
        "k_ptr": key,
        "pad_ptr": query if pad is None else pad,
        "mean_ptr": means,
        "height": height,
        "width": width,
        "region_height": rows.size,
        "region_width": columns.size,
        "key_columns": columns.total,
        "key_regions": count,
        "over_width": _over(columns.size),
        "over_key_columns": _over(columns.total),
        "parts": parts,
        "span": _SPAN,
        "HEADS": heads,
        "HEAD_DIM": head_dim,
        "PADDED": pad is not None,
        "BLOCK_N": block_n,
        "BLOCK_C": block_c,
    }
    grid = -(-channels // block_c) * parts * count, batch
    config = _triton.Config({}, min(4, max(1, block_n * block_c // 1024)), 2)
    _triton.launch(triton_kernels._routing_mean_kernel, lambda _: grid, arguments, [config])
    queries, keys = (means[:, 0] if parts == 1 else means.sum(1)).unbind(1)
    queries = queries.unflatten(1, (rows.total, columns.total))[:, : rows.real, : columns.real]
    return torch.topk(queries.flatten(1, 2) @ keys.mT, topk, sorted=False).indices


def _forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    pad: Tensor | None,
    num_regions: Sequence[int],
    topk: int,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """The output, logarithmic sums to base 2 [B, heads, R * L] and chosen regions [B, R, topk]."""
    out, sums, chosen = _fake_forward(query, key, value, pad, num_regions, topk)
    if query.shape[0] == 0:
        return out, sums, chosen
    from vitarium.ops.routing_attn import triton_kernels

    query, key, value = (_triton.readable(x) for x in (query, key, value))
    pad = None if pad is None else pad.contiguous()
    cut = cuts(query.shape[1:3], num_regions, pad is not None)
    chosen = _choose(query, key, pad, cut, topk)
    arguments = {
        **_strides(q=query, k=key, v=value),
        **_arguments(query, value, pad, cut, topk),
        "q_ptr": query,
        "k_ptr": key,
        "v_ptr": value,
        "chosen_ptr": chosen,
        "out_ptr": out,
        "sums_ptr": sums,
        "scale": scale,
    }
    arguments["mask_ptr"] = _masks(chosen, arguments) if arguments["MASKED"] else chosen
    _launch(triton_kernels._routing_fwd_kernel, arguments)
    return out, sums, chosen


def _callers(chosen: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Who chose each of ``count`` regions: places in ``chosen``, and where each region's begin.

    Places are [B, R * topk] of images' [R, topk], and beginnings [B, count + 1].
    """
    ordered, places = torch.sort(chosen.flatten(1), dim=1, stable=True)
    wanted = torch.arange(count + 1, device=chosen.device).expand(len(chosen), -1)
    return places, torch.searchsorted(ordered, wanted.contiguous())


def _backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    pad: Tensor | None,
    out: Tensor,
    sums: Tensor,
    chosen: Tensor,
    num_regions: Sequence[int],
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of query, key, value and pad; that of no pad has no elements."""
    grads = _fake_backward(grad, query, key, value, pad)
    if query.shape[0] == 0:
        grads[3].zero_()
        return grads
    from vitarium.ops.routing_attn import triton_kernels

    grad, query, key, value = (_triton.readable(x) for x in (grad, query, key, value))
    pad = None if pad is None else pad.contiguous()
    cut = cuts(query.shape[1:3], num_regions, pad is not None)
    delta = torch.empty_like(sums)
    arguments = {
        **_strides(grad=grad, q=query, k=key, v=value),
        **_arguments(query, value, pad, cut, chosen.shape[2]),
        "grad_ptr": grad,
        "q_ptr": query,
        "k_ptr": key,
        "v_ptr": value,
        "sums_ptr": sums,
        "delta_ptr": delta,
        "scale": scale,
    }
    arguments["mask_ptr"] = _masks(chosen, arguments) if arguments["MASKED"] else chosen
    of_queries = {"chosen_ptr": chosen, "out_ptr": out, "grad_q_ptr": grads[0]}
    _launch(triton_kernels._routing_bwd_query_kernel, {**arguments, **of_queries})

    (batch, _, _, heads, head_dim), blocks = query.shape, _blocks(arguments, "key_regions")
    places, begins = chosen, chosen
    if not arguments["DENSE"]:
        places, begins = _callers(chosen, arguments["key_regions"])
    side = _side(query.dtype, max(head_dim, value.shape[4]))
    forms = _forms(arguments, side, True)
    shares = sums.new_empty((batch * blocks, heads, 2, head_dim) if arguments["PADDED"] else 1)
    of_keys = {
        "callers_ptr": places,
        "offsets_ptr": begins,
        "grad_k_ptr": grads[1],
        "grad_v_ptr": grads[2],
        "grad_pad_ptr": shares,
    }
    _triton.launch(
        triton_kernels._routing_bwd_key_kernel,
        lambda _: (blocks * heads, batch),
        {**arguments, **of_keys},
        [_triton.Config({"BLOCK_N": n}, *rest) for n, *rest in forms],
        _KEY[:-2] + _KEY[-1:],
    )
    if pad is not None:
        grads[3].zero_()
    if arguments["PADDED"]:
        grads[3][1:] = shares.sum(0).transpose(0, 1)
    return grads


def _fake_forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    pad: Tensor | None,
    num_regions: Sequence[int],
    topk: int,
    *_: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    rows, columns = cuts(query.shape[1:3], num_regions, pad is not None)
    batch, heads, count = query.shape[0], query.shape[3], rows.real * columns.real
    return (
        value.new_empty(value.shape),
        query.new_empty((batch, heads, count * rows.size * columns.size), dtype=torch.float32),
        query.new_empty((batch, count, topk), dtype=torch.long),
    )


def _fake_backward(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, pad: Tensor | None, *_: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    new = query.new_empty
    grad_pad = new((0,)) if pad is None else new(pad.shape)
    return new(query.shape), new(key.shape), new(value.shape), grad_pad


def _flops(query: Sequence[int], *rest: Any, **_: Any) -> int:
    _, value, pad, num_regions, topk, _ = rest
    return sum(product_flops(query, value, num_regions, pad is not None, topk))


def _flops_backward(grad: Sequence[int], *rest: Any, **_: Any) -> int:
    """As torch counts scaled_dot_product_attention: five products, the scores once more."""
    query, _, value, pad, _, _, chosen, num_regions, _ = rest
    scores, mixing = product_flops(query, value, num_regions, pad is not None, chosen[2])
    return 3 * scores + 2 * mixing


_MAPS = "Tensor query, Tensor key, Tensor value, Tensor? pad"
_attention_backward = _dispatch.define(
    "routing_attention_triton_backward",
    f"(Tensor grad, {_MAPS}, Tensor out, Tensor sums, Tensor chosen, int[2] num_regions, "
    "float scale) -> (Tensor, Tensor, Tensor, Tensor)",
    _backward,
    _fake_backward,
    _flops_backward,
)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *maps, ctx.num_regions, _, ctx.scale = inputs
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(*maps, *output)


def _gradient(ctx: Any, grad: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    found = _attention_backward(grad, *ctx.saved_tensors, ctx.num_regions, ctx.scale)
    grads = (g if ctx.needs_input_grad[i] else None for i, g in enumerate(found))
    return *grads, None, None, None


_attention = _dispatch.define(
    "routing_attention_triton",
    f"({_MAPS}, int[2] num_regions, int topk, float scale) -> (Tensor, Tensor, Tensor)",
    _forward,
    _fake_forward,
    _flops,
    _keep,
    _gradient,
)
