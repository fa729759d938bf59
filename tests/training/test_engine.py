"""Runs: steps, averages, snapshots, interruptions, several processes."""

from __future__ import annotations

import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from vitarium.training.data import Layout
from vitarium.training.engine import Engine, create_optimizer, create_scheduler, run_length
from vitarium.training.snapshots import Snapshots
from vitarium.training.states import restore
from vitarium.training.toml import dump_config

pytest.importorskip("accelerate")


def run(config, output, resume=False):
    with Engine(config, "cpu") as engine:
        return engine.train(output, resume)


def equal(one, two):
    """Whether two runs ended with the same weights."""
    a, b = (load_file(Path(folder) / "last.safetensors") for folder in (one, two))
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    """Runs by their changes to the config, each made once."""
    made = {}

    def make(make_config, **changes):
        key = str(sorted(changes.items()))
        if key not in made:
            made[key] = tmp_path_factory.mktemp("unbroken") / "run"
            run(make_config(**changes), made[key])
        return made[key]

    return make


def test_it_learns_and_leaves_what_it_should(make_config, tmp_path):
    config = make_config(schedule__updates=40, optimizer__lr=2e-3, train__tensorboard=True)
    measures = run(config, tmp_path / "run")
    assert measures["top1"] > 60
    assert measures["images"] == 15
    folder = tmp_path / "run"
    names = {path.name for path in folder.iterdir()}
    assert names == {
        *("config.toml", "run.json", "log.csv", "best.safetensors", "last.safetensors"),
        *("snapshots", "tensorboard"),
    }
    assert (folder / "config.toml").read_text() == dump_config(config)
    assert len([*(folder / "snapshots").iterdir()]) == config.train.keep
    lines = (folder / "log.csv").read_text().splitlines()
    assert lines[0] == "update,epoch,name,value"
    assert [*(folder / "tensorboard").iterdir()]
    losses = [float(line.split(",")[3]) for line in lines if line.split(",")[2] == "loss"]
    assert losses[-1] < losses[0]


CHANGES = {
    "plain": {},
    "mixup": {"loss__mixup": 0.4, "loss__cutmix": 1.0, "loss__label_smoothing": 0.1},
    "accumulation": {"train__accumulation": 2, "train__precision": "bf16"},
    "drop path": {"model__drop_path_rate": 0.3, "ema": None, "optimizer__layer_decay": 0.7},
    "workers": {"data__workers": 2},
}


@pytest.mark.parametrize("changes", CHANGES.values(), ids=CHANGES)
def test_a_resumed_run_ends_like_an_unbroken_one(make_config, tmp_path, unbroken, changes):
    config = make_config(**changes)
    whole = unbroken(make_config, **changes)
    broken = tmp_path / "broken"
    shutil.copytree(whole, broken)
    for path in (broken / "snapshots").iterdir():
        path.unlink()
    # Stopped by a signal in the middle, as Ctrl-C and Slurm do it.
    shutil.rmtree(broken)
    stop_after(4, lambda: run(config, broken))
    with (broken / "log.csv").open("a") as file:
        file.write("8,1.33333,loss,0.1\n9,1.5,lo")  # as a killed process leaves it
    run(config, broken, resume=True)
    assert equal(broken, whole)
    logs = [(folder / "log.csv").read_text().splitlines() for folder in (broken, whole)]
    kept = [[x for x in log if "images_per_second" not in x] for log in logs]
    assert kept[0] == kept[1]


def stop_after(update, call):
    """Send SIGINT once an update has been made."""
    steps = []
    step = Engine._step

    def counted(self, *args):
        steps.append(None)
        if len(steps) == update:
            signal.raise_signal(signal.SIGINT)
        return step(self, *args)

    Engine._step = counted
    try:
        with pytest.raises(KeyboardInterrupt, match=f"interrupted after update {update} of"):
            call()
    finally:
        Engine._step = step


def test_a_damaged_snapshot_is_passed_over(make_config, tmp_path, unbroken):
    config, whole = make_config(), unbroken(make_config)
    broken = tmp_path / "broken"
    stop_after(5, lambda: run(config, broken))
    newest = broken / "snapshots" / "step-000000005.pt"
    newest.write_bytes(newest.read_bytes()[:-1000])
    with pytest.warns(UserWarning, match=r"passed over: .*step-000000005.pt"):
        run(config, broken, resume=True)
    assert equal(broken, whole)


def test_a_run_killed_before_its_first_snapshot_begins_again(make_config, tmp_path, unbroken):
    config, whole = make_config(), unbroken(make_config)
    broken = tmp_path / "broken"
    stop_after(1, lambda: run(config, broken))
    shutil.rmtree(broken / "snapshots")
    run(config, broken, resume=True)
    assert equal(broken, whole)


def test_folders_are_not_mixed_up(make_config, tmp_path, unbroken):
    whole = unbroken(make_config)
    with pytest.raises(ValueError, match="holds a run already; --resume goes on"):
        run(make_config(), whole)
    with pytest.raises(ValueError, match="expected a run to go on with, found none"):
        run(make_config(), tmp_path / "nothing", resume=True)
    with pytest.raises(ValueError, match=r"another config: optimizer.lr was 0.001, is 0.002"):
        run(make_config(optimizer__lr=0.002), whole, resume=True)
    blocked = tmp_path / "file"
    blocked.write_text("")
    with pytest.raises(ValueError, match="file"):
        run(make_config(), blocked / "run")


def test_a_finished_run_is_finished(make_config, tmp_path, unbroken):
    whole = unbroken(make_config)
    before = (whole / "last.safetensors").read_bytes()
    run(make_config(data__workers=1), whole, resume=True)
    assert (whole / "last.safetensors").read_bytes() == before


def test_snapshots_survive_a_full_disk(tmp_path, monkeypatch):
    snapshots = Snapshots(tmp_path, keep=1)
    snapshots.save(1, {"update": 1, "model": {"x": torch.ones(3)}})

    def full(content, file):
        file.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(OSError, match="No space"):
        snapshots.save(2, {"update": 2})
    assert [path.name for path in tmp_path.iterdir()] == ["step-000000001.pt"]
    assert snapshots.newest()["update"] == 1


def test_no_whole_snapshot_is_an_error(tmp_path):
    snapshots = Snapshots(tmp_path, keep=3)
    assert snapshots.newest() is None
    (tmp_path / "step-000000001.pt").write_bytes(b"")
    with pytest.warns(UserWarning, match="passed over"), pytest.raises(ValueError, match="all are"):
        snapshots.newest()


def test_a_loss_that_is_not_finite_stops_before_it_is_saved(make_config, tmp_path):
    with pytest.raises(ValueError, match="loss: expected a finite number"):
        run(make_config(optimizer__lr=1e30, optimizer__clip_grad=None), tmp_path / "run")
    for path in (tmp_path / "run" / "snapshots").glob("*"):
        content = torch.load(path, weights_only=True)
        assert all(x.isfinite().all() for x in content["model"].values())


def test_bad_images_are_named_once(make_config, colours, tmp_path, capsys):
    root = tmp_path / "data"
    shutil.copytree(colours, root)
    bad = root / "train" / "red" / "3.png"
    bad.write_bytes(bad.read_bytes()[:100])
    config = make_config(data__root=str(root))
    run(config, tmp_path / "run")
    assert capsys.readouterr().err.count(str(bad)) == 1
    rows = (tmp_path / "run" / "unreadable.csv").read_text().splitlines()
    assert len(rows) == 2
    assert str(bad) in rows[1]
    with pytest.raises(ValueError, match=r"3.png: cannot read this image"):
        run(make_config(data__root=str(root), data__strict=True), tmp_path / "strict")


def test_rates_follow_the_batch_and_the_schedule(make_config):
    config = make_config(
        optimizer__lr_batch=8, schedule__warmup_lr=1e-4, schedule__min_lr=2e-4, schedule__updates=10
    )
    model = torch.nn.Linear(2, 2)
    optimizer = create_optimizer(config, model, images=16)
    scheduler = create_scheduler(config, optimizer, images=16, updates=10, epoch=5.0)
    rates = []
    for update in range(11):
        scheduler.step_update(update)
        rates.append(optimizer.param_groups[0]["lr"])
    assert rates[0] == pytest.approx(2e-4)
    assert rates[1] == pytest.approx(1.1e-3)
    assert max(rates) == rates[2] <= 2e-3
    assert rates[10] == pytest.approx(4e-4)


@pytest.mark.parametrize("prefix", [False, True])
def test_the_rate_stays_low_after_the_end(make_config, prefix):
    config = make_config(
        data__samples=12,
        optimizer__lr=1.0,
        schedule__warmup_updates=4,
        schedule__warmup_prefix=prefix,
        schedule__min_lr=0.125,
        schedule__cooldown_epochs=2,
    )
    updates, epoch = run_length(config, None, Layout(4))
    assert (updates, epoch) == (9 + 2 * 3, 3.0)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    scheduler = create_scheduler(config, optimizer, 4, updates, epoch)
    rates = []
    for update in range(updates):
        scheduler.step_update(update)
        rates.append(optimizer.param_groups[0]["lr"])
    assert rates[9:] == [0.125] * 6
    assert rates[8] > 0.125
    assert (rates[4] == 1.0) == prefix  # without it, four of nine updates are over


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"optimizer__name": "adamww"}, "optimizer.name: .*adamww not found"),
        ({"optimizer__momentum": 0.9}, "optimizer.momentum: adamw has none"),
        ({"optimizer__name": "sgd", "optimizer__betas": [0.9, 0.9]}, "optimizer.betas: sgd has"),
        ({"train__parallel": "fsdp2"}, "train.parallel: expected ddp for a single process"),
    ],
)
def test_what_does_not_fit_is_said_before_the_first_step(make_config, tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        run(make_config(**changes), tmp_path / "run")


LAUNCH = """
import sys, torch
torch.set_num_threads(1)
from vitarium.training.engine import Engine
from vitarium.training.toml import load_config
with Engine(load_config(sys.argv[1]), "cpu") as engine:
    engine.train(sys.argv[2], len(sys.argv) > 3)
"""


def prepare(config, folder, *args, processes=2):
    """What trains in processes of torchrun's: command and environment."""
    folder.mkdir(exist_ok=True)
    (folder / "config.toml").write_text(dump_config(config))
    (folder / "launch.py").write_text(LAUNCH)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc_per_node", str(processes), str(folder / "launch.py")]
    command += [str(folder / "config.toml"), str(folder / "run"), *args]
    return command, {**os.environ, "OMP_NUM_THREADS": "1"}


def launch(config, folder, *args, processes=2):
    """Train in processes of torchrun's."""
    command, environment = prepare(config, folder, *args, processes=processes)
    result = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=600)
    assert result.returncode == 0, result.stderr
    return folder / "run"


@pytest.mark.parametrize("parallel", ["ddp", "fsdp2"])
def test_two_processes_equal_one_that_accumulates(make_config, tmp_path, parallel):
    changes = {"train__batch_size": 2, "schedule__updates": 5}
    alone = tmp_path / "alone"
    run(make_config(train__accumulation=2, **changes), alone)
    together = launch(make_config(train__parallel=parallel, **changes), tmp_path / "two")
    if parallel == "ddp":
        assert equal(alone, together)
    else:  # sums in another order
        a, b = (load_file(folder / "last.safetensors") for folder in (alone, together))
        for name in a:
            torch.testing.assert_close(b[name], a[name], atol=1e-5, rtol=1e-4)
    again = launch(make_config(train__parallel=parallel, **changes), tmp_path / "two", "--resume")
    assert again == together


def test_two_processes_agree_on_statistics_and_names(make_config, colours, tmp_path):
    """Batch norms see other images in each process; what any cannot read, the main one tells."""
    root = tmp_path / "data"
    shutil.copytree(colours, root)
    bad = [root / "train" / "green" / "1.png", root / "val" / "blue" / "1.png"]  # the second's
    for path in bad:
        path.write_bytes(path.read_bytes()[:100])
    changes = {"model__name": "test_resnet", "model__kwargs": {}, "data__root": str(root)}
    changes |= {"schedule__updates": 6, "train__batch_size": 2}
    together = launch(make_config(**changes), tmp_path / "two")
    rows = (together / "unreadable.csv").read_text().splitlines()
    assert {row.split(",")[1] for row in rows[1:]} == {*map(str, bad)}
    log = [line.split(",") for line in (together / "log.csv").read_text().splitlines()]
    measures = {name: float(value) for _, _, name, value in log[-4:]}
    with Engine(make_config(**changes), "cpu") as engine:
        engine.load(together / "last.safetensors")
        for name, value in engine.test().items():
            assert measures[f"val_{name}"] == pytest.approx(value, rel=1e-5)
    with pytest.raises(ValueError, match="takes 4 images a step, these processes take 2"):
        run(make_config(**changes), together, resume=True)
    run(make_config(**changes, train__accumulation=2), together, resume=True)


def test_a_process_without_images_to_validate(make_config, colours, tmp_path):
    root = tmp_path / "data"
    shutil.copytree(colours / "train", root / "train")
    (root / "val" / "red").mkdir(parents=True)
    shutil.copy(colours / "val" / "red" / "0.png", root / "val" / "red")
    changes = {"data__root": str(root), "schedule__updates": 1, "train__batch_size": 2}
    together = launch(make_config(**changes), tmp_path / "two")
    assert "val_images,1\n" in (together / "log.csv").read_text()


@pytest.mark.slow
def test_sigterm_of_torchrun_leaves_a_snapshot(make_config, tmp_path):
    """torchrun passes it on to the processes' groups, so the loader's workers get it too."""
    changes = {"schedule__updates": 100000, "train__checkpoint_every": 100000}
    changes |= {"data__workers": 1, "train__batch_size": 2, "train__validate_every": 1e9}
    command, environment = prepare(make_config(**changes), tmp_path, processes=2)
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment)
    deadline = time.monotonic() + 300
    while not (tmp_path / "run" / "log.csv").exists() and process.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.terminate()
    _, err = process.communicate(timeout=300)
    assert err.count("KeyboardInterrupt: interrupted after update") == 2
    assert "DataLoader worker" not in err
    assert len([*(tmp_path / "run" / "snapshots").glob("step-*.pt")]) == 1


def test_weights_that_are_lost_before_any_loss_shows_it(make_config, tmp_path, monkeypatch):
    step = Engine._step

    def poisoned(self, module, optimizer, batches, update, log):
        losses = step(self, module, optimizer, batches, update, log)
        if update == 3:
            next(module.parameters()).data.fill_(float("nan"))
        return losses

    monkeypatch.setattr(Engine, "_step", poisoned)
    with pytest.raises(ValueError, match="expected a finite number, and finite weights"):
        run(make_config(), tmp_path / "run")
    assert {path.name for path in (tmp_path / "run" / "snapshots").iterdir()} == {
        "step-000000002.pt"
    }


def test_what_a_killed_process_left_is_removed(tmp_path):
    snapshots = Snapshots(tmp_path, keep=2)
    (tmp_path / "step-000000003.pt.new").write_bytes(b"half")
    snapshots.save(4, {"update": 4})
    assert [path.name for path in tmp_path.iterdir()] == ["step-000000004.pt"]


def test_another_engine_may_follow_one_that_failed(make_config):
    with pytest.raises(ValueError, match="test_vitt"):
        Engine(make_config(model__name="test_vitt"), "cpu")
    assert not torch.are_deterministic_algorithms_enabled()
    with Engine(make_config(train__precision="bf16", deterministic=False), "cpu") as engine:
        assert engine.test()["images"] == 15


def test_no_worker_outlives_an_error(make_config, tmp_path):
    before = multiprocessing.active_children()
    with pytest.raises(ValueError, match="expected a finite number") as error:
        run(make_config(data__workers=2, optimizer__lr=1e30), tmp_path / "run")
    assert error.tb is not None  # whose frames hold all that was there
    assert multiprocessing.active_children() == before


OPTIMIZERS = ("lamb", "lars", "muon", "adafactor", "lion", "sgd", "adopt")


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_any_optimizer_goes_on_where_it_was(make_config, tmp_path, name):
    """Snapshots are tensors and plain data, read with weights_only, whoever made them."""
    config = make_config(optimizer__name=name, optimizer__clip_grad=None)
    torch.manual_seed(0)
    images = torch.randn(4, 3)

    def fresh():
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(3, 8), torch.nn.LayerNorm(8))
        return model, create_optimizer(config, model, images=4)

    def steps(model, optimizer, count):
        for _ in range(count):
            optimizer.zero_grad()
            model(images).pow(3).sum().backward()
            optimizer.step()

    model, optimizer = fresh()
    steps(model, optimizer, 2)
    snapshots = Snapshots(tmp_path, keep=1)
    snapshots.save(2, {"model": model.state_dict(), "optimizer": optimizer.state_dict()})
    other, another = fresh()
    found = snapshots.newest()
    restore(other, another, found["model"], found["optimizer"])
    steps(model, optimizer, 3)
    steps(other, another, 3)
    assert all(
        torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True)
    )
