"""Runs: interruptions, resumption, processes, checkpoints that are whole."""

from __future__ import annotations

import pytest

pytest.importorskip("mmdet")

import multiprocessing
import os
import resource
import shutil
import signal
from pathlib import Path

import torch
from toys import ToyData, ToyModel

from vitarium.detection.checkpoints import newest, read
from vitarium.detection.runner import measure, train

CHANGES = {
    "epochs": ["train_dataloader.num_workers=2", "train_dataloader.persistent_workers=True"],
    "iterations": ["train_cfg={'_delete_': True, 'by_epoch': False, 'max_iters': 15, 'val_interval': 2}"],
    "infinite": [
        "train_cfg={'_delete_': True, 'by_epoch': False, 'max_iters': 15, 'val_interval': 5}",
        "train_dataloader.sampler.type=InfiniteSampler",
        "train_dataloader.batch_sampler={'type': 'AspectRatioBatchSampler', 'batch_size': 2}",
    ],
    "accumulation": ["optim_wrapper.accumulative_counts=2"],
    "bf16": ["optim_wrapper.type=AmpOptimWrapper", "custom_hooks=[]"],
    "epoch checkpoints": [
        "default_hooks.checkpoint={'type': 'CheckpointHook', 'interval': 1, 'save_best': 'auto'}"
    ],
}


@pytest.fixture(autouse=True)
def on_path(monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parent)


def state(folder):
    return read(newest(folder))


def equal(one, two):
    """Whether two runs ended with the same weights, averages and moments of the optimizer."""
    a, b = state(one), state(two)
    pairs = [(a[key], b[key]) for key in ("state_dict", "ema_state_dict") if key in a]
    pairs += [
        (a["optimizer"]["state"][key], b["optimizer"]["state"][key])
        for key in a["optimizer"]["state"]
    ]
    return a["meta"]["iter"] == b["meta"]["iter"] and all(
        x.keys() == y.keys() and all(torch.equal(x[key], y[key]) for key in x) for x, y in pairs
    )


def best(folder):
    (path,) = folder.glob("best_*.pth")
    return path.name, read(path)["state_dict"]


def stop_after(iteration, call):
    """Send SIGINT in an iteration."""
    steps = []
    step = ToyModel.train_step

    def counted(self, *args, **kwargs):
        steps.append(None)
        if len(steps) == iteration:
            signal.raise_signal(signal.SIGINT)
        return step(self, *args, **kwargs)

    ToyModel.train_step = counted
    try:
        with pytest.raises(KeyboardInterrupt, match="interrupted after iteration . of 15"):
            call()
    finally:
        ToyModel.train_step = step


@pytest.mark.parametrize("changes", CHANGES.values(), ids=CHANGES)
def test_a_resumed_run_ends_like_an_unbroken_one(toy, tmp_path, changes):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    measures = train(toy, whole, changes, device="cpu")
    stop_after(7, lambda: train(toy, broken, changes, device="cpu"))
    again = train(toy, broken, changes, device="cpu", resume=True)
    assert equal(whole, broken)
    assert again == measures
    assert not [*broken.rglob("*.new")]
    name, weights = best(whole)
    assert best(broken)[0] == name
    assert all(torch.equal(weights[key], x) for key, x in best(broken)[1].items())
