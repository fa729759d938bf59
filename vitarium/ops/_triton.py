"""What the Triton implementations share on the host's side.

Imports torch alone: Triton is looked for when a call asks, and loaded when a kernel is launched.
With TRITON_INTERPRET=1 kernels run on CPU tensors too, as slow as an interpreter is: that proves
their arithmetic where there is no GPU.

Environment:
    VITARIUM_AUTOTUNE: 0 takes each kernel's first configuration instead of timing all of them at
        the first call of a kind. So does `torch.use_deterministic_algorithms`.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from importlib.util import find_spec
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vitarium.ops import _select

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
MAX_HEAD_DIM = 128
_SWITCH = "VITARIUM_AUTOTUNE"
_lock = threading.RLock()  # the tuner keeps a call's arguments in itself
_tuned: set[tuple[Any, ...]] = set()


class Config(NamedTuple):
    """One way to launch a kernel: sizes of its blocks, warps and stages of its pipeline."""

    blocks: Mapping[str, int]
    num_warps: int = 4
    num_stages: int = 2


def interpreted() -> bool:
    """Whether kernels run in Triton's interpreter."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


def unsupported(*maps: Tensor) -> str | None:
    """Why no kernel takes maps ``[..., head_dim]`` of one dtype and device, or None."""
    reason = device_unsupported(maps[0].device)
    if reason is not None:
        return reason
    if maps[0].dtype not in DTYPES:
        return f"kernels take float16, bfloat16 and float32, got {maps[0].dtype}"
    widest = max(x.shape[-1] for x in maps)
    if widest > MAX_HEAD_DIM:
        return f"kernels take a head_dim up to {MAX_HEAD_DIM}, got {widest}"
    return None


@torch.compiler.assume_constant_result  # not all that it asks can be traced
def device_unsupported(device: torch.device) -> str | None:
    """Why no kernel runs on a device, or None."""
    if device.type != "cuda" and not (device.type == "cpu" and interpreted()):
        return f"kernels need a CUDA device, got {device.type}"
    if find_spec("triton") is None:
        return "the package triton is not installed"
    is_nvidia = device.type == "cuda" and torch.version.hip is None
    if is_nvidia and torch.cuda.get_device_capability(device) < (8, 0):
        return "kernels need compute capability 8.0 (Ampere) or later"
    return None


def reserved(*maps: Tensor) -> str | None:
    """Why ``auto`` leaves a call that kernels could run, or None."""
    if maps[0].device.type == "cpu":
        return "its interpreter is for tests"
    if _select.is_exporting():
        return "exported programs run without vitarium"
    return None


def block(size: int, least: int = 16) -> int:
    """The power of two from ``least`` on that holds ``size``; products need 16 a side."""
    return max(least, 1 << (size - 1).bit_length())


def precision(dtype: torch.dtype) -> str:
    """``input_precision`` of products: as exact as torch's own of that dtype are set to be."""
    tf32 = torch.backends.cuda.matmul.fp32_precision == "tf32"
    return "tf32" if tf32 and dtype == torch.float32 else "ieee"


def readable(x: Tensor) -> Tensor:
    """``x``, or a copy where the elements of a head are not neighbors in memory."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def on(device: torch.device) -> AbstractContextManager[Any]:
    """Make ``device`` the current one: kernels are launched there."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def processors(device: torch.device) -> int:
    """Multiprocessors of a GPU; a few for the interpreter."""
    if device.type != "cuda":
        return 4
    return torch.cuda.get_device_properties(device).multi_processor_count


def launch(
    kernel: Any,
    grid: Callable[[Mapping[str, Any]], tuple[int, ...]],
    arguments: Mapping[str, Any],
    configs: Sequence[Config],
    key: Sequence[str] = (),
) -> None:
    """Run a kernel with the configuration that is fastest on this device.

    All are timed at the first call of a kind, in seconds, and Triton keeps the result on disk.

    Args:
        kernel: a ``triton.jit`` function. Since timing repeats it, what it writes must not
            depend on what was there.
        grid: gives the numbers of programs from all arguments, blocks included.
        arguments: the kernel's, by name, but for the blocks of ``configs``.
        configs: at most eight; the first one where nothing may be timed. It must fit every
            device of compute capability 8.0 on.
        key: names of arguments that make another kind of call; dtypes always do. Batch sizes
            and sizes of maps are none: each new one would be timed again.
    """
    if interpreted():
        _mend_interpreter()
    with on(next(x for x in arguments.values() if isinstance(x, Tensor)).device), _lock:
        choice = configs if _may_tune(kernel, arguments, key, len(configs)) else configs[:1]
        if len(choice) > 1:
            _tuner(kernel, tuple(_frozen(x) for x in choice), tuple(key))[grid](**arguments)
            return
        blocks, num_warps, num_stages = choice[0]
        kernel[grid](**arguments, **blocks, num_warps=num_warps, num_stages=num_stages)


@cache
def _mend_interpreter() -> None:
    """Let the interpreter multiply bfloat16, of which it takes the bits for integers, and round."""
    import triton.language as tl
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    dot, cast = InterpreterBuilder.create_dot, InterpreterBuilder.cast_impl

    def create_dot(self: Any, *operands: Any) -> Any:
        a, b = (
            cast(self, x, tl.float32) if x.dtype.scalar == tl.bfloat16 else x for x in operands[:2]
        )
        return dot(self, a, b, *operands[2:])

    def cast_impl(self: Any, source: Any, dtype: Any) -> Any:
        if source.dtype.scalar != tl.float32 or dtype.scalar != tl.bfloat16:
            return cast(self, source, dtype)
        rounded = torch.tensor(source.data).bfloat16().view(torch.int16)
        return TensorHandle(rounded.numpy().view("uint16"), tl.bfloat16)

    InterpreterBuilder.create_dot, InterpreterBuilder.cast_impl = create_dot, cast_impl


def _may_tune(kernel: Any, arguments: Mapping[str, Any], key: Sequence[str], count: int) -> bool:
    """Whether configurations are timed now, or were; nothing can be while a graph is captured."""
    if count == 1 or interpreted() or os.environ.get(_SWITCH, "1") == "0":
        return False
    if torch.are_deterministic_algorithms_enabled():  # the order of sums is part of the result
        return False
    dtypes = [x.dtype for x in arguments.values() if isinstance(x, Tensor)]
    kind = (kernel, *(arguments[name] for name in key), *dtypes)
    if kind in _tuned:
        return True
    if torch.cuda.is_current_stream_capturing():
        return False
    _tuned.add(kind)
    return True


def _frozen(config: Config) -> tuple[Any, ...]:
    return tuple(config.blocks.items()), config.num_warps, config.num_stages


@cache
def _tuner(kernel: Any, configs: tuple[Any, ...], key: tuple[str, ...]) -> Any:
    import triton

    found = [
        triton.Config(dict(blocks), num_warps=num_warps, num_stages=num_stages)
        for blocks, num_warps, num_stages in configs
    ]
    return triton.autotune(configs=found, key=list(key), cache_results=True)(kernel)
