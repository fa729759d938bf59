"""`vitarium features`: a model's feature pyramid of an image, as a picture.

Each stage's map is shown by its first three principal components, as red, green and blue: places
with similar features have similar colours. Colours of different stages do not correspond.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from vitarium.heads.features import FeatureBackbone
from vitarium.tools._common import (
    chosen_weights,
    model_input,
    pick_device,
    read_image,
    resized,
    save,
    scaled,
    sheet,
)

_PANEL = 480  # longer side of one picture, in pixels
_COLUMNS = 3
_SMALL_PANEL = 320  # the same where several models are compared


def run(args: Namespace) -> int:
    """Picture one image's pyramid and print its shapes and the file.

    Raises:
        ValueError: an image that cannot be read, unknown model, no weights, a checkpoint that
            does not fit, a size that the model does not take, no such device.
        OSError: the output cannot be written.
    """
    photo = read_image(args.image)
    device = pick_device(args.device)
    cfg, weights, kwargs = chosen_weights(args)
    image = scaled(photo, args.size)
    if cfg.fixed_input_size:  # then the model is built for one size: that nearest to the image's
        step = max(FeatureBackbone(args.model).strides)
        height, width = (max(1, round(n / step)) * step for n in (image.height, image.width))
        image = resized(image, height, width)
        kwargs["img_size"] = (height, width)
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    backbone = FeatureBackbone(args.model, **kwargs).to(device).eval()
    maps = pyramid(image, backbone)
    file = out / f"{Path(args.image).stem}.{args.model}.features.png"
    save(picture(image, maps, backbone.strides, f"{args.model}, {weights}"), file)
    change = "" if image is photo else f", resized to {image.height} x {image.width}"
    print(f"{args.image}: {photo.height} x {photo.width} pixels (H x W){change}")
    print(f"{args.model}: {weights}")
    for index, (features, stride) in enumerate(zip(maps, backbone.strides, strict=True)):
        print(f"  map {index}: {_described(features, stride)}")
    print(f"wrote {file}")
    return 0


def pyramid_picture(image: Image.Image, backbone: FeatureBackbone, title: str) -> Image.Image:
    """The image beside its feature maps, each in the colours of its principal components.

    Args:
        image: RGB, any size that the backbone takes.
        backbone: in eval mode.
        title: a line above the pictures; say there which weights made them.

    Returns:
        An RGB picture.

    Raises:
        ValueError: the backbone is in training mode.
    """
    return picture(image, pyramid(image, backbone), backbone.strides, title)


def pyramid(image: Image.Image, backbone: FeatureBackbone) -> list[Tensor]:
    """Feature maps ``[C, h, w]`` of an RGB image, normalized as the model's weights want it.

    Raises:
        ValueError: the backbone is in training mode, or nothing in it has a ``pretrained_cfg``
            that tells mean and standard deviation.
    """
    pixels = model_input(image, backbone)
    with torch.inference_mode():
        return [features[0].float().cpu() for features in backbone(pixels)]


def picture(
    image: Image.Image, maps: Sequence[Tensor], strides: Sequence[int], title: str
) -> Image.Image:
    """The image beside its maps ``[C, h, w]``, with a title and a caption under each."""
    panels = _panels(image, f"photo, {image.height} x {image.width}", maps, strides, _PANEL)
    rows = [panels[i : i + _COLUMNS] for i in range(0, len(panels), _COLUMNS)]
    return sheet(_heading(title), rows)


def comparison_picture(
    image: Image.Image, backbones: Mapping[str, FeatureBackbone], title: str
) -> Image.Image:
    """The image beside the feature maps of several backbones, a row for each.

    Args:
        image: RGB, any size that the backbones take.
        backbones: name -> a backbone in eval mode.
        title: a line above the rows; say there which weights made them.

    Returns:
        An RGB picture.

    Raises:
        ValueError: no backbone, or one that is in training mode.
    """
    if not backbones:
        raise ValueError("backbones: expected at least one, got none")
    rows = [
        _panels(image, name, pyramid(image, backbone), backbone.strides, _SMALL_PANEL)
        for name, backbone in backbones.items()
    ]
    return sheet(_heading(title), rows)


def _heading(title: str) -> str:
    return f"{title}: the first three principal components of each map"


def _panels(
    image: Image.Image, caption: str, maps: Sequence[Tensor], strides: Sequence[int], longest: int
) -> list[tuple[Image.Image, str]]:
    """The image and its maps, as large as each other, and what stands under each."""
    scale = longest / max(image.size)
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    panels = [(resized(image, size[1], size[0]), caption)]
    for features, stride in zip(maps, strides, strict=True):
        colours = Image.fromarray(_colours(features))
        enlarged = colours.resize(size, Image.Resampling.NEAREST)
        panels.append((enlarged, _described(features, stride)))
    return panels


def _described(features: Tensor, stride: int) -> str:
    channels, height, width = features.shape
    return f"{channels} channels, {height} x {width}, stride {stride}"


def _colours(features: Tensor) -> np.ndarray:
    """``[C, h, w]`` to ``[h, w, 3]`` bytes: the first three principal components.

    Each component runs from black at its 1st percentile to full at its 99th; where there are
    fewer than three, or one is constant, it is mid-grey.
    """
    height, width = features.shape[1:]
    points = features.double().flatten(1).T
    points = points - points.mean(0)
    left, values, right = torch.linalg.svd(points, full_matrices=False)
    count = min(3, len(values))
    # A component's sign is arbitrary: its largest weight is made positive.
    peaks = right[:count].gather(1, right[:count].abs().argmax(1, keepdim=True))
    components = left[:, :count] * values[:count] * peaks.sign().T
    low, high = (components.quantile(q, dim=0) for q in (0.01, 0.99))
    spread = high - low
    shown = torch.full((height * width, 3), 0.5, dtype=torch.float64)
    some = spread > 1e-9 * values[0]
    shown[:, :count][:, some] = ((components - low) / spread)[:, some].clamp(0, 1)
    return (shown * 255).round().to(torch.uint8).reshape(height, width, 3).numpy()
