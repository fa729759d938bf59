"""Neighborhood attention as one would write it without this package: the benchmark's peers.

Every peer gets the same heads-last maps and does per call what depends on its inputs, the bias
above all; what depends on the shape alone (masks of geometry, indices) it may prepare. So may
ours.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor

from vitarium.ops import neighborhood_attention
from vitarium.tools import bench

_Inputs = dict[str, Tensor]
_Candidate = Callable[[_Inputs], Tensor]


@dataclass(frozen=True)
class Shape:
    """Maps batch x size x size with heads of head_dim channels, and their windows."""

    size: int
    heads: int
    dilation: int = 1
    goals: dict[str, float] = field(default_factory=dict)
    batch: int = 2
    head_dim: int = 32
    kernel_size: int = 7
    biases: tuple[bool, ...] = (False, True)

    @property
    def title(self) -> str:
        dilated = f", dilation {self.dilation}" if self.dilation > 1 else ""
        return f"{self.size}x{self.size} x {self.heads} heads{dilated}"

    @property
    def window(self) -> dict[str, int]:
        """The op's arguments that are not tensors."""
        return {"kernel_size": self.kernel_size, "dilation": self.dilation}

    @cached_property
    def neighbors(self) -> tuple[Tensor, Tensor]:
        """Per position of an axis, its neighbors and their bias entries: [size, kernel_size]."""
        position = torch.arange(self.size)
        residue, rank = position % self.dilation, position // self.dilation
        last = (self.size - 1 - residue) // self.dilation - self.kernel_size + 1
        start = torch.minimum((rank - self.kernel_size // 2).clamp(0), last)
        neighbor = start[:, None] + torch.arange(self.kernel_size)
        entry = neighbor - rank[:, None] + self.kernel_size - 1
        return residue[:, None] + neighbor * self.dilation, entry

    def neighbor_bias(self, bias: Tensor) -> Tensor:
        """[heads, H, W, kh, kw]."""
        entry = self.neighbors[1]
        return bias[:, entry[:, None, :, None], entry[None, :, None, :]]

    def gathered(self, x: Tensor) -> Tensor:
        """[B, H, W, kh, kw, heads, head_dim]."""
        neighbor = self.neighbors[0]
        return x[:, neighbor[:, None, :, None], neighbor[None, :, None, :]]

    def offsets(self, x: Tensor) -> Iterator[Tensor]:
        """Every position's first neighbor, its second, and so on: [B, H, W, heads, head_dim]."""
        neighbor = self.neighbors[0]
        for i in range(self.kernel_size):
            for j in range(self.kernel_size):
                yield x.index_select(1, neighbor[:, i]).index_select(2, neighbor[:, j])


@dataclass(frozen=True)
class Neighborhood(Shape):
    """Attention at one shape."""

    op: str = "neighborhood"

    def inputs(self, biased: bool) -> _Inputs:
        torch.manual_seed(0)
        shape = (self.batch, self.size, self.size, 3, self.heads, self.head_dim)
        names = ("query", "key", "value")
        # strided like a model's: three views of one projection
        inputs = dict(zip(names, torch.randn(shape).unbind(3), strict=True))
        if biased:
            entries = 2 * self.kernel_size - 1
            inputs["bias"] = torch.randn(self.heads, entries, entries)
        return {name: x.detach().requires_grad_() for name, x in inputs.items()}

    def oracle(self, inputs: _Inputs) -> Tensor:
        exact = {name: x.double() for name, x in inputs.items()}
        return neighborhood_attention(**exact, **self.window, impl="reference")

    def candidates(self, biased: bool, backward: bool) -> dict[str, _Candidate | str]:
        found: dict[str, _Candidate | str] = {"vitarium": self._ours}
        found["dense SDPA, float mask"] = self._dense
        found["gather + einsum"] = self._gather
        found[f"loop over {self.kernel_size**2} offsets"] = self._offsets
        if backward:
            found["FlexAttention, compiled"] = "has no backward pass on a CPU"
        elif not bench.has_compiler():
            found["FlexAttention, compiled"] = "torch.compile needs a C++ compiler"
        else:
            found["FlexAttention, compiled"] = self._flex()
        if biased:
            found["natten"] = "takes no position bias"
        elif backward:
            found["natten"] = "has no backward pass on a CPU"
        else:
            try:
                import natten  # noqa: F401
            except ImportError:
                found["natten"] = "not installed"
            else:
                found["natten"] = self._natten
        return found

    def _ours(self, inputs: _Inputs) -> Tensor:
        return neighborhood_attention(**inputs, **self.window)

    def _natten(self, inputs: _Inputs) -> Tensor:
        return neighborhood_attention(**inputs, **self.window, impl="natten")

    @cached_property
    def _dense_tables(self) -> tuple[Tensor, Tensor]:
        """Of every pair of positions: whether the key is a neighbor, and its bias entry."""
        neighbor, _ = self.neighbors
        position = torch.arange(self.size)
        near = (neighbor[:, :, None] == position).any(1)
        last = 2 * self.kernel_size - 2
        step = (position - position[:, None]) // self.dilation
        entry = (step + self.kernel_size - 1).clamp(0, last)
        tokens = self.size**2
        entries = entry[:, None, :, None] * (last + 1) + entry[None, :, None, :]
        both = near[:, None, :, None] & near[None, :, None, :]
        return both.reshape(tokens, tokens), entries.reshape(tokens, tokens)

    @cached_property
    def _dense_mask(self) -> Tensor:
        near = self._dense_tables[0]
        return torch.zeros(near.shape).masked_fill(~near, float("-inf"))

    def _heads_first(self, x: Tensor) -> Tensor:
        return x.flatten(1, 2).transpose(1, 2)

    def _dense(self, inputs: _Inputs) -> Tensor:
        mask = self._dense_mask
        if "bias" in inputs:
            near, entry = self._dense_tables
            mask = inputs["bias"].flatten(1)[:, entry].masked_fill(~near, float("-inf"))
        query, key, value = (self._heads_first(inputs[x]) for x in ("query", "key", "value"))
        out = F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
        return out.transpose(1, 2).unflatten(1, (self.size, self.size))

    def _gather(self, inputs: _Inputs) -> Tensor:
        query = inputs["query"] * self.head_dim**-0.5
        scores = torch.einsum("bhwnd,bhwklnd->bnhwkl", query, self.gathered(inputs["key"]))
        if "bias" in inputs:
            scores = scores + self.neighbor_bias(inputs["bias"])
        weights = scores.flatten(4).softmax(-1).view_as(scores)
        return torch.einsum("bnhwkl,bhwklnd->bhwnd", weights, self.gathered(inputs["value"]))

    def _offsets(self, inputs: _Inputs) -> Tensor:
        query = inputs["query"] * self.head_dim**-0.5
        scores = torch.stack([(query * k).sum(-1) for k in self.offsets(inputs["key"])], -1)
        if "bias" in inputs:
            scores = scores + self.neighbor_bias(inputs["bias"]).flatten(3).permute(1, 2, 0, 3)
        weights = scores.softmax(-1)
        out = torch.zeros_like(query)
        for n, v in enumerate(self.offsets(inputs["value"])):
            out = out + weights[..., n, None] * v
        return out

    def _flex(self) -> _Candidate:
        from torch.nn.attention.flex_attention import create_block_mask, flex_attention

        size, kernel, dilation = self.size, self.kernel_size, self.dilation

        def near_on_axis(q: Tensor, k: Tensor) -> Tensor:
            residue = q % dilation
            last = (size - 1 - residue) // dilation - kernel + 1
            start = torch.minimum((q // dilation - kernel // 2).clamp(0), last)
            rank = k // dilation
            return (k % dilation == residue) & (rank >= start) & (rank < start + kernel)

        def near(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
            del b, h
            return near_on_axis(q // size, k // size) & near_on_axis(q % size, k % size)

        mask = create_block_mask(near, None, None, size**2, size**2, device="cpu")
        torch.compiler.reset()  # after eight programs of one function torch would run it eagerly
        compiled = torch.compile(flex_attention, dynamic=False)  # a CPU builds no dynamic sizes

        def attend(inputs: _Inputs) -> Tensor:
            score_mod = None
            if "bias" in inputs:
                bias = inputs["bias"].detach()
                last = 2 * kernel - 2

                def add_bias(score: Tensor, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
                    row, column = k // size - q // size, k % size - q % size
                    entries = [(x // dilation + kernel - 1).clamp(0, last) for x in (row, column)]
                    return score + bias[h, entries[0], entries[1]]

                score_mod = add_bias
            query, key, value = (
                self._heads_first(inputs[x]).detach() for x in ("query", "key", "value")
            )
            out = compiled(query, key, value, score_mod=score_mod, block_mask=mask)
            return out.transpose(1, 2).unflatten(1, (size, size))

        return attend


def cases(quick: bool) -> list[Neighborhood]:
    """NAT's three large maps at 224 pixels and DiNAT's dilations; the smallest if quick.

    DiNAT dilates by 8, 4 and 2 at 56 x 56, 28 x 28 and 14 x 14; 7 x 7 windows fit a map of 28
    up to a dilation of 4 and a map of 14 up to 2, where every class is one window. The goals of
    dilated maps are three quarters of those without dilation.
    """

    def goals(forward: float, biased: float, training: float) -> dict[str, float]:
        passes = ("forward", "forward, bias", "forward+backward, bias")
        return dict(zip(passes, (forward, biased, training), strict=True))

    smallest = Neighborhood(14, 8, goals=goals(1.0, 1.1, 1.0))
    if quick:
        return [smallest]
    large, middle = goals(6, 7, 4.5), goals(2, 3, 3)
    found = [Neighborhood(56, 2, goals=large), Neighborhood(28, 4, goals=middle), smallest]
    for size, heads, dilations, plain in ((56, 2, (2, 4, 8), large), (28, 4, (2, 4), middle)):
        dilated = {name: 0.75 * goal for name, goal in plain.items()}
        found += [Neighborhood(size, heads, dilation, dilated) for dilation in dilations]
    return found
