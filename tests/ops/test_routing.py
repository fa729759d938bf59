"""Bi-level routing attention: every implementation against the definition and the authors."""

from __future__ import annotations

import itertools
import shutil
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from golden import op_case, sample
from harness import flops, gradients, random_maps, record
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from vitarium.ops import explain, routing_attention, use_impl
from vitarium.ops.routing_attn import aten
from vitarium.ops.routing_attn.regions import axis

pytestmark = pytest.mark.usefixtures("nan_memory")

GOLDENS = sorted(Path(__file__).parents[1].glob("golden/ops/bilevel_routing_*.json"))
EXACT = ("reference", "aten")

# (H, W), num_regions, topk, padded with pad: regions that divide the map and that do not, more of
# them than asked for, whole regions of padding, size 1, one region, all regions
SHAPES = [
    ((12, 8), 4, 3, False),
    ((12, 8), (2, 4), 1, True),
    ((13, 10), 3, 4, False),
    ((13, 10), 3, 4, True),
    ((11, 18), (4, 7), 30, False),
    ((9, 17), 8, 5, True),
    ((5, 3), 7, 49, True),
    ((1, 1), 1, 1, False),
    ((1, 1), 3, 2, True),
    ((6, 5), 1, 1, False),
    ((7, 1), (3, 1), 2, False),
]


def inputs(
    size: tuple[int, int],
    padded: bool = False,
    dtype: torch.dtype = torch.float64,
    batch: int = 2,
    heads: int = 3,
    head_dim: int = 8,
    seed: int = 0,
) -> dict[str, Tensor]:
    """Random leaves, strided like three views of one projection."""

    found, normal = random_maps(size, dtype, batch, heads, head_dim, seed)
    if padded:
        found["pad"] = normal(3, heads, head_dim)
    return {name: x.requires_grad_() for name, x in found.items()}


# The authors' numbers: three forms of their attention, around our op.


def depthwise(x: Tensor, parameters: dict[str, Tensor]) -> Tensor:
    """The authors' positional term: [B, H, W, C] -> the same."""
    if "lepe.weight" not in parameters:
        return torch.zeros_like(x)
    weight = parameters["lepe.weight"]
    x = F.conv2d(
        x.permute(0, 3, 1, 2), weight, parameters["lepe.bias"], padding="same", groups=len(weight)
    )
    return x.permute(0, 2, 3, 1)


def functional(d: dict, x: dict[str, Tensor], p: dict[str, Tensor], impl: str) -> Tensor:
    maps = {n: x[n].permute(0, 2, 3, 1) for n in "qkv"}
    query, key, value = (y.unflatten(3, (d["num_heads"], -1)) for y in maps.values())
    routing = {n: d[n] for n in ("soft_routing", "diff_routing") if n in d}
    args = (d["n_win"], d["topk"], d["scale"])
    out = routing_attention(query, key, value, *args, **routing, impl=impl).flatten(3)
    return (out + depthwise(maps["v"], p)).permute(0, 3, 1, 2)


def padded_first(d: dict, x: dict[str, Tensor], p: dict[str, Tensor], impl: str) -> Tensor:
    """Zeros complete the input of the projection, which makes them its bias."""
    height, width = x["x"].shape[1:3]
    weight, bias = p["qkv.qkv.weight"], p["qkv.qkv.bias"]

    def parts(x: Tensor) -> tuple[Tensor, ...]:
        return F.linear(x, weight, bias).unflatten(3, (3, d["num_heads"], -1)).unbind(3)

    below, right = -height % d["n_win"], -width % d["n_win"]
    grown = F.pad(x["x"], (0, 0, 0, right, 0, below))
    pad = bias.unflatten(0, (3, d["num_heads"], -1))
    args = (d["n_win"], d["topk"], d["scale"])
    out = routing_attention(*parts(x["x"]), *args, pad=pad, impl=impl).flatten(3)
    out = out + depthwise(parts(grown)[2].flatten(3), p)[:, :height, :width]
    return F.linear(out, p["wo.weight"], p["wo.bias"])


def padded_last(d: dict, x: dict[str, Tensor], p: dict[str, Tensor], impl: str) -> Tensor:
    """Zeros complete query, key and value."""
    weight = p["qkv_linear.weight"].flatten(1)
    qkv = F.linear(x["x"].permute(0, 2, 3, 1), weight, p["qkv_linear.bias"])
    query, key, value = qkv.unflatten(3, (3, d["num_heads"], -1)).unbind(3)
    args = (d["n_win"], d["topk"], d["scale"])
    out = routing_attention(query, key, value, *args, impl=impl).flatten(3)
    out = out + depthwise(value.flatten(3), p)
    out = F.linear(out, p["output_linear.weight"].flatten(1), p["output_linear.bias"])
    return out.permute(0, 3, 1, 2)


FORMS = {"functional": functional, "module_legacy": padded_first, "module_nchw": padded_last}


@pytest.mark.parametrize("impl", EXACT)
@pytest.mark.parametrize("path", GOLDENS, ids=lambda path: path.stem)
def test_golden(path: Path, impl: str, monkeypatch: pytest.MonkeyPatch) -> None:
    d, x, parameters, probe, expected = op_case(path.with_suffix(""))
    chosen = []
    topk = torch.topk

    def spy(*args: object, **kwargs: object) -> object:
        found = topk(*args, **kwargs)
        chosen.append(found.indices)
        return found

    monkeypatch.setattr(torch, "topk", spy)
    out = FORMS[d["form"]](d, x, parameters, impl)
    found = {"out": out}
    leaves = {**x, **parameters}
    grads = torch.autograd.grad((out * probe).sum(), list(leaves.values()))
    found |= {f"grad_{name}": g for name, g in zip(leaves, grads, strict=True)}
    index = expected.pop("region_index", None)
    assert set(found) == set(expected)
    for name, y in expected.items():
        assert (sample(found[name]) - y).abs().max() <= 1e-7 * y.std(), name
    if impl == "aten" and index is not None:
        axes = [axis(d[n], d["n_win"], d.get("auto_pad", False)) for n in "HW"]
        index = index.unflatten(1, [cut.total for cut in axes])
        index = index[:, : axes[0].real, : axes[1].real].flatten(1, 2)
        assert torch.equal(chosen[0].sort(-1).values, index.long())


def test_goldens_are_there() -> None:
    assert len(GOLDENS) == 12


@pytest.mark.parametrize(("size", "num_regions", "topk", "padded"), SHAPES)
def test_aten_equals_the_definition(
    size: tuple[int, int], num_regions: int, topk: int, padded: bool
) -> None:
    leaves = inputs(size, padded)
    args = {"num_regions": num_regions, "topk": topk, "scale": 0.4}
    expected = routing_attention(**leaves, **args, impl="reference")
    out = routing_attention(**leaves, **args, impl="aten")
    torch.testing.assert_close(out, expected, rtol=1e-10, atol=1e-10)
    assert out.is_contiguous()
    wanted, found = gradients(expected, leaves), gradients(out, leaves)
    for name in leaves:
        torch.testing.assert_close(found[name], wanted[name], rtol=1e-9, atol=1e-9, msg=name)
    with torch.no_grad():
        again = routing_attention(**leaves, **args)
    torch.testing.assert_close(again, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("diff", [False, True])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("num_regions", [3, 8])
def test_soft_routing(padded: bool, diff: bool, num_regions: int) -> None:
    leaves = inputs((9, 11), padded)
    args = {
        "num_regions": num_regions,
        "topk": 4,
        "soft_routing": True,
        "diff_routing": diff,
        "scale": 1.0,
    }
    expected = routing_attention(**leaves, **args, impl="reference")
    out = routing_attention(**leaves, **args)
    torch.testing.assert_close(out, expected)
    wanted, found = gradients(expected, leaves), gradients(out, leaves)
    for name in leaves:
        torch.testing.assert_close(found[name], wanted[name], msg=name)
    cut = routing_attention(**leaves, **{**args, "diff_routing": not diff})
    torch.testing.assert_close(cut, out)
    assert not torch.allclose(gradients(cut, leaves)["query"], found["query"])


@pytest.mark.parametrize("form", ["few channels of values", "many channels of values"])
def test_values_may_have_other_channels(form: str) -> None:
    leaves = inputs((9, 11), head_dim=8)
    dim = 3 if form.startswith("few") else 13
    leaves["value"] = torch.randn(2, 9, 11, 3, dim).double().requires_grad_()
    expected = routing_attention(**leaves, num_regions=3, topk=4, impl="reference")
    out = routing_attention(**leaves, num_regions=3, topk=4)
    assert out.shape == leaves["value"].shape
    torch.testing.assert_close(out, expected)
    wanted = gradients(expected, leaves)
    for name, grad in gradients(out, leaves).items():
        torch.testing.assert_close(grad, wanted[name], msg=name)


def test_parts_do_not_mix(monkeypatch: pytest.MonkeyPatch) -> None:
    """One region a part, several, and all images at once give the same numbers."""
    leaves = inputs((12, 15), True, batch=3)
    args = {"num_regions": 4, "topk": 5}
    expected = routing_attention(**leaves, **args, impl="reference")
    wanted = gradients(expected, leaves)
    for chunk in (1, 1 << 12, 1 << 30):
        monkeypatch.setattr(aten, "CHUNK", chunk)
        out = routing_attention(**leaves, **args)
        torch.testing.assert_close(out, expected)
        for name, grad in gradients(out, leaves).items():
            torch.testing.assert_close(grad, wanted[name], msg=name)


def test_without_the_flash_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Devices other than a CPU compute the same products by themselves."""
    leaves = inputs((9, 11), True)
    q, k, v = (leaves[n].detach().flatten(1, 2).transpose(1, 2) for n in ("query", "key", "value"))
    flash = aten._attend(q, k, v, 0.3)
    grads = aten._attend_backward(v, q, k, v, *flash, 0.3)

    class Elsewhere(Tensor):
        device = torch.device("meta")

    q, k, v = (x.as_subclass(Elsewhere) for x in (q, k, v))
    found = aten._attend(q, k, v, 0.3)
    for x, y in zip(found, flash, strict=True):
        torch.testing.assert_close(x.as_subclass(Tensor), y)
    for x, y in zip(aten._attend_backward(v, q, k, v, *found, 0.3), grads, strict=True):
        torch.testing.assert_close(x.as_subclass(Tensor), y)


def test_gradcheck_of_the_definition() -> None:
    leaves = inputs((4, 3), True, batch=1, heads=2, head_dim=2)
    names = list(leaves)

    def function(*tensors: Tensor) -> Tensor:
        call = dict(zip(names, tensors, strict=True))
        soft = {"soft_routing": True, "diff_routing": True}
        return routing_attention(**call, num_regions=2, topk=2, **soft, impl="reference")

    assert torch.autograd.gradcheck(function, tuple(leaves.values()))


# Memory: what the op is for.


def test_no_copies_are_kept() -> None:
    """Backward keeps the maps and one number a query and head, whatever ``topk`` is."""
    leaves = inputs((24, 24), dtype=torch.float32)
    saved: dict[int, int] = {}

    def keep(x: Tensor) -> Tensor:
        saved[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        routing_attention(**leaves, num_regions=6, topk=20)
    one = leaves["query"].numel() * 4
    index = 2 * 36 * 20 * 8
    assert sum(saved.values()) <= 4 * one + one / 8 + index


# Invariants that no oracle shares a bug with.


@pytest.mark.parametrize("impl", EXACT)
@pytest.mark.parametrize("padded", [False, True])
def test_queries_attend_to_whole_regions(impl: str, padded: bool) -> None:
    """topk regions, the same for all queries of a region and all heads; weights sum to one."""
    height, width, heads = 6, 9, 2
    tokens = height * width
    query = torch.randn(1, height, width, heads, tokens, dtype=torch.float64)
    value = torch.eye(tokens, dtype=torch.float64).view(1, height, width, 1, tokens)
    value = value.expand(-1, -1, -1, heads, -1)
    pad = torch.zeros(3, heads, tokens, dtype=torch.float64) if padded else None
    weights = routing_attention(query, query.flip(1), value, 3, 4, pad=pad, impl=impl)[0]
    assert torch.allclose(weights.sum(-1), torch.ones(()).double())
    seen = (weights > 0).unflatten(3, (height, width))
    of_regions = seen.unflatten(4, (3, 3)).unflatten(3, (3, 2))  # [..., 3, 2, 3, 3]
    whole = of_regions.all(6).all(4)
    assert torch.equal(whole, of_regions.any(6).any(4))
    assert (whole.sum((3, 4)) == 4).all()
    same = whole.unflatten(1, (3, 3)).unflatten(0, (3, 2))[:, :1, :, :1, :1]
    assert torch.equal(
        whole.unflatten(1, (3, 3)).unflatten(0, (3, 2)),
        same.expand_as(whole.unflatten(1, (3, 3)).unflatten(0, (3, 2))),
    )


@pytest.mark.parametrize("impl", EXACT)
def test_all_regions_are_dense_attention(impl: str) -> None:
    leaves = inputs((6, 9))
    out = routing_attention(**leaves, num_regions=3, topk=9, scale=0.3, impl=impl)
    q, k, v = (leaves[n].flatten(1, 2).transpose(1, 2) for n in ("query", "key", "value"))
    dense = F.scaled_dot_product_attention(q, k, v, scale=0.3).transpose(1, 2)
    torch.testing.assert_close(out, dense.reshape(out.shape))


@pytest.mark.parametrize("impl", EXACT)
def test_default_scale_is_of_the_whole_width(impl: str) -> None:
    leaves = inputs((6, 9), heads=4, head_dim=4)
    args = {"num_regions": 3, "topk": 2, "impl": impl}
    out = routing_attention(**leaves, **args)
    assert torch.equal(out, routing_attention(**leaves, **args, scale=0.25))


@pytest.mark.parametrize("impl", EXACT)
@pytest.mark.parametrize("padded", [False, True])
def test_heads_and_images_are_independent(impl: str, padded: bool) -> None:
    leaves = {n: x.detach() for n, x in inputs((7, 10), padded).items()}
    args = {"num_regions": 3, "topk": 2, "impl": impl}
    out = routing_attention(**leaves, **args)
    heads = torch.tensor([2, 0, 1])
    moved = {n: x[:, heads] if n == "pad" else x[:, :, :, heads].flip(0) for n, x in leaves.items()}
    torch.testing.assert_close(routing_attention(**moved, **args), out[:, :, :, heads].flip(0))
    alone = {n: x if n == "pad" else x[1:] for n, x in leaves.items()}
    torch.testing.assert_close(routing_attention(**alone, **args), out[1:])


@pytest.mark.parametrize("impl", EXACT)
def test_padding_is_a_larger_map(impl: str) -> None:
    """``pad`` gives what attention on the padded map gives, cropped."""
    leaves = {n: x.detach() for n, x in inputs((7, 10), True).items()}
    pad = leaves.pop("pad")
    out = routing_attention(**leaves, num_regions=4, topk=5, pad=pad, impl=impl)
    grown = {}
    for n, x, fill in zip(leaves, leaves.values(), pad, strict=True):
        x = torch.cat([x, fill.expand(2, 1, 10, -1, -1)], 1)
        grown[n] = torch.cat([x, fill.expand(2, 8, 2, -1, -1)], 2)
    whole = routing_attention(**grown, num_regions=4, topk=5, impl=impl)
    torch.testing.assert_close(out, whole[:, :7, :10])
    divided = {n: x[:, :4, :8] for n, x in leaves.items()}
    args = {"num_regions": 4, "topk": 5, "impl": impl}
    torch.testing.assert_close(
        routing_attention(**divided, **args, pad=pad), routing_attention(**divided, **args)
    )


@pytest.mark.parametrize("impl", EXACT)
def test_ties_between_regions_of_padding_do_not_matter(impl: str) -> None:
    """Whichever of them is taken: their tokens are the same."""
    leaves = {n: x.detach() for n, x in inputs((3, 9), True).items()}
    leaves["query"] = leaves["query"].abs()
    leaves["pad"][1] = 10  # regions of padding are near to all
    args = {"num_regions": (6, 3), "impl": impl}
    two = routing_attention(**leaves, **args, topk=2)
    one = routing_attention(**leaves, **args, topk=1)
    torch.testing.assert_close(one, two)
    torch.testing.assert_close(one, leaves["pad"][2].expand_as(one))


@pytest.mark.parametrize("impl", EXACT)
def test_completed_regions_are_averaged_over_their_real_tokens(impl: str) -> None:
    """Without ``pad``: a last row of one token competes with its mean, not with a third of it."""
    query = torch.ones(1, 7, 1, 1, 1, dtype=torch.float64)
    key = torch.tensor([1.0, 1, 1, 0, 0, 0, 2]).double().view_as(query)
    value = torch.arange(7).double().view_as(query)
    args = {"num_regions": (2, 1), "topk": 1, "impl": impl}
    out = routing_attention(query, key, value, **args)  # three regions: 3, 3 and 1 of 3 tokens
    weights = torch.tensor([2.0, 0, 0]).softmax(0)  # zeros take part in the softmax
    torch.testing.assert_close(out, torch.full_like(out, 6 * weights[0].item()), rtol=1e-6, atol=0)


# Precision, memory layout, compilation.


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_error_is_that_of_dense_attention(dtype: torch.dtype) -> None:
    """At most 3x the error of the same-precision SDPA, where all regions are chosen."""
    leaves = inputs((12, 12), dtype=dtype, head_dim=32)
    out = routing_attention(**leaves, num_regions=3, topk=9, impl="aten")
    assert out.dtype == dtype
    grads = gradients(out, leaves)
    exact = {n: x.detach().double().requires_grad_() for n, x in leaves.items()}
    expected = routing_attention(**exact, num_regions=3, topk=9, impl="reference")
    wanted = gradients(expected, exact)
    q, k, v = (leaves[n].flatten(1, 2).transpose(1, 2) for n in ("query", "key", "value"))
    dense = F.scaled_dot_product_attention(q, k, v, scale=96**-0.5).transpose(1, 2)
    peer = gradients(dense.reshape(out.shape), leaves)

    def error(found: Tensor, oracle: Tensor) -> float:
        return float((found.detach().double() - oracle.detach()).abs().mean())

    assert error(out, expected) <= 3 * error(dense.reshape(out.shape), expected)
    for name in leaves:
        assert error(grads[name], wanted[name]) <= 3 * error(peer[name], wanted[name]), name


def test_layouts() -> None:
    """Heads-last views, permuted and cropped maps are read as they are."""
    x = torch.randn(2, 3, 12, 11, 8, dtype=torch.float64)
    views = [x.permute(0, 2, 3, 1, 4), x.permute(0, 3, 2, 1, 4).transpose(1, 2)]
    views.append(torch.randn(2, 15, 14, 3, 8).double()[:, 2:14, 1:12])
    views.append(torch.randn(2, 12, 11, 3, 16).double()[..., ::2])
    for query, key in itertools.product(views, views):
        expected = routing_attention(query, key, views[0], 4, 3, impl="reference")
        torch.testing.assert_close(routing_attention(query, key, views[0], 4, 3), expected)


@pytest.mark.parametrize("padded", [False, True])
def test_empty_batch(padded: bool) -> None:
    leaves = inputs((7, 9), padded, batch=0)
    out = routing_attention(**leaves, num_regions=4, topk=2)
    assert out.shape == leaves["query"].shape
    for name, grad in gradients(out, leaves).items():
        assert torch.equal(grad, torch.zeros_like(leaves[name])), name


def test_pad_may_have_another_precision() -> None:
    """Under autocast the maps are bfloat16 and the parameters float32."""
    leaves = inputs((5, 5), True, torch.float32)
    low = {n: x if n == "pad" else x.bfloat16() for n, x in leaves.items()}
    out = routing_attention(**low, num_regions=4, topk=16)
    assert out.dtype == torch.bfloat16
    out.float().sum().backward()
    assert leaves["pad"].grad is not None
    assert leaves["pad"].grad.dtype == torch.float32


def test_meta_tensors_give_shapes() -> None:
    query = torch.empty(2, 17, 19, 3, 8, device="meta", requires_grad=True)
    out = routing_attention(query, query, query, 5, 3)
    assert out.shape == query.shape
    assert torch.autograd.grad(out, query, torch.empty_like(out))[0].shape == query.shape


def test_repeatable() -> None:
    torch.set_num_threads(2)
    leaves = inputs((20, 21), True, torch.float32)
    runs = []
    for _ in range(3):
        out = routing_attention(**leaves, num_regions=7, topk=12)
        runs.append([out, *gradients(out, leaves).values()])
    torch.set_num_threads(1)
    for run in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(run, runs[0], strict=True))


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("soft", [False, True])
def test_compile_fullgraph(padded: bool, soft: bool) -> None:
    leaves = inputs((9, 13), padded)
    args = dict(leaves, num_regions=4, topk=3, soft_routing=soft, diff_routing=soft)
    expected = routing_attention(**args, impl="reference")
    wanted = gradients(expected, leaves)
    torch._dynamo.reset()
    out = torch.compile(routing_attention, fullgraph=True, backend="aot_eager")(**args)
    torch.testing.assert_close(out, expected)
    for name, grad in gradients(out, leaves).items():
        torch.testing.assert_close(grad, wanted[name], msg=name)


class Attention(torch.nn.Module):
    """What `torch.export` takes."""

    def forward(self, x: dict[str, Tensor]) -> Tensor:
        return routing_attention(**x, num_regions=4, topk=5)


@pytest.mark.parametrize("padded", [False, True])
def test_one_program_for_many_sizes(padded: bool) -> None:
    counter = CompileCounterWithBackend("eager")
    torch._dynamo.reset()
    compiled = torch.compile(routing_attention, fullgraph=True, backend=counter, dynamic=True)
    for size in ((11, 14), (8, 20), (30, 9), (12, 16)):
        x = {n: y.detach() for n, y in inputs(size, padded).items()}
        expected = routing_attention(**x, num_regions=4, topk=5, impl="reference")
        torch.testing.assert_close(compiled(**x, num_regions=4, topk=5), expected)
    assert counter.frame_count == 1


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("c++") is None, reason="inductor needs a C++ compiler")
def test_exported_program_compiles_with_inductor() -> None:
    """Its pattern matcher rewrites attention, which once went wrong."""
    leaves = {n: x.detach() for n, x in inputs((9, 13), True, torch.float32).items()}
    expected = routing_attention(**leaves, num_regions=4, topk=5, impl="reference")
    exported = torch.export.export(Attention(), (leaves,)).module()
    torch._dynamo.reset()
    out = torch.compile(exported, fullgraph=True)(leaves)
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("padded", [False, True])
def test_export(padded: bool) -> None:
    """One plain program for all batches and sizes."""
    leaves = {n: x.detach() for n, x in inputs((9, 13), padded).items()}
    sides = {0: torch.export.Dim("B"), 1: torch.export.Dim("H", min=4)}
    sides[2] = torch.export.Dim("W", min=4)
    dynamic = {n: None if n == "pad" else sides for n in leaves}
    program = torch.export.export(Attention(), (leaves,), dynamic_shapes=(dynamic,))
    targets = {str(node.target) for node in program.graph.nodes}
    assert not any("vitarium" in target for target in targets)
    for size, batch in (((9, 13), 2), ((4, 5), 2), ((8, 24), 1), ((31, 10), 3)):
        x = {n: y.detach() for n, y in inputs(size, padded, batch=batch).items()}
        expected = routing_attention(**x, num_regions=4, topk=5, impl="reference")
        torch.testing.assert_close(program.module()(x), expected)


# The dispatcher's view.


@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize("padded", [False, True])
def test_opcheck(padded: bool, soft: bool) -> None:
    ops = torch.ops.vitarium
    x = inputs((7, 9), padded)
    maps = (x["query"], x["key"], x["value"], x.get("pad"))
    rows, columns = aten._axes(x["query"], x.get("pad"), (3, 4))
    chosen = weights = None
    if soft:
        chosen = torch.randint(rows.total * columns.total, (2, rows.real * columns.real, 3))
        weights = torch.rand(chosen.shape, dtype=torch.float64, requires_grad=True)
    args = (*maps, chosen, weights, (3, 4), 3, 0.3)
    torch.library.opcheck(ops.routing_attention_aten, args)
    plain = [x.detach() if isinstance(x, Tensor) else x for x in args]
    found = ops.routing_attention_aten(*plain)
    args = (torch.randn_like(found[0]), *plain[:4], *found, plain[5], (3, 4), 0.3)
    torch.library.opcheck(ops.routing_attention_aten_backward, args)


def test_second_derivatives_are_refused() -> None:
    leaves = inputs((5, 7))
    out = routing_attention(**leaves, num_regions=2, topk=2, impl="aten")
    (grad,) = torch.autograd.grad(out.sum(), leaves["query"], create_graph=True)
    with pytest.raises(RuntimeError, match="has no gradient; impl='reference'"):
        grad.sum().backward()


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize(
    ("size", "padded", "keys"),
    [((12, 16), False, 3 * 12), ((10, 13), True, 3 * 12), ((13, 18), False, 3 * 12)],
)
def test_flops_are_the_formula(size: tuple[int, int], padded: bool, keys: int, device: str) -> None:
    """Two products of real queries with their regions' keys; the gradient takes five."""
    leaves = inputs(size, padded, torch.float32)
    leaves = {n: x.detach().to(device).requires_grad_() for n, x in leaves.items()}
    args = dict(leaves, num_regions=4, topk=3)
    product = 2 * leaves["query"].numel() * keys
    assert flops(routing_attention, **args) == 2 * product
    if device == "cpu" and size == (12, 16):
        regions = 2 * 2 * 16 * 16 * 24  # of all regions with all: the definition routes openly
        assert flops(routing_attention, **args, impl="reference") == 2 * product + regions

    def training() -> None:
        routing_attention(**args).sum().backward()

    assert flops(training) == 7 * product


# Which implementation runs.


def test_which_implementation_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    x = {n: y.detach() for n, y in inputs((9, 9)).items()}
    args = dict(x, num_regions=3, topk=2)
    ran = record(monkeypatch, "routing")
    monkeypatch.delenv("VITARIUM_OPS", raising=False)
    routing_attention(**args)
    routing_attention(**args, impl="reference")
    with use_impl({"routing": "reference"}):
        routing_attention(**args)
        routing_attention(**args, impl="aten")
    assert ran == ["aten", "reference", "reference", "aten"]
    with pytest.raises(ValueError, match="no such implementation"):
        routing_attention(**args, impl="natten")
    for name in ("routing", routing_attention):
        found = explain(name, **args)
        assert found.chosen == "aten"
        assert list(found.reasons) == ["reference", "triton", "aten"]
        assert found.reasons["reference"] is None
        assert found.reasons["triton"]  # float64
        assert found.reasons["aten"] is None


# Bad input.


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"query": torch.randn(2, 9, 8, 24)}, r"query: expected rank 5, .*got shape \(2, 9, 8, 24"),
        ({"key": torch.randn(2, 9, 8, 3, 4)}, r"key: expected query's shape .*got \(2, 9, 8, 3, 4"),
        ({"value": torch.randn(2, 9, 7, 3, 8)}, r"value: expected .* but for head_dim, got \(2, 9"),
        ({"value": torch.randn(2, 9, 8, 24)}, "value: expected rank 5"),
        ({"value": torch.randn(2, 9, 8, 3, 8).double()}, "value: expected query's dtype .*float64"),
        ({"query": torch.ones(2, 9, 8, 3, 8, dtype=torch.long)}, "query: .*floating.*int64"),
        ({"num_regions": 0}, "num_regions: expected a positive int"),
        ({"num_regions": (3, 3, 3)}, "num_regions: expected a positive int or a pair"),
        ({"num_regions": 9}, "num_regions: expected at most W = 8 without pad=, got 9"),
        ({"topk": 0}, "topk: expected a positive int, got 0"),
        ({"topk": True}, "topk: expected a positive int, got True"),
        ({"topk": 2.0}, "topk: expected a positive int, got 2.0"),
        ({"topk": 10}, r"topk: expected at most the number of regions, 3 \* 4, got 13"),
        ({"pad": torch.randn(3, 24)}, r"pad: expected shape \(3, 3, 8\), got \(3, 24\)"),
        ({"scale": "large"}, "scale: expected a positive number, got 'large'"),
        ({"scale": -1.0}, "scale: expected a positive number, got -1.0"),
        ({"diff_routing": True}, "diff_routing: expected soft_routing too"),
        (
            {"value": torch.randn(2, 9, 8, 3, 4), "pad": torch.randn(3, 3, 8)},
            r"pad: expected None where value's head_dim \(4\) is not query's \(8\)",
        ),
    ],
)
def test_bad_input(changes: dict[str, object], message: str) -> None:
    x = {n: y.detach() for n, y in inputs((9, 8), dtype=torch.float32).items()}
    if changes == {"topk": 10}:  # 8 columns in 3 regions are 4 of 2 tokens
        changes = {"topk": 13}
    with pytest.raises(ValueError, match=message):
        routing_attention(**{**x, "num_regions": 3, "topk": 2, **changes})


def test_there_may_be_more_regions_than_asked_for() -> None:
    x = {n: y.detach() for n, y in inputs((9, 8)).items()}
    out = routing_attention(**x, num_regions=3, topk=12)
    expected = routing_attention(**x, num_regions=3, topk=12, impl="reference")
    torch.testing.assert_close(out, expected)
    pad = torch.zeros(3, 3, 8).double()
    with pytest.raises(ValueError, match=r"topk: expected at most .*, 3 \* 3, got 12"):
        routing_attention(**x, num_regions=3, topk=12, pad=pad)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_aten_on_a_gpu() -> None:
    for size, num_regions, topk, padded in SHAPES:
        leaves = inputs(size, padded)
        args = {"num_regions": num_regions, "topk": topk}
        expected = routing_attention(**leaves, **args, impl="reference")
        wanted = gradients(expected, leaves)
        moved = {n: x.detach().cuda().requires_grad_() for n, x in leaves.items()}
        out = routing_attention(**moved, **args, impl="aten")
        torch.testing.assert_close(out.cpu(), expected, rtol=1e-9, atol=1e-9)
        for name, grad in gradients(out, moved).items():
            torch.testing.assert_close(grad.cpu(), wanted[name], rtol=1e-9, atol=1e-9, msg=name)
