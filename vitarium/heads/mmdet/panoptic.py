"""What mmdet's panoptic data and measure import of panopticapi, which no package index has.

Colours of a PNG are numbers of segments in base 256, red first. Panoptic quality of a class is the
sum of the matched segments' IoU over TP + FP / 2 + FN / 2 (Kirillov et al., arXiv 1801.00868); that
of some classes is the mean over those that occur at all.
"""

from __future__ import annotations

import importlib.util
import sys
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, fields
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

import numpy as np

_NAME = "panopticapi"
OFFSET = 256**3  # numbers of segments are smaller
VOID = 0  # the number of what belongs to no segment


def rgb2id(color: Any) -> Any:
    """Numbers of segments [H, W] of a picture [H, W, 3], or of one colour."""
    if isinstance(color, np.ndarray) and color.ndim == 3:
        return color.astype(np.int32) @ np.array([1, 256, 256**2], np.int32)
    red, green, blue = (int(x) for x in color)
    return red + 256 * green + 256**2 * blue


def id2rgb(id_map: Any) -> Any:
    """The inverse of `rgb2id`: uint8 [H, W, 3], or a list of three numbers."""
    if isinstance(id_map, np.ndarray):
        return np.stack([id_map // 256**i % 256 for i in range(3)], -1).astype(np.uint8)
    return [int(id_map) // 256**i % 256 for i in range(3)]


@dataclass
class PQStatCat:
    """Counts of one class.

    Attributes:
        iou: sum over matched segments.
        tp: matched segments.
        fp: predicted ones without a match.
        fn: true ones without a match.
    """

    iou: float = 0.0
    tp: int = 0
    fp: int = 0
    fn: int = 0

    def __iadd__(self, other: PQStatCat) -> PQStatCat:
        for field in fields(self):
            setattr(self, field.name, getattr(self, field.name) + getattr(other, field.name))
        return self

    def quality(self) -> dict[str, float]:
        """Panoptic, segmentation and recognition quality, each 0 where there is nothing."""
        weight = self.tp + (self.fp + self.fn) / 2
        sq = self.iou / self.tp if self.tp else 0.0
        rq = self.tp / weight if weight else 0.0
        return {"pq": self.iou / weight if weight else 0.0, "sq": sq, "rq": rq}


class PQStat:
    """Counts by class, of any number of images."""

    def __init__(self) -> None:
        self.pq_per_cat: defaultdict[int, PQStatCat] = defaultdict(PQStatCat)

    def __getitem__(self, label: int) -> PQStatCat:
        return self.pq_per_cat[label]

    def __iadd__(self, other: PQStat) -> PQStat:
        for label, counts in other.pq_per_cat.items():
            self.pq_per_cat[label] += counts
        return self

    def pq_average(
        self, categories: Mapping[int, Mapping[str, Any]], isthing: bool | None
    ) -> tuple[dict[str, float], dict[int, dict[str, float]]]:
        """Means over classes, and all classes.

        Args:
            categories: classes by their number, of which ``isthing`` is told.
            isthing: whether only things count, or only stuff; None for both.

        Returns:
            ``pq``, ``sq``, ``rq`` and ``n``, the number of classes that occur, and the first three
            of each class.
        """
        chosen = {
            label: self.pq_per_cat[label]
            for label, info in categories.items()
            if isthing is None or isthing == (info["isthing"] == 1)
        }
        classes = {label: counts.quality() for label, counts in chosen.items()}
        there = [classes[label] for label, x in chosen.items() if x.tp + x.fp + x.fn]
        means = {key: sum(x[key] for x in there) / max(len(there), 1) for key in ("pq", "sq", "rq")}
        return {**means, "n": len(there)}, classes


def provide() -> None:
    """Make these importable as panopticapi's where that is not installed."""
    if _NAME in sys.modules or importlib.util.find_spec(_NAME) is not None:
        return
    contents: dict[str, dict[str, Any]] = {
        _NAME: {"__path__": []},
        f"{_NAME}.utils": {"rgb2id": rgb2id, "id2rgb": id2rgb},
        f"{_NAME}.evaluation": {"OFFSET": OFFSET, "VOID": VOID, "PQStat": PQStat},
    }
    for name, content in contents.items():
        module = ModuleType(name, __doc__)
        module.__spec__ = ModuleSpec(name, loader=None, origin=__name__)
        vars(module).update(content)
        sys.modules[name] = module
    for part in ("utils", "evaluation"):
        setattr(sys.modules[_NAME], part, sys.modules[f"{_NAME}.{part}"])
