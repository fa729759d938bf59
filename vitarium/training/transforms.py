"""From an image of any kind to a tensor of the model's size: training's way and validation's."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from timm.data import create_transform
from torch import Tensor
from torchvision.transforms import v2
from torchvision.transforms.functional import InterpolationMode, normalize, pil_to_tensor, to_tensor

from vitarium.training.config import AugmentConfig, SegmentationAugmentConfig
from vitarium.training.sources import Pair

_KNOTS = 4  # of the grid that bends a picture, each way
_CROPS = 10  # tried until no class fills too much of one


@dataclass(frozen=True)
class Preprocessing:
    """What a model expects of its images, as timm's data config says it."""

    mean: tuple[float, ...]
    std: tuple[float, ...]
    crop_pct: float


def validation_interpolation(augment: AugmentConfig) -> str:
    """How validation changes an image's size."""
    return "bicubic" if augment.interpolation == "random" else augment.interpolation


class ClassTransform:
    """An image to a tensor [3, H, W]; its class's number to a tensor [].

    Args:
        augment: what is varied, and how size is changed.
        size: (height, width) of the result.
        expected: mean and standard deviation of the result, and validation's crop.
        training: whether anything is varied; else the middle of the image is taken.
    """

    def __init__(
        self,
        augment: AugmentConfig,
        size: tuple[int, int],
        expected: Preprocessing,
        training: bool,
    ) -> None:
        common: dict[str, Any] = {
            "input_size": (3, *size),
            "mean": expected.mean,
            "std": expected.std,
            "use_prefetcher": False,
        }
        if not training:
            self._steps = create_transform(
                **common,
                interpolation=validation_interpolation(augment),
                crop_pct=expected.crop_pct,
                crop_mode="center",
            )
            return
        try:
            first, second, last = create_transform(
                **common,
                is_training=True,
                separate=True,
                interpolation=augment.interpolation,
                scale=augment.scale,
                ratio=augment.ratio,
                hflip=augment.hflip,
                color_jitter=augment.color_jitter,
                auto_augment=augment.auto_augment,
                re_prob=augment.random_erasing,
                re_mode="pixel",
            )
        except (AssertionError, ValueError) as error:  # of what only timm can parse
            raise ValueError(
                f"augment.auto_augment: timm does not know {augment.auto_augment!r}: {error}"
            ) from error
        if augment.crop == "resize":
            mode = InterpolationMode(augment.interpolation)
            first.transforms[0] = v2.Resize(size, mode)
        if any((augment.rotation, augment.translate, augment.zoom, augment.shear, augment.bend)):
            last.transforms.insert(1, _Moved(augment))  # behind the conversion to [0, 1]
        self._steps = v2.Compose([*first.transforms, *second.transforms, *last.transforms])

    def __call__(self, pair: Pair) -> tuple[Tensor, Tensor]:
        image, number = pair
        return self._steps(image), torch.tensor(number)


class _Moved:
    """A tensor [3, H, W] turned, sheared, stretched, shifted and bent; black comes in."""

    def __init__(self, augment: AugmentConfig) -> None:
        self._augment = augment

    def __call__(self, image: Tensor) -> Tensor:
        most = self._augment
        turn, lean, wide, high, right, down = (2 * torch.rand(6) - 1).tolist()
        angle, shear = math.radians(most.rotation * turn), math.tan(math.radians(most.shear * lean))
        cos, sin, ratio = math.cos(angle), math.sin(angle), image.shape[-2] / image.shape[-1]
        width, height = 1 + most.zoom * wide, 1 + most.zoom * high
        shift = 2 * most.translate  # the grid is 2 wide and 2 high
        rows = (
            (cos * width, cos * shear - sin * ratio * height, shift * right),
            (sin / ratio * width, sin / ratio * shear + cos * height, shift * down),
        )
        theta = torch.tensor([rows], dtype=image.dtype)
        grid = F.affine_grid(theta, [1, *image.shape], align_corners=False)
        if most.bend:
            knots = most.bend * (2 * torch.rand(1, 2, _KNOTS, _KNOTS) - 1)
            bend = F.interpolate(knots, image.shape[-2:], mode="bicubic", align_corners=True)
            grid = grid + bend.permute(0, 2, 3, 1)
        return F.grid_sample(image[None], grid, align_corners=False)[0]


class MapTransform:
    """An image to a tensor [3, H, W], its map of classes to one [H, W]; both move together.

    In training, a random scale, crop and flip give both the same size; what a crop has beyond the
    image is 0, the mean, and is ignored in the map. In validation the image is scaled, the map is
    not.

    Args:
        augment: what is varied, and the scale to begin with.
        size: (height, width) of a crop.
        expected: mean and standard deviation of the result.
        training: whether anything is varied.
        ignore_index: value of pixels beyond the image.
    """

    def __init__(
        self,
        augment: SegmentationAugmentConfig,
        size: tuple[int, int],
        expected: Preprocessing,
        training: bool,
        ignore_index: int,
    ) -> None:
        self._augment = augment
        self._size = size
        self._expected = expected
        self._training = training
        self._ignored = ignore_index
        self._photometric = v2.RandomPhotometricDistort() if augment.photometric else None

    def __call__(self, pair: Pair) -> tuple[Tensor, Tensor]:
        image, target = pair
        assert isinstance(target, Image.Image)
        width, height = self._scaled(image)
        image = image.resize((width, height), Image.Resampling.BILINEAR)
        if not self._training:
            return self._normalized(image), pil_to_tensor(target)[0].long()
        target = target.resize((width, height), Image.Resampling.NEAREST)
        labels = pil_to_tensor(target)[0].long()
        top, left = self._place(labels)
        rows, columns = slice(top, top + self._size[0]), slice(left, left + self._size[1])
        labels = labels[rows, columns]
        image = image.crop((left, top, left + labels.shape[1], top + labels.shape[0]))
        if self._photometric is not None:
            image = self._photometric(image)
        pixels = self._normalized(image)
        if torch.rand(()) < self._augment.hflip:
            pixels, labels = pixels.flip(-1), labels.flip(-1)
        missing = (0, self._size[1] - labels.shape[1], 0, self._size[0] - labels.shape[0])
        return F.pad(pixels, missing), F.pad(labels, missing, value=self._ignored)

    def _normalized(self, image: Image.Image) -> Tensor:
        return normalize(to_tensor(image), self._expected.mean, self._expected.std)

    def _scaled(self, image: Image.Image) -> tuple[int, int]:
        """(width, height) before anything is cropped."""
        factor = 1.0
        if self._augment.resize is not None:
            short, long = self._augment.resize
            factor = min(short / min(image.size), long / max(image.size))
        if self._training:
            least, most = self._augment.scale
            factor *= least + (most - least) * float(torch.rand(()))
        width, height = (max(1, round(side * factor)) for side in image.size)
        return width, height

    def _place(self, labels: Tensor) -> tuple[int, int]:
        """(top, left) of a crop in which no class fills too much, if one is found."""
        for _ in range(_CROPS):
            free = [max(0, n - size) for n, size in zip(labels.shape, self._size, strict=True)]
            top, left = (int(torch.randint(n + 1, ())) for n in free)
            crop = labels[top : top + self._size[0], left : left + self._size[1]]
            counted = crop[crop != self._ignored]
            if self._augment.category_max >= 1 or not len(counted):
                break
            counts = counted.bincount()
            if (counts > 0).sum() > 1 and counts.max() < self._augment.category_max * len(counted):
                break
        return top, left
