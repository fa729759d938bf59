"""`use_ops` and `restore`: our ops in a model of timm, and out again, by its classes alone."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass
from typing import Any, TypeVar

from timm.layers import PatchEmbed
from timm.models import davit, swin_transformer, swin_transformer_v2
from torch import nn

from vitarium.backbones import _fused_blocks as blocks

_Model = TypeVar("_Model", bound=nn.Module)

_BLOCKS: dict[type, type] = {
    swin_transformer.SwinTransformerBlock: blocks.FusedSwinBlock,
    swin_transformer_v2.SwinTransformerV2Block: blocks.FusedSwinV2Block,
    davit.SpatialBlock: blocks.FusedSpatialBlock,
    davit.ChannelBlock: blocks.FusedChannelBlock,
}
_ATTENTIONS: dict[type, tuple[type, str]] = {
    swin_transformer.WindowAttention: (blocks.FusedSwinAttention, "window"),
    swin_transformer_v2.WindowAttention: (blocks.FusedSwinV2Attention, "window"),
    davit.WindowAttention: (blocks.FusedDaVitWindowAttention, "window"),
    davit.ChannelAttention: (blocks.FusedChannelAttention, "channel"),
    davit.ChannelAttentionV2: (blocks.FusedChannelAttentionV2, "channel"),
}
BETWEEN: dict[type, type] = {
    PatchEmbed: blocks.AnySizePatches,
    swin_transformer.PatchMerging: blocks.AnySizeMerging,
    swin_transformer_v2.PatchMerging: blocks.AnySizeMergingV2,
    davit.Stem: blocks.AnySizeStem,
    davit.Downsample: blocks.AnySizeDownsample,
}
_TIMMS = {
    **{ours: theirs for theirs, ours in BETWEEN.items()},
    **{ours: theirs for theirs, ours in _BLOCKS.items()},
    **{ours: theirs for theirs, (ours, _) in _ATTENTIONS.items()},
}
_OPS = dict(_ATTENTIONS.values())
_EXPECTED = "a Swin, SwinV2 or DaViT of timm, built of timm's own blocks"


@dataclass(frozen=True)
class UsedOps:
    """What of a model runs with our ops.

    Attributes:
        blocks: names of the blocks, and the op that each one calls.
    """

    blocks: Mapping[str, str]

    def __str__(self) -> str:
        counts = Counter(self.blocks.values())
        ops = ", ".join(f"{count} with {op} attention" for op, count in counts.items())
        return f"{len(self.blocks)} blocks run with vitarium's ops" + (f": {ops}" if ops else "")


def use_ops(model: _Model, inplace: bool = False) -> _Model:
    """Put our ops into a Swin, SwinV2 or DaViT of timm, wherever in ``model`` it is.

    What the model computes stays the same, at every size; parameters, their names, buffers,
    hooks, modes and settings stay what and where they are. `used_ops` says what was replaced,
    and `restore` undoes it. Blocks that are ours already stay as they are. An attention module
    gets maps [B, H, W, C] from now on in the place of windows, and so do its hooks.

    >>> model = use_ops(timm.create_model("swin_tiny_patch4_window7_224"))
    >>> print(used_ops(model))
    12 blocks run with vitarium's ops: 12 with window attention

    Args:
        model: a model of timm, or one that holds such a model.
        inplace: change ``model`` itself instead of a deep copy.

    Returns:
        The model, or its changed copy.

    Raises:
        ValueError: a block that differs from timm's, a dropout of attention weights, or no block
            at all; ``model`` is untouched.
    """
    if not isinstance(model, nn.Module):
        raise ValueError(f"model: expected {_EXPECTED}, got {type(model).__name__}")
    found, ours = _timms_blocks(model), used_ops(model).blocks
    if not found and not ours:
        raise ValueError(f"model: expected {_EXPECTED}, got {type(model).__name__} without any")
    if not inplace:
        model = deepcopy(model)
    for name in found:
        block: Any = model.get_submodule(name)
        block.attn.__class__ = _ATTENTIONS[type(block.attn)][0]
        block.__class__ = _BLOCKS[type(block)]
    return model


def restore(model: _Model) -> _Model:
    """Undo `use_ops`: every block is timm's again, in place.

    Raises:
        ValueError: blocks of a detector, whose windows timm's blocks do not have; ``model`` is
            untouched.
    """
    ours = [module for module in model.modules() if type(module) in _TIMMS]
    if any(getattr(module, "semantics", None) == "dense" for module in ours):
        raise ValueError("model: expected windows as timm has them, got those of a detector")
    for module in ours:
        module.__class__ = _TIMMS[type(module)]
    return model


def used_ops(model: nn.Module) -> UsedOps:
    """What of ``model`` runs with our ops, by `use_ops` or as one of our entries."""
    modules: Any = model.named_modules()
    return UsedOps(
        {name: _OPS[type(block.attn)] for name, block in modules if type(block) in _BLOCKS.values()}
    )


def _timms_blocks(model: nn.Module) -> list[str]:
    """Names of the blocks to replace, if all attention of their kind can be."""
    found, owned = [], set()
    modules: Any = model.named_modules()
    for name, module in modules:
        if not isinstance(module, (*_BLOCKS, *_ATTENTIONS)) or type(module) in _TIMMS:
            continue
        if id(module) in owned:
            continue
        why = _unfit(module)
        if why is not None:
            raise ValueError(f"model: expected {_EXPECTED}, got {name or 'a block'} {why}")
        found.append(name)
        block: Any = module
        owned.add(id(block.attn))
    return found


def _unfit(block: Any) -> str | None:
    """Why a module is no block of timm that we know, or None."""
    if type(block) not in _BLOCKS:
        return f"of type {type(block).__module__}.{type(block).__qualname__}"
    attn = block.attn
    if type(attn) not in _ATTENTIONS:
        return f"with attention of type {type(attn).__module__}.{type(attn).__qualname__}"
    if type(attn.qkv) is not nn.Linear:
        return f"with a projection of type {type(attn.qkv).__qualname__}"
    if block.mlp is None:
        return "without an MLP"
    if {"forward", "_attn"} & {*vars(block), *vars(attn)}:
        return "with a forward method of its own"
    dropout = getattr(attn, "attn_drop", nn.Identity())
    if getattr(dropout, "p", 0.0):
        return f"with attn_drop {dropout.p} (the ops have no dropout)"
    passed_over = [dropout, getattr(attn, "softmax", dropout)]
    if isinstance(block, swin_transformer_v2.SwinTransformerV2Block):
        passed_over.append(attn.qkv)
    if any(m._forward_hooks or m._forward_pre_hooks for m in passed_over):
        return "with hooks on modules that our ops pass over (softmax, attn_drop, SwinV2's qkv)"
    return None
