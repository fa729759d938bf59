"""A run's folder: its config, what made it, its log, its weights."""

from __future__ import annotations

import csv
import io
import json
import os
import platform
import subprocess
import sys
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

import vitarium
from vitarium.checkpoints.disk import replacing
from vitarium.training.config import Config
from vitarium.training.snapshots import Snapshots
from vitarium.training.toml import differences, dump_config, load_config

_CONFIG = "config.toml"
_FACTS = "run.json"
_LOG = "log.csv"
_UNREADABLE = "unreadable.csv"
_PACKAGES = ("torch", "torchvision", "timm", "accelerate", "numpy", "pillow", "datasets")
# What may change between an interruption and a resumption: no weight depends on it, provided that
# a step has as many images as before.
_FREE = {
    "data.root", "data.workers", "train.accumulation", "train.log_every",
    "train.checkpoint_every", "train.keep", "train.tensorboard",
}  # fmt: skip


class RunFolder:
    """``config.toml``, ``run.json``, ``log.csv``, ``snapshots/`` and weights.

    One process writes; `open` comes first.
    """

    def __init__(self, path: Path, config: Config) -> None:
        self.path = path
        self.config = config
        self.snapshots = Snapshots(path / "snapshots", config.train.keep)

    def open(self, resume: bool) -> None:
        """Begin the run, or see that it can go on.

        Args:
            resume: whether the folder holds this run already.

        Raises:
            ValueError: the folder holds a run and ``resume`` is false, or the other way round; the
                run has another config.
            OSError: the folder cannot be written.
        """
        there = (self.path / _CONFIG).exists()
        if there and not resume:
            raise ValueError(
                f"{self.path}: holds a run already; --resume goes on with it, --output names "
                f"another folder"
            )
        if resume and not there:
            raise ValueError(f"{self.path}: expected a run to go on with, found none")
        if there:
            before = load_config(self.path / _CONFIG)
            changed = {
                name: pair
                for name, pair in differences(before, self.config).items()
                if name not in _FREE
            }
            if changed:
                name, (was, now) = next(iter(changed.items()))
                raise ValueError(
                    f"{self.path}: its run has another config: {name} was {was!r}, is {now!r}"
                )
            return
        self.path.mkdir(parents=True, exist_ok=True)
        _write(self.path / _FACTS, json.dumps(_facts(), indent=2) + "\n")
        _write(self.path / _CONFIG, dump_config(self.config))

    def rewind(self, update: int) -> None:
        """Remove what the log says of later updates, and a line that was not finished."""
        for name in (_LOG, _UNREADABLE):
            path = self.path / name
            if not path.exists():
                continue
            whole = path.read_text(encoding="utf-8", errors="replace").split("\n")[:-1]
            rows = list(csv.reader(whole))
            kept = [
                line
                for line, row in zip(whole, rows, strict=True)
                if not row[0].isdecimal() or int(row[0]) <= update
            ]
            _write(path, "".join(f"{line}\n" for line in kept))

    def log(self, row: Mapping[str, Any]) -> None:
        """Add a line to the log; all have the same columns."""
        self._append(_LOG, row)

    def unreadable(self, update: int, name: str, why: str) -> None:
        """Write down an image that could not be read."""
        self._append(_UNREADABLE, {"update": update, "image": name, "reason": why})

    def _append(self, name: str, row: Mapping[str, Any]) -> None:
        path = self.path / name
        new = not path.exists() or path.stat().st_size == 0
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        if new:
            writer.writerow(row)
        writer.writerow(f"{x:.6g}" if isinstance(x, float) else x for x in row.values())
        with path.open("a", encoding="utf-8", newline="") as file:
            file.write(text.getvalue())

    def save_weights(self, name: str, tensors: Mapping[str, Tensor], facts: Any) -> Path:
        """Write ``<name>.safetensors``; what it replaces stays until it is complete."""
        path = self.path / f"{name}.safetensors"
        plain = {key: tensor.cpu().contiguous() for key, tensor in tensors.items()}
        try:
            with replacing(path) as temporary:
                save_file(plain, temporary, {"training": json.dumps(facts)})
        except SafetensorError as error:  # what safetensors makes of a disk that is full
            raise OSError(f"{path}: cannot be written: {error}") from error
        return path


def _write(path: Path, text: str) -> None:
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def _facts() -> dict[str, Any]:
    """What made the run, beside its config."""
    return {
        "command": " ".join(["vitarium", *sys.argv[1:]]),
        "versions": {"vitarium": vitarium.__version__, **_versions()},
        "python": platform.python_version(),
        "platform": platform.platform(),
        "devices": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        "processes": int(os.environ.get("WORLD_SIZE", "1")),
        "git": _git_state(),
    }


def _versions() -> dict[str, str]:
    found = {}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def _git_state() -> dict[str, Any] | None:
    """Commit of the working directory and whether files differ from it; None outside of git."""

    def git(*args: str) -> str:
        return subprocess.run(
            ["git", *args], capture_output=True, text=True, check=True, timeout=10
        ).stdout

    try:
        return {
            "commit": git("rev-parse", "HEAD").strip(),
            "dirty": bool(git("status", "--porcelain")),
        }
    except (OSError, subprocess.SubprocessError):
        return None
