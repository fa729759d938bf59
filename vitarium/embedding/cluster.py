"""The same shards on Ray Data: its actors make them, wherever they are."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

from vitarium.embedding.embedder import Embedder, Progress, Settings, spare_cores

_BLOCKS = 1000  # at the most, into which Ray Data cuts the list of shards


class _Actor:
    """One model, which makes the shards that Ray hands to it."""

    def __init__(self, settings: Settings) -> None:
        self._embedder = Embedder(settings)

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        """The number of a shard -> its rows and failures, or an error."""
        try:
            rows, failed = self._embedder.run([int(row["shard"])])
        except (ValueError, OSError) as error:
            return {"shard": row["shard"], "rows": 0, "failed": [], "error": str(error)}
        return {"shard": row["shard"], "rows": rows, "failed": [*map(list, failed)], "error": ""}


def run(settings: Settings, actors: int | None) -> tuple[int, list[tuple[str, str]]]:
    """Make the shards that are not there yet on the cluster that Ray finds, or on this machine.

    All of its machines must see the data and the folder under the same paths.

    Args:
        settings: what to do.
        actors: how many models; None for one on each GPU, or as many as the CPUs have room for.

    Returns:
        How many rows the shards have, and which images have none, and why.

    Raises:
        ValueError: Ray is not installed, or lacks the CPUs or GPUs, or as `Embedder` and its `run`.
    """
    try:
        import ray
        import ray.data
    except ImportError as error:
        raise ValueError('ray is not installed: pip install "vitarium[ray]"') from error
    settings = replace(settings, **_absolute(settings))
    ours = Embedder(replace(settings, device="cpu"))
    progress = Progress(ours.store.count, len(ours.images))
    pending = [n for n in range(ours.store.shards) if ours.store.outcome(n) is None]
    if pending:
        started = not ray.is_initialized()
        if started:
            ray.init(log_to_driver=False, logging_level=logging.WARNING)
        try:
            _map(settings, actors, pending, progress)
        finally:
            if started:
                ray.shutdown()
    progress.end()
    return ours.run()


def _map(settings: Settings, actors: int | None, shards: list[int], progress: Progress) -> None:
    import ray

    logging.getLogger("ray.data").setLevel(logging.ERROR)  # the progress is told by ours
    ray.data.DataContext.get_current().enable_progress_bars = False
    resources = ray.cluster_resources()
    cpus = int(resources.get("CPU", 1))
    on_gpu = settings.device != "cpu" and (settings.device is not None or "GPU" in resources)
    needed = 1 + (spare_cores() if settings.workers is None else settings.workers)
    room = int(resources.get("GPU", 0)) if on_gpu else cpus
    count = actors or (room if on_gpu else max(1, cpus // needed))
    if count > room:
        kind = "GPU" if on_gpu else "CPU"
        raise ValueError(f"--ray: expected no more than {room}, one for each {kind}, got {count}")
    rows = ray.data.from_items(
        [{"shard": number} for number in shards],
        override_num_blocks=min(len(shards), _BLOCKS),
    )
    outcomes = rows.map(
        _Actor,
        fn_constructor_args=(settings,),
        compute=ray.data.ActorPoolStrategy(size=count),
        num_cpus=max(1, min(needed, cpus // count)),
        num_gpus=1 if on_gpu else 0,
    )
    for row in outcomes.iter_rows():
        if row["error"]:
            raise ValueError(row["error"])
        for name, why in row["failed"]:
            progress.say(f"cannot be read: {name}: {why}")
        progress.tell(0)


def _absolute(settings: Settings) -> dict[str, str]:
    """Paths as processes with another working directory need them."""
    found = {"out": str(Path(settings.out).expanduser().absolute())}
    for key in ("checkpoint", "root"):
        value = getattr(settings, key)
        if value is not None:
            found[key] = str(Path(value).expanduser().absolute())
    data = Path(settings.data).expanduser()
    if data.is_dir() or settings.data.endswith(".tar"):
        found["data"] = str(data.absolute())
    return found
