"""What breaks or is unsafe where mmengine 0.10 and mmdet 3.3 meet a current stack, mended once.

- torch.load reads with ``weights_only`` since torch 2.6, and mmengine's checkpoints hold more than
  tensors: statistics of the log and numbers of NumPy. Exactly these may be read.
- ``Runner.resume`` runs ``meta["config"]`` of a checkpoint as Python, and inferencers the config in
  their weights. The first is dropped when a file is read, the second refused.
- ``pkg_resources`` left setuptools and ``distutils`` left Python.
- NumPy 2 has no ``np.float``.
- Mixed precision asks for a GPU.
- Every checkpoint formats the config anew, for a second or more.
"""

from __future__ import annotations

import importlib.util
import pickle
import sys
from collections.abc import Callable
from functools import wraps
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from mmengine.config.config import FormatCode
from mmengine.infer import BaseInferencer
from mmengine.logging import HistoryBuffer
from mmengine.optim import AmpOptimWrapper, OptimWrapper
from mmengine.registry import OPTIM_WRAPPERS
from mmengine.runner import checkpoint as mmengine_checkpoint
from mmengine.utils import package_utils
from mmengine.utils.dl_utils import collect_env

_STATISTICS = ("min", "max", "current", "mean")
_KINDS = ("Float64", "Float32", "Int64", "Int32", "Bool")  # of NumPy's numbers
_PACKAGES = ("mmengine", "mmcv", "mmdet")


def mend() -> None:
    """Put all of it in place; a second call changes nothing."""
    if getattr(BaseInferencer, "_mended", False):
        return
    BaseInferencer._mended = True
    allow_checkpoints()
    _replace(mmengine_checkpoint._load_checkpoint, _without_config)
    BaseInferencer._init_model = _with_config(BaseInferencer._init_model)
    _replace(package_utils.is_installed, lambda _: is_installed)
    _replace(package_utils.get_installed_path, lambda _: installed_path)
    _replace(FormatCode, _remembered)
    _replace(collect_env, _without_distutils)
    OPTIM_WRAPPERS.register_module("AmpOptimWrapper", force=True, module=MixedPrecision)
    _old_numbers("mmdet.evaluation.functional.ytviseval", "mmcv.ops.pixel_group")


def allow_checkpoints() -> None:
    """Let torch.load read what mmengine writes with ``weights_only``, and nothing else."""
    rebuild: Any = np.zeros(0).__reduce__()[0]
    number: Any = np.float64(0).__reduce__()[0]
    named: list[Any] = [(_statistic, "builtins.getattr")]
    for module in ("numpy._core.multiarray", "numpy.core.multiarray"):  # of NumPy 2 and 1
        named += [(rebuild, f"{module}._reconstruct"), (number, f"{module}.scalar")]
    kinds = [getattr(np.dtypes, f"{kind}DType") for kind in _KINDS]
    torch.serialization.add_safe_globals([HistoryBuffer, np.ndarray, np.dtype, *kinds, *named])
    HistoryBuffer.__setstate__ = _set_state


def _statistic(owner: Any, name: Any) -> Any:
    """In the place of getattr: a buffer's pickle asks for its class' statistics by it."""
    if owner is not HistoryBuffer or name not in _STATISTICS:
        raise pickle.UnpicklingError(
            f"refused: it asks for {name!r} of {owner!r}, and only statistics of logs are given"
        )
    return vars(HistoryBuffer)[name]


def _set_state(self: HistoryBuffer, state: dict[str, Any]) -> None:
    """Restore a buffer's numbers; mmengine would take its class' methods from the file too."""
    logs, counts, length = (state[x] for x in ("_log_history", "_count_history", "max_length"))
    for values in (logs, counts):
        if type(values) is not np.ndarray or values.ndim != 1 or values.dtype.kind not in "biuf":
            raise pickle.UnpicklingError("refused: a log's history is not a row of numbers")
    HistoryBuffer.__init__(self, logs, counts, length)


def _without_config(load: Callable[..., Any]) -> Callable[..., Any]:
    """Read checkpoints without the key that `Runner.resume` would run."""

    @wraps(load)
    def loaded(*args: Any, **kwargs: Any) -> Any:
        checkpoint = load(*args, **kwargs)
        meta = checkpoint.get("meta") if isinstance(checkpoint, dict) else None
        if isinstance(meta, dict):
            meta.pop("config", None)
        return checkpoint

    return loaded


def _with_config(init: Callable[..., Any]) -> Callable[..., Any]:
    """Refuse to run the config that stands in weights."""

    @wraps(init)
    def initialized(self: BaseInferencer, cfg: Any, *args: Any, **kwargs: Any) -> Any:
        if not cfg:
            raise ValueError(
                "model: expected a config, got None; the one in the weights is Python, which is "
                "not run"
            )
        return init(self, cfg, *args, **kwargs)

    return initialized


def is_installed(package: str) -> bool:
    """Whether there is a distribution or a module of this name."""
    try:
        distribution(package)
    except PackageNotFoundError:
        spec = importlib.util.find_spec(package)
        return spec is not None and spec.origin is not None
    return True


def installed_path(package: str) -> str:
    """Folder of a package, by its module's or its distribution's name.

    Raises:
        PackageNotFoundError: there is neither.
        RuntimeError: it has no folder of its own.
    """
    spec = importlib.util.find_spec(package) if package.isidentifier() else None
    if spec is None:
        modules = (distribution(package).read_text("top_level.txt") or "").split()
        spec = importlib.util.find_spec(modules[0]) if modules else None
    if spec is None or spec.origin is None:
        raise RuntimeError(f"{package}: expected a package with a folder, got none")
    return str(Path(spec.origin).parent)


def _without_distutils(collect: Callable[[], dict[str, Any]]) -> Callable[[], dict[str, Any]]:
    """Describe the machine in few words where the many need what Python 3.12 has not."""

    @wraps(collect)
    def collected() -> dict[str, Any]:
        try:
            return collect()
        except ModuleNotFoundError:
            return {
                "sys.platform": sys.platform,
                "Python": sys.version.replace("\n", ""),
                "PyTorch": torch.__version__,
                "CUDA available": torch.cuda.is_available(),
            }

    return collected


def _remembered(formatted: Callable[..., Any]) -> Callable[..., Any]:
    """Format a text once, where it is the last one again."""
    last: dict[str, Any] = {}

    @wraps(formatted)
    def remembered(text: str, *args: Any, **kwargs: Any) -> Any:
        if text not in last:
            last.clear()
            last[text] = formatted(text, *args, **kwargs)
        return last[text]

    return remembered


class MixedPrecision(AmpOptimWrapper):
    """mmengine's wrapper for GPUs; on a CPU, bfloat16 without scaling.

    Args:
        loss_scale: mmengine's; a CPU has none.
        dtype: ``bfloat16``, or None, which means that on a CPU.
        use_fsdp: mmengine's; a CPU has none.
        **kwargs: of `OptimWrapper`.

    Raises:
        ValueError: another dtype on a CPU.
    """

    def __init__(
        self,
        loss_scale: Any = "dynamic",
        dtype: str | torch.dtype | None = None,
        use_fsdp: bool = False,
        **kwargs: Any,
    ) -> None:
        from mmengine.device import get_device

        if get_device() != "cpu":
            super().__init__(loss_scale=loss_scale, dtype=dtype, use_fsdp=use_fsdp, **kwargs)
            return
        if dtype not in (None, "bfloat16", torch.bfloat16):
            raise ValueError(f"optim_wrapper.dtype: expected bfloat16 on a CPU, got {dtype}")
        OptimWrapper.__init__(self, **kwargs)
        self._scale_update_param = None
        self.loss_scaler = torch.amp.GradScaler("cpu", enabled=False)
        self.cast_dtype = torch.bfloat16


class _OldNumPy(ModuleType):
    """NumPy with the names of numbers that it had before 1.24."""

    float = float

    def __getattr__(self, name: str) -> Any:
        return getattr(np, name)


def _old_numbers(*names: str) -> None:
    for name in names:
        importlib.import_module(name).__dict__["np"] = _OldNumPy("numpy")


def _replace(old: Any, make: Callable[..., Any]) -> None:
    """Put something in the place of a function wherever it was imported by its name."""
    new, its_name = make(old), str(old.__name__)
    for name, module in [*sys.modules.items()]:
        if name.partition(".")[0] in _PACKAGES and vars(module).get(its_name) is old:
            setattr(module, its_name, new)
