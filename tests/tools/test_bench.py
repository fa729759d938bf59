"""The benchmarks run, say what they compared, and refuse what they cannot do."""

import csv
import os

import pytest
import torch

from vitarium.tools import bench


def rows_of(path):
    head, *lines = path.read_text().splitlines()
    assert head.startswith("# ")
    assert torch.__version__ in head
    return list(csv.DictReader(lines))


def test_ops(program, tmp_path):
    file = tmp_path / "ops.csv"
    status, out, _ = program("bench", "ops", "--quick", "--rounds", "1", "--csv", file)
    assert status == 0
    assert out.count("best peer / ours") == 1
    rows = rows_of(file)
    assert len({row["pass"] for row in rows}) == 4
    for row in rows:
        assert row["note"] or float(row["ms"]) > 0
        assert row["note"] or float(row["max_error"]) < 1e-4
        assert row["note"] or float(row["peak_mib"]) > 0
    ran = {row["implementation"] for row in rows if not row["note"]}
    assert {"vitarium", "dense SDPA, float mask", "gather + einsum"} <= ran


def test_embed(program, tmp_path):
    file = tmp_path / "embed.csv"
    argv = ("nat_atto", "--images", 3, "--batch-size", 2, "--workers", 0, "--rounds", 1)
    status, out, _ = program("bench", "embed", *argv, "--csv", file)
    assert status == 0
    assert "bare images/s" in out
    (row,) = rows_of(file)
    assert float(row["ratio"]) == pytest.approx(
        float(row["embed_images_per_s"]) / float(row["bare_images_per_s"]), abs=2e-3
    )
    assert row["met"] == str(float(row["ratio"]) >= 0.9)


def test_startup(program):
    status, out, _ = program("bench", "startup", "--rounds", "1")
    assert status == 0
    assert "import vitarium over import timm" in out


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (("ops", "neighbourhood"), "bench ops: expected ops among neighborhood"),
        (("ops", "--device", "meta"), "--device: expected cpu or cuda, got 'meta'"),
        (("ops", "--csv", "no/such/folder/x.csv"), "--csv: no folder no/such/folder"),
        (("startup", "--rounds", "0"), "--rounds: expected a positive number, got 0"),
        (("ops", "--threads", "-1"), "--threads: expected a positive number, got -1"),
    ],
)
def test_refusals(program, argv, message):
    status, _, err = program("bench", *argv)
    assert status == 1
    assert err.startswith(f"vitarium: error: {message}")
    assert err.count("\n") == 1


def test_turns():
    calls = []

    def fast():
        calls.append("fast")

    def slow():
        calls.append("slow")
        sum(range(2_000_000))

    times = bench.interleaved({"fast": fast, "slow": slow}, rounds=3, seconds=1)
    assert 0 <= times["fast"] < times["slow"]
    assert calls.index("slow") < len(calls) - 1 - calls[::-1].index("fast")


def test_peak_memory():
    def function():
        a = torch.zeros(1 << 18)  # 1 MiB
        b = a + 1
        del a
        return b + 1

    assert bench.peak_memory(function) == pytest.approx(2, abs=0.1)


def test_other_load_is_that_of_others():
    others = bench.OtherLoad()
    others._before = (others._before[0] - 10, others._before[1] - 5)
    assert others.cores() >= 2
    here = bench.OtherLoad()
    sum(range(3_000_000))
    busy, wall = (b - a for a, b in zip(here._before, here._seconds(), strict=True))
    assert busy < wall * os.cpu_count()


def test_compile_is_told_the_models(program, tmp_path, monkeypatch):
    def measure(console, names):
        return [{"model": name, "graphs": 1} for name in names]

    monkeypatch.setattr("vitarium.tools.bench_compile.measure", measure)
    file = tmp_path / "compile.csv"
    status, out, _ = program("bench", "compile", "nat_atto", "nat_mini", "--csv", file)
    assert status == 0
    assert out.endswith(f"wrote {file}\n")
    assert [row["model"] for row in rows_of(file)] == ["nat_atto", "nat_mini"]
