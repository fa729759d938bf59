"""Isotropic NAT, DiNAT and ViT with relative positions (Hassani & Shi, 2022, arXiv 2209.15001).

Authors' code: SHI-Labs/Neighborhood-Attention-Transformer, commit d334f5b, MIT licence.

ViT's architecture with one resolution throughout, whose attention is to the neighborhood (NAT), to
dilated neighborhoods in every second block (DiNAT), or to the whole map (ViT-rpb). The last one has
an entry of its position table for every offset on the map, so its parameters depend on the image's
size: give ``img_size``, or call ``set_input_size``. The others take any size from one patch on.

Quirks:
    - No position embedding, no class token, no layer scale; a LayerNorm follows the patches.
    - Heads have 32 channels: twice as many heads as ViT.
    - Every LayerNorm has eps 1e-5.
    - ViT-rpb's table is indexed by key minus query, as neighborhood attention's is.
    - The authors' ViT-rpb stores that index as a buffer of every block; here it is computed.
    - For another size the authors resize tables bicubically, as Swin does.
    - The authors trained with stochastic depth of 0.1 (small) and 0.4 (base).

Shapes: B images, H x W tokens, C channels. Tokens are [B, H, W, C].
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import (
    calculate_drop_path_rates,
    register_notrace_function,
    resize_rel_pos_bias_table_simple,
    to_2tuple,
)
from timm.models import checkpoint, generate_default_cfgs
from timm.models._input import update_model_input_size
from torch import Tensor, nn

from vitarium.backbones._blocks import (
    Backbone,
    Block,
    NeighborhoodAttention,
    Patches,
    head_dim,
    refuse_attention_dropout,
    resized_rpb,
)
from vitarium.backbones._registry import Published, build, register, source_cfg
from vitarium.checkpoints import Renames, Weight

__all__ = ["IsotropicNAT"]

_INDEX = "relative_position_index"


class RelativePositionAttention(nn.Module):
    """Multi-head attention of every token to all, with a bias for the offset between them."""

    def __init__(
        self, dim: int, num_heads: int, size: tuple[int, int], proj_drop: float = 0.0, **dd: Any
    ) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.head_dim = head_dim(dim, num_heads)
        self.qkv = nn.Linear(dim, 3 * dim, **dd)
        height, width = size
        self.rpb = nn.Parameter(torch.zeros(num_heads, 2 * height - 1, 2 * width - 1, **dd))
        self.proj = nn.Linear(dim, dim, **dd)
        self.proj_drop = nn.Dropout(proj_drop)
        self.register_load_state_dict_pre_hook(drop_index)

    def forward(self, x: Tensor) -> Tensor:
        """[B, H, W, C] -> [B, H, W, C]."""
        B, H, W, C = x.shape
        qkv = self.qkv(x).reshape(B, H * W, 3, self.num_heads, self.head_dim)
        query, key, value = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        bias = position_bias(self.rpb, H, W).to(query.dtype)
        x = F.scaled_dot_product_attention(query, key, value, attn_mask=bias)
        return self.proj_drop(self.proj(x.transpose(1, 2).reshape(B, H, W, C)))


def drop_index(module: nn.Module, state_dict: dict[str, Tensor], prefix: str, *_: Any) -> None:
    """Before loading: pass over the index that the authors store, which here is computed."""
    state_dict.pop(prefix + _INDEX, None)


@register_notrace_function  # which passes over names with an underscore
def position_bias(table: Tensor, height: int, width: int) -> Tensor:
    """[heads, 2H - 1, 2W - 1] -> [1, heads, H * W, H * W]: the entry of every query and key."""
    rows, columns = _offsets(height, table.device), _offsets(width, table.device)
    bias = table[:, rows[:, None, :, None], columns[None, :, None, :]]
    return bias.reshape(1, -1, height * width, height * width)


def _offsets(length: int, device: torch.device) -> Tensor:
    """Entry of a table's axis for each query and key, [length, length]."""
    position = torch.arange(length, device=device)
    return position - position[:, None] + length - 1


class IsotropicNAT(Backbone):
    """Patches, blocks of one resolution, LayerNorm, pooling, linear classifier.

    Args:
        num_classes: outputs of the classifier; 0 for none.
        in_chans: channels of the image.
        global_pool: ``avg``, ``max``, ``avgmax``, ``catavgmax``, or ``""`` for none.
        img_size: of the images, in pixels: an int or (H, W). With attention to the whole map it
            must be a multiple of the patch and all images must have it; otherwise it is only the
            size that timm recommends for data.
        patch_size: in pixels.
        embed_dim: channels.
        depth: number of blocks.
        num_heads: attention heads.
        kernel_size: odd window size in tokens; None for attention to the whole map.
        dilation: step between a window's tokens in odd blocks; even ones have 1.
        mlp_ratio: hidden over input channels in the MLPs.
        drop_rate: dropout before the classifier, in [0, 1).
        proj_drop_rate: dropout after the projections of attention and MLP, in [0, 1).
        attn_drop_rate: must be 0: the attention has no dropout.
        drop_path_rate: stochastic depth of the last block, in [0, 1); it rises linearly from 0.
        device: of the parameters.
        dtype: of the parameters.

    Attributes:
        img_size: (H, W) of every image, in pixels; None where any size will do.

    Raises:
        ValueError: an argument outside of these.
    """

    stages_name = "layers"

    def __init__(
        self,
        num_classes: int = 1000,
        in_chans: int = 3,
        global_pool: str = "avg",
        img_size: int | tuple[int, int] = 224,
        patch_size: int = 16,
        embed_dim: int = 384,
        depth: int = 12,
        num_heads: int = 12,
        kernel_size: int | None = 7,
        dilation: int = 1,
        mlp_ratio: float = 4.0,
        drop_rate: float = 0.0,
        proj_drop_rate: float = 0.0,
        attn_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(num_classes, in_chans)
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        refuse_attention_dropout(attn_drop_rate)
        if kernel_size is None and dilation != 1:
            raise ValueError(
                f"dilation: expected 1 without a window (kernel_size=None), got {dilation}"
            )
        self.min_size = patch_size
        self.patch_embed = Patches(patch_size, in_chans, embed_dim, **dd)
        size = _checked_size(img_size, patch_size, exact=kernel_size is None)
        self.img_size = size if kernel_size is None else None
        rates: Any = calculate_drop_path_rates(drop_path_rate, depth)
        self.layers: Any = nn.ModuleList()  # of Block, which torch's type cannot say
        for i in range(depth):
            attn: nn.Module
            if kernel_size is None:
                grid = _grid(size, patch_size)
                attn = RelativePositionAttention(embed_dim, num_heads, grid, proj_drop_rate, **dd)
            else:
                window = (kernel_size, dilation if i % 2 else 1)
                attn = NeighborhoodAttention(embed_dim, num_heads, *window, proj_drop_rate, **dd)
            block = Block(embed_dim, attn, mlp_ratio, None, proj_drop_rate, rates[i], **dd)
            self.layers.append(block)
            info = {"num_chs": embed_dim, "reduction": patch_size, "module": f"layers.{i}"}
            self.feature_info.append(info)
        self._add_head(embed_dim, global_pool, drop_rate, dd)

    def _stage(self, index: int, x: Tensor) -> Tensor:
        block = self.layers[index]
        y: Tensor = checkpoint(block, x) if self.grad_checkpointing else block(x)
        return y

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Patterns by which timm groups parameters, by blocks; there is nothing coarser."""
        blocks = [(r"^layers\.(\d+)", None), (r"^norm", (99999,))]  # the norm joins the last block
        return {"stem": r"^patch_embed", "blocks": blocks}

    def set_input_size(self, img_size: int | tuple[int, int] | None = None) -> None:
        """Make the model one for images of another size, resizing position tables bicubically.

        Args:
            img_size: in pixels, an int or (H, W); None changes nothing.

        Raises:
            ValueError: no positive size, or no multiple of the patch where tables depend on it.
        """
        if img_size is None:
            return
        size = _checked_size(img_size, self.min_size, exact=self.img_size is not None)
        if self.img_size is not None:
            self.img_size = size
            for block in self.layers:
                old = block.attn.rpb
                table = _resized(old.detach(), _grid(size, self.min_size))
                block.attn.rpb = nn.Parameter(table, requires_grad=old.requires_grad)
        update_model_input_size(self, size)


def _checked_size(img_size: int | tuple[int, int], patch_size: int, exact: bool) -> tuple[int, int]:
    size = tuple(to_2tuple(img_size))
    if (
        len(size) != 2
        or any(not isinstance(side, int) or side < patch_size for side in size)
        or (exact and any(side % patch_size for side in size))
    ):
        kind = "multiples of" if exact else "at least"
        raise ValueError(
            f"img_size: expected one or two sides in pixels, {kind} the patch's {patch_size}, "
            f"got {img_size!r}"
        )
    return size[0], size[1]


def _grid(size: tuple[int, int], patch_size: int) -> tuple[int, int]:
    return size[0] // patch_size, size[1] // patch_size


def _resized(table: Tensor, grid_size: tuple[int, int]) -> Tensor:
    """A position table [heads, 2H - 1, 2W - 1] for a map of another size."""
    shape = (table.shape[0], 2 * grid_size[0] - 1, 2 * grid_size[1] - 1)
    exact = torch.promote_types(table.dtype, torch.float32)
    if table.shape == shape:
        return table
    resized: Tensor = resize_rel_pos_bias_table_simple(table.to(exact), grid_size, shape)
    return resized.to(table.dtype)


_RENAMES = Renames(())  # the authors' names are ours
_RESIZES = {"*.rpb": "bicubic"}


def _BUFFERS(model: IsotropicNAT) -> dict[str, Tensor]:  # noqa: N802
    """What the authors store beside the parameters: ViT-rpb's indices into its tables."""
    if model.img_size is None:
        return {}
    height, width = _grid(model.img_size, model.min_size)
    rows, columns = (_offsets(length, torch.device("cpu")) for length in (height, width))
    index = rows[:, None, :, None] * (2 * width - 1) + columns[None, :, None, :]
    index = index.reshape(height * width, height * width)
    return {f"layers.{i}.attn.{_INDEX}": index.clone() for i in range(len(model.layers))}


def checkpoint_filter_fn(state_dict: Mapping[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """An authors' state dict for ``model``: without indices, tables resized to it bicubically.

    ViT-rpb's tables to the size of its map; the others' to their kernels, see `resized_rpb`.
    """
    filtered = {name: x for name, x in state_dict.items() if not name.endswith(f".{_INDEX}")}
    if not isinstance(model, IsotropicNAT) or model.img_size is None:
        return resized_rpb(filtered, model)
    grid = _grid(model.img_size, model.min_size)
    for name, x in filtered.items():
        is_table = x.ndim == 3 and x.is_floating_point() and all(n % 2 for n in x.shape[1:])
        if name.endswith(".rpb") and is_table:
            filtered[name] = _resized(x, grid)
    return filtered


_CODE_LICENCE = "MIT"
_README = "README of SHI-Labs/Neighborhood-Attention-Transformer, d334f5b"
_PUBLISHED = {
    "nat_isotropic_small.shi_in1k": Published(top1=80.0, gflops=4.3, source=_README),
    "nat_isotropic_base.shi_in1k": Published(top1=81.6, gflops=16.9, source=_README),
    "dinat_isotropic_small.shi_in1k": Published(top1=80.8, gflops=4.3, source=_README),
    "dinat_isotropic_base.shi_in1k": Published(top1=82.1, gflops=16.9, source=_README),
    "vitrpb_small.shi_in1k": Published(top1=81.2, gflops=4.6, source=_README),
    "vitrpb_base.shi_in1k": Published(top1=82.5, gflops=17.5, source=_README),
}
_URL = "https://shi-labs.com/projects/dinat/checkpoints/isotropic"
_WEIGHTS = {
    name: Weight(url=f"{_URL}/{name.partition('.')[0]}_in1k_224.pth", wrapper="plain")
    for name in _PUBLISHED
}
_ORIGIN = "https://github.com/SHI-Labs/Neighborhood-Attention-Transformer"


def _cfg(name: str, patch_size: int = 16, **kwargs: Any) -> dict[str, Any]:
    """The rest is timm's default, and the authors': 224 x 224, bicubic, ImageNet's mean and std."""
    return {
        **source_cfg(_WEIGHTS.get(name)),
        "fixed_input_size": name.startswith("vitrpb"),
        "min_input_size": (3, patch_size, patch_size),
        "pool_size": (14, 14),
        "first_conv": "patch_embed.proj",
        "classifier": "head",
        "paper_ids": "arXiv:2209.15001",
        "paper_name": "Dilated Neighborhood Attention Transformer",
        **kwargs,
    }


_ATTOS = ("dinat_isotropic_atto.untrained", "vitrpb_atto.untrained")
_SMALL: dict[str, Any] = {"num_classes": 10, "input_size": (3, 64, 64), "crop_pct": 1.0}
default_cfgs = generate_default_cfgs(
    {
        _ATTOS[0]: _cfg(_ATTOS[0], patch_size=8, **_SMALL, pool_size=(8, 8)),
        _ATTOS[1]: _cfg(_ATTOS[1], **_SMALL, pool_size=(4, 4)),
        **{name: _cfg(name, origin_url=_ORIGIN) for name in _PUBLISHED},
    }
)


_create = partial(
    build,
    IsotropicNAT,
    weights=_WEIGHTS,
    filter_fn=checkpoint_filter_fn,
    feature_cfg={"out_indices": 3},  # the last three, as of timm's ViTs
)


_ATTO = {"img_size": 64, "patch_size": 8, "embed_dim": 96, "depth": 4, "num_heads": 3}
_BASE = {"embed_dim": 768, "num_heads": 24}


@register
def dinat_isotropic_atto(pretrained: bool = False, **kwargs: Any) -> IsotropicNAT:
    """467,542 parameters (10 classes); ours, for tests and demos, on 64 x 64 pixels."""
    args = {**_ATTO, "kernel_size": 3, "dilation": 2}
    return _create("dinat_isotropic_atto", pretrained, **{**args, **kwargs})


@register
def vitrpb_atto(pretrained: bool = False, **kwargs: Any) -> IsotropicNAT:
    """747,100 parameters (10 classes); ours, for tests and demos, on 64 x 64 pixels."""
    args = {**_ATTO, "patch_size": 16, "depth": 6, "kernel_size": None}
    return _create("vitrpb_atto", pretrained, **{**args, **kwargs})


@register
def nat_isotropic_small(pretrained: bool = False, **kwargs: Any) -> IsotropicNAT:
    """21,999,736 parameters, 4.3 GFLOPs at 224 x 224, ImageNet-1k top-1 80.0 % (published)."""
    return _create("nat_isotropic_small", pretrained, **kwargs)


@register
def nat_isotropic_base(pretrained: bool = False, **kwargs: Any) -> IsotropicNAT:
    """86,465,800 parameters, 16.9 GFLOPs at 224 x 224, ImageNet-1k top-1 81.6 % (published)."""
    return _create("nat_isotropic_base", pretrained, **{**_BASE, **kwargs})


@register
def dinat_isotropic_small(pretrained: bool = False, **kwargs: Any) -> IsotropicNAT:
    """21,999,736 parameters, 4.3 GFLOPs at 224 x 224, ImageNet-1k top-1 80.8 % (published)."""
    return _create("dinat_isotropic_small", pretrained, **{"dilation": 2, **kwargs})


@register
def dinat_isotropic_base(pretrained: bool = False, **kwargs: Any) -> IsotropicNAT:
    """86,465,800 parameters, 16.9 GFLOPs at 224 x 224, ImageNet-1k top-1 82.1 % (published)."""
    return _create("dinat_isotropic_base", pretrained, **{**_BASE, "dilation": 2, **kwargs})


@register
def vitrpb_small(pretrained: bool = False, **kwargs: Any) -> IsotropicNAT:
    """22,080,376 parameters, 4.6 GFLOPs at 224 x 224, ImageNet-1k top-1 81.2 % (published)."""
    return _create("vitrpb_small", pretrained, **{"kernel_size": None, **kwargs})


@register
def vitrpb_base(pretrained: bool = False, **kwargs: Any) -> IsotropicNAT:
    """86,627,080 parameters, 17.5 GFLOPs at 224 x 224, ImageNet-1k top-1 82.5 % (published)."""
    return _create("vitrpb_base", pretrained, **{**_BASE, "kernel_size": None, **kwargs})
