"""Procedural backgrounds: noise, gradients, stripes, checks, rings, dots and cells, in colour.

Everything is drawn from the generator that is passed in. A pattern is a map of values 0 ... 1 of
shape [H, W]; lengths are in pixels, whatever the size of the image.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TypeAlias

import numpy as np
from PIL import Image, ImageDraw

Size: TypeAlias = tuple[int, int]  # height, width
_LUMA = np.array([0.299, 0.587, 0.114], np.float32)  # of ITU-R BT.601, as in Pillow's mode "L"
_FINER = 3  # lines are drawn so many times larger each way, which smooths their edges


def background(rng: np.random.Generator, size: Size) -> np.ndarray:
    """A textured image with thin curves on it.

    The pattern's luma spans at most 0.4 and is below 0.65, so that something can be lighter than
    all of it.

    Args:
        rng: what everything is drawn from.
        size: height and width in pixels.

    Returns:
        float32 [H, W, 3], values 0 ... 1.
    """
    first, second = rng.integers(len(_PATTERNS), size=2)
    pattern = _PATTERNS[first](rng, size)
    if rng.random() < 0.6:
        share = rng.uniform(0.2, 0.5)
        pattern = _stretched((1 - share) * pattern + share * _PATTERNS[second](rng, size))
    half = rng.uniform(0.06, 0.2)
    middle = rng.uniform(0.05 + half, 0.65 - half)
    shades = middle + half * np.array([-1, rng.uniform(-0.5, 0.5), 1])
    palette = np.stack([colour(rng, shade) for shade in rng.permutation(shades)])
    knots = [0, rng.uniform(0.3, 0.7), 1]
    channels = [np.interp(pattern, knots, channel) for channel in palette.T]
    image = np.stack(channels, -1).astype(np.float32)
    for _ in range(rng.integers(0, 6)):
        paint(image, colour(rng, middle + half * rng.uniform(-1.3, 1.3)), _curve(rng, size))
    return image


def colour(rng: np.random.Generator, shade: float) -> np.ndarray:
    """A random hue and saturation whose luma is ``shade``: float32 [3], values 0 ... 1."""
    shade = min(max(shade, 0.0), 1.0)
    chroma = rng.random(3, np.float32) - 0.5
    chroma -= luma(chroma)  # what is left has none
    room = np.where(chroma > 0, 1 - shade, shade) / np.maximum(np.abs(chroma), 1e-6)
    saturated: np.ndarray = shade + min(1.5 * rng.random(), float(room.min())) * chroma
    return saturated.astype(np.float32)


def luma(image: np.ndarray) -> np.ndarray:
    """Of colours [..., 3]: [...]."""
    return np.asarray((image * _LUMA).sum(-1))


def paint(image: np.ndarray, ink: np.ndarray, opacity: np.ndarray) -> None:
    """Lay a colour, [3], over an image, [H, W, 3], as far as it is opaque, [H, W]."""
    image += opacity[..., None] * (ink - image)


def _clouds(rng: np.random.Generator, size: Size) -> np.ndarray:
    total = np.zeros(size, np.float32)
    persistence = rng.uniform(0.4, 0.9)
    for octave in range(rng.integers(3, 7)):
        total += persistence**octave * _smooth(rng, size, 64 / 2**octave)
    return _stretched(total)


def _gradient(rng: np.random.Generator, size: Size) -> np.ndarray:
    return _stretched(_radius(rng, size) if rng.random() < 0.5 else _axes(rng, size)[0])


def _stripes(rng: np.random.Generator, size: Size) -> np.ndarray:
    bend = rng.uniform(0, 30) * _smooth(rng, size, 48)
    return _wave(rng, _frequency(rng) * (_axes(rng, size)[0] + bend))


def _checks(rng: np.random.Generator, size: Size) -> np.ndarray:
    frequency = _frequency(rng)
    a, b = (_wave(rng, frequency * axis) for axis in _axes(rng, size))
    return np.maximum(a, b) if rng.random() < 0.4 else a * b + (1 - a) * (1 - b)


def _rings(rng: np.random.Generator, size: Size) -> np.ndarray:
    bend = rng.uniform(0, 20) * _smooth(rng, size, 32)
    return _wave(rng, _frequency(rng) * (_radius(rng, size) + bend))


def _dots(rng: np.random.Generator, size: Size) -> np.ndarray:
    frequency = _frequency(rng)
    a, b = (np.cos(frequency * axis) for axis in _axes(rng, size))
    return _stretched(np.tanh(3 * (a + b - rng.uniform(-0.5, 1))))


def _cells(rng: np.random.Generator, size: Size) -> np.ndarray:
    """Voronoi's."""
    y, x = _grid(size)
    nearest = np.full(size, np.inf, np.float32)
    values = np.zeros(size, np.float32)
    for _ in range(rng.integers(8, 40)):
        distance = (y - rng.uniform(0, size[0])) ** 2 + (x - rng.uniform(0, size[1])) ** 2
        values[distance < nearest] = rng.random()
        np.minimum(nearest, distance, out=nearest)
    return _stretched(values)


_PATTERNS: tuple[Callable[[np.random.Generator, Size], np.ndarray], ...] = (
    *(_clouds, _gradient, _stripes, _checks, _rings, _dots, _cells),
)


def _curve(rng: np.random.Generator, size: Size) -> np.ndarray:
    """Opacity of a curve, thinner than any digit's strokes, of one bend (a Bezier of degree 2)."""
    H, W = size
    ends = rng.uniform(-0.1, 1.1, (3, 2)) * (W, H)
    t = np.linspace(0, 1, 24)[:, None]
    points = (1 - t) ** 2 * ends[0] + 2 * t * (1 - t) * ends[1] + t**2 * ends[2]
    canvas = Image.new("L", (W * _FINER, H * _FINER))
    width = int(rng.integers(2, 8))
    path = [(float(x), float(y)) for x, y in points * _FINER]
    ImageDraw.Draw(canvas).line(path, fill=255, width=width, joint="curve")
    return np.asarray(canvas.reduce(_FINER), np.float32) / 255


def _smooth(rng: np.random.Generator, size: Size, cell: float) -> np.ndarray:
    """Random values at knots that are ``cell`` pixels apart, bicubic in between."""
    H, W = size
    knots = rng.random((math.ceil(H / cell), math.ceil(W / cell)), np.float32)
    box = (0, 0, W / cell, H / cell)
    return np.asarray(Image.fromarray(knots).resize((W, H), Image.Resampling.BICUBIC, box))


def _wave(rng: np.random.Generator, phase: np.ndarray) -> np.ndarray:
    """A periodic profile: a sine, or closer to a square wave."""
    sharpness = rng.uniform(0.5, 6)
    wave: np.ndarray = 0.5 + np.tanh(sharpness * np.sin(phase)) / (2 * math.tanh(sharpness))
    return wave


def _frequency(rng: np.random.Generator) -> float:
    return 2 * math.pi / rng.uniform(8, 40)


def _grid(size: Size) -> tuple[np.ndarray, np.ndarray]:
    y, x = np.indices(size, np.float32)
    return y, x


def _axes(rng: np.random.Generator, size: Size) -> tuple[np.ndarray, np.ndarray]:
    """Coordinates along two perpendicular directions."""
    y, x = _grid(size)
    angle = rng.uniform(0, math.pi)
    return (
        math.cos(angle) * x + math.sin(angle) * y,
        math.cos(angle) * y - math.sin(angle) * x,
    )


def _radius(rng: np.random.Generator, size: Size) -> np.ndarray:
    """Distances from a point in or near the image."""
    y, x = _grid(size)
    return np.hypot(y - rng.uniform(-0.3, 1.3) * size[0], x - rng.uniform(-0.3, 1.3) * size[1])


def _stretched(values: np.ndarray) -> np.ndarray:
    """To 0 ... 1."""
    low, high = values.min(), values.max()
    return np.asarray((values - low) / max(high - low, 1e-6))
