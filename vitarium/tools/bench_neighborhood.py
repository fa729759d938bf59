"""Neighborhood attention as one would write it without this package: the benchmark's peers.

Every peer gets the same heads-last maps and does per call what depends on its inputs, the bias
above all; what depends on the shape alone (masks of geometry, indices) it may prepare. So may
ours.
"""

from __future__ import annotations

from collections.abc import Callable
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
class Neighborhood:
    """One shape: batch x size x size, heads of head_dim channels."""

    size: int
    heads: int
    goals: dict[str, float] = field(default_factory=dict)
    batch: int = 2
    head_dim: int = 32
    kernel_size: int = 7
    op: str = "neighborhood"

    @property
    def title(self) -> str:
        return f"{self.size}x{self.size} x {self.heads} heads"

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
        return neighborhood_attention(**exact, kernel_size=self.kernel_size, impl="reference")

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
        return neighborhood_attention(**inputs, kernel_size=self.kernel_size)

    def _natten(self, inputs: _Inputs) -> Tensor:
        return neighborhood_attention(**inputs, kernel_size=self.kernel_size, impl="natten")

    @cached_property
    def _window(self) -> tuple[Tensor, Tensor]:
        """Per position of an axis, its neighbors and their bias entries: [size, kernel_size]."""
        position = torch.arange(self.size)
        start = (position - self.kernel_size // 2).clamp(0, self.size - self.kernel_size)
        neighbor = start[:, None] + torch.arange(self.kernel_size)
        return neighbor, neighbor - position[:, None] + self.kernel_size - 1

    def _neighbor_bias(self, bias: Tensor) -> Tensor:
        """[heads, H, W, kh, kw]."""
        entry = self._window[1]
        return bias[:, entry[:, None, :, None], entry[None, :, None, :]]

    @cached_property
    def _dense_tables(self) -> tuple[Tensor, Tensor]:
        """Of every pair of positions: whether the key is a neighbor, and its bias entry."""
        neighbor, _ = self._window
        position = torch.arange(self.size)
        near = (neighbor[:, :, None] == position).any(1)
        last = 2 * self.kernel_size - 2
        entry = (position - position[:, None] + self.kernel_size - 1).clamp(0, last)
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
        neighbor, _ = self._window
        rows, columns = neighbor[:, None, :, None], neighbor[None, :, None, :]
        query = inputs["query"] * self.head_dim**-0.5
        scores = torch.einsum("bhwnd,bhwklnd->bnhwkl", query, inputs["key"][:, rows, columns])
        if "bias" in inputs:
            scores = scores + self._neighbor_bias(inputs["bias"])
        weights = scores.flatten(4).softmax(-1).view_as(scores)
        return torch.einsum("bnhwkl,bhwklnd->bhwnd", weights, inputs["value"][:, rows, columns])

    def _offsets(self, inputs: _Inputs) -> Tensor:
        neighbor, _ = self._window
        pairs = [(i, j) for i in range(self.kernel_size) for j in range(self.kernel_size)]

        def at(x: Tensor, i: int, j: int) -> Tensor:
            return x.index_select(1, neighbor[:, i]).index_select(2, neighbor[:, j])

        query = inputs["query"] * self.head_dim**-0.5
        scores = torch.stack([(query * at(inputs["key"], i, j)).sum(-1) for i, j in pairs], -1)
        if "bias" in inputs:
            scores = scores + self._neighbor_bias(inputs["bias"]).flatten(3).permute(1, 2, 0, 3)
        weights = scores.softmax(-1)
        out = torch.zeros_like(query)
        for n, (i, j) in enumerate(pairs):
            out = out + weights[..., n, None] * at(inputs["value"], i, j)
        return out

    def _flex(self) -> _Candidate:
        from torch.nn.attention.flex_attention import create_block_mask, flex_attention

        size, kernel = self.size, self.kernel_size

        def near(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
            del b, h
            first_row = (q // size - kernel // 2).clamp(0, size - kernel)
            first_column = (q % size - kernel // 2).clamp(0, size - kernel)
            row, column = k // size - first_row, k % size - first_column
            return (row >= 0) & (row < kernel) & (column >= 0) & (column < kernel)

        mask = create_block_mask(near, None, None, size**2, size**2, device="cpu")
        compiled = torch.compile(flex_attention, dynamic=False)  # a CPU builds no dynamic sizes

        def attend(inputs: _Inputs) -> Tensor:
            score_mod = None
            if "bias" in inputs:
                bias = inputs["bias"].detach()
                last = 2 * kernel - 2

                def add_bias(score: Tensor, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
                    row = (k // size - q // size + kernel - 1).clamp(0, last)
                    column = (k % size - q % size + kernel - 1).clamp(0, last)
                    return score + bias[h, row, column]

                score_mod = add_bias
            query, key, value = (
                self._heads_first(inputs[x]).detach() for x in ("query", "key", "value")
            )
            out = compiled(query, key, value, score_mod=score_mod, block_mask=mask)
            return out.transpose(1, 2).unflatten(1, (size, size))

        return attend


def cases(quick: bool) -> list[Neighborhood]:
    """NAT's three large maps at 224 pixels; the smallest of them if quick."""

    def goals(forward: float, biased: float, training: float) -> dict[str, float]:
        passes = ("forward", "forward, bias", "forward+backward, bias")
        return dict(zip(passes, (forward, biased, training), strict=True))

    found = [
        Neighborhood(56, 2, goals(6, 7, 4.5)),
        Neighborhood(28, 4, goals(2, 3, 3)),
        Neighborhood(14, 8, goals(1.0, 1.1, 1.0)),
    ]
    return found[-1:] if quick else found
