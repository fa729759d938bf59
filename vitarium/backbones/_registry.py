"""Entries in timm's registry, and the one place that builds a model and finds its weights."""

from __future__ import annotations

import os
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
    get_arch_pretrained_cfgs,
    is_model,
    load_pretrained,
    model_entrypoint,
    register_model,
    resolve_pretrained_cfg,
)
from torch import Tensor, nn

from vitarium.checkpoints import (
    CheckpointError,
    Weight,
    compare,
    fetch,
    hub_file,
    outline,
    read,
    unwrap,
)
from vitarium.checkpoints.loading import filtered

_Model = TypeVar("_Model", bound=nn.Module)
_Entry = TypeVar("_Entry", bound=Callable[..., nn.Module])
_Filter = Callable[[dict[str, Tensor], nn.Module], dict[str, Tensor]]

_SOURCES = ("source", "state_dict", "file", "url", "hf_hub_id", "hf_hub_filename")
_NAMED_SOURCES = ("hf-hub", "local-dir")
UNKNOWN_LICENCE = "not known: the address is the caller's"
_IN_A_FOLDER = ("model.safetensors", "pytorch_model.bin")
_SUFFIXES = (".safetensors", ".pth", ".pt", ".bin")

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


def released(entry: str) -> dict[str, Weight]:
    """The released files of an entry, by ``entry.tag``; none of a model that is not vitarium's."""
    weights: Mapping[str, Weight] = getattr(entries().get(entry), "_WEIGHTS", {})
    return {name: x for name, x in weights.items() if name.partition(".")[0] == entry}


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
        pretrained: whether to load weights: those that the caller names (``hf-hub:`` or
            ``local-dir:`` as the model's name; ``state_dict``, ``file``, ``hf_hub_id`` or ``url``
            in ``pretrained_cfg_overlay`` or ``pretrained_cfg``), or else those of the tag.
        weights: the family's weight files, by ``entry.tag``.
        filter_fn: the family's ``checkpoint_filter_fn``.
        **kwargs: timm's builder arguments and the model's own; ``cache_dir`` is where files are
            kept, ours and huggingface_hub's.

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
    for key, only in (("pretrained_strict", True), ("pretrained_filter_fn", None)):
        if kwargs.get(key, only) is not only:
            raise ValueError(f"{key}: expected {only}, weights fit whole, got {kwargs[key]!r}")
    overlay = kwargs.get("pretrained_cfg_overlay") or {}
    cfg = resolve_pretrained_cfg(variant, kwargs.get("pretrained_cfg"), overlay)
    beside = [key for key in _SOURCES if overlay.get(key) is not None]
    if cfg.source in _NAMED_SOURCES and beside:
        raise ValueError(
            f"pretrained_cfg_overlay: expected no {beside[0]} beside the weights of {cfg.source}:, "
            f"got {overlay[beside[0]]!r}"
        )
    features = bool(kwargs.get("features_only", False))
    found, wrapper = _checkpoint(variant, cfg, weights, kwargs.get("cache_dir"))
    what = f"{variant}: {found if isinstance(found, Path) else 'the checkpoint'}"
    described = {k: v for k, v in vars(cfg).items() if v is not None and k not in _SOURCES}

    def fitted(held: Any, model: Any, data: bool) -> tuple[dict[str, Tensor], set[str]]:
        """What a checkpoint holds, converted, and which of it timm adapts; the rest fits."""
        try:
            converted = filtered(filter_fn, unwrap(held, wrapper), model)
        except CheckpointError as error:
            raise CheckpointError(f"{what}: {error}") from error
        if model.num_classes == cfg.num_classes:
            _drop_background(converted, cfg)
        adapted = _adapted(converted, model, described, features)
        kept = {name: tensor for name, tensor in converted.items() if name not in adapted}
        report = compare(kept, model, data=data)
        missing = tuple(name for name in report.missing if name not in adapted)
        replace(report, missing=missing).require_whole(f"{what} does not fit")
        return converted, adapted

    def create(**model_kwargs: Any) -> _Model:
        model: Any = model_cls(**model_kwargs)
        held = found
        if isinstance(found, Path):
            fitted(outline(found), model, data=False)  # before memory is taken
            held = read(found, mmap=True)
        converted, adapted = fitted(held, model, data=True)
        source = {**described, "state_dict": converted, "label_offset": 0}
        if f"{cfg.classifier}.weight" not in adapted:  # it fits, so timm shall keep it
            source["num_classes"] = model.num_classes
        load_pretrained(
            model,
            pretrained_cfg=source,
            num_classes=0 if features else model.num_classes,
            in_chans=model.in_chans,
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
    variant: str, cfg: PretrainedCfg, weights: Mapping[str, Weight], cache_dir: Any
) -> tuple[Path | dict[str, Any], str | None]:
    """The checkpoint that ``cfg`` names, on this machine and verified, and its wrapper if known."""
    folder = None if cache_dir is None else _path("cache_dir", cache_dir)
    if cfg.source == "local-dir":
        return _file_in(_path("file", cfg.file)), None
    if cfg.source == "hf-hub":  # whatever else its config names
        return _hub_file(cfg, folder), None
    name = f"{variant}.{cfg.tag}"
    weight = weights.get(name)
    registered = get_arch_pretrained_cfgs(variant).get(name, PretrainedCfg())
    # What the registry says of a tag stays in its cfg when the caller names another source.
    named = {key for key in _SOURCES if getattr(cfg, key) not in (None, getattr(registered, key))}
    if "state_dict" in named:
        assert cfg.state_dict is not None
        return cfg.state_dict, None
    if "file" in named:
        return _path("file", cfg.file), None
    if named & {"hf_hub_id", "hf_hub_filename"}:
        return _hub_file(cfg, folder), None
    url = cfg.url[0] if isinstance(cfg.url, tuple) else cfg.url
    if "url" in named and url is not None and (weight is None or url != weight.url):
        return fetch(Weight(url=url, licence=UNKNOWN_LICENCE), name, cache_dir=folder), None
    try:
        if weight is None or weight.unreleased is not None:
            why = weight and weight.unreleased
            known = f"not released: {why}" if why else "no weights are known"
            raise CheckpointError(
                f"{name}: {known}; give a file of your own as pretrained_cfg_overlay=dict(file=...)"
            )
        return fetch(weight, name, cache_dir=folder), weight.wrapper
    except CheckpointError as error:
        raise CheckpointError(f"{error}. {_others(variant, name, weights)}") from error


def _path(argument: str, value: Any) -> Path:
    if not isinstance(value, (str, os.PathLike)):
        raise ValueError(f"{argument}: expected a path, got {value!r}")
    return Path(value).expanduser()


def _hub_file(cfg: PretrainedCfg, folder: Path | None) -> Path:
    repo_id, _, revision = (cfg.hf_hub_id or "").partition("@")
    return hub_file(repo_id, cfg.hf_hub_filename, revision or None, folder)


def _file_in(folder: Path) -> Path:
    """The one checkpoint in a folder, or the one that has the name which the hub expects."""
    for name in _IN_A_FOLDER:
        if (folder / name).exists():
            return folder / name
    found = sorted(path for path in folder.glob("*") if path.suffix in _SUFFIXES)
    if len(found) != 1:
        names = ", ".join(path.name for path in found) or "none"
        raise CheckpointError(
            f"{folder}: expected {' or '.join(_IN_A_FOLDER)}, or one checkpoint, got {names}"
        )
    return found[0]


def _others(variant: str, name: str, weights: Mapping[str, Weight]) -> str:
    """Which other weights of an entry a program can have."""
    found = [
        other
        for other, weight in weights.items()
        if other.startswith(f"{variant}.") and other != name and weight.task == "cls"
        if weight.url is not None or packaged(weight) is not None
    ]
    listed = f"(vitarium list '{variant}*')"
    if not found:
        return f"There are no other weights of {variant} that a program can fetch {listed}"
    return f"Other weights of {variant} that a program can fetch: {', '.join(found)} {listed}"


def _drop_background(state_dict: dict[str, Tensor], cfg: PretrainedCfg) -> None:
    """Cut the classes off that stand before the first one of the data set, as timm does it."""
    for name in (f"{cfg.classifier}.weight", f"{cfg.classifier}.bias"):
        if cfg.label_offset and name in state_dict:
            state_dict[name] = state_dict[name][cfg.label_offset :]


def _adapted(
    state_dict: Mapping[str, Tensor], model: Any, cfg: Mapping[str, Any], features: bool
) -> set[str]:
    """Names of a converted checkpoint that timm drops or reshapes to fit what was asked for."""
    expected = model.state_dict()

    def fits(name: str) -> bool:
        theirs, ours = state_dict.get(name), expected.get(name)
        return theirs is not None and ours is not None and theirs.shape == ours.shape

    head = {f"{cfg.get('classifier')}.{leaf}" for leaf in ("weight", "bias")}
    names: set[str] = set()
    if features or (model.num_classes != cfg["num_classes"] and not all(map(fits, head))):
        names |= head
    stem, channels = f"{cfg.get('first_conv')}.weight", cfg["input_size"][0]
    if model.in_chans != channels and stem in state_dict:
        ours = expected[stem].shape
        if state_dict[stem].shape == (ours[0], channels, *ours[2:]):
            names.add(stem)
    return names
