"""What is wrong with a detection config, its data or its weights, said before training starts."""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from mmdet.datasets import BaseVideoDataset, CocoDataset, CocoPanopticDataset
from mmdet.registry import DATASETS
from mmengine.config import Config
from torch import nn

from vitarium.tools.list import did_you_mean

_LOOPS = ("EpochBasedTrainLoop", "IterBasedTrainLoop")
_NEEDED = ("model", "train_dataloader", "optim_wrapper", "train_cfg")
# What mmdet 2.x had at the top of its configs, and where it went.
_OLD = {
    "data": "train_dataloader, val_dataloader, test_dataloader (samples_per_gpu is batch_size, "
    "workers_per_gpu is num_workers)",
    "optimizer": "optim_wrapper = dict(type='OptimWrapper', optimizer=...)",
    "optimizer_config": "optim_wrapper.clip_grad",
    "lr_config": "param_scheduler",
    "runner": "train_cfg = dict(type='EpochBasedTrainLoop', max_epochs=...)",
    "total_epochs": "train_cfg.max_epochs",
    "evaluation": "val_evaluator and train_cfg.val_interval",
    "checkpoint_config": "default_hooks.checkpoint",
    "log_config": "default_hooks.logger and visualizer",
    "fp16": "optim_wrapper.type='AmpOptimWrapper'",
}
_PANOPTIC = ("num_things_classes", "num_stuff_classes")
_SHOWN = 3  # names in a message


def check_training(config: Config) -> list[str]:
    """Check what can be known before a detector is built.

    Returns:
        What is worth saying of the data.

    Raises:
        ValueError: the first thing that is wrong.
    """
    missing = [key for key in _NEEDED if not config.get(key)]
    old = [f"{key} -> {_OLD[key]}" for key in _OLD if key in config]
    if missing and old:
        raise ValueError(f"{config.filename}: a config of mmdet 2.x; change {'; '.join(old)}")
    if missing:
        raise ValueError(f"{config.filename}: expected {', '.join(missing)}, found none")
    _check_runner(config)
    said = [*_check_data(config, "train"), *_check_data(config, "val")]
    _check_packages(config)
    return said


def check_test(config: Config) -> list[str]:
    """Check what can be known before a detector is built and tested.

    Returns:
        What is worth saying of the data.

    Raises:
        ValueError: the first thing that is wrong.
    """
    for key in ("model", "test_dataloader", "test_evaluator", "test_cfg"):
        if config.get(key) is None:
            raise ValueError(f"{config.filename}: {key}: expected it for a test, found none")
    _check_packages(config)
    return [*_check_data(config, "test")]


def _check_runner(config: Config) -> None:
    """Refuse what would be ignored, or would break an exact resumption."""
    loop = _class_name(config.train_cfg.get("type", ""))
    by_epoch = config.train_cfg.get("by_epoch", loop == _LOOPS[0])
    if loop and loop not in _LOOPS:
        raise ValueError(f"train_cfg.type: expected {' or '.join(_LOOPS)}, got {loop}")
    length, other = ("max_epochs", "max_iters")[:: 1 if by_epoch else -1]
    if not isinstance(config.train_cfg.get(length), int) or other in config.train_cfg:
        raise ValueError(f"train_cfg: expected {length} and no {other}, got {config.train_cfg}")
    if config.get("runner_type", "Runner") != "Runner":
        raise ValueError(f"runner_type: expected Runner, got {config.runner_type!r}")
    if config.get("randomness", {}).get("diff_rank_seed"):
        raise ValueError(
            "randomness.diff_rank_seed: expected False, got True; processes draw unlike each other "
            "without it"
        )
    if "optimizer" not in config.optim_wrapper:
        raise ValueError(f"optim_wrapper: expected one optimizer, got {config.optim_wrapper}")
    for key, option in (("resume", "--resume"), ("work_dir", "--output")):
        if config.get(key):
            raise ValueError(f"{key}: expected none, got {config[key]!r}; {option} says that")
    hook = config.get("default_hooks", {}).get("checkpoint", {})
    if hook is None or _class_name(hook.get("type", "CheckpointHook")) != "CheckpointHook":
        raise ValueError(f"default_hooks.checkpoint: expected a CheckpointHook, got {hook}")
    for key in ("out_dir", "filename_tmpl", "backend_args", "file_client_args"):
        if hook.get(key) is not None:
            raise ValueError(f"default_hooks.checkpoint.{key}: expected none, got {hook[key]!r}")
    if not isinstance(config.train_dataloader.get("batch_size"), int):
        raise ValueError("train_dataloader.batch_size: expected a number of images, found none")


def _check_packages(config: Config) -> None:
    """See that what is asked of torch and of other packages can be had."""
    if not isinstance(config.get("compile") or False, bool | dict):
        raise ValueError(
            f"compile: expected True, False or what torch.compile takes, got {config.compile!r}"
        )
    visualizer = config.get("visualizer") or {}
    kinds = [_class_name(x.get("type", "")) for x in visualizer.get("vis_backends") or ()]
    if "TensorboardVisBackend" in kinds and find_spec("tensorboard") is None:
        raise ValueError('visualizer: tensorboard is not installed: pip install "vitarium[train]"')


def _check_data(config: Config, split: str) -> Iterator[str]:
    """Check a split's annotations, classes and images."""
    loader = config.get(f"{split}_dataloader")
    if loader is None:
        return
    if not isinstance(loader.get("dataset"), dict):
        raise ValueError(
            f"{split}_dataloader.dataset: expected a dict, got {loader.get('dataset')}"
        )
    # A detector that reads what it looks for has as many outputs as words.
    heads = [] if "language_model" in config.model else [*_class_counts(config.model, "model")]
    for where, dataset in _data_sets(loader.dataset, f"{split}_dataloader.dataset"):
        kind = dataset.get("type")
        kind = DATASETS.get(kind) if isinstance(kind, str) else kind
        if kind is None:
            hint = did_you_mean(str(dataset.get("type")), DATASETS.module_dict)
            raise ValueError(f"{where}.type: unknown: {dataset.get('type')!r}{hint}")
        classes = _classes(dataset, kind, where)
        if classes is not None and not issubclass(kind, BaseVideoDataset):  # tracks tell fewer
            things = _things(dataset, kind) or classes
            _check_counts(heads, len(classes), len(things), where)
        if dataset.get("backend_args") or not issubclass(kind, CocoDataset):
            continue
        path = _joined(dataset, dataset.get("ann_file") or "")
        content = _annotations(path, f"{where}.ann_file")
        folders = {"img": "images"}
        if issubclass(kind, CocoPanopticDataset):
            content["annotations"] = [*_segments(content.get("annotations", ()), path)]
            folders["seg"] = "maps of segments"
        elif _loads(dataset, "with_seg"):
            folders["seg"] = "semantic maps"
        yield from _check_boxes(content, path, dataset, classes or (), split)
        _check_images(content, path, dataset, where, folders)
    for evaluator in _listed(config.get(f"{split}_evaluator")):
        source = evaluator.get("ann_file")
        if source is not None and not evaluator.get("backend_args") and not Path(source).is_file():
            raise ValueError(f"{split}_evaluator.ann_file: expected a file, {source} is not there")


def _data_sets(dataset: Mapping[str, Any], where: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Those that read files, out of those that repeat, mix and chain others."""
    if "dataset" in dataset:
        yield from _data_sets(dataset["dataset"], f"{where}.dataset")
    elif "datasets" in dataset:
        for number, part in enumerate(dataset["datasets"]):
            yield from _data_sets(part, f"{where}.datasets.{number}")
    else:
        yield where, dataset


def _class_counts(model: Any, where: str) -> Iterator[tuple[str, int]]:
    """What the heads that tell classes apart say of their number."""
    for key, part in model.items() if isinstance(model, dict) else enumerate(_listed(model)):
        place = f"{where}.{key}"
        if isinstance(part, dict) and _is_head(place) and isinstance(part.get("num_classes"), int):
            yield f"{place}.num_classes", part["num_classes"]
        if isinstance(part, dict) and key == "panoptic_head" and {*_PANOPTIC} <= part.keys():
            yield f"{place}: {' + '.join(_PANOPTIC)}", sum(part[x] for x in _PANOPTIC)
        if isinstance(part, dict | list | tuple):
            yield from _class_counts(part, place)


def _check_counts(heads: Sequence[tuple[str, int]], classes: int, things: int, where: str) -> None:
    """Compare numbers of classes; where there is stuff, boxes and masks are of things alone."""
    for place, count in heads:
        expected = classes if place.endswith(_PANOPTIC[-1]) else things
        if count != expected:
            raise ValueError(
                f"{place}: expected {expected}, the number of classes of {where}, got {count}"
            )


def _is_head(place: str) -> bool:
    names = [name for name in place.split(".") if not name.isdecimal()]
    return names[-1] in ("bbox_head", "mask_head")


def _classes(dataset: Mapping[str, Any], kind: type[Any], where: str) -> Sequence[str] | None:
    classes = (dataset.get("metainfo") or {}).get("classes")
    if classes is None:
        classes = getattr(kind, "METAINFO", {}).get("classes")
    if isinstance(classes, str):
        if not Path(classes).is_file():
            raise ValueError(
                f"{where}.metainfo.classes: expected a tuple of names, got {classes!r}"
            )
        classes = Path(classes).read_text(encoding="utf-8").splitlines()
    return classes


def _things(dataset: Mapping[str, Any], kind: type[Any]) -> Sequence[str]:
    """The classes that have boxes, of panoptic data; none of others."""
    if not issubclass(kind, CocoPanopticDataset):
        return ()
    meta = dataset.get("metainfo") or {}
    return meta.get("thing_classes", () if "classes" in meta else kind.METAINFO["thing_classes"])


def _joined(dataset: Mapping[str, Any], name: str) -> Path:
    return Path(dataset.get("data_root") or "") / name


def _annotations(path: Path, where: str) -> dict[str, Any]:
    """A file of COCO's format, with its images and categories."""
    if not path.is_file():
        raise ValueError(f"{where}: expected a file, {path} is not there")
    try:
        content = json.loads(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{where}: {path} is damaged: {error}") from error
    for key in ("images", "categories"):
        if not isinstance(content, dict) or not isinstance(content.get(key), list):
            raise ValueError(f"{where}: {path} has no list of {key}, as COCO's format has")
    if not content["images"]:
        raise ValueError(f"{where}: expected images, {path} has none")
    return content


def _loads(dataset: Mapping[str, Any], what: str) -> bool:
    """Whether the annotations that are loaded are to have something."""
    steps = dataset.get("pipeline") or ()
    return any(_class_name(x.get("type", "")) == "LoadAnnotations" and x.get(what) for x in steps)


def _segments(annotations: Sequence[dict[str, Any]], path: Path) -> Iterator[dict[str, Any]]:
    """Segments of panoptic annotations, each with its image, as other annotations are."""
    for each in annotations:
        if not isinstance(each.get("segments_info"), list):
            raise ValueError(f"{path}: expected segments_info, as panoptic annotations have it")
        for segment in each["segments_info"]:
            yield {**segment, "image_id": each.get("image_id")}


def _check_boxes(
    content: dict[str, Any],
    path: Path,
    dataset: Mapping[str, Any],
    classes: Sequence[str],
    split: str,
) -> Iterator[str]:
    """Check classes, and boxes as mmdet will read them; say how many images have none."""
    names = {each["id"]: each["name"] for each in content["categories"]}
    absent = [name for name in classes if name not in names.values()]
    if absent:
        raise ValueError(
            f"{path}: expected categories {_some(absent)}, it has {_some(names.values())}; "
            f"metainfo=dict(classes=(...)) names those that are wanted"
        )
    if split == "test" and not content.get("annotations"):
        return  # as published where the truth is secret
    masked = _loads(dataset, "with_mask")
    with_boxes = set()
    images = {each["id"] for each in content["images"]}
    for each in content.get("annotations", ()):
        where = f"{path}: annotation {each.get('id')}"
        _check_box(each, where)
        if each["image_id"] not in images:
            raise ValueError(f"{where}: its image {each['image_id']} is not there")
        if each["category_id"] not in names:
            raise ValueError(f"{where}: its category {each['category_id']} is not there")
        if masked and not each.get("segmentation"):
            raise ValueError(f"{where}: expected a mask (segmentation), found none")
        if names[each["category_id"]] in classes and min(each["bbox"][2:]) >= 1:
            with_boxes.add(each["image_id"])
    if not with_boxes:
        raise ValueError(f"{path}: expected boxes of {_some(classes)}, no image has any")
    without = len(images) - len(with_boxes)
    if without and split == "train":
        left_out = (dataset.get("filter_cfg") or {}).get("filter_empty_gt", False)
        does = "are left out" if left_out else "count as background"
        yield f"{path}: {without} of {len(images)} images have no box and {does}"


def _check_box(each: dict[str, Any], where: str) -> None:
    for key in ("image_id", "category_id", "area", "bbox"):
        if key not in each:
            raise ValueError(f"{where}: expected {key}, found none")
    box = each["bbox"]
    numbers = isinstance(box, list) and all(isinstance(x, int | float) for x in box)
    if not numbers or len(box) != 4 or not all(map(math.isfinite, box)):
        raise ValueError(f"{where}: bbox: expected [x, y, width, height], got {box}")
    if min(box[2:]) < 0:
        raise ValueError(f"{where}: bbox: expected a width and a height, got {box}")


def _check_images(
    content: dict[str, Any],
    path: Path,
    dataset: Mapping[str, Any],
    where: str,
    folders: Mapping[str, str],
) -> None:
    """See that images are there, and what goes with them; ``folders`` says what is in which."""
    for each in content["images"]:
        if not {"id", "width", "height"} <= each.keys():
            raise ValueError(f"{path}: expected id, width and height of an image, got {each}")
    names = [each["file_name"] for each in content["images"] if "file_name" in each]
    for key, what in folders.items():
        folder = _joined(dataset, (dataset.get("data_prefix") or {}).get(key) or "")
        for name in names:
            file = name if key == "img" else name.replace(".jpg", ".png")
            if not (folder / file).is_file():
                raise ValueError(f"{where}: expected {what} in {folder}, no {file} there")


def check_channels(model: nn.Module) -> None:
    """Compare a backbone of ours with the neck behind it.

    Raises:
        ValueError: the neck expects other channels.
    """
    channels = getattr(getattr(model, "backbone", None), "channels", None)
    expected = getattr(getattr(model, "neck", None), "in_channels", None)
    if channels is None or not isinstance(expected, list | tuple):
        return
    if [*channels] != [*expected]:
        raise ValueError(
            f"model.neck.in_channels: expected {[*channels]}, the backbone's, got {[*expected]}"
        )


def _some(names: Collection[str]) -> str:
    rest = len(names) - _SHOWN
    shown = ", ".join([*names][:_SHOWN])
    return f"{shown} and {rest} more" if rest > 0 else shown


def _class_name(kind: Any) -> str:
    """Of a class, or of its name with or without a scope before it."""
    return str(getattr(kind, "__name__", kind)).rpartition(".")[2]


def _listed(value: Any) -> list[Any]:
    if value is None:
        return []
    return list(value) if isinstance(value, list | tuple) else [value]
