"""What the benchmark of ops compares computes the same."""

import pytest
import torch

from vitarium.tools import bench, bench_ops
from vitarium.tools.bench_agent import Agent
from vitarium.tools.bench_channel import Channel
from vitarium.tools.bench_neighborhood import Neighborhood, Shape
from vitarium.tools.bench_neighborhood_parts import Mix, Scores
from vitarium.tools.bench_window import Window


@pytest.mark.parametrize("case", [Neighborhood, Scores, Mix])
@pytest.mark.parametrize("dilation", [1, 2, 3])
def test_peers_compute_neighborhoods(case, dilation, monkeypatch):
    monkeypatch.setattr(bench, "has_compiler", lambda: False)  # compiling takes minutes
    check_peers(case(11, 2, dilation, head_dim=8, kernel_size=3))


def test_peers_compute_channel_attention():
    check_peers(Channel(5, 9, 2, batch=3, head_dim=8))


@pytest.mark.parametrize("cosine", [False, True])
@pytest.mark.parametrize("shift", [0, 1])
def test_peers_compute_window_attention(shift, cosine):
    check_peers(Window(9, 14, 2, 4, shift, cosine, head_dim=8))


def test_peers_compute_agent_attention():
    check_peers(Agent((5, 9), 3, 2, batch=3, head_dim=8))


def check_peers(shape):
    for biased in shape.biases:
        inputs = shape.inputs(biased)
        with torch.no_grad():
            expected = shape.oracle(inputs)
            for name, candidate in shape.candidates(biased, backward=False).items():
                if not isinstance(candidate, str):
                    found = candidate(inputs).double()
                    assert (found - expected).abs().max() < 1e-5, name


def test_cases():
    titles = {op: [case.title for case in cases(False)] for op, cases in bench_ops._CASES.items()}
    assert titles["neighborhood"][3:] == [
        *(f"56x56 x 2 heads, dilation {dilation}" for dilation in (2, 4, 8)),
        *(f"28x28 x 4 heads, dilation {dilation}" for dilation in (2, 4)),
    ]
    assert titles["neighborhood_scores"] == titles["neighborhood_mix"]
    for cases in bench_ops._CASES.values():
        assert len(cases(True)) == 1
        for case in cases(False):
            if isinstance(case, Shape):
                assert case.kernel_size * case.dilation <= case.size
            passes = {bench_ops._pass(biased, True) for biased in case.biases}
            passes |= {bench_ops._pass(biased, False) for biased in case.biases}
            assert case.goals.keys() <= passes
