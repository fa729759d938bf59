"""Neighborhood attention as one would write it without this package: the benchmark's peers.

Every peer gets the same heads-last maps and does per call what depends on its inputs, the bias
above all; what depends on the shape alone (masks of geometry, indices) it may prepare. So may
ours.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from vitarium.tools import bench, bench_case, bench_flex
from vitarium.tools.bench_case import Candidate, Compile, Inputs, OpCase

_MOST = 8.0  # GiB of a dense mask's table


@dataclass(frozen=True)
class Shape(OpCase):
    """Maps batch x H x W with heads of head_dim channels, and their windows."""

    size: int | tuple[int, int]  # an int for squares
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
        return f"{self.sizes[0]}x{self.sizes[1]} x {self.heads} heads{dilated}"

    @property
    def sizes(self) -> tuple[int, int]:
        """Height and width."""
        return (self.size, self.size) if isinstance(self.size, int) else self.size

    @property
    def window(self) -> dict[str, int]:
        """The op's arguments that are not tensors."""
        return {"kernel_size": self.kernel_size, "dilation": self.dilation}

    @cached_property
    def neighbors(self) -> tuple[tuple[Tensor, Tensor], ...]:
        """Per position of each axis, its neighbors and their bias entries: [size, kernel_size]."""
        return tuple(self._axis(size) for size in self.sizes)

    def _axis(self, size: int) -> tuple[Tensor, Tensor]:
        position = torch.arange(size, device=self.device)
        residue, rank = position % self.dilation, position // self.dilation
        last = (size - 1 - residue) // self.dilation - self.kernel_size + 1
        start = torch.minimum((rank - self.kernel_size // 2).clamp(0), last)
        neighbor = start[:, None] + torch.arange(self.kernel_size, device=self.device)
        entry = neighbor - rank[:, None] + self.kernel_size - 1
        return residue[:, None] + neighbor * self.dilation, entry

    def neighbor_bias(self, bias: Tensor) -> Tensor:
        """[heads, H, W, kh, kw]."""
        (_, row), (_, column) = self.neighbors
        return bias[:, row[:, None, :, None], column[None, :, None, :]]

    def gathered(self, x: Tensor) -> Tensor:
        """[B, H, W, kh, kw, heads, head_dim]."""
        (row, _), (column, _) = self.neighbors
        return x[:, row[:, None, :, None], column[None, :, None, :]]

    def offsets(self, x: Tensor) -> Iterator[Tensor]:
        """Every position's first neighbor, its second, and so on: [B, H, W, heads, head_dim]."""
        (row, _), (column, _) = self.neighbors
        for i in range(self.kernel_size):
            for j in range(self.kernel_size):
                yield x.index_select(1, row[:, i]).index_select(2, column[:, j])


@dataclass(frozen=True)
class Neighborhood(Shape):
    """Attention at one shape."""

    op: ClassVar[str] = "neighborhood"

    def inputs(self, biased: bool) -> Inputs:
        torch.manual_seed(0)
        shape = (self.batch, *self.sizes, 3, self.heads, self.head_dim)
        # strided like a model's: three views of one projection
        inputs = bench_case.named(self.random(*shape).unbind(3))
        if biased:
            entries = 2 * self.kernel_size - 1
            inputs["bias"] = self.random(self.heads, entries, entries)
        return {name: x.detach().requires_grad_() for name, x in inputs.items()}

    def arguments(self, inputs: Inputs) -> dict[str, Any]:
        return {**inputs, **self.window}

    def candidates(self, biased: bool, backward: bool) -> dict[str, Candidate | str]:
        found: dict[str, Candidate | str] = {"vitarium": self.ours}
        found["dense SDPA, float mask"] = self._dense
        found["gather + einsum"] = self._gather
        found[f"loop over {self.kernel_size**2} offsets"] = self._offsets
        if backward:
            found["FlexAttention, compiled"] = "has no backward pass on a CPU"
        elif not bench.has_compiler():
            found["FlexAttention, compiled"] = "torch.compile needs a C++ compiler"
        else:
            torch.compiler.reset()  # after eight programs of one function torch runs it eagerly
            found["FlexAttention, compiled"] = self._flex(
                lambda function: torch.compile(function, dynamic=False)  # a CPU builds no others
            )
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

    def peers(self, biased: bool, backward: bool, compiled: Compile) -> dict[str, Candidate | str]:
        del backward
        found: dict[str, Candidate | str] = {}
        tokens = self.sizes[0] * self.sizes[1]
        table = 8 * tokens**2 / 2**30
        dense = ("dense SDPA, float mask", "dense SDPA, float mask, compiled")
        if table > _MOST:
            found |= dict.fromkeys(dense, f"the indices of its mask take {table:.1f} GiB")
        else:
            _ = self._dense_mask  # the compiler cannot see into cached properties
            found |= zip(dense, (self._dense, compiled(self._dense)), strict=True)
        found["FlexAttention, compiled"] = self._flex(compiled)
        reason = "takes no position bias" if biased else without_natten(self.device)
        found["natten"] = reason or self._natten
        return found

    def _natten(self, inputs: Inputs) -> Tensor:
        return self.ours(inputs, "natten")

    @cached_property
    def _dense_tables(self) -> tuple[Tensor, Tensor]:
        """Of every pair of positions: whether the key is a neighbor, and its bias entry."""
        last = 2 * self.kernel_size - 2
        near, entry = [], []
        for size, (neighbor, _) in zip(self.sizes, self.neighbors, strict=True):
            position = torch.arange(size, device=self.device)
            near.append((neighbor[:, :, None] == position).any(1))
            step = (position - position[:, None]) // self.dilation
            entry.append((step + self.kernel_size - 1).clamp(0, last))
        tokens = self.sizes[0] * self.sizes[1]
        entries = entry[0][:, None, :, None] * (last + 1) + entry[1][None, :, None, :]
        both = near[0][:, None, :, None] & near[1][None, :, None, :]
        return both.reshape(tokens, tokens), entries.reshape(tokens, tokens)

    @cached_property
    def _dense_mask(self) -> Tensor:
        near = self._dense_tables[0]
        mask = torch.zeros(near.shape, device=self.device, dtype=self.dtype)
        return mask.masked_fill(~near, float("-inf"))

    def _heads_first(self, x: Tensor) -> Tensor:
        return x.flatten(1, 2).transpose(1, 2)

    def _dense(self, inputs: Inputs) -> Tensor:
        mask = self._dense_mask
        if "bias" in inputs:
            near, entry = self._dense_tables
            mask = inputs["bias"].flatten(1)[:, entry].masked_fill(~near, float("-inf"))
        query, key, value = (self._heads_first(inputs[x]) for x in ("query", "key", "value"))
        out = F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
        return out.transpose(1, 2).unflatten(1, self.sizes)

    def _gather(self, inputs: Inputs) -> Tensor:
        query = inputs["query"] * self.head_dim**-0.5
        scores = torch.einsum("bhwnd,bhwklnd->bnhwkl", query, self.gathered(inputs["key"]))
        if "bias" in inputs:
            scores = scores + self.neighbor_bias(inputs["bias"])
        weights = scores.flatten(4).softmax(-1).view_as(scores)
        return torch.einsum("bnhwkl,bhwklnd->bhwnd", weights, self.gathered(inputs["value"]))

    def _offsets(self, inputs: Inputs) -> Tensor:
        query = inputs["query"] * self.head_dim**-0.5
        scores = torch.stack([(query * k).sum(-1) for k in self.offsets(inputs["key"])], -1)
        if "bias" in inputs:
            scores = scores + self.neighbor_bias(inputs["bias"]).flatten(3).permute(1, 2, 0, 3)
        weights = scores.softmax(-1)
        out = torch.zeros_like(query)
        for n, v in enumerate(self.offsets(inputs["value"])):
            out = out + weights[..., n, None] * v
        return out

    def _flex(self, compiled: Compile) -> Candidate:
        from torch.nn.attention.flex_attention import flex_attention

        width, kernel, dilation = self.sizes[1], self.kernel_size, self.dilation
        function = compiled(flex_attention)

        def attend(inputs: Inputs) -> Tensor:
            score_mod = None
            inputs = bench_flex.given(inputs)
            if "bias" in inputs:
                bias = inputs["bias"]
                last = 2 * kernel - 2

                def add_bias(score: Tensor, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
                    row, column = k // width - q // width, k % width - q % width
                    entries = [(x // dilation + kernel - 1).clamp(0, last) for x in (row, column)]
                    return score + bias[h, entries[0], entries[1]]

                score_mod = add_bias
            query, key, value = (self._heads_first(inputs[x]) for x in ("query", "key", "value"))
            out = function(query, key, value, score_mod=score_mod, block_mask=self._block_mask)
            return out.transpose(1, 2).unflatten(1, self.sizes)

        return attend

    @cached_property
    def _block_mask(self) -> Any:
        from torch.nn.attention.flex_attention import create_block_mask

        (height, width), kernel, dilation = self.sizes, self.kernel_size, self.dilation

        def near_on_axis(size: int, q: Tensor, k: Tensor) -> Tensor:
            residue = q % dilation
            last = (size - 1 - residue) // dilation - kernel + 1
            start = torch.minimum((q // dilation - kernel // 2).clamp(0), last)
            rank = k // dilation
            return (k % dilation == residue) & (rank >= start) & (rank < start + kernel)

        def near(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
            del b, h
            rows = near_on_axis(height, q // width, k // width)
            return rows & near_on_axis(width, q % width, k % width)

        tokens = height * width
        on_gpu = self.device.type == "cuda"
        # compiled, it never holds a number for every pair of tokens
        return create_block_mask(
            near, None, None, tokens, tokens, device=str(self.device), _compile=on_gpu
        )


def without_natten(device: torch.device) -> str | None:
    """Why natten does not take part, or None."""
    try:
        import natten
    except ImportError:
        return "not installed"
    if device.type == "cuda" and not natten.HAS_LIBNATTEN:
        return "installed without its CUDA kernels (libnatten)"
    return None


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


def native_cases(img_size: str) -> list[Neighborhood]:
    """The maps of NAT-T and DiNAT-T on images of a size; at 224 pixels without a bias too."""
    biases = (False, True) if img_size == "224" else (True,)
    found = []
    for call in bench_case.calls("neighborhood", ("nat_tiny", "dinat_tiny"), img_size):
        batch, height, width, heads, head_dim = call.query.shape
        kernel, dilation = call.kernel_size, call.dilation
        assert (*kernel, *dilation) == (*kernel[::-1], *dilation[::-1]), "these have squares"
        shape = ((height, width), heads, dilation[0])
        about = {"batch": batch, "head_dim": head_dim, "kernel_size": kernel[0]}
        found.append(Neighborhood(*shape, **about, biases=biases))
    return bench_case.distinct(found)
