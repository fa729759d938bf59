"""Weights and optimizers of one process or many, as plain tensors, and an average of weights."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.optim import Optimizer

_WHOLE = StateDictOptions(full_state_dict=True, cpu_offload=True)


def shard(model: nn.Module, mesh: Any) -> None:
    """FSDP2: every process keeps a part of each block's weights, and of the rest."""
    for module in model.modules():
        if isinstance(module, (nn.ModuleList, nn.Sequential)):
            for child in module:
                composite = any(True for _ in child.children())
                if composite and not isinstance(child, (nn.ModuleList, nn.Sequential)):
                    fully_shard(child, mesh=mesh)
    fully_shard(model, mesh=mesh)


def model_state(model: nn.Module) -> dict[str, Any]:
    """All weights by name; every process must ask where they are sharded."""
    if isinstance(model, FSDPModule):
        return get_model_state_dict(model, options=_WHOLE)
    return model.state_dict()


def optimizer_state(model: nn.Module, optimizer: Optimizer) -> dict[str, Any]:
    """The optimizer's state; every process must ask where it is sharded."""
    if isinstance(model, FSDPModule):
        return get_optimizer_state_dict(model, optimizer, options=_WHOLE)
    return optimizer.state_dict()


def restore(
    model: nn.Module, optimizer: Optimizer, weights: dict[str, Any], state: dict[str, Any]
) -> None:
    """Put back what `model_state` and `optimizer_state` gave."""
    if isinstance(model, FSDPModule):
        set_model_state_dict(model, weights, options=StateDictOptions(full_state_dict=True))
        options = StateDictOptions(full_state_dict=True)
        set_optimizer_state_dict(model, optimizer, state, options=options)
        return
    model.load_state_dict(weights)
    optimizer.load_state_dict(state)


class Average:
    """An exponential average of all weights and statistics, where and as the model holds them.

    Args:
        model: whose values it starts from.
        decay: share of the old average that an update keeps.
        warmup: whether that share rises as 1 - n^(-2/3) at the n-th update (timm).
    """

    def __init__(self, model: nn.Module, decay: float, warmup: bool) -> None:
        self._decay = decay
        self._warmup = warmup
        self.values: dict[str, Tensor] = {k: v.clone() for k, v in model.state_dict().items()}

    @torch.no_grad()
    def update(self, model: nn.Module, updates: int) -> None:
        """Take the weights after a number of updates in; those after the first as they are."""
        decay = self._decay if updates > 1 else 0.0
        if self._warmup:
            decay = min(decay, 1 - updates ** (-2 / 3))
        current = model.state_dict()
        floating = [name for name, value in self.values.items() if value.is_floating_point()]
        for name in self.values.keys() - floating:
            self.values[name].copy_(current[name])
        torch._foreach_lerp_(
            [self.values[name] for name in floating],
            [current[name] for name in floating],
            1 - decay,
        )

    @contextmanager
    def applied(self, model: nn.Module) -> Iterator[None]:
        """The model with the average in the place of its weights."""
        self._swap(model)
        try:
            yield
        finally:
            self._swap(model)

    @torch.no_grad()
    def _swap(self, model: nn.Module) -> None:
        for name, value in model.state_dict().items():
            kept = value.clone()
            value.copy_(self.values[name])
            self.values[name].copy_(kept)

    def state(self, model: nn.Module) -> dict[str, Any]:
        """All values by name; every process must ask where they are sharded."""
        if not isinstance(model, FSDPModule):
            return self.values
        with self.applied(model):
            return {name: value.clone() for name, value in model_state(model).items()}

    def restore(self, model: nn.Module, values: dict[str, Any]) -> None:
        """Put back what `state` gave."""
        with self.applied(model):
            if isinstance(model, FSDPModule):
                set_model_state_dict(model, values, options=StateDictOptions(full_state_dict=True))
            else:
                model.load_state_dict(values)
