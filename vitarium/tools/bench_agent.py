"""Agent attention as one would write it without this package: the benchmark's peers."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from vitarium.tools import bench_case, bench_flex
from vitarium.tools.bench_case import Candidate, Compile, Inputs, OpCase


@dataclass(frozen=True)
class Agent(OpCase):
    """Maps batch x H x W with heads of head_dim channels, and a square of agents."""

    size: tuple[int, int]
    agent_size: int
    heads: int
    goals: dict[str, float] = field(default_factory=dict)
    batch: int = 2
    head_dim: int = 32
    biases: tuple[bool, ...] = (True,)  # no model is without
    op: ClassVar[str] = "agent"

    @property
    def title(self) -> str:
        height, width = self.size
        return f"{height}x{width} x {self.heads} heads, {self.agent_size**2} agents"

    def inputs(self, biased: bool) -> Inputs:
        """The output of the projection, with the gradient that it wants: copies count."""
        torch.manual_seed(0)
        height, width = self.size
        inputs = {"qkv": self.random(self.batch, height, width, 3, self.heads, self.head_dim)}
        if biased:
            shape = (self.heads, self.agent_size**2, height * width)
            inputs["agent_bias"] = self.random(*shape)
            inputs["token_bias"] = self.random(*shape).mT  # as bias maps are resized: [.., H, W]
        return {name: x.requires_grad_() for name, x in inputs.items()}

    def arguments(self, inputs: Inputs) -> dict[str, Any]:
        biases = {name: x for name, x in inputs.items() if name != "qkv"}
        maps = bench_case.named(inputs["qkv"].unbind(3))
        return {**maps, "agent_size": self.agent_size, **biases}

    def candidates(self, biased: bool, backward: bool) -> dict[str, Candidate | str]:
        del biased, backward
        return {
            "vitarium": self.ours,
            "SDPA twice, float mask": self._fused,
            "two materialised softmaxes": self._written_out,
        }

    def peers(self, biased: bool, backward: bool, compiled: Compile) -> dict[str, Candidate | str]:
        del biased, backward
        return {
            "SDPA twice, float mask": self._fused,
            "SDPA twice, float mask, compiled": compiled(self._fused),
            "two softmaxes": self._written_out,
            "two softmaxes, compiled": compiled(self._written_out),
            "FlexAttention twice, compiled": compiled(self._flex),
        }

    def _tokens(self, inputs: Inputs) -> tuple[Tensor, ...]:
        """Agents, then query, key and value, all [B, heads, tokens, head_dim]."""
        qkv = inputs["qkv"].flatten(1, 2).permute(2, 0, 3, 1, 4)
        grid = inputs["qkv"].select(3, 0).flatten(3).permute(0, 3, 1, 2)
        grid = F.adaptive_avg_pool2d(grid, self.agent_size).flatten(2)
        return grid.unflatten(1, (self.heads, self.head_dim)).mT, *qkv.unbind(0)

    def _fused(self, inputs: Inputs) -> Tensor:
        agents, query, key, value = self._tokens(inputs)
        first, second = (
            None if bias is None else bias[None]
            for bias in (inputs.get("agent_bias"), inputs.get("token_bias"))
        )
        gathered = F.scaled_dot_product_attention(agents, key, value, first)
        out = F.scaled_dot_product_attention(query, agents, gathered, second)
        return out.transpose(1, 2).reshape(inputs["qkv"].select(3, 0).shape)

    def _flex(self, inputs: Inputs) -> Tensor:
        inputs = bench_flex.given(inputs)
        agents, query, key, value = self._tokens(inputs)
        first, second = (
            bench_flex.added(inputs.get(name)) for name in ("agent_bias", "token_bias")
        )
        gathered = bench_flex.attend((agents, key, value), first)
        out = bench_flex.attend((query, agents, gathered), second)
        return out.transpose(1, 2).reshape(inputs["qkv"].select(3, 0).shape)

    def _written_out(self, inputs: Inputs) -> Tensor:
        agents, query, key, value = self._tokens(inputs)
        scale = self.head_dim**-0.5
        scores = agents * scale @ key.mT
        if "agent_bias" in inputs:
            scores = scores + inputs["agent_bias"]
        gathered = scores.softmax(-1) @ value
        scores = query * scale @ agents.mT
        if "token_bias" in inputs:
            scores = scores + inputs["token_bias"]
        out = scores.softmax(-1) @ gathered
        return out.transpose(1, 2).reshape(inputs["qkv"].select(3, 0).shape)


def cases(quick: bool) -> list[Agent]:
    """Agent-Swin-T's maps at 224 pixels, DeiT-T's, and detection's largest at 800 x 1216.

    Goals stand where they are held: training, which computes weights again, is slower than peers
    that keep them unless agents are few. If quick, the first of them.
    """
    forward = {"forward, bias": 1.0}
    found = [
        Agent((28, 28), 4, 6, forward),
        Agent((56, 56), 3, 3, forward | {"forward+backward, bias": 1.0}),
        Agent((14, 14), 7, 12, forward),
        Agent((14, 14), 7, 3, head_dim=64),
        Agent((200, 304), 9, 3, forward, batch=1),
    ]
    return found[:1] if quick else found


def native_cases(img_size: str) -> list[Agent]:
    """Agent-Swin-T's maps on images of a size."""
    found = []
    for call in bench_case.calls("agent", ("agent_swin_tiny",), img_size):
        batch, height, width, heads, head_dim = call.query.shape
        rows, columns = call.agent_size
        assert rows == columns, "this model has squares of agents"
        found.append(Agent((height, width), rows, heads, batch=batch, head_dim=head_dim))
    return bench_case.distinct(found)
