import contextlib
import io
import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_sample_image

import vitarium_cli
from vitarium.data.digits import split
from vitarium.data.folders import SceneSet, ensure
from vitarium.tools import demo

ROOT = Path(__file__).parents[2]


def wrote(text, folder):
    """The files that a text names, after its "wrote"."""
    return [folder / match for match in re.findall(r"^ *wrote ([^:\n]+)", text, re.MULTILINE)]


@pytest.fixture(scope="module")
def shown(tmp_path_factory):
    """Where the demo ran, without network, and what it printed."""

    def refused(*args):
        pytest.fail("the demo uses the network")

    folder = tmp_path_factory.mktemp("demo")
    out = io.StringIO()
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("TORCH_HOME", str(folder / "torch"))
        few = ensure("detection", scenes=SceneSet(16, 8))  # in the place of the many
        few.rename(few.with_name(few.name.replace("_16_8_", "_1000_200_")))
        patch.setattr(socket.socket, "connect", refused)
        patch.setattr(socket, "getaddrinfo", refused)
        with contextlib.redirect_stdout(out):
            assert vitarium_cli.main(["demo", "--updates", "2"]) == 0
        yield folder, out.getvalue()


def test_every_file_that_it_names_is_there(shown):
    folder, text = shown
    names = ["digit", "digits", "china", "china.features", "flower", "flower.features"]
    names += ["china.families"]
    names += [f"china.{model}.neighborhoods" for model in ("nat_atto", "dinat_mini")]
    attentions = ("nat", "biformer", "agent", "fused_davit", "fused_swin")
    assert all(f" {family}_" in text for family in attentions)
    files = [f"{name}.png" for name in names]
    files += ["scenes.best.png", "scenes.worst.png", "scenes.pth", "scene.png"]
    assert wrote(text, folder) == [folder / "outputs" / name for name in files]
    assert sorted((folder / "outputs").iterdir()) == sorted(wrote(text, folder))


def test_it_prints_the_accuracies_of_the_test(shown, program):
    _, text = shown
    lines = program("digits", "test").out.splitlines()
    assert [line.strip() for line in text.splitlines()[1:3]] == lines
    right = int(re.search(r"\((\d+) of 360\)", text)[1])
    assert f"the {360 - right} mistakes come first" in text


def test_the_pictures(shown):
    folder = shown[0] / "outputs"
    for name in ("china", "flower"):
        assert (
            np.asarray(Image.open(folder / f"{name}.png")) == load_sample_image(f"{name}.jpg")
        ).all()
        sheet = Image.open(folder / f"{name}.features.png")
        assert sheet.width > 3 * 480
        assert sheet.height > 2 * 320
        assert len(sheet.getcolors(sheet.width * sheet.height)) > 5000
    sheet = Image.open(folder / "china.families.png")
    assert sheet.width > 5 * 320
    assert sheet.height > 5 * 213
    assert len(sheet.getcolors(sheet.width * sheet.height)) > 5000
    for model, rows in (("nat_atto", 1), ("dinat_mini", 2)):
        sheet = Image.open(folder / f"china.{model}.neighborhoods.png")
        assert sheet.width > 4 * 400
        assert sheet.height // rows > 267
        assert len(sheet.getcolors(sheet.width * sheet.height)) > 3000
    assert Image.open(folder / "digit.png").size == (64, 64)
    grid = Image.open(folder / "digits.png")
    assert grid.width == 1200
    assert grid.height > 700


def red(file):
    """Share of red pixels."""
    pixels = np.asarray(Image.open(file).convert("RGB")).astype(int)
    return float((pixels == (255, 0, 0)).all(-1).mean())


def test_all_mistakes_are_shown_and_marked(tmp_path):
    held_out = split()[1]
    right = torch.nn.functional.one_hot(held_out.labels, 10) * 0.9
    wrong = right.roll(1, -1)
    shares = []
    for mistakes in (0, 5, 100):
        chances = right.clone()
        chances[200 : 200 + mistakes] = wrong[200 : 200 + mistakes]
        file = tmp_path / f"{mistakes}.png"
        assert demo._save_predictions(file, held_out, chances) == mistakes
        shares.append(red(file))
    assert shares[0] == 0 < 3 * shares[1] < shares[2]
    heights = [Image.open(tmp_path / f"{mistakes}.png").height for mistakes in (0, 5, 100)]
    assert heights[0] == heights[1] < heights[2]


def test_the_detector(shown, program):
    folder, text = shown
    (printed,) = re.findall(r"box AP (\d\.\d{3}), mask AP (\d\.\d{3}) on 200 scenes", text)
    assert re.findall(r"(\d) of 2 updates: loss \d+\.\d\d", text) == ["1", "2"]
    argv = ("--checkpoint", folder / "outputs" / "scenes.pth", "--output", folder / "again")
    status, out, _ = program("test", "mask_rcnn_nat_atto_digits", *argv, "--device", "cpu")
    assert status == 0
    measured = [re.search(rf"coco/{kind}_mAP +(\S+)", out)[1] for kind in ("bbox", "segm")]
    assert [float(x) for x in measured] == pytest.approx([float(x) for x in printed], abs=1e-3)
    for kind in ("best", "worst"):
        with Image.open(folder / "outputs" / f"scenes.{kind}.png") as picture:
            assert picture.height > 3 * 480


def test_what_is_measured_is_told(tmp_path, monkeypatch):
    from vitarium.tools import demo_detector

    def trained(config, run, changes, **kwargs):
        run.mkdir()
        for name in ("iter_7.pth", "best.png", "worst.png"):
            (run / name).write_text(name)
        return {"coco/bbox_mAP": 0.25, "coco/segm_mAP": 0.5, "coco/bbox_mAP_50": 0.75}

    folder = tmp_path / "val"
    folder.mkdir()
    (folder / "000000.png").write_text("scene")
    monkeypatch.setattr(demo_detector, "train", trained)
    monkeypatch.setattr(demo_detector, "ensure", lambda kind: tmp_path)
    (out := tmp_path / "out").mkdir()
    found = demo_detector.train_detector(out, 7, print)
    assert (found.box_ap, found.mask_ap) == (0.25, 0.5)
    kept = [found.weights, *found.pictures, found.scene]
    assert [x.read_text() for x in kept] == ["iter_7.pth", "best.png", "worst.png", "scene"]
    assert {*out.iterdir()} == {*kept}


def test_an_interrupted_detector_leaves_nothing(tmp_path, monkeypatch):
    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt("--resume goes on")

    from vitarium.tools import demo_detector

    monkeypatch.setattr(demo_detector, "train", interrupted)
    with pytest.raises(KeyboardInterrupt, match="^$"):
        demo_detector.train_detector(tmp_path, 1, print)
    assert list(tmp_path.iterdir()) == []


def test_the_next_commands_work_as_printed(shown):
    folder, text = shown
    commands = [line.strip() for line in text.splitlines()[-5:]]
    results = [
        subprocess.run(
            command,
            shell=True,
            cwd=folder,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
            timeout=60,
        )
        for command in commands
    ]
    *others, detected, _ = results
    assert [(result.returncode, result.stderr) for result in others] == [(0, "")] * 3
    assert detected.returncode == 0
    assert detected.stderr.endswith("a config of Python, which is run\n")
    predicted, features, visualized, found, listed = (result.stdout for result in results)
    name, first, *_ = predicted.splitlines()
    assert name == str(Path("outputs") / "digit.png")
    assert first.split()[1] == str(int(split()[1].labels[0]))
    for text in (features, visualized, found):
        (picture,) = wrote(text, folder)
        assert picture.is_file()
    assert "nat_tiny" in listed


@pytest.mark.parametrize("package", ["scikit-learn", "matplotlib"])
def test_without_the_extra(package, program, monkeypatch, tmp_path):
    name = {"scikit-learn": "sklearn.datasets"}.get(package, package)
    monkeypatch.setitem(sys.modules, name, None)
    status, out, err = program("demo", "--out", tmp_path / "new")
    assert (status, out) == (1, "")
    assert err == f'vitarium: error: {package} is not installed: pip install "vitarium[demo]"\n'
    assert list(tmp_path.iterdir()) == []


def test_an_unusable_folder(program, tmp_path):
    file = tmp_path / "file"
    file.touch()
    result = program("demo", "--out", file)
    assert result == (1, "", f"vitarium: error: {file}: File exists\n")


def test_it_calls_itself_as_the_shell_finds_it(tmp_path, monkeypatch):
    script = tmp_path / ".venv" / "bin" / "vitarium"
    monkeypatch.setattr(demo.sysconfig, "get_path", lambda name: str(script.parent))
    assert demo._program() == (sys.executable, "-m", "vitarium_cli")
    script.parent.mkdir(parents=True)
    script.touch(mode=0o755)
    assert demo._program() == (str(script),)
    monkeypatch.chdir(tmp_path)
    assert demo._program() == (str(Path(".venv") / "bin" / "vitarium"),)
    monkeypatch.setenv("PATH", str(script.parent))
    assert demo._program() == ("vitarium",)
