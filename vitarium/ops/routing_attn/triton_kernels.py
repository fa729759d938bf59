"""Kernels of bi-level routing attention.

Tokens have slots: those of a region one after the other, regions in raster order, padding
included. Regions of queries are those that hold any token of the map; regions of keys are all.
Chosen regions are read where they lie in the map, through their index.

A program owns a block of slots and loops over blocks of those that it attends to, or that attend
to it. These belong to a list of regions, and the owner is a part of one region. Or, DENSE, they
are all slots of the image, and so are the owners: where regions are smaller than a product of
matrices may be, that is less work. Then a word of bits says for each query which of the regions in
a block of keys it sees (MASKED).

Strides come in units of UNIT elements, so that the compiler sees what divides them and reads
vectors. Programs of neighboring heads, which are neighbors in memory, run at the same time.
"""

# ruff: noqa: N803
# mypy: ignore-errors

import triton
import triton.language as tl

_LOG2_E = tl.constexpr(1.4426950408889634)  # exponentials are of base 2
_LOWEST = tl.constexpr(-1e30)  # less than all scores, but their differences are finite
_STRIDES = [f"{x}_stride_{axis}" for x in ("q", "k", "v", "grad") for axis in "bhwn"]
_SIZES = ["height", "width", "region_height", "region_width", "query_columns", "key_columns"]
_SIZES += ["query_regions", "key_regions"]


@triton.jit
def _place(region, token, columns, region_height, region_width):
    """Row and column in the map."""
    down, right = region // columns, token // region_width
    row = down * region_height + right
    column = (region - down * columns) * region_width + token - right * region_width
    return row.to(tl.int64), column.to(tl.int64)


@triton.jit
def _owner(regions, length, HEADS: tl.constexpr, DENSE: tl.constexpr, BLOCK: tl.constexpr):
    """Image and head of this program, its list of regions, and the slots that it owns.

    These as region and token in it, which of them there are, and the first one's region.
    """
    program = tl.program_id(0)
    head, rest = program % HEADS, program // HEADS
    if DENSE:
        blocks = tl.cdiv(regions * length, BLOCK)
        image, block = rest // blocks, rest % blocks
        first = block * BLOCK // length
        slot = block * BLOCK + tl.arange(0, BLOCK)
        region = slot // length
        token = slot - region * length
        owned = region < regions
    else:
        blocks = tl.cdiv(length, BLOCK)
        first = rest // blocks % regions
        image = rest // blocks // regions
        token = rest % blocks * BLOCK + tl.arange(0, BLOCK)
        region = first + tl.zeros_like(token)
        owned = token < length
    return image.to(tl.int64), head.to(tl.int64), first, region, token, owned


@triton.jit
def _listed(list_ptr, start, slots, length, DENSE: tl.constexpr, DIVISOR: tl.constexpr, BLOCK):
    """A block of slots as region and token in it, and which of them there are.

    The list holds DIVISOR numbers per region: its index is their quotient.
    """
    slot = start + tl.arange(0, BLOCK)
    there = slot < slots
    region = slot // length
    token = slot - region * length
    if not DENSE:
        region = tl.load(list_ptr + region, mask=there, other=0).to(tl.int32) // DIVISOR
    return region, token, there


@triton.jit
def _inside(row, column, there, height, width, RAGGED: tl.constexpr):
    """Which slots hold a token of the map, given that ``there`` are slots."""
    if RAGGED:
        return there & (row < height) & (column < width)
    else:
        return there


@triton.jit
def _mask(rows, DIM: tl.constexpr, BLOCK: tl.constexpr):
    """Which elements of [rows, BLOCK] there are."""
    if DIM == BLOCK:
        return rows[:, None]
    else:
        return rows[:, None] & (tl.arange(0, BLOCK) < DIM)[None, :]


@triton.jit
def _read(
    base, row, column, inside, stride_h, stride_w, UNIT: tl.constexpr, DIM: tl.constexpr, BLOCK
):
    """Tokens [rows, BLOCK] of a map; zeros where there are none."""
    at = row * (stride_h * UNIT) + column * (stride_w * UNIT)
    where = base + at[:, None] + tl.arange(0, BLOCK)[None, :]
    return tl.load(where, mask=_mask(inside, DIM, BLOCK), other=0.0)


@triton.jit
def _filled(x, inside, pad_ptr, DIM: tl.constexpr, BLOCK: tl.constexpr):
    """Tokens with the vector at ``pad_ptr`` in the place of those that are not ``inside``."""
    d = tl.arange(0, BLOCK)
    fill = tl.load(pad_ptr + d, mask=d < DIM, other=0.0)
    return tl.where(inside[:, None], x, fill[None, :])


@triton.jit
def _write(
    ptr, x, image, head, row, column, inside, height, width, HEADS: tl.constexpr, DIM, BLOCK
):
    """Tokens [rows, BLOCK] of a contiguous map."""
    at = ((image * height + row) * width + column) * HEADS + head
    where = ptr + (at * DIM)[:, None] + tl.arange(0, BLOCK)[None, :]
    tl.store(where, x.to(ptr.dtype.element_ty), mask=_mask(inside, DIM, BLOCK))


@triton.jit
def _words(chosen_ptr, region, there, first, TOPK: tl.constexpr, BLOCK_K: tl.constexpr):
    """Bit i: whether queries of a region see region ``first + i`` of keys, for i < 32.

    Those that are not there see all, which keeps their numbers finite.
    """
    k = tl.arange(0, BLOCK_K)
    mask = there[:, None] & (k < TOPK)[None, :]
    near = tl.load(chosen_ptr + region[:, None] * TOPK + k[None, :], mask=mask, other=0)
    near = near.to(tl.int32) - first
    seen = mask & (near >= 0) & (near < 32)
    return tl.where(there, tl.sum(tl.where(seen, 1 << (near & 31), 0), 1), -1)


@triton.jit
def _sees(words, bit):
    """Whether a bit of words, among the lowest 32, is set."""
    return (words >> (bit & 31)) & 1 != 0


@triton.jit(do_not_specialize=[*_STRIDES, *_SIZES, "parts", "span"])
def _routing_mean_kernel(
    q_ptr,
    q_stride_b,
    q_stride_h,
    q_stride_w,
    q_stride_n,
    k_ptr,
    k_stride_b,
    k_stride_h,
    k_stride_w,
    k_stride_n,
    pad_ptr,
    mean_ptr,
    height,
    width,
    region_height,
    region_width,
    key_columns,
    key_regions,
    parts,
    span,
    HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    UNIT: tl.constexpr,
    PADDED: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Means of queries and keys over the tokens of a region: [B, parts, 2, regions, channels].

    A part has ``span`` tokens of a region; the sum over the parts is the mean.
    """
    CHANNELS: tl.constexpr = HEADS * HEAD_DIM
    BLOCKS: tl.constexpr = (CHANNELS + BLOCK_C - 1) // BLOCK_C
    program = tl.program_id(0)
    c = program % BLOCKS * BLOCK_C + tl.arange(0, BLOCK_C)
    part = program // BLOCKS % parts
    region = program // BLOCKS // parts % key_regions
    image = (program // BLOCKS // parts // key_regions).to(tl.int64)
    length = region_height * region_width
    channel = c < CHANNELS
    q_at = (image * q_stride_b + (c // HEAD_DIM).to(tl.int64) * q_stride_n) * UNIT + c % HEAD_DIM
    k_at = (image * k_stride_b + (c // HEAD_DIM).to(tl.int64) * k_stride_n) * UNIT + c % HEAD_DIM
    q_sum = tl.zeros([BLOCK_N, BLOCK_C], tl.float32)
    k_sum = tl.zeros([BLOCK_N, BLOCK_C], tl.float32)
    for start in range(part * span, tl.minimum(part * span + span, length), BLOCK_N):
        token = start + tl.arange(0, BLOCK_N)
        row, column = _place(region, token, key_columns, region_height, region_width)
        inside = (token < length) & (row < height) & (column < width)
        mask = inside[:, None] & channel[None, :]
        at = row * (q_stride_h * UNIT) + column * (q_stride_w * UNIT)
        q_sum += tl.load(q_ptr + at[:, None] + q_at[None, :], mask=mask, other=0.0).to(tl.float32)
        at = row * (k_stride_h * UNIT) + column * (k_stride_w * UNIT)
        k_sum += tl.load(k_ptr + at[:, None] + k_at[None, :], mask=mask, other=0.0).to(tl.float32)
    q = tl.sum(q_sum, 0)
    k = tl.sum(k_sum, 0)
    down = tl.minimum(height - region // key_columns * region_height, region_height)
    right = tl.minimum(width - region % key_columns * region_width, region_width)
    real = tl.maximum(down, 0) * tl.maximum(right, 0)
    if PADDED:
        padding = tl.where(part == 0, length - real, 0).to(tl.float32)
        q += padding * tl.load(pad_ptr + c, mask=channel, other=0.0).to(tl.float32)
        k += padding * tl.load(pad_ptr + CHANNELS + c, mask=channel, other=0.0).to(tl.float32)
        counted = length.to(tl.float32)
    else:
        counted = real.to(tl.float32)
    at = (image * parts + part) * 2 * key_regions + region
    tl.store(mean_ptr + at * CHANNELS + c, q / counted, mask=channel)
    tl.store(mean_ptr + (at + key_regions) * CHANNELS + c, k / counted, mask=channel)


@triton.jit(do_not_specialize=[*_STRIDES, *_SIZES, "scale"])
def _routing_fwd_kernel(
    q_ptr,
    q_stride_b,
    q_stride_h,
    q_stride_w,
    q_stride_n,
    k_ptr,
    k_stride_b,
    k_stride_h,
    k_stride_w,
    k_stride_n,
    v_ptr,
    v_stride_b,
    v_stride_h,
    v_stride_w,
    v_stride_n,
    pad_ptr,
    chosen_ptr,
    out_ptr,
    sums_ptr,
    scale,
    height,
    width,
    region_height,
    region_width,
    query_columns,
    key_columns,
    query_regions,
    key_regions,
    HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    TOPK: tl.constexpr,
    UNIT: tl.constexpr,
    DENSE: tl.constexpr,
    MASKED: tl.constexpr,
    RAGGED: tl.constexpr,
    PADDED: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Attention, and its logarithmic sums to base 2 in the order of slots."""
    length = region_height * region_width
    image, head, one, region, token, owned = _owner(query_regions, length, HEADS, DENSE, BLOCK_M)
    row, column = _place(region, token, query_columns, region_height, region_width)
    real = _inside(row, column, owned, height, width, RAGGED)
    base = q_ptr + (image * q_stride_b + head * q_stride_n) * UNIT
    q = _read(base, row, column, real, q_stride_h, q_stride_w, UNIT, HEAD_DIM, BLOCK_D)
    k_base = k_ptr + (image * k_stride_b + head * k_stride_n) * UNIT
    v_base = v_ptr + (image * v_stride_b + head * v_stride_n) * UNIT
    chosen_ptr += image * query_regions * TOPK
    slots = key_regions * length if DENSE else TOPK * length
    power = scale * _LOG2_E

    largest = tl.full([BLOCK_M], _LOWEST, tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    out = tl.zeros([BLOCK_M, BLOCK_E], tl.float32)
    for start in range(0, slots, BLOCK_N):
        near, n, there = _listed(chosen_ptr + one * TOPK, start, slots, length, DENSE, 1, BLOCK_N)
        y, x = _place(near, n, key_columns, region_height, region_width)
        inside = _inside(y, x, there, height, width, RAGGED)
        k = _read(k_base, y, x, inside, k_stride_h, k_stride_w, UNIT, HEAD_DIM, BLOCK_D)
        v = _read(v_base, y, x, inside, v_stride_h, v_stride_w, UNIT, VALUE_DIM, BLOCK_E)
        if PADDED:
            k = _filled(k, inside, pad_ptr + (HEADS + head) * HEAD_DIM, HEAD_DIM, BLOCK_D)
            v = _filled(v, inside, pad_ptr + (2 * HEADS + head) * HEAD_DIM, VALUE_DIM, BLOCK_E)
        scores = tl.dot(q, tl.trans(k), input_precision=PRECISION)
        seen = there[None, :]
        if MASKED:
            first = start // length
            words = _words(chosen_ptr, region, owned, first, TOPK, BLOCK_K)
            seen = seen & _sees(words[:, None], (near - first)[None, :])
        scores = tl.where(seen, scores, -float("inf"))
        larger = tl.maximum(largest, tl.max(scores, 1) * power)
        weights = tl.exp2(scores * power - larger[:, None])
        fade = tl.exp2(largest - larger)
        total = total * fade + tl.sum(weights, 1)
        out = out * fade[:, None]
        out += tl.dot(weights.to(v.dtype), v, input_precision=PRECISION)
        largest = larger

    out = out / total[:, None]
    _write(out_ptr, out, image, head, row, column, real, height, width, HEADS, VALUE_DIM, BLOCK_E)
    at = (image * HEADS + head) * query_regions * length + region * length + token
    tl.store(sums_ptr + at, largest + tl.log2(total), mask=owned)


@triton.jit(do_not_specialize=[*_STRIDES, *_SIZES, "scale"])
def _routing_bwd_query_kernel(
    grad_ptr,
    grad_stride_b,
    grad_stride_h,
    grad_stride_w,
    grad_stride_n,
    q_ptr,
    q_stride_b,
    q_stride_h,
    q_stride_w,
    q_stride_n,
    k_ptr,
    k_stride_b,
    k_stride_h,
    k_stride_w,
    k_stride_n,
    v_ptr,
    v_stride_b,
    v_stride_h,
    v_stride_w,
    v_stride_n,
    pad_ptr,
    chosen_ptr,
    out_ptr,
    sums_ptr,
    grad_q_ptr,
    delta_ptr,
    scale,
    height,
    width,
    region_height,
    region_width,
    query_columns,
    key_columns,
    query_regions,
    key_regions,
    HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    TOPK: tl.constexpr,
    UNIT: tl.constexpr,
    DENSE: tl.constexpr,
    MASKED: tl.constexpr,
    RAGGED: tl.constexpr,
    PADDED: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Gradient of the queries, and each one's product of output and gradient, ``delta``."""
    length = region_height * region_width
    image, head, one, region, token, owned = _owner(query_regions, length, HEADS, DENSE, BLOCK_M)
    row, column = _place(region, token, query_columns, region_height, region_width)
    real = _inside(row, column, owned, height, width, RAGGED)
    base = q_ptr + (image * q_stride_b + head * q_stride_n) * UNIT
    q = _read(base, row, column, real, q_stride_h, q_stride_w, UNIT, HEAD_DIM, BLOCK_D)
    base = grad_ptr + (image * grad_stride_b + head * grad_stride_n) * UNIT
    grad = _read(base, row, column, real, grad_stride_h, grad_stride_w, UNIT, VALUE_DIM, BLOCK_E)
    at = ((image * height + row) * width + column) * HEADS + head
    where = out_ptr + (at * VALUE_DIM)[:, None] + tl.arange(0, BLOCK_E)[None, :]
    out = tl.load(where, mask=_mask(real, VALUE_DIM, BLOCK_E), other=0.0)
    delta = tl.sum(out.to(tl.float32) * grad.to(tl.float32), 1)
    at = (image * HEADS + head) * query_regions * length + region * length + token
    tl.store(delta_ptr + at, delta, mask=owned)
    sums = tl.load(sums_ptr + at, mask=owned, other=0.0)
    k_base = k_ptr + (image * k_stride_b + head * k_stride_n) * UNIT
    v_base = v_ptr + (image * v_stride_b + head * v_stride_n) * UNIT
    chosen_ptr += image * query_regions * TOPK
    slots = key_regions * length if DENSE else TOPK * length
    power = scale * _LOG2_E

    grad_q = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for start in range(0, slots, BLOCK_N):
        near, n, there = _listed(chosen_ptr + one * TOPK, start, slots, length, DENSE, 1, BLOCK_N)
        y, x = _place(near, n, key_columns, region_height, region_width)
        inside = _inside(y, x, there, height, width, RAGGED)
        k = _read(k_base, y, x, inside, k_stride_h, k_stride_w, UNIT, HEAD_DIM, BLOCK_D)
        v = _read(v_base, y, x, inside, v_stride_h, v_stride_w, UNIT, VALUE_DIM, BLOCK_E)
        if PADDED:
            k = _filled(k, inside, pad_ptr + (HEADS + head) * HEAD_DIM, HEAD_DIM, BLOCK_D)
            v = _filled(v, inside, pad_ptr + (2 * HEADS + head) * HEAD_DIM, VALUE_DIM, BLOCK_E)
        scores = tl.dot(q, tl.trans(k), input_precision=PRECISION)
        seen = there[None, :]
        if MASKED:
            first = start // length
            words = _words(chosen_ptr, region, owned, first, TOPK, BLOCK_K)
            seen = seen & _sees(words[:, None], (near - first)[None, :])
        weights = tl.exp2(scores * power - sums[:, None])
        products = tl.dot(grad, tl.trans(v), input_precision=PRECISION)
        grad_scores = tl.where(seen, weights * (products - delta[:, None]), 0.0)
        grad_q += tl.dot(grad_scores.to(k.dtype), k, input_precision=PRECISION)
    grad_q = grad_q * scale
    _write(
        grad_q_ptr, grad_q, image, head, row, column, real, height, width, HEADS, HEAD_DIM, BLOCK_D
    )


@triton.jit(do_not_specialize=[*_STRIDES, *_SIZES, "scale"])
def _routing_bwd_key_kernel(
    grad_ptr,
    grad_stride_b,
    grad_stride_h,
    grad_stride_w,
    grad_stride_n,
    q_ptr,
    q_stride_b,
    q_stride_h,
    q_stride_w,
    q_stride_n,
    k_ptr,
    k_stride_b,
    k_stride_h,
    k_stride_w,
    k_stride_n,
    v_ptr,
    v_stride_b,
    v_stride_h,
    v_stride_w,
    v_stride_n,
    pad_ptr,
    chosen_ptr,
    callers_ptr,
    offsets_ptr,
    sums_ptr,
    delta_ptr,
    grad_k_ptr,
    grad_v_ptr,
    grad_pad_ptr,
    scale,
    height,
    width,
    region_height,
    region_width,
    query_columns,
    key_columns,
    query_regions,
    key_regions,
    HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    TOPK: tl.constexpr,
    UNIT: tl.constexpr,
    DENSE: tl.constexpr,
    MASKED: tl.constexpr,
    RAGGED: tl.constexpr,
    PADDED: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Gradients of keys and values, and of the vectors that pad them: a program's share of each.

    ``callers`` lists, divided by TOPK, the regions of queries that chose region 0, then those that
    chose region 1, and so on; ``offsets`` says where each one's begin.
    """
    length = region_height * region_width
    image, head, one, region, token, owned = _owner(key_regions, length, HEADS, DENSE, BLOCK_M)
    row, column = _place(region, token, key_columns, region_height, region_width)
    real = _inside(row, column, owned, height, width, RAGGED)
    base = k_ptr + (image * k_stride_b + head * k_stride_n) * UNIT
    k = _read(base, row, column, real, k_stride_h, k_stride_w, UNIT, HEAD_DIM, BLOCK_D)
    base = v_ptr + (image * v_stride_b + head * v_stride_n) * UNIT
    v = _read(base, row, column, real, v_stride_h, v_stride_w, UNIT, VALUE_DIM, BLOCK_E)
    if PADDED:
        k = _filled(k, real, pad_ptr + (HEADS + head) * HEAD_DIM, HEAD_DIM, BLOCK_D)
        v = _filled(v, real, pad_ptr + (2 * HEADS + head) * HEAD_DIM, VALUE_DIM, BLOCK_E)
    q_base = q_ptr + (image * q_stride_b + head * q_stride_n) * UNIT
    grad_base = grad_ptr + (image * grad_stride_b + head * grad_stride_n) * UNIT
    query_slot = (image * HEADS + head) * query_regions * length
    chosen_ptr += image * query_regions * TOPK
    if DENSE:
        slots = query_regions * length
    else:
        offsets_ptr += image * (key_regions + 1) + one
        begin = tl.load(offsets_ptr)
        slots = (tl.load(offsets_ptr + 1) - begin).to(tl.int32) * length
        callers_ptr += image * query_regions * TOPK + begin
    power = scale * _LOG2_E

    grad_k = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    grad_v = tl.zeros([BLOCK_M, BLOCK_E], tl.float32)
    for start in range(0, slots, BLOCK_N):
        near, n, there = _listed(callers_ptr, start, slots, length, DENSE, TOPK, BLOCK_N)
        y, x = _place(near, n, query_columns, region_height, region_width)
        inside = _inside(y, x, there, height, width, RAGGED)
        q = _read(q_base, y, x, inside, q_stride_h, q_stride_w, UNIT, HEAD_DIM, BLOCK_D)
        grad = _read(
            grad_base, y, x, inside, grad_stride_h, grad_stride_w, UNIT, VALUE_DIM, BLOCK_E
        )
        at = query_slot + near * length + n
        sums = tl.load(sums_ptr + at, mask=there, other=0.0)
        delta = tl.load(delta_ptr + at, mask=there, other=0.0)
        scores = tl.dot(k, tl.trans(q), input_precision=PRECISION)
        seen = there[None, :]
        if MASKED:
            words = _words(chosen_ptr, near, there, one, TOPK, BLOCK_K)
            seen = seen & _sees(words[None, :], (region - one)[:, None])
        weights = tl.where(seen, tl.exp2(scores * power - sums[None, :]), 0.0)
        grad_v += tl.dot(weights.to(grad.dtype), grad, input_precision=PRECISION)
        products = tl.dot(v, tl.trans(grad), input_precision=PRECISION)
        grad_scores = weights * (products - delta[None, :])
        grad_k += tl.dot(grad_scores.to(q.dtype), q, input_precision=PRECISION)
    grad_k = grad_k * scale
    _write(
        grad_k_ptr, grad_k, image, head, row, column, real, height, width, HEADS, HEAD_DIM, BLOCK_D
    )
    _write(
        grad_v_ptr, grad_v, image, head, row, column, real, height, width, HEADS, VALUE_DIM, BLOCK_E
    )
    if PADDED:
        padding = owned & (real == 0)
        d = tl.arange(0, BLOCK_D)
        where = grad_pad_ptr + tl.program_id(0).to(tl.int64) * (2 * HEAD_DIM) + d
        share = tl.sum(tl.where(padding[:, None], grad_k, 0.0), 0)
        tl.store(where, share, mask=d < HEAD_DIM)
        share = tl.sum(tl.where(padding[:, None], grad_v, 0.0), 0)
        tl.store(where + HEAD_DIM, share, mask=d < HEAD_DIM)
