"""Kernels of window attention. Rolling, padding, cutting and masking are addressing alone.

Place i of a window's row stands at slot ``number * window + i`` of its axis. Slots are positions
of the map that is rolled and then padded (PADDED = 1), padded and then rolled (2), or that
windows divide (0). A pair is masked where a region's edge parts it, which only windows in the
last row or column have. Where windows are whole axes (WW = 0) their width is known at run time
alone.
"""

import triton
import triton.language as tl

_LOG2E = tl.constexpr(1.4426950408889634)
_MASKED = tl.constexpr(-100.0)
_EPS = tl.constexpr(1e-12)  # the least norm, of torch.nn.functional.normalize

# what new sizes and layouts change
_SIZES = (
    *("windows", "tokens", "wh", "ww", "rows", "columns", "height", "width", "heads"),
    *("down", "right", "turn_row", "turn_column", "edge_row", "edge_column"),
    *(f"{x}_{axis}" for x in "qkvg" for axis in ("batch", "row", "column", "head")),
)


@triton.jit
def _split(place, ww, WW: tl.constexpr):
    """Row and column of a place in its window."""
    if WW > 0:
        i, j = place // WW, place % WW
    else:
        i, j = place // ww, place % ww
    return i, j


@triton.jit
def _located(
    number, i, j, live, wh, ww, rows, columns, height, width, down, right, turn_row, turn_column,
    PADDED: tl.constexpr, SHIFTED: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Rows and columns of places (i, j) of a window, and which of them are on the map."""
    row = number // columns % rows * wh + i
    column = number % columns * ww + j
    if PADDED == 1:
        live = live & (row < height) & (column < width)
    if SHIFTED:
        row += down
        row = tl.where(row >= turn_row, row - turn_row, row)
        column += right
        column = tl.where(column >= turn_column, column - turn_column, column)
    if PADDED == 2:
        live = live & (row < height) & (column < width)
    if WIDE:
        row, column = row.to(tl.int64), column.to(tl.int64)
    return row, column, live


@triton.jit
def _beyond(i, j, edge_row, edge_column):
    """Which edges a place is beyond, as bits."""
    return (i >= edge_row).to(tl.int32) * 2 + (j >= edge_column).to(tl.int32)


@triton.jit
def _edges(number, rows, columns):
    """Which edges a window has, as bits."""
    last_row = (number // columns % rows == rows - 1).to(tl.int32)
    return last_row * 2 + (number % columns == columns - 1).to(tl.int32)


@triton.jit
def _valid(live, d, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    """Which elements [L, D] of vectors are in memory."""
    mask = live[:, None]
    if HEAD_DIM < BLOCK_D:
        mask = mask & (d < HEAD_DIM)[None, :]
    return mask


@triton.jit
def _read(x, offsets, d, mask, live, pad, HAS_PAD: tl.constexpr):
    """Vectors [L, D] of a head and an image; ``pad`` off the map, zeros without."""
    found = tl.load(x + (offsets[:, None] + d[None, :]), mask=mask, other=0.0)
    if HAS_PAD:
        found = tl.where(live[:, None], found, pad[None, :])
    return found


@triton.jit
def _pads(pad, head, heads, d, HEAD_DIM: tl.constexpr, HAS_PAD: tl.constexpr):
    """Query, key and value of a padded position; anything without."""
    q, k, v = d, d, d
    if HAS_PAD:
        pad += head * HEAD_DIM
        q = tl.load(pad + d, mask=d < HEAD_DIM, other=0.0)
        k = tl.load(pad + heads * HEAD_DIM + d, mask=d < HEAD_DIM, other=0.0)
        v = tl.load(pad + 2 * heads * HEAD_DIM + d, mask=d < HEAD_DIM, other=0.0)
    return q, k, v


@triton.jit
def _norms(x):
    x = x.to(tl.float32)
    return tl.sqrt(tl.sum(x * x, 1))


@triton.jit
def _inverse(norms):
    return 1.0 / tl.maximum(norms, _EPS)


@triton.jit
def _through_norm(grad, x, norms):
    """Gradient of vectors by that of their units, and the sum of products of the two."""
    inverse = _inverse(norms)
    unit = x.to(tl.float32) * inverse[:, None]
    along = tl.sum(grad * unit, 1)
    # below the least norm the divisor is a constant
    kept = tl.where(norms >= _EPS, along, 0.0)
    return (grad - unit * kept[:, None]) * inverse[:, None], along


@triton.jit
def _at_query(i, j, live, TABLE_H: tl.constexpr, TABLE_W: tl.constexpr):
    """Entry of a query's bias for the window's first key; any one for places beyond the window."""
    middle: tl.constexpr = (TABLE_H - 1) * (2 * TABLE_W - 1) + TABLE_W - 1
    return tl.where(live, i * (2 * TABLE_W - 1) + j, 0) + middle


@triton.jit
def _at_key(i, j, live, TABLE_W: tl.constexpr):
    """How many entries before that the one for a key stands."""
    return tl.where(live, i * (2 * TABLE_W - 1) + j, 0)


@triton.jit
def _exp(scores, less):
    """Exponential of the difference, an instruction for two."""
    return tl.exp2(scores * _LOG2E - less * _LOG2E)


@triton.jit
def _scored(
    products, scale, inverse_q, inverse_k, added, region_q, region_k,
    COSINE: tl.constexpr, SHIFTED: tl.constexpr,
):  # fmt: skip
    """Scores of products of queries and keys; what else there is broadcasts."""
    if COSINE:
        products = products * inverse_k
        scale = scale * inverse_q
    scores = products * scale + added
    if SHIFTED:
        scores = tl.where(region_q != region_k, scores + _MASKED, scores)
    return scores


@triton.jit(do_not_specialize=_SIZES)
def _window_fwd_kernel(
    query, key, value, bias, factor, pad, out, scale,
    windows, rows, columns, height, width, down, right, turn_row, turn_column,
    edge_row, edge_column, heads,
    q_batch, q_row, q_column, q_head, k_batch, k_row, k_column, k_head,
    v_batch, v_row, v_column, v_head,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, TABLE_H: tl.constexpr, TABLE_W: tl.constexpr,
    HAS_BIAS: tl.constexpr, COSINE: tl.constexpr, PADDED: tl.constexpr, HAS_PAD: tl.constexpr,
    SHIFTED: tl.constexpr, PACKED: tl.constexpr, WIDE: tl.constexpr, ALIGN: tl.constexpr,
    PRECISION: tl.constexpr,
    WH: tl.constexpr, WW: tl.constexpr, BLOCK_L: tl.constexpr,
    RESIDENT: tl.constexpr,  # the grid's
):  # fmt: skip
    """Whole windows of one head; its bias stays in registers."""
    head = tl.program_id(0).to(tl.int64)
    d = tl.arange(0, BLOCK_D)
    place = tl.arange(0, BLOCK_L)
    i, j = _split(place, WW, WW)
    in_window = place < WH * WW
    beyond = _beyond(i, j, edge_row, edge_column)
    added = tl.where(in_window, 0.0, float("-inf"))[None, :]
    if HAS_BIAS:
        bias += head * ((2 * TABLE_H - 1) * (2 * TABLE_W - 1))
        at_query = _at_query(i, j, in_window, TABLE_H, TABLE_W)
        at_key = _at_key(i, j, in_window, TABLE_W)
        added += tl.load(bias + (at_query[:, None] - at_key[None, :]))
    if COSINE:
        scale = tl.load(factor + head)
    pad_q, pad_k, pad_v = _pads(pad, head, heads, d, HEAD_DIM, HAS_PAD)
    for number in range(tl.program_id(1), windows, tl.num_programs(1)):
        image = (number // columns // rows).to(tl.int64)
        row, column, live = _located(
            number, i, j, in_window, WH, WW, rows, columns, height, width, down, right,
            turn_row, turn_column, PADDED, SHIFTED, WIDE,
        )  # fmt: skip
        mask = _valid(live, d, HEAD_DIM, BLOCK_D)
        offsets = tl.multiple_of(row * q_row + column * q_column, ALIGN)
        first = tl.multiple_of(image * q_batch + head * q_head, ALIGN)
        q = _read(query + first, offsets, d, mask, live, pad_q, HAS_PAD)
        if not PACKED:
            offsets = tl.multiple_of(row * k_row + column * k_column, ALIGN)
        first = tl.multiple_of(image * k_batch + head * k_head, ALIGN)
        k = _read(key + first, offsets, d, mask, live, pad_k, HAS_PAD)
        if not PACKED:
            offsets = tl.multiple_of(row * v_row + column * v_column, ALIGN)
        first = tl.multiple_of(image * v_batch + head * v_head, ALIGN)
        v = _read(value + first, offsets, d, mask, live, pad_v, HAS_PAD)
        region, inverse_q, inverse_k = beyond, beyond, beyond
        if COSINE:
            inverse_q, inverse_k = _inverse(_norms(q)), _inverse(_norms(k))
        if SHIFTED:
            region = beyond & _edges(number, rows, columns)
        scores = _scored(
            tl.dot(q, tl.trans(k), input_precision=PRECISION), scale,
            inverse_q[:, None], inverse_k[None, :], added, region[:, None], region[None, :],
            COSINE, SHIFTED,
        )  # fmt: skip
        weights = _exp(scores, tl.max(scores, 1)[:, None])
        mixed = tl.dot(weights.to(v.dtype), v, input_precision=PRECISION)
        mixed = mixed * (1.0 / tl.sum(weights, 1))[:, None]
        first = tl.multiple_of((image * height * width * heads + head) * HEAD_DIM, ALIGN)
        offsets = tl.multiple_of((row * width + column) * (heads * HEAD_DIM), ALIGN)
        to = first + (offsets[:, None] + d[None, :])
        tl.store(out + to, mixed.to(out.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=_SIZES)
def _window_bwd_kernel(
    query, key, value, grad, bias, factor, pad, grad_query, grad_key, grad_value,
    grad_pairs, grad_factor, grad_pad, scale,
    windows, rows, columns, height, width, down, right, turn_row, turn_column,
    edge_row, edge_column, heads,
    q_batch, q_row, q_column, q_head, k_batch, k_row, k_column, k_head,
    v_batch, v_row, v_column, v_head, g_batch, g_row, g_column, g_head,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, TABLE_H: tl.constexpr, TABLE_W: tl.constexpr,
    HAS_BIAS: tl.constexpr, COSINE: tl.constexpr, PADDED: tl.constexpr, HAS_PAD: tl.constexpr,
    SHIFTED: tl.constexpr, PACKED: tl.constexpr, WIDE: tl.constexpr, ALIGN: tl.constexpr,
    PRECISION: tl.constexpr,
    WH: tl.constexpr, WW: tl.constexpr, BLOCK_L: tl.constexpr,
):  # fmt: skip
    """Gradients of whole windows of one head, and sums over them of those of parameters."""
    head = tl.program_id(0).to(tl.int64)
    d = tl.arange(0, BLOCK_D)
    place = tl.arange(0, BLOCK_L)
    i, j = _split(place, WW, WW)
    in_window = place < WH * WW
    beyond = _beyond(i, j, edge_row, edge_column)
    added = tl.where(in_window, 0.0, float("-inf"))[None, :]
    if HAS_BIAS:
        bias += head * ((2 * TABLE_H - 1) * (2 * TABLE_W - 1))
        at_query = _at_query(i, j, in_window, TABLE_H, TABLE_W)
        at_key = _at_key(i, j, in_window, TABLE_W)
        added += tl.load(bias + (at_query[:, None] - at_key[None, :]))
    if COSINE:
        scale = tl.load(factor + head)
    pad_q, pad_k, pad_v = _pads(pad, head, heads, d, HEAD_DIM, HAS_PAD)
    sum_pairs = tl.zeros([BLOCK_L, BLOCK_L], tl.float32)
    sum_factor = tl.zeros([BLOCK_L], tl.float32)
    sum_pad_k = tl.zeros([BLOCK_D], tl.float32)
    sum_pad_v = tl.zeros([BLOCK_D], tl.float32)
    for number in range(tl.program_id(1), windows, tl.num_programs(1)):
        image = (number // columns // rows).to(tl.int64)
        row, column, live = _located(
            number, i, j, in_window, WH, WW, rows, columns, height, width, down, right,
            turn_row, turn_column, PADDED, SHIFTED, WIDE,
        )  # fmt: skip
        mask = _valid(live, d, HEAD_DIM, BLOCK_D)
        offsets = tl.multiple_of(row * q_row + column * q_column, ALIGN)
        first = tl.multiple_of(image * q_batch + head * q_head, ALIGN)
        q = _read(query + first, offsets, d, mask, live, pad_q, HAS_PAD)
        if not PACKED:
            offsets = tl.multiple_of(row * k_row + column * k_column, ALIGN)
        first = tl.multiple_of(image * k_batch + head * k_head, ALIGN)
        k = _read(key + first, offsets, d, mask, live, pad_k, HAS_PAD)
        if not PACKED:
            offsets = tl.multiple_of(row * v_row + column * v_column, ALIGN)
        first = tl.multiple_of(image * v_batch + head * v_head, ALIGN)
        v = _read(value + first, offsets, d, mask, live, pad_v, HAS_PAD)
        offsets = tl.multiple_of(row * g_row + column * g_column, ALIGN)
        first = tl.multiple_of(image * g_batch + head * g_head, ALIGN)
        g = _read(grad + first, offsets, d, mask, live, d, False)
        norms_q, norms_k, region = beyond, beyond, beyond
        inverse_q, inverse_k = beyond, beyond
        if COSINE:
            norms_q, norms_k = _norms(q), _norms(k)
            inverse_q, inverse_k = _inverse(norms_q), _inverse(norms_k)
        if SHIFTED:
            region = beyond & _edges(number, rows, columns)
        scores = _scored(
            tl.dot(q, tl.trans(k), input_precision=PRECISION), scale,
            inverse_q[:, None], inverse_k[None, :], added, region[:, None], region[None, :],
            COSINE, SHIFTED,
        )  # fmt: skip
        weights = _exp(scores, tl.max(scores, 1)[:, None])
        weights = weights * (1.0 / tl.sum(weights, 1))[:, None]
        grad_scores = tl.dot(g, tl.trans(v), input_precision=PRECISION)
        grad_scores = weights * (grad_scores - tl.sum(weights * grad_scores, 1)[:, None])
        if HAS_BIAS:
            sum_pairs += grad_scores
        grad_v = tl.dot(tl.trans(weights.to(g.dtype)), g, input_precision=PRECISION)
        low = grad_scores.to(q.dtype)
        unit_q, unit_k = q, k
        if COSINE:
            unit_q = (q.to(tl.float32) * inverse_q[:, None]).to(q.dtype)
            unit_k = (k.to(tl.float32) * inverse_k[:, None]).to(q.dtype)
        grad_q = tl.dot(low, unit_k, input_precision=PRECISION)
        grad_k = tl.dot(tl.trans(low), unit_q, input_precision=PRECISION)
        if COSINE:
            grad_q, along = _through_norm(grad_q, q, norms_q)
            grad_k, _ = _through_norm(grad_k, k, norms_k)
            sum_factor += along
        grad_q = grad_q * scale
        grad_k = grad_k * scale
        first = tl.multiple_of((image * height * width * heads + head) * HEAD_DIM, ALIGN)
        offsets = tl.multiple_of((row * width + column) * (heads * HEAD_DIM), ALIGN)
        to = first + (offsets[:, None] + d[None, :])
        tl.store(grad_query + to, grad_q.to(q.dtype), mask=mask)
        tl.store(grad_key + to, grad_k.to(q.dtype), mask=mask)
        tl.store(grad_value + to, grad_v.to(q.dtype), mask=mask)
        if HAS_PAD:
            padded = (in_window & ~live)[:, None]
            sum_pad_k += tl.sum(tl.where(padded, grad_k, 0.0), 0)
            sum_pad_v += tl.sum(tl.where(padded, grad_v, 0.0), 0)

    part = tl.program_id(1) * heads + head
    if HAS_BIAS:
        tokens: tl.constexpr = WH * WW
        pair = place[:, None] * tokens + place[None, :]
        live_pair = in_window[:, None] & in_window[None, :]
        tl.store(grad_pairs + part * (tokens * tokens) + pair, sum_pairs, mask=live_pair)
    if COSINE:
        tl.store(grad_factor + part, tl.sum(sum_factor, 0))
    if HAS_PAD:
        to_pad = grad_pad + part * (2 * HEAD_DIM) + d
        tl.store(to_pad, sum_pad_k, mask=d < HEAD_DIM)
        tl.store(to_pad + HEAD_DIM, sum_pad_v, mask=d < HEAD_DIM)


@triton.jit(do_not_specialize=_SIZES)
def _window_fwd_blocks_kernel(
    query, key, value, bias, factor, pad, out, sums, scale,
    tokens, wh, ww, rows, columns, height, width, down, right, turn_row, turn_column,
    edge_row, edge_column, heads,
    q_batch, q_row, q_column, q_head, k_batch, k_row, k_column, k_head,
    v_batch, v_row, v_column, v_head,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, TABLE_H: tl.constexpr, TABLE_W: tl.constexpr,
    HAS_BIAS: tl.constexpr, COSINE: tl.constexpr, PADDED: tl.constexpr, HAS_PAD: tl.constexpr,
    SHIFTED: tl.constexpr, PACKED: tl.constexpr, WIDE: tl.constexpr, ALIGN: tl.constexpr,
    PRECISION: tl.constexpr,
    WW: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Some queries of a window and head, by its keys block after block."""
    blocks = tl.cdiv(tokens, BLOCK_M)
    head = (tl.program_id(0) % heads).to(tl.int64)
    block = tl.program_id(0) // heads % blocks
    number = tl.program_id(0) // heads // blocks
    image = (number // columns // rows).to(tl.int64)
    d = tl.arange(0, BLOCK_D)
    pad_q, pad_k, pad_v = _pads(pad, head, heads, d, HEAD_DIM, HAS_PAD)
    if HAS_BIAS:
        bias += head * ((2 * TABLE_H - 1) * (2 * TABLE_W - 1))
    edges = _edges(number, rows, columns)
    if COSINE:
        scale = tl.load(factor + head)
    m = block * BLOCK_M + tl.arange(0, BLOCK_M)
    query_i, query_j = _split(m, ww, WW)
    query_region = _beyond(query_i, query_j, edge_row, edge_column) & edges
    query_row, query_column, query_live = _located(
        number, query_i, query_j, m < tokens, wh, ww, rows, columns, height, width, down, right,
        turn_row, turn_column, PADDED, SHIFTED, WIDE,
    )  # fmt: skip
    query_mask = _valid(query_live, d, HEAD_DIM, BLOCK_D)
    offsets = tl.multiple_of(query_row * q_row + query_column * q_column, ALIGN)
    first = tl.multiple_of(image * q_batch + head * q_head, ALIGN)
    q = _read(query + first, offsets, d, query_mask, query_live, pad_q, HAS_PAD)
    inverse_q = d
    if COSINE:
        inverse_q = _inverse(_norms(q))
    best = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    mixed = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for start in range(0, tokens, BLOCK_N):
        n = start + tl.arange(0, BLOCK_N)
        key_i, key_j = _split(n, ww, WW)
        key_region = _beyond(key_i, key_j, edge_row, edge_column) & edges
        key_row, key_column, key_live = _located(
            number, key_i, key_j, n < tokens, wh, ww, rows, columns, height, width, down, right,
            turn_row, turn_column, PADDED, SHIFTED, WIDE,
        )  # fmt: skip
        key_mask = _valid(key_live, d, HEAD_DIM, BLOCK_D)
        inner = tl.multiple_of(key_row * k_row + key_column * k_column, ALIGN)
        first = tl.multiple_of(image * k_batch + head * k_head, ALIGN)
        k = _read(key + first, inner, d, key_mask, key_live, pad_k, HAS_PAD)
        if not PACKED:
            inner = tl.multiple_of(key_row * v_row + key_column * v_column, ALIGN)
        first = tl.multiple_of(image * v_batch + head * v_head, ALIGN)
        v = _read(value + first, inner, d, key_mask, key_live, pad_v, HAS_PAD)
        inverse_k = d
        if COSINE:
            inverse_k = _inverse(_norms(k))
        added = tl.where(n < tokens, 0.0, float("-inf"))[None, :]
        if HAS_BIAS:
            at_query = _at_query(query_i, query_j, m < tokens, TABLE_H, TABLE_W)
            at_key = _at_key(key_i, key_j, n < tokens, TABLE_W)
            added += tl.load(bias + (at_query[:, None] - at_key[None, :]))
        scores = _scored(
            tl.dot(q, tl.trans(k), input_precision=PRECISION), scale,
            inverse_q[:, None], inverse_k[None, :], added,
            query_region[:, None], key_region[None, :], COSINE, SHIFTED,
        )  # fmt: skip
        larger = tl.maximum(best, tl.max(scores, 1))
        weights = _exp(scores, larger[:, None])
        shrunk = _exp(best, larger)
        total = total * shrunk + tl.sum(weights, 1)
        mixed = mixed * shrunk[:, None]
        mixed += tl.dot(weights.to(v.dtype), v, input_precision=PRECISION)
        best = larger
    mixed = mixed * (1.0 / total)[:, None]
    first = tl.multiple_of((image * height * width * heads + head) * HEAD_DIM, ALIGN)
    offsets = tl.multiple_of((query_row * width + query_column) * (heads * HEAD_DIM), ALIGN)
    to = first + (offsets[:, None] + d[None, :])
    tl.store(out + to, mixed.to(out.dtype.element_ty), mask=query_mask)
    at_sums = (image * heads + head) * height * width + query_row * width + query_column
    tl.store(sums + at_sums, best + tl.log(total), mask=query_live)


@triton.jit(do_not_specialize=_SIZES)
def _window_bwd_query_kernel(
    query, key, value, grad, out, bias, factor, pad, sums, deltas, grad_query, grad_factor,
    scale,
    tokens, wh, ww, rows, columns, height, width, down, right, turn_row, turn_column,
    edge_row, edge_column, heads,
    q_batch, q_row, q_column, q_head, k_batch, k_row, k_column, k_head,
    v_batch, v_row, v_column, v_head, g_batch, g_row, g_column, g_head,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, TABLE_H: tl.constexpr, TABLE_W: tl.constexpr,
    HAS_BIAS: tl.constexpr, COSINE: tl.constexpr, PADDED: tl.constexpr, HAS_PAD: tl.constexpr,
    SHIFTED: tl.constexpr, PACKED: tl.constexpr, WIDE: tl.constexpr, ALIGN: tl.constexpr,
    PRECISION: tl.constexpr,
    WW: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Gradient of some queries; ``deltas``: sums of their products of output and gradient."""
    blocks = tl.cdiv(tokens, BLOCK_M)
    head = (tl.program_id(0) % heads).to(tl.int64)
    block = tl.program_id(0) // heads % blocks
    number = tl.program_id(0) // heads // blocks
    image = (number // columns // rows).to(tl.int64)
    d = tl.arange(0, BLOCK_D)
    pad_q, pad_k, pad_v = _pads(pad, head, heads, d, HEAD_DIM, HAS_PAD)
    if HAS_BIAS:
        bias += head * ((2 * TABLE_H - 1) * (2 * TABLE_W - 1))
    edges = _edges(number, rows, columns)
    if COSINE:
        scale = tl.load(factor + head)
    m = block * BLOCK_M + tl.arange(0, BLOCK_M)
    query_i, query_j = _split(m, ww, WW)
    query_region = _beyond(query_i, query_j, edge_row, edge_column) & edges
    query_row, query_column, query_live = _located(
        number, query_i, query_j, m < tokens, wh, ww, rows, columns, height, width, down, right,
        turn_row, turn_column, PADDED, SHIFTED, WIDE,
    )  # fmt: skip
    query_mask = _valid(query_live, d, HEAD_DIM, BLOCK_D)
    offsets = tl.multiple_of(query_row * q_row + query_column * q_column, ALIGN)
    first = tl.multiple_of(image * q_batch + head * q_head, ALIGN)
    q = _read(query + first, offsets, d, query_mask, query_live, pad_q, HAS_PAD)
    inverse_q = d
    if COSINE:
        inverse_q = _inverse(_norms(q))
    offsets = tl.multiple_of(query_row * g_row + query_column * g_column, ALIGN)
    first = tl.multiple_of(image * g_batch + head * g_head, ALIGN)
    g = _read(grad + first, offsets, d, query_mask, query_live, d, False)
    first = tl.multiple_of((image * height * width * heads + head) * HEAD_DIM, ALIGN)
    offsets = tl.multiple_of((query_row * width + query_column) * (heads * HEAD_DIM), ALIGN)
    to = first + (offsets[:, None] + d[None, :])
    o = tl.load(out + to, mask=query_mask, other=0.0)
    delta = tl.sum(g.to(tl.float32) * o.to(tl.float32), 1)
    at_sums = (image * heads + head) * height * width + query_row * width + query_column
    tl.store(deltas + at_sums, delta, mask=query_live)
    # no weight where there is no query
    normal = tl.load(sums + at_sums, mask=query_live, other=float("inf"))
    grad_q = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for start in range(0, tokens, BLOCK_N):
        n = start + tl.arange(0, BLOCK_N)
        key_i, key_j = _split(n, ww, WW)
        key_region = _beyond(key_i, key_j, edge_row, edge_column) & edges
        key_row, key_column, key_live = _located(
            number, key_i, key_j, n < tokens, wh, ww, rows, columns, height, width, down, right,
            turn_row, turn_column, PADDED, SHIFTED, WIDE,
        )  # fmt: skip
        key_mask = _valid(key_live, d, HEAD_DIM, BLOCK_D)
        inner = tl.multiple_of(key_row * k_row + key_column * k_column, ALIGN)
        first = tl.multiple_of(image * k_batch + head * k_head, ALIGN)
        k = _read(key + first, inner, d, key_mask, key_live, pad_k, HAS_PAD)
        if not PACKED:
            inner = tl.multiple_of(key_row * v_row + key_column * v_column, ALIGN)
        first = tl.multiple_of(image * v_batch + head * v_head, ALIGN)
        v = _read(value + first, inner, d, key_mask, key_live, pad_v, HAS_PAD)
        inverse_k = d
        if COSINE:
            inverse_k = _inverse(_norms(k))
        added = tl.where(n < tokens, 0.0, float("-inf"))[None, :]
        if HAS_BIAS:
            at_query = _at_query(query_i, query_j, m < tokens, TABLE_H, TABLE_W)
            at_key = _at_key(key_i, key_j, n < tokens, TABLE_W)
            added += tl.load(bias + (at_query[:, None] - at_key[None, :]))
        scores = _scored(
            tl.dot(q, tl.trans(k), input_precision=PRECISION), scale,
            inverse_q[:, None], inverse_k[None, :], added,
            query_region[:, None], key_region[None, :], COSINE, SHIFTED,
        )  # fmt: skip
        weights = _exp(scores, normal[:, None])
        grad_scores = tl.dot(g, tl.trans(v), input_precision=PRECISION)
        grad_scores = weights * (grad_scores - delta[:, None])
        if COSINE:
            k = (k.to(tl.float32) * inverse_k[:, None]).to(q.dtype)
        grad_q += tl.dot(grad_scores.to(q.dtype), k, input_precision=PRECISION)
    if COSINE:
        grad_q, along = _through_norm(grad_q, q, _norms(q))
        tl.store(grad_factor + at_sums, along, mask=query_live)
    tl.store(grad_query + to, (grad_q * scale).to(q.dtype), mask=query_mask)


@triton.jit(do_not_specialize=_SIZES)
def _window_bwd_key_kernel(
    query, key, value, grad, bias, factor, pad, sums, deltas, grad_key, grad_value, grad_pad,
    scale,
    tokens, wh, ww, rows, columns, height, width, down, right, turn_row, turn_column,
    edge_row, edge_column, heads,
    q_batch, q_row, q_column, q_head, k_batch, k_row, k_column, k_head,
    v_batch, v_row, v_column, v_head, g_batch, g_row, g_column, g_head,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, TABLE_H: tl.constexpr, TABLE_W: tl.constexpr,
    HAS_BIAS: tl.constexpr, COSINE: tl.constexpr, PADDED: tl.constexpr, HAS_PAD: tl.constexpr,
    SHIFTED: tl.constexpr, PACKED: tl.constexpr, WIDE: tl.constexpr, ALIGN: tl.constexpr,
    PRECISION: tl.constexpr,
    WW: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Gradients of some keys and values; scores are [keys, queries]."""
    blocks = tl.cdiv(tokens, BLOCK_N)
    head = (tl.program_id(0) % heads).to(tl.int64)
    block = tl.program_id(0) // heads % blocks
    number = tl.program_id(0) // heads // blocks
    image = (number // columns // rows).to(tl.int64)
    d = tl.arange(0, BLOCK_D)
    pad_q, pad_k, pad_v = _pads(pad, head, heads, d, HEAD_DIM, HAS_PAD)
    if HAS_BIAS:
        bias += head * ((2 * TABLE_H - 1) * (2 * TABLE_W - 1))
    edges = _edges(number, rows, columns)
    if COSINE:
        scale = tl.load(factor + head)
    n = block * BLOCK_N + tl.arange(0, BLOCK_N)
    key_i, key_j = _split(n, ww, WW)
    key_region = _beyond(key_i, key_j, edge_row, edge_column) & edges
    key_row, key_column, key_live = _located(
        number, key_i, key_j, n < tokens, wh, ww, rows, columns, height, width, down, right,
        turn_row, turn_column, PADDED, SHIFTED, WIDE,
    )  # fmt: skip
    key_mask = _valid(key_live, d, HEAD_DIM, BLOCK_D)
    offsets = tl.multiple_of(key_row * k_row + key_column * k_column, ALIGN)
    first = tl.multiple_of(image * k_batch + head * k_head, ALIGN)
    k = _read(key + first, offsets, d, key_mask, key_live, pad_k, HAS_PAD)
    if not PACKED:
        offsets = tl.multiple_of(key_row * v_row + key_column * v_column, ALIGN)
    first = tl.multiple_of(image * v_batch + head * v_head, ALIGN)
    v = _read(value + first, offsets, d, key_mask, key_live, pad_v, HAS_PAD)
    inverse_k = d
    if COSINE:
        inverse_k = _inverse(_norms(k))
    grad_k = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    grad_v = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    for start in range(0, tokens, BLOCK_M):
        m = start + tl.arange(0, BLOCK_M)
        query_i, query_j = _split(m, ww, WW)
        query_region = _beyond(query_i, query_j, edge_row, edge_column) & edges
        query_row, query_column, query_live = _located(
            number, query_i, query_j, m < tokens, wh, ww, rows, columns, height, width, down, right,
            turn_row, turn_column, PADDED, SHIFTED, WIDE,
        )  # fmt: skip
        query_mask = _valid(query_live, d, HEAD_DIM, BLOCK_D)
        inner = tl.multiple_of(query_row * q_row + query_column * q_column, ALIGN)
        first = tl.multiple_of(image * q_batch + head * q_head, ALIGN)
        q = _read(query + first, inner, d, query_mask, query_live, pad_q, HAS_PAD)
        inner = tl.multiple_of(query_row * g_row + query_column * g_column, ALIGN)
        first = tl.multiple_of(image * g_batch + head * g_head, ALIGN)
        g = _read(grad + first, inner, d, query_mask, query_live, d, False)
        inverse_q = d
        if COSINE:
            inverse_q = _inverse(_norms(q))
        added = tl.where(n < tokens, 0.0, float("-inf"))[:, None]
        if HAS_BIAS:
            at_query = _at_query(query_i, query_j, m < tokens, TABLE_H, TABLE_W)
            at_key = _at_key(key_i, key_j, n < tokens, TABLE_W)
            added += tl.load(bias + (at_query[None, :] - at_key[:, None]))
        scores = _scored(
            tl.dot(k, tl.trans(q), input_precision=PRECISION), scale,
            inverse_q[None, :], inverse_k[:, None], added,
            query_region[None, :], key_region[:, None], COSINE, SHIFTED,
        )  # fmt: skip
        at_sums = (image * heads + head) * height * width + query_row * width + query_column
        normal = tl.load(sums + at_sums, mask=query_live, other=float("inf"))
        delta = tl.load(deltas + at_sums, mask=query_live, other=0.0)
        weights = _exp(scores, normal[None, :])
        grad_v += tl.dot(weights.to(g.dtype), g, input_precision=PRECISION)
        grad_scores = tl.dot(v, tl.trans(g), input_precision=PRECISION)
        grad_scores = weights * (grad_scores - delta[None, :])
        if COSINE:
            q = (q.to(tl.float32) * inverse_q[:, None]).to(k.dtype)
        grad_k += tl.dot(grad_scores.to(k.dtype), q, input_precision=PRECISION)
    if COSINE:
        grad_k, _ = _through_norm(grad_k, k, _norms(k))
    grad_k = grad_k * scale
    first = tl.multiple_of((image * height * width * heads + head) * HEAD_DIM, ALIGN)
    offsets = tl.multiple_of((key_row * width + key_column) * (heads * HEAD_DIM), ALIGN)
    to = first + (offsets[:, None] + d[None, :])
    tl.store(grad_key + to, grad_k.to(k.dtype), mask=key_mask)
    tl.store(grad_value + to, grad_v.to(k.dtype), mask=key_mask)
    if HAS_PAD:
        padded = ((n < tokens) & ~key_live)[:, None]
        to_pad = grad_pad + tl.program_id(0).to(tl.int64) * (2 * HEAD_DIM) + d
        tl.store(to_pad, tl.sum(tl.where(padded, grad_k, 0.0), 0), mask=d < HEAD_DIM)
        tl.store(to_pad + HEAD_DIM, tl.sum(tl.where(padded, grad_v, 0.0), 0), mask=d < HEAD_DIM)


@triton.jit(do_not_specialize=_SIZES)
def _window_bwd_pairs_kernel(
    query, key, value, grad, bias, factor, pad, sums, deltas, grad_pairs, scale, windows,
    tokens, wh, ww, rows, columns, height, width, down, right, turn_row, turn_column,
    edge_row, edge_column, heads,
    q_batch, q_row, q_column, q_head, k_batch, k_row, k_column, k_head,
    v_batch, v_row, v_column, v_head, g_batch, g_row, g_column, g_head,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, TABLE_H: tl.constexpr, TABLE_W: tl.constexpr,
    COSINE: tl.constexpr, PADDED: tl.constexpr, HAS_PAD: tl.constexpr,
    SHIFTED: tl.constexpr, PACKED: tl.constexpr, WIDE: tl.constexpr, ALIGN: tl.constexpr,
    PRECISION: tl.constexpr,
    WW: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Gradient of the scores of a block of pairs, summed over some windows."""
    head = (tl.program_id(0) % heads).to(tl.int64)
    block = tl.program_id(0) // heads
    blocks = tl.cdiv(tokens, BLOCK_N)
    d = tl.arange(0, BLOCK_D)
    pad_q, pad_k, pad_v = _pads(pad, head, heads, d, HEAD_DIM, HAS_PAD)
    if COSINE:
        scale = tl.load(factor + head)
    m = block // blocks * BLOCK_M + tl.arange(0, BLOCK_M)
    query_i, query_j = _split(m, ww, WW)
    query_beyond = _beyond(query_i, query_j, edge_row, edge_column)
    n = block % blocks * BLOCK_N + tl.arange(0, BLOCK_N)
    key_i, key_j = _split(n, ww, WW)
    key_beyond = _beyond(key_i, key_j, edge_row, edge_column)
    bias += head * ((2 * TABLE_H - 1) * (2 * TABLE_W - 1))
    at_query = _at_query(query_i, query_j, m < tokens, TABLE_H, TABLE_W)
    at_key = _at_key(key_i, key_j, n < tokens, TABLE_W)
    added = tl.where(n < tokens, 0.0, float("-inf"))[None, :]
    added += tl.load(bias + (at_query[:, None] - at_key[None, :]))
    sum_pairs = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for number in range(tl.program_id(1), windows, tl.num_programs(1)):
        image = (number // columns // rows).to(tl.int64)
        edges = _edges(number, rows, columns)
        query_region, key_region = query_beyond & edges, key_beyond & edges
        query_row, query_column, query_live = _located(
            number, query_i, query_j, m < tokens, wh, ww, rows, columns, height, width, down, right,
            turn_row, turn_column, PADDED, SHIFTED, WIDE,
        )  # fmt: skip
        query_mask = _valid(query_live, d, HEAD_DIM, BLOCK_D)
        key_row, key_column, key_live = _located(
            number, key_i, key_j, n < tokens, wh, ww, rows, columns, height, width, down, right,
            turn_row, turn_column, PADDED, SHIFTED, WIDE,
        )  # fmt: skip
        key_mask = _valid(key_live, d, HEAD_DIM, BLOCK_D)
        offsets = tl.multiple_of(query_row * q_row + query_column * q_column, ALIGN)
        first = tl.multiple_of(image * q_batch + head * q_head, ALIGN)
        q = _read(query + first, offsets, d, query_mask, query_live, pad_q, HAS_PAD)
        offsets = tl.multiple_of(query_row * g_row + query_column * g_column, ALIGN)
        first = tl.multiple_of(image * g_batch + head * g_head, ALIGN)
        g = _read(grad + first, offsets, d, query_mask, query_live, d, False)
        offsets = tl.multiple_of(key_row * k_row + key_column * k_column, ALIGN)
        first = tl.multiple_of(image * k_batch + head * k_head, ALIGN)
        k = _read(key + first, offsets, d, key_mask, key_live, pad_k, HAS_PAD)
        if not PACKED:
            offsets = tl.multiple_of(key_row * v_row + key_column * v_column, ALIGN)
        first = tl.multiple_of(image * v_batch + head * v_head, ALIGN)
        v = _read(value + first, offsets, d, key_mask, key_live, pad_v, HAS_PAD)
        inverse_q = d
        if COSINE:
            inverse_q = _inverse(_norms(q))
        inverse_k = d
        if COSINE:
            inverse_k = _inverse(_norms(k))
        scores = _scored(
            tl.dot(q, tl.trans(k), input_precision=PRECISION), scale,
            inverse_q[:, None], inverse_k[None, :], added,
            query_region[:, None], key_region[None, :], COSINE, SHIFTED,
        )  # fmt: skip
        at_sums = (image * heads + head) * height * width + query_row * width + query_column
        normal = tl.load(sums + at_sums, mask=query_live, other=float("inf"))
        delta = tl.load(deltas + at_sums, mask=query_live, other=0.0)
        weights = _exp(scores, normal[:, None])
        grad_scores = tl.dot(g, tl.trans(v), input_precision=PRECISION)
        sum_pairs += weights * (grad_scores - delta[:, None])
    part = tl.program_id(1) * heads + head
    pair = m[:, None] * tokens + n[None, :]
    live = (m < tokens)[:, None] & (n < tokens)[None, :]
    tl.store(grad_pairs + part * tokens * tokens + pair, sum_pairs, mask=live)


@triton.jit(do_not_specialize=_SIZES)
def _window_bwd_table_kernel(
    grad_pairs, grad_bias, WH: tl.constexpr, WW: tl.constexpr,
    TABLE_H: tl.constexpr, TABLE_W: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_L: tl.constexpr,
):  # fmt: skip
    """Gradient of some entries of the table: each of all pairs that are so far apart."""
    tokens: tl.constexpr = WH * WW
    entries: tl.constexpr = (2 * TABLE_H - 1) * (2 * TABLE_W - 1)
    head = tl.program_id(0).to(tl.int64)
    entry = tl.program_id(1) * BLOCK_E + tl.arange(0, BLOCK_E)
    down = (entry // (2 * TABLE_W - 1) - (TABLE_H - 1))[:, None]
    right = (entry % (2 * TABLE_W - 1) - (TABLE_W - 1))[:, None]
    grad_pairs += head * (tokens * tokens)
    found = tl.zeros([BLOCK_E, BLOCK_L], tl.float32)
    for start in range(0, tokens, BLOCK_L):
        m = start + tl.arange(0, BLOCK_L)[None, :]
        i, j = m // WW - down, m % WW - right
        live = (m < tokens) & (i >= 0) & (i < WH) & (j >= 0) & (j < WW)
        found += tl.load(grad_pairs + m * tokens + i * WW + j, mask=live, other=0.0)
    tl.store(grad_bias + head * entries + entry, tl.sum(found, 1), mask=entry < entries)
