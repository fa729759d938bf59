"""Deformable convolution, plain and modulated: every tap is read where an offset moves it to.

Shapes: input [B, C, H, W], weight [out, C / groups, KH, KW], output [B, out, HO, WO], offset
[B, deform_groups * KH * KW * 2, HO, WO] in pixels of the input (y before x), mask
[B, deform_groups * KH * KW, HO, WO]. A tap one pixel or more outside of the input reads 0, and
its offset has no gradient (torchvision's has one there). So does one whose offset is no number, as
in mmcv, where torchvision's operator ends the process.
"""

# ruff: noqa: N803  (the arguments have mmcv's names: it passes them by keyword)

from __future__ import annotations

from typing import NamedTuple

import torch
import torchvision  # noqa: F401  (registers its operators with torch)
from torch import Tensor

from vitarium.heads.mmdet.operators._precision import operator, wide

__all__ = [
    "deform_conv_backward_input",
    "deform_conv_backward_parameters",
    "deform_conv_forward",
    "modulated_deform_conv_backward",
    "modulated_deform_conv_forward",
]


_FAR = 2.0**20  # pixels: outside of every input, and no more than an index holds


class _Geometry(NamedTuple):
    """Sizes of a convolution, rows before columns, out of mmcv's keywords."""

    kernel: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]
    groups: int
    deform_groups: int

    @classmethod
    def plain(
        cls,
        kW: int,
        kH: int,
        dW: int,
        dH: int,
        padW: int,
        padH: int,
        dilationW: int,
        dilationH: int,
        group: int,
        deformable_group: int,
        im2col_step: int,
    ) -> _Geometry:
        """Those of the plain convolution; mmcv takes ``im2col_step`` images at a time, we all."""
        sizes = ((kH, kW), (dH, dW), (padH, padW), (dilationH, dilationW))
        return cls(*sizes, group, deformable_group)

    @classmethod
    def modulated(
        cls,
        kernel_h: int,
        kernel_w: int,
        stride_h: int,
        stride_w: int,
        pad_h: int,
        pad_w: int,
        dilation_h: int,
        dilation_w: int,
        group: int,
        deformable_group: int,
    ) -> _Geometry:
        """Those of the modulated one."""
        kernel, stride = (kernel_h, kernel_w), (stride_h, stride_w)
        padding, dilation = (pad_h, pad_w), (dilation_h, dilation_w)
        return cls(kernel, stride, padding, dilation, group, deformable_group)

    def taps(self) -> int:
        """Places that are read for an output pixel, of all groups of offsets."""
        return self.deform_groups * self.kernel[0] * self.kernel[1]

    def numbers(self) -> tuple[int, ...]:
        """As torchvision's operators take them; they know the kernel from the weight."""
        return (*self.stride, *self.padding, *self.dilation, self.groups, self.deform_groups)


@operator
def deform_conv_forward(
    input: Tensor,
    weight: Tensor,
    offset: Tensor,
    output: Tensor,
    columns: Tensor,
    ones: Tensor,
    **shape: int,
) -> None:
    """Fill ``output``. ``columns`` and ``ones`` are mmcv's working memory."""
    geometry = _Geometry.plain(**shape)
    output.copy_(_forward(input, weight, offset, None, geometry))


@operator
def deform_conv_backward_input(
    input: Tensor,
    offset: Tensor,
    grad_output: Tensor,
    grad_input: Tensor,
    grad_offset: Tensor,
    weight: Tensor,
    columns: Tensor,
    **shape: int,
) -> None:
    """Add the gradients to ``grad_input`` and ``grad_offset``."""
    geometry = _Geometry.plain(**shape)
    by_input, _, by_offset, _ = _backward(grad_output, input, weight, offset, None, geometry)
    grad_input.add_(by_input)
    grad_offset.add_(by_offset)


@operator
def deform_conv_backward_parameters(
    input: Tensor,
    offset: Tensor,
    grad_output: Tensor,
    grad_weight: Tensor,
    columns: Tensor,
    ones: Tensor,
    *,
    scale: float,
    **shape: int,
) -> None:
    """Add ``scale`` times the gradient to ``grad_weight``."""
    geometry = _Geometry.plain(**shape)
    # The gradient of the weight does not depend on the weight: any of its shape does.
    by_weight = _backward(grad_output, input, grad_weight, offset, None, geometry)[1]
    grad_weight.add_(by_weight, alpha=scale)


@operator
def modulated_deform_conv_forward(
    input: Tensor,
    weight: Tensor,
    bias: Tensor,
    ones: Tensor,
    offset: Tensor,
    mask: Tensor,
    output: Tensor,
    columns: Tensor,
    *,
    with_bias: bool,
    **shape: int,
) -> None:
    """Fill ``output``. ``columns`` and ``ones`` are mmcv's working memory.

    Offset and mask may be of another size than the output, as DyHead passes them: what an image has
    of them is read as flat memory, from the front.
    """
    geometry = _Geometry.modulated(**shape)
    taps, size = geometry.taps(), output.shape[2:]
    result = _forward(
        input, weight, _front(offset, 2 * taps, size), _front(mask, taps, size), geometry
    )
    output.copy_(result + wide(bias)[:, None, None] if with_bias else result)


@operator
def modulated_deform_conv_backward(
    input: Tensor,
    weight: Tensor,
    bias: Tensor,
    ones: Tensor,
    offset: Tensor,
    mask: Tensor,
    columns: Tensor,
    grad_input: Tensor,
    grad_weight: Tensor,
    grad_bias: Tensor,
    grad_offset: Tensor,
    grad_mask: Tensor,
    grad_output: Tensor,
    *,
    with_bias: bool,
    **shape: int,
) -> None:
    """Add the gradients to the tensors that are named for them."""
    geometry = _Geometry.modulated(**shape)
    taps, size = geometry.taps(), grad_output.shape[2:]
    by_input, by_weight, by_offset, by_mask = _backward(
        grad_output,
        input,
        weight,
        _front(offset, 2 * taps, size),
        _front(mask, taps, size),
        geometry,
    )
    grad_input.add_(by_input)
    grad_weight.add_(by_weight)
    grad_offset.add_(_unfront(by_offset, offset))
    grad_mask.add_(_unfront(by_mask, mask))
    if with_bias:
        grad_bias.add_(wide(grad_output).sum((0, 2, 3)))


def _front(tensor: Tensor, channels: int, size: torch.Size) -> Tensor:
    """The first values of every image as [B, channels, *size]."""
    count = channels * size.numel()
    flat = tensor.flatten(1)
    if flat.shape[1] < count:
        raise ValueError(
            f"offset or mask: expected at least {count} values an image, for {channels} channels "
            f"of {tuple(size)}, got {flat.shape[1]} in a tensor of shape {tuple(tensor.shape)}"
        )
    return flat[:, :count].unflatten(1, (channels, *size))


def _unfront(front: Tensor, like: Tensor) -> Tensor:
    """Values of every image in the place where ``_front`` took them from; 0 elsewhere."""
    flat = front.flatten(1)
    rest = like.flatten(1).shape[1] - flat.shape[1]
    return torch.nn.functional.pad(flat, (0, rest)).view(like.shape)


def _forward(
    input: Tensor, weight: Tensor, offset: Tensor, mask: Tensor | None, geometry: _Geometry
) -> Tensor:
    tensors = _arguments(input, weight, offset, mask)
    return torch.ops.torchvision.deform_conv2d(*tensors, *geometry.numbers(), mask is not None)


def _backward(
    grad: Tensor,
    input: Tensor,
    weight: Tensor,
    offset: Tensor,
    mask: Tensor | None,
    geometry: _Geometry,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients by input, weight, offset and mask."""
    tensors = _arguments(input, weight, offset, mask)
    by_input, by_weight, by_offset, by_mask, _ = torch.ops.torchvision._deform_conv2d_backward(
        wide(grad), *tensors, *geometry.numbers(), mask is not None
    )
    inside = _inside(wide(offset), (input.shape[2], input.shape[3]), geometry)
    return by_input, by_weight, by_offset * inside, by_mask


def _arguments(
    input: Tensor, weight: Tensor, offset: Tensor, mask: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Input, weight, offset, mask and bias as torchvision's operator takes them."""
    input = wide(input)
    mask = input.new_zeros(len(input), 0) if mask is None else wide(mask)
    offset = wide(offset).nan_to_num(nan=_FAR).clamp(-_FAR, _FAR)
    return input, wide(weight), offset, mask, input.new_zeros(len(weight))


def _inside(offset: Tensor, size: tuple[int, int], geometry: _Geometry) -> Tensor:
    """Whether taps lie less than a pixel outside of the input, in the shape of the offset."""
    taps = offset.unflatten(1, (geometry.deform_groups, *geometry.kernel, 2))
    within = []
    for axis in (0, 1):
        out = torch.arange(offset.shape[2 + axis], device=offset.device) * geometry.stride[axis]
        tap = torch.arange(geometry.kernel[axis], device=offset.device) * geometry.dilation[axis]
        shape = [1] * 6  # B, deform groups, KH, KW, HO, WO
        shape[2 + axis], shape[4 + axis] = len(tap), len(out)
        grid = (tap[:, None] + out - geometry.padding[axis]).view(shape)
        place = taps.select(4, axis) + grid
        within.append((place > -1) & (place < size[axis]))
    return (within[0] & within[1]).unsqueeze(4).expand_as(taps).flatten(1, 4)
