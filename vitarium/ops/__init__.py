"""Attention ops on heads-last maps ``[B, H, W, heads, head_dim]``."""

from vitarium.ops._select import Explanation, explain, use_impl
from vitarium.ops.agent_attn.op import agent_attention
from vitarium.ops.channel_attn.op import channel_attention
from vitarium.ops.neighborhood_attn.op import neighborhood_attention
from vitarium.ops.neighborhood_parts.op import neighborhood_mix, neighborhood_scores
from vitarium.ops.routing_attn.op import routing_attention
from vitarium.ops.window_attn.op import window_attention

__all__ = [
    "Explanation",
    "agent_attention",
    "channel_attention",
    "explain",
    "neighborhood_attention",
    "neighborhood_mix",
    "neighborhood_scores",
    "routing_attention",
    "use_impl",
    "window_attention",
]
