"""What the GPU benchmark compares computes the same, and costs what its rows say."""

import sys
from argparse import Namespace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from vitarium.ops import _triton
from vitarium.tools import bench_case, bench_gpu, bench_neighborhood
from vitarium.tools.bench_agent import Agent
from vitarium.tools.bench_channel import Channel
from vitarium.tools.bench_neighborhood import Neighborhood
from vitarium.tools.bench_routing import GATHER, Routing
from vitarium.tools.bench_window import Window

CASES = {
    "window": Window(8, 12, 2, 4, batch=2, head_dim=8),
    "shifted window": Window(9, 14, 2, 4, 1, batch=2, head_dim=8, pad=True),
    "neighborhood": Neighborhood((7, 10), 2, head_dim=8, kernel_size=3),
    "dilated neighborhood": Neighborhood((7, 10), 2, 2, head_dim=8, kernel_size=3),
    "routing": Routing(8, 12, 2, 5, 4, batch=2, head_dim=8),
    "padded routing": Routing(9, 13, 2, 5, 4, batch=2, head_dim=8),
    "agent": Agent((5, 9), 3, 2, head_dim=8),
    "channel": Channel(5, 9, 2, batch=2, head_dim=8),
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.filterwarnings("ignore:.*flex_attention")
def test_peers_compute_the_op(name):
    """Flex has no backward pass on a CPU; the gradients of all others are compared too."""
    case = CASES[name]
    for biased in case.biases:
        inputs = case.inputs(biased)
        expected = case.oracle(inputs)
        probe = torch.randn_like(expected)
        wanted = torch.autograd.grad(expected, list(inputs.values()), probe)
        peers = case.peers(biased, True, lambda function: function)
        assert {"FlexAttention, compiled", "FlexAttention twice, compiled"} & peers.keys()
        for peer, candidate in peers.items():
            if isinstance(candidate, str):
                continue
            with torch.set_grad_enabled(peer != "natten" and "Flex" not in peer):
                out = candidate(inputs)
            assert out.shape == expected.shape
            torch.testing.assert_close(out.double(), expected, rtol=0, atol=1e-5, msg=peer)
            if out.requires_grad:
                found = torch.autograd.grad(out, list(inputs.values()), probe.float())
                for a, b in zip(found, wanted, strict=True):
                    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4, msg=peer)


@pytest.mark.parametrize("name", ["shifted window", "neighborhood", "routing", "agent", "channel"])
def test_peers_compile_in_one_piece(name):
    """Else a compiled peer would be slower than it has to be. Flex is one call of torch's."""
    case = CASES[name]
    inputs = case.inputs(case.biases[-1])

    def compiled(function):
        return torch.compile(function, dynamic=False, backend="eager", fullgraph=True)

    torch.compiler.reset()
    peers = case.peers(case.biases[-1], False, compiled)
    peers["aten, compiled"] = compiled(lambda inputs: case.ours(inputs, "aten"))
    with torch.no_grad():
        expected = case.oracle(inputs)
        for peer, candidate in peers.items():
            if peer.endswith("compiled") and "Flex" not in peer:
                torch.testing.assert_close(
                    candidate(inputs).double(), expected, rtol=0, atol=1e-5, msg=peer
                )


@pytest.mark.parametrize("name", CASES)
def test_peers_compute_on_the_device_of_their_inputs(name, monkeypatch):
    """Fake tensors of a CUDA device have no values, but refuse to meet those of a CPU."""
    monkeypatch.setattr(_triton, "device_unsupported", lambda device: None)
    case = bench_case.placed(CASES[name], torch.device("cuda"), torch.bfloat16)
    with FakeTensorMode():
        for biased in case.biases:
            inputs = case.inputs(biased)
            found = case.peers(biased, True, lambda function: function)
            found |= {"aten": lambda x: case.ours(x, "aten"), "auto": case.ours}
            for peer, candidate in found.items():
                if callable(candidate) and "Flex" not in peer:
                    out = candidate(inputs)
                    assert (out.device.type, out.dtype) == ("cuda", torch.bfloat16), peer
                    assert out.shape == bench_case.cost(case, biased, False).shape


def test_why_peers_do_not_take_part():
    def plain(function):
        return function

    assert (
        "head_dim of H * W = 45"
        in CASES["channel"].peers(False, True, plain)["FlexAttention, compiled"]
    )
    peers = CASES["neighborhood"].peers(True, True, plain)
    assert peers["natten"] == "takes no position bias"
    large = Neighborhood((200, 304), 2, batch=1)
    reason = "the indices of its mask take 27.5 GiB"
    assert large.peers(True, False, plain)["dense SDPA, float mask, compiled"] == reason
    routed = Routing(56, 56, 2, 1, batch=2048, dtype=torch.float16)
    assert routed.peers(False, True, plain)[f"{GATHER}, compiled"] == (
        "its gradient takes 37.5 GiB for the keys alone"
    )
    assert callable(routed.peers(False, False, plain)[GATHER])


@pytest.mark.parametrize("kernels", [False, True])
def test_natten_without_kernels_is_no_peer(monkeypatch, kernels):
    monkeypatch.setitem(sys.modules, "natten", Namespace(HAS_LIBNATTEN=kernels))
    reason = bench_neighborhood.without_natten(torch.device("cuda"))
    assert reason == (None if kernels else "installed without its CUDA kernels (libnatten)")
    monkeypatch.setitem(sys.modules, "natten", None)
    assert bench_neighborhood.without_natten(torch.device("cuda")) == "not installed"


# By hand: maps of B * H * W * heads * head_dim numbers of 2 bytes; products of 2 FLOPs.
@pytest.mark.parametrize(
    ("case", "maps", "parameters", "products"),
    [
        # scores and mixing with the 16 keys of a window; backward: five such products
        (Window(8, 8, 2, 4, batch=3, head_dim=8), 3 * 64 * 16, 2 * 7 * 7, (2 * 16, 5 * 16)),
        # rows that complete a window are free, their keys are not
        (
            Window(6, 8, 2, 4, batch=3, head_dim=8, pad=True),
            3 * 48 * 16,
            2 * 7 * 7 + 3 * 16,
            (2 * 16, 5 * 16),
        ),
        (
            Neighborhood((6, 8), 2, batch=3, head_dim=8, kernel_size=3),
            3 * 48 * 16,
            2 * 5 * 5,
            (2 * 9, 5 * 9),
        ),
        # every query has 5 regions of 6 keys
        (Routing(8, 12, 2, 5, 4, batch=3, head_dim=8), 3 * 96 * 16, None, (2 * 30, 5 * 30)),
        # agents and tokens, then tokens and agents: two attentions of 9 keys a token
        (Agent((5, 9), 3, 2, batch=3, head_dim=8), 3 * 45 * 16, 2 * 2 * 9 * 45, (4 * 9, 10 * 9)),
        # scores and mixing of 8 channels; the weights are kept for the backward pass
        (Channel(5, 9, 2, batch=3, head_dim=8), 3 * 45 * 16, None, (2 * 8, 4 * 8)),
    ],
)
def test_costs(case, maps, parameters, products):
    case = bench_case.placed(case, torch.device("cpu"), torch.bfloat16)
    biased = parameters is not None
    forward = bench_case.cost(case, biased, False)
    assert forward.bytes == 2 * (4 * maps + (parameters or 0))
    assert forward.flops == 2 * maps * products[0]
    assert forward.shape == case.ours(case.inputs(biased)).shape
    both = bench_case.cost(case, biased, True)
    assert both.bytes == 2 * (4 * maps + (parameters or 0) + 7 * maps)
    assert both.flops == 2 * maps * sum(products)


def test_shapes_are_the_models():
    cases = {name: native("224") for name, native in bench_gpu._NATIVE.items()}
    titles = {name: [case.title for case in found] for name, found in cases.items()}
    assert titles["channel"] == [
        *("56x56 x 3 heads", "28x28 x 6 heads", "14x14 x 12 heads", "7x7 x 24 heads")
    ]
    assert titles["agent"] == [
        *("56x56 x 3 heads, 9 agents", "28x28 x 6 heads, 16 agents"),
        "14x14 x 12 heads, 49 agents",
    ]
    assert titles["routing"] == [
        *("56x56 x 2 heads, 1 of 7 x 7 regions", "28x28 x 4 heads, 4 of 7 x 7 regions"),
        "14x14 x 8 heads, 16 of 7 x 7 regions",
    ]
    assert titles["neighborhood"] == [
        *("56x56 x 2 heads", "28x28 x 4 heads", "14x14 x 8 heads", "7x7 x 16 heads"),
        *("56x56 x 2 heads, dilation 8", "28x28 x 4 heads, dilation 4"),
        "14x14 x 8 heads, dilation 2",
    ]
    swin = [case for case in cases["window"] if case.biases == (True,)]
    assert [(case.height, case.shift_size) for case in swin] == [
        *((56, 0), (56, 3), (28, 0), (28, 3), (14, 0), (14, 3), (7, 0))
    ]
    assert len(cases["window"]) == len(swin) + 4  # DaViT's, without a bias
    assert {case.batch for found in cases.values() for case in found} == {128}
    large = {name: native("800x1216") for name, native in bench_gpu._NATIVE.items()}
    assert {case.batch for found in large.values() for case in found} == {2}
    assert large["neighborhood"][0].sizes == (200, 304)
    assert all(case.pad for case in large["window"])
