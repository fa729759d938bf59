"""Whole detectors as their authors released them: backbone, neck and heads into mmdet's model.

mmdet 3 kept the names of 2.x for the necks and heads of pyramids, and their order of classes; only
the backbone's names are the authors' own. FeatureBackbone takes those wherever it is loaded, so
mmdet's tools do too; `load_detector` is strict besides, says what is wrong before it loads, and
reads detectron2's Mask2Former.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from vitarium.checkpoints import CheckpointError, Report, compare, convert, outline, read
from vitarium.checkpoints.wrappers import unwrap_tensors
from vitarium.heads.mmdet.detectron2 import from_detectron2

_BACKBONE = "backbone."
_COUNTER = "num_batches_tracked"


def load_detector(
    model: nn.Module,
    source: str | os.PathLike[str] | Mapping[str, Any],
    skip: Sequence[str] = (),
) -> Report:
    """Load a checkpoint into a detector of mmdet's: all of it, or nothing.

    Files of mmdet 2.x and 3 are understood, with what trained them around the tensors, and of
    detectron2 those of Mask2Former with a backbone of ours. Of mmcv's
    averaged weights (names that begin with ``ema_``) only one copy is needed: where such a file
    was written, the average has the plain names.

    Args:
        model: as a config of ours describes it; its ``backbone`` is a FeatureBackbone.
        source: a file, or what such a file holds.
        skip: beginnings of names that are left out, of the file and of the model, which keeps what
            it has there.

    Returns:
        What was loaded and what was ignored, with reasons.

    Raises:
        CheckpointError: the file cannot be read, is of mmdet 1.x, or has other heads, another
            number of classes or another backbone; the model is unchanged.
    """
    if isinstance(source, Mapping):
        held, what = source, "checkpoint"
    else:
        what = os.fspath(source)
        fitted(model, outline(source), what, skip, data=False)  # before memory is taken
        held = read(source, mmap=True)
    report, state_dict = fitted(model, held, what, skip)
    model.load_state_dict(state_dict, strict=not skip)
    return report


def for_detector(
    state_dict: Mapping[str, Tensor], model: nn.Module
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """A detector's state dict with its backbone's tensors in our names.

    Args:
        state_dict: tensors by name, without what surrounds them in a file.
        model: the detector; it is not changed.

    Returns:
        Tensors by the model's names, and names that it rightly lacks, with why.

    Raises:
        CheckpointError: the tensors cannot be converted.
    """
    state_dict, ignored = from_detectron2(state_dict, model)
    averaged = {f"ema_{name.replace('.', '_')}" for name in state_dict}
    ignored |= dict.fromkeys(
        (name for name in state_dict if name in averaged), "a second copy beside the average"
    )
    rest = {name: x for name, x in state_dict.items() if name not in ignored}
    if not hasattr(model, "backbone"):
        return rest, ignored
    theirs = {k.removeprefix(_BACKBONE): x for k, x in rest.items() if k.startswith(_BACKBONE)}
    ours, left = for_backbone(theirs, model.get_submodule("backbone"))
    found = {name: x for name, x in rest.items() if not name.startswith(_BACKBONE)}
    found |= {_BACKBONE + name: x for name, x in ours.items()}
    for name, expected in model.state_dict().items():  # as torch does for files before 1.0
        owner, _, leaf = name.rpartition(".")
        if leaf == _COUNTER and name not in found and f"{owner}.running_mean" in found:
            found[name] = torch.zeros_like(expected)
    return found, ignored | {_BACKBONE + name: why for name, why in left.items()}


def for_backbone(
    state_dict: Mapping[str, Tensor], backbone: nn.Module
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """A backbone's tensors in our names, less those that no output depends on, which come with why.

    Raises:
        CheckpointError: they cannot be converted.
    """
    if not state_dict:
        return {}, {}
    ours = convert(state_dict, backbone)
    ignore = getattr(backbone, "checkpoint_ignore", dict)
    left = compare(ours, backbone, ignore(), data=False).ignored
    return {name: x for name, x in ours.items() if name not in left}, dict(left)


def fitted(
    model: nn.Module, held: Any, what: str, skip: Sequence[str] = (), *, data: bool = True
) -> tuple[Report, dict[str, Tensor]]:
    """What `load_detector` loads, without loading it.

    Args:
        model: the detector; it is not changed.
        held: what a checkpoint file holds.
        what: begins messages.
        skip: as there.
        data: whether tensors must hold data; False for an `outline`.

    Returns:
        What fits and what is ignored, and tensors by the model's names.

    Raises:
        CheckpointError: as there.
    """
    version = _version(held)
    if version is not None and version < 2:
        raise CheckpointError(
            f"{what}: expected a detector of mmdet 2 or 3, got one of mmdet {version}.x, which has "
            f"other names and the background as the first class"
        )
    try:
        state_dict, ignored = for_detector(unwrap_tensors(held), model)
    except CheckpointError as error:
        raise CheckpointError(f"{what}: {error}") from error
    skipped = tuple(name for name in state_dict if name.startswith(tuple(skip)))
    state_dict = {name: x for name, x in state_dict.items() if name not in skipped}
    report = compare(state_dict, model, data=data)
    missing = tuple(name for name in report.missing if not name.startswith(tuple(skip)))
    report = replace(report, missing=missing)
    report.require_whole(f"{what} does not fit {type(model).__name__}")
    return replace(report, ignored=ignored | dict.fromkeys(skipped, "to be skipped")), state_dict


def _version(held: Any) -> int | None:
    """The first number of the mmdet that wrote a checkpoint, where it says so."""
    meta = held.get("meta") if isinstance(held, Mapping) else None
    written = meta.get("mmdet_version") if isinstance(meta, Mapping) else None
    found = re.match(r"\d+", written) if isinstance(written, str) else None
    return int(found[0]) if found else None
