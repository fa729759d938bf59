"""Window attention as one would write it without this package: the benchmark's peers.

All get the projection of a whole map and give a whole map. The peers prepare the mask of a
shifted map and the index of its bias once, as timm's blocks do; what depends on the inputs they
do per call, as ours does. Where windows do not divide a map, it is rolled, then completed.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from timm.models import davit
from timm.models.swin_transformer import (
    WindowAttention,
    get_relative_position_index,
    window_partition,
    window_reverse,
)
from torch import Tensor, nn
from torch.func import functional_call

from vitarium.ops.window_attn import windows
from vitarium.tools import bench_case, bench_flex
from vitarium.tools.bench_case import Candidate, Compile, Inputs, OpCase


@dataclass(frozen=True)
class Window(OpCase):
    """Windows on maps batch x height x width with heads of head_dim channels.

    Attributes:
        pad: whether padded positions have a value of their own, as behind a projection with bias.
    """

    height: int
    width: int
    heads: int
    window_size: int = 7
    shift_size: int = 0
    cosine: bool = False
    goals: dict[str, float] = field(default_factory=dict)
    biases: tuple[bool, ...] = (False, True)
    batch: int = 4
    head_dim: int = 32
    pad: bool = False
    op: ClassVar[str] = "window"

    @property
    def title(self) -> str:
        found = f"{self.height}x{self.width} x {self.heads} heads, window {self.window_size}"
        if self.shift_size:
            found += f", shift {self.shift_size}"
        return found + (", cosine" if self.cosine else "")

    def inputs(self, biased: bool) -> Inputs:
        torch.manual_seed(0)
        qkv = self.random(self.batch, self.height, self.width, 3, self.heads, self.head_dim)
        inputs = {"qkv": qkv}
        if biased:
            entries = 2 * self.window_size - 1
            inputs["bias"] = self.random(self.heads, entries, entries)
        if self.cosine:
            inputs["logit_scale"] = qkv.new_full((self.heads,), math.log(10))
        if self.pad:
            inputs["pad"] = self.random(3, self.heads, self.head_dim)
        return {name: x.requires_grad_() for name, x in inputs.items()}

    def arguments(self, inputs: Inputs) -> dict[str, Any]:
        rest = {name: x for name, x in inputs.items() if name != "qkv"}
        rest |= bench_case.named(inputs["qkv"].unbind(3))
        return {"window_size": self.window_size, "shift_size": self.shift_size, **rest}

    def candidates(self, biased: bool, backward: bool) -> dict[str, Candidate | str]:
        del biased, backward
        return {
            "vitarium": self.ours,
            "windows + matmul + softmax": self._plain,
            "windows + SDPA, float mask": self._fused,
        }

    def peers(self, biased: bool, backward: bool, compiled: Compile) -> dict[str, Candidate | str]:
        del biased, backward
        assert not self.cosine, "timm's modules below are Swin's and DaViT's"
        for name in ("_timms", "_mask", "_entry"):
            getattr(self, name)  # the compiler cannot see into cached properties
        return {
            "timm": self._timm,
            "timm, compiled": compiled(self._timm),
            "SDPA, float mask": self._fused,
            "SDPA, float mask, compiled": compiled(self._fused),
            "FlexAttention, compiled": compiled(self._flex),
        }

    @cached_property
    def _counts(self) -> tuple[int, int]:
        return -(-self.height // self.window_size), -(-self.width // self.window_size)

    @cached_property
    def _entry(self) -> Tensor:
        window = self.window_size
        return get_relative_position_index(window, window, device=self.device).flatten()

    @cached_property
    def _mask(self) -> Tensor:
        """0 or -100 for every pair of positions of every window: [windows, 1, L, L]."""
        w, s = self.window_size, self.shift_size
        labels = []
        for count in self._counts:
            label = torch.zeros(count * w, device=self.device)
            label[-w:], label[-s:] = 1, 2
            labels.append(label)
        region = self._cut((3 * labels[0][:, None] + labels[1])[None, :, :, None]).squeeze(-1)
        mask = torch.where(region[:, None] != region[:, :, None], windows.MASKED, 0.0)
        return mask[:, None].to(self.dtype)

    def _cut(self, x: Tensor) -> Tensor:
        """[B, H, W, C] -> [B * windows, L, C]."""
        w = self.window_size
        x = x.unflatten(2, (-1, w)).unflatten(1, (-1, w)).transpose(2, 3)
        return x.flatten(3, 4).flatten(0, 2)

    def _completed(self, inputs: Inputs) -> Tensor:
        """The projection of a map that windows divide, [B, H, W, 3 * heads * head_dim]."""
        x = inputs["qkv"].flatten(3)
        if self.shift_size:
            x = x.roll((-self.shift_size, -self.shift_size), (1, 2))
        below, right = (
            count * self.window_size - size
            for count, size in zip(self._counts, (self.height, self.width), strict=True)
        )
        if not self.pad:
            return F.pad(x, (0, 0, 0, right, 0, below))
        fill = inputs["pad"].flatten()
        x = torch.cat([x, fill.expand(self.batch, self.height, right, -1)], 2)
        return torch.cat([x, fill.expand(self.batch, below, self.width + right, -1)], 1)

    def _windows(self, inputs: Inputs) -> tuple[Tensor, ...]:
        """Query, key and value [B * windows, heads, L, head_dim]."""
        x = self._cut(self._completed(inputs))
        return x.unflatten(2, (3, self.heads, self.head_dim)).permute(2, 0, 3, 1, 4).unbind(0)

    def _map(self, x: Tensor) -> Tensor:
        """[B * windows, heads, L, head_dim] -> [B, H, W, heads, head_dim]."""
        w = self.window_size
        x = x.transpose(1, 2).flatten(2).unflatten(0, (self.batch, *self._counts))
        return self._cropped(x.unflatten(3, (w, w)).transpose(2, 3).flatten(3, 4).flatten(1, 2))

    def _cropped(self, x: Tensor) -> Tensor:
        """What `_completed` did, undone."""
        x = x[:, : self.height, : self.width]
        if self.shift_size:
            x = x.roll((self.shift_size, self.shift_size), (1, 2))
        return x.unflatten(3, (self.heads, self.head_dim))

    def _bias(self, inputs: Inputs) -> Tensor | None:
        """[1, heads, L, L]."""
        if "bias" not in inputs:
            return None
        length = self.window_size**2
        return inputs["bias"].flatten(1)[:, self._entry].view(1, -1, length, length)

    def _scaled(self, query: Tensor, key: Tensor, inputs: Inputs) -> tuple[Tensor, Tensor]:
        if not self.cosine:
            return query * self.head_dim**-0.5, key
        factor = inputs["logit_scale"].clamp(max=math.log(100)).exp()
        return F.normalize(query, dim=-1) * factor[:, None, None], F.normalize(key, dim=-1)

    def _plain(self, inputs: Inputs) -> Tensor:
        query, key, value = self._windows(inputs)
        query, key = self._scaled(query, key, inputs)
        scores = query @ key.mT
        bias = self._bias(inputs)
        if bias is not None:
            scores = scores + bias
        if self.shift_size:
            masked = scores.unflatten(0, (self.batch, -1)) + self._mask
            scores = masked.flatten(0, 1)
        return self._map(scores.softmax(-1) @ value)

    def _fused(self, inputs: Inputs) -> Tensor:
        query, key, value = self._windows(inputs)
        if self.cosine:
            query, key = self._scaled(query, key, inputs)
        mask = self._bias(inputs)
        if self.shift_size:
            mask = self._mask if mask is None else mask + self._mask
            mask = mask.repeat(self.batch, 1, 1, 1)
        scale = 1.0 if self.cosine else None
        return self._map(F.scaled_dot_product_attention(query, key, value, mask, scale=scale))

    @cached_property
    def _timms(self) -> tuple[nn.Module, nn.Module]:
        """Attention of timm's DaViT and of its Swin, without projections."""
        channels, window = self.heads * self.head_dim, (self.window_size, self.window_size)
        dd: dict[str, Any] = {"device": self.device, "dtype": self.dtype}
        modules: Any = (
            davit.WindowAttention(channels, window, self.heads, **dd),
            WindowAttention(channels, self.heads, window_size=window, **dd),
        )
        for module in modules:
            module.qkv, module.proj = bench_case.Given(), nn.Identity()
        nn.init.zeros_(modules[1].relative_position_bias_table)
        return modules

    def _timm(self, inputs: Inputs) -> Tensor:
        window = (self.window_size, self.window_size)
        x = self._completed(inputs)
        size = x.shape[1:3]
        x = window_partition(x, window).flatten(1, 2)
        given = {"qkv.value": x}
        args: tuple[Any, ...] = (x[..., : self.heads * self.head_dim],)
        is_swin = "bias" in inputs or self.shift_size > 0
        if is_swin:
            args = (*args, self._mask.squeeze(1) if self.shift_size else None)
        if "bias" in inputs:
            given["relative_position_bias_table"] = inputs["bias"].flatten(1).t()
        module = self._timms[1] if is_swin else self._timms[0]
        out = functional_call(module, given, args)
        out = window_reverse(out.unflatten(1, window), window, *size)
        return self._cropped(out)

    def _flex(self, inputs: Inputs) -> Tensor:
        inputs = bench_flex.given(inputs)
        window, count = self.window_size, math.prod(self._counts)
        bias, mask = inputs.get("bias"), self._mask.squeeze(1) if self.shift_size else None

        def score_mod(score: Tensor, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
            if bias is not None:
                row, column = q // window - k // window, q % window - k % window
                score = score + bias[h, row + window - 1, column + window - 1]
            return score if mask is None else score + mask[b % count, q, k]

        return self._map(bench_flex.attend(self._windows(inputs), score_mod))


def cases(quick: bool) -> list[Window]:
    """Swin's maps at 224 pixels, a padded one, SwinV2's; the smallest if quick.

    The padded map is one of an 800 x 1216 image. Without a shift SDPA of plain windows is what
    ours does too, in less memory: the goals are about the other maps.
    """

    def goals(forward: float, training: float) -> dict[str, float]:
        found = dict.fromkeys(("forward", "forward, bias"), forward)
        return found | {"forward+backward, bias": training}

    smallest = Window(14, 14, 12, shift_size=3, goals=goals(1.2, 0.9))
    if quick:
        return [smallest]
    return [
        Window(56, 56, 3, goals=goals(0.9, 0.85)),
        Window(56, 56, 3, shift_size=3, goals=goals(1.3, 1.0)),
        Window(28, 28, 6, shift_size=3, goals=goals(1.2, 0.9)),
        smallest,
        Window(100, 152, 6, shift_size=3, batch=1, goals=goals(1.5, 1.05)),
        Window(64, 64, 3, 8, 4, cosine=True, goals=goals(1.5, 1.1)),
        Window(64, 64, 3, 16, 8, cosine=True, goals=goals(1.2, 1.05)),
    ]


def native_cases(img_size: str) -> list[Window]:
    """The windows of Swin-T, DaViT-T and Agent-Swin-T on images of a size."""
    models = ("fused_swin_tiny_patch4_window7_224", "fused_davit_tiny", "agent_swin_tiny")
    found = []
    for call in bench_case.calls("window", models, img_size):
        batch, height, width, heads, head_dim = call.query.shape
        size, given = (height, width), (call.window_size, call.shift_size)
        window, shift = windows.clamped(size, *given, call.semantics)
        assert (*window, *shift) == (*window[::-1], *shift[::-1]), "these models have squares"
        found.append(
            Window(
                height,
                width,
                heads,
                window[0],
                shift[0],
                biases=(call.bias is not None,),
                batch=batch,
                head_dim=head_dim,
                pad=bool(height % window[0] or width % window[1]),
            )
        )
    return bench_case.distinct(found)
