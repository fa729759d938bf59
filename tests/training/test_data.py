"""Batches: their order, what stands in for what, and that any step can come back."""

from __future__ import annotations

import random
import shutil
from functools import partial
from itertools import islice

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data._utils.pin_memory import pin_memory

from vitarium.training.data import (
    Batch,
    Layout,
    order,
    seeded,
    training_batches,
    validation_batches,
)
from vitarium.training.sources import Source, Stream, UnreadableError, open_sources


class Numbers(Source):
    """Image i is a number; those in ``bad`` cannot be read."""

    def __init__(self, count, bad=()):
        self.names = [f"image {i}" for i in range(count)]
        self.classes = ("one",)
        self.bad = bad

    def load(self, index):
        if index in self.bad:
            raise UnreadableError("broken")
        return Image.new("L", (1, 1), index), index


class NumberStream(Stream):
    """Shards of numbers, which differ from pass to pass."""

    def __init__(self, shards, each, bad=()):
        self.classes = ("one",)
        self._shards, self._each, self._bad = shards, each, bad

    def open(self, epoch, rank, world):
        info = torch.utils.data.get_worker_info()
        mine = range(rank, self._shards, world)
        if info is not None:
            mine = mine[info.id :: info.num_workers]
        for shard in mine:
            for i in range(self._each):
                number = 1000 * epoch + 100 * shard + i
                yield f"image {number}", partial(self._load, number)

    def _load(self, number):
        if number % 100 in self._bad:
            raise UnreadableError("broken")
        return Image.new("L", (1, 1)), number

    def shards(self, world):
        return self._shards // world


def transform(pair):
    """The number, and three random ones: from torch, NumPy and Python."""
    return torch.tensor([torch.rand(()), np.random.rand(), random.random()]), torch.tensor(pair[1])


def batches(source, layout, update=0, workers=0, strict=False):
    found = training_batches(
        source, transform, layout, seed=7, update=update, workers=workers, strict=strict
    )
    return found


def taken(source, layout, count, **kwargs):
    found = [*islice(batches(source, layout, **kwargs), count)]
    return torch.stack([x.targets for x in found]), torch.stack([x.images for x in found])


def test_a_run_is_one_permutation_after_another():
    places = [*islice(order(5, 3, 0), 15)]
    assert [position for position, _ in places] == [*range(15)]
    passes = [[index for _, index in places[i : i + 5]] for i in (0, 5, 10)]
    assert all(sorted(each) == [*range(5)] for each in passes)
    assert len({*map(tuple, passes)}) > 1
    assert [*islice(order(5, 3, 7), 8)] == places[7:]


def test_an_image_stands_several_times_in_a_row():
    places = [*islice(order(5, 3, 0, repeats=3), 10)]
    assert [position for position, _ in places] == [*range(10)]
    once = [place for _, place in islice(order(5, 3, 0), 10)]
    shown = [place for _, place in places]
    assert shown == [once[i] for i in (0, 0, 0, 1, 1, 5, 5, 5, 6, 6)]
    assert [*islice(order(5, 3, 4, repeats=3), 6)] == places[4:]


def test_seeds_do_not_leak():
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    with seeded(5, 6):
        inside = torch.rand(3)
    assert torch.equal(torch.rand(3), expected)
    with seeded(5, 6):
        assert torch.equal(torch.rand(3), inside)
    with seeded(5, 7):
        assert not torch.equal(torch.rand(3), inside)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize(
    "source", [Numbers(10), NumberStream(4, 5, bad=(2,))], ids=["map", "stream"]
)
def test_any_step_can_come_back(source, workers):
    layout = Layout(batch=3)
    numbers, drawn = taken(source, layout, 9, workers=workers)
    for update in (1, 4, 5):
        again, drawn_again = taken(source, layout, 9 - update, update=update, workers=workers)
        assert torch.equal(again, numbers[update:])
        assert torch.equal(drawn_again, drawn[update:])


def test_workers_change_nothing_but_speed():
    source, layout = Numbers(10, bad=(4,)), Layout(batch=3)
    alone, together = (taken(source, layout, 8, workers=n) for n in (0, 2))
    assert all(torch.equal(a, b) for a, b in zip(alone, together, strict=True))


def test_two_processes_take_what_one_takes_that_accumulates():
    source = Numbers(10)
    one = taken(source, Layout(2, accumulation=4), 12)
    parts = [taken(source, Layout(2, 2, rank, 2), 6) for rank in (0, 1)]
    for mine, theirs in zip(one, zip(*parts, strict=True), strict=True):
        rounds = mine.unflatten(0, (3, 4))
        assert torch.equal(rounds[:, :2].flatten(0, 1), theirs[0])
        assert torch.equal(rounds[:, 2:].flatten(0, 1), theirs[1])


@pytest.mark.parametrize("workers", [0, 2])
def test_processes_share_a_stream(workers):
    source = NumberStream(4, 6)
    seen = [
        taken(source, Layout(3, rank=rank, world=2), 4, workers=workers)[0].flatten().tolist()
        for rank in (0, 1)
    ]
    assert sorted(seen[0] + seen[1]) == sorted(100 * s + i for s in range(4) for i in range(6))


def test_another_image_stands_in_and_the_bad_one_is_named():
    found = [*islice(batches(Numbers(6, bad=(2, 3)), Layout(6)), 2)]
    for batch in found:
        assert sorted(batch.targets.tolist()) == [0, 1, 4, 4, 4, 5]
        assert {name for name, _ in batch.failures} == {"image 2", "image 3"}
    stream = next(batches(NumberStream(1, 4, bad=(1,)), Layout(4)))
    assert len(stream.targets) == 4
    assert 1 not in stream.targets
    assert stream.failures == (("image 1", "broken"),)


@pytest.mark.parametrize("workers", [0, 1])
def test_strict_stops(workers):
    found = batches(Numbers(6, bad=(2,)), Layout(6), workers=workers, strict=True)
    with pytest.raises(ValueError, match="^image 2: cannot read this image: broken$"):
        next(found)


def test_nothing_but_bad_images_stops():
    with pytest.raises(ValueError, match="20 images in a row"):
        next(batches(Numbers(30, bad=range(30)), Layout(2)))
    with pytest.raises(ValueError, match="a whole batch"):
        next(batches(NumberStream(1, 3, bad=range(3)), Layout(3)))


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("source", [Numbers(11, bad=(3,)), NumberStream(4, 3, bad=(1,))])
def test_validation_sees_each_image_once(source, workers):
    seen, failures = [], []
    for rank in (0, 1):
        layout = Layout(2, rank=rank, world=2)
        for batch in validation_batches(source, transform, layout, workers=workers, strict=False):
            seen += batch.targets.tolist()
            failures += batch.failures
    expected = {i for i in range(11) if i != 3}
    if isinstance(source, Stream):
        expected = {100 * s + i for s in range(4) for i in (0, 2)}
    assert sorted(seen) == sorted(expected)
    assert len(failures) == 11 - 10 if isinstance(source, Source) else 4


def test_folders(make_config, colours, tmp_path):
    train, val = open_sources(make_config().data, segmentation=False)
    assert (len(train), len(val)) == (24, 15)
    assert train.classes == ("blue", "green", "red")
    image, number = train.load(23)
    assert (image.mode, number) == ("RGB", 2)
    root = tmp_path / "copy"
    shutil.copytree(colours, root)
    shutil.rmtree(root / "val" / "green")
    _, val = open_sources(make_config(data__root=str(root)).data, segmentation=False)
    assert {val.load(i)[1] for i in range(len(val))} == {0, 2}
    (root / "train" / "white").mkdir()
    with pytest.raises(ValueError, match="1 classes without images in .*: white"):
        open_sources(make_config(data__root=str(root)).data, segmentation=False)
    shutil.rmtree(root / "train" / "white")
    shutil.copytree(root / "val" / "red", root / "val" / "pink")
    with pytest.raises(ValueError, match="expected the classes of train, got pink besides"):
        open_sources(make_config(data__root=str(root)).data, segmentation=False)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data__root": "/nowhere"}, "data.root: expected a folder"),
        ({"data__root": None}, "data.root: expected the folder of folder"),
        ({"data__train": "training"}, "expected .*training with a folder for each class"),
        ({"data__source": "cifar"}, "data.source: expected one of folder, "),
        ({"data__image_key": "x"}, "data.image_key: folder has none"),
        ({"data__source": "digits"}, "data.root: digits has none"),
        (
            {"data__source": "hf/x", "data__stream": True, "data__repeats": 3},
            "data.repeats: hf/x has",
        ),
        ({"data__source": "torchvision/nothing"}, "Unknown torchvision dataset"),
    ],
)
def test_sources_that_are_not_there(make_config, changes, message):
    with pytest.raises(ValueError, match=message):
        open_sources(make_config(**changes).data, segmentation=False)


def test_a_place_decides_for_every_generator_and_leaves_them(monkeypatch):
    def drawn():
        return float(torch.rand(())), float(np.random.rand()), random.random()

    before = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()
    with seeded(1, 2, 3):
        found = drawn()
        with seeded(4, 5, 6):
            drawn()
        drawn()
    with seeded(1, 2, 3):
        assert drawn() == found
    assert random.getstate() == before[0]
    assert np.random.get_state()[1].tolist() == before[1]
    assert torch.equal(torch.get_rng_state(), before[2])


def test_batches_are_pinned_whole(monkeypatch):
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self: self + 1)
    batch = Batch(torch.zeros(2, 3, 4, 4), torch.zeros(2, dtype=torch.long), (("x", "why"),))
    pinned = pin_memory(batch)
    assert pinned.images.sum() == 96
    assert pinned.targets.sum() == 2
    assert pinned.failures == batch.failures
