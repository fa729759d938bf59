"""Lists of images in a fixed order: folders, tar files, splits of data sets."""

from __future__ import annotations

import hashlib
import os
import tarfile
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from glob import glob
from pathlib import Path
from typing import Any, NamedTuple, overload

import numpy as np
from PIL import Image
from torchvision.datasets.folder import IMG_EXTENSIONS

from vitarium.training.config import DataConfig
from vitarium.training.sources import Source, UnreadableError, decode, open_split, open_table

_KINDS = "a folder, a pattern of tar files, digits, torchvision/NAME or hf/NAME"


class Images(ABC):
    """Images that can be read in any order.

    Attributes:
        names: of all of them, in their order.
        digest: sha256 that tells this list from another one.
    """

    names: Sequence[str]
    digest: str

    def __len__(self) -> int:
        return len(self.names)

    @abstractmethod
    def load(self, index: int) -> Image.Image:
        """An image as RGB.

        Raises:
            UnreadableError: it cannot be read.
        """


def open_images(data: str, root: str | None = None, split: str | None = None) -> Images:
    """The images that a user means.

    Args:
        data: a folder, with all that is below it; a pattern of tar files, such as WebDataset's
            shards; ``digits``; ``torchvision/NAME`` or ``hf/NAME``.
        root: folder of a data set that has a name.
        split: of the same.

    Raises:
        ValueError: there is no such source, it lacks something, or it has no images.
    """
    path = Path(data).expanduser()
    kind, _, name = data.partition("/")
    named = not path.is_dir() and (data == "digits" or (kind in ("torchvision", "hf") and name))
    if not named:
        for option, given in (("--root", root), ("--split", split)):
            if given is not None:
                raise ValueError(f"{option}: {data} has none, got {given!r}")
    elif split is None:
        raise ValueError(f"--split: expected one of {data}, got none")
    elif (kind == "torchvision" and root is None) or (data == "digits" and root is not None):
        expected = "none" if data == "digits" else "the folder"
        raise ValueError(f"--root: expected {expected} of {data}, got {root or 'none'}")
    elif root is not None and not Path(root).expanduser().is_dir():
        raise ValueError(f"--root: expected a folder, got {root!r}")

    images: Images
    if path.is_dir():
        images = _Folder(path)
    elif data.endswith(".tar"):
        images = _Tars(sorted(glob(str(path))), data)
    elif not named:
        raise ValueError(f"--data: expected {_KINDS}, got {data!r}")
    else:
        assert split is not None
        config = DataConfig(source=data, root=root, image_size=(1, 1))
        images = _Table(config, name, split) if kind == "hf" else _Split(config, split)
    if not len(images):
        raise ValueError(f"--data: expected images in {data}, found none")
    return images


class _Names(Sequence[str]):
    """Names in one block of memory, which processes that are forked go on sharing."""

    def __init__(self, names: Iterable[str]) -> None:
        encoded = [os.fsencode(name) for name in names]
        self._ends = np.cumsum([0, *map(len, encoded)])
        self._content = b"".join(encoded)

    def __len__(self) -> int:
        return len(self._ends) - 1

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> list[str]: ...
    def __getitem__(self, index: int | slice) -> str | list[str]:
        places = range(len(self))[index]
        if isinstance(places, range):
            return [self[i] for i in places]
        return os.fsdecode(self._content[self._ends[places] : self._ends[places + 1]])


def _digest(entries: Iterable[object]) -> str:
    hasher = hashlib.sha256()
    for entry in entries:
        hasher.update(f"{entry}\0".encode("utf-8", "surrogateescape"))
    return hasher.hexdigest()


class _Folder(Images):
    """All image files below a folder, by their paths in it; links are followed."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        found = sorted(_files(folder, "", set()))
        self.names = _Names(name for name, _ in found)
        self.digest = _digest(x for entry in found for x in entry)

    def load(self, index: int) -> Image.Image:
        return decode(self._folder / self.names[index])


def _files(folder: Path, prefix: str, above: set[tuple[int, int]]) -> Iterator[tuple[str, int]]:
    """Paths and sizes of image files; a link back to a folder ``above`` it ends there."""
    state = folder.stat()
    here = {*above, (state.st_dev, state.st_ino)}
    if len(here) == len(above):
        return
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.is_dir():
                yield from _files(Path(entry.path), f"{prefix}{entry.name}/", here)
            elif entry.name.lower().endswith(IMG_EXTENSIONS):
                # A link to nothing counts: that it cannot be read is then said.
                yield prefix + entry.name, entry.stat().st_size if entry.is_file() else 0


class _Member(NamedTuple):
    file: int
    name: str
    offset: int
    size: int


class _Tars(Images):
    """Image files in tar files, which stay as they are; what else is in them is passed over."""

    def __init__(self, files: list[str], pattern: str) -> None:
        self._files = files
        members = [member for i, file in enumerate(files) for member in _members(i, file)]
        common = os.path.commonpath([os.path.dirname(file) for file in files]) if files else ""
        shown = [os.path.relpath(file, common or ".") for file in files]
        self._file, self._offset, self._size = (
            np.array([getattr(member, key) for member in members], dtype=np.int64)
            for key in ("file", "offset", "size")
        )
        self.names = _Names(f"{shown[member.file]}/{member.name}" for member in members)
        self.digest = _digest(x for m in members for x in (shown[m.file], *m[1:]))

    def load(self, index: int) -> Image.Image:
        try:
            with open(self._files[self._file[index]], "rb") as file:
                file.seek(self._offset[index])
                content = file.read(int(self._size[index]))
        except OSError as error:
            raise UnreadableError(error.strerror or str(error)) from error
        return decode(content)


def _members(number: int, file: str) -> Iterator[_Member]:
    try:
        with tarfile.open(file, "r:") as tar:
            for member in tar:
                if member.isfile() and member.name.lower().endswith(IMG_EXTENSIONS):
                    yield _Member(number, member.name, member.offset_data, member.size)
    except tarfile.TarError as error:
        raise ValueError(f"--data: {file} is damaged, or no uncompressed tar: {error}") from error


class _Split(Images):
    """A split of what `vitarium train` reads, without its targets."""

    def __init__(self, data: DataConfig, split: str) -> None:
        source = open_split(data, split)
        assert isinstance(source, Source)
        self._source = source
        self.names = source.names
        self.digest = _digest((data.source, *self.names))

    def load(self, index: int) -> Image.Image:
        image, _ = self._source.load(index)
        return image


class _Table(Images):
    """A split of a data set of Hugging Face's, which needs no targets."""

    def __init__(self, data: DataConfig, name: str, split: str) -> None:
        found = open_table(data, name, split)
        from datasets import Image as ImageColumn

        columns = [key for key, kind in found.features.items() if isinstance(kind, ImageColumn)]
        if len(columns) != 1:
            raise ValueError(
                f"--data: expected one column of images in {data.source}, found {len(columns)}"
            )
        self._column = columns[0]
        self._rows: Any = found.cast_column(self._column, ImageColumn(decode=False))
        self.names = _Names(f"{data.source} {split} {i}" for i in range(len(found)))
        self.digest = _digest((data.source, split, len(found), found._fingerprint))

    def load(self, index: int) -> Image.Image:
        image = self._rows[index][self._column]
        if image is None:
            raise UnreadableError("the row has no image")
        return decode(image["bytes"] or Path(image["path"]))
