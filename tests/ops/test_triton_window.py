"""Window attention's Triton kernels in the interpreter: numbers, layouts, the dispatcher."""

from __future__ import annotations

import math
from functools import partial
from pathlib import Path
from typing import Any

import harness
import pytest
import torch
from golden import op_case, sample
from harness import flops, gradients, in_interpreter, random_maps, record
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from vitarium.ops import _triton, explain, window_attention
from vitarium.ops.window_attn import triton_launch

pytestmark = [
    pytest.mark.usefixtures("nan_memory", "few_programs"),
    in_interpreter,
]

GOLDENS = [
    pytest.param(path, id=path.stem, marks=[pytest.mark.slow] if path.stem.endswith("6") else [])
    for path in sorted(Path(__file__).parents[1].glob("golden/ops/window_attention_*.json"))
]  # the sixth has windows of 12x12
HALVES = (torch.float16, torch.bfloat16)
OPS = torch.ops.vitarium
computed = partial(harness.computed, window_attention)
assert_as_exact_as_aten = partial(
    harness.assert_as_exact_as_aten,
    window_attention,
    few=8,
    more={"logit_scale": 32},  # it sums what cancels over all pairs
)
TILE = ["_window_fwd_kernel", "_window_bwd_kernel"]
BLOCKS = ["_window_fwd_blocks_kernel", "_window_bwd_query_kernel", "_window_bwd_key_kernel"]
TABLE = "_window_bwd_table_kernel"


@pytest.fixture
def few_programs(monkeypatch):
    """As an interpreter likes it: programs of several windows, and large blocks."""
    monkeypatch.setattr(_triton, "processors", lambda device: 1)
    config = _triton.Config({"BLOCK_M": 128, "BLOCK_N": 64})
    monkeypatch.setattr(triton_launch, "_query_configs", lambda *_: [config])
    monkeypatch.setattr(triton_launch, "_key_configs", lambda *_: [config])


def inputs(
    size: tuple[int, int],
    window: Any,
    *,
    biased: bool = True,
    cosine: bool = False,
    padded: bool = True,
    dtype: torch.dtype = torch.float32,
    batch: int = 1,
    heads: int = 2,
    head_dim: int = 8,
) -> dict[str, Tensor]:
    """Random leaves; the maps are three views of one projection."""
    wh, ww = (window, window) if isinstance(window, int) else window
    found, normal = random_maps(size, dtype, batch, heads, head_dim)
    if biased:
        found["bias"] = normal(heads, 2 * wh - 1, 2 * ww - 1)
    if cosine:
        found["logit_scale"] = (normal(heads) / 2 + 1).to(dtype)
    if padded:
        found["pad"] = normal(3, heads, head_dim)
    return {name: x.requires_grad_() for name, x in found.items()}


@pytest.mark.parametrize("path", GOLDENS)
def test_golden(path: Path) -> None:
    d, x, _, probe, expected = op_case(path.with_suffix(""))
    window, heads = d["params"]["window"], d["params"]["heads"]
    errors = {}
    for impl in ("aten", "triton"):
        low = {n: y.detach().float().requires_grad_() for n, y in x.items()}
        out = window_attention(
            *low["qkv"].unbind(3),
            window,
            d["params"]["shift"],
            bias=low["table"].t().reshape(heads, 2 * window - 1, 2 * window - 1),
            scale=d["params"]["scale"],
            pad=low.get("pad"),
            semantics="dense",
            impl=impl,
        ).flatten(3)
        grads = torch.autograd.grad(out, list(low.values()), probe.float())
        found = {"out": out} | {f"grad_{n}": g for n, g in zip(low, grads, strict=True)}
        errors[impl] = {n: float((sample(found[n]) - y).abs().max()) for n, y in expected.items()}
    for name, y in expected.items():
        allowed = max(3 * errors["aten"][name], 1e-6 * float(y.abs().max()))
        assert errors["triton"][name] <= allowed, name


# (H, W), window, shift: non-square, ragged on one or both axes, padding in more than the last
# window, size 1, window = map, maps smaller than the window, strips
TILES = [
    ((9, 14), (3, 7), (1, 3)),
    ((10, 7), (4, 5), (3, 4)),
    ((4, 9), 7, (3, 2)),
    ((1, 1), 2, 1),
    ((1, 9), (1, 3), 0),
    ((7, 7), 7, 3),
    ((8, 5), 8, (0, 4)),
]
LARGE = [((13, 11), 9, 4), ((12, 8), (6, 12), (2, 0))]


@pytest.mark.parametrize("cosine", [False, True], ids=["dot", "cosine"])
@pytest.mark.parametrize("semantics", ["timm", "timm_fixed", "dense"])
@pytest.mark.parametrize(("size", "window", "shift"), TILES)
def test_tiles(
    size: tuple[int, int],
    window: Any,
    shift: Any,
    semantics: str,
    cosine: bool,
    kernels: list[str],
) -> None:
    leaves = inputs(size, window, cosine=cosine, heads=1)
    args = {"window_size": window, "shift_size": shift, "semantics": semantics}
    assert_as_exact_as_aten(leaves, **args)
    assert kernels == [*TILE, TABLE]


@pytest.mark.parametrize(
    ("number", "semantics", "cosine"),
    [(0, "timm", True), (0, "dense", False), (1, "timm", False), (1, "timm_fixed", True)],
)
def test_larger_windows(number: int, semantics: str, cosine: bool, kernels: list[str]) -> None:
    size, window, shift = LARGE[number]
    args = {"window_size": window, "shift_size": shift, "semantics": semantics}
    assert_as_exact_as_aten(inputs(size, window, cosine=cosine, heads=1), **args)
    assert kernels == [*BLOCKS, "_window_bwd_pairs_kernel", TABLE]


@pytest.mark.parametrize(
    ("size", "window", "semantics"),
    [
        ((9, 14), (3, 7), "authors"),
        ((5, 10), 7, "authors"),
        ((5, 11), 7, "authors_padded"),
        ((9, 18), 9, "authors"),
        ((7, 8), 9, "authors_padded"),
    ],
)
def test_the_authors_semantics(size: tuple[int, int], window: Any, semantics: str) -> None:
    shift = 1 if isinstance(window, tuple) else window // 2
    args = {"window_size": window, "shift_size": shift, "semantics": semantics}
    assert_as_exact_as_aten(inputs(size, window, heads=1), **args)


@pytest.mark.parametrize("cosine", [False, True], ids=["dot", "cosine"])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize(
    ("size", "window", "shift", "semantics"),
    [
        ((9, 7), 4, (1, 0), "dense"),
        ((8, 8), 4, 2, "timm"),
        ((17, 5), (None, 4), 0, "timm"),
        ((7, 22), (3, None), (2, 0), "timm_fixed"),
        ((6, 13), (None, None), 0, "dense"),
        ((6, 13), (80, 80), 0, "timm_fixed"),
    ],
)
def test_without_a_bias(
    size: tuple[int, int], window: Any, shift: Any, semantics: str, padded: bool, cosine: bool
) -> None:
    if window == (80, 80):
        window = (10, 13)
    leaves = inputs(size, window, biased=False, padded=padded, cosine=cosine, heads=1)
    args = {"window_size": window, "shift_size": shift, "semantics": semantics}
    assert_as_exact_as_aten(leaves, **args)


@pytest.mark.parametrize("cosine", [False, True], ids=["dot", "cosine"])
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize(("size", "window"), [((10, 13), 7), ((9, 13), 9)])
def test_half_precision(
    size: tuple[int, int], window: int, dtype: torch.dtype, cosine: bool
) -> None:
    leaves = inputs(size, window, cosine=cosine, dtype=dtype, heads=1, head_dim=32)
    assert_as_exact_as_aten(leaves, window_size=window, shift_size=3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("window", [4, (6, 11)])
@pytest.mark.parametrize("head_dim", [1, 16, 24, 48, 80, 128])
def test_head_dims(head_dim: int, window: Any, dtype: torch.dtype) -> None:
    # of one element, directions have no gradient but roundings
    cosine = head_dim > 1
    leaves = inputs((6, 11), window, cosine=cosine, dtype=dtype, heads=1, head_dim=head_dim)
    assert_as_exact_as_aten(leaves, window_size=window, shift_size=1)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize(("window", "head_dim"), [((7, 10), 24), ((7, 10), 64), ((7, 10), 128)])
def test_every_configuration(
    window: tuple[int, int], head_dim: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each one that differs in more than warps and stages, which the interpreter has none of."""
    monkeypatch.undo()  # with the configurations of a card
    launch, wanted, seen = _triton.launch, [0], set()

    def only(kernel: Any, grid: Any, arguments: Any, configs: Any, key: Any = ()) -> None:
        blocks = list(dict.fromkeys(tuple(x.blocks.items()) for x in configs))
        number = min(wanted[0], len(blocks) - 1)
        seen.add((kernel.__name__, number))
        launch(kernel, grid, arguments, [_triton.Config(dict(blocks[number]))], key)

    monkeypatch.setattr(_triton, "launch", only)
    leaves = inputs((7, 10), window, dtype=dtype, heads=1, head_dim=head_dim)
    args = {"window_size": window}
    before = 0
    for wanted[0] in range(8):
        assert_as_exact_as_aten(leaves, **args)
        if len(seen) == before:
            break
        before = len(seen)


def layouts() -> list[Tensor]:
    """Maps [2, 6, 5, 2, 8] in memory; nothing around them may be read."""
    nan = float("nan")
    found = [
        torch.empty(2, 2, 6, 5, 8).permute(0, 2, 3, 1, 4),
        torch.empty(2, 5, 6, 2, 8).transpose(1, 2),
        torch.empty(2, 2, 8, 6, 5).permute(0, 3, 4, 1, 2),
        torch.full((2, 9, 8, 2, 8), nan)[:, 2:8, 1:6],
        torch.full((2, 6, 5, 2, 11), nan)[..., 1:9],
        torch.full((2, 6, 5, 2, 16), nan)[..., ::2],
        torch.empty(6, 5, 2, 8, 2).permute(4, 0, 1, 2, 3),
    ]
    for x in found:
        x.copy_(torch.randn(2, 6, 5, 2, 8))
    return [*found, torch.randn(2, 6, 5, 1, 8).expand(-1, -1, -1, 2, -1)]


@pytest.mark.parametrize("window", [4, (13, 5)])
@pytest.mark.parametrize("number", range(8))
def test_layouts(number: int, window: Any) -> None:
    """Each one as query, as key and as value."""
    torch.manual_seed(0)
    views = layouts()
    views = [x.detach().requires_grad_() for x in views[number:] + views[:number]]
    leaves = dict(zip(("query", "key", "value"), views, strict=False))
    assert_as_exact_as_aten(leaves, window_size=window, shift_size=1)


@pytest.mark.parametrize("window", [4, 9])
def test_large_maps(window: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Images of more elements than 32 bits count."""
    monkeypatch.setattr(triton_launch, "NARROW", 0)
    leaves = inputs((10, 9), window, heads=1)
    assert_as_exact_as_aten(leaves, window_size=window, shift_size=2, semantics="dense")


@pytest.mark.parametrize("window", [4, 9])
def test_many_programs(window: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Programs of a window each, and one for all, leave the same sums."""
    leaves = inputs((9, 13), window, cosine=True)
    args = {"window_size": window, "shift_size": 1, "semantics": "dense"}
    for count in (1, 100):
        monkeypatch.setattr(_triton, "processors", lambda device, count=count: count)
        assert_as_exact_as_aten(leaves, **args)


def test_maps_of_one_projection_are_not_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    leaves = inputs((9, 14), 4)
    seen: list[int] = []
    monkeypatch.setattr(
        _triton,
        "launch",
        lambda kernel, grid, arguments, *_: seen.extend(
            arguments[name].data_ptr() for name in ("query", "key", "value")
        ),
    )
    window_attention(**leaves, window_size=4, impl="triton")
    assert seen == [leaves[n].data_ptr() for n in ("query", "key", "value")]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("window", [4, 9])
def test_vectors_of_zeros_have_no_direction(window: int, dtype: torch.dtype) -> None:
    """SwinV2's keys of a black border: other gradients stay finite beside them."""
    leaves = inputs((9, 9), window, cosine=True, padded=False, dtype=dtype, heads=1)
    low = {n: x.detach().clone() for n, x in leaves.items()}
    low["key"][:, :2] = 0
    low = {n: x.requires_grad_() for n, x in low.items()}
    exact = {n: x.detach().double().requires_grad_() for n, x in low.items()}
    args = {"window_size": window, "semantics": "dense"}
    expected, found = computed(exact, "reference", **args), computed(low, "triton", **args)
    for name in ("out", "query", "value", "bias", "logit_scale"):
        error = (found[name] - expected[name]).abs().max()
        limit = 16 * torch.finfo(dtype).eps * expected[name].abs().max()
        assert error <= limit, name
    assert found["key"][:, 2:].isfinite().all()


def test_large_scores_do_not_overflow() -> None:
    for window in (4, 9):
        leaves = {n: 30 * x.detach() for n, x in inputs((9, 9), window).items()}
        out = window_attention(**leaves, window_size=window, impl="triton")
        expected = window_attention(**leaves, window_size=window, impl="reference")
        torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-3)


def test_parameters_may_have_another_precision() -> None:
    """Under autocast the maps are bfloat16 and the parameters float32, which are not rounded."""
    leaves = inputs((5, 5), 4, cosine=True)
    maps = ("query", "key", "value")
    low = {n: (x.detach().bfloat16() if n in maps else x.detach()) for n, x in leaves.items()}
    low = {n: x.requires_grad_() for n, x in low.items()}
    with torch.autocast("cpu", torch.float16):
        found = computed(low, "triton", window_size=4)
    assert found["out"].dtype == torch.bfloat16
    assert found["bias"].dtype == torch.float32
    shifted = low | {"bias": low["bias"] + 1000}
    out = window_attention(**shifted, window_size=4, impl="triton")
    torch.testing.assert_close(out, found["out"], rtol=0, atol=0.02)


@pytest.mark.parametrize("window", [4, 9])
def test_empty_batch(window: int, kernels: list[str]) -> None:
    leaves = inputs((5, 9), window, cosine=True, batch=0)
    for name, x in computed(leaves, "triton", window_size=window).items():
        assert torch.equal(x, torch.zeros_like(leaves.get(name, x))), name
    assert not kernels


@pytest.mark.parametrize(("window", "extra"), [(4, []), (9, [(1, 9, 9, 2, 8), (1, 2, 9, 9)])])
def test_what_is_kept(window: int, extra: list[tuple[int, ...]]) -> None:
    """Inputs, and for larger windows the output and logarithms of sums."""
    leaves = inputs((9, 9), window, padded=False)
    kept: list[Tensor] = []

    def pack(x: Tensor) -> Tensor:
        kept.append(x)
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        window_attention(**leaves, window_size=window, impl="triton")
    given = {x.data_ptr() for x in leaves.values()}
    found = [tuple(x.shape) for x in kept if x.numel() and x.data_ptr() not in given]
    assert found == extra


def test_only_gradients_that_are_wanted() -> None:
    leaves = inputs((5, 6), 4)
    leaves = {n: x.detach().requires_grad_(n in ("query", "bias")) for n, x in leaves.items()}
    window_attention(**leaves, window_size=4, impl="triton").sum().backward()
    assert {n for n, x in leaves.items() if x.grad is not None} == {"query", "bias"}


@pytest.mark.parametrize("plain", [False, True])
@pytest.mark.parametrize("window", [3, 9])
def test_opcheck(window: int, plain: bool) -> None:
    x = inputs((5, 7), window, cosine=not plain, padded=not plain, biased=not plain, heads=1)
    maps = (x["query"], x["key"], x["value"], x.get("bias"), x.get("logit_scale"), x.get("pad"))
    shape = ((window, window), (1, 1), 0.3, "dense")
    torch.library.opcheck(OPS.window_attention_triton, (*maps, *shape))
    maps = tuple(None if y is None else y.detach() for y in maps)
    out, sums = OPS.window_attention_triton(*maps, *shape)
    grad = out.transpose(1, 3).contiguous().transpose(1, 3)
    args = (grad, None if window == 3 else out, sums, *maps, *shape)
    torch.library.opcheck(OPS.window_attention_triton_backward, args)


def test_second_derivatives_are_refused() -> None:
    leaves = inputs((5, 7), 3)
    out = window_attention(**leaves, window_size=3, impl="triton")
    (grad,) = torch.autograd.grad(out.sum(), leaves["query"], create_graph=True)
    with pytest.raises(RuntimeError, match="has no gradient; impl='reference'"):
        grad.sum().backward()


@pytest.mark.parametrize(("size", "window", "area"), [((9, 7), (3, 5), 15), ((9, 9), 9, 81)])
def test_flops_are_the_formula(size: tuple[int, int], window: Any, area: int) -> None:
    leaves = inputs(size, window, heads=1)
    product = 2 * leaves["query"].numel() * area

    def training() -> None:
        window_attention(**leaves, window_size=window, impl="triton").sum().backward()

    assert flops(training) == 7 * product


@pytest.mark.parametrize("window", [4, 9])
def test_compile_fullgraph(window: int) -> None:
    """Forward and backward, any batch, in few graphs."""
    torch._dynamo.reset()
    backend = CompileCounterWithBackend("aot_eager")

    def attention(leaves: dict[str, Tensor]) -> Tensor:
        return window_attention(**leaves, window_size=window, shift_size=1, impl="triton")

    compiled = torch.compile(attention, fullgraph=True, backend=backend)
    for batch in (1, 2, 3):
        leaves = inputs((9, 4), window, cosine=True, batch=batch, heads=1)
        expected = computed(leaves, "triton", window_size=window, shift_size=1)
        out = compiled(leaves)
        found = {"out": out.detach(), **gradients(out, leaves)}
        for name, x in expected.items():
            torch.testing.assert_close(found[name], x, msg=name)
    assert backend.frame_count <= 2


def test_one_program_for_all_maps() -> None:
    counter = CompileCounterWithBackend("eager")
    torch._dynamo.reset()
    compiled = torch.compile(window_attention, fullgraph=True, backend=counter, dynamic=True)
    for size in ((11, 14), (5, 20), (3, 4)):
        leaves = {n: x.detach() for n, x in inputs(size, 5, heads=1).items()}
        args = {"window_size": 5, "shift_size": 2}
        expected = window_attention(**leaves, **args, impl="reference")
        torch.testing.assert_close(compiled(**leaves, **args, impl="triton"), expected)
    assert counter.frame_count == 1


class Attention(torch.nn.Module):
    """What `torch.export` takes."""

    def __init__(self, impl: str) -> None:
        super().__init__()
        self.impl = impl

    def forward(self, x: dict[str, Tensor]) -> Tensor:
        return window_attention(**x, window_size=4, shift_size=2, impl=self.impl)


@pytest.mark.parametrize("impl", ["triton", "auto"])
def test_export(impl: str) -> None:
    """The op where it is asked for, ordinary functions elsewhere."""
    leaves = {n: x.detach() for n, x in inputs((6, 9), 4).items()}
    program = torch.export.export(Attention(impl), (leaves,))
    nodes = " ".join(str(node.target) for node in program.graph.nodes)
    assert ("vitarium.window_attention_triton" in nodes) == (impl == "triton")
    expected = window_attention(**leaves, window_size=4, shift_size=2, impl="reference")
    torch.testing.assert_close(program.module()(leaves), expected)


def test_which_implementation_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    x = {n: y.detach() for n, y in inputs((4, 5), 4).items()}
    ran = record(monkeypatch, "window")
    window_attention(**x, window_size=4)
    window_attention(**x, window_size=4, impl="triton")
    assert ran == ["aten", "triton"]
    found = explain("window", **x, window_size=4)
    assert found.reasons["triton"] is None
    assert found.reserved["triton"] == "its interpreter is for tests"


def test_one_large_window_is_left_to_flash_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_triton, "reserved", lambda *maps: None)
    x = {n: y.detach() for n, y in inputs((32, 32), 4, biased=False, padded=False).items()}

    def reason(window: Any, **args: Any) -> str | None:
        return explain("window", **x, **args, window_size=window).reserved["triton"]

    for window in ((None, None), (32, None), 32, 50):
        assert "flash attention, got 32x32" in (reason(window) or "")
    bias = torch.randn(2, 63, 63)
    for found in (reason((None, 8)), reason(7), reason(31), reason(32, bias=bias)):
        assert found is None


@pytest.mark.parametrize(
    ("head_dim", "dtype", "interpret", "reason"),
    [
        (8, torch.float32, "0", "kernels need a CUDA device, got cpu"),
        (8, torch.float64, "1", "kernels take float16, bfloat16 and float32, got torch.float64"),
        (129, torch.float32, "1", "kernels take a head_dim up to 128, got 129"),
    ],
)
def test_reasons(
    head_dim: int, dtype: torch.dtype, interpret: str, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", interpret)
    x = {n: y.detach() for n, y in inputs((2, 3), 2, dtype=dtype, head_dim=head_dim).items()}
    assert explain("window", **x, window_size=2).reasons["triton"] == reason
    with pytest.raises(ValueError, match=reason):
        window_attention(**x, window_size=2, impl="triton")


def test_cosines_end_at_a_hundred() -> None:
    leaves = {n: x.detach() for n, x in inputs((8, 8), 4, cosine=True).items()}
    leaves["logit_scale"] = torch.full((2,), math.log(100) + 1)
    out = window_attention(**leaves, window_size=4, impl="triton")
    leaves["logit_scale"] -= 1
    torch.testing.assert_close(window_attention(**leaves, window_size=4, impl="triton"), out)
