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

Shapes: B images, H x W tokens of the stage at hand, C channels. Tokens are [B, H, W, C].
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from itertools import islice
from typing import Any

import torch
from timm.layers import (
    DropPath,
    Mlp,
    SelectAdaptivePool2d,
    get_device_dtype,
    register_notrace_function,
    to_ntuple,
)
from timm.models import checkpoint_seq, generate_default_cfgs
from timm.models._features import feature_take_indices
from torch import Tensor, nn

from vitarium.backbones._registry import Published, build, packaged, register
from vitarium.checkpoints import Renames, Weight
from vitarium.ops import neighborhood_attention

__all__ = ["NAT", "DenseNAT"]

_MIN_SIZE = 32
_POOLS = ("avg", "max", "avgmax", "catavgmax", "")


class NeighborhoodAttention(nn.Module):
    """Multi-head attention of every token to the ``kernel_size`` x ``kernel_size`` nearest ones."""

    def __init__(
        self, dim: int, num_heads: int, kernel_size: int, proj_drop: float = 0.0, **dd: Any
    ) -> None:
        super().__init__()
        if dim % num_heads:
            raise ValueError(f"num_heads: expected a divisor of dim = {dim}, got {num_heads}")
        if kernel_size < 1 or kernel_size % 2 == 0:
            raise ValueError(f"kernel_size: expected an odd size, got {kernel_size}")
        self.num_heads = num_heads
        self.head_dim = dim // num_heads
        self.kernel_size = kernel_size
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
        x = neighborhood_attention(query, key, value, self.kernel_size, bias=self.rpb, pad=pad)
        return self.proj_drop(self.proj(x.reshape(B, H, W, C)))


class Block(nn.Module):
    """``x + gamma1 * attn(norm1(x))``, then ``x + gamma2 * mlp(norm2(x))``."""

    def __init__(
        self,
        dim: int,
        num_heads: int,
        kernel_size: int,
        mlp_ratio: float,
        layer_scale: float | None = None,
        proj_drop: float = 0.0,
        drop_path: float = 0.0,
        **dd: Any,
    ) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, **dd)
        self.attn = NeighborhoodAttention(dim, num_heads, kernel_size, proj_drop, **dd)
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


@register_notrace_function  # which passes over names with an underscore
def checked_image(image: Tensor, channels: int) -> Tensor:
    """The image, if its shape is one that the stem takes."""
    shape = image.shape
    if len(shape) != 4 or shape[1] != channels or shape[2] < _MIN_SIZE or shape[3] < _MIN_SIZE:
        raise ValueError(
            f"image: expected [B, {channels}, H, W] with H, W >= {_MIN_SIZE}, got shape "
            f"{tuple(shape)}"
        )
    return image


class Stem(nn.Module):
    """Two strided 3 x 3 convolutions and a LayerNorm: a quarter of the resolution."""

    def __init__(self, in_chans: int, dim: int, **dd: Any) -> None:
        super().__init__()
        self.in_chans = in_chans
        self.proj = nn.Sequential(
            nn.Conv2d(in_chans, dim // 2, 3, stride=2, padding=1, **dd),
            nn.Conv2d(dim // 2, dim, 3, stride=2, padding=1, **dd),
        )
        self.norm = nn.LayerNorm(dim, **dd)

    def forward(self, x: Tensor) -> Tensor:
        """[B, in_chans, H, W] -> [B, ceil(H / 4), ceil(W / 4), C]."""
        return self.norm(self.proj(checked_image(x, self.in_chans)).permute(0, 2, 3, 1))


class Downsample(nn.Module):
    """A strided 3 x 3 convolution and a LayerNorm: half the resolution, twice the channels."""

    def __init__(self, dim: int, **dd: Any) -> None:
        super().__init__()
        self.reduction = nn.Conv2d(dim, 2 * dim, 3, stride=2, padding=1, bias=False, **dd)
        self.norm = nn.LayerNorm(2 * dim, **dd)

    def forward(self, x: Tensor) -> Tensor:
        """[B, H, W, C] -> [B, ceil(H / 2), ceil(W / 2), 2C]."""
        return self.norm(self.reduction(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1))


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


class NAT(nn.Module):
    """Neighborhood Attention Transformer: stem, levels, LayerNorm, pooling, linear classifier.

    Args:
        num_classes: outputs of the classifier; 0 for none.
        in_chans: channels of the image.
        global_pool: ``avg``, ``max``, ``avgmax``, ``catavgmax``, or ``""`` for none.
        embed_dim: channels of the first level; every further level has twice as many.
        depths: blocks of each level.
        num_heads: attention heads of each level.
        kernel_size: odd window size in tokens, of all levels or of each one.
        mlp_ratio: hidden over input channels in the MLPs.
        layer_scale: initial value of the branches' learned factors; None for no factors.
        drop_rate: dropout before the classifier, in [0, 1).
        proj_drop_rate: dropout after the projections of attention and MLP, in [0, 1).
        attn_drop_rate: must be 0: the attention has no dropout.
        drop_path_rate: stochastic depth of the last block, in [0, 1); it rises linearly from 0
            over all blocks. The authors trained mini and tiny with 0.2, small with 0.3, base
            with 0.5.
        device: of the parameters.
        dtype: of the parameters.

    Raises:
        ValueError: an argument outside of these.
    """

    def __init__(
        self,
        num_classes: int = 1000,
        in_chans: int = 3,
        global_pool: str = "avg",
        embed_dim: int = 64,
        depths: Sequence[int] = (3, 4, 6, 5),
        num_heads: Sequence[int] = (2, 4, 8, 16),
        kernel_size: int | Sequence[int] = 7,
        mlp_ratio: float = 3.0,
        layer_scale: float | None = None,
        drop_rate: float = 0.0,
        proj_drop_rate: float = 0.0,
        attn_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        if attn_drop_rate:
            raise ValueError(f"attn_drop_rate: expected 0 (no such dropout), got {attn_drop_rate}")
        kernel_sizes = to_ntuple(len(depths))(kernel_size)
        for name, values in (("num_heads", num_heads), ("kernel_size", kernel_sizes)):
            if len(values) != len(depths):
                raise ValueError(
                    f"{name}: expected one per level ({len(depths)}), got {tuple(values)}"
                )
        self.num_classes = num_classes
        self.in_chans = in_chans
        self.output_fmt = "NHWC"
        self.grad_checkpointing = False
        self.patch_embed = Stem(in_chans, embed_dim, **dd)
        drop_paths = iter(torch.linspace(0, drop_path_rate, sum(depths), device="cpu").tolist())
        self.levels: Any = nn.ModuleList()  # of Level, which torch's type cannot say
        self.feature_info = []
        for i, (depth, heads, kernel) in enumerate(
            zip(depths, num_heads, kernel_sizes, strict=True)
        ):
            dim = embed_dim * 2**i
            blocks = [
                Block(dim, heads, kernel, mlp_ratio, layer_scale, proj_drop_rate, rate, **dd)
                for rate in islice(drop_paths, depth)
            ]
            last = i == len(depths) - 1
            self.levels.append(Level(blocks, nn.Identity() if last else Downsample(dim, **dd)))
            info = {"num_chs": dim, "reduction": 4 * 2**i, "module": f"levels.{i}.blocks"}
            self.feature_info.append(info)
        self.num_features = dim
        self.norm: nn.Module = nn.LayerNorm(dim, **dd)
        self.head_drop = nn.Dropout(drop_rate)
        self.apply(self._init_weights)
        self.reset_classifier(num_classes, global_pool)

    @staticmethod
    def _init_weights(module: nn.Module) -> None:
        if isinstance(module, nn.Linear):
            nn.init.trunc_normal_(module.weight, std=0.02)
            nn.init.zeros_(module.bias)
        elif isinstance(module, NeighborhoodAttention):
            nn.init.trunc_normal_(module.rpb, std=0.02)

    def no_weight_decay(self) -> set[str]:
        """Names of the position biases, which the authors do not decay."""
        return {name for name, _ in self.named_parameters() if name.endswith(".rpb")}

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Patterns by which timm groups parameters, for layer-wise learning rates."""
        previous = (99999,)  # timm's mark for "the group before"
        fine = [
            (r"^levels\.(\d+)\.blocks\.(\d+)", None),
            (r"^levels\.(\d+)\.downsample", previous),
            (r"^norm", previous),
        ]
        return {"stem": r"^patch_embed", "blocks": r"^levels\.(\d+)" if coarse else fine}

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

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """Feature maps of the levels.

        Args:
            x: image [B, in_chans, H, W].
            indices: which levels; an int for the last so many, None for all.
            norm: apply the final LayerNorm to the last level's map, the only one that it fits.
            stop_early: do not compute levels behind the last index.
            output_fmt: ``NCHW`` or ``NHWC``, of the feature maps.
            intermediates_only: return only the feature maps.

        Returns:
            Maps in the order of the levels, or (final map, maps). The final map is what
            `forward_features` returns, or, stopped early, the last computed map as it is.
        """
        if output_fmt not in ("NCHW", "NHWC"):
            raise ValueError(f"output_fmt: expected NCHW or NHWC, got {output_fmt!r}")
        taken, last = feature_take_indices(len(self.levels), indices)
        x = self.patch_embed(x)
        maps = []
        for i, level in enumerate(self.levels[: last + 1] if stop_early else self.levels):
            if i > 0:
                x = self.levels[i - 1].downsample(x)
            x = level(x, self.grad_checkpointing)
            if i in taken:
                y = self.norm(x) if norm and i == len(self.levels) - 1 else x
                maps.append(y.permute(0, 3, 1, 2).contiguous() if output_fmt == "NCHW" else y)
        if intermediates_only:
            return maps
        return (self.norm(x) if i == len(self.levels) - 1 else x), maps

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Remove what the feature maps ``indices`` do not need.

        The final norm goes with the last level, or alone if ``prune_norm``.

        Returns:
            The levels' indices, counted from the first.
        """
        taken, last = feature_take_indices(len(self.levels), indices)
        if prune_norm or last < len(self.levels) - 1:
            self.norm = nn.Identity()
        self.levels = self.levels[: last + 1]
        self.levels[-1].downsample = nn.Identity()
        if prune_head:
            self.reset_classifier(0, "")
        return taken

    def forward_features(self, x: Tensor) -> Tensor:
        """[B, in_chans, H, W] -> [B, ceil(H / 32), ceil(W / 32), num_features], normalised."""
        x = self.patch_embed(x)
        for level in self.levels:
            x = level.downsample(level(x, self.grad_checkpointing))
        return self.norm(x)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Pool and classify; without the classifier if ``pre_logits``."""
        x = self.head_drop(self.global_pool(x))
        return x if pre_logits else self.head(x)

    def forward(self, x: Tensor) -> Tensor:
        """[B, in_chans, H, W], H and W at least 32 -> logits [B, num_classes]."""
        return self.forward_head(self.forward_features(x))


class DenseNAT(nn.Module):
    """The authors' form for detection and segmentation: a LayerNorm for each map it returns.

    The norms act on the outputs alone: every level gets the un-normalised map before it.

    Args:
        model: gives its stem and levels; it is not to be used further.
        out_indices: ascending indices of the levels whose maps are returned.
    """

    def __init__(self, model: NAT, out_indices: Sequence[int]) -> None:
        super().__init__()
        dd = get_device_dtype(model)
        model.prune_intermediate_layers(list(out_indices), prune_norm=True)
        self.patch_embed = model.patch_embed
        self.levels = model.levels
        self.grad_checkpointing = False
        self.out_indices = tuple(out_indices)
        for i in self.out_indices:
            self.add_module(f"norm{i}", nn.LayerNorm(model.feature_info[i]["num_chs"], **dd))

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute blocks in the backward pass instead of storing their intermediate values."""
        self.grad_checkpointing = enable

    def forward(self, x: Tensor) -> list[Tensor]:
        """[B, in_chans, H, W] -> maps [B, C, H / stride, W / stride], sizes rounded up."""
        x = self.patch_embed(x)
        maps = []
        for i, level in enumerate(self.levels):
            x = level(x, self.grad_checkpointing)
            if i in self.out_indices:
                maps.append(self.get_submodule(f"norm{i}")(x).permute(0, 3, 1, 2).contiguous())
            x = level.downsample(x)
        return maps


_RENAMES = Renames(())  # the authors' names are ours


def checkpoint_filter_fn(state_dict: Mapping[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """An authors' state dict in the names of ``model``.

    A classification checkpoint has no norms for the maps of a dense model: there they keep
    their values, as with the authors.
    """
    renamed = _RENAMES.to_ours(state_dict, model)
    if isinstance(model, DenseNAT) and "norm.weight" in renamed:
        norms = {k: v for k, v in model.state_dict().items() if k.startswith("norm")}
        return norms | renamed
    return renamed


_CODE_LICENCE = "MIT"
_README = "README of SHI-Labs/Neighborhood-Attention-Transformer, d334f5b"
_PUBLISHED = {
    "nat_mini.shi_in1k": Published(top1=81.8, gflops=2.7, source=_README),
    "nat_tiny.shi_in1k": Published(top1=83.2, gflops=4.3, source=_README),
    "nat_small.shi_in1k": Published(top1=83.7, gflops=7.8, source=_README),
    "nat_base.shi_in1k": Published(top1=84.3, gflops=13.7, source=_README),
}
_URL = "https://shi-labs.com/projects/nat/checkpoints/CLS"
_DIGITS = "nat_atto.vitarium_digits"
_WEIGHTS = {
    _DIGITS: Weight(
        file=f"{_DIGITS}.safetensors",
        size=5_636_104,
        sha256="1a94fd0fa93b12d9b5cd8b94e4a25cef4c76bcef4ae3210791ee962c41abeabe",
        licence="Apache-2.0",
    ),
    **{name: Weight(url=f"{_URL}/{name.partition('.')[0]}.pth") for name in _PUBLISHED},
}


def _cfg(name: str, **kwargs: Any) -> dict[str, Any]:
    """The rest is timm's default, and the authors': 224 x 224, bicubic, ImageNet's mean and std."""
    return {
        "url": _WEIGHTS[name].url,
        "file": packaged(_WEIGHTS[name]),
        "license": _WEIGHTS[name].licence,
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
        **{name: _cfg(name, origin_url=_ORIGIN) for name in _PUBLISHED},
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


def dense_adapter(model: NAT, task: str, out_indices: Sequence[int]) -> DenseNAT:
    """The authors' backbone of detection and of segmentation (``task``), which are the same."""
    return DenseNAT(model, out_indices)
