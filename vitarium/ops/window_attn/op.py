"""The public function of window attention, and what it accepts."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from timm.layers import register_notrace_function
from torch import Tensor

from vitarium.ops import _checks, _select
from vitarium.ops.window_attn import aten, reference, triton_launch, windows

Window = int | tuple[int | None, int | None]


@dataclass(frozen=True)
class Call:
    """A validated call: what every implementation gets."""

    query: Tensor
    key: Tensor
    value: Tensor
    window_size: tuple[int, int]  # 0 for the whole axis
    shift_size: tuple[int, int]
    bias: Tensor | None
    scale: float
    factor: Tensor | None
    pad: Tensor | None
    semantics: str


def _prepare(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    window_size: Window,
    shift_size: int | tuple[int, int] = 0,
    bias: Tensor | None = None,
    scale: float | None = None,
    logit_scale: Tensor | None = None,
    pad: Tensor | None = None,
    semantics: str = "timm",
) -> Call:
    _checks.maps(query=query, key=key, value=value)
    if semantics not in windows.SEMANTICS:
        raise ValueError(
            f"semantics: expected one of {', '.join(windows.SEMANTICS)}, got {semantics!r}"
        )
    window = _window(window_size, semantics, bias is not None)
    shift = _shift(shift_size, window)
    heads, head_dim = query.shape[3:]
    bias = _exact("bias", bias, (heads, 2 * window[0] - 1, 2 * window[1] - 1), query)
    pad = _checks.parameter("pad", pad, (3, heads, head_dim), query)
    logit_scale = _exact("logit_scale", logit_scale, (heads,), query)
    if scale is not None and not isinstance(scale, (int, float)):
        raise ValueError(f"scale: expected a number, got {type(scale).__name__}")
    if scale is not None and logit_scale is not None:
        raise ValueError("scale: expected None beside logit_scale, which takes its place")
    if semantics == "authors":
        windows.divides((query.shape[1], query.shape[2]), window)
    factor = None
    if logit_scale is not None:
        factor = logit_scale.clamp(max=_limit(semantics)).exp()
    scale = head_dim**-0.5 if scale is None else float(scale)
    return Call(query, key, value, window, shift, bias, scale, factor, pad, semantics)


def _window(value: Window, semantics: str, biased: bool) -> tuple[int, int]:
    """Demand sizes that bias and semantics allow; returned as two, 0 for the whole axis."""
    found = value if isinstance(value, (tuple, list)) else (value, value)
    sizes = _checks.pair("window_size", tuple(1 if n is None else n for n in found))
    if None not in found:
        if semantics == "authors_padded" and sizes[0] != sizes[1]:
            raise ValueError(
                f"window_size: expected a square with semantics={semantics!r}, got {value!r}"
            )
        return sizes
    if biased or semantics.startswith("authors"):
        raise ValueError(
            f"window_size: expected numbers beside a bias or the authors' semantics, got {value!r}"
        )
    return 0 if found[0] is None else sizes[0], 0 if found[1] is None else sizes[1]


def _exact(name: str, x: Tensor | None, shape: tuple[int, ...], query: Tensor) -> Tensor | None:
    """Demand an optional parameter; half precision takes it in float32, unrounded."""
    if x is None:
        return None
    _checks.parameter(name, x, shape, query)
    return x.to(torch.float64 if query.dtype == torch.float64 else torch.float32)


def _shift(value: int | tuple[int, int], window: tuple[int, int]) -> tuple[int, int]:
    """Demand shifts from 0 on, smaller than the window; returned as two."""
    found = (value, value) if isinstance(value, int) else value
    if (
        not isinstance(found, (tuple, list))
        or len(found) != 2
        or not all(isinstance(n, int) and not isinstance(n, bool) for n in found)
        or not all(0 <= n < max(size, 1) for n, size in zip(found, window, strict=True))
    ):
        raise ValueError(
            f"shift_size: expected an int or a pair of them, from 0 to below window_size "
            f"{window}, got {value!r}"
        )
    return found[0], found[1]


def _limit(semantics: str) -> float:
    """The largest logit scale: log 100, which SwinV2's authors round to float32."""
    if semantics.startswith("timm"):
        return math.log(100)
    return 4.605170249938965


_op = _select.register(
    _select.Op(
        "window",
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
def window_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    window_size: Window,
    shift_size: int | tuple[int, int] = 0,
    bias: Tensor | None = None,
    scale: float | None = None,
    logit_scale: Tensor | None = None,
    pad: Tensor | None = None,
    semantics: str = "timm",
    impl: str | None = None,
) -> Tensor:
    """Attention among the positions of each window; windows cut the map without overlap.

    ``out[i] = sum_j softmax_j(scale * q[i] . k[j] + bias[i - j] + mask[i, j]) v[j]``

    where j runs over i's window. With a shift the map is rolled by ``-shift_size`` first and
    the result is rolled back; mask is -100 between positions that only rolling made neighbors,
    else 0. Where windows do not divide the map, it is padded at the bottom and right; padded
    positions are ordinary keys.

    Args:
        query: ``[B, H, W, heads, head_dim]``, floating point; any strides. Fastest where query,
            key and value are views of one projection, ``qkv.unbind(3)``.
        key: like ``query``.
        value: like ``query``.
        window_size: window in tokens, an int or ``(wh, ww)``; None in the place of one of the
            two for as many tokens as the map has on that axis.
        shift_size: shift in tokens, below ``window_size``, an int or ``(sh, sw)``.
        bias: relative position bias ``[heads, 2*wh-1, 2*ww-1]``, indexed by query minus key
            plus ``window_size - 1``; where a window is clamped, its middle applies.
        scale: factor of the dot products; ``head_dim ** -0.5`` if None.
        logit_scale: ``[heads]``: SwinV2's cosine form. Query and key are divided by their
            norms, and ``exp(min(logit_scale, log 100))`` is the factor.
        pad: ``[3, heads, head_dim]``: query, key and value of a padded position; zeros if None.
        semantics: what happens on maps that windows do not divide or that are not larger than
            one. ``"timm"``: on each axis where the map is not larger than the window, the window
            is clamped to it and the shift is 0; the map is rolled, then padded.
            ``"timm_fixed"``: the same without clamping, as blocks of timm do that were built for
            another size or with ``always_partition``. ``"authors"``: where the map's shorter side
            is not longer than the window's, windows are squares of that side, and both shifts are
            0; nothing is padded (the authors' classifiers). ``"dense"``: nothing is clamped; the
            map is padded, then rolled (their detectors). ``"authors_padded"``, for square
            windows: clamped as ``"authors"``, then as ``"dense"``: what ``"authors"`` is where
            windows divide the map, and works on every map.
        impl: ``"reference"``, ``"triton"``, ``"aten"`` or ``"auto"``; None leaves the choice to
            `vitarium.ops.use_impl`, the environment variable VITARIUM_OPS and ``auto``.

    Returns:
        ``[B, H, W, heads, head_dim]``, contiguous, of query's dtype.

    Raises:
        ValueError: a rank, shape, dtype or device that does not fit, a shift that is not below
            the window, a scale beside a logit_scale, unknown semantics, a map that the authors'
            windows do not divide, or a requested implementation that cannot run this call.

    Implementations:
        ``reference``: any device, floating dtype and head_dim; computes in float64; gradients
        of everything; the definition of correct.
        ``triton``: CUDA devices of compute capability 8.0 or later; float16, bfloat16, float32;
        head_dim up to 128; gradients of everything, bias, logit_scale and pad included;
        deterministic; one op to torch.compile. Reads and writes every map once where windows
        have up to 64 positions.
        ``aten``: any device, floating dtype and head_dim; gradients of everything, bias,
        logit_scale and pad included; deterministic; one op to torch.compile, ordinary functions
        to torch.export.

    Source:
        Liu et al., arXiv 2103.14030, section 3.2, and arXiv 2111.09883, section 3.3.
    """
    call = _prepare(
        query, key, value, window_size, shift_size, bias, scale, logit_scale, pad, semantics
    )
    return _op(call, impl)


window_attention.op_name = "window"
