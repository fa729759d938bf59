"""TOML files to typed configurations and back; whatever does not fit is named."""

from __future__ import annotations

import json
import math
import sys
import types
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import MISSING, Field, fields, is_dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from vitarium.training.config import TASKS, AugmentConfig, Config, LossConfig

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Read a run's configuration.

    Args:
        path: a TOML file.
        overrides: ``section.key=value``, where the value is TOML or else a plain string; they
            count more than the file.

    Raises:
        ValueError: the file cannot be read, is no TOML, or does not describe a run: an unknown
            key (near matches are named), a missing one, a value of another kind.
    """
    path = Path(path)
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"{path}: cannot read this config: {error.strerror}") from error
    except ValueError as error:
        raise ValueError(f"{path}: no TOML: {error}") from error
    for override in overrides:
        _override(content, override)
    return parse_config(content, str(path))


def parse_config(content: Mapping[str, Any], where: str) -> Config:
    """A run's configuration from plain data; errors begin with ``where``."""
    task = content.get("task")
    if not isinstance(task, str) or task not in TASKS:
        raise ValueError(f"{where}: task: expected one of {', '.join(TASKS)}, got {task!r}")
    config: Config = _parsed(TASKS[task], content, where, "")
    _check(config, where)
    return config


def dump_config(config: Config) -> str:
    """The whole configuration as TOML, defaults included; what is absent is left out."""
    return "\n".join(_lines(config, "")) + "\n"


def differences(config: Config, other: Config) -> dict[str, tuple[Any, Any]]:
    """Values that two configurations do not share, by their dotted names."""
    mine, theirs = (dict(_flat(each, "")) for each in (config, other))
    names = sorted(mine.keys() | theirs.keys())
    pairs = {name: (mine.get(name), theirs.get(name)) for name in names}
    return {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}


def _override(content: dict[str, Any], override: str) -> None:
    name, equals, text = override.partition("=")
    *sections, key = name.strip().split(".")
    if not equals or not all((*sections, key)):
        raise ValueError(f"--set: expected section.key=value, got {override!r}")
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except ValueError:
        value = text.strip()
    for section in sections:
        content = content.setdefault(section, {})
        if not isinstance(content, dict):
            raise ValueError(f"--set: {section} is no section, got {override!r}")
    content[key] = value


def _parsed(cls: type[Any], content: Any, where: str, prefix: str) -> Any:
    if not isinstance(content, Mapping):
        raise ValueError(f"{where}: {prefix[:-1]}: expected a section, got {content!r}")
    hints, known = get_type_hints(cls), {each.name: each for each in fields(cls)}
    for name in content:
        if name not in known:
            close = get_close_matches(name, known, n=3)
            hint = f"; did you mean {' or '.join(close)}?" if close else f" of {', '.join(known)}"
            raise ValueError(f"{where}: unknown key {prefix}{name}{hint}")
    values = {}
    for name, each in known.items():
        if name in content:
            values[name] = _value(hints[name], content[name], where, prefix + name)
        elif _required(each):
            raise ValueError(f"{where}: {prefix}{name} is missing")
    return cls(**values)


def _required(each: Field[Any]) -> bool:
    return each.default is MISSING and each.default_factory is MISSING


def _value(hint: Any, value: Any, where: str, name: str) -> Any:
    """A value of the kind that ``hint`` says, or an error that says so."""
    origin, args = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return _value(next(arg for arg in args if arg is not type(None)), value, where, name)
    if is_dataclass(hint):
        assert isinstance(hint, type)
        return _parsed(hint, value, where, f"{name}.")
    if origin is Literal:
        if value in args:
            return value
        raise ValueError(f"{where}: {name}: expected one of {', '.join(args)}, got {value!r}")
    if origin is dict and isinstance(value, dict):
        return value
    if origin is tuple:
        if hint == tuple[int, int] and type(value) is int:
            value = [value, value]
        if isinstance(value, list) and (args[-1] is ... or len(value) == len(args)):
            inner = [args[0]] * len(value)
            return tuple(
                _value(kind, x, where, f"{name}[{i}]")
                for i, (kind, x) in enumerate(zip(inner, value, strict=True))
            )
    elif hint is float:
        if type(value) in (int, float) and math.isfinite(value):
            return float(value)
    elif type(value) is hint:
        return value
    raise ValueError(f"{where}: {name}: expected {_words(hint)}, got {value!r}")


def _words(hint: Any) -> str:
    if get_origin(hint) is tuple:
        args = get_args(hint)
        count = "a list" if args[-1] is ... else f"{len(args)}"
        return f"{count} of {_words(args[0])}"
    words = {float: "a number", int: "a whole number", str: "a string", bool: "true or false"}
    return words.get(hint, "a section")


_TINY = 1e-12  # for what must be more than 0
# Of numbers that a library would take as they are, whatever comes of it.
_RANGES = (
    ("model.drop_path_rate", 0, 1 - _TINY),
    ("data.shuffle_buffer", 1, math.inf),
    ("augment.scale", _TINY, math.inf),
    ("augment.ratio", _TINY, math.inf),
    ("augment.hflip", 0, 1),
    ("augment.color_jitter", 0, math.inf),
    ("augment.random_erasing", 0, 1),
    ("augment.zoom", 0, 1 - _TINY),
    ("augment.std", _TINY, math.inf),
    ("augment.crop_pct", _TINY, 1),
    ("augment.resize", 1, math.inf),
    ("augment.category_max", _TINY, 1),
    ("loss.label_smoothing", 0, 1 - _TINY),
    ("loss.mixup", 0, math.inf),
    ("loss.cutmix", 0, math.inf),
    ("loss.mixup_prob", 0, 1),
    ("loss.switch_prob", 0, 1),
    ("optimizer.lr_batch", 1, math.inf),
    ("optimizer.weight_decay", 0, math.inf),
    ("optimizer.layer_decay", _TINY, 1),
    ("optimizer.clip_grad", _TINY, math.inf),
    ("schedule.warmup_lr", 0, math.inf),
    ("schedule.min_lr", 0, math.inf),
    ("schedule.power", _TINY, math.inf),
    ("schedule.decay_rate", _TINY, math.inf),
    ("head.freeze", 0, math.inf),
    ("head.dice_weight", 0, math.inf),
    ("head.auxiliary_weight", 0, math.inf),
    ("head.drop_rate", 0, 1 - _TINY),
    ("head.lr_factor", _TINY, math.inf),
)


def _check(config: Config, where: str) -> None:
    """What no type says."""
    schedule, train, data = config.schedule, config.train, config.data

    def expect(condition: bool, name: str, expected: str, got: Any) -> None:
        if not condition:
            raise ValueError(f"{where}: {name}: expected {expected}, got {got!r}")

    length = (schedule.epochs, schedule.updates)
    expect(sum(x is not None for x in length) == 1, "schedule", "epochs or updates", length)
    expect(all(x is None or x > 0 for x in length), "schedule", "a positive length", length)
    warm = (schedule.warmup_epochs, schedule.warmup_updates)
    expect(None in warm, "schedule", "warmup_epochs or warmup_updates", warm)
    expect(all(x is None or x >= 0 for x in warm), "schedule", "a warm-up of 0 or more", warm)
    ends = schedule.name in ("cosine", "poly") or not schedule.min_lr
    expect(ends, "schedule.min_lr", f"0 with {schedule.name}", schedule.min_lr)
    for key, name in (("power", "poly"), ("milestones", "step"), ("decay_rate", "step")):
        given = getattr(schedule, key)
        ok = (given is None) == (schedule.name != name)
        expect(ok, f"schedule.{key}", f"a value with {name}, else none", given)
    falls = schedule.name in ("cosine", "poly")
    cooldown = schedule.cooldown_epochs
    ok = cooldown == 0 or (falls and cooldown > 0)
    expect(ok, "schedule.cooldown_epochs", "0 or more with cosine or poly, else 0", cooldown)
    prefix = schedule.warmup_prefix
    expect(falls or not prefix, "schedule.warmup_prefix", "false without cosine or poly", prefix)
    model = config.model
    both = model.pretrained and model.checkpoint is not None
    expect(not both, "model.checkpoint", "none beside pretrained = true", model.checkpoint)
    for name, number, least in (
        ("train.batch_size", train.batch_size, 1),
        ("train.accumulation", train.accumulation, 1),
        ("train.log_every", train.log_every, 1),
        ("train.keep", train.keep, 1),
        ("train.checkpoint_every", train.checkpoint_every or 1, 1),
        ("data.workers", data.workers, 0),
        ("data.repeats", data.repeats, 1),
        ("data.image_size", min(data.image_size), 1),
        ("data.samples", 1 if data.samples is None else data.samples, 1),
    ):
        expect(number >= least, name, f"{least} or more", number)
    for name, smallest, largest in _RANGES:
        section, key = name.split(".")
        value = getattr(getattr(config, section, None), key, None)
        several = value if isinstance(value, tuple) else () if value is None else (value,)
        ok = all(smallest <= x <= largest for x in several)
        expect(
            ok,
            name,
            f"{smallest:g} ... {largest:g}" if largest < math.inf else f"{smallest:g} or more",
            value,
        )
    for section, key in (("augment", "scale"), ("augment", "ratio")):
        pair = getattr(getattr(config, section, None), key, (0, 1))
        expect(pair[0] <= pair[1], f"{section}.{key}", "the smaller one first", pair)
    for key in ("mean", "std"):
        value = getattr(getattr(config, "augment", None), key, None)
        expect(value is None or len(value) == 3, f"augment.{key}", "three numbers", value)
    expect(train.validate_every > 0, "train.validate_every", "more than 0", train.validate_every)
    expect(config.optimizer.lr > 0, "optimizer.lr", "more than 0", config.optimizer.lr)
    expect(0 <= config.seed < 2**31, "seed", "0 ... 2**31 - 1", config.seed)
    augment = getattr(config, "augment", None)
    if isinstance(augment, AugmentConfig):
        jitter, mode = augment.color_jitter, augment.interpolation
        alone = augment.auto_augment is None or not jitter  # timm drops one of them
        expect(alone, "augment.color_jitter", "0 beside auto_augment", jitter)
        fixed = augment.crop != "resize" or mode != "random"
        expect(fixed, "augment.interpolation", "bilinear or bicubic with crop resize", mode)
    loss = getattr(config, "loss", None)
    if isinstance(loss, LossConfig) and (loss.mixup or loss.cutmix):
        even = train.batch_size % 2 == 0  # timm mixes a batch with its reverse
        expect(even, "train.batch_size", "an even number with mixup", train.batch_size)
    if config.ema is not None:
        expect(0 < config.ema.decay < 1, "ema.decay", "a share in (0, 1)", config.ema.decay)


def _flat(section: Any, prefix: str) -> Iterator[tuple[str, Any]]:
    for each in fields(section):
        value = getattr(section, each.name)
        if is_dataclass(value):
            yield from _flat(value, f"{prefix}{each.name}.")
        else:
            yield prefix + each.name, value


def _lines(section: Any, prefix: str) -> Iterator[str]:
    values = {each.name: getattr(section, each.name) for each in fields(section)}
    inner = {name: value for name, value in values.items() if is_dataclass(value)}
    for name, value in values.items():
        if name not in inner and value is not None and value != {}:
            yield f"{name} = {_toml(value)}"
    for name, value in inner.items():
        yield f"\n[{prefix}{name}]"
        yield from _lines(value, f"{prefix}{name}.")


def _toml(value: Any) -> str:
    if isinstance(value, dict):
        return "{ " + ", ".join(f"{json.dumps(k)} = {_toml(v)}" for k, v in value.items()) + " }"
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(map(_toml, value)) + "]"
    # Strings of JSON are strings of TOML too, but for one character.
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
