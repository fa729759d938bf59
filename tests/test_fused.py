"""timm's models with our ops inside: the same numbers, everything else as it was, and back."""

import copy
import pickle

import pytest
import timm
import torch
from attos import assert_same, image
from timm.models import swin_transformer
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import vitarium
from vitarium.backbones import fused
from vitarium.backbones._hosts.swin import Swin
from vitarium.checkpoints import load
from vitarium.heads.features import FeatureBackbone

SMALL = {"embed_dim": 16, "depths": (2, 2), "num_heads": (1, 2), "num_classes": 5}
DAVIT = {"embed_dims": (16, 32), "depths": (1, 1), "num_heads": (1, 2), "num_classes": 5}
MODELS = {
    "swin": ("swin_tiny_patch4_window7_224", {**SMALL, "window_size": 4}),
    "swin head_dim": (
        "swin_tiny_patch4_window7_224",
        {**SMALL, "window_size": (3, 4), "head_dim": 4},
    ),
    "swinv2": ("swinv2_tiny_window8_256", {**SMALL, "window_size": 4}),
    "swinv2 pretrained windows": (
        "swinv2_tiny_window8_256",
        {**SMALL, "window_size": 4, "pretrained_window_sizes": (3, 0)},
    ),
    "davit": ("davit_tiny", {**DAVIT, "window_size": 4}),
    "davit florence": ("davit_base_fl", {**DAVIT, "window_size": 4}),
}
REAL = ("swin_tiny_patch4_window7_224", "swinv2_tiny_window8_256", "davit_tiny")
SIZES = [(64, 64), (64, 96), (52, 72), (16, 24)]  # windows divide the maps, do not, or clamp


def timms(name, size=(64, 64), seed=0, **kwargs):
    """A model of timm with weights that act: position tables and SwinV2's norms do not at first."""
    entry, args = MODELS.get(name, (name, {}))
    if "davit" not in entry:
        args = {"img_size": size, **args}
    torch.manual_seed(seed)
    model = timm.create_model(entry, **{**args, **kwargs}).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model


def results(model, x):
    """Outputs, and the gradients of the image and of every parameter."""
    model.zero_grad()
    leaf = x.clone().requires_grad_()
    out = model(leaf)
    probe = torch.randn(out.shape, generator=torch.Generator().manual_seed(2)).to(x)
    (out * probe).sum().backward()
    grads = {key: parameter.grad for key, parameter in model.named_parameters()}
    return {"out": out.detach(), "image": leaf.grad, **grads}


def error(actual, expected):
    """Relative to the spread, or to the value where there is one only."""
    spread = expected.std() if expected.numel() > 1 else expected.abs().max()
    return float((actual - expected).abs().max() / spread)


def assert_equal_with_ops(model, x, tolerance):
    """In single precision timm's gradients of parameters have larger errors; ours have no more."""
    ours = vitarium.use_ops(model)
    with torch.no_grad():
        assert_same(ours(x), model(x), tolerance)
    exact = results(copy.deepcopy(model).double(), x.double())
    found, expected = results(ours, x), results(model, x)
    for key, value in expected.items():
        allowed = tolerance
        if x.dtype is torch.float32 and key not in ("out", "image"):
            allowed = max(tolerance, 3 * error(value, exact[key]))
            value = exact[key]
        assert error(found[key], value) <= allowed, key


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("name", MODELS)
def test_same_numbers_and_gradients(name, size):
    model = timms(name, size).double()
    assert_equal_with_ops(model, image(size, batch=2).double(), 1e-12)


@pytest.mark.parametrize("name", MODELS)
def test_same_numbers_in_single_precision(name):
    assert_equal_with_ops(timms(name, (52, 72)), image((52, 72), batch=2), 1e-5)


@pytest.mark.parametrize("name", ["swin", "swinv2"])
def test_same_numbers_at_sizes_that_only_the_image_tells(name):
    model = timms(name, strict_img_size=False).double()
    for size in ((64, 64), (100, 36), (8, 12)):
        assert_equal_with_ops(model, image(size).double(), 1e-12)
    always = timms(name, always_partition=True).double()
    assert_equal_with_ops(always, image((64, 64)).double(), 1e-12)


@pytest.mark.slow
@pytest.mark.parametrize("name", REAL)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-12)])
def test_same_numbers_of_real_models(name, dtype, tolerance):
    native = timm.get_pretrained_cfg(name).input_size[1:]
    for size in (native, (200, 264), (160, 384)):
        torch.manual_seed(0)
        kwargs = {} if "davit" in name else {"img_size": size}
        model = timm.create_model(name, **kwargs).eval()
        with torch.no_grad():
            for key, parameter in model.named_parameters():
                if parameter.ndim == 1 or "table" in key:
                    parameter.add_(torch.randn_like(parameter), alpha=0.1)
        assert_equal_with_ops(model.to(dtype), image(size).to(dtype), tolerance)


@pytest.mark.parametrize("name", MODELS)
def test_everything_else_stays(name):
    model = timms(name).train()
    model.head.eval()
    before = {key: (type(m), m.training) for key, m in model.named_modules()}
    state, names = model.state_dict(keep_vars=True), [*model.state_dict()]
    called = []
    for key, module in model.named_modules():
        if key.rpartition(".")[2] in ("0", "attn", "norm1", "mlp", "fc1", "act", "proj"):
            module.register_forward_hook(lambda *_, key=key: called.append(key))
    x = image((64, 64))
    model(x)
    expected = sorted(called)
    ours = vitarium.use_ops(model, inplace=True)
    assert ours is model
    for _ in range(2):  # with gradients and without
        called.clear()
        model(x)
        assert sorted(called) == expected
        torch.set_grad_enabled(False)
    torch.set_grad_enabled(True)
    assert [*model.state_dict()] == names
    assert all(model.state_dict(keep_vars=True)[key] is state[key] for key in names)
    assert {key: m.training for key, m in model.named_modules()} == {
        key: training for key, (_, training) in before.items()
    }
    for key, module in model.named_modules():
        assert isinstance(module, before[key][0])
    assert vitarium.restore(model) is model
    assert {key: (type(m), m.training) for key, m in model.named_modules()} == before


def test_a_copy_leaves_the_model_as_it_was():
    model = timms("swin")
    ours = vitarium.use_ops(model)
    assert not vitarium.used_ops(model).blocks
    assert {*vitarium.used_ops(ours).blocks.values()} == {"window"}
    assert not {id(p) for p in model.parameters()} & {id(p) for p in ours.parameters()}


def test_report():
    used = vitarium.used_ops(vitarium.use_ops(timms("davit")))
    assert str(used) == (
        "4 blocks run with vitarium's ops: 2 with window attention, 2 with channel attention"
    )
    assert used.blocks["stages.1.blocks.0.1"] == "channel"
    assert str(vitarium.used_ops(nn.Identity())) == "0 blocks run with vitarium's ops"


def test_once_more_changes_nothing():
    model = vitarium.use_ops(timms("swin"), inplace=True)
    types = [type(m) for m in model.modules()]
    assert vitarium.use_ops(model, inplace=True) is model
    assert [type(m) for m in model.modules()] == types
    vitarium.restore(vitarium.restore(model))
    assert not vitarium.used_ops(model).blocks


@torch.no_grad()
@pytest.mark.parametrize("name", MODELS)
def test_copies_compute_the_same(name):
    model, x = vitarium.use_ops(timms(name)), image((64, 64))
    expected = model(x)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other(x), expected)
        assert vitarium.used_ops(other) == vitarium.used_ops(model)


@torch.no_grad()
@pytest.mark.parametrize("wrapped", ["module", "list", "getter"])
def test_models_inside_others(wrapped):
    entry, args = MODELS["swin"]
    args = {**args, "img_size": 64}
    if wrapped == "module":
        outer = nn.Sequential(nn.Identity(), nn.ModuleDict({"a": timms("swin")})["a"])
    else:
        kwargs = {} if wrapped == "list" else {"feature_cls": "getter"}
        outer = timm.create_model(entry, features_only=True, **kwargs, **args)
    outer, x = outer.eval(), image((64, 64))
    ours = vitarium.use_ops(outer)
    assert len(vitarium.used_ops(ours).blocks) == 4
    for y, z in zip(ours(x), outer(x), strict=True):
        assert_same(y, z)


@torch.no_grad()
def test_new_input_size():
    model = timms("swin")
    ours, x = vitarium.use_ops(model), image((96, 160))
    for each in (model, ours):
        each.set_input_size((96, 160), window_size=5)
    assert_same(ours(x), model(x))


@torch.no_grad()
def test_without_gradients_parts_run_together_and_count_as_flops():
    model, x = timms("swin"), image((64, 64))
    counts = []
    for each in (model, vitarium.use_ops(model)):
        with FlopCounterMode(display=False) as flops:
            each(x)
        counts.append(flops.get_total_flops())
    assert counts[0] == counts[1]


def drop(model):
    model.layers[1].blocks[1].attn.attn_drop.p = 0.1


def subclass(model):
    class Other(swin_transformer.SwinTransformerBlock):
        pass

    model.layers[1].blocks[1].__class__ = Other


def subclass_of_attention(model):
    class Other(swin_transformer.WindowAttention):
        pass

    model.layers[1].blocks[1].attn.__class__ = Other


def projection(model):
    class LoRA(nn.Linear):
        pass

    model.layers[1].blocks[1].attn.qkv.__class__ = LoRA


def method(model):
    block = model.layers[1].blocks[1]
    block.forward = lambda x: x


def hook(model):
    model.layers[1].blocks[1].attn.softmax.register_forward_hook(lambda *_: None)


def lone_attention(model):
    model.extra = copy.deepcopy(model.layers[1].blocks[1].attn)


@pytest.mark.parametrize("inplace", [True, False])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (drop, r"got layers\.1\.blocks\.1 with attn_drop 0\.1"),
        (subclass, r"got layers\.1\.blocks\.1 of type test_fused\.subclass.*Other"),
        (subclass_of_attention, r"got layers\.1\.blocks\.1 with attention of type test_fused"),
        (projection, r"got layers\.1\.blocks\.1 with a projection of type .*LoRA"),
        (method, r"got layers\.1\.blocks\.1 with a forward method of its own"),
        (hook, r"got layers\.1\.blocks\.1 with hooks on modules that our ops pass over"),
        (lone_attention, r"got extra of type timm\.models\.swin_transformer\.WindowAttention"),
    ],
)
def test_what_cannot_be_handled_is_refused_and_untouched(change, message, inplace):
    model = timms("swin")
    change(model)
    types = [type(m) for m in model.modules()]
    with pytest.raises(ValueError, match=f"model: expected a Swin, SwinV2 or DaViT.*{message}"):
        vitarium.use_ops(model, inplace=inplace)
    assert [type(m) for m in model.modules()] == types


@pytest.mark.parametrize("name", ["resnet10t", "test_vit", "swinv2_cr_tiny_224", "gcvit_xxtiny"])
def test_other_models_are_refused(name):
    with torch.device("meta"):
        model = timm.create_model(name)
    with pytest.raises(ValueError, match="model: expected a Swin, .* got .* without any"):
        vitarium.use_ops(model)


def test_no_model_at_all():
    with pytest.raises(ValueError, match="model: expected a Swin, .* got str"):
        vitarium.use_ops("swin")


def test_dropout_that_comes_later_is_refused():
    model = vitarium.use_ops(timms("swin")).train()
    drop(model)
    with pytest.raises(ValueError, match=r"attn_drop: expected 0 .* got 0\.1"):
        model(image((64, 64)))


# Entries


@torch.no_grad()
@pytest.mark.parametrize("name", REAL)
def test_entries_are_timms_models(name):
    """With timm's weights, tags and classifier."""
    with torch.device("meta"):
        theirs, ours = timm.create_model(name), timm.create_model(f"fused_{name}")
    assert isinstance(ours, type(theirs))
    assert {k: v.shape for k, v in ours.state_dict().items()} == {
        k: v.shape for k, v in theirs.state_dict().items()
    }
    mine = timm.models.get_arch_pretrained_cfgs(f"fused_{name}")
    tags = [f"fused_{tag}" for tag in timm.models.get_arch_pretrained_cfgs(name)]
    assert [tag for tag in mine if ".microsoft_" not in tag and ".dingmyu_" not in tag] == tags
    for tag, cfg in timm.models.get_arch_pretrained_cfgs(name).items():
        for field in ("hf_hub_id", "input_size", "mean", "std", "crop_pct", "num_classes"):
            assert getattr(mine[f"fused_{tag}"], field) == getattr(cfg, field)


@torch.no_grad()
@pytest.mark.parametrize("name", ["swin", "swinv2", "davit"])
def test_entries_compute_what_timms_do(name):
    entry, args = MODELS[name]
    theirs = timms(name)
    ours = timm.create_model(
        f"fused_{entry}", **args, **({} if name == "davit" else {"img_size": 64})
    )
    assert set(load(ours, theirs.state_dict()).matched) == set(theirs.state_dict())
    assert_same(ours.eval()(image((64, 64))), theirs(image((64, 64))))


def test_a_detectors_windows_cannot_be_restored():
    model = FeatureBackbone("fused_swin_atto", task="det")
    types = [type(m) for m in model.modules()]
    with pytest.raises(ValueError, match="model: expected windows as timm has them"):
        vitarium.restore(model)
    assert [type(m) for m in model.modules()] == types


def test_tables_for_other_windows_are_resized_as_timm_does():
    theirs = timms("swin")
    ours = timm.create_model(
        "fused_swin_tiny_patch4_window7_224", **{**MODELS["swin"][1], "window_size": 6}, img_size=96
    )
    load(ours, theirs.state_dict())
    theirs.set_input_size((96, 96), window_size=6)
    for key, tensor in theirs.state_dict().items():
        assert torch.equal(ours.state_dict()[key], tensor), key


@pytest.mark.parametrize("semantics", ["timm", "authors"])
def test_windows_clamped_as_the_authors_do(semantics):
    """On maps of 4 x 8 and 2 x 4 tokens with windows of 4; the host has been held to goldens."""
    torch.manual_seed(0)
    shape = {"embed_dim": 32, "depths": (2, 2, 2, 2), "num_heads": (2, 4, 8, 16)}
    host = Swin(10, img_size=(64, 128), window_size=4, mlp_ratio=2.0, **shape)
    host.double().eval()
    with torch.no_grad():
        for parameter in host.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    model = timm.create_model(
        "fused_swin_atto", img_size=(64, 128), depths=(2, 2, 2, 2), semantics=semantics
    )
    weights = fused._RENAMES.to_ours(host.state_dict(), model)
    tables = {name for name, x in model.state_dict().items() if weights[name].shape != x.shape}
    assert all(name.startswith("layers.3.") for name in tables)  # the host keeps whole tables
    for name in tables:
        heads = weights[name].shape[1]
        side = model.get_submodule(name.rpartition(".")[0]).window_size
        whole = weights[name].view(7, 7, heads)
        rows, columns = (slice(4 - n, 3 + n) for n in side)
        weights[name] = whole[rows, columns].reshape(-1, heads)
    model.double().eval().load_state_dict(weights)
    x = image((64, 128)).double()
    ours = model.forward_intermediates(x, intermediates_only=True)
    authors = host.forward_intermediates(x, intermediates_only=True)
    for y, z in zip(ours[:2], authors[:2], strict=True):
        assert error(y, z) <= 1e-12
    same = [error(y, z) <= 1e-12 for y, z in zip(ours[2:], authors[2:], strict=True)]
    assert same == [semantics == "authors"] * 2


def test_unknown_semantics_are_refused():
    with pytest.raises(ValueError, match="semantics: expected 'timm' or 'authors', got 'dense'"):
        timm.create_model("fused_swin_atto", semantics="dense")
    with pytest.raises(TypeError, match="semantics"):
        timm.create_model("fused_davit_atto", semantics="authors")
