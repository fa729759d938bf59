"""What every case of ``vitarium bench ops`` is: one op at one shape, on one device, in one dtype.

A case knows its op's arguments, and so which implementation runs and what it costs at least. The
modules of single ops add inputs, peers and the shapes that models have.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, ClassVar, TypeVar
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import vitarium.ops
from vitarium.ops import _select, explain
from vitarium.tools import bench

Inputs = dict[str, Tensor]
Candidate = Callable[[Inputs], Tensor]
Compile = Callable[[Any], Any]  # a function -> the same, compiled
Size = tuple[int, int]
META = torch.device("meta")
SIZES: dict[str, tuple[Size, int]] = {"224": ((224, 224), 128), "800x1216": ((800, 1216), 2)}


@dataclass(frozen=True, kw_only=True)
class OpCase:
    """One op at one shape.

    Attributes:
        device: of the inputs.
        dtype: of the inputs.
        op: the op's short name.
    """

    device: torch.device = bench.CPU
    dtype: torch.dtype = torch.float32
    op: ClassVar[str]

    @property
    def title(self) -> str:
        """The shape."""
        raise NotImplementedError

    @property
    def biases(self) -> tuple[bool, ...]:
        """Whether there are passes without a position bias, with one."""
        raise NotImplementedError

    def inputs(self, biased: bool) -> Inputs:
        """Random inputs that require gradients: maps have at least four axes, parameters fewer."""
        raise NotImplementedError

    def arguments(self, inputs: Inputs) -> dict[str, Any]:
        """What the op's public function is called with."""
        raise NotImplementedError

    def peers(self, biased: bool, backward: bool, compiled: Compile) -> dict[str, Candidate | str]:
        """What one would write instead, on a GPU: functions, or why one cannot take part."""
        raise NotImplementedError

    def random(self, *shape: int) -> Tensor:
        """Normally distributed numbers, where and as the case wants them."""
        return torch.randn(shape, device=self.device, dtype=self.dtype)

    def ours(self, inputs: Inputs, impl: str | None = None) -> Tensor:
        """The op."""
        function = getattr(vitarium.ops, f"{self.op}_attention")
        out: Tensor = function(**self.arguments(inputs), impl=impl)
        return out

    def oracle(self, inputs: Inputs) -> Tensor:
        """The op in float64."""
        return self.ours({name: x.double() for name, x in inputs.items()}, "reference")

    def explained(self, inputs: Inputs) -> _select.Explanation:
        """Which implementation `auto` runs, and why not another."""
        return explain(self.op, **self.arguments(inputs), impl="auto")


_Case = TypeVar("_Case", bound=OpCase)


def named(maps: Iterable[Tensor]) -> Inputs:
    """Query, key and value, by name."""
    return dict(zip(("query", "key", "value"), maps, strict=True))


class Given(nn.Module):
    """Stands for a projection: its output is put in as ``value`` by `torch.func`."""

    value: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("value", torch.empty(0))

    def forward(self, x: Tensor) -> Tensor:
        """Whatever -> ``value``."""
        del x
        return self.value


def distinct(cases: Sequence[_Case]) -> list[_Case]:
    """Each shape once, in order."""
    return list({f"{case.title}, {case.biases}": case for case in cases}.values())


def placed(case: _Case, device: torch.device, dtype: torch.dtype) -> _Case:
    """The same shape elsewhere."""
    return replace(case, device=device, dtype=dtype)


@dataclass(frozen=True)
class Cost:
    """What a call costs at least.

    Attributes:
        bytes: every map read or written once in each direction, parameters once. The backward pass
            reads query, key, value and the output's gradient, and writes three gradients; the
            output itself and what else is kept for it do not count.
        flops: by the op's own formula, 2 per multiply-add.
        shape: of the output.
    """

    bytes: int
    flops: int
    shape: torch.Size


def cost(case: OpCase, biased: bool, backward: bool) -> Cost:
    """What a call costs at least, found without computing anything."""
    case = placed(case, META, case.dtype)
    inputs = case.inputs(biased)
    with FlopCounterMode(display=False) as counter, torch.set_grad_enabled(backward):
        out = case.ours(inputs, "aten")
        if backward:
            torch.autograd.grad(out, list(inputs.values()), torch.empty_like(out))
    maps = sum(x.nbytes for x in inputs.values() if is_map(x))
    parameters = sum(x.nbytes for x in inputs.values() if not is_map(x))
    moved = maps + out.nbytes + parameters + (2 * maps + out.nbytes if backward else 0)
    return Cost(moved, counter.get_total_flops(), out.shape)


def is_map(x: Tensor) -> bool:
    """Whether an input is one per image; a parameter is one for all."""
    return x.ndim > 3


def calls(op: str, models: Sequence[str], img_size: str) -> list[Any]:
    """The calls of an op that models make of one batch of images, on the meta device.

    Args:
        op: its short name.
        models: entries of vitarium.
        img_size: a key of `SIZES`.
    """
    return [call for model in models for name, call in _calls(model, img_size) if name == op]


@cache
def _calls(model: str, img_size: str) -> list[tuple[str, Any]]:
    found: list[tuple[str, Any]] = []
    run = _select.Op.__call__

    def recorded(op: _select.Op, call: Any, impl: str | None) -> Tensor:
        found.append((op.name, call))
        return run(op, call, impl)

    size, batch = SIZES[img_size]
    with META, torch.no_grad(), patch.object(_select.Op, "__call__", recorded):
        bench.built(model, size).eval()(torch.empty(batch, 3, *size))
    return found
