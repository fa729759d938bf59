"""`vitarium data`: what of a data set is there, what is missing, and links that complete it.

Nothing is downloaded, deleted or overwritten. What `layout` makes is complete or not there: links,
renamed files, and maps that are written under another name first.
"""

from __future__ import annotations

import os
import re
from argparse import Namespace
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from vitarium.checkpoints.disk import replacing

_LABEL = re.compile(r"(ILSVRC2012_val_\d{8})\D.*?(n\d{8})")
_IMAGENET = "https://image-net.org/download.php (account)"
_ADE20K = "http://data.csail.mit.edu/places/ADEchallenge/ADEChallengeData2016.zip"
_CITYSCAPES = "https://www.cityscapes-dataset.com/downloads (account), "
_COCO = "http://images.cocodataset.org/"
_CITY_CLASSES = (7, 8, 11, 12, 13, 17, *range(19, 29), 31, 32, 33)  # labelIds of the 19 that count
_IDS, _TRAIN_IDS = "_gtFine_labelIds.png", "_gtFine_labelTrainIds.png"


@dataclass(frozen=True)
class Part:
    """Files that a data set consists of.

    Attributes:
        path: below the root: a file, or a folder with files at any depth.
        ending: of the files' names.
        count: how many there are.
        address: where to get them.
        within: other paths at which they lie in what is unpacked.
        classes: how many folders they are sorted into, 0 for any number.
        beside: path and ending of the files that each of these has one of, or none.
    """

    path: str
    ending: str
    count: int
    address: str
    within: tuple[str, ...] = ()
    classes: int = 0
    beside: tuple[str, str] | None = None


_IN_IMAGENET = "ILSVRC/Data/CLS-LOC/"
_IN_ADE20K = "ADEChallengeData2016/"
PARTS: Mapping[str, tuple[Part, ...]] = {
    "imagenet": (
        Part("train", ".JPEG", 1281167, _IMAGENET, (f"{_IN_IMAGENET}train",), classes=1000),
        Part("val", ".JPEG", 50000, _IMAGENET, (f"{_IN_IMAGENET}val",), classes=1000),
    ),
    "ade20k": (
        Part("objectInfo150.txt", "", 1, _ADE20K, (f"{_IN_ADE20K}objectInfo150.txt",)),
        *(
            part
            for split, count in (("training", 20210), ("validation", 2000))
            for part in (
                Part(f"images/{split}", ".jpg", count, _ADE20K, (f"{_IN_ADE20K}images/{split}",)),
                Part(
                    f"annotations/{split}",
                    ".png",
                    count,
                    _ADE20K,
                    (f"{_IN_ADE20K}annotations/{split}",),
                    beside=(f"images/{split}", ".jpg"),
                ),
            )
        ),
    ),
    "cityscapes": tuple(
        part
        for split, count in (("train", 2975), ("val", 500))
        for part in (
            Part(
                f"leftImg8bit/{split}",
                "_leftImg8bit.png",
                count,
                f"{_CITYSCAPES}leftImg8bit_trainvaltest.zip",
            ),
            Part(
                f"gtFine/{split}",
                _TRAIN_IDS,
                count,
                f"{_CITYSCAPES}gtFine_trainvaltest.zip, from whose labelIds `layout` makes them",
                beside=(f"leftImg8bit/{split}", "_leftImg8bit.png"),
            ),
        )
    ),
    "coco": (
        Part("train2017", ".jpg", 118287, f"{_COCO}zips/train2017.zip", ("images/train2017",)),
        Part("val2017", ".jpg", 5000, f"{_COCO}zips/val2017.zip", ("images/val2017",)),
        *(
            Part(
                f"annotations/instances_{split}2017.json",
                "",
                1,
                f"{_COCO}annotations/annotations_trainval2017.zip",
            )
            for split in ("train", "val")
        ),
    ),
}


def run(args: Namespace) -> int:
    """Lay the folders out where that is asked for, and say what is there; 1 if something is not.

    Raises:
        ValueError: folders or labels that are not there or do not fit, before anything is made.
        OSError: nothing can be written.
    """
    root = Path(args.root).expanduser()
    if args.action == "layout":
        source = root if args.source is None else Path(args.source).expanduser()
        if not source.is_dir():
            argument = "DIR" if args.source is None else "--from"
            raise ValueError(f"{argument}: expected a folder, got {str(source)!r}")
        _LAYOUTS.get(args.name, _link_parts)(args.name, root, source.resolve(), args.labels)
    found = [(part, *_state(root, part)) for part in PARTS[args.name]]
    width = max(len(part.path) for part, _, _ in found)
    for part, complete, words in found:
        print(f"{'there' if complete else 'missing':8} {part.path:{width}}  {words}")
    return int(not all(complete for _, complete, _ in found))


def _state(root: Path, part: Part) -> tuple[bool, str]:
    """Whether a part is complete, and in words what is there and what is not."""
    path = root / part.path
    if not part.ending:
        there = path.is_file()
        return there, "a file" if there else f"no such file: {part.address}"
    names = set(_names(path, part.ending))
    words = [f"{len(names)} of {part.count} files *{part.ending}"]
    folders = {name.partition("/")[0] for name in names if "/" in name}
    if part.classes:
        words.append(f"in {len(folders)} of {part.classes} classes")
        loose = sum("/" not in name for name in names)
        if loose:
            words.append(f"{loose} in no class: layout --labels FILE")
    lacking: list[str] = []
    if part.beside is not None:
        lacking = sorted({*_names(root / part.beside[0], part.beside[1])} - names)
        if lacking:
            words.append(f"none for {len(lacking)} images, such as {lacking[0]}")
    complete = len(names) == part.count and len(folders) >= part.classes and not lacking
    return complete, ", ".join(words) + ("" if complete else f": {part.address}")


def _names(folder: Path, ending: str) -> Iterator[str]:
    """Files with that ending in a folder and those in it, without the ending, from the folder."""
    for path, _, files in os.walk(folder, followlinks=True):
        inner = Path(path).relative_to(folder).as_posix()
        before = "" if inner == "." else f"{inner}/"
        yield from (before + x.removesuffix(ending) for x in files if x.endswith(ending))


def _link_parts(name: str, root: Path, source: Path, labels: str | None) -> None:
    """Link each part that is not there to where it lies in ``source``."""
    if labels is not None:
        raise ValueError(f"--labels: expected none, {name} needs none, got {labels!r}")
    for part in PARTS[name]:
        _link_part(root, source, part)


def _link_part(root: Path, source: Path, part: Part) -> None:
    found = _found(source, part)
    if found is not None:
        _link(found, root / part.path)


def _found(source: Path, part: Part) -> Path | None:
    """Where a part lies in what is unpacked."""
    places = (source / place for place in (part.path, *part.within))
    return next((place for place in places if place.exists()), None)


def _link(source: Path, target: Path) -> None:
    """A folder by a symbolic link, a file by a hard one where that can be; what is there stays."""
    if os.path.lexists(target):
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    if source.is_dir():
        target.symlink_to(source, target_is_directory=True)
        return
    try:
        target.hardlink_to(source)
    except OSError:  # another file system, or one without hard links
        target.symlink_to(source)


def _lay_out_imagenet(name: str, root: Path, source: Path, labels: str | None) -> None:
    """Link folders of classes, and sort validation images by their labels into such folders."""
    train, val = PARTS[name]
    folder, target = _found(source, val), root / val.path
    flat = [] if folder is None else sorted(folder.glob(f"*{val.ending}"))
    classes: Mapping[str, str] = {}
    if flat:
        if labels is None:
            raise ValueError(
                f"--labels: expected the file with the classes of {len(flat)} images in {folder}: "
                "LOC_val_solution.csv, or ILSVRC2012_validation_ground_truth.txt of the devkit"
            )
        classes = _labels(Path(labels).expanduser())
        unknown = [path.name for path in flat if path.stem not in classes]
        if unknown:
            raise ValueError(
                f"--labels: {labels} has no class of {len(unknown)} images: {unknown[0]}"
            )
        if target.is_symlink():
            raise ValueError(f"{target}: expected a folder to sort images into, got a link")
    elif labels is not None:
        raise ValueError(f"--labels: expected none, no image in {source} lacks a class")
    _link_part(root, source, train)
    if not flat:
        _link_part(root, source, val)
    for path in flat:
        place = target / classes[path.stem] / path.name
        if path.parent != target.resolve():
            _link(path, place)
            continue
        place.parent.mkdir(exist_ok=True)
        if os.path.lexists(place):
            raise ValueError(f"{path}: {place} is there too")
        path.rename(place)


def _labels(path: Path) -> dict[str, str]:
    """Classes of validation images by their names, from Kaggle's table or the devkit's list."""
    lines = path.read_text(encoding="utf-8").split("\n")
    found = {match[1]: match[2] for match in map(_LABEL.match, lines) if match}
    if found:
        return found
    numbers = [int(line) for line in lines if line.strip().isdecimal()]
    meta = path.with_name("meta.mat")
    if not numbers or not meta.exists():
        raise ValueError(
            f"--labels: expected lines with an image and its class, or the devkit's numbers beside "
            f"meta.mat, got {path}"
        )
    try:
        from scipy.io import loadmat
    except ImportError as error:
        raise ValueError("scipy is not installed: pip install scipy (it reads meta.mat)") from error
    synsets = loadmat(meta, squeeze_me=True)["synsets"]
    names = {int(row["ILSVRC2012_ID"]): str(row["WNID"]) for row in synsets}
    return {f"ILSVRC2012_val_{i:08}": names[number] for i, number in enumerate(numbers, 1)}


def _lay_out_cityscapes(name: str, root: Path, source: Path, labels: str | None) -> None:
    """Link images and maps; make maps of the 19 classes from those of all, where there are none."""
    if labels is not None:
        raise ValueError(f"--labels: expected none, {name} needs none, got {labels!r}")
    table = np.full(256, 255, np.uint8)
    table[list(_CITY_CLASSES)] = range(len(_CITY_CLASSES))
    for part in PARTS[name]:
        if part.ending != _TRAIN_IDS:
            _link_part(root, source, part)
            continue
        for ids in sorted((source / part.path).glob(f"*/*{_IDS}")):
            target = root / part.path / ids.parent.name / ids.name.replace(_IDS, _TRAIN_IDS)
            made = ids.with_name(target.name)
            if made.exists():
                _link(made, target)
            elif not os.path.lexists(target):
                with Image.open(ids) as image:
                    if image.mode not in ("L", "P"):
                        raise ValueError(f"{ids}: expected 8 bits a pixel, got {image.mode}")
                    numbers = table[np.asarray(image)]
                target.parent.mkdir(parents=True, exist_ok=True)
                with replacing(target) as temporary:
                    Image.fromarray(numbers).save(temporary, format="PNG")


_LAYOUTS: Mapping[str, Callable[[str, Path, Path, str | None], None]] = {
    "imagenet": _lay_out_imagenet,
    "cityscapes": _lay_out_cityscapes,
}
