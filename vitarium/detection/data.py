"""mmengine's training data by position: any iteration can come back, on any number of processes."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import count
from typing import Any

import mmengine.dist.utils
from torch.utils.data import DataLoader, Dataset, Sampler

from vitarium.training.data import Layout, seeded

_SAMPLE = 1  # what a place is drawn for; `seeded_step` has 0


def training_loader(
    config: dict[str, Any], build: Callable[..., DataLoader[Any]], layout: Layout, seed: int
) -> DataLoader[Any]:
    """A process' batches, of a `Batches` as their sampler.

    All processes go through the same batches of the config's own samplers and take theirs, so
    several draw what one draws that accumulates as many. One pass follows the other without an end;
    batches do not care where, so none is short.

    Args:
        config: of mmengine's data loader.
        build: ``Runner.build_dataloader``.
        layout: which batches are this process'.
        seed: of order and augmentation.

    Raises:
        ValueError: the data set has no samples.
    """
    if "num_batch_per_epoch" in config:  # counts those of one process
        batches = config["num_batch_per_epoch"] * layout.world
        config = {**config, "num_batch_per_epoch": batches}
    with _alone():
        plain = build(config, seed=seed)
    if not len(plain.dataset):  # type: ignore[arg-type]
        raise ValueError("train_dataloader.dataset: expected images to train on, got none")
    inner: Any = plain.batch_sampler
    inner.sampler = _Endless(inner.sampler, plain.dataset)
    return DataLoader(
        _Seeded(plain.dataset, seed),
        batch_sampler=Batches(inner, layout),
        num_workers=plain.num_workers,
        collate_fn=plain.collate_fn,
        pin_memory=plain.pin_memory,
        timeout=plain.timeout,
        worker_init_fn=plain.worker_init_fn,
        multiprocessing_context=plain.multiprocessing_context,
        prefetch_factor=plain.prefetch_factor,
        persistent_workers=plain.persistent_workers,
    )


class Batches(Sampler[list[tuple[int, int, Any]]]):
    """For each iteration of a span: number of the batch, place in it and index of each sample.

    Nothing is read for the iterations before the span.

    Attributes:
        span: the first iteration that is wanted, and the one behind the last; it moves forward.
        sampler: what hooks of mmengine look for, to set an epoch; this one has none to set.
    """

    def __init__(self, inner: Any, layout: Layout) -> None:
        self.span = (0, 0)
        self.sampler = inner.sampler
        self._length = max(1, math.ceil(len(inner) / layout.world))
        self._layout = layout
        self._numbered: Iterator[tuple[int, list[Any]]] = enumerate(inner)

    def __len__(self) -> int:
        """Iterations of one pass over the data."""
        return self._length

    def __iter__(self) -> Iterator[list[tuple[int, int, Any]]]:
        for iteration in range(*self.span):
            wanted = batch_number(self._layout, iteration)
            batch = next(batch for number, batch in self._numbered if number == wanted)
            yield [(wanted, place, index) for place, index in enumerate(batch)]


def batch_number(layout: Layout, iteration: int) -> int:
    """Number, over the whole run and all processes, of a process' batch."""
    return layout.micro_batch(*divmod(iteration, layout.accumulation))


class _Endless(Sampler[Any]):
    """A sampler's passes, one after another."""

    def __init__(self, sampler: Any, dataset: Any) -> None:
        self.dataset = dataset  # batch samplers ask it for the images' sizes
        self._sampler = sampler

    def __len__(self) -> int:
        return len(self._sampler)

    def __iter__(self) -> Iterator[Any]:
        for epoch in count():
            if hasattr(self._sampler, "set_epoch"):
                self._sampler.set_epoch(epoch)
            yield from self._sampler


class _Seeded(Dataset[Any]):
    """A data set whose random changes to a sample depend on the sample's place in the run."""

    def __init__(self, dataset: Any, seed: int) -> None:
        self.dataset = dataset
        self.seed = seed

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, key: tuple[int, int, Any]) -> Any:
        number, place, index = key
        with seeded(self.seed, _SAMPLE, number, place):
            return self.dataset[index]

    def __getattr__(self, name: str) -> Any:
        """What hooks ask the data set for: classes, the pipeline."""
        if name == "dataset":  # a copy that has nothing yet
            raise AttributeError(name)
        return getattr(self.dataset, name)


@contextmanager
def _alone() -> Iterator[None]:
    """Let each process build mmengine's samplers as the only one; they deal out to all."""
    utils = mmengine.dist.utils
    before = utils.is_distributed
    utils.is_distributed = lambda: False
    try:
        yield
    finally:
        utils.is_distributed = before
