"""Pooling of regions of interest.

RoIs [R, 5] are an image's index and x1, y1, x2, y2 in pixels of the image; ``spatial_scale`` brings
them to the map [B, C, H, W]. Each is divided into PH x PW bins. One that is no number, lies further
away than any map reaches, or is of no image, shows NaN and has no gradient; compiled operators read
other memory there, or end the process.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torchvision  # noqa: F401  (registers its operators with torch)
from torch import Tensor

from vitarium.heads.mmdet.operators._precision import operator, wide

__all__ = ["roi_align_backward", "roi_align_forward", "roi_pool_backward", "roi_pool_forward"]

_MAX = 0  # mmcv's number of the pooling mode; 1 is the average
_NOWHERE = -2  # a coordinate outside of every map
_FAR = 2.0**15  # pixels of a map: no map is larger


@operator
def roi_align_forward(
    input: Tensor,
    rois: Tensor,
    output: Tensor,
    argmax_y: Tensor,
    argmax_x: Tensor,
    aligned_height: int,
    aligned_width: int,
    spatial_scale: float,
    sampling_ratio: int,
    pool_mode: int,
    aligned: bool,
) -> None:
    """Fill ``output`` with what the bins' sampling points show, on average or at most.

    Args:
        input: [B, C, H, W].
        rois: [R, 5].
        output: [R, C, PH, PW].
        argmax_y: in max mode filled with the row of the greatest point, in pixels of the map.
        argmax_x: the same of its column.
        aligned_height: PH.
        aligned_width: PW.
        spatial_scale: pixels of the map per pixel of the image.
        sampling_ratio: points along each side of a bin; 0 for one per pixel of the map.
        pool_mode: 0 for the maximum, 1 for the average.
        aligned: pixels have their centre at half coordinates, and RoIs may be smaller than a pixel.
    """
    values = wide(input)
    rois, sound = _sound(rois.to(values.dtype), len(input), spatial_scale)
    if pool_mode != _MAX:
        pooled = torch.ops.torchvision.roi_align(
            values, rois, spatial_scale, aligned_height, aligned_width, sampling_ratio, aligned
        )
        output.copy_(torch.where(sound, pooled, torch.nan))
        return
    image = rois[:, 0].long()[:, None, None]
    size = (aligned_height, aligned_width)
    best = values.new_full((len(rois), *size, input.shape[1]), -torch.inf)
    best_y, best_x = torch.full_like(best, _NOWHERE), torch.full_like(best, _NOWHERE)
    for y, x, used in _points(rois, size, spatial_scale, sampling_ratio, aligned):
        shown = torch.zeros_like(best)
        for weight, row, column in _corners(y, x, *input.shape[2:]):
            shown += weight[..., None] * values[image, :, row, column]
        better = used[..., None] & (shown > best)
        best = torch.where(better, shown, best)
        best_y = torch.where(better, y[..., None], best_y)
        best_x = torch.where(better, x[..., None], best_x)
    # A bin without points shows 0, as in the other mode; mmcv's minimum differs by device.
    pooled = torch.where(best_y == _NOWHERE, 0, best).permute(0, 3, 1, 2)
    output.copy_(torch.where(sound, pooled, torch.nan))
    argmax_y.copy_(best_y.permute(0, 3, 1, 2))
    argmax_x.copy_(best_x.permute(0, 3, 1, 2))


@operator
def roi_align_backward(
    grad_output: Tensor,
    rois: Tensor,
    argmax_y: Tensor,
    argmax_x: Tensor,
    grad_input: Tensor,
    aligned_height: int,
    aligned_width: int,
    spatial_scale: float,
    sampling_ratio: int,
    pool_mode: int,
    aligned: bool,
) -> None:
    """Add the gradient of the map to ``grad_input``; arguments as of the forward function."""
    grad = wide(grad_output)
    rois, sound = _sound(rois.to(grad.dtype), len(grad_input), spatial_scale)
    grad = torch.where(sound, grad, 0)
    if pool_mode != _MAX:
        total = torch.ops.torchvision._roi_align_backward(
            grad,
            rois,
            spatial_scale,
            aligned_height,
            aligned_width,
            *grad_input.shape,
            sampling_ratio,
            aligned,
        )
    else:
        total = torch.zeros(grad_input.shape, dtype=grad.dtype, device=grad.device)
        first = _planes(rois, grad_input)
        y, x = argmax_y.to(grad.dtype), argmax_x.to(grad.dtype)
        width = grad_input.shape[3]
        for weight, row, column in _corners(y, x, *grad_input.shape[2:]):
            place = first + row * width + column
            total.view(-1).index_add_(0, place.flatten(), (weight * grad).flatten())
    grad_input.add_(total)


@operator
def roi_pool_forward(
    input: Tensor,
    rois: Tensor,
    output: Tensor,
    argmax: Tensor,
    pooled_height: int,
    pooled_width: int,
    spatial_scale: float,
) -> None:
    """Fill ``output`` with the greatest pixel of every bin.

    A RoI covers its last pixel, is not rounded, and its bins overlap by the pixels that they share.
    A bin without pixels, or of a RoI whose end lies before its start, shows 0.

    Args:
        input: [B, C, H, W].
        rois: [R, 5].
        output: [R, C, PH, PW].
        argmax: int32 like ``output``, filled with ``row * W + column`` of the pixel that is shown,
            the first one of equals; -1 for none.
        pooled_height: PH.
        pooled_width: PW.
        spatial_scale: pixels of the map per pixel of the image.
    """
    values = wide(input)
    rois, sound = _sound(rois.to(values.dtype), len(input), spatial_scale)
    height, width = input.shape[2:]
    start, end = rois[:, 1:3] * spatial_scale, (rois[:, 3:5] + 1) * spatial_scale
    real = (end > start).all(1)[:, None]
    top, bottom = _bins(start[:, 1], end[:, 1], pooled_height, height)
    left, right = _bins(start[:, 0], end[:, 0], pooled_width, width)
    rows, columns = (bottom - top).clamp(min=0) * real, (right - left).clamp(min=0) * real
    image = rois[:, 0].long()[:, None, None]
    best = values.new_full((len(rois), *output.shape[2:], input.shape[1]), -torch.inf)
    place = torch.full_like(best, -1, dtype=argmax.dtype)
    for i in range(_greatest(rows)):
        for j in range(_greatest(columns)):
            used = (i < rows)[:, :, None] & (j < columns)[:, None, :]
            row = (top + i).clamp(max=height - 1)[:, :, None]
            column = (left + j).clamp(max=width - 1)[:, None, :]
            shown = values[image, :, row, column]
            better = used[..., None] & (shown > best)
            best = torch.where(better, shown, best)
            place = torch.where(better, (row * width + column).to(place)[..., None], place)
    pooled = torch.where(place < 0, 0, best).permute(0, 3, 1, 2)
    output.copy_(torch.where(sound, pooled, torch.nan))
    argmax.copy_(place.permute(0, 3, 1, 2))


@operator
def roi_pool_backward(
    grad_output: Tensor,
    rois: Tensor,
    argmax: Tensor,
    grad_input: Tensor,
    pooled_height: int,
    pooled_width: int,
    spatial_scale: float,
) -> None:
    """Add the gradient of the map to ``grad_input``; arguments as of the forward function."""
    grad = wide(grad_output)
    rois, sound = _sound(rois, len(grad_input), spatial_scale)
    grad = torch.where(sound, grad, 0)
    total = torch.zeros(grad_input.shape, dtype=grad.dtype, device=grad.device)
    place = _planes(rois, grad_input) + argmax.clamp(min=0)
    total.view(-1).index_add_(0, place.flatten(), torch.where(argmax < 0, 0, grad).flatten())
    grad_input.add_(total)


def _sound(rois: Tensor, images: int, spatial_scale: float) -> tuple[Tensor, Tensor]:
    """RoIs, with zeros in the place of those that nothing can be read of; and which are sound.

    Returns:
        [R, 5], and bool [R, 1, 1, 1].
    """
    near = ((rois[:, 1:] * spatial_scale).abs() <= _FAR).all(1)  # and no NaN
    sound = near & (rois[:, 0] >= 0) & (rois[:, 0] < images)
    return torch.where(sound[:, None], rois, 0), sound[:, None, None, None]


def _planes(rois: Tensor, maps: Tensor) -> Tensor:
    """Where the plane of every RoI's image and channel begins in a flat map: [R, C, 1, 1]."""
    channels, height, width = maps.shape[1:]
    channel = torch.arange(channels, device=rois.device)
    plane = rois[:, :1].long() * channels + channel
    return (plane * (height * width))[:, :, None, None]


def _greatest(counts: Tensor) -> int:
    return int(counts.max()) if counts.numel() else 0


def _bins(start: Tensor, end: Tensor, count: int, size: int) -> tuple[Tensor, Tensor]:
    """First pixel and the one after the last of every bin along one side: [R, count] each."""
    step = ((end - start) / count)[:, None]
    index = torch.arange(count, device=start.device, dtype=start.dtype)
    first = (index * step + start[:, None]).floor().clamp(0, size)
    last = ((index + 1) * step + start[:, None]).ceil().clamp(0, size)
    return first.long(), last.long()


def _points(
    rois: Tensor,
    size: tuple[int, int],
    spatial_scale: float,
    sampling_ratio: int,
    aligned: bool,
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Sampling points of all bins, one of each bin at a time, row by row.

    Yields:
        Their rows and columns in the map, and whether the RoI has such a point, as [R, PH, PW].
    """
    corners = rois[:, 1:] * spatial_scale - (0.5 if aligned else 0)
    start, extent = corners[:, :2], corners[:, 2:] - corners[:, :2]
    if not aligned:
        extent = extent.clamp(min=1)
    step = extent / extent.new_tensor([size[1], size[0]])  # x, y
    points = torch.full_like(step, sampling_ratio) if sampling_ratio > 0 else step.ceil()
    per_bin = points.clamp(min=1)  # a RoI without extent has none, which is no number to divide by
    bins_y = torch.arange(size[0], device=rois.device)
    bins_x = torch.arange(size[1], device=rois.device)
    for i in range(_greatest(points[:, 1])):
        y = start[:, 1:] + (bins_y + (i + 0.5) / per_bin[:, 1:]) * step[:, 1:]
        for j in range(_greatest(points[:, 0])):
            x = start[:, :1] + (bins_x + (j + 0.5) / per_bin[:, :1]) * step[:, :1]
            used = ((i < points[:, 1]) & (j < points[:, 0]))[:, None, None]
            yield (*torch.broadcast_tensors(y[:, :, None], x[:, None, :], used),)


def _corners(
    y: Tensor, x: Tensor, height: int, width: int
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """The four pixels around points of a map: weight, row and column of each.

    A point up to one pixel outside shows the border, one further away nothing.
    """
    inside = (y >= -1) & (y <= height) & (x >= -1) & (x <= width)
    y, x = y.clamp(0, height - 1), x.clamp(0, width - 1)
    top, left = y.floor(), x.floor()
    below, right = y - top, x - left
    for row, down in ((top, 1 - below), (top + 1, below)):
        for column, across in ((left, 1 - right), (left + 1, right)):
            yield (
                down * across * inside,
                row.clamp(max=height - 1).long(),
                column.clamp(max=width - 1).long(),
            )
