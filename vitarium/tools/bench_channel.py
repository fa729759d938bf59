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
        """The output of the projection, with the gradient that it wants: copies count."""
        del biased
        torch.manual_seed(0)
        channels = 3 * self.heads * self.head_dim
        qkv = torch.randn(self.batch, self.height, self.width, channels)
        return {"qkv": qkv.requires_grad_()}

    def oracle(self, inputs: _Inputs) -> Tensor:
        return channel_attention(*self._maps(inputs["qkv"].double()), impl="reference")

    def _maps(self, qkv: Tensor) -> tuple[Tensor, ...]:
        return qkv.unflatten(-1, (3, self.heads, self.head_dim)).unbind(3)

    def candidates(self, biased: bool, backward: bool) -> dict[str, _Candidate | str]:
        del biased, backward
        return {"vitarium": self._ours, "timm": self._timm, "SDPA over channels": self._sdpa}

    def _ours(self, inputs: _Inputs) -> Tensor:
        return channel_attention(*self._maps(inputs["qkv"]))

    def _heads_first(self, inputs: _Inputs) -> tuple[Tensor, ...]:
        qkv = inputs["qkv"].unflatten(-1, (3, self.heads, self.head_dim)).flatten(1, 2)
        return qkv.permute(2, 0, 3, 1, 4).unbind(0)

    def _timm(self, inputs: _Inputs) -> Tensor:
        """As timm's DaViT has it: the scaled keys times the values."""
        query, key, value = self._heads_first(inputs)
        weights = ((key * self.head_dim**-0.5).mT @ value).softmax(-1)
        return self._map(weights @ query.mT)

    def _sdpa(self, inputs: _Inputs) -> Tensor:
        """Channels in the place of tokens."""
        query, key, value = (x.mT for x in self._heads_first(inputs))
        out = F.scaled_dot_product_attention(key, value, query, scale=self.head_dim**-0.5)
        return self._map(out)

    def _map(self, out: Tensor) -> Tensor:
        shape = (self.batch, self.height, self.width, self.heads, self.head_dim)
        return out.permute(0, 3, 1, 2).reshape(shape)


def cases(quick: bool) -> list[Channel]:
    """DaViT-T's four maps at 224 pixels, and its largest at 800 x 1216; the smallest if quick."""
    if quick:
        return [Channel(7, 7, 24)]
    sizes = ((56, 3), (28, 6), (14, 12), (7, 24))
    found = [Channel(size, size, heads) for size, heads in sizes]
    return [*found, Channel(200, 304, 3, batch=1)]
