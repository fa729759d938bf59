"""The public function of channel attention, and what it accepts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from timm.layers import register_notrace_function
from torch import Tensor

from vitarium.ops import _checks, _select
from vitarium.ops.channel_attn import aten, reference, triton_launch


@dataclass(frozen=True)
class Call:
    """A validated call: what every implementation gets."""

    query: Tensor
    key: Tensor
    value: Tensor
    mode: str
    scale: float | None

    @property
    def operands(self) -> tuple[Tensor, Tensor, Tensor]:
        """What gives the scores' rows, what gives their columns, and what is mixed."""
        if self.mode == "florence":
            return self.query, self.key, self.value
        return self.key, self.value, self.query


def _prepare(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mode: Literal["davit", "florence"] = "davit",
    scale: float | None = None,
) -> Call:
    _checks.maps(query=query, key=key, value=value)
    if mode not in ("davit", "florence"):
        raise ValueError(f"mode: expected 'davit' or 'florence', got {mode!r}")
    if scale is not None and not isinstance(scale, (int, float)):
        raise ValueError(f"scale: expected a number, got {type(scale).__name__}")
    if scale is None and mode == "davit":
        scale = query.shape[4] ** -0.5
    return Call(query, key, value, mode, None if scale is None else float(scale))


_op = _select.register(
    _select.Op(
        "channel",
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
def channel_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mode: Literal["davit", "florence"] = "davit",
    scale: float | None = None,
    impl: str | None = None,
) -> Tensor:
    """Attention between the channels of a head, over all positions of the map.

    With Q, K, V ``[H * W, head_dim]`` of one image and head, and the softmax over columns:

    - ``"davit"``: ``out = Q softmax(scale * K^T V)^T``. The values enter the scores and the
      queries are mixed; the scale knows nothing of the number of positions, so that scores grow
      with the map.
    - ``"florence"``: ``out = V softmax(scale * Q^T K)^T``, as in Florence-2.

    Args:
        query: ``[B, H, W, heads, head_dim]``, floating point; any strides.
        key: like ``query``.
        value: like ``query``.
        mode: ``"davit"`` or ``"florence"``.
        scale: factor of the scores; if None, ``head_dim ** -0.5`` for ``"davit"`` and
            ``(H * W) ** -0.5`` for ``"florence"``.
        impl: ``"reference"``, ``"triton"``, ``"aten"`` or ``"auto"``; None leaves the choice to
            `vitarium.ops.use_impl`, the environment variable VITARIUM_OPS and ``auto``.

    Returns:
        ``[B, H, W, heads, head_dim]``, contiguous, of query's dtype.

    Raises:
        ValueError: a rank, shape, dtype or device that does not fit, an unknown mode, or a
            requested implementation that cannot run this call.

    Implementations:
        ``reference``: any device, floating dtype and head_dim; computes in float64; gradients
        of everything; the definition of correct.
        ``triton``: CUDA devices of compute capability 8.0 on; float16, bfloat16 and float32;
        head_dim up to 128; sums in float32, weights in the maps' dtype; gradients of
        everything; deterministic; one op to torch.compile and torch.export. ``auto`` takes it
        wherever it runs, but not while exporting.
        ``aten``: any device, floating dtype and head_dim; half precision computes in float32;
        gradients of everything; deterministic; one op to torch.compile, ordinary functions to
        torch.export.

    Source:
        Ding et al., arXiv 2204.03645, eq. 4, and the authors' code, which takes it apart as above;
        Florence-2, arXiv 2311.06242, by its released code.
    """
    return _op(_prepare(query, key, value, mode, scale), impl)


channel_attention.op_name = "channel"
