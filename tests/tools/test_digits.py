import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import sklearn.datasets
import timm
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file
from sklearn.neighbors import KNeighborsClassifier

import vitarium_cli
from vitarium.backbones import nat
from vitarium.checkpoints import fetch, load
from vitarium.data.digits import Digits, split
from vitarium.data.folders import SceneSet, ensure
from vitarium.tools import digits
from vitarium.tools.digits import MODEL, Recipe

ROOT = Path(__file__).parents[2]
SHIPPED = nat._WEIGHTS[MODEL]


def train(out):
    assert vitarium_cli.main(["digits", "train", "--epochs", "1", "--out", str(out)]) == 0
    return out


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Weights after one epoch."""
    return train(tmp_path_factory.mktemp("digits") / "new" / "folder" / "one.safetensors")


def test_training_repeats_and_never_sees_the_held_out(trained, tmp_path, monkeypatch, capsys):
    data = sklearn.datasets.load_digits()
    data.images[-360:] = np.random.default_rng(0).integers(0, 17, (360, 8, 8))
    data.data[-360:] = data.images[-360:].reshape(360, 64)
    data.target[-360:] = (data.target[-360:] + 1) % 10
    monkeypatch.setattr(sklearn.datasets, "load_digits", lambda: data)
    torch.manual_seed(1)  # the program seeds itself
    before = torch.get_rng_state(), torch.get_num_threads()
    again = train(tmp_path / "again.safetensors")
    assert again.read_bytes() == trained.read_bytes()
    assert torch.equal(torch.get_rng_state(), before[0])
    assert torch.get_num_threads() == before[1]
    assert capsys.readouterr().out.endswith(f"\nwrote {again}\n")
    assert [path.name for path in tmp_path.iterdir()] == [again.name]


def test_every_training_digit_and_the_seed_count():
    training = split()[0]
    few = Digits(training.pictures[-64:], training.labels[-64:], training.pixels[-64:])
    other = few._replace(labels=torch.cat([few.labels[:-1], (few.labels[-1:] + 1) % 10]))
    recipe = replace(Recipe(), epochs=1, batch=32)
    states = [
        digits.train(data, recipe, seed).state_dict()["head.weight"]
        for data, seed in ((few, 0), (few, 0), (other, 0), (few, 1))
    ]
    assert torch.equal(states[0], states[1])
    assert not torch.equal(states[0], states[2])
    assert not torch.equal(states[0], states[3])


def test_the_file_says_how_it_was_made_and_loads(trained):
    with safe_open(trained, "pt") as file:
        facts = json.loads(file.metadata()["training"])
    assert facts["command"] == "vitarium digits train --epochs 1 --seed 0"
    assert facts["recipe"]["epochs"] == 1
    assert facts["versions"]["timm"] == timm.__version__
    model = timm.create_model(MODEL, pretrained_cfg_overlay={"file": str(trained)}, pretrained=True)
    state = load_file(trained)
    assert state.keys() == model.state_dict().keys()
    assert all(torch.equal(state[name], tensor) for name, tensor in model.state_dict().items())


def test_predict_sees_a_digit_as_training_does(trained, program, tmp_path):
    held_out = split()[1]
    model = timm.create_model(MODEL)
    load(model, trained)
    few = Digits(held_out.pictures[:3], held_out.labels[:3], held_out.pixels[:3])
    chances = digits.probabilities(model, few)
    torch.testing.assert_close(chances.sum(-1), torch.ones(3))
    paths = [tmp_path / f"{index}.png" for index in range(4)]
    for path, picture in zip(paths, few.pictures, strict=False):
        picture.save(path)
    few.pictures[0].resize((64, 64), Image.Resampling.BICUBIC).save(paths[3])
    arguments = ("--checkpoint", trained, "--topk", 10, "--json", "--device", "cpu")
    rows = json.loads(program("predict", *paths, "--model", MODEL, *arguments).out)
    for row, expected in zip(rows, [*chances, chances[0]], strict=True):
        found = torch.empty(10)
        for answer in row["predictions"]:
            found[int(answer["label"])] = answer["probability"]
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


def test_images_move_a_little_and_stay_digits():
    recipe = Recipe()
    images = digits.inputs(split()[0].pictures[:64])
    assert images.shape == (64, 3, 64, 64)
    assert images.min() == -1
    torch.manual_seed(0)
    moved = digits._moved(images, recipe)
    assert moved.shape == images.shape
    assert moved.min() >= -1
    assert moved.max() <= 1
    assert (moved - images).abs().mean((1, 2, 3)).min() > 0.01
    still = replace(recipe, rotation=0.0, scale=0.0, shear=0.0, shift=0.0, bend=0.0, raster=0.0)
    torch.testing.assert_close(digits._moved(images, still), images, atol=1e-4, rtol=0)
    right = torch.zeros(1, 3, 64, 64)
    right[..., 32:] = 1  # its edge shows where shifts end
    furthest = replace(still, shift=0.25)
    edges = [int((digits._moved(right, furthest)[0, 0, 32] > 0.5).nonzero()[0]) for _ in range(50)]
    assert 16 <= min(edges) < 24 < 40 < max(edges) <= 48


def test_ctrl_c_leaves_nothing(tmp_path):
    out = tmp_path / "weights.safetensors"
    out.write_bytes(b"of before")
    code = "import sys, vitarium_cli; sys.exit(vitarium_cli.main())"
    process = subprocess.Popen(
        [sys.executable, "-c", code, "digits", "train", "--out", str(out)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        # a shell's background jobs, and what they start, would ignore Ctrl-C
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    part = tmp_path / "weights.safetensors.part"
    for _ in range(600):
        if part.exists() or process.poll() is not None:
            break
        time.sleep(0.1)
    assert part.exists()
    time.sleep(0.5)  # some steps
    process.send_signal(signal.SIGINT)
    assert process.communicate(timeout=30) == ("", "vitarium: error: interrupted\n")
    assert process.returncode == 130
    assert list(tmp_path.iterdir()) == [out]
    assert out.read_bytes() == b"of before"


def test_unusable_outputs_are_refused_before_the_training(program, tmp_path, monkeypatch):
    monkeypatch.setattr(digits, "train", lambda *args: pytest.fail("it trains"))
    file = tmp_path / "file"
    file.touch()
    for out, message in (
        (tmp_path, f"--out: expected a file, got the folder {tmp_path}"),
        (file / "weights.safetensors", f"{file}: File exists"),
    ):
        status, text, error = program("digits", "train", "--out", out)
        assert (status, text, error) == (1, "", f"vitarium: error: {message}\n")
    assert list(tmp_path.iterdir()) == [file]


def test_the_shipped_weights_are_what_this_recipe_made():
    path = fetch(SHIPPED, MODEL)  # checks size and sha256
    assert SHIPPED.size == path.stat().st_size <= 6_000_000
    assert SHIPPED.sha256 is not None
    assert {tensor.dtype for tensor in load_file(path).values()} == {torch.float32}
    with safe_open(path, "pt") as file:
        facts = json.loads(file.metadata()["training"])
    assert Recipe(**facts["recipe"]) == Recipe()
    assert facts["seed"] == vitarium_cli._parser().parse_args(["digits", "train"]).seed


def test_the_shipped_weights_read_digits(program, trained):
    training, held_out = split()
    neighbours = KNeighborsClassifier(3).fit(training.pixels, training.labels)
    right = int((neighbours.predict(held_out.pixels) == held_out.labels.numpy()).sum())

    def tested(*argv):
        status, out, err = program("digits", "test", *argv)
        assert (status, err) == (0, "")
        first, second = out.splitlines()
        assert second == f"3 nearest neighbours on raw pixels  {right / 3.6:.2f}% ({right} of 360)"
        assert first.startswith(MODEL)
        return float(first.removeprefix(MODEL).partition("%")[0])

    shipped = tested()
    assert shipped >= 97.5
    assert tested("--checkpoint", fetch(SHIPPED, MODEL)) == shipped
    assert tested("--checkpoint", trained) < shipped


def files(folder):
    return {x.relative_to(folder): x.read_bytes() for x in folder.rglob("*") if x.is_file()}


def test_make_writes_all_kinds(program, tmp_path):
    folder = tmp_path / "new" / "data"
    numbers = ("--scenes", 3, "--val", 2, "--size", "64x96", "--seed", 5)
    status, out, err = program("digits", "make", folder, *numbers)
    assert (status, err) == (0, "")
    assert out == f"wrote {folder}: classification, detection, segmentation\n"
    assert list(folder.parent.iterdir()) == [folder]
    scenes = SceneSet(3, 2, (64, 96), 5)
    for kind in ("detection", "segmentation"):
        assert files(folder / kind) == files(ensure(kind, tmp_path, scenes))
    assert len(files(folder / "classification")) == 1797


def test_make_wants_a_new_folder_and_leaves_nothing_when_it_fails(program, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    for folder in (tmp_path, tmp_path / "file"):
        status, out, err = program("digits", "make", folder)
        assert (status, out) == (1, "")
        assert err == f"vitarium: error: {folder}: expected a new or an empty folder\n"
    empty = tmp_path / "empty"
    empty.mkdir()
    for argument, value, message in (
        ("--size", "160x31", "size: expected at least 32 pixels each way, got (160, 31)"),
        ("--seed", -1, "seed: expected 0 ... 4294967295, got -1"),
    ):
        status, out, err = program("digits", "make", empty, argument, value)
        assert (status, out, err) == (1, "", f"vitarium: error: {message}\n")

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device", "x.png")

    monkeypatch.setattr(Image.Image, "save", full)
    status, out, err = program("digits", "make", empty)
    assert (status, err) == (1, "vitarium: error: x.png: No space left on device\n")
    assert sorted(tmp_path.iterdir()) == [empty, tmp_path / "file"]
    assert not list(empty.iterdir())


def test_without_scikit_learn(program, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    for action in (["train"], ["test"], ["make", tmp_path / "data"]):
        status, out, err = program("digits", *action)
        assert (status, out) == (1, "")
        assert err == (
            'vitarium: error: scikit-learn is not installed: pip install "vitarium[demo]"\n'
        )


def test_progress_without_a_terminal(monkeypatch, capsys):
    clock = [0.0]
    monkeypatch.setattr(digits.time, "monotonic", lambda: clock[0])
    with digits.progress("training", 1000) as advance:
        for _ in range(10):
            clock[0] += 4
            advance(100)
    out, err = capsys.readouterr()
    assert out == ""
    assert err.splitlines() == [
        "training: 300/1000 images, 25 images/s, 0:00:28 left",
        "training: 600/1000 images, 25 images/s, 0:00:16 left",
        "training: 900/1000 images, 25 images/s, 0:00:04 left",
    ]


def test_progress_on_a_terminal(monkeypatch, capsys):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "200")
    with digits.progress("training", 100) as advance:
        advance(100)
    out, err = capsys.readouterr()
    assert out == ""
    assert "training" in err
    assert "100/100 images" in err
    assert "0:00:00 left" in err
