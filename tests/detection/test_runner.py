"""Runs: interruptions, resumption, processes, checkpoints that are whole."""

from __future__ import annotations

import pytest

pytest.importorskip("mmdet")

import errno
import multiprocessing
import os
import signal
import sys
from pathlib import Path

import torch
from mmengine.fileio import LocalBackend
from servers import Reply, Server
from toys import ToyData, ToyModel

import vitarium_cli
from vitarium.detection.checkpoints import found, located, newest, read
from vitarium.detection.runner import measure, train

CHANGES = {
    "epochs": ["train_dataloader.num_workers=2", "train_dataloader.persistent_workers=True"],
    "iterations": [
        "train_cfg={'_delete_': True, 'by_epoch': False, 'max_iters': 15, 'val_interval': 2}"
    ],
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


def test_a_signal_waits_for_the_step(toy, tmp_path):
    changes = ["optim_wrapper.accumulative_counts=2", "default_hooks.checkpoint.interval=3"]
    stop_after(5, lambda: train(toy, tmp_path / "run", changes, device="cpu"))
    assert {path.name for path in found(tmp_path / "run")} == {"iter_4.pth", "iter_6.pth"}


def test_configs_on_mmdets_own(toy, tmp_path):
    bases = ("default_runtime", "schedules/schedule_1x")
    text = f"_base_ = {[f'mmdet::_base_/{name}.py' for name in bases]}" + toy.read_text()
    text = text.replace("by_epoch=True, max_epochs=3", "max_epochs=1")
    toy.write_text(text.replace('type="AdamW", lr=1e-2', "lr=1e-2"))
    assert train(toy, tmp_path / "run", device="cpu")
    assert len(found(tmp_path / "run")) == 3


def test_nothing_is_read_again(toy, tmp_path):
    changes = ["val_cfg=None", "val_dataloader=None", "val_evaluator=None"]
    changes += ["default_hooks.checkpoint={'type': 'CheckpointHook', 'by_epoch': False}"]
    stop_after(7, lambda: train(toy, tmp_path / "run", changes, device="cpu"))
    ToyData.read.clear()
    train(toy, tmp_path / "run", changes, device="cpu", resume=True)
    assert len(ToyData.read) == 2 * 8


def interrupted(toy, folder, changes=()):
    stop_after(7, lambda: train(toy, folder, changes, device="cpu"))
    return folder


def test_damaged_checkpoints_are_passed_over_by_name(toy, tmp_path, capsys):
    whole, run = tmp_path / "whole", tmp_path / "run"
    train(toy, whole, device="cpu")
    interrupted(toy, run)
    last = run / "iter_7.pth"
    last.write_bytes(last.read_bytes()[:-100])
    (run / "iter_8.pth.new").write_bytes(b"half")
    (run / "last_checkpoint").write_text("")
    capsys.readouterr()
    assert newest(run) == run / "iter_6.pth"
    assert "passed over: iter_7.pth: truncated or damaged" in capsys.readouterr().err
    middle = bytearray((run / "iter_6.pth").read_bytes())
    middle[len(middle) // 2] ^= 1
    (run / "iter_6.pth").write_bytes(middle)
    assert newest(run) == run / "iter_5.pth"
    train(toy, run, device="cpu", resume=True)
    assert equal(whole, run)
    for path in found(run):
        path.write_bytes(b"x")
    with pytest.raises(ValueError, match="run: expected a whole checkpoint, all are damaged"):
        train(toy, run, device="cpu", resume=True)


def test_what_a_killed_process_left_behind_goes(toy, tmp_path):
    run = tmp_path / "run"
    interrupted(toy, run)
    left = [run / f"{name}.new" for name in ("iter_9.pth", "best_a_3.pth", "last_checkpoint")]
    for half in left:
        half.write_bytes(b"half")
    other = run / "notes.new"
    other.touch()
    train(toy, run, device="cpu", resume=True)
    assert not any(half.exists() for half in left)
    assert other.exists()


def test_a_hostile_checkpoint_is_not_resumed(toy, tmp_path, monkeypatch):
    run = interrupted(toy, tmp_path / "run")
    content = read(run / "iter_7.pth")
    content["meta"]["config"] = f"open({str(tmp_path / 'ran')!r}, 'w')"
    torch.save(content, run / "iter_7.pth")
    assert train(toy, run, device="cpu", resume=True)  # the key is dropped
    assert not (tmp_path / "ran").exists()


def test_a_full_disk_leaves_the_older_ones(toy, tmp_path, monkeypatch):
    run = interrupted(toy, tmp_path / "run")
    before = {path: path.read_bytes() for path in run.glob("*.pth")}

    def put(self, content, path):
        Path(path).write_bytes(content[: len(content) // 2])
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(LocalBackend, "put", put)
    with pytest.raises(OSError, match=r"iter_8.pth: cannot be written: No space left on device"):
        train(toy, run, device="cpu", resume=True)
    assert before == {path: path.read_bytes() for path in run.glob("*.pth")}
    assert (run / "last_checkpoint").read_text() == str(run / "iter_7.pth")
    assert not [*run.rglob("*.new")]


def test_weights_that_are_lost_are_not_kept(toy, tmp_path):
    changes = ["optim_wrapper.optimizer.lr=1e30", "param_scheduler=None"]
    with pytest.raises(ValueError, match="loss: expected finite weights, got others; lower"):
        train(toy, tmp_path / "run", changes, device="cpu")


def test_folders(toy, tmp_path):
    run = tmp_path / "run"
    with pytest.raises(ValueError, match="expected a run to go on with, found none"):
        train(toy, run, device="cpu", resume=True)
    assert not run.exists()
    interrupted(toy, run)
    with pytest.raises(ValueError, match="holds a run already; --resume goes on with it"):
        train(toy, run, device="cpu")
    with pytest.raises(ValueError, match="another config: train_cfg.max_epochs was 3, is 4"):
        train(toy, run, ["train_cfg.max_epochs=4"], device="cpu", resume=True)
    text = toy.read_text()
    with pytest.raises(ValueError, match="--output: expected another folder than the config's"):
        train(toy, toy.parent, device="cpu")
    assert toy.read_text() == text
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="file: File exists|Not a directory"):
        train(toy, tmp_path / "file", device="cpu")
    free = ["train_dataloader.num_workers=1", "default_hooks.logger.interval=1"]
    assert train(toy, run, free, device="cpu", resume=True)


def process(rank, port, toy, folder, changes):
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    os.environ.update(zip(names, (str(rank), "2", str(rank), "127.0.0.1", port), strict=True))
    torch.set_num_threads(1)
    train(toy, folder, changes, device="cpu")


def test_two_processes_are_one_that_accumulates(toy, tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    changes = ["custom_hooks=[]", "param_scheduler=None"]
    changes += ["default_hooks.checkpoint.save_best=None", "optim_wrapper.clip_grad.max_norm=1"]
    port = str(20000 + os.getpid() % 20000)
    steps = "train_cfg={'_delete_': True, 'by_epoch': False, 'max_iters': %d}"
    context = multiprocessing.get_context("fork")
    given = (port, toy, two, [*changes, steps % 4])
    processes = [context.Process(target=process, args=(rank, *given)) for rank in range(2)]
    for each in processes:
        each.start()
    changes += [steps % 8, "optim_wrapper.accumulative_counts=2"]
    train(toy, one, changes, device="cpu")
    for each in processes:
        each.join(120)
        assert each.exitcode == 0
    # The statistics of batch norms are each process' own, and are no parameters.
    a, b = (
        {key: x for key, x in state(run)["state_dict"].items() if "running" not in key}
        for run in (one, two)
    )
    assert all(torch.equal(a[key], b[key]) for key in a if "num_batches" not in key)
    match = r"expected 2 images a batch, 1 .* 1 processes, as here, its run had \[2, 1, 2\]"
    with pytest.raises(ValueError, match=match):
        train(toy, two, given[-1], device="cpu", resume=True)


def test_the_command_line(toy, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    call = lambda *args: vitarium_cli.main([*args])  # noqa: E731
    assert call("train", str(toy), "--device", "cpu", "--set", "randomness.seed=4") == 0
    out, err = capsys.readouterr()
    assert out.startswith("toy/accuracy -")
    assert out.endswith("wrote outputs/toy\n")
    assert f"{toy}: a config of Python, which is run" in err
    assert call("test", str(toy), "--device", "cpu", "--json", "--set", "load_skip=[]") == 0
    out, err = capsys.readouterr()
    assert out.startswith('{\n  "toy/accuracy": -')
    assert "weights of outputs/toy/best_toy_accuracy" in err
    weights = str(tmp_path / "weights.pth")
    torch.save({"state_dict": {"head.weight": torch.ones(1, 9)}}, weights)
    assert call("test", str(toy), "--device", "cpu", "--checkpoint", weights) == 1
    said = capsys.readouterr().err
    assert "1 misshapen: head.weight expected [1, 144] float32, got [1, 9] float32" in said
    assert "load_skip=('...',) names the beginnings" in said
    assert call("train", str(toy), "--strict") == 1
    assert f"--strict: not for {toy}" in capsys.readouterr().err
    assert call("train", "toyy.py") == 1
    assert "expected a TOML file, a Python file or the name of one" in capsys.readouterr().err
    assert call("train", "atto_digits", "--launcher", "slurm") == 1
    assert "--launcher: not for atto_digits" in capsys.readouterr().err
    assert call("train", str(toy), "--launcher", "slurm") == 1
    assert "--launcher slurm: expected SLURM_PROCID" in capsys.readouterr().err
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "cv2", None)
        assert call("train", str(toy)) == 1
        assert "opencv-python-headless" in capsys.readouterr().err
    monkeypatch.setattr("vitarium.tools.train.find_spec", lambda name: None)
    assert call("train", str(toy)) == 1
    assert 'mmdet is not installed: pip install "vitarium[det]"' in capsys.readouterr().err


def test_backbone_and_neck_are_compiled(config, tmp_path):
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    plain = train(config, tmp_path / "plain", device="cpu")
    assert not torch._dynamo.utils.counters["frames"]
    changes = ["compile={'backend': 'eager'}"]
    compiled = train(config, tmp_path / "compiled", changes, device="cpu")
    assert torch._dynamo.utils.counters["frames"]["ok"] >= 2
    assert compiled.keys() == plain.keys()
    one, two = (state(tmp_path / name)["state_dict"] for name in ("plain", "compiled"))
    assert one.keys() == two.keys()
    for key, value in one.items():
        torch.testing.assert_close(two[key], value, msg=key)


def test_weights_by_address_and_by_name(toy, tmp_path, cache):
    interrupted(toy, tmp_path / "run")
    file = newest(tmp_path / "run")
    with Server({"/a/weights.pth": Reply(file.read_bytes())}) as server:
        for name in ("one", "two"):  # the second from the cache
            start = [f"load_from={server.url('/a/weights.pth')}", "optim_wrapper.optimizer.lr=0.0"]
            train(toy, tmp_path / name, start, device="cpu")
        assert server.requests == ["/a/weights.pth"]
        measured = measure(
            toy, tmp_path / "one", checkpoint=server.url("/a/weights.pth"), device="cpu"
        )
        assert measured == measure(toy, tmp_path / "two", checkpoint=str(file), device="cpu")
        with pytest.raises(ValueError, match="404"):
            train(toy, tmp_path / "no", [f"load_from={server.url('/b.pth')}"], device="cpu")
    for source, hint in (
        ("nowhere.pth", ""),
        ("nat_mini.shi_mask_rcnn_3x_cocoo", "did you mean nat_mini.shi_mask_rcnn_3x_coco"),
    ):
        match = f"load_from: expected a file, an address or the name .* got {source}.*{hint}"
        with pytest.raises(ValueError, match=match):
            train(toy, tmp_path / "no", [f"load_from={source}"], device="cpu")
    assert not (tmp_path / "no").exists()
    assert located("nat_atto.vitarium_digits", "x").is_file()


def test_a_detector_learns_writes_events_and_starts_from_weights(config, tmp_path):
    board = "visualizer={'type': 'DetLocalVisualizer', 'vis_backends': "
    board += "[{'type': 'LocalVisBackend'}, {'type': 'TensorboardVisBackend'}]}"
    measures = train(config, tmp_path / "run", [board], device="cpu")
    assert "coco/bbox_mAP" in measures
    assert [*(tmp_path / "run").rglob("events.out.tfevents.*")]
    assert measure(config, tmp_path / "run", device="cpu") == measures
    start = [f"load_from={tmp_path / 'run' / 'epoch_1.pth'}", "train_cfg.max_epochs=1"]
    start += ["optim_wrapper.optimizer.lr=0.0"]
    assert train(config, tmp_path / "again", start, device="cpu") == measures
