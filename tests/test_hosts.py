"""The hosts with their own attention, and what they promise to mixers."""

import copy

import pytest
import timm
import torch
import torch.nn.functional as F
from attos import assert_same
from torch import nn
from torch.export import Dim, export

from vitarium.backbones._hosts import cswin, swin
from vitarium.tools import bench_compile

SMALL = {
    "num_classes": 5,
    "embed_dim": 16,
    "depths": (2, 2, 2, 1),
    "num_heads": (1, 2, 4, 8),
    "mlp_ratio": 2.0,
}
SMALL_SWIN = {**SMALL, "window_size": 4}
SMALL_CSWIN = {**SMALL, "num_heads": (2, 2, 4, 8), "split_size": (2, 2, 3, 3)}
HOSTS = [(swin.Swin, SMALL_SWIN), (cswin.CSwin, SMALL_CSWIN)]
BOTH = pytest.mark.parametrize(("host", "kwargs"), HOSTS, ids=["swin", "cswin"])


def randomized(model):
    """The model in evaluation, with weights of which none is zero."""
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        parameter.data += 0.1 * noise.to(parameter)
    return model.eval()


def image(*shape, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=dtype)


# Swin


def from_timm(state_dict, model):
    """timm's tensors under the authors' names, tables of clamped windows grown to whole ones."""
    renamed = {}
    for name, x in state_dict.items():
        key = name.replace("head.fc.", "head.")
        if ".downsample." in key:
            _, i, rest = key.split(".", 2)
            key = f"layers.{int(i) - 1}.{rest}"
        if key.endswith("bias_table"):
            whole = torch.zeros_like(model.state_dict()[key]).t().unflatten(1, (7, 7))
            side = int(len(x) ** 0.5)
            middle = slice(3 - side // 2, 4 + side // 2)
            whole[:, middle, middle] = x.t().unflatten(1, (side, side))
            x = whole.flatten(1).t()
        renamed[key] = x
    return renamed


@pytest.mark.parametrize("size", [128, 64])
def test_swin_is_timms(size):
    """At 128 the last map is one window, at 64 it is smaller: neither is shifted."""
    kwargs = {**SMALL_SWIN, "img_size": size}
    theirs = timm.create_model("swin_tiny_patch4_window7_224", **kwargs)
    theirs = randomized(theirs.double())
    ours = swin.Swin(**kwargs, dtype=torch.float64).eval()
    ours.load_state_dict(from_timm(theirs.state_dict(), ours))
    x = image(2, 3, size, size, dtype=torch.float64).requires_grad_()
    expected, found = theirs(x), ours(x)
    torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-11)
    probe = torch.randn_like(expected)
    wanted, grad = (torch.autograd.grad(y, x, probe)[0] for y in (expected, found))
    torch.testing.assert_close(grad, wanted, rtol=1e-11, atol=1e-11)
    maps = theirs.forward_intermediates(x, intermediates_only=True)
    for y, z in zip(ours.forward_intermediates(x, intermediates_only=True), maps, strict=True):
        torch.testing.assert_close(y, z, rtol=1e-11, atol=1e-11)


def test_swins_buffers_are_dropped_and_rebuilt():
    """What timm computes for its blocks is what the authors store."""
    kwargs = {**SMALL_SWIN, "img_size": (64, 96)}
    theirs = timm.create_model("swin_tiny_patch4_window7_224", **kwargs)
    model = randomized(swin.Swin(**kwargs))
    buffers = swin.buffers(model)
    masks = {key for key in buffers if key.endswith("attn_mask")}
    assert masks == {"layers.0.blocks.1.attn_mask", "layers.1.blocks.1.attn_mask"}
    for key, x in buffers.items():
        if key.startswith(("layers.0", "layers.1")):  # timm clamps the axes of others one by one
            assert torch.equal(x, theirs.get_buffer(key)), key
    stored = {**model.state_dict(), **buffers}
    other = swin.Swin(**kwargs).eval()
    other.load_state_dict(stored)
    x = image(1, 3, 64, 96)
    assert torch.equal(other(x), model(x))
    assert swin.without_buffers(stored).keys() == model.state_dict().keys()
    pyramid = swin.dense(copy.deepcopy(model), (0, 1, 2, 3))
    kept = {key: x for key, x in stored.items() if key.startswith(("layers", "patch_embed"))}
    norms = {key: x for key, x in pyramid.state_dict().items() if key.startswith("norm")}
    pyramid.load_state_dict({**kept, **norms})


@torch.no_grad()
def test_swins_dense_form_differs_where_windows_are_clamped():
    """Maps of 24 x 32 to 6 x 8 are padded alike; one of 3 x 4 is clamped in the classifier."""
    model = randomized(swin.Swin(**SMALL_SWIN))
    x = image(2, 3, 92, 126)
    maps = model.forward_intermediates(x, output_fmt="NHWC", intermediates_only=True)
    normed = [F.layer_norm(y, y.shape[-1:]).permute(0, 3, 1, 2) for y in maps]
    pyramid = swin.dense(model, (0, 1, 2, 3)).eval()
    for i, (y, z) in enumerate(zip(pyramid(x), normed, strict=True)):
        assert torch.allclose(y, z, atol=1e-5) == (i < 3)


@torch.no_grad()
def test_swin_pads_with_what_the_projection_makes_of_zeros():
    attn = randomized(swin.WindowAttention(8, 2, 4, dtype=torch.float64))
    x = image(1, 6, 9, 8, dtype=torch.float64)
    padded = attn(F.pad(x, (0, 0, 0, 3, 0, 2)))
    torch.testing.assert_close(attn(x), padded[:, :6, :9])


# CSwin


def stripes(attn, qkv, axis, stripe):
    """Stripe by stripe, all that a branch does."""
    out = []
    for part in qkv.split(stripe, axis):
        _, height, width, channels = part.shape
        q, k, v = part.unflatten(-1, (3, attn.num_heads, -1)).flatten(1, 2).unbind(2)
        scores = torch.einsum("bqhd,bkhd->bhqk", q * q.shape[-1] ** -0.5, k)
        y = torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), v).flatten(2)
        v = v.flatten(2).transpose(1, 2).unflatten(2, (height, width))
        lepe = F.conv2d(v, attn.get_v.weight, attn.get_v.bias, padding=1, groups=channels // 3)
        out.append(y.unflatten(1, (height, width)) + lepe.permute(0, 2, 3, 1))
    return torch.cat(out, axis)


@pytest.mark.parametrize("size", [(6, 9), (3, 3), (1, 6), (6, 2), (2, 1)])
def test_stripes(size):
    """Whose convolution sees zeros around every stripe; maps narrower than one are one stripe."""
    qkv = image(2, *size, 24, dtype=torch.float64).requires_grad_()
    for axis, window in ((2, (None, 3)), (1, (3, None))):
        attn = randomized(cswin.LePEAttention(8, 2, window, dtype=torch.float64))
        found, expected = attn(qkv), stripes(attn, qkv, axis, 3)
        torch.testing.assert_close(found, expected)
        probe = torch.randn_like(found)
        grad, wanted = (torch.autograd.grad(y, qkv, probe)[0] for y in (found, expected))
        torch.testing.assert_close(grad, wanted)
    whole = randomized(cswin.LePEAttention(8, 2, (None, None), dtype=torch.float64))
    torch.testing.assert_close(whole(qkv), stripes(whole, qkv, 1, 100))


@torch.no_grad()
def test_ragged_maps_are_completed_with_zeros():
    qkv = image(1, 6, 7, 24, dtype=torch.float64)
    attn = randomized(cswin.LePEAttention(8, 2, (None, 3), dtype=torch.float64))
    expected = stripes(attn, F.pad(qkv, (0, 0, 0, 2)), 2, 3)[:, :, :7]
    torch.testing.assert_close(attn(qkv), expected)


@torch.no_grad()
def test_halves_of_the_heads_take_the_two_directions():
    model = randomized(cswin.CSwin(**SMALL_CSWIN, dtype=torch.float64))
    block = model.stage2[0]
    x = image(1, 6, 8, 32, dtype=torch.float64)
    q, k, v = block.qkv(block.norm1(x)).chunk(3, -1)
    first, second = (torch.cat([y[..., at] for y in (q, k, v)], -1) for at in HALVES)
    y = torch.cat([stripes(block.attns[0], first, 2, 2), stripes(block.attns[1], second, 1, 2)], -1)
    mixed = x + block.proj(y)
    torch.testing.assert_close(block(x), mixed + block.mlp(block.norm2(mixed)))


HALVES = (slice(0, 16), slice(16, 32))


@torch.no_grad()
def test_cswins_stem_completes_patches_only():
    model = randomized(cswin.CSwin(**SMALL_CSWIN))
    conv, _, norm = model.stage1_conv_embed
    x = image(1, 3, 64, 96)
    assert torch.equal(model._embed(x), norm(conv(x).permute(0, 2, 3, 1)))
    odd = image(1, 3, 61, 90)
    assert_same(model(odd), model(F.pad(odd, (0, 2, 0, 3))))


# Both


@BOTH
@torch.no_grad()
def test_any_size(host, kwargs):
    model = randomized(host(**kwargs))
    for size in ((32, 32), (37, 51), (64, 64), (100, 33)):
        maps = model.forward_intermediates(image(1, 3, *size), intermediates_only=True)
        for y, info in zip(maps, model.feature_info, strict=True):
            assert tuple(y.shape[2:]) == tuple(-(-n // info["reduction"]) for n in size)
            assert y.isfinite().all()


class Mean(nn.Module):
    """A mixer: what it is made with, and a mean in the place of attention."""

    def __init__(self, about, dim, **dd):
        super().__init__()
        self.about = about
        self.scale = nn.Parameter(torch.ones(dim, **dd))

    def forward(self, x):
        C = len(self.scale)
        return self.scale * x[..., :C] + x[..., -C:].mean((1, 2), keepdim=True)

    def set_input_size(self, size):
        self.about["size"] = size


def mean_mixer(stage, block, dim, num_heads, size, **dd):
    """The first stage, and the first block of the second."""
    if stage + block > 1 or stage > 1:
        return None
    return Mean({"at": (stage, block), "heads": num_heads, "size": size}, dim, **dd)


@BOTH
def test_mixers_take_the_place_of_attention(host, kwargs):
    model = host(**kwargs, img_size=(64, 90), mixer=mean_mixer, dtype=torch.float64)
    mixers = [m for m in model.modules() if isinstance(m, Mean)]
    heads = kwargs["num_heads"]
    assert [m.about for m in mixers] == [
        {"at": (0, 0), "heads": heads[0], "size": (16, 23)},
        {"at": (0, 1), "heads": heads[0], "size": (16, 23)},
        {"at": (1, 0), "heads": heads[1], "size": (8, 12)},
    ]
    names = {key for key, _ in model.named_parameters() if key.endswith(".scale")}
    if host is swin.Swin:
        assert "layers.1.blocks.0.attn.scale" in names
        assert isinstance(model.layers[1].blocks[1].attn, swin.WindowAttention)
    else:
        assert "stage2.0.attns.0.scale" in names
        assert len(model.stage2[0].attns) == 1
        assert len(model.stage2[1].attns) == 2
    x = image(2, 3, 64, 90, dtype=torch.float64)
    model(x).sum().backward()
    assert all(m.scale.grad.any() for m in mixers)
    assert not torch.equal(model(x), host(**kwargs, dtype=torch.float64)(x))
    model.set_input_size()
    assert model.input_size == (64, 90)
    model.set_input_size(96)
    assert [m.about["size"] for m in mixers] == [(24, 24), (24, 24), (12, 12)]
    assert model.input_size == (96, 96)


@pytest.mark.slow
@BOTH
@torch.no_grad()
def test_one_program_for_all_sizes(host, kwargs):
    model = randomized(host(**{**kwargs, "depths": (2, 1, 1, 1)}))
    sides = {0: Dim("B"), 2: Dim("H", min=33), 3: Dim("W", min=33)}
    program = export(model, (image(2, 3, 96, 128),), dynamic_shapes=(sides,)).module()
    for shape in ((1, 3, 33, 33), (3, 3, 97, 210), (2, 3, 64, 64)):
        x = image(*shape)
        assert_same(program(x), model(x))


@pytest.mark.slow
@BOTH
@torch.no_grad()
def test_compiled_once_for_all_sizes(host, kwargs):
    shapes = [(2, 3, *size) for size in ((64, 64), (96, 96), (64, 96), (37, 77), (33, 33))]
    model = randomized(host(**{**kwargs, "depths": (2, 1, 1, 1)}))
    row = bench_compile.programs(model, shapes)
    assert row["graph_breaks"] == 0
    assert row["recompiles"] <= 1
    assert row["max_error"] <= 1e-5


@BOTH
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_heads": (2, 2)}, "num_heads: expected .*4"),
        ({"num_heads": (3, 3, 3, 3)}, "num_heads: expected a divisor of dim"),
        ({"img_size": 31}, "img_size: expected .* at least 32, got 31"),
        ({"img_size": (64, 64, 3)}, "img_size: expected one or two sides"),
        ({"attn_drop_rate": 0.1}, "attn_drop_rate: expected 0"),
    ],
)
def test_wrong_arguments(host, kwargs, change, message):
    with pytest.raises(ValueError, match=message):
        host(**{**kwargs, **change})


def test_wrong_windows_and_stripes():
    with pytest.raises(ValueError, match="window_size: expected at least 1, got 0"):
        swin.Swin(**{**SMALL_SWIN, "window_size": 0})
    with pytest.raises(ValueError, match=r"split_size: expected a positive .* got \(1, 2, 0, 3\)"):
        cswin.CSwin(**{**SMALL_CSWIN, "split_size": (1, 2, 0, 3)})
    with pytest.raises(ValueError, match="num_heads: expected even numbers .* got 1"):
        cswin.CSwin(**{**SMALL_CSWIN, "num_heads": (1, 2, 4, 8)})
