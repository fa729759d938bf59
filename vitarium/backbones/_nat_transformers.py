"""NAT's and DiNAT's checkpoints as the library transformers (4.x) lays them out.

Names and shapes are those of ``NatForImageClassification``, ``DinatForImageClassification`` and
their ``...Model`` and ``...Backbone`` in huggingface/transformers v4.40.2 (Apache-2.0), files
``models/{nat,dinat}/modeling_{nat,dinat}.py``. Beside names, two things differ from the authors'
layout: the projections of queries, keys and values are three, and the factors of a block's two
branches are the rows of one tensor, ``layer_scale_parameters`` [2, C].
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from vitarium.checkpoints import CheckpointError, Renames

_MARKS = ("embeddings.patch_embeddings.", "encoder.levels.")

_LAYER, _BLOCK = "encoder.levels.{i}.layers.{j}.", "levels.{i}.blocks.{j}."
_NAMES = Renames(
    [
        ("embeddings.patch_embeddings.projection.", "patch_embed.proj."),
        ("embeddings.norm.", "patch_embed.norm."),
        (f"{_LAYER}layernorm_before.", f"{_BLOCK}norm1."),
        (f"{_LAYER}attention.self.qkv.", f"{_BLOCK}attn.qkv."),  # three of theirs, joined
        (f"{_LAYER}attention.self.rpb", f"{_BLOCK}attn.rpb"),
        (f"{_LAYER}attention.output.dense.", f"{_BLOCK}attn.proj."),
        (f"{_LAYER}layernorm_after.", f"{_BLOCK}norm2."),
        (f"{_LAYER}intermediate.dense.", f"{_BLOCK}mlp.fc1."),
        (f"{_LAYER}output.dense.", f"{_BLOCK}mlp.fc2."),
        (f"{_LAYER}layer_scale_parameters.0", f"{_BLOCK}gamma1"),  # rows of one of theirs
        (f"{_LAYER}layer_scale_parameters.1", f"{_BLOCK}gamma2"),
        ("encoder.levels.{i}.downsample.", "levels.{i}.downsample."),
        ("layernorm.", "norm."),
        ("hidden_states_norms.stage{i+1}.", "norm{i}."),
        ("classifier.", "head."),
    ]
)
_JOINED = ".attention.self.qkv."
_SEPARATE = tuple(f".attention.self.{part}." for part in ("query", "key", "value"))
_SCALE = ".layer_scale_parameters"


def is_transformers(state_dict: Iterable[str]) -> bool:
    """Whether any of the names is one of transformers' layout alone."""
    return any(_bare(name).startswith(_MARKS) for name in state_dict)


def from_transformers(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A state dict of transformers' Nat or Dinat in our names, which are the authors'.

    Args:
        state_dict: of the classifier, the bare model or the backbone; it is not changed.

    Returns:
        A new dictionary. Projections are joined in new tensors, all others are shared.

    Raises:
        CheckpointError: a name that the layout does not have, a projection without the two that
            belong to it, or tensors that do not go together.
    """
    joined: dict[str, Tensor] = {}
    for name, tensor in state_dict.items():
        bare = _bare(name)
        part = next((part for part in _SEPARATE if part in bare), None)
        if part is not None:
            target = bare.replace(part, _JOINED)
            if target not in joined:
                parts = [name.replace(part, other) for other in _SEPARATE]
                joined[target] = torch.cat(_alike(parts, state_dict))
        elif bare.endswith(_SCALE):
            if tensor.ndim != 2 or len(tensor) != 2:
                raise CheckpointError(f"{name}: expected shape [2, C], got {list(tensor.shape)}")
            joined |= {f"{bare}.{row}": factors for row, factors in enumerate(tensor.unbind())}
        elif bare in joined:
            raise CheckpointError(f"two tensors of the checkpoint are both called {bare}")
        else:
            joined[bare] = tensor
    alien = [name for name in joined if _NAMES.ours(name) == name]
    if alien:
        raise CheckpointError(
            f"expected transformers' layout of Nat or Dinat throughout, got {_listed(alien)} too"
        )
    return {_NAMES.ours(name): tensor for name, tensor in joined.items()}


def to_transformers(state_dict: Mapping[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """A state dict of a `NAT`, a `DiNAT` or their dense form in transformers' names.

    The inverse of `from_transformers`.

    Args:
        state_dict: tensors in ``model``'s names; it is not changed.
        model: says which layout: a NAT or DiNAT that of ``...ForImageClassification``, the dense
            form that of ``...Backbone``, whose names have no prefix.

    Returns:
        A new dictionary. Tensors are shared, but for the factors of branches.

    Raises:
        CheckpointError: a tensor for which the layout has no place, one of a block's factors
            without the other, or a projection that is not three.
    """
    prefix = getattr(model, "transformers_prefix", "")
    converted: dict[str, Tensor] = {}
    for name, tensor in state_dict.items():
        bare = _NAMES.authors(name)
        theirs = bare if name.startswith("head.") else prefix + bare
        if bare == name:
            raise CheckpointError(f"{name}: transformers' Nat and Dinat have no such tensor")
        stem, scale, _ = theirs.partition(_SCALE)
        if scale:
            pair = [f"{name[:-1]}{digit}" for digit in (1, 2)]
            converted[stem + scale] = torch.stack(_alike(pair, state_dict))
        elif _JOINED in theirs:
            if tensor.ndim == 0 or len(tensor) % 3:
                raise CheckpointError(
                    f"{name}: expected three projections, got shape {list(tensor.shape)}"
                )
            for part, rows in zip(_SEPARATE, tensor.chunk(3), strict=True):
                converted[theirs.replace(_JOINED, part)] = rows
        else:
            converted[theirs] = tensor
    return converted


def _bare(name: str) -> str:
    return name.removeprefix("dinat.").removeprefix("nat.")


def _alike(names: list[str], state_dict: Mapping[str, Tensor]) -> list[Tensor]:
    """Tensors that belong together."""
    missing = [name for name in names if name not in state_dict]
    if missing:
        raise CheckpointError(f"expected {_listed(names)} together, missing {_listed(missing)}")
    tensors = [state_dict[name] for name in names]
    if tensors[0].ndim == 0 or len({(x.shape, x.dtype, x.device) for x in tensors}) > 1:
        found = [f"{list(x.shape)} {x.dtype}" for x in tensors]
        raise CheckpointError(f"expected {_listed(names)} alike, got {_listed(found)}")
    return tensors


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more
