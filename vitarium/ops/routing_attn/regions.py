"""How a map is cut into regions."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from vitarium.ops import _select


class Axis(NamedTuple):
    """Regions along an axis."""

    size: int  # tokens of a region
    total: int  # regions, padding included
    real: int  # regions that hold any token of the map: the first ones

    @property
    def padded(self) -> int:
        """Tokens, padding included."""
        return self.size * self.total


def axis(length: int, num_regions: int, completed: bool) -> Axis:
    """Cut an axis.

    Args:
        length: tokens of the map.
        num_regions: how many regions are wanted.
        completed: whether padding completes the map to exactly so many regions. If not, regions
            have ``length // num_regions`` tokens, the last one is completed, and there may be more.
    """
    size = -(-length // num_regions) if completed else length // num_regions
    real = (length + size - 1) // size
    if not completed:
        real = _select.larger(real, num_regions)  # it is; a traced program needs the bound
    return Axis(size, num_regions if completed else real, real)


def cuts(size: Sequence[int], num_regions: Sequence[int], completed: bool) -> tuple[Axis, Axis]:
    """Cut both axes of a map: along H, along W."""
    (height, width), (rows, columns) = size, num_regions
    return axis(height, rows, completed), axis(width, columns, completed)


def product_flops(
    query: Sequence[int],
    value: Sequence[int],
    num_regions: Sequence[int],
    completed: bool,
    topk: int,
) -> tuple[int, int]:
    """FLOPs of all scores, and of mixing all values, of real queries with their regions' keys.

    Takes the shapes of query and value; queries of padding are free.
    """
    keys = topk * math.prod(cut.size for cut in cuts(query[1:3], num_regions, completed))
    return 2 * math.prod(query) * keys, 2 * math.prod(value) * keys
