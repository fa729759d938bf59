"""`vitarium data`: what is there, what is missing, and what is linked, sorted or made."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vitarium.checkpoints import disk
from vitarium.tools import data
from vitarium.training.config import DataConfig
from vitarium.training.sources import open_sources

VAL = "ILSVRC2012_val_{:08}.JPEG"
WNIDS = ("n01440764", "n01443537")


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """Two images of each kind, in two classes."""
    parts = {
        name: tuple(
            replace(part, count=2 if part.ending else 1, classes=2 * bool(part.classes))
            for part in parts
        )
        for name, parts in data.PARTS.items()
    }
    monkeypatch.setattr(data, "PARTS", parts)


def put(path, *shape, top=256, mode=None):
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(0).integers(0, top, shape or (4, 6, 3), dtype=np.uint8)
    image = Image.fromarray(pixels)
    (image if mode is None else image.convert(mode)).save(path)


def tree(root):
    """Paths of all files, through links."""
    return sorted(path.relative_to(root).as_posix() for path in root.rglob("*") if path.is_file())


@pytest.fixture
def unpacked(tmp_path):
    """ImageNet as Kaggle packs it: validation images in one folder, and their table."""
    folder = tmp_path / "unpacked"
    for number, wnid in enumerate(WNIDS, 1):
        put(folder / "ILSVRC/Data/CLS-LOC/train" / wnid / f"{wnid}_1.JPEG")
        put(folder / "ILSVRC/Data/CLS-LOC/val" / VAL.format(number))
    table = ["ImageId,PredictionString"]
    table += [f"{VAL.format(i)[:-5]},{WNIDS[-i]} 85 1 499 272 " for i in (1, 2)]
    (folder / "LOC_val_solution.csv").write_text("\n".join(table))
    return folder


def test_what_is_missing_is_said_with_its_address(program, tmp_path):
    result = program("data", "check", "coco", tmp_path)
    assert result.status == 1
    lines = result.out.splitlines()
    assert len(lines) == 4
    assert lines[0].split() == [
        *("missing", "train2017", "0", "of", "2", "files", "*.jpg:"),
        "http://images.cocodataset.org/zips/train2017.zip",
    ]
    assert "no such file: http" in lines[2]
    assert not [*tmp_path.iterdir()]


def test_imagenet_is_linked_and_sorted(program, unpacked, tmp_path):
    before = tree(unpacked)
    root = tmp_path / "imagenet"
    layout = ("data", "layout", "imagenet", root, "--from", unpacked)
    result = program(*layout)
    assert result.status == 1
    assert "--labels: expected the file with the classes of 2 images" in result.err
    assert not root.exists()
    labels = ("--labels", unpacked / "LOC_val_solution.csv")
    for _ in range(2):  # a second time changes nothing
        result = program(*layout, *labels)
        assert result.status == 0, result.out + result.err
        assert [line.split()[0] for line in result.out.splitlines()] == ["there", "there"]
    assert tree(root / "val") == [f"{WNIDS[0]}/{VAL.format(2)}", f"{WNIDS[1]}/{VAL.format(1)}"]
    assert tree(unpacked) == before
    config = DataConfig(source="folder", root=str(root), image_size=(4, 6))
    train, val = open_sources(config, segmentation=False)
    assert train.classes == WNIDS
    assert [val.load(i)[1] for i in range(2)] == [0, 1]


def test_images_in_place_are_renamed(program, unpacked):
    root = unpacked / "ILSVRC/Data/CLS-LOC"
    command = ("data", "layout", "imagenet", root, "--labels", unpacked / "LOC_val_solution.csv")
    assert program(*command).status == 0
    assert tree(root / "val") == [f"{WNIDS[0]}/{VAL.format(2)}", f"{WNIDS[1]}/{VAL.format(1)}"]
    assert "expected none, no image" in program(*command).err


def test_an_image_without_a_class_stops_before_anything_is_made(program, unpacked, tmp_path):
    (tmp_path / "labels.txt").write_text(f"{VAL.format(1)} {WNIDS[0]}\n")
    root = tmp_path / "imagenet"
    result = program(
        *("data", "layout", "imagenet", root, "--from", unpacked),
        *("--labels", tmp_path / "labels.txt"),
    )
    assert result.status == 1
    assert f"has no class of 1 images: {VAL.format(2)}" in result.err
    assert not root.exists()


def test_the_devkit_has_numbers(tmp_path):
    io = pytest.importorskip("scipy.io")
    path = tmp_path / "ILSVRC2012_validation_ground_truth.txt"
    path.write_text("2\n1\n")
    with pytest.raises(ValueError, match=r"numbers beside meta\.mat"):
        data._labels(path)
    synsets = np.zeros(2, dtype=[("ILSVRC2012_ID", "i4"), ("WNID", "O")])
    synsets["ILSVRC2012_ID"], synsets["WNID"] = (1, 2), WNIDS
    io.savemat(tmp_path / "meta.mat", {"synsets": synsets})
    assert data._labels(path) == {
        VAL.format(1)[:-5]: WNIDS[1],
        VAL.format(2)[:-5]: WNIDS[0],
    }


def test_a_pair_that_is_torn_is_named(program, tmp_path):
    root = tmp_path / "root"
    folder = tmp_path / "unpacked/ADEChallengeData2016"
    for split in ("training", "validation"):
        for i in range(2):
            put(folder / f"images/{split}/{i}.jpg")
            put(folder / f"annotations/{split}/{i}.png", 4, 6)
    (folder / "objectInfo150.txt").write_text("Idx\tName\n1\twall, w\n")
    layout = ("data", "layout", "ade20k", root, "--from", folder.parent)
    assert program(*layout).status == 0
    assert (root / "images/training").resolve() == folder / "images/training"
    assert (root / "objectInfo150.txt").stat().st_ino == (
        folder / "objectInfo150.txt"
    ).stat().st_ino
    (folder / "annotations/training/1.png").rename(folder / "annotations/training/3.png")
    result = program("data", "check", "ade20k", root)
    assert result.status == 1
    assert "missing  annotations/training" in result.out
    assert "none for 1 images, such as 1" in result.out


def test_cityscapes_gets_maps_of_the_classes_that_count(program, tmp_path):
    root, folder = tmp_path / "root", tmp_path / "unpacked"
    for split in ("train", "val"):
        for i in range(2):
            put(folder / f"leftImg8bit/{split}/town/{i}_leftImg8bit.png")
            put(folder / f"gtFine/{split}/town/{i}_gtFine_labelIds.png", 4, 6, top=34)
    before = tree(folder)
    assert program("data", "check", "cityscapes", folder).status == 1
    result = program("data", "layout", "cityscapes", root, "--from", folder)
    assert result.status == 0, result.out
    assert tree(folder) == before
    ids = np.array(Image.open(folder / "gtFine/train/town/0_gtFine_labelIds.png"))
    made = np.array(Image.open(root / "gtFine/train/town/0_gtFine_labelTrainIds.png"))
    known = {7: 0, 8: 1, 11: 2, 12: 3, 13: 4, 17: 5, 19: 6, 20: 7, 21: 8, 22: 9, 23: 10, 24: 11}
    known |= {25: 12, 26: 13, 27: 14, 28: 15, 31: 16, 32: 17, 33: 18}
    assert made.tolist() == [[known.get(x, 255) for x in row] for row in ids.tolist()]
    config = DataConfig(source="cityscapes", root=str(root), image_size=(4, 6))
    assert len(open_sources(config, segmentation=True)[0]) == 2
    # and where they lie, without links
    assert program("data", "layout", "cityscapes", folder).status == 0
    assert len(tree(folder)) == len(before) + 4


def test_a_map_that_cannot_be_written_leaves_nothing(program, tmp_path, monkeypatch):
    for i in range(2):
        put(tmp_path / f"gtFine/train/town/{i}_gtFine_labelIds.png", 4, 6, top=34)

    def full(path):
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr(disk, "sync", full)
    before = tree(tmp_path)
    result = program("data", "layout", "cityscapes", tmp_path)
    assert result.status == 1
    assert "No space left" in result.err
    assert tree(tmp_path) == before


def test_a_map_of_another_kind_is_refused(program, tmp_path):
    put(tmp_path / "gtFine/val/town/0_gtFine_labelIds.png")
    assert (
        "expected 8 bits a pixel, got RGB" in program("data", "layout", "cityscapes", tmp_path).err
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("layout", "coco", "/nowhere"), "DIR: expected a folder, got '/nowhere'"),
        (("layout", "coco", ".", "--from", "/nowhere"), "--from: expected a folder"),
        (("layout", "coco", ".", "--labels", "x"), "--labels: expected none, coco needs none"),
    ],
)
def test_what_does_not_fit_is_said(program, arguments, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = program("data", *arguments)
    assert result.status == 1
    assert message in result.err


def test_links_are_relative_to_nothing(program, tmp_path, monkeypatch):
    for split in ("train", "val"):
        for i in range(2):
            put(tmp_path / f"there/images/{split}2017/{i}.jpg")
        put(tmp_path / f"there/annotations/instances_{split}2017.png")
        path = tmp_path / f"there/annotations/instances_{split}2017"
        path.with_suffix(".png").rename(path.with_suffix(".json"))
    monkeypatch.chdir(tmp_path)
    assert program("data", "layout", "coco", "here", "--from", "there").status == 0
    monkeypatch.chdir("/")
    assert program("data", "check", "coco", tmp_path / "here").status == 0
    assert Path(tmp_path / "here/train2017").readlink().is_absolute()
