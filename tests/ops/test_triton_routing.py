"""Triton kernels of bi-level routing attention, in the interpreter: tiny maps, all modes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import harness
import pytest
import torch
from calls_routing import CALLS
from golden import op_case, sample
from harness import flops, gradients, in_interpreter, random_maps, record
from test_routing import FORMS, GOLDENS
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from vitarium.ops import _triton, explain, routing_attention
from vitarium.ops.routing_attn import triton_launch

pytestmark = [
    pytest.mark.usefixtures("nan_memory"),
    in_interpreter,
]

# (H, W), num_regions, topk, padded with pad
SHAPES = {
    "one block of keys": ((4, 6), 2, 2, False),
    "several blocks of keys": ((4, 18), (1, 3), 2, False),
    "several blocks of queries": ((14, 5), (2, 1), 1, False),
    "completed with pad": ((5, 7), (2, 3), 3, True),
    "completed with zeros": ((5, 7), (2, 3), 3, False),
    "masked": ((4, 6), (2, 3), 5, False),
    "masked, completed with pad": ((3, 11), (2, 6), 7, True),
    "masked, completed with zeros": ((5, 4), 2, 5, False),
    "all regions": ((4, 9), (2, 3), 6, True),
    "regions of padding": ((3, 5), (5, 4), 4, True),
    "regions of one token": ((2, 4), (2, 4), 3, False),
    "one token": ((1, 1), 1, 1, False),
    "one token among padding": ((1, 1), 3, 2, True),
    "one region": ((6, 5), 1, 1, False),
}


def inputs(
    size: tuple[int, int],
    padded: bool = False,
    dtype: torch.dtype = torch.float32,
    batch: int = 1,
    heads: int = 2,
    head_dim: int = 8,
) -> dict[str, Tensor]:
    """Random leaves, strided like three views of one projection."""
    found, normal = random_maps(size, dtype, batch, heads, head_dim)
    if padded:
        found["pad"] = normal(3, heads, head_dim)
    return {name: x.requires_grad_() for name, x in found.items()}


def owned(leaves: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: x.detach().requires_grad_() for name, x in leaves.items()}


def computed(leaves: dict[str, Tensor], args: dict[str, Any], impl: str) -> dict[str, Tensor]:
    return harness.computed(routing_attention, owned(leaves), impl, **args)


def assert_as_exact_as_aten(leaves: dict[str, Tensor], args: dict[str, Any]) -> None:
    harness.assert_as_exact_as_aten(routing_attention, owned(leaves), few=8, **args)


@pytest.mark.parametrize(
    "path",
    [
        pytest.param(path, id=path.stem, marks=[] if path.stem.endswith("_4") else pytest.mark.slow)
        for path in GOLDENS
        if not op_case(path.with_suffix(""))[0].get("soft_routing")
    ],
)
def test_golden(path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """As near to the authors' numbers as ATen in float32."""
    d, *given, probe, expected = op_case(path.with_suffix(""))
    expected.pop("region_index", None)
    x, parameters = ({n: y.detach().float().requires_grad_() for n, y in z.items()} for z in given)
    leaves = {**x, **parameters}
    found = {}
    for impl in ("aten", "triton"):
        out = FORMS[d["form"]](d, x, parameters, impl)
        grads = torch.autograd.grad((out * probe.float()).sum(), list(leaves.values()))
        found[impl] = {"out": out} | {f"grad_{n}": g for n, g in zip(leaves, grads, strict=True)}
    for name, y in expected.items():
        aten, error = ((sample(found[n][name]) - y).abs().max() for n in ("aten", "triton"))
        assert error <= 3 * aten + 4 * torch.finfo(torch.float32).eps * y.abs().max(), name


@pytest.mark.parametrize("shape", SHAPES)
def test_equals_the_definition(shape: str) -> None:
    size, num_regions, topk, padded = SHAPES[shape]
    args = {"num_regions": num_regions, "topk": topk, "scale": 0.4}
    assert_as_exact_as_aten(inputs(size, padded, batch=2), args)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", ["several blocks of keys", "completed with pad", "masked"])
def test_half_precision(shape: str, dtype: torch.dtype) -> None:
    size, num_regions, topk, padded = SHAPES[shape]
    args = {"num_regions": num_regions, "topk": topk}
    assert_as_exact_as_aten(inputs(size, padded, dtype, head_dim=32), args)


@pytest.mark.parametrize("head_dim", [16, 24, 48, 80, 128])
def test_head_dims(head_dim: int) -> None:
    args = {"num_regions": (1, 2), "topk": 1}
    assert_as_exact_as_aten(inputs((3, 5), True, heads=1, head_dim=head_dim), args)


@pytest.mark.parametrize("dims", [(8, 24), (24, 8)])
def test_values_may_have_other_channels(dims: tuple[int, int]) -> None:
    leaves = inputs((4, 6), head_dim=dims[0])
    leaves["value"] = inputs((4, 6), head_dim=dims[1])["value"]
    assert_as_exact_as_aten(leaves, {"num_regions": 2, "topk": 3})


def test_layouts() -> None:
    """Heads before positions, cropped maps, and a last stride that is not one."""
    x = torch.randn(2, 3, 6, 5, 8)
    views = [x.permute(0, 2, 3, 1, 4), torch.randn(2, 8, 9, 3, 8)[:, 1:7, 2:7]]
    views.append(torch.randn(2, 6, 5, 3, 16)[..., ::2])
    for maps in (views, views[1:] + views[:1]):
        leaves = dict(zip(("query", "key", "value"), maps, strict=True))
        assert_as_exact_as_aten(leaves, {"num_regions": (2, 1), "topk": 1})


@pytest.mark.parametrize("padded", [False, True])
def test_parts_of_large_regions(padded: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Means that several programs add up choose as one sum does."""
    monkeypatch.setattr(triton_launch, "_SPAN", 30)
    leaves = {n: x.detach() for n, x in inputs((13, 17), padded, heads=1, head_dim=2).items()}
    cut = triton_launch.cuts((13, 17), (2, 2), padded)
    chosen = triton_launch._choose(leaves["query"], leaves["key"], leaves.get("pad"), cut, 2)
    maps = (leaves["query"], leaves["key"], leaves["value"], leaves.get("pad"))
    wanted = torch.ops.vitarium.routing_attention_aten(*maps, None, None, (2, 2), 2, 0.3)[2]
    assert torch.equal(chosen.sort(-1).values, wanted.sort(-1).values)


@pytest.mark.parametrize("shape", ["one block of keys", "several blocks of keys", "masked"])
def test_every_configuration_gives_the_same(shape: str, monkeypatch: pytest.MonkeyPatch) -> None:
    size, num_regions, topk, padded = SHAPES[shape]
    leaves = inputs(size, padded, heads=1)
    args = {"num_regions": num_regions, "topk": topk}
    launch, seen = _triton.launch, {}

    def one(kernel: Any, grid: Any, arguments: Any, configs: Any, key: Any = ()) -> None:
        assert set(key) <= set(arguments)
        seen[kernel.__name__] = len(configs)
        launch(kernel, grid, arguments, [configs[min(wanted, len(configs) - 1)]], key)

    monkeypatch.setattr(_triton, "launch", one)
    wanted = 0
    expected = computed(leaves, args, "triton")
    assert len(seen) == 4
    assert max(seen.values()) <= 8
    for wanted in range(1, max(seen.values())):
        for name, x in computed(leaves, args, "triton").items():
            torch.testing.assert_close(x, expected[name], msg=f"{wanted}: {name}")


def test_divisions_are_exact() -> None:
    """What the kernels compute with the numbers that divide for them."""
    for divisor in (1, 2, 3, 7, 10, 29, 4096, 60800, 2**20 - 1, 2**31 - 1):
        over = triton_launch._over(divisor)
        factor, shift = over & 0xFFFFFFFF, (over >> 32) - 1
        assert over >> 32 > 0
        assert factor >> 31 == 1
        for x in {0, 1, divisor - 1, divisor, 7 * divisor - 1, 2**31 - 1, 2**30 + 1}:
            if x < 2**31:
                assert (2 * x * factor >> 32) >> shift == x // divisor


@pytest.mark.parametrize("padded", [False, True])
def test_opcheck(padded: bool) -> None:
    ops = torch.ops.vitarium
    x = inputs((3, 5), padded)
    maps = (x["query"], x["key"], x["value"], x.get("pad"))
    args = (*maps, (2, 2), 2, 0.3)
    torch.library.opcheck(ops.routing_attention_triton, args)
    plain = [x.detach() if isinstance(x, Tensor) else x for x in args]
    found = ops.routing_attention_triton(*plain)
    args = (torch.randn_like(found[0]), *plain[:4], *found, (2, 2), 0.3)
    torch.library.opcheck(ops.routing_attention_triton_backward, args)


def test_only_wanted_gradients() -> None:
    leaves = inputs((3, 5), True)
    leaves["key"] = leaves["key"].detach()
    out = routing_attention(**leaves, num_regions=2, topk=2, impl="triton")
    out.sum().backward()
    assert leaves["key"].grad is None
    assert all(leaves[n].grad is not None for n in ("query", "value", "pad"))


def test_second_derivatives_are_refused() -> None:
    leaves = inputs((3, 5))
    out = routing_attention(**leaves, num_regions=1, topk=1, impl="triton")
    (grad,) = torch.autograd.grad(out.sum(), leaves["query"], create_graph=True)
    with pytest.raises(RuntimeError, match="has no gradient; impl='reference'"):
        grad.sum().backward()


def test_repeatable() -> None:
    leaves = inputs((5, 7), True)
    runs = [computed(leaves, {"num_regions": 2, "topk": 3}, "triton") for _ in range(2)]
    assert all(torch.equal(runs[0][name], x) for name, x in runs[1].items())


@pytest.mark.parametrize("padded", [False, True])
def test_compile_fullgraph(padded: bool) -> None:
    leaves = inputs((3, 5), padded)
    args = dict(leaves, num_regions=2, topk=2)
    expected = routing_attention(**args, impl="reference")
    wanted = gradients(expected, leaves)
    torch._dynamo.reset()
    compiled = torch.compile(routing_attention, fullgraph=True, backend="aot_eager")
    out = compiled(**args, impl="triton")
    torch.testing.assert_close(out, expected)
    for name, grad in gradients(out, leaves).items():
        torch.testing.assert_close(grad, wanted[name], msg=name)


def test_one_program_for_many_batches() -> None:
    counter = CompileCounterWithBackend("eager")
    torch._dynamo.reset()
    compiled = torch.compile(routing_attention, fullgraph=True, backend=counter)
    for batch in (2, 3, 4):
        x = {n: y.detach() for n, y in inputs((3, 5), batch=batch, heads=1).items()}
        expected = routing_attention(**x, num_regions=1, topk=1, impl="reference")
        out = compiled(**x, num_regions=1, topk=1, impl="triton")
        torch.testing.assert_close(out, expected)
    assert counter.frame_count <= 2


class Attention(torch.nn.Module):
    """What `torch.export` takes."""

    def __init__(self, impl: str | None) -> None:
        super().__init__()
        self.impl = impl

    def forward(self, x: dict[str, Tensor]) -> Tensor:
        return routing_attention(**x, num_regions=2, topk=2, impl=self.impl)


@pytest.mark.parametrize("impl", ["triton", None])
def test_export(impl: str | None) -> None:
    leaves = {n: x.detach() for n, x in inputs((3, 5), True).items()}
    program = torch.export.export(Attention(impl), (leaves,))
    targets = {str(node.target) for node in program.graph.nodes}
    assert any("routing_attention_triton" in target for target in targets) == (impl == "triton")
    expected = routing_attention(**leaves, num_regions=2, topk=2, impl="reference")
    torch.testing.assert_close(program.module()(leaves), expected)


def test_autocast_and_a_parameter_of_another_precision() -> None:
    leaves = inputs((3, 5), True)
    low = {n: x if n == "pad" else x.bfloat16() for n, x in leaves.items()}
    args = {"num_regions": 2, "topk": 2, "impl": "triton"}
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = routing_attention(**low, **args)
        exact = routing_attention(**leaves, **args)
    assert out.dtype == torch.bfloat16
    assert exact.dtype == torch.float32
    assert torch.equal(exact, routing_attention(**leaves, **args))
    out.float().sum().backward()
    assert leaves["pad"].grad is not None
    assert leaves["pad"].grad.dtype == torch.float32


@pytest.mark.parametrize("padded", [False, True])
def test_empty_batch(padded: bool) -> None:
    leaves = inputs((3, 5), padded, batch=0)
    out = routing_attention(**leaves, num_regions=2, topk=2, impl="triton")
    assert out.shape == leaves["query"].shape
    for name, grad in gradients(out, leaves).items():
        assert torch.equal(grad, torch.zeros_like(leaves[name])), name


def test_flops_are_those_of_aten() -> None:
    leaves = inputs((5, 7), True)
    args = dict(leaves, num_regions=2, topk=3)

    def training(impl: str) -> Callable[[], None]:
        return lambda: routing_attention(**args, impl=impl).sum().backward()

    assert flops(training("triton")) == flops(training("aten")) > 0


# Which implementation runs.


def test_which_implementation_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    x = {n: y.detach() for n, y in inputs((3, 5)).items()}
    args = dict(x, num_regions=1, topk=1)
    ran = record(monkeypatch, "routing")
    monkeypatch.delenv("VITARIUM_OPS", raising=False)
    routing_attention(**args)
    routing_attention(**args, impl="triton")
    assert ran == ["aten", "triton"]
    found = explain("routing", **args)
    assert (found.chosen, found.reasons["triton"]) == ("aten", None)
    assert found.reserved["triton"] == "its interpreter is for tests"
    monkeypatch.setattr(_triton, "reserved", lambda *_: None)
    assert explain("routing", **args).chosen == "triton"


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"dtype": torch.float64}, "float16, bfloat16 and float32, got torch.float64"),
        ({"head_dim": 136}, "a head_dim up to 128, got 136"),
        ({"soft_routing": True}, "kernels choose regions without weights, got soft_routing"),
        ({"batch": 65536}, "up to 65535 images, got 65536"),
        ({}, "kernels need a CUDA device, got cpu"),
    ],
)
def test_reasons(changes: dict[str, Any], reason: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if not changes:
        monkeypatch.setenv("TRITON_INTERPRET", "0")
    options = {n: changes[n] for n in ("soft_routing",) if n in changes}
    sizes = {n: x for n, x in changes.items() if n not in options}
    x = {n: y.detach() for n, y in inputs((1, 1), heads=1, **sizes).items()}
    args = dict(x, num_regions=1, topk=1, **options)
    assert reason in (explain("routing", **args).reasons["triton"] or "")
    with pytest.raises(ValueError, match=r"impl='triton' cannot run this routing call"):
        routing_attention(**args, impl="triton")


def test_calls_are_made_as_on_a_card(monkeypatch: pytest.MonkeyPatch) -> None:
    """The small maps on which kernels are compiled stand for the real ones."""
    found: list[Any] = []

    def note(kernel: Any, grid: Any, arguments: Any, configs: Any, key: Any = ()) -> None:
        modes = {n: x for n, x in arguments.items() if n.isupper()}
        found.append((kernel.__name__, modes, configs))

    monkeypatch.setattr(_triton, "launch", note)
    monkeypatch.setattr(
        triton_launch,
        "_choose",
        lambda query, key, pad, cut, topk: torch.zeros(
            len(query), cut[0].real * cut[1].real, topk, dtype=torch.long
        ),
    )
    for name, make in CALLS.items():
        both = []
        for tiny in (False, True):
            leaves, args = make(torch.bfloat16, torch.device("cpu"), tiny)
            leaves = {n: x.detach() for n, x in leaves.items()}
            found.clear()
            routing_attention(**leaves, **args, impl="triton")
            both.append(list(found))
        assert both[0] == both[1], name
