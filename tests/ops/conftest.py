"""Fixtures of the ops' tests."""

import pytest

from vitarium.ops import _triton


@pytest.fixture
def kernels(monkeypatch):
    """Names of the Triton kernels in the order in which they are launched."""
    names = []
    launch = _triton.launch

    def recorded(kernel, *args):
        names.append(kernel.__name__)
        launch(kernel, *args)

    monkeypatch.setattr(_triton, "launch", recorded)
    return names
