"""Which implementation of an op runs, and why the others do not."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

IMPLEMENTATIONS = ("reference", "aten", "triton", "natten")
_CHOICES = ("auto", *IMPLEMENTATIONS)
_VARIABLE = "VITARIUM_OPS"

_overrides: list[Mapping[str, str]] = []


@dataclass(frozen=True)
class Implementation:
    """One way to compute an op.

    ``run(call)`` computes it; ``unsupported(call)`` says why it cannot, or None;
    ``reserved(call)`` says why ``auto`` leaves a call that it can run to those behind it in the
    op's order, or None.
    """

    run: Callable[[Any], Tensor]
    unsupported: Callable[[Any], str | None]
    reserved: Callable[[Any], str | None]

    def passed(self, call: Any) -> str | None:
        """Why ``auto`` does not take it for ``call``, or None."""
        # in this order: limits would become conditions of programs that are exported
        return self.reserved(call) or self.unsupported(call)


def on_request(call: Any) -> str | None:
    """What `Implementation.reserved` says where ``auto`` never chooses."""
    return "only on request (impl= or VITARIUM_OPS)"


def always(call: Any) -> str | None:
    """What `Implementation.reserved` says where ``auto`` chooses whatever can run."""
    return None


@dataclass(frozen=True)
class Op:
    """An op: its name, the function that validates arguments, its implementations in order."""

    name: str
    prepare: Callable[..., Any]
    implementations: Mapping[str, Implementation]

    def __call__(self, call: Any, impl: str | None) -> Tensor:
        return self.implementations[self.choose(call, impl)].run(call)

    def choose(self, call: Any, impl: str | None) -> str:
        """Name of the implementation that runs ``call``."""
        requested = self._requested(impl)
        if requested == "auto":
            for name, candidate in self.implementations.items():
                if candidate.passed(call) is None:
                    return name
            raise ValueError(f"{self.name}: no implementation can run this call")
        if requested not in self.implementations:
            raise ValueError(
                f"impl={requested!r}: {self.name} has no such implementation, only "
                f"{', '.join(self.implementations)}"
            )
        reason = self.implementations[requested].unsupported(call)
        if reason is not None:
            raise ValueError(f"impl={requested!r} cannot run this {self.name} call: {reason}")
        return requested

    def _requested(self, impl: str | None) -> str:
        if impl is not None:
            return _checked(impl, "impl")
        for mapping in reversed(_overrides):
            for key in (self.name, "*"):
                if key in mapping:
                    return mapping[key]
        return _checked(os.environ.get(_VARIABLE) or "auto", _VARIABLE)


ops: dict[str, Op] = {}


def register(op: Op) -> Op:
    """Enter an op under its short name, by which `use_impl` and `explain` know it."""
    ops[op.name] = op
    return op


def _checked(name: str, argument: str) -> str:
    if name not in _CHOICES:
        raise ValueError(f"{argument}: expected one of {', '.join(_CHOICES)}, got {name!r}")
    return name


@contextmanager
def use_impl(choice: str | Mapping[str, str]) -> Iterator[None]:
    """Choose implementations inside a ``with`` block, for all ops or per op.

    Args:
        choice: an implementation's name, or a mapping from an op's short name to one,
            for instance ``{"neighborhood": "reference"}``.

    Raises:
        ValueError: unknown op or implementation. An implementation that cannot run a call
            raises when the call is made: there is no silent fallback.
    """
    mapping = {"*": choice} if isinstance(choice, str) else dict(choice)
    for op, name in mapping.items():
        if op != "*" and op not in ops:
            raise ValueError(f"use_impl: expected ops among {', '.join(sorted(ops))}, got {op!r}")
        _checked(name, "use_impl")
    _overrides.append(mapping)
    try:
        yield
    finally:
        # by identity: an equal one further out stays in its place
        _overrides[:] = [x for x in _overrides if x is not mapping]


@dataclass(frozen=True)
class Explanation:
    """What `explain` found.

    Attributes:
        op: its short name.
        chosen: the implementation that runs.
        reasons: for each one why it cannot run, or None.
        reserved: for each one that can run why ``auto`` passes over it, or None.
    """

    op: str
    chosen: str
    reasons: Mapping[str, str | None]
    reserved: Mapping[str, str | None]

    def why_not(self, name: str) -> str:
        """Why an implementation that is not chosen is not, in words."""
        return self.reasons[name] or self.reserved[name] or "can run"

    def __str__(self) -> str:
        lines = [f"{self.op}: {self.chosen} runs"]
        for name in self.reasons:
            able = "can run; " if self.reasons[name] is None and self.reserved[name] else ""
            why = "chosen" if name == self.chosen else able + self.why_not(name)
            lines.append(f"  {name}: {why}")
        return "\n".join(lines)


def explain(op: str | Callable[..., Tensor], *args: Any, **kwargs: Any) -> Explanation:
    """Say which implementation of ``op`` would run a call, and why the others would not.

    Args:
        op: an op's short name (``"neighborhood"``) or its public function.
        *args: the call's arguments.
        **kwargs: the call's arguments, ``impl`` included.

    Raises:
        ValueError: unknown op, arguments that the op refuses, or a requested implementation
            that cannot run.
    """
    name = op if isinstance(op, str) else getattr(op, "op_name", None)
    if name not in ops:
        raise ValueError(f"op: expected one of {', '.join(sorted(ops))}, got {op!r}")
    impl = kwargs.pop("impl", None)
    call = ops[name].prepare(*args, **kwargs)
    implementations = ops[name].implementations
    reasons = {k: v.unsupported(call) for k, v in implementations.items()}
    able = {k: v for k, v in implementations.items() if reasons[k] is None}
    reserved = {k: v.reserved(call) for k, v in able.items()}
    return Explanation(name, ops[name].choose(call, impl), reasons, reserved)


def is_tracing() -> bool:
    """Whether a graph is being recorded: nothing may be cached or read from tensors then."""
    return torch.compiler.is_compiling() or torch.jit.is_tracing()


def is_exporting() -> bool:
    """Whether the graph being recorded must run without vitarium, so without our dispatcher ops.

    Torch 2.10 and 2.11 answer the public question with yes in everything that they compile.
    """
    flag = getattr(torch.compiler, "_is_exporting_flag", None)
    exporting = torch.compiler.is_exporting() if flag is None else flag
    return bool(exporting) or torch.jit.is_tracing()


def larger(size: int, other: int) -> int:
    """The larger one of two sizes, which may be unknown while a graph is being recorded."""
    unknown: Any = torch.sym_max  # which torch 2.10 cannot compile for known sizes
    known = isinstance(size, int) and isinstance(other, int)
    return max(size, other) if known else unknown(size, other)


def smaller(size: int, other: int) -> int:
    """The smaller one of two sizes, which may be unknown while a graph is being recorded."""
    unknown: Any = torch.sym_min
    known = isinstance(size, int) and isinstance(other, int)
    return min(size, other) if known else unknown(size, other)
