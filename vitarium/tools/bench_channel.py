"""Channel attention as one would write it without this package: the benchmark's peers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from vitarium.ops import channel_attention

_Inputs = dict[str, Tensor]
_Candidate = Callable[[_Inputs], Tensor]


@dataclass(frozen=True)
class Channel:
    """DaViT's channel attention on maps batch x height x width."""

    height: int
    width: int
    heads: int
    batch: int = 8
    head_dim: int = 32
    goals: dict[str, float] = field(
        default_factory=lambda: dict.fromkeys(("forward", "forward+backward"), 1.0)
    )
    op: str = "channel"
    biases: tuple[bool, ...] = (False,)

    @property
    def title(self) -> str:
        return f"{self.height}x{self.width} x {self.heads} heads, batch {self.batch}"

    def inputs(self, biased: bool) -> _Inputs:
        del biased
        torch.manual_seed(0)
        shape = (self.batch, self.height, self.width, 3, self.heads, self.head_dim)
        # strided like a model's: three views of one projection
        qkv = torch.randn(shape).unbind(3)
        names = ("query", "key", "value")
        return {n: x.detach().requires_grad_() for n, x in zip(names, qkv, strict=True)}

    def oracle(self, inputs: _Inputs) -> Tensor:
        return channel_attention(**{n: x.double() for n, x in inputs.items()}, impl="reference")

    def candidates(self, biased: bool, backward: bool) -> dict[str, _Candidate | str]:
        del biased, backward
        return {"vitarium": self._ours, "timm": self._timm, "SDPA over channels": self._sdpa}

    def _ours(self, inputs: _Inputs) -> Tensor:
        return channel_attention(**inputs)

    def _timm(self, inputs: _Inputs) -> Tensor:
        """As timm's DaViT has it: heads first, the scaled keys times the values."""
        query, key, value = (x.flatten(1, 2).transpose(1, 2) for x in inputs.values())
        weights = ((key * self.head_dim**-0.5).mT @ value).softmax(-1)
        out = (weights @ query.mT).mT
        return out.transpose(1, 2).reshape(inputs["query"].shape)

    def _sdpa(self, inputs: _Inputs) -> Tensor:
        """Channels in the place of tokens."""
        query, key, value = (x.flatten(1, 2).permute(0, 2, 3, 1) for x in inputs.values())
        out = F.scaled_dot_product_attention(key, value, query, scale=self.head_dim**-0.5)
        return out.permute(0, 3, 1, 2).reshape(inputs["query"].shape)


def cases(quick: bool) -> list[Channel]:
    """DaViT-T's four maps at 224 pixels, and its largest at 800 x 1216; the smallest if quick."""
    if quick:
        return [Channel(7, 7, 24)]
    sizes = ((56, 3), (28, 6), (14, 12), (7, 24))
    found = [Channel(size, size, heads) for size, heads in sizes]
    return [*found, Channel(200, 304, 3, batch=1)]
