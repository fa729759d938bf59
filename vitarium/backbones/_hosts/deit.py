"""DeiT as a host of other attentions (Touvron et al., arXiv 2012.12877).

Authors' code: facebookresearch/deit, Apache-2.0 licence; without distillation. Families whose
authors put another attention into DeiT's blocks give it as a mixer.

Quirks:
    - Every LayerNorm has eps 1e-6; none follows the patches.
    - A class token stands before the map's tokens; the classifier reads it after the final norm.
    - The position embedding has an entry for the class token, which is not resized, and one for
      each patch at ``img_size``; those are resized bicubically for other sizes.
    - The authors take images of one square size; here zeros complete patches at the far borders.

Shapes: B images, H x W patches, C channels. Tokens are [B, 1 + H * W, C], the class token first.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import (
    DropPath,
    Mlp,
    calculate_drop_path_rates,
    register_notrace_function,
)
from timm.models import checkpoint
from torch import Tensor, nn

from vitarium.backbones._blocks import (
    checked_size,
    head_dim,
    refuse_attention_dropout,
)
from vitarium.backbones._hosts._host import Host

Mixer = Callable[..., nn.Module | None]
Size = tuple[int, int]
State = tuple[Tensor, Size]  # tokens, and the map's (H, W)


class TokenAttention(nn.Module):
    """Multi-head attention of every token to all."""

    def __init__(self, dim: int, num_heads: int, proj_drop: float = 0.0, **dd: Any) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.head_dim = head_dim(dim, num_heads)
        self.qkv = nn.Linear(dim, 3 * dim, **dd)
        self.proj = nn.Linear(dim, dim, **dd)
        self.proj_drop = nn.Dropout(proj_drop)

    def forward(self, x: Tensor, size: Size) -> Tensor:
        """[B, 1 + H * W, C] -> [B, 1 + H * W, C]; it needs no ``size``."""
        del size
        B, N, C = x.shape
        qkv = self.qkv(x).reshape(B, N, 3, self.num_heads, self.head_dim)
        query, key, value = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        x = F.scaled_dot_product_attention(query, key, value)
        return self.proj_drop(self.proj(x.transpose(1, 2).reshape(B, N, C)))


class TokenBlock(nn.Module):
    """``x + attn(norm1(x), size)``, then ``x + mlp(norm2(x))``."""

    def __init__(
        self,
        dim: int,
        attn: nn.Module,
        mlp_ratio: float,
        proj_drop: float = 0.0,
        drop_path: float = 0.0,
        **dd: Any,
    ) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6, **dd)
        self.attn = attn
        self.norm2 = nn.LayerNorm(dim, eps=1e-6, **dd)
        self.mlp = Mlp(dim, int(dim * mlp_ratio), drop=proj_drop, **dd)
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()

    def forward(self, x: Tensor, size: Size) -> Tensor:
        """[B, 1 + H * W, C] -> [B, 1 + H * W, C]."""
        x = x + self.drop_path(self.attn(self.norm1(x), size))
        return x + self.drop_path(self.mlp(self.norm2(x)))


class PatchEmbed(nn.Module):
    """A convolution over patches; zeros complete them at the far borders."""

    def __init__(self, patch_size: int, in_chans: int, dim: int, **dd: Any) -> None:
        super().__init__()
        self.patch_size = patch_size
        self.proj = nn.Conv2d(in_chans, dim, patch_size, stride=patch_size, **dd)

    def forward(self, x: Tensor) -> Tensor:
        """[B, in_chans, H, W] -> [B, ceil(H / patch_size), ceil(W / patch_size), C]."""
        # one number for all sizes, so that a traced program fits them: what is too much is no patch
        pad = self.patch_size - 1
        return self.proj(F.pad(x, (0, pad, 0, pad))).permute(0, 2, 3, 1)


@register_notrace_function  # which passes over names with an underscore
def resized_positions(table: Tensor, old: Size, new: Size) -> Tensor:
    """A position embedding [1, 1 + H * W, C] for a map of another size."""
    exact = torch.promote_types(table.dtype, torch.float32)
    x = table[:, 1:].unflatten(1, old).permute(0, 3, 1, 2).to(exact)
    x = F.interpolate(x, new, mode="bicubic").flatten(2).mT.to(table.dtype)
    return torch.cat([table[:, :1], x], 1)


class DeiT(Host):
    """Patches, a class token, positions, blocks, LayerNorm, linear classifier.

    Args:
        mixer: gives every block its attention: a module called as ``attn(tokens, (H, W))`` that
            returns tokens, or None for attention of every token to all. It is called with
            ``stage`` (0), ``block``, ``dim``, ``num_heads``, ``size`` (of the map at
            ``img_size``, in patches), ``device`` and ``dtype``. A module with a method
            ``set_input_size`` is told the map's new size when the model's changes.
        num_classes: outputs of the classifier; 0 for none.
        in_chans: channels of the image.
        global_pool: ``token`` for the class token; ``avg``, ``max``, ``avgmax``, ``catavgmax`` of
            the map without it; or ``""`` for none.
        img_size: of the images for which the position embedding and the mixers' parameters are
            made, in pixels: an int or (H, W). Images of any other size work too.
        patch_size: in pixels.
        embed_dim: channels.
        depth: number of blocks.
        num_heads: attention heads.
        mlp_ratio: hidden over input channels in the MLPs.
        drop_rate: dropout before the classifier, in [0, 1).
        proj_drop_rate: dropout after the projections, in [0, 1).
        attn_drop_rate: must be 0: the attention has no dropout.
        drop_path_rate: stochastic depth of the last block, in [0, 1); it rises linearly from 0.
        device: of the parameters.
        dtype: of the parameters.

    Attributes:
        input_size: (H, W) of the images for which the parameters are made, in pixels.
        num_prefix_tokens: tokens before the map: 1.

    Raises:
        ValueError: an argument outside of these.
    """

    stages_name = "blocks"
    num_prefix_tokens = 1

    def __init__(
        self,
        mixer: Mixer,
        num_classes: int = 1000,
        in_chans: int = 3,
        global_pool: str = "token",
        img_size: int | tuple[int, int] = 224,
        patch_size: int = 16,
        embed_dim: int = 384,
        depth: int = 12,
        num_heads: int = 6,
        mlp_ratio: float = 4.0,
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
        self.min_size = patch_size
        self.input_size = checked_size(img_size, patch_size)
        height, width = self.map_size
        self.cls_token = nn.Parameter(torch.zeros(1, 1, embed_dim, **dd))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + height * width, embed_dim, **dd))
        self.patch_embed = PatchEmbed(patch_size, in_chans, embed_dim, **dd)
        rates: Any = calculate_drop_path_rates(drop_path_rate, depth)
        self.blocks: Any = nn.ModuleList()  # of TokenBlock, which torch's type cannot say
        for i in range(depth):
            about = {"stage": 0, "block": i, "size": self.map_size}
            attn = mixer(dim=embed_dim, num_heads=num_heads, **about, **dd)
            if attn is None:
                attn = TokenAttention(embed_dim, num_heads, proj_drop_rate, **dd)
            self.blocks.append(
                TokenBlock(embed_dim, attn, mlp_ratio, proj_drop_rate, rates[i], **dd)
            )
            info = {"num_chs": embed_dim, "reduction": patch_size, "module": f"blocks.{i}"}
            self.feature_info.append(info)
        for table in (self.cls_token, self.pos_embed):
            nn.init.trunc_normal_(table, std=0.02)
        self._add_head(embed_dim, global_pool, drop_rate, dd)
        self.norm = nn.LayerNorm(embed_dim, eps=1e-6, **dd)

    def _map_size(self, stage: int = 0) -> Size:
        height, width = self.input_size
        return -(-height // self.min_size), -(-width // self.min_size)

    @property
    def map_size(self) -> Size:
        """(H, W) of the map at ``input_size``, in patches."""
        return self._map_size()

    def _embed(self, image: Tensor) -> State:
        x = self.patch_embed(self._checked(image))
        size = (x.shape[1], x.shape[2])
        tokens = torch.cat([self.cls_token.expand(x.shape[0], -1, -1), x.flatten(1, 2)], 1)
        return tokens + resized_positions(self.pos_embed, self.map_size, size), size

    def _stage(self, index: int, x: State) -> State:
        tokens, size = x
        block = self.blocks[index]
        if self.grad_checkpointing:
            return checkpoint(block, tokens, size), size
        return block(tokens, size), size

    def _map(self, x: State) -> Tensor:
        tokens, (height, width) = x
        return tokens[:, 1:].unflatten(1, (height, width))

    def _final(self, x: State) -> Tensor:
        return self.norm(x[0])

    def forward_features(self, x: Tensor) -> Tensor:
        """[B, in_chans, H, W] -> the last block's tokens, normalised, [B, 1 + H' * W', C]."""
        return super().forward_features(x)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Pool tokens and classify; without the classifier if ``pre_logits``."""
        if self.global_pool.pool_type == "token":
            x = x[:, 0]
        elif self.global_pool.pool_type:
            x = self.global_pool(x[:, 1:, None])  # as a map of one column
        x = self.head_drop(x)
        return x if pre_logits else self.head(x)

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the classifier by a fresh one, and the pooling unless it is None."""
        super().reset_classifier(num_classes, "" if global_pool == "token" else global_pool)
        if global_pool == "token":
            self.global_pool.pool_type = global_pool  # where timm looks it up when it saves a model

    def no_weight_decay(self) -> set[str]:
        """Names of the class token and the position embedding."""
        return {"cls_token", "pos_embed"}

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Patterns by which timm groups parameters, by blocks; there is nothing coarser."""
        blocks = [(r"^blocks\.(\d+)", None), (r"^norm", (99999,))]  # the norm joins the last block
        return {"stem": r"^cls_token|^pos_embed|^patch_embed", "blocks": blocks}

    def _resize_positions(self, before: list[Size]) -> None:
        old = self.pos_embed
        if self.map_size != before[0]:
            table = resized_positions(old.detach(), before[0], self.map_size)
            self.pos_embed = nn.Parameter(table, requires_grad=old.requires_grad)
