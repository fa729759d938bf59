"""Routing attention as one would write it without this package: the benchmark's peers.

Peers complete maps, cut them into regions and route as the authors do; they differ in how they
get the chosen keys and values. `training_steps` puts them into a whole model.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any, ClassVar
from unittest.mock import patch

import timm
import torch
import torch.nn.functional as F
from rich.console import Console
from torch import Tensor

from vitarium.backbones import biformer
from vitarium.ops import routing_attention
from vitarium.tools import bench, bench_case, bench_flex
from vitarium.tools.bench_case import Candidate, Compile, Inputs, OpCase

OURS, GATHER, SELECT = "vitarium", "torch.gather + softmax", "index_select + SDPA"


def _cut(x: Tensor, fill: Tensor | None, num_regions: int) -> Tensor:
    """[B, H, W, heads, head_dim] -> [B, R, L, heads, head_dim], completed with ``fill``."""
    batch, height, width = x.shape[:3]
    below, right = -height % num_regions, -width % num_regions
    if fill is not None:
        x = torch.cat([x, fill.expand(batch, height, right, -1, -1)], 2)
        x = torch.cat([x, fill.expand(batch, below, width + right, -1, -1)], 1)
    x = x.unflatten(2, (num_regions, -1)).unflatten(1, (num_regions, -1)).transpose(2, 3)
    return x.flatten(3, 4).flatten(1, 2)


def _gathered(x: Tensor, chosen: Tensor) -> Tensor:
    """Chosen regions [B, R, topk * L, heads, head_dim] by `torch.gather`, as the authors do."""
    count = x.shape[1]
    index = chosen[..., None, None, None].expand(-1, -1, -1, *x.shape[2:])
    return x[:, None].expand(-1, count, -1, -1, -1, -1).gather(2, index).flatten(2, 3)


def _selected(x: Tensor, chosen: Tensor) -> Tensor:
    """The same by `torch.index_select`."""
    batch, count = x.shape[:2]
    near = chosen + torch.arange(batch, device=x.device)[:, None, None] * count
    taken = x.flatten(0, 1).index_select(0, near.flatten())
    return taken.unflatten(0, chosen.shape).flatten(2, 3)


def _flex(query: Tensor, key: Tensor, value: Tensor, chosen: Tensor, scale: float) -> Tensor:
    """Of all tokens [B, R, L, heads, head_dim]: Flex skips no block that the data rule out."""
    count, length = query.shape[1:3]
    near = torch.zeros(len(query), count, count, dtype=torch.bool, device=query.device)
    near = near.scatter(2, chosen, True)

    def score_mod(score: Tensor, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        del h
        return torch.where(near[b, q // length, k // length], score, float("-inf"))

    maps = [x.flatten(1, 2).transpose(1, 2) for x in (query, key, value)]
    out = bench_flex.attend(maps, score_mod, scale)
    return out.unflatten(2, (count, length)).permute(0, 2, 1, 3, 4)


def _softmax(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    return ((query * scale) @ key.mT).softmax(-1) @ value


def _sdpa(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    q, k, v = (x.flatten(0, 1) for x in (query, key, value))
    return F.scaled_dot_product_attention(q, k, v, scale=scale).unflatten(0, query.shape[:2])


def peer(
    taken: Callable[[Tensor, Tensor], Tensor] | None, attend: Callable[..., Tensor]
) -> Callable[..., Tensor]:
    """A function with `routing_attention`'s arguments; maps that need it have a ``pad``.

    Args:
        taken: regions and a choice of them -> the tokens of those. None: ``attend`` gets all.
        attend: attention [B, R, heads, L, head_dim] with a scale.
    """

    def routed(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        num_regions: int,
        topk: int,
        scale: float,
        pad: Tensor | None = None,
    ) -> Tensor:
        height, width = query.shape[1:3]
        fills: Sequence[Tensor | None] = (None,) * 3
        if pad is not None and (height % num_regions or width % num_regions):
            fills = pad.unbind()
        q, k, v = (
            _cut(x, fill, num_regions) for x, fill in zip((query, key, value), fills, strict=True)
        )
        with torch.no_grad():
            # in half precision a rounded mean would choose another region now and then
            exact = torch.promote_types(q.dtype, torch.float32)
            scores = q.mean(2, dtype=exact).flatten(2) @ k.mean(2, dtype=exact).flatten(2).mT
            chosen = scores.topk(topk).indices
        if taken is None:
            out = attend(*(x.contiguous() for x in (q, k, v)), chosen, scale).transpose(2, 3)
        else:
            maps = (x.transpose(2, 3) for x in (q, taken(k, chosen), taken(v, chosen)))
            out = attend(*maps, scale).transpose(2, 3)
        rows = -(-height // num_regions)
        out = out.unflatten(2, (rows, -1)).unflatten(1, (num_regions, -1)).transpose(2, 3)
        return out.flatten(3, 4).flatten(1, 2)[:, :height, :width]

    return routed


_OPS: dict[str, Callable[..., Tensor]] = {
    OURS: routing_attention,
    GATHER: peer(_gathered, _softmax),
    SELECT: peer(_selected, _sdpa),
}


@dataclass(frozen=True)
class Routing(OpCase):
    """Maps batch x height x width with heads of head_dim channels, and their regions."""

    height: int
    width: int
    heads: int
    topk: int
    num_regions: int = 7
    goals: dict[str, float] = field(default_factory=dict)
    batch: int = 4
    head_dim: int = 32
    biases: tuple[bool, ...] = (False,)
    op: ClassVar[str] = "routing"

    @property
    def title(self) -> str:
        return (
            f"{self.height}x{self.width} x {self.heads} heads, "
            f"{self.topk} of {self.num_regions} x {self.num_regions} regions"
        )

    @property
    def _args(self) -> dict[str, Any]:
        scale = (self.heads * self.head_dim) ** -0.5
        return {"num_regions": self.num_regions, "topk": self.topk, "scale": scale}

    def inputs(self, biased: bool) -> Inputs:
        del biased
        torch.manual_seed(0)
        shape = (self.batch, self.height, self.width, 3, self.heads, self.head_dim)
        # strided like a model's: three views of one projection
        inputs = bench_case.named(self.random(*shape).unbind(3))
        if self.height % self.num_regions or self.width % self.num_regions:
            inputs["pad"] = self.random(3, self.heads, self.head_dim)
        return {name: x.detach().requires_grad_() for name, x in inputs.items()}

    def arguments(self, inputs: Inputs) -> dict[str, Any]:
        return {**inputs, **self._args}

    def candidates(self, biased: bool, backward: bool) -> dict[str, Candidate | str]:
        del biased
        found: dict[str, Candidate | str] = {n: self._candidate(f) for n, f in _OPS.items()}
        if backward and self._expanded > 1:
            found[GATHER] = self._too_large
        return found

    def peers(self, biased: bool, backward: bool, compiled: Compile) -> dict[str, Candidate | str]:
        del biased
        found: dict[str, Candidate | str] = {}
        for name in (GATHER, SELECT):
            candidate = self._candidate(_OPS[name])
            found |= {name: candidate, f"{name}, compiled": compiled(candidate)}
        if backward and self._expanded > _MOST_EXPANDED:
            found |= dict.fromkeys((GATHER, f"{GATHER}, compiled"), self._too_large)
        flex = self._candidate(peer(None, _flex))
        found["FlexAttention, compiled"] = compiled(lambda x: flex(bench_flex.given(x)))
        return found

    def _candidate(self, function: Callable[..., Tensor]) -> Candidate:
        return lambda inputs: function(**inputs, **self._args)

    @property
    def _expanded(self) -> float:
        """GiB of the keys that every region could choose, whose gradient `torch.gather` fills."""
        numbers = self.batch * self.num_regions**2 * self.height * self.width
        return numbers * self.heads * self.head_dim * self.dtype.itemsize / 2**30

    @property
    def _too_large(self) -> str:
        return f"its gradient takes {self._expanded:.1f} GiB for the keys alone"


def cases(quick: bool) -> list[Routing]:
    """BiFormer's maps at 224 pixels, and at 800 x 1216; the smallest if quick.

    They have no goals: those are of `training_steps`.
    """
    smallest = Routing(14, 14, 8, 16)
    if quick:
        return [smallest]
    found = [Routing(56, 56, 2, 1), Routing(28, 28, 4, 4), smallest]
    for size in ((200, 304, 2, 1), (100, 152, 4, 4), (50, 76, 8, 16)):
        found += [Routing(*size, regions, batch=1) for regions in (7, 16)]
    return found


def native_cases(img_size: str) -> list[Routing]:
    """BiFormer-S's maps on images of a size."""
    found = []
    for call in bench_case.calls("routing", ("biformer_small",), img_size):
        batch, height, width, heads, head_dim = call.query.shape
        rows, columns = call.num_regions
        assert rows == columns, "this model has squares of regions"
        shape = (height, width, heads, call.topk, rows)
        found.append(Routing(*shape, batch=batch, head_dim=head_dim))
    return bench_case.distinct(found)


_MOST_EXPANDED = 16.0  # GiB, on a GPU
_SIZE = (800, 1216)
_MODEL = "biformer_tiny"
_GOALS = {"ms": ("time", 2.0), "peak_mib": ("peak memory", 3.0)}
_NEEDED = 8.0  # GiB, for the largest of the candidates


def training_steps(
    console: Console, rounds: int, size: tuple[int, int] = _SIZE, model: str = _MODEL
) -> tuple[list[dict[str, Any]], list[list[str]]]:
    """Training steps of a whole model, with our op and with the peers in its place.

    Candidates take turns: one step under the memory profiler, then at most two that are timed.
    ``max_error`` is the largest difference of logits from our model's, over their deviation.

    Returns:
        Rows as `vitarium bench ops` has them, and a verdict for each goal.
    """
    rows: list[dict[str, Any]] = []
    verdicts = []
    for num_regions in (7, 16):
        title = f"{model} {size[0]}x{size[1]}, {num_regions} x {num_regions} regions"
        head: dict[str, Any] = {"op": "routing", "case": title, "pass": "training step"}
        found = [
            {**head, "implementation": name, "ms": None, "over_ours": None}
            | {"peak_mib": None, "max_error": None, "note": ""}
            for name in _OPS
        ]
        free = _free_gib()
        if size == _SIZE and free is not None and free < _NEEDED:
            for row in found:
                row["note"] = f"needs {_NEEDED:g} GiB of memory, {free:.1f} are free"
        else:
            _measure_steps(found, model, size, num_regions, min(rounds, 2))
            for key, (what, goal) in _GOALS.items():
                ratio = found[1][key] / found[0][key]
                met = "met" if ratio >= goal else "MISSED"
                verdicts.append(
                    [f"{title}, training, {what}", GATHER, f"{ratio:.2f}", f">= {goal:g}", met]
                )
        rows += found
        table = [
            [
                row["implementation"],
                f"{row['ms'] / 1e3:.2f}",
                f"{row['over_ours']:.2f}",
                f"{row['peak_mib']:.0f}",
                f"{row['peak_mib'] / found[0]['peak_mib']:.2f}",
                f"{row['max_error']:.0e}",
            ]
            for row in found
            if row["ms"] is not None
        ]
        columns = ["", "s", "x ours", "peak extra MiB", "x ours", "max error"]
        bench.show(console, f"{title}, training step", columns, table)
        for row in found:
            if row["note"]:
                console.print(f"  not run: {row['implementation']}: {row['note']}")
    return rows, verdicts


def _measure_steps(
    rows: list[dict[str, Any]], name: str, size: tuple[int, int], num_regions: int, rounds: int
) -> None:
    torch.manual_seed(0)
    model: Any = timm.create_model(name, num_regions=num_regions).train()
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.eval()  # as the authors train detectors: a batch of one has no statistics
    image = torch.randn(1, 3, *size)
    probe = torch.randn(1, model.num_classes)
    logits: dict[str, Tensor] = {}
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    times: dict[str, list[float]] = {row["implementation"]: [] for row in rows}

    def step(candidate: str) -> None:
        model.zero_grad()
        with patch.object(biformer, "routing_attention", _OPS[candidate]):
            out = model(image)
        logits[candidate] = out.detach()
        (out * probe).sum().backward()

    for row in rows:
        row["peak_mib"] = round(bench.peak_memory(partial(step, row["implementation"])), 2)
    for _ in range(rounds):
        for candidate, found in times.items():
            start = clock()
            step(candidate)
            found.append(clock() - start)
    for row in rows:
        candidate = row["implementation"]
        row["ms"] = round(median(times[candidate]) * 1e3, 1)
        row["over_ours"] = round(row["ms"] / rows[0]["ms"], 3)
        error = (logits[candidate] - logits[OURS]).abs().max() / logits[OURS].std()
        row["max_error"] = float(error)


def _free_gib() -> float | None:
    """Memory that is free or can be freed; None where the system does not tell."""
    file = Path("/proc/meminfo")
    if not file.exists():
        return None
    found = dict(line.split(":") for line in file.read_text().splitlines())
    return int(found["MemAvailable"].split()[0]) / 2**20
