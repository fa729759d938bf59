"""CSwin as a host of other attentions (Dong et al., arXiv 2107.00652).

Facts from the code of families that build on it: LeapLabTHU/Agent-Attention, commit 207ce3e, and
LeapLabTHU/InLine, commit e463a6f. They give another attention as a mixer; the projections around it
belong to the block.

Quirks:
    - Half of the heads attend in stripes of the map's full height, half in stripes of its full
      width; the first half of the channels are the first half of the heads. The last stage attends
      to the whole map in one branch.
    - LePE: a depthwise 3 x 3 convolution of the values is added to the attention's output. Each
      stripe has zeros around it: the convolution does not see its neighbors.
    - The authors take no maps that their stripes do not divide. Here a map narrower than a stripe
      is one stripe; any other is completed with zero queries, keys and values behind the
      projection: a padded position has score 0, so that it is attended to, and the value 0.
    - Where a stripe is as wide as the map the authors build one branch instead of two. Here only
      the last stage, and what a mixer replaces, has one.
    - The stem is a 7 x 7 convolution with stride 4 and two zeros at every border, merging a 3 x 3
      convolution with stride 2; a LayerNorm follows both. Images are completed to multiples of 4.
    - Every LayerNorm has eps 1e-5. There is no position embedding.
    - Stages are called ``stage1`` to ``stage4``, and their attention stands in ``attns.0`` and
      ``attns.1``.

Shapes: B images, H x W tokens of the stage at hand, C channels. Tokens are [B, H, W, C].
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import DropPath, Mlp, calculate_drop_path_rates, register_notrace_function
from timm.models import checkpoint_seq
from torch import Tensor, nn

from vitarium.backbones._blocks import (
    checked_size,
    head_dim,
    refuse_attention_dropout,
)
from vitarium.backbones._hosts._host import Host
from vitarium.backbones._hosts.swin import Mixer
from vitarium.ops import window_attention


class LePEAttention(nn.Module):
    """Attention in stripes or to the whole map, plus a depthwise convolution of the values.

    Args:
        dim: channels of this branch.
        num_heads: of this branch.
        window_size: (height, width) in tokens; None for the map's.
    """

    def __init__(
        self, dim: int, num_heads: int, window_size: tuple[int | None, int | None], **dd: Any
    ) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.head_dim = head_dim(dim, num_heads)
        self.window_size = window_size
        self.get_v = nn.Conv2d(dim, dim, 3, padding=1, groups=dim, **dd)

    def forward(self, qkv: Tensor) -> Tensor:
        """[B, H, W, 3C] or [B, H, W, 3, C] -> [B, H, W, C]."""
        B, H, W = qkv.shape[:3]
        maps = qkv.reshape(B, H, W, 3, self.num_heads, self.head_dim)
        query, key, value = maps.unbind(3)
        if self.window_size == (None, None):
            q, k, v = (x.flatten(1, 2).transpose(1, 2) for x in (query, key, value))
            x = F.scaled_dot_product_attention(q, k, v).transpose(1, 2)
        else:
            x = window_attention(query, key, value, self.window_size)
        value = value.flatten(3)
        return x.reshape(value.shape) + self._lepe(value)

    def _lepe(self, value: Tensor) -> Tensor:
        """[B, H, W, C] -> [B, H, W, C]: zeros between stripes let one convolution take them all."""
        height, width = self.window_size
        if height is None and width is None:
            return self._convolved(value)
        axis, stripe = (2, width) if height is None else (1, height)
        assert stripe is not None
        apart, together = separated(value.shape[axis], stripe, value.device)
        zero = (0, 0, 0, 1) if axis == 2 else (0, 0, 0, 0, 0, 1)
        value = F.pad(value, zero).index_select(axis, apart)
        return self._convolved(value).index_select(axis, together)

    def _convolved(self, x: Tensor) -> Tensor:
        y: Tensor = self.get_v(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        return y


@register_notrace_function
def separated(length: int, stripe: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Indices that put something between stripes of an axis, and those that take it out.

    Returns:
        Where every place of the longer axis comes from, ``length`` if from nowhere; and where the
        axis' positions went, [length].
    """
    count = (length + stripe - 1) // stripe
    place = torch.arange(count * (stripe + 1), device=device)
    number, inner = place // (stripe + 1), place % (stripe + 1)
    source = (number * stripe + inner).clamp(max=length)
    index = torch.arange(length, device=device)
    return torch.where(inner < stripe, source, length), index + index // stripe


class CSwinBlock(nn.Module):
    """``x + proj(attns(qkv(norm1(x))))``, then ``x + mlp(norm2(x))``."""

    def __init__(
        self,
        dim: int,
        attns: Sequence[nn.Module],
        mlp_ratio: float,
        proj_drop: float = 0.0,
        drop_path: float = 0.0,
        **dd: Any,
    ) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, **dd)
        self.qkv = nn.Linear(dim, 3 * dim, **dd)
        self.attns = nn.ModuleList(attns)
        self.proj = nn.Linear(dim, dim, **dd)
        self.proj_drop = nn.Dropout(proj_drop)
        self.norm2 = nn.LayerNorm(dim, **dd)
        self.mlp = Mlp(dim, int(dim * mlp_ratio), drop=proj_drop, **dd)
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """[B, H, W, C] -> [B, H, W, C]."""
        qkv = self.qkv(self.norm1(x))
        if len(self.attns) == 1:
            y = self.attns[0](qkv)
        else:
            first, second = qkv.unflatten(-1, (3, 2, -1)).unbind(4)  # FX takes no loop
            y = torch.cat([self.attns[0](first), self.attns[1](second)], -1)
        x = x + self.drop_path(self.proj_drop(self.proj(y)))
        return x + self.drop_path(self.mlp(self.norm2(x)))


class _HeadsLast(nn.Module):
    """[B, C, H, W] -> [B, H, W, C]."""

    def forward(self, x: Tensor) -> Tensor:
        return x.permute(0, 2, 3, 1)


class Merge(nn.Module):
    """A strided convolution and a LayerNorm."""

    def __init__(self, dim: int, **dd: Any) -> None:
        super().__init__()
        self.conv = nn.Conv2d(dim, 2 * dim, 3, stride=2, padding=1, **dd)
        self.norm = nn.LayerNorm(2 * dim, **dd)

    def forward(self, x: Tensor) -> Tensor:
        """[B, H, W, C] -> [B, ceil(H / 2), ceil(W / 2), 2C]."""
        y: Tensor = self.norm(self.conv(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1))
        return y


class CSwin(Host):
    """Stem, four stages of blocks, LayerNorm, pooling, linear classifier.

    Args:
        num_classes: outputs of the classifier; 0 for none.
        in_chans: channels of the image.
        global_pool: ``avg``, ``max``, ``avgmax``, ``catavgmax``, or ``""`` for none.
        img_size: of the images for which a mixer's parameters are made, in pixels: an int or
            (H, W). Images of any other size work too.
        embed_dim: channels of the first stage; every further stage has twice as many.
        depths: blocks of each stage.
        num_heads: attention heads of each stage; even but in the last one, unless a mixer takes
            all blocks.
        split_size: width of the stripes of each stage, in tokens; the last one's has no effect.
            torch.export makes one program for all sizes where stripes are at least 2 wide.
        mlp_ratio: hidden over input channels in the MLPs.
        mixer: gives every block its attention: a module [B, H, W, 3C] -> [B, H, W, C] of query,
            key and value, or None for stripes. It is called with ``stage``, ``block`` (counted
            from 0 in each stage), ``dim``, ``num_heads``, ``size`` (of the map at ``img_size``,
            in tokens), ``device`` and ``dtype``. A module with a method ``set_input_size`` is
            told the map's new size when the model's changes.
        drop_rate: dropout before the classifier, in [0, 1).
        proj_drop_rate: dropout after the projections of attention and MLP, in [0, 1).
        attn_drop_rate: must be 0: the attention has no dropout.
        drop_path_rate: stochastic depth of the last block, in [0, 1); it rises linearly from 0
            over all blocks.
        device: of the parameters.
        dtype: of the parameters.

    Attributes:
        input_size: (H, W) of the images for which the parameters are made, in pixels.

    Raises:
        ValueError: an argument outside of these.
    """

    def __init__(
        self,
        num_classes: int = 1000,
        in_chans: int = 3,
        global_pool: str = "avg",
        img_size: int | tuple[int, int] = 224,
        embed_dim: int = 64,
        depths: Sequence[int] = (2, 4, 18, 1),
        num_heads: Sequence[int] = (2, 4, 8, 16),
        split_size: Sequence[int] = (1, 2, 7, 7),
        mlp_ratio: float = 4.0,
        mixer: Mixer | None = None,
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
        for name, values in (("num_heads", num_heads), ("split_size", split_size)):
            if len(values) != len(depths) or min(values) < 1:
                raise ValueError(
                    f"{name}: expected a positive number per stage ({len(depths)}), "
                    f"got {tuple(values)}"
                )
        self.input_size = checked_size(img_size, self.min_size)
        self.stage1_conv_embed = nn.Sequential(
            nn.Conv2d(in_chans, embed_dim, 7, stride=4, padding=2, **dd),
            _HeadsLast(),
            nn.LayerNorm(embed_dim, **dd),
        )
        drop_paths: Any = iter(calculate_drop_path_rates(drop_path_rate, sum(depths)))
        for i, depth in enumerate(depths):
            dim, heads, last = embed_dim * 2**i, num_heads[i], i == len(depths) - 1
            if i > 0:
                self.add_module(f"merge{i}", Merge(dim // 2, **dd))
            blocks = []
            for j in range(depth):
                mixed = None
                if mixer is not None:
                    about = {"stage": i, "block": j, "size": self._map_size(i)}
                    mixed = mixer(dim=dim, num_heads=heads, **about, **dd)
                attns = _stripes(dim, heads, split_size[i], last, dd) if mixed is None else [mixed]
                rate = next(drop_paths)
                blocks.append(CSwinBlock(dim, attns, mlp_ratio, proj_drop_rate, rate, **dd))
            self.add_module(f"stage{i + 1}", nn.Sequential(*blocks))
            info = {"num_chs": dim, "reduction": 4 * 2**i, "module": f"stage{i + 1}"}
            self.feature_info.append(info)
        self._stage_count = len(depths)
        self._add_head(dim, global_pool, drop_rate, dd)

    @property
    def feature_stages(self) -> list[nn.Module]:
        """The modules whose outputs are the feature maps, in order."""
        return [getattr(self, f"stage{i + 1}") for i in range(self._stage_count)]

    def _keep_stages(self, count: int) -> None:
        for i in range(count, self._stage_count):
            delattr(self, f"merge{i}")
            delattr(self, f"stage{i + 1}")
        self._stage_count = count

    def _embed(self, image: Tensor) -> Tensor:
        image = self._checked(image)
        # so many zeros complete any image, and what is too much is no patch
        x: Tensor = self.stage1_conv_embed(F.pad(image, (0, 2, 0, 2)))
        return x

    def _stage(self, index: int, x: Tensor) -> Tensor:
        if index > 0:
            x = getattr(self, f"merge{index}")(x)
        stage = getattr(self, f"stage{index + 1}")
        y: Tensor = checkpoint_seq(stage, x) if self.grad_checkpointing else stage(x)
        return y

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Patterns by which timm groups parameters, for layer-wise learning rates."""
        previous = (99999,)  # timm's mark for "the group before"
        fine = [
            (r"^stage(\d+)\.(\d+)", None),
            (r"^merge(\d+)", previous),
            (r"^norm", previous),
        ]
        stem = r"^stage1_conv_embed"
        return {"stem": stem, "blocks": r"^(?:stage|merge)(\d+)\." if coarse else fine}


def _stripes(
    dim: int, num_heads: int, split: int, last: bool, dd: dict[str, Any]
) -> list[nn.Module]:
    """CSwin's own attention: two branches of half the heads, or one to the whole map."""
    if last:
        return [LePEAttention(dim, num_heads, (None, None), **dd)]
    head_dim(dim, num_heads)
    if num_heads % 2:
        raise ValueError(f"num_heads: expected even numbers where heads split, got {num_heads}")
    half = (dim // 2, num_heads // 2)
    return [LePEAttention(*half, window, **dd) for window in ((None, split), (split, None))]
