"""Scores and mixing: against the definition, the authors' numbers and each other."""

from __future__ import annotations

import itertools
import shutil
from pathlib import Path

import pytest
import torch
from golden import op_case, sample
from harness import flops, gradients, random_maps, record
from torch import Tensor

from vitarium.ops import (
    explain,
    neighborhood_attention,
    neighborhood_mix,
    neighborhood_scores,
    use_impl,
)

pytestmark = pytest.mark.usefixtures("nan_memory")

FOLDER = Path(__file__).parents[1] / "golden/ops"
GOLDENS = sorted(FOLDER.glob("neighborhood2d_qk_*.json")) + sorted(
    FOLDER.glob("neighborhood2d_av_*.json")
)
EXACT = ("reference", "aten")

# (H, W), kernel_size, dilation: non-square, ragged tiles, classes of different lengths, window =
# map, one position, dilated global
SHAPES = [
    ((9, 14), 3, 1),
    ((15, 8), (5, 7), 1),
    ((1, 1), 1, 1),
    ((1, 9), (1, 3), 1),
    ((7, 7), 7, 1),
    ((14, 6), (7, 3), (2, 2)),
    ((23, 11), (3, 5), (4, 2)),
    ((29, 33), 7, (3, 2)),
]


def inputs(
    size: tuple[int, int],
    kernel: int | tuple[int, int],
    dtype: torch.dtype = torch.float64,
    batch: int = 2,
    heads: int = 3,
    head_dim: int = 8,
    seed: int = 0,
) -> dict[str, Tensor]:
    """Random leaves, maps strided like three views of one projection."""
    kh, kw = (kernel, kernel) if isinstance(kernel, int) else kernel

    found, normal = random_maps(size, dtype, batch, heads, head_dim, seed)
    found["bias"] = normal(heads, 2 * kh - 1, 2 * kw - 1)
    found["weights"] = normal(batch, *size, kh * kw, heads).transpose(3, 4)
    return {name: x.requires_grad_() for name, x in found.items()}


def of_scores(leaves: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: leaves[name] for name in ("query", "key", "bias")}


def of_mix(leaves: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: leaves[name] for name in ("weights", "value")}


PARTS = [(neighborhood_scores, of_scores), (neighborhood_mix, of_mix)]
part = pytest.mark.parametrize(("op", "select"), PARTS, ids=["scores", "mix"])


@pytest.mark.parametrize("impl", EXACT)
@pytest.mark.parametrize("path", GOLDENS, ids=lambda path: path.stem)
def test_golden(path: Path, impl: str) -> None:
    d, x, _, probe, expected = op_case(path.with_suffix(""))
    last = {name: y.permute(0, 2, 3, 1, 4) for name, y in x.items() if name != "rpb"}
    window = {"kernel_size": tuple(d["kernel_size"]), "dilation": tuple(d["dilation"])}
    if d["op"] == "na2d_qk":
        bias = x.get("rpb")
        out = neighborhood_scores(last["q"], last["k"], **window, bias=bias, impl=impl)
    else:
        out = neighborhood_mix(last["attn"], last["v"], **window, impl=impl)
    found = {"out": out.permute(0, 3, 1, 2, 4)}
    grads = torch.autograd.grad((found["out"] * probe).sum(), list(x.values()))
    found |= {f"grad_{name}": g for name, g in zip(x, grads, strict=True)}
    assert set(found) == set(expected)
    for name, y in expected.items():
        assert (sample(found[name]) - y).abs().max() <= 1e-7 * y.std(), name


def test_goldens_are_there() -> None:
    assert len(GOLDENS) == 5


@part
@pytest.mark.parametrize(("size", "kernel", "dilation"), SHAPES)
def test_aten_equals_the_definition(op, select, size, kernel, dilation) -> None:
    leaves = select(inputs(size, kernel))
    args = dict(leaves, kernel_size=kernel, dilation=dilation)
    expected, out = op(**args, impl="reference"), op(**args, impl="aten")
    torch.testing.assert_close(out, expected, rtol=1e-10, atol=1e-10)
    assert out.is_contiguous()
    wanted, found = gradients(expected, leaves), gradients(out, leaves)
    for name in leaves:
        torch.testing.assert_close(found[name], wanted[name], rtol=1e-9, atol=1e-9, msg=name)


@part
def test_parts_images_and_tiles_do_not_mix(op, select, monkeypatch: pytest.MonkeyPatch) -> None:
    from vitarium.ops.neighborhood_attn import gather, tiles

    leaves = select(inputs((12, 14), 5, batch=4))
    args = dict(leaves, kernel_size=5, dilation=(2, 1))
    expected = op(**args, impl="reference")
    wanted = gradients(expected, leaves)
    for chunk, tile in itertools.product((1, 1 << 14, 1 << 30), ((1, 1), (4, 5), (6, 14))):
        monkeypatch.setattr(gather, "CHUNK", chunk)
        monkeypatch.setattr(tiles, "best_tile", lambda *_, tile=tile: tile)
        out = op(**args, impl="aten")
        torch.testing.assert_close(out, expected)
        for name, grad in gradients(out, leaves).items():
            torch.testing.assert_close(grad, wanted[name], msg=name)


@pytest.mark.parametrize("impl", EXACT)
@pytest.mark.parametrize(("size", "kernel", "dilation"), SHAPES)
def test_composed_they_are_attention(impl: str, size, kernel, dilation) -> None:
    x = inputs(size, kernel)
    window = {"kernel_size": kernel, "dilation": dilation, "impl": impl}
    leaves = {name: x[name] for name in ("query", "key", "value", "bias")}
    expected = neighborhood_attention(**leaves, **window)
    scores = neighborhood_scores(x["query"] * 8**-0.5, x["key"], bias=x["bias"], **window)
    out = neighborhood_mix(scores.softmax(-1), x["value"], **window)
    torch.testing.assert_close(out, expected)
    wanted = gradients(expected, leaves)
    for name, grad in gradients(out, leaves).items():
        torch.testing.assert_close(grad, wanted[name], msg=name)


# Invariants that no oracle shares a bug with.


def windows(length: int, kernel: int, dilation: int) -> list[list[int]]:
    """By search: the members of each position's class that are nearest to it, in order."""
    found = []
    for i in range(length):
        members = range(i % dilation, length, dilation)
        found.append(sorted(sorted(members, key=lambda n: abs(n - i))[:kernel]))
    return found


@pytest.mark.parametrize("impl", EXACT)
@pytest.mark.parametrize(("size", "kernel", "dilation"), [((9, 12), 5, 1), ((11, 13), 3, (3, 4))])
def test_neighbors_in_order(impl: str, size, kernel: int, dilation) -> None:
    """Keys that tell their position, by scores and by one-hot weights."""
    height, width = size
    dh, dw = (dilation, dilation) if isinstance(dilation, int) else dilation
    rows, columns = windows(height, kernel, dh), windows(width, kernel, dw)
    wanted = [
        [[[r, c] for r in rows[i] for c in columns[j]] for j in range(width)] for i in range(height)
    ]
    expected = torch.tensor(wanted).double()  # [H, W, kh * kw, 2]
    grid = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    position = torch.stack(grid, -1)[None, :, :, None].double()
    for axis in (0, 1):
        one_hot = torch.zeros_like(position)
        one_hot[..., axis] = 1
        scores = neighborhood_scores(one_hot, position, kernel, dilation, impl=impl)
        assert torch.equal(scores[0, :, :, 0], expected[..., axis])
    for n in range(kernel**2):
        weights = torch.zeros(1, height, width, 1, kernel**2, dtype=torch.float64)
        weights[..., n] = 1
        found = neighborhood_mix(weights, position, kernel, dilation, impl=impl)
        assert torch.equal(found[0, :, :, 0], expected[:, :, n])


@pytest.mark.parametrize("impl", EXACT)
def test_mixing_a_constant_gives_the_sum_of_weights(impl: str) -> None:
    x = inputs((9, 10), 3)
    value = torch.full_like(x["value"], 2.0)
    out = neighborhood_mix(x["weights"], value, 3, 2, impl=impl)
    torch.testing.assert_close(out, 2 * x["weights"].sum(-1, keepdim=True).expand_as(out))


@pytest.mark.parametrize("impl", EXACT)
def test_bias_entries_are_key_minus_query(impl: str) -> None:
    """With zero queries the scores are the bias, whose entries tell the offsets."""
    query = torch.zeros(1, 8, 11, 1, 2, dtype=torch.float64)
    offsets = torch.arange(25.0, dtype=torch.float64).view(1, 5, 5)
    found = neighborhood_scores(query, query, 3, (2, 3), offsets, impl=impl)[0, :, :, 0]
    rows, columns = windows(8, 3, 2), windows(11, 3, 3)
    for i, j in itertools.product(range(8), range(11)):
        entries = [((r - i) // 2 + 2) * 5 + (c - j) // 3 + 2 for r in rows[i] for c in columns[j]]
        assert found[i, j].tolist() == entries


@pytest.mark.parametrize("impl", EXACT)
@part
def test_heads_and_images_are_independent(op, select, impl: str) -> None:
    leaves = {n: x.detach() for n, x in select(inputs((9, 8), 3)).items()}
    out = op(**leaves, kernel_size=3, impl=impl)
    heads = torch.tensor([2, 0, 1])
    moved = {n: x[heads] if n == "bias" else x[:, :, :, heads].flip(0) for n, x in leaves.items()}
    torch.testing.assert_close(op(**moved, kernel_size=3, impl=impl), out[:, :, :, heads].flip(0))


# Derivatives, precision, memory layout.


@pytest.mark.parametrize("impl", EXACT)
@part
def test_gradcheck_twice(op, select, impl: str) -> None:
    leaves = select(inputs((4, 3), (1, 3), batch=1, heads=2, head_dim=2))
    names = list(leaves)

    def function(*tensors: Tensor) -> Tensor:
        call = dict(zip(names, tensors, strict=True))
        return op(**call, kernel_size=(1, 3), dilation=(2, 1), impl=impl)

    assert torch.autograd.gradcheck(function, tuple(leaves.values()))
    assert torch.autograd.gradgradcheck(function, tuple(leaves.values()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@part
def test_error_is_that_of_gathering(op, select, dtype: torch.dtype) -> None:
    """At most 3x the error of the same formula in the same precision."""
    leaves = select(inputs((13, 12), 5, dtype, head_dim=32))
    out = op(**leaves, kernel_size=5, impl="aten")
    assert out.dtype == dtype
    exact = {n: x.detach().double().requires_grad_() for n, x in leaves.items()}
    expected = op(**exact, kernel_size=5, impl="reference")
    with pytest.MonkeyPatch.context() as patch:  # the definition without its float64
        patch.setattr(Tensor, "double", lambda self: self)
        peer = op(**leaves, kernel_size=5, impl="reference")

    def error(found: Tensor, oracle: Tensor) -> float:
        return float((found.detach().double() - oracle.detach()).abs().mean())

    assert error(out, expected) <= 3 * error(peer, expected)
    found, wanted, others = (
        gradients(y, x) for y, x in ((out, leaves), (expected, exact), (peer, leaves))
    )
    for name in leaves:
        assert error(found[name], wanted[name]) <= 3 * error(others[name], wanted[name]), name


def test_layouts() -> None:
    x = torch.randn(2, 3, 12, 11, 9, dtype=torch.float64)
    views = [x.permute(0, 2, 3, 1, 4), x.permute(0, 3, 2, 1, 4).transpose(1, 2)]
    views.append(torch.randn(2, 15, 14, 3, 9).double()[:, 2:14, 1:12])
    views.append(torch.randn(2, 12, 11, 3, 18).double()[..., ::2])
    for op in (neighborhood_scores, neighborhood_mix):
        for first, second in itertools.product(views, views):
            expected = op(first, second, 3, impl="reference")
            torch.testing.assert_close(op(first, second, 3), expected)


@part
def test_empty_batch(op, select) -> None:
    leaves = select(inputs((9, 9), 3, batch=0))
    out = op(**leaves, kernel_size=3)
    assert out.shape == op(**leaves, kernel_size=3, impl="reference").shape
    for name, grad in gradients(out, leaves).items():
        assert torch.equal(grad, torch.zeros_like(leaves[name])), name


@part
def test_meta_tensors_give_shapes(op, select) -> None:
    leaves = {
        n: x.detach().to("meta").requires_grad_() for n, x in select(inputs((9, 8), 3)).items()
    }
    out = op(**leaves, kernel_size=3, dilation=2)
    assert out.shape == op(**select(inputs((9, 8), 3)), kernel_size=3, dilation=2).shape
    for name, grad in gradients(out, leaves).items():
        assert grad.shape == leaves[name].shape


@pytest.mark.parametrize("first", [torch.inference_mode, torch.no_grad])
@part
def test_tables_of_one_mode_serve_another(op, select, first: type) -> None:
    from vitarium.ops.neighborhood_attn import tiles
    from vitarium.ops.neighborhood_parts import aten

    tiles.geometry.cache_clear()
    aten._kept_bias_entries.cache_clear()
    leaves = select(inputs((17, 9), 3))
    with first():
        op(**leaves, kernel_size=3)
    out = op(**leaves, kernel_size=3)
    wanted = gradients(op(**leaves, kernel_size=3, impl="reference"), leaves)
    for name, grad in gradients(out, leaves).items():
        torch.testing.assert_close(grad, wanted[name], msg=name)


@part
def test_repeatable(op, select) -> None:
    torch.set_num_threads(2)
    leaves = select(inputs((20, 21), 5, torch.float32))
    runs = []
    for _ in range(3):
        out = op(**leaves, kernel_size=5)
        runs.append([out, *gradients(out, leaves).values()])
    torch.set_num_threads(1)
    for run in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(run, runs[0], strict=True))


# The dispatcher's view, compilation, export.


def test_opcheck() -> None:
    x = inputs((5, 7), 3)
    args = ((3, 3), (1, 2))
    ops = torch.ops.vitarium
    torch.library.opcheck(ops.neighborhood_scores_aten, (x["query"], x["key"], *args))
    torch.library.opcheck(ops.neighborhood_mix_aten, (x["weights"], x["value"], *args))
    torch.library.opcheck(ops.neighborhood_spread_aten, (x["weights"], x["value"], *args))


@pytest.mark.parametrize("device", ["cpu", "meta"])
@part
def test_flops_are_the_formula(op, select, device: str) -> None:
    leaves = {
        n: x.detach().to(device).requires_grad_() for n, x in select(inputs((9, 14), 5)).items()
    }
    args = dict(leaves, kernel_size=5, dilation=(1, 2))
    product = 2 * 2 * 9 * 14 * 3 * 25 * 8
    assert flops(op, **args) == product
    if device == "cpu":
        assert flops(op, **args, impl="reference") == product

    def training() -> None:
        op(**args).sum().backward()

    assert flops(training) == 3 * product


@part
def test_compile_fullgraph(op, select) -> None:
    leaves = select(inputs((9, 13), (5, 3)))
    args = dict(leaves, kernel_size=(5, 3), dilation=(1, 2))
    expected = op(**args, impl="reference")
    wanted = gradients(expected, leaves)
    torch._dynamo.reset()
    out = torch.compile(op, fullgraph=True, backend="aot_eager")(**args)
    torch.testing.assert_close(out, expected)
    for name, grad in gradients(out, leaves).items():
        torch.testing.assert_close(grad, wanted[name], msg=name)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("c++") is None, reason="inductor needs a C++ compiler")
@part
def test_compile_with_inductor(op, select) -> None:
    leaves = {n: x.detach() for n, x in select(inputs((9, 13), 5, torch.float32)).items()}
    expected = op(**leaves, kernel_size=5, impl="reference")
    torch._dynamo.reset()
    compiled = torch.compile(op, fullgraph=True)
    torch.testing.assert_close(compiled(**leaves, kernel_size=5), expected, rtol=1e-4, atol=1e-5)


@part
def test_one_exported_program_for_all_sizes(op, select) -> None:
    class Module(torch.nn.Module):
        def forward(self, x: dict[str, Tensor]) -> Tensor:
            return op(**x, kernel_size=3, dilation=(2, 1))

    def given(batch: int, size: tuple[int, int]) -> dict[str, Tensor]:
        return {n: x.detach() for n, x in select(inputs(size, 3, batch=batch)).items()}

    sizes = dict.fromkeys(range(3), torch.export.Dim.DYNAMIC)
    x = given(2, (9, 14))
    shapes = {name: None if name == "bias" else sizes for name in x}
    program = torch.export.export(Module(), (x,), dynamic_shapes=(shapes,))
    assert not any("vitarium" in str(node.target) for node in program.graph.nodes)
    for batch, size in ((2, (9, 14)), (1, (6, 3)), (3, (17, 8)), (1, (29, 31))):
        x = given(batch, size)
        expected = op(**x, kernel_size=3, dilation=(2, 1), impl="reference")
        torch.testing.assert_close(program.module()(x), expected)


# Which implementation runs.


@part
def test_which_implementation_runs(op, select, monkeypatch: pytest.MonkeyPatch) -> None:
    x = {n: y.detach() for n, y in select(inputs((9, 9), 3)).items()}
    ran = record(monkeypatch, op.op_name)
    monkeypatch.delenv("VITARIUM_OPS", raising=False)
    op(**x, kernel_size=3)
    op(**x, kernel_size=3, impl="reference")
    with use_impl({op.op_name: "reference"}):
        op(**x, kernel_size=3)
    assert ran == ["aten", "reference", "reference"]
    found = explain(op, **x, kernel_size=3)
    assert found.op == op.op_name
    assert found.chosen == "aten"
    assert explain(op.op_name, **x, kernel_size=3, impl="reference").chosen == "reference"
    with pytest.raises(ValueError, match=f"impl='natten': {op.op_name} has no such"):
        op(**x, kernel_size=3, impl="natten")


# Bad input.


def bad(select, **changes: object) -> dict[str, object]:
    x = {n: y.detach() for n, y in select(inputs((9, 8), 3, torch.float32)).items()}
    return {**x, "kernel_size": 3, **changes}


WINDOW = [
    ({"kernel_size": 4}, "kernel_size: expected odd sizes, got 4"),
    ({"kernel_size": (3, 0)}, "kernel_size: expected a positive int"),
    ({"dilation": 0}, "dilation: expected a positive int"),
    ({"dilation": (4, 1)}, r"kernel_size \* dilation <= H = 9, got 3 \* 4$"),
    ({"dilation": (1, 3)}, r"kernel_size \* dilation <= W = 8, got 3 \* 3$"),
    ({"impl": "cuda"}, "impl: expected one of auto"),
]


@part
@pytest.mark.parametrize(("changes", "message"), WINDOW)
def test_bad_window(op, select, changes: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        op(**bad(select, **changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"query": torch.randn(2, 9, 8, 24)}, r"query: expected rank 5, .*got shape \(2, 9, 8, 24"),
        ({"query": [1]}, "query: expected a tensor, got list"),
        ({"key": torch.randn(2, 9, 8, 3, 4)}, r"key: expected query's shape .*got \(2, 9, 8, 3, 4"),
        ({"key": torch.randn(2, 9, 8, 3, 8).double()}, "key: expected query's dtype .*float64"),
        ({"key": torch.randn(2, 9, 8, 3, 8, device="meta")}, "key: .*device .*got .* meta"),
        ({"query": torch.ones(2, 9, 8, 3, 8, dtype=torch.long)}, "query: .*floating.*int64"),
        ({n: torch.randn(2, 9, 8, 3, 0) for n in ("query", "key")}, "query: expected head_dim >="),
        ({"bias": torch.randn(3, 5, 3)}, r"bias: expected shape \(3, 5, 5\), got \(3, 5, 3\)"),
        ({"bias": torch.randn(3, 5, 5, device="meta")}, "bias: expected device cpu, got meta"),
        ({"bias": torch.ones(3, 5, 5, dtype=torch.int)}, "bias: .*floating.*int32"),
    ],
)
def test_bad_scores(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        neighborhood_scores(**bad(of_scores, **changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"value": torch.randn(2, 9, 8, 24)}, "value: expected rank 5"),
        ({"value": torch.randn(2, 0, 8, 3, 8)}, "value: expected H >= 1"),
        ({"weights": None}, "weights: expected a tensor, got NoneType"),
        ({"weights": torch.ones(2, 9, 8, 3, 9, dtype=torch.int)}, "weights: .*floating.*int32"),
        ({"weights": torch.randn(2, 9, 8, 3, 8)}, r"weights: .*\(2, 9, 8, 3, 9\), got .*3, 8\)$"),
        ({"weights": torch.randn(2, 9, 8, 1, 9)}, r"weights: .*\(2, 9, 8, 3, 9\), got .*1, 9\)$"),
        ({"weights": torch.randn(2, 9, 8, 3, 9).half()}, "weights: expected value's dtype .*16"),
        ({"weights": torch.randn(2, 9, 8, 3, 9, device="meta")}, "weights: .*got .* meta"),
    ],
)
def test_bad_mix(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        neighborhood_mix(**bad(of_mix, **changes))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@part
def test_aten_on_a_gpu(op, select) -> None:
    for size, kernel, dilation in SHAPES:
        leaves = select(inputs(size, kernel))
        window = {"kernel_size": kernel, "dilation": dilation}
        expected = op(**leaves, **window, impl="reference")
        wanted = gradients(expected, leaves)
        moved = {n: x.detach().cuda().requires_grad_() for n, x in leaves.items()}
        out = op(**moved, **window, impl="aten")
        torch.testing.assert_close(out.cpu(), expected, rtol=1e-9, atol=1e-9)
        for name, grad in gradients(out, moved).items():
            torch.testing.assert_close(grad.cpu(), wanted[name], rtol=1e-9, atol=1e-9, msg=name)
