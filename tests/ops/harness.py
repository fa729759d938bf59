"""What the tests of all ops need."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from vitarium.ops import _select


def random_maps(
    size: tuple[int, int], dtype: torch.dtype, batch: int, heads: int, head_dim: int, seed: int = 0
) -> tuple[dict[str, Tensor], Callable[..., Tensor]]:
    """Query, key and value as three views of one projection, and what draws further tensors."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    qkv = normal(batch, *size, 3, heads, head_dim).unbind(3)
    return dict(zip(("query", "key", "value"), qkv, strict=True)), normal


def gradients(out: Tensor, leaves: Mapping[str, Tensor], seed: int = 7) -> dict[str, Tensor]:
    """Of a random projection of ``out``, whose gradient arrives non-contiguous."""
    generator = torch.Generator().manual_seed(seed)
    probe = torch.randn(out.transpose(1, 3).shape, generator=generator, dtype=torch.float64)
    probe = probe.to(out).transpose(1, 3)
    found = torch.autograd.grad(out, list(leaves.values()), probe, allow_unused=True)
    zeros = (
        torch.zeros_like(x) if g is None else g for g, x in zip(found, leaves.values(), strict=True)
    )
    return dict(zip(leaves, zeros, strict=True))


def flops(function: Callable[..., object], *args: object, **kwargs: object) -> int:
    """What torch counts for a call, 2 per multiply-add."""
    with FlopCounterMode(display=False) as counter:
        function(*args, **kwargs)
    return counter.get_total_flops()


def record(monkeypatch: pytest.MonkeyPatch, op: str) -> list[str]:
    """Names of the implementations of ``op``, to which every run adds its own."""
    ran: list[str] = []
    for name, implementation in _select.ops[op].implementations.items():
        run = implementation.run

        def spy(call: object, name: str = name, run: Callable[..., Tensor] = run) -> Tensor:
            ran.append(name)
            return run(call)

        recorded = _select.Implementation(spy, implementation.unsupported, implementation.reserved)
        monkeypatch.setitem(_select.ops[op].implementations, name, recorded)
    return ran
