"""Data sets of other packages, made here and read offline: torchvision, Hugging Face, shards."""

from __future__ import annotations

import io
import os
import pickle
import struct
import tarfile
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from vitarium.training.data import Layout, training_batches, validation_batches
from vitarium.training.sources import Stream, UnreadableError, open_sources

COUNTS = {"train": 24, "val": 15}


@pytest.fixture(scope="module", autouse=True)
def offline(tmp_path_factory):
    """No hub is asked, and nothing is left in the home folder."""
    with pytest.MonkeyPatch.context() as patch:
        home = str(tmp_path_factory.mktemp("hf"))
        for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"):
            patch.setenv(name, "1")
        patch.setenv("HF_HOME", home)
        datasets = pytest.importorskip("datasets")
        patch.setattr(datasets.config, "HF_DATASETS_OFFLINE", True, raising=False)
        patch.setattr(datasets.config, "HF_HUB_OFFLINE", True, raising=False)
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", Path(home) / "datasets")
        datasets.disable_progress_bars()
        yield


@pytest.fixture(scope="module")
def places(colours, tmp_path_factory) -> dict[str, Path]:
    """The colours as an image folder, as Parquet, saved on the disk, and as shards."""
    datasets = pytest.importorskip("datasets")
    base = tmp_path_factory.mktemp("places")
    classes = sorted(os.listdir(colours / "train"))
    features = datasets.Features(
        {"image": datasets.Image(), "label": datasets.ClassLabel(names=classes)}
    )
    saved, parquet, shards = {}, base / "parquet", base / "shards"
    parquet.mkdir()
    shards.mkdir()
    for split in COUNTS:
        files = [
            (p, i) for i, k in enumerate(classes) for p in sorted((colours / split / k).iterdir())
        ]
        rows = {
            "image": [{"bytes": path.read_bytes(), "path": path.name} for path, _ in files],
            "label": [number for _, number in files],
        }
        saved[split] = datasets.Dataset.from_dict(rows, features=features)
        saved[split].to_parquet(parquet / f"{split}-00000-of-00001.parquet")
        for shard in range(4):
            with tarfile.open(shards / f"{split}-{shard}.tar", "w") as tar:
                for path, number in files[shard::4]:
                    add(tar, f"{split}{number}x{path.stem}.png", path.read_bytes())
                    add(tar, f"{split}{number}x{path.stem}.cls", b"%d" % number)
    datasets.DatasetDict(saved).save_to_disk(str(base / "disk"))
    return {"imagefolder": colours, "parquet": parquet, "disk": base / "disk", "shards": shards}


def add(tar, name, content):
    entry = tarfile.TarInfo(name)
    entry.size = len(content)
    tar.addfile(entry, io.BytesIO(content))


@pytest.fixture
def opened(make_config, places):
    """A source by its name, as (train, val)."""

    def make(name, **changes):
        root = places["shards" if name == "webdataset" else name.partition("/")[2]]
        given = {"data__source": name, "data__root": str(root), **changes}
        if name == "webdataset":
            given |= {"data__train": "train-*.tar", "data__val": "val-*.tar"}
            given |= {"data__classes": ["blue", "green", "red"]}
        elif not name.endswith("disk"):  # what the builders call it
            given["data__val"] = "validation"
        return open_sources(make_config(**given).data, segmentation=False, shuffle_seed=5)

    return make


def mean_colour(pair):
    image, number = pair
    noise = torch.rand(1)
    colour = torch.tensor(np.asarray(image.convert("RGB"), np.float32).mean((0, 1)))
    return torch.cat([colour, noise]), torch.tensor(number)


def taken(source, count, update=0, workers=0, rank=0, world=1):
    found = training_batches(
        source,
        mean_colour,
        Layout(3, rank=rank, world=world),
        seed=7,
        update=update,
        workers=workers,
        strict=True,
    )
    return [(x.images, x.targets) for x in islice(found, count)]


def same(one, two):
    assert len(one) == len(two)
    return all(
        torch.equal(a, b) for x, y in zip(one, two, strict=True) for a, b in zip(x, y, strict=True)
    )


def right(batches):
    """Whether every target is the class of its colour: the channel that is the brightest."""
    return all(
        torch.equal(images[:, :3].argmax(1), torch.tensor([2, 1, 0])[targets])
        for images, targets in batches
    )


def whole(source, world=1, workers=0):
    """Colours of everything that is validated, by process."""
    return [
        torch.cat(
            [
                x.images[:, 0]
                for x in validation_batches(
                    source,
                    mean_colour,
                    Layout(4, rank=rank, world=world),
                    workers=workers,
                    strict=True,
                )
            ]
        )
        for rank in range(world)
    ]


@pytest.mark.parametrize("name", ["hf/imagefolder", "hf/parquet", "hf/disk"])
def test_tables_are_read_in_any_order(opened, name):
    train, val = opened(name)
    assert (len(train), len(val)) == (24, 15)
    assert train.classes == ("blue", "green", "red")
    run = taken(train, 8)
    assert right(run)
    assert (
        sorted(torch.cat([targets for _, targets in run]).tolist()) == [0] * 8 + [1] * 8 + [2] * 8
    )
    assert same(taken(train, 5, update=3, workers=2), run[3:])


STREAMS = ["hf/imagefolder", "hf/parquet", "hf/disk", "webdataset"]


@pytest.mark.parametrize("name", STREAMS)
def test_streams_come_back_at_any_step(opened, name):
    changes = {} if name == "webdataset" else {"data__stream": True}
    train, val = opened(name, data__samples=24, **changes)
    assert isinstance(train, Stream)
    run = taken(train, 10)
    assert right(run)
    assert same(taken(train, 6, update=4), run[4:])
    colours = torch.cat([images[:, 0] for images, _ in run[:8]])
    assert len(colours.unique()) == 24  # one pass has each image once
    assert len(torch.cat(whole(val)).unique()) == 15


@pytest.mark.parametrize("world", [1, 2])
def test_workers_and_processes_share_shards(opened, world):
    train, val = opened("webdataset", data__samples=24)
    assert train.shards(world) == 4 // world
    runs = [taken(train, 5, workers=2, rank=rank, world=world) for rank in range(world)]
    seen = torch.cat([images[:, 0] for run in runs for images, _ in run[: 8 // world]])
    assert len(seen.unique()) == 24 if world == 2 else len(seen)
    for rank in range(world):
        again = taken(train, 2, update=3, workers=2, rank=rank, world=world)
        assert same(again, runs[rank][3:])
    shares = whole(val, world, workers=2)
    assert len(torch.cat(shares).unique()) == sum(map(len, shares)) == 15


def test_three_processes_share_four_shards(opened):
    _, val = opened("webdataset", data__samples=24)
    shares = whole(val, world=3)
    assert len(torch.cat(shares).unique()) == sum(map(len, shares)) == 15


def test_a_stream_of_fewer_rows_than_shards(opened):
    _, val = opened("hf/disk", data__stream=True, data__samples=24)
    assert len(torch.cat(whole(val))) == 15  # 16 shards are wanted where there are that many rows


def test_bad_rows_are_named(make_config, tmp_path):
    with tarfile.open(tmp_path / "train-0.tar", "w") as tar:
        for i in range(4):
            content = io.BytesIO()
            Image.new("RGB", (8, 8), (255, 0, 0)).save(content, "PNG")
            add(tar, f"{i}.png", content.getvalue()[: 40 if i == 2 else None])
            add(tar, f"{i}.cls", b"2")
    given = {"data__root": str(tmp_path), "data__train": "*.tar", "data__val": "*.tar"}
    config = make_config(
        data__source="webdataset", data__classes=["blue", "green", "red"], data__samples=4, **given
    )
    _, val = open_sources(config.data, segmentation=False)
    (batch,) = validation_batches(val, mean_colour, Layout(4), workers=0, strict=False)
    assert len(batch.targets) == 3
    ((name, _why),) = batch.failures
    assert "train-0.tar" in name
    assert name.endswith("2")
    config = make_config(
        data__source="webdataset", data__classes=["blue"], data__samples=4, **given
    )
    train, _ = open_sources(config.data, segmentation=False)
    with pytest.raises(ValueError, match="data.classes: expected more than 2 names") as error:
        taken(train, 1)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("hf/disk", {"data__train": "trian"}, "data.source: hf/disk"),
        ("hf/disk", {"data__image_key": "picture"}, "data.image_key: expected one of image, label"),
        ("hf/disk", {"data__target_key": "class"}, "data.target_key: expected one of image, label"),
        ("hf/parquet", {"data__train": "trian"}, "data.source: hf/parquet"),
    ],
)
def test_tables_that_are_not_as_stated(opened, name, changes, message):
    with pytest.raises(ValueError, match=message):
        opened(name, **changes)


@pytest.fixture(scope="module")
def torchvision_root(tmp_path_factory) -> Path:
    """MNIST's and CIFAR10's files, of few and random images."""
    root = tmp_path_factory.mktemp("torchvision")
    rng = np.random.default_rng(0)
    raw = root / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for half, count in (("train", 12), ("t10k", 6)):
        pixels = rng.integers(0, 256, (count, 28, 28), dtype=np.uint8)
        head = struct.pack(">IIII", 2051, count, 28, 28)
        (raw / f"{half}-images-idx3-ubyte").write_bytes(head + pixels.tobytes())
        labels = struct.pack(">II", 2049, count) + bytes(i % 10 for i in range(count))
        (raw / f"{half}-labels-idx1-ubyte").write_bytes(labels)
    return root


def test_mnist(make_config, torchvision_root):
    config = make_config(data__source="torchvision/mnist", data__root=str(torchvision_root))
    train, val = open_sources(config.data, segmentation=False)
    assert (len(train), len(val), len(train.classes)) == (12, 6, 10)
    image, number = train.load(3)
    assert (image.mode, image.size, number) == ("RGB", (28, 28), 3)


def test_cifar10(make_config, tmp_path, monkeypatch):
    from torchvision.datasets import CIFAR10

    folder = tmp_path / CIFAR10.base_folder
    folder.mkdir()
    names = [name for name, _ in (*CIFAR10.train_list, *CIFAR10.test_list)]
    for i, name in enumerate(names):
        rows = {"data": np.full((2, 3072), 40 * i, np.uint8), "labels": [i, 9]}
        (folder / name).write_bytes(pickle.dumps(rows))
    meta = {CIFAR10.meta["key"]: list("abcdefghij")}
    (folder / CIFAR10.meta["filename"]).write_bytes(pickle.dumps(meta))
    monkeypatch.setattr("torchvision.datasets.cifar.check_integrity", lambda *args: True)
    config = make_config(data__source="torchvision/cifar10", data__root=str(tmp_path))
    train, val = open_sources(config.data, segmentation=False)
    assert (len(train), len(val), train.classes) == (10, 2, tuple("abcdefghij"))
    image, number = val.load(0)
    assert (image.getpixel((0, 0)), number) == ((200, 200, 200), 5)


def test_what_torchvision_is_not_asked(make_config, torchvision_root, tmp_path):
    mnist, cifar = (
        make_config(data__source=f"torchvision/{name}", data__root=str(root), data__train=split)
        for name, root, split in (
            ("mnist", torchvision_root, "trian"),
            ("cifar10", tmp_path, "train"),
        )
    )
    with pytest.raises(ValueError, match=r"data.train: expected one of train, .*, got 'trian'"):
        open_sources(mnist.data, segmentation=False)
    with pytest.raises(ValueError, match="data.source: torchvision/cifar10: Dataset not found"):
        open_sources(cifar.data, segmentation=False)
    for split in COUNTS:
        (tmp_path / split / "red").mkdir(parents=True)
        (tmp_path / split / "red" / "0.png").write_bytes(b"no image")
    config = make_config(data__source="torchvision/image_folder", data__root=str(tmp_path))
    train, _ = open_sources(config.data, segmentation=False)
    with pytest.raises(UnreadableError, match="cannot identify"):
        train.load(0)
