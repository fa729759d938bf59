"""`bench compile` counts programs as they are, and says what it did not measure."""

import io

import pytest
import torch
from rich.console import Console
from torch import nn

from vitarium.backbones._registry import entries
from vitarium.tools import _common, bench_compile


def measure(*names):
    console = Console(file=io.StringIO(), width=160)
    return bench_compile.measure(console, names), console.file.getvalue()


class Breaking(nn.Module):
    def forward(self, x):
        x = x + 1
        torch._dynamo.graph_break()
        return x * x.sum()


class Specialized(nn.Module):
    """A program of its own for every width."""

    def forward(self, x):
        return x * sum(range(int(x.shape[-1])))


def test_graph_breaks_and_recompiles_are_counted():
    shapes = [(2, 3, 8, width) for width in (8, 9, 10, 9)]
    found = bench_compile.programs(Breaking(), shapes[:1])
    assert (found["graphs"], found["graph_breaks"], found["recompiles"]) == (2, 1, 0)
    assert found["note"]
    found = bench_compile.programs(Specialized(), shapes)
    assert (found["graphs"], found["graph_breaks"], found["recompiles"]) == (1, 0, 2)
    found = bench_compile.programs(nn.Softmax(-1), shapes)
    assert (found["graphs"], found["graph_breaks"], found["recompiles"]) == (1, 0, 1)
    assert found["shapes"].startswith("2x3x8x8 2x3x8x9 ")


def test_a_fixed_input_size_leaves_the_batch():
    (row,), printed = measure("test_vit")
    assert row["change"] == "batch"
    assert row["note"] == "H x W are fixed"
    assert row["met"]
    assert row["shapes"] == "1x3x160x160 2x3x160x160 3x3x160x160 5x3x160x160"
    for word in ("test_vit, batch", "<= 1", "met", "H x W are fixed"):
        assert word in printed


def test_missed_goals_are_called_missed(monkeypatch):
    found = {"shapes": "", "graphs": 3, "graph_breaks": 2, "recompiles": 0, "note": "print"}
    monkeypatch.setattr(bench_compile, "programs", lambda *_: {**found, "max_error": 0.0})
    (row,), printed = measure("test_vit")
    assert not row["met"]
    assert "MISSED" in printed
    assert row["note"] == "H x W are fixed; print"


def test_every_small_model_of_ours_by_default(monkeypatch):
    found = {"shapes": "", "graphs": 1, "graph_breaks": 0, "recompiles": 0, "note": ""}
    monkeypatch.setattr(bench_compile, "programs", lambda *_: {**found, "max_error": 0.0})
    rows, _ = measure()
    assert {row["model"] for row in rows} == {n for n in entries() if n.endswith("_atto")}


def test_names():
    assert _common.model_names(["nat_[am]*", "nat_atto"]) == ["nat_atto", "nat_mini"]
    with pytest.raises(ValueError, match=r"no model matches 'mat_\*'"):
        measure("mat_*")
    with pytest.raises(ValueError, match="unknown model 'nat_tinny'"):
        measure("nat_tinny")
