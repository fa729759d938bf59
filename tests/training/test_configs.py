"""The configs that ship: what they say, and that each kind of them trains."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import timm
import torch
from attos import ATTOS
from PIL import Image

import vitarium
from vitarium.tools import recipes
from vitarium.tools.train import chosen
from vitarium.training.engine import Engine
from vitarium.training.tasks import _TASKS

FOLDER = Path(vitarium.__file__).parent / "configs"
FILES = sorted(FOLDER.rglob("*.toml"))
RECIPES = [*recipes.recipes()]
CLASSES = {"folder": 1000, "ade20k": 150, "cityscapes": 19}
SHRUNK = {
    "model.pretrained": "false",
    "model.drop_path_rate": "0.1",
    "data.image_size": "64",
    "data.workers": "0",
    "train.batch_size": "2",
    "train.precision": "fp32",
}
SHRUNK_CLASSES = {
    "schedule.epochs": "0.1",
    "schedule.warmup_epochs": "0",
    "schedule.cooldown_epochs": "0",
}
SHRUNK_MAPS = {
    "schedule.updates": "1",
    "schedule.warmup_updates": "0",
    "augment.resize": "[64, 128]",
    "head.channels": "16",
    "head.auxiliary_channels": "0",
}


def test_the_generated_configs_are_fresh(capsys):
    assert recipes.main(["--check"]) == 0, capsys.readouterr().err


def test_stale_configs_are_told_and_written(tmp_path, monkeypatch, capsys):
    (tmp_path / "models.json").write_bytes((FOLDER.parent / "models.json").read_bytes())
    monkeypatch.setattr(recipes, "_PACKAGE", tmp_path)
    assert recipes.main(["--check"]) == 1
    assert capsys.readouterr().err.splitlines()[0] == (
        "nat_mini.toml is stale: run python -m vitarium.tools.recipes"
    )
    assert recipes.main([]) == recipes.main(["--check"]) == 0
    written = {path.relative_to(tmp_path / "configs") for path in tmp_path.rglob("*.toml")}
    assert written <= {path.relative_to(FOLDER) for path in FILES}
    assert len(written) == len(RECIPES)


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_every_config_is_found_by_its_name(file):
    config, name = chosen(file.stem, [])
    assert name == file.stem
    assert chosen(str(file), [])[0] == config
    assert config.task == file.parent.name


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.name)
def test_headers_say_how_where_what_and_whence(recipe):
    text = (FOLDER / recipe.settings["task"] / f"{recipe.name}.toml").read_text(encoding="utf-8")
    header = text.partition("\n\n")[0]
    assert all(line.startswith("#") for line in header.splitlines())
    for key in ("Hardware", "Expected result", "Source", "Differs"):
        assert header.count(f"\n# {key}: ") == 1
    assert f"{recipe.gpus} GPUs; not run" in header
    assert re.search(r"[0-9a-f]{7}", header.partition("Source: ")[2])  # a commit
    assert set(re.findall(r" train ([a-z0-9_]+)", header)) == {recipe.name}
    assert "torchrun" in header
    assert "accelerate launch" in header
    config, _ = chosen(recipe.name, [])
    images = int(re.search(r": (\d+) images a step", header)[1])
    assert images == config.train.batch_size * recipe.gpus
    several = int(re.search(r"--nproc_per_node (\d+)", header)[1])
    assert several * config.train.batch_size == images
    override = re.search(r"Command, 1 GPU: .* --set (\S+)", header)[1]
    alone, _ = chosen(recipe.name, [override])
    assert alone.train.batch_size * alone.train.accumulation == images


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.name)
def test_every_model_builds(recipe):
    config, _ = chosen(recipe.name, [])
    config = replace(config, model=replace(config.model, pretrained=False))
    task = object.__new__(_TASKS[config.task])
    task.config = config
    task.train = SimpleNamespace(classes=range(CLASSES[config.data.source]))
    with torch.device("meta"):
        assert sum(p.numel() for p in task._built().parameters()) > 1e6
    if config.task == "classification":  # the images have the size that the result is for
        tag = next(
            row["name"]
            for row in recipes.rows()
            if row["entry"] == recipe.name and f"top-1 {row['top1']} " in recipe.expected
        )
        size = timm.get_pretrained_cfg(tag).input_size[-2:]
        assert size == config.data.image_size


def of_each_kind():
    """The first recipe of each task, family, head and data."""
    kinds = {}
    for recipe in RECIPES:
        settings = recipe.settings
        kind = (smallest(recipe), settings.get("head", {}).get("name"), settings.get("probe", {}))
        if settings["data"]["source"] == "cityscapes":
            kind = ("cityscapes",)
        kinds.setdefault(str((settings["task"], kind)), recipe)
    return kinds.values()


def smallest(recipe):
    """The small model of the family, in the place of a recipe's own."""
    if recipe.settings["task"] == "probing":
        return "test_vit"
    name = recipe.settings["model"]["name"]
    return max((x for x in ATTOS if name.startswith(x.removesuffix("_atto"))), key=len)


@pytest.fixture(scope="module")
def roots(colours, tmp_path_factory):
    """Folders by the name of the source, with few small images each."""
    rng = np.random.default_rng(0)

    def save(path, *shape):
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 19, shape, dtype=np.uint8)).save(path)

    ade, city = (tmp_path_factory.mktemp(name) for name in ("ade20k", "cityscapes"))
    for split in ("training", "validation"):
        for i in range(2):
            save(ade / "images" / split / f"{i}.jpg", 80, 96, 3)
            save(ade / "annotations" / split / f"{i}.png", 80, 96)
    lines = [
        "Idx\tRatio\tTrain\tVal\tStuff\tName",
        *(f"{i}\t0\t1\t1\t0\tthing {i}" for i in range(150)),
    ]
    (ade / "objectInfo150.txt").write_text("\n".join(lines))
    for split in ("train", "val"):
        for i in range(2):
            save(city / "leftImg8bit" / split / "town" / f"{i}_leftImg8bit.png", 64, 128, 3)
            save(city / "gtFine" / split / "town" / f"{i}_gtFine_labelTrainIds.png", 64, 128)
    return {"folder": colours, "ade20k": ade, "cityscapes": city}


@pytest.mark.parametrize("recipe", of_each_kind(), ids=lambda recipe: recipe.name)
def test_each_kind_takes_a_step(recipe, roots, tmp_path):
    pytest.importorskip("accelerate")
    task, source = recipe.settings["task"], recipe.settings["data"]["source"]
    own = {"model.name": smallest(recipe), "data.root": str(roots[source])}
    shrunk = SHRUNK | (SHRUNK_MAPS if task == "segmentation" else SHRUNK_CLASSES) | own
    if task == "probing":
        shrunk["model.kwargs"] = "{ img_size = 64 }"
        del shrunk["model.drop_path_rate"]
    config, _ = chosen(recipe.name, [f"{key}={value}" for key, value in shrunk.items()])
    with Engine(config, "cpu") as engine:
        measures = engine.train(tmp_path / "run")
    assert {"classification": "top1", "probing": "top1", "segmentation": "mIoU"}[task] in measures
    assert len((tmp_path / "run" / "log.csv").read_text().splitlines()) >= 2
