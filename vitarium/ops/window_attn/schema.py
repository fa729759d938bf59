"""What all dispatcher ops of window attention share: arguments, shapes, FLOPs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from vitarium.ops.window_attn import windows

ARGUMENTS = (
    "Tensor query, Tensor key, Tensor value, Tensor? bias, Tensor? factor, Tensor? pad, "
    "int[2] window_size, int[2] shift_size, float scale, str semantics"
)
GRADIENTS = "(Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"


def fake_forward(query: Tensor, *_: Any) -> Tensor:
    """Memory for the output."""
    return query.new_empty(query.shape)


def fake_backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None,
    factor: Tensor | None,
    pad: Tensor | None,
    *_: Any,
) -> tuple[Tensor, ...]:
    """Memory for the gradients of all tensors; without elements for None."""
    return tuple(_like(x, query) for x in (query, key, value, bias, factor, pad))


def _like(x: Tensor | None, query: Tensor) -> Tensor:
    return query.new_empty(0) if x is None else query.new_empty(x.shape, dtype=x.dtype)


def flops(query: Sequence[int], *rest: Any, **_: Any) -> int:
    """Scores and mixing."""
    return 2 * _product(query, rest[5:])


def flops_backward(grad: Sequence[int], *rest: Any, **_: Any) -> int:
    """As torch counts scaled_dot_product_attention: five products, the scores once more."""
    return 5 * _product(grad, rest[6:])


def _product(query: Sequence[int], geometry: Sequence[Any]) -> int:
    """FLOPs of real positions with their windows: queries of padding are free."""
    (wh, ww), (sh, sw), _, semantics = geometry
    window, _ = windows.clamped((query[1], query[2]), (wh, ww), (sh, sw), semantics)
    return 2 * math.prod(query) * math.prod(window)
