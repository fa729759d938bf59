"""timm's blocks of Swin, SwinV2 and DaViT, computed with our ops.

Each class is timm's with another ``forward``: a block becomes one of ours, and timm's again, by
its class alone. Parameters, buffers, hooks and settings stay where they are. Where no gradient is
wanted, blocks on a CPU also take their products, GELU and residuals from `vitarium.ops._linear`.

Shapes: B images, H x W tokens of the stage at hand, C channels. Tokens are [B, H, W, C].
"""

from __future__ import annotations

from typing import Any

import timm.layers
import torch
import torch.nn.functional as F
from timm.layers import DropPath, Mlp, register_notrace_module
from timm.models import davit, swin_transformer, swin_transformer_v2
from torch import Tensor, nn

from vitarium.ops import _select, channel_attention, window_attention
from vitarium.ops._linear import linear, residual_mlp

_has_global_hooks = nn.modules.module._has_any_global_hook


def _heads(qkv: Tensor, num_heads: int) -> tuple[Tensor, ...]:
    """[B, H, W, 3 * heads * head_dim] -> query, key and value, [B, H, W, heads, head_dim]."""
    return qkv.unflatten(-1, (3, num_heads, -1)).unbind(3)


def _table(table: Tensor, window: tuple[int, int]) -> Tensor:
    """[(2wh - 1) * (2ww - 1), heads] -> [heads, 2wh - 1, 2ww - 1]."""
    return table.t().unflatten(1, (2 * window[0] - 1, 2 * window[1] - 1))


def _without_dropout(attn: Any) -> None:
    if attn.training and attn.attn_drop.p:
        raise ValueError(f"attn_drop: expected 0 (the op has no dropout), got {attn.attn_drop.p}")


# Attention. timm pads before the projection, so that a padded position holds the projection's bias.
# A ``residual`` is given where no gradient is wanted, and added.


class FusedSwinAttention(swin_transformer.WindowAttention):
    """timm's attention of Swin, on maps in the place of windows."""

    def forward(  # type: ignore[override]
        self,
        x: Tensor,
        shift_size: tuple[int, int],
        semantics: str,
        residual: Tensor | None = None,
    ) -> Tensor:
        """[B, H, W, C] -> [B, H, W, C]."""
        _without_dropout(self)
        bias, num_heads = self.qkv.bias, self.num_heads
        out = window_attention(
            *_heads(_project(self.qkv, x), num_heads),
            self.window_size,
            shift_size,
            bias=_table(self.relative_position_bias_table, self.window_size),
            scale=self.scale,
            pad=None if bias is None else bias.unflatten(0, (3, num_heads, -1)),
            semantics=semantics,
        )
        return _projected(self, out, residual)


class FusedSwinV2Attention(swin_transformer_v2.WindowAttention):
    """timm's attention of SwinV2, on maps in the place of windows."""

    def forward(  # type: ignore[override]
        self, x: Tensor, shift_size: tuple[int, int], semantics: str
    ) -> Tensor:
        """[B, H, W, C] -> [B, H, W, C]."""
        _without_dropout(self)
        bias = None
        if self.q_bias is not None:
            bias = torch.cat((self.q_bias, self.k_bias, self.v_bias))  # type: ignore[arg-type]
        product = F.linear if _needs_modules(x) else linear
        qkv = product(x, self.qkv.weight, bias)
        table = self.cpb_mlp(self.relative_coords_table).flatten(0, 2)
        out = window_attention(
            *_heads(qkv, self.num_heads),
            self.window_size,
            shift_size,
            bias=16 * torch.sigmoid(_table(table, self.window_size)),
            logit_scale=self.logit_scale.flatten(),
            pad=None if bias is None else bias.unflatten(0, (3, self.num_heads, -1)),
            semantics=semantics,
        )
        return self.proj_drop(_project(self.proj, out.flatten(3)))


class FusedDaVitWindowAttention(davit.WindowAttention):
    """timm's window attention of DaViT, on maps in the place of windows."""

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """[B, H, W, C] -> [B, H, W, C]."""
        bias, num_heads = self.qkv.bias, self.num_heads
        out = window_attention(
            *_heads(_project(self.qkv, x), num_heads),
            self.window_size,
            scale=self.scale,
            pad=None if bias is None else bias.unflatten(0, (3, num_heads, -1)),
            semantics="dense",
        )
        return _projected(self, out, residual)


class FusedChannelAttention(davit.ChannelAttention):
    """timm's channel attention of DaViT, on maps."""

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """[B, H, W, C] -> [B, H, W, C]."""
        qkv = _heads(_project(self.qkv, x), self.num_heads)
        return _projected(self, channel_attention(*qkv, scale=self.scale), residual)


class FusedChannelAttentionV2(davit.ChannelAttentionV2):
    """timm's channel attention of Florence-2, on maps."""

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """[B, H, W, C] -> [B, H, W, C]."""
        qkv = _heads(_project(self.qkv, x), self.groups)
        scale = None if self.dynamic_scale else self.head_dim**-0.5
        out = channel_attention(*qkv, mode="florence", scale=scale)
        return _projected(self, out, residual)


# Where modules need not be called one by one.


def _needs_modules(x: Tensor) -> bool:
    """Whether functions of one precision and of our own are out of place."""
    return (
        x.is_cuda  # where no library joins more than the compiler does
        or (not x.is_meta and torch.is_autocast_enabled(x.device.type))
        or _select.is_exporting()
        or (torch.is_grad_enabled() and _select.is_tracing())  # inductor joins what it sees
    )


_PLAIN = {
    *(nn.Linear, nn.LayerNorm, timm.layers.LayerNorm, Mlp, nn.GELU, nn.ReLU, nn.Conv2d),
    *(nn.Dropout, DropPath, nn.Identity, nn.Softmax, nn.Sequential, davit.ConvPosEnc),
    *(FusedSwinAttention, FusedSwinV2Attention, FusedDaVitWindowAttention),
    *(FusedChannelAttention, FusedChannelAttentionV2),
}


def _is_plain(module: nn.Module) -> bool:
    """Whether calling a module does what timm's code says, and no more."""
    return type(module) in _PLAIN and not (
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks
    )


def _project(layer: nn.Linear, x: Tensor) -> Tensor:
    if _needs_modules(x) or not _is_plain(layer) or layer.weight.dtype != x.dtype:
        out: Tensor = layer(x)
        return out
    return linear(x, layer.weight, layer.bias)


def _projected(attn: Any, x: Tensor, residual: Tensor | None) -> Tensor:
    """[B, H, W, heads, head_dim] -> [B, H, W, C]."""
    x, proj = x.flatten(3), attn.proj
    if residual is not None:
        return linear(x, proj.weight, proj.bias, residual)
    x = _project(proj, x)
    return attn.proj_drop(x) if isinstance(attn, FusedSwinAttention) else x


def _is_fast(block: Any, x: Tensor) -> bool:
    """Whether a block's parts may be run together: nobody would see the difference."""
    mlp, norm = block.mlp, block.norm2
    return (
        not torch.is_grad_enabled()
        and not _needs_modules(x)
        and not block.training
        and not _has_global_hooks()
        and all(_is_plain(module) for module in block.modules() if module is not block)
        and type(mlp.act) is nn.GELU
        and mlp.act.approximate == "none"
        and type(mlp.norm) is nn.Identity
        and norm.weight is not None
        and norm.bias is not None
        and norm.weight.dtype == mlp.fc1.weight.dtype == x.dtype
    )


def _attend(block: Any, x: Tensor, *settings: Any) -> Tensor:
    """The first branch of a block and its residual; ``settings`` go to the attention."""
    attn = block.attn
    if _is_fast(block, x):
        return attn.forward(block.norm1(x), *settings, residual=x)
    out: Tensor = x + block.drop_path1(attn(block.norm1(x), *settings))
    return out


def _feed(block: Any, x: Tensor) -> Tensor:
    """The second branch of a block and its residual."""
    if _is_fast(block, x):
        return _fast_mlp(block, x, norm_first=True)
    out: Tensor = x + block.drop_path2(_mlp(block.mlp, block.norm2(x)))
    return out


def _mlp(mlp: Any, x: Tensor) -> Tensor:
    if not _is_plain(mlp):
        out: Tensor = mlp(x)
        return out
    x = mlp.norm(mlp.drop1(mlp.act(_project(mlp.fc1, x))))
    out = mlp.drop2(_project(mlp.fc2, x))
    return out


def _fast_mlp(block: Any, x: Tensor, norm_first: bool) -> Tensor:
    norm = (block.norm2.weight, block.norm2.bias, block.norm2.eps)
    layers = [(layer.weight, layer.bias) for layer in (block.mlp.fc1, block.mlp.fc2)]
    return residual_mlp(x, norm, layers, norm_first)


def _dual(block: Any, x: Tensor) -> Tensor:
    """A block of DaViT, [B, C, H, W] -> [B, C, H, W]."""
    x = _attend(block, block.cpe1(x).permute(0, 2, 3, 1))
    x = _feed(block, block.cpe2(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1))
    return x.permute(0, 3, 1, 2)


# Blocks: a leaf to FX, as what runs depends on whether gradients are wanted.


@register_notrace_module
class FusedSwinBlock(swin_transformer.SwinTransformerBlock):
    """timm's Swin block with our window attention."""

    semantics = "timm_fixed"  # blocks clamp windows when they are built

    def forward(self, x: Tensor) -> Tensor:
        """[B, H, W, C] -> [B, H, W, C]."""
        return _feed(self, _attend(self, x, self.shift_size, self.semantics))


@register_notrace_module
class FusedSwinV2Block(swin_transformer_v2.SwinTransformerV2Block):
    """timm's SwinV2 block with our window attention."""

    semantics = "timm_fixed"

    def forward(self, x: Tensor) -> Tensor:
        """[B, H, W, C] -> [B, H, W, C]."""
        x = x + self.drop_path1(self.norm1(self.attn(x, self.shift_size, self.semantics)))
        if _is_fast(self, x):
            return _fast_mlp(self, x, norm_first=False)
        return x + self.drop_path2(self.norm2(_mlp(self.mlp, x)))


@register_notrace_module
class FusedSpatialBlock(davit.SpatialBlock):
    """timm's DaViT block of window attention, with ours."""

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] -> [B, C, H, W]."""
        return _dual(self, x)


@register_notrace_module
class FusedChannelBlock(davit.ChannelBlock):
    """timm's DaViT block of channel attention, with ours."""

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] -> [B, C, H, W]."""
        return _dual(self, x)


# What lies between blocks, without arithmetic that divides sizes: one traced program fits them all.


def _quads(x: Tensor) -> Tensor:
    """[B, H, W, C] -> [B, ceil(H / 2), ceil(W / 2), 4C], tokens in timm's order."""
    height, width = x.shape[1:3]
    x = F.pad(x, (0, 0, 0, 1, 0, 1))  # a second row or column too many is not read
    even, odd = x[:, 0:height:2], x[:, 1::2]
    columns = (slice(0, width, 2), slice(1, None, 2))
    return torch.cat([rows[:, :, column] for column in columns for rows in (even, odd)], -1)


class AnySizePatches(timm.layers.PatchEmbed):
    """timm's patch embedding of maps; zeros complete patches at the far borders."""

    def forward(self, x: Tensor) -> Tensor:
        """[B, in_chans, H, W] -> [B, ceil(H / patch), ceil(W / patch), C]."""
        height, width = self.patch_size
        x = self.proj(F.pad(x, (0, width - 1, 0, height - 1)))  # what is too much is no patch
        return self.norm(x.permute(0, 2, 3, 1))


class AnySizeMerging(swin_transformer.PatchMerging):
    """timm's patch merging of Swin."""

    def forward(self, x: Tensor) -> Tensor:
        """[B, H, W, C] -> [B, ceil(H / 2), ceil(W / 2), 2C]."""
        return self.reduction(self.norm(_quads(x)))


class AnySizeMergingV2(swin_transformer_v2.PatchMerging):
    """timm's patch merging of SwinV2."""

    def forward(self, x: Tensor) -> Tensor:
        """[B, H, W, C] -> [B, ceil(H / 2), ceil(W / 2), 2C]."""
        return self.norm(self.reduction(_quads(x)))


class AnySizeStem(davit.Stem):
    """timm's stem of DaViT, whose convolution's own padding completes patches."""

    def forward(self, x: Tensor) -> Tensor:
        """[B, in_chans, H, W] -> [B, C, ceil(H / 4), ceil(W / 4)]."""
        return self.norm(self.conv(x))


class AnySizeDownsample(davit.Downsample):
    """timm's downsampling of DaViT."""

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] -> [B, C', ceil(H / 2), ceil(W / 2)]."""
        if self.conv.kernel_size != (2, 2):
            return super().forward(x)
        return self.conv(F.pad(self.norm(x), (0, 1, 0, 1)))
