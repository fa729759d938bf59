"""Agent attention in Triton: queries are read twice, keys and values once, the output written.

The backward pass reads each map twice (keys and values only once where agents have no bias). All
sums have a fixed order: results are the same in every run on one device.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from vitarium.ops import _dispatch, _triton
from vitarium.ops._triton import Config

if TYPE_CHECKING:
    from vitarium.ops.agent_attn.op import Call

_MAX_AGENTS = 256
_MAX_BYTES = 1 << 14  # of a head's agents: shared memory holds them several times
_FEW_BYTES = 1 << 13  # so few, and at most 64, that loops may load the next ones meanwhile
_PROGRAMS, _PROGRAMS_BACKWARD = 8, 4  # for each multiprocessor; gradients take more registers
_PART = 512  # tokens that are worth a program of their own, or eight times the agents
_STEP = 128  # tokens, a multiple of every BLOCK_T
_NO_PREFIX = (None, None, None)

_POOL = (
    Config({"BLOCK_T": 64, "BLOCK_C": 64}, 4, 2),
    Config({"BLOCK_T": 32, "BLOCK_C": 64}, 2, 3),
    Config({"BLOCK_T": 32, "BLOCK_C": 128}, 4, 3),
    Config({"BLOCK_T": 128, "BLOCK_C": 32}, 4, 2),
)
_FEW = (
    Config({"BLOCK_T": 64}, 4, 2),
    Config({"BLOCK_T": 128}, 4, 2),
    Config({"BLOCK_T": 64}, 4, 3),
    Config({"BLOCK_T": 64}, 8, 2),
    Config({"BLOCK_T": 32}, 4, 2),
    Config({"BLOCK_T": 128}, 8, 2),
)
_FEW_BACKWARD = (  # of _FEW_BYTES
    Config({"BLOCK_T": 32}, 4, 2),
    Config({"BLOCK_T": 64}, 4, 2),
    Config({"BLOCK_T": 64}, 8, 2),
    Config({"BLOCK_T": 32}, 8, 2),
    Config({"BLOCK_T": 32}, 4, 3),
)
_FEW_EXACT = (
    Config({"BLOCK_T": 32}, 8, 1),
    Config({"BLOCK_T": 32}, 4, 1),
    Config({"BLOCK_T": 16}, 8, 1),
)
_MANY = (
    Config({"BLOCK_T": 16}, 8, 1),
    Config({"BLOCK_T": 16}, 4, 1),
    Config({"BLOCK_T": 32}, 8, 1),
)
_KEY = ("BLOCK_N", "HEAD_DIM")


def unsupported(call: Call) -> str | None:
    """Why kernels cannot run a call, or None."""
    reason = _triton.unsupported(call.query)
    if reason is not None:
        return reason
    agents, head_dim = math.prod(call.agent_size), call.query.shape[-1]
    if agents > _MAX_AGENTS:
        return f"kernels take up to {_MAX_AGENTS} agents, got {agents}"
    if _bytes(agents, call.query) > _MAX_BYTES:
        return f"{agents} agents of head_dim {head_dim} in {call.query.dtype} fill shared memory"
    return None


def reserved(call: Call) -> str | None:
    """Why ``auto`` leaves a call to others, or None."""
    return _triton.reserved(call.query)


def run(call: Call) -> Tensor:
    """[B, P + H * W, heads, head_dim], class tokens first."""
    tensors = (call.query, call.key, call.value, call.agent_bias, call.token_bias)
    out: Tensor = _attention(*tensors, *(call.prefix or _NO_PREFIX), call.agent_size, call.scale)[0]
    return out


def _bytes(agents: int, query: Tensor) -> int:
    """What agents of one head take, in whole blocks."""
    return _triton.block(agents) * _triton.block(query.shape[-1]) * query.element_size()


def _joined(first: Tensor | None, x: Tensor) -> Tensor:
    """All tokens as a map, class tokens first: a view where these precede the map in memory."""
    if first is None:
        return _triton.readable(x)
    images, height, width, heads, head_dim = x.shape
    image, row, column, head, last = x.stride()
    before = (
        first.stride() == (image, column, head, last)
        and (height == 1 or row == width * column)
        and first.untyped_storage().data_ptr() == x.untyped_storage().data_ptr()
        and first.storage_offset() + first.shape[1] * column == x.storage_offset()
    )
    if before:
        shape = (images, 1, first.shape[1] + height * width, heads, head_dim)
        return _triton.readable(first.as_strided(shape, (image, 0, column, head, last)))
    return torch.cat([first, x.flatten(1, 2)], 1)[:, None]


class _Sizes:
    """A call's numbers, how its work is divided, and what most kernels are told."""

    def __init__(
        self,
        query: Tensor,
        first: Tensor | None,
        agent_size: Sequence[int],
        scale: float,
        backward: bool,
    ) -> None:
        self.images, self.height, self.width, self.heads, self.head_dim = query.shape
        self.agents = math.prod(agent_size)
        self.tokens = self.height * self.width + (0 if first is None else first.shape[1])
        self.wide = self.width if first is None else self.tokens
        self.query = query
        self.common: dict[str, Any] = {
            "heads": self.heads,
            "images": self.images,
            "scale": scale,
            "HEAD_DIM": self.head_dim,
            "PRECISION": _triton.precision(query.dtype),
            "BLOCK_N": _triton.block(self.agents),
            "BLOCK_D": _triton.block(self.head_dim),
        }
        size = _bytes(self.agents, query)
        self.configs: Sequence[Config] = _MANY
        if self.agents <= 64 and size <= _FEW_BYTES:
            self.configs = _FEW_BACKWARD if backward and size == _FEW_BYTES else _FEW
            if query.dtype == torch.float32:
                self.configs = _FEW_EXACT
        programs = _PROGRAMS_BACKWARD if backward else _PROGRAMS
        wanted, images = programs * _triton.processors(query.device), max(1, self.images)
        least = max(_PART, 8 * self.common["BLOCK_N"])
        parts = min(-(-wanted // (images * self.heads)), -(-self.tokens // least))
        self.part = -(-self.tokens // (parts * _STEP))  # steps
        self.parts = -(-self.tokens // (self.part * _STEP))
        groups = min(-(-wanted // (-(-self.tokens // 64) * self.heads)), images)
        self.group = -(-images // groups)  # images
        self.groups = -(-images // self.group)

    def empty(self, *leading: int, exact: bool = False) -> Tensor:
        """[*leading, B, n, heads, head_dim], in float32 or the dtype of the maps."""
        shape = (*leading, self.images, self.agents, self.heads, self.head_dim)
        return self.query.new_empty(shape, dtype=torch.float32 if exact else None)

    def all_tokens(self) -> Tensor:
        """[B, tokens, heads, head_dim]."""
        return self.query.new_empty(self.images, self.tokens, self.heads, self.head_dim)

    def by_image(self, kernel: Any, maps: Mapping[str, Tensor], **arguments: Any) -> None:
        """Run a program for every part of the tokens of every image and head."""
        programs = (self.heads * self.parts * self.images,)
        arguments |= {"span": self.part, "parts": self.parts, "AGENTS": self.agents}
        self._launch(kernel, lambda _: programs, maps, arguments)

    def by_block(self, kernel: Any, maps: Mapping[str, Tensor], **arguments: Any) -> None:
        """Run a program for every block of tokens of every head, and a group of images."""

        def grid(x: Mapping[str, Any]) -> tuple[int]:
            return (self.heads * -(-self.tokens // x["BLOCK_T"]) * self.groups,)

        self._launch(kernel, grid, maps, arguments | {"span": self.group})

    def _launch(
        self, kernel: Any, grid: Any, maps: Mapping[str, Tensor], arguments: Mapping[str, Any]
    ) -> None:
        flat = all(_flat(x) for x in maps.values())
        found = {**self.common, **_located(maps), "FLAT": flat, **arguments}
        _triton.launch(kernel, grid, found, self.configs, _KEY)


def _located(maps: Mapping[str, Tensor]) -> dict[str, Any]:
    """Maps [B, H, W, heads, head_dim] with their strides, and the unit of these."""
    strides = {
        name: tuple(n if size > 1 else 0 for n, size in zip(x.stride()[:4], x.shape, strict=False))
        for name, x in maps.items()
    }
    unit = math.gcd(16, *(n for x in strides.values() for n in x))
    units = {f"{name}_strides": tuple(n // unit for n in x) for name, x in strides.items()}
    return {**maps, **units, "UNIT": unit}


def _flat(x: Tensor) -> bool:
    """Whether the tokens of a map are equally far apart."""
    return x.shape[1] == 1 or x.stride(1) == x.shape[2] * x.stride(2)


def _biased(bias: Tensor | None, tokens: int) -> dict[str, Any]:
    """A bias [heads, n, tokens], its strides and the tokens, in units of ALIGNED elements."""
    strides: tuple[int, ...] = (0, 0)
    if bias is not None:
        bias = _triton.readable(bias)
        strides = bias.stride()[:2]
    unit = math.gcd(16, tokens, *strides)
    found = {"bias": bias, "bias_strides": tuple(n // unit for n in strides)}
    return {**found, "tokens": tokens // unit, "ALIGNED": unit}


def _forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    agent_bias: Tensor | None,
    token_bias: Tensor | None,
    query_prefix: Tensor | None,
    key_prefix: Tensor | None,
    value_prefix: Tensor | None,
    agent_size: Sequence[int],
    scale: float,
) -> tuple[Tensor, ...]:
    from vitarium.ops.agent_attn import triton_kernels as kernels

    x = _Sizes(query, query_prefix, agent_size, scale, False)
    out, gathered = x.all_tokens(), x.empty()
    lse = query.new_empty(gathered.shape[:3], dtype=torch.float32)
    if not x.images:
        return out, x.empty(), gathered, lse
    agents = _pooled(x, agent_size)
    keys = {"key": _joined(key_prefix, key), "value": _joined(value_prefix, value)}
    found, levels = gathered, lse
    if x.parts > 1:
        found, levels = x.empty(x.parts, exact=True), lse.new_empty(x.parts, *lse.shape)
    x.by_image(
        kernels._agent_fwd_gather_kernel,
        keys,
        agents=agents,
        gathered=found,
        lse=levels,
        width=x.wide,
        **_biased(agent_bias, x.tokens),
    )
    if x.parts > 1:
        arguments: dict[str, Any] = {
            "parts_gathered": found,
            "parts_lse": levels,
            "gathered": gathered,
            "lse": lse,
        }
        names = ("heads", "images", "HEAD_DIM", "BLOCK_N", "BLOCK_D")
        arguments |= {name: x.common[name] for name in names}
        arguments |= {"parts": x.parts, "AGENTS": x.agents}
        kernel = kernels._agent_fwd_combine_kernel
        _triton.launch(kernel, lambda _: (x.heads * x.images,), arguments, [Config({}, 4, 1)])
    x.by_block(
        kernels._agent_fwd_read_kernel,
        {"query": _joined(query_prefix, query)},
        agents=agents,
        gathered=gathered,
        out=out,
        width=x.wide,
        AGENTS=x.agents,
        **_biased(None if token_bias is None else token_bias.mT, x.tokens),
    )
    return out, agents, gathered, lse


def _pooled(x: _Sizes, agent_size: Sequence[int]) -> Tensor:
    """Means of the map's queries, [B, n, heads, head_dim]."""
    from vitarium.ops.agent_attn import triton_kernels as kernels

    rows, columns = agent_size
    channels = x.heads * x.head_dim
    programs = rows * x.images * -(-channels // 64)
    wanted = -(-_PROGRAMS * _triton.processors(x.query.device) // programs)
    parts = max(1, min(wanted, x.height * x.width // (rows * _PART)))
    agents = x.empty(*([parts] if parts > 1 else []), exact=parts > 1)
    arguments: dict[str, Any] = {
        **_located({"query": _triton.readable(x.query)}),
        "agents": agents,
        "height": x.height,
        "width": x.width,
        "parts": parts,
        "ROWS": rows,
        "COLUMNS": columns,
        "BLOCK_COLUMNS": _triton.block(columns),
    }
    arguments |= {name: x.common[name] for name in ("heads", "images", "HEAD_DIM", "PRECISION")}

    def grid(y: Mapping[str, Any]) -> tuple[int]:
        return (-(-channels // y["BLOCK_C"]) * parts * rows * x.images,)

    key = ("COLUMNS", "HEAD_DIM")
    _triton.launch(kernels._agent_fwd_pool_kernel, grid, arguments, _POOL, key)
    return agents if parts == 1 else agents.sum(0).to(x.query.dtype)


def _backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    agent_bias: Tensor | None,
    token_bias: Tensor | None,
    query_prefix: Tensor | None,
    key_prefix: Tensor | None,
    value_prefix: Tensor | None,
    agents: Tensor,
    gathered: Tensor,
    lse: Tensor,
    agent_size: Sequence[int],
    scale: float,
) -> tuple[Tensor, ...]:
    """Gradients of all tokens' queries, keys and values, and of the biases.

    The gradient of what is None has no elements.
    """
    from vitarium.ops.agent_attn import triton_kernels as kernels

    x = _Sizes(query, query_prefix, agent_size, scale, True)
    grads = tuple(x.all_tokens() for _ in range(3))
    biases = tuple(
        query.new_zeros(0) if bias is None else lse.new_empty(x.groups, x.heads, x.agents, x.tokens)
        for bias in (agent_bias, token_bias)
    )
    if not x.images:
        return _results(grads, tuple(b.zero_()[0] if b.ndim > 1 else b for b in biases), query)
    first, second = (
        _biased(agent_bias, x.tokens),
        _biased(None if token_bias is None else token_bias.mT, x.tokens),
    )
    small = {"agents": agents, "gathered": gathered}
    keys = {"key": _joined(key_prefix, key), "value": _joined(value_prefix, value)}
    queries = {"grad": _joined(None, grad[:, None]), "query": _joined(query_prefix, query)}
    grad_agents, grad_gathered = x.empty(2, x.parts, exact=True), x.empty(x.parts, exact=True)
    x.by_image(
        kernels._agent_bwd_read_kernel,
        queries,
        **small,
        grad_gathered=grad_gathered,
        grad_agents=grad_agents[0],
        width=x.wide,
        **second,
    )
    grad_gathered = grad_gathered.sum(0) if x.parts > 1 else grad_gathered[0]
    small_keys = {**small, "grad_gathered": grad_gathered, "lse": lse, "width": x.wide, **first}
    x.by_image(
        kernels._agent_bwd_gather_kernel,
        keys,
        **small_keys,
        grad_key=grads[1],
        grad_value=grads[2],
        grad_agents=grad_agents[1],
    )
    x.by_block(
        kernels._agent_bwd_query_kernel,
        queries,
        **small,
        grad_agents=grad_agents.sum((0, 1)),
        grad_query=grads[0],
        grad_bias=None if token_bias is None else biases[1],
        height=x.height,
        width=x.width,
        wide=x.wide,
        ROWS=agent_size[0],
        COLUMNS=agent_size[1],
        **second,
    )
    if agent_bias is not None:
        kernel = kernels._agent_bwd_bias_kernel
        x.by_block(kernel, keys, **small_keys, grad_bias=biases[0], AGENTS=x.agents)
    return _results(grads, tuple(b.sum(0) if b.ndim > 1 else b for b in biases), query)


def _results(
    grads: tuple[Tensor, ...], biases: tuple[Tensor, ...], query: Tensor
) -> tuple[Tensor, ...]:
    first, second = (b.to(query.dtype) for b in biases)
    return *grads, first, second.mT if second.ndim > 1 else second


def _shape(query: Any, first: Any) -> tuple[int, ...]:
    """Of all tokens; of tensors or of shapes."""
    images, height, width, heads, head_dim = tuple(getattr(query, "shape", query))
    classes = 0 if first is None else tuple(getattr(first, "shape", first))[1]
    return images, classes + height * width, heads, head_dim


def _fake_forward(query: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    first, agent_size = rest[4], rest[7]
    agents = query.new_empty(query.shape[0], math.prod(agent_size), *query.shape[3:])
    lse = query.new_empty(agents.shape[:3], dtype=torch.float32)
    return query.new_empty(_shape(query, first)), agents, torch.empty_like(agents), lse


def _fake_backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    agent_bias: Tensor | None,
    token_bias: Tensor | None,
    *_: Any,
) -> tuple[Tensor, ...]:
    found = tuple(query.new_empty(grad.shape) for _ in range(3))
    first = query.new_empty(0 if agent_bias is None else agent_bias.shape)
    if token_bias is None:
        return *found, first, query.new_empty(0)
    return *found, first, query.new_empty(token_bias.mT.shape).mT


def _flops(query: Sequence[int], *rest: Any, **_: Any) -> int:
    """Scores and mixing of both attentions; the means are free."""
    return 8 * math.prod(_shape(query, rest[4])) * math.prod(rest[7])


def _flops_backward(grad: Sequence[int], *rest: Any, **_: Any) -> int:
    """As torch counts two calls of scaled_dot_product_attention, of five products each."""
    return 20 * math.prod(grad) * math.prod(rest[11])


_ARGUMENTS = (
    "Tensor query, Tensor key, Tensor value, Tensor? agent_bias, Tensor? token_bias, "
    "Tensor? query_prefix, Tensor? key_prefix, Tensor? value_prefix"
)
_attention_backward = _dispatch.define(
    "agent_attention_triton_backward",
    f"(Tensor grad, {_ARGUMENTS}, Tensor agents, Tensor gathered, Tensor lse, int[2] agent_size, "
    "float scale) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _backward,
    _fake_backward,
    _flops_backward,
)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(*inputs[:8], *output[1:])
    ctx.rest = inputs[8:]
    ctx.set_materialize_grads(False)  # only the first output has a gradient


def _gradient(ctx: Any, grad: Tensor, *_: Any) -> tuple[Any, ...]:
    query, first = ctx.saved_tensors[0], ctx.saved_tensors[5]
    *tokens, agent_bias, token_bias = _attention_backward(grad, *ctx.saved_tensors, *ctx.rest)
    classes = 0 if first is None else first.shape[1]
    maps = (x[:, classes:].unflatten(1, query.shape[1:3]) for x in tokens)
    found = (*maps, agent_bias, token_bias, *(x[:, :classes] for x in tokens))
    wanted = ctx.needs_input_grad[:8]
    return *(x if want else None for x, want in zip(found, wanted, strict=True)), None, None


_attention = _dispatch.define(
    "agent_attention_triton",
    f"({_ARGUMENTS}, int[2] agent_size, float scale) -> (Tensor, Tensor, Tensor, Tensor)",
    _forward,
    _fake_forward,
    _flops,
    _keep,
    _gradient,
)
