"""Windows as long as the map, and the authors' windows on maps that they do not divide."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.export import Dim, export

from vitarium.ops import window_attention

pytestmark = pytest.mark.usefixtures("nan_memory")

SIZES = [(9, 14), (2, 2), (1, 1), (3, 9), (4, 4), (8, 12), (4, 17), (20, 3), (13, 4)]
STRIPES = [
    {"window_size": (None, 3)},
    {"window_size": (3, None), "semantics": "dense"},
    {"window_size": (None, None)},
]


def maps(size: tuple[int, int], batch: int = 2) -> list[Tensor]:
    generator = torch.Generator().manual_seed(sum(size))
    qkv = torch.randn(batch, *size, 3, 2, 8, generator=generator, dtype=torch.float64)
    return [x.requires_grad_() for x in qkv.unbind(3)]


def table(window: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    bias = torch.randn(2, 2 * window - 1, 2 * window - 1, generator=generator, dtype=torch.float64)
    return {"bias": bias, "pad": torch.randn(3, 2, 8, generator=generator, dtype=torch.float64)}


class Attention(torch.nn.Module):
    """What `torch.export` takes."""

    def __init__(self, call: dict[str, Any]) -> None:
        super().__init__()
        self.call = call

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return window_attention(query, key, value, **self.call)


@pytest.mark.parametrize("impl", ["reference", "aten"])
@pytest.mark.parametrize("size", SIZES)
def test_none_is_the_whole_axis(size: tuple[int, int], impl: str) -> None:
    for call in STRIPES:
        x = maps(size)
        out = window_attention(*x, **call, impl=impl)
        whole = tuple(n or side for n, side in zip(call["window_size"], size, strict=True))
        expected = window_attention(*x, **call | {"window_size": whole}, impl="reference")
        torch.testing.assert_close(out, expected)
        for a, b in zip(
            torch.autograd.grad(out.square().sum(), x),
            torch.autograd.grad(expected.square().sum(), x),
            strict=True,
        ):
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize("impl", ["reference", "aten"])
@pytest.mark.parametrize("size", SIZES)
def test_authors_padded(size: tuple[int, int], impl: str) -> None:
    """What the authors' classifier computes where it runs; a map larger than windows is padded."""
    call = {**table(4), "window_size": 4, "shift_size": 2}
    x = maps(size)
    out = window_attention(*x, **call, semantics="authors_padded", impl=impl)
    side = min(*size, 4)
    if size[0] % side == 0 and size[1] % side == 0:
        expected = window_attention(*x, **call, semantics="authors", impl="reference")
    elif min(size) > 4:
        expected = window_attention(*x, **call, semantics="dense", impl="reference")
    else:
        middle = slice(4 - side, 3 + side)
        clamped = {"bias": call["bias"][:, middle, middle], "window_size": side, "shift_size": 0}
        expected = window_attention(*x, **call | clamped, semantics="dense", impl="reference")
    torch.testing.assert_close(out, expected)


CALLS = [
    *STRIPES,
    {**table(4), "window_size": 4, "shift_size": 2, "semantics": "authors_padded"},
    {**table(5), "window_size": 5, "semantics": "authors_padded"},
]


@pytest.mark.parametrize("call", CALLS, ids=lambda call: str(call["window_size"]))
def test_one_exported_program_for_all_sizes(call: dict[str, Any]) -> None:
    sides = {0: Dim("B"), 1: Dim("H"), 2: Dim("W")}
    program = export(Attention(call), tuple(maps((9, 14))), dynamic_shapes=[sides] * 3).module()
    for batch, size in enumerate(((9, 14), (2, 3), (3, 9), (4, 4), (8, 12), (4, 17), (20, 3)), 2):
        x = maps(size, batch)
        torch.testing.assert_close(program(*x), window_attention(*x, **call, impl="reference"))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ({"window_size": (None, 3), "semantics": "authors"}, "window_size: expected numbers"),
        ({"window_size": (None, 3), "bias": torch.zeros(2, 5, 5)}, "window_size: expected numbers"),
        ({"window_size": (None, 3), "shift_size": (1, 0)}, "shift_size: expected"),
        ({"window_size": (None, 0)}, "window_size: expected a positive int"),
        ({"window_size": (4, 3), "semantics": "authors_padded"}, "window_size: expected a square"),
    ],
)
def test_bad_windows(call: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        window_attention(*(x.detach() for x in maps((9, 12))), **call)
