"""Eight scenes, and configs whose detectors learn them in seconds."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import pytest
from small import TOY, detector

from vitarium.data.folders import SceneSet, ensure

if find_spec("mmdet") is not None:
    import vitarium.heads.mmdet  # noqa: F401  (operators, which mmdet wants when it is imported)


@pytest.fixture(autouse=True)
def on_path(monkeypatch):
    """Configs import the toy from here."""
    monkeypatch.syspath_prepend(Path(__file__).parent)


@pytest.fixture(scope="session")
def scenes(tmp_path_factory) -> Path:
    """Eight scenes of 64 x 64 pixels to train on, and four to validate."""
    return ensure("detection", tmp_path_factory.mktemp("data"), SceneSet(8, 4, (64, 64)))


@pytest.fixture
def config(scenes, tmp_path) -> Path:
    """A RetinaNet with nat_atto: an epoch of four iterations."""
    path = tmp_path / "tiny.py"
    path.write_text(detector(scenes))
    return path


@pytest.fixture
def toy(tmp_path) -> Path:
    """A toy's run: three epochs of five iterations, a checkpoint after each."""
    path = tmp_path / "toy.py"
    path.write_text(TOY)
    return path
