"""What every backbone promises, on the smallest model of each family."""

import copy
import inspect
import io
import pickle

import pytest
import timm
import torch
from attos import (
    ATTOS,
    SIZE,
    as_map,
    assert_same,
    create,
    gradients,
    image,
    is_fixed,
    limits,
    map_sizes,
    sizes,
    smallest_side,
)
from PIL import Image
from timm.data import create_transform, resolve_model_data_config
from timm.layers import DropPath
from timm.models import FeatureInfo, create_feature_extractor, group_parameters
from timm.optim import create_optimizer_v2, param_groups_layer_decay
from timm.utils import ModelEmaV3, reparameterize_model
from torch import nn

from vitarium.ops import use_impl


def pytest_generate_tests(metafunc):
    """Every test runs on every model; one that takes a size, on the sizes of that model."""
    if "size" in metafunc.fixturenames:
        cases = [(name, size) for name in ATTOS for size in sizes(name)]
        metafunc.parametrize(("name", "size"), cases)
    else:
        metafunc.parametrize("name", ATTOS)


# Images


@torch.no_grad()
def test_any_size_gives_logits_and_maps(name, size):
    model = create(name, size)
    logits = model(image(size, batch=2))
    assert logits.shape == (2, model.num_classes)
    assert logits.isfinite().all()
    maps = model.forward_intermediates(image(size), intermediates_only=True)
    assert [y.shape[1] for y in maps] == [i["num_chs"] for i in model.feature_info]
    assert [tuple(y.shape[2:]) for y in maps] == map_sizes(model, size)


def test_other_sizes_are_refused(name):
    small = smallest_side(name) - 1
    refused = [(small, 64), (64, small), (0, 64)]
    if is_fixed(name):
        refused.append(SIZE[::-1])
    model = create(name)
    for size in refused:
        with pytest.raises(ValueError, match=rf"image: expected .*, got shape .*{size[0]}, "):
            model(torch.zeros(1, 3, *size))


def test_images_of_another_form_are_refused(name):
    model = create(name)
    for shape in ((3, *SIZE), (1, *SIZE, 3), (1, 1, *SIZE)):
        with pytest.raises(ValueError, match=r"image: expected \[B, 3, .* got shape \(") as info:
            model(torch.zeros(shape))
        assert str(shape) in str(info.value)


@torch.no_grad()
def test_input_size_is_set(name):
    """Where it is fixed, the model takes another size from then on."""
    model = create(name)
    assert hasattr(model, "set_input_size") or not is_fixed(name)
    if not hasattr(model, "set_input_size") or "windows of its own at another img_size" in limits(
        name
    ):
        return
    other, x = (64, 96), image((64, 96))
    for parameter in model.to(torch.bfloat16).parameters():
        parameter.requires_grad_(False)
    model.set_input_size(other)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert not any(p.requires_grad for p in model.parameters())
    built = create(name, other, seed=1, img_size=other).to(torch.bfloat16)
    built.load_state_dict(model.state_dict())
    assert torch.equal(model(x.bfloat16()), built(x.bfloat16()))
    if is_fixed(name):
        with pytest.raises(ValueError, match="image: expected"):
            model(image().bfloat16())
    with pytest.raises(ValueError, match="img_size: expected"):
        model.set_input_size((smallest_side(name) - 1, 64))


@torch.no_grad()
def test_batches_do_not_mix(name):
    model, x = create(name), image(batch=3)
    assert_same(torch.cat([model(y[None]) for y in x]), model(x))


@torch.no_grad()
def test_channels_last_input(name):
    model, x = create(name), image()
    assert_same(model(x.contiguous(memory_format=torch.channels_last)), model(x))


@torch.no_grad()
def test_timms_preprocessing_feeds_the_model(name):
    model = create(name, size=timm.get_pretrained_cfg(name).input_size[1:])
    config = resolve_model_data_config(model)
    assert config["input_size"] == model.pretrained_cfg["input_size"]
    assert config["mean"] == model.pretrained_cfg["mean"]
    x = create_transform(**config)(Image.new("RGB", (90, 70), "red"))
    assert x.shape == config["input_size"]
    assert model(x[None]).isfinite().all()


# Features and feature maps


@torch.no_grad()
def test_forward_is_head_of_features(name):
    model, x = create(name), image()
    features = model.forward_features(x)
    last = as_map(model, features, SIZE)
    assert last.shape == (1, *map_sizes(model, SIZE)[-1], model.num_features)
    assert torch.equal(model.forward_head(features), model(x))
    assert model.forward_head(features, pre_logits=True).shape == (1, model.head_hidden_size)


@torch.no_grad()
def test_features_only_equals_forward_intermediates(name):
    model, x = create(name), image()
    last = len(model.feature_info) - 1
    every = model.forward_intermediates(x, intermediates_only=True)
    for indices, taken in (
        (tuple(range(last + 1)), range(last + 1)),
        ((0, 2), [0, 2]),
        ((-3, -1), [last - 2, last]),
        ((1,), [1]),
        (2, [last - 1, last]),
    ):
        features = create(name, features_only=True, out_indices=indices)
        expected = [model.feature_info[i] for i in taken]
        assert features.feature_info.channels() == [i["num_chs"] for i in expected]
        assert features.feature_info.reduction() == [i["reduction"] for i in expected]
        assert features.feature_info.module_name() == [i["module"] for i in expected]
        for y, i in zip(features(x), taken, strict=True):
            assert torch.equal(y, every[i])


@torch.no_grad()
def test_features_only_by_default_gives_the_described_maps(name):
    features = create(name, features_only=True).train()
    assert len(features.feature_info.channels()) >= 3
    with torch.enable_grad():
        sum(y.square().sum() for y in features(image(batch=2))).backward()
    assert [key for key, p in features.named_parameters() if p.grad is None] == []


@torch.no_grad()
def test_indices_out_of_range_are_refused(name):
    model = create(name)
    count = len(model.feature_info)
    for indices in ([count], [-count - 1], [0, count], [], 0, count + 1):
        with pytest.raises(ValueError, match="indices: expected"):
            model.forward_intermediates(image(), indices=indices)
        with pytest.raises(ValueError, match="indices: expected"):
            model.prune_intermediate_layers(indices)
        if indices != 0:
            with pytest.raises(ValueError, match="indices: expected"):
                create(name, features_only=True, out_indices=indices)


@torch.no_grad()
def test_intermediates_with_the_final_map(name):
    model, x = create(name), image()
    final, maps = model.forward_intermediates(x)
    assert torch.equal(final, model.forward_features(x))
    assert len(maps) == len(model.feature_info)
    only = model.forward_intermediates(x, intermediates_only=True)
    assert all(torch.equal(y, z) for y, z in zip(maps, only, strict=True))


@torch.no_grad()
@pytest.mark.parametrize("stop_early", [False, True])
def test_intermediates_by_index(name, stop_early):
    model, x = create(name), image()
    every = model.forward_intermediates(x, intermediates_only=True)
    last = len(every) - 1
    for indices, taken in (
        (None, range(last + 1)),
        (2, [last - 1, last]),
        ([1], [1]),
        ((0, -2), [0, last - 1]),
    ):
        some = model.forward_intermediates(
            x, indices=indices, stop_early=stop_early, intermediates_only=True
        )
        assert all(torch.equal(y, every[i]) for y, i in zip(some, taken, strict=True))


@torch.no_grad()
def test_stop_early_does_less(name):
    model, x = create(name), image()
    called = []
    for module in model.modules():
        if isinstance(module, nn.Linear):
            module.register_forward_hook(lambda *_: called.append(1))
    model.forward_intermediates(x, indices=[0])
    whole = len(called)
    final, maps = model.forward_intermediates(x, indices=[0], stop_early=True, output_fmt="NHWC")
    assert len(called) - whole < whole / 2
    assert torch.equal(as_map(model, final, SIZE), maps[0])


@torch.no_grad()
def test_intermediates_layouts(name):
    model, x = create(name), image()
    first = model.forward_intermediates(x, intermediates_only=True)
    last = model.forward_intermediates(x, output_fmt="NHWC", intermediates_only=True)
    assert all(torch.equal(y, z.permute(0, 3, 1, 2)) for y, z in zip(first, last, strict=True))
    with pytest.raises(ValueError, match="output_fmt: expected NCHW or NHWC, got 'NLC'"):
        model.forward_intermediates(x, output_fmt="NLC")


@torch.no_grad()
def test_intermediates_normed(name):
    """The final norm fits the maps with as many channels as the last one has."""
    model, x = create(name), image()
    plain = model.forward_intermediates(x, output_fmt="NHWC", intermediates_only=True)
    final, maps = model.forward_intermediates(x, norm=True, output_fmt="NHWC")
    for y, z in zip(maps, plain, strict=True):
        fits = z.shape[-1] == model.num_features
        assert torch.equal(y, model.norm(z) if fits else z)
    assert torch.equal(maps[-1], as_map(model, final, SIZE))
    unchanged = {"norm before pooling", "no final norm"} & {*limits(name)}
    assert torch.equal(maps[-1], plain[-1]) == bool(unchanged)


@torch.no_grad()
@pytest.mark.parametrize("indices", [[0], [1, 2], [-1], 1])
@pytest.mark.parametrize("prune_norm", [False, True])
def test_pruning_keeps_the_maps_and_no_more(name, indices, prune_norm):
    model, x = create(name), image()
    expected = model.forward_intermediates(x, indices=indices, intermediates_only=True)
    taken = model.prune_intermediate_layers(indices, prune_norm=prune_norm)
    maps = model.forward_intermediates(x, indices=taken, intermediates_only=True)
    assert all(torch.equal(y, z) for y, z in zip(maps, expected, strict=True))
    assert model.num_classes == 0
    assert not any(module.training for module in model.modules())

    model.train().requires_grad_()
    with torch.enable_grad():
        final, _ = model.forward_intermediates(x, indices=taken)
        final.square().sum().backward()
    assert [key for key, p in model.named_parameters() if p.grad is None] == []


@torch.no_grad()
def test_fx_extraction(name):
    model, x = create(name), image()
    info = FeatureInfo(model.feature_info, len(model.feature_info))
    extractor = create_feature_extractor(model, [*info.module_name(), "head"])
    *maps, logits = extractor(x).values()
    assert torch.equal(logits, model(x))
    expected = model.forward_intermediates(x, output_fmt="NHWC", intermediates_only=True)
    for y, z in zip(maps, expected, strict=True):
        assert torch.equal(as_map(model, y, SIZE), z)
    with pytest.raises(ValueError, match="image: expected"):
        extractor(torch.zeros(1, 3, smallest_side(name) - 1, 64))


def test_fx_extraction_trains(name):
    model = create(name).train()
    extractor = create_feature_extractor(model, ["head"])
    extractor(image(batch=2))["head"].sum().backward()
    assert all(parameter.grad is not None for parameter in extractor.parameters())


# Weights


@torch.no_grad()
def test_new_weights_count_at_once(name):
    model, other, x = create(name), create(name, seed=1), image()
    before = model(x)
    model.load_state_dict(other.state_dict())
    assert torch.equal(model(x), other(x))
    assert not torch.equal(model(x), before)


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


@torch.no_grad()
def test_moving_average_of_weights(name):
    model, later = create(name), create(name, seed=1)
    average = ModelEmaV3(model, decay=0.75)
    average.update(later)
    for key, tensor in average.module.state_dict().items():
        if not tensor.is_floating_point():  # a batch norm's counter
            continue
        expected = torch.lerp(model.state_dict()[key], later.state_dict()[key], 0.25)
        torch.testing.assert_close(tensor, expected)
    assert average(image()).isfinite().all()


# Training and precision


def test_every_parameter_gets_a_gradient(name, size, nan_memory):
    model = create(name, size).train()
    x = image(size, batch=2).requires_grad_()
    model(x).square().sum().backward()
    for key, parameter in [("image", x), *model.named_parameters()]:
        assert parameter.grad is not None, key
        assert parameter.grad.isfinite().all(), key
        lone = key.endswith("rpb") and parameter[0].numel() == 1  # the same for all, so for nothing
        # these weigh keys, of which a map of one token has one alone
        weighs = key.endswith(("bias_table", "an_bias", "ah_bias", "aw_bias"))
        if not weighs or (1, 1) not in map_sizes(model, size):
            assert parameter.grad.any() != lone, key


@torch.no_grad()
def test_implementations_agree(name, size):
    model, x = create(name, size), image(size)
    with use_impl("reference"):
        expected = model(x)
    assert_same(model(x), expected)


def test_grad_checkpointing_changes_nothing(name):
    model, x = create(name).train(), image(batch=2)
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


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_lower_precision(name, size, dtype):
    model, x = create(name, size), image(size)
    expected = model(x)
    with torch.autocast("cpu", dtype):
        mixed = model(x)
    lower = create(name, size).to(dtype)(x.to(dtype))
    assert lower.dtype == dtype
    for out in (mixed, lower):
        assert_same(out.float(), expected, tolerance=0.2 if dtype is torch.bfloat16 else 0.03)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_training_step_in_lower_precision(name, dtype):
    model, x = create(name).to(dtype).train(), image(batch=2).to(dtype)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    before = model(x)
    nn.functional.cross_entropy(before, torch.tensor([0, 1])).backward()
    optimizer.step()
    after = model(x)
    assert after.dtype == dtype
    assert after.isfinite().all()
    assert not torch.equal(after, before)
    for key, parameter in model.named_parameters():
        assert parameter.dtype == dtype
        assert parameter.grad.isfinite().all(), key


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
    acting = []  # scales of the modules' own parameters, in the order in which they act
    for module in model.modules():
        if module is not model:
            module.register_forward_pre_hook(
                lambda m, _: acting.extend(scale[id(p)] for p in m.parameters(recurse=False))
            )
    model.train()(image(batch=2))
    assert acting == sorted(acting)
    assert acting[0] == 0.5 ** (depth - 1)
    assert acting[-1] == 1
    coarse = group_parameters(model, model.group_matcher(coarse=True))
    assert 2 < len(coarse) <= depth


def test_timms_optimizer_decays_layers(name):
    model = create(name).train()
    optimizer = create_optimizer_v2(model, "adamw", lr=1e-2, weight_decay=0.1, layer_decay=0.5)
    given = [id(p) for group in optimizer.param_groups for p in group["params"]]
    assert sorted(given) == sorted(id(p) for p in model.parameters())
    undecayed = {
        id(p) for g in optimizer.param_groups if not g["weight_decay"] for p in g["params"]
    }
    assert {id(model.get_parameter(key)) for key in model.no_weight_decay()} <= undecayed
    before = copy.deepcopy(model)
    model(image(batch=2)).square().sum().backward()
    optimizer.step()
    for key, parameter in model.named_parameters():
        assert not torch.equal(parameter, before.get_parameter(key)), key


def test_no_weight_decay_names_parameters(name):
    model = create(name)
    assert model.no_weight_decay() <= {key for key, _ in model.named_parameters()}


# timm's arguments and methods


@torch.no_grad()
def test_classifier_is_replaced_and_removed(name):
    model, x = create(name), image()
    pooled = model.forward_head(model.forward_features(x), pre_logits=True)
    model.reset_classifier(7)
    assert model.get_classifier().out_features == model.num_classes == 7
    assert model(x).shape == (1, 7)
    model.reset_classifier(0)
    assert model.num_classes == 0
    assert torch.equal(model(x), pooled)
    model.reset_classifier(0, "")
    if "norm before pooling" not in limits(name):
        assert torch.equal(model(x), model.forward_features(x))
    if "catavgmax" not in limits(name):
        model.reset_classifier(5, "catavgmax")
        assert model.head_hidden_size == 2 * model.num_features
        assert model(x).shape == (1, 5)
    assert not any(module.training for module in model.modules())
    with pytest.raises(ValueError, match="global_pool: expected one of .*, got 'median'"):
        model.reset_classifier(5, "median")


@torch.no_grad()
@pytest.mark.parametrize("global_pool", ["avg", "max", "avgmax", "catavgmax", ""])
def test_without_classifier_from_the_start(name, global_pool):
    if global_pool in limits(name):
        with pytest.raises(ValueError, match="global_pool: expected one of"):
            create(name, num_classes=0, global_pool=global_pool)
        return
    model = create(name, num_classes=0, global_pool=global_pool)
    classifier = model.pretrained_cfg["classifier"]
    assert not any(key.startswith(f"{classifier}.") for key in model.state_dict())
    out = model(image())
    last = out if global_pool else as_map(model, out, SIZE)
    assert last.ndim == (2 if global_pool else 4)
    assert last.shape[-1] == model.head_hidden_size


@torch.no_grad()
def test_channels_classes_device_and_dtype(name):
    model = create(name, in_chans=1, num_classes=3, dtype=torch.float64)
    assert {p.dtype for p in model.parameters()} == {torch.float64}
    assert model(image(channels=1).double()).shape == (1, 3)
    model.reset_classifier(4)
    assert model.get_classifier().weight.dtype == torch.float64
    meta = create(name, device="meta")
    assert all(tensor.is_meta for tensor in (*meta.parameters(), *meta.buffers()))
    assert next(create(name, dtype=torch.bfloat16).parameters()).isfinite().all()


def test_drop_rates(name):
    kwargs = {} if "dropout" in limits(name) else {"proj_drop_rate": 0.1}
    model = create(name, drop_path_rate=0.3, drop_rate=0.2, **kwargs)
    rates = [m.drop_prob for m in model.modules() if isinstance(m, DropPath)]
    assert rates == sorted(rates)
    assert rates[-1] == pytest.approx(0.3)
    dropouts = {
        key: m.p
        for key, m in model.named_modules()
        if isinstance(m, nn.Dropout) and not key.endswith("attn_drop")
    }
    assert {*dropouts.values()} == {0.2, kwargs.get("proj_drop_rate", 0.0)}
    assert [key.replace("head.", "head_") for key, p in dropouts.items() if p == 0.2] == [
        "head_drop"
    ]
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
    expected = {
        "num_classes", "in_chans", "global_pool", "drop_rate", "proj_drop_rate",
        "attn_drop_rate", "drop_path_rate", "device", "dtype",
    }  # fmt: skip
    if "dropout" in limits(name):
        expected -= {"proj_drop_rate", "attn_drop_rate"}
    assert expected <= parameters.keys()
    assert "img_size" in parameters or not is_fixed(name)


@torch.no_grad()
def test_config_describes_the_model(name):
    cfg = timm.get_pretrained_cfg(name)
    model = create(name, cfg.input_size[1:])
    assert model.pretrained_cfg["input_size"] == cfg.input_size
    state_dict = model.state_dict()
    assert f"{cfg.classifier}.weight" in state_dict
    assert state_dict[f"{cfg.first_conv}.weight"].shape[1] == cfg.input_size[0]
    assert model.num_classes == cfg.num_classes
    size = cfg.input_size[1:]
    features = as_map(model, model.forward_features(image(size)), size)
    assert tuple(features.shape[1:3]) == cfg.pool_size
