"""torch.compile: one graph, the same numbers, few programs for many batches and sizes."""

import io
import shutil

import pytest
import torch
from attos import ATTOS, SIZE, assert_same, create, gradients, image, is_fixed, sizes
from rich.console import Console
from torch._dynamo.testing import CompileCounterWithBackend

from vitarium.tools import bench_compile

NEEDS_COMPILER = pytest.mark.skipif(
    not any(map(shutil.which, ("g++", "clang++", "cl"))), reason="inductor needs a C++ compiler"
)

pytestmark = pytest.mark.parametrize("name", ATTOS)


def compiled(model, backend, **kwargs):
    """The model as one graph, or an error."""
    torch.compiler.reset()
    return torch.compile(model, fullgraph=True, backend=backend, **kwargs)


def test_compiled_training_in_one_graph(name):
    size = SIZE if is_fixed(name) else sizes(name)[-1]
    # in float64: some position biases' gradients are differences of nearly equal numbers
    model, x = create(name, size).double().train(), image(size, batch=2).double()
    expected = gradients(model, x)
    for key, grad in gradients(model, x, compiled(model, "aot_eager")).items():
        assert_same(grad, expected[key], tolerance=1e-10)


def test_limits_on_programs(name):
    rows = bench_compile.measure(Console(file=io.StringIO()), [name])
    changes = [row["change"] for row in rows]
    assert changes == (["batch"] if is_fixed(name) else ["batch", "H x W"])
    assert [row for row in rows if not row["met"]] == []


@pytest.mark.slow
@torch.no_grad()
def test_one_program_when_all_is_dynamic(name):
    shapes = [(batch, 3, *SIZE) for batch in (2, 3, 5)]
    if not is_fixed(name):
        shapes = [(2, 3, 96, 128), (2, 3, 48, 80), (3, 3, 101, 166)]
    model, counter = create(name), CompileCounterWithBackend("eager")
    run = compiled(model, counter, dynamic=True)
    for shape in shapes:
        x = torch.randn(shape)
        assert_same(run(x), model(x))
    assert counter.frame_count == 1


@NEEDS_COMPILER
@torch.no_grad()
def test_default_backend(name):
    size = sizes(name)[-1]
    model, x = create(name, size), image(size)
    assert_same(compiled(model, "inductor")(x), model(x))
