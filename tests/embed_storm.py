"""Embed images with processes that are killed again and again, and judge what is left.

    python tests/embed_storm.py [--rounds 20] [--kills 3]

Every round begins with an empty folder and one or two processes, by turns with and without others
that read for them. One is killed with SIGKILL at a random moment, from its start to the last shard,
and started again, and so on. In the end all must have exited with 0, and the shards must be those
of an unbroken run, byte for byte; every image must be in them once; no shard that was there when a
process died may have been written again; and no temporary file may be left. Both formats take
turns. One line per round; exits 1 unless all is right. Needs fork, so no Windows.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from contextlib import redirect_stderr, redirect_stdout, suppress
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import torch
from PIL import Image
from safetensors import safe_open

import vitarium_cli

_IMAGES = 58
_BAD = 2
_SHARD = 2
_SHARDS = (_IMAGES + _BAD) // _SHARD
_PATIENCE = 120.0  # seconds for any one process to end

_fork = multiprocessing.get_context("fork")  # children have all modules, and import nothing


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=20, metavar="N")
    parser.add_argument("--kills", type=int, default=3, metavar="N")
    args = parser.parse_args()
    torch.set_num_threads(1)
    started, good, killed = time.monotonic(), 0, 0
    rng = random.Random(0)
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        _draw(root / "images")
        for kind in ("safetensors", "parquet"):  # here: what this imports, children have
            if _run(_argv(root, root / f"whole-{kind}", kind, 0)):
                sys.exit("the unbroken run fails")
        for index in range(args.rounds):
            right, died, line = _round(root, index, args.kills, rng)
            good, killed = good + right, killed + died
            print(f"round {index + 1:2}: {line}", flush=True)
    print(
        f"{good} of {args.rounds} rounds right, {killed} processes killed; "
        f"{time.monotonic() - started:.0f} s"
    )
    return int(good != args.rounds)


def _draw(folder: Path) -> None:
    rng = np.random.default_rng(0)
    for i in range(_IMAGES):
        path = folder / f"{i % 7}" / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 255, (40, 30 + i, 3), dtype=np.uint8)).save(path)
    for i in range(_BAD):
        (folder / f"bad{i}.jpg").write_bytes(b"no image")


def _round(root: Path, index: int, kills: int, rng: random.Random) -> tuple[bool, int, str]:
    """Whether all is right, how many processes died, and a line about it."""
    began = time.monotonic()
    kind = ("safetensors", "parquet")[index // 4 % 2]
    count, workers = 1 + index % 2, index // 2 % 2
    out, whole = root / f"round-{index}", root / f"whole-{kind}"

    def start(rank: int) -> multiprocessing.process.BaseProcess:
        return _start(root, out, kind, rank, count, workers)

    processes = [start(rank) for rank in range(count)]
    there: list[int] = []
    died = 0
    kept: dict[Path, tuple[int, int]] = {}
    for enough in sorted(rng.sample(range(_SHARDS), kills)):
        rank = rng.randrange(count)
        _until(out, enough, processes[rank])
        time.sleep(rng.uniform(0, 0.1))
        died += _kill(processes[rank])
        kept |= {path: _identity(path) for path in _shards(out)}
        there.append(len(kept))
        processes[rank] = start(rank)
    statuses = [_wait(process) for process in processes]

    names = Counter(name for path in _shards(out) for name in _names(path))
    expected = {path.relative_to(root / "images").as_posix() for path in _files(root / "images")}
    faults = {
        "exit status": any(statuses),
        "other bytes": [p.read_bytes() for p in _shards(out)]
        != [p.read_bytes() for p in _shards(whole)],
        "an image lost or repeated": names != Counter(dict.fromkeys(expected, 1)),
        "a shard made again": any(_identity(path) != was for path, was in kept.items()),
        "other files": {path.name for path in out.iterdir()}
        != {path.name for path in whole.iterdir()},
    }
    wrong = [fault for fault, there_is in faults.items() if there_is]
    line = (
        f"{'WRONG: ' + ', '.join(wrong) if wrong else 'right'}; {count} processes, {workers} "
        f"workers, {kind}; killed with {', '.join(map(str, there))} of {_SHARDS} shards there; "
        f"{len(names)} images once; {time.monotonic() - began:.1f} s"
    )
    return not wrong, died, line


def _start(
    root: Path, out: Path, kind: str, rank: int, world: int, workers: int
) -> multiprocessing.process.BaseProcess:
    process = _fork.Process(target=_embed, args=(_argv(root, out, kind, workers), rank, world))
    process.start()
    return process


def _argv(root: Path, out: Path, kind: str, workers: int) -> list[str]:
    argv = [
        *("embed", "--model", "nat_atto.vitarium_digits", "--data", root / "images", "--out", out),
        *("--format", kind, "--shard-size", _SHARD, "--workers", workers, "--device", "cpu"),
    ]
    return [str(argument) for argument in argv]


def _embed(argv: list[str], rank: int, world: int) -> None:
    os.environ["RANK"], os.environ["WORLD_SIZE"] = str(rank), str(world)
    sys.exit(_run(argv))


def _run(argv: list[str]) -> int:
    with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere), redirect_stderr(nowhere):
        return vitarium_cli.main(argv)


def _until(out: Path, shards: int, process: multiprocessing.process.BaseProcess) -> None:
    """Wait for so many shards, or for the process' end."""
    deadline = time.monotonic() + _PATIENCE
    while len(_shards(out)) < shards and process.is_alive():
        if time.monotonic() > deadline:
            raise TimeoutError(f"expected {shards} shards, there are {len(_shards(out))}")
        time.sleep(0.002)


def _kill(process: multiprocessing.process.BaseProcess) -> bool:
    """Whether that was its end; it may have come to one of its own before."""
    assert process.pid is not None
    with suppress(ProcessLookupError):  # it had ended
        os.kill(process.pid, signal.SIGKILL)
    process.join()
    return process.exitcode == -signal.SIGKILL


def _wait(process: multiprocessing.process.BaseProcess) -> int | None:
    process.join(_PATIENCE)
    process.kill()
    process.join()
    return process.exitcode


def _shards(out: Path) -> list[Path]:
    return sorted(out.glob("shard-*[st]"))  # not what is being written


def _files(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file()]


def _identity(path: Path) -> tuple[int, int]:
    state = path.stat()
    return state.st_ino, state.st_mtime_ns


def _names(path: Path) -> list[str]:
    """All images that a shard speaks of."""
    if path.suffix == ".parquet":
        table = pq.read_table(path)
        facts = json.loads(table.schema.metadata[b"shard"])
        facts["names"] = table["name"].to_pylist()
        rows = len(table)
    else:
        with safe_open(path, framework="numpy") as file:
            facts = json.loads(file.metadata()["shard"])
            rows = len(file.get_tensor("embeddings"))
    assert rows == len(facts["names"])
    return [*facts["names"], *(name for name, _ in facts["failed"])]


if __name__ == "__main__":
    sys.exit(main())
