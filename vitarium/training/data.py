"""Batches whose content depends on the seed and the position alone, so any step can come back."""

from __future__ import annotations

import random
import signal
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from itertools import count
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, get_worker_info

from vitarium.training.sources import Load, Pair, Source, Stream, UnreadableError

Transform: TypeAlias = Callable[[Pair], tuple[Tensor, Tensor]]

_REPLACEMENTS = 20  # images tried in the place of one that cannot be read
_PREFETCH = 4  # batches that a worker prepares ahead
_STEP, _IMAGE = range(2)  # what a place is drawn for
_numpy: Any = np.random  # whose types leave out how its generator is changed


@dataclass(frozen=True)
class Layout:
    """How a step's images are dealt out.

    A step of all processes takes ``world * accumulation`` batches in a row: process 0 the first
    ``accumulation`` of them, and so on. So two processes take what one takes that accumulates twice
    as many, in the same order.
    """

    batch: int
    accumulation: int = 1
    rank: int = 0
    world: int = 1

    @property
    def images(self) -> int:
        """Of one step, over all processes."""
        return self.world * self.accumulation * self.batch

    def micro_batch(self, update: int, part: int) -> int:
        """Number, over the whole run, of a process' ``part``-th batch of a step."""
        return (update * self.world + self.rank) * self.accumulation + part


@dataclass(frozen=True)
class Batch:
    """Images [B, 3, H, W], targets [B] or [B, H, W], and names of what could not be read, and why.

    An image that could not be read has no place in a batch of validation, and another one stands
    in for it in training.
    """

    images: Tensor
    targets: Tensor
    failures: tuple[tuple[str, str], ...] = ()

    def to(self, device: torch.device, memory_format: torch.memory_format) -> Batch:
        """The same batch on a device."""
        images = self.images.to(device, non_blocking=True, memory_format=memory_format)
        return replace(self, images=images, targets=self.targets.to(device, non_blocking=True))

    def pin_memory(self) -> Batch:
        """The same batch where a device can fetch it by itself; torch's loader asks for it."""
        return replace(self, images=self.images.pin_memory(), targets=self.targets.pin_memory())


@contextmanager
def seeded(*key: int) -> Iterator[None]:
    """Every generator of this process at a place that ``key`` says; as they were, afterwards.

    So what is drawn inside does not depend on what was drawn before: not on an interruption, nor
    on which process reads an image.
    """
    sequence = np.random.SeedSequence(key)
    words = sequence.generate_state(4)
    seed = int(words[2]) << 32 | int(words[3])
    # torch.manual_seed walks through every kind of device, and costs more than to read an image;
    # NumPy's state is large, so its generator is changed for another one.
    cpu, cuda = torch.default_generator, torch.cuda.is_initialized()
    before = random.getstate(), _numpy.get_bit_generator(), cpu.get_state()
    device = torch.cuda.get_rng_state() if cuda else None
    random.seed(int(words[0]))
    _numpy.set_bit_generator(np.random.PCG64(sequence))
    cpu.manual_seed(seed)
    if cuda:
        torch.cuda.manual_seed(seed)
    try:
        yield
    finally:
        random.setstate(before[0])
        _numpy.set_bit_generator(before[1])
        cpu.set_state(before[2])
        if device is not None:
            torch.cuda.set_rng_state(device)


def seeded_step(seed: int, micro_batch: int) -> Any:
    """`seeded` for a batch's way through the model, whichever process computes it."""
    return seeded(seed, _STEP, micro_batch)


def order(count: int, seed: int, first: int, repeats: int = 1) -> Iterator[tuple[int, int]]:
    """Positions of a run from ``first`` on, and the index of the image at each.

    The run is one permutation of all images after another; batches do not care where one ends. With
    ``repeats`` each image stands so many times in a row, and a pass has the first ``count`` places.
    """
    epoch, offset = divmod(first, count)
    while True:
        places = np.random.default_rng([seed, epoch]).permutation(count).repeat(repeats)
        for place in places[offset:count]:
            yield epoch * count + offset, int(place)
            offset += 1
        epoch, offset = epoch + 1, 0


def training_batches(
    source: Source | Stream,
    transform: Transform,
    layout: Layout,
    *,
    seed: int,
    update: int,
    workers: int,
    strict: bool,
    repeats: int = 1,
) -> Generator[Batch, None, None]:
    """One process' batches from step ``update`` on, without end.

    Args:
        source: the images.
        transform: what each goes through.
        layout: which of them are this process'.
        seed: of order and augmentation.
        update: steps that are done already; a stream reads their images again and drops them.
        workers: processes that read; a stream has work for one per shard.
        strict: whether an image that cannot be read raises a ValueError.
        repeats: times that an image stands in a row, see `order`; streams have none.
    """
    reader = _Reader(transform, seed, strict)
    if isinstance(source, Source):
        keys = _keys(len(source), seed, update, layout, repeats)
        yield from _loader(_Shuffled(source, reader), workers, keys)
    else:
        workers = min(workers, source.shards(layout.world))
        passed = update * layout.accumulation
        loader = _loader(_Streamed(source, reader, layout, passed), workers)
        yield from (batch for batch in loader if batch is not None)


def validation_batches(
    source: Source | Stream,
    transform: Transform,
    layout: Layout,
    *,
    workers: int,
    strict: bool,
) -> Generator[Batch, None, None]:
    """One process' share of all images, each once; any batch may be smaller, or empty."""
    reader = _Reader(transform, 0, strict)
    if isinstance(source, Source):
        mine = range(layout.rank, len(source), layout.world)
        keys = [[*mine[i : i + layout.batch]] for i in range(0, len(mine), layout.batch)]
        yield from _loader(_Once(source, reader), workers, keys)
    else:
        workers = min(workers, source.shards(layout.world))
        yield from _loader(_StreamedOnce(source, reader, layout), workers)


def _loader(dataset: Dataset[Any], workers: int, keys: Any = None) -> Iterator[Any]:
    kwargs: dict[str, Any] = {"batch_size": None}
    if keys is not None:
        kwargs = {"batch_sampler": keys, "collate_fn": _batch}
    if workers:
        kwargs |= {"prefetch_factor": _PREFETCH, "worker_init_fn": _spared}
    pinned = torch.cuda.is_available()
    try:
        yield from DataLoader(dataset, num_workers=workers, pin_memory=pinned, **kwargs)
    except ValueError as error:  # a worker's comes with its traceback in the message
        raise ValueError(str(error).strip().rpartition("ValueError: ")[2]) from error


def _spared(worker: int) -> None:
    """Let a worker live through one SIGINT and one SIGTERM.

    Terminals, torchrun and Slurm send them to all processes, and the one that trains still wants
    batches until it has written its snapshot; then it ends its workers.
    """
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda number, frame: signal.signal(number, signal.SIG_DFL))


def _keys(
    count: int, seed: int, update: int, layout: Layout, repeats: int
) -> Iterator[list[tuple[int, int]]]:
    """Positions and indices of one process' batches."""
    images = order(count, seed, update * layout.images, repeats)
    first = layout.rank * layout.accumulation
    while True:
        for number in range(layout.world * layout.accumulation):
            batch = [next(images) for _ in range(layout.batch)]
            if first <= number < first + layout.accumulation:
                yield batch


class _Item(NamedTuple):
    """What became of one place: an image and its target, or none, and what could not be read."""

    pair: tuple[Tensor, Tensor] | None
    failures: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True)
class _Reader:
    transform: Transform
    seed: int
    strict: bool

    def read(self, name: str, load: Load, position: int) -> _Item:
        """The image at a position of the run."""
        try:
            pair = load()
        except UnreadableError as error:
            if self.strict:
                raise ValueError(f"{name}: cannot read this image: {error}") from error
            return _Item(None, ((name, str(error)),))
        with seeded(self.seed, _IMAGE, position):
            return _Item(self.transform(pair))


def _batch(items: Sequence[_Item]) -> Batch:
    pairs = [item.pair for item in items if item.pair is not None]
    failures = tuple(failure for item in items for failure in item.failures)
    if not pairs:
        return Batch(torch.empty(0), torch.empty(0), failures)
    images, targets = map(torch.stack, zip(*pairs, strict=True))
    return Batch(images, targets, failures)


class _Shuffled(Dataset[_Item]):
    """Images by (position, index); another one stands in for what cannot be read."""

    def __init__(self, source: Source, reader: _Reader) -> None:
        self.source = source
        self.reader = reader

    def __getitem__(self, key: tuple[int, int]) -> _Item:
        position, index = key
        failures: tuple[tuple[str, str], ...] = ()
        for attempt in range(_REPLACEMENTS):
            place = (index + attempt) % len(self.source)
            name = self.source.names[place]
            item = self.reader.read(name, partial(self.source.load, place), position)
            failures += item.failures
            if item.pair is not None:
                return _Item(item.pair, failures)
        raise ValueError(
            f"{_REPLACEMENTS} images in a row cannot be read: {failures[0][0]} ({failures[0][1]}) "
            f"and those after it"
        )


class _Once(Dataset[_Item]):
    """Images by index."""

    def __init__(self, source: Source, reader: _Reader) -> None:
        self.source = source
        self.reader = reader

    def __getitem__(self, index: int) -> _Item:
        load = partial(self.source.load, index)
        return self.reader.read(self.source.names[index], load, index)


class _StreamedOnce(IterableDataset[Batch]):
    """Batches of one pass over a process' share of a stream."""

    def __init__(self, stream: Stream, reader: _Reader, layout: Layout) -> None:
        self.stream = stream
        self.reader = reader
        self.layout = layout

    def __iter__(self) -> Iterator[Batch]:
        items = []
        for position, (name, load) in enumerate(
            self.stream.open(0, self.layout.rank, self.layout.world)
        ):
            items.append(self.reader.read(name, load, position))
            if len(items) == self.layout.batch:
                yield _batch(items)
                items = []
        if items:
            yield _batch(items)


class _Streamed(IterableDataset[Batch | None]):
    """Batches of one pass over a stream after another, without what earlier steps took.

    torch's loader takes a batch of each of its workers in turn, so which batch of the process is
    made here follows from the worker's number.
    """

    def __init__(self, stream: Stream, reader: _Reader, layout: Layout, passed: int) -> None:
        self.stream = stream
        self.reader = reader
        self.layout = layout
        self.passed = passed

    def __iter__(self) -> Iterator[Batch | None]:
        info = get_worker_info()
        worker, workers = (info.id, info.num_workers) if info is not None else (0, 1)
        done = len(range(worker, self.passed, workers))
        if worker < self.passed % workers:  # the loader begins with worker 0 again: not its turn
            yield None
        images = self._images()
        for number in count():
            numbered = [next(images) for _ in range(self.layout.batch)]
            if number >= done:
                first = (worker + number * workers) * self.layout.batch
                yield _batch(_filled([*self._items(numbered, first)]))

    def _items(self, numbered: Sequence[tuple[str, Load]], first: int) -> Iterator[_Item]:
        for place, (name, load) in enumerate(numbered, first):
            yield self.reader.read(name, load, place * self.layout.world + self.layout.rank)

    def _images(self) -> Iterator[tuple[str, Load]]:
        for epoch in count():
            empty = True
            for image in self.stream.open(epoch, self.layout.rank, self.layout.world):
                empty = False
                yield image
            if empty:
                raise ValueError("data.train: expected a shard for each process, one has no images")


def _filled(items: list[_Item]) -> list[_Item]:
    """Another image of the batch in the place of each that could not be read.

    Which images the next batch takes must not depend on them: it may be read again without this.
    """
    pairs = [item.pair for item in items if item.pair is not None]
    if not pairs:
        name, why = items[0].failures[0]
        raise ValueError(f"a whole batch cannot be read: {name} ({why}) and those after it")
    return [item._replace(pair=item.pair or pairs[i % len(pairs)]) for i, item in enumerate(items)]
