"""What the tests of all ops need."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib.util import find_spec
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from vitarium.ops import _select

in_interpreter = pytest.mark.skipif(
    find_spec("triton") is None or torch.cuda.is_available(),
    reason="needs Triton, and no GPU: there test_gpu.py runs the kernels themselves",
)


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


def computed(
    function: Callable[..., Tensor], leaves: Mapping[str, Tensor], impl: str, **rest: Any
) -> dict[str, Tensor]:
    """The output and the gradients of all leaves, by name."""
    out = function(**leaves, **rest, impl=impl)
    return {"out": out.detach(), **gradients(out, leaves)}


def assert_as_exact_as_aten(
    function: Callable[..., Tensor],
    leaves: Mapping[str, Tensor],
    few: float = 4,
    more: Mapping[str, float] | None = None,
    **rest: Any,
) -> None:
    """Kernels are at most three times as far from the definition as ATen in the same precision.

    They may be a ``few`` roundings of the largest number further, and more by name; in float32 of
    one, where all are small: they may be what remains of larger terms.
    """
    exact = {name: x.detach().double().requires_grad_() for name, x in leaves.items()}
    expected = computed(function, exact, "reference", **rest)
    aten, found = (computed(function, leaves, impl, **rest) for impl in ("aten", "triton"))
    assert found["out"].is_contiguous()
    for name, x in expected.items():
        assert found[name].dtype == aten[name].dtype == leaves.get(name, leaves["query"]).dtype
        dtype = found[name].dtype
        roundings = (more or {}).get(name, few) * torch.finfo(dtype).eps
        largest = max(float(x.abs().max()), float(dtype == torch.float32))
        allowed = 3 * float((aten[name].double() - x).abs().max())
        allowed += roundings * largest
        error = float((found[name].double() - x).abs().max())
        assert error <= allowed, f"{name}: error {error:.2e}, allowed {allowed:.2e}"
