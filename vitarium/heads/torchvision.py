"""Detection with torchvision: its own detectors on any backbone of vitarium or timm.

What is built are instances of ``torchvision.models.detection``'s classes, trained and asked as
these are: ``losses = model(images, targets)`` in training mode, ``predictions = model(images)`` in
evaluation mode. Images are lists of [3, H, W] in [0, 1], of any sizes. This module holds what lies
between: which maps, the pyramid, anchors and RoI pooling for its strides, padding, normalisation.

Tensors are named as in torchvision's detectors with a ResNet: ``backbone.fpn.*``, ``rpn.*``,
``roi_heads.*`` or ``head.*``; only ``backbone.body.*`` is the backbone's own (`FeatureBackbone`).

- Anchors are torchvision's, for each level as many strides large. A level's anchors are spaced by
  the padded image's size divided by the map's, rounded down (`AnchorGenerator`): exact up to the
  backbone's last stride, and on the coarser levels that follow where ``size_divisible`` is a
  multiple of their strides, too.
- In bf16 or fp16 autocast the heads compute in that precision, but maps and what heads give are
  brought to float32: torchvision computes anchors and boxes in their precision, and bf16 cannot
  tell 800 from 802 pixels. Of a head that is replaced later, what it gives is left as it is.
- TorchScript is not supported. torch.compile, torch.export and ONNX are not tested: outputs have
  sizes that depend on the images, which torchvision supports in ONNX only.

Sources: Mask R-CNN, He et al., arXiv 1703.06870; RetinaNet, Lin et al., arXiv 1708.02002; FCOS,
Tian et al., arXiv 1904.01355; feature pyramids, Lin et al., arXiv 1612.03144.
"""

from __future__ import annotations

import inspect
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from typing import Any, TypeVar

import torch
from timm.layers import freeze_batch_norm_2d
from torch import Tensor, nn
from torchvision.models.detection import FCOS, FasterRCNN, MaskRCNN, RetinaNet
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.ops import FeaturePyramidNetwork, MultiScaleRoIAlign
from torchvision.ops.feature_pyramid_network import (
    ExtraFPNBlock,
    LastLevelMaxPool,
    LastLevelP6P7,
)
from torchvision.ops.poolers import LevelMapper

from vitarium.heads.features import FeatureBackbone
from vitarium.heads.segmentation import SimplePyramid
from vitarium.tools.list import did_you_mean

_STRIDES = (4, 8, 16, 32)  # of a pyramid on a plain vision transformer
_RATIOS = (0.5, 1.0, 2.0)  # height / width of anchors
_OCTAVE = (1.0, 2 ** (1 / 3), 2 ** (2 / 3))  # scales of RetinaNet's anchors within one
_TRANSFORM = {"size_divisible", "fixed_size", "_skip_resize"}  # behind torchvision's **kwargs
_Detector = TypeVar("_Detector", FasterRCNN, MaskRCNN, RetinaNet, FCOS)


class PyramidBackbone(nn.Module):
    """A backbone with a feature pyramid, in the form in which torchvision's detectors take it.

    >>> backbone = PyramidBackbone("nat_atto")
    >>> backbone.levels, backbone.strides
    (('0', '1', '2', '3', 'pool'), (4, 8, 16, 32, 64))

    A backbone all of whose maps have one stride (a plain vision transformer) gets a `SimplePyramid`
    on the last one, with strides from 4 or 8 to 32.

    Args:
        name: a model's name, as `FeatureBackbone` takes it.
        one_stage: for RetinaNet and FCOS, levels from stride 8 on and two more of strided
            convolutions (P6, P7); else from stride 4 on and one more, the last one subsampled.
        out_indices: of the backbone's maps, each with twice the stride of the one before; None for
            all from the first stride above on.
        fpn_channels: of every level.
        frozen_stages: how many of the backbone's stages, counted as its maps and with all that
            comes before them, keep their weights and statistics; True for the whole backbone.
        frozen_batch_norm: whether the backbone's batch norms are constants, as a few images per
            batch demand; None for torchvision's rule: where weights are loaded.
        pretrained_backbone: load the backbone's weights, as timm does; or those of the backbone in
            the released detector that ``name`` is.
        checkpoint: a file, or what it holds, to load into the backbone (see `FeatureBackbone`).
        **backbone_kwargs: further arguments of `FeatureBackbone` and of the model: ``task="det"``
            for the form that the authors give their backbone in detection, ``drop_path_rate``, ...
            The pyramid takes its device and dtype.

    Attributes:
        out_channels: ``fpn_channels``.
        levels: names of the maps.
        strides: of the maps, in pixels.
        num_maps: how many of them come from the backbone's; the others are coarser ones.
        size_divisible: what sides of images must be a multiple of, in pixels.
        pretrained_cfg: timm's description of the images that the backbone expects.

    Raises:
        ValueError: arguments that are unknown, out of range or do not go together; maps whose
            strides do not double.
        CheckpointError: a checkpoint cannot be had or read, or does not fit.
    """

    def __init__(
        self,
        name: str,
        *,
        one_stage: bool = False,
        out_indices: Sequence[int] | None = None,
        fpn_channels: int = 256,
        frozen_stages: int | bool = 0,
        frozen_batch_norm: bool | None = None,
        pretrained_backbone: bool = False,
        checkpoint: str | os.PathLike[str] | Mapping[str, Any] | None = None,
        **backbone_kwargs: Any,
    ) -> None:
        super().__init__()
        finest = 8 if one_stage else 4
        if fpn_channels < 1:
            raise ValueError(f"fpn_channels: expected at least 1, got {fpn_channels}")
        if out_indices is None:
            out_indices = _maps_from(finest, name, backbone_kwargs)
        self.body = body = FeatureBackbone(
            name,
            out_indices,
            checkpoint=checkpoint,
            pretrained=pretrained_backbone,
            **backbone_kwargs,
        )
        if not 0 <= frozen_stages <= body.num_stages:
            raise ValueError(
                f"frozen_stages: expected True or 0 to {body.num_stages}, got {frozen_stages}"
            )
        body.freeze(frozen_stages)
        if frozen_batch_norm is None:
            frozen_batch_norm = pretrained_backbone or checkpoint is not None
        if frozen_batch_norm:
            freeze_batch_norm_2d(body)

        like = next(body.parameters())
        strides: tuple[int, ...] = body.strides
        is_plain = len(strides) > 1 and len({*strides}) == 1
        if is_plain or any(b != 2 * a for a, b in pairwise(strides)):
            expected = "one index" if is_plain else "maps whose strides double"
            raise ValueError(
                f"out_indices: expected {expected} of {name}, "
                f"got {tuple(out_indices)} with strides {strides}"
            )
        with torch.device(like.device):
            extra = LastLevelP6P7(fpn_channels, fpn_channels) if one_stage else LastLevelMaxPool()
            self.fpn: nn.Module
            if len(strides) > 1:
                self.fpn = FeaturePyramidNetwork([*body.channels], fpn_channels, extra)
            else:
                strides = tuple(s for s in _STRIDES if s >= finest)
                pyramid = SimplePyramid(body.channels[0], body.strides[0], fpn_channels, strides)
                self.fpn = _SimpleFPN(pyramid, extra)
        self.to(like.dtype)
        self.out_channels = fpn_channels
        self.num_maps = len(strides)
        self.size_divisible = max(*body.strides, *strides)
        coarser = ("p6", "p7") if one_stage else ("pool",)
        self.levels = (*map(str, range(len(strides))), *coarser)
        self.strides = (*strides, *(strides[-1] << i for i in range(1, len(coarser) + 1)))
        self.pretrained_cfg = body.pretrained_cfg

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute the backbone's blocks in the backward pass instead of storing their values."""
        self.body.set_grad_checkpointing(enable)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """[B, in_chans, H, W] -> by level [B, out_channels, H / stride, W / stride]."""
        maps = self.fpn({str(i): x for i, x in enumerate(self.body(images))})
        return {level: _in_full(x) for level, x in maps.items()}


class _SimpleFPN(nn.Module):
    """A `SimplePyramid` that is called as torchvision's pyramid, and its coarser levels."""

    def __init__(self, pyramid: SimplePyramid, extra_blocks: ExtraFPNBlock) -> None:
        super().__init__()
        self.pyramid = pyramid
        self.extra_blocks = extra_blocks

    def forward(self, maps: dict[str, Tensor]) -> dict[str, Tensor]:
        """{"0": [B, C, H, W]} -> maps by level."""
        levels = self.pyramid(maps["0"])
        names = [str(i) for i in range(len(levels))]
        levels, names = self.extra_blocks(levels, levels, names)
        return dict(zip(names, levels, strict=True))


def faster_rcnn(name: str, num_classes: int, **kwargs: Any) -> FasterRCNN:
    """Faster R-CNN; its arguments are those of `mask_rcnn`, but for the mask head's."""
    return _rcnn(FasterRCNN, name, num_classes, kwargs)


def mask_rcnn(name: str, num_classes: int, **kwargs: Any) -> MaskRCNN:
    """Mask R-CNN on a backbone of vitarium or timm.

    >>> model = mask_rcnn("nat_atto", num_classes=11, min_size=64, box_score_thresh=0.5).eval()
    >>> (prediction,) = model([torch.zeros(3, 120, 90)])
    >>> sorted(prediction)
    ['boxes', 'labels', 'masks', 'scores']

    Args:
        name: a model's name, as `FeatureBackbone` takes it.
        num_classes: with the background, which is 0: targets' labels count from 1.
        **kwargs: further arguments of torchvision's ``MaskRCNN`` and of the transform within it
            (``min_size``, ``max_size``, ``fixed_size``, ``box_score_thresh``, ...), and, by their
            names, of `PyramidBackbone` and the model (``task="det"``, ``pretrained_backbone``,
            ``frozen_stages``, ``fpn_channels``, ``drop_path_rate``, ...). Other defaults than
            torchvision's are those that follow from the backbone: ``image_mean``, ``image_std``,
            ``size_divisible``, ``rpn_anchor_generator`` (anchors eight strides large) and RoI
            pooling from all maps but the coarsest.

    Returns:
        torchvision's model, its backbone a `PyramidBackbone`:
        ``model.backbone.set_grad_checkpointing()``.

    Raises:
        ValueError: arguments that are unknown, out of range or do not go together.
        CheckpointError: a checkpoint cannot be had or read, or does not fit.
    """
    return _rcnn(MaskRCNN, name, num_classes, kwargs)


def retinanet(name: str, num_classes: int, **kwargs: Any) -> RetinaNet:
    """RetinaNet, P3 to P7; ``num_classes`` has the background here, too: see `mask_rcnn`.

    Anchors of a level are 4, 5.0 and 6.3 strides large (``anchor_generator``).
    """

    def anchors(stride: int) -> tuple[int, ...]:
        return tuple(int(4 * stride * scale) for scale in _OCTAVE)

    backbone, options = _parts(RetinaNet, name, num_classes, kwargs, one_stage=True)
    options.setdefault("anchor_generator", _anchors(map(anchors, backbone.strides)))
    return _finished(RetinaNet(backbone, num_classes, **options), "head")


def fcos(name: str, num_classes: int, **kwargs: Any) -> FCOS:
    """FCOS, P3 to P7; ``num_classes`` has the background here, too: see `mask_rcnn`.

    A level has one point per cell (``anchor_generator``: squares of a stride). The head's group
    norms need a multiple of 32 for ``fpn_channels``.
    """
    backbone, options = _parts(FCOS, name, num_classes, kwargs, one_stage=True)
    points = _anchors(((stride,) for stride in backbone.strides), (1.0,))
    options.setdefault("anchor_generator", points)
    return _finished(FCOS(backbone, num_classes, **options), "head")


def _rcnn(
    detector: type[_Detector], name: str, num_classes: int, kwargs: dict[str, Any]
) -> _Detector:
    backbone, options = _parts(detector, name, num_classes, kwargs, one_stage=False)
    anchors = _anchors((8 * stride,) for stride in backbone.strides)
    options.setdefault("rpn_anchor_generator", anchors)
    options.setdefault("box_roi_pool", _roi_pool(backbone, 7))
    if issubclass(detector, MaskRCNN):
        options.setdefault("mask_roi_pool", _roi_pool(backbone, 14))
    model = detector(backbone, num_classes, **options)
    heads = ["rpn.head", "roi_heads.box_predictor"]
    if issubclass(detector, MaskRCNN):
        heads.append("roi_heads.mask_predictor")
    return _finished(model, *heads)


def _parts(
    detector: type[nn.Module], name: str, num_classes: int, kwargs: dict[str, Any], one_stage: bool
) -> tuple[PyramidBackbone, dict[str, Any]]:
    """The backbone, and the arguments of torchvision's class, which swallows unknown ones."""
    if num_classes < 2:
        raise ValueError(
            f"num_classes: expected at least 2, of which one is the background, got {num_classes}"
        )
    theirs = {*inspect.signature(detector).parameters} - {"backbone", "num_classes", "kwargs"}
    theirs |= _TRANSFORM
    options = {key: value for key, value in kwargs.items() if key in theirs}
    others = {key: value for key, value in kwargs.items() if key not in theirs}
    try:
        backbone = PyramidBackbone(name, one_stage=one_stage, **others)
    except TypeError as error:
        known = [*theirs, *inspect.signature(PyramidBackbone).parameters]
        hints = "".join(did_you_mean(key, known) for key in others if f"'{key}'" in str(error))
        raise ValueError(f"{error}{hints}") from error
    cfg = backbone.pretrained_cfg
    options.setdefault("image_mean", cfg["mean"])
    options.setdefault("image_std", cfg["std"])
    options.setdefault("size_divisible", backbone.size_divisible)
    return backbone, options


def _finished(model: _Detector, *heads: str) -> _Detector:
    """The model on its backbone's device and in its dtype, the outputs of heads in full."""
    for head in heads:
        model.get_submodule(head).register_forward_hook(_outputs_in_full)
    return model.to(next(model.backbone.parameters()))


def _maps_from(finest: int, name: str, backbone_kwargs: dict[str, Any]) -> tuple[int, ...]:
    """Indices of a backbone's maps from a stride on; of those with one stride, the last."""
    loading = {"device", "checkpoint_path", "pretrained_cfg_overlay"}
    kwargs = {key: value for key, value in backbone_kwargs.items() if key not in loading}
    with torch.device("meta"):
        probe = FeatureBackbone(name, pretrained=False, **kwargs)
    maps = list(zip(probe.out_indices, probe.strides, strict=True))
    if len({*probe.strides}) == 1:
        return (probe.out_indices[-1],)
    return tuple(index for index, stride in maps if stride >= finest)


def _anchors(
    sizes: Iterable[tuple[int, ...]], ratios: tuple[float, ...] = _RATIOS
) -> AnchorGenerator:
    levels = tuple(sizes)
    return AnchorGenerator(levels, (ratios,) * len(levels))


def _roi_pool(backbone: PyramidBackbone, output_size: int) -> MultiScaleRoIAlign:
    """RoI pooling from the maps that are the backbone's, by their strides.

    torchvision would guess strides from the sizes of the first images that come and keep them; it
    guesses wrong where padding makes much of these.
    """
    strides = backbone.strides[: backbone.num_maps]
    pool = MultiScaleRoIAlign([*backbone.levels[: backbone.num_maps]], output_size, 2)
    first = int(math.log2(strides[0]))
    pool.scales = [1 / stride for stride in strides]
    pool.map_levels = LevelMapper(
        first, first + len(strides) - 1, pool.canonical_scale, pool.canonical_level
    )
    return pool


def _in_full(x: Tensor) -> Tensor:
    """In autocast: float32 at least."""
    if torch.is_autocast_enabled(x.device.type):
        return x.to(torch.promote_types(x.dtype, torch.float32))
    return x


def _outputs_in_full(module: nn.Module, args: Any, outputs: Any) -> Any:
    """A hook: the tensors in a head's output, a tensor, list, tuple or dict of these."""
    if isinstance(outputs, Tensor):
        return _in_full(outputs)
    if isinstance(outputs, dict):
        return {key: _outputs_in_full(module, args, x) for key, x in outputs.items()}
    return type(outputs)(_outputs_in_full(module, args, x) for x in outputs)
