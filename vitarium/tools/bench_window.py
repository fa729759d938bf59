"""Window attention as one would write it without this package: the benchmark's peers.

All get the projection of a whole map and give a whole map. The peers prepare the mask of a
shifted map and the index of its bias once, as timm's blocks do; what depends on the inputs they
do per call, as ours does.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property

import torch
import torch.nn.functional as F
from timm.models.swin_transformer import get_relative_position_index
from torch import Tensor

from vitarium.ops import window_attention

_Inputs = dict[str, Tensor]
_Candidate = Callable[[_Inputs], Tensor]


@dataclass(frozen=True)
class Window:
    """Windows on maps batch x height x width with heads of head_dim channels."""

    height: int
    width: int
    heads: int
    window_size: int = 7
    shift_size: int = 0
    cosine: bool = False
    goals: dict[str, float] = field(default_factory=dict)
    biases: tuple[bool, ...] = (False, True)
    batch: int = 4
    head_dim: int = 32
    op: str = "window"

    @property
    def title(self) -> str:
        found = f"{self.height}x{self.width} x {self.heads} heads, window {self.window_size}"
        if self.shift_size:
            found += f", shift {self.shift_size}"
        return found + (", cosine" if self.cosine else "")

    def inputs(self, biased: bool) -> _Inputs:
        torch.manual_seed(0)
        shape = (self.batch, self.height, self.width, 3, self.heads, self.head_dim)
        inputs = {"qkv": torch.randn(shape)}
        if biased:
            entries = 2 * self.window_size - 1
            inputs["bias"] = torch.randn(self.heads, entries, entries)
        if self.cosine:
            inputs["logit_scale"] = torch.full((self.heads,), math.log(10))
        return {name: x.requires_grad_() for name, x in inputs.items()}

    def oracle(self, inputs: _Inputs) -> Tensor:
        return self._attend({name: x.double() for name, x in inputs.items()}, "reference")

    def candidates(self, biased: bool, backward: bool) -> dict[str, _Candidate | str]:
        del biased, backward
        return {
            "vitarium": self._attend,
            "windows + matmul + softmax": self._plain,
            "windows + SDPA, float mask": self._fused,
        }

    def _attend(self, inputs: _Inputs, impl: str | None = None) -> Tensor:
        rest = {name: x for name, x in inputs.items() if name != "qkv"}
        maps = inputs["qkv"].unbind(3)
        return window_attention(*maps, self.window_size, self.shift_size, **rest, impl=impl)

    @cached_property
    def _counts(self) -> tuple[int, int]:
        return -(-self.height // self.window_size), -(-self.width // self.window_size)

    @cached_property
    def _entry(self) -> Tensor:
        return get_relative_position_index(self.window_size, self.window_size).flatten()

    @cached_property
    def _mask(self) -> Tensor:
        """0 or -100 for every pair of positions of every window: [windows, 1, L, L]."""
        w, s = self.window_size, self.shift_size
        labels = []
        for count in self._counts:
            label = torch.zeros(count * w)
            label[-w:], label[-s:] = 1, 2
            labels.append(label)
        region = self._cut((3 * labels[0][:, None] + labels[1])[None, :, :, None]).squeeze(-1)
        return torch.where(region[:, None] != region[:, :, None], -100.0, 0.0)[:, None]

    def _cut(self, x: Tensor) -> Tensor:
        """[B, H, W, C] -> [B * windows, L, C]."""
        w = self.window_size
        x = x.unflatten(2, (-1, w)).unflatten(1, (-1, w)).transpose(2, 3)
        return x.flatten(3, 4).flatten(0, 2)

    def _windows(self, qkv: Tensor) -> tuple[Tensor, ...]:
        """Query, key and value [B * windows, heads, L, head_dim]."""
        x = qkv.flatten(3)
        if self.shift_size:
            x = x.roll((-self.shift_size, -self.shift_size), (1, 2))
        below, right = (
            count * self.window_size - size
            for count, size in zip(self._counts, (self.height, self.width), strict=True)
        )
        x = self._cut(F.pad(x, (0, 0, 0, right, 0, below)))
        return x.unflatten(2, (3, self.heads, self.head_dim)).permute(2, 0, 3, 1, 4).unbind(0)

    def _map(self, x: Tensor) -> Tensor:
        """[B * windows, heads, L, head_dim] -> [B, H, W, heads, head_dim]."""
        w = self.window_size
        x = x.transpose(1, 2).flatten(2).unflatten(0, (self.batch, *self._counts))
        x = x.unflatten(3, (w, w)).transpose(2, 3).flatten(3, 4).flatten(1, 2)
        x = x[:, : self.height, : self.width]
        if self.shift_size:
            x = x.roll((self.shift_size, self.shift_size), (1, 2))
        return x.unflatten(3, (self.heads, self.head_dim))

    def _bias(self, inputs: _Inputs) -> Tensor | None:
        """[1, heads, L, L]."""
        if "bias" not in inputs:
            return None
        length = self.window_size**2
        return inputs["bias"].flatten(1)[:, self._entry].view(1, -1, length, length)

    def _scaled(self, query: Tensor, key: Tensor, inputs: _Inputs) -> tuple[Tensor, Tensor]:
        if not self.cosine:
            return query * self.head_dim**-0.5, key
        factor = inputs["logit_scale"].clamp(max=math.log(100)).exp()
        return F.normalize(query, dim=-1) * factor[:, None, None], F.normalize(key, dim=-1)

    def _plain(self, inputs: _Inputs) -> Tensor:
        query, key, value = self._windows(inputs["qkv"])
        query, key = self._scaled(query, key, inputs)
        scores = query @ key.mT
        bias = self._bias(inputs)
        if bias is not None:
            scores = scores + bias
        if self.shift_size:
            masked = scores.unflatten(0, (self.batch, -1)) + self._mask
            scores = masked.flatten(0, 1)
        return self._map(scores.softmax(-1) @ value)

    def _fused(self, inputs: _Inputs) -> Tensor:
        query, key, value = self._windows(inputs["qkv"])
        if self.cosine:
            query, key = self._scaled(query, key, inputs)
        mask = self._bias(inputs)
        if self.shift_size:
            mask = self._mask if mask is None else mask + self._mask
            mask = mask.repeat(self.batch, 1, 1, 1)
        scale = 1.0 if self.cosine else None
        return self._map(F.scaled_dot_product_attention(query, key, value, mask, scale=scale))


def cases(quick: bool) -> list[Window]:
    """Swin's maps at 224 pixels, a padded one, SwinV2's; the smallest if quick.

    The padded map is one of an 800 x 1216 image. Without a shift SDPA of plain windows is what
    ours does too, in less memory: the goals are about the other maps.
    """

    def goals(forward: float, training: float) -> dict[str, float]:
        found = dict.fromkeys(("forward", "forward, bias"), forward)
        return found | {"forward+backward, bias": training}

    smallest = Window(14, 14, 12, shift_size=3, goals=goals(1.2, 0.9))
    if quick:
        return [smallest]
    return [
        Window(56, 56, 3, goals=goals(0.9, 0.85)),
        Window(56, 56, 3, shift_size=3, goals=goals(1.3, 1.0)),
        Window(28, 28, 6, shift_size=3, goals=goals(1.2, 0.9)),
        smallest,
        Window(100, 152, 6, shift_size=3, batch=1, goals=goals(1.5, 1.05)),
        Window(64, 64, 3, 8, 4, cosine=True, goals=goals(1.5, 1.1)),
        Window(64, 64, 3, 16, 8, cosine=True, goals=goals(1.2, 1.05)),
    ]
