"""A detector's run that is killed again and again, and one that two processes share.

    python tests/detect_storm.py [--kills 5] [--iterations 20] [--updates 20] [--seed N]

First, a Mask R-CNN on nat_atto learns scenes of digits with a worker that reads, random flips,
stochastic depth, an average of weights and validations, deterministically. The same run is then
killed with SIGKILL, the worker included, at random iterations and random moments of them, every
second time while a checkpoint is being written, and resumed each time. In the end weights, their
average and the optimizer must equal those of the unbroken run bit for bit, and so must the best
weights.

Second, it learns in two processes of torchrun's (gloo), and in one that accumulates two batches:
weights must be equal bit for bit. Its losses are sums over each process' own images, divided by
numbers of its own samples; so it is for RetinaNet and Cascade R-CNN. Heads that average such
numbers over processes (FCOS, ATSS, DETR and others) have no such equal. One line each; exits 1
unless all is right. CPU only.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent / "detection"))

import torch
from small import detector
from train_storm import _PATIENCE, _train, _wait

from vitarium.checkpoints import CheckpointError
from vitarium.data.folders import SceneSet, ensure
from vitarium.detection.checkpoints import found, newest, read

_KILLED = """
train_dataloader["num_workers"] = 1
train_cfg = dict(type="IterBasedTrainLoop", max_iters={iterations}, val_interval=10)
custom_hooks = [dict(type="EMAHook", momentum=0.05)]
param_scheduler = dict(type="LinearLR", start_factor=0.1, by_epoch=False, end={iterations})
default_hooks["checkpoint"] = dict(
    type="CheckpointHook", by_epoch=False, interval=1, max_keep_ckpts=2,
    save_best="coco/bbox_mAP",
)
"""
_SHARED = """
train_cfg = dict(type="IterBasedTrainLoop", max_iters={iterations}, val_interval=1000)
val_dataloader = val_evaluator = val_cfg = None
optim_wrapper["accumulative_counts"] = {accumulation}
default_hooks["checkpoint"] = dict(type="CheckpointHook", by_epoch=False, interval=1000)
"""


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--kills", type=int, default=5, metavar="N", help="0 leaves that out")
    parser.add_argument("--iterations", type=int, default=20, metavar="N")
    parser.add_argument("--updates", type=int, default=20, metavar="N")
    parser.add_argument("--seed", type=int, default=None, metavar="N", help="(default: the time)")
    args = parser.parse_args()
    seed = int(time.time()) if args.seed is None else args.seed
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        text = detector(ensure("detection", folder, SceneSet(24, 4, (64, 64))), masks=True)
        rng = random.Random(seed)
        good = not args.kills or _killed(folder, text, args.kills, args.iterations, rng)
        good &= _shared(folder, text, args.updates)
    print("all right" if good else f"WRONG (seed {seed})")
    return int(not good)


def _killed(folder: Path, text: str, kills: int, iterations: int, rng: random.Random) -> bool:
    config, broken, whole = folder / "killed.py", folder / "broken", folder / "whole"
    config.write_text(text + _KILLED.format(iterations=iterations))
    began = time.monotonic()
    assert _train(config, whole).wait(_PATIENCE) == 0
    print(f"unbroken: {iterations} iterations in {time.monotonic() - began:.0f} s", flush=True)
    sound = True
    for number, iteration in enumerate(sorted(rng.sample(range(1, iterations), kills))):
        process = _train(config, broken, resume=number > 0)
        _wait(lambda at=iteration: _newest_name(broken) >= at, process)
        if number % 2:
            _wait(lambda: any(broken.glob("iter_*.new")), process)
            moment = "while a checkpoint is written"
        else:
            pause = rng.uniform(0, 1.0)
            time.sleep(pause)
            moment = f"{pause:.2f} s later"
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        bad = _damaged(broken)
        sound &= not bad and process.returncode == -signal.SIGKILL
        half = len([*broken.glob("*.new")])
        print(
            f"kill {number + 1}: at iteration {iteration}, {moment}; newest checkpoint "
            f"{_newest_name(broken)}, {len(bad)} damaged, {half} unfinished beside",
            flush=True,
        )
    ended = _train(config, broken, resume=True).wait(_PATIENCE) == 0
    last = _equal(newest(whole), newest(broken))
    best = _equal(*(next(iter(x.glob("best_*.pth")), None) for x in (whole, broken)))
    left = [*broken.rglob("*.new")]
    print(
        f"resumed to the end: last weights, average and optimizer {'equal' if last else 'DIFFER'}, "
        f"best weights {'equal' if best else 'DIFFER'}, {len(left)} unfinished files left",
        flush=True,
    )
    return sound and ended and last and best and not left


def _shared(folder: Path, text: str, updates: int) -> bool:
    runs = []
    for processes in (2, 1):
        config = folder / f"shared{processes}.py"
        accumulation = 2 // processes
        iterations = updates * accumulation
        config.write_text(text + _SHARED.format(iterations=iterations, accumulation=accumulation))
        runs.append(folder / f"by{processes}")
        assert _train(config, runs[-1], processes=processes).wait(_PATIENCE) == 0
    same = _equal(*map(newest, runs))
    print(
        f"two processes, {updates} updates: weights and optimizer "
        f"{'equal' if same else 'DIFFER from'} those of one that accumulates two batches",
        flush=True,
    )
    return same


def _newest_name(folder: Path) -> int:
    return max((int(path.stem.partition("_")[2]) for path in found(folder)), default=0)


def _damaged(folder: Path) -> list[Path]:
    bad = []
    for path in found(folder):
        try:
            read(path)
        except CheckpointError:
            bad.append(path)
    return bad


def _equal(one: Path | None, two: Path | None) -> bool:
    """Whether two checkpoints hold the same weights, averages and state of the optimizer."""
    if one is None or two is None:
        return False
    a, b = (_tensors(read(path), "") for path in (one, two))
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def _tensors(value: Any, prefix: str) -> dict[str, torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return {prefix: value}
    if not isinstance(value, dict):
        return {}
    parts = (_tensors(part, f"{prefix}.{key}") for key, part in value.items())
    return {name: x for part in parts for name, x in part.items()}


if __name__ == "__main__":
    sys.exit(main())
