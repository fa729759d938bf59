"""Tasks: what segmentation moves together, what a probe leaves alone, and timm's numbers."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from timm.utils import AverageMeter, ModelEmaV3, accuracy

from vitarium.training.config import SegmentationAugmentConfig
from vitarium.training.data import Batch, seeded
from vitarium.training.engine import Engine, create_optimizer, create_scheduler
from vitarium.training.states import Average
from vitarium.training.tasks import (
    Classification,
    classification_counts,
    classification_measures,
    create_task,
)
from vitarium.training.transforms import MapTransform, Preprocessing

pytest.importorskip("accelerate")
PLAIN = Preprocessing((0.0, 0.0, 0.0), (1.0, 1.0, 1.0), 1.0)


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    """Pictures of two halves, of several sizes, whose maps say which half is which."""
    root = tmp_path_factory.mktemp("scenes")
    rng = np.random.default_rng(0)
    for split, sizes in (("train", [(40, 52)] * 6), ("val", [(40, 52), (33, 61), (32, 32)])):
        for kind in ("images", "annotations"):
            (root / kind / split).mkdir(parents=True)
        for i, (height, width) in enumerate(sizes):
            target = np.zeros((height, width), np.uint8)
            target[:, rng.integers(10, width - 10) :] = 1
            target[:3] = 255
            pixels = np.where(target[..., None] == 1, (220, 40, 30), (20, 60, 200))
            pixels = (pixels + rng.normal(0, 10, pixels.shape)).clip(0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(root / "images" / split / f"{i}.png")
            Image.fromarray(target).save(root / "annotations" / split / f"{i}.png")
    return root


@pytest.fixture
def segmentation(make_config, scenes):
    """The config, of a segmenter of two halves."""

    def make(**changes):
        return make_config(
            **{
                "task": "segmentation",
                "model__name": "nat_atto",
                "model__kwargs": {},
                "data__root": str(scenes),
                "data__classes": ["left", "right"],
                "augment": {"scale": [0.8, 1.5]},
                "head": {"channels": 8, "auxiliary_channels": 8, "name": "semantic_fpn"},
                "train__batch_size": 2,
                "schedule__updates": 2,
                "schedule__warmup_updates": 0,
                **changes,
            }
        )

    return make


@pytest.mark.parametrize("size", [(24, 40), (64, 48)])
def test_an_image_and_its_map_move_together(size):
    rng = np.random.default_rng(1)
    numbers = rng.integers(1, 5, (5, 7)).repeat(9, 0).repeat(9, 1).astype(np.uint8)
    target = Image.fromarray(numbers)
    image = Image.merge("RGB", [target] * 3)
    augment = SegmentationAugmentConfig(scale=(0.6, 1.7), hflip=0.5)
    transform = MapTransform(augment, size, PLAIN, training=True, ignore_index=255)
    padded = cropped = flipped = 0
    for i in range(24):
        with seeded(3, i):
            pixels, labels = transform((image, target))
        assert pixels.shape == (3, *size)
        assert labels.shape == size
        inside = labels != 255
        assert not pixels[:, ~inside].any()
        padded += bool((~inside).any())
        cropped += bool(inside.all())
        # Away from edges between numbers, which only the image's interpolation blurs.
        steady = torch.nn.functional.max_pool2d(labels[None].float(), 5, 1, 2)[0] == labels
        steady &= -torch.nn.functional.max_pool2d(-labels[None].float(), 5, 1, 2)[0] == labels
        steady[:3] = steady[-3:] = steady[:, :3] = steady[:, -3:] = False  # what lies beyond?
        found = (255 * pixels[0]).round().long()
        assert torch.equal(found[steady & inside], labels[steady & inside])
        assert (steady & inside).sum() > 20
        with seeded(3, i):
            straight, _ = MapTransform(
                SegmentationAugmentConfig(scale=(0.6, 1.7), hflip=0.0), size, PLAIN, True, 255
            )((image, target))
        flipped += not torch.equal(straight, pixels)
    assert flipped not in (0, 24)
    assert padded if size == (64, 48) else cropped


def test_crops_do_not_show_one_class_alone():
    numbers = np.zeros((40, 400), np.uint8)
    numbers[:, 200:] = 1
    pair = Image.new("RGB", (400, 40)), Image.fromarray(numbers)

    def shares(most):
        augment = SegmentationAugmentConfig(category_max=most)
        transform = MapTransform(augment, (40, 100), PLAIN, training=True, ignore_index=255)
        for i in range(40):
            with seeded(0, i):
                yield float((transform(pair)[1] == 0).float().mean())

    assert sum(share in (0, 1) for share in shares(0.75)) < sum(
        share in (0, 1) for share in shares(1.0)
    )


def test_the_longer_side_is_bounded_too():
    augment = SegmentationAugmentConfig(resize=(32, 50))
    transform = MapTransform(augment, (32, 32), PLAIN, training=False, ignore_index=255)
    pixels, labels = transform((Image.new("RGB", (200, 64)), Image.new("L", (200, 64))))
    assert pixels.shape == (3, 16, 50)
    assert labels.shape == (64, 200)  # as it is: the prediction is scaled, not the truth


@pytest.mark.parametrize(
    "changes",
    [
        {"augment": {"resize": [32, 64]}},
        {"head": {"channels": 8, "predict": "slide", "stride": [20, 20], "norm": "layernorm2d"}},
        {"head": {"channels": 8, "class_weight": [0.5, 2.0], "dice_weight": 1.0}},
    ],
    ids=["scaled", "slide", "weights"],
)
def test_segmenters_train_and_count_every_pixel(segmentation, tmp_path, changes):
    with Engine(segmentation(**changes), "cpu") as engine:
        measures = engine.train(tmp_path / "run")
        assert set(measures) == {"mIoU", "aAcc", "IoU/left", "IoU/right"}
        found = sum(
            int(engine._task.counts(engine._model.eval(), batch).sum())
            for batch in batches_of(engine)
        )
    assert found == sum(w * (h - 3) for h, w in ((40, 52), (33, 61), (32, 32)))


def batches_of(engine):
    from vitarium.training.data import validation_batches

    task = engine._task
    layout = task.validation_layout(engine._layout)
    with torch.no_grad():
        yield from validation_batches(
            task.val, task.transform(training=False), layout, workers=0, strict=True
        )


def test_slide_equals_whole_where_one_window_is_enough(segmentation):
    whole = create_task(segmentation())
    head = {"channels": 8, "auxiliary_channels": 8, "name": "semantic_fpn"}
    slide = create_task(segmentation(head={**head, "predict": "slide", "stride": [32, 32]}))
    batch = Batch(torch.randn(1, 3, 32, 32), torch.zeros(1, 32, 32, dtype=torch.long))
    with torch.no_grad():
        assert torch.equal(
            whole.counts(whole.model.eval(), batch), slide.counts(slide.model.eval(), batch)
        )


def test_frozen_stages_stay_and_heads_have_their_rate(segmentation, tmp_path):
    head = {"channels": 8, "freeze": 2, "lr_factor": 10.0}
    config = segmentation(head=head, ema=None, optimizer__weight_decay=0.1)
    task = create_task(config)
    optimizer = create_optimizer(config, task.parameters(0.1), images=2)
    create_scheduler(config, optimizer, images=2, updates=2, epoch=1.0).step_update(0)
    of = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    for name, parameter in task.model.named_parameters():
        if not parameter.requires_grad:
            assert id(parameter) not in of
            continue
        group = of[id(parameter)]
        assert group["lr"] == pytest.approx(1e-3 * (1 if name.startswith("backbone.") else 10))
        if parameter.ndim < 2:
            assert group["weight_decay"] == 0
    with Engine(config, "cpu") as engine:
        engine.train(tmp_path / "run")
    after = load_file(tmp_path / "run" / "last.safetensors")
    before = task.model.state_dict()
    frozen = {n for n, p in task.model.named_parameters() if not p.requires_grad}
    assert frozen
    assert all(torch.equal(after[name], before[name]) for name in frozen)
    moved = {name for name in before if not torch.equal(after[name], before[name])}
    assert any(name.startswith("backbone.") for name in moved)


def probing(make_config, **changes):
    given = {"task": "probing", "model__name": "nat_atto", "model__kwargs": {}}
    given |= {"probe": {"pooling": "ep", "kwargs": {"num_queries": 8}}, "ema": None}
    return make_config(**given | changes)


def test_muon_leaves_position_tables_to_adamw(make_config, segmentation):
    optimizer = {"name": "muon", "lr": 1e-3, "weight_decay": 0.1}
    kwargs = {"kwargs": {}, "name": "nat_atto"}
    for config in (
        make_config(optimizer=optimizer, model=kwargs, data__image_size=64),
        segmentation(optimizer=optimizer),
    ):
        task = create_task(config)
        found = create_optimizer(config, task.parameters(0.1), images=2)
        of = {id(p): group for group in found.param_groups for p in group["params"]}
        tables = {n: p for n, p in task.model.named_parameters() if n.endswith(".rpb")}
        assert tables
        assert all(of[id(p)]["use_fallback"] for p in tables.values())
        shape = (2,) if config.task == "classification" else (2, 64, 64)
        batch = Batch(torch.rand(2, 3, 64, 64), torch.zeros(shape, dtype=torch.long))
        task.losses(task.model, batch)["loss"].backward()
        found.step()
        for name, parameter in task.model.named_parameters():
            if parameter.ndim == 2 and min(parameter.shape) >= 8:
                assert "exp_avg_sq" not in found.state[parameter], name
        assert all("exp_avg_sq" in found.state[p] for p in tables.values())


@pytest.mark.parametrize("average", [None, {"decay": 0.5}])
def test_a_probe_leaves_its_backbone_alone(make_config, tmp_path, average):
    config = probing(make_config, ema=average, model__name="test_resnet")  # which has batch norms
    with Engine(config, "cpu") as engine:
        before = {k: v.clone() for k, v in engine._model.backbone.state_dict().items()}
        engine.train(tmp_path / "run")
        after = engine._model.backbone.state_dict()
        assert all(torch.equal(after[name], before[name]) for name in before)
        head = engine._model.head.state_dict()
    for name in ("best", "last"):
        assert load_file(tmp_path / "run" / f"{name}.safetensors").keys() == head.keys()
    with Engine(config, "cpu") as engine:
        engine.load(tmp_path / "run" / "best.safetensors")
        assert engine.test()["images"] == 15


@pytest.mark.parametrize("classes", [3, 12])
def test_measures_are_timms(classes):
    torch.manual_seed(0)
    top1, top5, loss = AverageMeter(), AverageMeter(), AverageMeter()
    total = 0
    for count in (7, 4, 1):
        logits, targets = torch.randn(count, classes), torch.randint(classes, (count,))
        one, five = accuracy(logits, targets, topk=(1, 5))
        top1.update(one.item(), count)
        top5.update(five.item(), count)
        loss.update(torch.nn.functional.cross_entropy(logits, targets).item(), count)
        total = total + classification_counts(logits, targets)
    found = classification_measures(total)
    assert found["top1"] == pytest.approx(top1.avg)
    assert found["top5"] == pytest.approx(top5.avg)
    assert found["loss"] == pytest.approx(loss.avg)
    assert found["images"] == 12


def test_columns_are_timms(make_config):
    task = create_task(make_config(augment__interpolation="random"))
    row = task.row({"top1": 61.23456, "top5": 90.0, "loss": 1.0, "images": 15.0})
    theirs = ["model", "top1", "top1_err", "top5", "top5_err", "param_count", "img_size"]
    assert [*row][:9] == [*theirs, "crop_pct", "interpolation"]
    assert (row["top1"], row["top1_err"], row["interpolation"]) == (61.235, 38.765, "bicubic")


@pytest.mark.parametrize("warmup", [False, True])
def test_the_average_is_timms(warmup):
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4))
    theirs = ModelEmaV3(model, decay=0.7, use_warmup=warmup)
    ours = Average(model, 0.7, warmup)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for update in range(1, 7):
        (model(torch.randn(5, 3)) * torch.randn(5, 4)).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        theirs.update(model, step=update)
        ours.update(model, update)
        for name, value in theirs.module.state_dict().items():
            torch.testing.assert_close(ours.values[name], value)
    assert ours.values["1.num_batches_tracked"] == 6
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with ours.applied(model):
        assert not torch.equal(model[0].weight, before["0.weight"])
    assert all(torch.equal(model.state_dict()[name], before[name]) for name in before)


def test_rates_are_those_of_timms_script(make_config):
    from timm.scheduler import create_scheduler_v2

    config = make_config(
        schedule__updates=None, schedule__warmup_updates=None, schedule__epochs=4,
        schedule__warmup_epochs=1, schedule__warmup_lr=1e-5, schedule__min_lr=1e-6,
    )  # fmt: skip
    optimizers = [torch.optim.SGD([torch.zeros(1)], lr=1e-3) for _ in range(2)]
    ours = create_scheduler(config, optimizers[0], images=4, updates=24, epoch=6.0)
    theirs, _ = create_scheduler_v2(
        optimizers[1], sched="cosine", num_epochs=4, warmup_epochs=1, warmup_lr=1e-5, min_lr=1e-6,
        step_on_epochs=False, updates_per_epoch=6,
    )  # fmt: skip
    for update in range(24):  # the script: a step, then step_update with the number of steps done
        ours.step_update(update)
        rates = [optimizer.param_groups[0]["lr"] for optimizer in optimizers]
        assert rates[0] == pytest.approx(rates[1])
        theirs.step_update(update + 1)


MODES = {
    "bf16, channels last": {"train__precision": "bf16", "train__channels_last": True},
    "checkpointing": {"train__grad_checkpointing": True},
    "mixed, bce": {"loss__kind": "bce", "loss__mixup": 0.5, "train__precision": "bf16"},
}


@pytest.mark.parametrize("changes", MODES.values(), ids=MODES)
def test_modes_change_little(make_config, tmp_path, changes):
    base = {"schedule__updates": 3, "model__name": "nat_atto", "model__kwargs": {}}
    ends = []
    plain = {k: v for k, v in changes.items() if not k.startswith("train__")}
    for name, given in (("plain", plain), ("mode", changes)):
        with Engine(make_config(**base, **given), "cpu") as engine:
            engine.train(tmp_path / name)
        ends.append(load_file(tmp_path / name / "last.safetensors"))
    assert all(value.dtype == ends[0][name].dtype for name, value in ends[1].items())
    for name, value in ends[1].items():
        torch.testing.assert_close(value, ends[0][name], atol=5e-3, rtol=0)


@pytest.mark.slow
@pytest.mark.parametrize("task", ["classification", "segmentation"])
def test_compiled_with_an_average(make_config, segmentation, tmp_path, task, monkeypatch):
    """Graphs, guards and gradients are compile's own; what machine code does, other tests see."""
    compile_ = torch.nn.Module.compile
    monkeypatch.setattr(
        torch.nn.Module, "compile", lambda self: compile_(self, backend="aot_eager")
    )
    make = make_config if task == "classification" else segmentation
    changes = {"schedule__updates": 3, "schedule__warmup_updates": 0, "ema__decay": 0.5}
    ends = []
    for compiled in (False, True):
        with Engine(make(train__compile=compiled, **changes), "cpu") as engine:
            engine.train(tmp_path / str(compiled))
        ends.append(load_file(tmp_path / str(compiled) / "last.safetensors"))
    assert ends[0].keys() == ends[1].keys()
    for name, value in ends[1].items():
        torch.testing.assert_close(value, ends[0][name], atol=2e-3, rtol=1e-3)


def test_losses_are_float32_under_bf16(make_config):
    task = create_task(make_config())
    assert isinstance(task, Classification)
    batch = Batch(torch.randn(2, 3, 32, 32), torch.tensor([0, 1]))
    with torch.autocast("cpu", torch.bfloat16):
        assert task.model(batch.images).dtype == torch.bfloat16
        assert task.losses(task.model, batch)["loss"].dtype == torch.float32


def test_a_blank_batch_counts_nothing(make_config, segmentation):
    for config in (make_config(), segmentation(), probing(make_config)):
        task = create_task(config)
        with torch.no_grad():
            assert not task.counts(task.model.eval(), task.blank()).any()
