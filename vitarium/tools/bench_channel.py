"""Channel attention as one would write it without this package: the benchmark's peers."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from timm.models import davit
from torch import Tensor, nn
from torch.func import functional_call

from vitarium.tools import bench_case
from vitarium.tools.bench_case import Candidate, Compile, Inputs, OpCase


@dataclass(frozen=True)
class Channel(OpCase):
    """DaViT's channel attention on maps batch x height x width."""

    height: int
    width: int
    heads: int
    batch: int = 8
    head_dim: int = 32
    goals: dict[str, float] = field(
        default_factory=lambda: dict.fromkeys(("forward", "forward+backward"), 1.0)
    )
    biases: tuple[bool, ...] = (False,)
    op: ClassVar[str] = "channel"

    @property
    def title(self) -> str:
        return f"{self.height}x{self.width} x {self.heads} heads"

    def inputs(self, biased: bool) -> Inputs:
        """The output of the projection, with the gradient that it wants: copies count."""
        del biased
        torch.manual_seed(0)
        channels = 3 * self.heads * self.head_dim
        qkv = self.random(self.batch, self.height, self.width, channels)
        return {"qkv": qkv.requires_grad_()}

    def arguments(self, inputs: Inputs) -> dict[str, Any]:
        maps = inputs["qkv"].unflatten(-1, (3, self.heads, self.head_dim)).unbind(3)
        return dict(bench_case.named(maps))

    def candidates(self, biased: bool, backward: bool) -> dict[str, Candidate | str]:
        del biased, backward
        return {"vitarium": self.ours, "timm": self._timm, "SDPA over channels": self._sdpa}

    def peers(self, biased: bool, backward: bool, compiled: Compile) -> dict[str, Candidate | str]:
        del biased, backward
        tokens = self.height * self.width
        _ = self._timms  # the compiler cannot see into cached properties
        return {
            "timm": self._timm,
            "timm, compiled": compiled(self._timm),
            "SDPA over channels": self._sdpa,
            "SDPA over channels, compiled": compiled(self._sdpa),
            "FlexAttention, compiled": f"takes no head_dim of H * W = {tokens}",
        }

    def _heads_first(self, inputs: Inputs) -> tuple[Tensor, ...]:
        qkv = inputs["qkv"].unflatten(-1, (3, self.heads, self.head_dim)).flatten(1, 2)
        return qkv.permute(2, 0, 3, 1, 4).unbind(0)

    @cached_property
    def _timms(self) -> nn.Module:
        """The module of timm without its projections."""
        dd: dict[str, Any] = {"device": self.device, "dtype": self.dtype}
        module: Any = davit.ChannelAttention(self.heads * self.head_dim, self.heads, **dd)
        module.qkv, module.proj = bench_case.Given(), nn.Identity()
        found: nn.Module = module
        return found

    def _timm(self, inputs: Inputs) -> Tensor:
        x = inputs["qkv"].flatten(1, 2)
        tokens = x[..., : self.heads * self.head_dim]
        out = functional_call(self._timms, {"qkv.value": x}, (tokens,))
        return out.reshape(len(x), self.height, self.width, self.heads, self.head_dim)

    def _sdpa(self, inputs: Inputs) -> Tensor:
        """Channels in the place of tokens."""
        query, key, value = (x.mT for x in self._heads_first(inputs))
        out = F.scaled_dot_product_attention(key, value, query, scale=self.head_dim**-0.5)
        shape = (self.batch, self.height, self.width, self.heads, self.head_dim)
        return out.permute(0, 3, 1, 2).reshape(shape)


def cases(quick: bool) -> list[Channel]:
    """DaViT-T's four maps at 224 pixels, and its largest at 800 x 1216; the smallest if quick."""
    if quick:
        return [Channel(7, 7, 24)]
    sizes = ((56, 3), (28, 6), (14, 12), (7, 24))
    found = [Channel(size, size, heads) for size, heads in sizes]
    return [*found, Channel(200, 304, 3, batch=1)]


def native_cases(img_size: str) -> list[Channel]:
    """DaViT-T's maps on images of a size."""
    found = []
    for call in bench_case.calls("channel", ("fused_davit_tiny",), img_size):
        batch, height, width, heads, head_dim = call.query.shape
        found.append(Channel(height, width, heads, batch, head_dim))
    return bench_case.distinct(found)
