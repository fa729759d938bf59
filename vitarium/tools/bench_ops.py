"""``vitarium bench ops``: each op beside what one would write without it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from rich.console import Console
from rich.progress import Progress
from torch import Tensor

from vitarium.tools import (
    bench,
    bench_agent,
    bench_channel,
    bench_neighborhood,
    bench_neighborhood_parts,
    bench_routing,
    bench_window,
)

Candidate = Callable[[dict[str, Tensor]], Tensor]


class Case(Protocol):
    """One op at one shape: what a module of candidates has to offer."""

    @property
    def op(self) -> str:
        """Its name."""

    @property
    def title(self) -> str:
        """The shape."""

    @property
    def biases(self) -> tuple[bool, ...]:
        """Whether there are passes without a position bias, with one."""

    @property
    def goals(self) -> dict[str, float]:
        """Pass -> best peer / ours that we hold ourselves to."""

    def inputs(self, biased: bool) -> dict[str, Tensor]:
        """Random inputs that require gradients."""

    def oracle(self, inputs: dict[str, Tensor]) -> Tensor:
        """The op in float64."""

    def candidates(self, biased: bool, backward: bool) -> dict[str, Candidate | str]:
        """Ours first, then the peers: functions, or why one cannot take part."""


_CASES: dict[str, Callable[[bool], Sequence[Case]]] = {
    "neighborhood": bench_neighborhood.cases,
    "neighborhood_scores": bench_neighborhood_parts.scores_cases,
    "neighborhood_mix": bench_neighborhood_parts.mix_cases,
    "channel": bench_channel.cases,
    "agent": bench_agent.cases,
    "window": bench_window.cases,
    "routing": bench_routing.cases,
}
# What an op does for a whole model: rows and verdicts, given the console and the rounds.
_MODELS: dict[str, Callable[[Console, int], tuple[list[dict[str, Any]], list[list[str]]]]] = {
    "routing": bench_routing.training_steps,
}


def measure(
    console: Console, names: Sequence[str], rounds: int, quick: bool
) -> list[dict[str, Any]]:
    """Time the named ops (all if none) and print a table for every case and pass."""
    for name in names:
        if name not in _CASES:
            raise ValueError(f"bench ops: expected ops among {', '.join(_CASES)}, got {name!r}")
    rows: list[dict[str, Any]] = []
    verdicts = []
    with Progress(console=Console(stderr=True), transient=True) as progress:
        for name in names or _CASES:
            for case in _CASES[name](quick):
                for backward in (False, True):
                    for biased in case.biases:
                        found = _measure(progress, case, biased, backward, rounds)
                        _show(console, found)
                        verdicts.append(_verdict(case, found))
                        rows += found
            if name in _MODELS and not quick:
                found, judged = _MODELS[name](console, rounds)
                rows += found
                verdicts += judged
    columns = ["", "best peer", "best peer / ours", "goal", ""]
    bench.show(console, "Best peer over ours, `auto`", columns, verdicts)
    return rows


def _measure(
    progress: Progress, case: Case, biased: bool, backward: bool, rounds: int
) -> list[dict[str, Any]]:
    """One pass of a case: a row for each candidate, ours first."""
    inputs = case.inputs(biased)
    with torch.no_grad():
        expected = case.oracle(inputs)
    steps, rows = {}, []
    for name, candidate in case.candidates(biased, backward).items():
        row: dict[str, Any] = {"op": case.op, "case": case.title, "pass": _pass(biased, backward)}
        row |= {"implementation": name, "ms": None, "over_ours": None}
        row |= {"peak_mib": None, "max_error": None, "note": ""}
        rows.append(row)
        if isinstance(candidate, str):
            row["note"] = candidate
            continue
        steps[name] = _step(candidate, inputs, backward)
        with torch.no_grad():
            row["max_error"] = float((candidate(inputs).double() - expected).abs().max())
        steps[name]()
        row["peak_mib"] = round(bench.peak_memory(steps[name]), 2)
    times = bench.interleaved(steps, rounds, 10.0, progress)
    for row in rows:
        if row["implementation"] in times:
            row["ms"] = round(times[row["implementation"]], 4)
            row["over_ours"] = round(row["ms"] / rows[0]["ms"], 3)
    return rows


def _pass(biased: bool, backward: bool) -> str:
    return ("forward+backward" if backward else "forward") + (", bias" if biased else "")


def _step(
    candidate: Candidate, inputs: dict[str, Tensor], backward: bool
) -> Callable[[], Tensor | tuple[Tensor, ...]]:
    def forward() -> Tensor:
        with torch.no_grad():
            return candidate(inputs)

    if not backward:
        return forward
    probe = torch.randn_like(forward())

    def training() -> tuple[Tensor, ...]:
        return torch.autograd.grad(candidate(inputs), list(inputs.values()), probe)

    return training


def _show(console: Console, rows: list[dict[str, Any]]) -> None:
    timed = sorted((row for row in rows if row["ms"] is not None), key=lambda row: row["ms"])
    table = [
        [
            row["implementation"],
            f"{row['ms']:.2f}",
            f"{row['over_ours']:.2f}",
            f"{row['peak_mib']:.1f}",
            f"{row['max_error']:.0e}",
        ]
        for row in timed
    ]
    title = f"{rows[0]['op']} {rows[0]['case']}, {rows[0]['pass']}"
    bench.show(console, title, ["", "ms", "x ours", "peak extra MiB", "max error"], table)
    for row in rows:
        if row["ms"] is None:
            console.print(f"  not run: {row['implementation']}: {row['note']}")


def _verdict(case: Case, rows: list[dict[str, Any]]) -> list[str]:
    peers = [row for row in rows[1:] if row["ms"] is not None]
    best = min(peers, key=lambda row: row["ms"])
    ratio, goal = best["over_ours"], case.goals.get(rows[0]["pass"])
    return [
        f"{case.op} {case.title}, {rows[0]['pass']}",
        best["implementation"],
        f"{ratio:.2f}",
        "" if goal is None else f">= {goal:g}",
        "" if goal is None else "met" if ratio >= goal else "MISSED",
    ]
