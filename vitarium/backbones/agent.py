"""Agent Attention in DeiT, PVT, Swin and CSwin (Han et al., ECCV 2024, arXiv 2312.08874).

Authors' code: LeapLabTHU/Agent-Attention, commit 207ce3e; no licence stated.

A few agents, means of the queries, attend to all tokens; all tokens then attend to the agents. So
attention over the whole map costs as much as attention in small windows. The hosts stand in
`_hosts`; here is what is put into them. Any image size works: tables are made for ``img_size`` and
resized on the fly for other maps, or for good by ``set_input_size``.

Quirks:
    - Agents are pooled from the projected queries, bias included, before heads are split; the
      scale applies to both attentions.
    - The bias of agents and positions is a sum: a table of 7 x 7 entries (``an_bias``,
      ``na_bias``), resized bilinearly to the map whatever its size, plus one along the rows
      (``ah_bias``, ``ha_bias``) and one along the columns (``aw_bias``, ``wa_bias``), which are
      made for the map at ``img_size`` and resized linearly. In dense form there are more agents
      than in the tables, which are resized bilinearly over the grid of agents too.
    - A depthwise 3 x 3 convolution of the values is added before the output projection (called
      ``get_v`` in CSwin).
    - DeiT: the class token is a query and a key with biases of its own (``ac_bias``,
      ``ca_bias``), but no agent is pooled from it and it gets no convolution. In
      DeiT-B the last eight blocks have ordinary attention.
    - PVT: no reduction of keys and values; a separate projection for queries.
    - Swin: agents see the whole map, where there are any (``attn_type``: A for agents, B for
      windows, M2 for two blocks with agents and the rest with windows). The authors' classifier
      has windows of 56 tokens instead, which at 224 pixels is the same; their detector has none.
    - The config called agent_pvt_b builds Agent-PVT-L.
    - Numbers of agents are squares. The authors round their root down, and then fail.

Shapes: B images, H x W tokens of the stage at hand, C channels, n agents. Tokens are [B, H, W, C].
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from timm.layers import register_notrace_module
from timm.models import generate_default_cfgs, resolve_pretrained_cfg
from torch import Tensor, nn

from vitarium.backbones import _blocks
from vitarium.backbones._blocks import head_dim
from vitarium.backbones._hosts import deit, pvt, swin
from vitarium.backbones._hosts.cswin import CSwin
from vitarium.backbones._hosts.deit import DeiT
from vitarium.backbones._hosts.pvt import PVT, DensePVT
from vitarium.backbones._hosts.swin import Swin
from vitarium.backbones._registry import Published, build, register, source_cfg
from vitarium.backbones._released import Tables, dense
from vitarium.checkpoints import Renames, Weight
from vitarium.ops import _select, agent_attention

__all__ = ["AgentCSwin", "AgentDeiT", "AgentPVT", "AgentSwin"]

Size = tuple[int, int]
_Model = TypeVar("_Model", bound=nn.Module)

# The tables along an axis: its place among theirs, for the agents' biases and the tokens'.
_AXES = {"ah_bias": 3, "aw_bias": 4, "ha_bias": 2, "wa_bias": 3}


class _Composed(NamedTuple):
    """Biases of one map's size, and what they were composed from."""

    key: tuple[Any, ...]
    tables: list[weakref.ref[Tensor]]  # an id belongs to a table as long as that lives
    agent_bias: Tensor
    token_bias: Tensor


_composed: weakref.WeakKeyDictionary[nn.Module, _Composed] = weakref.WeakKeyDictionary()


class AgentBiases(nn.Module):
    """Tables from which the biases of agents and tokens are composed for a map of any size.

    Attributes:
        agent_size: grid of the agents; it may be set to another than the tables have.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        num_agents: int,
        size: Size,
        class_token: bool = False,
        **dd: Any,
    ) -> None:
        super().__init__()
        side = math.isqrt(max(num_agents, 0))
        if side < 1 or side**2 != num_agents:
            raise ValueError(f"num_agents: expected squares, got {num_agents}")
        self.num_heads = num_heads
        self.head_dim = head_dim(dim, num_heads)
        self.grid_size = self.agent_size = (side, side)
        heads, n, (height, width) = num_heads, num_agents, size

        def table(*shape: int) -> nn.Parameter:
            return nn.Parameter(nn.init.trunc_normal_(torch.empty(shape, **dd), std=0.02))

        self.an_bias, self.na_bias = table(heads, n, 7, 7), table(heads, n, 7, 7)
        self.ah_bias, self.aw_bias = table(1, heads, n, height, 1), table(1, heads, n, 1, width)
        self.ha_bias, self.wa_bias = table(1, heads, height, 1, n), table(1, heads, 1, width, n)
        if class_token:
            self.ac_bias, self.ca_bias = table(1, heads, n, 1), table(1, heads, 1, n)

    def set_input_size(self, size: Size) -> None:
        """Resize the tables along rows and columns linearly for a map of another size."""
        for name, axis in _AXES.items():
            old = getattr(self, name)
            shape = list(old.shape)
            shape[axis] = size[1 if "w" in name else 0]
            table = resized(name, old.detach(), torch.Size(shape))
            setattr(self, name, nn.Parameter(table, requires_grad=old.requires_grad))
        _composed.pop(self, None)

    def _apply(self, *args: Any, **kwargs: Any) -> Any:
        _composed.pop(self, None)  # tensors move without a new version
        return super()._apply(*args, **kwargs)

    def biases(self, size: Size, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """For agents [heads, n, P + H * W] and tokens [heads, P + H * W, n]; P class tokens.

        In evaluation they are kept for the next call, as long as the tables stay what they are.
        """
        tables = [p for name, p in self.named_parameters(recurse=False) if name.endswith("_bias")]
        trains = torch.is_grad_enabled() and any(p.requires_grad for p in tables)
        # versions say whether values changed; tensors of inference mode have none
        if self.training or trains or _select.is_tracing() or any(p.is_inference() for p in tables):
            return self._compose(size, dtype)
        key = (size, dtype, self.agent_size, [(id(p), p._version) for p in tables])
        known = _composed.get(self)
        if known is None or known.key != key or any(p() is None for p in known.tables):
            with torch.inference_mode(False), torch.no_grad():
                known = _Composed(
                    key, [weakref.ref(p) for p in tables], *self._compose(size, dtype)
                )
            _composed[self] = known
        return known.agent_bias, known.token_bias

    def _compose(self, size: Size, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        agent = self._maps(self.an_bias, self.ah_bias[0, ..., 0], self.aw_bias[0, :, :, 0], size)
        rows, columns = self.ha_bias[0, :, :, 0].mT, self.wa_bias[0, :, 0].mT
        token = self._maps(self.na_bias, rows, columns, size)
        if hasattr(self, "ac_bias"):
            agent = torch.cat([self._regridded(self.ac_bias[0]), agent], 2)
            token = torch.cat([self._regridded(self.ca_bias[0].mT), token], 2)
        return agent.to(dtype), token.to(dtype).mT

    def _maps(self, table: Tensor, rows: Tensor, columns: Tensor, size: Size) -> Tensor:
        """[heads, n, 7, 7] + [heads, n, H'] + [heads, n, W'] -> [heads, n, H * W].

        Resizing is linear and keeps the axes apart, so small tables go first, each by itself.
        """
        table, rows, columns = (self._regridded(x) for x in (table, rows, columns))
        maps = F.interpolate(table, size, mode="bilinear")
        rows = F.interpolate(rows, size[0], mode="linear")
        columns = F.interpolate(columns, size[1], mode="linear")
        return (maps + rows[..., None] + columns[..., None, :]).flatten(2)

    def _regridded(self, x: Tensor) -> Tensor:
        """A table [heads, agents, ...] for the agents that there are; at least in float32."""
        x = x.to(torch.promote_types(x.dtype, torch.float32))
        if self.agent_size == self.grid_size:
            return x
        grid = x.flatten(2).mT.unflatten(2, self.grid_size)
        grid = F.interpolate(grid, self.agent_size, mode="bilinear")
        return grid.flatten(2).mT.unflatten(2, x.shape[2:])


def resized(name: str, table: Tensor, shape: torch.Size) -> Tensor:
    """A table along an axis, one of `_AXES`, for a map of another size."""
    axis = _AXES[name]
    if table.shape == shape:
        return table
    x = table.to(torch.promote_types(table.dtype, torch.float32)).movedim(axis, -1)
    x = F.interpolate(x.flatten(0, -2)[None], shape[axis], mode="linear")[0]
    moved = [n for i, n in enumerate(shape) if i != axis]
    return x.unflatten(0, moved).movedim(-1, axis).contiguous().to(table.dtype)


def depthwise(dim: int, **dd: Any) -> nn.Conv2d:
    """The convolution whose output is added to the attention's."""
    return nn.Conv2d(dim, dim, 3, padding=1, groups=dim, **dd)


def convolved(conv: nn.Conv2d, value: Tensor) -> Tensor:
    """[B, H, W, heads, head_dim] -> [B, H, W, C]."""
    y: Tensor = conv(value.flatten(3).permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
    return y


@register_notrace_module
class AgentAttention(AgentBiases):
    """Agent attention on a map, between projections; Swin's."""

    def __init__(
        self, dim: int, num_heads: int, num_agents: int, size: Size, proj_drop: float, **dd: Any
    ) -> None:
        super().__init__(dim, num_heads, num_agents, size, **dd)
        self._add_projections(dim, dd)
        self.proj = nn.Linear(dim, dim, **dd)
        self.proj_drop = nn.Dropout(proj_drop)
        self.dwc = depthwise(dim, **dd)

    def _add_projections(self, dim: int, dd: dict[str, Any]) -> None:
        self.qkv = nn.Linear(dim, 3 * dim, **dd)

    def _projected(self, x: Tensor) -> tuple[Tensor, ...]:
        """Query, key and value, [B, H, W, heads, head_dim]."""
        return self.qkv(x).unflatten(3, (3, self.num_heads, self.head_dim)).unbind(3)

    def forward(self, x: Tensor) -> Tensor:
        """[B, H, W, C] -> [B, H, W, C]."""
        query, key, value = self._projected(x)
        biases = self.biases((x.shape[1], x.shape[2]), query.dtype)
        out: Any = agent_attention(query, key, value, self.agent_size, *biases)
        out = out.flatten(3) + convolved(self.dwc, value)
        return self.proj_drop(self.proj(out))


@register_notrace_module
class SplitAgentAttention(AgentAttention):
    """The same with a projection of its own for the queries; PVT's."""

    def _add_projections(self, dim: int, dd: dict[str, Any]) -> None:
        self.q = nn.Linear(dim, dim, **dd)
        self.kv = nn.Linear(dim, 2 * dim, **dd)

    def _projected(self, x: Tensor) -> tuple[Tensor, ...]:
        heads = (self.num_heads, self.head_dim)
        return self.q(x).unflatten(3, heads), *self.kv(x).unflatten(3, (2, *heads)).unbind(3)


@register_notrace_module
class TokenAgentAttention(AgentBiases):
    """Agent attention on a class token and a map; DeiT's."""

    def __init__(
        self, dim: int, num_heads: int, num_agents: int, size: Size, proj_drop: float, **dd: Any
    ) -> None:
        super().__init__(dim, num_heads, num_agents, size, class_token=True, **dd)
        self.qkv = nn.Linear(dim, 3 * dim, **dd)
        self.proj = nn.Linear(dim, dim, **dd)
        self.proj_drop = nn.Dropout(proj_drop)
        self.dwc = depthwise(dim, **dd)

    def forward(self, x: Tensor, size: Size) -> Tensor:
        """[B, 1 + H * W, C] -> [B, 1 + H * W, C]."""
        height, width = size
        qkv = self.qkv(x).unflatten(2, (3, self.num_heads, self.head_dim))
        first, rest = qkv.split([1, height * width], 1)
        query, key, value = rest.unflatten(1, size).unbind(3)
        biases = self.biases((height, width), query.dtype)
        out: Any = agent_attention(
            query, key, value, self.agent_size, *biases, prefix=first.unbind(2)
        )
        patches = out[1].flatten(3) + convolved(self.dwc, value)
        tokens = torch.cat([out[0].flatten(2), patches.flatten(1, 2)], 1)
        return self.proj_drop(self.proj(tokens))


@register_notrace_module
class InnerAgentAttention(AgentBiases):
    """Agent attention on a map, without projections; CSwin's."""

    def __init__(self, dim: int, num_heads: int, num_agents: int, size: Size, **dd: Any) -> None:
        super().__init__(dim, num_heads, num_agents, size, **dd)
        self.get_v = depthwise(dim, **dd)

    def forward(self, qkv: Tensor) -> Tensor:
        """[B, H, W, 3C] -> [B, H, W, C]."""
        maps = qkv.unflatten(3, (3, self.num_heads, self.head_dim))
        query, key, value = maps.unbind(3)
        biases = self.biases((qkv.shape[1], qkv.shape[2]), query.dtype)
        out: Any = agent_attention(query, key, value, self.agent_size, *biases)
        return out.flatten(3) + convolved(self.get_v, value)


class AgentDeiT(DeiT):
    """DeiT with agent attention in its first blocks.

    Args:
        num_agents: in every such block, a square.
        num_agent_blocks: how many there are; None for all. The others have ordinary attention.
        num_classes: and the arguments behind it are those of `DeiT`.

    Raises:
        ValueError: an argument outside of these.
    """

    def __init__(
        self,
        num_classes: int = 1000,
        in_chans: int = 3,
        global_pool: str = "token",
        img_size: int | tuple[int, int] = 224,
        patch_size: int = 16,
        embed_dim: int = 384,
        depth: int = 12,
        num_heads: int = 6,
        mlp_ratio: float = 4.0,
        num_agents: int = 49,
        num_agent_blocks: int | None = None,
        drop_rate: float = 0.0,
        proj_drop_rate: float = 0.0,
        attn_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        count = depth if num_agent_blocks is None else num_agent_blocks
        if not 0 <= count <= depth:
            raise ValueError(f"num_agent_blocks: expected 0 to {depth}, got {count}")

        def mixer(*, stage: int, block: int, **about: Any) -> nn.Module | None:
            del stage
            if block >= count:
                return None
            return TokenAgentAttention(num_agents=num_agents, proj_drop=proj_drop_rate, **about)

        super().__init__(
            mixer,
            num_classes,
            in_chans,
            global_pool,
            img_size,
            patch_size,
            embed_dim,
            depth,
            num_heads,
            mlp_ratio,
            drop_rate,
            proj_drop_rate,
            attn_drop_rate,
            drop_path_rate,
            device,
            dtype,
        )


class AgentPVT(PVT):
    """PVT with agent attention in all blocks.

    Args:
        num_agents: of each stage, squares.
        num_classes: and the arguments behind it are those of `PVT`.

    Raises:
        ValueError: an argument outside of these.
    """

    def __init__(
        self,
        num_classes: int = 1000,
        in_chans: int = 3,
        global_pool: str = "avg",
        img_size: int | tuple[int, int] = 224,
        embed_dims: Sequence[int] = (64, 128, 320, 512),
        depths: Sequence[int] = (2, 2, 2, 2),
        num_heads: Sequence[int] = (1, 2, 5, 8),
        mlp_ratios: Sequence[float] = (8, 8, 4, 4),
        num_agents: Sequence[int] = (9, 16, 49, 49),
        drop_rate: float = 0.0,
        proj_drop_rate: float = 0.0,
        attn_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        agents = per_stage(num_agents)

        def mixer(*, stage: int, block: int, **about: Any) -> nn.Module:
            del block
            return SplitAgentAttention(num_agents=agents[stage], proj_drop=proj_drop_rate, **about)

        super().__init__(
            mixer,
            num_classes,
            in_chans,
            global_pool,
            img_size,
            embed_dims,
            depths,
            num_heads,
            mlp_ratios,
            drop_rate,
            proj_drop_rate,
            attn_drop_rate,
            drop_path_rate,
            device,
            dtype,
        )


class AgentSwin(Swin):
    """Swin with agent attention in the first blocks of its stages.

    Args:
        num_agents: of each stage, squares.
        agent_depths: how many blocks of each stage have agents; the others have windows.
        num_classes: and the arguments behind it are those of `Swin`.

    Raises:
        ValueError: an argument outside of these.
    """

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
        num_agents: Sequence[int] = (9, 16, 49, 49),
        agent_depths: Sequence[int] = (2, 2, 6, 0),
        drop_rate: float = 0.0,
        proj_drop_rate: float = 0.0,
        attn_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        agents, counts = per_stage(num_agents), checked_depths(agent_depths, depths)

        def mixer(*, stage: int, block: int, **about: Any) -> nn.Module | None:
            if block >= counts[stage]:
                return None
            return AgentAttention(num_agents=agents[stage], proj_drop=proj_drop_rate, **about)

        super().__init__(
            num_classes,
            in_chans,
            global_pool,
            img_size,
            embed_dim,
            depths,
            num_heads,
            window_size,
            mlp_ratio,
            mixer,
            drop_rate,
            proj_drop_rate,
            attn_drop_rate,
            drop_path_rate,
            device,
            dtype,
        )


class AgentCSwin(CSwin):
    """CSwin with agent attention in the first blocks of its stages.

    Args:
        num_agents: of each stage, squares.
        agent_depths: how many blocks of each stage have agents; the others have stripes.
        num_classes: and the arguments behind it are those of `CSwin`.

    Raises:
        ValueError: an argument outside of these.
    """

    def __init__(
        self,
        num_classes: int = 1000,
        in_chans: int = 3,
        global_pool: str = "avg",
        img_size: int | tuple[int, int] = 224,
        embed_dim: int = 64,
        depths: Sequence[int] = (2, 4, 18, 1),
        num_heads: Sequence[int] = (2, 4, 8, 16),
        split_size: Sequence[int] = (1, 2, 7, 7),
        mlp_ratio: float = 4.0,
        num_agents: Sequence[int] = (9, 16, 49, 49),
        agent_depths: Sequence[int] = (2, 4, 0, 0),
        drop_rate: float = 0.0,
        proj_drop_rate: float = 0.0,
        attn_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        agents, counts = per_stage(num_agents), checked_depths(agent_depths, depths)

        def mixer(*, stage: int, block: int, **about: Any) -> nn.Module | None:
            if block >= counts[stage]:
                return None
            return InnerAgentAttention(num_agents=agents[stage], **about)

        super().__init__(
            num_classes,
            in_chans,
            global_pool,
            img_size,
            embed_dim,
            depths,
            num_heads,
            split_size,
            mlp_ratio,
            mixer,
            drop_rate,
            proj_drop_rate,
            attn_drop_rate,
            drop_path_rate,
            device,
            dtype,
        )


def per_stage(num_agents: Sequence[int]) -> tuple[int, ...]:
    """One number for each of four stages."""
    if len(num_agents) != 4:
        raise ValueError(f"num_agents: expected one per stage (4), got {tuple(num_agents)}")
    return tuple(num_agents)


def checked_depths(agent_depths: Sequence[int], depths: Sequence[int]) -> tuple[int, ...]:
    """Blocks with agents of each of four stages, no more than there are blocks."""
    counts = tuple(agent_depths)
    if len(counts) != len(depths) or any(
        not 0 <= n <= d for n, d in zip(counts, depths, strict=True)
    ):
        raise ValueError(f"agent_depths: expected 0 to {tuple(depths)}, got {counts}")
    return counts


_RENAMES = Renames(())  # the authors' names are ours
_BUFFERS = swin.buffers  # on other hosts the authors store nothing beside parameters
_RESIZES = {
    **{f"*.{name}": "linear" for name in _AXES},
    "*.relative_position_bias_table": "bicubic",
    "*pos_embed*": "bicubic",
}


def checkpoint_filter_fn(state_dict: Mapping[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """An authors' state dict for ``model``: tables resized to its maps, no buffers.

    Tables along rows and columns linearly; those of windows, and position embeddings, which are
    from a square map, bicubically. Whatever else does not fit stays as it is.
    """
    expected = model.state_dict()
    filtered = _blocks.checkpoint_filter_fn(swin.without_buffers(dict(state_dict)), model)
    # As many positions may be of a map of another form: only the tables along its axes tell.
    moved = any(
        name.endswith(tuple(_AXES)) and x.shape != expected[name].shape
        for name, x in filtered.items()
        if name in expected
    )
    for name, x in filtered.items():
        shape = expected[name].shape if name in expected else x.shape
        leaf = name.rpartition(".")[2]
        fits = x.shape == shape and not (moved and leaf.startswith("pos_embed"))
        if fits or x.ndim != len(shape) or not x.is_floating_point():
            continue
        if leaf in _AXES:
            axis = _AXES[leaf]
            if x.shape[:axis] + shape[axis : axis + 1] + x.shape[axis + 1 :] == shape:
                filtered[name] = resized(leaf, x, shape)
        elif leaf == "relative_position_bias_table" and _blocks.is_window_table(x, expected[name]):
            side = (math.isqrt(shape[0]) + 1) // 2
            filtered[name] = _blocks.resized_window_table(x, (side, side), shape)
        elif leaf.startswith("pos_embed"):
            filtered[name] = _resized_positions(leaf, x, model)
    return filtered


def _resized_positions(leaf: str, table: Tensor, model: Any) -> Tensor:
    tokens = table.shape[1] - (leaf == "pos_embed")  # DeiT's first is the class token's
    side = math.isqrt(tokens)
    if side**2 != tokens or side == 0:
        return table
    if leaf == "pos_embed":
        return deit.resized_positions(table, (side, side), model.map_size)
    new = model.map_sizes[int(leaf[-1]) - 1]
    return pvt.resized_positions(table, (side, side), new, "bicubic").flatten(1, 2)


_CODE_LICENCE = "none stated"
_README = "README of LeapLabTHU/Agent-Attention, 207ce3e"
_FILES = {  # pixels a side, top-1, GFLOPs, and what the authors' cloud calls the file
    "agent_deit_tiny.leaplab_in1k": (224, 74.9, 1.2, "57e0904221824ee7b7af"),
    "agent_deit_small.leaplab_in1k": (224, 80.5, 4.4, "fdd43304372541db8ea7"),
    "agent_deit_small.leaplab_in1k_448": (448, 83.1, 17.7, "a228f86241c445f1969b"),
    "agent_deit_base.leaplab_in1k": (224, 82.0, 17.6, "5115f15fdd7e4ab58fbc"),
    "agent_pvt_tiny.leaplab_in1k": (224, 78.4, 2.0, "13fdf0e0a7c5498c934f"),
    "agent_pvt_small.leaplab_in1k": (224, 82.2, 4.0, "36b8be9a8863456685a3"),
    "agent_pvt_medium.leaplab_in1k": (224, 83.4, 7.0, "4d00ecacf18b45f9b88c"),
    "agent_pvt_medium.leaplab_in1k_256": (256, 83.8, 9.2, "654df734121643b19c52"),
    "agent_pvt_large.leaplab_in1k": (224, 83.7, 10.4, "040cfe0cfbbe4762ad09"),
    "agent_swin_tiny.leaplab_in1k": (224, 82.6, 4.5, "a2ddc1190c224f768a41"),
    "agent_swin_small.leaplab_in1k": (224, 83.7, 8.7, "f607172c9fea4d6e99bb"),
    "agent_swin_small_288.leaplab_in1k": (288, 84.1, 14.6, "09760394e93b4046a25e"),
    "agent_swin_base.leaplab_in1k": (224, 84.0, 15.4, "4fcd2d0114bb490483c3"),
    "agent_swin_base_384.leaplab_in1k": (384, 84.9, 46.3, "bb84ee9058954706a557"),
    "agent_cswin_tiny.leaplab_in1k": (224, 83.1, 4.3, "8c562a74441e46d5902b"),
    "agent_cswin_small.leaplab_in1k": (224, 83.9, 6.8, "30eb8af675bc4b7a8747"),
    "agent_cswin_base.leaplab_in1k": (224, 84.7, 14.9, "c8035b0839b2410c8c9f"),
    "agent_cswin_base_384.leaplab_in1k": (384, 85.8, 46.3, "1239be0df44b47719432"),
}
_DENSE: Tables = {  # box AP and mask AP, or mIoU and mAcc; the file
    "mask_rcnn_1x_coco": {
        "agent_swin_tiny": (44.6, 40.7, "258e208469084e6abf26"),
        "agent_swin_small": (47.2, 42.7, "52714305c21a4104bbc5"),
        "agent_pvt_tiny": (41.4, 38.7, "79cbc3a7b7a24a0b92c1"),
        "agent_pvt_small": (44.5, 41.2, "8e333aa6b55e45d4b76c"),
        "agent_pvt_medium": (45.9, 42.0, "6401bf2b227046a58fc3"),
        "agent_pvt_large": (46.9, 42.8, "8fa3d506f1e24099b99f"),
    },
    "mask_rcnn_3x_coco": {
        "agent_swin_tiny": (47.3, 42.7, "e0ab821875704960a505"),
        "agent_swin_small": (48.9, 43.8, "b78f6ff837b84b61b122"),
    },
    "cascade_mask_rcnn_1x_coco": {
        "agent_swin_tiny": (49.2, 42.7, "39d78fddf90241e58db0"),
    },
    "cascade_mask_rcnn_3x_coco": {
        "agent_swin_tiny": (51.4, 44.5, "ed2af911d0e64d359aa3"),
        "agent_swin_small": (52.6, 45.5, "3d092a23b935458b98ed"),
        "agent_swin_base": (52.6, 45.3, "b3a628e668eb460ca532"),
    },
    "retinanet_1x_coco": {
        "agent_pvt_tiny": (40.3, "d3c1dbe0243d4775aafd"),
        "agent_pvt_small": (44.1, "d427a52511f64ab5a928"),
        "agent_pvt_medium": (45.8, "81d6c824d9f244a192a3"),
        "agent_pvt_large": (46.8, "2dc5b1f685fd4ecf8db5"),
    },
    "upernet_160k_ade20k": {
        "agent_swin_tiny": (46.68, 58.53, "280481ee38024bce8364"),
        "agent_swin_small": (48.08, 59.78, None),
        "agent_swin_base": (48.73, 60.01, None),
    },
    "semantic_fpn_40k_ade20k": {
        "agent_pvt_tiny": (40.18, 51.76, "5e7bf988b4b74efe8654"),
        "agent_pvt_small": (44.18, 56.17, "11332fa565e443678e4c"),
        "agent_pvt_medium": (44.30, 56.42, None),
        "agent_pvt_large": (46.52, 58.50, "0da8b58581214f85974f"),
    },
}


def _weight(file: str | None, task: str, wrapper: str | None) -> Weight:
    # In dense form the code stands in copies of mmdetection and mmsegmentation, which state one.
    code = None if task == "cls" else "Apache-2.0"
    if file is None:
        reason = "the authors give its result, but no file"
        return Weight(unreleased=reason, task=task, code_licence=code)
    url = f"https://cloud.tsinghua.edu.cn/f/{file}/?dl=1"
    return Weight(url=url, wrapper=wrapper, task=task, code_licence=code)


_dense_weights, _dense_results = dense(
    "leaplab",
    _README,
    _DENSE,
    lambda file, task: _weight(file, task, "state_dict"),
    metrics={"coco": ("box AP", "mask AP"), "ade20k": ("mIoU", "mAcc")},
)
_PUBLISHED = {
    name: Published(top1=top1, gflops=gflops, source=_README)
    for name, (_, top1, gflops, _) in _FILES.items()
} | _dense_results
_WEIGHTS = {
    # Files on CSwin may hold averaged weights beside "model", which the authors then prefer.
    name: _weight(file, "cls", None if "cswin" in name else "model")
    for name, (*_, file) in _FILES.items()
} | _dense_weights
_ORIGIN = "https://github.com/LeapLabTHU/Agent-Attention"
_FIRST_CONV = {
    "deit": "patch_embed.proj",
    "pvt": "patch_embed1.proj",
    "swin": "patch_embed.proj",
    "cswin": "stage1_conv_embed.0",
}


def _cfg(name: str, side: int = 224, **kwargs: Any) -> dict[str, Any]:
    """The rest is timm's default, and the authors': bicubic, ImageNet's mean and std."""
    host = name.split("_")[1]
    stride, smallest = (16, 16) if host == "deit" else (32, 32)
    return {
        **source_cfg(_WEIGHTS.get(name)),
        "input_size": (3, side, side),
        "min_input_size": (3, smallest, smallest),
        "pool_size": (side // stride, side // stride),
        "first_conv": _FIRST_CONV[host],
        "classifier": "head",
        "paper_ids": "arXiv:2312.08874",
        "paper_name": "Agent Attention: On the Integration of Softmax and Linear Attention",
        **kwargs,
    }


_LIMITS = {
    "agent_deit_atto": ("dense form",),
    "agent_pvt_atto": ("no final norm",),
    "agent_cswin_atto": ("dense form",),
}
_UNCROPPED = ("agent_swin_small_288.leaplab_in1k", "agent_swin_base_384.leaplab_in1k")


def _released_cfg(name: str, side: int) -> dict[str, Any]:
    """The authors squash images, and most files are evaluated on the middle, as by timm."""
    evaluation = {"crop_mode": "squash", "crop_pct": 1.0 if name in _UNCROPPED else 0.875}
    return _cfg(name, side, origin_url=_ORIGIN, **evaluation)


_SMALL = {"num_classes": 10, "crop_pct": 1.0}
_TOKENS = {"min_input_size": (3, 8, 8), "pool_size": (8, 8)}
default_cfgs = generate_default_cfgs(
    {
        "agent_deit_atto.untrained": _cfg("agent_deit_atto.untrained", 64, **_SMALL, **_TOKENS),
        "agent_pvt_atto.untrained": _cfg("agent_pvt_atto.untrained", 64, **_SMALL),
        "agent_swin_atto.untrained": _cfg("agent_swin_atto.untrained", 64, **_SMALL),
        "agent_cswin_atto.untrained": _cfg("agent_cswin_atto.untrained", 64, **_SMALL),
        **{name: _released_cfg(name, side) for name, (side, *_) in _FILES.items()},
    }
)


def _create(
    model_cls: Callable[..., _Model], variant: str, pretrained: bool, **kwargs: Any
) -> _Model:
    """Tables are made for the size that the tag was trained at, unless the caller says another."""
    cfg = resolve_pretrained_cfg(
        variant, kwargs.get("pretrained_cfg"), kwargs.get("pretrained_cfg_overlay")
    )
    feature_cfg = {"out_indices": 3 if model_cls is AgentDeiT else (0, 1, 2, 3)}
    return build(
        model_cls,
        variant,
        pretrained,
        weights=_WEIGHTS,
        filter_fn=checkpoint_filter_fn,
        feature_cfg=feature_cfg,
        **{"img_size": cfg.input_size[1:], **kwargs},
    )


@register
def agent_deit_atto(pretrained: bool = False, **kwargs: Any) -> AgentDeiT:
    """486,958 parameters (10 classes); ours, for tests and demos, on 64 x 64 pixels."""
    args = {"patch_size": 8, "embed_dim": 96, "depth": 4, "num_heads": 3}
    args |= {"num_agents": 9, "num_agent_blocks": 3}
    return _create(AgentDeiT, "agent_deit_atto", pretrained, **{**args, **kwargs})


@register
def agent_deit_tiny(pretrained: bool = False, **kwargs: Any) -> AgentDeiT:
    """6,015,640 parameters, 1.2 GFLOPs at 224 x 224, ImageNet-1k top-1 74.9 % (published)."""
    args = {"embed_dim": 192, "num_heads": 3}
    return _create(AgentDeiT, "agent_deit_tiny", pretrained, **{**args, **kwargs})


@register
def agent_deit_small(pretrained: bool = False, **kwargs: Any) -> AgentDeiT:
    """22,647,112 parameters, 4.4 GFLOPs at 224 x 224, ImageNet-1k top-1 80.5 % (published)."""
    return _create(AgentDeiT, "agent_deit_small", pretrained, **kwargs)


@register
def agent_deit_base(pretrained: bool = False, **kwargs: Any) -> AgentDeiT:
    """87,204,904 parameters, 17.6 GFLOPs at 224 x 224, ImageNet-1k top-1 82.0 % (published)."""
    args = {"embed_dim": 768, "num_heads": 12, "num_agents": 81, "num_agent_blocks": 4}
    return _create(AgentDeiT, "agent_deit_base", pretrained, **{**args, **kwargs})


@register
def agent_pvt_atto(pretrained: bool = False, **kwargs: Any) -> AgentPVT:
    """469,654 parameters (10 classes); ours, for tests and demos, on 64 x 64 pixels."""
    args = {"embed_dims": (32, 64, 96, 128), "depths": (1, 1, 2, 1), "num_heads": (1, 2, 3, 4)}
    args |= {"mlp_ratios": (4, 4, 2, 2), "num_agents": (4, 9, 16, 16)}
    return _create(AgentPVT, "agent_pvt_atto", pretrained, **{**args, **kwargs})


@register
def agent_pvt_tiny(pretrained: bool = False, **kwargs: Any) -> AgentPVT:
    """11,570,352 parameters, 2.0 GFLOPs at 224 x 224, ImageNet-1k top-1 78.4 % (published)."""
    return _create(AgentPVT, "agent_pvt_tiny", pretrained, **kwargs)


@register
def agent_pvt_small(pretrained: bool = False, **kwargs: Any) -> AgentPVT:
    """20,635,066 parameters, 4.0 GFLOPs at 224 x 224, ImageNet-1k top-1 82.2 % (published)."""
    return _create(AgentPVT, "agent_pvt_small", pretrained, **{"depths": (3, 4, 6, 3), **kwargs})


@register
def agent_pvt_medium(pretrained: bool = False, **kwargs: Any) -> AgentPVT:
    """35,921,746 parameters, 7.0 GFLOPs at 224 x 224, ImageNet-1k top-1 83.4 % (published)."""
    return _create(AgentPVT, "agent_pvt_medium", pretrained, **{"depths": (3, 4, 18, 3), **kwargs})


@register
def agent_pvt_large(pretrained: bool = False, **kwargs: Any) -> AgentPVT:
    """48,738,180 parameters, 10.4 GFLOPs at 224 x 224, ImageNet-1k top-1 83.7 % (published)."""
    return _create(AgentPVT, "agent_pvt_large", pretrained, **{"depths": (3, 8, 27, 3), **kwargs})


@register
def agent_swin_atto(pretrained: bool = False, **kwargs: Any) -> AgentSwin:
    """659,222 parameters (10 classes); ours, for tests and demos, on 64 x 64 pixels."""
    args = {"embed_dim": 24, "depths": (1, 1, 3, 1), "num_heads": (1, 2, 4, 8), "window_size": 3}
    args |= {"mlp_ratio": 2.0, "num_agents": (4, 9, 16, 16), "agent_depths": (1, 1, 1, 0)}
    return _create(AgentSwin, "agent_swin_atto", pretrained, **{**args, **kwargs})


@register
def agent_swin_tiny(pretrained: bool = False, **kwargs: Any) -> AgentSwin:
    """28,902,964 parameters, 4.5 GFLOPs at 224 x 224, ImageNet-1k top-1 82.6 % (published)."""
    return _create(AgentSwin, "agent_swin_tiny", pretrained, **kwargs)


_SWIN_SMALL = {"depths": (2, 2, 18, 2), "agent_depths": (2, 2, 0, 0)}
_SWIN_BASE = {
    "embed_dim": 128,
    "num_heads": (4, 8, 16, 32),
    "depths": (2, 2, 18, 2),
    "agent_depths": (2, 2, 2, 0),
}


@register
def agent_swin_small(pretrained: bool = False, **kwargs: Any) -> AgentSwin:
    """49,666,684 parameters, 8.7 GFLOPs at 224 x 224, ImageNet-1k top-1 83.7 % (published)."""
    return _create(AgentSwin, "agent_swin_small", pretrained, **{**_SWIN_SMALL, **kwargs})


@register
def agent_swin_small_288(pretrained: bool = False, **kwargs: Any) -> AgentSwin:
    """49,707,964 parameters, 14.6 GFLOPs at 288 x 288, ImageNet-1k top-1 84.1 % (published)."""
    args = {**_SWIN_SMALL, "window_size": 9}
    return _create(AgentSwin, "agent_swin_small_288", pretrained, **{**args, **kwargs})


@register
def agent_swin_base(pretrained: bool = False, **kwargs: Any) -> AgentSwin:
    """88,095,096 parameters, 15.4 GFLOPs at 224 x 224, ImageNet-1k top-1 84.0 % (published)."""
    return _create(AgentSwin, "agent_swin_base", pretrained, **{**_SWIN_BASE, **kwargs})


@register
def agent_swin_base_384(pretrained: bool = False, **kwargs: Any) -> AgentSwin:
    """88,305,016 parameters, 46.3 GFLOPs at 384 x 384, ImageNet-1k top-1 84.9 % (published)."""
    args = {**_SWIN_BASE, "window_size": 12}
    return _create(AgentSwin, "agent_swin_base_384", pretrained, **{**args, **kwargs})


@register
def agent_cswin_atto(pretrained: bool = False, **kwargs: Any) -> AgentCSwin:
    """703,270 parameters (10 classes); ours, for tests and demos, on 64 x 64 pixels."""
    args = {"embed_dim": 24, "depths": (1, 1, 2, 1), "num_heads": (2, 2, 4, 4)}
    args |= {"split_size": (1, 2, 3, 3), "mlp_ratio": 2.0}
    args |= {"num_agents": (4, 9, 16, 16), "agent_depths": (1, 1, 0, 0)}
    return _create(AgentCSwin, "agent_cswin_atto", pretrained, **{**args, **kwargs})


_CSWIN_SMALL = {"depths": (3, 6, 29, 2), "agent_depths": (3, 6, 0, 0)}
_CSWIN_BASE = {**_CSWIN_SMALL, "embed_dim": 96, "num_heads": (4, 8, 16, 32)}


@register
def agent_cswin_tiny(pretrained: bool = False, **kwargs: Any) -> AgentCSwin:
    """20,458,672 parameters, 4.3 GFLOPs at 224 x 224, ImageNet-1k top-1 83.1 % (published)."""
    return _create(AgentCSwin, "agent_cswin_tiny", pretrained, **kwargs)


@register
def agent_cswin_small(pretrained: bool = False, **kwargs: Any) -> AgentCSwin:
    """32,814,100 parameters, 6.8 GFLOPs at 224 x 224, ImageNet-1k top-1 83.9 % (published)."""
    return _create(AgentCSwin, "agent_cswin_small", pretrained, **{**_CSWIN_SMALL, **kwargs})


@register
def agent_cswin_base(pretrained: bool = False, **kwargs: Any) -> AgentCSwin:
    """73,249,696 parameters, 14.9 GFLOPs at 224 x 224, ImageNet-1k top-1 84.7 % (published)."""
    return _create(AgentCSwin, "agent_cswin_base", pretrained, **{**_CSWIN_BASE, **kwargs})


@register
def agent_cswin_base_384(pretrained: bool = False, **kwargs: Any) -> AgentCSwin:
    """73,328,416 parameters, 46.3 GFLOPs at 384 x 384, ImageNet-1k top-1 85.8 % (published)."""
    args = {**_CSWIN_BASE, "split_size": (1, 2, 12, 12)}
    return _create(AgentCSwin, "agent_cswin_base_384", pretrained, **{**args, **kwargs})


class DenseAgentPVT(DensePVT):
    """PVT's dense form; its checkpoints are the family's."""


class DenseAgentSwin(_blocks.DensePyramid):
    """Swin's dense form; its checkpoints are the family's."""


_PVT_AGENTS, _SWIN_AGENTS = (12, 16, 28, 28), (9, 12, 14, 7)  # a side, of each stage


def dense_adapter(model: nn.Module, task: str, out_indices: Sequence[int]) -> nn.Module:
    """The authors' backbone of detection and of segmentation: more agents in every stage.

    Args:
        model: a PVT or a Swin, the hosts that the authors have in dense form; it is not to be
            used further.
        task: ``det`` or ``seg``: the same form.
        out_indices: ascending indices of the stages whose maps are returned.

    Raises:
        ValueError: a model on another host.
    """
    if not isinstance(model, (AgentPVT, AgentSwin)):
        raise ValueError(
            f"task: expected None, {type(model).__name__} has no form of its own, got {task!r}"
        )
    sides = _PVT_AGENTS if isinstance(model, AgentPVT) else _SWIN_AGENTS
    for stage, side in zip(model.feature_stages, sides, strict=True):
        for module in stage.modules():
            if isinstance(module, AgentBiases):
                module.agent_size = (side, side)
    if isinstance(model, AgentPVT):
        return DenseAgentPVT(model, out_indices)
    return swin.dense(model, out_indices, DenseAgentSwin)
