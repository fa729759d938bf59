"""Content-aware reassembly of features: upsampling whose kernel differs at every pixel.

Paper: CARAFE (Wang et al., ICCV 2019, arXiv 1905.02188), equation 2.
Shapes: features [B, C, H, W], masks [B, groups * K * K, scale * H, scale * W], output
[B, C, scale * H, scale * W]; C / groups channels share a kernel. Pixels outside of the map are 0.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from vitarium.heads.mmdet.operators._precision import operator, wide

__all__ = [
    "carafe_backward",
    "carafe_forward",
    "carafe_naive_backward",
    "carafe_naive_forward",
]


def _reassemble(features: Tensor, masks: Tensor, kernel: int, groups: int, scale: int) -> Tensor:
    B, _, H, W = features.shape
    windows = F.unfold(features, kernel, padding=kernel // 2)
    windows = windows.view(B, groups, -1, kernel * kernel, H, W)
    kernels = masks.view(B, groups, kernel * kernel, H, scale, W, scale)
    output = torch.einsum("bgckhw,bgkhiwj->bgchiwj", windows, kernels)
    return output.reshape(B, -1, H * scale, W * scale)


@operator
def carafe_naive_forward(
    features: Tensor,
    masks: Tensor,
    output: Tensor,
    kernel_size: int,
    group_size: int,
    scale_factor: int,
) -> None:
    """Fill ``output``."""
    output.copy_(_reassemble(wide(features), wide(masks), kernel_size, group_size, scale_factor))


@operator
def carafe_naive_backward(
    grad_output: Tensor,
    features: Tensor,
    masks: Tensor,
    grad_input: Tensor,
    grad_masks: Tensor,
    kernel_size: int,
    group_size: int,
    scale_factor: int,
) -> None:
    """Add the gradients to ``grad_input`` and ``grad_masks``."""
    with torch.enable_grad():
        leaves = [wide(x.detach()).requires_grad_() for x in (features, masks)]
        output = _reassemble(leaves[0], leaves[1], kernel_size, group_size, scale_factor)
    by_features, by_masks = torch.autograd.grad(output, leaves, wide(grad_output))
    grad_input.add_(by_features)
    grad_masks.add_(by_masks)


@operator
def carafe_forward(
    features: Tensor,
    masks: Tensor,
    rfeatures: Tensor,
    routput: Tensor,
    rmasks: Tensor,
    output: Tensor,
    kernel_size: int,
    group_size: int,
    scale_factor: int,
) -> None:
    """Fill ``output``, and ``rfeatures`` with what the backward function reads.

    The tensors with an r are mmcv's copies in another order of dimensions, which is its own affair.
    """
    rfeatures.copy_(features)
    carafe_naive_forward(features, masks, output, kernel_size, group_size, scale_factor)


@operator
def carafe_backward(
    grad_output: Tensor,
    rfeatures: Tensor,
    masks: Tensor,
    rgrad_output: Tensor,
    rgrad_input_hs: Tensor,
    rgrad_input: Tensor,
    rgrad_masks: Tensor,
    grad_input: Tensor,
    grad_masks: Tensor,
    kernel_size: int,
    group_size: int,
    scale_factor: int,
) -> None:
    """Add the gradients to ``grad_input`` and ``grad_masks``."""
    carafe_naive_backward(
        grad_output,
        rfeatures,
        masks,
        grad_input,
        grad_masks,
        kernel_size,
        group_size,
        scale_factor,
    )
