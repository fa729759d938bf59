"""``vitarium bench models``: whole networks side by side, ours and timm's.

Weights and images are random: speed does not depend on them. A name with ``+fused_attn``
behind it is one of timm's models built as with TIMM_FUSED_ATTN=2; one with ``+aten`` behind it is
one of ours without kernels, as in ``use_impl("aten")``. Columns that timm's ``benchmark.py`` has
are named as there, so that results merge; those behind ``param_count`` are ours.
"""

from __future__ import annotations

import math
import re
import sys
import time
from argparse import Namespace
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from itertools import groupby, product
from typing import Any

import timm
import torch
import torch._dynamo.config
import torch.nn.functional as F
from rich.console import Console
from rich.progress import Progress
from timm.layers import set_fused_attn, use_fused_attn
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from vitarium.ops import _triton, use_impl
from vitarium.tools import _common, bench, bench_report
from vitarium.tools.bench import Row
from vitarium.tools.bench_report import ATEN, FLAG

Key = tuple[str, bool, int, tuple[int, int]]  # model, compiled, batch size, image size

_DEFAULT = ("nat_mini", "dinat_s_tiny", "swin_tiny_patch4_window7_224", "convnext_tiny")
_TIMMS = ("samples_per_sec", "step_time", "batch_size", "img_size")
_OURS = ("over_base", "peak_mib", "pixel_time_growth", "pixel_memory_growth")
_COLUMNS = (
    *("model", *(f"infer_{x}" for x in _TIMMS), "infer_gmacs"),
    *(*(f"train_{x}" for x in _TIMMS), "param_count"),
    *(f"{mode}_{x}" for mode in ("infer", "train") for x in _OURS),
    *("base", "compiled", "dtype", "channels_last", "device", "threads", "clock"),
    *("other_load", "note"),
)
_NOTICEABLE = 0.25  # cores that other programs keep busy
_LOOK = 0.5  # seconds in which they are looked at before the first setting
_SECONDS = 60.0  # for one candidate in one setting, at the most
# What a network or a device answers to what it does not take; timm's networks assert their sizes.
_REFUSALS = (RuntimeError, ValueError, AssertionError)


@dataclass(frozen=True)
class Setting:
    """What the candidates do in turns.

    Attributes:
        mode: ``infer`` (forward) or ``train`` (forward, loss, backward, SGD step).
        batch_size: images per step.
        size: height and width of an image, in pixels.
    """

    mode: str
    batch_size: int
    size: tuple[int, int]

    def __str__(self) -> str:
        return f"{self.mode}, batch {self.batch_size}, {self.size[0]} x {self.size[1]}"

    @property
    def img_size(self) -> str:
        """The size as in timm's tables; ``HxW`` where it is not square."""
        height, width = self.size
        return f"{height}" if height == width else f"{height}x{width}"


@dataclass(frozen=True)
class Run:
    """What all settings share."""

    base: str
    dtype: str
    channels_last: bool
    device: torch.device
    threads: int
    rounds: int
    compiled: tuple[bool, ...]
    compile_mode: str = "default"

    def placed(self, value: Any) -> Any:
        """An image or a network, where and as this run wants it."""
        layout = torch.channels_last if self.channels_last else torch.preserve_format
        return value.to(self.device, getattr(torch, self.dtype), memory_format=layout)


@dataclass
class Network:
    """A model built for one size, or why there is none."""

    name: str
    model: nn.Module | None = None
    params: float | None = None  # million
    gmacs: float | None = None  # of one image
    outputs: int = 0  # classes, or features where the model has no classifier
    note: str = ""


def measure(
    console: Console, args: Namespace, device: torch.device, save: Callable[[list[Row]], None]
) -> list[Row]:
    """Time the named models in every mode, batch size and image size, and print the tables.

    Args:
        console: where tables go.
        args: of the command line.
        device: where the models compute.
        save: called with the rows so far whenever a setting is done.

    Returns:
        A row for each model, batch size and image size, eager and compiled.

    Raises:
        ValueError: an argument outside of what is possible here.
        KeyboardInterrupt: Ctrl-C; the message says which settings were not measured.
    """
    names = _names(args.names or _DEFAULT)
    base = names[0] if args.base is None else args.base
    if base not in names:
        raise ValueError(f"--base: expected one of {', '.join(names)}, got {base!r}")
    if args.compile and device.type == "cpu" and not bench.has_compiler():
        raise ValueError("--compile: expected a C++ compiler (c++, g++, clang++), found none")
    mode = args.compile_mode
    if mode is not None and not (args.compile and device.type == "cuda"):
        raise ValueError(f"--compile-mode: expected it with --compile on cuda, got {mode!r}")
    settings = _settings(args)
    compiled = (False, True) if args.compile else (False,)
    run = Run(
        base,
        args.dtype,
        args.channels_last,
        device,
        args.threads,
        args.rounds,
        compiled,
        mode or "default",
    )
    others = bench.OtherLoad()
    time.sleep(_LOOK)
    warned = _warn(console, others.cores(), run)
    sweep = len({setting.size for setting in settings}) > 1
    rows: dict[Key, Row] = {}
    done = 0
    progress = Progress(
        console=Console(stderr=True), transient=True, disable=not sys.stderr.isatty()
    )
    try:
        with progress, _triton.on(device):
            task = progress.add_task("", total=len(settings))
            for size, group in groupby(settings, key=lambda setting: setting.size):
                networks = [_network(name, size, run) for name in names]
                for setting in group:
                    progress.update(task, description=str(setting))
                    found = _measured(setting, networks, run, progress)
                    found = _merged(rows, found, setting, settings[0])
                    save(list(rows.values()))
                    done += 1
                    progress.advance(task)
                    bench_report.show(console, str(setting), setting.mode, found, sweep)
                    warned = warned or _warn(console, found[0]["other_load"], run)
    except KeyboardInterrupt:
        missing = "; ".join(str(setting) for setting in settings[done:])
        raise KeyboardInterrupt(f"interrupted; not measured: {missing}") from None
    finally:
        bench_report.judge(console, list(rows.values()))
    return list(rows.values())


def _names(patterns: Sequence[str]) -> list[str]:
    """What `_common.model_names` finds, with the flags as they were given."""
    names: list[str] = []
    for pattern in patterns:
        plain, flag = _split(pattern)
        names += [name + flag for name in _common.model_names([plain])]
    return list(dict.fromkeys(names))


def _split(name: str) -> tuple[str, str]:
    """A model's name, and the flag behind it or nothing."""
    plain = name.removesuffix(FLAG).removesuffix(ATEN)
    return plain, name[len(plain) :]


def _is_ours(name: str) -> bool:
    """Whether a model is vitarium's."""
    return timm.model_entrypoint(_split(name)[0]).__module__.startswith("vitarium.")


def _without_kernels(name: str) -> AbstractContextManager[None]:
    """Inside, our ops run as the flag behind a model's name says."""
    return use_impl("aten") if _split(name)[1] == ATEN else nullcontext()


@contextmanager
def _flagged(flag: str) -> Iterator[None]:
    """Build timm's models with its flag, if that is asked for, and leave timm as it was."""
    before = {"enable": use_fused_attn(), "experimental": use_fused_attn(experimental=True)}
    if flag == FLAG:
        set_fused_attn(True, experimental=True)
    try:
        yield
    finally:
        set_fused_attn(**before)


def _settings(args: Namespace) -> list[Setting]:
    sizes = []
    for text in args.sizes:
        match = re.fullmatch(r"([1-9]\d*)(?:x([1-9]\d*))?", text)
        if match is None:
            raise ValueError(f"--sizes: expected e.g. 224 or 800x1216 (H x W), got {text!r}")
        sizes.append((int(match[1]), int(match[2] or match[1])))
    batches = args.batch_size or [1 if args.quick else 8]
    if min(batches) < 1:
        raise ValueError(f"--batch-size: expected positive numbers, got {min(batches)}")
    modes = ("infer", "train") if args.mode == "both" else (args.mode,)
    every = (Setting(m, b, s) for s in sizes for b in batches for m in modes)
    return list(dict.fromkeys(every))


def _warn(console: Console, load: float | None, run: Run) -> bool:
    """Whether it was necessary to say that the machine is busy."""
    if load is None or load < _NOTICEABLE:
        return False
    clock = bench.clock_name(run.threads, run.device)
    effect = "leaves their share out" if clock == "process time" else "includes waiting for them"
    console.print(f"warning: other programs keep about {load:.1f} cores busy; {clock} {effect}")
    return True


def _network(name: str, size: tuple[int, int], run: Run) -> Network:
    """Build a model for a size and count what one image costs."""
    plain, flag = _split(name)
    try:
        with _flagged(flag):
            model = bench.built(plain, size)
        fused = any(getattr(module, "fused_attn", False) for module in model.modules())
        if flag == FLAG and not fused:
            raise ValueError(f"expected attention that timm's flag fuses, {plain} has none")
        if flag == ATEN and not _is_ours(name):
            raise ValueError(f"expected a model of vitarium, {plain} is timm's")
        model = run.placed(model).eval()
        image = run.placed(torch.randn(1, 3, *size))
        # with gradients: without, the counter fails on modules that take parameters as inputs
        with FlopCounterMode(display=False) as flops, _without_kernels(name):
            outputs = model(image).shape[-1]
    except _REFUSALS as error:
        return Network(name, note=_reason(error, name))
    params = sum(p.numel() for p in model.parameters()) / 1e6
    gmacs = flops.get_total_flops() / 2e9
    return Network(name, model, round(params, 2), round(gmacs, 6), outputs)


def _reason(error: Exception, name: str) -> str:
    """The first line of a refusal; an assertion of ours that fails is none, and raised again."""
    if _is_ours(name) and isinstance(error, AssertionError):
        raise error
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _measured(setting: Setting, networks: list[Network], run: Run, bar: Progress) -> list[Row]:
    """A row for each network, eager and compiled, in this setting."""
    mode = setting.mode
    image = run.placed(torch.randn(setting.batch_size, 3, *setting.size))
    rows: dict[str, Row] = {}
    steps: dict[str, bench.Function] = {}
    torch.compiler.reset()
    # Graphs are counted per class; beyond the default of 8 its other models would run eagerly.
    with torch._dynamo.config.patch(recompile_limit=256):
        for network, compiled in product(networks, run.compiled):
            row = _row(setting, network, compiled, run)
            rows[bench_report.label(row)] = row
            if network.model is None:
                continue
            step = _step(setting, network, image, compiled, run)
            try:
                step()
                row[f"{mode}_peak_mib"] = round(bench.peak_memory(step, run.device), 2)
            except _REFUSALS as error:
                row["note"] = _reason(error, network.name)
            else:
                steps[bench_report.label(row)] = step
        others = bench.OtherLoad()
        times = bench.interleaved(steps, run.rounds, _SECONDS, bar, run.device)
    load = others.cores()
    for label, row in rows.items():
        row["other_load"] = load
        if label in times:
            row[f"{mode}_step_time"] = round(times[label], 3)
            row[f"{mode}_samples_per_sec"] = round(setting.batch_size / times[label] * 1e3, 2)
            if run.base in times:
                row[f"{mode}_over_base"] = round(times[run.base] / times[label], 3)
    return list(rows.values())


def _row(setting: Setting, network: Network, compiled: bool, run: Run) -> Row:
    """What is known before the clock runs."""
    return dict.fromkeys(_COLUMNS) | {
        "model": network.name,
        f"{setting.mode}_batch_size": setting.batch_size,
        f"{setting.mode}_img_size": setting.img_size,
        "infer_gmacs": network.gmacs,
        "param_count": network.params,
        "base": run.base,
        "compiled": compiled,
        "dtype": run.dtype,
        "channels_last": run.channels_last,
        "device": str(run.device),
        "threads": run.threads,
        "clock": bench.clock_name(run.threads, run.device),
        "note": network.note,
    }


def _step(
    setting: Setting, network: Network, image: Tensor, compiled: bool, run: Run
) -> bench.Function:
    """What is timed."""
    model: Any = network.model
    model.train(setting.mode == "train")
    forward = torch.compile(model, dynamic=False, mode=run.compile_mode) if compiled else model
    infer = partial(_infer, forward, image)
    if setting.mode == "infer":
        return _begun(infer, network.name, run)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4, momentum=0.9)
    target = torch.randint(network.outputs, (len(image),), device=image.device)

    def train() -> None:
        logits = forward(image)
        # some of timm's have a second classifier while training
        logits = logits[0] if isinstance(logits, tuple) else logits
        F.cross_entropy(logits, target).backward()
        optimizer.step()
        optimizer.zero_grad()

    return _begun(train, network.name, run)


def _infer(forward: Callable[[Tensor], Tensor], image: Tensor) -> Tensor:
    with torch.inference_mode():
        return forward(image)


def _begun(step: bench.Function, name: str, run: Run) -> bench.Function:
    """A step with the ops that the model's name asks for."""

    def begun() -> Any:
        if run.compile_mode != "default":
            torch.compiler.cudagraph_mark_step_begin()  # a graph may overwrite the step before
        with _without_kernels(name):
            return step()

    return begun


def _merged(rows: dict[Key, Row], found: list[Row], setting: Setting, first: Setting) -> list[Row]:
    """Enter what a setting gave into the run's rows, which hold both modes; return those."""
    mode, merged = setting.mode, []
    for row in found:
        case = (row["model"], row["compiled"], setting.batch_size)
        before = rows.get((*case, setting.size), row)
        loads = [x for x in (before["other_load"], row["other_load"]) if x is not None]
        row["other_load"] = max(loads, default=None)
        row["note"] = "; ".join(dict.fromkeys(filter(None, (before["note"], row["note"]))))
        row = before | {column: value for column, value in row.items() if value is not None}
        rows[(*case, setting.size)] = row
        start = rows[(*case, first.size)]
        for figure, growth in (("step_time", "time"), ("peak_mib", "memory")):
            here, there = row[f"{mode}_{figure}"], start[f"{mode}_{figure}"]
            if here and there:
                scale = math.prod(first.size) / math.prod(setting.size)
                row[f"{mode}_pixel_{growth}_growth"] = round(here / there * scale, 3)
        merged.append(row)
    return merged
