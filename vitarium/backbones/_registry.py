"""Entries in timm's registry, and the one place that builds a model and finds its weights."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar

from timm.models import (
    PretrainedCfg,
    build_model_with_cfg,
    is_model,
    load_pretrained,
    model_entrypoint,
    register_model,
    resolve_pretrained_cfg,
)
from torch import Tensor, nn

from vitarium.checkpoints import CheckpointError, Weight, compare, fetch, read, unwrap

_Model = TypeVar("_Model", bound=nn.Module)
_Entry = TypeVar("_Entry", bound=Callable[..., nn.Module])
_Filter = Callable[[dict[str, Tensor], nn.Module], dict[str, Tensor]]

_entries: dict[str, str] = {}


@dataclass(frozen=True)
class Published:
    """What the authors report for one weight file.

    Attributes:
        source: where the figures stand.
        top1: a classifier's top-1 accuracy in percent on the data set of the tag.
        gflops: multiply-accumulate operations of one image at the tag's input size, in 1e9.
        setting: how it was trained and tested, where the tag does not say it all: a detector's or
            a segmenter's head, schedule and data.
        metrics: what a detector or a segmenter reaches, in percent, by the metric's name.
    """

    source: str
    top1: float | None = None
    gflops: float | None = None
    setting: str | None = None
    metrics: Mapping[str, float] = field(default_factory=dict)


def entries() -> dict[str, ModuleType]:
    """Every entry that vitarium has in timm's registry, and the family module that defines it."""
    return {name: sys.modules[module] for name, module in sorted(_entries.items())}


def register(fn: _Entry) -> _Entry:
    """Enter a model function into timm's registry, unless timm itself has a model of that name.

    In that case timm's entry stays, a warning names ours, and the import goes on.
    """
    name = fn.__name__
    if is_model(name):
        owner = model_entrypoint(name).__module__
        if owner.partition(".")[0] == "timm":
            warnings.warn(
                f"{fn.__module__}.{name} is not registered: timm has a model of that name "
                f"({owner}), which stays",
                UserWarning,
                stacklevel=2,
            )
            return fn
    _entries[name] = fn.__module__
    register_model(fn)
    return fn


def build(
    model_cls: Callable[..., _Model],
    variant: str,
    pretrained: bool,
    *,
    weights: Mapping[str, Weight],
    filter_fn: _Filter,
    **kwargs: Any,
) -> _Model:
    """Build a model as timm does, with weights from a verified file.

    Args:
        model_cls: the model's class.
        variant: the entry's name.
        pretrained: whether to load weights: those that the caller names (``file``,
            ``state_dict``, ``url`` or ``hf_hub_id`` in ``pretrained_cfg_overlay`` or
            ``pretrained_cfg``), or else those of the tag.
        weights: the family's weight files, by ``entry.tag``.
        filter_fn: the family's ``checkpoint_filter_fn``.
        **kwargs: timm's builder arguments and the model's own.

    Returns:
        The model, or timm's feature extractor around it for ``features_only=True``.

    Raises:
        CheckpointError: no weights are known for the tag, they cannot be had, or they do not
            fit. A checkpoint is loaded whole; only a classifier for another ``num_classes`` and
            a first convolution for another ``in_chans`` may differ, as timm adapts them.
    """
    kwargs["feature_cfg"] = {"feature_cls": "getter", **kwargs.get("feature_cfg", {})}
    if not pretrained:
        return build_model_with_cfg(model_cls, variant, False, **kwargs)
    cfg = resolve_pretrained_cfg(
        variant, kwargs.get("pretrained_cfg"), kwargs.get("pretrained_cfg_overlay")
    )
    features = bool(kwargs.get("features_only", False))
    cache_dir = kwargs.get("cache_dir")
    source = {name: value for name, value in vars(cfg).items() if value is not None}
    source["state_dict"] = _checkpoint(variant, cfg, weights, cache_dir)
    if cfg.source != "local-dir":  # there it is the folder; else it is read by now, or not wanted
        source.pop("file", None)

    def convert(state_dict: dict[str, Any], model: Any) -> dict[str, Tensor]:
        converted = filter_fn(unwrap(state_dict), model)
        adapted = _adapted(converted, model, source, features)
        kept = {name: tensor for name, tensor in converted.items() if name not in adapted}
        report = compare(kept, model)
        missing = tuple(name for name in report.missing if name not in adapted)
        replace(report, missing=missing).require_whole(f"{variant}: the checkpoint does not fit")
        if f"{cfg.classifier}.weight" not in adapted:  # it fits, so timm shall keep it
            source["num_classes"] = model.num_classes
        return converted

    def create(**model_kwargs: Any) -> _Model:
        model: Any = model_cls(**model_kwargs)
        load_pretrained(
            model,
            pretrained_cfg=source,
            num_classes=0 if features else model.num_classes,
            in_chans=model.in_chans,
            filter_fn=convert,
            cache_dir=cache_dir,
        )
        return model

    return build_model_with_cfg(create, variant, False, **kwargs)


def source_cfg(weight: Weight | None) -> dict[str, Any]:
    """What a tag's cfg tells timm about its weight file; nothing where there is none."""
    if weight is None:
        return {}
    return {"url": weight.url, "file": packaged(weight), "license": weight.licence}


def packaged(weight: Weight) -> str | None:
    """Path of a weight file that ships inside this package, or None where it is not there."""
    path = Path(__file__).parent / "weights" / (weight.file or "")
    return str(path) if path.is_file() else None


def _checkpoint(
    variant: str, cfg: PretrainedCfg, weights: Mapping[str, Weight], cache_dir: object
) -> dict[str, Any] | None:
    """What the checkpoint that ``cfg`` names holds; None for one that timm gets from a hub."""
    if cfg.source in ("hf-hub", "local-dir"):
        return None
    if cfg.state_dict:
        return cfg.state_dict
    name = f"{variant}.{cfg.tag}"
    weight = weights.get(name)
    if cfg.file and (weight is None or cfg.file != packaged(weight)):
        return read(cfg.file)
    if cfg.hf_hub_id:
        return None
    if isinstance(cfg.url, str) and (weight is None or cfg.url != weight.url):
        weight = Weight(url=cfg.url)
    if weight is None:
        raise CheckpointError(
            f"{name}: no weights are known; give a file of your own as "
            f"pretrained_cfg_overlay=dict(file=...)"
        )
    if cache_dir is not None and weight.file is None:
        raise ValueError(
            f"cache_dir: expected None, got {cache_dir!r}: {name} is kept in torch.hub's folder, "
            f"which TORCH_HOME moves"
        )
    return unwrap(read(fetch(weight, name)), weight.wrapper)


def _adapted(
    state_dict: Mapping[str, Tensor], model: Any, cfg: Mapping[str, Any], features: bool
) -> set[str]:
    """Names of a converted checkpoint that timm drops or reshapes to fit what was asked for."""
    expected = model.state_dict()

    def fits(name: str) -> bool:
        theirs, ours = state_dict.get(name), expected.get(name)
        return theirs is not None and ours is not None and theirs.shape == ours.shape

    head = {f"{cfg['classifier']}.{leaf}" for leaf in ("weight", "bias")}
    names: set[str] = set()
    if features or (model.num_classes != cfg["num_classes"] and not all(map(fits, head))):
        names |= head
    stem, channels = f"{cfg['first_conv']}.weight", cfg["input_size"][0]
    if model.in_chans != channels and stem in state_dict:
        ours = expected[stem].shape
        if state_dict[stem].shape == (ours[0], channels, *ours[2:]):
            names.add(stem)
    return names
