"""Convolution at some pixels only: their windows as columns, and the results put back."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from vitarium.heads.mmdet.operators._precision import operator

__all__ = ["masked_col2im_forward", "masked_im2col_forward"]


@operator
def masked_im2col_forward(
    im: Tensor,
    mask_h_idx: Tensor,
    mask_w_idx: Tensor,
    col: Tensor,
    kernel_h: int,
    kernel_w: int,
    pad_h: int,
    pad_w: int,
) -> None:
    """Fill ``col`` [C * kernel_h * kernel_w, N] with the windows of N pixels.

    Args:
        im: the map [1, C, H, W].
        mask_h_idx: int64 [N], rows of the output.
        mask_w_idx: int64 [N], their columns.
        col: filled.
        kernel_h: the window's height.
        kernel_w: its width.
        pad_h: rows by which a window begins before its pixel; pixels outside of the map are 0.
        pad_w: the same of columns.
    """
    padded = F.pad(im[0], (pad_w, max(kernel_w - 1, pad_w), pad_h, max(kernel_h - 1, pad_h)))
    rows = torch.arange(kernel_h, device=im.device)[:, None, None] + mask_h_idx
    columns = torch.arange(kernel_w, device=im.device)[:, None] + mask_w_idx
    col.copy_(padded[:, rows, columns].view_as(col))


@operator
def masked_col2im_forward(
    col: Tensor,
    mask_h_idx: Tensor,
    mask_w_idx: Tensor,
    im: Tensor,
    height: int,
    width: int,
    channels: int,
) -> None:
    """Put ``col`` [channels, N] at N pixels of ``im`` [1, channels, height, width]."""
    im[0, :, mask_h_idx, mask_w_idx] = col
