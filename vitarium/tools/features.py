"""`vitarium features`: a model's feature pyramid of an image, as a picture.

Each stage's map is shown by its first three principal components, as red, green and blue: places
with similar features have similar colours. Colours of different stages do not correspond.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from timm.data import resolve_data_config
from torch import Tensor
from torchvision.transforms.functional import normalize, to_tensor

from vitarium.heads.features import FeatureBackbone
from vitarium.tools._common import check_model, pick_device, read_image

_PANEL = 480  # longer side of one picture, in pixels
_CAPTION = 280  # room for a caption under it
_COLUMNS = 3
_GAP = 12
_FONT = 16


def run(args: Namespace) -> int:
    """Picture one image's pyramid and print its shapes and the file.

    Raises:
        ValueError: an image that cannot be read, unknown model, no weights, a checkpoint that
            does not fit, a size that the model does not take, no such device.
        OSError: the output cannot be written.
    """
    photo = read_image(args.image)
    device = pick_device(args.device)
    cfg = check_model(args.model, pretrained=not args.random and args.checkpoint is None)
    kwargs: dict[str, Any] = {}
    if args.random:
        weights = "random weights"
        torch.manual_seed(0)
    elif args.checkpoint is not None:
        weights = f"weights of {args.checkpoint}"
        kwargs["checkpoint"] = args.checkpoint
    else:
        weights = f"pretrained weights ({cfg.tag})"
        kwargs["pretrained"] = True
    image = photo
    if args.size is not None:
        scale = args.size / min(photo.size)
        image = _resized(photo, round(photo.height * scale), round(photo.width * scale))
    if cfg.fixed_input_size:  # then the model is built for one size: that nearest to the image's
        step = max(FeatureBackbone(args.model).strides)
        height, width = (max(1, round(n / step)) * step for n in (image.height, image.width))
        image = _resized(image, height, width)
        kwargs["img_size"] = (height, width)
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    backbone = FeatureBackbone(args.model, **kwargs).to(device).eval()
    maps = pyramid(image, backbone)
    file = out / f"{Path(args.image).stem}.{args.model}.features.png"
    picture(image, maps, backbone.strides, f"{args.model}, {weights}").save(file)
    resized = "" if image is photo else f", resized to {image.height} x {image.width}"
    print(f"{args.image}: {photo.height} x {photo.width} pixels (H x W){resized}")
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
    if backbone.training:
        raise ValueError("backbone: expected eval mode, got training mode")
    cfgs = [m.pretrained_cfg for m in backbone.modules() if hasattr(m, "pretrained_cfg")]
    if not cfgs:
        raise ValueError("backbone: expected a module with a pretrained_cfg, found none")
    config = resolve_data_config(pretrained_cfg=cfgs[0])
    pixels = normalize(to_tensor(image), config["mean"], config["std"])
    device = next(backbone.parameters()).device
    with torch.inference_mode():
        return [features[0].float().cpu() for features in backbone(pixels[None].to(device))]


def picture(
    image: Image.Image, maps: Sequence[Tensor], strides: Sequence[int], title: str
) -> Image.Image:
    """The image beside its maps ``[C, h, w]``, with a title and a caption under each."""
    scale = _PANEL / max(image.size)
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    panels = [_resized(image, size[1], size[0])]
    captions = [f"photo, {image.height} x {image.width}"]
    for features, stride in zip(maps, strides, strict=True):
        colours = Image.fromarray(_colours(features))
        panels.append(colours.resize(size, Image.Resampling.NEAREST))
        captions.append(_described(features, stride))

    font = ImageFont.load_default(_FONT)
    line = _FONT + _GAP
    columns = min(_COLUMNS, len(panels))
    rows = -(-len(panels) // columns)
    step_x, step_y = max(size[0], _CAPTION) + _GAP, size[1] + line
    sheet = Image.new("RGB", (_GAP + columns * step_x, line + _GAP + rows * step_y), "white")
    draw = ImageDraw.Draw(sheet)
    heading = f"{title}: the first three principal components of each map"
    draw.text((_GAP, _GAP), heading, fill="black", font=font)
    for index, (panel, caption) in enumerate(zip(panels, captions, strict=True)):
        x = _GAP + index % columns * step_x
        y = _GAP + line + index // columns * step_y
        sheet.paste(panel, (x, y))
        draw.text((x, y + size[1] + _GAP // 4), caption, fill="black", font=font)
    return sheet


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


def _resized(image: Image.Image, height: int, width: int) -> Image.Image:
    return image.resize((width, height), Image.Resampling.BICUBIC)
