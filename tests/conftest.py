"""Settings and fixtures that every test shares."""

import os

# A graph compiled before a mended fake would otherwise come back from the disk.
os.environ["TORCHINDUCTOR_FORCE_DISABLE_CACHES"] = "1"

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before Triton loads: its kernels then run on a CPU

import vitarium  # noqa: F401  (registers the backbones)
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
