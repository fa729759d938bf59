"""Where images and their targets come from: folders, packages' data sets, streams of shards."""

from __future__ import annotations

import io
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

from PIL import Image, UnidentifiedImageError
from torchvision.datasets.folder import IMG_EXTENSIONS, find_classes, make_dataset

from vitarium.tools._common import DECODER_ERRORS
from vitarium.training.config import DataConfig

_TARGETS = ("label", "cls", "fine_label", "class")
_BUFFER = 1000  # images among which a stream is shuffled, unless the config says otherwise
_SHARDS = 16  # parts into which a table on the disk is cut for a stream

# A class's number, or a map of them for every pixel.
Target: TypeAlias = int | Image.Image
Pair: TypeAlias = tuple[Image.Image, Target]
Load: TypeAlias = Callable[[], Pair]


class UnreadableError(Exception):
    """An image, or its target, that cannot be read; the message says why, without the name."""


class Source(ABC):
    """Images that can be read in any order; processes that read get a copy.

    Attributes:
        names: of the images, for people.
        classes: names, in the order of their numbers.
    """

    names: Sequence[str]
    classes: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.names)

    @abstractmethod
    def load(self, index: int) -> Pair:
        """An image as RGB, and its target.

        Raises:
            UnreadableError: the image cannot be read.
        """


class Stream(ABC):
    """Images that come in an order of their own.

    Attributes:
        classes: names, in the order of their numbers.
    """

    classes: tuple[str, ...]

    @abstractmethod
    def open(self, epoch: int, rank: int, world: int) -> Iterator[tuple[str, Load]]:
        """One process' share of a pass: each image's name, and a function that reads it.

        Workers of torch's loader share it among them.
        """

    @abstractmethod
    def shards(self, world: int) -> int:
        """How many workers a process has work for."""


def open_sources(
    data: DataConfig, segmentation: bool, shuffle_seed: int = 0
) -> tuple[Source | Stream, Source | Stream]:
    """What a run trains on and what it validates on.

    Args:
        data: the section of the config.
        segmentation: whether targets are maps of classes.
        shuffle_seed: of streams.

    Raises:
        ValueError: an unknown source, or one that has no such targets, a missing folder, package
            or split, classes without images, or classes of the two that differ.
    """
    kind, _, name = data.source.partition("/")
    openers: Mapping[str, Callable[..., Any]] = _MAPS if segmentation else _CLASSES
    if kind not in openers:
        task = "segmentation" if segmentation else "classification"
        raise ValueError(
            f"data.source: expected one of {', '.join(openers)} for {task}, got {data.source!r}"
        )
    _expect_used(data, kind)
    train, val = (
        openers[kind](data, name, split, shuffle_seed if is_train else None)
        for split, is_train in ((data.train, True), (data.val, False))
    )
    if train.classes != val.classes:
        odd = sorted({*val.classes} - {*train.classes})
        if odd or isinstance(val, Stream):
            raise ValueError(
                f"data.val: expected the classes of {data.train}, got {', '.join(odd[:5])} besides"
                if odd
                else f"data.val: expected {len(train.classes)} classes, got {len(val.classes)}"
            )
        val = _Renumbered(val, train.classes)
    return train, val


def decode(content: str | Path | bytes | io.BytesIO | Image.Image) -> Image.Image:
    """An image as RGB, read as timm and torchvision do it.

    Raises:
        UnreadableError: not an image, a truncated one, or no such file.
    """
    try:
        if isinstance(content, Image.Image):
            return content.convert("RGB")
        with Image.open(io.BytesIO(content) if isinstance(content, bytes) else content) as image:
            return image.convert("RGB")
    except UnidentifiedImageError as error:
        raise UnreadableError("unknown format, damaged, or empty") from error
    except DECODER_ERRORS as error:
        raise UnreadableError(getattr(error, "strerror", None) or str(error)) from error


def _expect_used(data: DataConfig, kind: str) -> None:
    """Refuse keys that a source does not read."""
    tables = kind in ("hf", "webdataset")
    streamed = kind == "webdataset" or (kind == "hf" and data.stream)
    for key, used in (
        ("root", kind not in ("digits",)),
        ("stream", kind == "hf"),
        ("image_key", tables),
        ("target_key", tables),
        ("samples", streamed),
        ("shuffle_buffer", streamed),
        ("classes", tables or kind == "pairs"),
    ):
        if not used and getattr(data, key):
            raise ValueError(f"data.{key}: {data.source} has none, got {getattr(data, key)!r}")


def _root(data: DataConfig) -> Path:
    if data.root is None:
        raise ValueError(f"data.root: expected the folder of {data.source}, got none")
    root = Path(data.root).expanduser()
    if not root.is_dir():
        raise ValueError(f"data.root: expected a folder, got {data.root!r}")
    return root


class _Renumbered(Source):
    """The same images with the numbers that their classes have elsewhere."""

    def __init__(self, source: Source, classes: tuple[str, ...]) -> None:
        self._source = source
        self._numbers = [classes.index(name) for name in source.classes]
        self.names = source.names
        self.classes = classes

    def load(self, index: int) -> Pair:
        image, number = self._source.load(index)
        assert isinstance(number, int)
        return image, self._numbers[number]


class _Folder(Source):
    """``root/split/class/image``."""

    def __init__(self, data: DataConfig, name: str, split: str, seed: int | None) -> None:
        folder = _root(data) / split
        try:
            classes, numbers = find_classes(str(folder))
        except FileNotFoundError as error:
            raise ValueError(
                f"data.root: expected {folder} with a folder for each class"
            ) from error
        self._samples = make_dataset(str(folder), numbers, IMG_EXTENSIONS, allow_empty=True)
        empty = sorted({*classes} - {classes[number] for _, number in self._samples})
        if empty:
            named = ", ".join(empty[:5]) + (" ..." if len(empty) > 5 else "")
            raise ValueError(f"data.root: {len(empty)} classes without images in {folder}: {named}")
        self.names = [path for path, _ in self._samples]
        self.classes = tuple(classes)

    def load(self, index: int) -> Pair:
        path, number = self._samples[index]
        return decode(path), number


class _Torchvision(Source):
    """A data set of torchvision's that is on this machine, by timm's name for it."""

    def __init__(self, data: DataConfig, name: str, split: str, seed: int | None) -> None:
        from timm.data import create_dataset

        try:
            self._found: Any = create_dataset(f"torch/{name}", root=str(_root(data)), split=split)
        except (AssertionError, RuntimeError, OSError) as error:
            raise ValueError(f"data.source: {data.source}: {error}") from error
        self.names = [f"{data.source} {split} {i}" for i in range(len(self._found))]
        self.classes = tuple(map(str, self._found.classes))

    def load(self, index: int) -> Pair:
        image, number = self._found[index]
        return decode(image), int(number)


class _Digits(Source):
    """scikit-learn's digits, of which the last 360 are never trained on."""

    def __init__(self, data: DataConfig, name: str, split: str, seed: int | None) -> None:
        from vitarium.tools.digits import split as digits

        parts = dict(zip(("train", "val"), digits(), strict=True))
        if split not in parts:
            raise ValueError(
                f"data.{'val' if seed is None else 'train'}: expected train or val, got {split!r}"
            )
        self._digits = parts[split]
        self.names = [f"digit {i} of {split}" for i in range(len(self._digits.labels))]
        self.classes = tuple(map(str, range(10)))

    def load(self, index: int) -> Pair:
        return self._digits.pictures[index], int(self._digits.labels[index])


def _hugging_face(data: DataConfig, name: str, split: str, seed: int | None) -> Source | Stream:
    """A data set of the hub's, a builder with ``root`` as its folder, or one saved in ``root``."""
    datasets = _datasets()
    try:
        if name == "disk":
            found = datasets.load_from_disk(str(_root(data)))
            found = found[split] if isinstance(found, datasets.DatasetDict) else found
            found = found.to_iterable_dataset(_SHARDS) if data.stream else found
        else:
            folder = {} if data.root is None else {"data_dir": str(_root(data))}
            found = datasets.load_dataset(name, split=split, streaming=data.stream, **folder)
    except Exception as error:  # of any of the libraries beneath
        raise ValueError(f"data.source: {data.source}: {_first_line(error)}") from error
    table = _Table(found, data)
    return (
        _TableStream(table, split, data, seed) if data.stream else _TableSource(table, split, data)
    )


def _webdataset(data: DataConfig, name: str, split: str, seed: int | None) -> Stream:
    """Shards by a pattern below ``root``."""
    files = sorted(map(str, _root(data).glob(split)))
    if not files:
        raise ValueError(f"data.root: no shard of {data.root} matches {split!r}")
    try:
        found = _datasets().load_dataset(
            "webdataset", data_files={"shards": files}, split="shards", streaming=True
        )
    except Exception as error:  # of any of the libraries beneath
        raise ValueError(f"data.source: {data.source}: {_first_line(error)}") from error
    return _TableStream(_Table(found, data), split, data, seed)


def _datasets() -> Any:
    try:
        import datasets
    except ImportError as error:
        raise ValueError('datasets is not installed: pip install "vitarium[train]"') from error
    return datasets


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"


class _Table:
    """A table of Hugging Face's, with images undecoded, so that a bad one can be named."""

    def __init__(self, found: Any, data: DataConfig) -> None:
        datasets = _datasets()
        if found.features is None:
            found = found._resolve_features()
        features = found.features
        images = [key for key, kind in features.items() if isinstance(kind, datasets.Image)]
        targets = [key for key in _TARGETS if key in features]
        self._image = _column("image_key", data.image_key, images, features)
        self._target = _column("target_key", data.target_key, targets[:1], features)
        self.rows = found.cast_column(self._image, datasets.Image(decode=False))
        names = getattr(features[self._target], "names", None)
        self.classes: tuple[str, ...] = data.classes or tuple(names or ())
        if not self.classes:
            raise ValueError(f"data.classes: expected a list, {data.source} does not name them")

    def name(self, row: Any, number: int) -> str:
        """What to call a row."""
        key = row.get("__key__") or row[self._image].get("path") or f"row {number}"
        return f"{row['__url__']} {key}" if "__url__" in row else str(key)

    def read(self, row: Any) -> Pair:
        """A row's image and its class."""
        image = row[self._image]
        number = int(row[self._target])
        if not 0 <= number < len(self.classes):
            raise ValueError(
                f"data.classes: expected more than {number} names, the class of a row, got "
                f"{len(self.classes)}"
            )
        return decode(image["bytes"] or Path(image["path"])), number


class _TableSource(Source):
    def __init__(self, table: _Table, split: str, data: DataConfig) -> None:
        self._table = table
        self.names = [f"{data.source} {split} {i}" for i in range(len(table.rows))]
        self.classes = table.classes

    def load(self, index: int) -> Pair:
        return self._table.read(self._table.rows[index])


class _TableStream(Stream):
    def __init__(self, table: _Table, split: str, data: DataConfig, seed: int | None) -> None:
        self._table = table
        self._rows = table.rows
        if seed is not None:
            self._rows = self._rows.shuffle(seed, buffer_size=data.shuffle_buffer or _BUFFER)
        self.classes = table.classes

    def open(self, epoch: int, rank: int, world: int) -> Iterator[tuple[str, Load]]:
        from datasets.distributed import split_dataset_by_node

        part = split_dataset_by_node(self._rows, rank=rank, world_size=world)
        part.set_epoch(epoch)
        for number, row in enumerate(part):
            yield self._table.name(row, number), partial(self._table.read, row)

    def shards(self, world: int) -> int:
        count = int(self._rows.num_shards)
        return count // world if count % world == 0 else count


def _column(argument: str, chosen: str | None, found: list[str], features: Any) -> str:
    if chosen is not None and chosen in features:
        return chosen
    if chosen is None and len(found) == 1:
        return found[0]
    got = "none" if chosen is None else repr(chosen)
    raise ValueError(f"data.{argument}: expected one of {', '.join(features)}, got {got}")


_CLASSES: Mapping[str, Callable[..., Source | Stream]] = {
    "folder": _Folder,
    "digits": _Digits,
    "torchvision": _Torchvision,
    "hf": _hugging_face,
    "webdataset": _webdataset,
}
_MAPS: Mapping[str, Callable[..., Source | Stream]] = {}
