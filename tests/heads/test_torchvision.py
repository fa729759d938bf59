"""torchvision's detectors on vitarium's and timm's backbones."""

import copy
import doctest
import pickle
import re
from pathlib import Path

import pytest
import torch
from attos import ATTOS, is_fixed
from torchvision.models.detection import (
    FCOS,
    FasterRCNN,
    MaskRCNN,
    RetinaNet,
    maskrcnn_resnet50_fpn,
    retinanet_resnet50_fpn,
)
from torchvision.models.detection.backbone_utils import resnet_fpn_backbone
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads

from vitarium.data.scenes import Scenes, TorchvisionScenes
from vitarium.heads import torchvision as heads
from vitarium.heads.torchvision import PyramidBackbone, faster_rcnn, fcos, mask_rcnn, retinanet

CLASSES = 11
DETECTORS = {faster_rcnn: FasterRCNN, mask_rcnn: MaskRCNN, retinanet: RetinaNet, fcos: FCOS}
FEW = {  # regions, so that a step is quick
    "rpn_pre_nms_top_n_train": 20,
    "rpn_post_nms_top_n_train": 10,
    "rpn_pre_nms_top_n_test": 20,
    "rpn_post_nms_top_n_test": 4,
    "box_batch_size_per_image": 8,
    "box_score_thresh": 0.0,
    "box_detections_per_img": 3,
}
ODD = [(61, 83), (90, 51)]


def small(build, name="nat_atto", size=(64, 96), **kwargs):
    """A detector that is quick and brings the shorter, longer side of images to ``size`` pixels."""
    torch.manual_seed(0)
    few = FEW if build in (faster_rcnn, mask_rcnn) else {"score_thresh": 0.0, "topk_candidates": 3}
    if build is mask_rcnn:
        few = {**few, "mask_head": MaskRCNNHeads(kwargs.get("fpn_channels", 32), (32, 256), 1)}
    sizes = {"min_size": size[0], "max_size": size[1]}
    return build(name, CLASSES, **{**few, **sizes, "fpn_channels": 32, **kwargs})


def images(*sizes):
    generator = torch.Generator().manual_seed(1)
    return [torch.rand(3, *size, generator=generator) for size in sizes]


def targets(*sizes, counts=(2, 1)):
    found = []
    for (H, W), count in zip(sizes, counts, strict=True):
        boxes = torch.tensor([[2.0, 3.0, 30.0, 41.0], [10.5, 9.0, W - 1, H - 2]])[:count]
        masks = torch.zeros(count, H, W, dtype=torch.uint8)
        for mask, box in zip(masks, boxes.int().tolist(), strict=True):
            mask[box[1] : box[3], box[0] : box[2]] = 1
        found.append({"boxes": boxes, "labels": torch.tensor([1, 10])[:count], "masks": masks})
    return found


def assert_trains(model, sizes=ODD, unused=()):
    """One backward pass: finite losses, a gradient for every parameter that wants one."""
    losses = model.train()(images(*sizes), targets(*sizes))
    assert all(loss.isfinite() and loss.ndim == 0 for loss in losses.values())
    sum(losses.values()).backward()
    without = [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert without == []
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)
    return losses


@torch.no_grad()
def assert_predicts(model, sizes=ODD):
    predictions = model.eval()(images(*sizes))
    for (H, W), found in zip(sizes, predictions, strict=True):
        count = len(found["scores"])
        assert count > 0
        assert found["boxes"].shape == (count, 4)
        assert found["boxes"].dtype == torch.float32
        x1, y1, x2, y2 = found["boxes"].unbind(1)
        assert all((a >= 0).all() and (a <= b).all() for a, b in ((x1, x2), (y1, y2)))
        assert x2.max() <= W + 1e-3
        assert y2.max() <= H + 1e-3
        assert found["labels"].shape == (count,)
        assert ((found["scores"] >= 0) & (found["scores"] <= 1)).all()
        if isinstance(model, MaskRCNN):
            assert found["masks"].shape == (count, 1, H, W)
    return predictions


NAMES = {
    "nat_atto": {},
    "resnet18": {},
    "test_vit": {"dynamic_img_size": True},
}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("build", DETECTORS)
def test_all_detectors(build, name):
    model = small(build, name, **NAMES[name])
    assert type(model) is DETECTORS[build]
    assert_trains(model)
    assert_predicts(model)


@pytest.mark.parametrize("name", [name for name in ATTOS if name != "nat_atto"])
def test_every_family(name):
    kwargs = {"img_size": (64, 96), "fixed_size": (96, 64)} if is_fixed(name) else {}
    model = small(retinanet, name, **kwargs)
    assert_trains(model)
    assert_predicts(model)


@pytest.mark.parametrize("build", [mask_rcnn, retinanet, fcos])
def test_form_for_detection(build):
    """The family's own norms: one per map that is used."""
    model = small(build, task="det")
    assert_trains(model)
    assert len(model.backbone.body.channels) == (4 if build is mask_rcnn else 3)


@pytest.mark.parametrize("build", [mask_rcnn, retinanet, fcos])
def test_images_without_boxes(build):
    model = small(build).train()
    for counts in ((0, 1), (0, 0)):
        losses = model(images(*ODD), targets(*ODD, counts=counts))
        assert all(loss.isfinite() for loss in losses.values())
        sum(losses.values()).backward()


# Pyramids, anchors, pooling


@pytest.mark.parametrize(
    ("name", "kwargs", "levels", "strides", "divisor"),
    [
        ("nat_atto", {}, "0 1 2 3 pool", (4, 8, 16, 32, 64), 32),
        ("nat_atto", {"one_stage": True}, "0 1 2 p6 p7", (8, 16, 32, 64, 128), 32),
        ("nat_atto", {"out_indices": (1, 2)}, "0 1 pool", (8, 16, 32), 16),
        ("nat_atto", {"out_indices": (-2, -1)}, "0 1 pool", (16, 32, 64), 32),
        ("resnet18", {}, "0 1 2 3 pool", (4, 8, 16, 32, 64), 32),
        ("resnet18", {"out_indices": (0, 1, 2)}, "0 1 2 pool", (2, 4, 8, 16), 8),
        ("agent_deit_atto", {}, "0 1 2 3 pool", (4, 8, 16, 32, 64), 32),
        ("agent_deit_atto", {"one_stage": True}, "0 1 2 p6 p7", (8, 16, 32, 64, 128), 32),
        ("test_vit", {"dynamic_img_size": True}, "0 1 2 3 pool", (4, 8, 16, 32, 64), 32),
    ],
)
@torch.no_grad()
def test_levels(name, kwargs, levels, strides, divisor):
    backbone = PyramidBackbone(name, fpn_channels=8, **kwargs).eval()
    assert backbone.levels == tuple(levels.split())
    assert (backbone.strides, backbone.size_divisible) == (strides, divisor)
    assert backbone.num_maps == sum(level.isdigit() for level in backbone.levels)
    size = 96 * divisor // 32, 160 * divisor // 32
    maps = backbone(images(size)[0][None])
    assert (*maps,) == backbone.levels
    for x, stride in zip(maps.values(), strides, strict=True):
        assert x.shape == (1, backbone.out_channels, *(-(-n // stride) for n in size))


@torch.no_grad()
@pytest.mark.parametrize("build", DETECTORS)
@pytest.mark.parametrize("kwargs", [{}, {"out_indices": (1, 2)}, {"out_indices": (2, 3)}])
def test_anchors_fit_the_maps(build, kwargs):
    model = small(build, size_divisible=256, **kwargs).eval()
    inputs, _ = model.transform(images((256, 256)))
    maps = model.backbone(inputs.tensors)
    generator = model.rpn.anchor_generator if hasattr(model, "rpn") else model.anchor_generator
    boxes = generator(inputs, [*maps.values()])[0]
    per_cell = generator.num_anchors_per_location()
    counts = [n * x[0, 0].numel() for n, x in zip(per_cell, maps.values(), strict=True)]
    sizes = {faster_rcnn: (8,), mask_rcnn: (8,), retinanet: (4, 5.04, 6.35), fcos: (1,)}[build]
    for level, stride in zip(boxes.split(counts), model.backbone.strides, strict=True):
        centres = (level[:, :2] + level[:, 2:]) / 2
        steps = centres[:: len(level) // (256 // stride) ** 2].reshape(-1, 256 // stride, 2)
        assert (steps.diff(dim=1) == torch.tensor([stride, 0])).all()
        areas = (level[:, 2:] - level[:, :2]).prod(1).sqrt()
        found = areas.reshape(256 // stride, -1)[0] / stride
        for size in sizes:
            assert ((found - size).abs() < 0.1 * size).any()
        assert found.min() > 0.9 * min(sizes)
        assert found.max() < 1.1 * max(sizes)


def test_pooling_does_not_depend_on_the_first_images():
    """torchvision itself takes a map of stride 4 for one of stride 2 after an image like this."""
    model = small(faster_rcnn, size=(40, 40)).eval()
    fresh = small(faster_rcnn, size=(40, 40)).eval()
    pool = model.roi_heads.box_roi_pool
    assert pool.scales == [1 / 4, 1 / 8, 1 / 16, 1 / 32]
    with torch.no_grad():
        model(images((40, 40)))
    for each in (model, fresh):
        each.transform.min_size, each.transform.max_size = (96,), 128
    expected, found = (each(images((96, 128)))[0] for each in (fresh, model))
    assert torch.equal(expected["boxes"], found["boxes"])
    assert torch.equal(expected["scores"], found["scores"])
    assert pool.scales == [1 / 4, 1 / 8, 1 / 16, 1 / 32]


def test_regions_are_pooled_where_they_lie():
    """Each level's map holds its own pixels' positions; each region comes back with its centre."""
    backbone = PyramidBackbone("nat_atto", out_indices=(1, 2, 3), fpn_channels=8)
    pool = heads._roi_pool(backbone, 7)
    maps = {}
    for level, stride in zip(backbone.levels, backbone.strides, strict=True):
        rows = torch.arange(1024 // stride) * float(stride)  # torchvision's: corners of cells
        place = torch.stack([rows[None].expand(len(rows), -1), rows[:, None].expand(-1, len(rows))])
        maps[level] = torch.cat([place, torch.full_like(place[:1], stride)])[None]
    sides = torch.tensor([20.0, 60, 111, 113, 223, 225, 447, 449, 900])
    centres = torch.tensor([[500.0, 480.0]]).expand(len(sides), 2)
    boxes = torch.cat([centres - sides[:, None] / 2, centres + sides[:, None] / 2], 1)
    found = pool(maps, [boxes], [(1024, 1024)]).mean((2, 3))
    assert (found[:, :2] - centres).abs().max() < 1
    assert found[:, 2].tolist() == [8, 8, 8, 8, 8, 16, 16, 32, 32]  # 224 pixels: stride 16


def test_what_follows_from_the_backbone():
    model = small(mask_rcnn, "vit_tiny_patch16_224", dynamic_img_size=True, depth=3)
    assert model.transform.image_mean == (0.5, 0.5, 0.5)
    assert small(fcos, image_mean=(0.1, 0.2, 0.3)).transform.image_mean == (0.1, 0.2, 0.3)
    own = small(fcos, "resnet18", out_indices=(2, 3), size_divisible=64, drop_path_rate=0.1)
    assert own.transform.size_divisible == 64
    assert own.backbone.body.strides == (8, 16)
    assert small(fcos, "resnet18", out_indices=(2, 3)).transform.size_divisible == 16


@pytest.mark.parametrize(
    ("build", "theirs"),
    [(mask_rcnn, maskrcnn_resnet50_fpn), (retinanet, retinanet_resnet50_fpn)],
)
def test_names_are_torchvisions(build, theirs):
    """All tensors but the backbone's own, so that heads of a released detector can be loaded."""
    with torch.device("meta"):
        expected = theirs(weights=None, weights_backbone=None, num_classes=CLASSES)
        found = build("resnet50", CLASSES)

    def outside(model):
        state = model.state_dict()
        return {k: v.shape for k, v in state.items() if not k.startswith("backbone.body.")}

    assert outside(found) == outside(expected)
    anchors = [
        m.rpn.anchor_generator if build is mask_rcnn else m.anchor_generator
        for m in (found, expected)
    ]
    assert anchors[0].sizes == anchors[1].sizes
    assert anchors[0].aspect_ratios == anchors[1].aspect_ratios


def test_equals_torchvisions_with_its_weights():
    """A ResNet-18 and heads with equal weights give equal predictions and losses."""
    kwargs = {**FEW, "min_size": 64, "max_size": 96}
    body = resnet_fpn_backbone(
        backbone_name="resnet18", weights=None, norm_layer=torch.nn.BatchNorm2d, trainable_layers=5
    )
    theirs = MaskRCNN(body, CLASSES, **kwargs)
    ours = mask_rcnn("resnet18", CLASSES, **kwargs)
    assert theirs.transform.size_divisible == ours.transform.size_divisible
    state = {
        k.replace("backbone.body.", "backbone.body.model."): v
        for k, v in theirs.state_dict().items()
    }
    missing, unexpected = ours.load_state_dict(state, strict=False)
    assert (missing, unexpected) == ([], [])
    inputs = images(*ODD)
    for a, b in zip(theirs.eval()(inputs), ours.eval()(inputs), strict=True):
        for key, value in a.items():
            torch.testing.assert_close(b[key], value)
    expected, found = (
        (torch.manual_seed(3), model.train()(inputs, targets(*ODD)))[1] for model in (theirs, ours)
    )
    torch.testing.assert_close(found, expected)


# Training


def test_frozen_stages():
    model = small(faster_rcnn, frozen_stages=2)
    assert_trains(model)
    levels = model.backbone.body.model.model.levels
    assert not any(p.requires_grad for level in levels[:2] for p in level.parameters())
    assert all(p.requires_grad for level in levels[2:] for p in level.parameters())
    assert not any(
        p.requires_grad for p in small(fcos, frozen_stages=True).backbone.body.parameters()
    )


def test_frozen_batch_norm():
    """torchvision's rule: constants where weights are loaded."""
    plain = small(fcos, "resnet18")
    state = plain.backbone.body.model.state_dict()
    assert any(key.endswith("num_batches_tracked") for key in state)
    loaded = small(fcos, "resnet18", checkpoint=plain.backbone.body.state_dict())
    before = copy.deepcopy(loaded.state_dict())
    assert_trains(loaded)
    after = loaded.state_dict()
    assert all(torch.equal(after[key], value) for key, value in before.items())
    assert not any("num_batches_tracked" in key for key in after)
    kept = small(fcos, "resnet18", checkpoint=state, frozen_batch_norm=False)
    assert any(key.endswith("num_batches_tracked") for key in kept.state_dict())


def test_checkpoint_of_the_backbone():
    trained = small(retinanet, task="det").backbone.body
    with torch.no_grad():
        for parameter in trained.parameters():
            parameter.add_(0.5)
    model = small(retinanet, task="det", checkpoint=trained.state_dict())
    for key, value in trained.state_dict().items():
        assert torch.equal(model.state_dict()[f"backbone.body.{key}"], value)


def test_gradient_checkpointing():
    losses, gradients = [], []
    for enable in (False, True):
        model = small(retinanet).double()
        model.backbone.set_grad_checkpointing(enable)
        sizes = [(64, 96), (64, 64)]
        found = model.train()([x.double() for x in images(*sizes)], targets(*sizes))
        sum(found.values()).backward()
        losses.append({key: value.detach() for key, value in found.items()})
        gradients.append([p.grad for p in model.parameters()])
    torch.testing.assert_close(*losses)
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("build", [mask_rcnn, retinanet, fcos])
def test_bf16_autocast(build):
    """Anchors, boxes and losses are float32: bf16 has steps of 4 pixels from 512 on."""
    model = small(build, size=(32, 992))
    wide = [(32, 992), (30, 930)]
    with torch.autocast("cpu", torch.bfloat16):
        losses = assert_trains(model, wide)
        maps = model.backbone(images((32, 64))[0][None])
        found = assert_predicts(model, wide)
    assert all(loss.dtype == torch.float32 for loss in losses.values())
    assert all(x.dtype == torch.float32 for x in maps.values())
    generator = model.rpn.anchor_generator if hasattr(model, "rpn") else model.anchor_generator
    assert all(x.dtype == torch.float32 for x in generator.cell_anchors)
    far = torch.cat([prediction["boxes"] for prediction in found])
    assert (far != far.bfloat16()).any()


def test_compiled_and_exported():
    model = small(retinanet).eval()
    with torch.no_grad():
        expected = model(images(*ODD))
        maps = model.backbone(torch.ones(2, 3, 64, 96))
        exported = torch.export.export(model.backbone, (torch.zeros(2, 3, 64, 96),))
        for key, value in exported.module()(torch.ones(2, 3, 64, 96)).items():
            torch.testing.assert_close(value, maps[key], atol=1e-5, rtol=1e-5)
        torch._dynamo.reset()
        model.backbone.compile(backend="eager", fullgraph=True)
        found = model(images(*ODD))
    for one, two in zip(found, expected, strict=True):
        for key, value in one.items():
            torch.testing.assert_close(value, two[key], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("build", [mask_rcnn, fcos])
def test_state_copies_and_pickles(build):
    model = small(build).eval()
    other = small(build)
    torch.manual_seed(7)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.normal_()
    other.load_state_dict(model.state_dict())
    expected = model(images(*ODD))
    for again in (other, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        for a, b in zip(expected, again.eval()(images(*ODD)), strict=True):
            assert all(torch.equal(value, b[key]) for key, value in a.items())


# Scenes


def test_scenes_as_targets():
    scenes = Scenes("train", 3, (96, 128))
    found = TorchvisionScenes(scenes)
    assert len(found) == 3
    for index, scene in enumerate(scenes[i] for i in range(3)):
        image, target = found[index]
        assert image.shape == (3, 96, 128)
        assert (image.mul(255).round().permute(1, 2, 0).numpy() == scene.image).all()
        assert target["labels"].tolist() == (scene.labels + 1).tolist()
        assert target["image_id"] == index
        for mask, box, area in zip(target["masks"], target["boxes"], target["area"], strict=True):
            ys, xs = mask.nonzero().unbind(1)
            corners = [xs.min(), ys.min(), xs.max() + 1, ys.max() + 1]
            assert box.tolist() == [x.item() for x in corners]
            assert area == mask.sum()
    with pytest.raises(IndexError):
        found[3]


@pytest.mark.parametrize("build", [mask_rcnn, fcos])
def test_learns_a_few_scenes(build):
    few = [TorchvisionScenes(Scenes("train", 2, (64, 64)))[i] for i in range(2)]
    batch = [list(x) for x in zip(*few, strict=True)]
    model = small(build, size=(64, 64)).train()
    optimizer = torch.optim.AdamW(model.parameters(), 2e-3)
    totals = []
    for _ in range(8):
        loss = sum(model(*batch).values())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 5.0)
        optimizer.step()
        totals.append(loss.item())
    assert sum(totals[-2:]) < 0.7 * sum(totals[:2])


# Mistakes


@pytest.mark.parametrize(
    ("build", "arguments", "kwargs", "message"),
    [
        (
            mask_rcnn,
            ("nat_mni", 5),
            {},
            r"name: expected .* got 'nat_mni'; did you mean .*nat_mini",
        ),
        (fcos, ("nat_atto", 1), {}, "num_classes: expected at least 2, .*background, got 1"),
        (fcos, ("nat_atto", 5), {"scor_thresh": 0.1}, "'scor_thresh'; did you mean .*score_thresh"),
        (mask_rcnn, ("nat_atto", 5), {"task": "cls"}, "task: expected .* got 'cls'"),
        (
            mask_rcnn,
            ("nat_atto", 5),
            {"fpn_channels": 0},
            "fpn_channels: expected at least 1, got 0",
        ),
        (mask_rcnn, ("nat_atto", 5), {"frozen_stages": 5}, "frozen_stages: .* 0 to 4, got 5"),
        (mask_rcnn, ("nat_atto", 5), {"out_indices": (0, 4)}, r"out_indices: .* got \(0, 4\)"),
        (mask_rcnn, ("nat_atto", 5), {"out_indices": (0, 2)}, r"strides double .*\(4, 16\)"),
        (mask_rcnn, ("agent_deit_atto", 5), {"out_indices": (1, 2)}, "out_indices: .* one index"),
        (
            fcos,
            ("test_vit", 5),
            {"patch_size": 14, "img_size": 56},
            "stride: .* of two .* 8 and 14",
        ),
        (
            mask_rcnn,
            ("nat_atto", 5),
            {"backbone": "nat_atto"},
            "unexpected keyword argument 'backbone'",
        ),
    ],
)
def test_mistakes(build, arguments, kwargs, message):
    with pytest.raises(ValueError, match=message):
        build(*arguments, **kwargs)


def test_boxes_without_size_are_refused():
    target = targets((64, 64), counts=(1,))
    target[0]["boxes"] = torch.tensor([[30.0, 3.0, 2.0, 41.0]])
    with pytest.raises(AssertionError, match="positive height and width"):
        small(retinanet).train()(images((64, 64)), target)


# Documents


def test_page(capsys):
    """The example with fewer steps and regions."""
    page = (Path(__file__).parents[2] / "docs" / "detection.md").read_text(encoding="utf-8")
    section = page.partition("## With torchvision\n")[2]
    (code,) = re.findall(r"^```python\n(.*?)^```$", section, re.MULTILINE | re.DOTALL)
    for name, value in {"STEPS ": 2, "box_batch_size_per_image": 4, "top_n_test": 10}.items():
        code, count = re.subn(rf"{name}= ?\d+", f"{name}={value}", code)
        assert count == 1
    session = {}
    exec(compile(code, "docs/detection.md", "exec"), session)
    assert len(session["found"]["boxes"]) == len(capsys.readouterr().out.splitlines())
    assert all(loss.isfinite() for loss in session["losses"].values())


def test_docstrings():
    assert doctest.testmod(heads).failed == 0
