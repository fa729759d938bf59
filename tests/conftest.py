"""Settings and fixtures that every test shares."""

import os
from collections.abc import Iterator
from pathlib import Path

# A graph compiled before a mended fake would otherwise come back from the disk.
os.environ["TORCHINDUCTOR_FORCE_DISABLE_CACHES"] = "1"

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before Triton loads: its kernels then run on a CPU

import vitarium  # noqa: F401  (registers the backbones)
from vitarium.checkpoints import transport
from vitarium.ops import _select

# Threads that wait for each other spin: on a machine with other load two are slower than one.
torch.set_num_threads(1)


@pytest.fixture
def nan_memory():
    """``torch.empty`` gives NaN: whoever reads what was never written is found out."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    yield
    torch.use_deterministic_algorithms(before)


@pytest.fixture
def ops_run(monkeypatch):
    """Names of our ops in the order in which they run."""
    names = []
    call = _select.Op.__call__

    def recorded(self, *args, **kwargs):
        names.append(self.name)
        return call(self, *args, **kwargs)

    monkeypatch.setattr(_select.Op, "__call__", recorded)
    return names


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty weight cache of one's own, no waiting, and nothing half-done in it afterwards."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    for variable in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_ENDPOINT", "VITARIUM_LOCK"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setattr(transport, "_PAUSES", (0.0, 0.0, 0.0))
    monkeypatch.setattr(transport, "_TIMEOUT", 5.0)
    folder = tmp_path / "torch" / "hub" / "checkpoints" / "vitarium"
    yield folder
    assert not [path for path in folder.glob("*") if path.suffix == ".new" or ".part" in path.name]
