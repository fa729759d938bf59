"""What tiles work on: gathered from maps part by part, or at once in exported programs."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from vitarium.ops.neighborhood_attn.tiles import Geometry, Traced

CHUNK = 1 << 18  # elements that are worked on at a time, so that they stay in cache


def rows(x: Tensor) -> Tensor:
    """[B, H, W, heads, head_dim] -> [B * H * W, channels], a view where its strides allow."""
    return x.reshape(-1, x.shape[3] * x.shape[4])


class Group(NamedTuple):
    """Tables of some images at once; positions count through all of them."""

    query: Tensor  # [N, Lq]
    slot: Tensor  # [positions]
    key: Tensor  # [N, Lk]
    kind: Tensor  # [N]
    real: Tensor | None  # [N, Lq]


def _group(geometry: Geometry, images: int, keys: int) -> Group:
    """Tables of ``images`` images; ``keys`` is the number of rows that an image's keys have."""
    real = geometry.real
    if images == 1:
        return Group(geometry.query, geometry.slot, geometry.key, geometry.kind, real)
    image = torch.arange(images, device=geometry.kind.device)[:, None]
    many = image[..., None]
    return Group(
        (geometry.query + many * len(geometry.slot)).flatten(0, 1),
        (geometry.slot + image * geometry.query.numel()).flatten(),
        (geometry.key + many * keys).flatten(0, 1),
        geometry.kind.repeat(images),
        None if real is None else real.repeat(images, 1),
    )


def groups(
    geometry: Geometry, batch: int, keys: int, channels: int
) -> Iterator[tuple[Group, slice, slice, list[slice]]]:
    """Cut the work into groups of images, and those into parts of tiles that stay in cache.

    Yields:
        tables of the group, its rows among the queries, its rows among the keys, parts of its
        tiles.
    """
    count, weight = len(geometry.kind), geometry.key.shape[1] * channels
    step, images = max(1, CHUNK // weight), max(1, CHUNK // (count * weight))
    group = None
    for first in range(0, batch, images):
        number = min(images, batch - first)
        if group is None or number != images:
            group = _group(geometry, number, keys)
        positions = len(geometry.slot)
        yield (
            group,
            slice(first * positions, (first + number) * positions),
            slice(first * keys, (first + number) * keys),
            [slice(i, i + step) for i in range(0, number * count, step)],
        )


def take(rows: Tensor, index: Tensor, heads: int, buffer: Tensor | None = None) -> Tensor:
    """Rows at [N, L] -> [N, L, heads, head_dim], in memory of their own or in that of ``buffer``.

    Parts that come one after the other share a buffer: new memory for each costs as much as
    filling it.
    """
    out = None if buffer is None else buffer[: index.numel()]
    taken = torch.index_select(rows, 0, index.flatten(), out=out)
    return taken.view(*index.shape, heads, -1)


def tiles_of(x: Tensor, index: Tensor, heads: int) -> Tensor:
    """Maps [B, positions, channels] at [tiles, L] -> [B * tiles, heads, L, head_dim]."""
    # images and tiles share an axis: of five-dimensional attention inductor makes nonsense
    taken = x[:, index].flatten(0, 1)
    return taken.unflatten(2, (heads, taken.shape[2] // heads)).transpose(1, 2)


def map_of(x: Tensor, batch: int, traced: Traced) -> Tensor:
    """Queries' results [B * tiles, heads, L, n] -> [B, H, W, heads, n]."""
    flat = x.transpose(1, 2).reshape(batch, traced.query.numel(), x.shape[1], x.shape[3])
    return flat[:, traced.slot]
