"""Linear layers and MLPs between the ops: equal to torch's, counted, differentiable."""

import pytest
import torch
import torch.nn.functional as F
from harness import flops

from vitarium.ops import _linear
from vitarium.ops._linear import linear, residual_mlp


def tensors(*shapes, dtype=torch.float32, seed=0, transposed=False):
    generator = torch.Generator().manual_seed(seed)
    found = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]
    if transposed:  # the same values in another layout
        found = [x.mT.contiguous().mT if x.ndim > 1 else x for x in found]
    return [x.to(dtype) for x in found]


CASES = [((2, 5, 7, 12), 20), ((1, 12), 3), ((3, 12), 1), ((0, 12), 4)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize(("shape", "out"), CASES)
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("rest", ["", "bias", "residual", "both"])
def test_linear_and_its_gradients(dtype, shape, out, transposed, rest):
    x, weight, bias, residual, grad = tensors(
        shape, (out, 12), (out,), (*shape[:-1], out), (*shape[:-1], out),
        dtype=dtype, transposed=transposed,
    )  # fmt: skip
    given = {
        "bias": bias if rest in ("bias", "both") else None,
        "residual": residual if rest in ("residual", "both") else None,
    }
    leaves = [x, weight, *(t for t in given.values() if t is not None)]
    for leaf in leaves:
        leaf.requires_grad_()
    y = linear(x, weight, **given)
    assert y.is_contiguous()
    exact = [leaf.detach().double().requires_grad_() for leaf in leaves]
    more = dict(zip((k for k, t in given.items() if t is not None), exact[2:], strict=True))
    expected = F.linear(exact[0], exact[1], more.get("bias"))
    if "residual" in more:
        expected = expected + more["residual"]
    tolerance = {torch.float32: 1e-5, torch.float64: 1e-12, torch.bfloat16: 5e-2}[dtype]
    torch.testing.assert_close(y.double(), expected, atol=tolerance * 10, rtol=tolerance)
    found = torch.autograd.grad(y, leaves, grad)
    for ours, theirs in zip(
        found, torch.autograd.grad(expected, exact, grad.double()), strict=True
    ):
        torch.testing.assert_close(ours.double(), theirs, atol=tolerance * 10, rtol=tolerance)


def test_second_derivatives_and_the_dispatcher():
    x, weight, bias, residual = tensors((2, 3, 4), (5, 4), (5,), (2, 3, 5), dtype=torch.float64)
    leaves = [t.requires_grad_() for t in (x, weight, bias, residual)]
    assert torch.autograd.gradcheck(linear, leaves)
    assert torch.autograd.gradgradcheck(linear, leaves)
    torch.library.opcheck(torch.ops.vitarium.linear_aten, leaves)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("norm_first", [True, False])
@pytest.mark.parametrize("chunk", [1, 40, 1 << 20])
def test_residual_mlp(dtype, norm_first, chunk, monkeypatch):
    monkeypatch.setattr(_linear, "CHUNK", chunk)
    x, scale, shift, w1, b1, w2, b2 = tensors(
        (2, 3, 5, 6), (6,), (6,), (8, 6), (8,), (6, 8), (6,), dtype=dtype
    )
    before = x.clone()
    out = residual_mlp(x, (scale, shift, 1e-6), [(w1, b1), (w2, b2)], norm_first)

    def norm(y):
        return F.layer_norm(y, (6,), scale, shift, 1e-6)

    def mlp(y):
        return F.linear(F.gelu(F.linear(y, w1, b1)), w2, b2)

    expected = x + (mlp(norm(x)) if norm_first else norm(mlp(x)))
    torch.testing.assert_close(
        out, expected, atol=1e-4 if dtype is torch.float32 else 1e-11, rtol=0
    )
    assert torch.equal(x, before)


def test_a_gradient_through_the_mlp_is_refused():
    x, vector, w1, w2 = tensors((2, 6), (6,), (8, 6), (6, 8))
    out = residual_mlp(
        x.requires_grad_(), (vector, vector, 1e-6), [(w1, None), (w2, None)], norm_first=True
    )
    with pytest.raises(RuntimeError, match="has no gradient"):
        out.sum().backward()


def test_flops():
    x, vector, w1, w2 = tensors((2, 3, 6), (6,), (8, 6), (6, 8))
    assert flops(linear, x, w1) == 2 * 6 * 6 * 8
    layers = [(w1, None), (w2, None)]
    assert flops(residual_mlp, x, (vector, vector, 1e-6), layers, True) == 2 * 2 * 6 * 6 * 8
    weight = w1.requires_grad_()
    trained = flops(lambda: linear(x.requires_grad_(), weight).sum().backward())
    assert trained == 3 * 2 * 6 * 6 * 8
