"""mmengine's Python configs: run, changed by the command line, compared."""

from __future__ import annotations

import ast
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from mmengine.config import Config

from vitarium.checkpoints.disk import replacing
from vitarium.tools.list import did_you_mean

# Keys that mmengine's Runner and mmdet's tools read, beside those that a config has already.
KEYS = {
    "auto_scale_lr", "backend_args", "compile", "custom_hooks", "custom_imports",
    "data_preprocessor", "default_hooks", "default_scope", "env_cfg", "experiment_name",
    "find_unused_parameters", "load_from", "load_skip", "log_level", "log_processor", "model",
    "model_wrapper_cfg", "optim_wrapper", "param_scheduler", "randomness", "sync_bn",
    "test_cfg", "test_dataloader", "test_evaluator", "train_cfg", "train_dataloader",
    "tta_model", "tta_pipeline", "val_cfg", "val_dataloader", "val_evaluator", "visualizer",
    "activation_checkpointing", "efficient_conv_bn_eval",
}  # fmt: skip
# What may change between an interruption and a resumption: no weight depends on it.
_FREE_SECTIONS = {
    "default_hooks", "env_cfg", "log_level", "log_processor", "visualizer", "vis_backends",
    "work_dir", "launcher", "load_from", "resume", "data_root", "backend_args",
    "experiment_name", "model_wrapper_cfg",
}  # fmt: skip
_FREE_KEYS = {
    "ann_file", "data_prefix", "data_root", "num_workers", "persistent_workers",
    "pin_memory", "prefetch_factor",
}  # fmt: skip


def load_config(path: Path, overrides: Sequence[str] = ()) -> Config:
    """Run a config file, and say so.

    Args:
        path: Python that assigns what mmengine's Runner and mmdet want.
        overrides: ``dotted.key=value``, where the value is a Python literal or else a plain string;
            they count more than the file.

    Raises:
        ValueError: it cannot be run, or an override is none or changes nothing that is known.
    """
    print(f"{path}: a config of Python, which is run", file=sys.stderr)
    try:
        config = Config.fromfile(path)
    except OSError as error:
        raise ValueError(f"{path}: cannot read this config: {error}") from error
    except Exception as error:  # whatever its code may raise
        raise ValueError(f"{path}: cannot be run: {type(error).__name__}: {error}") from error
    changes = dict(_override(text, config) for text in overrides)
    try:
        config.merge_from_dict(changes)
    except (KeyError, TypeError, IndexError, AttributeError) as error:
        raise ValueError(f"--set: cannot change {', '.join(changes)}: {error}") from error
    return config


def _override(text: str, config: Config) -> tuple[str, Any]:
    name, equals, value = (part.strip() for part in text.partition("="))
    if not equals or not all(name.split(".")):
        raise ValueError(f"--set: expected key=value, got {text!r}")
    top = name.partition(".")[0]
    if top not in KEYS and top not in config:
        hint = did_you_mean(top, [*KEYS, *config])
        raise ValueError(f"--set: expected a key of detection configs, got {top!r}{hint}")
    return name, _literal(value)


def _literal(text: str) -> Any:
    named = {"true": True, "false": False, "none": None}
    if text.lower() in named:
        return named[text.lower()]
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def without_pretrained(config: Config) -> None:
    """A checkpoint's weights follow: those of a classifier need not be fetched before."""
    backbone = config.model.get("backbone") or {}
    if backbone.get("type") == "FeatureBackbone" and backbone.get("pretrained"):
        config.model.backbone.pretrained = False


def save_config(config: Config, path: Path) -> None:
    """Write what `differences` compares with."""
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(dict(_flat(config.to_dict(), "")), indent=1) + "\n")


def differences(path: Path, config: Config) -> dict[str, tuple[Any, Any]]:
    """Values before and now, by dotted names, of what may not change while a run goes on.

    Raises:
        ValueError: the file is damaged.
    """
    try:
        before = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: damaged: {error}") from error
    now = dict(_flat(config.to_dict(), ""))
    names = [x for x in sorted(before.keys() | now.keys()) if not _is_free(x)]
    pairs = {name: (before.get(name), now.get(name)) for name in names}
    return {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}


def _is_free(name: str) -> bool:
    parts = name.split(".")
    return parts[0] in _FREE_SECTIONS or not _FREE_KEYS.isdisjoint(parts)


def _flat(value: Any, prefix: str) -> Iterator[tuple[str, Any]]:
    """Leaves by their dotted names, as JSON can say them."""
    if isinstance(value, dict):
        parts = [(str(key), part) for key, part in value.items()]
    elif isinstance(value, list | tuple) and value:
        parts = [(str(number), part) for number, part in enumerate(value)]
    else:
        plain = isinstance(value, str | int | float | bool | None)
        yield prefix[:-1], value if plain else str(value)
        return
    for key, part in parts:
        yield from _flat(part, f"{prefix}{key}.")
