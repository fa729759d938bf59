"""Channel attention: every implementation against the definition, the authors' numbers, timm."""

from __future__ import annotations

import itertools
import shutil
from pathlib import Path

import pytest
import torch
from golden import op_case, sample
from harness import flops, gradients, random_maps, record
from timm.models.davit import ChannelAttention, ChannelAttentionV2
from torch import Tensor

from vitarium.ops import channel_attention, explain, use_impl

pytestmark = pytest.mark.usefixtures("nan_memory")

GOLDENS = sorted(Path(__file__).parents[1].glob("golden/ops/channel_attention_*.json"))
EXACT = ("reference", "aten")
MODES = ("davit", "florence")
SIZES = [(9, 14), (1, 1), (1, 7), (7, 7), (13, 2)]


def inputs(
    size: tuple[int, int],
    dtype: torch.dtype = torch.float64,
    batch: int = 2,
    heads: int = 3,
    head_dim: int = 8,
) -> dict[str, Tensor]:
    """Random leaves, strided like three views of one projection."""
    found, _ = random_maps(size, dtype, batch, heads, head_dim)
    return {name: x.requires_grad_() for name, x in found.items()}


@pytest.mark.parametrize("impl", EXACT)
@pytest.mark.parametrize("path", GOLDENS, ids=lambda path: path.stem)
def test_golden(path: Path, impl: str) -> None:
    d, x, _, probe, expected = op_case(path.with_suffix(""))
    query, key, value = x["qkv"].unsqueeze(2).unbind(3)  # a map one token wide
    out = channel_attention(query, key, value, scale=d["params"]["scale"], impl=impl)
    out = out.flatten(3).flatten(1, 2)
    found = {"out": out, "grad_qkv": torch.autograd.grad((out * probe).sum(), x["qkv"])[0]}
    assert set(found) == set(expected)
    for name, y in expected.items():
        assert (sample(found[name]) - y).abs().max() <= 1e-7 * y.std(), name


def test_goldens_are_there() -> None:
    assert len(GOLDENS) == 6


@pytest.mark.parametrize("batch", [1, 2, 13], ids="batch{}".format)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("size", SIZES)
def test_aten_equals_the_definition(size: tuple[int, int], mode: str, batch: int) -> None:
    """Few images, and many: more than four for every head."""
    leaves = inputs(size, batch=batch)
    expected = channel_attention(**leaves, mode=mode, impl="reference")
    out = channel_attention(**leaves, mode=mode, impl="aten")
    torch.testing.assert_close(out, expected, rtol=1e-10, atol=1e-10)
    assert out.is_contiguous()
    assert expected.is_contiguous()
    wanted, found = gradients(expected, leaves), gradients(out, leaves)
    for name in leaves:
        torch.testing.assert_close(found[name], wanted[name], rtol=1e-9, atol=1e-9, msg=name)


@pytest.mark.parametrize("impl", EXACT)
@pytest.mark.parametrize(
    ("mode", "module", "scale"),
    [
        ("davit", ChannelAttention(24, 3), None),
        ("florence", ChannelAttentionV2(24, 3), None),
        ("florence", ChannelAttentionV2(24, 3, dynamic_scale=False), 8**-0.5),
    ],
)
def test_timm_agrees(mode: str, module: torch.nn.Module, scale: float | None, impl: str) -> None:
    module = module.double()
    x = torch.randn(2, 9 * 5, 24, dtype=torch.float64, requires_grad=True)
    expected = module(x)
    query, key, value = module.qkv(x).view(2, 9, 5, 3, 3, 8).unbind(3)
    out = channel_attention(query, key, value, mode, scale, impl)
    found = module.proj(out.flatten(3).flatten(1, 2))
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    leaves = [x, *module.parameters()]
    probe = torch.randn_like(expected)
    wanted = torch.autograd.grad(expected, leaves, probe)
    for a, b in zip(torch.autograd.grad(found, leaves, probe), wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("mode", MODES)
def test_gradcheck_of_the_definition(mode: str) -> None:
    leaves = inputs((2, 3), batch=1, heads=2, head_dim=3)

    def function(*tensors: Tensor) -> Tensor:
        return channel_attention(*tensors, mode=mode, impl="reference")

    assert torch.autograd.gradcheck(function, tuple(leaves.values()))


# Invariants that no oracle shares a bug with.


@pytest.mark.parametrize("impl", EXACT)
@pytest.mark.parametrize("mode", MODES)
def test_positions_are_a_set(mode: str, impl: str) -> None:
    """Moving all positions alike moves the output with them; one position twice is seen."""
    leaves = {n: x.detach() for n, x in inputs((4, 6)).items()}
    out = channel_attention(**leaves, mode=mode, impl=impl)
    order = torch.randperm(24)
    moved = {n: x.flatten(1, 2)[:, order].unflatten(1, (8, 3)) for n, x in leaves.items()}
    found = channel_attention(**moved, mode=mode, impl=impl)
    torch.testing.assert_close(found.flatten(1, 2), out.flatten(1, 2)[:, order])


@pytest.mark.parametrize("impl", EXACT)
@pytest.mark.parametrize(("mode", "mixed"), [("davit", "query"), ("florence", "value")])
def test_rows_sum_to_one(mode: str, mixed: str, impl: str) -> None:
    """What is equal in all channels of a head stays as it is."""
    leaves = {n: x.detach() for n, x in inputs((4, 6)).items()}
    leaves[mixed] = torch.randn(2, 4, 6, 3, 1, dtype=torch.float64).expand(-1, -1, -1, -1, 8)
    out = channel_attention(**leaves, mode=mode, impl=impl)
    torch.testing.assert_close(out, leaves[mixed].contiguous())


@pytest.mark.parametrize("impl", EXACT)
@pytest.mark.parametrize("mode", MODES)
def test_heads_and_images_are_independent(mode: str, impl: str) -> None:
    leaves = {n: x.detach() for n, x in inputs((5, 4)).items()}
    out = channel_attention(**leaves, mode=mode, impl=impl)
    heads = torch.tensor([2, 0, 1])
    moved = {n: x[:, :, :, heads].flip(0) for n, x in leaves.items()}
    found = channel_attention(**moved, mode=mode, impl=impl)
    torch.testing.assert_close(found, out[:, :, :, heads].flip(0))


# Precision, memory layout, compilation.


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_error_is_that_of_plain_products(dtype: torch.dtype, mode: str) -> None:
    """At most 3x the error of the same-precision matmul and softmax."""
    leaves = inputs((13, 13), dtype, head_dim=32)
    out = channel_attention(**leaves, mode=mode, impl="aten")
    assert out.dtype == dtype
    grads = gradients(out, leaves)
    exact = {n: x.detach().double().requires_grad_() for n, x in leaves.items()}
    expected = channel_attention(**exact, mode=mode, impl="reference")
    wanted = gradients(expected, exact)

    query, key, value = (x.flatten(1, 2).transpose(1, 2) for x in leaves.values())
    if mode == "davit":
        plain = ((key * 32**-0.5).mT @ value).softmax(-1) @ query.mT
    else:
        plain = ((query / 13).mT @ key).softmax(-1) @ value.mT
    plain = plain.permute(0, 3, 1, 2).reshape(out.shape)
    peer = gradients(plain, leaves)

    def error(found: Tensor, oracle: Tensor) -> float:
        return float((found.detach().double() - oracle.detach()).abs().mean())

    assert error(out, expected) <= 3 * error(plain, expected)
    for name in leaves:
        assert error(grads[name], wanted[name]) <= 3 * error(peer[name], wanted[name]), name


def test_large_scores_do_not_overflow() -> None:
    """DaViT's scores grow with the map, past the range of float16."""
    leaves = {n: 30 * x.detach() for n, x in inputs((40, 40), torch.float16).items()}
    out = channel_attention(**leaves)
    expected = channel_attention(**leaves, impl="reference")
    torch.testing.assert_close(out, expected, rtol=1e-3, atol=1e-2)


def test_autocast() -> None:
    leaves = inputs((5, 6), torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        inside = channel_attention(**leaves)
    assert torch.equal(inside, channel_attention(**leaves))


def test_layouts() -> None:
    """Heads-last views, permuted and cropped maps are read as they are."""
    x = torch.randn(2, 3, 12, 11, 8, dtype=torch.float64)
    views = [x.permute(0, 2, 3, 1, 4), x.permute(0, 3, 2, 1, 4).transpose(1, 2)]
    views.append(torch.randn(2, 15, 14, 3, 8).double()[:, 2:14, 1:12])
    views.append(torch.randn(2, 12, 11, 3, 16).double()[..., ::2])
    for query, key in itertools.product(views, views):
        expected = channel_attention(query, key, views[0], impl="reference")
        torch.testing.assert_close(channel_attention(query, key, views[0]), expected)


def test_empty_batch() -> None:
    leaves = inputs((5, 9), batch=0)
    out = channel_attention(**leaves)
    assert out.shape == leaves["query"].shape
    for name, grad in gradients(out, leaves).items():
        assert torch.equal(grad, torch.zeros_like(leaves[name])), name


def test_meta_tensors_give_shapes() -> None:
    query = torch.empty(2, 7, 9, 3, 8, device="meta", requires_grad=True)
    out = channel_attention(query, query, query)
    assert out.shape == query.shape
    assert torch.autograd.grad(out, query, torch.empty_like(out))[0].shape == query.shape


def test_only_maps_and_small_weights_are_kept() -> None:
    leaves = inputs((20, 20), torch.float32)
    kept: list[Tensor] = []

    def pack(x: Tensor) -> Tensor:
        kept.append(x)
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        channel_attention(**leaves)
    maps = {x.data_ptr() for x in leaves.values()}
    others = [x for x in kept if x.data_ptr() not in maps]
    assert [tuple(x.shape) for x in others] == [(2, 3, 8, 8)]


def test_repeatable() -> None:
    torch.set_num_threads(2)
    leaves = inputs((20, 21), torch.float32)
    runs = []
    for _ in range(3):
        out = channel_attention(**leaves)
        runs.append([out, *gradients(out, leaves).values()])
    torch.set_num_threads(1)
    for run in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(run, runs[0], strict=True))


class Attention(torch.nn.Module):
    """What `torch.export` takes."""

    def __init__(self, mode: str) -> None:
        super().__init__()
        self.mode = mode

    def forward(self, x: dict[str, Tensor]) -> Tensor:
        return channel_attention(**x, mode=self.mode)


@pytest.mark.parametrize("mode", MODES)
def test_compile_fullgraph(mode: str) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(channel_attention, fullgraph=True, backend="aot_eager", dynamic=True)
    for size in ((9, 13), (4, 30)):
        leaves = inputs(size)
        expected = channel_attention(**leaves, mode=mode, impl="reference")
        wanted = gradients(expected, leaves)
        out = compiled(**leaves, mode=mode)
        torch.testing.assert_close(out, expected)
        for name, grad in gradients(out, leaves).items():
            torch.testing.assert_close(grad, wanted[name], msg=name)


@pytest.mark.skipif(shutil.which("c++") is None, reason="inductor needs a C++ compiler")
@pytest.mark.parametrize("mode", MODES)
def test_compile_with_inductor(mode: str) -> None:
    leaves = {n: x.detach() for n, x in inputs((9, 13), torch.float32).items()}
    expected = channel_attention(**leaves, mode=mode, impl="reference")
    exported = torch.export.export(Attention(mode), (leaves,)).module()
    for module in (Attention(mode), exported):
        torch._dynamo.reset()
        out = torch.compile(module, fullgraph=True)(leaves)
        torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("mode", MODES)
def test_export(mode: str) -> None:
    leaves = {n: x.detach() for n, x in inputs((6, 8)).items()}
    dims = {0: torch.export.Dim("B"), 1: torch.export.Dim("H"), 2: torch.export.Dim("W")}
    shapes = {"x": dict.fromkeys(leaves, dims)}
    program = torch.export.export(Attention(mode), (leaves,), dynamic_shapes=shapes)
    assert not any("vitarium" in str(node.target) for node in program.graph.nodes)
    for size, batch in (((6, 8), 2), ((5, 17), 4)):
        x = {n: y.detach() for n, y in inputs(size, batch=batch).items()}
        expected = channel_attention(**x, mode=mode, impl="reference")
        torch.testing.assert_close(program.module()(x), expected)


# The dispatcher's view.


@pytest.mark.parametrize(("batch", "scale"), [(2, 0.3), (13, None)])
def test_opcheck(batch: int, scale: float | None) -> None:
    ops = torch.ops.vitarium
    maps = tuple(inputs((5, 7), batch=batch).values())
    torch.library.opcheck(ops.channel_attention_aten, (*maps, scale))
    maps = tuple(x.detach() for x in maps)
    out, weights = ops.channel_attention_aten(*maps, scale)
    torch.library.opcheck(ops.channel_attention_aten_backward, (out, *maps, weights, scale))


def test_second_derivatives_are_refused() -> None:
    leaves = inputs((5, 7))
    out = channel_attention(**leaves, impl="aten")
    (grad,) = torch.autograd.grad(out.sum(), leaves["query"], create_graph=True)
    with pytest.raises(RuntimeError, match="has no gradient; impl='reference'"):
        grad.sum().backward()


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_flops_are_the_formula(device: str) -> None:
    """Two products of head_dim x head_dim at every position; the gradient takes four."""
    leaves = inputs((9, 14), torch.float32)
    leaves = {n: x.detach().to(device).requires_grad_() for n, x in leaves.items()}
    product = 2 * leaves["query"].numel() * 8
    assert flops(channel_attention, **leaves) == 2 * product
    assert flops(channel_attention, **leaves, impl="reference") == 2 * product

    def training() -> None:
        channel_attention(**leaves).sum().backward()

    assert flops(training) == 6 * product


# Which implementation runs, and what is refused.


def test_which_implementation_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    x = {n: y.detach() for n, y in inputs((4, 5)).items()}
    ran = record(monkeypatch, "channel")
    monkeypatch.delenv("VITARIUM_OPS", raising=False)
    channel_attention(**x)
    channel_attention(**x, impl="reference")
    with use_impl({"channel": "reference"}):
        channel_attention(**x)
    assert ran == ["aten", "reference", "reference"]
    assert explain(channel_attention, **x).chosen == "aten"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"query": torch.zeros(2, 4, 5, 24)}, "query: expected rank 5"),
        ({"key": torch.zeros(2, 4, 5, 3, 9)}, "key: expected query's shape"),
        ({"value": torch.zeros(2, 4, 5, 3, 8).half()}, "value: expected query's dtype"),
        ({"mode": "v2"}, "mode: expected 'davit' or 'florence', got 'v2'"),
        ({"scale": "dynamic"}, "scale: expected a number, got str"),
        ({"impl": "natten"}, "channel has no such implementation"),
    ],
)
def test_bad_input(change: dict[str, object], message: str) -> None:
    call = {n: x.detach() for n, x in inputs((4, 5), torch.float32).items()} | change
    with pytest.raises(ValueError, match=message):
        channel_attention(**call)
