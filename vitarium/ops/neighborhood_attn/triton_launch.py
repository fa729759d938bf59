"""Neighborhood attention by Triton kernels: tiles of queries and their halos of keys on a GPU."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vitarium.ops import _dispatch, _triton

if TYPE_CHECKING:
    from vitarium.ops.neighborhood_attn.op import Call

_GRID = 65535  # the most programs on a grid's second and third axis
_MAX_HEIGHT = _GRID  # there are not more rows of tiles than of positions
_MASKED = -1e30
_LOG2_E = 1 / math.log(2)


def unsupported(call: Call) -> str | None:
    """Why the kernels cannot run this call, or None."""
    if call.padded_size[0] > _MAX_HEIGHT:
        return f"kernels take maps of up to {_MAX_HEIGHT} rows, got {call.padded_size[0]}"
    return _triton.unsupported(call.query, call.key, call.value)


def reserved(call: Call) -> str | None:
    """Why ``auto`` leaves this call to others, or None."""
    return _triton.reserved(call.query, call.key, call.value)


def run(call: Call) -> Tensor:
    """Attend; keys and values of a map that is too small are padded first."""
    query, key, value = call.query, call.key, call.value
    size = call.padded_size
    if call.pad is not None and size != tuple(query.shape[1:3]):
        key, value = _padded(key, call.pad[1], size), _padded(value, call.pad[2], size)
    tensors = (query, key, value, call.bias)
    keep = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)
    out: Tensor = _attention(*tensors, call.kernel_size, call.dilation, call.scale, keep)[0]
    return out


def _padded(x: Tensor, fill: Tensor, size: tuple[int, int]) -> Tensor:
    batch, height, width = x.shape[:3]
    below = fill.expand(batch, size[0] - height, width, -1, -1)
    right = fill.expand(batch, size[0], size[1] - width, -1, -1)
    return torch.cat([torch.cat([x, below], 1), right], 2)


def _table(bias: Tensor | None) -> Tensor | None:
    """The bias as kernels read it, with a row and a column that mask."""
    return None if bias is None else F.pad(bias.float() * _LOG2_E, (0, 1, 0, 1), value=_MASKED)


def _strides(unit: int, **maps: Tensor) -> dict[str, int]:
    """Strides of maps by the kernels' names, in units."""
    names = ("batch", "row", "column", "head")
    return {
        f"{x}_{name}": stride // unit
        for x, y in maps.items()
        for name, stride in zip(names, _steps(y), strict=True)
    }


def _steps(x: Tensor) -> list[int]:
    """Strides of all axes but the last; those of axes of one position are of no use."""
    return [0 if n == 1 else s for n, s in zip(x.shape[:-1], x.stride(), strict=False)]


def _unit(*maps: Tensor) -> int:
    """The largest power of two up to 16 that divides all strides."""
    return math.gcd(16, *(stride for x in maps for stride in _steps(x)))


def _call(
    query: Tensor,
    key: Tensor,
    bias: Tensor | None,
    kernel_size: Sequence[int],
    dilation: Sequence[int],
    unit: int,
) -> dict[str, Any]:
    """What all kernels are told."""
    _, height, width, heads, head_dim = query.shape
    return {
        "heads": heads,
        "height": height,
        "width": width,
        "key_height": key.shape[1],
        "key_width": key.shape[2],
        "dilation_h": dilation[0],
        "dilation_w": dilation[1],
        "KERNEL_H": kernel_size[0],
        "KERNEL_W": kernel_size[1],
        "HEAD_DIM": head_dim,
        "BLOCK_D": _triton.block(head_dim),
        "UNIT": unit,
        "BIASED": bias is not None,
        "PRECISION": _triton.precision(query.dtype),
    }


_KEY = ("KERNEL_H", "KERNEL_W", "HEAD_DIM", "BIASED", "PRECISION")


def _grid(batch: int, keys: bool = False) -> Callable[[Mapping[str, Any]], tuple[int, ...]]:
    """Programs for all tiles of queries, or of keys, of ``batch`` images."""
    of = "key_" if keys else ""

    def grid(x: Mapping[str, Any]) -> tuple[int, ...]:
        columns = _tiles(x[f"{of}width"], x["dilation_w"], x["TILE_W"])
        rows = _tiles(x[f"{of}height"], x["dilation_h"], x["TILE_H"])
        return x["heads"] * columns, rows, batch

    return grid


def _tiles(length: int, dilation: int, tile: int) -> int:
    """Tiles of an axis: as many for each class as the longest one takes."""
    return dilation * ((length + dilation * tile - 1) // (dilation * tile))


def _config(
    tile_h: int, tile_w: int, rows: int, columns: int, num_warps: int, num_stages: int
) -> _triton.Config:
    blocks = {"TILE_H": tile_h, "TILE_W": tile_w, "ROWS": rows, "COLUMNS": columns}
    return _triton.Config(blocks, num_warps, num_stages)


def _configs(query: Tensor, kernel_size: Sequence[int]) -> list[_triton.Config]:
    """A chunk is as wide as the halo where that takes few columns."""
    if query.dtype.itemsize == 4:  # products are sums of the shader cores, in registers
        return _NARROW_EXACT_CONFIGS if kernel_size[1] <= 9 else _WIDE_EXACT_CONFIGS
    if kernel_size[1] <= 9:
        return _NARROW_CONFIGS
    return _WIDE_CONFIGS if kernel_size[1] <= 13 else _WIDEST_CONFIGS


_NARROW_CONFIGS = [
    _config(8, 8, 2, 16, 4, 2),
    _config(8, 8, 2, 16, 4, 1),
    _config(8, 8, 4, 16, 4, 2),
    _config(4, 8, 2, 16, 2, 2),
    _config(4, 8, 2, 16, 4, 1),
    _config(4, 8, 4, 16, 4, 2),
]
_WIDE_CONFIGS = [
    _config(16, 4, 2, 16, 4, 2),
    _config(16, 4, 4, 16, 4, 2),
    _config(8, 4, 2, 16, 2, 2),
    _config(8, 4, 4, 16, 4, 2),
]
_NARROW_EXACT_CONFIGS = [_config(4, 8, 1, 16, 4, 1), _config(4, 8, 2, 16, 4, 1)]
_WIDE_EXACT_CONFIGS = [_config(8, 4, 1, 16, 4, 1), _config(4, 8, 1, 32, 4, 1)]
_WIDEST_CONFIGS = [_config(8, 8, 1, 32, 4, 2), _config(8, 8, 2, 32, 4, 2)]
_BIAS_CONFIGS = {2: _config(8, 8, 4, 16, 4, 1), 4: _config(4, 8, 2, 16, 4, 1)}  # by itemsize
_IMAGE_CONFIGS = [
    _config(8, 8, 2, 16, 4, 2),
    _config(4, 8, 2, 16, 2, 2),
    _config(8, 8, 2, 16, 4, 3),
    _config(4, 8, 2, 16, 2, 3),
]


def _resident(query: Tensor, kernel_size: Sequence[int]) -> bool:
    """Whether the biases of a tile fit in registers."""
    return query.dtype.itemsize == 2 and query.shape[-1] <= 32 and max(kernel_size) <= 7


def _images(key: Tensor, kernel_size: Sequence[int], dilation: Sequence[int]) -> dict[str, Any]:
    """What kernels that take a tile of several images are told beside."""
    longest = -(-key.shape[1] // dilation[0])
    return {"batch": len(key), "LONGEST": min(longest, kernel_size[0] + 7)}


def _grid_of_images(query: Tensor) -> Callable[[Mapping[str, Any]], tuple[int, ...]]:
    """Programs for all tiles; each takes several images where there is enough to do."""
    programs = 16 * _triton.processors(query.device)

    def grid(x: Mapping[str, Any]) -> tuple[int, ...]:
        columns, rows, _ = _grid(1)(x)
        parts = (programs + columns * rows - 1) // (columns * rows)
        return columns, rows, min(parts, len(query), _GRID)

    return grid


def _forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None,
    kernel_size: list[int],
    dilation: list[int],
    scale: float,
    keep: bool,
) -> tuple[Tensor, Tensor]:
    out, lse = _fake_forward(query, key, value, bias, kernel_size, dilation, scale, keep)
    query, key, value = (_triton.readable(x) for x in (query, key, value))
    unit = _unit(query, key, value)
    shared = _call(query, key, bias, kernel_size, dilation, unit)
    shared |= _strides(unit, q=query, k=key, v=value) | {"KEEP": keep}
    if len(query) and _resident(query, kernel_size):
        arguments: dict[str, Any] = {"query": query, "key": key, "value": value, "bias": bias}
        arguments |= {"out": out, "lse": lse, "scale": scale * _LOG2_E} | shared
        arguments |= _images(key, kernel_size, dilation)
        _launch("fwd_images", _grid_of_images(query), arguments, _IMAGE_CONFIGS)
        return out, lse
    table = _table(bias)
    for first in range(0, len(query), _GRID):
        part = slice(first, first + _GRID)
        q, k, v, o, e = (x[part] for x in (query, key, value, out, lse))
        arguments = {"query": q, "key": k, "value": v, "table": table, "out": o, "lse": e}
        arguments |= shared | {"scale": scale * _LOG2_E}
        _launch("fwd", _grid(len(q)), arguments, _configs(query, kernel_size))
    return out, lse


def _backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None,
    out: Tensor,
    lse: Tensor,
    kernel_size: list[int],
    dilation: list[int],
    scale: float,
    of_bias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of query, key, value and bias; the bias's has no elements if not asked for."""
    fake = (grad, query, key, value, bias, out, lse, kernel_size, dilation, scale, of_bias)
    grads = _fake_backward(*fake)
    if len(query) == 0:
        for x in grads:
            x.zero_()
        return grads
    query, key, value, grad = (_triton.readable(x) for x in (query, key, value, grad))
    unit, table, delta = _unit(query, key, value, grad), _table(bias), torch.empty_like(lse)
    resident = _resident(query, kernel_size)
    if resident:
        arguments: dict[str, Any] = {"query": query, "key": key, "value": value, "bias": bias}
        arguments |= {"out": out, "lse": lse, "grad": grad, "delta": delta, "grad_query": grads[0]}
        arguments |= _call(query, key, bias, kernel_size, dilation, unit)
        arguments |= _strides(unit, q=query, k=key, v=value, g=grad)
        arguments |= {"scale": scale * _LOG2_E, "factor": scale}
        arguments |= _images(key, kernel_size, dilation)
        _launch("bwd_query_images", _grid_of_images(query), arguments, _IMAGE_CONFIGS)
    for first in range(0, len(query), _GRID):
        part = slice(first, first + _GRID)
        q, k, v, g, e, x = (x[part] for x in (query, key, value, grad, lse, delta))
        shared: dict[str, Any] = {"query": q, "key": k, "value": v, "table": table, "grad": g}
        shared |= {"lse": e, "delta": x} | _call(q, k, bias, kernel_size, dilation, unit)
        shared |= _strides(unit, q=q, k=k, v=v, g=g)
        shared |= {"scale": scale * _LOG2_E, "factor": scale}
        configs = _configs(query, kernel_size)
        if not resident:
            to = {"out": out[part], "grad_query": grads[0][part]}
            _launch("bwd_query", _grid(len(q)), shared | to, configs)
        to = {"grad_key": grads[1][part], "grad_value": grads[2][part]}
        _launch("bwd_key", _grid(len(q), keys=True), shared | to, configs)
    if bias is not None and of_bias:
        maps = {"query": query, "key": key, "value": value, "grad": grad}
        arguments = {**maps, "table": table, "lse": lse, "delta": delta}
        arguments |= _call(query, key, bias, kernel_size, dilation, unit)
        arguments |= _strides(unit, q=query, k=key, v=value, g=grad)
        grads[3].copy_(_bias_gradient(arguments | {"scale": scale * _LOG2_E}))
    return grads


def _bias_gradient(arguments: dict[str, Any]) -> Tensor:
    query, dilation = arguments["query"], (arguments["dilation_h"], arguments["dilation_w"])
    batch, height, width, heads, _ = query.shape
    kernel = (arguments["KERNEL_H"], arguments["KERNEL_W"])
    config = _BIAS_CONFIGS[query.dtype.itemsize]
    tile = (config.blocks["TILE_H"], config.blocks["TILE_W"])
    block = (config.blocks["ROWS"], config.blocks["COLUMNS"])
    before = [-(-(k // 2) // n) for k, n in zip(kernel, block, strict=True)]
    halo = [max(t + k - 1, k // 2 + k) for k, t in zip(kernel, tile, strict=True)]
    chunks = [b + -(-n // c) for b, n, c in zip(before, halo, block, strict=True)]
    axes = zip((height, width), dilation, tile, strict=True)
    tiles = batch * math.prod(_tiles(*axis) for axis in axes)
    programs = 8 * _triton.processors(query.device)
    split = max(1, min(programs // (heads * math.prod(chunks)), tiles, _GRID))
    size = [n * c for n, c in zip(chunks, block, strict=True)]
    partial = query.new_empty(split, heads, *size, math.prod(tile), dtype=torch.float32)
    arguments |= {"batch": batch, "split": split, "partial": partial}
    arguments |= {"CHUNKS_H": chunks[0], "CHUNKS_W": chunks[1]}

    def grid(_: Mapping[str, Any]) -> tuple[int, ...]:
        return math.prod(chunks), heads, split

    _launch("bwd_bias", grid, arguments, [config])
    # a key at p and a query at i of a tile stand p - i + const apart: sum along diagonals
    first = [b * n - k // 2 for b, n, k in zip(before, block, kernel, strict=True)]
    need = [f + 2 * k - 1 + t - 1 for f, k, t in zip(first, kernel, tile, strict=True)]
    idle = [max(0, n - s) for n, s in zip(need, size, strict=True)]
    found = F.pad(partial.sum(0), (0, 0, 0, idle[1], 0, idle[0]))[:, first[0] :, first[1] :]
    a, b, c, _ = found.stride()
    shape = (heads, 2 * kernel[0] - 1, 2 * kernel[1] - 1, *tile)
    diagonals = found.as_strided(shape, (a, b, c, b + tile[1], c + 1), found.storage_offset())
    return diagonals.sum((-1, -2))


def _launch(
    name: str,
    grid: Callable[[Mapping[str, Any]], tuple[int, ...]],
    arguments: dict[str, Any],
    configs: Sequence[_triton.Config],
) -> None:
    from vitarium.ops.neighborhood_attn import triton_kernels

    kernel = getattr(triton_kernels, f"_neighborhood_{name}_kernel")
    _triton.launch(kernel, grid, arguments, configs, _KEY)


def _fake_forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None,
    kernel_size: list[int],
    dilation: list[int],
    scale: float,
    keep: bool,
) -> tuple[Tensor, Tensor]:
    batch, height, width, heads, _ = query.shape
    shape = (batch, heads, height, width) if keep else (batch, 0, height, width)
    return query.new_empty(query.shape), query.new_empty(shape, dtype=torch.float32)


def _fake_backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None,
    *rest: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    of_query, of_key, of_value = (x.new_empty(x.shape) for x in (query, key, value))
    shape = bias.shape if bias is not None and rest[-1] else (0,)
    return of_query, of_key, of_value, query.new_empty(shape)


def _flops(query: Sequence[int], *rest: Any, **_: Any) -> int:
    """Scores and mixing of the windows."""
    return 4 * math.prod(query) * math.prod(rest[3])


def _flops_backward(grad: Sequence[int], *rest: Any, **_: Any) -> int:
    """As torch counts scaled_dot_product_attention: five products, the scores once more."""
    return 10 * math.prod(grad) * math.prod(rest[6])


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    query, key, value, bias, kernel_size, dilation, scale, _ = inputs
    ctx.save_for_backward(query, key, value, bias, *output)
    ctx.rest = (kernel_size, dilation, scale)


def _gradient(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    of_bias = ctx.needs_input_grad[3]
    *maps, bias = _attention_backward(grad, *ctx.saved_tensors, *ctx.rest, of_bias)
    return *maps, bias if of_bias else None, None, None, None, None


_attention_backward = _dispatch.define(
    "neighborhood_attention_triton_backward",
    "(Tensor grad, Tensor query, Tensor key, Tensor value, Tensor? bias, Tensor out, Tensor lse, "
    "int[2] kernel_size, int[2] dilation, float scale, bool of_bias) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
    _backward,
    _fake_backward,
    _flops_backward,
)


_attention = _dispatch.define(
    "neighborhood_attention_triton",
    "(Tensor query, Tensor key, Tensor value, Tensor? bias, int[2] kernel_size, int[2] dilation, "
    "float scale, bool keep) -> (Tensor, Tensor)",
    _forward,
    _fake_forward,
    _flops,
    _keep,
    _gradient,
)
