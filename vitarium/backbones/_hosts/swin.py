"""Swin as a host of other attentions (Liu et al., arXiv 2103.14030).

Authors' code: microsoft/Swin-Transformer, commit f82860b, and its detection fork, commit c7b2011,
MIT licence. Families whose authors put another attention into Swin's blocks give it as a mixer.

Quirks:
    - Where a map's shorter side is not longer than a window, windows are squares of that side, on
      both axes, and none is shifted. The authors' classifier decides so when it is built and takes
      no maps that its windows do not divide. Here every map decides for itself, and one that
      windows do not divide is padded, then rolled, as in the authors' detector: with zeros before
      the projection, so that a padded position has the projection's bias as query, key and value,
      and is attended to.
    - The detector never clamps: it shifts even the only window of a map, see `dense`.
    - Position tables have the entries of the whole window; a clamped window uses the middle.
    - Merging concatenates the 2 x 2 tokens (row, column) in the order 00, 10, 01, 11, and completes
      maps of odd size with zeros; images are completed to multiples of 4.
    - Every LayerNorm has eps 1e-5.
    - Files hold the tables' indices and the shifted windows' masks; here both are computed.

Shapes: B images, H x W tokens of the level at hand, C channels. Tokens are [B, H, W, C].
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from timm.layers import calculate_drop_path_rates
from torch import Tensor, nn

from vitarium.backbones._blocks import (
    Block,
    DensePyramid,
    Level,
    Patches,
    PatchMerging,
    checked_size,
    head_dim,
    refuse_attention_dropout,
    window_index,
    window_mask,
)
from vitarium.backbones._hosts._host import Host
from vitarium.ops import window_attention
from vitarium.ops.window_attn import windows

Mixer = Callable[..., nn.Module | None]

_TABLE = "relative_position_bias_table"
_INDEX = "relative_position_index"
_MASK = "attn_mask"


class WindowAttention(nn.Module):
    """Multi-head attention in windows of a map, with a bias for the offset of query and key."""

    def __init__(
        self,
        dim: int,
        num_heads: int,
        window_size: int,
        shift_size: int = 0,
        proj_drop: float = 0.0,
        **dd: Any,
    ) -> None:
        super().__init__()
        if window_size < 1:
            raise ValueError(f"window_size: expected at least 1, got {window_size}")
        self.num_heads = num_heads
        self.head_dim = head_dim(dim, num_heads)
        self.window_size = window_size
        self.shift_size = shift_size
        self.semantics = "authors_padded"
        self.relative_position_bias_table = nn.Parameter(
            torch.zeros((2 * window_size - 1) ** 2, num_heads, **dd)
        )
        self.qkv = nn.Linear(dim, 3 * dim, **dd)
        self.proj = nn.Linear(dim, dim, **dd)
        self.proj_drop = nn.Dropout(proj_drop)

    def forward(self, x: Tensor) -> Tensor:
        """[B, H, W, C] -> [B, H, W, C]."""
        B, H, W, C = x.shape
        qkv = self.qkv(x).reshape(B, H, W, 3, self.num_heads, self.head_dim)
        query, key, value = qkv.unbind(3)
        entries = 2 * self.window_size - 1
        x = window_attention(
            query,
            key,
            value,
            self.window_size,
            self.shift_size,
            bias=self.relative_position_bias_table.t().unflatten(1, (entries, entries)),
            pad=self.qkv.bias.reshape(3, self.num_heads, self.head_dim),  # a zero token, projected
            semantics=self.semantics,
        )
        return self.proj_drop(self.proj(x.reshape(B, H, W, C)))


class Swin(Host):
    """Patches, four levels of blocks, LayerNorm, pooling, linear classifier.

    Args:
        num_classes: outputs of the classifier; 0 for none.
        in_chans: channels of the image.
        global_pool: ``avg``, ``max``, ``avgmax``, ``catavgmax``, or ``""`` for none.
        img_size: of the images for which a mixer's parameters are made, in pixels: an int or
            (H, W). Images of any other size work too.
        embed_dim: channels of the first level; every further level has twice as many.
        depths: blocks of each level.
        num_heads: attention heads of each level.
        window_size: in tokens; odd blocks shift their windows by half of it, rounded down.
        mlp_ratio: hidden over input channels in the MLPs.
        mixer: gives every block its attention: a module [B, H, W, C] -> [B, H, W, C], or None for
            attention in windows. It is called with ``stage``, ``block`` (counted from 0 in each
            stage), ``dim``, ``num_heads``, ``size`` (of the map at ``img_size``, in tokens),
            ``device`` and ``dtype``. A module with a method ``set_input_size`` is told the map's
            new size when the model's changes.
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

    stages_name = "layers"

    def __init__(
        self,
        num_classes: int = 1000,
        in_chans: int = 3,
        global_pool: str = "avg",
        img_size: int | tuple[int, int] = 224,
        embed_dim: int = 96,
        depths: Sequence[int] = (2, 2, 6, 2),
        num_heads: Sequence[int] = (3, 6, 12, 24),
        window_size: int = 7,
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
        if len(num_heads) != len(depths):
            raise ValueError(
                f"num_heads: expected one per level ({len(depths)}), got {tuple(num_heads)}"
            )
        self.input_size = checked_size(img_size, self.min_size)
        self.patch_embed = Patches(4, in_chans, embed_dim, **dd)
        drop_paths: Any = iter(calculate_drop_path_rates(drop_path_rate, sum(depths)))
        self.layers: Any = nn.ModuleList()  # of Level, which torch's type cannot say
        for i, (depth, heads) in enumerate(zip(depths, num_heads, strict=True)):
            dim, last = embed_dim * 2**i, i == len(depths) - 1
            blocks = []
            for j in range(depth):
                attn = None
                if mixer is not None:
                    about = {"stage": i, "block": j, "size": self._map_size(i)}
                    attn = mixer(dim=dim, num_heads=heads, **about, **dd)
                if attn is None:
                    shift = window_size // 2 if j % 2 else 0
                    attn = WindowAttention(dim, heads, window_size, shift, proj_drop_rate, **dd)
                rate = next(drop_paths)
                block = Block(dim, attn, mlp_ratio, None, proj_drop_rate, rate, **dd)
                block.register_load_state_dict_pre_hook(_drop_buffers)
                blocks.append(block)
            downsample = nn.Identity() if last else PatchMerging(dim, **dd)
            self.layers.append(Level(blocks, downsample))
            info = {"num_chs": dim, "reduction": 4 * 2**i, "module": f"layers.{i}.blocks"}
            self.feature_info.append(info)
        self._add_head(dim, global_pool, drop_rate, dd)

    @staticmethod
    def _init_weights(module: nn.Module) -> None:
        Host._init_weights(module)
        if isinstance(module, WindowAttention):
            nn.init.trunc_normal_(module.relative_position_bias_table, std=0.02)

    def no_weight_decay(self) -> set[str]:
        """Names of the position tables, which the authors do not decay."""
        return {name for name, _ in self.named_parameters() if name.endswith(_TABLE)}


def _drop_buffers(module: nn.Module, state_dict: dict[str, Tensor], prefix: str, *_: Any) -> None:
    """Before loading a block: pass over what the authors store and what is computed here."""
    for name in (_MASK, f"attn.{_INDEX}"):
        state_dict.pop(prefix + name, None)


def without_buffers(state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    """A state dict without what the authors store and what is computed here."""
    computed = (f".{_MASK}", f".{_INDEX}")
    return {name: x for name, x in state_dict.items() if not name.endswith(computed)}


def buffers(model: nn.Module) -> dict[str, Tensor]:
    """What the authors of Swin, and of whatever is put into it, store beside parameters.

    Args:
        model: a `Swin`, whose windows and maps are those at its ``input_size``, or its dense form,
            whose windows are never clamped and for whose maps no masks are stored.

    Returns:
        For blocks with windows ``attn.relative_position_index`` [L, L], and for those with shifted
        ones ``attn_mask`` [windows, L, L], where L is the number of positions in a window.
    """
    found = {}
    for name, attn in model.named_modules():
        if not isinstance(attn, WindowAttention):
            continue
        window, shift = (2 * (n,) for n in (attn.window_size, attn.shift_size))
        if isinstance(model, Swin):
            size = model._map_size(int(name.split(".")[1]))
            window, shift = windows.clamped(size, window, shift, "authors")
            if shift != (0, 0):
                found[f"{name.removesuffix('attn')}{_MASK}"] = window_mask(size, window, shift)
        found[f"{name}.{_INDEX}"] = window_index(window)
    return found


def dense(
    model: Swin, out_indices: Sequence[int], form: type[DensePyramid] = DensePyramid
) -> DensePyramid:
    """The authors' detector's backbone: a norm for each map, and windows that are never clamped.

    Args:
        model: gives its stem and levels; it is not to be used further.
        out_indices: ascending indices of the levels whose maps are returned.
        form: the class to build, which stands beside the family's ``checkpoint_filter_fn``.
    """
    for module in model.modules():
        if isinstance(module, WindowAttention):
            module.semantics = "dense"
    return form(model, out_indices)
