"""Pictures of benchmark results, ours and timm's."""

import csv
import sys

import numpy as np
import pytest
from PIL import Image

from vitarium.tools import bench_plots

TIMM = """model,infer_img_size,infer_samples_per_sec,infer_batch_size,param_count,infer_gmacs
test_vit,160,700.5,1,0.37,0.04
resnet10t,176,350.5,1,5.44,0.7
mobilenetv3_large_150d,224,90.5,1,14.62,
resnet10t,224,180.5,4,5.44,1.1
resnet18,224,125.5,1,11.69,1.82
regnety_002,224,155.5,1,3.16,1.2
resnet14t,224,120.5,1,10.08,1.69
"""


@pytest.fixture
def timms(tmp_path):
    file = tmp_path / "timm.csv"
    file.write_text(TIMM)
    return file


def colours(file):
    pixels = np.asarray(Image.open(file).convert("RGB")).reshape(-1, 3)
    return len(np.unique(pixels, axis=0))


def test_a_run_draws_itself_and_its_csv_again(program, tmp_path):
    file, first, again = tmp_path / "models.csv", tmp_path / "a", tmp_path / "b"
    first.mkdir()
    argv = ("nat_atto", "test_vit", "resnet10t", "--sizes", "64", "32x48", "--mode", "both")
    status, out, _ = program(
        *("bench", "models", *argv, "--quick", "--rounds", "1", "--csv", file, "--plot", first)
    )
    assert status == 0
    names = ["infer_gflops.png", "infer_size.png", "train_gflops.png", "train_size.png"]
    assert sorted(x.name for x in first.iterdir()) == names
    assert out.count("wrote") == 5
    assert program("bench", "plot", file, "--out", again).status == 0
    for name in names:
        assert colours(first / name) > 20
        assert (first / name).read_bytes() == (again / name).read_bytes()


def test_timms_results_beside_ours(program, timms, tmp_path):
    ours = tmp_path / "ours.csv"
    columns = ["model", "infer_img_size", "infer_samples_per_sec", "infer_gmacs", "compiled"]
    with ours.open("w", newline="") as file:
        file.write("# machine\n")
        writer = csv.writer(file)
        writer.writerows([columns, ["nat_atto", "64x96", 1.5, 2, "False"], ["", "", "", "", ""]])
    rows = bench_plots.read([str(timms), str(ours)])
    points, terms = bench_plots._points(rows, "infer")
    assert [(p.model, p.series, p.size) for p in points][-2:] == [
        ("resnet14t", "timm", (224, 224)),
        ("nat_atto", "ours, eager", (64, 96)),
    ]
    assert len(points) == 7
    assert terms == ""
    assert [p.ours for p in points] == [False] * 6 + [True]
    status, out, _ = program("bench", "plot", timms, ours, "--out", tmp_path / "new" / "folder")
    assert status == 0
    assert out.count("wrote") == 2


def test_front(timms):
    points, _ = bench_plots._points(bench_plots.read([str(timms)]), "infer")
    found = [(p.model, p.gflops) for p in bench_plots._front(points)]
    assert found == [
        ("test_vit", 0.04),
        ("resnet10t", 0.7),
        ("resnet10t", 1.1),
        ("regnety_002", 1.2),
        ("resnet18", 1.82),
    ]


def test_names_do_not_overlap(timms):
    points = [
        bench_plots.Point(
            f"a_model_with_a_long_name_{i}", "", 10 + 0.1 * i, 4 + 0.1 * (i % 4), (9, 9)
        )
        for i in range(12)
    ]
    figure = bench_plots._over_gflops(points, "title", "terms")
    figure.canvas.draw()
    (axes,) = figure.axes
    boxes = [text.get_window_extent() for text in axes.texts]
    assert len(boxes) == 12
    for i, box in enumerate(boxes):
        assert not box.count_overlaps(boxes[:i])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("infer_gmacs", "gmacs"), ": no column infer_gmacs"),
        (("model,", "name,"), ": no column model"),
        (("infer_samples_per_sec", "speed"), ": no column infer_samples_per_sec"),
        (("700.5", "fast"), ", test_vit: could not convert string to float: 'fast'"),
        ((",160,", ",large,"), ", test_vit: invalid literal for int()"),
    ],
)
def test_bad_files(program, timms, change, message):
    timms.write_text(TIMM.replace(*change))
    status, _, err = program("bench", "plot", timms, "--out", timms.parent / "out")
    assert status == 1
    assert err.startswith(f"vitarium: error: {timms}{message}")
    assert err.count("\n") == 1


def test_no_rows(program, timms):
    timms.write_text(TIMM.splitlines()[0])
    status, _, err = program("bench", "plot", timms, "--out", timms.parent / "out")
    assert status == 1
    assert "expected rows with a throughput and infer_gmacs, found none" in err


def test_no_file(program, tmp_path):
    status, _, err = program("bench", "plot", "no/such.csv", "--out", tmp_path)
    assert (status, err) == (1, "vitarium: error: no/such.csv: No such file or directory\n")


def test_without_matplotlib(program, timms, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setattr("vitarium.tools._common.find_spec", lambda name: None)
    status, _, err = program("bench", "models", "--plot", timms.parent)
    assert status == 1
    assert err.startswith("vitarium: error: matplotlib is not installed: pip install")
