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
_CITY = (
    *("road", "sidewalk", "building", "wall", "fence", "pole", "traffic light", "traffic sign"),
    *("vegetation", "terrain", "sky", "person", "rider", "car", "truck", "bus", "train"),
    *("motorcycle", "bicycle"),
)
_HALVES = ("train", "training", "val", "valid", "validation", "eval", "evaluation", "test")
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
        same_size: whether all images are known to have one size.
    """

    names: Sequence[str]
    classes: tuple[str, ...]
    same_size = False

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
    _expect_used(data, kind, segmentation)
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


def open_split(data: DataConfig, split: str) -> Source | Stream:
    """One split for classification, in its own order and with its own classes.

    Raises:
        ValueError: as for `open_sources`.
    """
    kind, _, name = data.source.partition("/")
    return _CLASSES[kind](data, name, split, None)


def decode(content: str | Path | bytes | Image.Image, mode: str = "RGB") -> Image.Image:
    """An image as RGB, read as timm and torchvision do it, or a map of classes (``P``) as 8 bits.

    Raises:
        UnreadableError: not an image, a truncated one, or no such file.
    """
    try:
        if isinstance(content, Image.Image):
            return content.convert(mode)
        with Image.open(io.BytesIO(content) if isinstance(content, bytes) else content) as image:
            if mode == "P":
                return _numbers(image)
            return image.convert(mode)
    except UnidentifiedImageError as error:
        raise UnreadableError("unknown format, damaged, or empty") from error
    except DECODER_ERRORS as error:
        raise UnreadableError(getattr(error, "strerror", None) or str(error)) from error


def _numbers(image: Image.Image) -> Image.Image:
    """A map of classes as it is stored, palette or not."""
    if image.mode not in ("L", "P"):
        raise UnreadableError(f"a map of classes has 8 bits, this image is {image.mode}")
    return Image.frombytes("L", image.size, image.tobytes())


def _expect_used(data: DataConfig, kind: str, segmentation: bool) -> None:
    """Refuse keys that a source does not read."""
    tables = kind in ("hf", "webdataset")
    streamed = kind == "webdataset" or (kind == "hf" and data.stream)
    for key, used in (
        ("root", kind not in ("digits", "digit_scenes")),
        ("stream", kind == "hf"),
        ("image_key", tables),
        ("target_key", tables),
        ("samples", streamed),
        ("shuffle_buffer", streamed),
        ("repeats", not streamed),
        ("classes", tables or (segmentation and kind == "folder")),
    ):
        if not used and getattr(data, key) != getattr(DataConfig, key):
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
        if hasattr(self._found, "train") and split not in _HALVES:  # timm takes it for the test set
            key = "val" if seed is None else "train"
            raise ValueError(f"data.{key}: expected one of {', '.join(_HALVES)}, got {split!r}")
        if not hasattr(self._found, "classes"):
            raise ValueError(f"data.source: {data.source} does not name its classes")
        self.names = [f"{data.source} {split} {i}" for i in range(len(self._found))]
        self.classes = tuple(map(str, self._found.classes))

    def load(self, index: int) -> Pair:
        try:
            image, number = self._found[index]
        except DECODER_ERRORS as error:
            raise UnreadableError(getattr(error, "strerror", None) or str(error)) from error
        return decode(image), int(number)


class _Digits(Source):
    """scikit-learn's digits, of which the last 360 are never trained on."""

    def __init__(self, data: DataConfig, name: str, split: str, seed: int | None) -> None:
        from vitarium.data.digits import digits_of

        self._digits, _ = digits_of(split)
        self.names = [f"digit {i} of {split}" for i in range(len(self._digits.labels))]
        self.classes = tuple(map(str, range(10)))

    def load(self, index: int) -> Pair:
        return self._digits.pictures[index], int(self._digits.labels[index])


class _Pairs(Source):
    """Images and maps of classes in folders, named alike.

    Args:
        images: folder of the images, and of the folders in it.
        maps: the same of their maps, 8-bit.
        endings: of the images' names and of their maps', which differ in nothing else.
        classes: names, in the order of their numbers.
        shift: whether 0 is no class: it is ignored, and the others count from 1.
    """

    def __init__(
        self,
        images: Path,
        maps: Path,
        endings: tuple[str, str],
        classes: tuple[str, ...],
        shift: bool = False,
    ) -> None:
        theirs, ours = endings
        found = sorted(path for path in images.rglob(f"*{theirs}") if path.is_file())
        if not found:
            raise ValueError(f"data.root: expected images *{theirs} in {images}, found none")
        named = [str(path.relative_to(images)).removesuffix(theirs) for path in found]
        self._maps = [maps / f"{name}{ours}" for name in named]
        lacking = [path for path in self._maps if not path.is_file()]
        if lacking:
            raise ValueError(
                f"data.root: {len(lacking)} of {len(found)} images have no map: {lacking[0]}"
            )
        self.names = [*map(str, found)]
        self.classes = classes
        self._shift = shift

    def load(self, index: int) -> Pair:
        image = decode(self.names[index])
        target = decode(self._maps[index], "P")
        if target.size != image.size:
            raise UnreadableError(f"{image.size} pixels, and its map has {target.size}")
        if self._shift:
            target = target.point([(value - 1) % 256 for value in range(256)])
        return image, target


def _map_folder(data: DataConfig, name: str, split: str, seed: int | None) -> Source:
    """``root/images/split/NAME.jpg`` and ``root/annotations/split/NAME.png``."""
    if data.classes is None:
        raise ValueError("data.classes: expected the names of the maps' classes, got none")
    root = _root(data)
    folder = root / "images" / split
    endings = [".jpg", ".png"]
    ending = next((x for x in endings if any(folder.rglob(f"*{x}"))), endings[0])
    return _Pairs(folder, root / "annotations" / split, (ending, ".png"), data.classes)


def _ade20k(data: DataConfig, name: str, split: str, seed: int | None) -> Source:
    """The scene parsing benchmark's folders, ADEChallengeData2016, of 150 classes."""
    root = _root(data)
    names = root / "objectInfo150.txt"
    try:
        lines = names.read_text(encoding="utf-8").splitlines()[1:]
    except OSError as error:
        raise ValueError(f"data.root: expected {names}, which names the classes") from error
    classes = tuple(line.split("\t")[-1].split(",")[0].strip() for line in lines)
    folders = root / "images" / split, root / "annotations" / split
    return _Pairs(*folders, (".jpg", ".png"), classes, shift=True)


def _cityscapes(data: DataConfig, name: str, split: str, seed: int | None) -> Source:
    """``leftImg8bit`` and, in ``gtFine``, the maps of the 19 classes that count."""
    root = _root(data)
    endings = "_leftImg8bit.png", "_gtFine_labelTrainIds.png"
    return _Pairs(root / "leftImg8bit" / split, root / "gtFine" / split, endings, _CITY)


class _DigitScenes(_Pairs):
    """Digits on textured backgrounds, 1000 scenes to train on, and 200 of held-out digits."""

    same_size = True

    def __init__(self, data: DataConfig, name: str, split: str, seed: int | None) -> None:
        from vitarium.data.digits import CLASSES, SPLITS
        from vitarium.data.folders import SceneSet, ensure

        if split not in SPLITS:
            key = "val" if seed is None else "train"
            raise ValueError(f"data.{key}: expected {' or '.join(SPLITS)}, got {split!r}")
        root = ensure("segmentation", scenes=SceneSet(size=data.image_size))
        folders = root / "images" / split, root / "annotations" / split
        super().__init__(*folders, (".png", ".png"), ("background", *CLASSES))


def open_table(data: DataConfig, name: str, split: str) -> Any:
    """A data set of the hub's, a builder with ``root`` as its folder, or one saved in ``root``.

    Raises:
        ValueError: it cannot be opened, or datasets is not installed.
    """
    datasets = _datasets()
    try:
        if name == "disk":
            found = datasets.load_from_disk(str(_root(data)))
            found = found[split] if isinstance(found, datasets.DatasetDict) else found
            if data.stream:
                found = found.to_iterable_dataset(max(1, min(_SHARDS, len(found))))
            return found
        folder = {} if data.root is None else {"data_dir": str(_root(data))}
        return datasets.load_dataset(name, split=split, streaming=data.stream, **folder)
    except Exception as error:  # of any of the libraries beneath
        raise ValueError(f"data.source: {data.source}: {_first_line(error)}") from error


def _hugging_face(data: DataConfig, name: str, split: str, seed: int | None) -> Source | Stream:
    table = _Table(open_table(data, name, split), data)
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
_MAPS: Mapping[str, Callable[..., Source | Stream]] = {
    "folder": _map_folder,
    "digit_scenes": _DigitScenes,
    "ade20k": _ade20k,
    "cityscapes": _cityscapes,
}
