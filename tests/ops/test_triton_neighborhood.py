"""The Triton kernels of neighborhood attention, in Triton's interpreter where there is no GPU."""

from __future__ import annotations

import itertools
from functools import partial
from pathlib import Path
from typing import Any

import harness
import pytest
import torch
from calls_neighborhood import CALLS
from golden import op_case, sample
from harness import flops, gradients, in_interpreter, random_maps, record
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from vitarium.ops import _triton, explain, neighborhood_attention
from vitarium.ops.neighborhood_attn import triton_launch

pytestmark = [
    pytest.mark.usefixtures("nan_memory"),
    in_interpreter,
]

GOLDENS = sorted(Path(__file__).parents[1].glob("golden/ops/neighborhood2d_[0-9]*.json"))
LARGE = {f"neighborhood2d_{i:02}" for i in (4, 5, 6, 8, 9, 14, 15)}  # hundreds of programs

# (H, W), kernel_size, dilation, padded: several ragged tiles, size 1, window = map, non-square,
# classes of different lengths, a class without queries, kernels wider than a chunk
SHAPES = [
    ((11, 3), 3, 1, False),
    ((1, 1), 1, 1, False),
    ((1, 9), (1, 3), 1, False),
    ((7, 7), 7, 1, False),
    ((7, 11), (3, 5), (2, 1), False),
    ((1, 15), (1, 11), 1, False),
    ((3, 17), (1, 17), 1, False),
    ((3, 5), 7, 1, True),
    ((1, 9), 3, (2, 2), True),
]


def inputs(
    size: tuple[int, int],
    kernel: int | tuple[int, int],
    padded: bool = False,
    dtype: torch.dtype = torch.float32,
    batch: int = 1,
    heads: int = 2,
    head_dim: int = 8,
) -> dict[str, Tensor]:
    """Random leaves, strided like three views of one projection."""
    kh, kw = (kernel, kernel) if isinstance(kernel, int) else kernel
    found, normal = random_maps(size, dtype, batch, heads, head_dim)
    found["bias"] = normal(heads, 2 * kh - 1, 2 * kw - 1)
    if padded:
        found["pad"] = normal(3, heads, head_dim)
    return {name: x.requires_grad_() for name, x in found.items()}


results = partial(harness.computed, neighborhood_attention)


def exact(leaves: dict[str, Tensor], **call: Any) -> dict[str, Tensor]:
    """What float64 gives."""
    double = {name: x.detach().double().requires_grad_() for name, x in leaves.items()}
    return results(double, "reference", **call)


def assert_close(
    found: dict[str, Tensor], expected: dict[str, Tensor], relative: float = 3e-6
) -> None:
    """Within ``relative`` of the largest expected number, or of one where all are small."""
    assert set(found) == set(expected)
    for name, y in expected.items():
        largest = max(float(y.abs().max()), 1.0)
        assert found[name].shape == y.shape
        assert float((found[name].double() - y).abs().max()) <= relative * largest, name


@pytest.fixture(autouse=True)
def few_partial_sums(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_triton, "processors", lambda _: 1)


@pytest.fixture
def large_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter takes as long for large tiles as for small ones."""
    config = triton_launch._config(16, 16, 8, 32, 4, 1)
    monkeypatch.setattr(triton_launch, "_configs", lambda *_: [config])
    monkeypatch.setattr(triton_launch, "_BIAS_CONFIGS", {2: config, 4: config})


@pytest.mark.usefixtures("large_tiles")
@pytest.mark.parametrize(
    "path",
    [pytest.param(path, marks=pytest.mark.slow if path.stem in LARGE else ()) for path in GOLDENS],
    ids=lambda path: path.stem,
)
def test_golden(path: Path) -> None:
    d, x, _, probe, expected = op_case(path.with_suffix(""))
    errors = []
    for impl in ("aten", "triton"):
        leaves = {name: y.detach().float().requires_grad_() for name, y in x.items()}
        query, key, value = (leaves[name].permute(0, 2, 3, 1, 4) for name in "qkv")
        call = {"kernel_size": tuple(d["kernel_size"]), "dilation": tuple(d["dilation"])}
        call |= {"bias": leaves.get("rpb"), "scale": d["scale"], "impl": impl}
        out = neighborhood_attention(query, key, value, **call).permute(0, 3, 1, 2, 4)
        grads = torch.autograd.grad((out * probe.float()).sum(), list(leaves.values()))
        found = {"out": out, **{f"grad_{n}": g for n, g in zip(leaves, grads, strict=True)}}
        assert set(found) == set(expected)
        errors.append({n: float((sample(found[n]) - y).abs().max()) for n, y in expected.items()})
    for name, y in expected.items():
        ulp = float(y.abs().max()) * torch.finfo(torch.float32).eps
        assert errors[1][name] <= 3 * errors[0][name] + 4 * ulp, name


@pytest.mark.parametrize(
    ("size", "kernel", "dilation", "padded", "biased"),
    [*((*shape, True) for shape in SHAPES), *((*shape, False) for shape in SHAPES[4:])],
)
def test_equals_the_definition(
    size: tuple[int, int], kernel: Any, dilation: Any, padded: bool, biased: bool
) -> None:
    leaves = inputs(size, kernel, padded, heads=1)
    if not biased:
        del leaves["bias"]
    call = {"kernel_size": kernel, "dilation": dilation}
    found = results(leaves, "triton", **call)
    assert_close(found, exact(leaves, **call))
    assert found["out"].is_contiguous()
    with torch.no_grad():
        again = neighborhood_attention(**leaves, **call, impl="triton")
    assert torch.equal(again, found["out"])


@pytest.mark.usefixtures("large_tiles")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("size", "kernel", "dilation", "head_dim", "biased"),
    [
        ((9, 10), 7, 1, 32, True),
        ((3, 11), 3, (1, 2), 24, False),
        ((9, 9), 9, 1, 48, True),
        ((4, 3), 3, 1, 80, True),
        ((3, 4), (1, 3), 1, 128, False),
    ],
)
def test_half_precision(
    size: tuple[int, int], kernel: Any, dilation: Any, head_dim: int, biased: bool, dtype: Any
) -> None:
    """At most three times the error of aten in that precision."""
    leaves = inputs(size, kernel, dtype=dtype, batch=2, heads=1, head_dim=head_dim)
    if not biased:
        del leaves["bias"]
    call = {"kernel_size": kernel, "dilation": dilation}
    expected = exact(leaves, **call)
    found, peer = (results(leaves, impl, **call) for impl in ("triton", "aten"))
    for name, y in expected.items():
        assert found[name].dtype == dtype
        floor = float(y.abs().max()) * torch.finfo(dtype).eps
        error, most = (float((x[name].double() - y).abs().max()) for x in (found, peer))
        assert error <= 3 * most + floor, name


@pytest.mark.parametrize("head_dim", [8, 20, 64])
def test_head_dims(head_dim: int) -> None:
    leaves = inputs((3, 4), 3, heads=2, head_dim=head_dim)
    assert_close(results(leaves, "triton", kernel_size=3), exact(leaves, kernel_size=3))


@pytest.mark.parametrize("config", range(8))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kernel", [(3, 9), (3, 11), (1, 15)])
def test_every_configuration_gives_the_same_numbers(
    kernel: tuple[int, int], dtype: torch.dtype, config: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    leaves = inputs((6, 16), kernel, dtype=dtype, heads=1)
    del leaves["bias"]
    configs = triton_launch._configs(leaves["query"], kernel)
    if config >= len(configs):
        return
    monkeypatch.setattr(triton_launch, "_configs", lambda *_: [configs[config]])
    found = results(leaves, "triton", kernel_size=kernel)
    close = 3e-6 if dtype == torch.float32 else 2e-2
    assert_close(found, exact(leaves, kernel_size=kernel), close)


@pytest.mark.parametrize("config", range(4))
@pytest.mark.parametrize("biased", [True, False])
def test_a_tile_of_several_images(
    config: int, biased: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Half precision: bias and mask are found once for all images that a program takes."""
    monkeypatch.setattr(triton_launch, "_IMAGE_CONFIGS", [triton_launch._IMAGE_CONFIGS[config]])
    monkeypatch.setattr(triton_launch, "_GRID", 1)
    leaves = inputs((9, 3), (5, 3), dtype=torch.bfloat16, batch=3, heads=1)
    if not biased:
        del leaves["bias"]
    found = results(leaves, "triton", kernel_size=(5, 3))
    assert_close(found, exact(leaves, kernel_size=(5, 3)), 2e-2)


@pytest.mark.parametrize("name", CALLS)
def test_calls(name: str) -> None:
    """What is timed and compiled elsewhere gives the right output."""
    leaves, rest = CALLS[name](torch.bfloat16, torch.device("cpu"), True)
    leaves = {n: x.detach() for n, x in leaves.items()}
    found = neighborhood_attention(**leaves, **rest, impl="triton")
    expected = neighborhood_attention(**leaves, **rest, impl="reference")
    torch.testing.assert_close(found, expected, rtol=2e-2, atol=2e-2)
    assert CALLS[name](torch.bfloat16, torch.device("cpu"), False)[0]["query"].shape[0] >= 8


@pytest.mark.usefixtures("large_tiles")
def test_layouts() -> None:
    """Maps of any strides; gradients that are not contiguous come from `gradients`."""
    x = torch.randn(2, 3, 5, 4, 8)
    views = [x.permute(0, 2, 3, 1, 4), x.permute(0, 3, 2, 1, 4).transpose(1, 2)]
    views.append(torch.randn(2, 7, 6, 3, 9)[:, 1:6, 1:5, :, :8])
    views.append(torch.randn(2, 5, 4, 3, 16)[..., ::2])
    views.append(torch.randn(1, 1, 4, 3, 8).expand(2, 5, -1, -1, -1))
    for query, key in itertools.pairwise([*views, views[0]]):
        expected = neighborhood_attention(query, key, views[2], 3, impl="reference")
        found = neighborhood_attention(query, key, views[2], 3, impl="triton")
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    for view in views[1:3]:
        leaves = {n: view.detach().requires_grad_() for n in ("query", "key", "value")}
        assert_close(results(leaves, "triton", kernel_size=3), exact(leaves, kernel_size=3))


@pytest.mark.parametrize("name", ["query", "key", "value", "bias"])
def test_one_gradient(name: str) -> None:
    leaves = inputs((4, 4), 3)
    wanted = exact(leaves, kernel_size=3)[name]
    others = {n: x if n == name else x.detach() for n, x in leaves.items()}
    out = neighborhood_attention(**others, kernel_size=3, impl="triton")
    (found,) = gradients(out, {name: leaves[name]}).values()
    torch.testing.assert_close(found.double(), wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.usefixtures("large_tiles")
def test_many_images(monkeypatch: pytest.MonkeyPatch) -> None:
    """More than a grid's axis takes."""
    monkeypatch.setattr(triton_launch, "_GRID", 2)
    leaves = inputs((3, 4), 3, batch=3)
    assert_close(results(leaves, "triton", kernel_size=3), exact(leaves, kernel_size=3))
    low = {n: x.detach().bfloat16() for n, x in leaves.items()}
    found = neighborhood_attention(**low, kernel_size=3, impl="triton")
    expected = neighborhood_attention(**low, kernel_size=3, impl="reference")
    torch.testing.assert_close(found, expected, rtol=2e-2, atol=2e-2)


@pytest.mark.usefixtures("large_tiles")
def test_large_scores() -> None:
    """Far from zero, of either sign, and with a negative scale."""
    leaves = inputs((4, 9), 3)
    for scale in (30.0, -30.0):
        call = {"kernel_size": 3, "scale": scale}
        assert_close(results(leaves, "triton", **call), exact(leaves, **call), 1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("padded", [False, True])
def test_empty_batch(padded: bool, dtype: torch.dtype) -> None:
    kernel = 7 if padded else 3
    leaves = inputs((5, 9), kernel, padded, dtype, batch=0)
    out = neighborhood_attention(**leaves, kernel_size=kernel, impl="triton")
    assert out.shape == leaves["query"].shape
    for name, grad in gradients(out, leaves).items():
        assert torch.equal(grad, torch.zeros_like(leaves[name])), name


@pytest.mark.usefixtures("large_tiles")
def test_autocast() -> None:
    """Maps are bfloat16, parameters and their gradients float32."""
    leaves = inputs((3, 4), 5, True)
    low = {n: x if n in ("bias", "pad") else x.bfloat16() for n, x in leaves.items()}
    with torch.autocast("cpu", torch.bfloat16):
        out = neighborhood_attention(**low, kernel_size=5, impl="triton")
    expected = neighborhood_attention(**low, kernel_size=5, impl="reference")
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out, expected, rtol=2e-2, atol=2e-2)
    found, wanted = gradients(out, leaves), gradients(expected, leaves)
    for name in leaves:
        assert found[name].dtype == torch.float32
        torch.testing.assert_close(found[name], wanted[name], rtol=5e-2, atol=1e-1, msg=name)


# The dispatcher's view.


@pytest.mark.usefixtures("large_tiles")
@pytest.mark.parametrize("biased", [True, False])
def test_opcheck(biased: bool) -> None:
    x = inputs((3, 4), 3)
    bias = x["bias"] if biased else None
    maps, window = (x["query"], x["key"], x["value"]), ((3, 3), (1, 1), 0.3)
    ops = torch.ops.vitarium
    # the log-sum-exp is a second result, without a gradient of its own
    which = ("test_schema", "test_autograd_registration", "test_faketensor")
    args = (*maps, bias, *window, True)
    torch.library.opcheck(ops.neighborhood_attention_triton, args, test_utils=which)
    args = [y.detach() if isinstance(y, Tensor) else y for y in args]
    out, lse = ops.neighborhood_attention_triton(*args)
    args = (out, *args[:4], out, lse, *window, biased)
    torch.library.opcheck(ops.neighborhood_attention_triton_backward, args)


@pytest.mark.usefixtures("large_tiles")
def test_second_derivatives_are_refused() -> None:
    leaves = inputs((3, 4), 3)
    out = neighborhood_attention(**leaves, kernel_size=3, impl="triton")
    (grad,) = torch.autograd.grad(out.sum(), leaves["query"], create_graph=True)
    with pytest.raises(RuntimeError, match="has no gradient; impl='reference'"):
        grad.sum().backward()


@pytest.mark.usefixtures("large_tiles")
@pytest.mark.parametrize("padded", [False, True])
def test_compile(padded: bool) -> None:
    """One graph, and one more for all batches: forward and backward."""
    counter = CompileCounterWithBackend("aot_eager")
    torch._dynamo.reset()
    compiled = torch.compile(neighborhood_attention, fullgraph=True, backend=counter)
    kernel = 5 if padded else 3
    for batch in (2, 3):
        leaves = inputs((3, 4), kernel, padded, batch=batch, heads=1)
        for x in leaves.values():
            torch._dynamo.mark_dynamic(x, 0) if x.ndim == 5 else None
        out = compiled(**leaves, kernel_size=kernel, impl="triton")
        found = {"out": out.detach(), **gradients(out, leaves)}
        assert_close(found, exact(leaves, kernel_size=kernel))
    assert counter.frame_count == 1


class Attention(torch.nn.Module):
    """What `torch.export` takes."""

    def __init__(self, impl: str) -> None:
        super().__init__()
        self.impl = impl

    def forward(self, x: dict[str, Tensor]) -> Tensor:
        return neighborhood_attention(**x, kernel_size=3, impl=self.impl)


@pytest.mark.usefixtures("large_tiles")
def test_export() -> None:
    """On request the program holds the op; ``auto`` takes ordinary functions."""
    leaves = {n: x.detach() for n, x in inputs((4, 5), 3).items()}
    expected = neighborhood_attention(**leaves, kernel_size=3, impl="reference")
    for impl, holds in (("triton", True), ("auto", False)):
        program = torch.export.export(Attention(impl), (leaves,))
        targets = {str(node.target) for node in program.graph.nodes}
        assert any("vitarium" in target for target in targets) == holds
        torch.testing.assert_close(program.module()(leaves), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.usefixtures("large_tiles")
def test_flops() -> None:
    """Those of the real queries' windows, padded or not; the gradient takes five products."""
    for size, kernel, padded in (((5, 7), 3, False), ((3, 4), 5, True)):
        leaves = inputs(size, kernel, padded)
        product = 2 * leaves["query"].numel() * kernel**2

        def training(call: dict[str, Any]) -> None:
            neighborhood_attention(**call, impl="triton").sum().backward()

        args = {**leaves, "kernel_size": kernel}
        assert flops(neighborhood_attention, **args, impl="triton") == 2 * product
        assert flops(training, args) == 7 * product


# Which implementation runs.


def test_which_implementation_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    leaves = {n: x.detach() for n, x in inputs((3, 3), 3).items()}
    ran = record(monkeypatch, "neighborhood")
    neighborhood_attention(**leaves, kernel_size=3)
    neighborhood_attention(**leaves, kernel_size=3, impl="triton")
    monkeypatch.setattr(_triton, "reserved", lambda *_: None)
    neighborhood_attention(**leaves, kernel_size=3)
    assert ran == ["aten", "triton", "triton"]


def test_reasons(monkeypatch: pytest.MonkeyPatch) -> None:
    def reason(**changes: Any) -> str | None:
        leaves = {n: x.detach() for n, x in inputs((3, 3), 3, **changes).items()}
        return explain("neighborhood", **leaves, kernel_size=3).reasons["triton"]

    assert reason() is None
    assert reason(dtype=torch.float64) == (
        "kernels take float16, bfloat16 and float32, got torch.float64"
    )
    monkeypatch.setattr(triton_launch, "_MAX_HEIGHT", 2)
    assert reason() == "kernels take maps of up to 2 rows, got 3"
    monkeypatch.undo()
    assert reason(head_dim=160) == "kernels take a head_dim up to 128, got 160"
    leaves = {n: x.detach() for n, x in inputs((3, 3), 3).items()}
    found = explain("neighborhood", **leaves, kernel_size=3)
    assert (found.chosen, found.reserved["triton"]) == ("aten", "its interpreter is for tests")
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    assert reason() == "kernels need a CUDA device, got cpu"
