"""Agent attention in ordinary torch functions, fast on a CPU.

Agents gather by fused attention: few queries, long rows of keys. Tokens read from the agents by
fused attention too, unless these are so few that its kernel cannot fill a vector with keys: then
scores stand transposed, one row of tokens per agent. Training keeps no weights: the backward pass
computes them again, image by image, since a bias that needs a gradient would send fused attention
to a path that keeps all of them. All this is one op of the dispatcher; exported programs hold
ordinary functions.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vitarium.ops import _dispatch, _select

if TYPE_CHECKING:
    from vitarium.ops.agent_attn.op import Call

_FEW = 16  # agents; measured, float32 on AVX-512
_CHUNK = 1 << 16  # scores; measured: groups of larger maps only cost copies


def unsupported(call: Call) -> str | None:
    """None: runs everywhere."""
    return None


def run(call: Call) -> Tensor:
    """[B, P + H * W, heads, head_dim], class tokens first."""
    query, key, value = (x.flatten(1, 2) for x in (call.query, call.key, call.value))
    if call.prefix is not None:
        tokens = zip(call.prefix, (query, key, value), strict=True)
        query, key, value = (torch.cat(pair, 1) for pair in tokens)
    attend: Callable[..., Tensor] = _fused if _select.is_exporting() else _attention
    biases, sizes = (call.agent_bias, call.token_bias), (call.query.shape[1:3], call.agent_size)
    return attend(query, key, value, *biases, *sizes, call.scale)


def _agents(query: Tensor, size: Sequence[int], agent_size: Sequence[int]) -> Tensor:
    """Means of the map's queries [B, P + H * W, heads, head_dim]: [B, heads, n, head_dim]."""
    (height, width), (rows, columns) = size, agent_size
    x = query[:, query.shape[1] - height * width :].flatten(2).unflatten(1, (height, width))
    x = F.adaptive_avg_pool2d(x.permute(0, 3, 1, 2), (rows, columns))
    return x.unflatten(1, query.shape[2:]).flatten(3).mT


def _attend(query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, scale: float) -> Tensor:
    mask = None if bias is None else bias[None]
    return F.scaled_dot_product_attention(query, key, value, mask, scale=scale)


def _fused(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    agent_bias: Tensor | None,
    token_bias: Tensor | None,
    size: Sequence[int],
    agent_size: Sequence[int],
    scale: float,
) -> Tensor:
    agents = _agents(query, size, agent_size)
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    gathered = _attend(agents, k, v, agent_bias, scale)
    return _attend(q, agents, gathered, token_bias, scale).transpose(1, 2)


# The eager computation.


def _groups(query: Tensor, agents: int) -> list[slice]:
    """Images that are computed at a time, so that their scores stay in cache where they can."""
    images = max(1, _CHUNK // (query.shape[2] * agents * query.shape[1]))
    return [slice(i, i + images) for i in range(0, len(query), images)]


def _heads(x: Tensor, dtype: torch.dtype) -> Tensor:
    """[images, N, heads, head_dim] -> [images * heads, N, head_dim]; of one image a view."""
    return x.transpose(1, 2).flatten(0, 1).to(dtype)


def _scores(agents: Tensor, tokens: Tensor, bias: Tensor | None) -> Tensor:
    """[images * heads, n, N], without the scale."""
    scores = torch.bmm(agents, tokens.mT)
    if bias is not None:
        scores.view(-1, *bias.shape).add_(bias)
    return scores


def _forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    agent_bias: Tensor | None,
    token_bias: Tensor | None,
    size: list[int],
    agent_size: list[int],
    scale: float,
) -> Tensor:
    biases: Any = (None if x is None else x.detach() for x in (agent_bias, token_bias))
    agent_bias, token_bias = biases  # fused attention keeps weights where a mask needs a gradient
    count = math.prod(agent_size)
    if count >= _FEW:
        fused = (agent_bias, token_bias, size, agent_size, scale)
        return _fused(query, key, value, *fused).contiguous()
    out = torch.empty_like(query, memory_format=torch.contiguous_format)
    exact = torch.promote_types(query.dtype, torch.float32)
    agents = _agents(query, size, agent_size)
    gathered = _attend(agents, key.transpose(1, 2), value.transpose(1, 2), agent_bias, scale)
    agents = agents.to(exact) * scale
    bias = None if token_bias is None else token_bias.mT
    for part in _groups(query, count):
        a, u = (x[part].flatten(0, 1) for x in (agents, gathered.to(exact)))
        read = _scores(a, _heads(query[part], exact), bias).softmax(-2)
        o = out[part].transpose(1, 2)
        o.copy_(torch.bmm(read.mT, u).view(o.shape))
    return out


def _backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    agent_bias: Tensor | None,
    token_bias: Tensor | None,
    size: list[int],
    agent_size: list[int],
    scale: float,
) -> tuple[Tensor, ...]:
    """Gradients of query, key, value and the biases; half precision accumulates in float32.

    Weights are computed again. The gradient of what is None has no elements.
    """
    exact = torch.promote_types(query.dtype, torch.float32)
    bias1 = None if agent_bias is None else agent_bias.to(exact)
    bias2 = None if token_bias is None else token_bias.to(exact).mT
    sum1, sum2 = (query.new_zeros(0 if x is None else x.shape, dtype=exact) for x in (bias1, bias2))
    agents = _agents(query, size, agent_size).to(exact) * scale
    grad_agents = torch.empty_like(agents)
    maps = (query, key, value)
    found = [x.new_empty(x.transpose(1, 2).shape) for x in maps]  # as products leave them
    for part in _groups(query, math.prod(agent_size)):
        a = agents[part].flatten(0, 1)
        q, k, v, g = (_heads(x[part], exact) for x in (*maps, grad))
        gather = _scores(a, k, bias1).softmax(-1)
        read = _scores(a, q, bias2).softmax(-2)
        gathered, grad_gathered = torch.bmm(gather, v), torch.bmm(read, g)
        grad_v = torch.bmm(gather.mT, grad_gathered)
        scores = torch.bmm(grad_gathered, v.mT)
        scores = torch._softmax_backward_data(scores, gather, -1, exact)
        grad_k, grad_a = torch.bmm(scores.mT, a), torch.bmm(scores, k)
        if bias1 is not None:
            _add_images(sum1, scores)
        scores = torch.bmm(gathered, g.mT)
        scores = torch._softmax_backward_data(scores, read, -2, exact)
        grad_q, grad_a = torch.bmm(scores.mT, a), grad_a.baddbmm_(scores, q)
        if bias2 is not None:
            _add_images(sum2, scores)
        grad_agents[part] = grad_a.view(grad_agents[part].shape)
        for x, y in zip(found, (grad_q, grad_k, grad_v), strict=True):
            x[part] = y.view(x[part].shape)
    found = [x.transpose(1, 2) for x in found]
    positions = found[0][:, query.shape[1] - math.prod(size) :]
    positions += _spread(grad_agents * scale, size, agent_size)
    sum1, sum2 = sum1.to(query.dtype), sum2.to(query.dtype)
    return *found, sum1, sum2 if bias2 is None else sum2.mT


def _add_images(total: Tensor, scores: Tensor) -> None:
    for image in scores.view(-1, *total.shape):
        total += image


def _spread(grad: Tensor, size: Sequence[int], agent_size: Sequence[int]) -> Tensor:
    """Gradient of `_agents`, [B, H * W, heads, head_dim].

    Two products: that of adaptive pooling is not deterministic on every device.
    """
    (height, width), (rows, columns) = size, agent_size
    x = grad.transpose(1, 2).flatten(2).unflatten(1, (rows, columns)).flatten(2)
    x = torch.matmul(_averages(height, rows, x.dtype, x.device).T, x)
    x = x.unflatten(2, (columns, -1))
    x = torch.matmul(_averages(width, columns, x.dtype, x.device).T, x)  # [B, H, W, C]
    return x.flatten(1, 2).unflatten(2, (grad.shape[1], grad.shape[3]))


@lru_cache(maxsize=64)
@torch.inference_mode(False)
def _averages(length: int, count: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """[count, length]: what each position of an axis contributes to each mean."""
    return F.adaptive_avg_pool1d(torch.eye(length, dtype=dtype, device=device), count).T


def _fake_forward(query: Tensor, *_: Any) -> Tensor:
    return query.new_empty(query.shape)


def _fake_backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    agent_bias: Tensor | None,
    token_bias: Tensor | None,
    *_: Any,
) -> tuple[Tensor, ...]:
    shapes = (x.transpose(1, 2).shape for x in (query, key, value))
    found = (query.new_empty(shape).transpose(1, 2) for shape in shapes)
    grad_bias = query.new_empty(0 if agent_bias is None else agent_bias.shape)
    if token_bias is None:
        return *found, grad_bias, query.new_empty(0)
    return *found, grad_bias, query.new_empty(token_bias.mT.shape).mT


def _flops(query: Sequence[int], *rest: Any, **_: Any) -> int:
    """Scores and mixing of both attentions; the means are free, as in adaptive pooling."""
    agent_size = rest[5]
    return 8 * math.prod(query) * math.prod(agent_size)


def _flops_backward(grad: Sequence[int], *rest: Any, **_: Any) -> int:
    """As torch counts two calls of scaled_dot_product_attention, of five products each."""
    return 20 * math.prod(grad) * math.prod(rest[6])


_ARGUMENTS = (
    "Tensor query, Tensor key, Tensor value, Tensor? agent_bias, Tensor? token_bias, "
    "SymInt[2] size, int[2] agent_size, float scale"
)
_attention_backward = _dispatch.define(
    "agent_attention_aten_backward",
    f"(Tensor grad, {_ARGUMENTS}) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _backward,
    _fake_backward,
    _flops_backward,
)


_attention = _dispatch.define(
    "agent_attention_aten",
    f"({_ARGUMENTS}) -> Tensor",
    _forward,
    _fake_forward,
    _flops,
    *_dispatch.from_inputs(_attention_backward, 5),
)
