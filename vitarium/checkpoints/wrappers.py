"""What surrounds the tensors in a checkpoint file: training states, prefixes, detectors."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from vitarium.checkpoints.errors import CheckpointError
from vitarium.checkpoints.files import DTYPES

# Averaged weights first: where a file holds them, the published accuracy is theirs.
WRAPPERS = ("state_dict_ema", "model_ema", "state_dict", "model")
_PREFIXES = ("module.", "_orig_mod.")
_BACKBONE = "backbone."
_DEPTH = 4


def unwrap(obj: Any, wrapper: str | None = None) -> dict[str, Tensor]:
    """Tensors by name, out of whatever a checkpoint file held.

    Understands a plain state dict, one under ``model``, ``state_dict``, ``model_ema`` or
    ``state_dict_ema`` (averaged weights are preferred), names that all begin with ``module.``
    or ``_orig_mod.``, and detectors: of names with ``backbone.`` only those are kept.

    Args:
        obj: what `read` returned, or a state dict.
        wrapper: where to look instead of searching: one of those four, or ``"plain"``.

    Returns:
        A new dictionary that shares the tensors.

    Raises:
        CheckpointError: no such wrapper, no tensors, or something else among them.
    """
    return split_detector(unwrap_tensors(obj, wrapper))[0]


def unwrap_tensors(obj: Any, wrapper: str | None = None) -> dict[str, Tensor]:
    """`unwrap` up to the prefix of a detector's backbone, which only some models want removed."""
    return unwrap_layers(obj, wrapper)[0]


def unwrap_layers(
    obj: Any, wrapper: str | None = None
) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """`unwrap_tensors`, and what it took off: keys and prefixes, the outermost first."""
    if wrapper not in (None, "plain", *WRAPPERS):
        raise ValueError(f"wrapper: expected plain or one of {WRAPPERS}, got {wrapper!r}")
    layers: list[str] = []
    if wrapper is None:
        obj = _innermost(obj, layers)
    elif wrapper != "plain":
        if not isinstance(obj, Mapping) or wrapper not in obj:
            raise CheckpointError(f"expected a checkpoint with the entry {wrapper!r}")
        obj = obj[wrapper]
        layers.append(wrapper)
    return _without_prefixes(_tensors(obj), layers), tuple(layers)


def split_detector(state_dict: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """A backbone's tensors without their prefix, and the other names with why they are left.

    Without any ``backbone.`` name everything is kept.
    """
    if not any(name.startswith(_BACKBONE) for name in state_dict):
        return dict(state_dict), {}
    kept = {
        name.removeprefix(_BACKBONE): tensor
        for name, tensor in state_dict.items()
        if name.startswith(_BACKBONE)
    }
    left = [name for name in state_dict if not name.startswith(_BACKBONE)]
    return kept, dict.fromkeys(left, "detector part, not backbone")


def _innermost(obj: Any, layers: list[str]) -> Any:
    for _ in range(_DEPTH):
        inner = [
            key
            for key in WRAPPERS
            if isinstance(obj, Mapping) and isinstance(obj.get(key), Mapping)
        ]
        if not inner:
            break
        obj = obj[inner[0]]
        layers.append(inner[0])
    return obj


def _tensors(obj: Any) -> dict[str, Tensor]:
    if not isinstance(obj, Mapping):
        raise CheckpointError(f"expected a dictionary of tensors by name, got {type(obj).__name__}")
    if not obj:
        raise CheckpointError("expected tensors by name, got an empty dictionary")
    for name, value in obj.items():
        if not isinstance(name, str) or not isinstance(value, Tensor):
            raise CheckpointError(
                f"expected tensors by name, got {type(value).__name__} at {name!r:.200} among "
                f"{len(obj)} entries"
            )
        if not name.isprintable():  # as the names of attributes are, and a terminal obeys others
            raise CheckpointError(
                f"expected names of tensors that can be printed, got {name!a:.200}"
            )
        if value.layout is not torch.strided or value.is_quantized or value.is_nested:
            raise CheckpointError(
                f"expected dense tensors, got a sparse, quantized or nested {name}"
            )
        if value.dtype not in DTYPES.values():  # torch could not copy it into a model
            raise CheckpointError(
                f"expected numbers of a kind that safetensors has, got {value.dtype} in {name}"
            )
        if _overlaps(value):
            raise CheckpointError(f"expected {value.numel()} values of their own in {name}")
    return dict(obj)


def _overlaps(tensor: Tensor) -> bool:
    """Whether elements share memory, as in an expanded tensor; damaged strides look like that."""
    reach = 0
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size > 1:
            if stride <= reach:
                return tensor.numel() > 0
            reach += stride * (size - 1)
    return False


def _without_prefixes(state_dict: dict[str, Tensor], layers: list[str]) -> dict[str, Tensor]:
    while True:
        for prefix in _PREFIXES:
            if all(name.startswith(prefix) for name in state_dict):
                layers.append(prefix)
                state_dict = {name.removeprefix(prefix): state_dict[name] for name in state_dict}
                break
        else:
            return state_dict
