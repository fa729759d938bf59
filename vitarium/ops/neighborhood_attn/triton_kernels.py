"""Neighborhood attention: kernels.

A program attends for a tile of queries of one residue class. The windows of its queries lie in
one rectangle of keys of the same class, its halo, which is walked in chunks of ``ROWS`` rows and
``COLUMNS`` columns; what of it lies outside of a query's window is masked. Positions are ranks in
their class until they become addresses. Scores are in units of log 2.

Args that kernels share:
    table: ``[heads, 2 * KERNEL_H, 2 * KERNEL_W]``, float32: the bias times log2(e); the last row
        and the last column mask. Kernels for several images take the bias as it is given.
    lse, delta: ``[batch, heads, height, width]``, float32: the scores' log-sum-exp, and the dot
        product of the output with its gradient.
    height, width: positions with queries; key_height, key_width: with keys.
    q_batch, ...: strides in units of UNIT elements, which says how addresses are aligned.
"""

import triton
import triton.language as tl

_LOG2_E = tl.constexpr(1.4426950408889634)
_MASKED = tl.constexpr(-1e30)  # finite: differences of masked scores are no NaN
_SIZES = ["heads", "height", "width", "key_height", "key_width"]
_STRIDES = [f"{x}_{axis}" for x in "qkvg" for axis in ("batch", "row", "column", "head")]
_Q, _K, _V, _G = (_STRIDES[i : i + 4] for i in range(0, 16, 4))


@triton.jit
def _start(rank, members, KERNEL: tl.constexpr):
    """First rank of the window of the query at ``rank``."""
    return tl.minimum(tl.maximum(rank - KERNEL // 2, 0), members - KERNEL)


@triton.jit
def _halo(first, queries, members, TILE: tl.constexpr, KERNEL: tl.constexpr):
    """Ranks [begin, end) of the keys that a tile's queries see."""
    last = tl.minimum(first + TILE, queries) - 1
    return _start(first, members, KERNEL), _start(last, members, KERNEL) + KERNEL


@triton.jit
def _seen_by(first, queries, members, TILE: tl.constexpr, KERNEL: tl.constexpr):
    """Ranks [begin, end) of the queries that see a tile's keys."""
    last = tl.minimum(first + TILE, members) - 1
    begin = tl.where(first < KERNEL, 0, first - KERNEL // 2)
    end = tl.where(last >= members - KERNEL, members, last + KERNEL // 2 + 1)
    return begin, tl.minimum(end, queries)


@triton.jit
def _before(KERNEL: tl.constexpr, CHUNK: tl.constexpr):
    """Keys before a tile's first query, in whole chunks before the halo of an inner tile."""
    return KERNEL // 2 + (KERNEL // 2 + CHUNK - 1) // CHUNK * CHUNK


@triton.jit
def _inside(key, start, KERNEL: tl.constexpr):
    """Whether windows that begin at ``start`` hold a key."""
    return (key >= start) & (key < start + KERNEL)


@triton.jit
def _entry(key, query, start, KERNEL: tl.constexpr):
    """Where on an axis of the table a key stands to a query; anywhere if there is no query."""
    entry = tl.maximum(key - query + KERNEL - 1, 0)
    return tl.where(_inside(key, start, KERNEL), entry, 2 * KERNEL - 1)


@triton.jit
def _on_map(rows, d, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    """Mask of the elements ``[rows, BLOCK_D]`` that exist."""
    mask = rows[:, None]
    if HEAD_DIM < BLOCK_D:
        mask = mask & (d < HEAD_DIM)[None, :]
    return mask


@triton.jit
def _scores(
    s, scale, table, row_key, row_query, row_start, column_term,
    KERNEL_H: tl.constexpr, KERNEL_W: tl.constexpr, BIASED: tl.constexpr,
):  # fmt: skip
    """Scores of products ``s``, masked and biased.

    ``column_term`` is what `_column_term` gives; rows are ranks that broadcast to s's shape.
    """
    if BIASED:
        row = _entry(row_key, row_query, row_start, KERNEL_H) * (2 * KERNEL_W)
        s = s * scale + tl.load(table + row + column_term)
    else:
        s = tl.where(_inside(row_key, row_start, KERNEL_H), s * scale + column_term, _MASKED)
    return s


@triton.jit
def _column_term(key, query, start, KERNEL_W: tl.constexpr, BIASED: tl.constexpr):
    """What columns add to scores: an offset into the table, or the mask itself."""
    if BIASED:
        term = _entry(key, query, start, KERNEL_W)
    else:
        term = tl.where(_inside(key, start, KERNEL_W), 0.0, _MASKED)
    return term


@triton.jit
def _term(
    bias, kr, kc, qr, qc, start_r, start_c,
    KERNEL_H: tl.constexpr, KERNEL_W: tl.constexpr, BIASED: tl.constexpr,
):  # fmt: skip
    """What is added to the scores of a chunk; ``bias`` is a head's, as it was given."""
    kr, kc, qr, qc = kr[None, :], kc[None, :], qr[:, None], qc[:, None]
    start_r, start_c = start_r[:, None], start_c[:, None]
    inside = _inside(kr, start_r, KERNEL_H) & _inside(kc, start_c, KERNEL_W)
    if BIASED:
        row = _entry(kr, qr, start_r, KERNEL_H) * (2 * KERNEL_W - 1)
        column = _entry(kc, qc, start_c, KERNEL_W)
        term = tl.load(bias + row + column, mask=inside, other=0.0).to(tl.float32) * _LOG2_E
        term = tl.where(inside, term, _MASKED)
    else:
        term = tl.where(inside, 0.0, _MASKED)
    return term


@triton.jit(do_not_specialize=[*_SIZES, *_Q, *_K, *_V])
def _neighborhood_fwd_kernel(
    query, key, value, table, out, lse,
    heads, height, width, key_height, key_width,
    q_batch, q_row, q_column, q_head,
    k_batch, k_row, k_column, k_head,
    v_batch, v_row, v_column, v_head,
    dilation_h, dilation_w, scale,
    KERNEL_H: tl.constexpr, KERNEL_W: tl.constexpr, HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr, UNIT: tl.constexpr, BIASED: tl.constexpr, KEEP: tl.constexpr,
    PRECISION: tl.constexpr, TILE_H: tl.constexpr, TILE_W: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    head, column_tile = tl.program_id(0) % heads, tl.program_id(0) // heads
    row_tile, image = tl.program_id(1), tl.program_id(2).to(tl.int64)
    residue_h, residue_w = row_tile % dilation_h, column_tile % dilation_w
    first_r, first_c = row_tile // dilation_h * TILE_H, column_tile // dilation_w * TILE_W
    queries_h = (height - residue_h + dilation_h - 1) // dilation_h
    queries_w = (width - residue_w + dilation_w - 1) // dilation_w
    members_h = (key_height - residue_h + dilation_h - 1) // dilation_h
    members_w = (key_width - residue_w + dilation_w - 1) // dilation_w
    begin_r, end_r = _halo(first_r, queries_h, members_h, TILE_H, KERNEL_H)
    begin_c, end_c = _halo(first_c, queries_w, members_w, TILE_W, KERNEL_W)

    m = tl.arange(0, TILE_H * TILE_W)
    n = tl.arange(0, ROWS * COLUMNS)
    d = tl.arange(0, BLOCK_D)
    qr, qc = first_r + m // TILE_W, first_c + m % TILE_W
    start_r, start_c = _start(qr, members_h, KERNEL_H), _start(qc, members_w, KERNEL_W)
    real = (qr < queries_h) & (qc < queries_w)
    y = (qr * dilation_h + residue_h).to(tl.int64)
    x = (qc * dilation_w + residue_w).to(tl.int64)
    query += (image * q_batch + head * q_head) * UNIT
    at = query + ((y * q_row + x * q_column) * UNIT)[:, None] + d[None, :]
    q = tl.load(at, mask=_on_map(real, d, HEAD_DIM, BLOCK_D), other=0.0)

    key += (image * k_batch + head * k_head) * UNIT
    value += (image * v_batch + head * v_head) * UNIT
    if BIASED:
        table += head * (4 * KERNEL_H * KERNEL_W)
    top = tl.full([TILE_H * TILE_W], _MASKED, tl.float32)
    total = tl.zeros([TILE_H * TILE_W], tl.float32)
    acc = tl.zeros([TILE_H * TILE_W, BLOCK_D], tl.float32)
    down = n // COLUMNS
    for column in range(begin_c, end_c, COLUMNS):
        kc = column + n % COLUMNS
        term = _column_term(kc[None, :], qc[:, None], start_c[:, None], KERNEL_W, BIASED)
        near_y = (down * dilation_h).to(tl.int64)
        near_x = (kc * dilation_w + residue_w).to(tl.int64)
        k_at = key + ((near_y * k_row + near_x * k_column) * UNIT)[:, None] + d[None, :]
        v_at = value + ((near_y * v_row + near_x * v_column) * UNIT)[:, None] + d[None, :]
        for row in range(begin_r, end_r, ROWS):
            kr = row + down
            mask = _on_map((kr < end_r) & (kc < end_c), d, HEAD_DIM, BLOCK_D)
            row_y = (row * dilation_h + residue_h).to(tl.int64) * UNIT
            k = tl.load(k_at + row_y * k_row, mask=mask, other=0.0)
            s = tl.dot(q, tl.trans(k), input_precision=PRECISION)
            s = _scores(
                s, scale, table, kr[None, :], qr[:, None], start_r[:, None], term,
                KERNEL_H, KERNEL_W, BIASED,
            )  # fmt: skip
            higher = tl.maximum(top, tl.max(s, 1))
            shrink = tl.exp2(top - higher)
            weights = tl.exp2(s - higher[:, None])
            top = higher
            total = total * shrink + tl.sum(weights, 1)
            v = tl.load(v_at + row_y * v_row, mask=mask, other=0.0)
            acc = acc * shrink[:, None]
            acc = tl.dot(weights.to(v.dtype), v, acc, input_precision=PRECISION)
    acc = acc * (1 / total)[:, None]
    position = (image * height + y) * width + x
    at = out + ((position * heads + head) * HEAD_DIM)[:, None] + d[None, :]
    tl.store(at, acc.to(out.dtype.element_ty), mask=_on_map(real, d, HEAD_DIM, BLOCK_D))
    if KEEP:
        at = ((image * heads + head) * height + y) * width + x
        tl.store(lse + at, top + tl.log2(total), mask=real)


@triton.jit(do_not_specialize=["batch", *_SIZES, *_Q, *_K, *_V])
def _neighborhood_fwd_images_kernel(
    query, key, value, bias, out, lse,
    batch, heads, height, width, key_height, key_width,
    q_batch, q_row, q_column, q_head,
    k_batch, k_row, k_column, k_head,
    v_batch, v_row, v_column, v_head,
    dilation_h, dilation_w, scale,
    KERNEL_H: tl.constexpr, KERNEL_W: tl.constexpr, HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr, UNIT: tl.constexpr, BIASED: tl.constexpr, KEEP: tl.constexpr,
    PRECISION: tl.constexpr, LONGEST: tl.constexpr, TILE_H: tl.constexpr, TILE_W: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """The same tile of several images: what is added to scores stays in registers.

    LONGEST is the number of rows of the longest class, or more than a halo has.
    """
    head, column_tile = tl.program_id(0) % heads, tl.program_id(0) // heads
    row_tile = tl.program_id(1)
    residue_h, residue_w = row_tile % dilation_h, column_tile % dilation_w
    first_r, first_c = row_tile // dilation_h * TILE_H, column_tile // dilation_w * TILE_W
    queries_h = (height - residue_h + dilation_h - 1) // dilation_h
    queries_w = (width - residue_w + dilation_w - 1) // dilation_w
    members_h = (key_height - residue_h + dilation_h - 1) // dilation_h
    members_w = (key_width - residue_w + dilation_w - 1) // dilation_w
    begin_r, end_r = _halo(first_r, queries_h, members_h, TILE_H, KERNEL_H)
    begin_c, end_c = _halo(first_c, queries_w, members_w, TILE_W, KERNEL_W)
    CHUNKS: tl.constexpr = (min(TILE_H + KERNEL_H - 1, LONGEST) + ROWS - 1) // ROWS
    tl.static_assert(COLUMNS >= TILE_W + KERNEL_W - 1)

    m = tl.arange(0, TILE_H * TILE_W)
    n = tl.arange(0, ROWS * COLUMNS)
    d = tl.arange(0, BLOCK_D)
    qr, qc = first_r + m // TILE_W, first_c + m % TILE_W
    start_r, start_c = _start(qr, members_h, KERNEL_H), _start(qc, members_w, KERNEL_W)
    real = (qr < queries_h) & (qc < queries_w)
    mask_q = _on_map(real, d, HEAD_DIM, BLOCK_D)
    y = (qr * dilation_h + residue_h).to(tl.int64)
    x = (qc * dilation_w + residue_w).to(tl.int64)
    q_at = query + head * q_head * UNIT + ((y * q_row + x * q_column) * UNIT)[:, None] + d[None, :]
    kr, kc = begin_r + n // COLUMNS, begin_c + n % COLUMNS
    near_y = (kr * dilation_h + residue_h).to(tl.int64)
    near_x = (kc * dilation_w + residue_w).to(tl.int64)
    k_at = ((near_y * k_row + near_x * k_column) * UNIT)[:, None] + d[None, :]
    v_at = ((near_y * v_row + near_x * v_column) * UNIT)[:, None] + d[None, :]
    key += head * k_head * UNIT
    value += head * v_head * UNIT
    k_step, v_step = k_row.to(tl.int64), v_row.to(tl.int64)

    if BIASED:
        bias += head * ((2 * KERNEL_H - 1) * (2 * KERNEL_W - 1))
    terms = ()
    for i in tl.static_range(CHUNKS):
        term = _term(
            bias, kr + i * ROWS, kc, qr, qc, start_r, start_c, KERNEL_H, KERNEL_W, BIASED
        )  # fmt: skip
        terms += (term,)

    for image in range(tl.program_id(2), batch, tl.num_programs(2)):
        of = tl.cast(image, tl.int64)
        q = tl.load(q_at + of * q_batch * UNIT, mask=mask_q, other=0.0)
        top = tl.full([TILE_H * TILE_W], _MASKED, tl.float32)
        total = tl.zeros([TILE_H * TILE_W], tl.float32)
        acc = tl.zeros([TILE_H * TILE_W, BLOCK_D], tl.float32)
        for i in tl.static_range(CHUNKS):
            mask = _on_map((kr + i * ROWS < end_r) & (kc < end_c), d, HEAD_DIM, BLOCK_D)
            down = i * ROWS * dilation_h
            at = key + (of * k_batch + down * k_step) * UNIT + k_at
            k = tl.load(at, mask=mask, other=0.0)
            at = value + (of * v_batch + down * v_step) * UNIT + v_at
            v = tl.load(at, mask=mask, other=0.0)
            s = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale + terms[i]
            higher = tl.maximum(top, tl.max(s, 1))
            shrink = tl.exp2(top - higher)
            weights = tl.exp2(s - higher[:, None])
            top = higher
            total = total * shrink + tl.sum(weights, 1)
            acc = acc * shrink[:, None]
            acc = tl.dot(weights.to(v.dtype), v, acc, input_precision=PRECISION)
        acc = acc * (1 / total)[:, None]
        position = (of * height + y) * width + x
        at = out + ((position * heads + head) * HEAD_DIM)[:, None] + d[None, :]
        tl.store(at, acc.to(out.dtype.element_ty), mask=mask_q)
        if KEEP:
            at = ((of * heads + head) * height + y) * width + x
            tl.store(lse + at, top + tl.log2(total), mask=real)


@triton.jit(do_not_specialize=[*_SIZES, *_STRIDES])
def _neighborhood_bwd_query_kernel(
    query, key, value, table, out, lse, grad, delta, grad_query,
    heads, height, width, key_height, key_width,
    q_batch, q_row, q_column, q_head,
    k_batch, k_row, k_column, k_head,
    v_batch, v_row, v_column, v_head,
    g_batch, g_row, g_column, g_head,
    dilation_h, dilation_w, scale, factor,
    KERNEL_H: tl.constexpr, KERNEL_W: tl.constexpr, HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr, UNIT: tl.constexpr, BIASED: tl.constexpr,
    PRECISION: tl.constexpr, TILE_H: tl.constexpr, TILE_W: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Gradient of a tile of queries; writes ``delta`` too."""
    head, column_tile = tl.program_id(0) % heads, tl.program_id(0) // heads
    row_tile, image = tl.program_id(1), tl.program_id(2).to(tl.int64)
    residue_h, residue_w = row_tile % dilation_h, column_tile % dilation_w
    first_r, first_c = row_tile // dilation_h * TILE_H, column_tile // dilation_w * TILE_W
    queries_h = (height - residue_h + dilation_h - 1) // dilation_h
    queries_w = (width - residue_w + dilation_w - 1) // dilation_w
    members_h = (key_height - residue_h + dilation_h - 1) // dilation_h
    members_w = (key_width - residue_w + dilation_w - 1) // dilation_w
    begin_r, end_r = _halo(first_r, queries_h, members_h, TILE_H, KERNEL_H)
    begin_c, end_c = _halo(first_c, queries_w, members_w, TILE_W, KERNEL_W)

    m = tl.arange(0, TILE_H * TILE_W)
    n = tl.arange(0, ROWS * COLUMNS)
    d = tl.arange(0, BLOCK_D)
    qr, qc = first_r + m // TILE_W, first_c + m % TILE_W
    start_r, start_c = _start(qr, members_h, KERNEL_H), _start(qc, members_w, KERNEL_W)
    real = (qr < queries_h) & (qc < queries_w)
    mask = _on_map(real, d, HEAD_DIM, BLOCK_D)
    y = (qr * dilation_h + residue_h).to(tl.int64)
    x = (qc * dilation_w + residue_w).to(tl.int64)
    query += (image * q_batch + head * q_head) * UNIT
    grad += (image * g_batch + head * g_head) * UNIT
    at = ((y * q_row + x * q_column) * UNIT)[:, None] + d[None, :]
    q = tl.load(query + at, mask=mask, other=0.0)
    at = ((y * g_row + x * g_column) * UNIT)[:, None] + d[None, :]
    g = tl.load(grad + at, mask=mask, other=0.0)
    position = (image * height + y) * width + x
    dense = ((position * heads + head) * HEAD_DIM)[:, None] + d[None, :]
    o = tl.load(out + dense, mask=mask, other=0.0)
    at = ((image * heads + head) * height + y) * width + x
    norm = tl.load(lse + at, mask=real, other=-_MASKED)
    products = tl.sum(g.to(tl.float32) * o.to(tl.float32), 1)
    tl.store(delta + at, products, mask=real)

    key += (image * k_batch + head * k_head) * UNIT
    value += (image * v_batch + head * v_head) * UNIT
    if BIASED:
        table += head * (4 * KERNEL_H * KERNEL_W)
    acc = tl.zeros([TILE_H * TILE_W, BLOCK_D], tl.float32)
    down = n // COLUMNS
    for column in range(begin_c, end_c, COLUMNS):
        kc = column + n % COLUMNS
        term = _column_term(kc[None, :], qc[:, None], start_c[:, None], KERNEL_W, BIASED)
        near_y = (down * dilation_h).to(tl.int64)
        near_x = (kc * dilation_w + residue_w).to(tl.int64)
        k_at = key + ((near_y * k_row + near_x * k_column) * UNIT)[:, None] + d[None, :]
        v_at = value + ((near_y * v_row + near_x * v_column) * UNIT)[:, None] + d[None, :]
        for row in range(begin_r, end_r, ROWS):
            kr = row + down
            mask_k = _on_map((kr < end_r) & (kc < end_c), d, HEAD_DIM, BLOCK_D)
            row_y = (row * dilation_h + residue_h).to(tl.int64) * UNIT
            k = tl.load(k_at + row_y * k_row, mask=mask_k, other=0.0)
            v = tl.load(v_at + row_y * v_row, mask=mask_k, other=0.0)
            s = tl.dot(q, tl.trans(k), input_precision=PRECISION)
            s = _scores(
                s, scale, table, kr[None, :], qr[:, None], start_r[:, None], term,
                KERNEL_H, KERNEL_W, BIASED,
            )  # fmt: skip
            weights = tl.exp2(s - norm[:, None])
            s = tl.dot(g, tl.trans(v), input_precision=PRECISION)
            s = weights * (s - products[:, None])
            acc = tl.dot(s.to(k.dtype), k, acc, input_precision=PRECISION)
    tl.store(grad_query + dense, (acc * factor).to(grad_query.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["batch", *_SIZES, *_STRIDES])
def _neighborhood_bwd_query_images_kernel(
    query, key, value, bias, out, lse, grad, delta, grad_query,
    batch, heads, height, width, key_height, key_width,
    q_batch, q_row, q_column, q_head,
    k_batch, k_row, k_column, k_head,
    v_batch, v_row, v_column, v_head,
    g_batch, g_row, g_column, g_head,
    dilation_h, dilation_w, scale, factor,
    KERNEL_H: tl.constexpr, KERNEL_W: tl.constexpr, HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr, UNIT: tl.constexpr, BIASED: tl.constexpr,
    PRECISION: tl.constexpr, LONGEST: tl.constexpr, TILE_H: tl.constexpr, TILE_W: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Gradient of the same tile of queries of several images; writes ``delta`` too."""
    head, column_tile = tl.program_id(0) % heads, tl.program_id(0) // heads
    row_tile = tl.program_id(1)
    residue_h, residue_w = row_tile % dilation_h, column_tile % dilation_w
    first_r, first_c = row_tile // dilation_h * TILE_H, column_tile // dilation_w * TILE_W
    queries_h = (height - residue_h + dilation_h - 1) // dilation_h
    queries_w = (width - residue_w + dilation_w - 1) // dilation_w
    members_h = (key_height - residue_h + dilation_h - 1) // dilation_h
    members_w = (key_width - residue_w + dilation_w - 1) // dilation_w
    begin_r, end_r = _halo(first_r, queries_h, members_h, TILE_H, KERNEL_H)
    begin_c, end_c = _halo(first_c, queries_w, members_w, TILE_W, KERNEL_W)
    CHUNKS: tl.constexpr = (min(TILE_H + KERNEL_H - 1, LONGEST) + ROWS - 1) // ROWS
    tl.static_assert(COLUMNS >= TILE_W + KERNEL_W - 1)

    m = tl.arange(0, TILE_H * TILE_W)
    n = tl.arange(0, ROWS * COLUMNS)
    d = tl.arange(0, BLOCK_D)
    qr, qc = first_r + m // TILE_W, first_c + m % TILE_W
    start_r, start_c = _start(qr, members_h, KERNEL_H), _start(qc, members_w, KERNEL_W)
    real = (qr < queries_h) & (qc < queries_w)
    mask_q = _on_map(real, d, HEAD_DIM, BLOCK_D)
    y = (qr * dilation_h + residue_h).to(tl.int64)
    x = (qc * dilation_w + residue_w).to(tl.int64)
    q_at = query + head * q_head * UNIT + ((y * q_row + x * q_column) * UNIT)[:, None] + d[None, :]
    grad += head * g_head * UNIT
    g_at = grad + ((y * g_row + x * g_column) * UNIT)[:, None] + d[None, :]
    kr, kc = begin_r + n // COLUMNS, begin_c + n % COLUMNS
    near_y = (kr * dilation_h + residue_h).to(tl.int64)
    near_x = (kc * dilation_w + residue_w).to(tl.int64)
    k_at = ((near_y * k_row + near_x * k_column) * UNIT)[:, None] + d[None, :]
    v_at = ((near_y * v_row + near_x * v_column) * UNIT)[:, None] + d[None, :]
    key += head * k_head * UNIT
    value += head * v_head * UNIT
    k_step, v_step = k_row.to(tl.int64), v_row.to(tl.int64)

    if BIASED:
        bias += head * ((2 * KERNEL_H - 1) * (2 * KERNEL_W - 1))
    terms = ()
    for i in tl.static_range(CHUNKS):
        term = _term(
            bias, kr + i * ROWS, kc, qr, qc, start_r, start_c, KERNEL_H, KERNEL_W, BIASED
        )  # fmt: skip
        terms += (term,)

    for image in range(tl.program_id(2), batch, tl.num_programs(2)):
        of = tl.cast(image, tl.int64)
        q = tl.load(q_at + of * q_batch * UNIT, mask=mask_q, other=0.0)
        g = tl.load(g_at + of * g_batch * UNIT, mask=mask_q, other=0.0)
        position = (of * height + y) * width + x
        dense = ((position * heads + head) * HEAD_DIM)[:, None] + d[None, :]
        o = tl.load(out + dense, mask=mask_q, other=0.0)
        at = ((of * heads + head) * height + y) * width + x
        norm = tl.load(lse + at, mask=real, other=-_MASKED)
        products = tl.sum(g.to(tl.float32) * o.to(tl.float32), 1)
        tl.store(delta + at, products, mask=real)
        acc = tl.zeros([TILE_H * TILE_W, BLOCK_D], tl.float32)
        for i in tl.static_range(CHUNKS):
            mask = _on_map((kr + i * ROWS < end_r) & (kc < end_c), d, HEAD_DIM, BLOCK_D)
            down = i * ROWS * dilation_h
            at = key + (of * k_batch + down * k_step) * UNIT + k_at
            k = tl.load(at, mask=mask, other=0.0)
            at = value + (of * v_batch + down * v_step) * UNIT + v_at
            v = tl.load(at, mask=mask, other=0.0)
            s = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale + terms[i]
            weights = tl.exp2(s - norm[:, None])
            s = tl.dot(g, tl.trans(v), input_precision=PRECISION)
            s = weights * (s - products[:, None])
            acc = tl.dot(s.to(k.dtype), k, acc, input_precision=PRECISION)
        tl.store(grad_query + dense, (acc * factor).to(grad_query.dtype.element_ty), mask=mask_q)


@triton.jit(do_not_specialize=[*_SIZES, *_STRIDES])
def _neighborhood_bwd_key_kernel(
    query, key, value, table, lse, grad, delta, grad_key, grad_value,
    heads, height, width, key_height, key_width,
    q_batch, q_row, q_column, q_head,
    k_batch, k_row, k_column, k_head,
    v_batch, v_row, v_column, v_head,
    g_batch, g_row, g_column, g_head,
    dilation_h, dilation_w, scale, factor,
    KERNEL_H: tl.constexpr, KERNEL_W: tl.constexpr, HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr, UNIT: tl.constexpr, BIASED: tl.constexpr,
    PRECISION: tl.constexpr, TILE_H: tl.constexpr, TILE_W: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Gradients of a tile of keys and values: chunks are of the queries that see them."""
    head, column_tile = tl.program_id(0) % heads, tl.program_id(0) // heads
    row_tile, image = tl.program_id(1), tl.program_id(2).to(tl.int64)
    residue_h, residue_w = row_tile % dilation_h, column_tile % dilation_w
    first_r, first_c = row_tile // dilation_h * TILE_H, column_tile // dilation_w * TILE_W
    queries_h = (height - residue_h + dilation_h - 1) // dilation_h
    queries_w = (width - residue_w + dilation_w - 1) // dilation_w
    members_h = (key_height - residue_h + dilation_h - 1) // dilation_h
    members_w = (key_width - residue_w + dilation_w - 1) // dilation_w
    begin_r, end_r = _seen_by(first_r, queries_h, members_h, TILE_H, KERNEL_H)
    begin_c, end_c = _seen_by(first_c, queries_w, members_w, TILE_W, KERNEL_W)

    m = tl.arange(0, TILE_H * TILE_W)
    n = tl.arange(0, ROWS * COLUMNS)
    d = tl.arange(0, BLOCK_D)
    kr, kc = first_r + m // TILE_W, first_c + m % TILE_W
    mask = _on_map((kr < members_h) & (kc < members_w), d, HEAD_DIM, BLOCK_D)
    y = (kr * dilation_h + residue_h).to(tl.int64)
    x = (kc * dilation_w + residue_w).to(tl.int64)
    key += (image * k_batch + head * k_head) * UNIT
    value += (image * v_batch + head * v_head) * UNIT
    at = ((y * k_row + x * k_column) * UNIT)[:, None] + d[None, :]
    k = tl.load(key + at, mask=mask, other=0.0)
    at = ((y * v_row + x * v_column) * UNIT)[:, None] + d[None, :]
    v = tl.load(value + at, mask=mask, other=0.0)

    query += (image * q_batch + head * q_head) * UNIT
    grad += (image * g_batch + head * g_head) * UNIT
    lse += (image * heads + head) * height * width
    delta += (image * heads + head) * height * width
    if BIASED:
        table += head * (4 * KERNEL_H * KERNEL_W)
    acc_k = tl.zeros([TILE_H * TILE_W, BLOCK_D], tl.float32)
    acc_v = tl.zeros([TILE_H * TILE_W, BLOCK_D], tl.float32)
    down = n // COLUMNS
    for column in range(begin_c, end_c, COLUMNS):
        qc = column + n % COLUMNS
        start_c = _start(qc, members_w, KERNEL_W)
        term = _column_term(kc[:, None], qc[None, :], start_c[None, :], KERNEL_W, BIASED)
        near_y = (down * dilation_h).to(tl.int64)
        near_x = (qc * dilation_w + residue_w).to(tl.int64)
        q_at = query + ((near_y * q_row + near_x * q_column) * UNIT)[:, None] + d[None, :]
        g_at = grad + ((near_y * g_row + near_x * g_column) * UNIT)[:, None] + d[None, :]
        near = near_y * width + near_x
        for row in range(begin_r, end_r, ROWS):
            qr = row + down
            start_r = _start(qr, members_h, KERNEL_H)
            real = (qr < end_r) & (qc < end_c)
            mask_q = _on_map(real, d, HEAD_DIM, BLOCK_D)
            row_y = (row * dilation_h + residue_h).to(tl.int64)
            q = tl.load(q_at + row_y * q_row * UNIT, mask=mask_q, other=0.0)
            g = tl.load(g_at + row_y * g_row * UNIT, mask=mask_q, other=0.0)
            norm = tl.load(lse + row_y * width + near, mask=real, other=-_MASKED)
            products = tl.load(delta + row_y * width + near, mask=real, other=0.0)
            s = tl.dot(k, tl.trans(q), input_precision=PRECISION)
            s = _scores(
                s, scale, table, kr[:, None], qr[None, :], start_r[None, :], term,
                KERNEL_H, KERNEL_W, BIASED,
            )  # fmt: skip
            weights = tl.exp2(s - norm[None, :])
            acc_v = tl.dot(weights.to(g.dtype), g, acc_v, input_precision=PRECISION)
            s = tl.dot(v, tl.trans(g), input_precision=PRECISION)
            s = weights * (s - products[None, :])
            acc_k = tl.dot(s.to(q.dtype), q, acc_k, input_precision=PRECISION)
    position = (image * key_height + y) * key_width + x
    at = ((position * heads + head) * HEAD_DIM)[:, None] + d[None, :]
    tl.store(grad_key + at, (acc_k * factor).to(grad_key.dtype.element_ty), mask=mask)
    tl.store(grad_value + at, acc_v.to(grad_value.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=[*_SIZES, *_STRIDES, "batch", "split"])
def _neighborhood_bwd_bias_kernel(
    query, key, value, table, lse, grad, delta, partial,
    batch, heads, height, width, key_height, key_width,
    q_batch, q_row, q_column, q_head,
    k_batch, k_row, k_column, k_head,
    v_batch, v_row, v_column, v_head,
    g_batch, g_row, g_column, g_head,
    dilation_h, dilation_w, scale, split,
    KERNEL_H: tl.constexpr, KERNEL_W: tl.constexpr, HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr, UNIT: tl.constexpr, BIASED: tl.constexpr,
    PRECISION: tl.constexpr, TILE_H: tl.constexpr, TILE_W: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, CHUNKS_H: tl.constexpr, CHUNKS_W: tl.constexpr,
):  # fmt: skip
    """Gradients of scores, summed over the tiles of all images.

    A program takes one chunk of the keys around a tile: as far from its first query in every
    tile, so a query and a key of a chunk always stand to each other in the same way. It sums over
    every ``split``-th tile whose halo holds some of it. Chunks begin where halos inside of a map
    do, and go on before them for tiles at a map's end. ``partial`` is
    ``[split, heads, CHUNKS_H * ROWS, CHUNKS_W * COLUMNS, TILE_H * TILE_W]``.
    """
    chunk, head, part = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    chunk_r, chunk_c = chunk // CHUNKS_W * ROWS, chunk % CHUNKS_W * COLUMNS
    m = tl.arange(0, TILE_H * TILE_W)
    n = tl.arange(0, ROWS * COLUMNS)
    d = tl.arange(0, BLOCK_D)
    table += head * (4 * KERNEL_H * KERNEL_W)
    tiles_h = (height + dilation_h * TILE_H - 1) // (dilation_h * TILE_H) * dilation_h
    tiles_w = (width + dilation_w * TILE_W - 1) // (dilation_w * TILE_W) * dilation_w
    acc = tl.zeros([TILE_H * TILE_W, ROWS * COLUMNS], tl.float32)
    for tile in range(part, batch * tiles_h * tiles_w, split):
        column_tile, row_tile = tile % tiles_w, tile // tiles_w % tiles_h
        residue_h, residue_w = row_tile % dilation_h, column_tile % dilation_w
        first_r, first_c = row_tile // dilation_h * TILE_H, column_tile // dilation_w * TILE_W
        queries_h = (height - residue_h + dilation_h - 1) // dilation_h
        queries_w = (width - residue_w + dilation_w - 1) // dilation_w
        members_h = (key_height - residue_h + dilation_h - 1) // dilation_h
        members_w = (key_width - residue_w + dilation_w - 1) // dilation_w
        begin_r, end_r = _halo(first_r, queries_h, members_h, TILE_H, KERNEL_H)
        begin_c, end_c = _halo(first_c, queries_w, members_w, TILE_W, KERNEL_W)
        row = first_r + chunk_r - _before(KERNEL_H, ROWS)
        column = first_c + chunk_c - _before(KERNEL_W, COLUMNS)
        met_h = (first_r < queries_h) & (row < end_r) & (row + ROWS > begin_r)
        met_w = (first_c < queries_w) & (column < end_c) & (column + COLUMNS > begin_c)
        if met_h & met_w:
            image = (tile // (tiles_w * tiles_h)).to(tl.int64)
            qr, qc = first_r + m // TILE_W, first_c + m % TILE_W
            kr, kc = row + n // COLUMNS, column + n % COLUMNS
            start_r, start_c = _start(qr, members_h, KERNEL_H), _start(qc, members_w, KERNEL_W)
            real = (qr < queries_h) & (qc < queries_w)
            y = (qr * dilation_h + residue_h).to(tl.int64)
            x = (qc * dilation_w + residue_w).to(tl.int64)
            mask = _on_map(real, d, HEAD_DIM, BLOCK_D)
            at = ((y * q_row + x * q_column) * UNIT)[:, None] + d[None, :]
            q = tl.load(query + (image * q_batch + head * q_head) * UNIT + at, mask=mask, other=0.0)
            at = ((y * g_row + x * g_column) * UNIT)[:, None] + d[None, :]
            g = tl.load(grad + (image * g_batch + head * g_head) * UNIT + at, mask=mask, other=0.0)
            at = ((image * heads + head) * height + y) * width + x
            norm = tl.load(lse + at, mask=real, other=-_MASKED)
            products = tl.load(delta + at, mask=real, other=0.0)

            inside = (kr >= begin_r) & (kr < end_r) & (kc >= begin_c) & (kc < end_c)
            y = (kr * dilation_h + residue_h).to(tl.int64)
            x = (kc * dilation_w + residue_w).to(tl.int64)
            mask = _on_map(inside, d, HEAD_DIM, BLOCK_D)
            at = ((y * k_row + x * k_column) * UNIT)[:, None] + d[None, :]
            k = tl.load(key + (image * k_batch + head * k_head) * UNIT + at, mask=mask, other=0.0)
            at = ((y * v_row + x * v_column) * UNIT)[:, None] + d[None, :]
            v = tl.load(value + (image * v_batch + head * v_head) * UNIT + at, mask=mask, other=0.0)

            term = _column_term(kc[None, :], qc[:, None], start_c[:, None], KERNEL_W, BIASED)
            s = tl.dot(q, tl.trans(k), input_precision=PRECISION)
            s = _scores(
                s, scale, table, kr[None, :], qr[:, None], start_r[:, None], term,
                KERNEL_H, KERNEL_W, BIASED,
            )  # fmt: skip
            weights = tl.exp2(s - norm[:, None])
            s = tl.dot(g, tl.trans(v), input_precision=PRECISION)
            acc += weights * (s - products[:, None])
    row = (part.to(tl.int64) * heads + head) * (CHUNKS_H * ROWS) + chunk_r + n // COLUMNS
    at = (row * (CHUNKS_W * COLUMNS) + chunk_c + n % COLUMNS) * (TILE_H * TILE_W)
    tl.store(partial + m[:, None] + at[None, :], acc)
