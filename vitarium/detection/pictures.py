"""What a detector finds: drawn on images, and the best and the worst of the images measured."""

from __future__ import annotations

import colorsys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mmcv
import numpy as np
import torch
from mmengine.dist import get_rank
from mmengine.hooks import Hook
from mmengine.structures import InstanceData
from PIL import Image, ImageDraw, ImageFont

from vitarium.tools._common import FONT_SIZE, save, sheet

_SIDE = 480  # pixels that the longer side has at least, so that captions can be read
_OPACITY = 0.45  # of masks
_OVERLAP = 0.5  # of boxes that are taken for the same


@dataclass(frozen=True)
class Objects:
    """What is on an image, or is said to be.

    Attributes:
        boxes: [N, 4], x1, y1, x2, y2 in pixels.
        labels: [N], numbers of classes.
        scores: [N], or None for what is certain.
        masks: bool [N, H, W], or None.
    """

    boxes: np.ndarray
    labels: np.ndarray
    scores: np.ndarray | None = None
    masks: np.ndarray | None = None

    @classmethod
    def of(cls, instances: InstanceData, threshold: float = 0.0) -> Objects:
        """Instances of mmdet's whose score is at least the threshold, the likeliest first."""
        values: dict[str, Any] = {key: instances[key] for key in instances.keys()}  # noqa: SIM118
        boxes, labels = _array(values["bboxes"]), _array(values["labels"])
        scores = _array(values["scores"]) if "scores" in values else None
        masks = _array(values["masks"]).astype(bool) if "masks" in values else None
        if scores is None:
            return cls(boxes, labels, None, masks)
        order = np.argsort(-scores, kind="stable")
        order = order[scores[order] >= threshold]
        return cls(
            boxes[order], labels[order], scores[order], None if masks is None else masks[order]
        )

    def rows(self, names: Sequence[str]) -> list[dict[str, Any]]:
        """One dictionary for each, of plain values."""
        rows = []
        for i, label in enumerate(self.labels.tolist()):
            row = {
                "index": label,
                "label": _name(names, label),
                "box": self.boxes[i].round(2).tolist(),
            }
            if self.scores is not None:
                row["score"] = float(self.scores[i])
            if self.masks is not None:
                row["mask_area"] = int(self.masks[i].sum())
            rows.append(row)
        return rows


def draw(image: Image.Image, objects: Objects, names: Sequence[str]) -> Image.Image:
    """The image, enlarged if it is small, with masks, boxes, classes and scores."""
    factor = -(-_SIDE // max(image.size))
    size = image.width * factor, image.height * factor
    pixels = np.asarray(image.convert("RGB").resize(size, Image.Resampling.BICUBIC), np.float32)
    colours = [_colour(label, len(names)) for label in objects.labels.tolist()]
    if objects.masks is not None:
        for mask, colour in zip(objects.masks, colours, strict=True):
            large = mask.repeat(factor, 0).repeat(factor, 1)
            pixels[large] += _OPACITY * (np.array(colour, np.float32) - pixels[large])
    drawn = Image.fromarray(pixels.round().astype(np.uint8))
    pen, font = ImageDraw.Draw(drawn), ImageFont.load_default(FONT_SIZE)
    # of a detector that has learned nothing they may be anywhere
    boxes = np.nan_to_num(objects.boxes * factor).clip(0, np.tile(size, 2) - 1)
    for i in reversed(range(len(colours))):  # the likeliest on top
        left, top, right, bottom = boxes[i].tolist()
        pen.rectangle((left, top, max(left, right), max(top, bottom)), outline=colours[i], width=2)
        text = _name(names, int(objects.labels[i]))
        if objects.scores is not None:
            text += f" {objects.scores[i]:.2f}"
        height = FONT_SIZE + 4
        place = (left, top - height if top >= height else bottom)
        width = font.getlength(text) + 4
        pen.rectangle((*place, place[0] + width, place[1] + height), fill=colours[i])
        pen.text((place[0] + 2, place[1] + 1), text, fill="black", font=font)
    return drawn


class Extremes(Hook):
    """Keeps the best and worst images of a test or a validation, and draws them when it ends.

    An image counts by the share of what is on it and what is found that match, 2 TP / (2 TP + FP +
    FN): a box matches one of its class that overlaps it by half, what is found is what has the
    threshold's score. Images on which nothing is and nothing is found do not count. What is there
    is in pixels of the file, as mmdet's own tests have it: annotations are loaded after `Resize`.

    Args:
        folder: of the pictures, ``best.png`` and ``worst.png``, which the next validation replaces;
            with several processes each writes those of its images, ``best_1.png`` and so on.
        count: images of each kind.
        threshold: least score.

    Attributes:
        written: the pictures.
        blind: whether there were images without annotations or without a path, which were left out.
    """

    def __init__(self, folder: Path, count: int, threshold: float = 0.3) -> None:
        self._folder = folder
        self._names: Sequence[str] = ()
        self._count = count
        self._threshold = threshold
        self._seen: list[tuple[float, str, Objects, Objects]] = []
        self.written: list[Path] = []
        self.blind = False

    def before_test(self, runner: Any) -> None:
        """Forget what was seen."""
        self._begin(runner.test_loop)

    def before_val(self, runner: Any) -> None:
        """Forget what was seen."""
        self._begin(runner.val_loop)

    def after_test_iter(
        self, runner: Any, batch_idx: int, data_batch: Any = None, outputs: Any = None
    ) -> None:
        """Look at a batch."""
        self._look(outputs)

    def after_val_iter(
        self, runner: Any, batch_idx: int, data_batch: Any = None, outputs: Any = None
    ) -> None:
        """Look at a batch."""
        self._look(outputs)

    def after_test(self, runner: Any) -> None:
        """Draw.

        Raises:
            OSError: the pictures cannot be written.
        """
        self._draw("test")

    def after_val(self, runner: Any) -> None:
        """Draw.

        Raises:
            OSError: the pictures cannot be written.
        """
        self._draw("validation")

    def _begin(self, loop: Any) -> None:
        self._names = class_names(loop.dataloader.dataset.metainfo)
        self._seen, self.written, self.blind = [], [], False

    def _look(self, samples: Any) -> None:
        for sample in samples:
            if not _can_be_judged(sample):
                self.blind = True
                continue
            there = Objects.of(sample.gt_instances)
            found = Objects.of(sample.pred_instances, self._threshold)
            if len(there.labels) or len(found.labels):
                share = _agreement(there, found)
                self._seen.append((share, sample.img_path, there, found))
                self._drop()

    def _draw(self, what: str) -> None:
        self._seen.sort(key=lambda x: x[0])
        count = min(self._count, len(self._seen))
        if not count:
            return
        self._folder.mkdir(parents=True, exist_ok=True)
        suffix = f"_{get_rank()}" if get_rank() else ""
        for kind, chosen in (("best", self._seen[-count:][::-1]), ("worst", self._seen[:count])):
            rows = [self._row(*each) for each in chosen]
            size = (
                max(x.width for row in rows for x, _ in row),
                max(x.height for row in rows for x, _ in row),
            )
            rows = [[(_padded(panel, size), text) for panel, text in row] for row in rows]
            file = self._folder / f"{kind}{suffix}.png"
            save(sheet(f"the {kind} of the {what}: found, and what is there", rows), file)
            self.written.append(file)

    def _drop(self) -> None:
        """Keep no more than can be among the best or the worst."""
        if len(self._seen) > 4 * self._count:
            self._seen.sort(key=lambda x: x[0])
            self._seen = self._seen[: self._count] + self._seen[-self._count :]

    def _row(
        self, share: float, path: str, there: Objects, found: Objects
    ) -> list[tuple[Image.Image, str]]:
        image = Image.fromarray(mmcv.imread(path, channel_order="rgb"))
        captions = f"{Path(path).name}: {share:.0%} match", f"{len(there.labels)} there"
        panels = (draw(image, objects, self._names) for objects in (found, there))
        return list(zip(panels, captions, strict=True))


def _can_be_judged(sample: Any) -> bool:
    """Whether it has boxes, those that are there too, and tells where its image is."""
    parts = [getattr(sample, name, ()) for name in ("gt_instances", "pred_instances")]
    return all("bboxes" in part for part in parts) and "img_path" in sample


def _agreement(there: Objects, found: Objects) -> float:
    """2 TP / (2 TP + FP + FN), the likeliest of what is found choosing first."""
    left = set(range(len(there.labels)))
    right = 0
    for box, label in zip(found.boxes, found.labels, strict=True):
        overlaps = {i: _overlap(box, there.boxes[i]) for i in left if there.labels[i] == label}
        best = max(overlaps, key=lambda i: overlaps[i], default=None)
        if best is not None and overlaps[best] >= _OVERLAP:
            left.remove(best)
            right += 1
    return 2 * right / (len(there.labels) + len(found.labels))


def _overlap(a: np.ndarray, b: np.ndarray) -> float:
    """What two boxes share over what they cover."""
    sides = np.minimum(a[2:], b[2:]) - np.maximum(a[:2], b[:2])
    shared = float(sides.clip(min=0).prod())
    return shared / max(float((a[2:] - a[:2]).prod() + (b[2:] - b[:2]).prod()) - shared, 1e-12)


def _array(values: Any) -> np.ndarray:
    """Of a tensor, or of mmdet's boxes or masks."""
    if hasattr(values, "to_ndarray"):
        return values.to_ndarray()
    tensor: torch.Tensor = getattr(values, "tensor", values)
    return tensor.detach().cpu().numpy()


def _padded(panel: Image.Image, size: tuple[int, int]) -> Image.Image:
    whole = Image.new("RGB", size, "white")
    whole.paste(panel)
    return whole


def _colour(index: int, count: int) -> tuple[int, int, int]:
    """Hues spread over the classes."""
    red, green, blue = colorsys.hsv_to_rgb(index / max(count, 1), 0.75, 1.0)
    return round(255 * red), round(255 * green), round(255 * blue)


def class_names(meta: Mapping[str, Any] | None) -> tuple[str, ...]:
    """Names of the classes by a data set's ``metainfo``; of mmdet 2.x they are in capitals."""
    meta = meta or {}
    return tuple(meta.get("classes") or meta.get("CLASSES") or ())


def _name(names: Sequence[str], label: int) -> str:
    return names[label] if label < len(names) else str(label)
