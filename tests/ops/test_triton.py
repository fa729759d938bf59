"""What the Triton implementations share: reasons, the choice of a configuration, compilation."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

from vitarium.ops import _triton
from vitarium.ops._triton import Config

pytestmark = pytest.mark.skipif(
    find_spec("triton") is None, reason="the package triton is not installed"
)

OPS = ("window", "neighborhood", "routing", "agent", "channel")
CONFIGS = [Config({"BLOCK": 16}), Config({"BLOCK": 32}, 8, 3)]


class Kernel:
    """Remembers how it was launched."""

    def __init__(self) -> None:
        self.launches: list[dict[str, Any]] = []

    def __getitem__(self, grid: Any) -> Any:
        def run(**arguments: Any) -> None:
            self.launches.append({"grid": grid({**arguments}), **arguments})

        return run


class Tuner(Kernel):
    """Takes the place of Triton's."""


def launch(kernel: Kernel, size: int = 3) -> None:
    arguments = {"x": torch.zeros(2), "SIZE": size}
    _triton.launch(kernel, lambda a: (a["SIZE"], a.get("BLOCK", 0)), arguments, CONFIGS, ("SIZE",))


@pytest.fixture
def tuner(monkeypatch):
    """As on a card: no interpreter, nothing captured, nothing timed before."""
    found = Tuner()
    monkeypatch.setattr(_triton, "interpreted", lambda: False)
    monkeypatch.setattr(_triton, "_tuned", set())
    monkeypatch.setattr(_triton, "_tuner", lambda *_: found)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.delenv("VITARIUM_AUTOTUNE", raising=False)
    return found


def assert_first(kernel: Kernel) -> None:
    (found,) = kernel.launches
    assert found["grid"] == (3, 16)
    assert (found["BLOCK"], found["num_warps"], found["num_stages"]) == (16, 4, 2)


def test_the_interpreter_takes_the_first_configuration():
    kernel = Kernel()
    launch(kernel)
    assert_first(kernel)


def test_configurations_are_timed(tuner):
    kernel = Kernel()
    launch(kernel)
    assert not kernel.launches
    assert len(tuner.launches) == 1
    assert "BLOCK" not in tuner.launches[0]  # the tuner adds it


def test_timing_can_be_switched_off(tuner, monkeypatch):
    monkeypatch.setenv("VITARIUM_AUTOTUNE", "0")
    kernel = Kernel()
    launch(kernel)
    assert_first(kernel)
    assert not tuner.launches


def test_deterministic_runs_are_not_timed(tuner, nan_memory):
    kernel = Kernel()
    launch(kernel)
    assert_first(kernel)
    assert not tuner.launches


def test_nothing_is_timed_while_a_graph_is_captured(tuner, monkeypatch):
    kernel = Kernel()
    launch(kernel)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    launch(kernel)  # of a kind that was timed before
    assert len(tuner.launches) == 2
    launch(kernel, size=4)
    assert len(tuner.launches) == 2
    assert [x["SIZE"] for x in kernel.launches] == [4]


def test_reasons(monkeypatch):
    maps = torch.zeros(1, 2, 2, 1, 32)
    assert _triton.unsupported(maps) is None
    assert "float64" in _triton.unsupported(maps.double())
    assert "129" in _triton.unsupported(maps, torch.zeros(1, 2, 2, 1, 129))
    assert "meta" in _triton.unsupported(maps.to("meta"))
    assert "tests" in _triton.reserved(maps)
    monkeypatch.setattr(_triton, "find_spec", lambda name: None)
    assert "not installed" in _triton.unsupported(maps)
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    assert _triton.unsupported(maps) == "kernels need a CUDA device, got cpu"


def test_old_cards_are_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert "8.0" in _triton.device_unsupported(torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    assert _triton.device_unsupported(torch.device("cuda")) is None


def test_blocks():
    assert [_triton.block(n) for n in (1, 16, 17, 49, 64, 65)] == [16, 16, 32, 64, 64, 128]
    assert _triton.block(3, 1) == 4


@pytest.fixture
def matmul():
    """Torch's settings of products on a GPU, put back."""
    settings = torch.backends.cuda.matmul
    before = settings.fp32_precision
    yield settings
    settings.fp32_precision = before


def test_tf32_only_where_torch_takes_it(matmul):
    assert _triton.precision(torch.float32) == "ieee"
    matmul.fp32_precision = "tf32"
    assert _triton.precision(torch.float32) == "tf32"
    assert _triton.precision(torch.bfloat16) == "ieee"


def compiled(*arguments: str) -> list[dict[str, Any]]:
    script = Path(__file__).with_name("triton_compiled.py")
    root = str(script.parents[2])
    run = subprocess.run(
        [sys.executable, str(script), *arguments],
        env={**os.environ, "PYTHONPATH": root, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    return [json.loads(line) for line in run.stdout.splitlines()]


@pytest.mark.parametrize("op", OPS)
def test_kernels_compile_for_a_card_that_is_not_there(op, tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    rows = compiled(op, "--first", "--count", "1")
    assert any("_fwd_" in row["kernel"] for row in rows)
    assert any("_bwd_" in row["kernel"] for row in rows)
    for row in rows:
        assert row["spilled"] <= 64, row
        assert row["shared"] <= 99 * 1024, row  # of any card of capability 8.0 on


def test_the_tuner_takes_every_argument_and_remembers(tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.delenv("VITARIUM_AUTOTUNE", raising=False)
    launches = [row["kernel"] for row in compiled("channel", "--tune", "--count", "1")]
    names = ("products", "weights", "fwd", "bwd_products", "weights", "bwd")
    once = [f"_channel_{name}_kernel" for name in names]
    assert launches[-len(once) :] == once  # the second time
    assert list(dict.fromkeys(launches)) == list(dict.fromkeys(once))
    assert launches.count("_channel_fwd_kernel") > 3  # the first time all configurations
    assert len([*tmp_path.rglob("*.autotune.json")]) == 4


@pytest.mark.slow
@pytest.mark.parametrize("arch", ["80", "90"])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_every_configuration_compiles(dtype, arch, tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    rows = compiled("--dtype", dtype, "--arch", arch)
    kernels = [row for row in rows if "kernel" in row]
    assert {row["kernel"].split("_")[1] for row in kernels} == {*OPS}
    for row in kernels:
        assert row["shared"] <= 227 * 1024, row
