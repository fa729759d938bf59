"""One process' part of embedding a list of images: whatever shards no other one has claimed."""

from __future__ import annotations

import hashlib
import os
import signal
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import timm
import torch
from filelock import FileLock
from timm.data import create_transform, resolve_model_data_config
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

import vitarium
from vitarium.checkpoints import convert, load, outline
from vitarium.checkpoints.wrappers import unwrap_tensors
from vitarium.embedding.images import Images, open_images
from vitarium.embedding.store import Shard, Store
from vitarium.heads.probing import FrozenBackbone
from vitarium.tools._common import check_model, pick_device
from vitarium.training.sources import UnreadableError

SHARD_SIZES = {"pooled": 4096, "tokens": 256}  # images, unless one says otherwise
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_PREFETCH = 4  # batches that a worker prepares ahead
_POLL = 0.5  # seconds between two looks at shards that others have claimed
_PACKAGES = ("torch", "torchvision", "timm", "pillow")


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What is embedded, by what, and how; the command line's names.

    Attributes:
        model: a name of vitarium or timm.
        checkpoint: a file of weights; absent: the pretrained ones.
        data: images, see `open_images`.
        root: folder of a data set that has a name.
        split: of the same.
        out: folder of the shards.
        what: ``pooled``, the model's features before its classifier [C]; ``tokens``, its patch
            tokens [N, C].
        dtype: in which the model computes, and of what is stored.
        format: ``safetensors`` or ``parquet``.
        shard_size: images of a shard; absent: `SHARD_SIZES`.
        batch_size: images that the model sees at once.
        workers: processes that read images; absent: as many as this process' share of cores has
            left beside it.
        device: such as ``cuda``; absent: that where there is one, else the CPU.
        strict: whether an image that cannot be read is an error.
    """

    model: str
    checkpoint: str | None = None
    data: str
    root: str | None = None
    split: str | None = None
    out: str
    what: str = "pooled"
    dtype: str = "float32"
    format: str = "safetensors"
    shard_size: int | None = None
    batch_size: int = 64
    workers: int | None = None
    device: str | None = None
    strict: bool = False


class Embedder:
    """Makes shards; any number of these, on machines that share the folder, may do it together.

    Those of one launch take turns through the list by the variables that torchrun and accelerate
    set. They are no process group: one that dies leaves its shards to the others.

    Args:
        settings: what to do.

    Attributes:
        images: all of them.
        store: the shards.

    Raises:
        ValueError: the settings do not fit together, name something that is not there, or the
            folder holds other embeddings.
        CheckpointError: the weights cannot be had or do not fit.
        OSError: the folder cannot be written.
    """

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._rank, self._world = _place("RANK", 0), _place("WORLD_SIZE", 1)
        self._device = _own_device(settings.device)
        self._dtype = _DTYPES[settings.dtype]
        self.images = open_images(settings.data, settings.root, settings.split)
        model = build(settings.model, settings.checkpoint)
        config = resolve_model_data_config(model)
        self._transform = create_transform(**config, is_training=False)
        weights = _weights_digest(model)
        self.model = model.requires_grad_(False).to(self._device).eval()
        self._embed = FrozenBackbone(model) if settings.what == "tokens" else _pooled(model)
        self._shape = self(torch.zeros(1, *config["input_size"])).shape[1:]
        manifest = {
            "model": settings.model.partition(".")[0],
            "weights": weights,
            "what": settings.what,
            "dtype": settings.dtype,
            "shape": [*self._shape],
            "transform": {k: [*v] if isinstance(v, tuple) else v for k, v in config.items()},
            "images": len(self.images),
            "list": self.images.digest,
            "format": settings.format,
            "shard_size": settings.shard_size or SHARD_SIZES[settings.what],
            "facts": {
                "vitarium": vitarium.__version__,
                **{package: version(package) for package in _PACKAGES},
            },
        }
        self.store = Store(Path(settings.out).expanduser(), manifest)
        self.store.open()

    def __call__(self, images: Tensor) -> Tensor:
        """Embeddings [B, ...] of images [B, 3, H, W], on the model's device."""
        images = images.to(self._device, non_blocking=True)
        with (
            torch.inference_mode(),
            torch.autocast(self._device.type, self._dtype, self._dtype != torch.float32),
        ):
            embeddings: Tensor = self._embed(images)
        return embeddings.to(self._dtype)

    def run(self, shards: Iterable[int] | None = None) -> tuple[int, list[tuple[str, str]]]:
        """Make the shards that are not there yet, and see to it that others make theirs.

        Args:
            shards: numbers; None for all.

        Returns:
            How many rows these shards have now, and which images have none, and why.

        Raises:
            ValueError: an image cannot be read, and the settings are strict.
            OSError: a shard cannot be written; those before it stay.
        """
        numbers = range(self.store.shards) if shards is None else [*shards]
        pending = dict.fromkeys([*numbers[self._rank :: self._world], *numbers])
        shown = shards is None and self._rank == 0
        progress = Progress(self.store.count, len(self.images) if shown else None)
        rows, failed = 0, []
        while True:
            for number in [*pending]:
                outcome = self.store.outcome(number)
                if outcome is not None:
                    del pending[number]
                    rows += outcome.rows
                    failed += outcome.failed
            if failed and self._settings.strict:
                raise _unreadable(*failed[0])
            if not pending:
                break
            # No claim is held while others' are waited for: two could wait for each other.
            if not self._make(pending, progress):
                time.sleep(_POLL)
        progress.end()
        if shards is None:
            self.store.tidy()
        return rows, failed

    def _make(self, numbers: Iterable[int], progress: Progress) -> int:
        """Make all of these shards that nobody else has claimed; says how many these were."""
        made = 0
        claims: dict[int, FileLock] = {}
        shard: list[_Batch] = []
        try:
            for batch in self._loader(self._batches(numbers, claims)):
                for name, why in batch.failed:
                    if self._settings.strict:
                        raise _unreadable(name, why)
                    progress.say(f"cannot be read: {name}: {why}")
                shard.append(batch._replace(images=self(batch.images)) if batch.names else batch)
                number = batch.start // self.store.manifest["shard_size"]
                indices = self.store.indices(number)
                if batch.stop == indices.stop:
                    self.store.write(number, self._joined(shard))
                    claims.pop(number).release()
                    shard, made = [], made + 1
                    progress.tell(0)
                else:
                    progress.tell(batch.stop - indices.start)
        finally:
            for claim in claims.values():
                claim.release()
        return made

    def _joined(self, batches: Sequence[_Batch]) -> Shard:
        parts = [batch.images for batch in batches if batch.names]
        none = torch.empty(0, *self._shape, dtype=self._dtype)
        return Shard(
            names=[name for batch in batches for name in batch.names],
            embeddings=torch.cat(parts).cpu() if parts else none,
            failed=[failure for batch in batches for failure in batch.failed],
        )

    def _batches(self, numbers: Iterable[int], claims: dict[int, FileLock]) -> Iterator[list[int]]:
        """Indices; a shard is claimed when the loader asks for its first batch."""
        size = self._settings.batch_size
        for number in numbers:
            claim = self.store.claim(number)
            if claim is None:
                continue
            if self.store.outcome(number) is not None:
                claim.release()
                continue
            claims[number] = claim
            indices = self.store.indices(number)
            for i in range(0, len(indices), size):
                yield [*indices[i : i + size]]

    def _loader(self, batches: Iterator[list[int]]) -> Iterable[_Batch]:
        workers = self._settings.workers
        workers = spare_cores() if workers is None else workers
        return DataLoader(
            _Read(self.images, self._transform),
            batch_sampler=batches,  # type: ignore[arg-type]  # an iterator will do
            num_workers=workers,
            collate_fn=_batch,
            prefetch_factor=_PREFETCH if workers else None,
            pin_memory=self._device.type == "cuda",
            worker_init_fn=_ignore_interrupts,
        )


def build(name: str, checkpoint: str | None) -> nn.Module:
    """A model with its pretrained weights, or a checkpoint's, of any number of classes."""
    check_model(name, pretrained=checkpoint is None)
    model: Any = timm.create_model(name, pretrained=checkpoint is None)
    if checkpoint is not None:
        found = convert(unwrap_tensors(outline(checkpoint)), model)
        classifier = found.get(f"{model.pretrained_cfg.get('classifier')}.weight")
        if classifier is not None and len(classifier) != model.num_classes:
            model = timm.create_model(name, num_classes=len(classifier))
        load(model, checkpoint)
    built: nn.Module = model
    return built


def _pooled(model: Any) -> Callable[[Tensor], Tensor]:
    return lambda images: model.forward_head(model.forward_features(images), pre_logits=True)


def _weights_digest(model: nn.Module) -> str:
    """sha256 of all tensors of a model, with their names."""
    hasher = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        hasher.update(f"{name} {tensor.dtype} {[*tensor.shape]}\0".encode())
        hasher.update(tensor.contiguous().flatten().view(torch.uint8).numpy())
    return hasher.hexdigest()


def _place(variable: str, default: int) -> int:
    """What torchrun and accelerate say of a process."""
    return int(os.environ.get(variable, default))


def _own_device(name: str | None) -> torch.device:
    """The device of this name; of several CUDA devices the one of this process."""
    device = pick_device(name)
    if device.type == "cuda" and name in (None, "cuda"):
        return torch.device("cuda", _place("LOCAL_RANK", 0) % torch.cuda.device_count())
    return device


def spare_cores() -> int:
    has_affinity = hasattr(os, "sched_getaffinity")
    cores = len(os.sched_getaffinity(0)) if has_affinity else os.cpu_count() or 1
    return max(1, cores // _place("LOCAL_WORLD_SIZE", 1) - 1)


def _unreadable(name: str, why: str) -> ValueError:
    return ValueError(f"{name}: cannot read this image: {why}")


class _Item(NamedTuple):
    place: int
    name: str
    image: Tensor | None
    why: str = ""


class _Batch(NamedTuple):
    """Images ``start`` to ``stop`` of the list: tensors [B, ...] of those that can be read."""

    start: int
    stop: int
    names: list[str]
    images: Tensor
    failed: list[tuple[str, str]]


class _Read(Dataset[_Item]):
    def __init__(self, images: Images, transform: Callable[[Any], Tensor]) -> None:
        self._images = images
        self._transform = transform

    def __getitem__(self, index: int) -> _Item:
        name = self._images.names[index]
        try:
            image = self._images.load(index)
        except UnreadableError as error:
            return _Item(index, name, None, str(error))
        return _Item(index, name, self._transform(image))


def _batch(items: Sequence[_Item]) -> _Batch:
    read = [(item.name, item.image) for item in items if item.image is not None]
    return _Batch(
        items[0].place,
        items[-1].place + 1,
        [name for name, _ in read],
        torch.stack([image for _, image in read]) if read else torch.empty(0),
        [(item.name, item.why) for item in items if item.image is None],
    )


def _ignore_interrupts(worker: int) -> None:
    """Ctrl-C is for the process that embeds; it ends its workers."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


class Progress:
    """How far it is: a line that is written over on a terminal, else one every half minute.

    Args:
        count: tells how many images are in whole shards, of all processes.
        total: images; None for a process that leaves this to another one.
    """

    def __init__(self, count: Callable[[], int], total: int | None) -> None:
        self._count = count
        self._total = total
        self._terminal = sys.stderr.isatty()
        self._since = self._told = time.monotonic()
        self._first = count() if total is not None else 0
        if total is not None and 0 < self._first < total:
            self.say(f"{self._first} of {total} images are there already")

    def tell(self, further: int) -> None:
        """Show whole shards, and so many images besides, if it is time to."""
        now = time.monotonic()
        if self._total is None or now - self._told < (0.5 if self._terminal else 30):
            return
        self._told = now
        done = self._count() + further
        rate = (done - self._first) / (now - self._since)
        left = timedelta(seconds=round((self._total - done) / max(rate, 1e-9)))
        text = f"{done}/{self._total} images  {rate:.4g} images/s  {left} left"
        self._print(text, end="" if self._terminal else "\n")

    def say(self, text: str) -> None:
        """Write a line that stays."""
        self._print(text)

    def end(self) -> None:
        """Leave the terminal as it was."""
        if self._terminal and self._total is not None:
            self._print("", end="")

    def _print(self, text: str, end: str = "\n") -> None:
        if self._terminal:
            text = f"\r{text}\x1b[K"
        print(text, end=end, file=sys.stderr, flush=True)
