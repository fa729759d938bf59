"""Segmentation: heads equal to mmsegmentation's, the segmenter around them, its checkpoints."""

import doctest
import json
import re
from pathlib import Path

import golden
import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from attos import ATTOS, limits
from safetensors.torch import load_file
from servers import Reply, Server
from torch import nn

import vitarium_cli
from vitarium import checkpoints
from vitarium.backbones import nat
from vitarium.backbones._registry import entries
from vitarium.checkpoints import CheckpointError, Weight
from vitarium.checkpoints.conversion import plan
from vitarium.heads import segmentation
from vitarium.heads.features import FeatureBackbone
from vitarium.heads.segmentation import (
    RENAMES,
    FCNHead,
    MeanIoU,
    Segmenter,
    SemanticFPN,
    SimplePyramid,
    UPerNet,
)

ROOT = Path(__file__).parents[1] / "golden"
GOLDENS = ROOT / "segmentation"
TOLERANCE = 1e-7  # of the expected values' spread
DIMS, STRIDES = (8, 12, 16, 20), (4, 8, 16, 32)
SMALL = {"channels": 16, "auxiliary_channels": 8}


def cases(kind):
    found = sorted(path.stem for path in GOLDENS.glob(f"{kind}_[0-9].json"))
    assert found, kind
    return found


def close(out, expected, what):
    spread = expected.std() if expected.numel() > 1 and expected.std() > 0 else 1.0
    assert (golden.sample(out)[: len(expected)] - expected).abs().max() <= TOLERANCE * spread, what


def small(name="nat_atto", num_classes=5, head="upernet", **kwargs):
    torch.manual_seed(0)
    return Segmenter(name, num_classes, head, **{**SMALL, **kwargs})


def images(*size, batch=2):
    return torch.randn(batch, 3, *size, generator=torch.Generator().manual_seed(1))


def labels(*size, classes=5, batch=2):
    return torch.randint(classes, (batch, *size), generator=torch.Generator().manual_seed(2))


# Heads


HEADS = {
    "upernet": lambda: UPerNet(DIMS, 5, 8, drop_rate=0.0),
    "semantic_fpn": lambda: SemanticFPN(DIMS, STRIDES, 5, 8, 16, drop_rate=0.0),
    "fcn": lambda: FCNHead(DIMS, 5, 8, drop_rate=0.0),
}


@pytest.mark.parametrize("case", [name for kind in HEADS for name in cases(kind)])
def test_head_equals_mmsegmentations(case):
    description, expected = golden.load(GOLDENS / case)
    head = HEADS[case[:-2]]().double()
    assert sum(p.numel() for p in head.parameters()) == description["num_params"]
    outer = re.compile("^(decode|auxiliary)_head\\.")
    ours = {name: outer.sub("", RENAMES.ours(name)) for name in description["tensors"]}
    counters = {k: x for k, x in head.state_dict().items() if not x.is_floating_point()}
    state = {ours[name]: x for name, x in golden.state_dict(description).items()}
    head.load_state_dict(state | counters)
    head.train(description["training"])

    shapes, seed = description["map_shapes"], description["seed"]
    maps = [golden.normal(seed + i, shape).requires_grad_() for i, shape in enumerate(shapes)]
    logits = head(maps)
    assert list(logits.shape) == description["output_shapes"]["logits"]
    close(logits, expected.pop("logits"), "logits")
    (logits * golden.normal(seed + len(maps), logits.shape)).sum().backward()
    after = head.state_dict()
    assert {f"grad.{name}" for name in ours if "running" not in name} <= expected.keys()
    for key, value in expected.items():
        kind, _, name = key.partition(".")
        if kind.startswith("grad_map"):
            found = maps[int(kind[-1])].grad
        else:
            found = after[ours[name]] if kind == "after" else head.get_parameter(ours[name]).grad
        close(found, value, key)


@pytest.mark.parametrize("head", HEADS)
def test_heads_begin_as_mmsegmentations_do(head):
    torch.manual_seed(0)
    head = HEADS[head]()
    assert 0.005 < head.conv_seg.weight.std() < 0.015
    assert not head.conv_seg.bias.any()
    for module in head.modules():
        if isinstance(module, segmentation.ConvNormReLU):
            weight = module.conv.weight
            expected = (2 / (len(weight) * weight[0, 0].numel())) ** 0.5  # the fan out
            assert 0.7 * expected < weight.std() < 1.3 * expected


@pytest.mark.parametrize("head", ["upernet", "semantic_fpn"])
@pytest.mark.parametrize("norm", segmentation.NORMS)
def test_norms(head, norm):
    segmenter = small(head=head, norm=norm, channels=24).train()
    kinds = {type(m).__mro__[1] for m in segmenter.decode_head.modules() if hasattr(m, "eps")}
    assert len(kinds) == 1
    if norm == "batchnorm2d":
        with pytest.raises(ValueError, match="images: expected more than one .*groupnorm"):
            segmenter(images(32, 32, batch=1))
    else:
        segmenter.loss(images(32, 32, batch=1), labels(32, 32, batch=1))["ce"].backward()
    for size in ((1, 1), (45, 70)):
        assert segmenter.eval()(images(*size)).shape == (2, 5, *size)


def test_sync_batch_norm_keeps_the_activation():
    head = HEADS["upernet"]().eval()
    maps = [golden.normal(i, (1, c, 8, 8)).float() for i, c in enumerate(DIMS)]
    converted = nn.SyncBatchNorm.convert_sync_batchnorm(head)
    assert any(isinstance(m, nn.SyncBatchNorm) for m in converted.modules())
    inner = []
    converted.bottleneck.register_forward_hook(lambda module, args, out: inner.append(out))
    converted(maps)
    assert inner[0].min() == 0


def test_simple_pyramid():
    pyramid = SimplePyramid(64, 16, channels=32)
    assert (pyramid.channels, pyramid.strides) == ((32,) * 4, (4, 8, 16, 32))
    for height, width in ((6, 4), (5, 3), (1, 1)):
        maps = pyramid(torch.randn(2, 64, height, width, requires_grad=True))
        scales = (4, 2, 1, 0.5)
        expected = [(2, 32, *(-int(-n * s // 1) for n in (height, width))) for s in scales]
        assert [tuple(y.shape) for y in maps] == expected
    assert [tuple(y.shape[2:]) for y in SimplePyramid(64, 8)(torch.zeros(1, 64, 8, 8))] == [
        (16, 16), (8, 8), (4, 4), (2, 2)
    ]  # fmt: skip
    # A finer map is made of its own cell alone before the 3 x 3 convolution.
    assert [type(m).__name__ for m in pyramid.levels[0]] == [
        "ConvTranspose2d", "LayerNorm2d", "GELU", "ConvTranspose2d",
        "Conv2d", "LayerNorm2d", "Conv2d", "LayerNorm2d",
    ]  # fmt: skip
    assert pyramid.levels[0][3].out_channels == 16
    with pytest.raises(ValueError, match="stride: expected powers of two .* got 4 and 14"):
        SimplePyramid(64, 14)
    with pytest.raises(ValueError, match="strides: expected powers of two .* got 12 and 4"):
        SemanticFPN(DIMS, (4, 8, 12, 32), 5)


# The segmenter


@torch.no_grad()
@pytest.mark.parametrize("head", ["upernet", "semantic_fpn"])
@pytest.mark.parametrize("name", ATTOS)
def test_every_family(name, head):
    fixed = timm.get_pretrained_cfg(name).fixed_input_size
    size = (48, 80) if fixed else (37, 51)
    kwargs = {"img_size": size} if fixed else {}
    task = None if "dense form" in limits(name) else "seg"
    if not hasattr(entries()[name], "dense_adapter"):
        task = None
    segmenter = small(name, head=head, task=task, **kwargs).eval()
    assert (segmenter.pyramid is None) == (len({*segmenter.backbone.strides}) > 1)
    assert (segmenter.auxiliary_head is None) == (SMALL["auxiliary_channels"] == 0)
    assert segmenter(images(*size)).shape == (2, 5, *size)


@torch.no_grad()
@pytest.mark.parametrize(
    ("name", "kwargs"),
    [
        ("resnet18", {"out_indices": (1, 2, 3, 4)}),
        ("convnext_atto", {}),
        ("test_vit", {"dynamic_img_size": True}),
        ("swin_s3_tiny_224", {"img_size": 64, "strict_img_size": False, "depths": (1, 1, 1, 1)}),
    ],
)
def test_timm_models_and_images_that_they_cannot_divide(name, kwargs):
    segmenter = small(name, **kwargs).eval()
    divisor = segmenter.backbone.size_divisor
    x = images(37, 51)
    assert segmenter(x).shape == (2, 5, 37, 51)
    padded = F.pad(x, (0, -51 % divisor, 0, -37 % divisor))
    torch.testing.assert_close(segmenter(x), segmenter(padded)[:, :, :37, :51])


@torch.no_grad()
def test_sizes():
    """Our models pad where they must: any image that they take reaches them as it is."""
    segmenter = small().eval()
    seen = []
    segmenter.backbone.register_forward_pre_hook(lambda module, args: seen.append(args[0].shape))
    for size in ((1, 1), (7, 90), (31, 33), (33, 47), (64, 32)):
        assert segmenter(images(*size)).shape == (2, 5, *size)
        assert seen[-1][2:] == tuple(max(n, 32) for n in size)
    with pytest.raises(ValueError, match=r"images: expected \[B, C, H, W\], got \[3, 32, 32\]"):
        segmenter(images(32, 32)[0])
    with pytest.raises(ValueError, match="images: expected"):
        segmenter(torch.zeros(0, 3, 32, 32))


def test_every_parameter_gets_a_gradient():
    for name, kwargs in (("nat_atto", {"task": "seg"}), ("agent_deit_atto", {"norm": "groupnorm"})):
        for head in ("upernet", "semantic_fpn"):
            segmenter = small(name, head=head, dice_weight=1.0, **kwargs)
            losses = segmenter(images(64, 48), labels(64, 48))
            assert losses.keys() == {"ce", "dice", "aux"}
            sum(losses.values()).backward()
            assert [k for k, p in segmenter.named_parameters() if p.grad is None] == []


def test_gradient_checkpointing():
    segmenter = small(drop_rate=0.0)
    plain = segmenter.loss(images(32, 40), labels(32, 40))
    segmenter.set_grad_checkpointing()
    torch.testing.assert_close(segmenter.loss(images(32, 40), labels(32, 40)), plain)


@torch.no_grad()
@pytest.mark.parametrize("head", ["upernet", "semantic_fpn"])
def test_bfloat16(head):
    segmenter = small(head=head, dtype=torch.bfloat16).train()
    assert {p.dtype for p in segmenter.parameters()} == {torch.bfloat16}
    losses = segmenter.loss(images(48, 33).bfloat16(), labels(48, 33))
    assert {x.dtype for x in losses.values()} == {torch.float32}
    assert all(x.isfinite() for x in losses.values())
    segmenter.eval()
    assert segmenter(images(48, 33).bfloat16()).isfinite().all()
    assert segmenter.infer(images(48, 33).bfloat16(), "slide", 32, 16).dtype == torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        assert small(head=head).eval()(images(33, 33)).isfinite().all()


@pytest.mark.slow
@pytest.mark.parametrize("head", ["upernet", "semantic_fpn"])
def test_compiled_heads_compute_the_same(head):
    head = HEADS[head]()
    compiled = torch.compile(head, fullgraph=True)
    maps = [golden.normal(i, (2, c, 12 >> i, 8 >> i)).float() for i, c in enumerate(DIMS)]
    torch.testing.assert_close(compiled(maps), head(maps), atol=1e-5, rtol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("head", ["upernet", "semantic_fpn"])
def test_training_compiles_whole(head):
    segmenter = small(head=head, drop_rate=0.0)
    target = labels(33, 47)
    expected = segmenter.loss(images(33, 47), target)
    compiled = torch.compile(segmenter, fullgraph=True, backend="aot_eager")
    found = compiled(images(33, 47), target)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    sum(found.values()).backward()
    assert all(p.grad is not None for p in segmenter.parameters())


@torch.no_grad()
@pytest.mark.parametrize("head", ["upernet", pytest.param("semantic_fpn", marks=pytest.mark.slow)])
def test_traces_without_a_break(head):
    segmenter = small(head=head).eval()
    compiled = torch.compile(segmenter, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(images(33, 47)), segmenter(images(33, 47)))


@torch.no_grad()
@pytest.mark.parametrize(
    ("name", "head"),
    [
        pytest.param("nat_atto", "upernet", marks=pytest.mark.slow),
        ("resnet18", "upernet"),
        ("agent_deit_atto", "semantic_fpn"),
    ],
)
def test_exports(name, head):
    segmenter = small(name, head=head).eval()
    x = images(30, 47)
    program = torch.export.export(segmenter, (x,))
    torch.testing.assert_close(program.module()(x), segmenter(x), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"num_classes": None}, "num_classes: expected at least 1, got None"),
        ({"num_classes": 0}, "num_classes: expected at least 1, got 0"),
        (
            {"head": "fcn"},
            r"head: expected None or one of \('upernet', 'semantic_fpn'\), got 'fcn'",
        ),
        ({"norm": "batch"}, "norm: expected one of .*groupnorm.*, got 'batch'"),
        ({"freeze": 5}, "freeze: expected True or 0 to 4 stages, got 5"),
        ({"freeze": -1}, "freeze: expected True or 0 to 4 stages, got -1"),
        ({"class_weight": (1, 2)}, "class_weight: expected 5 numbers, got 2"),
        ({"ignore_index": 4}, "ignore_index: expected none of the 5 labels, got 4"),
        ({"name": "nat_nano"}, "name: expected a model of vitarium or timm, got 'nat_nano'"),
        ({"name": "agent_deit_atto", "out_indices": (1, 3)}, r"out_indices: .* got \(1, 3\)"),
        (
            {"name": "nat_mini.shi_upernet_160k_ade20k", "head": "semantic_fpn"},
            "head: expected None or 'upernet' of nat_mini.shi_upernet_160k_ade20k, got 'semantic",
        ),
        (
            {"name": "nat_mini.shi_upernet_160k_ade20k", "pretrained": True, "checkpoint": {}},
            "checkpoint: expected None with the weights of nat_mini",
        ),
    ],
)
def test_refusals(kwargs, message):
    with pytest.raises(ValueError, match=message):
        Segmenter(**{"name": "nat_atto", "num_classes": 5, "device": "meta", **kwargs})
    with pytest.raises(TypeError, match="windows"):
        small(windows=7)


# Freezing


@pytest.mark.parametrize("task", [None, "seg"])
@pytest.mark.parametrize("name", [*ATTOS, "resnet18", "convnext_atto", "test_vit"])
def test_frozen_stages_are_what_their_maps_are_made_of(name, task):
    if task and (not hasattr(entries().get(name), "dense_adapter") or "dense form" in limits(name)):
        pytest.skip("no form of its own")
    kwargs = {"img_size": 64} if name.startswith(("vitrpb", "test_vit")) else {}
    if name == "test_vit":
        kwargs["out_indices"] = range(6)
    backbone = FeatureBackbone(name, task=task, drop_path_rate=0.0, **kwargs)
    count = len(backbone.channels)
    assert count == backbone.num_stages
    maps = backbone(images(64, 64, batch=1))
    named = dict(backbone.named_parameters())
    used = []
    for y in maps:
        grads = torch.autograd.grad(y.sum(), named.values(), allow_unused=True, retain_graph=True)
        used.append({k for k, g in zip(named, grads, strict=True) if g is not None})
    for stages in range(count + 1):
        for p in named.values():
            p.requires_grad_(True)
        backbone.freeze(stages)
        frozen = {k for k, p in named.items() if not p.requires_grad}
        made = set().union(*used[:stages])
        norms = {k for k in made if re.search(r"\.(extra_)?norms?\.?\d", k) and task}
        assert made - norms <= frozen
        # A stage may end with what brings its map to the next one's size, and nothing more.
        beyond = {k for k in frozen - made if "pos_embed" not in k}  # PVT's: all in the stem
        assert all(re.search("downsample|merge|reduction", k) for k in beyond), beyond
        assert beyond <= set().union(*used[stages : stages + 1])
    backbone.freeze(True)
    assert not any(p.requires_grad for p in named.values())


def test_frozen_stages_keep_their_statistics():
    segmenter = small("resnet18", freeze=2, out_indices=(1, 2, 3, 4))
    model = segmenter.backbone.model
    for mode in (True, False, True):
        segmenter.train(mode)
        assert not model.layer1.training
        assert model.layer2.training == model.layer2[0].bn1.training == mode
        assert segmenter.decode_head.training == mode
    before = {k: x.clone() for k, x in segmenter.state_dict().items()}
    optimizer = torch.optim.SGD([p for p in segmenter.parameters() if p.requires_grad], 0.1)
    sum(segmenter.loss(images(64, 64), labels(64, 64)).values()).backward()
    optimizer.step()
    changed = {k for k, x in segmenter.state_dict().items() if not torch.equal(x, before[k])}
    assert not {k for k in changed if re.match(r"backbone\.model\.(conv1|bn1|layer1)", k)}
    assert "backbone.model.layer2.0.bn1.running_mean" in changed
    whole = small("resnet18", freeze=True, out_indices=(1, 2, 3, 4)).train()
    assert not any(m.training for m in whole.backbone.modules())
    assert not any(p.requires_grad for p in whole.backbone.parameters())


# Losses


def golden_labels(seed, shape, classes, share):
    rng = np.random.default_rng(seed)
    y = rng.integers(0, classes, shape)
    y[rng.random(shape) < share] = 255
    return torch.from_numpy(y)


@pytest.mark.parametrize("case", cases("loss"))
def test_cross_entropy_equals_mmsegmentations(case, monkeypatch):
    d, expected = golden.load(GOLDENS / case)
    target = golden_labels(d["seed"] + 1, d["label_shape"], d["num_classes"], d["ignored_share"])
    logits = golden.normal(d["seed"], d["logits_shape"]).requires_grad_()
    segmenter = small(
        num_classes=d["num_classes"],
        class_weight=d["class_weight"],
        avg_non_ignore=d["avg_non_ignore"],
        auxiliary_weight=d["loss_weight"],
        auxiliary_channels=8,
    ).double()
    monkeypatch.setattr(segmenter.auxiliary_head, "forward", lambda maps: logits)
    height, width = d["label_shape"][1:]
    # Of a size that needs no padding, as the recorded logits were resized to the labels'.
    segmenter.backbone.min_size = 1
    monkeypatch.setattr(segmenter.backbone, "forward", lambda x: [x])
    monkeypatch.setattr(segmenter.decode_head, "forward", lambda maps: logits.detach())
    losses = segmenter.loss(torch.zeros(2, 3, height, width, dtype=torch.float64), target)
    assert losses["aux"].item() == pytest.approx(d["loss"], rel=TOLERANCE, abs=1e-12)
    assert losses["ce"].item() * d["loss_weight"] == pytest.approx(d["loss"], rel=1e-7, abs=1e-12)
    losses["aux"].backward()
    close(logits.grad, expected["grad_logits"], "grad_logits")


def test_weights_and_ignored_pixels():
    """Where mmsegmentation fails: the divisor counts ignored pixels as 1, or not at all."""
    segmenter = small(class_weight=(1, 2, 3, 4, 5), auxiliary_channels=0).eval()
    x, target = images(32, 32), labels(32, 32)
    target[:, :10] = 255
    counted = target != 255
    with torch.no_grad():
        logits = segmenter(x).double()
        weight = torch.tensor([1.0, 2, 3, 4, 5]).double()
        total = F.cross_entropy(logits, target, weight, ignore_index=255, reduction="sum")
        divisor = weight[target[counted]].sum()
        ce = segmenter.loss(x, target)["ce"]
        assert ce.item() == pytest.approx((total / (divisor + (~counted).sum())).item(), rel=1e-5)
        segmenter.avg_non_ignore = True
        ce = segmenter.loss(x, target)["ce"]
        assert ce.item() == pytest.approx((total / divisor).item(), rel=1e-5)


@pytest.mark.parametrize("avg_non_ignore", [True, False])
@pytest.mark.parametrize("class_weight", [None, (0.0, 0.0, 1.0)])
def test_nothing_to_learn_from(avg_non_ignore, class_weight):
    segmenter = small(
        num_classes=3,
        avg_non_ignore=avg_non_ignore,
        class_weight=class_weight,
        dice_weight=1.0,
    )
    for label in (255, 0) if class_weight else (255,):
        target = torch.full((2, 32, 32), label)
        losses = segmenter.loss(images(32, 32), target)
        assert label == 0 or all(x == 0 for x in losses.values())
        sum(losses.values()).backward()
        for p in segmenter.parameters():
            assert p.grad is None or p.grad.isfinite().all()


def test_dice(monkeypatch):
    segmenter = small(num_classes=3, dice_weight=0.5, auxiliary_channels=0)
    target = torch.tensor([[[0, 1, 2], [1, 1, 255]]])
    scores = torch.randn(1, 3, 2, 3, generator=torch.Generator().manual_seed(0)).double()
    monkeypatch.setattr(segmenter, "_maps", lambda x: None)
    monkeypatch.setattr(segmenter.decode_head, "forward", lambda maps: None)
    monkeypatch.setattr(segmenter, "_at_size", lambda logits, x: scores)
    p = scores.softmax(1)[0]
    dice = []
    for c in range(3):
        above, below = 1.0, 1.0
        for y in range(2):
            for x in range(3):
                label, chance = target[0, y, x].item(), p[c, y, x].item()
                if label != 255:
                    above += 2 * chance * (label == c)
                    below += chance**2 + (label == c)
        dice.append(above / below)
    found = segmenter.loss(torch.zeros(1, 3, 2, 3), target)["dice"].item()
    assert found == pytest.approx(0.5 * (1 - sum(dice) / 3))


def test_one_class_is_two_labels():
    segmenter = small(num_classes=1, dice_weight=1.0, class_weight=(1, 3), auxiliary_channels=0)
    segmenter.eval()
    assert (segmenter.num_classes, segmenter.num_labels) == (1, 2)
    x, target = images(32, 32), labels(32, 32, classes=2)
    target[:, 0] = 255
    logits = segmenter(x)
    assert logits.shape == (2, 1, 32, 32)
    counted = target != 255
    binary = F.binary_cross_entropy_with_logits(
        logits[:, 0][counted],
        target[counted].float(),
        pos_weight=torch.tensor(3.0),
        reduction="sum",
    )
    divisor = (1 + 2 * target[counted]).sum() + (~counted).sum()
    torch.testing.assert_close(segmenter.loss(x, target)["ce"], binary / divisor)
    assert torch.equal(segmenter.predict(x), (logits[:, 0] > 0).long())
    with pytest.raises(ValueError, match="labels from 0 to 1 or 255 of 2 classes, got 2"):
        segmenter.loss(x, target.where(counted, 2))
    two = small(num_classes=2).eval()
    assert two(x).shape == (2, 2, 32, 32)
    assert two.predict(x).unique().tolist() in ([0], [1], [0, 1])


@pytest.mark.parametrize(
    ("target", "message"),
    [
        (labels(32, 31), r"target: expected labels \[2, 32, 32\] .*, got \[2, 32, 31\]"),
        (labels(32, 32, batch=1), r"target: expected labels \[2, 32, 32\] .*, got \[1, 32, 32\]"),
        (labels(32, 32)[:, None], r"target: .* got \[2, 1, 32, 32\] of torch.int64"),
        (labels(32, 32).float(), r"target: .* of an integer type, got \[2, 32, 32\] of torch.fl"),
        (labels(32, 32) + 3, r"target: expected labels from 0 to 4 or 255 of 5 classes, got [567]"),
        (labels(32, 32) - 1, r"target: expected labels from 0 to 4 or 255 of 5 classes, got -1"),
    ],
)
def test_refused_targets(target, message):
    with pytest.raises(ValueError, match=message):
        small().loss(images(32, 32), target)


def test_targets_as_images_store_them():
    segmenter = small().eval()
    target = labels(32, 32)
    with torch.no_grad():
        plain = segmenter.loss(images(32, 32), target)
        assert segmenter.loss(images(32, 32), target.byte()) == plain


# Inference


@torch.no_grad()
@pytest.mark.parametrize("case", cases("slide"))
def test_slide_equals_mmsegmentations(case, monkeypatch):
    d, expected = golden.load(GOLDENS / case)
    kernel = golden.normal(d["seed"], (3, 3, 5, 5))
    segmenter = small(num_classes=3)
    monkeypatch.setattr(segmenter, "forward", lambda x: F.conv2d(x, kernel, padding=2))
    image = golden.normal(d["seed"] + 1, d["image_shape"])
    logits = segmenter.infer(image, "slide", tuple(d["crop_size"]), tuple(d["stride"]))
    assert list(logits.shape) == d["output_shapes"]["logits"]
    close(logits, expected["logits"], "logits")
    found = segmenter.predict(image, "slide", tuple(d["crop_size"]), tuple(d["stride"]))
    assert torch.equal(found, logits.argmax(1))


@torch.no_grad()
def test_slide_over_one_window_is_whole():
    segmenter = small().eval()
    x = images(40, 52)
    torch.testing.assert_close(segmenter.infer(x, "slide", 64, 32), segmenter(x))
    assert torch.equal(segmenter.predict(x), segmenter(x).argmax(1))


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("tile",), "mode: expected 'whole' or 'slide', got 'tile'"),
        (("whole", 32), "crop_size, stride: expected None in mode 'whole', got 32, None"),
        (("slide", 32), "crop_size, stride: expected both in mode 'slide', got 32, None"),
        (("slide", (32, 16), 24), r"stride: expected 1 to \(32, 16\) pixels, got \(24, 24\)"),
        (("slide", 32, 0), r"stride: expected 1 to \(32, 32\) pixels, got \(0, 0\)"),
    ],
)
def test_refused_inference(args, message):
    with pytest.raises(ValueError, match=message):
        small().infer(images(32, 32), *args)


# The metric


@pytest.mark.parametrize("case", cases("iou"))
def test_iou_equals_mmsegmentations(case):
    d, _ = golden.load(GOLDENS / case)
    rng = np.random.default_rng(d["seed"])
    whole, parts = MeanIoU(d["num_classes"]), []
    for _ in range(d["images"]):
        p = rng.integers(0, d["labels_below"], d["shape"])
        y = rng.integers(0, d["labels_below"], d["shape"])
        y[rng.random(d["shape"]) < 0.2] = 255
        parts.append(MeanIoU(d["num_classes"]))
        for metric in (whole, parts[-1]):
            metric.update(torch.from_numpy(p), torch.from_numpy(y))
    summed = MeanIoU(d["num_classes"])
    summed.confusion = sum(part.confusion for part in parts)  # as all_reduce does it
    for metric in (whole, summed):
        found = metric.compute()
        assert found["IoU"] == pytest.approx(
            [float("nan") if x is None else x for x in d["iou"]], nan_ok=True, rel=1e-12
        )
        assert found["mIoU"] == pytest.approx(d["mean_iou"], rel=1e-12)
        assert found["aAcc"] == pytest.approx(d["accuracy"], rel=1e-12)


def test_iou_without_pixels_and_refusals():
    metric = MeanIoU(1)
    assert metric.confusion.shape == (2, 2)
    metric.update(torch.zeros(3, 3, dtype=torch.uint8), torch.full((3, 3), 255))
    assert all(np.isnan([metric.compute()["mIoU"], metric.compute()["aAcc"]]))
    metric.update(torch.tensor([1, 0]), torch.tensor([1, 1]))
    assert metric.compute() == {"mIoU": 0.25, "aAcc": 0.5, "IoU": [0.0, 0.5]}
    metric.reset()
    assert not metric.confusion.any()
    with pytest.raises(ValueError, match=r"target's shape \[3\], got \[2\]"):
        metric.update(torch.zeros(2), torch.zeros(3))
    with pytest.raises(ValueError, match="target: expected labels from 0 to 1 or 255 .* got 2"):
        metric.update(torch.tensor([1]), torch.tensor([2]))
    with pytest.raises(ValueError, match="prediction: expected labels from 0 to 1 of .* got 255"):
        metric.update(torch.tensor([255]), torch.tensor([1]))
    with pytest.raises(ValueError, match="num_classes: expected at least 1, got 0"):
        MeanIoU(0)


# Checkpoints


MANIFESTS = {
    "upernet_nat_mini": ("nat_mini", "upernet"),
    "upernet_swin_tiny": ("fused_swin_tiny_patch4_window7_224", "upernet"),
    "semantic_fpn_agent_pvt_tiny": ("agent_pvt_tiny", "semantic_fpn"),
}


def released(case, model):
    """A checkpoint as mmsegmentation saves it: tensors that each know their place, one value."""
    description = json.loads((GOLDENS / f"{case}.json").read_text())
    tensors = {
        name: torch.tensor(float(i)).expand(shape)
        for i, (name, shape) in enumerate(description["tensors"].items())
    }
    counters = {name: torch.tensor(7) for name in description["constants"]}
    family = entries()[MANIFESTS[case][0]]
    stored = family._BUFFERS(model.backbone.model)
    return description, tensors | counters, {f"backbone.{k}": x for k, x in stored.items()}


@pytest.mark.parametrize("case", MANIFESTS)
def test_names_lead_to_ours_and_back(case):
    name, head = MANIFESTS[case]
    model = Segmenter(name, 150, head, task="seg", device="meta")
    description, theirs, constants = released(case, model)
    assert sum(p.numel() for p in model.parameters()) == description["num_params"]
    converted = checkpoints.convert(theirs | constants, model)
    report = checkpoints.compare(converted, model, model.checkpoint_ignore(), data=False)
    assert report.whole, report
    assert set(report.matched) == model.state_dict().keys()
    assert not report.ignored

    family = entries()[name]
    ours = {k.removeprefix("backbone.model."): x for k, x in converted.items()}
    inner = {k: x for k, x in ours.items() if not k.startswith(("decode_", "auxiliary_"))}
    heads = {k: x for k, x in ours.items() if k not in inner}
    back = {f"backbone.{k}": x for k, x in family._RENAMES.to_authors(inner).items()}
    back |= RENAMES.to_authors(heads)
    assert back.keys() == theirs.keys()
    for key, tensor in theirs.items():
        assert back[key].shape == tensor.shape, key
        assert back[key].flatten()[:1].equal(tensor.flatten()[:1]), key


def test_heads_of_mmsegmentations_own_swin():
    """Its backbone has names of its own, which no family reads: the heads fit, and nothing else."""
    path = GOLDENS / "upernet_mmseg_swin_tiny.json"
    description = json.loads(path.read_text())
    theirs = description["tensors"] | description["constants"]
    model = Segmenter("fused_swin_tiny_patch4_window7_224", 150, task="seg", device="meta")
    ours = {k: list(x.shape) for k, x in model.state_dict().items()}
    parts = ("decode_head.", "auxiliary_head.")
    assert {k: s for k, s in ours.items() if k.startswith(parts)} == {
        k: s for k, s in theirs.items() if k.startswith(parts)
    }
    with pytest.raises(CheckpointError, match="nothing was loaded.* missing: backbone.model"):
        checkpoints.load(model, {k: torch.empty(s, device="meta") for k, s in theirs.items()})


ATTO = {"name": "nat_atto", "num_classes": 5, "task": "seg"}


def theirs_of(segmenter):
    """A segmenter's tensors by mmsegmentation's names, written by hand."""
    found = {}
    for name, tensor in segmenter.state_dict().items():
        key = name.replace("backbone.model.", "backbone.").replace("decode_head.neck.", "neck.")
        key = re.sub(r"inner_blocks\.(\d)\.0", r"lateral_convs.\1.conv", key)
        found[re.sub(r"layer_blocks\.(\d)\.0", r"fpn_convs.\1.conv", key)] = tensor
    return found


def same(state, other):
    return state.keys() == other.keys() and all(torch.equal(x, other[k]) for k, x in state.items())


@pytest.mark.parametrize("head", ["upernet", "semantic_fpn"])
def test_load(head, tmp_path):
    torch.manual_seed(0)
    source = Segmenter(**ATTO, head=head, **SMALL)
    torch.save({"meta": {}, "state_dict": theirs_of(source)}, tmp_path / "theirs.pth")
    target = Segmenter(**ATTO, head=head, **SMALL)
    assert not same(target.state_dict(), source.state_dict())
    report = checkpoints.load(target, tmp_path / "theirs.pth")
    assert same(target.state_dict(), source.state_dict())
    assert set(report.matched) == source.state_dict().keys()

    bare = Segmenter(**ATTO, head=head, channels=16, auxiliary_channels=0)
    report = checkpoints.load(bare, tmp_path / "theirs.pth")
    assert set(report.ignored.values()) == {"this segmenter has no auxiliary head"}
    backbone = FeatureBackbone("nat_atto", task="seg")
    checkpoints.load(backbone, tmp_path / "theirs.pth")
    assert same(backbone.state_dict(), source.backbone.state_dict())
    checkpoints.load(target, source.state_dict())
    with pytest.raises(CheckpointError, match=r"conv_seg.weight expected \[4, 16, 1, 1\]"):
        checkpoints.load(
            Segmenter(**{**ATTO, "num_classes": 4}, head=head, **SMALL), theirs_of(source)
        )


@pytest.mark.parametrize("auxiliary", [0, 8])
@pytest.mark.parametrize("head", ["upernet", "semantic_fpn"])
def test_convert(head, auxiliary, tmp_path, capsys):
    torch.manual_seed(0)
    source = Segmenter(**ATTO, head=head, channels=16, auxiliary_channels=auxiliary)
    theirs, ours, back = (tmp_path / x for x in ("in.pth", "ours.safetensors", "back.pth"))
    torch.save({"state_dict": theirs_of(source)}, theirs)
    arguments = ["convert", "nat_atto", str(theirs), str(ours), "--head", head]
    assert vitarium_cli.main(arguments) == 0
    assert same(load_file(ours), source.state_dict())
    card = json.loads(ours.with_suffix(".json").read_text())
    assert (card["task"], card["head"]) == ("seg", head)
    assert card["parameters"] == sum(p.numel() for p in source.parameters())
    assert not card["dropped"]
    arguments = ["convert", "nat_atto", str(ours), str(back), "--head", head, "--to", "authors"]
    assert vitarium_cli.main(arguments) == 0
    written = torch.load(back, weights_only=True)
    assert same(written["state_dict"], theirs_of(source))
    capsys.readouterr()


def test_convert_refuses(capsys):
    state = theirs_of(Segmenter(**ATTO, **SMALL))
    assert "with semantic_fpn: " in plan("nat_atto", state, head="semantic_fpn").fault
    with pytest.raises(CheckpointError, match="expected a segmenter's decode_head.conv_seg"):
        plan("nat_atto", {k: x for k, x in state.items() if "conv_seg" not in k}, head="upernet")
    for kwargs, message in (
        ({"head": "fcn"}, "head: expected None or one of .* got 'fcn'"),
        ({"head": "upernet", "task": "det"}, "head: expected None with task 'det'"),
        ({"head": "upernet", "to": "transformers"}, "head: expected None .* to transformers"),
        ({"head": "upernet", "num_classes": 5}, "num_classes: expected None with a task"),
    ):
        with pytest.raises(ValueError, match=message):
            plan("nat_atto", state, **kwargs)
    parser = vitarium_cli._parser()
    args = parser.parse_args(["convert", "a", "b", "c", "--head", "upernet"])
    assert args.head in segmentation.HEADS


def test_pretrained(cache, monkeypatch, tmp_path):
    """A released segmenter is whole; other classes get new classifiers."""
    released = "nat_atto.shi_upernet_160k_ade20k"
    torch.manual_seed(0)
    source = Segmenter("nat_atto", 150, task="seg", **SMALL)
    torch.save({"state_dict": theirs_of(source)}, tmp_path / "upernet.pth")
    with Server({"/upernet.pth": Reply((tmp_path / "upernet.pth").read_bytes())}) as server:
        weight = Weight(url=server.url("/upernet.pth"), wrapper="state_dict", task="seg")
        monkeypatch.setitem(nat._WEIGHTS, released, weight)
        segmenter = Segmenter(released, pretrained=True, **SMALL)
        assert segmenter.num_classes == 150
        assert same(segmenter.state_dict(), source.state_dict())
        other = Segmenter(released, 7, pretrained=True, class_weight=range(7), **SMALL).eval()
        assert other(images(32, 32)).shape == (2, 7, 32, 32)
        assert other.auxiliary_head.conv_seg.weight.shape == (7, 8, 1, 1)
        mine = {k: x for k, x in other.state_dict().items() if "conv_seg" not in k}
        assert all(torch.equal(x, source.state_dict()[k]) for k, x in mine.items())
        with pytest.raises(CheckpointError, match="misshapen"):
            Segmenter(released, pretrained=True, channels=8, auxiliary_channels=8)
    with pytest.raises(CheckpointError, match="not released"):
        Segmenter("agent_swin_small.leaplab_upernet_160k_ade20k", pretrained=True, device="meta")


def test_backbones_own_weights():
    classifier = timm.create_model("nat_atto.vitarium_digits", pretrained=True)
    for kwargs in ({"pretrained": True}, {"checkpoint": classifier.state_dict()}):
        segmenter = Segmenter("nat_atto.vitarium_digits", 11, task="seg", **SMALL, **kwargs)
        key = "patch_embed.proj.0.weight"
        found = segmenter.backbone.model.get_parameter(key)
        assert torch.equal(found, classifier.get_parameter(key))
    assert timm.data.resolve_model_data_config(segmenter)["input_size"] == (3, 64, 64)


def test_reset_classifier():
    segmenter = small(class_weight=[1.0] * 5)
    segmenter.reset_classifier(3, class_weight=(1, 2, 3))
    losses = segmenter.loss(images(32, 32), labels(32, 32, classes=3))
    assert losses["aux"].isfinite()
    segmenter.reset_classifier(1)
    assert segmenter.class_weight is None
    with pytest.raises(ValueError, match="num_classes: expected at least 1, got 0"):
        segmenter.reset_classifier(0)


def test_the_examples_run():
    assert doctest.testmod(segmentation).attempted > 0
    assert doctest.testmod(segmentation).failed == 0
