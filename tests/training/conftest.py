"""A small data set of colours, and a config that a model learns in seconds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tomllib
from PIL import Image

from vitarium.training.config import Config
from vitarium.training.toml import parse_config

COLOURS = {"blue": (20, 40, 220), "green": (20, 200, 60), "red": (220, 30, 30)}


@pytest.fixture(scope="session")
def colours(tmp_path_factory) -> Path:
    """An image folder of three classes, 8 images each to train on and 5 to validate."""
    root = tmp_path_factory.mktemp("colours")
    rng = np.random.default_rng(0)
    for split, count in (("train", 8), ("val", 5)):
        for name, colour in COLOURS.items():
            folder = root / split / name
            folder.mkdir(parents=True)
            for i in range(count):
                noise = rng.normal(0, 25, (40, 36, 3))
                pixels = (np.array(colour) + noise).clip(0, 255).astype(np.uint8)
                Image.fromarray(pixels).save(folder / f"{i}.png")
    return root


CONFIG = """
task = "classification"
deterministic = true
[model]
name = "test_vit"
kwargs = { img_size = 32 }
[data]
source = "folder"
image_size = 32
workers = 0
[augment]
scale = [0.5, 1.0]
[optimizer]
lr = 1e-3
clip_grad = 1.0
[schedule]
updates = 9
warmup_updates = 2
[ema]
decay = 0.9
[train]
batch_size = 4
log_every = 2
checkpoint_every = 2
"""


@pytest.fixture
def make_config(colours):
    """The config above on the colours; keyword ``section__key`` changes it, None removes."""

    def make(**changes: Any) -> Config:
        content = tomllib.loads(CONFIG)
        content["data"]["root"] = str(colours)
        for name, value in changes.items():
            *sections, key = name.split("__")
            place = content
            for section in sections:
                place = place.setdefault(section, {})
            if value is None:
                del place[key]
            else:
                place[key] = value
        return parse_config(content, "test")

    return make
