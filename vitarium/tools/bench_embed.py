"""``vitarium bench embed``: whether reading and writing keep up with the model."""

from __future__ import annotations

import os
import statistics
import tempfile
import time
from argparse import Namespace
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from PIL import Image
from rich.console import Console
from rich.progress import Progress
from safetensors.torch import save_file

from vitarium.embedding.embedder import Embedder, Settings, spare_cores
from vitarium.tools import bench
from vitarium.tools._common import model_names

_GOAL = 0.9  # of the bare model's images/s
_SIZE = 500, 375  # of the images, in pixels: about the median of ImageNet's


def measure(console: Console, args: Namespace, device: torch.device) -> list[dict[str, Any]]:
    """Time `vitarium embed` on JPEG files and its model alone on a batch, taking turns.

    Ours includes the start of the workers that read, and the shards on the disk; building the
    model and listing the files come before. Wall-clock time, medians, random weights.

    Args:
        console: where the table goes.
        args: ``names``, ``rounds``, ``images``, ``batch_size`` and ``workers``.
        device: of the model.

    Returns:
        A row for each model: images/s of both, their ratio, and whether that is enough (``met``).

    Raises:
        ValueError: an unknown model, or one that takes no RGB images.
    """
    workers = spare_cores() if args.workers is None else args.workers
    rows = []
    with tempfile.TemporaryDirectory(prefix="vitarium-bench-") as folder:
        _draw(Path(folder) / "images", args.images)
        for name in model_names(args.names or ["nat_mini"]):
            weights = Path(folder) / f"{name}.safetensors"
            torch.manual_seed(0)
            save_file(timm.create_model(name).state_dict(), weights)
            settings = Settings(
                model=name,
                checkpoint=str(weights),
                data=f"{folder}/images",
                out=f"{folder}/{name}",
                batch_size=args.batch_size,
                workers=workers,
                device=str(device),
            )
            load = round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None
            bare, ours = _rates(Embedder(settings), settings, args.rounds)
            rows.append(
                {
                    "model": name,
                    "images": args.images,
                    "batch_size": args.batch_size,
                    "workers": workers,
                    "rounds": args.rounds,
                    "bare_images_per_s": round(bare, 3),
                    "embed_images_per_s": round(ours, 3),
                    "ratio": round(ours / bare, 3),
                    "met": ours / bare >= _GOAL,
                    "load_average": load,
                }
            )
    table = [
        [
            row["model"],
            f"{row['bare_images_per_s']:.2f}",
            f"{row['embed_images_per_s']:.2f}",
            f"{row['ratio']:.3f}",
            "met" if row["met"] else "MISSED",
            "-" if row["load_average"] is None else f"{row['load_average']:.1f}",
        ]
        for row in rows
    ]
    console.print(
        f"{args.images} JPEG files of {_SIZE[0]} x {_SIZE[1]}, batches of {args.batch_size}, "
        f"{workers} worker(s), medians of {args.rounds} turns; goal: {_GOAL} of the bare model"
    )
    columns = ["", "bare images/s", "embed images/s", "ratio", "", "load before"]
    bench.show(console, "", columns, table)
    return rows


def _rates(embedder: Embedder, settings: Settings, rounds: int) -> tuple[float, float]:
    """Images per second of the bare model and of everything."""
    count, size = len(embedder.images), settings.batch_size
    height, width = embedder.store.manifest["transform"]["input_size"][1:]
    batches = [torch.randn(min(size, count - i), 3, height, width) for i in range(0, count, size)]
    first = embedder.store

    def bare() -> None:
        torch.cat([embedder(batch) for batch in batches]).cpu()

    def embed() -> None:
        embedder.run()

    times: dict[Callable[[], None], list[float]] = {bare: [], embed: []}
    embedder(batches[0])  # the first call finds out more than others
    with Progress(console=Console(stderr=True), transient=True) as progress:
        for turn in progress.track(range(rounds), description=""):
            embedder.store = replace(first, folder=first.folder / f"turn-{turn}")
            embedder.store.open()
            for function, seconds in times.items():
                start = time.perf_counter()
                function()
                seconds.append(time.perf_counter() - start)
    return count / statistics.median(times[bare]), count / statistics.median(times[embed])


def _draw(folder: Path, count: int) -> None:
    """Photographs, as far as a decoder can tell: of about 100 kB."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    for i in range(count):
        coarse = Image.fromarray(rng.integers(0, 255, (24, 32, 3), dtype=np.uint8))
        smooth = np.asarray(coarse.resize(_SIZE, Image.Resampling.BICUBIC), dtype=np.float32)
        pixels = (smooth + rng.normal(0, 12, smooth.shape)).clip(0, 255).astype(np.uint8)
        Image.fromarray(pixels).save(folder / f"{i:06}.jpg", quality=90)
