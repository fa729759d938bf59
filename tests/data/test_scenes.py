import hashlib
import os
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
import sklearn.datasets
import torch
from torch.utils.data import DataLoader

from vitarium.data.digits import HELD_OUT
from vitarium.data.scenes import Scene, Scenes
from vitarium.data.textures import luma

ROOT = Path(__file__).parents[2]
TRAINING = 1797 - HELD_OUT


def equal(a, b):
    return all(np.array_equal(getattr(a, f.name), getattr(b, f.name)) for f in fields(Scene))


def content(scene):
    """A hash of all that a scene is."""
    parts = (getattr(scene, field.name) for field in fields(Scene))
    return hashlib.sha256(b"".join(part.tobytes() for part in parts)).hexdigest()


@pytest.fixture(scope="module")
def scenes():
    """Thirty of each split, of every size that is odd in some way."""
    sizes = ((160, 160), (97, 211), (32, 32), (33, 150))
    sets = [Scenes(split, 30, size) for split in ("train", "val") for size in sizes]
    return [(data, [data[i] for i in range(len(data))]) for data in sets]


def test_shapes_and_types(scenes):
    counts = set()
    for data, found in scenes:
        for scene in found:
            n = len(scene.labels)
            counts.add(n)
            assert scene.image.shape == (*data.size, 3)
            assert scene.owners.shape == scene.semantic.shape == data.size
            assert scene.image.dtype == scene.owners.dtype == scene.semantic.dtype == np.uint8
            assert scene.masks.shape == (n, *data.size)
            assert scene.boxes.shape == (n, 4)
            assert scene.samples.shape == (n,)
    assert counts >= {3, 4, 5, 6, 7, 8}
    assert max(counts) == 8


def test_digits_are_from_their_split_alone(scenes):
    target = sklearn.datasets.load_digits().target
    used = {"train": set(), "val": set()}
    for data, found in scenes:
        for scene in found:
            used[data.split] |= set(scene.samples.tolist())
            assert scene.labels.tolist() == target[scene.samples].tolist()
    assert used["train"] < set(range(TRAINING))
    assert used["val"] < set(range(TRAINING, 1797))
    assert min(map(len, used.values())) > 150


@pytest.mark.parametrize("split", ["train", "val"])
def test_a_scene_shows_the_samples_that_it_names_and_no_others(split, monkeypatch):
    before = Scenes(split, 3)[2]
    data = sklearn.datasets.load_digits()
    others = np.setdiff1d(np.arange(1797), before.samples)
    changed = np.random.default_rng(0).integers(0, 17, (len(others), 8, 8))
    data.images[others], data.data[others] = changed, changed.reshape(-1, 64)
    data.target[others] = (data.target[others] + 1) % 10
    monkeypatch.setattr(sklearn.datasets, "load_digits", lambda: data)
    assert equal(Scenes(split, 3)[2], before)
    data.data[before.samples[0]] = data.data[before.samples[0], ::-1]
    assert not equal(Scenes(split, 3)[2], before)


def test_masks_boxes_and_maps_agree(scenes):
    for data, found in scenes:
        H, W = data.size
        for scene in found:
            assert (scene.masks.sum(0) == (scene.owners > 0)).all()  # no pixel has two owners
            expected = np.zeros(data.size, int)
            for mask, label, (x, y, w, h) in zip(
                scene.masks, scene.labels, scene.boxes, strict=True
            ):
                expected += mask * (label + 1)
                assert 0 <= x < x + w <= W
                assert 0 <= y < y + h <= H
                inside = mask[y : y + h, x : x + w]
                assert inside.sum() == mask.sum()
                edges = inside[0], inside[-1], inside[:, 0], inside[:, -1]
                assert all(edge.any() for edge in edges)
            assert (scene.semantic == expected).all()


def test_digits_are_large_and_differ_from_their_ground(scenes):
    sides, differences = [], []
    for data, found in scenes:
        if data.size != (160, 160):
            continue
        for scene in found:
            shades = luma(scene.image / 255)
            for mask, (x, y, w, h) in zip(scene.masks, scene.boxes, strict=True):
                sides.append(max(w, h))
                around = np.s_[y : y + h, x : x + w]
                ground = shades[around][scene.owners[around] == 0]
                if len(ground) > 30:
                    differences.append(np.median(shades[mask]) - np.median(ground))
    assert 18 <= min(sides) < 32
    assert 50 < max(sides) < 84
    assert min(differences) > 0.25  # lighter


def test_every_argument_counts_and_the_number_of_scenes_does_not():
    scene = Scenes("train", 5)[3]
    assert equal(Scenes("train", 4)[3], scene)
    others = (
        *(Scenes("train", 5)[2], Scenes("val", 5)[3]),
        *(Scenes("train", 5, seed=1)[3], Scenes("train", 5, (160, 161))[3]),
    )
    assert len({content(x) for x in (scene, *others)}) == 5


def test_workers_order_and_global_generators_change_nothing():
    data = Scenes("train", 6, (64, 80))
    expected = [content(data[i]) for i in range(6)]
    np.random.seed(1)
    torch.manual_seed(1)
    before = np.random.get_state()[1].copy(), torch.get_rng_state()
    assert [content(data[i]) for i in reversed(range(6))] == expected[::-1]
    assert (np.random.get_state()[1] == before[0]).all()
    assert torch.equal(torch.get_rng_state(), before[1])
    for workers in (1, 2):
        loader = DataLoader(data, batch_size=None, num_workers=workers)
        assert [content(scene) for scene in loader] == expected


def test_another_process_paints_the_same():
    code = """
from hashlib import sha256
from vitarium.data.scenes import Scenes
scene = Scenes("val", 3, (64, 80))[2]
print(*(sha256(x).hexdigest() for x in (scene.image, scene.owners, scene.samples)))
"""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONHASHSEED": "7"}
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True
    )
    scene = Scenes("val", 9, (64, 80))[2]
    parts = (scene.image, scene.owners, scene.samples)
    assert result.stdout.split() == [hashlib.sha256(part).hexdigest() for part in parts]


def test_what_is_out_of_range_is_refused():
    for arguments, message in (
        ({"split": "test"}, "split: expected train or val, got 'test'"),
        ({"count": 0}, "count: expected at least one scene, got 0"),
        ({"size": (31, 64)}, r"size: expected at least 32 pixels each way, got \(31, 64\)"),
        ({"seed": -1}, "seed: expected 0 ... 4294967295, got -1"),
        ({"seed": 2**32}, "seed: expected 0 ... 4294967295, got 4294967296"),
    ):
        with pytest.raises(ValueError, match=f"^{message}$"):
            Scenes(**{"split": "train", "count": 1, **arguments})
    for index in (-1, 2):
        with pytest.raises(IndexError, match=f"expected 0 ... 1, got {index}"):
            Scenes("train", 2)[index]


def test_scenes_look_as_this_version_paints_them():
    """Whoever changes these figures gives vitarium.data.folders.VERSION one more."""
    training, held_out = (Scenes(split, 8)[7] for split in ("train", "val"))
    assert training.samples.tolist() == [124, 1251, 83]
    assert held_out.samples.tolist() == [1514, 1739, 1452, 1446, 1621, 1769, 1682, 1750]
    assert training.boxes[0].tolist() == [116, 39, 19, 25]
    assert held_out.boxes[0].tolist() == [50, 3, 31, 48]
    # another processor may round another way
    assert training.image.mean((0, 1)) == pytest.approx([119, 119, 69], abs=1)
    assert held_out.image.mean((0, 1)) == pytest.approx([59, 65, 66], abs=1)
