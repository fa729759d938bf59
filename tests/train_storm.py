"""A run that is killed again and again, and one that two processes share.

    python tests/train_storm.py [--kills 5] [--updates 80] [--seed N]

First, nat_atto learns the digits with mixup, stochastic depth, RandAugment, an average of weights
and a worker that reads, deterministically. The same run is then killed with SIGKILL, workers
included, at random updates and random moments of them, every second time while a snapshot is being
written, and resumed each time. After each kill every snapshot must be whole; in the end weights,
the best ones too, must equal those of the unbroken run bit for bit, and so must the log, speed
aside.

Second, a small ViT (LayerNorm, no stochastic depth) learns them in two processes of torchrun's
(gloo), in one with twice the batch, and in one that accumulates two batches. The loss curve of the
first two must agree to 1e-4, the weights of the first and the last bit for bit. One line each;
exits 1 unless all is right. CPU only.
"""

from __future__ import annotations

import argparse
import csv
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import redirect_stderr
from pathlib import Path

import torch
from safetensors.torch import load_file

from vitarium.checkpoints import CheckpointError, read
from vitarium.training.engine import Engine
from vitarium.training.toml import load_config

_PATIENCE = 600.0  # seconds for any one thing to happen
_COMMON = """
task = "classification"
seed = 11
deterministic = true
[data]
source = "digits"
image_size = {size}
workers = {workers}
[schedule]
updates = {updates}
warmup_updates = 5
[optimizer]
lr = 1e-3
clip_grad = 1.0
"""
_KILLED = """
[model]
name = "nat_atto"
drop_path_rate = 0.1
[augment]
auto_augment = "rand-m5-mstd0.5"
random_erasing = 0.2
[loss]
mixup = 0.2
cutmix = 0.5
label_smoothing = 0.1
[ema]
decay = 0.95
[train]
batch_size = 8
log_every = 1
validate_every = 0.2
checkpoint_every = 1
"""
_SHARED = """
[model]
name = "test_vit"
kwargs = {{ img_size = 32 }}
[augment]
scale = [0.8, 1.0]
hflip = 0.0
[train]
batch_size = {batch}
accumulation = {accumulation}
log_every = 1
validate_every = 1e9
checkpoint_every = 1000000
"""


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--kills", type=int, default=5, metavar="N")
    parser.add_argument("--updates", type=int, default=80, metavar="N")
    parser.add_argument("--seed", type=int, default=None, metavar="N", help="(default: the time)")
    args = parser.parse_args()
    seed = int(time.time()) if args.seed is None else args.seed
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        good = _killed(folder, args.kills, args.updates, random.Random(seed))
        good &= _shared(folder, args.updates)
    print("all right" if good else f"WRONG (seed {seed})")
    return int(not good)


def _killed(folder: Path, kills: int, updates: int, rng: random.Random) -> bool:
    config, broken, whole = folder / "killed.toml", folder / "broken", folder / "whole"
    config.write_text(_COMMON.format(size=32, workers=1, updates=updates) + _KILLED)
    began = time.monotonic()
    assert _train(config, whole).wait(_PATIENCE) == 0
    print(f"unbroken: {updates} updates in {time.monotonic() - began:.0f} s", flush=True)
    sound = True
    for number, update in enumerate(sorted(rng.sample(range(1, updates), kills))):
        process = _train(config, broken, resume=number > 0)
        _wait(lambda at=update: _logged(broken) >= at, process)
        if number % 2:
            _wait(lambda: any(broken.glob("snapshots/*.new")), process)
            moment = "while a snapshot is written"
        else:
            pause = rng.uniform(0, 0.3)
            time.sleep(pause)
            moment = f"{pause:.2f} s later"
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        found, bad = _snapshots(broken)
        sound &= not bad and process.returncode == -signal.SIGKILL
        half = len([*broken.glob("snapshots/*.new")])
        print(
            f"kill {number + 1}: at update {update}, {moment}; newest snapshot {found}, "
            f"{len(bad)} of them damaged, {half} unfinished beside",
            flush=True,
        )
    ended = _train(config, broken, resume=True).wait(_PATIENCE) == 0
    same = {name: _equal(whole, broken, name) for name in ("last", "best")}
    logs = _rows(whole) == _rows(broken)
    left = list(broken.rglob("*.new"))
    print(
        f"resumed to the end: last weights {'equal' if same['last'] else 'DIFFER'}, best weights "
        f"{'equal' if same['best'] else 'DIFFER'}, log {'equal' if logs else 'DIFFERS'}, "
        f"{len(left)} unfinished files left",
        flush=True,
    )
    return sound and ended and all(same.values()) and logs and not left


def _shared(folder: Path, updates: int) -> bool:
    layouts = {"two": (8, 1), "large": (16, 1), "accumulated": (8, 2)}
    for name, (batch, accumulation) in layouts.items():
        text = _COMMON.format(size=32, workers=0, updates=updates)
        text += _SHARED.format(batch=batch, accumulation=accumulation)
        (folder / f"{name}.toml").write_text(text)
    two = _train(folder / "two.toml", folder / "two", processes=2)
    assert two.wait(_PATIENCE) == 0
    for name in ("large", "accumulated"):
        said = (folder / f"{name}.txt").open("w")
        with (
            said,
            redirect_stderr(said),
            Engine(load_config(folder / f"{name}.toml"), "cpu") as engine,
        ):
            engine.train(folder / name)
    curves = [
        [float(row[3]) for row in _rows(folder / name) if row[2] == "loss"] for name in layouts
    ]
    apart = max(abs(a - b) for a, b in zip(curves[0], curves[1], strict=True))
    same = _equal(folder / "two", folder / "accumulated", "last")
    print(
        f"two processes, {len(curves[0])} updates: loss {curves[0][0]:.4f} to {curves[0][-1]:.4f}, "
        f"at most {apart:.1e} from one with twice the batch (allowed: 1e-4); weights "
        f"{'equal' if same else 'DIFFER from'} those of one that accumulates two batches",
        flush=True,
    )
    return apart <= 1e-4 and same and len(curves[0]) == updates


def _train(
    config: Path, output: Path, resume: bool = False, processes: int = 1
) -> subprocess.Popen[bytes]:
    """`vitarium train`, in a group of its own; what it says goes to a file beside its folder."""
    launcher = ["-m"]
    if processes > 1:
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node"]
        launcher += [str(processes), "-m"]
    command = [sys.executable, *launcher, "vitarium_cli", "train", str(config), "--device", "cpu"]
    command += ["--output", str(output), *(["--resume"] if resume else [])]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with output.with_suffix(".txt").open("ab") as said:
        return subprocess.Popen(
            command, stdout=said, stderr=said, env=environment, start_new_session=True
        )


def _wait(happened: Callable[[], bool], process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + _PATIENCE
    while not happened():
        if process.poll() is not None or time.monotonic() > deadline:
            raise RuntimeError("the run ended, or nothing happened, before it could be killed")
        time.sleep(0.002)


def _rows(folder: Path) -> list[list[str]]:
    """The log, without what depends on the machine."""
    try:
        with (folder / "log.csv").open(encoding="utf-8", newline="") as file:
            rows = [*csv.reader(file)]
    except FileNotFoundError:
        return []
    return [row for row in rows[1:] if len(row) == 4 and row[2] != "images_per_second"]


def _logged(folder: Path) -> int:
    rows = _rows(folder)
    return int(rows[-1][0]) if rows else 0


def _snapshots(folder: Path) -> tuple[int, list[Path]]:
    """The newest one's update, and those that cannot be read."""
    paths, bad = sorted(folder.glob("snapshots/step-*.pt")), []
    for path in paths:
        try:
            read(path)
        except CheckpointError:
            bad.append(path)
    return int(paths[-1].stem[5:]) if paths else 0, bad


def _equal(one: Path, two: Path, name: str) -> bool:
    a, b = (load_file(folder / f"{name}.safetensors") for folder in (one, two))
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


if __name__ == "__main__":
    sys.exit(main())
