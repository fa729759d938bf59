"""``vitarium bench digits``: every small model trained on the digits, by a recipe for its kind."""

from __future__ import annotations

import csv
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import timm
from rich.console import Console

import vitarium
from vitarium.backbones._registry import entries
from vitarium.tools import bench
from vitarium.tools._common import model_names
from vitarium.tools.bench import Row
from vitarium.training.toml import load_config

RECIPE = "atto_digits"
_RECIPES = {name: f"{name}_digits" for name in ("dinat_isotropic_atto", "vitrpb_atto")}
_TOP1 = 97.0  # percent of the held-out digits, that each of ours is to reach
_SECONDS = 480.0  # of CPU time, in which it is to do so


@dataclass(frozen=True)
class _Peer:
    """A model of timm's beside ours, of which nothing is asked."""

    name: str
    kwargs: dict[str, Any] = field(default_factory=dict)


_PEERS = {
    "convnext_atto": _Peer("convnext_atto"),
    "vit, patch 8, 6 blocks of 128": _Peer(
        "vit_tiny_patch16_224",
        {"img_size": 64, "patch_size": 8, "embed_dim": 128, "depth": 6, "num_heads": 4},
    ),
}


def measure(
    console: Console, names: Sequence[str], jobs: int, save: Callable[[list[Row]], None]
) -> list[Row]:
    """Train each in a fresh process on one thread; print as they come.

    Args:
        console: where the table goes.
        names: models and globs; none for every ``*_atto`` of ours and two of timm's.
        jobs: how many are trained at a time.
        save: keeps the rows so far, after each training.

    Raises:
        ValueError: an unknown model.
        RuntimeError: a training that failed.
    """
    models = {name: _Peer(name) for name in model_names(names)}
    if not models:
        models = {name: _Peer(name) for name in entries() if name.endswith("_atto")} | _PEERS
    rows = []
    with ThreadPoolExecutor(jobs) as pool:
        trainings = [pool.submit(_trained, shown, model) for shown, model in models.items()]
        try:
            for training in as_completed(trainings):
                rows.append(training.result())
                console.print(_line(rows[-1]))
                save(rows)
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    columns = ["", "M parameters", "top-1 %", "wrong of 360", "CPU s"]
    formats = {"param_count": ".2f", "top1": ".2f", "wrong": "d", "cpu_s": ".0f"}
    table = [
        [row["model"], *(format(row[key], form) for key, form in formats.items())]
        for row in sorted(rows, key=lambda row: -row["top1"])
    ]
    bench.show(console, "held-out digits, from random weights", columns, table)
    ours = [row for row in rows if row["model"] in entries()]
    if ours:
        least, longest = min(row["top1"] for row in ours), max(row["cpu_s"] for row in ours)
        for figure, ok in (
            (f"least of ours: {least:.2f} %, goal {_TOP1:g} %", least >= _TOP1),
            (f"longest of ours: {longest:.0f} s, goal {_SECONDS:g} s", longest <= _SECONDS),
        ):
            console.print(f"{figure}: {'met' if ok else 'missed'}")
    return rows


def _trained(shown: str, model: _Peer) -> Row:
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "run"
        recipe = _RECIPES.get(model.name, RECIPE)
        command = [sys.executable, "-m", "vitarium_cli", "train", recipe, "--device", "cpu"]
        command += ["--output", str(out), "--set", f"model.name={model.name}"]
        for key, value in model.kwargs.items():
            command += ["--set", f"model.kwargs.{key}={value}"]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        seconds = _ran(command, environment, Path(folder) / "errors")
        epochs = load_config(out / "config.toml").schedule.epochs
        with (out / "log.csv").open(encoding="utf-8", newline="") as file:
            top1 = [
                float(row["value"]) for row in csv.DictReader(file) if row["name"] == "val_top1"
            ]
    network = timm.create_model(model.name, num_classes=10, **model.kwargs, device="meta")
    return {
        "model": shown,
        "param_count": round(sum(p.numel() for p in network.parameters()) / 1e6, 3),
        "top1": top1[-1],
        "wrong": round(3.6 * (100 - top1[-1])),
        "cpu_s": round(seconds, 1),
        "recipe": recipe,
        "epochs": epochs,
        "vitarium": vitarium.__version__,
    }


def _ran(command: list[str], environment: dict[str, str], errors: Path) -> float:
    """Seconds of CPU time that the command took."""
    with errors.open("wb") as file:
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=file, env=environment)
        _, status, usage = os.wait4(process.pid, 0)  # of this process, not of all there were
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise RuntimeError(f"{' '.join(command)}: {errors.read_text(errors='replace')}")
    return usage.ru_utime + usage.ru_stime


def _line(row: Row) -> str:
    return f"{row['model']}: {row['top1']:.2f} % in {row['cpu_s']:.0f} s of CPU time"


def draw(rows: Sequence[Row], out: Path) -> list[Path]:
    """Accuracy against CPU time, as a PNG file in an existing folder."""
    from vitarium.tools import bench_plots

    figure, axes = bench_plots.canvas("The digits, learned", "one thread, recipes by kind")
    axes.set_xlabel("CPU seconds of training")
    axes.set_ylabel("held-out digits right, %")
    for row in rows:
        place = row["cpu_s"], row["top1"]
        face = "C0" if row["model"] in entries() else "w"
        axes.scatter(*place, s=34, c=face, edgecolor="C0", zorder=3)
        axes.annotate(row["model"], place, xytext=(5, 4), textcoords="offset points", fontsize=8)
    axes.axhline(_TOP1, color=bench_plots.FAINT, linewidth=0.8)
    axes.axvline(_SECONDS, color=bench_plots.FAINT, linewidth=0.8)
    file = out / "digits.png"
    bench_plots.save(figure, file)
    return [file]
