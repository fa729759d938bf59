import errno
import json
import multiprocessing
import os
import signal
import time

import numpy as np
import pytest
import sklearn.datasets
from PIL import Image
from timm.data import create_dataset
from torchvision.datasets import CocoDetection, ImageFolder

from vitarium.data import folders
from vitarium.data.digits import DigitImages
from vitarium.data.folders import SceneSet, ensure

FEW = SceneSet(train=5, val=3, size=(70, 90), seed=4)
COUNTS = {"train": 5, "val": 3}

_fork = multiprocessing.get_context("fork")


def files(folder):
    return {x.relative_to(folder): x.read_bytes() for x in folder.rglob("*") if x.is_file()}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tmp_path_factory.mktemp("data")


@pytest.fixture(scope="module")
def classification(root):
    return ensure("classification", root)


@pytest.fixture(scope="module")
def detection(root):
    return ensure("detection", root, FEW)


@pytest.fixture(scope="module")
def segmentation(root):
    return ensure("segmentation", root, FEW)


def test_classification_is_an_image_folder(classification):
    target = sklearn.datasets.load_digits().target
    for split, samples in (("train", range(1437)), ("val", range(1437, 1797))):
        folder = ImageFolder(classification / split)
        assert folder.classes == list("0123456789")
        named = {int(path[-8:-4]): label for path, label in folder.samples}
        assert named == dict(zip(samples, target[samples.start : samples.stop], strict=True))
        picture, label = folder[37]
        sample = int(folder.samples[37][0][-8:-4])
        expected = DigitImages(split)[sample - samples.start]
        assert (picture.tobytes(), label) == (expected[0].tobytes(), expected[1])
        assert len(create_dataset("", root=classification, split=split)) == len(samples)


def decoded(segmentation):
    """COCO's run lengths, by its description: they alternate, and run down the columns."""
    H, W = segmentation["size"]
    values = [i % 2 for i, count in enumerate(segmentation["counts"]) for _ in range(count)]
    return np.array(values, bool).reshape(W, H).T


@pytest.mark.parametrize("split", ["train", "val"])
def test_detection_is_coco(split, detection):
    document = json.loads((detection / f"annotations/instances_{split}.json").read_text())
    categories = {row["id"]: row["name"] for row in document["categories"]}
    assert categories == {i + 1: str(i) for i in range(10)}
    assert document["info"]["version"] == str(folders.VERSION)
    scenes = FEW.scenes()[split]
    assert [row["id"] for row in document["images"]] == list(range(COUNTS[split]))
    assert len(list((detection / split).iterdir())) == COUNTS[split]
    ids = [row["id"] for row in document["annotations"]]
    assert ids == list(range(1, len(ids) + 1))
    for row in document["images"]:
        scene = scenes[row["id"]]
        assert (row["height"], row["width"]) == FEW.size
        image = Image.open(detection / split / row["file_name"])
        assert image.mode == "RGB"
        assert (np.asarray(image) == scene.image).all()
        found = [a for a in document["annotations"] if a["image_id"] == row["id"]]
        assert [a["sample"] for a in found] == scene.samples.tolist()
        assert [a["category_id"] - 1 for a in found] == scene.labels.tolist()
        assert [a["bbox"] for a in found] == scene.boxes.tolist()
        assert [a["area"] for a in found] == scene.masks.sum((1, 2)).tolist()
        assert all(a["iscrowd"] == 0 for a in found)
        assert (np.stack([decoded(a["segmentation"]) for a in found]) == scene.masks).all()


def test_run_lengths_begin_with_what_is_not_set():
    for rows, counts in (
        ([[0, 1], [1, 1]], [1, 3]),
        ([[1, 0], [0, 1]], [0, 1, 2, 1]),
        ([[1, 1]], [0, 2]),
        ([[0, 0, 0]], [3]),
    ):
        assert folders._run_lengths(np.array(rows, bool)) == counts


def test_pycocotools_reads_the_detection_folder(detection):
    coco = pytest.importorskip("pycocotools.coco")
    mask = pytest.importorskip("pycocotools.mask")
    for split, scenes in FEW.scenes().items():
        file = detection / f"annotations/instances_{split}.json"
        annotated = coco.COCO(file)
        for index in annotated.getImgIds():
            scene = scenes[index]
            rows = annotated.loadAnns(annotated.getAnnIds(index))
            assert (np.stack([annotated.annToMask(row) for row in rows]) == scene.masks).all()
            runs = [annotated.annToRLE(row) for row in rows]
            assert mask.toBbox(runs).tolist() == scene.boxes.tolist()
            assert mask.area(runs).tolist() == [row["area"] for row in rows]
        image, rows = CocoDetection(detection / split, file)[1]
        assert (np.asarray(image) == scenes[1].image).all()
        assert len(rows) == len(scenes[1].labels)


@pytest.mark.parametrize("split", ["train", "val"])
def test_segmentation_is_pairs_of_files(split, segmentation):
    scenes = FEW.scenes()[split]
    names = [f"{i:06}.png" for i in range(COUNTS[split])]
    for part in ("images", "annotations"):
        assert sorted(x.name for x in (segmentation / part / split).iterdir()) == names
    for index, name in enumerate(names):
        image, labels = (
            Image.open(segmentation / part / split / name) for part in ("images", "annotations")
        )
        assert (image.mode, labels.mode) == ("RGB", "L")
        assert (np.asarray(image) == scenes[index].image).all()
        assert (np.asarray(labels) == scenes[index].semantic).all()


def test_what_is_there_is_not_made_again_and_what_differs_is(detection, root, monkeypatch):
    before = detection.stat().st_mtime_ns
    assert ensure("detection", root, FEW) == detection
    assert detection.stat().st_mtime_ns == before
    made = []
    monkeypatch.setattr(folders, "_write", lambda kind, *_: made.append(kind))
    others = [SceneSet(6, 3, (70, 90), 4), SceneSet(5, 4, (70, 90), 4)]
    others += [SceneSet(5, 3, (90, 70), 4), SceneSet(5, 3, (70, 90), 5)]
    found = {ensure("detection", root, scenes) for scenes in others}
    monkeypatch.setattr(folders, "VERSION", folders.VERSION + 1)
    found |= {ensure("detection", root, FEW), ensure("classification", root)}
    assert len(found) == len(made) == 6
    assert detection not in found


def test_without_a_root_it_lies_in_torch_hubs_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(folders, "_write", lambda *_: None)
    folder = ensure("segmentation")
    assert folder.parent == tmp_path / "hub" / "datasets" / "vitarium"
    assert folder.name == f"digits_v{folders.VERSION}_segmentation_1000_200_160x160_seed0"


def test_what_is_out_of_range_is_refused_before_anything_is_made(tmp_path):
    for arguments, message in (
        (("boxes",), "kind: expected classification, detection, segmentation, got 'boxes'"),
        (("classification", FEW), "scenes: expected None for classification, got SceneSet"),
        (("detection", SceneSet(val=0)), "count: expected at least one scene, got 0"),
        (("segmentation", SceneSet(seed=-1)), "seed: expected 0"),
    ):
        kind, *scenes = arguments
        with pytest.raises(ValueError, match=f"^{message}"):
            ensure(kind, tmp_path / "new", *scenes)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "error", [KeyboardInterrupt(), OSError(errno.ENOSPC, "No space left on device")]
)
def test_an_interrupted_making_leaves_nothing(error, tmp_path, monkeypatch):
    saved = []

    def save(pixels, file):
        saved.append(file)
        if len(saved) == 4:
            raise error
        Image.fromarray(pixels).save(file)

    monkeypatch.setattr(folders, "_save", save)
    with pytest.raises(type(error)):
        ensure("segmentation", tmp_path, FEW)
    assert saved[0].parents[2].name.endswith(".part")
    assert [path.suffix for path in tmp_path.iterdir()] == [".lock"]


def test_a_killed_making_is_made_again(tmp_path, segmentation):
    def stuck():
        save = folders._save

        def slow(pixels, file):
            save(pixels, file)
            (file.parent / "half.png").write_bytes(b"of before")
            time.sleep(60)

        folders._save = slow
        ensure("segmentation", tmp_path, FEW)

    process = _fork.Process(target=stuck)
    process.start()
    for _ in range(600):
        if list(tmp_path.rglob("half.png")):
            break
        time.sleep(0.05)
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    assert [x.suffix for x in sorted(tmp_path.iterdir())] == [".lock", ".part"]
    folder = ensure("segmentation", tmp_path, FEW)
    assert files(folder) == files(segmentation)
    assert sorted(tmp_path.iterdir()) == [folder, folder.with_name(f"{folder.name}.lock")]


def test_processes_share_one_making(tmp_path, detection):
    write, log = folders._write, tmp_path / "log"

    def logged(kind, folder, *rest):
        with log.open("a") as file:
            file.write(f"{kind}\n")
        time.sleep(0.5)
        write(kind, folder, *rest)

    def wanted(answers):
        folders._write = logged
        folder = ensure("detection", tmp_path / "data", FEW)
        answers.put((folder, files(folder)))

    answers = _fork.SimpleQueue()
    processes = [_fork.Process(target=wanted, args=(answers,)) for _ in range(3)]
    for process in processes:
        process.start()
    found = [answers.get() for _ in processes]
    for process in processes:
        process.join()
    assert all(content == files(detection) for _, content in found)
    assert {folder for folder, _ in found} == {tmp_path / "data" / detection.name}
    assert log.read_text() == "detection\n"
    assert len(list((tmp_path / "data").iterdir())) == 2  # and the lock
