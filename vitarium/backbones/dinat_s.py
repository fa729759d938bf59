"""DiNAT_s: dilated neighborhood attention in Swin's architecture (arXiv 2209.15001).

Authors' code: SHI-Labs/Neighborhood-Attention-Transformer, commit d334f5b, MIT licence.

Swin with neighborhood attention in place of its windows (even blocks) and with dilated neighborhood
attention in place of its shifted windows (odd blocks). Any image of at least 32 x 32 pixels works.

Quirks:
    - Images whose sides are no multiples of 4 are padded with zeros at the right and bottom before
      the patch convolution; maps of odd size likewise before merging, and the padding enters
      the merging's LayerNorm.
    - Merging concatenates the 2 x 2 tokens (row, column) in the order 00, 10, 01, 11.
    - Every LayerNorm has eps 1e-5. There is no layer scale.
    - The list of levels is called ``layers``, not ``levels`` as in NAT.
    - The 384-pixel model has other dilations (13, 6, 3), so have detection and segmentation, see
      `dense_kwargs`.
    - A map smaller than kernel x dilation is padded to it, as in NAT, block by block.
    - The authors trained with stochastic depth of 0.2 (tiny), 0.3 (small), 0.5 (base), 0.35
      (large) and 0.2 (large on ImageNet-22k).

Shapes: B images, H x W tokens of the level at hand, C channels. Tokens are [B, H, W, C].
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from timm.models import generate_default_cfgs

from vitarium.backbones._blocks import (
    DensePyramid,
    NeighborhoodPyramid,
    Patches,
    PatchMerging,
    checkpoint_filter_fn,
    cycled,
    no_buffers,
)
from vitarium.backbones._registry import Published, build, register, source_cfg
from vitarium.backbones._released import Tables, dense
from vitarium.checkpoints import Renames, Weight

__all__ = ["DiNATs"]


class DiNATs(NeighborhoodPyramid):
    """Dilated Neighborhood Attention Transformer with patches and patch merging, as Swin has.

    The arguments are those of `NeighborhoodPyramid`.
    """

    stages_name = "layers"
    stem = partial(Patches, 4)
    downsample = PatchMerging


_RENAMES = Renames(())  # the authors' names are ours
_BUFFERS = no_buffers
_RESIZES = {"*.rpb": "bicubic"}
_CODE_LICENCE = "MIT"
_README = "README of SHI-Labs/Neighborhood-Attention-Transformer, d334f5b"
_PUBLISHED = {
    "dinat_s_tiny.shi_in1k": Published(top1=81.8, gflops=4.5, source=_README),
    "dinat_s_small.shi_in1k": Published(top1=83.5, gflops=8.7, source=_README),
    "dinat_s_base.shi_in1k": Published(top1=83.8, gflops=15.4, source=_README),
    "dinat_s_large.shi_in22k_ft_in1k": Published(top1=86.5, gflops=34.5, source=_README),
    "dinat_s_large_384.shi_in22k_ft_in1k": Published(top1=87.4, gflops=101.5, source=_README),
}
_URL = "https://shi-labs.com/projects/dinat/checkpoints"

_DENSE: Tables = {  # box AP and mask AP, or mIoU of one scale and of several; the file
    "mask_rcnn_3x_coco": {
        "dinat_s_tiny": (46.6, 42.1, "coco/maskrcnn_dinat_s_tiny"),
        "dinat_s_small": (48.6, 43.5, "coco/maskrcnn_dinat_s_small"),
    },
    "cascade_mask_rcnn_3x_coco": {
        "dinat_s_tiny": (51.0, 44.1, "coco/cascadedmaskrcnn_dinat_s_tiny"),
        "dinat_s_small": (52.3, 45.2, "coco/cascadedmaskrcnn_dinat_s_small"),
        "dinat_s_base": (52.6, 45.3, "coco/cascadedmaskrcnn_dinat_s_base"),
        "dinat_s_large": (54.8, 47.2, "coco/cascadedmaskrcnn_dinat_s_large"),
    },
    "upernet_160k_ade20k": {
        "dinat_s_tiny": (46.0, 47.4, "ade20k/upernet_dinat_s_tiny"),
        "dinat_s_small": (48.6, 49.9, "ade20k/upernet_dinat_s_small"),
        "dinat_s_base": (49.4, 50.2, "ade20k/upernet_dinat_s_base"),
        "dinat_s_large": (53.4, 54.6, "ade20k/upernet_dinat_s_large"),
    },
}


def _in1k(size: str, pixels: int) -> Weight:
    """The authors' code and one of their tables name the same file differently."""
    names = (f"{_URL}/imagenet1k/dinat_s_{size}_{data}_{pixels}.pth" for data in ("in1k", "1k"))
    url, mirror = names
    return Weight(url=url, mirrors=(mirror,), wrapper="plain")


def _dense_weight(file: str, task: str) -> Weight:
    """Training states of mmcv, as the authors load them."""
    return Weight(url=f"{_URL}/{file}.pth", wrapper="state_dict", task=task)


_WEIGHTS = {
    "dinat_s_tiny.shi_in1k": _in1k("tiny", 224),
    "dinat_s_small.shi_in1k": _in1k("small", 224),
    "dinat_s_base.shi_in1k": _in1k("base", 224),
    "dinat_s_large.shi_in22k_ft_in1k": _in1k("large", 224),
    "dinat_s_large.shi_in22k": Weight(
        url=f"{_URL}/imagenet22k/dinat_s_large_in22k_224.pth", wrapper="plain"
    ),
    "dinat_s_large_384.shi_in22k_ft_in1k": _in1k("large", 384),
}
_TAGS = tuple(_WEIGHTS)
_dense_weights, _dense_results = dense("shi", _README, _DENSE, _dense_weight)
_WEIGHTS |= _dense_weights
_PUBLISHED |= _dense_results
_ORIGIN = "https://github.com/SHI-Labs/Neighborhood-Attention-Transformer"


def _cfg(name: str, **kwargs: Any) -> dict[str, Any]:
    """The rest is timm's default, and the authors': 224 x 224, bicubic, ImageNet's mean and std."""
    return {
        **source_cfg(_WEIGHTS.get(name)),
        "min_input_size": (3, DiNATs.min_size, DiNATs.min_size),
        "pool_size": (7, 7),
        "first_conv": "patch_embed.proj",
        "classifier": "head",
        "paper_ids": "arXiv:2209.15001",
        "paper_name": "Dilated Neighborhood Attention Transformer",
        **kwargs,
    }


_SMALL = {"num_classes": 10, "input_size": (3, 64, 64), "pool_size": (2, 2), "crop_pct": 1.0}
_CHANGES: dict[str, dict[str, Any]] = {
    # The authors state no number of classes; this is the usual one of ImageNet-22k.
    "dinat_s_large.shi_in22k": {"num_classes": 21841},
    "dinat_s_large_384.shi_in22k_ft_in1k": {
        "input_size": (3, 384, 384),
        "pool_size": (12, 12),
        "crop_pct": 1.0,
    },
}
default_cfgs = generate_default_cfgs(
    {
        "dinat_s_atto.untrained": _cfg("dinat_s_atto.untrained", **_SMALL),
        **{name: _cfg(name, origin_url=_ORIGIN, **_CHANGES.get(name, {})) for name in _TAGS},
    }
)


_TINY = {
    "embed_dim": 96,
    "depths": (2, 2, 6, 2),
    "num_heads": (3, 6, 12, 24),
    "dilations": (8, 4, 2, 1),
    "mlp_ratio": 4.0,
}
_LARGE = {"embed_dim": 192, "depths": (2, 2, 18, 2), "num_heads": (6, 12, 24, 48)}
_VARIANTS: dict[str, dict[str, Any]] = {
    "dinat_s_atto": {
        "embed_dim": 32,
        "depths": (2, 2, 2, 1),
        "num_heads": (1, 2, 4, 8),
        "kernel_size": (5, 3, 3, 3),
        "dilations": (3, 2, 1, 1),
        "mlp_ratio": 2.0,
    },
    "dinat_s_tiny": _TINY,
    "dinat_s_small": _TINY | {"depths": (2, 2, 18, 2)},
    "dinat_s_base": _TINY
    | {"embed_dim": 128, "depths": (2, 2, 18, 2), "num_heads": (4, 8, 16, 32)},
    "dinat_s_large": _TINY | _LARGE,
    "dinat_s_large_384": _TINY | _LARGE | {"dilations": (13, 6, 3, 1)},
}
_create = partial(
    build,
    DiNATs,
    weights=_WEIGHTS,
    filter_fn=checkpoint_filter_fn,
    feature_cfg={"out_indices": (0, 1, 2, 3)},
)


@register
def dinat_s_atto(pretrained: bool = False, **kwargs: Any) -> DiNATs:
    """1,055,296 parameters (10 classes); ours, for tests and demos, on 64 x 64 pixels."""
    return _create("dinat_s_atto", pretrained, **{**_VARIANTS["dinat_s_atto"], **kwargs})


@register
def dinat_s_tiny(pretrained: bool = False, **kwargs: Any) -> DiNATs:
    """28,288,354 parameters, 4.5 GFLOPs at 224 x 224, ImageNet-1k top-1 81.8 % (published)."""
    return _create("dinat_s_tiny", pretrained, **{**_VARIANTS["dinat_s_tiny"], **kwargs})


@register
def dinat_s_small(pretrained: bool = False, **kwargs: Any) -> DiNATs:
    """49,606,258 parameters, 8.7 GFLOPs at 224 x 224, ImageNet-1k top-1 83.5 % (published)."""
    return _create("dinat_s_small", pretrained, **{**_VARIANTS["dinat_s_small"], **kwargs})


@register
def dinat_s_base(pretrained: bool = False, **kwargs: Any) -> DiNATs:
    """87,768,224 parameters, 15.4 GFLOPs at 224 x 224, ImageNet-1k top-1 83.8 % (published)."""
    return _create("dinat_s_base", pretrained, **{**_VARIANTS["dinat_s_base"], **kwargs})


@register
def dinat_s_large(pretrained: bool = False, **kwargs: Any) -> DiNATs:
    """196,532,476 parameters, 34.5 GFLOPs at 224 x 224, ImageNet-1k top-1 86.5 % (published)."""
    return _create("dinat_s_large", pretrained, **{**_VARIANTS["dinat_s_large"], **kwargs})


@register
def dinat_s_large_384(pretrained: bool = False, **kwargs: Any) -> DiNATs:
    """196,532,476 parameters, 101.5 GFLOPs at 384 x 384, ImageNet-1k top-1 87.4 % (published)."""
    return _create("dinat_s_large_384", pretrained, **{**_VARIANTS["dinat_s_large_384"], **kwargs})


_COCO = ((28,), (14,), (3, 5, 7), (3,))
_ADE20K = ((16,), (8,), (2, 3, 4), (2,))
_ADE20K_640 = ((20,), (10,), (2, 3, 4, 5, 2, 3, 4, 5, 5), (2,))  # large was trained at 640


def dense_kwargs(entry: str, task: str, kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The model's arguments in detection (``det``: COCO) and segmentation (``seg``: ADE20K).

    Only the dilations differ from classification.

    Args:
        entry: the model's entry.
        task: ``det`` or ``seg``.
        kwargs: what the caller asks for, which counts more.
    """
    depths = kwargs.get("depths", _VARIANTS[entry]["depths"])
    cycles = _COCO if task == "det" else _ADE20K_640 if "large" in entry else _ADE20K
    return {"dilations": cycled(cycles, depths), **kwargs}


def dense_adapter(model: DiNATs, task: str, out_indices: Sequence[int]) -> DensePyramid:
    """The authors' backbone of detection and of segmentation: a norm for each map."""
    return DensePyramid(model, out_indices)
