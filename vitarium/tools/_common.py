"""What `predict` and `features` share: images from files, model names, devices."""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
import timm
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from timm.models import PretrainedCfg, get_arch_pretrained_cfgs, get_pretrained_cfg

from vitarium.tools.list import did_you_mean

# What Pillow's decoders raise on broken files.
_DECODER_ERRORS = (
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
    except _DECODER_ERRORS as error:
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
