"""What is known of a weight file: its addresses, size, hash, wrapper and licence."""

from __future__ import annotations

import re
from dataclasses import dataclass

from vitarium.checkpoints.errors import CheckpointError
from vitarium.checkpoints.wrappers import WRAPPERS

TASKS = ("cls", "det", "seg")
_NAME = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9_+-]|\.(?!\.)){0,150}")
_NON_COMMERCIAL = re.compile(
    r"\bnc\b|non[ -]?commercial|research[ -]((use|purposes?)[ -])?only", re.IGNORECASE
)
_ADDRESS = re.compile(r"https?://([\w.-]+|\[[0-9a-fA-F:.]+\])(:[0-9]+)?/[!-~]*", re.ASCII)


@dataclass(frozen=True)
class Weight:
    """Where a checkpoint is, and what is known about the file.

    Attributes:
        url: its address, http or https.
        mirrors: further addresses of the same file, tried in order.
        size: in bytes.
        sha256: 64 lower-case hexadecimal digits.
        wrapper: what surrounds the tensors in it, ``plain`` or a name that `unwrap` knows; None
            where that is not stated, and `unwrap` searches.
        licence: of the weights, as their authors state it.
        manual: how a person gets the file, with the address, where no program can.
        file: name of a file that ships inside this package.
        unreleased: in place of an address, why nobody can have the file.
        task: what the network in the file does: ``cls`` classifies, ``det`` detects, ``seg``
            segments. Only the backbone of the last two is a model of the zoo.
        code_licence: of the code that goes with the file, where it is not the family's.
    """

    url: str | None = None
    mirrors: tuple[str, ...] = ()
    size: int | None = None
    sha256: str | None = None
    wrapper: str | None = None
    licence: str = "none stated"
    manual: str | None = None
    file: str | None = None
    unreleased: str | None = None
    task: str = "cls"
    code_licence: str | None = None

    def __post_init__(self) -> None:
        for address in self.addresses:
            if not _ADDRESS.fullmatch(address):
                raise ValueError(f"url: expected an http or https address, got {address!r}")
        if self.mirrors and self.url is None:
            raise ValueError("mirrors: expected a url that they mirror, got None")
        kinds = (self.url, self.file, self.manual, self.unreleased)
        if sum(kind is not None for kind in kinds) != 1:
            raise ValueError(
                f"Weight: expected one of url, file, manual and unreleased, got {kinds}"
            )
        if self.task not in TASKS:
            raise ValueError(f"task: expected one of {TASKS}, got {self.task!r}")
        if self.size is not None and self.size <= 0:
            raise ValueError(f"size: expected a number of bytes, got {self.size!r}")
        if self.sha256 is not None and not re.fullmatch("[0-9a-f]{64}", self.sha256):
            raise ValueError(
                f"sha256: expected 64 lower-case hexadecimal digits, got {self.sha256!r}"
            )
        if self.wrapper not in (None, "plain", *WRAPPERS):
            raise ValueError(f"wrapper: expected plain or one of {WRAPPERS}, got {self.wrapper!r}")
        if self.file is not None:
            checked_name(self.file, "file")

    @property
    def addresses(self) -> tuple[str, ...]:
        """The url, then its mirrors."""
        return (() if self.url is None else (self.url,)) + self.mirrors

    @property
    def notice(self) -> str | None:
        """What to tell whoever gets the file; None where its licence allows commercial use."""
        if self.licence.lower() == "none stated":
            return "no licence is stated for these weights: ask their authors before you use them"
        if _NON_COMMERCIAL.search(self.licence):
            return f"the licence of these weights, {self.licence}, forbids commercial use"
        return None


def checked_name(name: str, argument: str) -> None:
    """Raise a `CheckpointError` unless ``name`` is a plain file name."""
    if not _NAME.fullmatch(name):
        raise CheckpointError(
            f"{argument}: expected a plain file name of letters, digits and . _ + -, got {name!r}"
        )
