"""What several tools share: images, models and weights as a user names them, sheets of pictures."""

from __future__ import annotations

import re
import struct
from argparse import Namespace
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from PIL import Image, ImageDraw, ImageFont, ImageOps, UnidentifiedImageError
from timm.data import resolve_data_config
from timm.models import PretrainedCfg, get_arch_pretrained_cfgs, get_pretrained_cfg
from torch import Tensor, nn
from torchvision.transforms.functional import normalize, to_tensor

from vitarium.tools.list import did_you_mean

GAP = 12  # between the panels of a sheet, in pixels
FONT_SIZE = 16

# What Pillow's decoders raise on broken files.
DECODER_ERRORS = (
    *(OSError, SyntaxError, ValueError, EOFError, RuntimeError, struct.error),
    Image.DecompressionBombError,
)


def read_image(path: str) -> Image.Image:
    """Read an image file as 8-bit RGB, turned as its EXIF orientation says.

    16-bit grey is scaled to 8 bits, what is transparent is laid over white.

    Raises:
        ValueError: no such file, a directory, not an image, a truncated one, one without
            pixels, or pixels that are neither 8 nor 16 bits deep.
    """
    try:
        with Image.open(path) as image:
            return _rgb(ImageOps.exif_transpose(image))
    except UnidentifiedImageError:
        empty = Path(path).stat().st_size == 0
        reason = "the file is empty" if empty else "unknown format, damaged, or without pixels"
    except DECODER_ERRORS as error:
        reason = getattr(error, "strerror", None) or str(error)
    raise ValueError(f"{path}: cannot read this image: {reason}")


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):
        pixels = np.asarray(image)
        if pixels.min() < 0 or pixels.max() > 0xFFFF:
            raise ValueError("expected 8 or 16 bits per channel, got 32")
        image = Image.fromarray((pixels / 257).round().astype(np.uint8))
    elif image.mode == "F":
        raise ValueError("expected 8 or 16 bits per channel, got floating-point pixels")
    elif image.mode in ("LA", "PA", "RGBA") or "transparency" in image.info:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image)
    return image.convert("RGB")


def resized(image: Image.Image, height: int, width: int) -> Image.Image:
    """The image in another size, bicubically."""
    return image.resize((width, height), Image.Resampling.BICUBIC)


def scaled(image: Image.Image, size: int | None) -> Image.Image:
    """The image with its shorter side scaled to ``size`` pixels; as it is if None."""
    if size is None:
        return image
    scale = size / min(image.size)
    return resized(image, round(image.height * scale), round(image.width * scale))


def check_model(name: str, pretrained: bool) -> PretrainedCfg:
    """What timm knows about a vitarium or timm model and its weights, of its first tag by default.

    Raises:
        ValueError: no model, or no tag of that model, has this name; or, where ``pretrained``
            weights are wanted, timm has none. (Of ours the builder says so, and how to get them.)
    """
    if not timm.is_model(name):
        known = [*timm.list_models(), *timm.list_models(include_tags=True)]
        raise ValueError(f"unknown model {name!r}{did_you_mean(name, known)}")
    tagged = get_arch_pretrained_cfgs(name)
    if "." in name and name not in tagged:
        raise ValueError(f"unknown model {name!r}: expected {' or '.join(tagged)}")
    cfg = get_pretrained_cfg(name) or PretrainedCfg()
    ours = timm.model_entrypoint(name).__module__.startswith("vitarium.")
    if pretrained and not ours and not cfg.has_weights:
        raise ValueError(f"{name} has no pretrained weights; give others with --checkpoint")
    return cfg


def model_names(patterns: Sequence[str]) -> list[str]:
    """Names of vitarium's and timm's models, and what globs match, each once.

    Raises:
        ValueError: no model has this name, or none matches the glob.
    """
    names: list[str] = []
    for pattern in patterns:
        found = timm.list_models(pattern) if re.search(r"[*?[]", pattern) else [pattern]
        if not found:
            hint = did_you_mean(pattern, timm.list_models())
            raise ValueError(f"no model matches {pattern!r}{hint}")
        names += found
    for name in names:
        check_model(name, pretrained=False)
    return list(dict.fromkeys(names))


def chosen_weights(args: Namespace) -> tuple[PretrainedCfg, str, dict[str, Any]]:
    """The weights that ``--random``, ``--checkpoint`` or neither asks for.

    Random ones are the same every time: this seeds torch.

    Returns:
        What timm knows about the model, what to call its weights, FeatureBackbone's arguments.

    Raises:
        ValueError: unknown model, or no pretrained weights where they are asked for.
    """
    cfg = check_model(args.model, pretrained=not args.random and args.checkpoint is None)
    if args.random:
        torch.manual_seed(0)
        return cfg, "random weights", {}
    if args.checkpoint is not None:
        return cfg, f"weights of {args.checkpoint}", {"checkpoint": args.checkpoint}
    return cfg, f"pretrained weights ({cfg.tag})", {"pretrained": True}


def model_input(image: Image.Image, model: nn.Module) -> Tensor:
    """An RGB image as the model's weights want it: [1, 3, H, W], normalized, on its device.

    Raises:
        ValueError: the model is in training mode, or nothing in it has a ``pretrained_cfg``
            that tells mean and standard deviation.
    """
    if model.training:
        raise ValueError("model: expected eval mode, got training mode")
    cfgs = [m.pretrained_cfg for m in model.modules() if hasattr(m, "pretrained_cfg")]
    if not cfgs:
        raise ValueError("model: expected a module with a pretrained_cfg, found none")
    config = resolve_data_config(pretrained_cfg=cfgs[0])
    pixels: Tensor = normalize(to_tensor(image), config["mean"], config["std"])
    return pixels[None].to(next(model.parameters()))


def require_matplotlib() -> None:
    """Say how to get it where it is missing.

    Raises:
        ValueError: matplotlib is not installed.
    """
    if find_spec("matplotlib") is None:
        raise ValueError(missing("matplotlib"))


def missing(package: str) -> str:
    """What to say where a package of the demo is not installed."""
    return f'{package} is not installed: pip install "vitarium[demo]"'


def save(image: Image.Image, file: Path) -> None:
    """Write an image, under a temporary name first."""
    temporary = file.with_name(f"{file.stem}.part{file.suffix}")
    image.save(temporary)
    temporary.replace(file)


def pick_device(name: str | None) -> torch.device:
    """The device of this name; without one, CUDA's where there is one, else the CPU.

    Raises:
        ValueError: no such device here.
    """
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:  # AssertionError: torch without CUDA
        reason = str(error).splitlines()[0]
        raise ValueError(f"device: {name!r} cannot be used here: {reason}") from error


def sheet(title: str, rows: Sequence[Sequence[tuple[Image.Image, str]]]) -> Image.Image:
    """Rows of panels of one size, each with a caption of one or more lines under it."""
    font = ImageFont.load_default(FONT_SIZE)
    line = FONT_SIZE + GAP // 4
    width, height = rows[0][0][0].size
    captions = [caption.splitlines() for row in rows for _, caption in row]
    step_x = GAP + max(width, *(_length(text, font) for lines in captions for text in lines))
    step_y = height + GAP // 4 + line * max(map(len, captions)) + GAP
    top = FONT_SIZE + 2 * GAP
    across = max(step_x * max(map(len, rows)), _length(title, font) + GAP)
    drawn = Image.new("RGB", (GAP + across, top + step_y * len(rows)), "white")
    draw = ImageDraw.Draw(drawn)
    draw.text((GAP, GAP), title, fill="black", font=font)
    for i, row in enumerate(rows):
        for j, (panel, caption) in enumerate(row):
            x, y = GAP + j * step_x, top + i * step_y
            drawn.paste(panel, (x, y))
            for k, text in enumerate(caption.splitlines()):
                at = (x, y + height + GAP // 4 + k * line)
                draw.text(at, text, fill="black", font=font)
    return drawn


def _length(text: str, font: Any) -> int:
    return round(font.getlength(text))
