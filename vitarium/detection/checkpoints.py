"""Checkpoints of mmengine's: written whole or not at all, the newest whole one counts."""

from __future__ import annotations

import pickle
import re
import sys
from contextlib import nullcontext
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import urlsplit

import torch
from mmengine.dist import is_main_process
from mmengine.fileio import LocalBackend
from mmengine.hooks import CheckpointHook
from safetensors.torch import load_file

from vitarium.backbones._registry import UNKNOWN_LICENCE, entries, released
from vitarium.checkpoints import CheckpointError, Weight, fetch
from vitarium.checkpoints.disk import replacing
from vitarium.checkpoints.files import check_structure
from vitarium.checkpoints.opcodes import DAMAGED
from vitarium.tools.list import did_you_mean

_NAME = re.compile(r"(epoch|iter)_([0-9]+)\.pth")
_ADDRESS = re.compile(r"https?://")


class WholeCheckpointHook(CheckpointHook):
    """mmengine's hook; an old checkpoint is removed once the new one is complete and on the disk.

    Where gradients of several iterations are added, a checkpoint waits for the step, since it does
    not hold gradients.
    """

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._waiting = False

    def before_train(self, runner: Any) -> None:
        """Find out what is best so far."""
        super().before_train(runner)
        self.file_backend = _Patient()

    def after_train_iter(self, runner: Any, batch_idx: int, *args: Any, **kwargs: Any) -> None:
        """Save if it is due, or was before the step."""
        super().after_train_iter(runner, batch_idx, *args, **kwargs)
        if self._waiting and runner.train_loop.updated:
            self._save(runner, f"iter_{runner.iter + 1}.pth", runner.epoch, runner.iter + 1)

    def save_now(self, runner: Any) -> None:
        """Save between two iterations."""
        self._save(runner, f"iter_{runner.iter}.pth", runner.epoch, runner.iter)

    def _save_checkpoint_with_step(self, runner: Any, step: int, meta: dict[str, Any]) -> None:
        self._waiting = not runner.train_loop.updated
        if not self._waiting:
            self._save(runner, self.filename_tmpl.format(step), meta["epoch"], meta["iter"])

    def _save_best_checkpoint(self, runner: Any, metrics: dict[str, float]) -> None:
        super()._save_best_checkpoint(runner, metrics)
        self.file_backend.settle()

    def _save(self, runner: Any, name: str, epoch: int, iteration: int) -> None:
        self._waiting = False
        folder = Path(self.out_dir)
        self.last_ckpt = str(folder / name)
        runner.message_hub.update_info("last_ckpt", self.last_ckpt)
        runner.save_checkpoint(
            str(folder),
            name,
            save_optimizer=self.save_optimizer,
            save_param_scheduler=self.save_param_scheduler,
            meta={"epoch": epoch, "iter": iteration},
            by_epoch=self.by_epoch,
            **self.args,
        )
        if not is_main_process():
            return
        with replacing(folder / "last_checkpoint") as temporary:
            temporary.write_text(self.last_ckpt, encoding="utf-8")
        if self.max_keep_ckpts > 0:
            length = len(runner.train_dataloader)
            paths = sorted(found(folder), key=lambda path: _iteration(path, length))
            for path in paths[: -self.max_keep_ckpts]:
                path.unlink(missing_ok=True)


class _Patient(LocalBackend):
    """What is to be removed before something is written waits until that is complete."""

    def __init__(self) -> None:
        super().__init__()
        self._unwanted: list[Path] = []

    def remove(self, filepath: str | Path) -> None:
        """Note what is unwanted."""
        self._unwanted.append(Path(filepath))

    def settle(self) -> None:
        """Remove it."""
        while self._unwanted:
            self._unwanted.pop().unlink(missing_ok=True)


def located(source: str, argument: str) -> Path:
    """A file of weights, brought to the cache and verified if it is not here.

    Args:
        source: a file, the name of released weights, or an address, http or https.
        argument: what names it, for messages.

    Raises:
        ValueError: it is none of these.
        CheckpointError: it cannot be had.
    """
    if Path(source).is_file():
        return Path(source)
    weight = released(source.partition(".")[0]).get(source)
    if weight is not None:
        return fetch(weight, source)
    if not _ADDRESS.match(source):
        known = [name for entry in entries() for name in released(entry)]
        raise ValueError(
            f"{argument}: expected a file, an address or the name of released weights, got "
            f"{source}{did_you_mean(source, known)}"
        )
    name = re.sub(r"[^A-Za-z0-9_.-]", "_", PurePosixPath(urlsplit(source).path).stem) or "weights"
    return fetch(Weight(url=source, licence=UNKNOWN_LICENCE), name)


def clear(folder: Path) -> None:
    """Remove what a killed process left behind unfinished."""
    for half in [*folder.glob("*.pth.new"), *folder.glob("last_checkpoint.new")]:
        half.unlink(missing_ok=True)


def found(folder: Path) -> list[Path]:
    """Checkpoints to go on from, in no order."""
    return [path for path in folder.glob("*.pth") if _NAME.fullmatch(path.name)]


def _iteration(path: Path, length: int) -> int:
    match = _NAME.fullmatch(path.name)
    assert match is not None
    return int(match[2]) * (length if match[1] == "epoch" else 1)


def newest(folder: Path) -> Path | None:
    """The newest checkpoint that is whole, or None where there is none; damaged ones are named.

    Raises:
        ValueError: there are checkpoints, and none of them can be read.
    """
    readable: list[tuple[int, Path]] = []
    paths = found(folder)
    for path in paths:
        try:
            readable.append((read(path, outline=True)["meta"]["iter"], path))
        except (CheckpointError, KeyError, TypeError) as error:
            _pass_over(path, error)
    for _, path in sorted(readable, reverse=True):
        try:
            check_structure(path)
        except CheckpointError as error:
            _pass_over(path, error)
        else:
            return path
    if paths:
        raise ValueError(f"{folder}: expected a whole checkpoint, all are damaged")
    return None


def _pass_over(path: Path, error: Exception) -> None:
    if not is_main_process():
        return
    why = str(error) if isinstance(error, CheckpointError) else "not written by a run"
    print(f"passed over: {path.name}: {why.removeprefix(f'{path}: ')}", file=sys.stderr)


def read(path: Path, outline: bool = False) -> dict[str, Any]:
    """What a checkpoint file of mmengine's holds; nothing in it is run.

    Args:
        path: safetensors, or a pickle of tensors, plain data and what mmengine logs.
        outline: whether tensors may be without data, which reads less and sees less damage.

    Raises:
        CheckpointError: it is something else, damaged, or asks for more.
    """
    try:
        if check_structure(path, payload=not outline) == "safetensors":
            return {"state_dict": load_file(path)}
        skipping = torch.serialization.skip_data() if outline else nullcontext()
        with skipping, path.open("rb") as file:
            content = torch.load(file, "meta" if outline else "cpu", weights_only=True)
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from error.__cause__
    except pickle.UnpicklingError:
        raise CheckpointError(f"{path}: {DAMAGED}") from None  # torch advises to run it
    except Exception as error:  # a damaged pickle can raise anything
        raise CheckpointError(f"{path}: truncated or damaged ({type(error).__name__})") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: expected a dictionary, got {type(content).__name__}")
    return content
