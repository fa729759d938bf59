"""Eager computations behind torch's dispatcher."""

import subprocess
import sys

import pytest
import torch

from vitarium.ops import _dispatch


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
