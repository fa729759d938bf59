"""Channel attention by its definition.

Per image and head with tokens as rows, the scores of DaViT are ``scale * K^T V``, those of
Florence-2 ``scale * Q^T K``: [head_dim, head_dim]. Their softmax over the last axis, S, mixes
channels: ``out[n, c] = sum_d S[c, d] X[n, d]``, where X is Q for DaViT and V for Florence-2.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from vitarium.ops.channel_attn.op import Call


def unsupported(call: Call) -> str | None:
    """None: the definition has no limits."""
    return None


def run(call: Call) -> Tensor:
    """Two products, in float64."""
    query, key, value = (x.double() for x in (call.query, call.key, call.value))
    scale = (query.shape[1] * query.shape[2]) ** -0.5 if call.scale is None else call.scale
    if call.mode == "davit":
        scores, mixed = torch.einsum("bhwnc,bhwnd->bncd", key * scale, value), query
    else:
        scores, mixed = torch.einsum("bhwnc,bhwnd->bncd", query * scale, key), value
    out = torch.einsum("bncd,bhwnd->bhwnc", scores.softmax(-1), mixed)
    return out.contiguous().to(call.query.dtype)
