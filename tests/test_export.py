"""Exported programs: plain PyTorch, equal numbers, no vitarium needed to run them."""

import subprocess
import sys

import pytest
import timm
import torch

from vitarium.backbones._registry import entries
from vitarium.heads.features import FeatureBackbone

ATTOS = [name for name in entries() if name.endswith("_atto")]
SIZES = [(64, 64), (37, 51)]

ELSEWHERE = """
import sys, torch
sys.modules["vitarium"] = sys.modules["timm"] = None  # an import would fail
program, image, out = sys.argv[1:]
torch.save(torch.export.load(program).module()(torch.load(image)), out)
"""


def assert_close(actual, expected):
    assert actual.shape == expected.shape
    assert (actual - expected).abs().max() <= 1e-5 * expected.std()


@pytest.mark.parametrize("name", ATTOS)
@pytest.mark.parametrize("size", SIZES)
@torch.no_grad()
def test_exported_model_computes_the_same(name, size):
    torch.manual_seed(0)
    model, x = timm.create_model(name).eval(), torch.randn(2, 3, *size)
    program = torch.export.export(model, (x,))
    targets = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    assert not [target for target in targets if "vitarium" in target]
    assert_close(program.module()(x), model(x))


@pytest.mark.parametrize("name", ATTOS)
@torch.no_grad()
def test_one_program_for_all_batches_and_sizes(name):
    """As long as the maps hold a window: where they are padded to one is another program."""
    torch.manual_seed(0)
    model, x = timm.create_model(name).eval(), torch.randn(2, 3, 128, 160)
    sides = {2: torch.export.Dim("H", min=65), 3: torch.export.Dim("W", min=65)}
    dynamic = ({0: torch.export.Dim("B"), **sides},)
    program = torch.export.export(model, (x,), dynamic_shapes=dynamic).module()
    for shape in ((1, 3, 65, 65), (3, 3, 97, 210)):
        x = torch.randn(shape)
        assert_close(program(x), model(x))


@pytest.mark.parametrize("name", ATTOS)
@torch.no_grad()
def test_saved_program_runs_without_vitarium(name, tmp_path):
    torch.manual_seed(0)
    model, x = timm.create_model(name).eval(), torch.randn(1, 3, 48, 64)
    program, image, out = (str(tmp_path / file) for file in ("model.pt2", "x.pt", "y.pt"))
    torch.export.save(torch.export.export(model, (x,)), program)
    torch.save(x, image)
    subprocess.run([sys.executable, "-c", ELSEWHERE, program, image, out], check=True)
    assert_close(torch.load(out), model(x))


@pytest.mark.parametrize("name", ATTOS)
@pytest.mark.parametrize("task", [None, "det"])
@torch.no_grad()
def test_exported_pyramid_computes_the_same(name, task):
    torch.manual_seed(0)
    backbone, x = FeatureBackbone(name, task=task).eval(), torch.randn(1, 3, 37, 51)
    maps = torch.export.export(backbone, (x,)).module()(x)
    for y, z in zip(maps, backbone(x), strict=True):
        assert_close(y, z)
