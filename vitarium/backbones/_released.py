"""Tables of released files: what follows from a row in them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from vitarium.backbones._registry import Published
from vitarium.checkpoints import Weight

Tables = Mapping[str, Mapping[str, tuple[Any, ...]]]

_HEADS = {
    "mask_rcnn": "Mask R-CNN",
    "cascade_mask_rcnn": "Cascade Mask R-CNN",
    "retinanet": "RetinaNet",
    "reppoints_v2": "RepPoints V2",
    "mask_reppoints_v2": "Mask RepPoints V2",
    "upernet": "UPerNet",
    "semantic_fpn": "Semantic FPN",
}
_MOBY = "moby_"  # before a head: self-supervised pre-training instead of classification
_DATA = {"coco": ("det", "COCO"), "ade20k": ("seg", "ADE20K")}
_METRICS = {"coco": ("box AP", "mask AP"), "ade20k": ("mIoU", "mIoU ms")}


def dense(
    org: str,
    source: str,
    tables: Tables,
    weight: Callable[[Any, str], Weight],
    entry: str = "{}",
    metrics: Mapping[str, tuple[str, ...]] = _METRICS,
) -> tuple[dict[str, Weight], dict[str, Published]]:
    """Weights and results of detectors and segmenters, by name.

    Args:
        org: who released them, as it stands in tags.
        source: where the results stand.
        tables: for every ``<head>_<schedule>_<data>`` a row of each backbone: its figures, as many
            as are known, and what ``weight`` needs to know of the file.
        weight: makes the `Weight`, given the end of a row and the task.
        entry: name of a backbone's entry, with a place for what the tables call it.
        metrics: what the figures are, by data.
    """
    weights, results = {}, {}
    for setting, rows in tables.items():
        head, schedule, data = setting.rsplit("_", 2)
        task, data_set = _DATA[data]
        pretrained = ", pretrained by MoBY" if head.startswith(_MOBY) else ""
        described = f"{_HEADS[head.removeprefix(_MOBY)]}, {schedule}, {data_set}{pretrained}"
        for backbone, (*figures, file) in rows.items():
            name = f"{entry.format(backbone)}.{org}_{setting}"
            weights[name] = weight(file, task)
            known = dict(zip(metrics[data], figures, strict=False))
            results[name] = Published(source=source, setting=described, metrics=known)
    return weights, results


def transformers_copy(repository: str) -> Weight:
    """SHI Labs' own copy of their weights on the Hugging Face hub, whose cards state the licence.

    Its layout is that of transformers' Nat and Dinat.
    """
    url = f"https://huggingface.co/shi-labs/{repository}/resolve/main/pytorch_model.bin"
    return Weight(url=url, wrapper="plain", licence="MIT")
