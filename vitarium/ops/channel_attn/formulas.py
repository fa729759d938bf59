"""What all implementations of channel attention agree on."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from torch import Tensor


def factor(left: Tensor, scale: float | None) -> float:
    """The scale, which by default knows the number of positions of a map [B, H, W, ...]."""
    return float((left.shape[1] * left.shape[2]) ** -0.5) if scale is None else scale


def flops(left: Sequence[int], *_: Any, **__: Any) -> int:
    """Scores and mixing."""
    return 4 * math.prod(left) * left[-1]


def flops_backward(grad: Sequence[int], *_: Any, **__: Any) -> int:
    """Two products for each of them: the weights are kept."""
    return 8 * math.prod(grad) * grad[-1]
