"""BiFormer and BiFormer-STL: regions, padding, dense forms, and what they refuse."""

import pytest
import timm
import torch
import torch.nn.functional as F
from attos import assert_same, gradients
from timm.layers import DropPath
from torch import nn
from torch.export import Dim, export
from torch.utils.flop_counter import FlopCounterMode

from vitarium import checkpoints
from vitarium.backbones.biformer import (
    FullAttention,
    RefactoredRoutingAttention,
    RoutingAttention,
)
from vitarium.heads.features import FeatureBackbone
from vitarium.ops import use_impl

ATTO = "biformer_atto"
SMALL_STL = {
    "embed_dim": 32, "depths": (1, 1, 1, 1), "head_dim": 16, "num_regions": 3,
    "topks": (1, 4, 9, None), "num_classes": 10,
}  # fmt: skip


def create(name=ATTO, **kwargs):
    torch.manual_seed(0)
    return timm.create_model(name, **kwargs).eval()


def stl(refactored, **kwargs):
    return create("biformer_stl_nchw" if refactored else "biformer_stl", **SMALL_STL, **kwargs)


def routed(model):
    return [m for m in model.modules() if isinstance(m, RoutingAttention)]


# Attention


def authors(attn, x):
    """The authors' padding, literally: zeros complete the input of the projection."""
    height, width = x.shape[1:3]
    n = attn.num_regions
    x = F.pad(x, (0, 0, 0, -width % n, 0, -height % n))
    out = attn(x)  # a map that regions divide
    return out[:, :height, :width]


@pytest.mark.parametrize("size", [(7, 9), (8, 9), (9, 8), (5, 4), (1, 1), (11, 10)])
def test_zeros_complete_the_input(size):
    attn = RoutingAttention(16, 2, 4, 3, dtype=torch.float64)
    x = torch.randn(2, *size, 16, dtype=torch.float64, requires_grad=True)
    leaves = [x, *attn.parameters()]
    expected, out = authors(attn, x), attn(x)
    torch.testing.assert_close(out, expected)
    probe = torch.randn_like(out)
    wanted, found = (torch.autograd.grad(y, leaves, probe) for y in (expected, out))
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b)


def test_a_divided_map_needs_no_zeros():
    """Both forms compute the same then, and the depthwise convolution sees zeros outside."""
    attn = RoutingAttention(16, 2, 4, 3, dtype=torch.float64)
    other = RefactoredRoutingAttention(16, 2, 4, 3, dtype=torch.float64)
    state = attn.state_dict()
    names = {"qkv.qkv": "qkv_linear", "wo": "output_linear", "lepe": "lepe"}
    for theirs, ours in names.items():
        layer = other.get_submodule(ours)
        layer.weight.data = state[f"{theirs}.weight"].view_as(layer.weight)
        layer.bias.data = state[f"{theirs}.bias"]
    x = torch.randn(1, 8, 12, 16).double()
    torch.testing.assert_close(other(x), attn(x))
    odd = torch.randn(1, 9, 13, 16).double()
    assert not torch.allclose(other(odd), attn(odd))


@torch.no_grad()
@pytest.mark.parametrize("of_value", [False, True])
def test_full_attention_is_what_the_formula_says(of_value):
    attn = FullAttention(16, 8, of_value, dtype=torch.float64)
    x = torch.randn(1, 3, 4, 16).double()
    assert attn.qkv.bias is None
    q, k, v = attn.qkv(x).reshape(12, 3, 8, 2).permute(1, 2, 0, 3)
    y = ((q @ k.mT) * 2**-0.5).softmax(-1) @ v
    y = y.transpose(0, 1).reshape(1, 3, 4, 16)
    local = (attn.qkv(x)[..., 32:] if of_value else x).permute(0, 3, 1, 2)
    lepe = F.conv2d(local, attn.lepe.weight, attn.lepe.bias, padding=2, groups=16)
    torch.testing.assert_close(attn(x), attn.proj(y + lepe.permute(0, 2, 3, 1)))


# Models


def test_regions_of_each_stage():
    model = create("biformer_tiny", device="meta")
    found = [(a.num_regions, a.topk, a.num_heads) for a in routed(model)]
    assert found == [(7, 1, 2)] * 2 + [(7, 4, 4)] * 2 + [(7, 16, 8)] * 8
    assert [a.num_heads for a in model.modules() if isinstance(a, FullAttention)] == [8, 8]
    model = create(num_regions=(2, 3, 4, 5), device="meta")
    assert [a.num_regions for a in routed(model)] == [2, 2, 3, 3, 4, 4]


@torch.no_grad()
def test_the_number_of_regions_changes_no_parameter():
    few, many = create(num_regions=2), create(num_regions=5)
    many.load_state_dict(few.state_dict())
    x = torch.randn(1, 3, 64, 96)
    assert not torch.allclose(few(x), many(x))


def test_stochastic_depth_rises_over_all_blocks():
    model = create(drop_path_rate=0.3, device="meta")
    rates = [m.drop_prob for m in model.modules() if isinstance(m, DropPath)]
    assert rates == pytest.approx(torch.linspace(0, 0.3, 7)[1:].tolist())


@pytest.mark.parametrize(
    "name", ["tiny", "stl", *(pytest.param(x, marks=pytest.mark.slow) for x in ("small", "base"))]
)
def test_flops_are_the_published_ones(name):
    model = create(f"biformer_{name}", device="meta")
    published = {"tiny": 2.2, "small": 4.5, "base": 9.8, "stl": 4.6}[name]
    with FlopCounterMode(display=False) as counter:
        model(torch.empty(1, 3, 224, 224, device="meta"))
    assert counter.get_total_flops() / 2e9 == pytest.approx(published, rel=0.03)


@pytest.mark.parametrize("refactored", [False, True])
@pytest.mark.parametrize("size", [(48, 48), (77, 59)])
def test_stl_takes_any_size(refactored, size):
    model = stl(refactored).train()
    x = torch.randn(2, 3, *size, requires_grad=True)
    maps = model.forward_intermediates(x, intermediates_only=True)
    height, width = (n // 4 for n in size)  # what is over at the far borders is dropped
    assert [tuple(y.shape[2:]) for y in maps] == [(height // 2**i, width // 2**i) for i in range(4)]
    model(x).square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    model.eval()
    with torch.no_grad(), use_impl("reference"):
        expected = model(x)
    assert_same(model(x).detach(), expected)


@torch.no_grad()
def test_the_two_stl_models_differ_in_their_last_stage():
    """On maps that regions divide; values and inputs of its convolution."""
    one, other = stl(False, dtype=torch.float64), stl(True, dtype=torch.float64)
    names = {"attn.qkv_linear.": "attn.qkv.qkv.", "attn.output_linear.": "attn.wo."}
    state = {}
    for name, x in other.state_dict().items():
        for theirs, ours in names.items():
            name = name.replace(theirs, ours)
        state[name] = x.view_as(one.state_dict()[name])
    one.load_state_dict(state)
    x = torch.randn(1, 3, 96, 96).double()
    a, b = (m.forward_intermediates(x, intermediates_only=True) for m in (one, other))
    for y, z in zip(a[:3], b[:3], strict=True):
        torch.testing.assert_close(y, z)
    assert not torch.allclose(a[3], b[3])


@pytest.mark.slow
def test_stl_trains_compiled():
    model, x = stl(True).train(), torch.randn(2, 3, 51, 60)
    expected = gradients(model, x)
    torch.compiler.reset()
    run = torch.compile(model, fullgraph=True, backend="aot_eager")
    for key, grad in gradients(model, x, run).items():
        if key != "downsample_layers.0.0.bias":  # before batch norm: nothing but rounding
            assert_same(grad, expected[key], 1e-4)


@pytest.mark.slow
@torch.no_grad()
def test_one_exported_stl_for_all_sizes():
    model = stl(True)
    sides = {0: Dim("B"), 2: Dim("H", min=97), 3: Dim("W", min=97)}
    program = export(model, (torch.randn(2, 3, 128, 160),), dynamic_shapes=(sides,)).module()
    for shape in ((1, 3, 97, 97), (3, 3, 131, 200)):
        x = torch.randn(shape)
        assert_same(program(x), model(x))


# Dense form


@torch.no_grad()
def test_dense_form():
    backbone = FeatureBackbone(ATTO, task="seg", dtype=torch.float64).eval()
    assert {a.num_regions for a in routed(backbone)} == {8}
    assert {a.num_regions for a in routed(FeatureBackbone(ATTO, task="det"))} == {16}
    assert {a.num_regions for a in routed(FeatureBackbone(ATTO, task="det", num_regions=5))} == {5}
    plain = create(num_regions=8, dtype=torch.float64)
    state = plain.state_dict()
    report = checkpoints.load(backbone, state)
    assert {name.partition(".")[0] for name in report.ignored} == {"norm", "head"}
    x = torch.randn(1, 3, 70, 90).double()
    expected = plain.forward_intermediates(x, intermediates_only=True, output_fmt="NHWC")
    for y, z in zip(backbone(x), expected, strict=True):
        z = F.layer_norm(z, z.shape[-1:], eps=1e-6)
        torch.testing.assert_close(y, z.permute(0, 3, 1, 2))


def test_dense_form_of_some_stages():
    backbone = FeatureBackbone(ATTO, task="det", out_indices=(0, 2), num_regions=4).train()
    backbone.model.set_grad_checkpointing()
    maps = backbone(torch.randn(2, 3, 48, 64))
    assert [tuple(y.shape[1:]) for y in maps] == [(32, 12, 16), (128, 3, 4)]
    sum(y.square().sum() for y in maps).backward()
    assert [key for key, p in backbone.named_parameters() if p.grad is None] == []
    names = {key for key in backbone.state_dict() if "extra_norms" in key}
    assert names == {f"model.extra_norms.{i}.{leaf}" for i in (0, 2) for leaf in ("weight", "bias")}


def test_stl_has_no_dense_form():
    with pytest.raises(ValueError, match="task: expected None, BiFormer-STL has no form .* 'det'"):
        FeatureBackbone("biformer_stl", task="det", device="meta")


# Checkpoints


def test_files_with_and_without_counters_load():
    model, other = create(), create(num_classes=10)
    state = model.state_dict()
    state["norm.num_batches_tracked"] += 7
    checkpoints.load(other, {"model": state})
    assert other.norm.num_batches_tracked == 7
    bare = {name: x for name, x in state.items() if "num_batches" not in name}
    checkpoints.load(create(), bare)
    with pytest.raises(checkpoints.CheckpointError, match=r"1 missing: norm\.running_mean"):
        checkpoints.load(create(), {k: x for k, x in state.items() if k != "norm.running_mean"})


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [("biformer_stl", "biformer_stl_nchw"), ("biformer_stl_nchw", "biformer_stl")],
)
def test_the_two_stl_models_do_not_take_each_others_files(theirs, ours):
    state = create(theirs, device="meta").state_dict()
    with pytest.raises(checkpoints.CheckpointError, match=r"missing: stages\.0\.blocks\.0"):
        checkpoints.load(create(ours, device="meta"), state)


def test_a_synchronized_final_norm_is_refused_aloud():
    """Its maps are channels-last, which torch's conversion does not know."""
    model = nn.SyncBatchNorm.convert_sync_batchnorm(create())
    with pytest.raises((RuntimeError, ValueError)):
        model(torch.randn(1, 3, 64, 96))


# Bad input


@pytest.mark.parametrize(
    ("name", "kwargs", "message"),
    [
        (ATTO, {"topks": (1, 2, 17, None)}, r"topks: expected 1 to num_regions \*\* 2 = 16 .* 17"),
        (ATTO, {"topks": (0, 2, 4, None)}, "topks: expected 1 to .*, got 0"),
        (ATTO, {"topks": (1, 2, 4)}, r"topks: expected one per stage \(4\), got \(1, 2, 4\)"),
        (ATTO, {"num_regions": (4, 4)}, r"num_regions: expected one per stage \(4\), got \(4, 4\)"),
        (ATTO, {"num_regions": 0}, "num_regions: expected at least 1, got 0"),
        (ATTO, {"head_dim": 24}, "head_dim: expected a divisor of dim = 32, got 24"),
        (ATTO, {"attn_drop_rate": 0.1}, "attn_drop_rate: expected 0"),
        ("biformer_tiny", {"num_regions": 3}, r"topks: expected 1 to num_regions \*\* 2 = 9"),
    ],
)
def test_bad_arguments(name, kwargs, message):
    with pytest.raises(ValueError, match=message):
        create(name, device="meta", **kwargs)


def test_small_images():
    with pytest.raises(ValueError, match=r"image: expected .* H, W >= 112, got .* 111, 224\)"):
        create("biformer_stl_nchw", device="meta")(torch.empty(1, 3, 111, 224, device="meta"))
    assert timm.get_pretrained_cfg("biformer_stl_nchw").min_input_size == (3, 112, 112)
    small = create("biformer_stl_nchw", num_regions=4, device="meta")
    assert small.min_size == 64
