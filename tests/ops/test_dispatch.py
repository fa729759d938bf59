"""Eager computations behind torch's dispatcher."""

import subprocess
import sys

import pytest
import torch

from vitarium.ops import (
    _dispatch,
    _select,
    neighborhood_attention,
    neighborhood_mix,
    neighborhood_scores,
)


def test_importing_is_silent_without_triton():
    code = "import sys; sys.modules['triton'] = None; import vitarium.ops"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (found.returncode, found.stdout, found.stderr) == (0, "", "")


def test_an_op_without_a_gradient_says_so():
    double = _dispatch.define(
        "test_double", "(Tensor x) -> Tensor", lambda x: 2 * x, torch.empty_like, lambda x: 0
    )
    x = torch.ones(3, requires_grad=True)
    assert torch.equal(double(x), torch.full((3,), 2.0))
    with pytest.raises(RuntimeError, match="vitarium::test_double has no gradient"):
        double(x).sum().backward()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("op", [neighborhood_attention, neighborhood_scores, neighborhood_mix])
def test_autocast_changes_nothing(op, dtype):
    """Ops compute in the precision of what they get, gradients inside the block included."""
    args = torch.randn(3, 1, 6, 6, 2, 9).to(dtype).requires_grad_().unbind()
    args = args if op is neighborhood_attention else args[:2]
    found = []
    for enabled in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            out = op(*args, kernel_size=3)
            found.append((out, *torch.autograd.grad(out.float().square().sum(), args)))
    for plain, cast in zip(*found, strict=True):
        assert torch.equal(plain, cast)


class Asking(torch.nn.Module):
    """Adds 1 where programs are exported, else 2."""

    def forward(self, x):
        return x + 1 if _select.is_exporting() else x + 2


def test_compiled_programs_are_not_exported_ones():
    zero = torch.zeros(1)
    assert torch.compile(Asking(), backend="eager", fullgraph=True)(zero) == 2
    for strict in (False, True):
        assert torch.export.export(Asking(), (zero,), strict=strict).module()(zero) == 1
    assert torch.jit.trace(Asking(), zero, check_trace=False)(zero) == 1
