"""`vitarium digits`: write the embedded data; test nat_atto on the digits.

A picture reaches the model as one from a file does: as 8-bit RGB, light strokes on black, through
the ordinary transform of the weights, which enlarges it to 64 x 64 (bicubic, by Pillow) and
normalizes it. `vitarium train atto_digits` trains.
"""

from __future__ import annotations

import sys
import time
from argparse import Namespace
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta

import timm
import torch
from PIL import Image
from timm.data import create_transform, resolve_data_config
from timm.models import get_pretrained_cfg
from torch import Tensor, nn

from vitarium.checkpoints import load
from vitarium.data.digits import Digits, split
from vitarium.data.folders import SceneSet, make

MODEL = "nat_atto.vitarium_digits"
_NEIGHBOURS = 3
_SECONDS = 10.0  # between two lines of progress where there is no terminal


def run(args: Namespace) -> int:
    """Write the embedded data; or test on the held-out digits, and print the accuracy.

    Raises:
        ValueError: scikit-learn is missing, a folder that holds something already, a number out of
            range, or a checkpoint that does not fit.
        OSError: the data cannot be written.
    """
    return _make(args) if args.action == "make" else _test(args.checkpoint)


def _make(args: Namespace) -> int:
    scenes = SceneSet(args.scenes, args.val, args.size, args.seed)
    digits = sum(len(part.labels) for part in split())
    with progress("making", digits + 2 * (args.scenes + args.val)) as advance:
        make(args.folder, scenes, advance)
    print(f"wrote {args.folder}: classification, detection, segmentation")
    return 0


def _test(checkpoint: str | None) -> int:
    training, held_out = split()
    model = timm.create_model(MODEL, pretrained=checkpoint is None)
    if checkpoint is not None:
        load(model, checkpoint)
    found = probabilities(model, held_out).argmax(-1)
    print(comparison(found, training, held_out))
    return 0


def inputs(pictures: list[Image.Image]) -> Tensor:
    """Pictures as the model gets them, [B, 3, 64, 64], by the transform of its weights."""
    cfg = get_pretrained_cfg(MODEL)
    assert cfg is not None
    transform = create_transform(**resolve_data_config(pretrained_cfg=cfg.to_dict()))
    return torch.stack([transform(picture) for picture in pictures])


def probabilities(model: nn.Module, digits: Digits) -> Tensor:
    """[B, 10], computed in eval mode."""
    with torch.inference_mode():
        logits: Tensor = model.eval()(inputs(digits.pictures))
    return logits.softmax(-1)


def comparison(found: Tensor, training: Digits, held_out: Digits) -> str:
    """The model's accuracy and that of nearest neighbours, two lines.

    Args:
        found: the model's classes of the held-out digits.
        training: the neighbours.
        held_out: the digits that are classified.
    """
    from sklearn.neighbors import KNeighborsClassifier

    neighbours = KNeighborsClassifier(_NEIGHBOURS).fit(training.pixels, training.labels)
    rows = {
        MODEL: found,
        f"{_NEIGHBOURS} nearest neighbours on raw pixels": torch.from_numpy(
            neighbours.predict(held_out.pixels)
        ),
    }
    width = max(map(len, rows))
    return "\n".join(f"{name:{width}}  {_score(x, held_out.labels)}" for name, x in rows.items())


def _score(found: Tensor, labels: Tensor) -> str:
    right = int((found == labels).sum())
    return f"{right / len(labels):.2%} ({right} of {len(labels)})"


@contextmanager
def progress(what: str, total: int) -> Iterator[Callable[[int], None]]:
    """A function that counts images: a bar on a terminal, else a line now and then, on stderr."""
    start = shown = time.monotonic()
    done = 0

    def status() -> str:
        rate = done / max(time.monotonic() - start, 1e-9)
        left = timedelta(seconds=round((total - done) / rate)) if done else "?"
        return f"{done}/{total} images, {rate:.0f} images/s, {left} left"

    if not sys.stderr.isatty():

        def tell(count: int) -> None:
            nonlocal done, shown
            done += count
            if time.monotonic() - shown >= _SECONDS:
                shown = time.monotonic()
                print(f"{what}: {status()}", file=sys.stderr, flush=True)

        yield tell
        return

    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn

    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[status]}"))
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task(what, total=total, status=status())

        def move(count: int) -> None:
            nonlocal done
            done += count
            bar.update(task, completed=done, status=status())

        yield move
