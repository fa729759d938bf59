"""Convert checkpoint files in memory: into our layout, or into the authors'."""

from __future__ import annotations

import copy
import os
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from inspect import signature
from types import ModuleType
from typing import Any

import timm
from timm.models import get_arch_pretrained_cfgs
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakTensorKeyDictionary

from vitarium.backbones._nat_transformers import to_transformers
from vitarium.backbones._registry import entries, released
from vitarium.checkpoints.errors import CheckpointError
from vitarium.checkpoints.files import read
from vitarium.checkpoints.loading import Report, compare, convert
from vitarium.checkpoints.wrappers import split_detector, unwrap_layers
from vitarium.heads.features import FeatureBackbone
from vitarium.heads.segmentation import HEADS, RENAMES, Segmenter

_DIRECTIONS = ("ours", "authors", "transformers")
DETECTOR = "backbone."
# Of the family's names in ours: with a task and with a head, or without.
_PREFIXES = {(False, False): "", (True, False): "model.", (True, True): "backbone.model."}
NONE_STATED = "none stated"

Size = tuple[int, int]


@dataclass(frozen=True)
class Resized:
    """A table made for another size: its shapes before and after, and the rule in words."""

    before: tuple[int, ...]
    after: tuple[int, ...]
    rule: str


@dataclass(frozen=True)
class Conversion:
    """A checkpoint in another layout, not written yet.

    Attributes:
        entry: the model's name, without a tag.
        tag: of the released file, where the caller said it.
        to: ``ours``, ``authors`` or ``transformers``.
        task: ``det``, ``seg`` or None.
        head: ``upernet`` or ``semantic_fpn`` of a whole segmenter, or None.
        img_size: (H, W) in pixels that was asked for, or None.
        wrapper: what was taken off around the tensors, keys and prefixes, the outermost first.
        tensors: the result, by name; where something does not fit, what does, in our names.
        num_parameters: of the model.
        report: how the checkpoint, in our names, and the model fit together; ``ignored`` holds
            all that is dropped, by the checkpoint's own names, and why.
        renamed: names of the result -> those of the checkpoint that it was made from, where
            they differ.
        resized: tables for another size, by our names.
        may_resize: whether the caller allows that.
        initialised: our names that the checkpoint rightly lacks, and what they hold.
    """

    entry: str
    tag: str | None
    to: str
    task: str | None
    head: str | None
    img_size: Size | None
    wrapper: tuple[str, ...]
    tensors: Mapping[str, Tensor]
    num_parameters: int
    report: Report
    renamed: Mapping[str, tuple[str, ...]]
    resized: Mapping[str, Resized]
    may_resize: bool
    initialised: Mapping[str, str]

    @property
    def fault(self) -> str | None:
        """Why this cannot be written, or None."""
        if not self.report.whole:
            hint = ""
            if self.head is not None:
                hint = f" with {self.head}"
            elif self.task is None and DETECTOR in self.wrapper:
                hint = ", which is a classifier; a detector's backbone needs a task, det or seg"
            return f"the checkpoint does not fit {self.entry}{hint}: {self.report}"
        if self.resized and not self.may_resize:
            name, table = next(iter(self.resized.items()))
            return (
                f"{len(self.resized)} tables are for another size of images or windows, and are "
                f"resized on request only (--img-size, or convert's --resize): {name} expected "
                f"{list(table.after)}, got {list(table.before)}"
            )
        return None

    def require_fit(self) -> None:
        """Raise a `CheckpointError` where there is a `fault`."""
        if self.fault is not None:
            raise CheckpointError(self.fault)

    def key_report(self) -> dict[str, Any]:
        """What happens to each name, as plain data."""
        shapes = self.report.misshapen.items()
        return {
            "entry": self.entry,
            "to": self.to,
            "task": self.task,
            "head": self.head,
            "wrapper": list(self.wrapper),
            "fits": self.fault is None,
            "fault": self.fault,
            "matched": list(self.report.matched),
            "renamed": {name: list(sources) for name, sources in self.renamed.items()},
            **self.changes(),
            "missing": list(self.report.missing),
            "unexpected": list(self.report.unexpected),
            "misshapen": {name: {"expected": a, "got": b} for name, (a, b) in shapes},
        }

    def changes(self) -> dict[str, Any]:
        """What becomes of tensors other than by renaming, as plain data."""
        return {
            "dropped": dict(self.report.ignored),
            "resized": {
                name: {"from": list(x.before), "to": list(x.after), "rule": x.rule}
                for name, x in self.resized.items()
            },
            "initialised": dict(self.initialised),
        }


def plan(
    entry: str,
    source: str | os.PathLike[str] | Mapping[str, Any],
    *,
    to: str = "ours",
    task: str | None = None,
    head: str | None = None,
    wrapper: str | None = None,
    img_size: Size | None = None,
    resize: bool = False,
    num_classes: int | None = None,
) -> Conversion:
    """Convert a checkpoint in memory. Files are mapped, and only what changes is copied.

    Args:
        entry: a model of vitarium, with or without a tag. A tag says at which size tables were
            made, how the authors wrap the file, whether it is a detector's, and its licence.
        source: a file, or what such a file holds, in any layout that the family understands.
        to: ``ours``; ``authors``, with the constants that they store; or, for NAT and DiNAT,
            ``transformers``.
        task: ``det`` or ``seg`` for the names of ``FeatureBackbone(entry, task=task)``; None for
            the classifier's, or for what the tag says.
        head: ``upernet`` or ``semantic_fpn`` for the names of ``Segmenter(entry, head=head,
            task="seg")``, whose numbers of classes and channels the checkpoint says.
        wrapper: where the tensors are instead of searching, see `unwrap`.
        img_size: (H, W) in pixels for which tables of positions are to be made.
        resize: whether tables may be resized to the entry's own size of images or windows.
        num_classes: of the classifier, 0 for none; None for as many as the checkpoint has.

    Returns:
        The conversion; its ``fault`` says what does not fit.

    Raises:
        ValueError: an unknown entry, tag, layout, task, head or wrapper, one that the entry does
            not have, a size that it cannot have or that changes nothing, ``num_classes`` together
            with a task, or a head with another task or layout than its own.
        CheckpointError: the file cannot be read, or its tensors cannot be converted.
    """
    target = _Target.of(entry, to, task, head, img_size, num_classes)
    model = target.build()
    if img_size is not None:
        target.require_effect(img_size)
    obj = source if isinstance(source, Mapping) else read(source, mmap=True)
    try:
        found, layers = unwrap_layers(obj, wrapper)
        dropped: dict[str, str] = {}
        if head is None:
            if any(name.startswith(DETECTOR) for name in found):
                layers = (*layers, DETECTOR)
            found, dropped = split_detector(found)
        # Tensors of their own: the same one may stand behind two names.
        state_dict = {name: tensor.detach() for name, tensor in found.items()}
        for name, tensor in state_dict.items():
            if tensor.is_meta:
                raise CheckpointError(f"{name} is without data")
        model = target.sized(model, state_dict)
        with _Provenance(state_dict) as sources:
            converted = convert(state_dict, model)
    except CheckpointError as error:
        if isinstance(source, Mapping):
            raise
        raise CheckpointError(f"{os.fspath(source)}: {error}") from error
    model, ignored = target.fitted(model, converted)
    report = compare(converted, model, ignored, data=False)
    constants = target.constants(model)
    used = {name for tensor in converted.values() for name in sources.of(tensor)}
    dropped |= {name: _why_left(name, constants) for name in state_dict if name not in used}
    for name, why in report.ignored.items():
        dropped |= dict.fromkeys(sources.of(converted[name]), why)
    kept = {name: converted[name] for name in report.matched}
    initialised = _initialise(kept, model) if report.whole else {}
    with sources:
        tensors = target.laid_out(kept, model) if report.whole else kept
    made = {name: sources.of(tensor) for name, tensor in tensors.items()}
    return Conversion(
        entry=target.entry,
        tag=target.tag,
        to=target.to,
        task=target.task,
        head=head,
        img_size=img_size,
        wrapper=layers,
        tensors=tensors,
        num_parameters=sum(p.numel() for p in model.parameters()),
        report=Report(report.matched, dropped, report.missing, report.unexpected, report.misshapen),
        renamed={name: names for name, names in made.items() if names not in ((), (name,))},
        resized=_resized(target.family, state_dict, converted, sources),
        may_resize=resize or img_size is not None,
        initialised=initialised,
    )


@dataclass(frozen=True)
class _Target:
    """The model that a checkpoint is converted for."""

    entry: str
    tag: str | None
    to: str
    task: str | None
    head: str | None
    img_size: Size | None
    num_classes: int | None

    @classmethod
    def of(
        cls,
        name: str,
        to: str,
        task: str | None,
        head: str | None,
        img_size: Size | None,
        num_classes: int | None,
    ) -> _Target:
        entry, _, tag = name.partition(".")
        if entry not in entries():
            raise ValueError(f"entry: expected a model of vitarium, got {entry!r}")
        known = sorted({*get_arch_pretrained_cfgs(entry), *released(entry)})
        if tag and name not in known:
            raise ValueError(f"entry: expected {entry} or one of {known}, got {name!r}")
        weight = released(entry).get(name)
        if task is None and weight is not None and weight.task != "cls":
            task = weight.task
        if head is not None:
            if head not in HEADS:
                raise ValueError(f"head: expected None or one of {(*HEADS,)}, got {head!r}")
            task = task or "seg"
        if head is not None and (task != "seg" or to == "transformers"):
            raise ValueError(f"head: expected None with task {task!r} to {to}, got {head!r}")
        if num_classes is not None and (task is not None or num_classes < 0):
            expected = "no negative number" if task is None else "None with a task"
            raise ValueError(f"num_classes: expected {expected}, got {num_classes}")
        if to not in _DIRECTIONS:
            raise ValueError(f"to: expected one of {_DIRECTIONS}, got {to!r}")
        if to == "authors" and entry in getattr(entries()[entry], "_READ_ONLY", ()):
            raise ValueError(f"to: the authors' layout of {entry} can be read, not written")
        classifier = type(timm.create_model(entry, device="meta"))
        if to == "transformers" and not hasattr(classifier, "transformers_prefix"):
            raise ValueError(f"to: transformers has NAT and DiNAT only, got {entry}")
        sized = any("img_size" in signature(base).parameters for base in classifier.mro())
        if img_size is not None and not sized:
            raise ValueError(
                f"img_size: expected None, no tensor of {entry} depends on the size of images, "
                f"got {img_size}"
            )
        return cls(entry, tag or None, to, task, head, img_size, num_classes)

    @property
    def family(self) -> ModuleType:
        return entries()[self.entry]

    def build(self, **kwargs: Any) -> Any:
        """The model without memory for its tensors."""
        tagged = f"{self.entry}.{self.tag}"
        name = tagged if tagged in get_arch_pretrained_cfgs(self.entry) else self.entry
        given = {"img_size": self.img_size, "num_classes": self.num_classes, **kwargs}
        given = {key: value for key, value in given.items() if value is not None}
        if self.head is not None:
            given = {"num_classes": 1, **given}
            return Segmenter(name, head=self.head, task=self.task, device="meta", **given)
        if self.task is not None:
            return FeatureBackbone(name, task=self.task, device="meta", **given)
        return timm.create_model(name, device="meta", **given)

    def require_effect(self, img_size: Size) -> None:
        """Raise unless tensors, or constants that are to be written, depend on the size."""
        height, width = img_size
        shapes = []
        for size in (img_size, (2 * height, 2 * width)):
            model = self.build(img_size=size)
            tensors = model.state_dict() | (self.constants(model) if self.to == "authors" else {})
            shapes.append({name: x.shape for name, x in tensors.items()})
        if shapes[0] == shapes[1]:
            raise ValueError(
                f"img_size: expected None, {self.entry} has the same tensors for all images of "
                f"{height} x {width} pixels and more, got {img_size}"
            )

    def sized(self, model: Any, state_dict: Mapping[str, Tensor]) -> Any:
        """A segmenter with the checkpoint's numbers of classes and channels; others as they are."""
        if self.head is None:
            return model
        classifiers = [state_dict.get(f"{x}_head.conv_seg.weight") for x in ("decode", "auxiliary")]
        sizes = [None if x is None or x.ndim != 4 else x.shape[:2] for x in classifiers]
        if sizes[0] is None or 0 in sizes[0]:
            raise CheckpointError("expected a segmenter's decode_head.conv_seg.weight")
        num_classes, channels = sizes[0]
        auxiliary = 0 if sizes[1] is None else sizes[1][1]
        return self.build(num_classes=num_classes, channels=channels, auxiliary_channels=auxiliary)

    def fitted(self, model: Any, converted: Mapping[str, Tensor]) -> tuple[Any, dict[str, str]]:
        """The model with the checkpoint's number of classes, and what it rightly ignores."""
        if self.task is not None:
            return model, model.checkpoint_ignore()
        classifier = model.pretrained_cfg["classifier"]
        if self.num_classes == 0:
            return model, {f"{classifier}.*": "no classifier is asked for"}
        weight = converted.get(f"{classifier}.weight")
        if self.num_classes is None and weight is not None and weight.ndim:
            classes = len(weight)
            if classes not in (0, model.num_classes):
                model = self.build(num_classes=classes)
        return model, {}

    def constants(self, model: Any) -> dict[str, Tensor]:
        """What the authors store beside, by the checkpoint's names."""
        outer = "" if self.head is None else DETECTOR
        return {outer + k: x for k, x in self.family._BUFFERS(self._inner(model)).items()}

    def _inner(self, model: Any) -> Any:
        """The family's model inside."""
        if self.head is not None:
            return model.backbone.model
        return model if self.task is None else model.model

    def laid_out(self, state_dict: dict[str, Tensor], model: Any) -> dict[str, Tensor]:
        """A state dict in our names as it is to be written."""
        if self.to == "ours":
            return state_dict
        prefix = _PREFIXES[self.task is not None, self.head is not None]
        bare = {k.removeprefix(prefix): x for k, x in state_dict.items() if k.startswith(prefix)}
        heads = {k: x for k, x in state_dict.items() if not k.startswith(prefix)}
        inner = self._inner(model)
        if self.to == "transformers":
            return to_transformers(bare, inner)
        theirs, constants = self.family._RENAMES.to_authors(bare), self.family._BUFFERS(inner)
        assert not theirs.keys() & constants.keys()
        outer = "" if self.task is None else DETECTOR
        found = {outer + name: tensor for name, tensor in {**theirs, **constants}.items()}
        return found | RENAMES.to_authors(heads)


class _Provenance(TorchFunctionMode):
    """Follows, inside a ``with``, from which tensors of a checkpoint others are made."""

    def __init__(self, state_dict: Mapping[str, Tensor]) -> None:
        super().__init__()
        self._sources: Any = WeakTensorKeyDictionary()
        for name, tensor in state_dict.items():
            self._sources[tensor] = (name,)

    def of(self, *values: Any) -> tuple[str, ...]:
        """Names of the checkpoint that went into tensors, however they are nested."""
        tensors = [x for x in tree_leaves(values) if isinstance(x, Tensor)]
        return tuple(dict.fromkeys(name for x in tensors for name in self._sources.get(x, ())))

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        changed = args[0] if func is Tensor.__setitem__ else result
        if names := self.of(args, kwargs):
            for x in tree_leaves(changed):
                if isinstance(x, Tensor):
                    self._sources[x] = names
        return result


def _why_left(name: str, constants: Mapping[str, Tensor]) -> str:
    if name in constants:
        return "stored constant, computed here"
    return "no part of this model, by its family's conversion"


def _resized(
    family: ModuleType,
    before: Mapping[str, Tensor],
    after: Mapping[str, Tensor],
    sources: _Provenance,
) -> dict[str, Resized]:
    """Tables that are not as they were, and whatever has more elements or fewer than its source."""
    made = {name: sources.of(tensor) for name, tensor in after.items()}
    uses = Counter(name for names in made.values() for name in names)
    rules: Mapping[str, str] = getattr(family, "_RESIZES", {})
    resized = {}
    for name, names in made.items():
        if len(names) != 1 or uses[names[0]] != 1:
            continue
        old, new = before[names[0]].shape, after[name].shape
        rule = next((rules[pattern] for pattern in rules if fnmatchcase(name, pattern)), None)
        changed = rule is not None and after[name] is not before[names[0]]
        if old.numel() != new.numel() or changed:
            resized[name] = Resized(tuple(old), tuple(new), rule or NONE_STATED)
    return resized


def _initialise(state_dict: dict[str, Tensor], model: nn.Module) -> dict[str, str]:
    """Give tensors that a conversion took from the model, which has no memory, initial values."""
    floats = {x.dtype for x in state_dict.values() if x.is_floating_point() and not x.is_meta}
    initialised = {}
    for name, tensor in state_dict.items():
        if not tensor.is_meta:
            continue
        owner, _, leaf = name.rpartition(".")
        norm: Any = copy.deepcopy(model.get_submodule(owner)).to_empty(device="cpu")
        norm.reset_parameters()
        value: Tensor = norm.state_dict()[leaf]
        if value.is_floating_point() and len(floats) == 1:
            value = value.to(floats.copy().pop())
        state_dict[name] = value
        initialised[name] = f"not in the checkpoint: as {type(norm).__name__} begins"
    return initialised
