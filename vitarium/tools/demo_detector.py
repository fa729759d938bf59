"""The demo's detector: trained on scenes of digits from random weights, measured and pictured."""

from __future__ import annotations

import io
from collections.abc import Callable
from contextlib import redirect_stderr
from dataclasses import dataclass
from pathlib import Path
from shutil import copyfile
from tempfile import TemporaryDirectory
from typing import Any

from mmengine.hooks import Hook

from vitarium.checkpoints.disk import replacing
from vitarium.data.folders import ensure
from vitarium.detection.runner import train
from vitarium.tools.train import config_file

CONFIG = "mask_rcnn_nat_atto_digits"
_WARMUP = 5  # an update of so many
_PICTURES = 3  # images of the best, and as many of the worst
_LINES = 5  # of progress


@dataclass(frozen=True)
class Trained:
    """What became of it.

    Attributes:
        box_ap: COCO's average precision of boxes, of scenes of held-out digits.
        mask_ap: of masks.
        weights: the checkpoint.
        pictures: of the best and the worst of these scenes.
        scene: one of them.
    """

    box_ap: float
    mask_ap: float
    weights: Path
    pictures: list[Path]
    scene: Path


def train_detector(folder: Path, updates: int, say: Callable[[str], None]) -> Trained:
    """Train the shipped config for fewer updates, and keep weights and pictures.

    Args:
        folder: of what is kept; it is there already.
        updates: of the weights.
        say: takes a line of progress.

    Raises:
        OSError: something cannot be written.
        KeyboardInterrupt: it was interrupted; nothing is kept.
    """
    warmup = max(1, updates // _WARMUP)
    changes = {
        "train_cfg.max_iters": updates,
        "train_cfg.val_interval": updates,
        "default_hooks.checkpoint.interval": updates,
        "param_scheduler.0.end": warmup,
        "param_scheduler.1.begin": warmup,
        "param_scheduler.1.end": max(updates, warmup + 1),
    }
    with TemporaryDirectory() as temporary:
        run = Path(temporary) / "run"
        try:
            with redirect_stderr(io.StringIO()):  # mmengine's log, which is in the run's folder too
                measures = train(
                    config_file(CONFIG),
                    run,
                    [f"{key}={value}" for key, value in changes.items()],
                    pictures=_PICTURES,
                    hooks=[_Progress(say, updates)],
                )
        except KeyboardInterrupt:
            raise KeyboardInterrupt from None  # there is no run to go on with
        scenes = ensure("detection") / "val"
        kept = {
            folder / "scenes.pth": run / f"iter_{updates}.pth",
            folder / "scenes.best.png": run / "best.png",
            folder / "scenes.worst.png": run / "worst.png",
            folder / "scene.png": min(scenes.glob("*.png")),
        }
        for target, source in kept.items():
            with replacing(target) as part:
                copyfile(source, part)
    weights, *pictures, scene = kept
    return Trained(measures["coco/bbox_mAP"], measures["coco/segm_mAP"], weights, pictures, scene)


class _Progress(Hook):
    def __init__(self, say: Callable[[str], None], updates: int) -> None:
        self._say = say
        self._updates = updates

    def after_train_iter(
        self, runner: Any, batch_idx: int, data_batch: Any = None, outputs: Any = None
    ) -> None:
        done = runner.iter + 1
        if done % max(1, self._updates // _LINES) == 0:
            self._say(f"    {done} of {self._updates} updates: loss {outputs['loss'].item():.2f}")
