"""`vitarium download`: weights into the cache, verified; the path of each on stdout."""

from __future__ import annotations

import re
import sys
import warnings
from argparse import Namespace
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path

from timm.models import get_pretrained_cfg

from vitarium.backbones._registry import entries
from vitarium.checkpoints import CheckpointError, Weight, adopt, fetch
from vitarium.tools.list import did_you_mean


def run(args: Namespace) -> int:
    """Get what is named, one after the other; what fails is one line on stderr.

    Returns:
        1 if something that was named outright, or that a program could fetch, failed; else 0.

    Raises:
        ValueError: ``--file`` with anything but one plain name.
    """
    weights = _weights()
    if args.file is not None and (len(args.names) != 1 or _is_glob(args.names[0])):
        raise ValueError(f"--file: expected one name with it, got {' '.join(args.names)}")
    failed = False
    needed: dict[str, bool] = {}  # whether it is a failure not to get it
    for pattern in args.names:
        try:
            names = _matching(pattern, weights, args.task)
        except ValueError as error:
            _complain(str(error))
            failed = True
            continue
        for name in names:
            fetchable = weights[name].manual is None and weights[name].unreleased is None
            needed[name] = needed.get(name, False) or fetchable or not _is_glob(pattern)
    for name, counts in needed.items():
        failed |= not _got(weights[name], name, args) and counts
    return int(failed)


def _weights() -> dict[str, Weight]:
    """Every weight file of the zoo, by ``entry.tag``."""
    return {
        name: weight for module in entries().values() for name, weight in module._WEIGHTS.items()
    }


def _matching(pattern: str, weights: Mapping[str, Weight], task: str) -> Sequence[str]:
    """Names of the weight files that a name, or a glob among those of a task, means.

    An entry means its default tag.

    Raises:
        ValueError: none.
    """
    defaults = {entry: f"{entry}.{_default_tag(entry)}" for entry in entries()}
    known = {**{name: name for name in weights}, **defaults}
    if not _is_glob(pattern):
        if pattern not in known:
            raise ValueError(f"unknown model {pattern!r}{did_you_mean(pattern, known)}")
        if known[pattern] not in weights:
            raise ValueError(f"{pattern}: no weights are known")
        return [known[pattern]]
    chosen = {n: w for n, w in weights.items() if task in (w.task, "all")}
    found = [known[name] for name in known if fnmatchcase(name, pattern) and known[name] in chosen]
    if not found:
        raise ValueError(
            f"no weights match {pattern!r} (--task {task}){did_you_mean(pattern, known)}"
        )
    return found


def _default_tag(entry: str) -> str | None:
    cfg = get_pretrained_cfg(entry)
    return None if cfg is None else cfg.tag


def _is_glob(pattern: str) -> bool:
    return re.search(r"[*?[]", pattern) is not None


def _got(weight: Weight, name: str, args: Namespace) -> bool:
    """Print the path of one file, or why there is none."""
    with warnings.catch_warnings(record=True) as shown:
        warnings.simplefilter("always")
        try:
            path = _path(weight, name, args)
        except CheckpointError as error:
            _complain(str(error))
            return False
        finally:
            for warning in shown:
                print(f"vitarium: {warning.message}", file=sys.stderr)
    print(path, flush=True)
    return True


def _path(weight: Weight, name: str, args: Namespace) -> Path:
    if args.file is not None:
        return adopt(weight, name, args.file, args.cache_dir, args.lock)
    return fetch(weight, name, False if args.quiet else None, args.cache_dir, args.lock)


def _complain(message: str) -> None:
    print(f"vitarium: error: {' '.join(message.split())}", file=sys.stderr)
