"""Bad input: one clear error before training starts, and nothing written."""

from __future__ import annotations

import pytest

pytest.importorskip("mmdet")

import json
import re
import shutil
from pathlib import Path

import mmdet
from mmengine.config import Config
from small import detector

from vitarium.detection import checks
from vitarium.detection.configs import load_config
from vitarium.detection.runner import train


@pytest.fixture
def data(scenes, tmp_path):
    """A copy of the scenes, and the content of their annotations."""
    root = tmp_path / "data"
    shutil.copytree(scenes, root)
    return root, json.loads((root / "annotations" / "instances_train.json").read_text())


@pytest.fixture
def make(data, tmp_path):
    """A config on that copy, with other annotations and other lines behind it."""
    root, content = data

    def made(lines: str = "", text: str | None = None, masks: bool = False) -> Config:
        text = json.dumps(content) if text is None else text
        (root / "annotations" / "instances_train.json").write_text(text)
        path = tmp_path / "made.py"
        path.write_text(detector(root, masks) + lines)
        return load_config(path)

    return made


def refused(config, match):
    with pytest.raises(ValueError, match=match):
        checks.check_training(config)


def test_good_data_pass(make, data):
    assert checks.check_training(make()) == []
    assert checks.check_training(make(masks=True)) == []
    data[1]["annotations"] = [x for x in data[1]["annotations"] if x["image_id"] != 1]
    (said,) = checks.check_training(make())
    assert said.endswith("1 of 8 images have no box and are left out")
    keep = 'train_dataloader["dataset"]["filter_cfg"] = dict(filter_empty_gt=False)'
    (said,) = checks.check_training(make(keep))
    assert said.endswith("1 of 8 images have no box and count as background")


def test_annotations_that_are_not_there_or_damaged(make, data):
    content = data[1]
    refused(make(text='{"images": ['), r"ann_file: .*instances_train.json is damaged: .*column")
    refused(make(text="[]"), "has no list of images, as COCO's format has")
    refused(make('train_dataloader["dataset"]["ann_file"] = "x.json"'), "expected a file, .*x.json")
    refused(make('val_evaluator["ann_file"] = "y.json"'), "val_evaluator.ann_file: .*y.json")
    content["images"] = []
    refused(make(), "expected images, .* has none")


BOXES = {
    "negative size": ({"bbox": [3, 4, -5, 6]}, r"annotation 1: bbox: .*\[3, 4, -5, 6\]"),
    "not finite": ({"bbox": [3, float("nan"), 5, 6]}, "annotation 1: bbox: "),
    "three numbers": ({"bbox": [3, 4, 5]}, "annotation 1: bbox: "),
    "no list": ({"bbox": None}, "annotation 1: bbox: "),
    "another image": ({"image_id": 99}, "annotation 1: its image 99 is not there"),
    "another category": ({"category_id": 99}, "annotation 1: its category 99 is not there"),
}


@pytest.mark.parametrize(("change", "match"), BOXES.values(), ids=BOXES)
def test_boxes(make, data, change, match):
    data[1]["annotations"][0].update({"id": 1, **change})
    refused(make(), match)


def test_annotations_without_what_is_wanted(make, data):
    annotations = data[1]["annotations"]
    kept = annotations[0].pop("area")
    refused(make(), "expected area, found none")
    annotations[0]["area"] = kept
    annotations[0].pop("segmentation")
    refused(make(masks=True), r"expected a mask \(segmentation\), found none")
    data[1]["annotations"] = []
    refused(make(), "expected boxes of 0, 1, 2 and 7 more, no image has any")


def test_classes(make, data):
    head = 'model["bbox_head"]["num_classes"] = 80'
    refused(make(head), r"model.bbox_head.num_classes: expected 10, .*train_dataloader.*got 80")
    heads = 'model["roi_head"]["mask_head"]["num_classes"] = 9'
    refused(make(heads, masks=True), "model.roi_head.mask_head.num_classes: expected 10")
    default = 'train_dataloader["dataset"]["metainfo"] = None; model["bbox_head"]["num_classes"]=80'
    refused(make(default), "expected categories person, bicycle, car and 77 more, it has 0, 1, 2")
    one = 'train_dataloader["dataset"]["metainfo"] = dict(classes=("0"))'
    refused(make(one), r"metainfo.classes: expected a tuple of names, got '0'")
    file = data[0] / "classes.txt"
    file.write_text("\n".join("0123456789"))
    named = f'train_dataloader["dataset"]["metainfo"] = dict(classes="{file}")'
    assert checks.check_training(make(named)) == []


def test_images_that_are_not_there(make, data):
    (data[0] / "train" / data[1]["images"][3]["file_name"]).unlink()
    refused(make(), f"no {data[1]['images'][3]['file_name']} there")


def test_semantic_maps_that_are_wanted(make, data):
    lines = "train_dataloader['dataset']['pipeline'][1].update(with_seg=True)\n"
    lines += "train_dataloader['dataset']['data_prefix']['seg'] = 'maps/'\n"
    refused(make(lines), r"expected semantic maps in .*maps, no 000000.png there")
    shutil.copytree(data[0] / "train", data[0] / "maps")
    assert checks.check_training(make(lines)) == []


def test_configs_that_would_be_ignored_or_misread(make):
    for lines, match in (
        ("train_cfg = dict(type='MyLoop', max_epochs=1)", "train_cfg.type: expected Epoch"),
        ("train_cfg = dict(by_epoch=False, max_epochs=1)", "train_cfg: expected max_iters and no"),
        ("runner_type = 'FlexibleRunner'", "runner_type: expected Runner"),
        ("randomness['diff_rank_seed'] = True", "diff_rank_seed: expected False"),
        ("default_hooks['checkpoint'] = None", "checkpoint: expected a CheckpointHook, got None"),
        ("default_hooks['checkpoint']['out_dir'] = 'x'", "checkpoint.out_dir: expected none"),
        ("compile = 'max-autotune'", "compile: expected True, False or what torch.compile takes"),
        ("resume = True", "resume: expected none, got True; --resume says that"),
        ("work_dir = 'x'", "work_dir: expected none, got 'x'; --output says that"),
        ("optim_wrapper = dict(constructor='Two')", "optim_wrapper: expected one optimizer"),
        ("del optim_wrapper", "expected optim_wrapper, found none"),
        ("train_dataloader['dataset']['type'] = 'CoccoDataset'", "did you mean CocoDataset"),
    ):
        refused(make(lines), match)


def test_a_config_of_mmdet_2_is_told_what_to_change(tmp_path):
    path = tmp_path / "old.py"
    path.write_text(
        "model = dict(type='RetinaNet')\ndata = dict(samples_per_gpu=2)\noptimizer = dict()\n"
        "runner = dict(max_epochs=12)\nevaluation = dict(metric='bbox')\n"
    )
    with pytest.raises(
        ValueError, match="a config of mmdet 2.x; change data -> train_data"
    ) as info:
        checks.check_training(load_config(path))
    for old in ("optimizer -> ", "runner -> train_cfg", "evaluation -> val_evaluator"):
        assert old in str(info.value)


BUILT = {
    "near names of backbones": (
        'model["backbone"]["name"] = "nat_ato"',
        r"expected a model of vitarium or timm, got 'nat_ato'; did you mean nat_atto",
    ),
    "near kinds of backbones": (
        'model["backbone"] = dict(type="ResNett", depth=50)',
        "ResNett is not in the .*did you mean ResNet",
    ),
    "near transforms": (
        'pipeline[2]["type"] = "RandomFlipp"',
        "RandomFlipp is not in the .*did you mean RandomFlip",
    ),
    "an argument that a class has not": (
        'model["neck"]["channels"] = 3',
        "unexpected keyword argument 'channels'",
    ),
    "channels": (
        'model["neck"]["in_channels"] = [24, 48, 96, 192]',
        r"neck.in_channels: expected \[32, 64, 128, 256\]",
    ),
}


@pytest.mark.parametrize(("lines", "match"), BUILT.values(), ids=BUILT)
def test_what_nobody_has_is_told_with_what_is_near_it(make, tmp_path, lines, match):
    config = make(lines)
    with pytest.raises(ValueError, match=match):
        train(Path(config.filename), tmp_path / "run", device="cpu")
    assert not (tmp_path / "run" / "config.json").exists()  # a second try needs no other folder


def test_configs_that_cannot_be_run(tmp_path):
    path = tmp_path / "broken.py"
    with pytest.raises(ValueError, match="broken.py: cannot read this config"):
        load_config(path)
    path.write_text("x = (")
    with pytest.raises(ValueError, match="broken.py: cannot be run: .*SyntaxError"):
        load_config(path)
    path.write_text("x = 1 / 0")
    with pytest.raises(ValueError, match="broken.py: cannot be run: ZeroDivisionError"):
        load_config(path)


def test_overrides(config):
    changes = ["model.bbox_head.num_classes=3", "train_cfg.max_epochs=2", "load_from=a.pth"]
    changes += ["model.neck.in_channels=[1, 2]", "auto_scale_lr.enable=true"]
    changed = load_config(config, changes)
    assert changed.model.bbox_head.num_classes == 3
    assert changed.train_cfg == {"type": "EpochBasedTrainLoop", "max_epochs": 2}
    assert changed.load_from == "a.pth"
    assert changed.model.neck.in_channels == [1, 2]
    assert changed.auto_scale_lr.enable is True
    with pytest.raises(ValueError, match=r"got 'trian_cfg'; did you mean .*train_cfg"):
        load_config(config, ["trian_cfg.max_epochs=2"])
    with pytest.raises(ValueError, match="--set: expected key=value, got 'model'"):
        load_config(config, ["model"])


# What stands in mmdet's folder of configs and cannot be trained as it is, by what is said of it.
NOT_TRAINABLE = (
    r"expected (model|train_dataloader|optim_wrapper).*, found none",  # parts, and trackers
    r"cannot be run: .*mmpretrain",
    r"cannot read this config",  # its base is not there
    r"train_dataloader.batch_size: expected",  # data alone
    r"ann_file: expected a file, .*\.odgt is not there",
)


@pytest.mark.slow
def test_mmdets_own_configs_are_not_refused(monkeypatch):
    def wanted(path, where):
        raise FileNotFoundError(path)

    monkeypatch.setattr(checks, "_annotations", wanted)
    folder = Path(mmdet.__file__).parent / ".mim" / "configs"
    paths = [x for x in sorted(folder.rglob("*.py")) if "_base_" not in x.parts]
    wrong, passed = [], 0
    for path in paths:
        try:
            checks.check_training(load_config(path))
        except FileNotFoundError:
            passed += 1
        except ValueError as error:
            if not any(re.search(pattern, str(error)) for pattern in NOT_TRAINABLE):
                wrong.append(f"{path.relative_to(folder)}: {error}")
        else:
            passed += 1
    assert wrong == []
    assert passed > 700
