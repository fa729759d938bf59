"""Agent attention by its definition.

Agent (i, j) of a grid of n x m over a map of H x W is the mean of the queries in rows
floor(i H / n) to ceil((i + 1) H / n) - 1 and columns floor(j W / m) to ceil((j + 1) W / m) - 1.
The agents attend to all tokens, class tokens first: u = softmax(scale a k^T + B1) v. The tokens
attend to the agents, whose values these are: out = softmax(scale q a^T + B2) u.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from vitarium.ops.agent_attn.op import Call


def unsupported(call: Call) -> str | None:
    """None: the definition has no limits."""
    return None


def bins(length: int, count: int) -> list[slice]:
    """What each of ``count`` bins holds of an axis: they cover it, and overlap by one at most."""
    return [slice(i * length // count, -(-(i + 1) * length // count)) for i in range(count)]


def run(call: Call) -> Tensor:
    """Both attentions with all their weights, in float64: [B, P + H * W, heads, head_dim]."""
    query, key, value = (x.double() for x in (call.query, call.key, call.value))
    rows, columns = (
        bins(length, count) for length, count in zip(query.shape[1:3], call.agent_size, strict=True)
    )
    agents = torch.stack([query[:, i, j].mean((1, 2)) for i in rows for j in columns], 1)
    query, key, value = (x.flatten(1, 2) for x in (query, key, value))
    if call.prefix is not None:
        query, key, value = (
            torch.cat([first.double(), x], 1)
            for first, x in zip(call.prefix, (query, key, value), strict=True)
        )
    scores = torch.einsum("bnhd,bthd->bhnt", call.scale * agents, key)
    if call.agent_bias is not None:
        scores = scores + call.agent_bias.double()
    gathered = torch.einsum("bhnt,bthd->bnhd", scores.softmax(-1), value)
    scores = torch.einsum("bthd,bnhd->bhtn", call.scale * query, agents)
    if call.token_bias is not None:
        scores = scores + call.token_bias.double()
    out = torch.einsum("bhtn,bnhd->bthd", scores.softmax(-1), gathered)
    return out.to(call.query.dtype)
