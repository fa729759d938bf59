"""The embedded data as folders of files, made on demand: whole or not there.

- "classification": ``{train,val}/<digit>/<sample>.png``, 64 x 64 pixels, as timm and torchvision's
  ImageFolder read it; ``sample`` counts those of scikit-learn's ``load_digits``.
- "detection": ``{train,val}/<scene>.png`` and COCO's ``annotations/instances_{train,val}.json``.
  Category ids are 1 ... 10 for the digits 0 ... 9, masks are uncompressed run lengths (what
  pycocotools and mmdet decode), and each annotation tells its ``sample``.
- "segmentation": ``images/{train,val}/<scene>.png`` and ``annotations/{train,val}/<scene>.png``,
  8-bit maps, 0 for background and 1 ... 10 for the digits 0 ... 9, as mmseg has Pascal VOC; every
  pixel counts.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch.hub
from filelock import FileLock
from PIL import Image

from vitarium.data.digits import CLASSES, SPLITS, DigitImages
from vitarium.data.scenes import Scene, Scenes
from vitarium.data.textures import Size

VERSION = 2  # of the files' content: one more wherever a digit or a scene looks unlike before
KINDS = ("classification", "detection", "segmentation")
_ORIGIN = (
    "E. Alpaydin, C. Kaynak: Optical Recognition of Handwritten Digits, UCI (CC BY 4.0), as "
    "scikit-learn has it"
)
_Advance: TypeAlias = Callable[[int], None]


@dataclass(frozen=True)
class SceneSet:
    """Which scenes there are.

    Attributes:
        train: number of scenes for training.
        val: number of scenes of held-out digits.
        size: height and width in pixels.
        seed: of all scenes.
    """

    train: int = 1000
    val: int = 200
    size: Size = (160, 160)
    seed: int = 0

    def scenes(self) -> dict[str, Scenes]:
        """Those of "train" and "val".

        Raises:
            ValueError: a number is out of range, or scikit-learn is missing.
        """
        counts = zip(SPLITS, (self.train, self.val), strict=True)
        return {split: Scenes(split, count, self.size, seed=self.seed) for split, count in counts}


def ensure(
    kind: str, root: str | os.PathLike[str] | None = None, scenes: SceneSet | None = None
) -> Path:
    """The folder of one kind of data, made now if it is not there yet.

    It is made under another name first, by one process, for which others wait. What another version
    of the generator makes, or other numbers, has another name.

    Args:
        kind: "classification", "detection" or "segmentation".
        root: where it is looked for and made; None for ``datasets/vitarium`` in torch.hub's folder,
            which TORCH_HOME moves.
        scenes: None for ``SceneSet()``; "classification" has none.

    Raises:
        ValueError: an argument is out of range, or scikit-learn is missing.
        OSError: it cannot be written.
    """
    if kind not in KINDS:
        raise ValueError(f"kind: expected {', '.join(KINDS)}, got {kind!r}")
    if kind == "classification" and scenes is not None:
        raise ValueError(f"scenes: expected None for classification, got {scenes}")
    name = f"digits_v{VERSION}_{kind}"
    scenes = scenes or SceneSet()
    if kind != "classification":
        H, W = scenes.size
        name += f"_{scenes.train}_{scenes.val}_{H}x{W}_seed{scenes.seed}"
    base = Path(torch.hub.get_dir()) / "datasets" / "vitarium" if root is None else Path(root)
    folder = base / name
    if not folder.is_dir():
        loaded = scenes.scenes()
        base.mkdir(parents=True, exist_ok=True)
        with FileLock(base / f"{name}.lock"):
            if not folder.is_dir():
                with _whole(folder, base / f"{name}.part") as part:
                    _write(kind, part, loaded, lambda count: None)
    return folder


def make(folder: str | os.PathLike[str], scenes: SceneSet, advance: _Advance) -> None:
    """Write all kinds into a new folder, a folder for each.

    Args:
        folder: a new folder, or an empty one.
        scenes: which.
        advance: told how many more images were written.

    Raises:
        ValueError: the folder holds something already, a number is out of range, or scikit-learn is
            missing.
        OSError: it cannot be written.
    """
    target = Path(folder).resolve()
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ValueError(f"{folder}: expected a new or an empty folder")
    loaded = scenes.scenes()
    with _whole(target, target.with_name(f".{target.name}.{os.getpid()}.part")) as part:
        for kind in KINDS:
            _write(kind, part / kind, loaded, advance)
        if target.exists():
            target.rmdir()


@contextmanager
def _whole(folder: Path, part: Path) -> Iterator[Path]:
    """A new folder to fill, ``part``, which is renamed in the end and is gone after a failure."""
    shutil.rmtree(part, ignore_errors=True)  # of a process that was killed
    try:
        part.mkdir(parents=True)
        yield part
        part.rename(folder)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def _write(kind: str, folder: Path, scenes: dict[str, Scenes], advance: _Advance) -> None:
    for split in SPLITS:
        if kind == "classification":
            _write_classification(folder / split, DigitImages(split), advance)
        elif kind == "detection":
            _write_detection(folder, scenes[split], advance)
        else:
            _write_segmentation(folder, scenes[split], advance)


def _write_classification(folder: Path, images: DigitImages, advance: _Advance) -> None:
    for name in images.classes:
        (folder / name).mkdir(parents=True)
    for index, sample in enumerate(images.samples):
        picture, label = images[index]
        picture.save(folder / images.classes[label] / f"{sample:04}.png")
        advance(1)


def _write_detection(folder: Path, scenes: Scenes, advance: _Advance) -> None:
    pictures = folder / scenes.split
    pictures.mkdir(parents=True)
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for index in range(len(scenes)):
        scene = scenes[index]
        name = _name(index)
        _save(scene.image, pictures / name)
        H, W = scene.owners.shape
        images.append({"id": index, "file_name": name, "height": H, "width": W})
        for annotation in _annotations(scene):
            # pycocotools takes an id of 0 for "no match"
            annotations.append({"id": len(annotations) + 1, "image_id": index, **annotation})
        advance(1)
    document = {
        "info": {
            "description": f"vitarium's scenes of handwritten digits, {scenes.split}",
            "version": str(VERSION),
            "contributor": _ORIGIN,
            "seed": scenes.seed,
        },
        "images": images,
        "annotations": annotations,
        "categories": [{"id": i, "name": name} for i, name in enumerate(CLASSES, 1)],
    }
    (folder / "annotations").mkdir(exist_ok=True)
    file = folder / "annotations" / f"instances_{scenes.split}.json"
    file.write_text(json.dumps(document, separators=(",", ":")), encoding="utf-8")


def _annotations(scene: Scene) -> Iterator[dict[str, Any]]:
    rows = zip(scene.labels, scene.samples, scene.boxes, scene.masks, strict=True)
    for label, sample, box, mask in rows:
        yield {
            "category_id": int(label) + 1,
            "bbox": box.tolist(),
            "area": int(mask.sum()),
            "segmentation": {"size": list(mask.shape), "counts": _run_lengths(mask)},
            "iscrowd": 0,
            "sample": int(sample),
        }


def _run_lengths(mask: np.ndarray) -> list[int]:
    """COCO's: lengths of runs down the columns, in turns of what is not set and what is."""
    pixels = mask.T.ravel()
    starts = np.flatnonzero(np.diff(pixels, prepend=False))  # of all runs but a first, unset one
    counts: list[int] = np.diff(starts, prepend=0, append=pixels.size).tolist()
    return counts


def _write_segmentation(folder: Path, scenes: Scenes, advance: _Advance) -> None:
    images, maps = folder / "images" / scenes.split, folder / "annotations" / scenes.split
    images.mkdir(parents=True)
    maps.mkdir(parents=True)
    for index in range(len(scenes)):
        scene = scenes[index]
        _save(scene.image, images / _name(index))
        _save(scene.semantic, maps / _name(index))
        advance(1)


def _name(index: int) -> str:
    return f"{index:06}.png"


def _save(pixels: np.ndarray, file: Path) -> None:
    # twice as fast as Pillow's own level, and hardly larger
    Image.fromarray(pixels).save(file, compress_level=1)
