from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file

import vitarium_cli


class Result(NamedTuple):
    status: int
    out: str
    err: str


@pytest.fixture
def program(capsys: pytest.CaptureFixture[str]) -> Callable[..., Result]:
    """Run the program in this process."""

    def run(*argv: str | Path) -> Result:
        status = vitarium_cli.main([str(argument) for argument in argv])
        return Result(status, *capsys.readouterr())

    return run


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of nat_atto with random weights."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("weights") / "atto.safetensors"
    save_file(timm.create_model("nat_atto").state_dict(), path)
    return path


@pytest.fixture(scope="session")
def photo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A smooth colour image, 48 pixels high and 72 wide."""
    y, x = np.mgrid[:48, :72]
    pixels = np.stack([3 * x, 5 * y, 255 - 2 * x - y], axis=-1).astype(np.uint8)
    path = tmp_path_factory.mktemp("images") / "photo.png"
    Image.fromarray(pixels).save(path)
    return path
