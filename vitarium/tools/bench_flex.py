"""FlexAttention, where the benchmark's peers call it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from vitarium.tools.bench_case import Inputs

ScoreMod = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]


def given(inputs: Inputs) -> Inputs:
    """Inputs as Flex takes them: on a CPU it has no backward pass and refuses to begin one."""
    return {name: x.detach() if x.device.type == "cpu" else x for name, x in inputs.items()}


def attend(
    maps: Sequence[Tensor], score_mod: ScoreMod | None = None, scale: float | None = None
) -> Tensor:
    """Query, key and value [B, heads, tokens, head_dim] -> the same.

    For functions that are compiled as a whole, so that changes of layout are compiled with it.
    """
    from torch.nn.attention.flex_attention import flex_attention

    query, key, value = maps
    out: Any = flex_attention(query, key, value, score_mod=score_mod, scale=scale)
    found: Tensor = out
    return found


def added(bias: Tensor | None) -> ScoreMod | None:
    """What adds a bias [heads, queries, keys] to the scores."""
    if bias is None:
        return None

    def score_mod(score: Tensor, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        del b
        return score + bias[h, q, k]

    return score_mod
