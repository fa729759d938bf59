"""Neighborhood attention's two products as one would write them without this package."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from vitarium.ops import neighborhood_mix, neighborhood_scores
from vitarium.tools.bench_case import Candidate, Inputs
from vitarium.tools.bench_neighborhood import Shape


def _named(
    shape: Shape, ours: Candidate, gather: Candidate, offsets: Candidate
) -> dict[str, Candidate | str]:
    loop = f"loop over {shape.kernel_size**2} offsets"
    return {"vitarium": ours, "gather + einsum": gather, loop: offsets}


@dataclass(frozen=True)
class Scores(Shape):
    """Dot products with the keys of the window."""

    op: ClassVar[str] = "neighborhood_scores"

    def inputs(self, biased: bool) -> Inputs:
        torch.manual_seed(0)
        shape = (self.batch, *self.sizes, 3, self.heads, self.head_dim)
        query, key, _ = self.random(*shape).unbind(3)  # strided like a model's
        inputs = {"query": query, "key": key}
        if biased:
            entries = 2 * self.kernel_size - 1
            inputs["bias"] = self.random(self.heads, entries, entries)
        return {name: x.detach().requires_grad_() for name, x in inputs.items()}

    def oracle(self, inputs: Inputs) -> Tensor:
        exact = {name: x.double() for name, x in inputs.items()}
        return neighborhood_scores(**exact, **self.window, impl="reference")

    def candidates(self, biased: bool, backward: bool) -> dict[str, Candidate | str]:
        del biased, backward
        return _named(self, self._ours, self._gather, self._offsets)

    def _ours(self, inputs: Inputs) -> Tensor:
        return neighborhood_scores(**inputs, **self.window)

    def _gather(self, inputs: Inputs) -> Tensor:
        keys = self.gathered(inputs["key"]).flatten(3, 4)
        return self._biased(torch.einsum("bhwnd,bhwmnd->bhwnm", inputs["query"], keys), inputs)

    def _offsets(self, inputs: Inputs) -> Tensor:
        scores = [(inputs["query"] * k).sum(-1) for k in self.offsets(inputs["key"])]
        return self._biased(torch.stack(scores, -1), inputs)

    def _biased(self, scores: Tensor, inputs: Inputs) -> Tensor:
        if "bias" not in inputs:
            return scores
        return scores + self.neighbor_bias(inputs["bias"]).flatten(3).permute(1, 2, 0, 3)


@dataclass(frozen=True)
class Mix(Shape):
    """Weighted sums of the values of the window."""

    op: ClassVar[str] = "neighborhood_mix"
    biases: tuple[bool, ...] = (False,)

    def inputs(self, biased: bool) -> Inputs:
        del biased
        torch.manual_seed(0)
        shape = (self.batch, *self.sizes, self.heads)
        inputs = {
            "weights": self.random(*shape, self.kernel_size**2),
            "value": self.random(*shape, self.head_dim),
        }
        return {name: x.requires_grad_() for name, x in inputs.items()}

    def oracle(self, inputs: Inputs) -> Tensor:
        exact = {name: x.double() for name, x in inputs.items()}
        return neighborhood_mix(**exact, **self.window, impl="reference")

    def candidates(self, biased: bool, backward: bool) -> dict[str, Candidate | str]:
        del biased, backward
        return _named(self, self._ours, self._gather, self._offsets)

    def _ours(self, inputs: Inputs) -> Tensor:
        return neighborhood_mix(**inputs, **self.window)

    def _gather(self, inputs: Inputs) -> Tensor:
        values = self.gathered(inputs["value"]).flatten(3, 4)
        return torch.einsum("bhwnm,bhwmnd->bhwnd", inputs["weights"], values)

    def _offsets(self, inputs: Inputs) -> Tensor:
        out = torch.zeros_like(inputs["value"])
        for n, v in enumerate(self.offsets(inputs["value"])):
            out = out + inputs["weights"][..., n, None] * v
        return out


_SHAPES = ((28, 4), (56, 2))


def scores_cases(quick: bool) -> list[Scores]:
    """NAT's two largest maps at 224 pixels, to be faster than both peers; the smaller if quick."""
    passes = ("forward", "forward, bias", "forward+backward", "forward+backward, bias")
    goals = dict.fromkeys(passes, 1.0)
    return [Scores(size, heads, goals=goals) for size, heads in _SHAPES[: 1 if quick else None]]


def mix_cases(quick: bool) -> list[Mix]:
    """The same maps."""
    goals = dict.fromkeys(("forward", "forward+backward"), 1.0)
    return [Mix(size, heads, goals=goals) for size, heads in _SHAPES[: 1 if quick else None]]
