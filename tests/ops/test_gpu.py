"""The Triton kernels on a card: numbers at real shapes, races, graphs, compilation.

``make gpu`` runs this; what needs no card stands in ``test_triton_*.py``.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any

import pytest
import timm
import torch
import torch._dynamo
from harness import gradients
from torch import Tensor
from torch.utils._pytree import tree_map

import vitarium.ops
from vitarium.ops import _triton, explain, use_impl

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

CUDA = torch.device("cuda")
DTYPES = (torch.float16, torch.bfloat16, torch.float32)
Make = Callable[[torch.dtype, torch.device, bool], tuple[dict[str, Tensor], dict[str, Any]]]
CALLS: dict[str, Make] = {
    f"{op}: {name}": make
    for op in ("window", "neighborhood", "routing", "agent", "channel")
    for name, make in import_module(f"calls_{op}").CALLS.items()
}
ATTOS = [
    *("nat_atto", "dinat_atto", "biformer_atto", "agent_swin_atto", "agent_deit_atto"),
    *("fused_swin_atto", "fused_swinv2_atto", "fused_davit_atto"),
]


def function(call: str) -> Callable[..., Any]:
    return getattr(vitarium.ops, call.split(":")[0] + "_attention")


def computed(call: str, leaves: dict[str, Tensor], rest: dict[str, Any], impl: str) -> Any:
    """The output and the gradients of all leaves, by name."""
    out = function(call)(**leaves, **rest, impl=impl)
    outs = list(out) if isinstance(out, tuple) else [out]
    joined = torch.cat([x.flatten(1) for x in outs], 1)[..., None, None]
    return {"out": joined.detach()} | gradients(joined, leaves)


def _double(x: Any) -> Any:
    return x.detach().double() if isinstance(x, Tensor) else x


def _copied(leaves: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: _double(x).requires_grad_() for name, x in leaves.items()}


def assert_as_exact_as_aten(call: str, dtype: torch.dtype, tiny: bool = False) -> None:
    leaves, rest = function_inputs(call, dtype, tiny)
    reason = explain(call.split(":")[0], **leaves, **rest).reasons["triton"]
    if reason is not None:
        pytest.skip(reason)
    exact = {k: tree_map(_double, x) for k, x in rest.items()}
    expected = computed(call, _copied(leaves), exact, "reference")
    aten = computed(call, leaves, rest, "aten")
    found = computed(call, leaves, rest, "triton")
    for name, x in expected.items():
        floor = 4 * torch.finfo(dtype).eps * x.abs().max()
        allowed = 3 * (aten[name].double() - x).abs().max() + floor
        error = (found[name].double() - x).abs().max()
        assert error <= allowed, f"{name}: error {error:.2e}, allowed {allowed:.2e}"


def function_inputs(call: str, dtype: torch.dtype, tiny: bool) -> Any:
    torch.manual_seed(0)
    return CALLS[call](dtype, CUDA, tiny)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("call", CALLS)
def test_kernels_are_as_exact_as_aten(call: str, dtype: torch.dtype) -> None:
    assert_as_exact_as_aten(call, dtype)


@pytest.mark.parametrize("call", CALLS)
def test_nothing_is_read_that_was_not_written(call: str, nan_memory: None) -> None:
    assert_as_exact_as_aten(call, torch.bfloat16)


@pytest.mark.parametrize("call", CALLS)
def test_repeated_runs_are_equal_to_the_bit(call: str) -> None:
    leaves, rest = function_inputs(call, torch.bfloat16, False)
    expected = computed(call, leaves, rest, "triton")
    noise = torch.randn(2048, 2048, device=CUDA)
    other = torch.cuda.Stream()
    for _ in range(20):
        with torch.cuda.stream(other):  # other work moves programs to other moments
            noise = (noise @ noise).tanh()
        for name, x in computed(call, leaves, rest, "triton").items():
            assert torch.equal(x, expected[name]), name


@pytest.mark.parametrize("call", CALLS)
def test_every_configuration_gives_the_same(call: str, monkeypatch: pytest.MonkeyPatch) -> None:
    leaves, rest = function_inputs(call, torch.float16, False)
    launch, wanted = _triton.launch, [0]

    def one(kernel: Any, grid: Any, arguments: Any, configs: Any, key: Any = ()) -> None:
        launch(kernel, grid, arguments, [configs[min(wanted[0], len(configs) - 1)]], key)

    monkeypatch.setattr(_triton, "launch", one)
    expected = computed(call, leaves, rest, "triton")
    for wanted[0] in range(1, 8):
        for name, x in computed(call, leaves, rest, "triton").items():
            spread = expected[name].double().abs().max()
            torch.testing.assert_close(x, expected[name], rtol=0, atol=float(8e-3 * spread))


@pytest.mark.parametrize("call", CALLS)
def test_compiles_without_breaks_and_with_graphs(call: str) -> None:
    leaves, rest = function_inputs(call, torch.bfloat16, False)
    expected = computed(call, leaves, rest, "triton")
    torch._dynamo.reset()
    compiled = torch.compile(function(call), fullgraph=True, mode="reduce-overhead")
    for _ in range(3):  # warm up, record, replay
        torch.compiler.cudagraph_mark_step_begin()
        out = compiled(**leaves, **rest, impl="triton")
        out = torch.cat([x.flatten(1) for x in (out if isinstance(out, tuple) else (out,))], 1)
        found = {"out": out.detach().clone()[..., None, None]}
        found |= {k: x.clone() for k, x in gradients(out[..., None, None], leaves).items()}
    for name, x in expected.items():
        torch.testing.assert_close(found[name], x, rtol=1e-2, atol=1e-2 * float(x.abs().max()))


@pytest.mark.parametrize("call", CALLS)
def test_captured_graphs_see_new_values(call: str) -> None:
    leaves, rest = function_inputs(call, torch.bfloat16, False)
    leaves = {name: x.detach() for name, x in leaves.items()}

    def run() -> Tensor:
        out = function(call)(**leaves, **rest, impl="triton")
        return out[1] if isinstance(out, tuple) else out

    run()  # tunes and fills what is kept per size
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = run()
    leaves["value"].normal_()
    leaves["query"].normal_()
    graph.replay()
    assert torch.equal(out, run())


@pytest.mark.parametrize("call", CALLS)
def test_sanitizer(call: str) -> None:
    """Small enough to run under compute-sanitizer."""
    leaves, rest = function_inputs(call, torch.bfloat16, True)
    for x in computed(call, leaves, rest, "triton").values():
        assert x.isfinite().all()


@pytest.mark.parametrize("call", CALLS)
def test_auto_runs_kernels_or_says_why_not(call: str) -> None:
    leaves, rest = function_inputs(call, torch.bfloat16, True)
    found = explain(call.split(":")[0], **leaves, **rest)
    assert found.reasons["triton"] is None
    assert found.chosen == "triton" or found.reserved["triton"]


@pytest.mark.parametrize("name", ATTOS)
def test_models_run_on_kernels(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=7).cuda()
    image = torch.randn(2, 3, 97, 150, device=CUDA)
    launches = []
    launch = _triton.launch

    def spy(kernel: Any, *args: Any, **kwargs: Any) -> None:
        launches.append(kernel.__name__)
        launch(kernel, *args, **kwargs)

    monkeypatch.setattr(_triton, "launch", spy)

    def step() -> list[Tensor]:
        model.zero_grad()
        logits = model(image)
        logits.square().sum().backward()
        return [
            logits.detach(),
            *(p.grad.clone() for p in model.parameters() if p.grad is not None),
        ]

    found = step()
    assert any("_fwd_" in x for x in launches)
    assert any("_bwd_" in x for x in launches)
    with use_impl("aten"):
        expected = step()
    for x, y in zip(found, expected, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-2, atol=1e-2 * float(y.abs().max()) + 1e-6)
    with torch.autocast("cuda", torch.bfloat16), torch.no_grad():
        low = model.eval()(image)
        exact = model.float()(image)
    torch.testing.assert_close(low.float(), exact.float(), rtol=0.1, atol=0.1)


@pytest.mark.parametrize("name", ATTOS)
def test_compiled_models_take_any_batch(name: str) -> None:
    torch._dynamo.reset()
    model = timm.create_model(name).cuda().eval()
    compiled = torch.compile(model, fullgraph=True)
    size = tuple(model.default_cfg["input_size"][1:])
    counted = torch._dynamo.utils.counters
    counted.clear()
    with torch.no_grad():
        for batch in (2, 3, 5, 8, 13):
            image = torch.randn(batch, 3, *size, device=CUDA)
            torch.testing.assert_close(compiled(image), model(image), rtol=1e-2, atol=1e-2)
    assert counted["stats"]["unique_graphs"] <= 3
