"""timm's own Swin, SwinV2 and DaViT with our ops inside: `use_ops`, and ``fused_*`` entries.

Papers: Swin (Liu et al., ICCV 2021, arXiv 2103.14030), SwinV2 (Liu et al., CVPR 2022, arXiv
2111.09883), DaViT (Ding et al., ECCV 2022, arXiv 2204.03645). Authors' code:
microsoft/Swin-Transformer, commit f82860b; SwinTransformer/Swin-Transformer-Object-Detection,
commit c7b2011; dingmyu/davit, commit fc79470; all MIT licence, but the detectors and segmenters, in
copies of OpenMMLab's code, Apache-2.0.

The networks are timm's classes, with timm's names of parameters, tags and weights. Their blocks
roll, pad, cut, mask and put together again around each attention; ours do not. Every entry takes
images of any size from 32 x 32 pixels on, without ``img_size``, which only says for which maps
windows are clamped and tables made.

Quirks:
    - timm clamps windows and shifts per axis, once, when a block is built; it rolls a map before
      it pads it. The authors' classifiers clamp both axes by the shorter one and cannot pad; at
      the square sizes of the released weights both are the same function. For another
      ``img_size``, ``semantics="authors"`` clamps as they do (Swin, SwinV2).
    - The authors' detectors never clamp, shift even a single window, and pad before they roll.
      That is what `dense_adapter` builds. SwinV2 has no published detector; its dense form here
      has the same windows as Swin's.
    - The authors downsample at the end of a stage, timm at the beginning of the next one.
    - SwinV2's table of coordinates is float32, whatever the dtype of the model.
    - DaViT normalises after pooling. Its classifier's form and its detector are one function
      apart from the norms of the maps.
    - ``fused_davit_*_fl`` are the image towers of Florence-2, whose channel attention is another.

Shapes: B images, H x W tokens of the stage at hand, C channels. Tokens are [B, H, W, C].
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import timm
import torch
from timm.layers import get_device_dtype, resize_rel_pos_bias_table
from timm.models import (
    PretrainedCfg,
    davit,
    generate_default_cfgs,
    get_arch_pretrained_cfgs,
    model_entrypoint,
    swin_transformer,
    swin_transformer_v2,
)
from torch import Tensor, nn

from vitarium.backbones import _fused_blocks as blocks
from vitarium.backbones._blocks import (
    _POOLS,
    Backbone,
    checked_image,
    is_window_table,
    refuse_attention_dropout,
    resized_window_table,
    window_index,
    window_mask,
)
from vitarium.backbones._registry import Published, build, register
from vitarium.backbones._released import Tables, dense
from vitarium.backbones._use_ops import BETWEEN
from vitarium.backbones._use_ops import UsedOps as UsedOps
from vitarium.backbones._use_ops import restore as restore
from vitarium.backbones._use_ops import use_ops as use_ops
from vitarium.backbones._use_ops import used_ops as used_ops
from vitarium.checkpoints import Renames, Weight

__all__ = ["FusedDaVit", "FusedSwin", "FusedSwinV2"]

_Base: Any = nn.Module  # whose methods timm's class beside it has


# Models: timm's, with the checks of arguments and the feature maps that all our models have


class _Entry(_Base):
    """What our entries have beyond timm's classes; it stands before those among the bases."""

    min_size: ClassVar[int] = 32  # pixels
    stem_name: ClassVar[str] = "patch_embed"
    stages_name: ClassVar[str] = "layers"
    pools: ClassVar[tuple[str, ...]] = _POOLS
    grad_checkpointing = False
    output_fmt = "NHWC"

    feature_stages: Any = Backbone.feature_stages
    forward_intermediates: Any = Backbone.forward_intermediates
    prune_intermediate_layers: Any = Backbone.prune_intermediate_layers
    _map: Any = Backbone._map
    _unfinished: Any = Backbone._unfinished
    _final: Any = Backbone._final

    def _embed(self: Any, image: Tensor) -> Tensor:
        stem = self.get_submodule(self.stem_name)
        x: Tensor = stem(checked_image(image, self.in_chans, self.min_size))
        return x

    def _stage(self, index: int, x: Tensor) -> Tensor:
        y: Tensor = self.feature_stages[index](x)
        return y

    def _keep_stages(self: Any, count: int) -> None:
        kept = self.feature_stages[:count]
        kept.training = self.training
        setattr(self, self.stages_name, kept)
        if hasattr(self, "_ref_window_sizes"):
            self._ref_window_sizes = self._ref_window_sizes[:count]

    def set_grad_checkpointing(self: Any, enable: bool = True) -> None:
        """Recompute blocks in the backward pass instead of storing their intermediate values."""
        super().set_grad_checkpointing(enable)
        self.grad_checkpointing = enable

    def reset_classifier(self: Any, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the classifier by a fresh one, and the pooling unless it is None."""
        if global_pool is not None and global_pool not in self.pools:
            raise ValueError(f"global_pool: expected one of {self.pools}, got {global_pool!r}")
        super().reset_classifier(num_classes, global_pool)
        self.head.train(self.training)

    def forward_features(self: Any, x: Tensor) -> Tensor:
        """[B, in_chans, H, W] -> the last stage's map, normalised, laid out as timm does it."""
        x = self._embed(x)
        for i in range(len(self.feature_stages)):
            x = self._stage(i, x)
        y: Tensor = self._final(x)
        return y

    def forward(self: Any, x: Tensor) -> Tensor:
        """[B, in_chans, H, W], no side below 32 -> logits [B, num_classes]."""
        y: Tensor = self.forward_head(self.forward_features(x))
        return y


class FusedSwin(_Entry, swin_transformer.SwinTransformer):
    """timm's Swin Transformer; the arguments are timm's."""


class FusedSwinV2(_Entry, swin_transformer_v2.SwinTransformerV2):
    """timm's Swin Transformer V2; the arguments are timm's."""


class FusedDaVit(_Entry, davit.DaVit):  # type: ignore[misc]
    """timm's DaViT; the arguments are timm's, and so is the layout of features, [B, C, H, W]."""

    output_fmt = "NCHW"
    stem_name = "stem"
    stages_name = "stages"
    pools = tuple(pool for pool in _POOLS if pool != "catavgmax")  # the norm takes one width

    def no_weight_decay(self) -> set[str]:
        """No names: nothing but vectors is kept from decay."""
        return set()

    @property
    def norm(self) -> nn.Module:
        """What acts on the last map: the identity, where the norm follows the pooling."""
        return self.norm_pre

    def _map(self, x: Tensor) -> Tensor:
        return x.permute(0, 2, 3, 1)

    def _unfinished(self, x: Tensor) -> Tensor:
        return x

    def _final(self, x: Tensor) -> Tensor:
        y: Tensor = self.norm_pre(x)
        return y

    def prune_intermediate_layers(
        self, indices: int | Sequence[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """As `Backbone.prune_intermediate_layers`; the head's norm goes with the head."""
        taken: list[int] = Backbone.prune_intermediate_layers(self, indices, prune_norm, prune_head)  # type: ignore[arg-type]
        if prune_head:
            davit.DaVit.reset_classifier(self, 0, "", reset_other=True)
            self.head.train(self.training)
        return taken


# Checkpoints


_RENAMES = Renames(
    [
        ("layers.{i}.downsample.", "layers.{i+1}.downsample."),
        ("patch_embeds.0.proj.", "stem.conv."),
        ("patch_embeds.0.norm.", "stem.norm."),
        ("patch_embeds.{i}.proj.", "stages.{i}.downsample.conv."),
        ("patch_embeds.{i}.norm.", "stages.{i}.downsample.norm."),
        ("main_blocks.{i}.{j}.{k}.cpe.0.", "stages.{i}.blocks.{j}.{k}.cpe1."),
        ("main_blocks.{i}.{j}.{k}.cpe.1.", "stages.{i}.blocks.{j}.{k}.cpe2."),
        ("main_blocks.{i}.{j}.{k}.", "stages.{i}.blocks.{j}.{k}."),
        ("norms.", "head.norm."),
        ("head.weight", "head.fc.weight"),
        ("head.bias", "head.fc.bias"),
    ]
)
# Florence-2 stores its image tower inside another model: its layout is read, not written.
_READ_ONLY = ("fused_davit_base_fl", "fused_davit_huge_fl")
_STORED_BUFFERS = ("relative_position_index", "relative_coords_table", "attn_mask")
_TABLE = ".relative_position_bias_table"
_RESIZES = {
    f"*{_TABLE}": "bicubic in the authors' files, timm's resize_rel_pos_bias_table in timm's"
}


def _BUFFERS(model: nn.Module) -> dict[str, Tensor]:  # noqa: N802
    """What the authors of Swin and SwinV2 store beside parameters, in their names.

    Args:
        model: a model of `build`'s, whose windows and maps are those at its ``img_size``, or its
            dense form, for whose maps no masks are stored.

    Returns:
        For every block ``attn.relative_position_index`` [L, L]; in SwinV2 also
        ``attn.relative_coords_table`` [1, 2h - 1, 2w - 1, 2] for windows of h x w tokens; for
        shifted windows ``attn_mask`` [windows, L, L]. L is the number of positions in a window.
    """
    found: dict[str, Tensor] = {}
    windowed = (blocks.FusedSwinBlock, blocks.FusedSwinV2Block)
    for name, block in model.named_modules():
        if not isinstance(block, windowed):
            continue
        window, shift = block.window_size, block.shift_size
        found[f"{name}.attn.relative_position_index"] = window_index(window)
        if isinstance(block, blocks.FusedSwinV2Block):
            table = _coordinates(window, block.attn.pretrained_window_size)
            found[f"{name}.attn.relative_coords_table"] = table
        if block.semantics != "dense" and shift != (0, 0):
            size: Any = block.input_resolution
            found[f"{name}.attn_mask"] = window_mask(size, window, shift)
    return found


def _coordinates(window: tuple[int, int], pretrained: tuple[int, int]) -> Tensor:
    """SwinV2's offsets of key and query, spaced logarithmically, [1, 2h - 1, 2w - 1, 2].

    The authors compute them in float32, in this order; the unit is the longest offset of the window
    of pre-training, where there was one.
    """
    longest = (max((p or w) - 1, 1) for p, w in zip(pretrained, window, strict=True))
    axes = [torch.arange(1 - w, w) / n * 8 for w, n in zip(window, longest, strict=True)]
    offsets = torch.stack(torch.meshgrid(*axes, indexing="ij"), -1)[None]
    return offsets.sign() * torch.log2(offsets.abs() + 1) / math.log2(8)


def checkpoint_filter_fn(state_dict: Mapping[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """A state dict of the authors, of timm or of Florence-2, for ``model``.

    Buffers that the authors store are dropped. Position tables for other windows are resized, at
    least in float32: those of the authors bicubically, as in load_pretrained() of utils.py in
    microsoft/Swin-Transformer and in their detectors; those of timm's layout as timm does it. Norms
    that checkpoints of another task do not hold keep their values: those of a detector's maps, and
    the classifier's one for Florence-2.
    """
    own = model.state_dict()
    found = {k: v for k, v in state_dict.items() if not k.endswith(_STORED_BUFFERS)}
    absent: tuple[str, ...] = ()
    if "vision_tower.convs.0.proj.weight" in found:
        found, absent = davit.checkpoint_filter_fn(found, model), ("head.norm.",)
    theirs, found = found.keys(), _RENAMES.to_ours(found, model)
    resized = resize_rel_pos_bias_table if found.keys() == theirs else resized_window_table
    if isinstance(model, DensePyramid) and {"norm.weight", "head.norm.weight"} & found.keys():
        absent = tuple(f"norm{i}." for i in model.out_indices)
    for name, table in found.items():
        if name.endswith(_TABLE) and name in own and is_window_table(table, own[name]):
            window: Any = model.get_submodule(name.removesuffix(_TABLE)).window_size
            found[name] = resized(table, window, own[name].shape)
    return {**{k: v for k, v in own.items() if absent and k.startswith(absent)}, **found}


# The authors' form for detection and segmentation


class DensePyramid(nn.Module):
    """A norm for each map that is returned; stages get the un-normalised map before them.

    Args:
        model: gives its stem and stages; it is not to be used further.
        out_indices: ascending indices of the stages whose maps are returned.
    """

    def __init__(self, model: Any, out_indices: Sequence[int]) -> None:
        super().__init__()
        dd = get_device_dtype(model)
        model.prune_intermediate_layers(list(out_indices), prune_norm=True)
        self.in_chans, self.min_size = model.in_chans, model.min_size
        self.stem_name, self.stages_name = model.stem_name, model.stages_name
        setattr(self, self.stem_name, getattr(model, self.stem_name))
        setattr(self, self.stages_name, model.feature_stages)
        self.out_indices = tuple(out_indices)
        self.channels_last = isinstance(model, FusedDaVit)
        for i in self.out_indices:
            self.add_module(f"norm{i}", nn.LayerNorm(model.feature_info[i]["num_chs"], **dd))
        for block in self.modules():
            if isinstance(block, (blocks.FusedSwinBlock, blocks.FusedSwinV2Block)):
                block.semantics = "dense"

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute blocks in the backward pass instead of storing their intermediate values."""
        for stage in getattr(self, self.stages_name):
            stage.grad_checkpointing = enable

    def forward(self, x: Tensor) -> list[Tensor]:
        """[B, in_chans, H, W] -> maps [B, C, H / stride, W / stride], sizes rounded up."""
        stem = self.get_submodule(self.stem_name)
        x = stem(checked_image(x, self.in_chans, self.min_size))
        maps = []
        for i, stage in enumerate(getattr(self, self.stages_name)):
            x = stage(x)
            if i in self.out_indices:
                y = x.permute(0, 2, 3, 1) if self.channels_last else x
                y = self.get_submodule(f"norm{i}")(y)
                maps.append(y.permute(0, 3, 1, 2).contiguous())
        return maps


def dense_kwargs(entry: str, task: str, kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The model's arguments in detection and segmentation (``task``), which are the same.

    Args:
        entry: the model's entry.
        task: ``det`` or ``seg``.
        kwargs: what the caller asks for, which counts more.
    """
    always = {} if entry.startswith("fused_davit") else {"always_partition": True}
    return {**always, **kwargs}


def dense_adapter(model: nn.Module, task: str, out_indices: Sequence[int]) -> DensePyramid:
    """The authors' backbone of detection and of segmentation (``task``), which are the same."""
    return DensePyramid(model, out_indices)


# Entries: timm's, one by one


_GOLDENS = ("davit", "swin", "swinv2")
_CODE_LICENCE = "MIT"
_SWIN = "README of microsoft/Swin-Transformer, f82860b"
_SWIN_DET = "README of SwinTransformer/Swin-Transformer-Object-Detection, c7b2011"
_SWIN_SEG = "README of SwinTransformer/Swin-Transformer-Semantic-Segmentation, 87e6f90"
_DAVIT = "README of dingmyu/davit, fc79470"
_LEFT_OUT = (
    "Swin-MLP, which has no attention; Swin-MoE, whose experts need a library; SimMIM's files, "
    "which have no classifier or, but for two of Swin-B, windows that no entry has; results "
    "without a file, of HTC++ and of UPerNet after ImageNet-22k, whose windows are not stated"
)
# By the authors' name: top-1, GFLOPs, release, and how the file's name goes on.
_SWIN_FILES: Mapping[str, Mapping[str, tuple[float | None, float | None, str, str]]] = {
    "swin_tiny_patch4_window7_224": {
        "in1k": (81.2, 4.5, "v1.0.0", ""),
        "in22k": (None, None, "v1.0.8", "_22k"),
        "in22k_ft_in1k": (80.9, 4.5, "v1.0.8", "_22kto1k_finetune"),
    },
    "swin_small_patch4_window7_224": {
        "in1k": (83.2, 8.7, "v1.0.0", ""),
        "in22k": (None, None, "v1.0.8", "_22k"),
        "in22k_ft_in1k": (83.2, 8.7, "v1.0.8", "_22kto1k_finetune"),
    },
    "swin_base_patch4_window7_224": {
        "in1k": (83.5, 15.4, "v1.0.0", ""),
        "in22k": (None, None, "v1.0.0", "_22k"),
        "in22k_ft_in1k": (85.2, 15.4, "v1.0.0", "_22kto1k"),
    },
    "swin_base_patch4_window12_384": {
        "in1k": (84.5, 47.1, "v1.0.0", ""),
        "in22k": (None, None, "v1.0.0", "_22k"),
        "in22k_ft_in1k": (86.4, 47.1, "v1.0.0", "_22kto1k"),
    },
    "swin_large_patch4_window7_224": {
        "in22k": (None, None, "v1.0.0", "_22k"),
        "in22k_ft_in1k": (86.3, 34.5, "v1.0.0", "_22kto1k"),
    },
    "swin_large_patch4_window12_384": {
        "in22k": (None, None, "v1.0.0", "_22k"),
        "in22k_ft_in1k": (87.3, 103.9, "v1.0.0", "_22kto1k"),
    },
    "swin_tiny_c24_patch4_window8_256": {"in1k": (81.6, 5.9, "v1.0.5", "")},
    "swinv2_tiny_patch4_window8_256": {"in1k": (81.8, 5.9, "v2.0.0", "")},
    "swinv2_tiny_patch4_window16_256": {"in1k": (82.8, 6.6, "v2.0.0", "")},
    "swinv2_small_patch4_window8_256": {"in1k": (83.7, 11.5, "v2.0.0", "")},
    "swinv2_small_patch4_window16_256": {"in1k": (84.1, 12.6, "v2.0.0", "")},
    "swinv2_base_patch4_window8_256": {"in1k": (84.2, 20.3, "v2.0.0", "")},
    "swinv2_base_patch4_window16_256": {"in1k": (84.6, 21.8, "v2.0.0", "")},
    "swinv2_base_patch4_window12_192": {"in22k": (None, None, "v2.0.0", "_22k")},
    "swinv2_base_patch4_window12to16_192to256": {
        "in22k_ft_in1k": (86.2, 21.8, "v2.0.0", "_22kto1k_ft"),
    },
    "swinv2_base_patch4_window12to24_192to384": {
        "in22k_ft_in1k": (87.1, 54.7, "v2.0.0", "_22kto1k_ft"),
    },
    "swinv2_large_patch4_window12_192": {"in22k": (None, None, "v2.0.0", "_22k")},
    "swinv2_large_patch4_window12to16_192to256": {
        "in22k_ft_in1k": (86.9, 47.5, "v2.0.0", "_22kto1k_ft"),
    },
    "swinv2_large_patch4_window12to24_192to384": {
        "in22k_ft_in1k": (87.6, 115.4, "v2.0.0", "_22kto1k_ft"),
    },
}
_DAVIT_FILES = {  # top-1, GFLOPs, file
    "davit_tiny": (82.8, 4.5, "EcJYlVYP9y5FsDbMP-nwjtABgLmdrNGZBxgR5--Kg3MZ7Q?e=v9OrXB"),
    "davit_small": (84.2, 8.8, "ERN_Gzm8oKdIvO01r0X2cscB_owuRAnnQPNGJEVGP23xHQ?e=MVW3ZO"),
    "davit_base": (84.6, 15.5, "Ea8kCpdM949CvTM0w7DWbGwBxxiACMSik4zx-emrNY0uKQ?e=aEjC7u"),
}
_SWIN_DETECTORS: Tables = {  # box AP and mask AP; the file
    "mask_rcnn_1x_coco": {"tiny": (43.7, 39.8, "v1.0.3/mask_rcnn_swin_tiny_patch4_window7_1x")},
    "mask_rcnn_3x_coco": {
        "tiny": (46.0, 41.6, "v1.0.2/mask_rcnn_swin_tiny_patch4_window7"),
        "small": (48.5, 43.3, "v1.0.2/mask_rcnn_swin_small_patch4_window7"),
    },
    "cascade_mask_rcnn_1x_coco": {
        "tiny": (48.1, 41.7, "v1.0.3/cascade_mask_rcnn_swin_tiny_patch4_window7_1x"),
    },
    "cascade_mask_rcnn_3x_coco": {
        "tiny": (50.4, 43.7, "v1.0.2/cascade_mask_rcnn_swin_tiny_patch4_window7"),
        "small": (51.9, 45.0, "v1.0.2/cascade_mask_rcnn_swin_small_patch4_window7"),
        "base": (51.9, 45.0, "v1.0.2/cascade_mask_rcnn_swin_base_patch4_window7"),
    },
    "reppoints_v2_3x_coco": {"tiny": (50.0, "v1.0.9/reppointsv2_swin_tiny_patch4_window7_3x")},
    "mask_reppoints_v2_3x_coco": {
        "tiny": (50.4, 43.8, "v1.0.9/mask_reppointsv2_swin_tiny_patch4_window7_3x"),
    },
    "moby_mask_rcnn_1x_coco": {
        "tiny": (43.6, 39.6, "v1.0.3/moby_mask_rcnn_swin_tiny_patch4_window7_1x"),
    },
    "moby_mask_rcnn_3x_coco": {
        "tiny": (46.0, 41.7, "v1.0.3/moby_mask_rcnn_swin_tiny_patch4_window7_3x"),
    },
    "moby_cascade_mask_rcnn_1x_coco": {
        "tiny": (48.1, 41.5, "v1.0.3/moby_cascade_mask_rcnn_swin_tiny_patch4_window7_1x"),
    },
    "moby_cascade_mask_rcnn_3x_coco": {
        "tiny": (50.2, 43.5, "v1.0.3/moby_cascade_mask_rcnn_swin_tiny_patch4_window7_3x"),
    },
}
_SWIN_SEGMENTERS: Tables = {  # mIoU of one scale and of several; the file
    "upernet_160k_ade20k": {
        "tiny": (44.51, 45.81, "v1.0.1/upernet_swin_tiny_patch4_window7_512x512"),
        "small": (47.64, 49.47, "v1.0.1/upernet_swin_small_patch4_window7_512x512"),
        "base": (48.13, 49.72, "v1.0.1/upernet_swin_base_patch4_window7_512x512"),
    },
    "moby_upernet_160k_ade20k": {
        "tiny": (44.06, 45.58, "v1.0.3/moby_upernet_swin_tiny_patch4_window7_512x512"),
    },
}
_DAVIT_DENSE: Tables = {  # box AP and mask AP, or mIoU; the file
    "mask_rcnn_1x_coco": {
        "tiny": (45.0, 41.1, "ERgc6486IzJPpPWDPJUwKP0BCc4oFtTgdudnPmmPqozqug?e=QWsLYg"),
        "small": (47.7, 42.9, "EVgVH-9l--pJpBuly1xwsAkBx57Ph9ZAajt31vk-TqQPrA?e=byv2uC"),
        "base": (48.2, 43.3, "EY5MU9O8n0ZPrvzCgakS4PoBdg6H3FCOSi1QVNCpJSQJ7g?e=MtdUGz"),
    },
    "mask_rcnn_3x_coco": {
        "tiny": (47.4, 42.9, "Ed1Su_p29_5KuX5Lbc2oq6gB3AVKnI-ojAT-yyICXWRbgg?e=XdJPsp"),
        "small": (49.5, 44.3, "EQCvUkIhwxNOrR1KibewNU0BqDDxzt311xANejUHprm0yQ?e=LiK9hX"),
        "base": (49.9, 44.6, "Ed8kh4c1G41OmfIzo5sOS74Bccp1G65qg0H2s0WtcXUJZA?e=lnqLoQ"),
    },
    "retinanet_1x_coco": {
        "tiny": (44.0, "EdNCWmdUArpPgjNn2JY37_QBs5KVNy8d-8bNK7DNyjYHyg?e=osMprJ"),
        "small": (46.0, "EfWFiJY0iEpGhPzwQA5nv7IB-8bgnVfCHQVT4FqX8UeK9w?e=sr0Ed6"),
        "base": (46.7, "ESKE9OFCDzxGo2D2Eyr29c0BFhc-j8OjF2WRoSxSK0gn4g?e=KfyJCA"),
    },
    "retinanet_3x_coco": {
        "tiny": (46.5, "EZ10htYokJhOi0serTLAx5cBGcJLL7PgWSO1uzlIXUw1Jg?e=zsMh4y"),
        "small": (48.2, "Ef9u9l_81_1PvCKGngnrkPoB1mGjelED0CzXr7RJwoQB7w?e=zTYozh"),
        "base": (48.7, "Ea7c6g_OkqpHrGIviK2Ua-4B2wc4Rd0PTdXAlA2IyTZxGQ?e=N4askR"),
    },
    "upernet_160k_ade20k": {
        "tiny": (46.3, "ERajqEKtzIBGgX2slZxCYrEBoEL-ZnLkUaXP9SHT-rp13w?e=Ga9U8a"),
        "small": (48.8, "Ef5hJPsJXNZLiRkUTL9-ozcBaVyVEAvolNwMUlsmJhm2Yg?e=BnJ6Et"),
        "base": (49.4, "EWl80Je0fUlNlbJzI_qKgIkBFX-epbfK3Vzgdq1C2iOsuA?e=wumOBS"),
    },
}


@dataclass(frozen=True)
class _Kind:
    """One of timm's modules whose models get our ops."""

    module: Any
    model: Any
    facts: Mapping[str, Any]
    atto: Mapping[str, Any]


# What our entries cannot do, because timm's classes cannot: DaViT has no dropout in its blocks, and
# its norm follows the pooling; Swin scales windows in set_input_size().
_LIMITS = {
    "fused_davit_atto": {"dropout", "norm before pooling", "catavgmax"},
    "fused_swin_atto": {"windows of its own at another img_size"},
    "fused_swinv2_atto": {"windows of its own at another img_size"},
}

_MICROSOFT = "https://github.com/microsoft/Swin-Transformer"
_SMALL = {
    "embed_dim": 32,
    "depths": (2, 2, 2, 1),
    "num_heads": (2, 4, 8, 16),
    "window_size": 4,
    "mlp_ratio": 2.0,
    "drop_path_rate": 0.0,
    "img_size": 64,
}
_DUAL = {"embed_dims": (24, 48, 96, 192), "depths": (1, 1, 1, 1), "num_heads": (1, 2, 4, 8)}
_KINDS = {
    "swin": _Kind(
        swin_transformer,
        FusedSwin,
        {
            "paper_ids": "arXiv:2103.14030",
            "paper_name": "Swin Transformer: Hierarchical Vision Transformer using Shifted Windows",
            "origin_url": _MICROSOFT,
        },
        _SMALL,
    ),
    "swinv2": _Kind(
        swin_transformer_v2,
        FusedSwinV2,
        {
            "paper_ids": "arXiv:2111.09883",
            "paper_name": "Swin Transformer V2: Scaling Up Capacity and Resolution",
            "origin_url": _MICROSOFT,
        },
        _SMALL,
    ),
    "davit": _Kind(
        davit,
        FusedDaVit,
        {
            "paper_ids": "arXiv:2204.03645",
            "paper_name": "DaViT: Dual Attention Vision Transformers",
            "origin_url": "https://github.com/dingmyu/davit",
        },
        {**_DUAL, "window_size": 4, "mlp_ratio": 2.0},
    ),
}


def _cfg(name: str, kind: _Kind, cfg: PretrainedCfg) -> PretrainedCfg:
    """Timm's description of a model and of its weights on the hub, as it applies to ours."""
    url = None
    if cfg.hf_hub_id:
        file = "pytorch_model.bin" if name.endswith("_florence2") else "model.safetensors"
        url = f"https://huggingface.co/{cfg.hf_hub_id}/resolve/main/{file}"
    return replace(
        cfg,
        url=url,
        license=cfg.license if url else None,
        fixed_input_size=False,
        min_input_size=(3, _Entry.min_size, _Entry.min_size),
        **kind.facts,
    )


def _clamp_as_authors(model: nn.Module) -> None:
    """Clamp both axes of a window by the shorter side of the map, and shift neither then."""
    windowed = (blocks.FusedSwinBlock, blocks.FusedSwinV2Block)
    found: list[Any] = [module for module in model.modules() if isinstance(module, windowed)]
    for block in found:
        side, axis = min((length, i) for i, length in enumerate(block.input_resolution))
        if block.window_size[axis] == side:  # timm has clamped it here
            block.window_size, block.shift_size = (side, side), (0, 0)
            block.window_area = side**2
            block.attn.set_window_size((side, side))
            block.attn_mask = None


_C24 = "fused_swin_tiny_c24_patch4_window8_256"  # a model of the authors that timm lacks
_C24_ARGS = {"num_heads": (4, 8, 16, 32), "window_size": 8, "img_size": 256}


def _create(
    variant: str, kind: _Kind, timms: str | None, pretrained: bool = False, **kwargs: Any
) -> nn.Module:
    def create(**args: Any) -> nn.Module:
        refuse_attention_dropout(args.get("attn_drop_rate", 0.0))
        pools = kind.model.pools
        if (pool := args.get("global_pool", "avg")) not in pools:
            raise ValueError(f"global_pool: expected one of {pools}, got {pool!r}")
        semantics = "timm"
        if kind.model is not FusedDaVit:
            semantics = args.pop("semantics", semantics)
            args = {"strict_img_size": False, **args}
        if semantics not in ("timm", "authors"):
            raise ValueError(f"semantics: expected 'timm' or 'authors', got {semantics!r}")
        if timms is None:
            model = kind.model(**{**kind.atto, **args})
            for name, parameter in model.named_parameters():
                if kind.model is FusedSwinV2 and name.endswith(("norm1.weight", "norm2.weight")):
                    nn.init.constant_(parameter, 0.5)  # at 0, as SwinV2 begins, blocks do nothing
        else:
            model = model_entrypoint(timms)(**args)
            model.__class__ = kind.model  # the same but for methods
        for module in model.modules():
            module.__class__ = BETWEEN.get(type(module), type(module))
        if kind.model is not FusedDaVit:
            model.patch_embed.dynamic_img_pad = True  # to timm's class, should it come back
        model = use_ops(model, inplace=True)
        if semantics == "authors":
            _clamp_as_authors(model)
        return model

    return build(
        create,
        variant,
        pretrained,
        weights=_WEIGHTS,
        filter_fn=checkpoint_filter_fn,
        feature_cfg={"out_indices": (0, 1, 2, 3)},
        **kwargs,
    )


def _entry(variant: str, kind: _Kind, timms: str | None) -> Callable[..., nn.Module]:
    own = _C24_ARGS if variant == _C24 else {}

    def entry(pretrained: bool = False, **kwargs: Any) -> nn.Module:
        return _create(variant, kind, timms, pretrained, **{**own, **kwargs})

    entry.__name__ = entry.__qualname__ = variant
    if timms is None:
        entry.__doc__ = "At most 1.5 M parameters (10 classes); ours, for tests, on 64 x 64 pixels."
    elif own:
        entry.__doc__ = f"timm's {timms} with {own}: Swin-T/C24, whose heads have 24 channels."
    else:
        entry.__doc__ = f"timm's {timms} with our ops, timm's weights, and any size of images."
    return entry


_ENTRIES: dict[str, tuple[_Kind, str | None]] = {
    f"fused_{name}": (kind, name)
    for kind in _KINDS.values()
    for name in timm.list_models(module=kind.module.__name__.rpartition(".")[2])
}
_TINY: dict[str, Any] = {
    "num_classes": 10,
    "input_size": (3, 64, 64),
    "pool_size": (2, 2),
    "crop_pct": 1.0,
}
_CFGS = {
    f"{ours}.{cfg.tag or 'untrained'}": _cfg(full, kind, cfg)
    for ours, (kind, name) in _ENTRIES.items()
    for full, cfg in get_arch_pretrained_cfgs(name or "").items()
}


def _swin_weight(file: str, task: str) -> Weight:
    """The authors' detectors and segmenters are in copies of OpenMMLab's code, with its licence."""
    return Weight(
        url=f"https://github.com/SwinTransformer/storage/releases/download/{file}.pth",
        wrapper="model" if task == "cls" else "state_dict",
        task=task,
        code_licence=None if task == "cls" else "Apache-2.0",
    )


def _davit_weight(file: str, task: str) -> Weight:
    """As of Swin, the code in dense form is in copies of OpenMMLab's, with its licence."""
    folder = "https://connecthkuhk-my.sharepoint.com/:u:/g/personal/u3007305_connect_hku_hk"
    return Weight(
        manual=f"Save {folder}/{file} from a browser: SharePoint serves browsers only",
        wrapper="state_dict",
        task=task,
        code_licence=None if task == "cls" else "Apache-2.0",
    )


_WEIGHTS = {
    name: Weight(url=str(cfg.url), wrapper="plain", licence=cfg.license)
    for name, cfg in _CFGS.items()
    if cfg.license
}
_PUBLISHED: dict[str, Published] = {}
_C24_CFG = replace(
    _CFGS["fused_swin_tiny_patch4_window7_224.ms_in1k"],
    input_size=(3, 256, 256),
    pool_size=(8, 8),
)


def _release(
    entry: str,
    orgs: tuple[str, str],
    data: str,
    weight: Weight,
    top1: float | None,
    gflops: float | None,
    source: str,
    **evaluation: Any,
) -> None:
    """A tag for a file of the authors beside that of timm's copy, in ``orgs``' order.

    Images are prepared as in the authors' ``evaluation``, which differs from timm's; the result
    is of both files.
    """
    name, copy = (f"{entry}.{org}_{data}" for org in orgs)
    like = _C24_CFG if entry == _C24 else _CFGS[copy]
    _CFGS[name] = replace(
        like, url=weight.url, hf_hub_id=None, license=weight.licence, **evaluation
    )
    _WEIGHTS[name] = weight
    if top1 is not None:
        result = Published(top1=top1, gflops=gflops, source=source)
        _PUBLISHED.update({known: result for known in (name, copy) if known in _CFGS})


for _stem, _files in _SWIN_FILES.items():
    _entry_name = f"fused_{_stem.replace('_patch4', '') if 'swinv2' in _stem else _stem}"
    _crop = {"crop_pct": 1.0, "crop_mode": "squash"} if "384" in _stem else {"crop_pct": 0.875}
    for _data, (_top1, _gflops, _folder, _end) in _files.items():
        _weight = _swin_weight(f"{_folder}/{_stem}{_end}", "cls")
        _orgs = ("microsoft", "ms")
        _release(_entry_name, _orgs, _data, _weight, _top1, _gflops, _SWIN, **_crop)
for _stem, (_top1, _gflops, _file) in _DAVIT_FILES.items():
    _weight = _davit_weight(_file, "cls")
    _orgs = ("dingmyu", "msft")
    _release(f"fused_{_stem}", _orgs, "in1k", _weight, _top1, _gflops, _DAVIT, crop_pct=0.9)

_GIANT = "fused_davit_giant.dingmyu_ft_in1k"
_WEIGHTS[_GIANT] = Weight(unreleased="the authors give its result, but neither file nor code")
_CFGS[_GIANT] = replace(_CFGS["fused_davit_giant.untrained"], license=_WEIGHTS[_GIANT].licence)
_PUBLISHED[_GIANT] = Published(
    top1=90.4, source=_DAVIT, setting="pretrained on 1.5 B pairs of image and text"
)

_SWIN_ENTRY = "fused_swin_{}_patch4_window7_224"
for _weights, _results in (
    dense("microsoft", _SWIN_DET, _SWIN_DETECTORS, _swin_weight, _SWIN_ENTRY),
    dense("microsoft", _SWIN_SEG, _SWIN_SEGMENTERS, _swin_weight, _SWIN_ENTRY),
    dense("dingmyu", _DAVIT, _DAVIT_DENSE, _davit_weight, "fused_davit_{}"),
):
    _WEIGHTS |= _weights
    _PUBLISHED |= _results

default_cfgs = generate_default_cfgs(
    {
        **_CFGS,
        **{
            f"fused_{name}_atto.untrained": replace(
                _cfg("", kind, PretrainedCfg()),
                first_conv="stem.conv" if name == "davit" else "patch_embed.proj",
                classifier="head.fc",
                **_TINY,
                origin_url=None,
            )
            for name, kind in _KINDS.items()
        },
    }
)

for _name, _kind in _KINDS.items():
    _ENTRIES[f"fused_{_name}_atto"] = (_kind, None)
_ENTRIES[_C24] = (_KINDS["swin"], "swin_tiny_patch4_window7_224")
for _variant, _of in _ENTRIES.items():
    globals()[_variant] = register(_entry(_variant, *_of))
