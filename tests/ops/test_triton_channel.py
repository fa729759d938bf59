"""Channel attention's Triton kernels in the interpreter: numbers, layouts, the dispatcher."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import harness
import pytest
import torch
from golden import op_case, sample
from harness import flops, gradients, in_interpreter, random_maps, record
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from vitarium.ops import _triton, channel_attention, explain
from vitarium.ops.channel_attn import triton_launch

pytestmark = [
    pytest.mark.usefixtures("nan_memory"),
    in_interpreter,
]

GOLDENS = sorted(Path(__file__).parents[1].glob("golden/ops/channel_attention_*.json"))
MODES = ("davit", "florence")
HALVES = (torch.float16, torch.bfloat16)
OPS = torch.ops.vitarium
computed = partial(harness.computed, channel_attention)
assert_as_exact_as_aten = partial(harness.assert_as_exact_as_aten, channel_attention, few=2)


@pytest.fixture(params=[False, True], ids=["alone", "parts"])
def parts(request, monkeypatch):
    """One program for every head, or parts of more than 128 tokens where there are so many."""
    monkeypatch.setattr(triton_launch, "_ALONE", 0 if request.param else 1 << 40)
    monkeypatch.setattr(_triton, "processors", lambda device: 100)
    return request.param


def inputs(
    size: tuple[int, int],
    dtype: torch.dtype = torch.float32,
    batch: int = 1,
    heads: int = 2,
    head_dim: int = 8,
) -> dict[str, Tensor]:
    """Random leaves, strided like three views of one projection."""
    found, _ = random_maps(size, dtype, batch, heads, head_dim)
    return {name: x.requires_grad_() for name, x in found.items()}


@pytest.mark.parametrize("path", GOLDENS, ids=lambda path: path.stem)
def test_golden(path: Path, parts: bool) -> None:
    d, x, _, probe, expected = op_case(path.with_suffix(""))
    errors = {}
    for impl in ("aten", "triton"):
        qkv = x["qkv"].detach().float().requires_grad_()
        query, key, value = qkv.unsqueeze(2).unbind(3)
        out = channel_attention(query, key, value, scale=d["params"]["scale"], impl=impl)
        out = out.flatten(3).flatten(1, 2)
        found = {"out": out, "grad_qkv": torch.autograd.grad(out, qkv, probe.float())[0]}
        errors[impl] = {n: float((sample(found[n]) - y).abs().max()) for n, y in expected.items()}
    for name, y in expected.items():
        allowed = max(3 * errors["aten"][name], 1e-6 * float(y.abs().max()))
        assert errors["triton"][name] <= allowed, name


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("size", [(9, 14), (1, 1), (1, 7), (7, 7), (2, 65), (13, 21)])
def test_sizes(size: tuple[int, int], mode: str, parts: bool, kernels: list[str]) -> None:
    assert_as_exact_as_aten(inputs(size), mode=mode)
    forward = ["_channel_fwd_kernel"]
    backward = ["_channel_bwd_kernel"]
    if parts and size[0] * size[1] > 128:
        forward = ["_channel_products_kernel", "_channel_weights_kernel", *forward]
        backward = ["_channel_bwd_products_kernel", "_channel_weights_kernel", *backward]
    assert kernels == forward + backward


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", HALVES)
def test_half_precision(dtype: torch.dtype, mode: str, parts: bool) -> None:
    assert_as_exact_as_aten(inputs((13, 15), dtype, heads=1, head_dim=32), mode=mode)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("head_dim", [1, 16, 24, 48, 64, 80, 128])
def test_head_dims(head_dim: int, dtype: torch.dtype, parts: bool, kernels: list[str]) -> None:
    size = (1, max(128, 4 * head_dim) + 3)  # two parts
    assert_as_exact_as_aten(inputs(size, dtype, heads=1, head_dim=head_dim), scale=0.1)
    assert len(kernels) == (6 if parts else 2)


@pytest.mark.parametrize(
    ("dtype", "head_dim", "number"),
    [
        *((torch.float16, 24, n) for n in range(6)),
        *((torch.float16, 64, n) for n in range(5)),
        *((torch.float16, 128, n) for n in range(3)),
        *((torch.float32, 24, n) for n in range(3)),
        *((torch.float32, 64, n) for n in range(2)),
    ],
)
def test_every_configuration(
    dtype: torch.dtype, head_dim: int, number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    launch = _triton.launch

    def only(kernel: Any, grid: Any, arguments: Any, configs: Any, key: Any = ()) -> None:
        config = configs[number if len(configs) > 1 else 0]
        launch(kernel, grid, arguments, [config], key)

    monkeypatch.setattr(_triton, "launch", only)
    assert_as_exact_as_aten(inputs((9, 15), dtype, heads=1, head_dim=head_dim))


@pytest.mark.parametrize("parts", [True], indirect=True)
def test_many_parts(parts: bool) -> None:
    """More than the summing kernel takes at once."""
    leaves = inputs((1, 2100), heads=1)
    assert triton_launch._parts(leaves["query"].flatten(1, 2)) == (17, 128)
    assert_as_exact_as_aten(leaves)


def test_parts_fill_a_card(monkeypatch) -> None:
    """Few heads are divided, but not too far; many, or small ones, are not."""
    monkeypatch.setattr(_triton, "processors", lambda device: 132)

    def number(batch: int, tokens: int, heads: int, head_dim: int) -> tuple[int, int]:
        found = triton_launch._parts(torch.empty(batch, tokens, heads, head_dim, device="meta"))
        assert (found[0] - 1) * found[1] < tokens <= found[0] * found[1]
        return found

    assert number(1, 15200, 3, 32) == (119, 128)
    assert number(16, 3136, 3, 32) == (9, 384)
    assert number(1, 3136, 3, 128) == (7, 512)
    assert number(128, 3136, 3, 32) == (1, 3136)
    assert number(1, 196, 12, 32) == (1, 196)


def layouts() -> dict[str, Tensor]:
    """Maps [2, 12, 11, 2, 8] in memory; nothing around them may be read."""
    nan = float("nan")
    found = {
        "heads first": torch.empty(2, 2, 12, 11, 8).permute(0, 2, 3, 1, 4),
        "columns first": torch.empty(2, 11, 12, 2, 8).transpose(1, 2),
        "channels first": torch.empty(2, 2, 8, 12, 11).permute(0, 3, 4, 1, 2),
        "cropped": torch.full((2, 15, 14, 2, 8), nan)[:, 2:14, 1:12],
        "narrow": torch.full((2, 12, 11, 2, 11), nan)[..., 1:9],
        "stepped": torch.full((2, 12, 11, 2, 16), nan)[..., ::2],
        "batch last": torch.empty(12, 11, 2, 8, 2).permute(4, 0, 1, 2, 3),
    }
    for x in found.values():
        x.copy_(torch.randn(2, 12, 11, 2, 8))
    found["one head"] = torch.randn(2, 12, 11, 1, 8).expand(-1, -1, -1, 2, -1)
    return found


@pytest.mark.parametrize("number", range(8))
def test_layouts(number: int, parts: bool) -> None:
    """Each one as query, as key and as value."""
    torch.manual_seed(0)
    views = list(layouts().values())
    views = views[number:] + views[:number]
    names = ("query", "key", "value")
    assert_as_exact_as_aten(
        {n: x.detach().requires_grad_() for n, x in zip(names, views, strict=False)}
    )


def test_maps_of_one_projection_are_not_copied(monkeypatch) -> None:
    leaves = inputs((9, 14))
    seen: list[int] = []
    monkeypatch.setattr(
        _triton,
        "launch",
        lambda kernel, grid, arguments, *_: seen.extend(
            arguments[f"{name}_ptr"].data_ptr() for name in ("mixed", "left", "right")
        ),
    )
    channel_attention(**leaves, impl="triton")
    assert seen == [x.data_ptr() for x in leaves.values()]


@pytest.mark.parametrize(("small", "large"), [(1e-2, 50.0), (100.0, 0.2)])
def test_gradients_of_products_have_no_range(small: float, large: float, parts: bool) -> None:
    """They are sums over a map, which float16 does not hold, nor what is left of tiny ones."""
    leaves = inputs((13, 15), torch.float16)
    leaves = {n: x.detach() * small for n, x in leaves.items()}
    leaves["query"] *= large / small
    leaves = {n: x.requires_grad_() for n, x in leaves.items()}
    exact = {n: x.detach().double().requires_grad_() for n, x in leaves.items()}
    scale = 0.1 / small**2  # weights that are neither even nor certain
    grads = []
    for maps, impl in ((exact, "reference"), (leaves, "triton")):
        out = channel_attention(**maps, scale=scale / 14, impl=impl)
        probe = torch.full_like(out, large)
        probe[:, ::2] *= -1
        grads.append(torch.autograd.grad(out, list(maps.values()), probe))
    for expected, found in zip(*grads, strict=True):
        error = (found.double() - expected).abs().max()
        assert error <= 0.01 * expected.abs().max()


def test_large_scores_do_not_overflow() -> None:
    """DaViT's scores grow with the map, past the range of float16."""
    leaves = {n: 30 * x.detach() for n, x in inputs((20, 20), torch.float16).items()}
    out = channel_attention(**leaves, impl="triton")
    expected = channel_attention(**leaves, impl="reference")
    torch.testing.assert_close(out, expected, rtol=1e-3, atol=1e-2)


def test_autocast() -> None:
    leaves = inputs((5, 6), torch.bfloat16)
    with torch.autocast("cpu", torch.float16):
        inside = computed(leaves, "triton")
    for name, x in computed(leaves, "triton").items():
        assert torch.equal(inside[name], x), name


def test_empty_batch(kernels: list[str]) -> None:
    leaves = inputs((5, 9), batch=0)
    for name, x in computed(leaves, "triton").items():
        assert x.shape == leaves["query"].shape, name
    assert not kernels


def test_only_maps_and_small_weights_are_kept(parts: bool) -> None:
    leaves = inputs((13, 15))
    kept: list[Tensor] = []

    def pack(x: Tensor) -> Tensor:
        kept.append(x)
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        channel_attention(**leaves, impl="triton")
    maps = {x.data_ptr() for x in leaves.values()}
    assert [tuple(x.shape) for x in kept if x.data_ptr() not in maps] == [(1, 2, 8, 8)]


def test_weights_are_kept_for_gradients_alone(parts: bool) -> None:
    """What was recorded without any computes them again."""
    maps = tuple(inputs((13, 15)).values())
    for keep in (True, False):
        out, weights = OPS.channel_attention_triton(*maps, None, keep)
        assert weights.numel() == keep * 2 * 8 * 8
        grads = torch.autograd.grad(out, maps, torch.ones_like(out) * out.detach())
        if keep:
            expected = grads
    for a, b in zip(grads, expected, strict=True):
        assert torch.equal(a, b)


def test_only_gradients_that_are_wanted() -> None:
    leaves = inputs((5, 6))
    value = leaves["value"].detach()
    out = channel_attention(leaves["query"], leaves["key"], value, impl="triton")
    out.sum().backward()
    assert leaves["query"].grad is not None
    assert leaves["key"].grad is not None
    assert value.grad is None


@pytest.mark.parametrize(("scale", "keep"), [(0.3, True), (None, False)])
def test_opcheck(scale: float | None, keep: bool) -> None:
    maps = tuple(inputs((3, 5)).values())
    if not keep:
        maps = tuple(x.detach() for x in maps)
    torch.library.opcheck(OPS.channel_attention_triton, (*maps, scale, keep))
    maps = tuple(x.detach() for x in maps)
    out, weights = OPS.channel_attention_triton(*maps, scale, True)
    grad = out.transpose(1, 3).contiguous().transpose(1, 3)
    torch.library.opcheck(OPS.channel_attention_triton_backward, (grad, *maps, weights, scale))


def test_second_derivatives_are_refused() -> None:
    leaves = inputs((5, 7))
    out = channel_attention(**leaves, impl="triton")
    (grad,) = torch.autograd.grad(out.sum(), leaves["query"], create_graph=True)
    with pytest.raises(RuntimeError, match="has no gradient; impl='reference'"):
        grad.sum().backward()


def test_flops_are_the_formula() -> None:
    leaves = inputs((9, 14))
    product = 2 * leaves["query"].numel() * 8

    def training() -> None:
        channel_attention(**leaves, impl="triton").sum().backward()

    assert flops(training) == 6 * product


@pytest.mark.parametrize("mode", MODES)
def test_compile_fullgraph(mode: str) -> None:
    """Forward and backward, any size and batch, in few graphs."""
    torch._dynamo.reset()
    backend = CompileCounterWithBackend("aot_eager")

    def attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return channel_attention(query, key, value, mode=mode, impl="triton")

    compiled = torch.compile(attention, fullgraph=True, backend=backend)
    for size, batch in (((9, 13), 2), ((4, 15), 3), ((7, 7), 4)):
        leaves = inputs(size, batch=batch)
        expected = computed(leaves, "triton", mode=mode)
        out = compiled(**leaves)
        found = {"out": out.detach(), **gradients(out, leaves)}
        for name, x in expected.items():
            torch.testing.assert_close(found[name], x, msg=name)
    assert backend.frame_count <= 2


class Attention(torch.nn.Module):
    """What `torch.export` takes."""

    def __init__(self, impl: str) -> None:
        super().__init__()
        self.impl = impl

    def forward(self, x: dict[str, Tensor]) -> Tensor:
        return channel_attention(**x, mode="florence", impl=self.impl)


@pytest.mark.parametrize("impl", ["triton", "auto"])
def test_export(impl: str) -> None:
    """The op where it is asked for, ordinary functions elsewhere."""
    leaves = {n: x.detach() for n, x in inputs((6, 8), batch=2).items()}
    dims = {0: torch.export.Dim("B"), 1: torch.export.Dim("H"), 2: torch.export.Dim("W")}
    shapes = {"x": dict.fromkeys(leaves, dims)}
    program = torch.export.export(Attention(impl), (leaves,), dynamic_shapes=shapes)
    nodes = " ".join(str(node.target) for node in program.graph.nodes)
    assert ("vitarium.channel_attention_triton" in nodes) == (impl == "triton")
    x = {n: y.detach() for n, y in inputs((5, 17), batch=3).items()}
    expected = channel_attention(**x, mode="florence", impl="reference")
    torch.testing.assert_close(program.module()(x), expected)


def test_which_implementation_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    x = {n: y.detach() for n, y in inputs((4, 5)).items()}
    ran = record(monkeypatch, "channel")
    channel_attention(**x)
    channel_attention(**x, impl="triton")
    assert ran == ["aten", "triton"]
    found = explain("channel", **x)
    assert found.reasons["triton"] is None
    assert found.reserved["triton"] == "its interpreter is for tests"


@pytest.mark.parametrize(
    ("head_dim", "dtype", "interpret", "reason"),
    [
        (8, torch.float32, "0", "kernels need a CUDA device, got cpu"),
        (8, torch.float64, "1", "kernels take float16, bfloat16 and float32, got torch.float64"),
        (129, torch.float32, "1", "kernels take a head_dim up to 128, got 129"),
    ],
)
def test_reasons(
    head_dim: int, dtype: torch.dtype, interpret: str, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", interpret)
    x = {n: y.detach() for n, y in inputs((2, 3), dtype, head_dim=head_dim).items()}
    assert explain("channel", **x).reasons["triton"] == reason
    with pytest.raises(ValueError, match=reason):
        channel_attention(**x, impl="triton")
