"""Attention ops on heads-last maps ``[B, H, W, heads, head_dim]``."""

from vitarium.ops._select import Explanation, explain, use_impl
from vitarium.ops.neighborhood_attn.op import neighborhood_attention

__all__ = ["Explanation", "explain", "neighborhood_attention", "use_impl"]
