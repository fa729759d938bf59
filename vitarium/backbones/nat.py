"""NAT: Neighborhood Attention Transformer (Hassani et al., CVPR 2023, arXiv 2204.07143).

Authors' code: SHI-Labs/Neighborhood-Attention-Transformer, commit d334f5b, MIT licence.

A pyramid of four resolutions in which every token attends to the window of tokens nearest to it.
Unusual: overlapping convolutions in place of patches, and the LayerNorm follows the downsampling
convolution instead of preceding it. Any image of at least 32 x 32 pixels works.

Quirks:
    - The stem's two convolutions have no activation and no norm between them.
    - The downsampling convolution has no bias.
    - Every LayerNorm has eps 1e-5.
    - The classifier normalises all tokens and averages afterwards.
    - Maps smaller than the kernel are padded with zero tokens *before* the qkv projection (as
      natten 0.14 does, with which the models were trained): a padded position has the qkv bias as
      query, key and value, and is attended to.
    - ``rpb`` is added after scaling, and indexed by key minus query.
    - The authors trained with stochastic depth of 0.2 (mini, tiny), 0.3 (small) and 0.5 (base).

Shapes: B images, H x W tokens of the stage at hand, C channels. Tokens are [B, H, W, C].
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, ClassVar

from timm.models import generate_default_cfgs
from torch import Tensor, nn

from vitarium.backbones._blocks import (
    DensePyramid,
    NeighborhoodPyramid,
    checkpoint_filter_fn,
    no_buffers,
)
from vitarium.backbones._nat_transformers import to_transformers as to_transformers
from vitarium.backbones._registry import Published, build, register, source_cfg
from vitarium.backbones._released import Tables, dense, transformers_copy
from vitarium.checkpoints import Renames, Weight

__all__ = ["NAT"]


class ConvStem(nn.Module):
    """Two strided 3 x 3 convolutions and a LayerNorm: a quarter of the resolution."""

    def __init__(self, in_chans: int, dim: int, **dd: Any) -> None:
        super().__init__()
        self.proj = nn.Sequential(
            nn.Conv2d(in_chans, dim // 2, 3, stride=2, padding=1, **dd),
            nn.Conv2d(dim // 2, dim, 3, stride=2, padding=1, **dd),
        )
        self.norm = nn.LayerNorm(dim, **dd)

    def forward(self, x: Tensor) -> Tensor:
        """[B, in_chans, H, W] -> [B, ceil(H / 4), ceil(W / 4), C]."""
        return self.norm(self.proj(x).permute(0, 2, 3, 1))


class ConvDownsample(nn.Module):
    """A strided 3 x 3 convolution and a LayerNorm: half the resolution, twice the channels."""

    def __init__(self, dim: int, **dd: Any) -> None:
        super().__init__()
        self.reduction = nn.Conv2d(dim, 2 * dim, 3, stride=2, padding=1, bias=False, **dd)
        self.norm = nn.LayerNorm(2 * dim, **dd)

    def forward(self, x: Tensor) -> Tensor:
        """[B, H, W, C] -> [B, ceil(H / 2), ceil(W / 2), 2C]."""
        return self.norm(self.reduction(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1))


class NAT(NeighborhoodPyramid):
    """Neighborhood Attention Transformer; the arguments are those of `NeighborhoodPyramid`."""

    stem = ConvStem
    downsample = ConvDownsample
    transformers_prefix: ClassVar[str] = "nat."  # of names in the library transformers


_RENAMES = Renames(())  # the authors' names are ours
_BUFFERS = no_buffers
_RESIZES = {"*.rpb": "bicubic"}


_CODE_LICENCE = "MIT"
_README = "README of SHI-Labs/Neighborhood-Attention-Transformer, d334f5b"
_PUBLISHED = {
    "nat_mini.shi_in1k": Published(top1=81.8, gflops=2.7, source=_README),
    "nat_tiny.shi_in1k": Published(top1=83.2, gflops=4.3, source=_README),
    "nat_small.shi_in1k": Published(top1=83.7, gflops=7.8, source=_README),
    "nat_base.shi_in1k": Published(top1=84.3, gflops=13.7, source=_README),
}
_URL = "https://shi-labs.com/projects/nat/checkpoints"
_DENSE: Tables = {  # box AP and mask AP, or mIoU of one scale and of several; the file
    "mask_rcnn_3x_coco": {
        "nat_mini": (46.5, 41.7, "DET/nat_mini_maskrcnn"),
        "nat_tiny": (47.7, 42.6, "DET/nat_tiny_maskrcnn"),
        "nat_small": (48.4, 43.2, "DET/nat_small_maskrcnn"),
    },
    "cascade_mask_rcnn_3x_coco": {
        "nat_mini": (50.3, 43.6, "DET/nat_mini_cascademaskrcnn"),
        "nat_tiny": (51.4, 44.5, "DET/nat_tiny_cascademaskrcnn"),
        "nat_small": (52.0, 44.9, "DET/nat_small_cascademaskrcnn"),
        "nat_base": (52.3, 45.1, "DET/nat_base_cascademaskrcnn"),
    },
    "upernet_160k_ade20k": {
        "nat_mini": (45.1, 46.4, "SEG/nat_mini_upernet"),
        "nat_tiny": (47.1, 48.4, "SEG/nat_tiny_upernet"),
        "nat_small": (48.0, 49.5, "SEG/nat_small_upernet"),
        "nat_base": (48.5, 49.7, "SEG/nat_base_upernet"),
    },
}


def _weight(file: str, task: str) -> Weight:
    """The classifiers are bare, the others mmcv's training states, as the authors load them."""
    wrapper = "plain" if task == "cls" else "state_dict"
    return Weight(url=f"{_URL}/{file}.pth", wrapper=wrapper, task=task)


_DIGITS = "nat_atto.vitarium_digits"
_WEIGHTS = {
    _DIGITS: Weight(
        file=f"{_DIGITS}.safetensors",
        size=5_637_312,
        sha256="1a6603596bff38e5bb839ef4086af8b1e329acea1961df896b5103d212e052dd",
        wrapper="plain",
        licence="Apache-2.0",
    ),
    **{name: _weight(f"CLS/{name.partition('.')[0]}", "cls") for name in _PUBLISHED},
    "nat_mini.shi_in1k_hf": transformers_copy("nat-mini-in1k-224"),
    "nat_tiny.shi_in1k_hf": transformers_copy("nat-tiny-in1k-224"),
    "nat_small.shi_in1k_hf": transformers_copy("nat-small-in1k-224"),
    "nat_base.shi_in1k_hf": transformers_copy("nat-base-in1k-224"),
}
_TAGS = tuple(_WEIGHTS)
_dense_weights, _dense_results = dense("shi", _README, _DENSE, _weight)
_WEIGHTS |= _dense_weights
_PUBLISHED |= _dense_results


def _cfg(name: str, **kwargs: Any) -> dict[str, Any]:
    """The rest is timm's default, and the authors': 224 x 224, bicubic, ImageNet's mean and std."""
    return {
        **source_cfg(_WEIGHTS[name]),
        "min_input_size": (3, NAT.min_size, NAT.min_size),
        "pool_size": (7, 7),
        "first_conv": "patch_embed.proj.0",
        "classifier": "head",
        "paper_ids": "arXiv:2204.07143",
        "paper_name": "Neighborhood Attention Transformer",
        **kwargs,
    }


_ORIGIN = "https://github.com/SHI-Labs/Neighborhood-Attention-Transformer"
_HALF = (0.5, 0.5, 0.5)
_SMALL = {"num_classes": 10, "input_size": (3, 64, 64), "pool_size": (2, 2), "crop_pct": 1.0}
default_cfgs = generate_default_cfgs(
    {
        _DIGITS: _cfg(_DIGITS, mean=_HALF, std=_HALF, **_SMALL),
        **{name: _cfg(name, origin_url=_ORIGIN) for name in _TAGS if name != _DIGITS},
    }
)


_create = partial(
    build,
    NAT,
    weights=_WEIGHTS,
    filter_fn=checkpoint_filter_fn,
    feature_cfg={"out_indices": (0, 1, 2, 3)},
)


_DEEP = (3, 4, 18, 5)
_SCALED = {"mlp_ratio": 2.0, "layer_scale": 1e-5}


@register
def nat_atto(pretrained: bool = False, **kwargs: Any) -> NAT:
    """1,405,940 parameters (10 classes); ours, for tests and demos, on 64 x 64 digits."""
    args = {"embed_dim": 32, "depths": (2, 2, 3, 1), "num_heads": (1, 2, 4, 8), "mlp_ratio": 2.0}
    return _create("nat_atto", pretrained, **{**args, "kernel_size": (7, 5, 3, 3), **kwargs})


@register
def nat_mini(pretrained: bool = False, **kwargs: Any) -> NAT:
    """19,984,174 parameters, 2.7 GFLOPs at 224 x 224, ImageNet-1k top-1 81.8 % (published)."""
    args = {"embed_dim": 64, "depths": (3, 4, 6, 5), "num_heads": (2, 4, 8, 16), "mlp_ratio": 3.0}
    return _create("nat_mini", pretrained, **{**args, **kwargs})


@register
def nat_tiny(pretrained: bool = False, **kwargs: Any) -> NAT:
    """27,901,582 parameters, 4.3 GFLOPs at 224 x 224, ImageNet-1k top-1 83.2 % (published)."""
    args = {"embed_dim": 64, "depths": _DEEP, "num_heads": (2, 4, 8, 16), "mlp_ratio": 3.0}
    return _create("nat_tiny", pretrained, **{**args, **kwargs})


@register
def nat_small(pretrained: bool = False, **kwargs: Any) -> NAT:
    """50,743,297 parameters, 7.8 GFLOPs at 224 x 224, ImageNet-1k top-1 83.7 % (published)."""
    args = {"embed_dim": 96, "depths": _DEEP, "num_heads": (3, 6, 12, 24), **_SCALED}
    return _create("nat_small", pretrained, **{**args, **kwargs})


@register
def nat_base(pretrained: bool = False, **kwargs: Any) -> NAT:
    """89,769,652 parameters, 13.7 GFLOPs at 224 x 224, ImageNet-1k top-1 84.3 % (published)."""
    args = {"embed_dim": 128, "depths": _DEEP, "num_heads": (4, 8, 16, 32), **_SCALED}
    return _create("nat_base", pretrained, **{**args, **kwargs})


def dense_adapter(model: NAT, task: str, out_indices: Sequence[int]) -> DensePyramid:
    """The authors' backbone of detection and of segmentation (``task``), which are the same."""
    return DensePyramid(model, out_indices)
