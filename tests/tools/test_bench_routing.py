"""Routing attention's peers compute the same, by themselves and in a whole model."""

import io

import pytest
import torch
from rich.console import Console

from vitarium.tools import bench_routing
from vitarium.tools.bench_routing import GATHER, OURS, SELECT, Routing


@pytest.mark.parametrize("size", [(8, 12), (9, 13)])
def test_peers_compute_the_op(size):
    case = Routing(*size, heads=2, topk=5, num_regions=4, batch=2, head_dim=8)
    inputs = case.inputs(False)
    expected = case.oracle(inputs)
    probe = torch.randn_like(expected)
    wanted = torch.autograd.grad(expected, list(inputs.values()), probe)
    for name, candidate in case.candidates(False, True).items():
        out = candidate(inputs)
        torch.testing.assert_close(out.double(), expected, rtol=0, atol=1e-5, msg=name)
        found = torch.autograd.grad(out, list(inputs.values()), probe.float())
        for a, b in zip(found, wanted, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4, msg=name)


def test_what_takes_too_much_memory_is_left_out():
    case = next(c for c in bench_routing.cases(False) if (c.height, c.num_regions) == (200, 16))
    assert isinstance(case.candidates(False, True)[GATHER], str)
    assert callable(case.candidates(False, False)[GATHER])


def test_training_steps():
    out = io.StringIO()
    rows, verdicts = bench_routing.training_steps(
        Console(file=out, width=140), 1, size=(64, 80), model="biformer_atto"
    )
    assert [row["implementation"] for row in rows] == [OURS, GATHER, SELECT] * 2
    for row in rows:
        assert row["ms"] > 0
        assert row["peak_mib"] > 0
        assert row["max_error"] < 1e-4
    assert [v[0].rpartition(", ")[2] for v in verdicts] == ["time", "peak memory"] * 2
    assert [v[3] for v in verdicts] == [">= 2", ">= 3"] * 2
    assert "biformer_atto 64x80, 16 x 16 regions, training step" in out.getvalue()


def test_without_memory_nothing_runs(monkeypatch):
    monkeypatch.setattr(bench_routing, "_free_gib", lambda: 1.5)
    out = io.StringIO()
    rows, verdicts = bench_routing.training_steps(Console(file=out, width=140), 1)
    assert verdicts == []
    assert {row["note"] for row in rows} == {"needs 8 GiB of memory, 1.5 are free"}
    assert out.getvalue().count("not run: torch.gather + softmax: needs 8 GiB") == 2
