"""The configs of detectors that ship: what they say, and that each kind of them trains."""

from __future__ import annotations

import ast
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("mmdet")

import detectors
from detectors import FILES, GOLDENS, RECIPES, built, entry_of, head_of, parsed, shrunk, step

import vitarium.heads.mmdet
import vitarium_cli
from vitarium.backbones._registry import entries
from vitarium.heads.features import FeatureBackbone
from vitarium.tools import detection_recipes, recipes

NAMES = [*FILES]
EACH = detectors.of_each("head", "family")
# Millions of parameters, as the authors' READMEs have them.
PUBLISHED = {
    "mask_rcnn": {
        "nat_mini": 40, "nat_tiny": 48, "nat_small": 70, "dinat_mini": 40, "dinat_tiny": 48,
        "dinat_small": 70, "dinat_s_tiny": 48, "dinat_s_small": 69, "agent_swin_tiny": 48,
        "agent_swin_small": 69, "agent_pvt_tiny": 31, "agent_pvt_small": 40,
        "agent_pvt_medium": 56, "agent_pvt_large": 68, "fused_davit_tiny": 47.8,
        "fused_davit_small": 69.2, "fused_davit_base": 107.3,
        "fused_swin_tiny_patch4_window7_224": 48, "fused_swin_small_patch4_window7_224": 69,
    },
    "cascade_mask_rcnn": {
        "nat_mini": 77, "nat_tiny": 85, "nat_small": 108, "nat_base": 147, "dinat_mini": 77,
        "dinat_tiny": 85, "dinat_small": 108, "dinat_base": 147, "dinat_large": 258,
        "dinat_s_tiny": 86, "dinat_s_small": 107, "dinat_s_base": 145, "dinat_s_large": 253,
        "agent_swin_tiny": 86, "agent_swin_small": 107, "agent_swin_base": 145,
        "fused_swin_tiny_patch4_window7_224": 86, "fused_swin_small_patch4_window7_224": 107,
        "fused_swin_base_patch4_window7_224": 145,
    },
    "retinanet": {
        "agent_pvt_tiny": 21, "agent_pvt_small": 30, "agent_pvt_medium": 46,
        "agent_pvt_large": 58, "fused_davit_tiny": 38.5, "fused_davit_small": 59.9,
        "fused_davit_base": 98.5,
    },
    "mask2former": {"dinat_large_11x11": 220},
}  # fmt: skip
# Parts of the names of parameters that the authors' files exempt from weight decay.
UNDECAYED = {
    "nat": ("rpb", "norm"),
    "dinat": ("rpb", "norm"),
    "dinat_s": ("absolute_pos_embed", "rpb", "norm"),
    "biformer": ("absolute_pos_embed", "relative_position_bias_table", "norm"),
    "agent_swin": (
        *("absolute_pos_embed", "relative_position_bias_table", "norm", "an_bias", "na_bias"),
        *("ah_bias", "aw_bias", "ha_bias", "wa_bias"),
    ),
    "agent_pvt": (),
    "fused_davit": (),
    "fused_swin": ("absolute_pos_embed", "relative_position_bias_table", "norm"),
}


def all_but(some):
    """Every config, those that are not among ``some`` left to the long run."""
    return [name if name in some else pytest.param(name, marks=pytest.mark.slow) for name in NAMES]


def test_the_generated_configs_are_fresh(capsys):
    assert detection_recipes.main(["--check"]) == 0, capsys.readouterr().err
    assert {*detection_recipes.FOLDER.glob("*_coco*.py")} == {*FILES.values()}


def test_stale_configs_are_told_and_written(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(detection_recipes, "FOLDER", tmp_path)
    assert detection_recipes.main(["--check"]) == 1
    assert capsys.readouterr().err.splitlines()[0] == (
        "mask_rcnn_nat_mini_1x_coco.py is stale: run python -m vitarium.tools.detection_recipes"
    )
    assert detection_recipes.main([]) == detection_recipes.main(["--check"]) == 0
    assert {path.name for path in tmp_path.iterdir()} == {path.name for path in FILES.values()}


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.name)
def test_a_config_holds_numbers_only_and_a_header(recipe):
    text = FILES[recipe.name].read_text(encoding="utf-8")
    lines = text.splitlines()
    header = lines[: next(i for i, line in enumerate(lines) if not line.startswith("#"))]
    assert lines[len(header)] == 'custom_imports = {"imports": ["vitarium.heads.mmdet"]}'
    for statement in ast.parse(text).body:
        assert isinstance(statement, ast.Assign)
        ast.literal_eval(statement.value)
    joined = "\n".join(header)
    for key in ("Hardware", "Expected result", "Source", "Differs"):
        assert joined.count(f"\n# {key}: ") == 1
    assert "not run" in joined
    assert ("\n# Weights: from a browser" in joined) == ("biformer" in recipe.name)
    commands = joined.replace(" \\\n#     ", " ")
    assert f"torchrun --nproc_per_node 8 -m vitarium_cli train {recipe.name}\n" in commands
    assert f"vitarium train {recipe.name} --set train_dataloader.batch_size=16\n" in commands


def test_every_published_detector_has_a_config():
    heads = ("mask_rcnn", "cascade_mask_rcnn", "retinanet")
    for row in recipes.rows():
        found = re.fullmatch(r"[a-z]+_(.+)_coco", row["tag"])
        if row["task"] != "det" or found is None or not found[1].startswith(heads):
            continue  # RepPoints, and MoBY's files, which are for Swin's configs
        head, _, schedule = found[1].rpartition("_")
        recipe = next(x for x in RECIPES if x.name == f"{head}_{row['entry']}_{schedule}_coco")
        released = row["weights"]["source"] != "not released"
        assert recipe.released == (row["name"] if released else None)
        for name, value in row["metrics"].items():
            assert f"{name} {value}" in recipe.expected
        assert row["source"] in recipe.expected


def test_every_family_has_every_head():
    for head, schedule in (
        *(("mask_rcnn", "1x"), ("mask_rcnn", "3x")),
        *(("cascade_mask_rcnn", "3x"), ("retinanet", "1x")),
    ):
        table = {
            "mask_rcnn": detection_recipes.MASK_RCNN,
            "cascade_mask_rcnn": detection_recipes.CASCADE_MASK_RCNN,
            "retinanet": detection_recipes.RETINANET,
        }[head][schedule]
        assert {*map(detection_recipes.family_of, table)} == {*detection_recipes.FAMILIES}


@pytest.mark.parametrize("name", NAMES)
def test_what_a_config_says(name):
    config = parsed(name)
    head, schedule = head_of(name), re.search(r"_(\d+)(x|e)_coco", name)
    assert config.train_dataloader.batch_size * 8 == 16 == config.auto_scale_lr.base_batch_size
    backbone = config.model.backbone
    assert backbone.type == "FeatureBackbone"
    assert backbone.task == "det"
    assert backbone.pretrained
    assert "init_cfg" not in backbone
    assert config.optim_wrapper.optimizer.type == "AdamW"
    assert config.default_scope == "mmdet"
    features = FeatureBackbone(backbone.name.partition(".")[0], task="det", device="meta")
    taker = config.model.panoptic_head if head == "mask2former" else config.model.neck
    indices = backbone.get("out_indices", range(4))
    assert taker.in_channels == [features.channels[i] for i in indices]
    if head == "mask2former":
        images = config.train_cfg.max_iters * 16
        assert round(images / 118000) == int(schedule[1])
        return
    epochs = {"1": 12, "3": 36}[schedule[1]]
    milestones = {"1": [11] if head == "dino" else [8, 11], "3": [27, 33]}[schedule[1]]
    assert config.train_cfg.max_epochs == config.param_scheduler[-1].end == epochs
    assert config.param_scheduler[-1].milestones == milestones
    kinds = [each.type for each in config.train_dataloader.dataset.pipeline]
    theirs = detection_recipes.FAMILIES[detection_recipes.family_of(backbone.name)]
    assert ("RandomChoice" in kinds) == (theirs.crops or epochs == 36 or head == "dino")
    masks = [x.get("with_mask", False) for x in config.train_dataloader.dataset.pipeline]
    assert any(masks) == (head not in ("retinanet", "dino"))
    if head == "cascade_mask_rcnn":
        for each in config.model.roi_head.bbox_head:
            assert each.norm_cfg.type == "SyncBN"
            assert each.loss_bbox.type == "GIoULoss"


@pytest.mark.parametrize("name", all_but(EACH))
def test_every_model_builds_with_as_many_parameters_as_published(name):
    model = built(parsed(name), "meta")
    millions = sum(p.numel() for p in model.parameters()) / 1e6
    published = PUBLISHED[head_of(name)].get(entry_of(name)) if head_of(name) in PUBLISHED else None
    if published is not None:
        assert millions == pytest.approx(published, abs=0.6 if published % 1 == 0 else 0.1)
    if head_of(name) != "dino":  # its encoder's norms hang on no backbone
        assert [*model.backbone.strides] == [4, 8, 16, 32][-len(model.backbone.strides) :]


@pytest.mark.parametrize("entry", sorted(GOLDENS))
def test_weight_decay_spares_what_the_authors_spare(entry):
    from mmengine.optim import build_optim_wrapper

    heads = ("mask_rcnn", "cascade_mask_rcnn")
    name = next(x for x in NAMES if head_of(x) in heads and entry_of(x) == entry)
    config, family = parsed(name), detection_recipes.family_of(entry)
    config.optim_wrapper.type = "OptimWrapper"
    config.optim_wrapper.pop("loss_scale", None)
    model = built(config, "meta")
    wrapper = build_optim_wrapper(model, config.optim_wrapper)
    names = {id(p): name for name, p in model.named_parameters()}
    spared = {
        names[id(p)].removeprefix("backbone.model.")
        for group in wrapper.optimizer.param_groups
        for p in group["params"]
        if group["weight_decay"] == 0 and names[id(p)].startswith("backbone.")
    }
    theirs = json.loads(GOLDENS[entry].read_text())["tensors"]
    renames = entries()[entry]._RENAMES
    expected = {renames.ours(x) for x in theirs if any(part in x for part in UNDECAYED[family])}
    parameters = {k.removeprefix("model.") for k, _ in model.backbone.named_parameters()}
    assert spared == expected & parameters
    assert bool(spared) == bool(UNDECAYED[family])
    for part in detection_recipes.no_decay_of("mask_rcnn", family):  # none is left from elsewhere
        assert any(part in x for x in spared)


@pytest.mark.parametrize("name", [x for x in NAMES if head_of(x) == "mask2former"])
def test_mask2former_learns_its_backbone_at_a_tenth_of_the_rate(name):
    from mmengine.optim import build_optim_wrapper

    config = parsed(name)
    model = built(config, "meta")
    wrapper = build_optim_wrapper(model, config.optim_wrapper)
    groups = {id(p): group for group in wrapper.optimizer.param_groups for p in group["params"]}
    for key, parameter in model.named_parameters():
        group, inside = groups[id(parameter)], key.startswith("backbone.")
        assert group["lr"] == pytest.approx(1e-5 if inside else 1e-4), key
        if inside:
            spared = "norm" in key or key.endswith("rpb")
            assert group["weight_decay"] == (0 if spared else 0.05), key


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    pytest.importorskip("sklearn")
    return detectors.panoptic_scenes(tmp_path_factory.mktemp("scenes"))


STEPS = {*detectors.of_each("head"), *detectors.of_each("family")}


@pytest.mark.parametrize("name", all_but(STEPS))
def test_one_step_trains_every_parameter(name, scenes):
    losses, unused, still = step(shrunk(name, scenes))
    assert all(torch.isfinite(torch.as_tensor(value)).all() for value in losses.values())
    assert unused == []
    # what stays: layers that drop path left out, biases whose gradients cancel
    assert len(still) < 30


def test_a_panoptic_run(scenes, tmp_path, capsys):
    def call(*argv):
        status = vitarium_cli.main([str(x) for x in argv])
        return status, *capsys.readouterr()

    config = shrunk("mask2former_dinat_large_11x11_100e_coco_panoptic", scenes)
    config.train_cfg = {"type": "IterBasedTrainLoop", "max_iters": 1, "val_interval": 1}
    config.param_scheduler = None
    config.custom_imports = {"imports": ["vitarium.heads.mmdet"]}
    config.model.backbone.pretrained = False
    config.default_hooks.checkpoint = {"type": "CheckpointHook", "by_epoch": False, "interval": 1}
    path, run = tmp_path / "config.py", tmp_path / "run"
    config.dump(path)
    given = (path, "--device", "cpu", "--output", run)
    status, out, err = call("train", *given)
    assert status == 0, err
    measured = re.search(r"coco_panoptic/PQ (\S+)", out)[1]
    assert 0 <= float(measured) < 50
    status, out, _ = call("test", *given, "--json")
    assert status == 0
    assert json.loads(out)["coco_panoptic/PQ"] == pytest.approx(float(measured), rel=1e-5)
    for change, message in (
        ("train_dataloader.dataset.ann_file=annotations/instances_train.json", "segments_info"),
        ("train_dataloader.dataset.data_prefix.seg=nowhere/", "expected maps of segments in"),
        ("model.panoptic_head.num_stuff_classes=2", "expected 11, the number of classes of"),
    ):
        status, out, err = call("train", *given[:3], "--output", tmp_path / "no", "--set", change)
        assert (status, out) == (1, "")
        assert message in err
        assert not (tmp_path / "no").exists()


@pytest.mark.slow
def test_mmdets_own_program_trains_a_config(scenes, tmp_path):
    import mmdet

    config = shrunk("mask_rcnn_nat_mini_1x_coco", scenes)
    config.train_cfg = {"type": "IterBasedTrainLoop", "max_iters": 1, "val_interval": 10}
    config.custom_imports = {"imports": ["vitarium.heads.mmdet"]}
    for key in ("val_cfg", "val_dataloader", "val_evaluator"):
        config[key] = None
    for key in ("test_cfg", "test_dataloader", "test_evaluator"):
        config[key] = None
    config.model.backbone.pretrained = False
    config.default_hooks.checkpoint.by_epoch = False
    path = tmp_path / "config.py"
    config.dump(path)
    tool = Path(mmdet.__path__[0]) / ".mim/tools/train.py"
    ran = subprocess.run(
        [sys.executable, tool, path, "--work-dir", tmp_path / "run"],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": str(Path(vitarium.__file__).parents[1])},
    )
    assert ran.returncode == 0, ran.stderr[-2000:]
    assert (tmp_path / "run" / "iter_1.pth").exists()
