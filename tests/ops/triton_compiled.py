"""Compile the kernels of all calls for a GPU that need not be there, and print what ptxas says.

``python tests/ops/triton_compiled.py [OP ...] [--arch 90] [--dtype bfloat16] [--first]`` prints a
JSON object per kernel and configuration: registers, bytes spilled, shared memory. Launches go
through the ops as on a GPU, so this compiles what would run there; nothing runs. With ``--tune``
they go through Triton's autotuner too, twice, and each launch is printed.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from itertools import islice
from pathlib import Path
from typing import Any

os.environ["TRITON_INTERPRET"] = "0"

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

import vitarium.ops
from vitarium.ops import _triton

OPS = ("window", "neighborhood", "routing", "agent", "channel")
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


class AbsentGPU:
    """What Triton asks of a driver before it compiles."""

    def __init__(self, arch: int) -> None:
        self.arch = arch

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.arch, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_benchmarker(self) -> Callable[..., list[float]]:
        def benchmark(call: Callable[[], Any], quantiles: Sequence[float]) -> list[float]:
            call()
            return [1.0 for _ in quantiles]

        return benchmark


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("ops", nargs="*", choices=[*OPS, []])
    parser.add_argument("--arch", type=int, default=90)
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16")
    parser.add_argument("--call", help="only calls whose name holds this")
    parser.add_argument("--count", type=int, help="only so many calls of each op")
    parser.add_argument("--first", action="store_true", help="only the first configuration")
    parser.add_argument("--tune", action="store_true", help="by way of the autotuner")
    parser.add_argument("--sass", help="a folder for the machine code")
    args = parser.parse_args()
    driver.set_active(AbsentGPU(args.arch))
    _triton.device_unsupported = lambda device: None
    seen: set[str] = set()

    def compile_only(
        kernel: Any,
        grid: Callable[[Mapping[str, Any]], tuple[int, ...]],
        arguments: Mapping[str, Any],
        configs: Sequence[_triton.Config],
        key: Sequence[str] = (),
    ) -> None:
        assert set(key) <= set(arguments), f"key of {kernel.__name__}: {key}"
        assert len(configs) <= 8, kernel.__name__
        for blocks, num_warps, num_stages in configs[:1] if args.first else configs:
            sizes = grid({**arguments, **blocks})
            assert all(isinstance(n, int) and n > 0 for n in sizes), (kernel.__name__, sizes)
            started = time.perf_counter()
            options = {"num_warps": num_warps, "num_stages": num_stages}
            found = kernel.warmup(**arguments, **blocks, grid=sizes, **options)
            seconds = time.perf_counter() - started
            if found.hash in seen:
                continue
            seen.add(found.hash)
            row = {"call": label, "kernel": kernel.__name__, **blocks, **options, "grid": sizes}
            row |= resources(found.asm["ptx"], args.arch) | {"shared": found.metadata.shared}
            print(json.dumps(row | {"seconds": round(seconds, 1)}), flush=True)
            if args.sass:
                name = "-".join([kernel.__name__, *(str(x) for x in blocks.values())])
                sass = Path(args.sass, f"{re.sub('[^a-zA-Z0-9]+', '-', label)}-{name}-{num_warps}w")
                sass.with_suffix(".sass").write_text(found.asm["sass"])
                sass.with_suffix(".ttgir").write_text(found.asm["ttgir"])

    if args.tune:
        tune_only()
    else:
        _triton.launch = compile_only
    for op in (args.ops or OPS) * (2 if args.tune else 1):
        for name, make in islice(import_module(f"calls_{op}").CALLS.items(), args.count):
            if args.call and args.call not in name:
                continue
            label = f"{op} {name} {args.dtype}"
            leaves, rest = make(DTYPES[args.dtype], torch.device("cpu"), True)
            reason = vitarium.ops.explain(op, **leaves, **rest).reasons["triton"]
            if reason is not None:
                print(json.dumps({"call": label, "unsupported": reason}), flush=True)
                continue
            function = getattr(vitarium.ops, f"{op}_attention")
            out = function(**leaves, **rest, impl="triton")
            outs = out if isinstance(out, tuple) else (out,)
            torch.autograd.grad(outs, list(leaves.values()), [torch.ones_like(x) for x in outs])


def tune_only() -> None:
    """Launches compile and are printed; the tuner finds all configurations equally fast."""
    torch.cuda.is_current_stream_capturing = lambda: False
    run = JITFunction.run

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        sizes = grid(kwargs) if callable(grid) else grid
        print(json.dumps({"kernel": self.__name__, "grid": sizes}), flush=True)
        return run(self, *args, grid=sizes, warmup=True, **kwargs)

    JITFunction.run = compile_only


def resources(ptx: str, arch: int) -> dict[str, int]:
    """Registers of a thread and bytes that it spills, by ptxas."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "ptxas"
    target = re.search(r"^\.target (\w+)", ptx, re.MULTILINE)
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "kernel.ptx")
        source.write_text(ptx)
        command = [tool, "-v", f"--gpu-name={target[1]}", source, "-o", Path(folder, "cubin")]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    registers = re.search(r"Used (\d+) registers", text)
    spilled = re.search(r"(\d+) bytes spill stores", text)
    return {"registers": int(registers[1]), "spilled": int(spilled[1])}


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent))
    main()
