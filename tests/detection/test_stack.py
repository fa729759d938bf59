"""What is mended of mmengine and mmdet on a current stack; hostile files."""

from __future__ import annotations

import pytest

pytest.importorskip("mmdet")

import builtins
import functools
import operator
import os
import pickle
import sys
import zipfile

import mmengine.runner.runner
import numpy as np
import torch
from mmdet.evaluation.functional import ytviseval
from mmengine.infer import BaseInferencer
from mmengine.logging import HistoryBuffer
from mmengine.optim import OptimWrapper
from mmengine.registry import OPTIM_WRAPPERS
from mmengine.runner.checkpoint import _load_checkpoint
from mmengine.utils import get_installed_path, is_installed

from vitarium.checkpoints import CheckpointError
from vitarium.detection.checkpoints import read
from vitarium.heads.mmdet import stack


def content():
    """What a checkpoint of mmengine's holds beside weights."""
    buffer = HistoryBuffer()
    for value in (3.0, 1.0, 2.0):
        buffer.update(value)
    numbers = [np.float64(1.5), np.float32(2.5), np.int64(3), np.int32(4), np.bool_(True)]
    return {
        "meta": {"iter": 3, "cfg": "x = 1", "numbers": numbers},
        "state_dict": {"weight": torch.ones(2)},
        "message_hub": {"log_scalars": {"train/loss": buffer}, "array": np.arange(3.0)},
    }


def test_what_mmengine_writes_is_read(tmp_path):
    torch.save(content(), tmp_path / "a.pth")
    assert "getattr" in pickled(tmp_path / "a.pth")
    for found in (read(tmp_path / "a.pth"), _load_checkpoint(str(tmp_path / "a.pth"))):
        buffer = found["message_hub"]["log_scalars"]["train/loss"]
        assert [buffer.min(), buffer.max(), buffer.current(), buffer.mean()] == [1, 3, 2, 2]
        assert buffer.statistics("max") == 3
        assert found["meta"]["numbers"] == content()["meta"]["numbers"]
        assert torch.equal(found["state_dict"]["weight"], torch.ones(2))


def pickled(path):
    with zipfile.ZipFile(path) as archive:
        (name,) = [x for x in archive.namelist() if x.endswith("data.pkl")]
        return archive.read(name).decode("latin1").replace("\n", " ")


def test_names_of_numpy_1_are_read_too(tmp_path):
    torch.save({"value": np.float64(1.5), "array": np.arange(2.0)}, tmp_path / "new.pth")
    old = tmp_path / "old.pth"
    with zipfile.ZipFile(tmp_path / "new.pth") as source, zipfile.ZipFile(old, "w") as target:
        for name in source.namelist():
            target.writestr(name, source.read(name).replace(b"numpy._core.", b"numpy.core."))
    assert b"numpy.core.multiarray" in old.read_bytes()
    assert torch.load(old)["value"] == 1.5


class Call:
    """A pickle that calls a function."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


HOSTILE = {
    "system": lambda: Call(os.system, "touch ran"),
    "getattr of a module": lambda: Call(getattr, Call(__import__, "os"), "system"),
    "getattr of the class": lambda: Call(getattr, HistoryBuffer, "__init__"),
    "globals by getattr": lambda: Call(
        getattr, Call(getattr, HistoryBuffer, "mean"), "__globals__"
    ),
    "getattr of a name's kind": lambda: Call(getattr, HistoryBuffer, ("mean",)),
    "eval": lambda: Call(eval, "open('ran', 'w')"),
    "partial": lambda: Call(functools.partial, os.system, "touch ran"),
    "attrgetter": lambda: Call(operator.attrgetter, "system"),
    "a buffer with a method": lambda: hidden("_log_history", os.system),
    "a buffer with no numbers": lambda: hidden("_log_history", np.array(["touch ran"])),
}


def hidden(name, value):
    buffer = HistoryBuffer()
    setattr(buffer, name, value)
    return buffer


@pytest.mark.parametrize("make", HOSTILE.values(), ids=HOSTILE)
def test_hostile_files_are_refused_and_nothing_runs(tmp_path, monkeypatch, make):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "hostile.pth"
    torch.save({"state_dict": {}, "x": make()}, path)
    opened = []
    monkeypatch.setattr(os, "system", opened.append)
    monkeypatch.setattr(builtins, "eval", opened.append)
    with pytest.raises(CheckpointError, match="more than tensors and plain data"):
        read(path)
    with pytest.raises(pickle.UnpicklingError):
        _load_checkpoint(str(path))
    assert not opened
    assert not (tmp_path / "ran").exists()


def test_statistics_do_not_come_from_files(tmp_path):
    buffer = content()["message_hub"]["log_scalars"]["train/loss"]
    buffer.__dict__["mean"] = buffer.__dict__["statistics_methods"] = {"mean": torch.Size}
    torch.save({"x": buffer}, tmp_path / "a.pth")
    before = dict(HistoryBuffer._statistics_methods)
    found = _load_checkpoint(str(tmp_path / "a.pth"))["x"]
    assert found.mean() == 2
    assert HistoryBuffer._statistics_methods == before


def test_a_config_in_a_checkpoint_is_dropped_or_refused(tmp_path):
    ran = tmp_path / "ran"
    saved = content()
    saved["meta"]["config"] = saved["meta"]["cfg"] = f"open({str(ran)!r}, 'w')"
    torch.save(saved, tmp_path / "a.pth")
    meta = mmengine.runner.runner._load_checkpoint(str(tmp_path / "a.pth"))["meta"]
    assert "config" not in meta
    assert meta["iter"] == 3

    class Inferencer(BaseInferencer):
        def __init__(self):
            pass

        visualize = postprocess = _init_pipeline = None

    with pytest.raises(ValueError, match="model: expected a config, got None; .* not run"):
        Inferencer()._init_model({}, str(tmp_path / "a.pth"))
    assert not ran.exists()


def test_packages_are_found_without_pkg_resources(monkeypatch):
    monkeypatch.setitem(sys.modules, "pkg_resources", None)
    assert is_installed("mmdet")
    assert is_installed("mmcv-lite")
    assert not is_installed("mmdet-that-is-not")
    assert get_installed_path("mmcv-lite") == get_installed_path("mmcv")
    assert get_installed_path("mmdet").endswith("mmdet")
    with pytest.raises(ImportError):
        get_installed_path("mmdet-that-is-not")


def test_the_machine_is_described_without_distutils(monkeypatch):
    monkeypatch.setitem(sys.modules, "distutils", None)
    assert mmengine.runner.runner.collect_env()["PyTorch"] == torch.__version__


def test_old_names_of_numbers_are_there_for_two_modules_only():
    assert np.arange(2).astype(ytviseval.np.float).dtype == np.float64
    assert ytviseval.np.zeros is np.zeros
    assert not hasattr(np, "float")


def test_mixed_precision_on_a_cpu(monkeypatch):
    monkeypatch.setattr("mmengine.device.utils.DEVICE", "cpu")
    layer = torch.nn.Linear(4, 4)
    settings = {"optimizer": torch.optim.SGD(layer.parameters(), 0.1)}
    wrapper = OPTIM_WRAPPERS.build(dict(type="AmpOptimWrapper", **settings))
    assert isinstance(wrapper, OptimWrapper)
    with wrapper.optim_context(layer):
        out = layer(torch.ones(2, 4))
    assert out.dtype == torch.bfloat16
    before = layer.weight.clone()
    wrapper.update_params(out.float().sum())
    assert not torch.equal(layer.weight, before)
    wrapper.load_state_dict(wrapper.state_dict())
    with pytest.raises(ValueError, match=r"optim_wrapper.dtype: expected bfloat16 .* float16"):
        OPTIM_WRAPPERS.build(dict(type="AmpOptimWrapper", dtype="float16", **settings))


def test_a_second_call_changes_nothing():
    before = mmengine.runner.runner._load_checkpoint, mmengine.runner.runner.collect_env
    stack.mend()
    assert before == (mmengine.runner.runner._load_checkpoint, mmengine.runner.runner.collect_env)
