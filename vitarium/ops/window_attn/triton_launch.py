"""Window attention in Triton's kernels: what they take, and how they are launched.

A window of up to 64 positions is one tile: its program keeps the bias in registers while it goes
through many windows of its head, and training keeps the inputs alone. Larger windows are tiled
as in flash attention, and training keeps the output and the logarithms of sums besides.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from vitarium.ops import _dispatch, _triton
from vitarium.ops._triton import Config
from vitarium.ops.window_attn import schema, windows

if TYPE_CHECKING:
    from vitarium.ops.window_attn.op import Call

NARROW = 1 << 31  # elements of an image that 32 bits count
WHOLE = 1024  # positions of a map that is one window, from where on its products are the bound
TILE = 64  # positions of the largest window that is one tile


def unsupported(call: Call) -> str | None:
    """Why no kernel takes a call, or None."""
    return _triton.unsupported(call.query)


def reserved(call: Call) -> str | None:
    """Why ``auto`` leaves a call to ordinary functions, or None."""
    reason = _triton.reserved(call.query)
    if reason is None and call.bias is None and not _is_tile(call.window_size):
        size = (call.query.shape[1], call.query.shape[2])
        window, _ = windows.clamped(size, call.window_size, call.shift_size, call.semantics)
        if window == size and math.prod(size) >= WHOLE:
            return (
                f"one window of {WHOLE} positions or more without a bias is as fast in torch's "
                f"flash attention, got {size[0]}x{size[1]}"
            )
    return reason


def run(call: Call) -> Tensor:
    """Attend in one pass over memory."""
    tensors = (call.query, call.key, call.value, call.bias, call.factor, call.pad)
    shape = (call.window_size, call.shift_size, call.scale, call.semantics)
    out: Tensor = _attention(*tensors, *shape)[0]
    return out


def _is_tile(window_size: Sequence[int]) -> bool:
    """Whether windows are single tiles: by the size that was asked for, which tracing knows."""
    return 0 < math.prod(window_size) <= TILE


def _geometry(
    query: Tensor, window_size: list[int], shift_size: list[int], semantics: str
) -> dict[str, Any]:
    """What kernels need to know of a partition."""
    (batch, height, width), (wh, ww), (sh, sw) = query.shape[:3], window_size, shift_size
    (wh, ww), (sh, sw) = windows.clamped((height, width), (wh, ww), (sh, sw), semantics)
    rows, columns = -(-height // wh), -(-width // ww)
    padded = (rows * wh, columns * ww)
    padded_first = semantics in windows.PADDED_FIRST
    turn = padded if padded_first else (height, width)
    divided = padded == (height, width)
    return {
        "windows": batch * rows * columns,
        "wh": wh,
        "ww": ww,
        "rows": rows,
        "columns": columns,
        "height": height,
        "width": width,
        "down": sh % turn[0],
        "right": sw % turn[1],
        "turn_row": turn[0],
        "turn_column": turn[1],
        "edge_row": wh - sh,
        "edge_column": ww - sw,
        "PADDED": 0 if divided else 2 if padded_first else 1,
        "SHIFTED": (sh, sw) != (0, 0),
    }


def _arguments(
    maps: dict[str, Tensor],
    bias: Tensor | None,
    factor: Tensor | None,
    pad: Tensor | None,
    window_size: list[int],
    shift_size: list[int],
    scale: float,
    semantics: str,
) -> dict[str, Any]:
    """What all kernels take."""
    maps = {name: _triton.readable(x) for name, x in maps.items()}
    query = maps["query"]
    heads, head_dim = query.shape[3:]
    geometry = _geometry(query, window_size, shift_size, semantics)
    strides = {
        f"{name[0]}_{axis}": n
        for name, x in maps.items()
        for axis, n in zip(("batch", "row", "column", "head"), x.stride()[:4], strict=True)
    }
    height, width = query.shape[1:3]
    token = heads * head_dim
    steps = [(width * token, token), *(x.stride()[1:3] for x in maps.values())]
    return {
        **maps,
        "bias": None if bias is None else bias.contiguous(),
        "factor": None if factor is None else factor.contiguous(),
        "pad": None if pad is None else pad.contiguous(),
        "scale": scale,
        **geometry,
        "heads": heads,
        **strides,
        "HEAD_DIM": head_dim,
        "BLOCK_D": _triton.block(head_dim),
        "TABLE_H": window_size[0],
        "TABLE_W": window_size[1],
        "HAS_BIAS": bias is not None,
        "COSINE": factor is not None,
        "HAS_PAD": pad is not None and geometry["PADDED"] > 0,
        "PACKED": len({maps[name].stride() for name in ("query", "key", "value")}) == 1,
        "WIDE": max(height * row + width * column for row, column in steps) >= NARROW,
        "ALIGN": math.gcd(16, head_dim, *strides.values()),
        "PRECISION": _triton.precision(query.dtype),
    }


def _tiled(arguments: dict[str, Any]) -> dict[str, Any]:
    """What kernels of single tiles take: they are compiled for a size of windows."""
    wh, ww = arguments["wh"], arguments["ww"]
    rest = {name: x for name, x in arguments.items() if name not in ("wh", "ww")}
    return rest | {"WH": wh, "WW": ww, "BLOCK_L": _triton.block(wh * ww)}


def _blocked(arguments: dict[str, Any]) -> dict[str, Any]:
    """What kernels of larger windows take; only widths of whole axes are not compiled in."""
    rest = {name: x for name, x in arguments.items() if name != "windows"}
    wh, ww = arguments["wh"], arguments["ww"]
    return rest | {"tokens": wh * ww, "WW": ww if arguments["TABLE_W"] else 0}


_TILE_KEY = ("HEAD_DIM", "WH", "WW", "HAS_BIAS", "COSINE", "PRECISION")
_BLOCK_KEY = ("HEAD_DIM", "WW", "HAS_BIAS", "COSINE", "PRECISION")


def _blocks_grid(arguments: dict[str, Any], block: str) -> Callable[..., tuple[int, ...]]:
    """A program per head, block of a window and window."""
    tokens, programs = arguments["wh"] * arguments["ww"], arguments["heads"] * arguments["windows"]

    def grid(meta: Mapping[str, Any]) -> tuple[int, ...]:
        return (-(-tokens // meta[block]) * programs,)

    return grid


def _programs(query: Tensor, count: int, each: int) -> int:
    """How many programs share ``count`` windows of a head evenly, ``each`` a multiprocessor."""
    most = max(1, each * _triton.processors(query.device) // query.shape[3])
    return -(-count // -(-count // most))


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
) -> tuple[Tensor, Tensor]:
    """The output and, for windows of more than a tile, logarithms of sums."""
    rest = (bias, factor, pad, window_size, shift_size, scale, semantics)
    out, sums = _fake_forward(query, key, value, *rest)
    if len(query) == 0:
        return out, sums
    from vitarium.ops.window_attn import triton_kernels as kernels

    arguments = _arguments({"query": query, "key": key, "value": value}, *rest)
    if _is_tile(window_size):
        arguments = _tiled(arguments)
        length = arguments["BLOCK_L"]
        heads, count = arguments["heads"], arguments["windows"]
        _triton.launch(
            kernels._window_fwd_kernel,
            lambda meta: (heads, _programs(query, count, int(meta["RESIDENT"]))),
            arguments | {"out": out},
            _resident_configs(query, length),
            _TILE_KEY,
        )
    else:
        _triton.launch(
            kernels._window_fwd_blocks_kernel,
            _blocks_grid(arguments, "BLOCK_M"),
            _blocked(arguments) | {"out": out, "sums": sums},
            _query_configs(query),
            _BLOCK_KEY,
        )
    return out, sums


def _tile_configs(query: Tensor, length: int) -> list[Config]:
    """For whole windows in blocks of ``length``: a warp per 16 rows, as tensor cores take them."""
    warps = length // 16
    if query.dtype == torch.float32:
        return [Config({}, 2 * warps, 1), Config({}, 2 * warps, 2)]
    if _row_bytes(query) > 128:  # one stage fits every device
        return [Config({}, 2 * warps, 1), Config({}, warps, 1)]
    return [Config({}, warps, 2), Config({}, warps, 1), Config({}, warps, 3)]


def _resident_configs(query: Tensor, length: int) -> list[Config]:
    """The same, with numbers of programs that a multiprocessor may hold at once.

    A program more than it does hold would start when all others end.
    """
    first, *others = _tile_configs(query, length)
    pairs = [(first, 4), *((x, 4) for x in others), (first, 5), (first, 3), (first, 8)]
    return [
        config._replace(blocks={"RESIDENT": resident * TILE // length})
        for config, resident in pairs
    ]


def _query_configs(query: Tensor) -> list[Config]:
    """For blocks of queries that loop over keys."""
    if query.dtype == torch.float32:
        n = 32 if _row_bytes(query) <= 256 else 16
        shapes = [(32, n, 4, 1), (64, n, 8, 1)]
    elif _row_bytes(query) > 128:
        shapes = [(64, 32, 4, 1), (64, 32, 4, 2), (128, 32, 8, 1)]
    else:
        shapes = [(64, 64, 4, 1), (64, 64, 4, 2), (64, 32, 4, 1), (64, 32, 4, 2)]
        shapes += [(128, 64, 8, 1), (128, 32, 8, 2)]
    return [Config({"BLOCK_M": m, "BLOCK_N": n}, *rest) for m, n, *rest in shapes]


def _key_configs(query: Tensor) -> list[Config]:
    """For blocks of keys that loop over queries; BLOCK_N is the same in all of them.

    It is what gradients of padding are laid out by.
    """
    if query.dtype == torch.float32:
        n, shapes = 32 if _row_bytes(query) <= 256 else 16, [(32, 4, 1), (16, 4, 1)]
    elif _row_bytes(query) > 128:
        n, shapes = 32, [(64, 4, 1), (32, 4, 1)]
    else:
        n, shapes = 64, [(32, 4, 1), (32, 4, 2), (64, 4, 1), (64, 4, 2)]
    return [Config({"BLOCK_M": m, "BLOCK_N": n}, *rest) for m, *rest in shapes]


def _row_bytes(query: Tensor) -> int:
    return _triton.block(query.shape[-1]) * query.element_size()


def _backward(
    grad: Tensor,
    out: Tensor | None,
    sums: Tensor,
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
    """Gradients of all tensors; that of what is None has no elements."""
    found = schema.fake_backward(grad, query, key, value, bias, factor, pad)
    if len(query) == 0:
        for x in found:
            x.zero_()
        return found
    maps = {"query": query, "key": key, "value": value, "grad": grad}
    arguments = _arguments(maps, bias, factor, pad, window_size, shift_size, scale, semantics)
    if out is None:
        _tile_backward(arguments, *found)
    else:
        _blocks_backward(arguments, out, sums, *found)
    return found


def _tile_backward(
    arguments: dict[str, Any],
    grad_query: Tensor,
    grad_key: Tensor,
    grad_value: Tensor,
    grad_bias: Tensor,
    grad_factor: Tensor,
    grad_pad: Tensor,
) -> None:
    """One kernel, and sums of what its programs found of parameters."""
    from vitarium.ops.window_attn import triton_kernels as kernels

    arguments = _tiled(arguments)
    heads, head_dim = grad_query.shape[3:]
    length = arguments["WH"] * arguments["WW"]
    block = arguments["BLOCK_L"]
    programs = _programs(grad_query, arguments["windows"], 4 * TILE // block)
    pairs, factors, pads = (
        grad_query.new_empty(programs, heads, *tail, dtype=torch.float32) if needed else None
        for needed, tail in (
            (arguments["HAS_BIAS"], (length, length)),
            (arguments["COSINE"], ()),
            (arguments["HAS_PAD"], (2, head_dim)),
        )
    )
    parts = {"grad_pairs": pairs, "grad_factor": factors, "grad_pad": pads}
    grads = {"grad_query": grad_query, "grad_key": grad_key, "grad_value": grad_value}
    _triton.launch(
        kernels._window_bwd_kernel,
        lambda _: (arguments["heads"], programs),
        arguments | grads | parts,
        _tile_configs(grad_query, block),
        _TILE_KEY,
    )
    if pairs is not None:
        _table(pairs, grad_bias, (arguments["WH"], arguments["WW"]))
    if factors is not None:
        torch.sum(factors, 0, out=grad_factor)
    _pad(pads, grad_pad)


def _pad(parts: Tensor | None, grad_pad: Tensor) -> None:
    """Sum parts [parts, heads, 2, head_dim] of the gradients of a padded key and value."""
    grad_pad.zero_()
    if parts is not None:
        grad_pad[1:] = parts.sum(0).transpose(0, 1)


def _table(pairs: Tensor, grad_bias: Tensor, window: tuple[int, int]) -> None:
    """Sum parts [parts, heads, L, L] of the gradient of all pairs to that of a bias."""
    from vitarium.ops.window_attn import triton_kernels as kernels

    heads, table_h, table_w = grad_bias.shape
    arguments = {
        "grad_pairs": pairs.sum(0),
        "grad_bias": grad_bias,
        "WH": window[0],
        "WW": window[1],
        "TABLE_H": (table_h + 1) // 2,
        "TABLE_W": (table_w + 1) // 2,
    }
    _triton.launch(
        kernels._window_bwd_table_kernel,
        lambda meta: (heads, -(-table_h * table_w // meta["BLOCK_E"])),
        arguments,
        [Config({"BLOCK_E": 16, "BLOCK_L": 64}, 4, 1)],
    )


def _blocks_backward(
    arguments: dict[str, Any],
    out: Tensor,
    sums: Tensor,
    grad_query: Tensor,
    grad_key: Tensor,
    grad_value: Tensor,
    grad_bias: Tensor,
    grad_factor: Tensor,
    grad_pad: Tensor,
) -> None:
    """A kernel for queries, one for keys and values, one for pairs where there is a bias."""
    from vitarium.ops.window_attn import triton_kernels as kernels

    count, (heads, head_dim) = arguments["windows"], grad_query.shape[3:]
    given = _blocked(arguments) | {"sums": sums, "deltas": torch.empty_like(sums)}
    configs = _key_configs(grad_query)
    factors = torch.empty_like(sums) if arguments["COSINE"] else None
    _triton.launch(
        kernels._window_bwd_query_kernel,
        _blocks_grid(arguments, "BLOCK_M"),
        given | {"out": out, "grad_query": grad_query, "grad_factor": factors},
        _query_configs(grad_query),
        _BLOCK_KEY,
    )
    pads = None
    if arguments["HAS_PAD"]:
        blocks = -(-given["tokens"] // configs[0].blocks["BLOCK_N"])  # the same in all of them
        pads = sums.new_empty(count * blocks, heads, 2, head_dim)
    _triton.launch(
        kernels._window_bwd_key_kernel,
        _blocks_grid(arguments, "BLOCK_N"),
        given | {"grad_key": grad_key, "grad_value": grad_value, "grad_pad": pads},
        configs,
        _BLOCK_KEY,
    )
    if factors is not None:
        torch.sum(factors, (0, 2, 3), out=grad_factor)
    _pad(pads, grad_pad)
    if not arguments["HAS_BIAS"]:
        return
    tokens = given["tokens"]
    most = 4 * _triton.processors(sums.device) // (heads * (-(-tokens // 64)) ** 2)
    splits = max(1, min(count, most))
    pairs = sums.new_empty(splits, heads, tokens, tokens)

    def grid(meta: Mapping[str, Any]) -> tuple[int, ...]:
        blocks = (-(-tokens // meta[x]) for x in ("BLOCK_M", "BLOCK_N"))
        return heads * math.prod(blocks), splits

    rest = {name: x for name, x in given.items() if name != "HAS_BIAS"}
    _triton.launch(
        kernels._window_bwd_pairs_kernel,
        grid,
        rest | {"windows": count, "grad_pairs": pairs},
        configs,
        [name for name in _BLOCK_KEY if name != "HAS_BIAS"],
    )
    _table(pairs, grad_bias, (arguments["wh"], arguments["ww"]))


def _fake_forward(query: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    batch, height, width, heads = query.shape[:4]
    sums = (0,) if _is_tile(rest[5]) else (batch, heads, height, width)
    return query.new_empty(query.shape), query.new_empty(sums, dtype=torch.float32)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    out, sums = output
    ctx.mark_non_differentiable(sums)
    kept = None if _is_tile(inputs[6]) else out
    ctx.save_for_backward(kept, sums, *inputs[:6])
    ctx.rest = inputs[6:]


def _gradient(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Any, ...]:
    grads = _attention_backward(grad, *ctx.saved_tensors, *ctx.rest)
    wanted = ctx.needs_input_grad[:6]
    found = (g if want else None for g, want in zip(grads, wanted, strict=True))
    return *found, *(None for _ in ctx.rest)


_attention_backward = _dispatch.define(
    "window_attention_triton_backward",
    f"(Tensor grad, Tensor? out, Tensor sums, {schema.ARGUMENTS}) -> {schema.GRADIENTS}",
    _backward,
    lambda grad, out, sums, *rest: schema.fake_backward(grad, *rest),
    lambda grad, out, sums, *rest, **_: schema.flops_backward(grad, *rest),
)

_attention = _dispatch.define(
    "window_attention_triton",
    f"({schema.ARGUMENTS}) -> (Tensor, Tensor)",
    _forward,
    _fake_forward,
    schema.flops,
    _keep,
    _gradient,
)
