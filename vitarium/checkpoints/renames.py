"""Rename tables between an authors' parameter names and ours, in both directions."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from vitarium.checkpoints.errors import CheckpointError

_FIELD = re.compile(r"\{([a-z]\w*)([+-][0-9]+)?\}")

TensorFunction = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class _Template:
    """A name with integer fields: ``stages.{i+1}.attn.``; a trailing dot makes it a prefix."""

    text: str
    pattern: re.Pattern[str]
    fields: tuple[tuple[str, int], ...]

    @classmethod
    def parse(cls, text: str) -> _Template:
        fields = tuple((match[1], int(match[2] or 0)) for match in _FIELD.finditer(text))
        literals = _FIELD.split(text)[::3]
        if not text or any(brace in literal for literal in literals for brace in "{}"):
            raise ValueError(f"template: expected a name with fields like {{i+1}}, got {text!r}")
        # No leading zeros: "01" would not come back as it was.
        body = "(0|[1-9][0-9]*)".join(re.escape(literal) for literal in literals)
        return cls(text, re.compile(body + ("" if text.endswith(".") else r"\Z")), fields)

    def match(self, name: str) -> tuple[dict[str, int], str] | None:
        """The fields' values and what follows the prefix, or None where the name does not fit."""
        found = self.pattern.match(name)
        if found is None:
            return None
        values: dict[str, int] = {}
        for (field, offset), digits in zip(self.fields, found.groups(), strict=True):
            value = int(digits) - offset
            if value < 0 or values.setdefault(field, value) != value:
                return None
        return values, name[found.end() :]

    def fill(self, values: Mapping[str, int]) -> str | None:
        """The name for these values, or None where a field would be negative."""
        if any(values[field] + offset < 0 for field, offset in self.fields):
            return None
        return _FIELD.sub(lambda field: str(values[field[1]] + int(field[2] or 0)), self.text)


class Renames:
    """A table of names: authors' on the left, ours on the right.

    Templates hold integer fields, with an offset where the two sides count differently; a
    template that ends with a dot is a prefix, any other is a full name. The first row that fits
    a name counts, so special rows stand above general ones. The inverse is read off the same
    rows; every name that a conversion writes must lead back to where it came from.

    >>> table = Renames([("layers.{i}.downsample.", "stages.{i+1}.downsample.")])
    >>> table.ours("layers.0.downsample.norm.weight")
    'stages.1.downsample.norm.weight'
    >>> table.authors("stages.1.downsample.norm.weight")
    'layers.0.downsample.norm.weight'

    Args:
        rows: pairs of templates (authors', ours) with the same fields.
        values: for tensors that change too, our template -> (authors' to ours, ours to
            authors'), two functions of one tensor that leave their argument as it is.

    Raises:
        ValueError: a template that cannot be read, a row whose sides have different fields or
            of which only one is a prefix, or ``values`` without any row.
    """

    def __init__(
        self,
        rows: Sequence[tuple[str, str]],
        values: Mapping[str, tuple[TensorFunction, TensorFunction]] | None = None,
    ) -> None:
        self._rows = [(_Template.parse(theirs), _Template.parse(ours)) for theirs, ours in rows]
        for theirs, ours in self._rows:
            if {name for name, _ in theirs.fields} != {name for name, _ in ours.fields}:
                raise ValueError(
                    f"rows: expected the same fields on both sides, got "
                    f"{theirs.text!r} and {ours.text!r}"
                )
            if theirs.text.endswith(".") != ours.text.endswith("."):
                raise ValueError(
                    f"rows: expected two prefixes or two full names, got "
                    f"{theirs.text!r} and {ours.text!r}"
                )
        if values and not rows:
            raise ValueError("values: expected rows too, by which the authors' format is known")
        self._values = [(_Template.parse(text), pair) for text, pair in (values or {}).items()]

    def ours(self, name: str) -> str:
        """Our name for an authors' name; a name that no row fits is its own."""
        return _renamed(name, self._rows)

    def authors(self, name: str) -> str:
        """The authors' name for one of ours; a name that no row fits is its own."""
        return _renamed(name, [(ours, theirs) for theirs, ours in self._rows])

    def to_ours(self, state_dict: Mapping[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
        """Convert an authors' state dict; one whose names are already ours is left as it is.

        Args:
            state_dict: tensors by name; it is not changed.
            model: tells the two formats apart: whichever has more of the model's own names.

        Returns:
            A new dictionary; tensors that ``values`` does not name are shared.

        Raises:
            CheckpointError: two names that become one, a name that does not lead back, or a
                tensor that a function of ``values`` cannot take.
        """
        own = model.state_dict().keys()
        renamed = {self.ours(name) for name in state_dict}
        if len(own & renamed) <= len(own & state_dict.keys()):
            return dict(state_dict)
        names = _one_to_one(state_dict, self.ours, self.authors)
        return {ours: self._value(ours, state_dict[theirs], 0) for theirs, ours in names.items()}

    def to_authors(self, state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Convert a state dict in our names back to the authors'; the inverse of `to_ours`.

        Raises:
            CheckpointError: as `to_ours`.
        """
        names = _one_to_one(state_dict, self.authors, self.ours)
        return {theirs: self._value(ours, state_dict[ours], 1) for ours, theirs in names.items()}

    def _value(self, ours: str, tensor: Tensor, direction: int) -> Tensor:
        for template, pair in self._values:
            if template.match(ours) is not None:
                try:
                    return pair[direction](tensor)
                except (RuntimeError, ValueError, IndexError) as error:
                    raise CheckpointError(
                        f"{ours}: a tensor of shape {list(tensor.shape)} cannot be converted: "
                        f"{error}"
                    ) from error
        return tensor


def _renamed(name: str, rows: Sequence[tuple[_Template, _Template]]) -> str:
    for source, target in rows:
        match = source.match(name)
        if match is None:
            continue
        filled = target.fill(match[0])
        if filled is not None:
            return filled + match[1]
    return name


def _one_to_one(
    names: Mapping[str, Tensor], there: Callable[[str], str], back: Callable[[str], str]
) -> dict[str, str]:
    table: dict[str, str] = {}
    sources: dict[str, str] = {}
    for name in names:
        target = there(name)
        if target in sources:
            raise CheckpointError(f"{sources[target]} and {name} would both become {target}")
        if back(target) != name:
            raise CheckpointError(
                f"{name} is ambiguous: it would become {target}, which leads back to {back(target)}"
            )
        sources[target] = name
        table[name] = target
    return table
