"""Agent attention: every implementation against the definition and the authors' numbers."""

from __future__ import annotations

import itertools
import shutil
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from golden import op_case, sample
from harness import flops, gradients, random_maps, record
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from vitarium.ops import agent_attention, explain, use_impl

pytestmark = pytest.mark.usefixtures("nan_memory")

GOLDENS = sorted(Path(__file__).parents[1].glob("golden/ops/agent_attention_*.json"))
EXACT = ("reference", "aten")

# (H, W), agent_size, class tokens: few agents and many, bins that overlap, a grid finer than the
# map, one position, one agent
SHAPES = [
    ((9, 14), 3, 0),
    ((10, 7), (4, 5), 0),
    ((1, 1), 1, 0),
    ((1, 1), 2, 1),
    ((1, 6), (1, 3), 2),
    ((5, 5), 5, 0),
    ((3, 2), 7, 1),
    ((13, 11), (2, 9), 3),
    ((17, 20), 2, 1),
]


def inputs(
    size: tuple[int, int],
    agent_size: int | tuple[int, int],
    classes: int = 0,
    dtype: torch.dtype = torch.float64,
    batch: int = 2,
    heads: int = 3,
    head_dim: int = 8,
) -> dict[str, Tensor]:
    """Random leaves, strided like three views of one projection."""

    found, normal = random_maps(size, dtype, batch, heads, head_dim)
    rows, columns = (agent_size, agent_size) if isinstance(agent_size, int) else agent_size
    agents, tokens = rows * columns, classes + size[0] * size[1]
    found["agent_bias"] = normal(heads, agents, tokens)
    found["token_bias"] = normal(heads, tokens, agents)
    if classes:
        prefix = normal(batch, classes, 3, heads, head_dim).unbind(2)
        found |= {f"prefix{i}": x for i, x in enumerate(prefix)}
    return {name: x.requires_grad_() for name, x in found.items()}


def attend(
    leaves: dict[str, Tensor], agent_size: int | tuple[int, int], **kwargs: object
) -> Tensor:
    """All tokens, class tokens first, [B, P + H * W, 1, heads, head_dim]."""
    call = {n: x for n, x in leaves.items() if not n.startswith("prefix")}
    prefix = tuple(x for n, x in leaves.items() if n.startswith("prefix"))
    out = agent_attention(**call, agent_size=agent_size, prefix=prefix or None, **kwargs)
    tokens = torch.cat([out[0], out[1].flatten(1, 2)], 1) if prefix else out.flatten(1, 2)
    return tokens[:, :, None]


def composed(x: dict[str, Tensor], letters: str, d: dict[str, object]) -> Tensor:
    """A golden's bias [heads, agents, tokens] from its parts: "an ah aw" or "na ha wa"."""
    size, p, grid = (d["H"], d["W"]), d["p"], tuple(d["agent_grid"])
    table, rows, columns = (x[f"{name}_bias"] for name in letters.split())
    if letters.startswith("na"):
        rows, columns = (y.permute(0, 1, 4, 2, 3) for y in (rows, columns))
    maps = [F.interpolate(y, size, mode="bilinear") for y in (table, (rows + columns)[0])]
    total = sum(maps).flatten(2)
    if grid != (p, p):
        total = F.interpolate(total.mT.unflatten(2, (p, p)), grid, mode="bilinear")
        total = total.flatten(2).mT
    return total


@pytest.mark.parametrize("impl", EXACT)
@pytest.mark.parametrize("path", GOLDENS, ids=lambda path: path.stem)
def test_golden(path: Path, impl: str) -> None:
    description, x, _, probe, expected = op_case(path.with_suffix(""))
    d = description["params"]
    height, width, heads = d["H"], d["W"], d["heads"]
    first, second = composed(x, "an ah aw", d), composed(x, "na ha wa", d).mT
    classes = d["mode"] == "cls_token"
    if classes:
        first = torch.cat([x["ac_bias"][0], first], 2)
        second = torch.cat([x["ca_bias"][0], second], 1)
    tokens = [x[name].unflatten(2, (heads, d["head_dim"])) for name in "qkv"]
    maps = [y[:, int(classes) :].unflatten(1, (height, width)) for y in tokens]
    out = agent_attention(
        *maps,
        agent_size=tuple(d["agent_grid"]),
        agent_bias=first,
        token_bias=second,
        scale=d["scale"],
        prefix=tuple(y[:, :1] for y in tokens) if classes else None,
        impl=impl,
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
    grads = torch.autograd.grad((out * probe).sum(), list(x.values()))
    found = {"out": out, **{f"grad_{n}": g for n, g in zip(x, grads, strict=True)}}
    assert set(found) == set(expected)
    for name, y in expected.items():
        assert (sample(found[name]) - y).abs().max() <= 1e-7 * y.std(), name


def test_goldens_are_there() -> None:
    assert len(GOLDENS) == 7


@pytest.mark.parametrize("biased", [True, False], ids=["bias", "plain"])
@pytest.mark.parametrize(("size", "agent_size", "classes"), SHAPES)
def test_aten_equals_the_definition(
    size: tuple[int, int], agent_size: int | tuple[int, int], classes: int, biased: bool
) -> None:
    leaves = inputs(size, agent_size, classes)
    if not biased:
        leaves = {n: x for n, x in leaves.items() if not n.endswith("bias")}
    expected = attend(leaves, agent_size, impl="reference")
    out = attend(leaves, agent_size, impl="aten")
    torch.testing.assert_close(out, expected, rtol=1e-10, atol=1e-10)
    wanted, found = gradients(expected, leaves), gradients(out, leaves)
    for name in leaves:
        torch.testing.assert_close(found[name], wanted[name], rtol=1e-9, atol=1e-9, msg=name)
    with torch.no_grad():
        again = attend(leaves, agent_size)
    torch.testing.assert_close(again, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("given", ["agent_bias", "token_bias"])
@pytest.mark.parametrize("agent_size", [3, 5])
def test_one_bias_alone(agent_size: int, given: str) -> None:
    leaves = inputs((6, 9), agent_size, 1)
    leaves = {n: x for n, x in leaves.items() if n == given or not n.endswith("bias")}
    expected, out = (attend(leaves, agent_size, impl=impl) for impl in EXACT)
    wanted, found = gradients(expected, leaves), gradients(out, leaves)
    for name in leaves:
        torch.testing.assert_close(found[name], wanted[name], msg=name)


@pytest.mark.parametrize("agent_size", [3, 4])
def test_groups_of_images_do_not_mix(agent_size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    from vitarium.ops.agent_attn import aten

    leaves = inputs((7, 9), agent_size, 1, batch=5)
    expected = attend(leaves, agent_size, impl="reference")
    wanted = gradients(expected, leaves)
    for images in (1, 2, 3, 8):
        monkeypatch.setattr(aten, "_CHUNK", images * 3 * agent_size**2 * 64)
        out = attend(leaves, agent_size)
        torch.testing.assert_close(out, expected)
        for name, grad in gradients(out, leaves).items():
            torch.testing.assert_close(grad, wanted[name], msg=name)


def test_gradcheck_of_the_definition() -> None:
    leaves = inputs((3, 2), (2, 1), 1, batch=1, heads=2, head_dim=2)
    names = list(leaves)

    def function(*tensors: Tensor) -> Tensor:
        return attend(dict(zip(names, tensors, strict=True)), (2, 1), impl="reference")

    assert torch.autograd.gradcheck(function, tuple(leaves.values()))


# Invariants that no oracle shares a bug with.


@pytest.mark.parametrize("impl", EXACT)
@pytest.mark.parametrize("agent_size", [3, 4])
def test_weights_sum_to_one(impl: str, agent_size: int) -> None:
    leaves = {n: x.detach() for n, x in inputs((6, 8), agent_size, 1).items()}
    for name in ("value", "prefix2"):
        leaves[name] = torch.ones_like(leaves[name])
    out = attend(leaves, agent_size, impl=impl)
    torch.testing.assert_close(out, torch.ones_like(out))


@pytest.mark.parametrize("impl", EXACT)
def test_equal_keys_and_one_agent_average_everything(impl: str) -> None:
    leaves = {n: x.detach() for n, x in inputs((5, 7), 1).items() if not n.endswith("bias")}
    leaves["key"] = torch.ones_like(leaves["key"])
    out = agent_attention(**leaves, agent_size=1, impl=impl)
    torch.testing.assert_close(out, leaves["value"].mean((1, 2), True).expand_as(out))


@pytest.mark.parametrize("impl", EXACT)
def test_a_closed_agent_and_a_hidden_token_count_for_nothing(impl: str) -> None:
    """-inf in a bias takes what it stands for out of the attention."""
    leaves = {n: x.detach() for n, x in inputs((4, 6), 3).items()}
    for bias in ("agent_bias", "token_bias"):
        leaves[bias] = leaves[bias].clone()
    leaves["agent_bias"][:, :, 5] = -torch.inf
    before = agent_attention(**leaves, agent_size=3, impl=impl)
    for name in ("key", "value"):
        leaves[name] = leaves[name].clone()
        leaves[name][:, 0, 5] += 3
    torch.testing.assert_close(agent_attention(**leaves, agent_size=3, impl=impl), before)
    leaves["token_bias"][..., 4] = -torch.inf
    closed = agent_attention(**leaves, agent_size=3, impl=impl)
    leaves["agent_bias"][:, 4] += torch.randn(24, dtype=torch.float64)
    torch.testing.assert_close(agent_attention(**leaves, agent_size=3, impl=impl), closed)


@pytest.mark.parametrize("impl", EXACT)
def test_heads_and_images_are_independent(impl: str) -> None:
    leaves = {n: x.detach() for n, x in inputs((9, 8), 3).items()}
    out = agent_attention(**leaves, agent_size=3, impl=impl)
    heads = torch.tensor([2, 0, 1])
    moved = {
        n: x[heads] if n.endswith("bias") else x[:, :, :, heads].flip(0) for n, x in leaves.items()
    }
    found = agent_attention(**moved, agent_size=3, impl=impl)
    torch.testing.assert_close(found, out[:, :, :, heads].flip(0))


# Precision, memory layout, compilation.


@pytest.mark.parametrize("agent_size", [3, 7])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_error_is_that_of_fused_attention(dtype: torch.dtype, agent_size: int) -> None:
    """At most 3x the error of two calls of SDPA in the same precision."""
    leaves = inputs((14, 14), agent_size, 0, dtype, head_dim=32)
    out = attend(leaves, agent_size, impl="aten")
    assert out.dtype == dtype
    grads = gradients(out, leaves)
    exact = {n: x.detach().double().requires_grad_() for n, x in leaves.items()}
    expected = attend(exact, agent_size, impl="reference")
    wanted = gradients(expected, exact)

    q, k, v = (leaves[n].flatten(1, 2).transpose(1, 2) for n in ("query", "key", "value"))
    agents = F.adaptive_avg_pool2d(leaves["query"].flatten(3).permute(0, 3, 1, 2), agent_size)
    agents = agents.flatten(2).unflatten(1, (3, 32)).mT
    gathered = F.scaled_dot_product_attention(agents, k, v, leaves["agent_bias"][None])
    fused = F.scaled_dot_product_attention(q, agents, gathered, leaves["token_bias"][None])
    fused = fused.transpose(1, 2)[:, :, None]
    peer = gradients(fused, leaves)

    def error(found: Tensor, oracle: Tensor) -> float:
        return float((found.detach().double() - oracle.detach()).abs().mean())

    assert error(out, expected) <= 3 * error(fused, expected)
    for name in leaves:
        assert error(grads[name], wanted[name]) <= 3 * error(peer[name], wanted[name]), name


@pytest.mark.parametrize("agent_size", [3, 5])
def test_layouts(agent_size: int) -> None:
    """Heads-last views, permuted and cropped maps are read as they are."""
    x = torch.randn(2, 3, 12, 11, 8, dtype=torch.float64)
    views = [x.permute(0, 2, 3, 1, 4), x.permute(0, 3, 2, 1, 4).transpose(1, 2)]
    views.append(torch.randn(2, 15, 14, 3, 8).double()[:, 2:14, 1:12])
    views.append(torch.randn(2, 12, 11, 3, 16).double()[..., ::2])
    for query, key in itertools.product(views, views):
        expected, out = (agent_attention(query, key, views[0], agent_size, impl=i) for i in EXACT)
        torch.testing.assert_close(out, expected)
        assert out.is_contiguous()


@pytest.mark.parametrize("agent_size", [3, 5])
def test_empty_batch(agent_size: int) -> None:
    leaves = inputs((5, 9), agent_size, 1, batch=0)
    out = attend(leaves, agent_size)
    assert out.shape == (0, 46, 1, 3, 8)
    for name, grad in gradients(out, leaves).items():
        assert torch.equal(grad, torch.zeros_like(leaves[name])), name


def test_biases_may_have_another_precision() -> None:
    """Under autocast the maps are bfloat16 and the parameters float32."""
    leaves = inputs((5, 5), 3, 1, torch.float32)
    low = {n: x if n.endswith("bias") else x.bfloat16() for n, x in leaves.items()}
    out = attend(low, 3)
    assert out.dtype == torch.bfloat16
    out.float().sum().backward()
    for name in ("agent_bias", "token_bias"):
        assert leaves[name].grad is not None
        assert leaves[name].grad.dtype == torch.float32


def test_autocast_changes_nothing_inside() -> None:
    leaves = inputs((9, 9), 3, 0, torch.float32)
    expected = attend(leaves, 3)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(attend(leaves, 3), expected)


@pytest.mark.parametrize("first", [torch.inference_mode, torch.no_grad])
def test_tables_of_one_mode_serve_another(first: type) -> None:
    """How positions share in means is kept between calls, whatever mode worked it out."""
    from vitarium.ops.agent_attn import aten

    aten._averages.cache_clear()
    with first():
        aten._averages(9, 3, torch.float64, torch.device("cpu"))
    leaves = inputs((9, 9), 3)
    wanted = gradients(attend(leaves, 3, impl="reference"), leaves)
    for name, grad in gradients(attend(leaves, 3), leaves).items():
        torch.testing.assert_close(grad, wanted[name], msg=name)


@pytest.mark.parametrize("agent_size", [3, 5])
def test_meta_tensors_give_shapes(agent_size: int) -> None:
    leaves = {n: x.to("meta") for n, x in inputs((17, 19), agent_size, 1).items()}
    leaves = {n: x.detach().requires_grad_() for n, x in leaves.items()}
    out = attend(leaves, agent_size)
    assert out.shape == (2, 324, 1, 3, 8)
    grads = torch.autograd.grad(out, list(leaves.values()), torch.empty_like(out))
    assert [g.shape for g in grads] == [x.shape for x in leaves.values()]


@pytest.mark.parametrize("agent_size", [3, 7])
def test_repeatable(agent_size: int) -> None:
    torch.set_num_threads(2)
    leaves = inputs((20, 21), agent_size, 1, torch.float32)
    runs = []
    for _ in range(3):
        out = attend(leaves, agent_size)
        runs.append([out, *gradients(out, leaves).values()])
    torch.set_num_threads(1)
    for run in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(run, runs[0], strict=True))


class Attention(torch.nn.Module):
    """What `torch.export` takes."""

    def __init__(self, agent_size: int) -> None:
        super().__init__()
        self.agent_size = agent_size

    def forward(self, x: dict[str, Tensor]) -> Tensor:
        return attend(x, self.agent_size)


@pytest.mark.parametrize("agent_size", [3, 5])
def test_compile_fullgraph(agent_size: int) -> None:
    leaves = inputs((9, 13), agent_size, 1)
    expected = attend(leaves, agent_size, impl="reference")
    wanted = gradients(expected, leaves)
    torch._dynamo.reset()
    out = torch.compile(Attention(agent_size), fullgraph=True, backend="aot_eager")(leaves)
    torch.testing.assert_close(out, expected)
    for name, grad in gradients(out, leaves).items():
        torch.testing.assert_close(grad, wanted[name], msg=name)


def test_one_program_for_all_sizes() -> None:
    counter = CompileCounterWithBackend("eager")
    torch._dynamo.reset()
    compiled = torch.compile(Attention(3), fullgraph=True, backend=counter, dynamic=True)
    for size in ((11, 14), (5, 20), (30, 8), (3, 4), (2, 12)):
        x = {n: y.detach() for n, y in inputs(size, 3).items()}
        torch.testing.assert_close(compiled(x), attend(x, 3, impl="reference"))
    assert counter.frame_count == 1


@pytest.mark.skipif(shutil.which("c++") is None, reason="inductor needs a C++ compiler")
def test_compile_with_inductor() -> None:
    """Of an exported program, whose attention inductor's pattern matcher may rewrite."""
    leaves = {n: x.detach() for n, x in inputs((9, 13), 3, 1, torch.float32).items()}
    expected = attend(leaves, 3, impl="reference")
    program = torch.export.export(Attention(3), (leaves,)).module()
    torch._dynamo.reset()
    out = torch.compile(program, fullgraph=True)(leaves)
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("agent_size", [3, 5])
def test_export(agent_size: int) -> None:
    leaves = {n: x.detach() for n, x in inputs((6, 8), agent_size, 1).items()}
    program = torch.export.export(Attention(agent_size), (leaves,))
    targets = {str(node.target) for node in program.graph.nodes}
    assert not any("vitarium" in target for target in targets)
    expected = attend(leaves, agent_size, impl="reference")
    torch.testing.assert_close(program.module()(leaves), expected)


# The dispatcher's view.


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize(("agent_size", "classes"), [((3, 3), 0), ((4, 5), 2)])
def test_opcheck(agent_size: tuple[int, int], classes: int, biased: bool) -> None:
    x = inputs((5, 7), agent_size, classes)
    tokens = [
        torch.randn(2, classes + 35, 3, 8, dtype=torch.float64, requires_grad=True)
        for _ in range(3)
    ]
    biases = (x["agent_bias"], x["token_bias"]) if biased else (None, None)
    args = (*tokens, *biases, (5, 7), agent_size, 0.3)
    torch.library.opcheck(torch.ops.vitarium.agent_attention_aten, args)
    args = [y.detach() if isinstance(y, Tensor) else y for y in args]
    backward = torch.ops.vitarium.agent_attention_aten_backward
    torch.library.opcheck(backward, (args[0], *args))


def test_second_derivatives_are_refused() -> None:
    leaves = inputs((5, 7), 3)
    out = attend(leaves, 3, impl="aten")
    (grad,) = torch.autograd.grad(out.sum(), leaves["query"], create_graph=True)
    with pytest.raises(RuntimeError, match="has no gradient; impl='reference'"):
        grad.sum().backward()


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize(("agent_size", "classes"), [((3, 3), 0), ((4, 5), 1)])
def test_flops_are_the_formula(agent_size: tuple[int, int], classes: int, device: str) -> None:
    """Two products of each attention; the gradient takes five."""
    leaves = inputs((9, 14), agent_size, classes, torch.float32)
    leaves = {n: x.detach().to(device).requires_grad_() for n, x in leaves.items()}
    product = 2 * 2 * (classes + 126) * 3 * 8 * agent_size[0] * agent_size[1]
    assert flops(attend, leaves, agent_size) == 4 * product
    if device == "cpu":
        assert flops(attend, leaves, agent_size, impl="reference") == 4 * product

    def training() -> None:
        attend(leaves, agent_size).sum().backward()

    assert flops(training) == 14 * product


# Which implementation runs.


def test_which_implementation_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    x = {n: y.detach() for n, y in inputs((9, 9), 3).items()}
    ran = record(monkeypatch, "agent")
    monkeypatch.delenv("VITARIUM_OPS", raising=False)
    attend(x, 3)
    attend(x, 3, impl="reference")
    with use_impl("reference"):
        attend(x, 3)
        with use_impl({"agent": "aten"}):
            attend(x, 3)
    assert ran == ["aten", "reference", "reference", "aten"]
    assert explain(agent_attention, **x, agent_size=3).chosen == "aten"
    with pytest.raises(ValueError, match="no such implementation"):
        attend(x, 3, impl="natten")


# Bad input.


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"query": torch.randn(2, 9, 8, 24)}, r"query: expected rank 5, .*got shape \(2, 9, 8, 24"),
        ({"key": torch.randn(2, 9, 8, 3, 4)}, r"key: expected query's shape .*got \(2, 9, 8, 3, 4"),
        ({"value": torch.randn(2, 9, 8, 3, 8).double()}, "value: expected query's dtype .*float64"),
        ({"agent_size": 0}, "agent_size: expected a positive int or a pair of them, got 0"),
        ({"agent_size": 2.5}, r"agent_size: expected a positive int .*, got 2\.5"),
        ({"agent_size": (3, 3, 1)}, r"agent_size: expected .*, got \(3, 3, 1\)"),
        ({"agent_size": 4}, r"agent_bias: expected shape \(3, 16, 72\), got \(3, 9, 72\)"),
        ({"agent_bias": torch.randn(3, 9, 73)}, r"agent_bias: expected shape \(3, 9, 72\)"),
        ({"token_bias": torch.randn(3, 9, 72)}, r"token_bias: expected shape \(3, 72, 9\)"),
        ({"token_bias": torch.ones(3, 72, 9, dtype=torch.int)}, "token_bias: .*floating.*int32"),
        ({"scale": "large"}, "scale: expected a number, got str"),
        ({"prefix": torch.randn(2, 1, 3, 8)}, "prefix: expected query, key and value .*got Tensor"),
        ({"prefix": (torch.randn(2, 1, 3, 8),)}, "prefix: expected query, key and value .*got 1"),
        (
            {"prefix": (torch.randn(2, 1, 3, 8), torch.randn(2, 2, 3, 8), torch.randn(2, 1, 3, 8))},
            r"prefix\[1\]: expected \[B, P, heads, head_dim\] .*got shape \(2, 2, 3, 8\)",
        ),
        ({"prefix": (torch.randn(2, 0, 3, 8),) * 3}, r"prefix\[0\]: .*P >= 1, got shape \(2, 0"),
        ({"prefix": (torch.randn(2, 1, 3, 8).double(),) * 3}, r"prefix\[0\]: expected query's dt"),
        (
            {"prefix": (torch.randn(2, 1, 3, 8),) * 3},
            r"agent_bias: expected shape \(3, 9, 73\), got \(3, 9, 72\)",
        ),
    ],
)
def test_bad_input(changes: dict[str, object], message: str) -> None:
    x = {n: y.detach() for n, y in inputs((9, 8), 3, 0, torch.float32).items()}
    with pytest.raises(ValueError, match=message):
        agent_attention(**{**x, "agent_size": 3, **changes})


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_aten_on_a_gpu() -> None:
    for size, agent_size, classes in SHAPES:
        leaves = inputs(size, agent_size, classes)
        expected = attend(leaves, agent_size, impl="reference")
        wanted = gradients(expected, leaves)
        moved = {n: x.detach().cuda().requires_grad_() for n, x in leaves.items()}
        out = attend(moved, agent_size, impl="aten")
        torch.testing.assert_close(out.cpu(), expected, rtol=1e-9, atol=1e-9)
        for name, grad in gradients(out, moved).items():
            torch.testing.assert_close(grad.cpu(), wanted[name], rtol=1e-9, atol=1e-9, msg=name)
