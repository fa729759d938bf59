"""`vitarium bench convert` measures both ways in processes of their own."""

import csv
import mmap
import sys
from functools import partial
from types import SimpleNamespace

import pytest
import torch

from vitarium.tools import bench_convert


def test_both_ways_are_timed_and_their_memory_is_watched(program, tmp_path, monkeypatch):
    small = partial(bench_convert.measure, entry="nat_atto")
    monkeypatch.setattr(bench_convert, "measure", small)
    file = tmp_path / "convert.csv"
    status, out, _ = program("bench", "convert", "--rounds", "1", "--csv", file)
    assert status == 0
    assert "vitarium convert" in out
    head, *lines = file.read_text().splitlines()
    assert torch.__version__ in head
    plain, ours = csv.DictReader(lines)
    assert float(ours["time_ratio"]) == pytest.approx(
        float(ours["wall_s"]) / float(plain["wall_s"]), abs=0.01
    )
    assert float(ours["file_mib"]) == pytest.approx(5.4, abs=0.1)
    assert ours["met"] in ("True", "False")
    if sys.platform == "linux":
        for row in (plain, ours):
            assert float(row["peak_mib"]) >= float(row["imports_mib"]) > 0
            assert float(row["memory_ratio"]) == pytest.approx(
                float(row["peak_mib"]) / float(row["file_mib"]), rel=0.05
            )


@pytest.mark.skipif(sys.platform != "linux", reason="memory is measured on Linux only")
def test_memory_that_a_process_takes_is_seen():
    size = 64 << 20
    private = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS  # fresh pages, which allocators may not give
    with bench_convert._PrivateMemory() as memory, mmap.mmap(-1, size, flags=private) as taken:
        for start in range(0, size, mmap.PAGESIZE):
            taken[start] = 1
        bench_convert.time.sleep(10 * bench_convert._PAUSE)
    assert memory.peak - memory.before == pytest.approx(size / 2**20, rel=0.5)


def test_too_little_space_is_said(program, monkeypatch):
    usage = SimpleNamespace(free=1000)
    monkeypatch.setattr(bench_convert.shutil, "disk_usage", lambda path: usage)
    status, _, err = program("bench", "convert", "--rounds", "1")
    assert status == 1
    assert "which has 1,000" in err
