"""The public function of bi-level routing attention, and what it accepts."""

from __future__ import annotations

from dataclasses import dataclass

from timm.layers import register_notrace_function
from torch import Tensor

from vitarium.ops import _checks, _select
from vitarium.ops.routing_attn import aten, reference, regions, triton_launch


@dataclass(frozen=True)
class Call:
    """A validated call: what every implementation gets."""

    query: Tensor
    key: Tensor
    value: Tensor
    num_regions: tuple[int, int]
    topk: int
    scale: float
    pad: Tensor | None
    soft_routing: bool
    diff_routing: bool

    @property
    def axes(self) -> tuple[regions.Axis, regions.Axis]:
        """How rows and columns are cut."""
        return regions.cuts(self.query.shape[1:3], self.num_regions, self.pad is not None)


def _prepare(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    num_regions: int | tuple[int, int],
    topk: int,
    scale: float | None = None,
    pad: Tensor | None = None,
    soft_routing: bool = False,
    diff_routing: bool = False,
) -> Call:
    _checks.maps(query=query, key=key)
    _checks.maps(value=value)
    if value.shape[:4] != query.shape[:4]:
        raise ValueError(
            f"value: expected query's shape {tuple(query.shape)} but for head_dim, "
            f"got {tuple(value.shape)}"
        )
    _checks.same_kind("value", value, "query", query)
    wanted = _checks.pair("num_regions", num_regions)
    heads, head_dim = query.shape[3:]
    if pad is not None and value.shape[4] != head_dim:
        raise ValueError(
            f"pad: expected None where value's head_dim ({value.shape[4]}) is not query's "
            f"({head_dim})"
        )
    pad = _checks.parameter("pad", pad, (3, heads, head_dim), query)
    if pad is None:
        for name, length, count in zip("HW", query.shape[1:3], wanted, strict=True):
            if length < count:
                raise ValueError(
                    f"num_regions: expected at most {name} = {length} without pad=, got {count}"
                )
    if scale is not None and (not isinstance(scale, (int, float)) or not scale > 0):
        raise ValueError(f"scale: expected a positive number, got {scale!r}")
    scale = (heads * head_dim) ** -0.5 if scale is None else float(scale)
    if diff_routing and not soft_routing:
        raise ValueError("diff_routing: expected soft_routing too: hard routing has no gradient")
    call = Call(query, key, value, wanted, topk, scale, pad, soft_routing, diff_routing)
    if not isinstance(topk, int) or isinstance(topk, bool) or topk < 1:
        raise ValueError(f"topk: expected a positive int, got {topk!r}")
    if topk > wanted[0] * wanted[1]:  # of which there are more at some sizes
        rows, columns = call.axes
        if topk > rows.total * columns.total:
            raise ValueError(
                f"topk: expected at most the number of regions, {rows.total} * {columns.total}, "
                f"got {topk}"
            )
    return call


_op = _select.register(
    _select.Op(
        "routing",
        _prepare,
        {
            "reference": _select.Implementation(
                reference.run, reference.unsupported, _select.on_request
            ),
            "triton": _select.Implementation(
                triton_launch.run, triton_launch.unsupported, triton_launch.reserved
            ),
            "aten": _select.Implementation(aten.run, aten.unsupported, _select.always),
        },
    )
)


@register_notrace_function
def routing_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    num_regions: int | tuple[int, int],
    topk: int,
    scale: float | None = None,
    pad: Tensor | None = None,
    soft_routing: bool = False,
    diff_routing: bool = False,
    impl: str | None = None,
) -> Tensor:
    """Attention of every region's queries to the keys of the ``topk`` regions nearest to it.

    A region is near where the mean of its keys has a large dot product with the mean of the
    queries, over all heads together: ``score[r, s] = sum_c mean_r(q)[c] mean_s(k)[c]``. Every
    query of region r attends, head by head, to all tokens of the regions that score best with r,
    in one softmax: ``out[i] = sum_j softmax_j(scale * q[i] . k[j]) v[j]``. The choice is one for
    all heads and has no gradient; a region need not choose itself.

    Where regions do not divide the map, it is padded at the bottom and right, in one of two ways:

    - with ``pad``: to exactly ``num_regions`` regions of ``ceil(H / num_regions)`` tokens a side.
      Padding counts in the regions' means.
    - without: regions have ``floor(H / num_regions)`` tokens a side and the last one is completed
      with zeros, which do not count in the means. There may be more than ``num_regions``.

    Padding is attended to, without a mask, in both; the output is cropped. Maps that regions
    divide give the same both ways.

    Args:
        query: ``[B, H, W, heads, head_dim]``, floating point; any strides.
        key: like ``query``.
        value: like ``query``; head_dim may be another one.
        num_regions: regions per side; an int or (along H, along W).
        topk: how many regions of keys, out of all.
        scale: factor of the dot products, positive; ``(heads * head_dim) ** -0.5``, of the whole
            width, if None.
        pad: ``[3, heads, head_dim]``: query, key and value of a padded position.
        soft_routing: whether the keys and values of a chosen region are multiplied by its weight,
            the softmax over the chosen regions of ``scale * score``.
        diff_routing: whether gradients flow through these weights.
        impl: ``"reference"``, ``"triton"``, ``"aten"`` or ``"auto"``; None leaves the choice to
            `vitarium.ops.use_impl`, the environment variable VITARIUM_OPS and ``auto``.

    Returns:
        ``[B, H, W, heads, head_dim]`` with value's head_dim, contiguous, of query's dtype.

    Raises:
        ValueError: a rank, shape, dtype or device that does not fit, ``topk`` above the number of
            regions, more regions than tokens a side without ``pad``, ``diff_routing`` without
            ``soft_routing``, or a requested implementation that cannot run this call.

    Implementations:
        ``reference``: any device, floating dtype and head_dim; computes in float64; gradients
        of everything; the definition of correct.
        ``triton``: CUDA from compute capability 8.0 on; float16, bfloat16 and float32, head_dim up
        to 128, no ``soft_routing``; chosen regions are read where they lie; gradients of query,
        key, value and ``pad``; deterministic; one op to torch.compile and torch.export.
        ``aten``: any device, floating dtype and head_dim; gradients of everything; deterministic
        on a CPU; one op to torch.compile, ordinary functions to torch.export. Neither it nor its
        gradient ever holds the chosen keys and values of more than a few regions.

    Source:
        Zhu et al., arXiv 2303.08810, eq. 1-6; rayleizhu/BiFormer, commit 1697bbb:
        ops/bra_legacy.py (padding before the projection) and ops/bra_nchw.py (after it).
    """
    call = _prepare(query, key, value, num_regions, topk, scale, pad, soft_routing, diff_routing)
    return _op(call, impl)


routing_attention.op_name = "routing"
