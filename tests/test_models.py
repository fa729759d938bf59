"""What every backbone promises, on the smallest model of each family."""

import copy
import inspect
import io
import math
import pickle
import shutil

import pytest
import timm
import torch
from timm.layers import DropPath
from timm.models import FeatureInfo, create_feature_extractor, group_parameters
from timm.optim import param_groups_layer_decay
from timm.utils import ModelEmaV3, reparameterize_model
from torch import nn

from vitarium.backbones._registry import entries
from vitarium.ops import use_impl

ATTOS = [name for name in entries() if name.endswith("_atto")]
SIZES = [(64, 64), (48, 80), (37, 51), (32, 32)]  # native, non-square, odd, smallest

NEEDS_COMPILER = pytest.mark.skipif(
    not any(map(shutil.which, ("g++", "clang++", "cl"))), reason="inductor needs a C++ compiler"
)

pytestmark = pytest.mark.parametrize("name", ATTOS)


def create(name, seed=0, **kwargs):
    torch.manual_seed(seed)
    return timm.create_model(name, **kwargs).eval()


def image(size=(64, 64), batch=1, channels=3):
    return torch.randn(batch, channels, *size, generator=torch.Generator().manual_seed(1))


def assert_same(actual, expected, tolerance=1e-5):
    """Equal up to rounding, relative to the spread: float32 sums differ in their order only."""
    assert actual.shape == expected.shape
    error = (actual - expected).abs().max() / expected.std()
    assert error <= tolerance, f"{error:.1e} of the spread"


def map_sizes(model, size):
    return [tuple(math.ceil(n / i["reduction"]) for n in size) for i in model.feature_info]


@pytest.mark.parametrize("size", SIZES)
@torch.no_grad()
def test_any_size_gives_logits_and_maps(name, size):
    model = create(name)
    logits = model(image(size, batch=2))
    assert logits.shape == (2, model.num_classes)
    assert logits.isfinite().all()
    maps = model.forward_intermediates(image(size), intermediates_only=True)
    assert [y.shape[1] for y in maps] == [i["num_chs"] for i in model.feature_info]
    assert [tuple(y.shape[2:]) for y in maps] == map_sizes(model, size)


@pytest.mark.parametrize("size", [(31, 64), (64, 31), (0, 64)])
def test_small_images_are_refused_by_their_size(name, size):
    with pytest.raises(ValueError, match=rf"image: expected .* >= 32, got shape .*{size[0]}, "):
        create(name)(torch.zeros(1, 3, *size))


def test_images_of_another_form_are_refused(name):
    for shape in ((3, 64, 64), (1, 64, 64, 3), (1, 1, 64, 64)):
        with pytest.raises(
            ValueError, match=r"image: expected \[B, 3, H, W\] .* got shape \("
        ) as info:
            create(name)(torch.zeros(shape))
        assert str(shape) in str(info.value)


@pytest.mark.parametrize("size", [(64, 64), (37, 51)])
def test_every_parameter_gets_a_gradient(name, size, nan_memory):
    model = create(name).train()
    x = image(size, batch=2).requires_grad_()
    model(x).square().sum().backward()
    for key, parameter in [("image", x), *model.named_parameters()]:
        assert parameter.grad is not None, key
        assert parameter.grad.isfinite().all(), key
        assert parameter.grad.any(), key


@torch.no_grad()
def test_forward_is_head_of_features(name):
    model, x = create(name), image((48, 80))
    features = model.forward_features(x)
    assert features.shape == (1, 2, 3, model.num_features)
    assert torch.equal(model.forward_head(features), model(x))
    assert model.forward_head(features, pre_logits=True).shape == (1, model.head_hidden_size)


@torch.no_grad()
def test_batches_do_not_mix(name):
    model, x = create(name), image((37, 51), batch=3)
    assert_same(torch.cat([model(y[None]) for y in x]), model(x))


@torch.no_grad()
def test_new_weights_count_at_once(name):
    model, other, x = create(name), create(name, seed=1), image()
    before = model(x)
    model.load_state_dict(other.state_dict())
    assert torch.equal(model(x), other(x))
    assert not torch.equal(model(x), before)


@torch.no_grad()
def test_implementations_agree(name):
    model, x = create(name), image((37, 51))
    with use_impl("reference"):
        expected = model(x)
    assert_same(model(x), expected)


# Feature maps


@torch.no_grad()
def test_features_only_equals_forward_intermediates(name):
    model, x = create(name), image((48, 80))
    features = create(name, features_only=True)
    assert features.feature_info.channels() == [i["num_chs"] for i in model.feature_info]
    assert features.feature_info.reduction() == [i["reduction"] for i in model.feature_info]
    expected = model.forward_intermediates(x, intermediates_only=True)
    for y, z in zip(features(x), expected, strict=True):
        assert torch.equal(y, z)


@torch.no_grad()
def test_intermediates_with_the_final_map(name):
    model, x = create(name), image((48, 80))
    final, maps = model.forward_intermediates(x)
    assert torch.equal(final, model.forward_features(x))
    assert len(maps) == len(model.feature_info)
    only = model.forward_intermediates(x, intermediates_only=True)
    assert all(torch.equal(y, z) for y, z in zip(maps, only, strict=True))


@torch.no_grad()
@pytest.mark.parametrize(
    ("indices", "taken"), [(None, [0, 1, 2, 3]), (2, [2, 3]), ([1], [1]), ((0, -2), [0, 2])]
)
@pytest.mark.parametrize("stop_early", [False, True])
def test_intermediates_by_index(name, indices, taken, stop_early):
    model, x = create(name), image((48, 80))
    every = model.forward_intermediates(x, intermediates_only=True)
    some = model.forward_intermediates(
        x, indices=indices, stop_early=stop_early, intermediates_only=True
    )
    assert all(torch.equal(y, every[i]) for y, i in zip(some, taken, strict=True))


@torch.no_grad()
def test_stop_early_does_less(name, ops_run):
    model, x = create(name), image()
    model.forward_intermediates(x, indices=[0])
    whole = len(ops_run)
    final, maps = model.forward_intermediates(x, indices=[0], stop_early=True, output_fmt="NHWC")
    assert len(ops_run) - whole < whole / 2
    assert torch.equal(final, maps[0])


@torch.no_grad()
def test_intermediates_layouts(name):
    model, x = create(name), image((48, 80))
    first = model.forward_intermediates(x, intermediates_only=True)
    last = model.forward_intermediates(x, output_fmt="NHWC", intermediates_only=True)
    assert all(torch.equal(y, z.permute(0, 3, 1, 2)) for y, z in zip(first, last, strict=True))
    with pytest.raises(ValueError, match="output_fmt: expected NCHW or NHWC, got 'NLC'"):
        model.forward_intermediates(x, output_fmt="NLC")


@torch.no_grad()
def test_intermediates_normed(name):
    model, x = create(name), image((48, 80))
    plain = model.forward_intermediates(x, output_fmt="NHWC", intermediates_only=True)
    final, maps = model.forward_intermediates(x, norm=True, output_fmt="NHWC")
    assert all(torch.equal(y, z) for y, z in zip(maps[:-1], plain[:-1], strict=True))
    assert torch.equal(maps[-1], final)
    assert not torch.equal(maps[-1], plain[-1])


@torch.no_grad()
@pytest.mark.parametrize("indices", [[0], [1, 2], [3], 1])
@pytest.mark.parametrize("prune_norm", [False, True])
def test_pruning_keeps_the_maps_and_no_more(name, indices, prune_norm):
    model, x = create(name), image((48, 80))
    expected = model.forward_intermediates(x, indices=indices, intermediates_only=True)
    taken = model.prune_intermediate_layers(indices, prune_norm=prune_norm)
    maps = model.forward_intermediates(x, indices=taken, intermediates_only=True)
    assert all(torch.equal(y, z) for y, z in zip(maps, expected, strict=True))
    assert model.num_classes == 0

    model.train().requires_grad_()
    with torch.enable_grad():
        final, _ = model.forward_intermediates(x, indices=taken)
        final.square().sum().backward()
    assert [key for key, p in model.named_parameters() if p.grad is None] == []


@torch.no_grad()
def test_fx_extraction(name):
    model, x = create(name), image((48, 80))
    info = FeatureInfo(model.feature_info, len(model.feature_info))
    extractor = create_feature_extractor(model, [*info.module_name(), "head"])
    *maps, logits = extractor(x).values()
    assert torch.equal(logits, model(x))
    expected = model.forward_intermediates(x, output_fmt="NHWC", intermediates_only=True)
    assert all(torch.equal(y, z) for y, z in zip(maps, expected, strict=True))
    with pytest.raises(ValueError, match="image: expected"):
        extractor(torch.zeros(1, 3, 16, 64))


def test_fx_extraction_trains(name):
    model = create(name).train()
    extractor = create_feature_extractor(model, ["head"])
    extractor(image(batch=2))["head"].sum().backward()
    assert all(parameter.grad is not None for parameter in extractor.parameters())


# Training and running


def test_grad_checkpointing_changes_nothing(name):
    model, x = create(name).train(), image((37, 51), batch=2)
    plain = gradients(model, x)
    model.set_grad_checkpointing()
    assert model.grad_checkpointing
    few = num_saved(model, x)
    for key, grad in gradients(model, x).items():
        assert_same(grad, plain[key])
    model.set_grad_checkpointing(False)
    assert few < num_saved(model, x) / 2


def num_saved(model, x):
    """Number of tensors that are kept for the backward pass."""
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(saved.append, lambda _: None):
        model(x)
    return len(saved)


def gradients(model, x, run=None):
    """Logits, and the gradient of every parameter of ``model`` when ``run`` computes them."""
    model.zero_grad()
    out = (model if run is None else run)(x)
    out.square().sum().backward()
    return {"logits": out.detach()} | {k: p.grad.clone() for k, p in model.named_parameters()}


@pytest.mark.parametrize(
    ("backend", "size"),
    [("aot_eager", (37, 51)), pytest.param("inductor", (64, 64), marks=NEEDS_COMPILER)],
)
def test_compiled_in_one_graph(name, backend, size):
    model, x = create(name), image(size)
    torch.compiler.reset()
    with torch.no_grad():
        assert_same(torch.compile(model, fullgraph=True, backend=backend)(x), model(x))


def test_compiled_training_in_one_graph(name):
    model, x = create(name).train(), image((37, 51), batch=2)
    expected = gradients(model, x)
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for key, grad in gradients(model, x, compiled).items():
        assert_same(grad, expected[key])


@pytest.mark.parametrize("size", [(64, 64), (37, 51)])
@torch.no_grad()
def test_bfloat16(name, size):
    model, x = create(name), image(size)
    expected = model(x)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = model(x)
    half = create(name).to(torch.bfloat16)(x.bfloat16())
    assert half.dtype == torch.bfloat16
    for out in (mixed, half):
        assert_same(out.float(), expected, tolerance=0.2)


@torch.no_grad()
def test_channels_last_input(name):
    model, x = create(name), image((48, 80))
    assert_same(model(x.contiguous(memory_format=torch.channels_last)), model(x))


@torch.no_grad()
@pytest.mark.parametrize("copied", ["deepcopy", "pickle", "state dict", "ema", "reparameterized"])
def test_copies_compute_the_same(name, copied):
    model, x = create(name), image()
    expected = model(x)
    if copied == "deepcopy":
        other = copy.deepcopy(model)
    elif copied == "pickle":
        other = pickle.loads(pickle.dumps(model))
    elif copied == "state dict":
        file = io.BytesIO()
        torch.save(model.state_dict(), file)
        other = create(name, seed=1)
        other.load_state_dict(torch.load(io.BytesIO(file.getvalue()), weights_only=True))
    elif copied == "ema":
        other = ModelEmaV3(model).module
    else:
        other = reparameterize_model(model)
    model.load_state_dict(create(name, seed=2).state_dict())
    assert torch.equal(other(x), expected)


# timm's arguments and methods


def test_layer_decay(name):
    model = create(name)
    groups = param_groups_layer_decay(
        model, weight_decay=0.1, no_weight_decay_list=model.no_weight_decay(), layer_decay=0.5
    )
    scale = {id(p): g["lr_scale"] for g in groups for p in g["params"]}
    decay = {id(p): g["weight_decay"] for g in groups for p in g["params"]}
    assert scale.keys() == {id(p) for p in model.parameters()}
    for key, parameter in model.named_parameters():
        assert (decay[id(parameter)] == 0) == (
            parameter.ndim <= 1 or key in model.no_weight_decay()
        )
    depth = len({*scale.values()})
    order = [scale[id(p)] for _, p in model.named_parameters()]
    assert order == sorted(order)  # parameters stand in the order in which they act
    assert order[-1] == 1
    assert order[0] == 0.5 ** (depth - 1)
    coarse = group_parameters(model, model.group_matcher(coarse=True))
    assert 2 < len(coarse) < depth


def test_no_weight_decay_names_parameters(name):
    model = create(name)
    assert model.no_weight_decay() <= {key for key, _ in model.named_parameters()}


@torch.no_grad()
def test_classifier_is_replaced_and_removed(name):
    model, x = create(name), image((48, 80))
    pooled = model.forward_head(model.forward_features(x), pre_logits=True)
    model.reset_classifier(7)
    assert model.get_classifier().out_features == model.num_classes == 7
    assert model(x).shape == (1, 7)
    model.reset_classifier(0)
    assert model.num_classes == 0
    assert torch.equal(model(x), pooled)
    model.reset_classifier(0, "")
    assert torch.equal(model(x), model.forward_features(x))
    model.reset_classifier(5, "catavgmax")
    assert model.head_hidden_size == 2 * model.num_features
    assert model(x).shape == (1, 5)
    with pytest.raises(ValueError, match="global_pool: expected one of .*, got 'median'"):
        model.reset_classifier(5, "median")


@torch.no_grad()
@pytest.mark.parametrize("global_pool", ["avg", "max", "avgmax", "catavgmax", ""])
def test_without_classifier_from_the_start(name, global_pool):
    model = create(name, num_classes=0, global_pool=global_pool)
    assert not any(key.startswith("head.") for key in model.state_dict())
    out = model(image())
    assert out.shape[-1] == model.head_hidden_size
    assert out.ndim == (2 if global_pool else 4)


@torch.no_grad()
def test_channels_classes_device_and_dtype(name):
    model = create(name, in_chans=1, num_classes=3, dtype=torch.float64)
    assert {p.dtype for p in model.parameters()} == {torch.float64}
    assert model(image(channels=1).double()).shape == (1, 3)
    model.reset_classifier(4)
    assert model.get_classifier().weight.dtype == torch.float64
    assert all(p.is_meta for p in create(name, device="meta").parameters())
    assert next(create(name, dtype=torch.bfloat16).parameters()).isfinite().all()


def test_drop_rates(name):
    model = create(name, drop_path_rate=0.3, drop_rate=0.2, proj_drop_rate=0.1)
    rates = [m.drop_prob for m in model.modules() if isinstance(m, DropPath)]
    assert rates == sorted(rates)
    assert rates[-1] == pytest.approx(0.3)
    dropouts = {key: m.p for key, m in model.named_modules() if isinstance(m, nn.Dropout)}
    assert {*dropouts.values()} == {0.1, 0.2}
    assert [key for key, p in dropouts.items() if p == 0.2] == ["head_drop"]
    x = image(batch=2)
    assert torch.equal(model(x), create(name)(x))  # none of it acts in evaluation
    assert not torch.equal(model.train()(x), model(x))
    with pytest.raises(ValueError, match=r"attn_drop_rate: expected 0 .*, got 0\.1"):
        create(name, attn_drop_rate=0.1)


def test_unknown_arguments_are_refused(name):
    with pytest.raises(TypeError, match="window"):
        create(name, window=7)


def test_signature_is_typed_and_takes_timms_names(name):
    parameters = inspect.signature(type(create(name)).__init__).parameters
    assert all(p.kind is not p.VAR_KEYWORD for p in parameters.values())
    assert {
        "num_classes", "in_chans", "global_pool", "drop_rate", "proj_drop_rate",
        "attn_drop_rate", "drop_path_rate", "device", "dtype",
    } <= parameters.keys()  # fmt: skip


@torch.no_grad()
def test_config_describes_the_model(name):
    model = create(name)
    cfg = model.pretrained_cfg
    state_dict = model.state_dict()
    assert f"{cfg['classifier']}.weight" in state_dict
    assert state_dict[f"{cfg['first_conv']}.weight"].shape[1] == cfg["input_size"][0]
    assert model.num_classes == cfg["num_classes"]
    features = model.forward_features(image(cfg["input_size"][1:]))
    assert tuple(features.shape[1:3]) == cfg["pool_size"]
