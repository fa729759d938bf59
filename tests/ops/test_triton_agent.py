"""The kernels of agent attention in Triton's interpreter."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import harness
import pytest
import torch
import torch.nn.functional as F
from golden import op_case, sample
from harness import flops, gradients, in_interpreter, record
from test_agent_attention import GOLDENS, SHAPES, Attention, attend, composed, inputs
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from vitarium.ops import _triton, agent_attention, explain
from vitarium.ops.agent_attn import triton_launch

pytestmark = [
    pytest.mark.usefixtures("nan_memory"),
    in_interpreter,
]


@pytest.fixture(autouse=True)
def kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Calls of a test run the kernels, unless it says otherwise."""
    pytest.importorskip("triton")
    monkeypatch.setenv("VITARIUM_OPS", "triton")


@pytest.fixture
def large_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fewer programs, for the interpreter's sake."""
    for name in ("_FEW_EXACT", "_MANY"):
        monkeypatch.setattr(triton_launch, name, [_triton.Config({"BLOCK_T": 128})])


def copied(leaves: dict[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    return {name: x.detach().to(dtype).requires_grad_() for name, x in leaves.items()}


def attending(agent_size: Any) -> Callable[..., Tensor]:
    """All tokens' attention as a function of leaves."""
    return lambda impl, **leaves: attend(leaves, agent_size, impl=impl)


def computed(leaves: dict[str, Tensor], agent_size: Any, impl: str = "triton") -> dict[str, Tensor]:
    return harness.computed(attending(agent_size), leaves, impl)


def assert_as_exact_as_aten(leaves: dict[str, Tensor], agent_size: Any) -> None:
    harness.assert_as_exact_as_aten(attending(agent_size), leaves)


# Numbers.


def from_golden(path: Path, dtype: torch.dtype, impl: str) -> tuple[dict[str, Tensor], Any]:
    description, x, _, probe, expected = op_case(path.with_suffix(""))
    x = {name: y.detach().to(dtype).requires_grad_() for name, y in x.items()}
    d = description["params"]
    height, width, heads = d["H"], d["W"], d["heads"]
    first, second = composed(x, "an ah aw", d), composed(x, "na ha wa", d).mT
    classes = d["mode"] == "cls_token"
    if classes:
        first = torch.cat([x["ac_bias"][0], first], 2)
        second = torch.cat([x["ca_bias"][0], second], 1)
    tokens = [x[name].unflatten(2, (heads, d["head_dim"])) for name in "qkv"]
    maps = [y[:, int(classes) :].unflatten(1, (height, width)) for y in tokens]
    prefix = tuple(y[:, :1] for y in tokens) if classes else None
    out = agent_attention(
        *maps, tuple(d["agent_grid"]), first, second, d["scale"], prefix, impl=impl
    )
    prefix, out = out if classes else (None, out)
    depthwise = F.conv2d(
        maps[2].flatten(3).permute(0, 3, 1, 2),
        x["dwc_weight"],
        x["dwc_bias"],
        padding=1,
        groups=len(x["dwc_bias"]),
    )
    out = (out.flatten(3) + depthwise.permute(0, 2, 3, 1)).flatten(1, 2)
    if prefix is not None:
        out = torch.cat([prefix.flatten(2), out], 1)
    grads = torch.autograd.grad((out * probe.to(dtype)).sum(), list(x.values()))
    found = {"out": out, **{f"grad_{n}": g for n, g in zip(x, grads, strict=True)}}
    return {name: sample(y.detach()).double() for name, y in found.items()}, expected


@pytest.mark.usefixtures("large_blocks")
@pytest.mark.parametrize("path", GOLDENS, ids=lambda path: path.stem)
def test_golden(path: Path) -> None:
    found, expected = from_golden(path, torch.float32, "triton")
    aten, _ = from_golden(path, torch.float32, "aten")
    for name, y in expected.items():
        floor = 4 * torch.finfo(torch.float32).eps * y.abs().max()
        assert (found[name] - y).abs().max() <= 3 * (aten[name] - y).abs().max() + floor, name


@pytest.mark.usefixtures("large_blocks")
@pytest.mark.parametrize("biased", [True, False], ids=["bias", "plain"])
@pytest.mark.parametrize(("size", "agent_size", "classes"), SHAPES)
def test_equals_the_definition(size: Any, agent_size: Any, classes: int, biased: bool) -> None:
    leaves = inputs(size, agent_size, classes, torch.float32)
    if not biased:
        leaves = {n: x for n, x in leaves.items() if not n.endswith("bias")}
    assert_as_exact_as_aten(leaves, agent_size)


@pytest.mark.parametrize("given", ["agent_bias", "token_bias"])
def test_one_bias_alone(given: str) -> None:
    leaves = inputs((4, 5), 3, 1, torch.float32)
    leaves = {n: x for n, x in leaves.items() if n == given or not n.endswith("bias")}
    assert_as_exact_as_aten(leaves, 3)


@pytest.mark.parametrize("head_dim", [8, 24, 32, 48, 64, 80, 128])
def test_head_dims(head_dim: int) -> None:
    assert_as_exact_as_aten(inputs((4, 5), 2, 1, torch.float32, 1, 2, head_dim), 2)


@pytest.mark.parametrize(("agent_size", "head_dim"), [(3, 32), (5, 24), ((4, 10), 16)])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype: torch.dtype, agent_size: Any, head_dim: int) -> None:
    assert_as_exact_as_aten(inputs((9, 11), agent_size, 1, dtype, 2, 2, head_dim), agent_size)


@pytest.mark.usefixtures("large_blocks")
def test_parts_of_tokens_and_groups_of_images(monkeypatch: pytest.MonkeyPatch) -> None:
    agent_size = (1, 3)
    leaves = inputs((10, 19), agent_size, 2, torch.float32, batch=5, heads=1)
    whole = computed(leaves, agent_size)
    monkeypatch.setattr(_triton, "processors", lambda _: 1)
    monkeypatch.setattr(triton_launch, "_PART", 64)  # 128 in fact: eight times a block of agents
    for programs, divided in ((1, (1, 1)), (4, (1, 2)), (8, (2, 3)), (100, (2, 5))):
        for name in ("_PROGRAMS", "_PROGRAMS_BACKWARD"):
            monkeypatch.setattr(triton_launch, name, programs)
        x = triton_launch._Sizes(leaves["query"], leaves["prefix0"], agent_size, 1.0, False)
        assert (x.parts, x.groups) == divided
        for name, found in computed(leaves, agent_size).items():
            torch.testing.assert_close(found, whole[name], msg=name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("agent_size", [3, 9])
def test_every_configuration(
    agent_size: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    launch, wanted, lengths = _triton.launch, [0], {0}

    def one(kernel: Any, grid: Any, arguments: Any, configs: Any, key: Any = ()) -> None:
        lengths.add(len(configs))
        launch(kernel, grid, arguments, [configs[min(wanted[0], len(configs) - 1)]], key)

    monkeypatch.setattr(_triton, "launch", one)
    leaves = inputs((5, 7), agent_size, 1, dtype, 2, 1)
    assert_as_exact_as_aten(leaves, agent_size)
    assert max(lengths) > 1
    for wanted[0] in range(1, max(lengths)):
        assert_as_exact_as_aten(leaves, agent_size)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_closed_agents_and_hidden_tokens(dtype: torch.dtype) -> None:
    """-inf in a bias; where all is closed, zeros and no NaN."""
    leaves = {n: x.detach() for n, x in inputs((5, 8), 3, 0, dtype).items()}
    leaves["agent_bias"][:, :, 5] = leaves["token_bias"][..., 4] = -torch.inf
    assert_as_exact_as_aten(copied(leaves, dtype), 3)
    leaves["agent_bias"][:, 2] = leaves["token_bias"][:, 7] = -torch.inf
    found = computed(copied(leaves, dtype), 3)
    assert all(x.isfinite().all() for x in found.values())
    assert (found["out"][:, 7] == 0).all()


def test_weights_sum_to_one() -> None:
    leaves = {n: x.detach() for n, x in inputs((6, 8), 4, 1, torch.float32).items()}
    for name in ("value", "prefix2"):
        leaves[name] = torch.ones_like(leaves[name])
    out = attend(leaves, 4)
    torch.testing.assert_close(out, torch.ones_like(out))


# Memory.


def test_layouts() -> None:
    """Heads-last views, permuted, cropped and strided maps; also as gradients."""
    x = torch.randn(2, 3, 6, 5, 8)
    views = [x.permute(0, 2, 3, 1, 4), x.permute(0, 3, 2, 1, 4).transpose(1, 2)]
    views += [torch.randn(2, 9, 8, 3, 8)[:, 2:8, 1:6], torch.randn(2, 6, 5, 3, 16)[..., ::2]]
    views += [torch.randn(1, 6, 5, 3, 8).expand(2, -1, -1, -1, -1), torch.randn(2, 6, 5, 3, 8)]
    for i in range(0, len(views), 2):
        query, key, value = views[i], views[i - 1], views[i - 2]
        maps = [y.detach().requires_grad_() for y in (query, key, value)]
        expected, out = (agent_attention(*maps, 3, impl=i) for i in ("reference", "triton"))
        torch.testing.assert_close(out, expected)
        assert out.is_contiguous()
        for probe in views[i : i + 3]:
            for found, wanted in zip(
                torch.autograd.grad(out, maps, probe, retain_graph=True),
                torch.autograd.grad(expected, maps, probe, retain_graph=True),
                strict=True,
            ):
                torch.testing.assert_close(found, wanted)


def test_layouts_of_biases() -> None:
    leaves = inputs((5, 4), 3, 0, torch.float32)
    expected = computed(leaves, 3, "reference")
    for name in ("agent_bias", "token_bias"):
        strided = leaves[name].detach().mT.contiguous().mT.requires_grad_()
        found = computed({**leaves, name: strided}, 3)
        for other, x in expected.items():
            torch.testing.assert_close(found[other], x, msg=other)


@pytest.mark.parametrize("adjacent", [True, False])
def test_class_tokens_are_copied_only_if_they_lie_elsewhere(
    adjacent: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    joined: list[int] = []
    cat = torch.cat
    monkeypatch.setattr(torch, "cat", lambda x, *a: joined.append(len(x)) or cat(x, *a))
    qkv = torch.randn(2, 22, 3, 3, 8)
    first, rest = qkv.split([2, 20], 1)
    if not adjacent:
        first = first.clone()
    prefix, maps = first.unbind(2), rest.unflatten(1, (4, 5)).unbind(3)
    found = agent_attention(*maps, 3, prefix=prefix)
    assert len(joined) == (0 if adjacent else 3)
    for x, y in zip(found, agent_attention(*maps, 3, prefix=prefix, impl="aten"), strict=True):
        torch.testing.assert_close(x, y)


@pytest.mark.parametrize("classes", [0, 1])
def test_empty_batch(classes: int) -> None:
    leaves = inputs((5, 9), 3, classes, torch.float32, batch=0)
    out = attend(leaves, 3)
    assert out.shape == (0, classes + 45, 1, 3, 8)
    for name, grad in gradients(out, leaves).items():
        assert torch.equal(grad, torch.zeros_like(leaves[name])), name


def test_autocast_and_parameters_of_another_precision() -> None:
    leaves = inputs((5, 5), 3, 1, torch.float32)
    low = {n: x if n.endswith("bias") else x.bfloat16() for n, x in leaves.items()}
    expected = attend(low, 3)
    with torch.autocast("cpu", torch.bfloat16):
        out = attend(low, 3)
    assert torch.equal(out, expected)
    out.float().sum().backward()
    assert leaves["agent_bias"].grad.dtype == leaves["token_bias"].grad.dtype == torch.float32


def test_repeatable() -> None:
    leaves = inputs((7, 9), 3, 1, torch.bfloat16)
    first, second = computed(leaves, 3), computed(leaves, 3)
    assert all(torch.equal(x, second[name]) for name, x in first.items())


# Compilation, export, the dispatcher's view.


@pytest.mark.parametrize("classes", [0, 1])
def test_compile_fullgraph(classes: int) -> None:
    leaves = inputs((6, 5), 3, classes, torch.float32)
    expected = computed(leaves, 3, "reference")
    torch._dynamo.reset()
    out = torch.compile(Attention(3), fullgraph=True, backend="aot_eager")(leaves)
    for name, x in {"out": out, **gradients(out, leaves)}.items():
        torch.testing.assert_close(x, expected[name], msg=name)


def test_one_program_for_all_batches() -> None:
    """One more than the first where the batch turns out to change."""
    counter = CompileCounterWithBackend("aot_eager")
    torch._dynamo.reset()
    compiled = torch.compile(Attention(3), fullgraph=True, backend=counter)
    for batch in (2, 3, 4):
        leaves = inputs((2, 3), 3, 0, torch.float32, batch, 1)
        expected = computed(leaves, 3, "reference")
        out = compiled(leaves)
        for name, x in {"out": out, **gradients(out, leaves)}.items():
            torch.testing.assert_close(x, expected[name], msg=name)
    assert counter.frame_count <= 2


def test_one_program_for_all_sizes() -> None:
    counter = CompileCounterWithBackend("aot_eager")
    torch._dynamo.reset()
    compiled = torch.compile(Attention(3), fullgraph=True, backend=counter, dynamic=True)
    for size in ((5, 6), (4, 9), (3, 4)):
        leaves = {n: x.detach() for n, x in inputs(size, 3, 0, torch.float32, 2, 1).items()}
        torch.testing.assert_close(compiled(leaves), attend(leaves, 3, impl="reference"))
    assert counter.frame_count == 1


def test_export(monkeypatch: pytest.MonkeyPatch) -> None:
    leaves = {n: x.detach() for n, x in inputs((4, 6), 3, 1, torch.float32).items()}
    expected = attend(leaves, 3, impl="reference")
    for choice in ("triton", "auto"):
        monkeypatch.setenv("VITARIUM_OPS", choice)
        program = torch.export.export(Attention(3), (leaves,))
        targets = {str(node.target) for node in program.graph.nodes}
        assert any("agent_attention_triton" in x for x in targets) == (choice == "triton")
        assert any("vitarium" in x for x in targets) == (choice == "triton")
        torch.testing.assert_close(program.module()(leaves), expected)


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("classes", [0, 2])
def test_opcheck(classes: int, biased: bool) -> None:
    x = inputs((2, 3), (2, 1), classes, torch.float32, 2, 1)
    maps = [x[n] for n in ("query", "key", "value")]
    biases = [x["agent_bias"], x["token_bias"]] if biased else [None, None]
    prefix = [x.get(f"prefix{i}") for i in range(3)]
    args = (*maps, *biases, *prefix, (2, 1), 0.3)
    torch.library.opcheck(torch.ops.vitarium.agent_attention_triton, args)
    args = [y.detach() if isinstance(y, Tensor) else y for y in args]
    out, *kept = torch.ops.vitarium.agent_attention_triton(*args)
    backward = torch.ops.vitarium.agent_attention_triton_backward
    torch.library.opcheck(backward, (torch.randn_like(out), *args[:8], *kept, *args[8:]))


def test_second_derivatives_are_refused() -> None:
    leaves = inputs((3, 4), 3, 0, torch.float32)
    out = attend(leaves, 3)
    (grad,) = torch.autograd.grad(out.sum(), leaves["query"], create_graph=True)
    with pytest.raises(RuntimeError, match="has no gradient; impl='reference'"):
        grad.sum().backward()


@pytest.mark.parametrize("classes", [0, 1])
def test_flops_are_those_of_aten(classes: int) -> None:
    leaves = inputs((3, 5), 3, classes, torch.float32)

    def training(impl: str) -> None:
        attend(leaves, 3, impl=impl).sum().backward()

    for function in (lambda impl: attend(leaves, 3, impl=impl), training):
        assert flops(function, "triton") == flops(function, "aten") > 0


# Which implementation runs.


def test_which_implementation_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    x = {n: y.detach() for n, y in inputs((3, 4), 3, 0, torch.float32).items()}
    ran = record(monkeypatch, "agent")
    attend(x, 3)
    monkeypatch.delenv("VITARIUM_OPS")
    attend(x, 3)
    assert ran == ["triton", "aten"]
    assert explain(agent_attention, **x, agent_size=3).reserved["triton"] == (
        "its interpreter is for tests"
    )


def call(dtype: torch.dtype = torch.float32, head_dim: int = 8, agents: int = 3) -> dict[str, Any]:
    x = torch.randn(1, 4, 4, 1, head_dim, dtype=dtype)
    return {"query": x, "key": x, "value": x, "agent_size": agents}


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: call(torch.float64), "float16, bfloat16 and float32, got torch.float64"),
        (lambda: call(head_dim=136), "head_dim up to 128, got 136"),
        (lambda: call(agents=17), "up to 256 agents, got 289"),
        (lambda: call(agents=16, head_dim=32), "256 agents of head_dim 32 in torch.float32 fill"),
    ],
)
def test_reasons(make: Callable[[], dict[str, Any]], reason: str) -> None:
    arguments = make()
    assert reason in explain(agent_attention, **arguments, impl="aten").reasons["triton"]
    with pytest.raises(ValueError, match=r"impl='triton' cannot run this agent call: "):
        agent_attention(**arguments, impl="triton")


def test_a_cpu_without_the_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    found = explain(agent_attention, **call(), impl="auto")
    assert found.chosen == "aten"
    assert found.reasons["triton"] == "kernels need a CUDA device, got cpu"
