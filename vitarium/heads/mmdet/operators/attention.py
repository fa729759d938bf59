"""Multi-scale deformable attention.

Paper: Deformable DETR (Zhu et al., ICLR 2021, arXiv 2010.04159), equation 3.
Shapes: value [B, S, heads, D] with the pixels of all levels one after another; sampling locations
[B, Q, heads, levels, points, 2], x and y in [0, 1] of a level; attention weights without the 2.
At whole pixels the slope by a location jumps: rounding decides which side's is given.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from vitarium.heads.mmdet.operators._precision import operator, wide

__all__ = ["ms_deform_attn_backward", "ms_deform_attn_forward"]


def _attend(
    value: Tensor, shapes: list[list[int]], starts: list[int], locations: Tensor, weights: Tensor
) -> Tensor:
    """[B, Q, heads * D]."""
    B, Q, heads, _, points, _ = locations.shape
    total = value.new_zeros(B * heads, value.shape[3], Q)
    for level, ((height, width), start) in enumerate(zip(shapes, starts, strict=True)):
        pixels = value[:, start : start + height * width].permute(0, 2, 3, 1)
        maps = pixels.reshape(B * heads, -1, height, width)
        place = locations[:, :, :, level].transpose(1, 2).flatten(0, 1)  # [B * heads, Q, points, 2]
        weight = weights[:, :, :, level].transpose(1, 2).reshape(B * heads, 1, Q, points)
        shown = F.grid_sample(maps, 2 * place - 1, padding_mode="zeros", align_corners=False)
        total = total + (shown * weight).sum(-1)
    return total.view(B, -1, Q).transpose(1, 2).contiguous()


@operator
def ms_deform_attn_forward(
    value: Tensor,
    spatial_shapes: Tensor,
    level_start_index: Tensor,
    sampling_locations: Tensor,
    attention_weights: Tensor,
    im2col_step: int,
) -> Tensor:
    """The weighted sum of what the sampling points of a query and a head show: [B, Q, heads * D].

    Args:
        value: [B, S, heads, D].
        spatial_shapes: int64 [levels, 2], height and width.
        level_start_index: int64 [levels], where the levels begin in ``value``.
        sampling_locations: [B, Q, heads, levels, points, 2].
        attention_weights: [B, Q, heads, levels, points].
        im2col_step: images that mmcv takes at a time; here all are.
    """
    output = _attend(
        wide(value),
        spatial_shapes.tolist(),
        level_start_index.tolist(),
        wide(sampling_locations),
        wide(attention_weights),
    )
    return output.to(value.dtype)


@operator
def ms_deform_attn_backward(
    value: Tensor,
    spatial_shapes: Tensor,
    level_start_index: Tensor,
    sampling_locations: Tensor,
    attention_weights: Tensor,
    grad_output: Tensor,
    grad_value: Tensor,
    grad_sampling_loc: Tensor,
    grad_attn_weight: Tensor,
    im2col_step: int,
) -> None:
    """Add the gradients to the tensors that are named for them."""
    shapes, starts = spatial_shapes.tolist(), level_start_index.tolist()
    with torch.enable_grad():
        leaves = [
            wide(x.detach()).requires_grad_()
            for x in (value, sampling_locations, attention_weights)
        ]
        output = _attend(leaves[0], shapes, starts, *leaves[1:])
    grads = torch.autograd.grad(output, leaves, wide(grad_output))
    for total, grad in zip((grad_value, grad_sampling_loc, grad_attn_weight), grads, strict=True):
        total.add_(grad)
