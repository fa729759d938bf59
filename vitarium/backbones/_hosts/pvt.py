"""PVT as a host of other attentions (Wang et al., arXiv 2102.12122).

Authors' code: whai362/PVT, Apache-2.0 licence. Families whose authors put another attention into
PVT's blocks, in all four stages, give it as a mixer; PVT's own attention, on reduced keys and
values, is not here.

Quirks:
    - Every stage begins with patches (a strided convolution and a LayerNorm of eps 1e-5) and a
      learned position embedding; a block's LayerNorms have eps 1e-6.
    - No class token and no final norm: the last map is pooled as it is.
    - Position embeddings are resized bilinearly for a map of another size at run time,
      bicubically when a model is made for another size.
    - Here zeros complete patches at the far borders. The authors' detector drops incomplete
      patches, see `dense`. It also leaves a position embedding as it is on a map of another shape
      with as many tokens as the first stage's has; here it is resized.

Shapes: B images, H x W tokens of the stage at hand, C channels. Tokens are [B, H, W, C].
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import calculate_drop_path_rates, register_notrace_function
from timm.models import checkpoint_seq
from torch import Tensor, nn

from vitarium.backbones._blocks import (
    Block,
    checked_image,
    checked_size,
    refuse_attention_dropout,
)
from vitarium.backbones._hosts._host import Host

Mixer = Callable[..., nn.Module]

_PATCHES = (4, 2, 2, 2)


class PatchEmbed(nn.Module):
    """A convolution over patches and a LayerNorm; the image's channels stand first, ours last."""

    def __init__(self, patch_size: int, in_chans: int, dim: int, **dd: Any) -> None:
        super().__init__()
        self.margin = patch_size - 1  # of zeros, which complete the last patches
        self.proj = nn.Conv2d(in_chans, dim, patch_size, stride=patch_size, **dd)
        self.norm = nn.LayerNorm(dim, **dd)

    def forward(self, x: Tensor) -> Tensor:
        """[B, in_chans, H, W] -> [B, ceil(H / patch_size), ceil(W / patch_size), C]."""
        # one number for all sizes, so that a traced program fits them: what is too much is no patch
        x = F.pad(x, (0, self.margin, 0, self.margin)) if self.margin else x
        return self.norm(self.proj(x).permute(0, 2, 3, 1))


@register_notrace_function  # which passes over names with an underscore
def resized_positions(
    table: Tensor, old: tuple[int, int], new: tuple[int, int], mode: str = "bilinear"
) -> Tensor:
    """Position embeddings [1, H * W, C] of another map: [1, H, W, C]."""
    exact = torch.promote_types(table.dtype, torch.float32)
    x = table.unflatten(1, old).permute(0, 3, 1, 2).to(exact)
    return F.interpolate(x, new, mode=mode).permute(0, 2, 3, 1).to(table.dtype)


def enter(model: Any, stage: int, x: Tensor) -> Tensor:
    """Patches with positions of a stage: from [B, C, H, W], the image or the map before."""
    x = getattr(model, f"patch_embed{stage + 1}")(x)
    table = getattr(model, f"pos_embed{stage + 1}")
    return x + resized_positions(table, model.map_sizes[stage], (x.shape[1], x.shape[2]))


def run_blocks(blocks: nn.Sequential, x: Tensor, grad_checkpointing: bool) -> Tensor:
    """[B, H, W, C] -> [B, H, W, C]."""
    y: Tensor = checkpoint_seq(blocks, x) if grad_checkpointing else blocks(x)
    return y


class PVT(Host):
    """Four stages of patches, positions and blocks; pooling, linear classifier.

    Args:
        mixer: gives every block its attention, a module [B, H, W, C] -> [B, H, W, C]. It is called
            with ``stage``, ``block`` (counted from 0 in each stage), ``dim``, ``num_heads``,
            ``size`` (of the map at ``img_size``, in tokens), ``device`` and ``dtype``. A module
            with a method ``set_input_size`` is told the map's new size when the model's changes.
        num_classes: outputs of the classifier; 0 for none.
        in_chans: channels of the image.
        global_pool: ``avg``, ``max``, ``avgmax``, ``catavgmax``, or ``""`` for none.
        img_size: of the images for which position embeddings and the mixers' parameters are made,
            in pixels: an int or (H, W). Images of any other size work too.
        embed_dims: channels of each stage.
        depths: blocks of each stage.
        num_heads: attention heads of each stage.
        mlp_ratios: hidden over input channels in the MLPs of each stage.
        drop_rate: dropout before the classifier, in [0, 1).
        proj_drop_rate: dropout after the MLPs' projections, in [0, 1).
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
        mixer: Mixer,
        num_classes: int = 1000,
        in_chans: int = 3,
        global_pool: str = "avg",
        img_size: int | tuple[int, int] = 224,
        embed_dims: Sequence[int] = (64, 128, 320, 512),
        depths: Sequence[int] = (2, 2, 2, 2),
        num_heads: Sequence[int] = (1, 2, 5, 8),
        mlp_ratios: Sequence[float] = (8, 8, 4, 4),
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
        per_stage = {"depths": depths, "num_heads": num_heads, "mlp_ratios": mlp_ratios}
        for name, values in {"embed_dims": embed_dims, **per_stage}.items():
            if len(values) != len(_PATCHES):
                raise ValueError(f"{name}: expected one per stage (4), got {tuple(values)}")
        self.input_size = checked_size(img_size, self.min_size)
        rates: Any = iter(calculate_drop_path_rates(drop_path_rate, sum(depths)))
        for i, (dim, size) in enumerate(zip(embed_dims, self.map_sizes, strict=True)):
            before = embed_dims[i - 1] if i else in_chans
            blocks = []
            for j in range(depths[i]):
                about = {"stage": i, "block": j, "size": size}
                attn = mixer(dim=dim, num_heads=num_heads[i], **about, **dd)
                block = Block(dim, attn, mlp_ratios[i], None, proj_drop_rate, next(rates), **dd)
                block.norm1.eps = block.norm2.eps = 1e-6
                blocks.append(block)
            positions = nn.Parameter(torch.zeros(1, size[0] * size[1], dim, **dd))
            self.register_parameter(f"pos_embed{i + 1}", positions)
            self.add_module(f"patch_embed{i + 1}", PatchEmbed(_PATCHES[i], before, dim, **dd))
            self.add_module(f"block{i + 1}", nn.Sequential(*blocks))
            info = {"num_chs": dim, "reduction": 4 * 2**i, "module": f"block{i + 1}"}
            self.feature_info.append(info)
            nn.init.trunc_normal_(positions, std=0.02)
        self._add_head(dim, global_pool, drop_rate, dd)
        self.norm = nn.Identity()

    @property
    def feature_stages(self) -> Any:
        """The blocks of each stage."""
        names = (f"block{i + 1}" for i in range(len(_PATCHES)))
        return [getattr(self, name) for name in names if hasattr(self, name)]

    def _keep_stages(self, count: int) -> None:
        for i in range(count, len(self.feature_stages)):
            for name in ("pos_embed", "patch_embed", "block"):
                delattr(self, f"{name}{i + 1}")

    def _embed(self, image: Tensor) -> Tensor:
        return enter(self, 0, self._checked(image))

    def _stage(self, index: int, x: Tensor) -> Tensor:
        if index > 0:
            x = enter(self, index, x.permute(0, 3, 1, 2))
        return run_blocks(self.feature_stages[index], x, self.grad_checkpointing)

    def no_weight_decay(self) -> set[str]:
        """Names of the position embeddings."""
        return {name for name, _ in self.named_parameters() if name.startswith("pos_embed")}

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Patterns by which timm groups parameters; a stage's patches go with its first block."""
        patches = r"^patch_embed([2-4])"
        fine = [(r"^block(\d+)\.(\d+)", None), (patches, (0,))]
        stages = [(r"^block(\d+)", None), (patches, None)]
        return {"stem": r"^pos_embed|^patch_embed1", "blocks": stages if coarse else fine}

    @property
    def map_sizes(self) -> list[tuple[int, int]]:
        """(H, W) of the stages' maps at ``input_size``, in tokens."""
        return [self._map_size(i) for i in range(len(_PATCHES))]

    def _resize_positions(self, before: list[tuple[int, int]]) -> None:
        for i, old_size in enumerate(before):
            old, size = getattr(self, f"pos_embed{i + 1}"), self.map_sizes[i]
            if size != old_size:
                table = resized_positions(old.detach(), old_size, size, "bicubic")
                positions = nn.Parameter(table.flatten(1, 2), requires_grad=old.requires_grad)
                setattr(self, f"pos_embed{i + 1}", positions)


class DensePVT(nn.Module):
    """The authors' backbone of detection: the maps as they are, incomplete patches dropped.

    Args:
        model: gives its stages; it is not to be used further.
        out_indices: ascending indices of the stages whose maps are returned.
    """

    def __init__(self, model: PVT, out_indices: Sequence[int]) -> None:
        super().__init__()
        model.prune_intermediate_layers(list(out_indices))
        self.in_chans, self.min_size = model.in_chans, model.min_size
        self.map_sizes = model.map_sizes
        self.out_indices = tuple(out_indices)
        self.grad_checkpointing = False
        for i in range(len(model.feature_stages)):
            patches = getattr(model, f"patch_embed{i + 1}")
            patches.margin = 0
            self.register_parameter(f"pos_embed{i + 1}", getattr(model, f"pos_embed{i + 1}"))
            self.add_module(f"patch_embed{i + 1}", patches)
            self.add_module(f"block{i + 1}", model.feature_stages[i])

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute blocks in the backward pass instead of storing their intermediate values."""
        self.grad_checkpointing = enable

    def forward(self, x: Tensor) -> list[Tensor]:
        """[B, in_chans, H, W] -> maps [B, C, H / stride, W / stride], sizes rounded down."""
        x = checked_image(x, self.in_chans, self.min_size)
        maps = []
        for i in range(self.out_indices[-1] + 1):
            x = run_blocks(
                getattr(self, f"block{i + 1}"), enter(self, i, x), self.grad_checkpointing
            )
            x = x.permute(0, 3, 1, 2)
            if i in self.out_indices:
                maps.append(x.contiguous())
        return maps
