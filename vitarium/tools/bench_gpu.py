"""``vitarium bench ops --device cuda``: each op beside what one would write without it, on a GPU.

Shapes are those of the models in `vitarium.backbones`. Time is measured by CUDA events. A call is
repeated over copies of its inputs that together exceed the GPU's cache, so that none finds its
inputs there, and is replayed from a CUDA graph where it can be captured, so that short kernels are
not timed with the gaps between their launches. What is reached stands beside the ceilings of the
same machine in the same run: a copy, and a product of matrices.
"""

from __future__ import annotations

import gc
import math
import statistics
import time
import warnings
from argparse import Namespace
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.progress import Progress
from torch import Tensor

from vitarium.ops import _triton
from vitarium.tools import (
    bench,
    bench_agent,
    bench_case,
    bench_channel,
    bench_gpu_report,
    bench_neighborhood,
    bench_routing,
    bench_window,
)
from vitarium.tools.bench import Function, Row
from vitarium.tools.bench_case import Candidate, Compile, Inputs, OpCase

_NATIVE: dict[str, Callable[[str], Sequence[OpCase]]] = {
    "window": bench_window.native_cases,
    "neighborhood": bench_neighborhood.native_cases,
    "routing": bench_routing.native_cases,
    "agent": bench_agent.native_cases,
    "channel": bench_channel.native_cases,
}
DTYPES = ("float16", "bfloat16")
_QUICK_ROUNDS = 5
_TURN = 5e-3  # seconds, at least
_REPLAY = 1e-3  # seconds: shorter graphs would be timed with the gap between two of them
_MOST_PASSES = 32  # over the copies of the inputs, in a graph
_SLOW = 0.5  # seconds: what takes longer has one call
_SECONDS = 5.0  # for one candidate, but not before its third turn


class Timed(NamedTuple):
    """A candidate that is ready to be timed.

    Attributes:
        turn: gives the seconds of a call.
        how: ``graph`` or ``eager``.
        why: no graph could be captured.
    """

    turn: Callable[[], float]
    how: str
    why: str = ""


@dataclass(frozen=True)
class Ceilings:
    """What a device reaches at best: GB/s, read and written, and TFLOP/s."""

    copy: float
    product: float

    def __str__(self) -> str:
        return f"copy {self.copy:,.0f} GB/s, bfloat16 product {self.product:,.1f} TFLOP/s"


@dataclass(frozen=True)
class Run:
    """What all rows share; ``compiled`` compiles a peer."""

    device: torch.device
    ceilings: Ceilings
    rounds: int
    compiled: Compile


def _compiled(function: Any) -> Any:
    return torch.compile(function, dynamic=False)


def measure(
    console: Console,
    args: Namespace,
    device: torch.device,
    ceilings: Ceilings,
    save: Callable[[list[Row]], None],
) -> list[Row]:
    """Time the named ops (all if none) and print a table for every shape, dtype and pass.

    Args:
        console: where tables go.
        args: of the command line.
        device: where the ops compute.
        ceilings: of the device.
        save: called with the rows so far whenever a table is done.

    Raises:
        ValueError: an op that has no models.
        KeyboardInterrupt: Ctrl-C, when the verdicts so far are printed.
    """
    for name in args.names:
        if name not in _NATIVE:
            expected = ", ".join(_NATIVE)
            raise ValueError(f"bench ops: expected ops of models among {expected}, got {name!r}")
    sizes = args.sizes or list(bench_case.SIZES)
    cases = [case for name in args.names or _NATIVE for case in _cases(name, sizes, args.quick)]
    rounds = min(args.rounds, _QUICK_ROUNDS) if args.quick else args.rounds
    default = DTYPES[-1:] if args.quick else DTYPES
    run = Run(device, ceilings, rounds, _compiled)
    rows: list[Row] = []
    verdicts: list[list[str]] = []
    dtypes = [getattr(torch, name) for name in args.dtype or default]
    settings = [
        (bench_case.placed(case, device, dtype), biased, backward)
        for case in cases
        for dtype in dtypes
        for backward in (False, True)
        for biased in case.biases
    ]
    try:
        with _triton.on(device), Progress(console=Console(stderr=True), transient=True) as bar:
            for setting in bar.track(settings, description=""):
                found = measured(run, *setting)
                rows += found
                save(rows)
                bench_gpu_report.show(console, found)
                console.file.flush()  # a run takes long, and may be cut short
                verdicts += bench_gpu_report.verdicts(found)
    finally:
        bench_gpu_report.judge(console, verdicts)
    return rows


def _cases(op: str, sizes: Sequence[str], quick: bool) -> list[OpCase]:
    found = [case for size in sizes for case in _NATIVE[op](size)]
    return found[:1] if quick else found


def ceilings(device: torch.device, copied: int = 1 << 30, side: int = 8192) -> Ceilings:
    """Measure a copy of so many bytes and the product of two square matrices."""
    with _triton.on(device):
        source = torch.randint(256, (copied,), dtype=torch.uint8, device=device)
        target = torch.empty_like(source)
        a, b = torch.randn(2, side, side, dtype=torch.bfloat16, device=device)
        c = torch.empty_like(a)
        copy = _median(partial(target.copy_, source), device)
        product = _median(partial(torch.mm, a, b, out=c), device)
    return Ceilings(2 * copied / copy / 1e9, 2 * side**3 / product / 1e12)


def _median(function: Function, device: torch.device) -> float:
    bench.timed(function, 5, device)
    return statistics.median(bench.timed(function, 5, device) for _ in range(20))


def measured(run: Run, case: OpCase, biased: bool, backward: bool) -> list[Row]:
    """One pass of a case: a row for each candidate, ours first."""
    torch.compiler.reset()
    cost = bench_case.cost(case, biased, backward)
    rows, ready = [], {}
    with torch.set_grad_enabled(backward):
        sets = _sets(case, biased, backward, cost, _cache(run.device))
        try:
            expected: list[Tensor] | str = _expected(case, *sets[0], backward)
        except RuntimeError as error:  # no memory, above all
            expected = f"no reference: {_reason(error)}"
        chosen = case.explained(sets[0][0]).chosen
        for name, candidate in _candidates(run, case, sets[0][0], biased, backward).items():
            row = bench_gpu_report.row(
                case, biased, backward, name, cost, run.ceilings.copy, run.ceilings.product
            )
            row["auto"] = name == chosen
            rows.append(row)
            if isinstance(candidate, str):
                row["note"] = candidate
                continue
            calls = [_call(candidate, *each, backward) for each in sets]
            # Whatever a peer's software raises is the reason why it does not take part.
            try:
                row["first_s"] = _first(row, calls[0], expected, run.device)
                row["peak_mib"] = round(bench.peak_memory(calls[0], run.device), 2)
                seconds = bench.timed(calls[0], 1, run.device)
                if seconds > _SLOW:
                    row |= {"ms": seconds * 1e3, "timed": "one call"}
                else:
                    ready[name] = on_gpu(calls) if run.device.type == "cuda" else on_cpu(calls)
                    row["timed"] = ready[name].how
                    row["note"] = "; ".join(filter(None, (row["note"], ready[name].why)))
            except Exception as error:
                row["note"] = f"failed: {_reason(error)}"
            if row["timed"] is None:
                _tidy(run.device)  # the error, which held on to memory, is gone
        times = medians(ready, run.rounds)
    for row in rows:
        if row["implementation"] in times:
            row["ms"] = times[row["implementation"]] * 1e3
    bench_gpu_report.complete(rows)
    del sets, ready
    _tidy(run.device)
    return rows


def _cache(device: torch.device) -> int:
    """Bytes of the cache that inputs must not fit into."""
    if device.type != "cuda":
        return 0
    return torch.cuda.get_device_properties(device).L2_cache_size


def _sets(
    case: OpCase, biased: bool, backward: bool, cost: bench_case.Cost, cache: int
) -> list[tuple[Inputs, Tensor]]:
    """Copies of the inputs, each with a gradient of the output, twice the cache together."""
    found: list[tuple[Inputs, Tensor]] = []
    count = 2
    while len(found) < count:
        inputs = case.inputs(biased)
        found.append((inputs, case.random(*cost.shape) if backward else torch.empty(0)))
        one = sum(x.nbytes for x in inputs.values()) + found[0][1].nbytes
        count = max(2, math.ceil(2 * cache / one))
    return found


def _candidates(
    run: Run, case: OpCase, inputs: Inputs, biased: bool, backward: bool
) -> dict[str, Candidate | str]:
    """Ours, then the peers: functions, or why one cannot take part."""
    reasons = case.explained(inputs).reasons
    aten = partial(case.ours, impl="aten")
    found: dict[str, Candidate | str] = {
        "triton": reasons.get("triton", "this op has none") or partial(case.ours, impl="triton"),
        "aten": aten,
        "aten, compiled": run.compiled(lambda inputs: aten(inputs)),
    }
    return found | case.peers(biased, backward, run.compiled)


def _call(candidate: Candidate, inputs: Inputs, probe: Tensor, backward: bool) -> Function:
    """A call that gives the output, or the gradients of all inputs."""

    def forward() -> list[Tensor]:
        with torch.no_grad():
            return [candidate(inputs)]

    def training() -> tuple[Tensor, ...]:
        return torch.autograd.grad(candidate(inputs), list(inputs.values()), probe)

    return training if backward else forward


def _expected(case: OpCase, inputs: Inputs, probe: Tensor, backward: bool) -> list[Tensor]:
    """What a call gives of the first image in float64: the output or the maps' gradients."""
    first = {name: x[:1] if bench_case.is_map(x) else x for name, x in inputs.items()}
    first = {name: x.detach().double().requires_grad_(backward) for name, x in first.items()}
    out = case.oracle(first)
    if not backward:
        return [out]
    maps = [x for x in first.values() if bench_case.is_map(x)]
    return list(torch.autograd.grad(out, maps, probe[:1].double()))


def _first(row: Row, call: Function, expected: list[Tensor] | str, device: torch.device) -> float:
    """Seconds of the first call, which compiles and tunes; enters its error."""
    start = time.perf_counter()
    found = call()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    seconds = round(time.perf_counter() - start, 2)
    _enter_error(row, found, expected)
    return seconds


def _enter_error(row: Row, found: Sequence[Tensor], expected: list[Tensor] | str) -> None:
    """The largest difference on the first image. Maps come before parameters."""
    if isinstance(expected, str):
        row["note"] = expected
        return
    errors = [
        float((x[:1].double() - y).abs().max()) for x, y in zip(found, expected, strict=False)
    ]
    row["max_error"] = max(errors)


def _reason(error: Exception) -> str:
    first = (str(error).strip() or "no message").splitlines()[0]
    return f"{type(error).__name__}: {first[:200]}"


def _tidy(device: torch.device) -> None:
    """Give back the memory of graphs, and of what failed."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def medians(ready: Mapping[str, Timed], rounds: int) -> dict[str, float]:
    """Median seconds of a call of each candidate; they take turns."""
    times: dict[str, list[float]] = {name: [] for name in ready}
    spent = dict.fromkeys(ready, 0.0)
    for number in range(rounds):
        for name, candidate in ready.items():
            if number < 3 or spent[name] < _SECONDS:
                start = time.perf_counter()
                times[name].append(candidate.turn())
                spent[name] += time.perf_counter() - start
    return {name: statistics.median(each) for name, each in times.items()}


def on_cpu(calls: Sequence[Function]) -> Timed:
    """Time calls one after the other."""

    def each() -> None:
        for call in calls:
            call()

    return Timed(lambda: bench.timed(each, 1) / len(calls), "eager")


def on_gpu(calls: Sequence[Function]) -> Timed:
    """Time calls by a graph that holds them all, or one after the other.

    The last results of all calls are kept: a call that got the memory of the one before would
    write where the cache still is.
    """
    kept: list[Any] = [None] * len(calls)

    def each(passes: int = 1) -> None:
        for _ in range(passes):
            for i, call in enumerate(calls):
                kept[i] = call()

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        each(3)  # kernels are compiled and tuned
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    passes, why = 1, ""
    run: Function = each
    try:
        run = _captured(each)
        passes = min(_MOST_PASSES, math.ceil(_REPLAY / max(bench.timed(run, 3, _GPU), 1e-6)))
        if passes > 1:
            run = _captured(partial(each, passes))
    except RuntimeError as error:
        torch.cuda.synchronize()
        run, passes, why = each, 1, f"no graph: {_reason(error)}"
    repeats = max(1, math.ceil(_TURN / max(bench.timed(run, 1, _GPU), 1e-6)))

    def turn() -> float:
        run()  # while it runs, what is timed is queued
        return bench.timed(run, repeats, _GPU) / (passes * len(calls))

    return Timed(turn, "eager" if why else "graph", why)


_GPU = torch.device("cuda")  # the current one


def _captured(function: Function) -> Function:
    """A graph of what the function does; a RuntimeError where that waits for the device."""
    with _no_waiting():
        function()  # a capture that fails on it would leave the allocator in disorder
    gc.collect()  # not while a graph is captured
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
    try:
        with torch.cuda.graph(graph):
            function()
    finally:
        torch.cuda.set_stream(stream)  # which torch does not restore after a failure
    return graph.replay


@contextmanager
def _no_waiting() -> Iterator[None]:
    """Inside, an operation that waits for the device raises."""
    before = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that not all such operations are known
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)
