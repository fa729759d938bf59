"""Pictures of the ops' results, of a CPU and of a GPU."""

import numpy as np
import pytest
from PIL import Image

from vitarium.tools import bench_op_plots


def row(implementation, ms, case="56x56", **other):
    found = {"op": "window", "case": case, "pass": "forward, bias"}
    return {**found, "implementation": implementation, "ms": ms, **other}


def test_a_run_draws_itself(program, tmp_path):
    status, out, _ = program(
        *("bench", "ops", "channel", "--quick", "--rounds", "1", "--plot", tmp_path)
    )
    assert status == 0
    names = ["ops_channel_forward+backward.png", "ops_channel_forward.png"]
    assert sorted(x.name for x in tmp_path.iterdir()) == names
    assert out.count("wrote") == 2


def test_a_file_for_each_op_pass_and_dtype(tmp_path):
    gpu = {"batch": 2, "bytes": 4e6, "flops": 1e9, "copy_gb_s": 4000.0, "product_tflop_s": 500.0}
    rows = [
        row(name, ms, case, dtype=dtype, **gpu)
        for dtype in ("float16", "bfloat16")
        for case in ("56x56", "28x28")
        for name, ms in (("triton", 0.01), ("aten", 0.1), ("timm, compiled", 0.05), ("flex", None))
    ]
    files = bench_op_plots.draw(rows, tmp_path)
    assert [x.name for x in files] == [
        "ops_window_forward_bias_float16.png", "ops_window_forward_bias_bfloat16.png"
    ]  # fmt: skip
    for file in files:
        pixels = np.asarray(Image.open(file).convert("RGB")).reshape(-1, 3)
        assert len(np.unique(pixels, axis=0)) > 20
    figure = bench_op_plots._figure(rows[:3])
    (axes,) = figure.axes
    texts = [text.get_text() for text in axes.get_legend().get_texts()]
    assert texts == ["triton", "aten", "timm, compiled", "copy or product"]
    assert [list(line.get_xdata()) for line in axes.lines] == [[0.01], [0.1], [0.05], [0.002]]
    frame, drawn = axes.get_legend().get_window_extent(), figure.bbox
    assert drawn.x0 <= frame.x0
    assert frame.y1 <= drawn.y1


def test_the_floor_is_what_takes_longer():
    figures = {"bytes": 4e6, "copy_gb_s": 4000.0, "product_tflop_s": 500.0}
    assert bench_op_plots.floor(row("a", 1)) is None
    assert bench_op_plots.floor(row("a", 1, flops=1e9, **figures)) == pytest.approx(0.002)
    assert bench_op_plots.floor(row("a", 1, flops=1e8, **figures)) == pytest.approx(0.001)


def test_nothing_timed(tmp_path):
    with pytest.raises(ValueError, match="plot: expected rows with a time, found none"):
        bench_op_plots.draw([row("a", None)], tmp_path)
