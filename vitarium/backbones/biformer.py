"""BiFormer: bi-level routing attention (Zhu et al., CVPR 2023, arXiv 2303.08810).

Authors' code: rayleizhu/BiFormer, commit 1697bbb, MIT licence.

A pyramid of four resolutions. In the first three the map is cut into ``num_regions`` regions a
side; every region chooses the few regions whose mean key has the largest dot product with its mean
query, and its tokens attend to all tokens of these. The last one attends to everything. BiFormer
takes any image of at least 32 x 32 pixels. BiFormer-STL is the same attention in Swin-T's layout;
its authors released two models of it, which compute different things.

Quirks:
    - Attention scales dot products by the whole width, not by a head's: ``dim ** -0.5``. The last
      stage is ordinary: 8 heads whatever ``head_dim`` says, ``(dim / 8) ** -0.5``, no bias in qkv.
    - A depthwise convolution (LEPE, 5 x 5) is added before the output projection: of the values,
      in the last stage of its *input*.
    - A map that regions do not divide is completed with zero tokens *before* the projection: they
      have its bias as query, key and value, count in the means, are attended to, and the depthwise
      convolution sees them.
    - BiFormer-STL-nchw differs: zeros complete query, key and value *after* the projection and do
      not count in the means; regions have ``floor(H / num_regions)`` tokens a side, and there may
      be more than ``num_regions`` of them; the last stage, too, takes LEPE of the values. Images
      need ``16 * num_regions`` pixels a side.
    - BiFormer begins a block with ``x + conv3x3(x)``; STL does not.
    - LayerNorm has eps 1e-6; BatchNorm stands in the stem, between stages and before pooling. STL
      normalises before it merges, and its convolutions drop what is over at the far borders.
    - The MLP is numbered 0 and 3 in BiFormer, 0 and 2 in STL.
    - In dense form there is no final norm, but a LayerNorm (eps 1e-6) for each map; 8 regions a
      side for ADE20K, 16 for COCO.
    - The authors trained with stochastic depth of 0.15 (small) and 0.1 (STL) on ImageNet.

Shapes: B images, H x W tokens of the stage at hand, C channels. Tokens are [B, H, W, C].
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from timm.layers import (
    DropPath,
    calculate_drop_path_rates,
    get_device_dtype,
    register_notrace_function,
    register_notrace_module,
    to_ntuple,
)
from timm.models import checkpoint_seq, generate_default_cfgs
from torch import Tensor, nn

from vitarium.backbones._blocks import (
    Backbone,
    checked_image,
    head_dim,
    no_buffers,
    refuse_attention_dropout,
)
from vitarium.backbones._registry import Published, build, register, source_cfg
from vitarium.backbones._released import Tables, dense
from vitarium.checkpoints import Renames, Weight
from vitarium.ops import routing_attention

__all__ = ["BiFormer", "BiFormerSTL", "BiFormerSTLnchw"]

_BORDER = 2  # tokens that the 5 x 5 convolution sees around each one


class Pointwise(nn.Conv2d):
    """A linear map of channels that is stored as a 1 x 1 convolution."""

    def __init__(self, dim: int, out_dim: int, bias: bool = True, **dd: Any) -> None:
        super().__init__(dim, out_dim, 1, bias=bias, **dd)

    def forward(self, x: Tensor) -> Tensor:
        """[..., dim] -> [..., out_dim]."""
        return F.linear(x, self.weight.flatten(1), self.bias)


@register_notrace_module
class TokenBatchNorm(nn.BatchNorm2d):
    """BatchNorm of [B, H, W, C]."""

    def forward(self, x: Tensor) -> Tensor:
        """[B, H, W, C] -> [B, H, W, C]."""
        return super().forward(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


class RoutingAttention(nn.Module):
    """Bi-level routing attention; zero tokens complete the map before the projection."""

    def __init__(
        self,
        dim: int,
        num_heads: int,
        num_regions: int,
        topk: int,
        proj_drop: float = 0.0,
        **dd: Any,
    ) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.head_dim = head_dim(dim, num_heads)
        self.num_regions = num_regions
        self.topk = topk
        self.lepe = nn.Conv2d(dim, dim, 2 * _BORDER + 1, groups=dim, **dd)
        self._add_projections(dim, **dd)
        self.proj_drop = nn.Dropout(proj_drop)

    def _add_projections(self, dim: int, **dd: Any) -> None:
        self.qkv = nn.ModuleDict({"qkv": nn.Linear(dim, 3 * dim, **dd)})
        self.wo = nn.Linear(dim, dim, **dd)

    def forward(self, x: Tensor) -> Tensor:
        """[B, H, W, C] -> [B, H, W, C]."""
        qkv: Any = self.qkv["qkv"]
        pad = qkv.bias.reshape(3, self.num_heads, self.head_dim)  # a zero token, projected
        return self.proj_drop(self.wo(self._attend(qkv(x), pad)))

    def _attend(self, qkv: Tensor, pad: Tensor | None) -> Tensor:
        B, H, W, C = qkv.shape
        query, key, value = qkv.reshape(B, H, W, 3, self.num_heads, self.head_dim).unbind(3)
        scale = (C // 3) ** -0.5
        x = routing_attention(query, key, value, self.num_regions, self.topk, scale, pad)
        fill = None if pad is None else pad[2].flatten()
        lepe = self.lepe(surrounded(value.flatten(3), fill, self.num_regions))
        return x.flatten(3) + lepe.permute(0, 2, 3, 1)


class RefactoredRoutingAttention(RoutingAttention):
    """Bi-level routing attention; zeros complete query, key and value."""

    def _add_projections(self, dim: int, **dd: Any) -> None:
        self.qkv_linear = Pointwise(dim, 3 * dim, **dd)
        self.output_linear = Pointwise(dim, dim, **dd)

    def forward(self, x: Tensor) -> Tensor:
        """[B, H, W, C] -> [B, H, W, C]."""
        return self.proj_drop(self.output_linear(self._attend(self.qkv_linear(x), None)))


class FullAttention(nn.Module):
    """Attention of every token to all, with a depthwise convolution of its input or its values."""

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        lepe_of_value: bool = False,
        proj_drop: float = 0.0,
        linear: type[nn.Linear] | type[Pointwise] = nn.Linear,
        **dd: Any,
    ) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.head_dim = head_dim(dim, num_heads)
        self.lepe_of_value = lepe_of_value
        self.qkv = linear(dim, 3 * dim, bias=False, **dd)
        self.proj = linear(dim, dim, **dd)
        self.lepe = nn.Conv2d(dim, dim, 2 * _BORDER + 1, padding=_BORDER, groups=dim, **dd)
        self.proj_drop = nn.Dropout(proj_drop)

    def forward(self, x: Tensor) -> Tensor:
        """[B, H, W, C] -> [B, H, W, C]."""
        B, H, W, C = x.shape
        qkv = self.qkv(x)
        tokens = qkv.reshape(B, H * W, 3, self.num_heads, self.head_dim)
        query, key, value = tokens.permute(2, 0, 3, 1, 4).unbind(0)
        y = F.scaled_dot_product_attention(query, key, value)
        y = y.transpose(1, 2).reshape(B, H, W, C)
        local = qkv[..., 2 * C :] if self.lepe_of_value else x
        lepe = self.lepe(local.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        return self.proj_drop(self.proj(y + lepe))


@register_notrace_function  # which passes over names with an underscore
def surrounded(x: Tensor, fill: Tensor | None, num_regions: int) -> Tensor:
    """A map [B, H, W, C] and what a 5 x 5 convolution sees around it, [B, C, H + 4, W + 4].

    Zeros; but ``fill`` [C], where it is given, in the padding that completes ``num_regions``.
    """
    height, width = x.shape[1:3]
    x = F.pad(x.permute(0, 3, 1, 2), (_BORDER,) * 4)
    if fill is None:
        return x
    # whether a map needs it or not: one program for both
    real, padded = zip(
        *(_extent(length, num_regions, x.device) for length in (height, width)), strict=True
    )
    ring = (padded[0][:, None] & padded[1]) & ~(real[0][:, None] & real[1])
    return torch.where(ring, fill.to(x.dtype)[:, None, None], x)


def _extent(length: int, num_regions: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Which of an axis's ``length + 4`` tokens are the map's, and which of its padded form."""
    index = torch.arange(-_BORDER, length + _BORDER, device=device)
    padded = num_regions * ((length + num_regions - 1) // num_regions)
    return (index >= 0) & (index < length), (index >= 0) & (index < padded)


class Block(nn.Module):
    """``x + pos_embed(x)`` (BiFormer), ``x + attn(norm1(x))``, then ``x + mlp(norm2(x))``."""

    def __init__(
        self,
        dim: int,
        attn: nn.Module,
        mlp_ratio: float,
        pos_embed: bool = True,
        proj_drop: float = 0.0,
        drop_path: float = 0.0,
        linear: type[nn.Linear] | type[Pointwise] = nn.Linear,
        **dd: Any,
    ) -> None:
        super().__init__()
        self.pos_embed = nn.Conv2d(dim, dim, 3, padding=1, groups=dim, **dd) if pos_embed else None
        self.norm1 = nn.LayerNorm(dim, eps=1e-6, **dd)
        self.attn = attn
        self.norm2 = nn.LayerNorm(dim, eps=1e-6, **dd)
        hidden = int(dim * mlp_ratio)
        self.mlp = nn.Sequential(
            linear(dim, hidden, **dd),
            *[nn.Identity()] * pos_embed,  # for the authors' numbering
            nn.GELU(),
            linear(hidden, dim, **dd),
            nn.Dropout(proj_drop),
        )
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """[B, H, W, C] -> [B, H, W, C]."""
        if self.pos_embed is not None:
            x = x + self.pos_embed(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        x = x + self.drop_path(self.attn(self.norm1(x)))
        return x + self.drop_path(self.mlp(self.norm2(x)))


class BiFormer(Backbone):
    """Strided convolutions, four stages of blocks, BatchNorm, pooling, linear classifier.

    Args:
        num_classes: outputs of the classifier; 0 for none.
        in_chans: channels of the image.
        global_pool: ``avg``, ``max``, ``avgmax``, ``catavgmax``, or ``""`` for none.
        embed_dim: channels of the first stage; every further stage has twice as many.
        depths: blocks of each stage.
        head_dim: channels of a head where attention is routed; elsewhere there are 8 heads.
        num_regions: regions a side of each stage's map, or of all.
        topks: how many regions a region attends to in each stage; None for the whole map, without
            regions.
        mlp_ratio: hidden over input channels in the MLPs.
        drop_rate: dropout before the classifier, in [0, 1).
        proj_drop_rate: dropout after the projections of attention and MLP, in [0, 1).
        attn_drop_rate: must be 0: the attention has no dropout.
        drop_path_rate: stochastic depth of the last block, in [0, 1); it rises linearly from 0
            over all blocks.
        device: of the parameters.
        dtype: of the parameters.

    Raises:
        ValueError: an argument outside of these.
    """

    stages_name = "stages"
    swin_layout: ClassVar[bool] = False
    refactored: ClassVar[bool] = False

    def __init__(
        self,
        num_classes: int = 1000,
        in_chans: int = 3,
        global_pool: str = "avg",
        embed_dim: int = 64,
        depths: Sequence[int] = (2, 2, 8, 2),
        head_dim: int = 32,
        num_regions: int | Sequence[int] = 7,
        topks: Sequence[int | None] = (1, 4, 16, None),
        mlp_ratio: float = 3.0,
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
        regions = to_ntuple(len(depths))(num_regions)
        for name, values in (("num_regions", regions), ("topks", topks)):
            if len(values) != len(depths):
                raise ValueError(
                    f"{name}: expected one per stage ({len(depths)}), got {tuple(values)}"
                )
        dims = [embed_dim * 2**i for i in range(len(depths))]
        self.downsample_layers: Any = nn.ModuleList([self._stem(in_chans, embed_dim, **dd)])
        self.stages: Any = nn.ModuleList()
        for dim in dims[:-1]:
            self.downsample_layers.append(self._downsample(dim, **dd))
        drop_paths: Any = iter(calculate_drop_path_rates(drop_path_rate, sum(depths)))
        linear = Pointwise if self.refactored else nn.Linear
        for i, (dim, depth) in enumerate(zip(dims, depths, strict=True)):
            blocks = []
            for _ in range(depth):
                attn = self._attention(dim, head_dim, regions[i], topks[i], proj_drop_rate, **dd)
                options = (not self.swin_layout, proj_drop_rate, next(drop_paths), linear)
                blocks.append(Block(dim, attn, mlp_ratio, *options, **dd))
            stage: nn.Module = nn.Sequential(*blocks)
            self.stages.append(nn.ModuleDict({"blocks": stage}) if self.swin_layout else stage)
            module = f"stages.{i}.blocks" if self.swin_layout else f"stages.{i}"
            self.feature_info.append({"num_chs": dim, "reduction": 4 * 2**i, "module": module})
            if self.refactored and topks[i] is not None:
                self.min_size = max(self.min_size, 4 * 2**i * regions[i])
        self._add_head(dims[-1], global_pool, drop_rate, dd)
        self.norm = TokenBatchNorm(dims[-1], **dd)

    def _stem(self, in_chans: int, dim: int, **dd: Any) -> nn.Module:
        if self.swin_layout:
            return nn.Sequential(
                nn.Conv2d(in_chans, dim, 4, stride=4, **dd), nn.BatchNorm2d(dim, **dd)
            )
        return nn.Sequential(
            nn.Conv2d(in_chans, dim // 2, 3, stride=2, padding=1, **dd),
            nn.BatchNorm2d(dim // 2, **dd),
            nn.GELU(),
            nn.Conv2d(dim // 2, dim, 3, stride=2, padding=1, **dd),
            nn.BatchNorm2d(dim, **dd),
        )

    def _downsample(self, dim: int, **dd: Any) -> nn.Module:
        if self.swin_layout:
            return nn.Sequential(
                nn.BatchNorm2d(dim, **dd), nn.Conv2d(dim, 2 * dim, 2, stride=2, **dd)
            )
        return nn.Sequential(
            nn.Conv2d(dim, 2 * dim, 3, stride=2, padding=1, **dd), nn.BatchNorm2d(2 * dim, **dd)
        )

    def _attention(
        self,
        dim: int,
        channels: int,
        num_regions: int,
        topk: int | None,
        proj_drop: float,
        **dd: Any,
    ) -> nn.Module:
        if topk is None:
            linear = Pointwise if self.refactored else nn.Linear
            return FullAttention(dim, 8, self.refactored, proj_drop, linear, **dd)
        if channels < 1 or dim % channels:
            raise ValueError(f"head_dim: expected a divisor of dim = {dim}, got {channels}")
        if num_regions < 1:
            raise ValueError(f"num_regions: expected at least 1, got {num_regions}")
        if not 1 <= topk <= num_regions**2:
            raise ValueError(
                f"topks: expected 1 to num_regions ** 2 = {num_regions**2} regions, got {topk}"
            )
        routed = RefactoredRoutingAttention if self.refactored else RoutingAttention
        return routed(dim, dim // channels, num_regions, topk, proj_drop, **dd)

    @staticmethod
    def _init_weights(module: nn.Module) -> None:
        Backbone._init_weights(module)
        if isinstance(module, Pointwise):
            nn.init.trunc_normal_(module.weight, std=0.02)
            if module.bias is not None:
                nn.init.zeros_(module.bias)

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Patterns by which timm groups parameters, for layer-wise learning rates."""
        fine = [
            (r"^downsample_layers\.(\d+)", (0,)),  # with the first block of its stage
            (r"^stages\.(\d+)\.(?:blocks\.)?(\d+)", None),
            (r"^norm", (99999,)),  # timm's mark for "the group before"
        ]
        blocks = r"^(?:downsample_layers|stages)\.(\d+)" if coarse else fine
        return {"stem": r"^downsample_layers\.0\.", "blocks": blocks}

    @property
    def patch_embed(self) -> nn.Module:  # type: ignore[override]
        """The stem, [B, in_chans, H, W] -> [B, C, H / 4, W / 4]."""
        stem: nn.Module = self.downsample_layers[0]
        return stem

    def _embed(self, image: Tensor) -> Tensor:
        return tokens(super()._embed(image))

    def _stage(self, index: int, x: Tensor) -> Tensor:
        if index > 0:
            x = tokens(self.downsample_layers[index](x.permute(0, 3, 1, 2)))
        blocks = self.stages[index]["blocks"] if self.swin_layout else self.stages[index]
        y: Tensor = checkpoint_seq(blocks, x) if self.grad_checkpointing else blocks(x)
        return y

    def _keep_stages(self, count: int) -> None:
        super()._keep_stages(count)
        kept = self.downsample_layers[:count]
        kept.training = self.training  # the list's own flag: the modules in it keep theirs
        self.downsample_layers = kept


def tokens(x: Tensor) -> Tensor:
    """[B, C, H, W] -> [B, H, W, C], contiguous."""
    return x.permute(0, 2, 3, 1).contiguous()


class BiFormerSTL(BiFormer):
    """BiFormer's attention in Swin-T's layout; the arguments are those of `BiFormer`."""

    swin_layout = True


class BiFormerSTLnchw(BiFormerSTL):
    """BiFormer-STL with the authors' refactored attention; see the quirks above."""

    refactored = True


class DenseBiFormer(nn.Module):
    """The authors' form for detection and segmentation: a LayerNorm for each map it returns.

    The norms act on the outputs alone: every stage gets the un-normalised map before it.

    Args:
        model: gives its stem and stages; it is not to be used further.
        out_indices: ascending indices of the stages whose maps are returned.
    """

    def __init__(self, model: BiFormer, out_indices: Sequence[int]) -> None:
        super().__init__()
        dd = get_device_dtype(model)
        model.prune_intermediate_layers(list(out_indices), prune_norm=True)
        self.in_chans, self.min_size = model.in_chans, model.min_size
        self.downsample_layers = model.downsample_layers
        self.stages = model.stages
        self.grad_checkpointing = False
        self.out_indices = tuple(out_indices)
        self.extra_norms = nn.ModuleDict(
            {
                str(i): nn.LayerNorm(model.feature_info[i]["num_chs"], eps=1e-6, **dd)
                for i in self.out_indices
            }
        )

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute blocks in the backward pass instead of storing their intermediate values."""
        self.grad_checkpointing = enable

    def forward(self, x: Tensor) -> list[Tensor]:
        """[B, in_chans, H, W] -> maps [B, C, H / stride, W / stride], sizes rounded up."""
        x = checked_image(x, self.in_chans, self.min_size).permute(0, 2, 3, 1)
        maps = []
        for i, (downsample, stage) in enumerate(
            zip(self.downsample_layers, self.stages, strict=True)
        ):
            x = tokens(downsample(x.permute(0, 3, 1, 2)))
            x = checkpoint_seq(stage, x) if self.grad_checkpointing else stage(x)
            if i in self.out_indices:
                maps.append(self.extra_norms[str(i)](x).permute(0, 3, 1, 2).contiguous())
        return maps


_RENAMES = Renames(())  # the authors' names are ours
_BUFFERS = no_buffers  # but for the counters of batch norms, which are ours too
_COUNTER = ".num_batches_tracked"


def checkpoint_filter_fn(state_dict: Mapping[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """A state dict, whose authors' names are ours, for ``model``.

    BatchNorm's counters, where the file has none, stay as they are, as with torch. So do the norms
    of a dense model in a classification checkpoint, as with the authors.
    """
    own = model.state_dict()
    added = {name: x for name, x in own.items() if name.endswith(_COUNTER)}
    if isinstance(model, DenseBiFormer) and "norm.weight" in state_dict:
        added |= {name: x for name, x in own.items() if name.startswith("extra_norms.")}
    return added | dict(state_dict)


_CODE_LICENCE = "MIT"
_README = "README of rayleizhu/BiFormer, 1697bbb"
_PUBLISHED = {
    "biformer_tiny.rayleizhu_in1k": Published(top1=81.4, gflops=2.2, source=_README),
    "biformer_small.rayleizhu_in1k": Published(top1=83.8, gflops=4.5, source=_README),
    "biformer_base.rayleizhu_in1k": Published(top1=84.3, gflops=9.8, source=_README),
    "biformer_stl.rayleizhu_in1k": Published(top1=82.7, gflops=4.6, source=_README),
    "biformer_stl_nchw.rayleizhu_in1k": Published(top1=82.7, gflops=4.6, source=_README),
}
_SHARES = {
    "biformer_tiny": "s!AkBbczdRlZvChHEOoGkgwgQzEDlM",
    "biformer_small": "s!AkBbczdRlZvChHDyM-x9KWRBZ832",
    "biformer_base": "s!AkBbczdRlZvChHI_XPhoadjaNxtO",
    "biformer_stl": "s!AkBbczdRlZvChSf-m7ujkvx9lIQ1",
    "biformer_stl_nchw": "s!AkBbczdRlZvChWYrKbWbMgqd2Ai0",
}
_FOLDER = "the authors' folder, https://1drv.ms/u/s!AkBbczdRlZvChGsXFqAA-PVnA-R8?e=IPlOCG"
_DENSE: Tables = {  # box AP, mask AP, or mIoU of one scale, several
    "mask_rcnn_1x_coco": {"small": (47.8, 43.2, None), "base": (48.6, 43.7, None)},
    "retinanet_1x_coco": {"small": (45.9, None), "base": (47.1, None)},
    "semantic_fpn_80k_ade20k": {"small": (48.9, None), "base": (49.9, None)},
    "upernet_160k_ade20k": {"small": (49.8, 50.8, None), "base": (51.0, 51.7, None)},
}


def _weight(share: str) -> Weight:
    return Weight(
        manual=f"Save https://1drv.ms/u/{share} from a browser, or the file in {_FOLDER}; the "
        f"authors' link to the former, https://api.onedrive.com/v1.0/shares/{share}/root/content, "
        f"answers no longer",
        wrapper="model",
    )


def _dense_weight(_: None, task: str) -> Weight:
    return Weight(unreleased="the authors publish training logs only", task=task)


_dense_weights, _dense_results = dense(
    "rayleizhu", _README, _DENSE, _dense_weight, entry="biformer_{}"
)
_WEIGHTS = {f"{name}.rayleizhu_in1k": _weight(share) for name, share in _SHARES.items()}
_TAGS = tuple(_WEIGHTS)
_WEIGHTS |= _dense_weights
_PUBLISHED |= _dense_results
_ORIGIN = "https://github.com/rayleizhu/BiFormer"


def _cfg(name: str, min_size: int = BiFormer.min_size, **kwargs: Any) -> dict[str, Any]:
    """The rest is timm's default, and the authors': 224 x 224, bicubic, ImageNet's mean and std."""
    return {
        **source_cfg(_WEIGHTS.get(name)),
        "min_input_size": (3, min_size, min_size),
        "pool_size": (7, 7),
        "first_conv": "downsample_layers.0.0",
        "classifier": "head",
        "paper_ids": "arXiv:2303.08810",
        "paper_name": "BiFormer: Vision Transformer with Bi-Level Routing Attention",
        **kwargs,
    }


_SMALL: dict[str, Any] = {
    "num_classes": 10,
    "input_size": (3, 64, 64),
    "pool_size": (2, 2),
    "crop_pct": 1.0,
}
default_cfgs = generate_default_cfgs(
    {
        "biformer_atto.untrained": _cfg("biformer_atto.untrained", **_SMALL),
        **{
            name: _cfg(name, 112 if "_nchw" in name else BiFormer.min_size, origin_url=_ORIGIN)
            for name in _TAGS
        },
    }
)


_create = partial(
    build,
    weights=_WEIGHTS,
    filter_fn=checkpoint_filter_fn,
    feature_cfg={"out_indices": (0, 1, 2, 3)},
)
_DEEP = (4, 4, 18, 4)
_STL = {"embed_dim": 96, "depths": (2, 2, 6, 2), "mlp_ratio": 4.0}


@register
def biformer_atto(pretrained: bool = False, **kwargs: Any) -> BiFormer:
    """1,297,354 parameters (10 classes); ours, for tests and demos, on 64 x 64 pixels."""
    args = {"embed_dim": 32, "depths": (2, 2, 2, 1), "head_dim": 16, "mlp_ratio": 2.0}
    args |= {"num_regions": 4, "topks": (1, 2, 4, None)}
    return _create(BiFormer, "biformer_atto", pretrained, **{**args, **kwargs})


@register
def biformer_tiny(pretrained: bool = False, **kwargs: Any) -> BiFormer:
    """13,142,760 parameters, 2.2 GFLOPs at 224 x 224, ImageNet-1k top-1 81.4 % (published)."""
    return _create(BiFormer, "biformer_tiny", pretrained, **kwargs)


@register
def biformer_small(pretrained: bool = False, **kwargs: Any) -> BiFormer:
    """25,536,232 parameters, 4.5 GFLOPs at 224 x 224, ImageNet-1k top-1 83.8 % (published)."""
    return _create(BiFormer, "biformer_small", pretrained, **{"depths": _DEEP, **kwargs})


@register
def biformer_base(pretrained: bool = False, **kwargs: Any) -> BiFormer:
    """56,804,968 parameters, 9.8 GFLOPs at 224 x 224, ImageNet-1k top-1 84.3 % (published)."""
    args = {"embed_dim": 96, "depths": _DEEP}
    return _create(BiFormer, "biformer_base", pretrained, **{**args, **kwargs})


@register
def biformer_stl(pretrained: bool = False, **kwargs: Any) -> BiFormerSTL:
    """28,372,552 parameters, 4.6 GFLOPs at 224 x 224, ImageNet-1k top-1 82.7 % (published)."""
    return _create(BiFormerSTL, "biformer_stl", pretrained, **{**_STL, **kwargs})


@register
def biformer_stl_nchw(pretrained: bool = False, **kwargs: Any) -> BiFormerSTLnchw:
    """28,372,552 parameters, 4.6 GFLOPs at 224 x 224, ImageNet-1k top-1 82.7 % (published)."""
    return _create(BiFormerSTLnchw, "biformer_stl_nchw", pretrained, **{**_STL, **kwargs})


_REGIONS = {"det": 16, "seg": 8}


def dense_kwargs(entry: str, task: str, kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The model's arguments in detection (``det``: COCO) and segmentation (``seg``: ADE20K).

    Only the number of regions differs from classification.

    Args:
        entry: the model's entry.
        task: ``det`` or ``seg``.
        kwargs: what the caller asks for, which counts more.
    """
    return {"num_regions": _REGIONS[task], **kwargs}


def dense_adapter(model: BiFormer, task: str, out_indices: Sequence[int]) -> DenseBiFormer:
    """The authors' backbone of detection and of segmentation: a norm for each map."""
    if model.swin_layout:
        raise ValueError(
            f"task: expected None, BiFormer-STL has no form of its own for it, got {task!r}"
        )
    return DenseBiFormer(model, out_indices)
