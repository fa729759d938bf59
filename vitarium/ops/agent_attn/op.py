"""The public function of agent attention, and what it accepts."""

from __future__ import annotations

from dataclasses import dataclass

from timm.layers import register_notrace_function
from torch import Tensor

from vitarium.ops import _checks, _select
from vitarium.ops.agent_attn import aten, reference, triton_launch

_Prefix = tuple[Tensor, Tensor, Tensor]


@dataclass(frozen=True)
class Call:
    """A validated call: what every implementation gets."""

    query: Tensor
    key: Tensor
    value: Tensor
    agent_size: tuple[int, int]
    agent_bias: Tensor | None
    token_bias: Tensor | None
    scale: float
    prefix: _Prefix | None


def _prepare(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    agent_size: int | tuple[int, int],
    agent_bias: Tensor | None = None,
    token_bias: Tensor | None = None,
    scale: float | None = None,
    prefix: _Prefix | None = None,
) -> Call:
    _checks.maps(query=query, key=key, value=value)
    _, height, width, heads, head_dim = query.shape
    size = _checks.pair("agent_size", agent_size)
    tokens = height * width
    if prefix is not None:
        prefix = _checked_prefix(prefix, query)
        tokens = prefix[0].shape[1] + tokens
    agents = size[0] * size[1]
    agent_bias = _checks.parameter("agent_bias", agent_bias, (heads, agents, tokens), query)
    token_bias = _checks.parameter("token_bias", token_bias, (heads, tokens, agents), query)
    if scale is not None and not isinstance(scale, (int, float)):
        raise ValueError(f"scale: expected a number, got {type(scale).__name__}")
    scale = head_dim**-0.5 if scale is None else float(scale)
    return Call(query, key, value, size, agent_bias, token_bias, scale, prefix)


def _checked_prefix(prefix: object, query: Tensor) -> _Prefix:
    if not isinstance(prefix, (tuple, list)) or len(prefix) != 3:
        raise ValueError(
            f"prefix: expected query, key and value of the class tokens, got "
            f"{len(prefix) if isinstance(prefix, (tuple, list)) else type(prefix).__name__}"
        )
    batch, _, _, heads, head_dim = query.shape
    for i, x in enumerate(prefix):
        name = f"prefix[{i}]"
        _checks.floating(name, x)
        if x.ndim != 4 or x.shape != (batch, prefix[0].shape[1], heads, head_dim) or not x.shape[1]:
            raise ValueError(
                f"{name}: expected [B, P, heads, head_dim] = [{batch}, P, {heads}, {head_dim}] "
                f"with one P >= 1, got shape {tuple(x.shape)}"
            )
        _checks.same_kind(name, x, "query", query)
    return prefix[0], prefix[1], prefix[2]


_op = _select.register(
    _select.Op(
        "agent",
        _prepare,
        {
            "reference": _select.Implementation(
                reference.run, reference.unsupported, _select.on_request
            ),
            "triton": _select.Implementation(
                triton_launch.run, triton_launch.unsupported, triton_launch.reserved
            ),
            "aten": _select.Implementation(aten.run, aten.unsupported, _select.always),
        },
    )
)


@register_notrace_function
def agent_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    agent_size: int | tuple[int, int],
    agent_bias: Tensor | None = None,
    token_bias: Tensor | None = None,
    scale: float | None = None,
    prefix: tuple[Tensor, Tensor, Tensor] | None = None,
    impl: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention through agents: they gather from all tokens, then every token reads from them.

    ``a = pool(q); u = softmax(scale * a k^T + agent_bias) v;
    out = softmax(scale * q a^T + token_bias) u``

    The agents are means of the query map over an ``agent_size`` grid of bins, as adaptive average
    pooling has them: bin i of n over L rows holds rows floor(i L / n) to ceil((i + 1) L / n) - 1;
    a grid may be finer than the map. Agents and map positions are counted row by row. Cost grows
    linearly with the map.

    Args:
        query: ``[B, H, W, heads, head_dim]``, floating point; any strides.
        key: like ``query``.
        value: like ``query``.
        agent_size: rows and columns of agents, an int or ``(rows, columns)``; n = rows * columns.
        agent_bias: ``[heads, n, P + H * W]``, added to the agents' scaled scores.
        token_bias: ``[heads, P + H * W, n]``, added to the tokens' scaled scores.
        scale: factor of the dot products; ``head_dim ** -0.5`` if None.
        prefix: query, key and value ``[B, P, heads, head_dim]`` of class tokens, which stand
            before the map. They are keys and queries like its positions; no agent is pooled
            from them.
        impl: ``"reference"``, ``"triton"``, ``"aten"`` or ``"auto"``; None leaves the choice to
            `vitarium.ops.use_impl`, the environment variable VITARIUM_OPS and ``auto``.

    Returns:
        ``[B, H, W, heads, head_dim]`` of query's dtype; with a ``prefix``, a pair: its tokens
        ``[B, P, heads, head_dim]`` and that map.

    Raises:
        ValueError: a rank, shape, dtype or device that does not fit, no positive number of
            agents, or a requested implementation that cannot run this call.

    Implementations:
        ``reference``: any device, floating dtype and head_dim; computes in float64; gradients
        of everything; the definition of correct.
        ``triton``: CUDA devices of compute capability 8.0 on; float16, bfloat16 and float32;
        head_dim up to 128; up to 256 agents, and 16 KiB for those of a head (powers of two: 128
        of head_dim 64 in half precision); sums in float32, weights in the maps' dtype;
        gradients of everything, biases included; deterministic; one op to torch.compile and
        torch.export. ``auto`` takes it wherever it runs, but not while exporting.
        ``aten``: any device, floating dtype and head_dim; gradients of everything, biases
        included; deterministic; one op to torch.compile, ordinary functions to torch.export.

    Source:
        Han et al., arXiv 2312.08874, eq. 4-6, without the depthwise term, which needs the map
        and no agents; authors' agent_transformer/models/agent_swin.py and agent_deit.py.
    """
    call = _prepare(query, key, value, agent_size, agent_bias, token_bias, scale, prefix)
    out = _op(call, impl)
    if prefix is None:
        return out.view(query.shape)
    count = prefix[0].shape[1]
    classes, tokens = out.split([count, out.shape[1] - count], 1)
    return classes, tokens.view(query.shape)


agent_attention.op_name = "agent"
