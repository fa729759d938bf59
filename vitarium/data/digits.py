"""scikit-learn's handwritten digits: 1797 pictures of 8 x 8 pixels with values 0 ... 16.

The last 360 are held out, always: "val" is made of them, and nothing of them enters "train".
As pictures they are 8-bit RGB, light strokes on black.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

SPLITS = ("train", "val")
CLASSES = tuple("0123456789")
HELD_OUT = 360


class Digits(NamedTuple):
    """Handwritten digits: pictures (8 x 8, RGB), labels and the 64 raw pixels of each."""

    pictures: list[Image.Image]
    labels: Tensor
    pixels: np.ndarray


def split() -> tuple[Digits, Digits]:
    """The digits for training, the first 1437, and the last 360, which are held out.

    Raises:
        ValueError: scikit-learn is missing.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ValueError('scikit-learn is not installed: pip install "vitarium[demo]"') from error
    data = load_digits()
    shades = (data.images * 255 / 16).round().astype(np.uint8)
    pictures = [Image.fromarray(picture).convert("RGB") for picture in shades]
    labels = torch.from_numpy(data.target)
    training, held_out = (
        Digits(pictures[part], labels[part], data.data[part])
        for part in (slice(-HELD_OUT), slice(-HELD_OUT, None))
    )
    return training, held_out


def digits_of(name: str) -> tuple[Digits, range]:
    """The digits of "train" or "val", and which samples of ``load_digits`` they are.

    Raises:
        ValueError: another name, or scikit-learn is missing.
    """
    if name not in SPLITS:
        raise ValueError(f"split: expected {' or '.join(SPLITS)}, got {name!r}")
    training, held_out = split()
    count = len(training.labels)
    if name == "train":
        return training, range(count)
    return held_out, range(count, count + len(held_out.labels))


class DigitImages(Dataset[tuple[Any, int]]):
    """The digits as a map-style data set for a classifier, as torchvision's are.

    An item is a picture, ``size`` x ``size`` pixels, RGB (``PIL.Image``, or what ``transform``
    makes of it), and its class. The enlargement is the bicubic one of an ordinary transform.

    Attributes:
        classes: the names "0" ... "9".
        targets: the class of every item.
        samples: which sample of ``load_digits`` every item is.
        transform: may be replaced, as timm's loaders do.
    """

    def __init__(
        self,
        split: str = "train",
        size: int = 64,
        transform: Callable[[Image.Image], Any] | None = None,
    ) -> None:
        """Enlarge all pictures.

        Args:
            split: "train", the first 1437, or "val", the last 360.
            size: side of a picture in pixels.
            transform: of a picture; None for none.

        Raises:
            ValueError: another split, a size that is not positive, or scikit-learn is missing.
        """
        if size < 1:
            raise ValueError(f"size: expected at least one pixel, got {size}")
        digits, self.samples = digits_of(split)
        self.classes = CLASSES
        self.targets: list[int] = digits.labels.tolist()
        self.transform = transform
        self._pictures = [
            picture.resize((size, size), Image.Resampling.BICUBIC) for picture in digits.pictures
        ]

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        picture = self._pictures[index]
        return (
            picture.copy() if self.transform is None else self.transform(picture),
            self.targets[index],
        )
