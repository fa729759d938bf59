"""What several families share: blocks of neighborhood attention, and timm's protocol.

Shapes: B images, H x W tokens of the stage at hand, C channels. Tokens are [B, H, W, C].
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from timm.layers import (
    DropPath,
    Mlp,
    SelectAdaptivePool2d,
    calculate_drop_path_rates,
    get_device_dtype,
    register_notrace_function,
    resize_rel_pos_bias_table_simple,
    to_ntuple,
)
from timm.models import checkpoint_seq
from torch import Tensor, nn

from vitarium.backbones._nat_transformers import from_transformers, is_transformers
from vitarium.ops import neighborhood_attention
from vitarium.ops.window_attn import windows

_POOLS = ("avg", "max", "avgmax", "catavgmax", "")


# Blocks


class NeighborhoodAttention(nn.Module):
    """Multi-head attention of every token to a window of the tokens nearest to it.

    The window holds ``kernel_size`` x ``kernel_size`` tokens in steps of ``dilation``. A map that
    is smaller is padded with zero tokens *before* the projection, as natten 0.14 does: a padded
    position has the projection's bias as query, key and value, and is attended to.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        kernel_size: int,
        dilation: int = 1,
        proj_drop: float = 0.0,
        **dd: Any,
    ) -> None:
        super().__init__()
        if kernel_size < 1 or kernel_size % 2 == 0:
            raise ValueError(f"kernel_size: expected an odd size, got {kernel_size}")
        if dilation < 1:
            raise ValueError(f"dilations: expected steps of at least 1, got {dilation}")
        self.num_heads = num_heads
        self.head_dim = head_dim(dim, num_heads)
        self.kernel_size = kernel_size
        self.dilation = dilation
        self.qkv = nn.Linear(dim, 3 * dim, **dd)
        self.rpb = nn.Parameter(
            torch.zeros(num_heads, 2 * kernel_size - 1, 2 * kernel_size - 1, **dd)
        )
        self.proj = nn.Linear(dim, dim, **dd)
        self.proj_drop = nn.Dropout(proj_drop)

    def forward(self, x: Tensor) -> Tensor:
        """[B, H, W, C] -> [B, H, W, C]."""
        B, H, W, C = x.shape
        qkv = self.qkv(x).reshape(B, H, W, 3, self.num_heads, self.head_dim)
        query, key, value = qkv.unbind(3)
        pad = self.qkv.bias.reshape(3, self.num_heads, self.head_dim)  # a zero token, projected
        x = neighborhood_attention(
            query, key, value, self.kernel_size, self.dilation, bias=self.rpb, pad=pad
        )
        return self.proj_drop(self.proj(x.reshape(B, H, W, C)))


def head_dim(dim: int, num_heads: int) -> int:
    """Channels of a head, where the heads share ``dim`` evenly."""
    if num_heads < 1 or dim % num_heads:
        raise ValueError(f"num_heads: expected a divisor of dim = {dim}, got {num_heads}")
    return dim // num_heads


class Block(nn.Module):
    """``x + gamma1 * attn(norm1(x))``, then ``x + gamma2 * mlp(norm2(x))``."""

    def __init__(
        self,
        dim: int,
        attn: nn.Module,
        mlp_ratio: float,
        layer_scale: float | None = None,
        proj_drop: float = 0.0,
        drop_path: float = 0.0,
        **dd: Any,
    ) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, **dd)
        self.attn = attn
        self.norm2 = nn.LayerNorm(dim, **dd)
        self.mlp = Mlp(dim, int(dim * mlp_ratio), drop=proj_drop, **dd)
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()
        self.gamma1, self.gamma2 = (
            None if layer_scale is None else nn.Parameter(torch.full((dim,), layer_scale, **dd))
            for _ in range(2)
        )

    def forward(self, x: Tensor) -> Tensor:
        """[B, H, W, C] -> [B, H, W, C]."""
        y = self.attn(self.norm1(x))
        x = x + self.drop_path(y if self.gamma1 is None else self.gamma1 * y)
        y = self.mlp(self.norm2(x))
        return x + self.drop_path(y if self.gamma2 is None else self.gamma2 * y)


class Level(nn.Module):
    """The blocks of one resolution, and ``downsample``, which leads to the next one.

    ``forward`` runs the blocks: their output is the level's feature map. The model calls
    ``downsample``; in the last level it is the identity.
    """

    def __init__(self, blocks: Sequence[Block], downsample: nn.Module) -> None:
        super().__init__()
        self.blocks = nn.Sequential(*blocks)
        self.downsample = downsample

    def forward(self, x: Tensor, grad_checkpointing: bool = False) -> Tensor:
        """[B, H, W, C] -> [B, H, W, C]."""
        return checkpoint_seq(self.blocks, x) if grad_checkpointing else self.blocks(x)


class Patches(nn.Module):
    """A convolution over patches and a LayerNorm; zeros complete patches at the far borders."""

    def __init__(self, patch_size: int, in_chans: int, dim: int, **dd: Any) -> None:
        super().__init__()
        self.patch_size = patch_size
        self.proj = nn.Conv2d(in_chans, dim, patch_size, stride=patch_size, **dd)
        self.norm = nn.LayerNorm(dim, **dd)

    def forward(self, x: Tensor) -> Tensor:
        """[B, in_chans, H, W] -> [B, ceil(H / patch_size), ceil(W / patch_size), C]."""
        # one number for all sizes, so that a traced program fits them: what is too much is no patch
        pad = self.patch_size - 1
        return self.norm(self.proj(F.pad(x, (0, pad, 0, pad))).permute(0, 2, 3, 1))


class PatchMerging(nn.Module):
    """2 x 2 tokens in one: a LayerNorm and a linear map of their channels."""

    def __init__(self, dim: int, **dd: Any) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(4 * dim, **dd)
        self.reduction = nn.Linear(4 * dim, 2 * dim, bias=False, **dd)

    def forward(self, x: Tensor) -> Tensor:
        """[B, H, W, C] -> [B, ceil(H / 2), ceil(W / 2), 2C]."""
        height, width = x.shape[1:3]
        # one number for all sizes, so that a traced program fits them: a second row is not read
        x = F.pad(x, (0, 0, 0, 1, 0, 1))
        even, odd = x[:, 0:height:2], x[:, 1::2]
        columns = (slice(0, width, 2), slice(1, None, 2))
        tokens = [rows[:, :, column] for column in columns for rows in (even, odd)]
        return self.reduction(self.norm(torch.cat(tokens, -1)))


# Models


def checked_size(img_size: int | Sequence[int], min_size: int) -> tuple[int, int]:
    """(H, W) in pixels from one or two sides, none below ``min_size``."""
    size = (img_size, img_size) if isinstance(img_size, int) else tuple(img_size)
    if len(size) != 2 or any(not isinstance(side, int) or side < min_size for side in size):
        raise ValueError(
            f"img_size: expected one or two sides in pixels, at least {min_size}, got {img_size!r}"
        )
    return size[0], size[1]


@register_notrace_function  # which passes over names with an underscore
def checked_image(
    image: Tensor, channels: int, min_size: int, size: tuple[int, int] | None = None
) -> Tensor:
    """The image, if it is [B, channels, H, W] with sides of ``min_size`` up, or of ``size``."""
    shape = image.shape
    if len(shape) != 4 or shape[1] != channels or shape[2] < min_size or shape[3] < min_size:
        raise ValueError(
            f"image: expected [B, {channels}, H, W] with H, W >= {min_size}, got shape "
            f"{tuple(shape)}"
        )
    if size is not None and (shape[2] != size[0] or shape[3] != size[1]):
        raise ValueError(
            f"image: expected H, W = {size}, for which the model is made (img_size= or "
            f"set_input_size() changes it), got shape {tuple(shape)}"
        )
    return image


def taken_indices(count: int, indices: int | Sequence[int] | None) -> list[int]:
    """Ascending indices out of ``count`` feature maps: all, the last so many, or those given."""
    if indices is None:
        return list(range(count))
    if isinstance(indices, int):
        taken = list(range(count - indices, count))
    else:
        taken = sorted({i + count if i < 0 else i for i in indices})
    if not taken or taken[0] < 0 or taken[-1] >= count:
        raise ValueError(
            f"out_indices, indices: expected some of {count} feature maps from {-count} to "
            f"{count - 1}, or how many of the last, got {indices!r}"
        )
    return taken


def refuse_attention_dropout(rate: float) -> None:
    """Raise unless ``attn_drop_rate`` is 0: the ops have no dropout."""
    if rate:
        raise ValueError(f"attn_drop_rate: expected 0 (no such dropout), got {rate}")


class Backbone(nn.Module):
    """timm's protocol over a stem, stages, a LayerNorm, pooling and a linear classifier.

    A family's constructor sets ``patch_embed``, its stages under the authors' name for them, and
    ``feature_info`` (one entry per stage), and calls `_add_head` at last. Stages are `Level`s, or
    blocks where the family overrides `_stage`.
    """

    min_size = 32  # pixels
    img_size: tuple[int, int] | None = None  # where parameters depend on it
    stages_name: ClassVar[str] = "levels"

    def __init__(self, num_classes: int, in_chans: int) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.in_chans = in_chans
        self.output_fmt = "NHWC"
        self.grad_checkpointing = False
        self.feature_info: list[dict[str, Any]] = []
        self.patch_embed: nn.Module

    def _add_head(self, dim: int, global_pool: str, drop_rate: float, dd: dict[str, Any]) -> None:
        self.num_features = dim
        self.norm: nn.Module = nn.LayerNorm(dim, **dd)
        self.head_drop = nn.Dropout(drop_rate)
        self.apply(self._init_weights)
        self.reset_classifier(self.num_classes, global_pool)

    @property
    def feature_stages(self) -> Any:
        """The modules whose outputs are the feature maps, in order."""
        return getattr(self, self.stages_name)

    def _keep_stages(self, count: int) -> None:
        """Remove the stages behind the first ``count``, and what leads to them."""
        kept = self.feature_stages[:count]
        kept.training = self.training  # the list's own flag: the modules in it keep theirs
        setattr(self, self.stages_name, kept)
        if isinstance(kept[-1], Level):
            kept[-1].downsample = nn.Identity().train(self.training)

    def _stage(self, index: int, x: Any) -> Any:
        """The map of a stage, from the map of the stage before or from the stem."""
        if index > 0:
            x = self.feature_stages[index - 1].downsample(x)
        return self.feature_stages[index](x, self.grad_checkpointing)

    @staticmethod
    def _init_weights(module: nn.Module) -> None:
        if isinstance(module, nn.Linear):
            nn.init.trunc_normal_(module.weight, std=0.02)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        table = getattr(module, "rpb", None)
        if isinstance(table, nn.Parameter):
            nn.init.trunc_normal_(table, std=0.02)

    def no_weight_decay(self) -> set[str]:
        """Names of the position biases, which the authors do not decay."""
        return {name for name, _ in self.named_parameters() if name.endswith(".rpb")}

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Patterns by which timm groups parameters, for layer-wise learning rates."""
        previous = (99999,)  # timm's mark for "the group before"
        stage = rf"^{self.stages_name}\.(\d+)"
        fine = [
            (rf"{stage}\.blocks\.(\d+)", None),
            (rf"{stage}\.downsample", previous),
            (r"^norm", previous),
        ]
        return {"stem": r"^patch_embed", "blocks": stage if coarse else fine}

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute blocks in the backward pass instead of storing their intermediate values."""
        self.grad_checkpointing = enable

    def get_classifier(self) -> nn.Module:
        """The linear classifier, or the identity where there is none."""
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the classifier by a fresh one, and the pooling unless it is None."""
        if global_pool is not None:
            if global_pool not in _POOLS:
                raise ValueError(f"global_pool: expected one of {_POOLS}, got {global_pool!r}")
            self.global_pool = SelectAdaptivePool2d(
                pool_type=global_pool, flatten=bool(global_pool), input_fmt=self.output_fmt
            )
        self.num_classes = num_classes
        self.head_hidden_size = self.num_features * self.global_pool.feat_mult()
        self.head: nn.Module = nn.Identity()
        if num_classes > 0:
            self.head = nn.Linear(self.head_hidden_size, num_classes, **get_device_dtype(self))
            self._init_weights(self.head)
        for fresh in (self.global_pool, self.head):
            fresh.train(self.training)

    def _embed(self, image: Tensor) -> Any:
        """What the first stage takes: a map, or whatever a family's own hooks pass on."""
        return self.patch_embed(self._checked(image))

    def _checked(self, image: Tensor) -> Tensor:
        # FX finds what it shall not trace by the file in which a model's forward stands: here
        return checked_image(image, self.in_chans, self.min_size, self.img_size)

    def _map(self, x: Any) -> Tensor:
        """The map [B, H, W, C] in what a stage returns."""
        y: Tensor = x
        return y

    def _unfinished(self, x: Any) -> Tensor:
        """What `forward_intermediates` returns as the final map where it stops early."""
        return self._map(x)

    def _final(self, x: Any) -> Tensor:
        """What `forward_features` returns, from what the last stage does."""
        y: Tensor = self.norm(x)
        return y

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | Sequence[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """Feature maps of the stages.

        Args:
            x: image [B, in_chans, H, W].
            indices: which stages, negative ones counted from the last; an int for the last so
                many; None for all.
            norm: apply the final LayerNorm to the maps that it fits: those with as many channels
                as the last one.
            stop_early: do not compute stages behind the last index.
            output_fmt: ``NCHW`` or ``NHWC``, of the feature maps.
            intermediates_only: return only the feature maps.

        Returns:
            Maps in the order of the stages, or (final map, maps). The final map is what
            `forward_features` returns, or, stopped early, the last computed map as it is.

        Raises:
            ValueError: indices out of range, an unknown layout, or an image of a wrong size.
        """
        if output_fmt not in ("NCHW", "NHWC"):
            raise ValueError(f"output_fmt: expected NCHW or NHWC, got {output_fmt!r}")
        count = len(self.feature_stages)
        taken = taken_indices(count, indices)
        state = self._embed(x)
        maps = []
        for i in range(taken[-1] + 1 if stop_early else count):
            state = self._stage(i, state)
            if i in taken:
                y = self._map(state)
                if norm and self.feature_info[i]["num_chs"] == self.num_features:
                    y = self.norm(y)
                maps.append(y.permute(0, 3, 1, 2).contiguous() if output_fmt == "NCHW" else y)
        if intermediates_only:
            return maps
        return (self._final(state) if i == count - 1 else self._unfinished(state)), maps

    def prune_intermediate_layers(
        self, indices: int | Sequence[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Remove what the feature maps ``indices`` do not need.

        The final norm goes with the last stage, or alone if ``prune_norm``.

        Returns:
            The stages' indices, ascending, counted from the first.

        Raises:
            ValueError: indices out of range.
        """
        count = len(self.feature_stages)
        taken = taken_indices(count, indices)
        if prune_norm or taken[-1] + 1 < count:
            self.norm = nn.Identity().train(self.training)
        self._keep_stages(taken[-1] + 1)
        if prune_head:
            self.reset_classifier(0, "")
        return taken

    def forward_features(self, x: Tensor) -> Tensor:
        """[B, in_chans, H, W] -> the last stage's map, normalised, [B, H, W, num_features]."""
        state = self._embed(x)
        for i in range(len(self.feature_stages)):
            state = self._stage(i, state)
        return self._final(state)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Pool and classify; without the classifier if ``pre_logits``."""
        x = self.head_drop(self.global_pool(x))
        return x if pre_logits else self.head(x)

    def forward(self, x: Tensor) -> Tensor:
        """[B, in_chans, H, W], no side below the smallest size -> logits [B, num_classes]."""
        return self.forward_head(self.forward_features(x))


class NeighborhoodPyramid(Backbone):
    """Four resolutions of neighborhood attention; families differ in stem and downsampling.

    Args:
        num_classes: outputs of the classifier; 0 for none.
        in_chans: channels of the image.
        global_pool: ``avg``, ``max``, ``avgmax``, ``catavgmax``, or ``""`` for none.
        embed_dim: channels of the first level; every further level has twice as many.
        depths: blocks of each level.
        num_heads: attention heads of each level.
        kernel_size: odd window size in tokens, of all levels or of each one.
        dilations: steps between a window's tokens, of all levels or of each one: an int for the
            odd blocks (the even ones have 1), or one int per block.
        mlp_ratio: hidden over input channels in the MLPs.
        layer_scale: initial value of the branches' learned factors; None for no factors.
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

    stem: ClassVar[Callable[..., nn.Module]]  # (in_chans, dim, **dd): image to the first tokens
    downsample: ClassVar[Callable[..., nn.Module]]  # (dim, **dd): to half the size, 2 * dim

    def __init__(
        self,
        num_classes: int = 1000,
        in_chans: int = 3,
        global_pool: str = "avg",
        embed_dim: int = 64,
        depths: Sequence[int] = (3, 4, 6, 5),
        num_heads: Sequence[int] = (2, 4, 8, 16),
        kernel_size: int | Sequence[int] = 7,
        dilations: int | Sequence[int | Sequence[int]] = 1,
        mlp_ratio: float = 3.0,
        layer_scale: float | None = None,
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
        per_level = to_ntuple(len(depths))
        kernels, steps = per_level(kernel_size), per_level(dilations)
        for name, values in (
            ("num_heads", num_heads),
            ("kernel_size", kernels),
            ("dilations", steps),
        ):
            if len(values) != len(depths):
                raise ValueError(
                    f"{name}: expected one per level ({len(depths)}), got {tuple(values)}"
                )
        self.patch_embed = type(self).stem(in_chans, embed_dim, **dd)
        drop_paths: Any = iter(calculate_drop_path_rates(drop_path_rate, sum(depths)))
        levels = nn.ModuleList()
        for i, depth in enumerate(depths):
            dim, last = embed_dim * 2**i, i == len(depths) - 1
            blocks = []
            for step in per_block(steps[i], depth):
                window = (num_heads[i], kernels[i], step)
                attn = NeighborhoodAttention(dim, *window, proj_drop_rate, **dd)
                rate = next(drop_paths)
                blocks.append(Block(dim, attn, mlp_ratio, layer_scale, proj_drop_rate, rate, **dd))
            downsample = nn.Identity() if last else type(self).downsample(dim, **dd)
            levels.append(Level(blocks, downsample))
            module = f"{self.stages_name}.{i}.blocks"
            info = {"num_chs": dim, "reduction": 4 * 2**i, "module": module}
            self.feature_info.append(info)
        setattr(self, self.stages_name, levels)
        self._add_head(dim, global_pool, drop_rate, dd)


def per_block(dilation: int | Sequence[int], depth: int) -> list[int]:
    """Dilations of a level's blocks: 1 and ``dilation`` in turn, unless there is one for each."""
    if isinstance(dilation, int):
        return [dilation if i % 2 else 1 for i in range(depth)]
    if len(dilation) != depth:
        raise ValueError(
            f"dilations: expected one int, or one for each of a level's {depth} blocks, "
            f"got {tuple(dilation)}"
        )
    return list(dilation)


def cycled(cycles: Sequence[Sequence[int]], depths: Sequence[int]) -> list[list[int]]:
    """Dilations per level and block: the odd blocks of a level take its cycle's values in turn."""
    return [
        [cycle[i // 2 % len(cycle)] if i % 2 else 1 for i in range(depth)]
        for cycle, depth in zip(cycles, depths, strict=True)
    ]


class DensePyramid(nn.Module):
    """The authors' form for detection and segmentation: a LayerNorm for each map it returns.

    The norms act on the outputs alone: every level gets the un-normalised map before it.

    Args:
        model: gives its stem and levels; it is not to be used further.
        out_indices: ascending indices of the levels whose maps are returned.
    """

    def __init__(self, model: Backbone, out_indices: Sequence[int]) -> None:
        super().__init__()
        dd = get_device_dtype(model)
        model.prune_intermediate_layers(list(out_indices), prune_norm=True)
        self.in_chans, self.min_size = model.in_chans, model.min_size
        self.stages_name = model.stages_name
        self.patch_embed = model.patch_embed
        setattr(self, self.stages_name, model.feature_stages)
        self.grad_checkpointing = False
        self.out_indices = tuple(out_indices)
        for i in self.out_indices:
            self.add_module(f"norm{i}", nn.LayerNorm(model.feature_info[i]["num_chs"], **dd))

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute blocks in the backward pass instead of storing their intermediate values."""
        self.grad_checkpointing = enable

    def forward(self, x: Tensor) -> list[Tensor]:
        """[B, in_chans, H, W] -> maps [B, C, H / stride, W / stride], sizes rounded up."""
        x = self.patch_embed(checked_image(x, self.in_chans, self.min_size))
        maps = []
        for i, level in enumerate(getattr(self, self.stages_name)):
            x = level(x, self.grad_checkpointing)
            if i in self.out_indices:
                maps.append(self.get_submodule(f"norm{i}")(x).permute(0, 3, 1, 2).contiguous())
            x = level.downsample(x)
        return maps


def checkpoint_filter_fn(state_dict: Mapping[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """A state dict of a `NeighborhoodPyramid`, whose authors' names are ours, for ``model``.

    One in transformers' layout is renamed. Position tables for another kernel size are resized, see
    `resized_rpb`. A classification checkpoint has no norms for the maps of a dense model: there
    they keep their values, as with the authors.
    """
    if is_transformers(state_dict):
        state_dict = from_transformers(state_dict)
    found = resized_rpb(state_dict, model)
    if isinstance(model, DensePyramid) and "norm.weight" in found:
        norms = {k: v for k, v in model.state_dict().items() if k.startswith("norm")}
        return norms | found
    return found


def resized_rpb(state_dict: Mapping[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """A state dict whose position tables fit the kernels of ``model``.

    Tables [heads, 2k - 1, 2k - 1] of odd kernels k from 3 on are resized bicubically, corners not
    aligned, at least in float32. Whatever else does not fit stays as it is. Source: a comment in
    SHI-Labs/Neighborhood-Attention-Transformer's classification/dinat.py, by which the tables of
    ``dinat_large`` for 11 x 11 tokens were so made from those for 7 x 7, as Swin's for other
    windows.
    """
    own = model.state_dict()
    found = dict(state_dict)
    for name, table in state_dict.items():
        if not name.endswith(".rpb") or name not in own or table.shape == own[name].shape:
            continue
        shape = own[name].shape
        if _has_kernel(table) and _has_kernel(own[name]) and len(table) == shape[0]:
            exact = table.to(torch.promote_types(table.dtype, torch.float32))
            resized = F.interpolate(exact[None], shape[1:], mode="bicubic")[0]
            found[name] = resized.to(table.dtype)
    return found


def _has_kernel(table: Tensor) -> bool:
    """Whether a position table is [heads, 2k - 1, 2k - 1] of an odd kernel k from 3 on."""
    if table.ndim != 3 or not table.is_floating_point():
        return False
    height, width = table.shape[1:]
    return height == width >= 5 and width % 4 == 1


def is_window_table(table: Tensor, own: Tensor) -> bool:
    """Whether a position table [(2w - 1) ** 2, heads] of square windows is for others than ``own``.

    Where other windows have as many entries, nothing tells them apart.
    """
    if table.ndim != 2 or table.shape[1:] != own.shape[1:] or not table.is_floating_point():
        return False
    side = math.isqrt(len(table))
    return len(table) != len(own) and side**2 == len(table) and side % 2 == 1


def resized_window_table(table: Tensor, window: tuple[int, int], shape: Sequence[int]) -> Tensor:
    """Such a table for other windows, bicubically, at least in float32.

    Source: load_pretrained() in utils.py of microsoft/Swin-Transformer.
    """
    exact = table.to(torch.promote_types(table.dtype, torch.float32))
    resized: Tensor = resize_rel_pos_bias_table_simple(exact, window, tuple(shape))
    return resized.to(table.dtype)


def window_index(window: tuple[int, int]) -> Tensor:
    """The entry of a window's position table for every query and key, [L, L]."""
    return windows.entries(window, window, torch.device("cpu"))


def window_mask(size: tuple[int, int], window: tuple[int, int], shift: tuple[int, int]) -> Tensor:
    """What is added to the scores in shifted windows: 0 or -100, [windows, L, L].

    Args:
        size: (H, W) of the map, in tokens.
        window: in tokens, as are shifts.
        shift: of the windows.
    """
    axes = zip(size, window, shift, strict=True)
    rows, columns = (windows.axis(*axis, "dense", torch.device("cpu")).region for axis in axes)
    region = (3 * rows[:, None, :, None] + columns[:, None]).flatten(2).flatten(0, 1)
    apart = region[:, :, None] != region[:, None]
    return torch.zeros(apart.shape).masked_fill(apart, windows.MASKED)


def no_buffers(model: nn.Module) -> dict[str, Tensor]:
    """What the authors of some families store beside parameters: nothing."""
    return {}
