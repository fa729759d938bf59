"""The public function of neighborhood attention, and what it accepts."""

from __future__ import annotations

from dataclasses import dataclass

from timm.layers import register_notrace_function
from torch import Tensor

from vitarium.ops import _checks, _select
from vitarium.ops.neighborhood_attn import aten, natten_launch, reference, tiles, triton_launch


@dataclass(frozen=True)
class Call:
    """A validated call: what every implementation gets."""

    query: Tensor
    key: Tensor
    value: Tensor
    kernel_size: tuple[int, int]
    dilation: tuple[int, int]
    bias: Tensor | None
    scale: float
    pad: Tensor | None

    @property
    def padded_size(self) -> tuple[int, int]:
        """(H, W) of the map that the windows live on, after padding at the right and bottom."""
        height, width = self.query.shape[1:3]
        if self.pad is None:
            return height, width
        return tiles.padded_size((height, width), self.kernel_size, self.dilation)


def _prepare(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    kernel_size: int | tuple[int, int],
    dilation: int | tuple[int, int] = 1,
    bias: Tensor | None = None,
    scale: float | None = None,
    pad: Tensor | None = None,
) -> Call:
    _checks.maps(query=query, key=key, value=value)
    kernel, step = _checks.window(kernel_size, dilation)
    heads, head_dim = query.shape[3:]
    bias = _checks.parameter("bias", bias, (heads, 2 * kernel[0] - 1, 2 * kernel[1] - 1), query)
    pad = _checks.parameter("pad", pad, (3, heads, head_dim), query)
    if pad is None:
        _checks.fits(query, kernel, step, " (give pad= to attend on a padded map)")
    if scale is not None and not isinstance(scale, (int, float)):
        raise ValueError(f"scale: expected a number, got {type(scale).__name__}")
    scale = head_dim**-0.5 if scale is None else float(scale)
    return Call(query, key, value, kernel, step, bias, scale, pad)


_op = _select.register(
    _select.Op(
        "neighborhood",
        _prepare,
        {
            "reference": _select.Implementation(
                reference.run, reference.unsupported, _select.on_request
            ),
            "triton": _select.Implementation(
                triton_launch.run, triton_launch.unsupported, triton_launch.reserved
            ),
            "aten": _select.Implementation(aten.run, aten.unsupported, _select.always),
            "natten": _select.Implementation(
                natten_launch.run, natten_launch.unsupported, _select.on_request
            ),
        },
    )
)


@register_notrace_function
def neighborhood_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    kernel_size: int | tuple[int, int],
    dilation: int | tuple[int, int] = 1,
    bias: Tensor | None = None,
    scale: float | None = None,
    pad: Tensor | None = None,
    impl: str | None = None,
) -> Tensor:
    """Attention of every position to the ``kernel_size`` window of keys nearest to it.

    ``out[i] = sum_n softmax_n(scale * q[i] . k[n] + bias[n - i]) v[n]``

    where n runs over exactly ``kh * kw`` neighbors. Per axis, a position belongs to the residue
    class ``i mod dilation``; its window holds ``kernel_size`` consecutive members of that class
    and is centred on it where it can be. At the borders windows shift: they are never cropped
    and never hold padding, so every query sees the same number of keys. Where the dilation does
    not divide the map, classes differ in length and so does the far border's shift.

    Args:
        query: ``[B, H, W, heads, head_dim]``, floating point; any strides.
        key: like ``query``.
        value: like ``query``.
        kernel_size: odd window size in tokens (counted in steps of ``dilation``); an int or
            ``(kh, kw)``.
        dilation: step between neighbors in tokens; an int or ``(dh, dw)``.
        bias: relative position bias ``[heads, 2*kh-1, 2*kw-1]``, indexed by key minus query
            in steps of the dilation, plus ``kernel_size - 1``; added after scaling.
        scale: factor of the dot products; ``head_dim ** -0.5`` if None.
        pad: ``[3, heads, head_dim]``: query, key and value of a padded position. A map smaller
            than ``kernel_size * dilation`` is then padded to it at the bottom and right, the
            padded positions are attended to, and the output is cropped. No effect on axes that
            are large enough.
        impl: ``"reference"``, ``"triton"``, ``"aten"``, ``"natten"`` or ``"auto"``; None leaves
            the choice to `vitarium.ops.use_impl`, the environment variable VITARIUM_OPS and
            ``auto``.

    Returns:
        ``[B, H, W, heads, head_dim]``, contiguous, of query's dtype.

    Raises:
        ValueError: a rank, shape, dtype or device that does not fit, an even kernel, a map
            smaller than ``kernel_size * dilation`` without ``pad``, or a requested
            implementation that cannot run this call.

    Implementations:
        ``reference``: any device, floating dtype and head_dim; computes in float64; gradients
        of everything; the definition of correct.
        ``triton``: CUDA devices of compute capability 8.0 on; float16, bfloat16 and float32
            (sums and softmax in float32), head_dim up to 128; gradients of everything, bias and
            pad included; deterministic; one op to torch.compile and torch.export.
        ``aten``: any device, floating dtype and head_dim; gradients of everything, bias and pad
        included; deterministic; one op to torch.compile, ordinary functions to torch.export.
        ``natten``: the natten package, without bias or pad; what else it refuses is natten's.

    Source:
        Hassani et al., arXiv 2204.07143, eq. 1-3, and arXiv 2209.15001 (dilation); border rule
        of NATTEN 0.14-0.17.
    """
    call = _prepare(query, key, value, kernel_size, dilation, bias, scale, pad)
    return _op(call, impl)


neighborhood_attention.op_name = "neighborhood"
