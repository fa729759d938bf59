"""Neighborhood attention: every implementation against the definition and the authors' numbers."""

from __future__ import annotations

import itertools
import shutil
from pathlib import Path

import pytest
import timm
import torch
from golden import op_case, sample
from harness import flops, gradients, random_maps, record
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from vitarium.ops import explain, neighborhood_attention, use_impl

pytestmark = pytest.mark.usefixtures("nan_memory")

GOLDENS = sorted(Path(__file__).parents[1].glob("golden/ops/neighborhood2d_[0-9]*.json"))
EXACT = ("reference", "aten")

# (H, W), kernel_size, dilation, padded: non-square, ragged tiles and classes, size 1, window = map,
# dilated global, kernel 1, maps smaller than the window on one or both axes
SHAPES = [
    ((9, 14), 3, 1, False),
    ((15, 8), (5, 7), 1, False),
    ((1, 1), 1, 1, False),
    ((1, 9), (1, 3), 1, False),
    ((7, 7), 7, 1, False),
    ((14, 6), (7, 3), (2, 2), False),
    ((23, 11), (3, 5), (4, 2), False),
    ((40, 33), 7, (3, 2), False),
    ((30, 31), 13, 1, False),
    ((3, 5), 7, 1, True),
    ((1, 1), 7, 1, True),
    ((10, 2), 3, (2, 3), True),
    ((5, 16), 7, 2, True),
]


def inputs(
    size: tuple[int, int],
    kernel: int | tuple[int, int],
    padded: bool,
    dtype: torch.dtype = torch.float64,
    batch: int = 2,
    heads: int = 3,
    head_dim: int = 8,
    seed: int = 0,
) -> dict[str, Tensor]:
    """Random leaves, strided like three views of one projection."""
    kh, kw = (kernel, kernel) if isinstance(kernel, int) else kernel

    found, normal = random_maps(size, dtype, batch, heads, head_dim, seed)
    found["bias"] = normal(heads, 2 * kh - 1, 2 * kw - 1)
    if padded:
        found["pad"] = normal(3, heads, head_dim)
    return {name: x.requires_grad_() for name, x in found.items()}


@pytest.mark.parametrize("impl", EXACT)
@pytest.mark.parametrize("path", GOLDENS, ids=lambda path: path.stem)
def test_golden(path: Path, impl: str) -> None:
    d, x, _, probe, expected = op_case(path.with_suffix(""))
    query, key, value = (x[name].permute(0, 2, 3, 1, 4) for name in "qkv")
    kernel, dilation = tuple(d["kernel_size"]), tuple(d["dilation"])
    out = neighborhood_attention(
        query, key, value, kernel, dilation, bias=x.get("rpb"), scale=d["scale"], impl=impl
    ).permute(0, 3, 1, 2, 4)
    found = {"out": out}
    grads = torch.autograd.grad((out * probe).sum(), list(x.values()))
    found |= {f"grad_{name}": g for name, g in zip(x, grads, strict=True)}
    assert set(found) == set(expected)
    for name, y in expected.items():
        assert (sample(found[name]) - y).abs().max() <= 1e-7 * y.std(), name


def test_goldens_are_there() -> None:
    assert len(GOLDENS) == 16


@pytest.mark.parametrize("biased", [True, False], ids=["bias", "plain"])
@pytest.mark.parametrize(("size", "kernel", "dilation", "padded"), SHAPES)
def test_aten_equals_the_definition(
    size: tuple[int, int], kernel: int, dilation: int, padded: bool, biased: bool
) -> None:
    leaves = inputs(size, kernel, padded)
    if not biased:
        del leaves["bias"]
    expected = neighborhood_attention(
        **leaves, kernel_size=kernel, dilation=dilation, impl="reference"
    )
    out = neighborhood_attention(**leaves, kernel_size=kernel, dilation=dilation, impl="aten")
    torch.testing.assert_close(out, expected, rtol=1e-10, atol=1e-10)
    assert out.is_contiguous()
    wanted, found = gradients(expected, leaves), gradients(out, leaves)
    for name in leaves:
        torch.testing.assert_close(found[name], wanted[name], rtol=1e-9, atol=1e-9, msg=name)
    with torch.no_grad():
        again = neighborhood_attention(**leaves, kernel_size=kernel, dilation=dilation)
    torch.testing.assert_close(again, expected, rtol=1e-10, atol=1e-10)


def test_parts_and_images_do_not_mix(monkeypatch: pytest.MonkeyPatch) -> None:
    """Many parts, several images a part, and one tile a part give the same numbers."""
    from vitarium.ops.neighborhood_attn import gather

    leaves = inputs((12, 24), 5, False, batch=4)
    expected = neighborhood_attention(**leaves, kernel_size=5, impl="reference")
    wanted = gradients(expected, leaves)
    for chunk in (1, 1 << 13, 1 << 15, 1 << 30):
        monkeypatch.setattr(gather, "CHUNK", chunk)
        out = neighborhood_attention(**leaves, kernel_size=5)
        torch.testing.assert_close(out, expected)
        for name, grad in gradients(out, leaves).items():
            torch.testing.assert_close(grad, wanted[name], msg=name)


@pytest.mark.parametrize("tile", [(1, 1), (2, 5), (4, 12), (3, 11), (10, 12)])
def test_every_tile_gives_the_same_numbers(
    tile: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    from vitarium.ops.neighborhood_attn import tiles

    monkeypatch.setattr(tiles, "best_tile", lambda *_: tile)
    for dilation, padded in ((1, False), ((3, 2), True)):
        leaves = inputs((10, 12), 5, padded)
        args = dict(leaves, kernel_size=5, dilation=dilation)
        expected = neighborhood_attention(**args, impl="reference")
        out = neighborhood_attention(**args, impl="aten")
        torch.testing.assert_close(out, expected)
        wanted = gradients(expected, leaves)
        for name, grad in gradients(out, leaves).items():
            torch.testing.assert_close(grad, wanted[name], msg=name)


def test_gradcheck_of_the_definition() -> None:
    leaves = inputs((4, 2), 3, True, batch=1, heads=2, head_dim=2)
    names = list(leaves)

    def function(*tensors: Tensor) -> Tensor:
        call = dict(zip(names, tensors, strict=True))
        return neighborhood_attention(**call, kernel_size=3, impl="reference")

    assert torch.autograd.gradcheck(function, tuple(leaves.values()))


# Invariants that no oracle shares a bug with.


@pytest.mark.parametrize("impl", EXACT)
@pytest.mark.parametrize(("size", "kernel", "dilation"), [((9, 12), 5, 1), ((11, 13), 3, (3, 4))])
def test_window(impl: str, size: tuple[int, int], kernel: int, dilation: int) -> None:
    """A query sees kernel x kernel keys, of its own class, the nearest ones; rows sum to one."""
    height, width = size
    tokens = height * width
    query = torch.randn(1, height, width, 1, tokens, dtype=torch.float64)
    value = torch.eye(tokens, dtype=torch.float64).view(1, height, width, 1, tokens)
    weights = neighborhood_attention(query, query, value, kernel, dilation, impl=impl)[0, :, :, 0]
    assert torch.allclose(weights.sum(-1), torch.ones(()).double())
    assert ((weights > 0).sum(-1) == kernel**2).all()
    dh, dw = (dilation, dilation) if isinstance(dilation, int) else dilation
    for i, j in itertools.product(range(height), range(width)):
        rows, columns = weights[i, j].view(height, width).nonzero().unbind(1)
        assert ((rows - i) % dh == 0).all()
        assert ((columns - j) % dw == 0).all()
        for at, found, length, d in ((i, rows, height, dh), (j, columns, width, dw)):
            members = torch.arange(at % d, length, d)
            nearest = members[(members - at).abs().argsort(stable=True)[:kernel]]
            assert set(found.tolist()) == set(nearest.tolist())


@pytest.mark.parametrize("impl", EXACT)
def test_equal_keys_average_the_window(impl: str) -> None:
    leaves = {n: x.detach() for n, x in inputs((8, 6), 3, False).items()}
    leaves["key"] = torch.ones_like(leaves["key"])
    del leaves["bias"]
    out = neighborhood_attention(**leaves, kernel_size=3, impl=impl)
    value = leaves["value"]
    torch.testing.assert_close(out[:, 0, 0], value[:, :3, :3].mean((1, 2)))
    torch.testing.assert_close(out[:, 4, 3], value[:, 3:6, 2:5].mean((1, 2)))
    torch.testing.assert_close(out[:, 7, 5], value[:, 5:, 3:].mean((1, 2)))


@pytest.mark.parametrize("impl", EXACT)
def test_whole_map_is_dense_attention(impl: str) -> None:
    leaves = inputs((7, 5), (7, 5), False)
    del leaves["bias"]
    out = neighborhood_attention(**leaves, kernel_size=(7, 5), impl=impl)
    q, k, v = (leaves[n].flatten(1, 2).transpose(1, 2) for n in ("query", "key", "value"))
    dense = torch.nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2)
    torch.testing.assert_close(out, dense.reshape(out.shape))


@pytest.mark.parametrize("impl", EXACT)
def test_heads_and_images_are_independent(impl: str) -> None:
    leaves = {n: x.detach() for n, x in inputs((9, 8), 3, False).items()}
    out = neighborhood_attention(**leaves, kernel_size=3, impl=impl)
    heads = torch.tensor([2, 0, 1])
    moved = {n: x[heads] if n == "bias" else x[:, :, :, heads].flip(0) for n, x in leaves.items()}
    found = neighborhood_attention(**moved, kernel_size=3, impl=impl)
    torch.testing.assert_close(found, out[:, :, :, heads].flip(0))


@pytest.mark.parametrize("impl", EXACT)
def test_padding_is_a_larger_map(impl: str) -> None:
    """``pad`` gives what attention on the padded map gives, cropped."""
    leaves = {n: x.detach() for n, x in inputs((4, 9), 5, True).items()}
    pad = leaves.pop("pad")
    out = neighborhood_attention(**leaves, kernel_size=5, pad=pad, impl=impl)
    names = ("query", "key", "value")
    grown = {
        n: torch.cat([leaves[n], pad[i].expand(2, 1, 9, -1, -1)], 1) for i, n in enumerate(names)
    }
    whole = neighborhood_attention(**grown, kernel_size=5, bias=leaves["bias"], impl=impl)
    torch.testing.assert_close(out, whole[:, :4])
    large = {n: x.detach() for n, x in inputs((6, 9), 5, True).items()}
    assert torch.equal(
        neighborhood_attention(**large, kernel_size=5, impl=impl),
        neighborhood_attention(**large | {"pad": None}, kernel_size=5, impl=impl),
    )


# Precision, memory layout, compilation.


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_error_is_that_of_dense_attention(dtype: torch.dtype) -> None:
    """At most 3x the error of the same-precision SDPA, with the whole map as the window."""
    leaves = inputs((13, 13), 13, False, dtype, head_dim=32)
    out = neighborhood_attention(**leaves, kernel_size=13, impl="aten")
    assert out.dtype == dtype
    grads = gradients(out, leaves)
    exact = {n: x.detach().double().requires_grad_() for n, x in leaves.items()}
    expected = neighborhood_attention(**exact, kernel_size=13, impl="reference")
    wanted = gradients(expected, exact)

    position = torch.arange(13)
    entry = position[None] - position[:, None] + 12
    rows, columns = entry[:, None, :, None], entry[None, :, None, :]
    mask = leaves["bias"][:, rows, columns].reshape(1, 3, 169, 169)
    q, k, v = (leaves[n].flatten(1, 2).transpose(1, 2) for n in ("query", "key", "value"))
    dense = torch.nn.functional.scaled_dot_product_attention(q, k, v, mask)
    dense = dense.transpose(1, 2).reshape(out.shape)
    peer = gradients(dense, leaves)

    def error(found: Tensor, oracle: Tensor) -> float:
        return float((found.detach().double() - oracle.detach()).abs().mean())

    assert error(out, expected) <= 3 * error(dense, expected)
    for name in leaves:
        assert error(grads[name], wanted[name]) <= 3 * error(peer[name], wanted[name]), name


def test_layouts() -> None:
    """Heads-last views, permuted and cropped maps are read as they are."""
    x = torch.randn(2, 3, 12, 11, 8, dtype=torch.float64)
    views = [x.permute(0, 2, 3, 1, 4), x.permute(0, 3, 2, 1, 4).transpose(1, 2)]
    views.append(torch.randn(2, 15, 14, 3, 8).double()[:, 2:14, 1:12])
    views.append(torch.randn(2, 12, 11, 3, 16).double()[..., ::2])
    for query, key in itertools.product(views, views):
        expected = neighborhood_attention(query, key, views[0], 5, impl="reference")
        torch.testing.assert_close(neighborhood_attention(query, key, views[0], 5), expected)


@pytest.mark.parametrize("padded", [False, True])
def test_empty_batch(padded: bool) -> None:
    leaves = inputs((5, 9), 7 if padded else 3, padded, batch=0)
    out = neighborhood_attention(**leaves, kernel_size=7 if padded else 3)
    assert out.shape == leaves["query"].shape
    for name, grad in gradients(out, leaves).items():
        assert torch.equal(grad, torch.zeros_like(leaves[name])), name


def test_bias_and_pad_may_have_another_precision() -> None:
    """Under autocast the maps are bfloat16 and the parameters float32."""
    leaves = inputs((5, 5), 7, True, torch.float32)
    low = {n: x if n in ("bias", "pad") else x.bfloat16() for n, x in leaves.items()}
    out = neighborhood_attention(**low, kernel_size=7)
    assert out.dtype == torch.bfloat16
    out.float().sum().backward()
    assert leaves["bias"].grad is not None
    assert leaves["bias"].grad.dtype == torch.float32


def test_new_parameter_values_are_seen() -> None:
    """Nothing that depends on values is kept from one call to the next."""
    leaves = {n: x.detach() for n, x in inputs((9, 9), 3, False).items()}
    before = neighborhood_attention(**leaves, kernel_size=3)
    leaves["bias"].data.mul_(2)
    after = neighborhood_attention(**leaves, kernel_size=3)
    assert not torch.equal(before, after)
    expected = neighborhood_attention(**leaves, kernel_size=3, impl="reference")
    torch.testing.assert_close(after, expected)


@pytest.mark.parametrize("first", [torch.inference_mode, torch.no_grad])
def test_tables_of_one_mode_serve_another(first: type) -> None:
    """Geometry is kept between calls, whatever mode made it."""
    from vitarium.ops.neighborhood_attn import tiles

    tiles.geometry.cache_clear()
    leaves = inputs((17, 19), 3, False)
    with first():
        neighborhood_attention(**leaves, kernel_size=3)
    out = neighborhood_attention(**leaves, kernel_size=3)
    expected = neighborhood_attention(**leaves, kernel_size=3, impl="reference")
    wanted = gradients(expected, leaves)
    for name, grad in gradients(out, leaves).items():
        torch.testing.assert_close(grad, wanted[name], msg=name)


def test_meta_tensors_give_shapes() -> None:
    query = torch.empty(2, 17, 19, 3, 8, device="meta", requires_grad=True)
    out = neighborhood_attention(query, query, query, kernel_size=3, dilation=2)
    assert out.shape == query.shape
    assert torch.autograd.grad(out, query, torch.empty_like(out))[0].shape == query.shape


def test_repeatable() -> None:
    torch.set_num_threads(2)
    leaves = inputs((20, 21), 5, False, torch.float32)
    runs = []
    for _ in range(3):
        out = neighborhood_attention(**leaves, kernel_size=5)
        runs.append([out, *gradients(out, leaves).values()])
    torch.set_num_threads(1)
    for run in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(run, runs[0], strict=True))


@pytest.mark.parametrize(
    ("size", "kernel", "dilation", "padded"),
    [((9, 13), (5, 3), (1, 2), False), ((3, 5), (7, 3), 1, True)],
)
def test_compile_fullgraph(size: tuple[int, int], kernel: int, dilation: int, padded: bool) -> None:
    leaves = inputs(size, kernel, padded)
    args = dict(leaves, kernel_size=kernel, dilation=dilation)
    expected = neighborhood_attention(**args, impl="reference")
    wanted = gradients(expected, leaves)
    torch._dynamo.reset()
    out = torch.compile(neighborhood_attention, fullgraph=True, backend="aot_eager")(**args)
    torch.testing.assert_close(out, expected)
    for name, grad in gradients(out, leaves).items():
        torch.testing.assert_close(grad, wanted[name], msg=name)


class Attention(torch.nn.Module):
    """What `torch.export` takes."""

    def __init__(self, kernel_size: int) -> None:
        super().__init__()
        self.kernel_size = kernel_size

    def forward(self, x: dict[str, Tensor]) -> Tensor:
        return neighborhood_attention(**x, kernel_size=self.kernel_size)


def test_one_program_for_maps_that_are_padded_and_that_are_not() -> None:
    counter = CompileCounterWithBackend("eager")
    torch._dynamo.reset()
    compiled = torch.compile(neighborhood_attention, fullgraph=True, backend=counter, dynamic=True)
    for size in ((11, 14), (5, 20), (30, 8), (3, 4), (12, 11)):
        x = {n: y.detach() for n, y in inputs(size, 5, True).items()}
        args = dict(x, kernel_size=5, dilation=(1, 2))
        expected = neighborhood_attention(**args, impl="reference")
        torch.testing.assert_close(compiled(**args), expected)
    assert counter.frame_count == 1


@pytest.mark.skipif(shutil.which("c++") is None, reason="inductor needs a C++ compiler")
def test_compile_with_inductor() -> None:
    """Of exported programs too: its pattern matcher rewrites attention, which once went wrong."""
    leaves = {n: x.detach() for n, x in inputs((9, 13), 5, False, torch.float32).items()}
    expected = neighborhood_attention(**leaves, kernel_size=5, impl="reference")
    exported = torch.export.export(Attention(5), (leaves,)).module()
    for module in (Attention(5), exported):
        torch._dynamo.reset()
        out = torch.compile(module, fullgraph=True)(leaves)
        torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("padded", [False, True])
def test_export(padded: bool) -> None:
    leaves = {n: x.detach() for n, x in inputs((6, 8), 7 if padded else 3, padded).items()}
    kernel = 7 if padded else 3
    program = torch.export.export(Attention(kernel), (leaves,))
    targets = {str(node.target) for node in program.graph.nodes}
    assert not any("vitarium" in target for target in targets)
    expected = neighborhood_attention(**leaves, kernel_size=kernel, impl="reference")
    torch.testing.assert_close(program.module()(leaves), expected)


def test_natten_agrees() -> None:
    pytest.importorskip("natten")
    for size, kernel, dilation in (((9, 12), 3, 1), ((14, 15), (5, 3), (2, 3))):
        x = inputs(size, kernel, False, torch.float32, head_dim=16)
        call = {n: x[n].detach() for n in ("query", "key", "value")}
        call |= {"kernel_size": kernel, "dilation": dilation}
        expected = neighborhood_attention(**call, impl="reference")
        found = neighborhood_attention(**call, impl="natten")
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


# The dispatcher's view.


def dispatched(size: tuple[int, int], padded: bool, biased: bool) -> tuple[object, ...]:
    """Arguments of the op behind ``aten``."""
    x = inputs(size, 3, padded)
    bias = x["bias"] if biased else None
    return x["query"], x["key"], x["value"], bias, x.get("pad"), (3, 3), (1, 2), 0.3


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize(("size", "padded"), [((5, 7), False), ((2, 7), True), ((4, 3), True)])
def test_opcheck(size: tuple[int, int], padded: bool, biased: bool) -> None:
    ops = torch.ops.vitarium
    args = dispatched(size, padded, biased)
    torch.library.opcheck(ops.neighborhood_attention_aten, args)
    args = [x.detach() if isinstance(x, Tensor) else x for x in args]
    torch.library.opcheck(ops.neighborhood_attention_aten_backward, (args[0], *args))


def test_second_derivatives_are_refused() -> None:
    leaves = inputs((5, 7), 3, False)
    out = neighborhood_attention(**leaves, kernel_size=3, impl="aten")
    (grad,) = torch.autograd.grad(out.sum(), leaves["query"], create_graph=True)
    with pytest.raises(RuntimeError, match="has no gradient; impl='reference'"):
        grad.sum().backward()


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize(
    ("size", "kernel", "dilation", "padded"),
    [((9, 14), (3, 5), 1, False), ((13, 11), 3, (4, 2), False), ((3, 9), 7, 1, True)],
)
def test_flops_are_the_formula(
    size: tuple[int, int], kernel: int, dilation: int, padded: bool, device: str
) -> None:
    """Two products of real queries with their windows; the gradient takes five."""
    leaves = inputs(size, kernel, padded, torch.float32)
    leaves = {n: x.detach().to(device).requires_grad_() for n, x in leaves.items()}
    args = dict(leaves, kernel_size=kernel, dilation=dilation)
    window = kernel**2 if isinstance(kernel, int) else kernel[0] * kernel[1]
    product = 2 * leaves["query"].numel() * window
    assert flops(neighborhood_attention, **args) == 2 * product
    if device == "cpu":
        assert flops(neighborhood_attention, **args, impl="reference") == 2 * product

    def training() -> None:
        neighborhood_attention(**args).sum().backward()

    assert flops(training) == 7 * product


def test_flops_of_a_model_are_the_published_ones() -> None:
    """Hassani et al., table 2: NAT-Mini takes 2.7 G multiply-adds at 224 x 224."""
    model = timm.create_model("nat_mini", device="meta").eval()
    image = torch.empty(1, 3, 224, 224, device="meta")
    assert flops(model, image) / 2 == pytest.approx(2.7e9, rel=0.03)


# Which implementation runs.


def test_which_implementation_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    x = {n: y.detach() for n, y in inputs((9, 9), 3, False).items()}
    ran = record(monkeypatch, "neighborhood")
    monkeypatch.delenv("VITARIUM_OPS", raising=False)
    neighborhood_attention(**x, kernel_size=3)
    neighborhood_attention(**x, kernel_size=3, impl="reference")
    with use_impl("reference"):
        neighborhood_attention(**x, kernel_size=3)
        neighborhood_attention(**x, kernel_size=3, impl="aten")
        with use_impl({"neighborhood": "aten"}):
            neighborhood_attention(**x, kernel_size=3)
    monkeypatch.setenv("VITARIUM_OPS", "reference")
    neighborhood_attention(**x, kernel_size=3)
    with use_impl("auto"):
        neighborhood_attention(**x, kernel_size=3)
    assert ran == ["aten", "reference", "reference", "aten", "aten", "reference", "aten"]


def test_a_choice_that_cannot_run_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    x = inputs((9, 9), 3, False)
    with pytest.raises(ValueError, match="impl='natten' cannot run this neighborhood call: .*bias"):
        neighborhood_attention(**x, kernel_size=3, impl="natten")
    monkeypatch.setattr("vitarium.ops.neighborhood_attn.natten_launch.find_spec", lambda _: None)
    with pytest.raises(ValueError, match="not installed"):
        neighborhood_attention(**x | {"bias": None}, kernel_size=3, impl="natten")
    with pytest.raises(ValueError, match="impl='triton' cannot run .*float16.*got torch.float64"):
        neighborhood_attention(**x, kernel_size=3, impl="triton")
    with pytest.raises(ValueError, match="impl: expected one of auto, .*got 'cuda'"):
        neighborhood_attention(**x, kernel_size=3, impl="cuda")
    monkeypatch.setenv("VITARIUM_OPS", "fast")
    with pytest.raises(ValueError, match="VITARIUM_OPS: expected one of .*got 'fast'"):
        neighborhood_attention(**x, kernel_size=3)
    with pytest.raises(ValueError, match="use_impl"), use_impl({"windows": "aten"}):
        pass


def test_choices_end_innermost_first() -> None:
    x = {n: y.detach() for n, y in inputs((9, 9), 3, False).items()}

    def chosen() -> str:
        return explain("neighborhood", **x, kernel_size=3).chosen

    with use_impl("reference"), use_impl("aten"):
        with use_impl("reference"):
            assert chosen() == "reference"
        assert chosen() == "aten"


def test_explain() -> None:
    x = {n: y.detach() for n, y in inputs((9, 9), 3, False).items()}
    for name in ("neighborhood", neighborhood_attention):
        found = explain(name, **x, kernel_size=3)
        assert found.chosen == "aten"
        assert found.reasons["reference"] is None
        assert "bias" in found.reasons["natten"]
        assert "neighborhood: aten runs" in str(found)
    assert explain("neighborhood", **x, kernel_size=3, impl="reference").chosen == "reference"
    with pytest.raises(ValueError, match="op: expected one of"):
        explain("attention")


# Bad input.


def bad(**changes: object) -> dict[str, object]:
    x = {n: y.detach() for n, y in inputs((9, 8), 3, False, torch.float32).items()}
    return {**x, "kernel_size": 3, **changes}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"query": torch.randn(2, 9, 8, 24)}, r"query: expected rank 5, .*got shape \(2, 9, 8, 24"),
        ({"key": torch.randn(2, 9, 8, 3, 4)}, r"key: expected query's shape .*got \(2, 9, 8, 3, 4"),
        ({"value": torch.randn(2, 9, 7, 3, 8)}, "value: expected query's shape"),
        ({"value": torch.randn(2, 9, 8, 3, 8).double()}, "value: expected query's dtype .*float64"),
        ({"query": torch.ones(2, 9, 8, 3, 8, dtype=torch.long)}, "query: .*floating.*int64"),
        ({"query": [1]}, "query: expected a tensor, got list"),
        ({"kernel_size": 4}, "kernel_size: expected odd sizes, got 4"),
        ({"kernel_size": (3, 0)}, "kernel_size: expected a positive int"),
        ({"kernel_size": 3.0}, "kernel_size: expected a positive int"),
        ({"kernel_size": (3, 3, 3)}, "kernel_size: expected a positive int or a pair"),
        ({"kernel_size": 9, "bias": None}, r"kernel_size \* dilation <= W = 8, got 9 \* 1"),
        ({"dilation": (4, 1)}, r"kernel_size \* dilation <= H = 9, got 3 \* 4"),
        ({"dilation": 0}, "dilation: expected a positive int"),
        ({"bias": torch.randn(3, 5, 3)}, r"bias: expected shape \(3, 5, 5\), got \(3, 5, 3\)"),
        ({"bias": torch.ones(3, 5, 5, dtype=torch.int)}, "bias: .*floating.*int32"),
        ({"pad": torch.randn(3, 24)}, r"pad: expected shape \(3, 3, 8\), got \(3, 24\)"),
        ({"scale": "large"}, "scale: expected a number, got str"),
        (
            {n: torch.randn(2, 0, 8, 3, 8) for n in ("query", "key", "value")},
            "query: expected H >= 1",
        ),
    ],
)
def test_bad_input(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        neighborhood_attention(**bad(**changes))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_aten_on_a_gpu() -> None:
    for size, kernel, dilation, padded in SHAPES:
        leaves = inputs(size, kernel, padded)
        args = {"kernel_size": kernel, "dilation": dilation}
        expected = neighborhood_attention(**leaves, **args, impl="reference")
        wanted = gradients(expected, leaves)
        moved = {n: x.detach().cuda().requires_grad_() for n, x in leaves.items()}
        out = neighborhood_attention(**moved, **args, impl="aten")
        torch.testing.assert_close(out.cpu(), expected, rtol=1e-9, atol=1e-9)
        for name, grad in gradients(out, moved).items():
            torch.testing.assert_close(grad.cpu(), wanted[name], rtol=1e-9, atol=1e-9, msg=name)
