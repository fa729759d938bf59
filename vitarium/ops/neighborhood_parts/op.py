"""The public functions of neighborhood attention's two products, and what they accept."""

from __future__ import annotations

from dataclasses import dataclass

from timm.layers import register_notrace_function
from torch import Tensor

from vitarium.ops import _checks, _select
from vitarium.ops.neighborhood_parts import aten, reference


@dataclass(frozen=True)
class ScoresCall:
    """A validated call of `neighborhood_scores`."""

    query: Tensor
    key: Tensor
    kernel_size: tuple[int, int]
    dilation: tuple[int, int]
    bias: Tensor | None


@dataclass(frozen=True)
class MixCall:
    """A validated call of `neighborhood_mix`."""

    weights: Tensor
    value: Tensor
    kernel_size: tuple[int, int]
    dilation: tuple[int, int]


def _prepare_scores(
    query: Tensor,
    key: Tensor,
    kernel_size: int | tuple[int, int],
    dilation: int | tuple[int, int] = 1,
    bias: Tensor | None = None,
) -> ScoresCall:
    _checks.maps(query=query, key=key)
    kernel, step = _checks.window(kernel_size, dilation)
    shape = (query.shape[3], 2 * kernel[0] - 1, 2 * kernel[1] - 1)
    bias = _checks.parameter("bias", bias, shape, query)
    _checks.fits(query, kernel, step)
    return ScoresCall(query, key, kernel, step, bias)


def _prepare_mix(
    weights: Tensor,
    value: Tensor,
    kernel_size: int | tuple[int, int],
    dilation: int | tuple[int, int] = 1,
) -> MixCall:
    _checks.maps(value=value)
    kernel, step = _checks.window(kernel_size, dilation)
    _checks.floating("weights", weights)
    shape = (*value.shape[:4], kernel[0] * kernel[1])
    if tuple(weights.shape) != shape:
        raise ValueError(
            f"weights: expected shape [B, H, W, heads, kh * kw] = {shape}, got "
            f"{tuple(weights.shape)}"
        )
    _checks.same_kind("weights", weights, "value", value)
    _checks.fits(value, kernel, step)
    return MixCall(weights, value, kernel, step)


_scores = _select.register(
    _select.Op(
        "neighborhood_scores",
        _prepare_scores,
        {
            "reference": _select.Implementation(
                reference.scores, reference.unsupported, _select.on_request
            ),
            "aten": _select.Implementation(aten.scores, aten.unsupported, _select.always),
        },
    )
)
_mix = _select.register(
    _select.Op(
        "neighborhood_mix",
        _prepare_mix,
        {
            "reference": _select.Implementation(
                reference.mix, reference.unsupported, _select.on_request
            ),
            "aten": _select.Implementation(aten.mix, aten.unsupported, _select.always),
        },
    )
)


@register_notrace_function
def neighborhood_scores(
    query: Tensor,
    key: Tensor,
    kernel_size: int | tuple[int, int],
    dilation: int | tuple[int, int] = 1,
    bias: Tensor | None = None,
    impl: str | None = None,
) -> Tensor:
    """Dot products of every query with the keys of its window: no scale, no softmax.

    ``out[i, a * kw + b] = q[i] . k[n(i, a, b)] + bias[n(i, a, b) - i]``

    where n(i, a, b) is the key in row a, from the top, and column b, from the left, of i's
    window: the windows of `neighborhood_attention`, which at the borders shift.

    Args:
        query: ``[B, H, W, heads, head_dim]``, floating point; any strides.
        key: like ``query``.
        kernel_size: odd window size in tokens (counted in steps of ``dilation``); an int or
            ``(kh, kw)``.
        dilation: step between neighbors in tokens; an int or ``(dh, dw)``.
        bias: relative position bias ``[heads, 2*kh-1, 2*kw-1]``, indexed by key minus query
            in steps of the dilation, plus ``kernel_size - 1``.
        impl: ``"reference"``, ``"aten"`` or ``"auto"``; None leaves the choice to
            `vitarium.ops.use_impl`, the environment variable VITARIUM_OPS and ``auto``.

    Returns:
        ``[B, H, W, heads, kh * kw]``, contiguous, of query's dtype.

    Raises:
        ValueError: a rank, shape, dtype or device that does not fit, an even kernel, a map
            smaller than ``kernel_size * dilation``, or a requested implementation that cannot
            run this call.

    Implementations:
        ``reference``: any device, floating dtype and head_dim; computes in float64; the
        definition of correct.
        ``aten``: any device, floating dtype and head_dim; half precision accumulates in
        float32; gradients of everything and of every order; deterministic on a CPU;
        one op to torch.compile, ordinary functions to torch.export.

    Source:
        The QK operation of NATTEN up to 0.17 (``natten.functional.na2d_qk``), heads last.
    """
    return _scores(_prepare_scores(query, key, kernel_size, dilation, bias), impl)


@register_notrace_function
def neighborhood_mix(
    weights: Tensor,
    value: Tensor,
    kernel_size: int | tuple[int, int],
    dilation: int | tuple[int, int] = 1,
    impl: str | None = None,
) -> Tensor:
    """Sum of the values in every position's window, with weights of its own.

    ``out[i] = sum_{a, b} weights[i, a * kw + b] v[n(i, a, b)]``

    with n as in `neighborhood_scores`. Weights are used as they are: a softmax over the last
    axis of scaled scores gives neighborhood attention, weights that a network predicts give a
    dynamic convolution whose windows shift at the borders.

    Args:
        weights: ``[B, H, W, heads, kh * kw]``, floating point; any strides.
        value: ``[B, H, W, heads, head_dim]``, of weights' dtype; any strides.
        kernel_size: odd window size in tokens (counted in steps of ``dilation``); an int or
            ``(kh, kw)``.
        dilation: step between neighbors in tokens; an int or ``(dh, dw)``.
        impl: ``"reference"``, ``"aten"`` or ``"auto"``; None leaves the choice to
            `vitarium.ops.use_impl`, the environment variable VITARIUM_OPS and ``auto``.

    Returns:
        ``[B, H, W, heads, head_dim]``, contiguous, of value's dtype.

    Raises:
        ValueError: a rank, shape, dtype or device that does not fit, an even kernel, a map
            smaller than ``kernel_size * dilation``, or a requested implementation that cannot
            run this call.

    Implementations:
        As those of `neighborhood_scores`.

    Source:
        The AV operation of NATTEN up to 0.17 (``natten.functional.na2d_av``), heads last.
    """
    return _mix(_prepare_mix(weights, value, kernel_size, dilation), impl)


neighborhood_scores.op_name = "neighborhood_scores"
neighborhood_mix.op_name = "neighborhood_mix"
