"""DiNAT: Dilated Neighborhood Attention Transformer (Hassani & Shi, 2022, arXiv 2209.15001).

Authors' code: SHI-Labs/Neighborhood-Attention-Transformer, commit d334f5b, MIT licence.

NAT in which every second block's window is dilated, so that it reaches over most of the map at the
price of a small one. Any image of at least 32 x 32 pixels works.

Quirks:
    - Blocks are counted in each level: its even ones (0, 2, ...) have dilation 1, its odd ones the
      level's dilation. NAT and DiNAT of one size have the same parameters.
    - ``dinat_small`` has no layer scale, though ``nat_small`` has.
    - The 384-pixel model with 7 x 7 windows has other dilations (13, 6, 3) than the 224-pixel one;
      the one with 11 x 11 windows keeps 8, 4, 2. Its ImageNet-22k weights are those for 7 x 7 with
      position tables resized bicubically.
    - Detection and segmentation have dilations of their own, see `dense_kwargs`.
    - A map smaller than kernel x dilation is padded to it, as in NAT, block by block.
    - The authors trained with stochastic depth of 0.2 (mini, tiny), 0.3 (small), 0.5 (base), 0.35
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
    checkpoint_filter_fn,
    cycled,
    no_buffers,
)
from vitarium.backbones._nat_transformers import to_transformers as to_transformers
from vitarium.backbones._registry import Published, build, register, source_cfg
from vitarium.backbones._released import Tables, dense, transformers_copy
from vitarium.backbones.nat import NAT
from vitarium.checkpoints import Renames, Weight

__all__ = ["DiNAT"]


class DiNAT(NAT):
    """Dilated Neighborhood Attention Transformer: NAT with ``dilations``.

    The arguments are those of `NeighborhoodPyramid`.
    """

    transformers_prefix = "dinat."


_RENAMES = Renames(())  # the authors' names are ours
_BUFFERS = no_buffers
_RESIZES = {"*.rpb": "bicubic"}
_CODE_LICENCE = "MIT"
_README = "README of SHI-Labs/Neighborhood-Attention-Transformer, d334f5b"
_PUBLISHED = {
    "dinat_mini.shi_in1k": Published(top1=81.8, gflops=2.7, source=_README),
    "dinat_tiny.shi_in1k": Published(top1=82.7, gflops=4.3, source=_README),
    "dinat_small.shi_in1k": Published(top1=83.8, gflops=7.8, source=_README),
    "dinat_base.shi_in1k": Published(top1=84.4, gflops=13.7, source=_README),
    "dinat_large.shi_in22k_ft_in1k": Published(top1=86.6, gflops=30.6, source=_README),
    "dinat_large_384.shi_in22k_ft_in1k": Published(top1=87.4, gflops=89.7, source=_README),
    "dinat_large_11x11.shi_in22k_ft_in1k_384": Published(top1=87.5, gflops=92.4, source=_README),
}
_FILES = {
    "dinat_mini.shi_in1k": "imagenet1k/dinat_mini_in1k_224",
    "dinat_tiny.shi_in1k": "imagenet1k/dinat_tiny_in1k_224",
    "dinat_small.shi_in1k": "imagenet1k/dinat_small_in1k_224",
    "dinat_base.shi_in1k": "imagenet1k/dinat_base_in1k_224",
    "dinat_large.shi_in22k_ft_in1k": "imagenet1k/dinat_large_in22k_in1k_224",
    "dinat_large.shi_in22k": "imagenet22k/dinat_large_in22k_224",
    "dinat_large_384.shi_in22k_ft_in1k": "imagenet1k/dinat_large_in22k_in1k_384",
    "dinat_large_11x11.shi_in22k_ft_in1k_384": "imagenet1k/dinat_large_in22k_in1k_384_11x11",
    "dinat_large_11x11.shi_in22k": "imagenet22k/dinat_large_in22k_224_11x11interp",
}
_URL = "https://shi-labs.com/projects/dinat/checkpoints"
_COPIES = {
    "dinat_mini.shi_in1k_hf": "dinat-mini-in1k-224",
    "dinat_tiny.shi_in1k_hf": "dinat-tiny-in1k-224",
    "dinat_small.shi_in1k_hf": "dinat-small-in1k-224",
    "dinat_base.shi_in1k_hf": "dinat-base-in1k-224",
    "dinat_large.shi_in22k_ft_in1k_hf": "dinat-large-in22k-in1k-224",
    "dinat_large_384.shi_in22k_ft_in1k_hf": "dinat-large-in22k-in1k-384",
    "dinat_large_11x11.shi_in22k_ft_in1k_384_hf": "dinat-large-11x11-in22k-in1k-384",
}
_DENSE: Tables = {  # box AP and mask AP, or mIoU of one scale and of several; the file
    "mask_rcnn_3x_coco": {
        "dinat_mini": (47.2, 42.5, "coco/maskrcnn_dinat_mini"),
        "dinat_tiny": (48.6, 43.5, "coco/maskrcnn_dinat_tiny"),
        "dinat_small": (49.3, 44.0, "coco/maskrcnn_dinat_small"),
    },
    "cascade_mask_rcnn_3x_coco": {
        "dinat_mini": (51.2, 44.4, "coco/cascadedmaskrcnn_dinat_mini"),
        "dinat_tiny": (52.2, 45.1, "coco/cascadedmaskrcnn_dinat_tiny"),
        "dinat_small": (52.9, 45.8, "coco/cascadedmaskrcnn_dinat_small"),
        "dinat_base": (53.4, 46.2, "coco/cascadedmaskrcnn_dinat_base"),
        "dinat_large": (55.3, 47.8, "coco/cascadedmaskrcnn_dinat_large"),
    },
    "upernet_160k_ade20k": {
        "dinat_mini": (45.8, 47.2, "ade20k/upernet_dinat_mini"),
        "dinat_tiny": (47.8, 48.8, "ade20k/upernet_dinat_tiny"),
        "dinat_small": (48.9, 49.9, "ade20k/upernet_dinat_small"),
        "dinat_base": (49.6, 50.4, "ade20k/upernet_dinat_base"),
        "dinat_large": (54.0, 54.9, "ade20k/upernet_dinat_large"),
    },
}
_MASK2FORMER: dict[str, dict[str, float]] = {  # all with windows of 11 x 11
    "coco_instance": {"AP": 50.8},
    "coco_panoptic": {"PQ": 58.5},
    "ade20k_instance": {"AP": 35.4},
    "ade20k_panoptic": {"PQ": 49.4},
    "ade20k_semantic": {"mIoU ms": 58.1},
    "cityscapes_instance": {"AP": 45.1},
    "cityscapes_panoptic": {"PQ": 67.2},
    "cityscapes_semantic": {"mIoU ms": 84.5},
}


def _weight(file: str, task: str) -> Weight:
    """The classifiers are bare, detectors mmcv's training states, as the authors load them."""
    wrapper = "plain" if task == "cls" else "state_dict"
    return Weight(url=f"{_URL}/{file}.pth", wrapper=wrapper, task=task)


_dense_weights, _dense_results = dense("shi", _README, _DENSE, _weight)
_WEIGHTS = {
    **{name: _weight(file, "cls") for name, file in _FILES.items()},
    **{name: transformers_copy(repository) for name, repository in _COPIES.items()},
    **_dense_weights,
}
_PUBLISHED |= _dense_results
_data_sets = {"coco": "COCO", "ade20k": "ADE20K", "cityscapes": "Cityscapes"}
for _setting, _metrics in _MASK2FORMER.items():
    _name = f"dinat_large_11x11.shi_mask2former_{_setting}"
    # What surrounds the tensors of these is not stated.
    _WEIGHTS[_name] = Weight(url=f"{_URL}/m2f/mask2former_dinat_large_{_setting}.pth", task="seg")
    _data, _, _kind = _setting.partition("_")
    _described = f"Mask2Former, {_data_sets[_data]}, {_kind}"
    _PUBLISHED[_name] = Published(source=_README, setting=_described, metrics=_metrics)
_ORIGIN = "https://github.com/SHI-Labs/Neighborhood-Attention-Transformer"


def _cfg(name: str, **kwargs: Any) -> dict[str, Any]:
    """The rest is timm's default, and the authors': 224 x 224, bicubic, ImageNet's mean and std."""
    return {
        **source_cfg(_WEIGHTS.get(name)),
        "min_input_size": (3, DiNAT.min_size, DiNAT.min_size),
        "pool_size": (7, 7),
        "first_conv": "patch_embed.proj.0",
        "classifier": "head",
        "paper_ids": "arXiv:2209.15001",
        "paper_name": "Dilated Neighborhood Attention Transformer",
        **kwargs,
    }


_SMALL = {"num_classes": 10, "input_size": (3, 64, 64), "pool_size": (2, 2), "crop_pct": 1.0}
_384 = {"input_size": (3, 384, 384), "pool_size": (12, 12), "crop_pct": 1.0}
# The authors state no number of classes; this is the usual one of ImageNet-22k.
_22K = {"num_classes": 21841}
_CHANGES: dict[str, dict[str, Any]] = {
    "dinat_large.shi_in22k": _22K,
    "dinat_large_384.shi_in22k_ft_in1k": _384,
    "dinat_large_11x11.shi_in22k_ft_in1k_384": _384,
    "dinat_large_11x11.shi_in22k": _22K,
}
default_cfgs = generate_default_cfgs(
    {
        "dinat_atto.untrained": _cfg("dinat_atto.untrained", **_SMALL),
        **{
            name: _cfg(name, origin_url=_ORIGIN, **_CHANGES.get(name.removesuffix("_hf"), {}))
            for name in (*_FILES, *_COPIES)
        },
    }
)


_MINI = {"embed_dim": 64, "depths": (3, 4, 6, 5), "num_heads": (2, 4, 8, 16), "mlp_ratio": 3.0}
_TINY = {**_MINI, "depths": (3, 4, 18, 5)}
_LARGE = {**_TINY, "embed_dim": 192, "num_heads": (6, 12, 24, 48), "mlp_ratio": 2.0}
_224 = {"dilations": (8, 4, 2, 1)}
_VARIANTS: dict[str, dict[str, Any]] = {
    "dinat_atto": {
        "embed_dim": 32,
        "depths": (2, 2, 3, 1),
        "num_heads": (1, 2, 4, 8),
        "kernel_size": (5, 3, 3, 3),
        "dilations": (3, 2, 1, 1),
        "mlp_ratio": 2.0,
    },
    "dinat_mini": _MINI | _224,
    "dinat_tiny": _TINY | _224,
    "dinat_small": _TINY | _224 | {"embed_dim": 96, "num_heads": (3, 6, 12, 24), "mlp_ratio": 2.0},
    "dinat_base": _TINY
    | _224
    | {"embed_dim": 128, "num_heads": (4, 8, 16, 32), "mlp_ratio": 2.0, "layer_scale": 1e-5},
    "dinat_large": _LARGE | _224,
    "dinat_large_384": _LARGE | {"dilations": (13, 6, 3, 1)},
    "dinat_large_11x11": _LARGE | _224 | {"kernel_size": 11},
}
_create = partial(
    build,
    DiNAT,
    weights=_WEIGHTS,
    filter_fn=checkpoint_filter_fn,
    feature_cfg={"out_indices": (0, 1, 2, 3)},
)


@register
def dinat_atto(pretrained: bool = False, **kwargs: Any) -> DiNAT:
    """1,405,540 parameters (10 classes); ours, for tests and demos, on 64 x 64 pixels."""
    return _create("dinat_atto", pretrained, **{**_VARIANTS["dinat_atto"], **kwargs})


@register
def dinat_mini(pretrained: bool = False, **kwargs: Any) -> DiNAT:
    """19,984,174 parameters, 2.7 GFLOPs at 224 x 224, ImageNet-1k top-1 81.8 % (published)."""
    return _create("dinat_mini", pretrained, **{**_VARIANTS["dinat_mini"], **kwargs})


@register
def dinat_tiny(pretrained: bool = False, **kwargs: Any) -> DiNAT:
    """27,901,582 parameters, 4.3 GFLOPs at 224 x 224, ImageNet-1k top-1 82.7 % (published)."""
    return _create("dinat_tiny", pretrained, **{**_VARIANTS["dinat_tiny"], **kwargs})


@register
def dinat_small(pretrained: bool = False, **kwargs: Any) -> DiNAT:
    """50,719,681 parameters, 7.8 GFLOPs at 224 x 224, ImageNet-1k top-1 83.8 % (published)."""
    return _create("dinat_small", pretrained, **{**_VARIANTS["dinat_small"], **kwargs})


@register
def dinat_base(pretrained: bool = False, **kwargs: Any) -> DiNAT:
    """89,769,652 parameters, 13.7 GFLOPs at 224 x 224, ImageNet-1k top-1 84.4 % (published)."""
    return _create("dinat_base", pretrained, **{**_VARIANTS["dinat_base"], **kwargs})


@register
def dinat_large(pretrained: bool = False, **kwargs: Any) -> DiNAT:
    """200,943,514 parameters, 30.6 GFLOPs at 224 x 224, ImageNet-1k top-1 86.6 % (published)."""
    return _create("dinat_large", pretrained, **{**_VARIANTS["dinat_large"], **kwargs})


@register
def dinat_large_384(pretrained: bool = False, **kwargs: Any) -> DiNAT:
    """200,943,514 parameters, 89.7 GFLOPs at 384 x 384, ImageNet-1k top-1 87.4 % (published)."""
    return _create("dinat_large_384", pretrained, **{**_VARIANTS["dinat_large_384"], **kwargs})


@register
def dinat_large_11x11(pretrained: bool = False, **kwargs: Any) -> DiNAT:
    """201,144,250 parameters, 92.4 GFLOPs at 384 x 384, ImageNet-1k top-1 87.5 % (published)."""
    return _create("dinat_large_11x11", pretrained, **{**_VARIANTS["dinat_large_11x11"], **kwargs})


_COCO = ((28,), (7, 14), (3, 5, 7), (3,))
_ADE20K = ((16,), (4, 8), (2, 3, 4), (2,))
_ADE20K_640 = ((20,), (5, 10), (2, 3, 4, 5, 2, 3, 4, 5, 5), (2,))  # large was trained at 640
_11X11 = ((14,), (4, 7), (2, 3, 2, 3, 2, 3, 2, 3, 3), (1,))  # Mask2Former's, on all data


def dense_kwargs(entry: str, task: str, kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The model's arguments in detection (``det``: COCO) and segmentation (``seg``: ADE20K).

    Only the dilations differ from classification. ``dinat_large_11x11`` is Mask2Former's backbone
    in both.

    Args:
        entry: the model's entry.
        task: ``det`` or ``seg``.
        kwargs: what the caller asks for, which counts more.
    """
    depths = kwargs.get("depths", _VARIANTS[entry]["depths"])
    segmenter = _ADE20K_640 if "large" in entry else _ADE20K
    cycles = _11X11 if "11x11" in entry else _COCO if task == "det" else segmenter
    return {"dilations": cycled(cycles, depths), **kwargs}


def dense_adapter(model: DiNAT, task: str, out_indices: Sequence[int]) -> DensePyramid:
    """The authors' backbone of detection and of segmentation: a norm for each map."""
    return DensePyramid(model, out_indices)
