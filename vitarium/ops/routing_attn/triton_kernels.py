"""Kernels of bi-level routing attention.

Tokens have slots: those of a region one after the other, regions in raster order, padding
included. Regions of queries are those that hold any token of the map; regions of keys are all.
Chosen regions are read where they lie in the map, through their index.

A program owns a block of slots and loops over blocks of those that it attends to, or that attend
to it. These belong to a list of regions, and the owner to one region. Or, DENSE, they are all slots
of the image, and so are the owners: where regions are smaller than a product of matrices may be,
that is less work. What was not chosen is then pushed out of the softmax (MASKED): a small product
adds to the scores what a table [regions of queries, regions of keys] holds. Blocks hold whole
regions there.

Where all that is attended to is one block (ONCE), a program computes a GROUP of heads, which share
the positions. Programs of neighboring heads, which are neighbors in memory, run together. Strides
come in units of UNIT elements, so that the compiler sees what divides them and reads vectors.
Divisors come as numbers to multiply by.
"""

import triton
import triton.language as tl

_LOG2_E = tl.constexpr(1.4426950408889634)  # exponentials are of base 2
_LOWEST = tl.constexpr(-1e38)  # of scores; finite, for differences of it
_STRIDES = [f"{x}_stride_{axis}" for x in ("q", "k", "v", "grad") for axis in "bhwn"]
_SIZES = ["height", "width", "region_height", "region_width", "query_columns", "key_columns"]
_SIZES += ["query_regions", "key_regions", "over_length", "over_width"]
_SIZES += ["over_query_columns", "over_key_columns"]


@triton.jit
def _quotient(x, inverse):
    """``x`` over the divisor that an inverse was made of; 0 <= x < 2**31."""
    high = tl.umulhi(x.to(tl.uint32) * 2, (inverse & 0xFFFFFFFF).to(tl.uint32))
    return (high >> ((inverse >> 32) - 1).to(tl.uint32)).to(tl.int32)


@triton.jit
def _place(region, token, columns, over_columns, region_height, region_width, over_width):
    """Row and column in the map."""
    down, right = _quotient(region, over_columns), _quotient(token, over_width)
    row = down * region_height + right
    column = (region - down * columns) * region_width + token - right * region_width
    return row.to(tl.int64), column.to(tl.int64)


@triton.jit
def _blocks(regions, length, MASKED: tl.constexpr, BLOCK: tl.constexpr):
    """How many blocks hold the slots of regions."""
    if MASKED:
        return tl.cdiv(regions, BLOCK // length)
    else:
        return tl.cdiv(regions * length, BLOCK)


@triton.jit
def _slots(
    list_ptr,
    block,
    regions,
    length,
    over_length,
    DENSE: tl.constexpr,
    MASKED: tl.constexpr,
    DIVISOR: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """A block of the slots of regions: the region of each, its place there, whether it exists.

    Unless DENSE, the regions are those of a list that holds DIVISOR numbers for each one.
    """
    slot = tl.arange(0, BLOCK)
    if MASKED:
        whole = BLOCK // length
        region = _quotient(slot, over_length)
        token = slot - region * length
        there = region < whole
        region += block * whole
        there = there & (region < regions)
    else:
        slot += block * BLOCK
        region = _quotient(slot, over_length)
        token = slot - region * length
        there = region < regions
        if not DENSE:
            region = tl.load(list_ptr + region, mask=there, other=0).to(tl.int32) // DIVISOR
    return region, token, there


@triton.jit
def _owned(
    block,
    regions,
    length,
    over_length,
    DENSE: tl.constexpr,
    MASKED: tl.constexpr,
    WHOLE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The slots of a program, as `_slots` gives them, and the region, unless there are more."""
    if DENSE:
        region, token, there = _slots(
            None, block, regions, length, over_length, True, MASKED, 1, BLOCK
        )
        one = 0
    else:
        one = block
        token = tl.arange(0, BLOCK)
        if not WHOLE:
            blocks = tl.cdiv(length, BLOCK)
            one = block // blocks
            token += (block - one * blocks) * BLOCK
        region = one + tl.zeros_like(token)
        there = token < length
    return region, token, there, one


@triton.jit
def _regions(over_length, BLOCK_R: tl.constexpr, BLOCK: tl.constexpr):
    """[BLOCK_R, BLOCK]: 1 where a slot belongs to a region of its block."""
    region = _quotient(tl.arange(0, BLOCK), over_length)
    return (tl.arange(0, BLOCK_R)[:, None] == region[None, :]).to(tl.float32).to(tl.bfloat16)


@triton.jit
def _added(mask_ptr, region, there, block, blocks, BLOCK_R: tl.constexpr):
    """What the scores of queries with the regions in a block of keys get, [queries, BLOCK_R]."""
    at = (region * blocks + block).to(tl.int64) * BLOCK_R
    where = mask_ptr + at[:, None] + tl.arange(0, BLOCK_R)[None, :]
    return tl.load(where, mask=there[:, None], other=_LOWEST)


@triton.jit
def _inside(row, column, there, height, width, RAGGED: tl.constexpr):
    """Which slots hold a token of the map."""
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
def _at(ptr, image, head, stride_b, stride_n, UNIT: tl.constexpr):
    """A head of an image."""
    return ptr + (image * stride_b + head.to(tl.int64) * stride_n) * UNIT


@triton.jit
def _rows(base, row, column, stride_h, stride_w, UNIT: tl.constexpr):
    """Where tokens of a map are."""
    return base + (row * stride_h + column * stride_w) * UNIT


@triton.jit
def _read(rows, inside, DIM: tl.constexpr, BLOCK: tl.constexpr):
    """Tokens [rows, BLOCK], zeros where they are not inside."""
    where = rows[:, None] + tl.arange(0, BLOCK)[None, :]
    return tl.load(where, mask=_mask(inside, DIM, BLOCK), other=0.0)


@triton.jit
def _filled(x, inside, pad_ptr, vector, DIM: tl.constexpr, BLOCK: tl.constexpr):
    """Tokens with a vector of ``pad`` in the place of those that are not inside.

    To read that vector in their place would cost the loads their width.
    """
    d = tl.arange(0, BLOCK)
    fill = tl.load(pad_ptr + vector * DIM + d, mask=d < DIM, other=0.0)
    return tl.where(inside[:, None], x, fill[None, :])


@triton.jit
def _write(
    ptr, x, image, head, row, column, inside, height, width, HEADS: tl.constexpr, DIM, BLOCK
):
    """Tokens [rows, BLOCK] of a contiguous map."""
    at = ((image * height + row) * width + column) * HEADS + head
    where = ptr + (at * DIM)[:, None] + tl.arange(0, BLOCK)[None, :]
    tl.store(where, x.to(ptr.dtype.element_ty), mask=_mask(inside, DIM, BLOCK))


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
    over_width,
    over_key_columns,
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
    region = program // BLOCKS // parts
    part = program // BLOCKS - region * parts
    image = tl.program_id(1).to(tl.int64)
    length = region_height * region_width
    channel = c < CHANNELS
    q_at = (image * q_stride_b + (c // HEAD_DIM).to(tl.int64) * q_stride_n) * UNIT + c % HEAD_DIM
    k_at = (image * k_stride_b + (c // HEAD_DIM).to(tl.int64) * k_stride_n) * UNIT + c % HEAD_DIM
    q_sum = tl.zeros([BLOCK_N, BLOCK_C], tl.float32)
    k_sum = tl.zeros([BLOCK_N, BLOCK_C], tl.float32)
    last = tl.minimum(part * span + span, length)
    for start in range(part * span, last, BLOCK_N):
        token = start + tl.arange(0, BLOCK_N)
        row, column = _place(
            region, token, key_columns, over_key_columns, region_height, region_width, over_width
        )
        inside = (token < last) & (row < height) & (column < width)
        mask = inside[:, None] & channel[None, :]
        at = (row * q_stride_h + column * q_stride_w) * UNIT
        q_sum += tl.load(q_ptr + at[:, None] + q_at[None, :], mask=mask, other=0.0).to(tl.float32)
        at = (row * k_stride_h + column * k_stride_w) * UNIT
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
    mask_ptr,
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
    over_length,
    over_width,
    over_query_columns,
    over_key_columns,
    HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    TOPK: tl.constexpr,
    UNIT: tl.constexpr,
    DENSE: tl.constexpr,
    MASKED: tl.constexpr,
    RAGGED: tl.constexpr,
    PADDED: tl.constexpr,
    WHOLE: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    ONCE: tl.constexpr,
    GROUP: tl.constexpr,
):
    """Attention, and its logarithmic sums to base 2 in the order of slots."""
    image = tl.program_id(1).to(tl.int64)
    piece = tl.program_id(0) // (HEADS // GROUP)
    first = tl.program_id(0) % (HEADS // GROUP) * GROUP
    length = region_height * region_width
    region, token, there, one = _owned(
        piece, query_regions, length, over_length, DENSE, MASKED, WHOLE, BLOCK_M
    )
    row, column = _place(
        region, token, query_columns, over_query_columns, region_height, region_width, over_width
    )
    real = _inside(row, column, there, height, width, RAGGED)
    chosen_ptr += (image * query_regions + one) * TOPK
    count = key_regions if DENSE else TOPK
    blocks = _blocks(count, length, MASKED, BLOCK_N)
    power = scale * _LOG2_E
    if MASKED:
        of_regions = _regions(over_length, BLOCK_R, BLOCK_N)
        mask_ptr += image * query_regions * blocks * BLOCK_R
    if ONCE:
        near, n, seen = _slots(chosen_ptr, 0, count, length, over_length, DENSE, MASKED, 1, BLOCK_N)
        y, x = _place(
            near, n, key_columns, over_key_columns, region_height, region_width, over_width
        )
        inside = _inside(y, x, seen, height, width, RAGGED)

    for i in range(0, GROUP):
        head = first + i
        base = _at(q_ptr, image, head, q_stride_b, q_stride_n, UNIT)
        rows = _rows(base, row, column, q_stride_h, q_stride_w, UNIT)
        q = _read(rows, real, HEAD_DIM, BLOCK_D)
        k_base = _at(k_ptr, image, head, k_stride_b, k_stride_n, UNIT)
        v_base = _at(v_ptr, image, head, v_stride_b, v_stride_n, UNIT)
        largest = tl.full([BLOCK_M], _LOWEST, tl.float32)
        total = tl.zeros([BLOCK_M], tl.float32)
        out = tl.zeros([BLOCK_M, BLOCK_E], tl.float32)
        for block in range(0, 1 if ONCE else blocks):
            if not ONCE:
                near, n, seen = _slots(
                    chosen_ptr, block, count, length, over_length, DENSE, MASKED, 1, BLOCK_N
                )
                y, x = _place(
                    near, n, key_columns, over_key_columns, region_height, region_width, over_width
                )
                inside = _inside(y, x, seen, height, width, RAGGED)
            k_rows = _rows(k_base, y, x, k_stride_h, k_stride_w, UNIT)
            v_rows = _rows(v_base, y, x, v_stride_h, v_stride_w, UNIT)
            k = _read(k_rows, inside, HEAD_DIM, BLOCK_D)
            v = _read(v_rows, inside, VALUE_DIM, BLOCK_E)
            if PADDED:
                k = _filled(k, inside, pad_ptr, HEADS + head, HEAD_DIM, BLOCK_D)
                v = _filled(v, inside, pad_ptr, 2 * HEADS + head, VALUE_DIM, BLOCK_E)
            scores = tl.dot(q, tl.trans(k), input_precision=PRECISION)
            if MASKED:
                added = _added(mask_ptr, region, there, block, blocks, BLOCK_R)
                scores = tl.dot(added, of_regions, scores)
            else:
                scores = tl.where(seen[None, :], scores, _LOWEST)
            larger = tl.maximum(largest, tl.max(scores, 1) * power)
            weights = tl.exp2(scores * power - larger[:, None])
            fade = tl.exp2(largest - larger)
            total = total * fade + tl.sum(weights, 1)
            out = out * fade[:, None]
            out += tl.dot(weights.to(v.dtype), v, input_precision=PRECISION)
            largest = larger
        out *= (1.0 / total)[:, None]
        _write(
            out_ptr, out, image, head, row, column, real, height, width, HEADS, VALUE_DIM, BLOCK_E
        )
        at = (image * HEADS + head) * query_regions * length + region * length + token
        tl.store(sums_ptr + at, largest + tl.log2(total), mask=there)


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
    mask_ptr,
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
    over_length,
    over_width,
    over_query_columns,
    over_key_columns,
    HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    TOPK: tl.constexpr,
    UNIT: tl.constexpr,
    DENSE: tl.constexpr,
    MASKED: tl.constexpr,
    RAGGED: tl.constexpr,
    PADDED: tl.constexpr,
    WHOLE: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    ONCE: tl.constexpr,
    GROUP: tl.constexpr,
):
    """Gradient of the queries, and each one's product of output and gradient, ``delta``."""
    image = tl.program_id(1).to(tl.int64)
    piece = tl.program_id(0) // (HEADS // GROUP)
    first = tl.program_id(0) % (HEADS // GROUP) * GROUP
    length = region_height * region_width
    region, token, there, one = _owned(
        piece, query_regions, length, over_length, DENSE, MASKED, WHOLE, BLOCK_M
    )
    row, column = _place(
        region, token, query_columns, over_query_columns, region_height, region_width, over_width
    )
    real = _inside(row, column, there, height, width, RAGGED)
    chosen_ptr += (image * query_regions + one) * TOPK
    count = key_regions if DENSE else TOPK
    blocks = _blocks(count, length, MASKED, BLOCK_N)
    power = scale * _LOG2_E
    if MASKED:
        of_regions = _regions(over_length, BLOCK_R, BLOCK_N)
        mask_ptr += image * query_regions * blocks * BLOCK_R
    if ONCE:
        near, n, seen = _slots(chosen_ptr, 0, count, length, over_length, DENSE, MASKED, 1, BLOCK_N)
        y, x = _place(
            near, n, key_columns, over_key_columns, region_height, region_width, over_width
        )
        inside = _inside(y, x, seen, height, width, RAGGED)

    for i in range(0, GROUP):
        head = first + i
        base = _at(q_ptr, image, head, q_stride_b, q_stride_n, UNIT)
        rows = _rows(base, row, column, q_stride_h, q_stride_w, UNIT)
        q = _read(rows, real, HEAD_DIM, BLOCK_D)
        base = _at(grad_ptr, image, head, grad_stride_b, grad_stride_n, UNIT)
        rows = _rows(base, row, column, grad_stride_h, grad_stride_w, UNIT)
        grad = _read(rows, real, VALUE_DIM, BLOCK_E)
        at = ((image * height + row) * width + column) * HEADS + head
        where = out_ptr + (at * VALUE_DIM)[:, None] + tl.arange(0, BLOCK_E)[None, :]
        out = tl.load(where, mask=_mask(real, VALUE_DIM, BLOCK_E), other=0.0)
        delta = tl.sum(out.to(tl.float32) * grad.to(tl.float32), 1)
        at = (image * HEADS + head) * query_regions * length + region * length + token
        tl.store(delta_ptr + at, delta, mask=there)
        sums = tl.load(sums_ptr + at, mask=there, other=0.0)
        k_base = _at(k_ptr, image, head, k_stride_b, k_stride_n, UNIT)
        v_base = _at(v_ptr, image, head, v_stride_b, v_stride_n, UNIT)
        grad_q = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
        for block in range(0, 1 if ONCE else blocks):
            if not ONCE:
                near, n, seen = _slots(
                    chosen_ptr, block, count, length, over_length, DENSE, MASKED, 1, BLOCK_N
                )
                y, x = _place(
                    near, n, key_columns, over_key_columns, region_height, region_width, over_width
                )
                inside = _inside(y, x, seen, height, width, RAGGED)
            k_rows = _rows(k_base, y, x, k_stride_h, k_stride_w, UNIT)
            v_rows = _rows(v_base, y, x, v_stride_h, v_stride_w, UNIT)
            k = _read(k_rows, inside, HEAD_DIM, BLOCK_D)
            v = _read(v_rows, inside, VALUE_DIM, BLOCK_E)
            if PADDED:
                k = _filled(k, inside, pad_ptr, HEADS + head, HEAD_DIM, BLOCK_D)
                v = _filled(v, inside, pad_ptr, 2 * HEADS + head, VALUE_DIM, BLOCK_E)
            scores = tl.dot(q, tl.trans(k), input_precision=PRECISION)
            if MASKED:
                added = _added(mask_ptr, region, there, block, blocks, BLOCK_R)
                scores = tl.dot(added, of_regions, scores)
            else:
                scores = tl.where(seen[None, :], scores, _LOWEST)
            weights = tl.exp2(scores * power - sums[:, None])
            products = tl.dot(grad, tl.trans(v), input_precision=PRECISION)
            grad_scores = weights * (products - delta[:, None])
            grad_q += tl.dot(grad_scores.to(k.dtype), k, input_precision=PRECISION)
        grad_q *= scale
        ptr = grad_q_ptr
        _write(ptr, grad_q, image, head, row, column, real, height, width, HEADS, HEAD_DIM, BLOCK_D)


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
    callers_ptr,
    offsets_ptr,
    mask_ptr,
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
    over_length,
    over_width,
    over_query_columns,
    over_key_columns,
    HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    TOPK: tl.constexpr,
    UNIT: tl.constexpr,
    DENSE: tl.constexpr,
    MASKED: tl.constexpr,
    RAGGED: tl.constexpr,
    PADDED: tl.constexpr,
    WHOLE: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Gradients of keys and values, and of the vectors that pad them: a program's share of each.

    ``callers`` lists, times TOPK, the regions of queries that chose region 0, then those that
    chose region 1, and so on; ``offsets`` says where each one's begin.
    """
    image = tl.program_id(1).to(tl.int64)
    piece, head = tl.program_id(0) // HEADS, tl.program_id(0) % HEADS
    length = region_height * region_width
    region, token, there, one = _owned(
        piece, key_regions, length, over_length, DENSE, MASKED, WHOLE, BLOCK_M
    )
    row, column = _place(
        region, token, key_columns, over_key_columns, region_height, region_width, over_width
    )
    real = _inside(row, column, there, height, width, RAGGED)
    base = _at(k_ptr, image, head, k_stride_b, k_stride_n, UNIT)
    k_rows = _rows(base, row, column, k_stride_h, k_stride_w, UNIT)
    base = _at(v_ptr, image, head, v_stride_b, v_stride_n, UNIT)
    v_rows = _rows(base, row, column, v_stride_h, v_stride_w, UNIT)
    k = _read(k_rows, real, HEAD_DIM, BLOCK_D)
    v = _read(v_rows, real, VALUE_DIM, BLOCK_E)
    if PADDED:
        k = _filled(k, real, pad_ptr, HEADS + head, HEAD_DIM, BLOCK_D)
        v = _filled(v, real, pad_ptr, 2 * HEADS + head, VALUE_DIM, BLOCK_E)
    q_base = _at(q_ptr, image, head, q_stride_b, q_stride_n, UNIT)
    grad_base = _at(grad_ptr, image, head, grad_stride_b, grad_stride_n, UNIT)
    slot = (image * HEADS + head) * query_regions * length
    count = query_regions
    if not DENSE:
        offsets_ptr += image * (key_regions + 1) + one
        begin = tl.load(offsets_ptr)
        count = (tl.load(offsets_ptr + 1) - begin).to(tl.int32)
        callers_ptr += image * query_regions * TOPK + begin
    if MASKED:
        of_regions = tl.trans(_regions(over_length, BLOCK_R, BLOCK_M))
        columns = _blocks(key_regions, length, MASKED, BLOCK_M)
        mask_ptr += image * query_regions * columns * BLOCK_R
    power = scale * _LOG2_E

    grad_k = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    grad_v = tl.zeros([BLOCK_M, BLOCK_E], tl.float32)
    for block in range(0, _blocks(count, length, MASKED, BLOCK_N)):
        near, n, seen = _slots(
            callers_ptr, block, count, length, over_length, DENSE, MASKED, TOPK, BLOCK_N
        )
        y, x = _place(
            near, n, query_columns, over_query_columns, region_height, region_width, over_width
        )
        inside = _inside(y, x, seen, height, width, RAGGED)
        rows = _rows(q_base, y, x, q_stride_h, q_stride_w, UNIT)
        q = _read(rows, inside, HEAD_DIM, BLOCK_D)
        rows = _rows(grad_base, y, x, grad_stride_h, grad_stride_w, UNIT)
        grad = _read(rows, inside, VALUE_DIM, BLOCK_E)
        at = slot + near * length + n
        sums = tl.load(sums_ptr + at, mask=seen, other=0.0)
        delta = tl.load(delta_ptr + at, mask=seen, other=0.0)
        scores = tl.dot(k, tl.trans(q), input_precision=PRECISION)
        if MASKED:
            added = _added(mask_ptr, near, seen, piece, columns, BLOCK_R)
            scores = tl.dot(of_regions, tl.trans(added), scores)
        else:
            scores = tl.where(seen[None, :], scores, _LOWEST)
        weights = tl.exp2(scores * power - sums[None, :])
        grad_v += tl.dot(weights.to(grad.dtype), grad, input_precision=PRECISION)
        products = tl.dot(v, tl.trans(grad), input_precision=PRECISION)
        grad_scores = weights * (products - delta[None, :])
        grad_k += tl.dot(grad_scores.to(q.dtype), q, input_precision=PRECISION)
    grad_k *= scale
    ptr = grad_k_ptr
    _write(ptr, grad_k, image, head, row, column, real, height, width, HEADS, HEAD_DIM, BLOCK_D)
    ptr = grad_v_ptr
    _write(ptr, grad_v, image, head, row, column, real, height, width, HEADS, VALUE_DIM, BLOCK_E)
    if PADDED:
        padding = there & (real == 0)
        d = tl.arange(0, BLOCK_D)
        program = image * tl.num_programs(0) + tl.program_id(0)
        where = grad_pad_ptr + program * (2 * HEAD_DIM) + d
        share = tl.sum(tl.where(padding[:, None], grad_k, 0.0), 0)
        tl.store(where, share, mask=d < HEAD_DIM)
        share = tl.sum(tl.where(padding[:, None], grad_v, 0.0), 0)
        tl.store(where + HEAD_DIM, share, mask=d < HEAD_DIM)
