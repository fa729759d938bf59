"""The same shards on Ray Data: its actors make them, wherever they are."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

from vitarium.embedding.embedder import Embedder, Progress, Settings

_BLOCKS = 1000  # at the most, into which Ray Data cuts the list of shards


class Actor:
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
    settings = _absolute(settings)
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
    cpus, gpus = (int(resources.get(kind, 0)) for kind in ("CPU", "GPU"))
    on_gpu = gpus > 0 if settings.device is None else settings.device != "cpu"
    room = gpus if on_gpu else cpus
    least = 1 + (1 if settings.workers is None else settings.workers)
    count = actors or (gpus if on_gpu else max(1, cpus // least))
    if count > room:
        kind = "GPU" if on_gpu else "CPU"
        raise ValueError(f"--ray: expected no more than {room}, one for each {kind}, got {count}")
    share = max(1, cpus // count)
    workers = max(1, share - 1) if settings.workers is None else settings.workers
    rows = ray.data.from_items(
        [{"shard": number} for number in shards],
        override_num_blocks=min(len(shards), _BLOCKS),
    )
    outcomes = rows.map(
        Actor,
        fn_constructor_args=(replace(settings, workers=workers),),
        compute=ray.data.ActorPoolStrategy(size=count),
        num_cpus=min(1 + workers, share),
        num_gpus=1 if on_gpu else 0,
    )
    for row in outcomes.iter_rows():
        if row["error"]:
            raise ValueError(row["error"])
        for name, why in row["failed"]:
            progress.say(f"cannot be read: {name}: {why}")
        progress.tell(0)


def _absolute(settings: Settings) -> Settings:
    """Paths as processes with another working directory need them."""

    def absolute(path: str) -> str:
        return str(Path(path).expanduser().absolute())

    is_path = Path(settings.data).expanduser().is_dir() or settings.data.endswith(".tar")
    return replace(
        settings,
        checkpoint=settings.checkpoint and absolute(settings.checkpoint),
        data=absolute(settings.data) if is_path else settings.data,
        root=settings.root and absolute(settings.root),
        out=absolute(settings.out),
    )
