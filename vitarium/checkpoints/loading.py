"""Convert, compare and load: a checkpoint goes into its model whole or not at all."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any

from torch import Tensor, nn

from vitarium.checkpoints.errors import CheckpointError
from vitarium.checkpoints.files import outline, read
from vitarium.checkpoints.wrappers import split_detector, unwrap_tensors

_SHOWN = 5


@dataclass(frozen=True)
class Report:
    """How a checkpoint's tensors and a model's fit together.

    Attributes:
        matched: names that are loaded.
        ignored: names of the checkpoint that the model rightly leaves, and why.
        missing: the model's names that the checkpoint lacks.
        unexpected: the checkpoint's names that the model lacks.
        misshapen: names of both whose tensors differ, with (expected, actual) described.
    """

    matched: tuple[str, ...] = ()
    ignored: Mapping[str, str] = field(default_factory=dict)
    missing: tuple[str, ...] = ()
    unexpected: tuple[str, ...] = ()
    misshapen: Mapping[str, tuple[str, str]] = field(default_factory=dict)

    @property
    def whole(self) -> bool:
        """Whether nothing is missing, unexpected or misshapen."""
        return not (self.missing or self.unexpected or self.misshapen)

    def require_whole(self, what: str) -> None:
        """Raise unless the checkpoint fits; ``what`` begins the message.

        Raises:
            CheckpointError: names the first few keys of each kind and counts them.
        """
        if not self.whole:
            raise CheckpointError(f"{what}: nothing was loaded. {self}")

    def __str__(self) -> str:
        shapes = [f"{k} expected {e}, got {a}" for k, (e, a) in self.misshapen.items()]
        ignored = [f"{k} ({why})" for k, why in self.ignored.items()]
        parts = [f"{len(self.matched)} tensors fit"]
        parts += _listed("missing", self.missing)
        parts += _listed("unexpected", self.unexpected)
        parts += _listed("misshapen", shapes)
        parts += _listed("ignored", ignored)
        return "; ".join(parts)


def _listed(kind: str, items: Iterable[str]) -> list[str]:
    items = list(items)
    if not items:
        return []
    more = f" and {len(items) - _SHOWN} more" if len(items) > _SHOWN else ""
    return [f"{len(items)} {kind}: {', '.join(items[:_SHOWN])}{more}"]


def convert(state_dict: Mapping[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """An authors' state dict in the names and layouts of ``model``.

    The family's ``checkpoint_filter_fn`` does the work: the one beside the model's class, or,
    for a model that wraps another as its ``model``, the one beside the inner class.

    Args:
        state_dict: tensors by name, as `unwrap` returns them; it is not changed.
        model: a zoo model, or one that wraps it. It tells the formats apart and is not changed.

    Returns:
        A new dictionary; whatever was in the model's own format comes back as it was.

    Raises:
        CheckpointError: names that are ambiguous or collide, or tensors that cannot be converted.
    """
    state_dict = dict(state_dict)
    shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
    own = shapes.keys()
    if {name: tensor.shape for name, tensor in state_dict.items()} == shapes:
        return state_dict
    for cls in type(model).__mro__:
        filter_fn = getattr(sys.modules[cls.__module__], "checkpoint_filter_fn", None)
        if filter_fn is not None:
            return filtered(filter_fn, state_dict, model)
    inner = getattr(model, "model", None)
    if not isinstance(inner, nn.Module):
        return state_dict
    prefix = "model."
    outer = {name: tensor for name, tensor in state_dict.items() if name in own}
    rest = {name: tensor for name, tensor in state_dict.items() if name not in own}
    for name, tensor in (convert(rest, inner) if rest else {}).items():
        target = prefix + name if prefix + name in own else name
        if target in outer:
            raise CheckpointError(f"two tensors of the checkpoint would both become {target}")
        outer[target] = tensor
    return outer


def filtered(
    filter_fn: Callable[[dict[str, Tensor], nn.Module], Mapping[str, Tensor]],
    state_dict: dict[str, Tensor],
    model: nn.Module,
) -> dict[str, Tensor]:
    """What a family's ``checkpoint_filter_fn`` makes of a state dict; all failures have one type.

    Raises:
        CheckpointError: it cannot be converted.
    """
    try:
        return dict(filter_fn(state_dict, model))
    except CheckpointError:
        raise
    except (KeyError, IndexError, RuntimeError, ValueError) as error:
        raise CheckpointError(
            f"cannot be converted for {type(model).__name__}: {type(error).__name__}: {error}"
        ) from error


def compare(
    state_dict: Mapping[str, Tensor],
    model: nn.Module,
    ignored: Mapping[str, str] | None = None,
    *,
    data: bool = True,
) -> Report:
    """How a converted state dict fits ``model``, without loading it.

    Args:
        state_dict: tensors in the model's names.
        model: the model; it is not changed.
        ignored: patterns (as ``fnmatch``) of names that the model rightly lacks, and why.
        data: whether the tensors must hold data where the model's do; False for an `outline`.

    Returns:
        The report; `Report.require_whole` raises on it.
    """
    expected = model.state_dict()
    left = {
        name: why
        for name in state_dict
        if name not in expected
        for pattern, why in (ignored or {}).items()
        if fnmatchcase(name, pattern)
    }
    misshapen = {
        name: (_described(expected[name], data), _described(tensor, data))
        for name, tensor in state_dict.items()
        if name in expected and not _alike(expected[name], tensor, data)
    }
    return Report(
        matched=tuple(name for name in expected if name in state_dict and name not in misshapen),
        ignored=left,
        missing=tuple(name for name in expected if name not in state_dict),
        unexpected=tuple(n for n in state_dict if n not in expected and n not in left),
        misshapen=misshapen,
    )


def load(model: nn.Module, source: str | os.PathLike[str] | Mapping[str, Any]) -> Report:
    """Load a checkpoint into a model: all of it, or nothing.

    What a model's ``checkpoint_ignore()`` lists (pattern -> why), and the parts of a detector
    around its backbone, may stay unused; anything else that does not fit is an error. A file is
    compared before its tensors are read, and tensors are copied from it straight to the model.

    Args:
        model: a zoo model, or one that wraps it, such as ``FeatureBackbone``.
        source: a file, or what such a file holds.

    Returns:
        What was loaded and what was ignored, with reasons.

    Raises:
        CheckpointError: the file cannot be read, or something is missing, unexpected or
            misshapen; the model is unchanged.
    """
    if isinstance(source, Mapping):
        obj, what = source, "checkpoint"
    else:
        check_fits(model, source)
        obj, what = read(source, mmap=True), os.fspath(source)
    report, state_dict = _fitted(model, obj, what, data=True)
    model.load_state_dict({name: state_dict[name] for name in report.matched}, strict=True)
    return report


def check_fits(model: nn.Module, path: str | os.PathLike[str]) -> Report:
    """Whether `load` would take a file, by names, dtypes and shapes: no tensor is read.

    Args:
        model: as for `load`; it is not changed.
        path: the file.

    Returns:
        What would be loaded and what ignored, with reasons.

    Raises:
        CheckpointError: as `load`, except that damaged tensors are not noticed.
    """
    return _fitted(model, outline(path), os.fspath(path), data=False)[0]


def _fitted(model: nn.Module, obj: Any, what: str, data: bool) -> tuple[Report, dict[str, Tensor]]:
    """What fits and what is ignored, and the converted tensors."""
    try:
        state_dict = unwrap_tensors(obj)
        parts: dict[str, str] = {}
        if not any(name.startswith("backbone.") for name in model.state_dict()):
            state_dict, parts = split_detector(state_dict)
        state_dict = convert(state_dict, model)
    except CheckpointError as error:
        raise CheckpointError(f"{what}: {error}") from error
    ignore = getattr(model, "checkpoint_ignore", None)
    found = compare(state_dict, model, ignore() if ignore is not None else None, data=data)
    found.require_whole(f"{what} does not fit {type(model).__name__}")
    return Report(matched=found.matched, ignored={**found.ignored, **parts}), state_dict


def _alike(expected: Tensor, actual: Tensor, data: bool) -> bool:
    return (
        expected.shape == actual.shape
        and expected.is_floating_point() == actual.is_floating_point()
        and expected.is_complex() == actual.is_complex()
        and (expected.is_meta == actual.is_meta or not data)
    )


def _described(tensor: Tensor, data: bool) -> str:
    where = " without data" if data and tensor.is_meta else ""
    return f"{list(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}{where}"
