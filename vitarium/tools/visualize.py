"""`vitarium visualize`: which tokens a pixel's token attends to, drawn over the photograph.

One panel per stage and kind of block, plain or dilated: its last block of that kind. Where all
blocks have one resolution, the first and the last one of each kind.
"""

from __future__ import annotations

import math
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont, ImageOps
from torch import Tensor, nn

from vitarium.backbones._blocks import Backbone, NeighborhoodAttention
from vitarium.backbones._registry import entries
from vitarium.heads.features import FeatureBackbone
from vitarium.ops import neighborhood_scores
from vitarium.tools._common import (
    FONT_SIZE,
    chosen_weights,
    model_input,
    pick_device,
    read_image,
    require_matplotlib,
    resized,
    save,
    scaled,
    sheet,
)

_PANEL = 400  # longer side of one picture, in pixels
_INSET = 130  # and of an enlarged window
_SMALL = 5  # a window is small if its side goes more often into that of the photograph
_OVERSAMPLED = 3
_DIM = 0.65  # brightness of the photograph
_COVER = 0.85  # opacity of the cells
_BAR = 120  # length of the colour scale, in pixels
_LEGEND = 310  # room for it and its labels


@dataclass(frozen=True)
class Attention:
    """The attention of one token in one block.

    Attributes:
        name: the block's, in its model.
        kernel_size: neighbors per axis.
        dilation: steps between them, in tokens.
        stride: side of a token's cell, in pixels.
        map_size: (H, W) of the map, in tokens.
        query: upper left corner (x, y) of the token's own cell, in pixels.
        cells: [K*K, 2], corners (x, y) of the neighbors' cells; of those that pad a small map,
            beyond the photograph.
        weights: [heads, K*K], rows that sum to 1.
    """

    name: str
    kernel_size: int
    dilation: int
    stride: int
    map_size: tuple[int, int]
    query: tuple[int, int]
    cells: Tensor
    weights: Tensor

    @property
    def padding(self) -> int:
        """How many of the neighbors are padding."""
        height, width = self.map_size
        return int((self.cells >= self.stride * torch.tensor([width, height])).any(1).sum())

    @property
    def span(self) -> int:
        """Side of the square that the neighbors' cells span, in pixels."""
        return ((self.kernel_size - 1) * self.dilation + 1) * self.stride


def run(args: Namespace) -> int:
    """Draw one image's neighborhoods, print what they are, and the file.

    Raises:
        ValueError: an image that cannot be read, unknown model, one without neighborhood
            attention, no weights, a checkpoint that does not fit, a size that the model does not
            take, a pixel outside of the image, no such device, no matplotlib.
        OSError: the output cannot be written.
    """
    require_matplotlib()
    photo = read_image(args.image)
    device = pick_device(args.device)
    _, weights, kwargs = chosen_weights(args)
    if args.model.partition(".")[0] not in entries():  # before its weights are fetched
        raise ValueError(_refusal(args.model))
    image = scaled(photo, args.size)
    pixel = _resolved(args.pixel, photo, image)
    model = FeatureBackbone(args.model, **kwargs).to(device).eval()
    found = attention_of(model, image, pixel)
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    file = out / f"{Path(args.image).stem}.{args.model}.neighborhoods.png"
    title = f"{Path(args.image).name}, {args.model}, {weights}"
    save(picture(image, found, pixel, title), file)
    change = "" if image is photo else f", resized to {image.height} x {image.width}"
    print(f"{args.image}: {photo.height} x {photo.width} pixels (H x W){change}")
    print(f"{args.model}: {weights}; x = {pixel[0]}, y = {pixel[1]}")
    for attention in found:
        print(f"  {', '.join(_described(attention))}")
    print(f"wrote {file}")
    return 0


def neighborhood_picture(
    image: Image.Image, model: nn.Module, pixel: tuple[int, int], title: str
) -> Image.Image:
    """What the token of a pixel attends to, over the dimmed image: a panel per stage and kind.

    Cells are coloured by the attention's weight, averaged over heads; a cross marks the pixel, and
    a frame the cell of its token.

    Args:
        image: RGB, any size that the model takes.
        model: a NAT or DiNAT, or a FeatureBackbone of one without a task, in eval mode.
        pixel: (x, y) in the image.
        title: a line above the panels; say there which weights made them.

    Returns:
        An RGB picture.

    Raises:
        ValueError: a model without neighborhood attention or in training mode, or a pixel outside
            of the image.
    """
    return picture(image, attention_of(model, image, pixel), pixel, title)


def attention_of(model: nn.Module, image: Image.Image, pixel: tuple[int, int]) -> list[Attention]:
    """The attention of the token that holds a pixel, in the last plain and dilated block per stage.

    Of a model whose blocks have one resolution, in the first and last of each kind.

    Args:
        model: a NAT or DiNAT, or a FeatureBackbone of one without a task, in eval mode.
        image: RGB.
        pixel: (x, y) in the image.

    Returns:
        Plain blocks first, then dilated ones, in the model's order.

    Raises:
        ValueError: a model without neighborhood attention or in training mode, or a pixel outside
            of the image.
    """
    _check_pixel(pixel, image)
    chosen = _chosen_blocks(model)
    pixels = model_input(image, model)
    projected: dict[nn.Module, Tensor] = {}

    def keep(module: nn.Module, inputs: Any, output: Tensor) -> None:
        projected[module] = output

    hooks = [attn.qkv.register_forward_hook(keep) for _, attn, _ in chosen]
    try:
        with torch.no_grad():
            model(pixels)
            return [
                _attention(name, attn, stride, projected[attn.qkv], pixel)
                for name, attn, stride in chosen
            ]
    finally:
        for hook in hooks:
            hook.remove()


def picture(
    image: Image.Image, attentions: list[Attention], pixel: tuple[int, int], title: str
) -> Image.Image:
    """The panels of `neighborhood_picture`: a row of plain blocks, and one of dilated ones."""
    panels = [(_panel(image, a, pixel), "\n".join(_described(a))) for a in attentions]
    kinds = [
        [p for p, a in zip(panels, attentions, strict=True) if (a.dilation > 1) == dilated]
        for dilated in (False, True)
    ]
    x, y = pixel
    heading = f"{title}: attention of the token at x = {x}, y = {y}, mean of its heads"
    return sheet(heading, [row for row in kinds if row])


def _chosen_blocks(model: nn.Module) -> list[tuple[str, NeighborhoodAttention, int]]:
    """Name, attention and stride of the blocks to draw."""
    kinds: dict[tuple[bool, int], list[tuple[str, NeighborhoodAttention, int]]] = {}
    for backbone in model.modules():
        if not isinstance(backbone, Backbone):
            continue
        for name, attn in backbone.named_modules():
            if isinstance(attn, NeighborhoodAttention):
                stride = next(
                    info["reduction"]
                    for info in backbone.feature_info
                    if name.startswith(f"{info['module']}.")
                )
                block = (name.removesuffix(".attn"), attn, stride)
                kinds.setdefault((attn.dilation > 1, stride), []).append(block)
    if not kinds:
        raise ValueError(_refusal(_name(model)))
    single = len({stride for _, stride in kinds}) == 1
    chosen = []
    for _, blocks in sorted(kinds.items()):
        chosen += [blocks[0], blocks[-1]] if single and len(blocks) > 1 else blocks[-1:]
    return chosen


def _refusal(name: str) -> str:
    return f"model: expected one with neighborhood attention (NAT, DiNAT), {name} has none"


def _name(model: nn.Module) -> str:
    cfgs: list[Any] = [getattr(m, "pretrained_cfg", None) for m in model.modules()]
    names = (cfg.get("architecture") for cfg in cfgs if cfg)
    return next(filter(None, names), type(model).__name__)


def _attention(
    name: str, attn: NeighborhoodAttention, stride: int, qkv: Tensor, pixel: tuple[int, int]
) -> Attention:
    """From the output of ``attn.qkv``, [1, H, W, 3 * C]."""
    height, width = qkv.shape[1:3]
    kernel, dilation = attn.kernel_size, attn.dilation
    # What the module attends to: a small map is padded with projected zeros, the bias alone.
    size = (max(height, kernel * dilation), max(width, kernel * dilation))
    tokens = attn.qkv.bias.expand(1, *size, -1).clone()
    tokens[:, :height, :width] = qkv
    tokens = tokens.unflatten(-1, (3, attn.num_heads, attn.head_dim))
    query, key, _ = tokens.unbind(3)
    scores = neighborhood_scores(query * attn.head_dim**-0.5, key, kernel, dilation, bias=attn.rpb)
    # Scores of ones with coordinates are the neighbors' coordinates.
    rows, columns = (torch.arange(length, dtype=torch.float64) for length in size)
    grid = torch.stack(torch.broadcast_tensors(columns, rows[:, None]), -1)[None, ..., None]
    places = neighborhood_scores(torch.ones_like(grid), grid, kernel, dilation)
    x, y = (n // stride for n in pixel)
    return Attention(
        name=name,
        kernel_size=kernel,
        dilation=dilation,
        stride=stride,
        map_size=(height, width),
        query=(x * stride, y * stride),
        cells=places[0, y, x].T.round().long() * stride,
        weights=scores[0, y, x].softmax(-1).cpu(),
    )


def _check_pixel(pixel: tuple[int, int], image: Image.Image) -> None:
    if not all(0 <= n < size for n, size in zip(pixel, image.size, strict=True)):
        raise ValueError(
            f"pixel: expected x, y below {image.width}, {image.height}, got {pixel[0]}, {pixel[1]}"
        )


def _resolved(
    asked: tuple[float, float], photo: Image.Image, image: Image.Image
) -> tuple[int, int]:
    """The pixel of ``image`` for a pixel (ints) or fractions (floats) of ``photo``."""
    if all(isinstance(n, int) for n in asked):
        _check_pixel((int(asked[0]), int(asked[1])), photo)
        asked = ((asked[0] + 0.5) / photo.width, (asked[1] + 0.5) / photo.height)
    if not all(0 <= n <= 1 for n in asked):
        raise ValueError(f"pixel: expected fractions from 0 to 1, got {asked[0]}, {asked[1]}")
    x, y = (min(int(n * size), size - 1) for n, size in zip(asked, image.size, strict=True))
    return x, y


def _described(attention: Attention) -> list[str]:
    """Lines of a caption."""
    k, span = attention.kernel_size, attention.span
    height, width = attention.map_size
    lines = [
        f"{attention.name}: {k} x {k} neighbors, dilation {attention.dilation}",
        f"map {height} x {width}, stride {attention.stride}, spans {span} x {span} pixels",
    ]
    if attention.padding:
        lines.append(f"{attention.padding} of {k * k} neighbors are padding")
    return lines


def _panel(image: Image.Image, attention: Attention, pixel: tuple[int, int]) -> Image.Image:
    """The photograph with the neighbors' cells, a small window enlarged, and the colours' scale."""
    drawn = _drawn(image, attention, pixel, (0, 0, *image.size), _PANEL)
    if attention.span * _SMALL < max(image.size) and min(drawn.size) > _INSET:
        _enlarge(drawn, image, attention, pixel)
    font = ImageFont.load_default(FONT_SIZE)
    weights = attention.weights.mean(0)
    low, high = f"weights {weights.min():.2%} ", f" {weights.max():.2%}"
    panel = Image.new("RGB", (max(drawn.width, _LEGEND), drawn.height + FONT_SIZE + 10), "white")
    panel.paste(drawn)
    draw = ImageDraw.Draw(panel)
    top, left = drawn.height + 4, round(font.getlength(low))
    draw.text((0, top), low, fill="black", font=font)
    draw.text((left + _BAR, top), high, fill="black", font=font)
    bar = _colours(torch.linspace(0, 1, _BAR))[None].repeat(FONT_SIZE - 4, 0)
    panel.paste(Image.fromarray(bar), (left, top + 3))
    return panel


def _enlarge(
    drawn: Image.Image, image: Image.Image, attention: Attention, pixel: tuple[int, int]
) -> None:
    """Show the window of a drawn photograph in the corner that is farthest from it."""
    cells = attention.cells
    left, top = cells.amin(0).tolist()
    right, bottom = (cells.amax(0) + attention.stride).tolist()
    part = (left, top, min(right, image.width), min(bottom, image.height))
    inset = ImageOps.expand(_drawn(image, attention, pixel, part, _INSET), 1, "white")
    scale = drawn.width / image.width
    ImageDraw.Draw(drawn).rectangle([round(n * scale) for n in part], outline="white")
    x, y = (
        0 if 2 * n > size else length - side
        for n, size, length, side in zip(pixel, image.size, drawn.size, inset.size, strict=True)
    )
    drawn.paste(inset, (x, y))


def _drawn(
    image: Image.Image,
    attention: Attention,
    pixel: tuple[int, int],
    part: tuple[int, int, int, int],
    longer: int,
) -> Image.Image:
    """A part (left, top, right, bottom) of the image with the neighbors' cells.

    It is drawn in whole pixels on a large canvas, then reduced to ``longer`` pixels on its longer
    side, so that cells keep their proportions.
    """
    left, top, right, bottom = part
    sides = (right - left, bottom - top)
    zoom = math.ceil(_OVERSAMPLED * longer / max(sides))
    unit = zoom * max(sides) / longer  # a pixel of the result

    def box(corner: Sequence[int]) -> tuple[int, int, int, int]:
        x, y = (corner[0] - left) * zoom, (corner[1] - top) * zoom
        side = attention.stride * zoom - 1
        return x, y, x + side, y + side

    grey = image.crop(part).convert("L").convert("RGB")
    dimmed = Image.blend(Image.new("RGB", grey.size), grey, _DIM)
    dimmed = resized(dimmed, sides[1] * zoom, sides[0] * zoom)
    covered = dimmed.copy()
    draw = ImageDraw.Draw(covered)
    colours = _colours(attention.weights.mean(0)).tolist()
    for cell, colour in zip(attention.cells.tolist(), colours, strict=True):
        draw.rectangle(box(cell), fill=tuple(colour), outline="black")
    canvas = Image.blend(dimmed, covered, _COVER)
    draw = ImageDraw.Draw(canvas)
    draw.rectangle(box(attention.query), outline="white", width=round(1.5 * unit))
    x, y = ((n + 0.5 - start) * zoom for n, start in zip(pixel, (left, top), strict=True))
    near, far = 2 * unit, 7 * unit
    for colour, width, more in (("white", 3.5, 1), ("red", 1.5, 0)):
        for sign in (-1, 1):
            start, end = sign * (near - more * unit), sign * (far + more * unit)
            draw.line((x + start, y, x + end, y), fill=colour, width=round(width * unit))
            draw.line((x, y + start, x, y + end), fill=colour, width=round(width * unit))
    width, height = (max(1, round(n / unit)) for n in canvas.size)
    return canvas.resize((width, height), Image.Resampling.LANCZOS)


def _colours(values: Tensor) -> np.ndarray:
    """[N] to [N, 3] bytes, from the smallest to the largest value."""
    from matplotlib import colormaps
    from matplotlib.colors import Normalize

    found = values.double().numpy()
    colours: np.ndarray = colormaps["viridis"](Normalize()(found), bytes=True)
    return colours[:, :3]
