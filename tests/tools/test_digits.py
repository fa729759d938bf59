import json
import math
import sys
from pathlib import Path

import pytest
import timm
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from sklearn.neighbors import KNeighborsClassifier

from vitarium.backbones import nat
from vitarium.checkpoints import fetch, load
from vitarium.data.digits import Digits, split
from vitarium.data.folders import SceneSet, ensure
from vitarium.tools import digits
from vitarium.tools.digits import MODEL
from vitarium.tools.train import chosen

ROOT = Path(__file__).parents[2]
SHIPPED = nat._WEIGHTS[MODEL]


@pytest.fixture(scope="module")
def random(tmp_path_factory):
    """Weights that know nothing."""
    torch.manual_seed(0)
    file = tmp_path_factory.mktemp("digits") / "random.safetensors"
    save_file(timm.create_model(MODEL).state_dict(), file)
    return file


def test_predict_sees_a_digit_as_the_test_does(random, program, tmp_path):
    held_out = split()[1]
    model = timm.create_model(MODEL)
    load(model, random)
    few = Digits(held_out.pictures[:3], held_out.labels[:3], held_out.pixels[:3])
    chances = digits.probabilities(model, few)
    torch.testing.assert_close(chances.sum(-1), torch.ones(3))
    paths = [tmp_path / f"{index}.png" for index in range(4)]
    for path, picture in zip(paths, few.pictures, strict=False):
        picture.save(path)
    few.pictures[0].resize((64, 64), Image.Resampling.BICUBIC).save(paths[3])
    arguments = ("--checkpoint", random, "--topk", 10, "--json", "--device", "cpu")
    rows = json.loads(program("predict", *paths, "--model", MODEL, *arguments).out)
    for row, expected in zip(rows, [*chances, chances[0]], strict=True):
        found = torch.empty(10)
        for answer in row["predictions"]:
            found[int(answer["label"])] = answer["probability"]
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


def test_the_shipped_weights_are_what_the_recipe_made():
    path = fetch(SHIPPED, MODEL)  # checks size and sha256
    assert SHIPPED.size == path.stat().st_size <= 6_000_000
    assert SHIPPED.sha256 is not None
    assert {tensor.dtype for tensor in load_file(path).values()} == {torch.float32}
    with safe_open(path, "pt") as file:
        facts = json.loads(file.metadata()["training"])
    config, _ = chosen("atto_digits", [])
    updates = math.ceil(config.schedule.epochs * len(split()[0].labels) / config.train.batch_size)
    assert facts["update"] == updates
    assert facts["measures"]["top1"] >= 97.5


def test_the_shipped_weights_read_digits(program, random):
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
    assert tested("--checkpoint", random) < shipped


def files(folder):
    return {x.relative_to(folder): x.read_bytes() for x in folder.rglob("*") if x.is_file()}


def test_make_writes_all_kinds(program, tmp_path, monkeypatch):
    monkeypatch.setattr(digits, "_SECONDS", math.inf)  # a slow machine would tell of its progress
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
    for action in (["test"], ["make", tmp_path / "data"]):
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
