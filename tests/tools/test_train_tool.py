"""`vitarium train` and `vitarium test`: what they print, and one clear line for what is wrong."""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import vitarium_cli
from vitarium.training.runs import RunFolder
from vitarium.training.toml import load_config

pytest.importorskip("accelerate")

CONFIG = """
task = "classification"
deterministic = true
[model]
name = "test_vit"
kwargs = { img_size = 32 }
[data]
source = "folder"
root = "DATA"
image_size = 32
workers = 0
[augment]
scale = [0.5, 1.0]
[optimizer]
lr = 1e-3
[schedule]
updates = 4
[train]
batch_size = 4
log_every = 2
checkpoint_every = 1
"""


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Three colours, four images each to train on and two to validate."""
    root = tmp_path_factory.mktemp("colours")
    rng = np.random.default_rng(0)
    for split, count in (("train", 4), ("val", 2)):
        for channel, name in enumerate(("red", "green", "blue")):
            (root / split / name).mkdir(parents=True)
            for i in range(count):
                pixels = rng.integers(0, 80, (40, 36, 3), dtype=np.uint8)
                pixels[..., channel] += 150
                Image.fromarray(pixels).save(root / split / name / f"{i}.png")
    return root


@pytest.fixture
def config(data, tmp_path):
    path = tmp_path / "colours.toml"
    path.write_text(CONFIG.replace("DATA", str(data)))
    return path


@pytest.fixture
def vitarium(monkeypatch, tmp_path, capsys):
    """The program, in this process and a folder of its own: status, stdout, stderr."""
    monkeypatch.chdir(tmp_path)

    def call(*args):
        status = vitarium_cli.main([*map(str, args)])
        out, err = capsys.readouterr()
        return status, out, err

    return call


def complaint(result):
    """The one line of an error."""
    status, out, err = result
    lines = [line for line in err.splitlines() if line.startswith("vitarium: error: ")]
    assert status == 1
    assert not out
    assert len(lines) == 1
    assert err.splitlines()[-1] == lines[0]
    assert "Traceback" not in err
    assert len(lines[0]) < 500
    return lines[0]


def test_it_trains_goes_on_and_validates(vitarium, config, tmp_path):
    status, out, err = vitarium("train", config, "--device", "cpu")
    assert status == 0
    assert out.splitlines()[-1] == "wrote outputs/colours"
    assert "4/4" in err
    facts = json.loads((tmp_path / "outputs" / "colours" / "run.json").read_text())
    assert {"command", "versions", "git"} <= facts.keys()
    assert complaint(vitarium("train", config)).endswith("--output names another folder")
    assert vitarium("train", config, "--resume")[0] == 0
    status, out, _ = vitarium("test", config, "--json", "--device", "cpu")
    assert status == 0
    assert json.loads(out)["images"] == 6
    assert vitarium("test", config, "--csv", "row.csv")[0] == 0
    assert (tmp_path / "row.csv").read_text().startswith("model,top1,top1_err,top5,top5_err,")


def test_set_and_output(vitarium, config, tmp_path):
    given = ("--set", "schedule.updates=2", "--set", "seed=3", "--output", tmp_path / "here")
    assert vitarium("train", config, *given)[0] == 0
    text = (tmp_path / "here" / "config.toml").read_text()
    assert "seed = 3" in text
    assert not (tmp_path / "outputs").exists()
    error = complaint(vitarium("train", config, "--resume", "--output", tmp_path / "here"))
    assert "another config: schedule.updates was 2, is 4" in error


def test_a_config_by_its_name(vitarium, monkeypatch, config):
    monkeypatch.setattr("vitarium.tools.train._CONFIGS", config.parent)
    given = ("--set", "schedule.updates=1", "--output", "run")
    assert vitarium("train", "colours", *given)[0] == 0
    assert "did you mean colours" in complaint(vitarium("train", "colour"))
    assert "expected a TOML file" in complaint(vitarium("train", "folder/colours"))


WRONG = {
    "optimizer.learning_rate=1": "unknown key optimizer.learning_rate",
    "optimizer.weigth_decay=1": "did you mean weight_decay",
    "optimizer.name=adamww": "optimizer.name: ",
    "optimizer.name=adahessian": "needs second derivatives",
    "optimizer.clip_grad=0.0": "optimizer.clip_grad: expected",
    "optimizer.lr_batch=0": "optimizer.lr_batch: expected 1 or more, got 0",
    "model.name=test_vitt": "unknown model 'test_vitt'; did you mean test_vit",
    "model.kwargs.img_sizes=3": "unexpected keyword argument 'img_sizes'",
    "model.kwargs.num_classes=5": "model.kwargs.num_classes: expected none, the data's classes",
    "model.kwargs.in_chans=1": "cannot take images of 3 channels and 32 x 32 pixels",
    "model.checkpoint=none.pth": "model.checkpoint: expected a file, got 'none.pth'",
    "augment.auto_augment=rnd-m9": "augment.auto_augment: timm does not know 'rnd-m9'",
    "augment.mean=[0.5]": "augment.mean: expected three numbers",
    "augment.scale=[1.0, 0.5]": "augment.scale: expected the smaller one first",
    "loss.label_smoothing=1.5": "loss.label_smoothing: expected 0 ... 1, got 1.5",
    "loss.mixup=-1.0": "loss.mixup: expected 0 or more",
    "data.root=nowhere": "data.root: expected a folder, got 'nowhere'",
    "data.val=test": "with a folder for each class",
}


@pytest.mark.parametrize(("changed", "message"), WRONG.items(), ids=WRONG)
def test_what_is_wrong_is_said_before_there_is_a_run(vitarium, config, changed, message):
    assert message in complaint(vitarium("train", config, "--set", changed))
    assert not Path("outputs").exists()


def test_min_lr_without_a_use_is_refused(vitarium, config):
    changes = ("--set", "schedule.name=constant", "--set", "schedule.min_lr=1e-5")
    assert "schedule.min_lr: expected 0 with constant" in complaint(
        vitarium("train", config, *changes)
    )


def test_an_output_that_cannot_be_written(vitarium, config, tmp_path):
    (tmp_path / "file").write_text("")
    for output in ("file", "file/run", "/proc/run"):
        assert output in complaint(vitarium("train", config, "--output", output))


def test_weights_that_do_not_fit(vitarium, config, tmp_path):
    assert "--checkpoint: expected weights" in complaint(vitarium("test", config))
    save_file({"x": torch.zeros(1)}, tmp_path / "other.safetensors")
    assert "other.safetensors" in complaint(
        vitarium("test", config, "--checkpoint", "other.safetensors")
    )
    assert vitarium("train", config)[0] == 0
    weights = load_file("outputs/colours/best.safetensors")
    heads = {
        k: v.repeat(2, *(1,) * (v.ndim - 1)) for k, v in weights.items() if k.startswith("head.")
    }
    save_file(weights | heads, "six.safetensors")
    error = complaint(vitarium("test", config, "--checkpoint", "six.safetensors"))
    assert "head" in error
    assert "6" in error


@pytest.mark.parametrize("workers", [0, 2])
def test_images_that_cannot_be_read(vitarium, config, data, tmp_path, workers):
    for split in ("train", "val"):
        for folder in (data / split).iterdir():
            (tmp_path / "data" / split / folder.name).mkdir(parents=True)
            for file in folder.iterdir():
                (tmp_path / "data" / split / folder.name / file.name).symlink_to(file)
    odd = "line\nbreak\udcff,.png"
    bad = [tmp_path / "data" / "train" / "red" / odd, tmp_path / "data" / "val" / "red" / "x.png"]
    for path in bad:
        path.write_bytes(b"\x89PNG\r\n\x1a\n")
    given = ("--set", f"data.root={tmp_path / 'data'}", "--set", f"data.workers={workers}")
    status, _, err = vitarium("train", config, *given)
    assert status == 0, err
    assert err.count("val/red/x.png: ") == 1
    assert "2 images could not be read" in err
    rows = Path("outputs/colours/unreadable.csv").read_text().splitlines()
    assert len(rows) == 3
    assert vitarium("train", config, *given, "--resume")[0] == 0
    status, out, err = vitarium("test", config, *given, "--json")
    assert json.loads(out)["images"] == 6
    assert "cannot be read" in err
    assert "val/red/x.png" in err
    bad[0].unlink()
    strict = complaint(vitarium("train", config, *given, "--strict", "--output", "strict"))
    assert "cannot read this image" in strict


def test_a_batch_of_validation_without_images(vitarium, config, data, tmp_path):
    for name in ("red", "green", "blue"):
        (tmp_path / "data" / "val" / name).mkdir(parents=True)
        (tmp_path / "data" / "val" / name / "x.png").write_bytes(b"")
    (tmp_path / "data" / "train").symlink_to(data / "train")
    given = ("--set", f"data.root={tmp_path / 'data'}", "--set", "schedule.updates=1")
    _, _, err = vitarium("train", config, *given)
    assert "data.val: expected images that can be read, got none" in err.splitlines()[-1]


@pytest.mark.parametrize("workers", [0, 2])
def test_no_worker_is_left_behind(vitarium, config, workers):
    before = children()
    given = ("--set", f"data.workers={workers}", "--set", "optimizer.lr=1e30")
    assert "expected" in complaint(vitarium("train", config, *given))
    assert children() <= before


def children():
    return {*Path(f"/proc/{os.getpid()}/task/{os.getpid()}/children").read_text().split()}


# Processes of their own: signals, limits.


def start(*args, files=None, **options):
    """The program as a process of its own group, whose files may have so many bytes."""

    def limit():
        if files is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (files, files))

    command = [sys.executable, "-m", "vitarium_cli", *map(str, args)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
        start_new_session=True,
        preexec_fn=limit,
        **options,
    )


@pytest.mark.parametrize(("number", "workers"), [(signal.SIGINT, 0), (signal.SIGTERM, 2)])
def test_a_signal_ends_it_after_a_snapshot(config, tmp_path, number, workers):
    """Sent to the group, as by terminals, Slurm and torchrun: workers of the loader get it too."""
    output = tmp_path / "run"
    given = ("--output", output, "--set", f"data.workers={workers}")
    long = (*given, "--set", "schedule.updates=100000", "--set", "train.checkpoint_every=100000")
    process = start("train", config, *long, "--set", "train.validate_every=1e9")
    deadline = time.monotonic() + 300
    while not (output / "log.csv").exists() and process.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    os.killpg(process.pid, number)
    out, err = process.communicate(timeout=300)
    assert process.returncode == 130, err
    last = err.splitlines()[-1]
    assert last.startswith("vitarium: error: interrupted after update ")
    assert last.endswith("of 100000; --resume goes on")
    assert "Traceback" not in err
    assert not out
    (snapshot,) = (output / "snapshots").iterdir()
    assert int(snapshot.stem[5:]) == int(last.split()[5])


def test_a_full_disk(config, tmp_path):
    """What was finished stays, nothing half-written does, and a later run goes on."""
    output = tmp_path / "run"
    # The size of two of the model's weights: its last weights fit, its snapshots do not.
    process = start("train", config, "--output", output, files=2_000_000)
    _out, err = process.communicate(timeout=300)
    assert process.returncode == 1, err
    line = err.splitlines()[-1]
    assert line.startswith("vitarium: error: ")
    assert "step-000000001.pt" in line or "File too large" in line
    assert "Traceback" not in err
    assert [*(output / "snapshots").iterdir()] == []
    process = start("train", config, "--output", output, "--resume")
    _, err = process.communicate(timeout=300)
    assert process.returncode == 0, err


def test_weights_on_a_full_disk(tmp_path):
    folder = RunFolder(tmp_path, load_config(_config_of_nothing(tmp_path)))
    folder.save_weights("best", {"x": torch.zeros(10)}, {})
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (5000, before[1]))
    try:
        with pytest.raises(OSError, match=r"best.safetensors: cannot be written: .*too large"):
            folder.save_weights("best", {"x": torch.zeros(100000)}, {})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert load_file(tmp_path / "best.safetensors")["x"].shape == (10,)
    assert not [*tmp_path.rglob("*.new")]


def _config_of_nothing(tmp_path):
    path = tmp_path / "config.toml"
    path.write_text(CONFIG)
    return path
