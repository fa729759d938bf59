"""What is found, drawn and listed: the program's `predict` and `test` of detectors."""

from __future__ import annotations

import pytest

pytest.importorskip("mmdet")

import csv
import json

import numpy as np
import torch
from mmengine.structures import InstanceData
from PIL import Image

import vitarium_cli
from vitarium.detection.configs import load_config
from vitarium.detection.pictures import Extremes, Objects, _agreement, draw


@pytest.fixture
def program(capsys):
    """Runs the program: its status, and what it prints to either side."""

    def run(*argv):
        capsys.readouterr()
        status = vitarium_cli.main([*map(str, argv)])
        return (status, *capsys.readouterr())

    return run


def objects(*rows, masks=None):
    """Of rows of a box and a label, with scores that fall."""
    boxes = np.array([row[0] for row in rows], np.float32).reshape(-1, 4)
    scores = np.linspace(0.9, 0.5, len(rows))
    return Objects(boxes, np.array([row[1] for row in rows], int), scores, masks)


def test_the_likeliest_first_and_none_below_the_threshold():
    instances = InstanceData(
        bboxes=torch.arange(12.0).view(3, 4),
        labels=torch.tensor([5, 6, 7]),
        scores=torch.tensor([0.2, 0.9, 0.4]),
        masks=torch.eye(3).bool().view(3, 1, 3),
    )
    found = Objects.of(instances, 0.3)
    assert found.labels.tolist() == [6, 7]
    assert found.boxes[0].tolist() == [4, 5, 6, 7]
    assert found.masks[:, 0].tolist() == [[False, True, False], [False, False, True]]
    names = list("0123456789")
    assert found.rows(names)[1] == {
        "index": 7, "label": "7", "box": [8, 9, 10, 11], "score": pytest.approx(0.4),
        "mask_area": 1,
    }  # fmt: skip


def test_boxes_masks_and_captions_are_drawn_where_they_are():
    mask = np.zeros((1, 100, 120), bool)
    mask[0, 60:80, 30:50] = True
    drawn = draw(Image.new("RGB", (120, 100)), objects(((20, 50, 70, 90), 2), masks=mask), "abcde")
    assert drawn.size == (480, 400)
    pixels = np.asarray(drawn).astype(int).sum(-1)
    assert pixels[4 * 70, 4 * 40] > 0  # in the mask
    assert pixels[4 * 85, 4 * 60] == 0  # in the box alone
    assert pixels[4 * 70, 4 * 20] > 0  # its left side
    assert pixels[4 * 20, 4 * 100] == 0  # outside
    assert pixels[4 * 50 - 8, 4 * 20 + 2 : 4 * 20 + 12].any()  # the caption


def test_boxes_that_are_nowhere_are_drawn_at_the_border():
    inf, nan = float("inf"), float("nan")
    far = objects(((-inf, -1e30, inf, 1e30), 1), ((nan, nan, nan, nan), 2), ((500, 500, 9, 9), 0))
    drawn = draw(Image.new("RGB", (120, 100)), far, "abc")
    pixels = np.asarray(drawn).astype(int).sum(-1)
    assert pixels[-1, 240] > 0
    assert pixels[200, -1] > 0
    assert pixels[200, 240] == 0


def test_an_image_counts_by_what_matches():
    there = objects(((0, 0, 10, 10), 1), ((20, 20, 30, 30), 2))
    assert _agreement(there, there) == 1
    assert _agreement(there, objects()) == 0
    wrong_class = objects(((0, 0, 10, 10), 3), ((20, 20, 30, 30), 2))
    assert _agreement(there, wrong_class) == 0.5
    twice = objects(((0, 0, 10, 10), 1), ((0, 0, 10, 9), 1), ((20, 20, 30, 30), 2))
    assert _agreement(there, twice) == pytest.approx(4 / 5)
    beside = objects(((6, 0, 16, 10), 1))
    assert _agreement(there, beside) == 0


def test_best_and_worst_of_a_test(config, tmp_path, capsys):
    run = tmp_path / "run"
    assert vitarium_cli.main(["train", str(config), "--output", str(run), "--device", "cpu"]) == 0
    pipeline = load_config(config).test_dataloader.dataset.pipeline
    pipeline = [*pipeline[:-1], {"type": "LoadAnnotations"}, {"type": "PackDetInputs"}]
    argv = ["test", str(config), "--output", str(run), "--device", "cpu", "--pictures", "2"]
    capsys.readouterr()
    assert vitarium_cli.main(argv) == 0
    assert "no pictures: " in capsys.readouterr().err
    assert not list((run / "test").glob("*.png"))
    argv += ["--set", f"test_dataloader.dataset.pipeline={[dict(x) for x in pipeline]}"]
    assert vitarium_cli.main(argv) == 0
    for kind in ("best", "worst"):
        with Image.open(run / "test" / f"{kind}.png") as picture:
            assert picture.height > 2 * 480


def test_best_and_worst_of_each_validation(config, tmp_path, capsys):
    pipeline = load_config(config).val_dataloader.dataset.pipeline
    pipeline = [*pipeline[:-1], {"type": "LoadAnnotations"}, {"type": "PackDetInputs"}]
    argv = ["train", str(config), "--device", "cpu"]
    argv += ["--set", f"val_dataloader.dataset.pipeline={[dict(x) for x in pipeline]}"]
    none, run = tmp_path / "none", tmp_path / "run"
    assert vitarium_cli.main([*argv, "--output", str(none), "--pictures", "0"]) == 0
    assert not list(none.rglob("*.png"))
    capsys.readouterr()
    assert vitarium_cli.main([*argv, "--output", str(run), "--pictures", "2"]) == 0
    said = capsys.readouterr().err
    for kind in ("best", "worst"):
        assert f"wrote {run / kind}.png" in said
        with Image.open(run / f"{kind}.png") as picture:
            assert picture.height > 2 * 480


def test_no_more_than_what_can_be_drawn_is_kept(tmp_path):
    hook = Extremes(tmp_path, 2)
    for share in np.random.default_rng(0).permutation(100):
        hook._seen.append((share / 100, str(share), objects(), objects()))
        hook._drop()
    assert len(hook._seen) <= 8
    shares = sorted(share for share, *_ in hook._seen)
    assert (shares[:2], shares[-2:]) == ([0, 0.01], [0.98, 0.99])


def test_predict(config, scenes, tmp_path, program):
    run = tmp_path / "run"
    assert program("train", config, "--output", run, "--device", "cpu")[0] == 0
    (weights,) = run.glob("epoch_1.pth")
    image = next((scenes / "val").glob("*.png"))
    out, table = tmp_path / "pictures", tmp_path / "found.csv"
    argv = ("predict", image, "--config", config, "--checkpoint", weights, "--device", "cpu")
    argv += ("--threshold", 0.0001, "--out", out)
    status, text, _ = program(*argv, "--csv", table)
    assert status == 0
    picture = out / f"{image.stem}.objects.png"
    assert f"wrote {picture}" in text
    with Image.open(picture) as drawn:
        assert max(drawn.size) >= 480
    status, text, _ = program(*argv, "--json")
    assert status == 0
    (found,) = json.loads(text)
    assert found["predictions"]
    assert {row["label"] for row in found["predictions"]} <= set("0123456789")
    with table.open() as file:
        rows = list(csv.DictReader(file))
    assert [row["label"] for row in rows] == [row["label"] for row in found["predictions"]]
    scores = [float(row["score"]) for row in rows]
    assert scores == sorted(scores, reverse=True)


def test_options_that_do_not_apply(config, program):
    for argv, message in (
        (("--model", "nat_atto", "--threshold", 0), "--threshold: not for --model"),
        (("--model", "nat_atto", "--set", "a=1"), "--set: not for --model"),
        (("--config", config), "--checkpoint: expected the detector's weights"),
        (("--config", config, "--checkpoint", "x", "--topk", 3), "--topk: not for --config"),
        (
            ("--config", config, "--checkpoint", "x", "--threshold", "nan"),
            "--threshold: expected 0 ... 1, got nan",
        ),
        (
            ("y/x.jpg", "--config", config, "--checkpoint", "x"),
            "IMAGE: expected names that differ, two would be drawn to outputs",
        ),
        (("--config", "atto_digits", "--checkpoint", "x"), "--config: expected that of a detector"),
    ):
        status, out, err = program("predict", "x.png", *argv)
        assert (status, out) == (1, "")
        assert message in err
