"""Window attention: every implementation against the definition, the authors' numbers and timm."""

from __future__ import annotations

import itertools
import math
import shutil
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from golden import op_case, sample
from harness import flops, gradients, random_maps, record
from timm.models.swin_transformer import SwinTransformerBlock
from timm.models.swin_transformer_v2 import SwinTransformerV2Block
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from vitarium.ops import explain, use_impl, window_attention

pytestmark = pytest.mark.usefixtures("nan_memory")

GOLDENS = sorted(Path(__file__).parents[1].glob("golden/ops/window_attention_*.json"))
EXACT = ("reference", "aten")
FREE = ("timm", "timm_fixed", "dense")  # semantics that take any map

# (H, W), window_size, shift_size: non-square, ragged on one or both axes, padding in more than
# the last window, size 1, window = map, maps smaller than the window, strips
SHAPES = [
    ((9, 14), (3, 7), (1, 3)),
    ((13, 4), (4, 7), (2, 3)),
    ((10, 11), (4, 5), (3, 4)),
    ((5, 5), 7, 3),
    ((4, 15), 7, (3, 2)),
    ((1, 1), 2, 1),
    ((1, 9), (1, 3), 0),
    ((7, 14), 7, 3),
    ((6, 10), (6, 5), 0),
]
DIVIDED = [((9, 14), (3, 7), (1, 3)), ((7, 14), 7, 3), ((8, 12), 4, 2), ((5, 10), 7, 3)]


def inputs(
    size: tuple[int, int],
    window: int | tuple[int, int],
    cosine: bool = False,
    padded: bool = True,
    dtype: torch.dtype = torch.float64,
    batch: int = 2,
    heads: int = 3,
    head_dim: int = 8,
    seed: int = 0,
) -> dict[str, Tensor]:
    """Random leaves; the maps are three views of one projection."""
    wh, ww = (window, window) if isinstance(window, int) else window

    found, normal = random_maps(size, dtype, batch, heads, head_dim, seed)
    found["bias"] = normal(heads, 2 * wh - 1, 2 * ww - 1)
    if cosine:
        found["logit_scale"] = normal(heads) + torch.arange(heads).to(dtype) * 3
    if padded:
        found["pad"] = normal(3, heads, head_dim)
    return {name: x.requires_grad_() for name, x in found.items()}


def detached(leaves: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: x.detach() for name, x in leaves.items()}


@pytest.mark.parametrize("impl", EXACT)
@pytest.mark.parametrize("path", GOLDENS, ids=lambda path: path.stem)
def test_golden(path: Path, impl: str) -> None:
    d, x, _, probe, expected = op_case(path.with_suffix(""))
    window, heads = d["params"]["window"], d["params"]["heads"]
    out = window_attention(
        *x["qkv"].unbind(3),
        window,
        d["params"]["shift"],
        bias=x["table"].t().reshape(heads, 2 * window - 1, 2 * window - 1),
        scale=d["params"]["scale"],
        pad=x.get("pad"),
        semantics="dense",
        impl=impl,
    ).flatten(3)
    found = {"out": out}
    grads = torch.autograd.grad((out * probe).sum(), list(x.values()))
    found |= {f"grad_{name}": g for name, g in zip(x, grads, strict=True)}
    assert set(found) == set(expected)
    for name, y in expected.items():
        assert (sample(found[name]) - y).abs().max() <= 1e-7 * y.std(), name


def test_goldens_are_there() -> None:
    assert len(GOLDENS) == 8


def assert_equals_the_definition(leaves: dict[str, Tensor], **args: object) -> None:
    expected = window_attention(**leaves, **args, impl="reference")
    out = window_attention(**leaves, **args, impl="aten")
    torch.testing.assert_close(out, expected, rtol=1e-10, atol=1e-10)
    assert out.is_contiguous()
    wanted, found = gradients(expected, leaves), gradients(out, leaves)
    for name in leaves:
        torch.testing.assert_close(found[name], wanted[name], rtol=1e-9, atol=1e-9, msg=name)


@pytest.mark.parametrize("cosine", [False, True], ids=["dot", "cosine"])
@pytest.mark.parametrize("semantics", FREE)
@pytest.mark.parametrize(("size", "window", "shift"), SHAPES)
def test_aten_equals_the_definition(
    size: tuple[int, int], window: int, shift: int, semantics: str, cosine: bool
) -> None:
    args = {"window_size": window, "shift_size": shift, "semantics": semantics}
    leaves = inputs(size, window, cosine)
    assert_equals_the_definition(leaves, **args)
    for name in ("bias", "pad"):
        del leaves[name]
        assert_equals_the_definition(leaves, **args)


@pytest.mark.parametrize(("size", "window", "shift"), DIVIDED)
def test_the_authors_semantics(size: tuple[int, int], window: int, shift: int) -> None:
    args = {"window_size": window, "shift_size": shift, "semantics": "authors"}
    assert_equals_the_definition(inputs(size, window), **args)


# What other code computes.


def blocks(
    block: torch.nn.Module, x: Tensor, bias: Tensor, pad: Tensor, **args: object
) -> tuple[Tensor, Tensor]:
    """What a block of timm attends to, and the same around our op."""
    attn = block.attn
    if isinstance(block, SwinTransformerV2Block):
        qkv = F.linear(x, attn.qkv.weight, pad.flatten())
        args["logit_scale"] = attn.logit_scale.flatten()
    else:
        qkv = attn.qkv(x)
    maps = qkv.unflatten(-1, pad.shape).unbind(3)
    ours = window_attention(*maps, bias=bias, pad=pad, **args, impl="aten")
    return block._attn(x), attn.proj(ours.flatten(3))


def assert_blocks_agree(theirs: Tensor, ours: Tensor, leaves: dict[str, Tensor]) -> None:
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    wanted, found = gradients(theirs, leaves), gradients(ours, leaves)
    for name, grad in wanted.items():
        scale = float(grad.abs().max())
        torch.testing.assert_close(found[name], grad, rtol=0, atol=1e-12 * scale, msg=name)


# native, padded and non-square, clamped on one axis, on both, and a window as large as the map
TIMM = [((14, 14), 7, 3), ((12, 17), 5, 2), ((4, 15), 7, 3), ((5, 3), 7, 3), ((7, 7), 7, 3)]


@pytest.mark.parametrize("always_partition", [False, True])
@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize(("size", "window", "shift"), TIMM)
def test_timm_blocks(
    size: tuple[int, int], window: int, shift: int, version: int, always_partition: bool
) -> None:
    """Blocks of Swin and SwinV2 as timm runs them, forward and gradients."""
    torch.manual_seed(0)
    heads, head_dim = 3, 8
    kind = SwinTransformerBlock if version == 1 else SwinTransformerV2Block
    block = kind(
        heads * head_dim,
        size,
        heads,
        window_size=window,
        shift_size=shift,
        always_partition=always_partition,
        dtype=torch.float64,
    )
    for x in block.parameters():
        torch.nn.init.normal_(x, std=0.5)
    attn, (wh, ww) = block.attn, block.window_size
    x = torch.randn(2, *size, heads * head_dim, dtype=torch.float64, requires_grad=True)
    leaves = {"x": x, "qkv": attn.qkv.weight}
    if version == 1:
        leaves |= {"bias": attn.relative_position_bias_table, "pad": attn.qkv.bias}
    else:
        leaves |= {"q_bias": attn.q_bias, "v_bias": attn.v_bias, "logit_scale": attn.logit_scale}
        leaves["bias"] = attn.cpb_mlp[2].weight
    fixed = {"window_size": (wh, ww), "shift_size": block.shift_size, "semantics": "timm_fixed"}
    clamping = {"window_size": window, "shift_size": shift, "semantics": "timm"}
    for args in (fixed,) if always_partition else (fixed, clamping):
        if version == 1:
            bias, pad = attn.relative_position_bias_table, attn.qkv.bias
        else:
            bias = 16 * attn.cpb_mlp(attn.relative_coords_table).sigmoid()
            pad = torch.cat([attn.q_bias, attn.k_bias, attn.v_bias])
        bias = bias.view(2 * wh - 1, 2 * ww - 1, heads).permute(2, 0, 1)
        if args is clamping:  # its table is that of the window before, whose middle applies
            around = (window - ww, window - ww, window - wh, window - wh)
            bias = F.pad(bias, around, value=1e3)
        outs = blocks(block, x, bias, pad.view(3, heads, head_dim), **args)
        assert_blocks_agree(*outs, leaves)


def test_semantics_differ_where_they_should() -> None:
    """Nowhere on maps that windows divide and that are larger; at padded and at small sizes."""

    def differ(size: tuple[int, int], *names: str) -> float:
        leaves = detached(inputs(size, 4))
        outs = [
            window_attention(**leaves, window_size=4, shift_size=2, semantics=name)
            for name in names
        ]
        return float((outs[0] - outs[1]).abs().max())

    for name in ("timm_fixed", "authors", "dense"):
        assert differ((8, 12), "timm", name) <= 1e-14
    assert differ((9, 12), "timm", "dense") > 0.1
    assert differ((9, 12), "timm", "timm_fixed") <= 1e-14
    assert differ((4, 8), "timm", "authors") > 0.1
    assert differ((4, 8), "timm", "timm_fixed") > 0.1
    assert differ((3, 8), "timm_fixed", "dense") > 0.1


def test_the_authors_window_is_clamped_by_the_shorter_side() -> None:
    leaves = detached(inputs((5, 10), 7))
    out = window_attention(**leaves, window_size=7, shift_size=3, semantics="authors")
    middle = leaves["bias"][:, 2:-2, 2:-2]
    expected = window_attention(**leaves | {"bias": middle}, window_size=5, semantics="dense")
    torch.testing.assert_close(out, expected)
    del leaves["bias"]
    with pytest.raises(ValueError, match="windows that divide the map 5x10 .*got 4x4"):
        window_attention(**leaves, window_size=4, semantics="authors")


@pytest.mark.parametrize("impl", EXACT)
def test_cosines(impl: str) -> None:
    """Lengths of queries and keys count for nothing; the factor ends at 100."""
    leaves = detached(inputs((8, 8), 4, cosine=True))
    args = {"window_size": 4, "shift_size": 2, "impl": impl}
    out = window_attention(**leaves, **args)
    longer = leaves | {"query": leaves["query"] * 7, "key": leaves["key"] / 3}
    torch.testing.assert_close(window_attention(**longer, **args), out)
    limit = torch.full((3,), math.log(100), dtype=torch.float64)
    beyond = {**leaves, "logit_scale": (limit + 1).requires_grad_()}
    clamped = window_attention(**beyond, **args)
    at_limit = leaves | {"logit_scale": limit}
    torch.testing.assert_close(clamped, window_attention(**at_limit, **args))
    assert not torch.equal(clamped, out)
    (grad,) = torch.autograd.grad(clamped.sum(), beyond["logit_scale"])
    assert torch.equal(grad, torch.zeros(3).double())
    # the authors round log 100 to float32
    rounded = limit.float().double() + 0 * limit
    theirs = {"semantics": "authors", **args}
    expected = window_attention(**leaves | {"logit_scale": rounded}, **theirs)
    torch.testing.assert_close(window_attention(**beyond, **theirs), expected, rtol=0, atol=1e-14)
    found = window_attention(**at_limit, **theirs)
    assert torch.equal(found, window_attention(**at_limit, **args))


@pytest.mark.parametrize("impl", EXACT)
def test_a_query_of_zeros_has_a_gradient(impl: str) -> None:
    """Below the least norm the divisor is a constant."""
    leaves = {n: x.detach() for n, x in inputs((4, 4), 4, cosine=True).items()}
    leaves["query"] = leaves["query"].clone()
    leaves["query"][:, 0, 0] = 0
    leaves = {n: x.requires_grad_() for n, x in leaves.items()}
    found = gradients(window_attention(**leaves, window_size=4, impl=impl), leaves)["query"]
    wanted = gradients(window_attention(**leaves, window_size=4, impl="reference"), leaves)
    assert found[:, 0, 0].abs().min() > 1
    torch.testing.assert_close(found, wanted["query"])


# Parts.


def test_parts_and_images_do_not_mix(monkeypatch: pytest.MonkeyPatch) -> None:
    """Many parts, several images a part, and one window a part give the same numbers."""
    from vitarium.ops.window_attn import aten

    leaves = inputs((11, 14), 4, cosine=True, batch=4)
    args = {"window_size": 4, "shift_size": 2}
    expected = window_attention(**leaves, **args, impl="reference")
    wanted = gradients(expected, leaves)
    for chunk in (1, 1 << 13, 1 << 15, 1 << 30):
        monkeypatch.setattr(aten, "CHUNK", chunk)
        out = window_attention(**leaves, **args)
        torch.testing.assert_close(out, expected)
        for name, grad in gradients(out, leaves).items():
            torch.testing.assert_close(grad, wanted[name], msg=name)


@pytest.mark.parametrize("cosine", [False, True])
def test_gradcheck_of_the_definition(cosine: bool) -> None:
    leaves = inputs((3, 2), 2, cosine, batch=1, heads=2, head_dim=2)
    names = list(leaves)

    def function(*tensors: Tensor) -> Tensor:
        call = dict(zip(names, tensors, strict=True))
        return window_attention(**call, window_size=2, shift_size=1, impl="reference")

    assert torch.autograd.gradcheck(function, tuple(leaves.values()))


# Invariants that no oracle shares a bug with.


@pytest.mark.parametrize("impl", EXACT)
@pytest.mark.parametrize(("shift", "count"), [(0, 12), ((2, 1), None)])
def test_window(impl: str, shift: int, count: int | None) -> None:
    """A query sees the keys of its window, each as often as it is seen; rows sum to one."""
    height, width, wh, ww = 8, 9, 4, 3
    tokens = height * width
    query = torch.randn(1, height, width, 1, tokens, dtype=torch.float64)
    value = torch.eye(tokens, dtype=torch.float64).view(1, height, width, 1, tokens)
    weights = window_attention(query, query, value, (wh, ww), shift, scale=0.01, impl=impl)
    weights = weights[0, :, :, 0].flatten(0, 1)
    assert torch.allclose(weights.sum(-1), torch.ones(()).double())
    seen = weights > 1e-30  # masked ones are not zero but exp(-100)
    assert torch.equal(seen, seen.t())
    if count is not None:
        assert (seen.sum(-1) == count).all()
    down, right = (shift, shift) if isinstance(shift, int) else shift
    position = torch.arange(tokens)
    row = (position // width + wh - down) // wh  # windows of the shifted grid, borders included
    column = (position % width + ww - right) // ww
    together = (row[:, None] == row) & (column[:, None] == column)
    assert torch.equal(seen, together)


@pytest.mark.parametrize("impl", EXACT)
def test_equal_keys_average_the_window(impl: str) -> None:
    leaves = detached(inputs((8, 6), (4, 3), padded=False))
    leaves["key"] = torch.ones_like(leaves["key"])
    del leaves["bias"]
    out = window_attention(**leaves, window_size=(4, 3), impl=impl)
    value = leaves["value"]
    torch.testing.assert_close(out[:, 3, 2], value[:, :4, :3].mean((1, 2)))
    torch.testing.assert_close(out[:, 4, 3], value[:, 4:, 3:].mean((1, 2)))


@pytest.mark.parametrize("impl", EXACT)
def test_whole_map_is_dense_attention(impl: str) -> None:
    leaves = detached(inputs((7, 5), (9, 5)))
    del leaves["bias"]
    out = window_attention(**leaves, window_size=(9, 5), shift_size=2, impl=impl)
    q, k, v = (leaves[n].flatten(1, 2).transpose(1, 2) for n in ("query", "key", "value"))
    dense = F.scaled_dot_product_attention(q, k, v).transpose(1, 2)
    torch.testing.assert_close(out, dense.reshape(out.shape))


@pytest.mark.parametrize("impl", EXACT)
def test_heads_and_images_are_independent(impl: str) -> None:
    leaves = detached(inputs((9, 8), 4, cosine=True))
    args = {"window_size": 4, "shift_size": 1, "impl": impl}
    out = window_attention(**leaves, **args)
    heads = torch.tensor([2, 0, 1])
    moved = {n: x[:, :, :, heads].flip(0) if x.ndim == 5 else x for n, x in leaves.items()}
    moved |= {n: leaves[n][heads] for n in ("bias", "logit_scale")}
    moved["pad"] = leaves["pad"][:, heads]
    found = window_attention(**moved, **args)
    torch.testing.assert_close(found, out[:, :, :, heads].flip(0))


@pytest.mark.parametrize("impl", EXACT)
def test_padding_is_a_larger_map(impl: str) -> None:
    """``pad`` gives what attention on the padded map gives, cropped; without one it is zeros."""
    leaves = detached(inputs((6, 12), 4))
    args = {"window_size": 4, "shift_size": 1, "semantics": "dense", "impl": impl}
    out = window_attention(**leaves, **args)
    pad = leaves.pop("pad")
    names = ("query", "key", "value")
    grown = {
        n: torch.cat([leaves[n], pad[i].expand(2, 2, 12, -1, -1)], 1) for i, n in enumerate(names)
    }
    whole = window_attention(**grown, bias=leaves["bias"], **args)
    torch.testing.assert_close(out, whole[:, :6])
    zeros = window_attention(**leaves, pad=torch.zeros_like(pad), **args)
    assert torch.equal(window_attention(**leaves, **args), zeros)
    assert not torch.allclose(zeros, out)


# Precision, memory layout, compilation.


@pytest.mark.parametrize("cosine", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_error_is_that_of_dense_attention(dtype: torch.dtype, cosine: bool) -> None:
    """At most 3x the error of the same-precision SDPA, with the whole map as the window."""
    leaves = inputs((13, 13), 13, cosine, False, dtype, head_dim=32)
    out = window_attention(**leaves, window_size=13, impl="aten")
    assert out.dtype == dtype
    grads = gradients(out, leaves)
    exact = {n: x.detach().double().requires_grad_() for n, x in leaves.items()}
    expected = window_attention(**exact, window_size=13, impl="reference")
    wanted = gradients(expected, exact)

    position = torch.arange(13)
    entry = position[:, None] - position + 12
    rows, columns = entry[:, None, :, None], entry[None, :, None, :]
    mask = leaves["bias"][:, rows, columns].reshape(1, 3, 169, 169)
    q, k, v = (leaves[n].flatten(1, 2).transpose(1, 2) for n in ("query", "key", "value"))
    scale = None
    if cosine:
        factor = leaves["logit_scale"].clamp(max=math.log(100)).exp()
        q, k = F.normalize(q, dim=-1) * factor[:, None, None], F.normalize(k, dim=-1)
        scale = 1.0
    dense = F.scaled_dot_product_attention(q, k, v, mask, scale=scale)
    dense = dense.transpose(1, 2).reshape(out.shape)
    peer = gradients(dense, leaves)

    def error(found: Tensor, oracle: Tensor) -> float:
        return float((found.detach().double() - oracle.detach()).abs().mean())

    assert error(out, expected) <= 3 * error(dense, expected)
    for name in leaves:
        assert error(grads[name], wanted[name]) <= 3 * error(peer[name], wanted[name]), name


def test_layouts() -> None:
    """Views of one projection, heads-last views, permuted and cropped maps are read as they are."""
    x = torch.randn(2, 3, 12, 11, 8, dtype=torch.float64)
    views = [x.permute(0, 2, 3, 1, 4), x.permute(0, 3, 2, 1, 4).transpose(1, 2)]
    views.append(torch.randn(2, 15, 14, 3, 8).double()[:, 2:14, 1:12])
    views.append(torch.randn(2, 12, 11, 3, 16).double()[..., ::2])
    qkv = torch.randn(2, 12, 11, 3, 3, 8).double()
    views += qkv.unbind(3)
    for query, key in itertools.product(views, views):
        args = (query, key, qkv[:, :, :, 2], 5, 2)
        expected = window_attention(*args, impl="reference")
        torch.testing.assert_close(window_attention(*args), expected)
    cropped = torch.randn(2, 14, 13, 3, 3, 8).double()[:, 1:13, 2:].unbind(3)
    expected = window_attention(*cropped, 5, 2, impl="reference")
    torch.testing.assert_close(window_attention(*cropped, 5, 2), expected)


def test_empty_batch() -> None:
    leaves = inputs((5, 9), 4, cosine=True, batch=0)
    out = window_attention(**leaves, window_size=4, shift_size=2)
    assert out.shape == leaves["query"].shape
    for name, grad in gradients(out, leaves).items():
        assert torch.equal(grad, torch.zeros_like(leaves[name])), name


def test_parameters_may_have_another_precision() -> None:
    """Under autocast the maps are bfloat16 and the parameters float32, which are not rounded."""
    leaves = inputs((5, 5), 4, True, dtype=torch.float32)
    names = ("query", "key", "value")
    low = {n: x.bfloat16() if n in names else x for n, x in leaves.items()}
    with torch.autocast("cpu"):
        out = window_attention(**low, window_size=4)
        assert out.dtype == torch.bfloat16
        out.float().sum().backward()
    for name in leaves:
        assert leaves[name].grad is not None, name
        assert leaves[name].grad.dtype == torch.float32
    shifted = low | {"bias": low["bias"] + 1000}
    found = window_attention(**shifted, window_size=4)
    torch.testing.assert_close(found, out, rtol=0, atol=0.02)


def test_new_parameter_values_are_seen() -> None:
    """Nothing that depends on values is kept from one call to the next."""
    leaves = detached(inputs((9, 9), 4))
    before = window_attention(**leaves, window_size=4)
    leaves["bias"].data.mul_(2)
    after = window_attention(**leaves, window_size=4)
    assert not torch.equal(before, after)
    expected = window_attention(**leaves, window_size=4, impl="reference")
    torch.testing.assert_close(after, expected)


@pytest.mark.parametrize("first", [torch.inference_mode, torch.no_grad])
def test_tables_of_one_mode_serve_another(first: type) -> None:
    """Windows are kept between calls, whatever mode made them."""
    from vitarium.ops.window_attn import windows

    windows.partition.cache_clear()
    leaves = inputs((9, 11), 4)
    with first():
        window_attention(**leaves, window_size=4, shift_size=1)
    assert_equals_the_definition(leaves, window_size=4, shift_size=1)


def test_meta_tensors_give_shapes() -> None:
    query = torch.empty(2, 17, 19, 3, 8, device="meta", requires_grad=True)
    out = window_attention(query, query, query, 7, 3)
    assert out.shape == query.shape
    assert torch.autograd.grad(out, query, torch.empty_like(out))[0].shape == query.shape


def test_repeatable() -> None:
    torch.set_num_threads(2)
    leaves = inputs((20, 21), 7, dtype=torch.float32)
    runs = []
    for _ in range(3):
        out = window_attention(**leaves, window_size=7, shift_size=3)
        runs.append([out, *gradients(out, leaves).values()])
    torch.set_num_threads(1)
    for run in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(run, runs[0], strict=True))


@pytest.mark.parametrize("semantics", ["timm", "dense"])
@pytest.mark.parametrize("cosine", [False, True])
def test_compile_fullgraph(semantics: str, cosine: bool) -> None:
    leaves = inputs((9, 13), 4, cosine)
    args = dict(leaves, window_size=4, shift_size=1, semantics=semantics)
    expected = window_attention(**args, impl="reference")
    wanted = gradients(expected, leaves)
    torch._dynamo.reset()
    out = torch.compile(window_attention, fullgraph=True, backend="aot_eager")(**args)
    torch.testing.assert_close(out, expected)
    for name, grad in gradients(out, leaves).items():
        torch.testing.assert_close(grad, wanted[name], msg=name)


class Attention(torch.nn.Module):
    """What `torch.export` takes."""

    def __init__(self, **args: object) -> None:
        super().__init__()
        self.args = args

    def forward(self, x: dict[str, Tensor]) -> Tensor:
        return window_attention(**x, **self.args)


def test_one_program_for_all_maps() -> None:
    counter = CompileCounterWithBackend("eager")
    torch._dynamo.reset()
    compiled = torch.compile(window_attention, fullgraph=True, backend=counter, dynamic=True)
    for size in ((11, 14), (5, 20), (30, 8), (3, 4), (12, 11)):
        args = dict(detached(inputs(size, 5)), window_size=5, shift_size=2)
        expected = window_attention(**args, impl="reference")
        torch.testing.assert_close(compiled(**args), expected)
    assert counter.frame_count == 1


@pytest.mark.skipif(shutil.which("c++") is None, reason="inductor needs a C++ compiler")
@pytest.mark.parametrize("exported", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_compile_with_inductor(exported: bool) -> None:
    """Of exported programs too: its pattern matcher rewrites attention."""
    leaves = detached(inputs((9, 13), 4, dtype=torch.float32))
    module: torch.nn.Module = Attention(window_size=4, shift_size=2)
    expected = window_attention(**leaves, window_size=4, shift_size=2, impl="reference")
    if exported:
        module = torch.export.export(module, (leaves,)).module()
    torch._dynamo.reset()
    out = torch.compile(module, fullgraph=True)(leaves)
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("cosine", [False, True])
@pytest.mark.parametrize("semantics", [*FREE, "authors"])
def test_export(semantics: str, cosine: bool) -> None:
    size = (8, 12) if semantics == "authors" else (6, 9)
    leaves = detached(inputs(size, 4, cosine))
    args = {"window_size": 4, "shift_size": 2, "semantics": semantics}
    program = torch.export.export(Attention(**args), (leaves,))
    targets = {str(node.target) for node in program.graph.nodes}
    assert not any("vitarium" in target for target in targets)
    expected = window_attention(**leaves, **args, impl="reference")
    torch.testing.assert_close(program.module()(leaves), expected)


def test_exported_native_sizes_copy_nothing_for_padding() -> None:
    for size, padding in (((8, 12), False), ((8, 11), True)):
        leaves = detached(inputs(size, 4))
        program = torch.export.export(Attention(window_size=4), (leaves,))
        assert padding == any("cat" in str(node.target) for node in program.graph.nodes)


@pytest.mark.parametrize("semantics", ["timm", "dense"])
def test_exported_for_any_size(semantics: str) -> None:
    """One program for maps that are padded, that are not, and that are smaller than a window."""
    leaves = detached(inputs((11, 14), 5, cosine=True))
    args = {"window_size": 5, "shift_size": 2, "semantics": semantics}
    dims = dict.fromkeys(range(3), torch.export.Dim.DYNAMIC)
    shapes = {n: dims if n in ("query", "key", "value") else None for n in leaves}
    program = torch.export.export(Attention(**args), (leaves,), dynamic_shapes=(shapes,)).module()
    for size, batch in (((11, 14), 2), ((5, 20), 3), ((3, 4), 2), ((10, 10), 4), ((2, 6), 2)):
        found = detached(inputs(size, 5, cosine=True, batch=batch))
        expected = window_attention(**found, **args, impl="reference")
        torch.testing.assert_close(program(found), expected)


def test_traced_programs_can_be_trained() -> None:
    from vitarium.ops.window_attn import op, traced

    for size, window, shift in SHAPES:
        leaves = inputs(size, window)
        for semantics in FREE:
            args = {"window_size": window, "shift_size": shift, "semantics": semantics}
            out = traced.run(op._prepare(**leaves, **args))
            expected = window_attention(**leaves, **args, impl="reference")
            torch.testing.assert_close(out, expected)
            wanted = gradients(expected, leaves)
            for name, grad in gradients(out, leaves).items():
                torch.testing.assert_close(grad, wanted[name], msg=name)


# The dispatcher's view.


@pytest.mark.parametrize("cosine", [False, True])
@pytest.mark.parametrize("plain", [False, True])
def test_opcheck(plain: bool, cosine: bool) -> None:
    ops = torch.ops.vitarium
    x = inputs((5, 7), 3, cosine, padded=not plain)
    factor = x["logit_scale"] if cosine else None
    bias = None if plain else x["bias"]
    args = (
        x["query"],
        x["key"],
        x["value"],
        bias,
        factor,
        x.get("pad"),
        (3, 3),
        (1, 1),
        0.3,
        "timm",
    )
    torch.library.opcheck(ops.window_attention_aten, args)
    args = [x.detach() if isinstance(x, Tensor) else x for x in args]
    torch.library.opcheck(ops.window_attention_aten_backward, (args[0], *args))


def test_second_derivatives_are_refused() -> None:
    leaves = inputs((5, 7), 3)
    out = window_attention(**leaves, window_size=3, impl="aten")
    (grad,) = torch.autograd.grad(out.sum(), leaves["query"], create_graph=True)
    with pytest.raises(RuntimeError, match="has no gradient; impl='reference'"):
        grad.sum().backward()


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize(
    ("size", "window", "area"), [((9, 14), (3, 5), 15), ((4, 15), 7, 28), ((8, 8), 4, 16)]
)
def test_flops_are_the_formula(size: tuple[int, int], window: int, area: int, device: str) -> None:
    """Two products of real queries with their clamped windows; the gradient takes five."""
    leaves = inputs(size, window, dtype=torch.float32)
    leaves = {n: x.detach().to(device).requires_grad_() for n, x in leaves.items()}
    args = dict(leaves, window_size=window, shift_size=1)
    product = 2 * leaves["query"].numel() * area
    assert flops(window_attention, **args) == 2 * product

    def training() -> None:
        window_attention(**args).sum().backward()

    assert flops(training) == 7 * product


# Which implementation runs.


def test_which_implementation_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    x = detached(inputs((9, 9), 3))
    ran = record(monkeypatch, "window")
    monkeypatch.delenv("VITARIUM_OPS", raising=False)
    window_attention(**x, window_size=3)
    window_attention(**x, window_size=3, impl="reference")
    with use_impl({"window": "reference"}):
        window_attention(**x, window_size=3)
        window_attention(**x, window_size=3, impl="aten")
    assert ran == ["aten", "reference", "reference", "aten"]
    for name in ("window", window_attention):
        found = explain(name, **x, window_size=3)
        assert found.chosen == "aten"
        assert list(found.reasons) == ["reference", "triton", "aten"]
        assert found.reasons["reference"] is None
        assert found.reasons["triton"]  # float64
        assert found.reasons["aten"] is None
    with pytest.raises(ValueError, match="no such implementation"):
        window_attention(**x, window_size=3, impl="natten")


# Bad input.


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"query": torch.randn(2, 9, 8, 24)}, r"query: expected rank 5, .*got shape \(2, 9, 8, 24"),
        ({"key": torch.randn(2, 9, 8, 3, 4)}, r"key: expected query's shape .*got \(2, 9, 8, 3, 4"),
        ({"value": torch.randn(2, 9, 8, 3, 8).double()}, "value: expected query's dtype .*float64"),
        ({"query": torch.ones(2, 9, 8, 3, 8, dtype=torch.long)}, "query: .*floating.*int64"),
        ({"window_size": 0}, "window_size: expected a positive int"),
        ({"window_size": 3.0}, "window_size: expected a positive int"),
        ({"window_size": (3, 3, 3)}, "window_size: expected a positive int or a pair"),
        ({"shift_size": 4}, r"shift_size: .*from 0 to below window_size \(4, 4\), got 4"),
        ({"shift_size": -1}, "shift_size: expected an int or a pair of them, from 0.*got -1"),
        ({"shift_size": 1.5}, "shift_size: expected an int.*got 1.5"),
        ({"shift_size": (1, 2, 3)}, "shift_size: expected an int or a pair"),
        ({"bias": torch.randn(3, 7, 5)}, r"bias: expected shape \(3, 7, 7\), got \(3, 7, 5\)"),
        ({"bias": torch.ones(3, 7, 7, dtype=torch.int)}, "bias: .*floating.*int32"),
        ({"pad": torch.randn(3, 24)}, r"pad: expected shape \(3, 3, 8\), got \(3, 24\)"),
        ({"logit_scale": torch.ones(3, 1, 1)}, r"logit_scale: expected shape \(3,\)"),
        ({"scale": "large"}, "scale: expected a number, got str"),
        ({"scale": 1.0, "logit_scale": torch.ones(3)}, "scale: expected None beside logit_scale"),
        ({"semantics": "swin"}, "semantics: expected one of timm, .*dense, got 'swin'"),
        (
            {n: torch.randn(2, 0, 8, 3, 8) for n in ("query", "key", "value")},
            "query: expected H >= 1",
        ),
    ],
)
def test_bad_input(changes: dict[str, object], message: str) -> None:
    x = detached(inputs((9, 8), 4, dtype=torch.float32))
    with pytest.raises(ValueError, match=message):
        window_attention(**{**x, "window_size": 4, **changes})


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("semantics", FREE)
def test_aten_on_a_gpu(semantics: str) -> None:
    for size, window, shift in SHAPES:
        leaves = inputs(size, window, cosine=True)
        args = {"window_size": window, "shift_size": shift, "semantics": semantics}
        expected = window_attention(**leaves, **args, impl="reference")
        wanted = gradients(expected, leaves)
        moved = {n: x.detach().cuda().requires_grad_() for n, x in leaves.items()}
        out = window_attention(**moved, **args, impl="aten")
        torch.testing.assert_close(out.cpu(), expected, rtol=1e-9, atol=1e-9)
        for name, grad in gradients(out, moved).items():
            torch.testing.assert_close(grad.cpu(), wanted[name], rtol=1e-9, atol=1e-9, msg=name)
