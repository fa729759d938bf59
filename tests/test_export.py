"""Exported programs: plain PyTorch, equal numbers, no vitarium needed to run them."""

import subprocess
import sys

import pytest
import torch
from attos import ATTOS, SIZE, assert_same, create, image, is_fixed, limits, sizes, smallest_side
from torch.export import Dim, export

from vitarium.backbones._registry import entries
from vitarium.heads.features import FeatureBackbone

ELSEWHERE = """
import sys, torch
sys.modules["vitarium"] = sys.modules["timm"] = None  # an import would fail
for name in sys.argv[1:]:
    program = torch.export.load(name + ".pt2")
    torch.save(program.module()(torch.load(name + ".x")), name + ".y")
"""


@torch.no_grad()
def test_saved_programs_run_without_vitarium(tmp_path):
    expected = {}
    for name in ATTOS:
        size = sizes(name)[-1]
        model, x = create(name, size), image(size, batch=2)
        torch.export.save(export(model, (x,)), tmp_path / f"{name}.pt2")
        torch.save(x, tmp_path / f"{name}.x")
        expected[name] = model(x)
    subprocess.run([sys.executable, "-c", ELSEWHERE, *ATTOS], cwd=tmp_path, check=True)
    for name in ATTOS:
        assert_same(torch.load(tmp_path / f"{name}.y"), expected[name])


def dynamic_sizes(name):
    """An image, its dynamic sizes, and shapes that the same program has to take.

    At the smallest size of all a map has one token: torch makes that a program of its own.
    """
    if is_fixed(name):
        return image(batch=2), {0: Dim("B")}, [(batch, 3, *SIZE) for batch in (1, 5)]
    n = smallest_side(name) + 1
    sides = {0: Dim("B"), 2: Dim("H", min=n), 3: Dim("W", min=n)}
    return image((96, 128), batch=2), sides, [(1, 3, n, n), (3, 3, 97, 210)]


@pytest.mark.slow
@pytest.mark.parametrize("name", ATTOS)
@torch.no_grad()
def test_one_program_for_all_batches_and_sizes(name):
    model = create(name)
    x, dynamic, shapes = dynamic_sizes(name)
    program = export(model, (x,), dynamic_shapes=(dynamic,)).module()
    for shape in shapes:
        x = torch.randn(shape)
        assert_same(program(x), model(x))


@pytest.mark.parametrize(
    ("name", "task"),
    [
        (name, task)
        for name in ATTOS
        for task in (None, "det")
        if task is None
        or (hasattr(entries()[name], "dense_adapter") and "dense form" not in limits(name))
    ],
)
@torch.no_grad()
def test_one_program_for_pyramids_of_all_sizes(name, task):
    """Of two levels: tracing takes long, and further ones are more of the same."""
    kwargs = {"img_size": SIZE} if is_fixed(name) else {}
    torch.manual_seed(0)
    backbone = FeatureBackbone(name, out_indices=(0, 1), task=task, **kwargs).eval()
    x, dynamic, shapes = dynamic_sizes(name)
    program = export(backbone, (x,), dynamic_shapes=(dynamic,)).module()
    for shape in shapes:
        x = torch.randn(shape)
        for y, z in zip(program(x), backbone(x), strict=True):
            assert_same(y, z)
