"""Processes that want the same weights at once, one of them killed in mid-download.

    python tests/download_storm.py [--rounds 20] [--processes 8]

Every round has an empty cache and new random weights of nat_atto, on a server on loopback that
takes about two seconds to send them. All processes start together; once a tenth to eight tenths of
the file are there, one is killed with SIGKILL: by turns the one that downloads and one that waits.
In every second pair of rounds the file's sha256 is known beforehand. Each survivor must end with
exactly the right weights in its model, and the cache with exactly the right file and no part; the
server must have been asked no more often than it takes. One line per round; exits 1 unless all is
right. Needs fork, so no Windows.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import multiprocessing
import os
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

import timm
import torch
from safetensors.torch import save
from servers import Reply, Server

import vitarium  # noqa: F401  (registers the backbones)
from vitarium.checkpoints import Weight, download, fetch, load

_SECONDS = 2.0  # that one whole body takes
_STEP = 1 << 16
_KILLED_AT = (0.1, 0.7, 0.3, 0.8, 0.5)  # of the body, four rounds each
_PATIENCE = 60.0  # seconds for any one thing to happen

_fork = multiprocessing.get_context("fork")  # children have all modules, and import nothing


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=20, metavar="N")
    parser.add_argument("--processes", type=int, default=8, metavar="N")
    args = parser.parse_args()
    torch.set_num_threads(1)
    started = time.monotonic()
    rounds = []
    for index in range(args.rounds):
        with tempfile.TemporaryDirectory() as home:
            rounds.append(_round(index, args.processes, Path(home)))
        print(f"round {index + 1:2}: {rounds[-1].line}", flush=True)
    good = sum(done.good for done in rounds)
    killed = [done for done in rounds if done.downloader]
    print(
        f"{good} of {args.rounds} rounds right: {sum(done.right for done in rounds)} of "
        f"{args.rounds * (args.processes - 1)} survivors have the right weights; the downloader "
        f"was killed {len(killed)} times, and {sum(done.resumed for done in killed)} times another "
        f"process went on where it was; {time.monotonic() - started:.0f} s"
    )
    return int(good != args.rounds)


class Round(NamedTuple):
    """What came of one: how many survivors are right, whether the downloader was killed..."""

    line: str
    good: bool
    right: int
    downloader: bool
    resumed: bool


def _round(index: int, processes: int, home: Path) -> Round:
    os.environ["TORCH_HOME"] = str(home)
    os.environ["no_proxy"] = "127.0.0.1"
    cache = home / "hub" / "checkpoints" / "vitarium"
    torch.manual_seed(index)
    body = save(timm.create_model("nat_atto").state_dict())
    known = index % 4 >= 2
    began = time.monotonic()
    with _served(body) as (url, ask):
        weight = Weight(url, sha256=hashlib.sha256(body).hexdigest() if known else None)
        workers = [
            _fork.Process(target=_worker, args=(weight, body, home / "downloader"))
            for _ in range(processes)
        ]
        for worker in workers:
            worker.start()
        enough = _KILLED_AT[index // 4 % len(_KILLED_AT)] * len(body)
        _wait(lambda: any(part.stat().st_size >= enough for part in cache.glob("*.part")))
        holder = int((home / "downloader").read_text())
        victim = next(w for w in workers if (w.pid == holder) == (index % 2 == 0))
        assert victim.pid is not None
        os.kill(victim.pid, signal.SIGKILL)
        for worker in workers:
            worker.join(_PATIENCE)
            worker.kill()
            worker.join()
        ranges = ask()
    others = [worker for worker in workers if worker is not victim]
    right = sum(worker.exitcode == 0 for worker in others)
    kept = [path for path in cache.iterdir() if path.suffix not in (".lock", ".json")]
    clean = len(kept) == 1 and kept[0].read_bytes() == body
    downloader = victim.pid == holder
    starts = [0 if asked is None else int(asked[len("bytes=") : -1]) for asked in ranges]
    good = (
        victim.exitcode == -signal.SIGKILL
        and right == len(others)
        and clean
        and len(starts) == (2 if downloader else 1)
        and (any(starts) or not (known and downloader))
    )
    line = (
        f"{'right' if good else 'WRONG'}; sha256 {'known' if known else 'unknown'}, "
        f"{'downloader' if downloader else 'waiter'} killed; {right} of {len(others)} survivors "
        f"right; {len(body)} bytes, asked for from {', '.join(map(str, starts))}; "
        f"{time.monotonic() - began:.1f} s"
    )
    return Round(line, good, right, downloader, any(starts))


def _worker(weight: Weight, body: bytes, downloader: Path) -> None:
    """Load the weights, or exit with status 1; whoever downloads writes down its process."""
    transfer = download.transfer

    def noted(*args: Any) -> Any:
        downloader.write_text(str(os.getpid()))
        return transfer(*args)

    download.transfer = noted
    warnings.simplefilter("ignore")  # no licence is stated
    torch.manual_seed(os.getpid() + (1 << 32))  # other weights than those that are to be loaded
    if weight.sha256 is None:
        overlay = {"url": weight.url}
        model = timm.create_model("nat_atto", pretrained=True, pretrained_cfg_overlay=overlay)
    else:
        model = timm.create_model("nat_atto")
        load(model, fetch(weight, "nat_atto.storm"))
    if save(model.state_dict()) != body:
        sys.exit("the weights are not the right ones")


def _wait(happened: Callable[[], bool]) -> None:
    deadline = time.monotonic() + _PATIENCE
    while not happened():
        if time.monotonic() > deadline:
            raise TimeoutError("no download began")
        time.sleep(0.01)


@contextmanager
def _served(body: bytes) -> Iterator[tuple[str, Callable[[], list[str | None]]]]:
    """The body's address on a server in a process of its own, and a function for what it saw.

    The threads of a server in this process would be copied half by each fork.
    """
    ours, theirs = _fork.Pipe()
    process = _fork.Process(target=_serve, args=(body, theirs), daemon=True)
    process.start()

    def ask() -> list[str | None]:
        ours.send("ranges")
        return json.loads(ours.recv())

    try:
        yield ours.recv(), ask
    finally:
        process.kill()
        process.join()


def _serve(body: bytes, pipe: Connection) -> None:
    try:
        reply = Reply(
            body,
            headers={"ETag": f'"{hashlib.sha256(body).hexdigest()}"'},
            ranges=True,
            step=_STEP,
            pause=_SECONDS * _STEP / len(body),
        )
        with Server({"/nat_atto.safetensors": reply}) as server:
            pipe.send(server.url("/nat_atto.safetensors"))
            while True:
                pipe.recv()
                pipe.send(json.dumps(server.ranges))
    except Exception:
        traceback.print_exc()
        raise


if __name__ == "__main__":
    sys.exit(main())
