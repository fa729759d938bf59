"""Kernels of channel attention: products over tokens, and channels mixed by their softmax.

A map arrives as tokens [B, N, heads, HEAD_DIM]; its strides come in units of UNIT elements, so
that the compiler sees what divides them and reads vectors. Programs of neighboring heads, which
are neighbors in memory, run at the same time. Where there are enough images and heads to fill a
GPU, one program does all for one of them (FUSED). Elsewhere the tokens are divided into parts:
one kernel writes each part's products, one sums them in a fixed order, one mixes part by part.
Either way every map is read once; the gradient of what is mixed is written with the products.
"""

import triton
import triton.language as tl

_SIZES = ["batch", "tokens", "heads", "parts", "chunk"]
_STRIDES = [
    f"{name}_stride_{axis}"
    for name in (*"xy", "left", "right", "mixed", "grad", "out", "dleft", "dright", "dmixed")
    for axis in "bnh"
]


@triton.jit
def _program(heads, parts):
    """Image, head and part of this program."""
    program = tl.program_id(0)
    head, rest = program % heads, program // heads
    return (rest // parts).to(tl.int64), head.to(tl.int64), rest % parts


@triton.jit
def _start(pointer, image, head, stride_b, stride_h, UNIT: tl.constexpr):
    """Address of a head's first token."""
    return pointer + (image * stride_b + head * stride_h) * UNIT


@triton.jit
def _at(start, rows, stride, UNIT: tl.constexpr, BLOCK_D: tl.constexpr):
    """Addresses [rows, BLOCK_D] of a head's tokens."""
    offsets = rows.to(tl.int64)[:, None] * stride * UNIT
    return start + offsets + tl.arange(0, BLOCK_D)[None, :]


@triton.jit
def _at_columns(start, columns, stride, UNIT: tl.constexpr, BLOCK_D: tl.constexpr):
    """The same addresses, tokens as columns: products want their left side so."""
    offsets = columns.to(tl.int64)[None, :] * stride * UNIT
    return start + offsets + tl.arange(0, BLOCK_D)[:, None]


@triton.jit
def _inside(rows, last, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    """Which of those addresses there are."""
    if HEAD_DIM == BLOCK_D:
        return (rows < last)[:, None]
    else:
        return (rows < last)[:, None] & (tl.arange(0, BLOCK_D) < HEAD_DIM)[None, :]


@triton.jit
def _inside_columns(columns, last, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    if HEAD_DIM == BLOCK_D:
        return (columns < last)[None, :]
    else:
        return (columns < last)[None, :] & (tl.arange(0, BLOCK_D) < HEAD_DIM)[:, None]


@triton.jit
def _products(
    x,
    y,
    x_stride,
    y_stride,
    first,
    last,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    UNIT: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """x^T y of the tokens from first to last."""
    total = tl.zeros([BLOCK_D, BLOCK_D], tl.float32)
    for start in range(first, last, BLOCK_M):
        rows = start + tl.arange(0, BLOCK_M)
        columns = _inside_columns(rows, last, HEAD_DIM, BLOCK_D)
        inside = _inside(rows, last, HEAD_DIM, BLOCK_D)
        left = tl.load(_at_columns(x, rows, x_stride, UNIT, BLOCK_D), mask=columns, other=0.0)
        right = tl.load(_at(y, rows, y_stride, UNIT, BLOCK_D), mask=inside, other=0.0)
        total = tl.dot(left, right, total, input_precision=PRECISION)
    return total


@triton.jit
def _square(first, HEAD_DIM: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr):
    """Offsets [BLOCK_R, BLOCK_D] in a [HEAD_DIM, HEAD_DIM] from a row on; which there are."""
    rows, columns = first + tl.arange(0, BLOCK_R), tl.arange(0, BLOCK_D)
    inside = (rows < HEAD_DIM)[:, None] & (columns < HEAD_DIM)[None, :]
    return rows[:, None] * HEAD_DIM + columns[None, :], inside


@triton.jit
def _softmax(scores, scale, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    """Over columns; past HEAD_DIM there are none."""
    scores *= scale * 1.4426950408889634  # log2(e)
    if HEAD_DIM != BLOCK_D:
        scores = tl.where((tl.arange(0, BLOCK_D) < HEAD_DIM)[None, :], scores, float("-inf"))
    weights = tl.exp2(scores - tl.max(scores, 1)[:, None])
    return weights / tl.sum(weights, 1)[:, None]


@triton.jit
def _through_softmax(grad, weights, scale):
    """Gradient of the products from that of the weights."""
    return weights * (grad - tl.sum(grad * weights, 1)[:, None]) * scale


@triton.jit(do_not_specialize=[*_SIZES, *_STRIDES])
def _channel_products_kernel(
    x_ptr,
    y_ptr,
    partials_ptr,  # [parts, B, heads, HEAD_DIM, HEAD_DIM]
    x_stride_b,
    x_stride_n,
    x_stride_h,
    y_stride_b,
    y_stride_n,
    y_stride_h,
    batch,
    tokens,
    heads,
    parts,
    chunk,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    UNIT: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    image, head, part = _program(heads, parts)
    x = _start(x_ptr, image, head, x_stride_b, x_stride_h, UNIT)
    y = _start(y_ptr, image, head, y_stride_b, y_stride_h, UNIT)
    first = part * chunk
    last = tl.minimum(first + chunk, tokens)
    total = _products(
        x, y, x_stride_n, y_stride_n, first, last, HEAD_DIM, BLOCK_D, UNIT, PRECISION, BLOCK_M
    )
    at, inside = _square(0, HEAD_DIM, BLOCK_D, BLOCK_D)
    piece = (part.to(tl.int64) * batch + image) * heads + head
    tl.store(partials_ptr + piece * HEAD_DIM * HEAD_DIM + at, total, mask=inside)


@triton.jit(do_not_specialize=["parts", "pieces"])
def _channel_weights_kernel(
    partials_ptr,  # [parts, B, heads, HEAD_DIM, HEAD_DIM]
    weights_ptr,  # [B, heads, HEAD_DIM, HEAD_DIM]; only read if BACKWARD
    out_ptr,  # like weights
    scale,
    parts,
    pieces,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BACKWARD: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    blocks: tl.constexpr = (HEAD_DIM + BLOCK_R - 1) // BLOCK_R
    piece = (tl.program_id(0) // blocks).to(tl.int64)
    at, inside = _square(tl.program_id(0) % blocks * BLOCK_R, HEAD_DIM, BLOCK_R, BLOCK_D)
    total = tl.zeros([BLOCK_R, BLOCK_D], tl.float32)
    for first in range(0, parts, BLOCK_P):
        part = first + tl.arange(0, BLOCK_P)
        starts = (part.to(tl.int64) * pieces + piece) * (HEAD_DIM * HEAD_DIM)
        there = (part < parts)[:, None, None] & inside[None, :, :]
        found = tl.load(
            partials_ptr + starts[:, None, None] + at[None, :, :], mask=there, other=0.0
        )
        total += tl.sum(found, 0)
    start = piece * HEAD_DIM * HEAD_DIM
    if BACKWARD:
        weights = tl.load(weights_ptr + start + at, mask=inside, other=0.0)
        total = _through_softmax(total, weights, scale)
    else:
        total = _softmax(total, scale, HEAD_DIM, BLOCK_D)
    tl.store(out_ptr + start + at, total, mask=inside)


@triton.jit(do_not_specialize=[*_SIZES, *_STRIDES])
def _channel_fwd_kernel(
    left_ptr,
    right_ptr,
    mixed_ptr,
    weights_ptr,  # read unless FUSED; else written if KEEP
    out_ptr,
    scale,
    left_stride_b,
    left_stride_n,
    left_stride_h,
    right_stride_b,
    right_stride_n,
    right_stride_h,
    mixed_stride_b,
    mixed_stride_n,
    mixed_stride_h,
    out_stride_b,
    out_stride_n,
    out_stride_h,
    tokens,
    heads,
    parts,
    chunk,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    UNIT: tl.constexpr,
    PRECISION: tl.constexpr,
    FUSED: tl.constexpr,
    KEEP: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    image, head, part = _program(heads, parts)
    at, inside = _square(0, HEAD_DIM, BLOCK_D, BLOCK_D)
    at += (image * heads + head) * HEAD_DIM * HEAD_DIM
    if FUSED:
        scores = _products(
            _start(left_ptr, image, head, left_stride_b, left_stride_h, UNIT),
            _start(right_ptr, image, head, right_stride_b, right_stride_h, UNIT),
            left_stride_n,
            right_stride_n,
            0,
            tokens,
            HEAD_DIM,
            BLOCK_D,
            UNIT,
            PRECISION,
            BLOCK_M,
        )
        weights = _softmax(scores, scale, HEAD_DIM, BLOCK_D)
        if KEEP:
            tl.store(weights_ptr + at, weights, mask=inside)
    else:
        weights = tl.load(weights_ptr + at, mask=inside, other=0.0)
    weights = tl.trans(weights.to(mixed_ptr.dtype.element_ty))
    mixed = _start(mixed_ptr, image, head, mixed_stride_b, mixed_stride_h, UNIT)
    out = _start(out_ptr, image, head, out_stride_b, out_stride_h, UNIT)
    last = tl.minimum((part + 1) * chunk, tokens)
    for start in range(part * chunk, last, BLOCK_M):
        rows = start + tl.arange(0, BLOCK_M)
        there = _inside(rows, last, HEAD_DIM, BLOCK_D)
        x = tl.load(_at(mixed, rows, mixed_stride_n, UNIT, BLOCK_D), mask=there, other=0.0)
        y = tl.dot(x, weights, input_precision=PRECISION)
        tl.store(_at(out, rows, out_stride_n, UNIT, BLOCK_D), y.to(x.dtype), mask=there)


@triton.jit
def _products_and_mixed(
    grad,
    mixed,
    dmixed,
    weights,
    grad_stride,
    mixed_stride,
    dmixed_stride,
    first,
    last,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    UNIT: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """grad^T mixed of the tokens from first to last; writes their grad @ weights."""
    total = tl.zeros([BLOCK_D, BLOCK_D], tl.float32)
    weights = tl.trans(weights.to(grad.dtype.element_ty))
    for start in range(first, last, BLOCK_M):
        rows = start + tl.arange(0, BLOCK_M)
        columns = _inside_columns(rows, last, HEAD_DIM, BLOCK_D)
        inside = _inside(rows, last, HEAD_DIM, BLOCK_D)
        x = tl.load(_at_columns(grad, rows, grad_stride, UNIT, BLOCK_D), mask=columns, other=0.0)
        y = tl.load(_at(mixed, rows, mixed_stride, UNIT, BLOCK_D), mask=inside, other=0.0)
        total = tl.dot(x, y, total, input_precision=PRECISION)
        z = tl.dot(weights, x, input_precision=PRECISION)
        at = _at_columns(dmixed, rows, dmixed_stride, UNIT, BLOCK_D)
        tl.store(at, z.to(x.dtype), mask=columns)
    return total


@triton.jit(do_not_specialize=[*_SIZES, *_STRIDES])
def _channel_bwd_products_kernel(
    grad_ptr,
    mixed_ptr,
    weights_ptr,
    partials_ptr,  # [parts, B, heads, HEAD_DIM, HEAD_DIM]
    dmixed_ptr,
    grad_stride_b,
    grad_stride_n,
    grad_stride_h,
    mixed_stride_b,
    mixed_stride_n,
    mixed_stride_h,
    dmixed_stride_b,
    dmixed_stride_n,
    dmixed_stride_h,
    batch,
    tokens,
    heads,
    parts,
    chunk,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    UNIT: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    image, head, part = _program(heads, parts)
    at, inside = _square(0, HEAD_DIM, BLOCK_D, BLOCK_D)
    piece = image * heads + head
    first = part * chunk
    total = _products_and_mixed(
        _start(grad_ptr, image, head, grad_stride_b, grad_stride_h, UNIT),
        _start(mixed_ptr, image, head, mixed_stride_b, mixed_stride_h, UNIT),
        _start(dmixed_ptr, image, head, dmixed_stride_b, dmixed_stride_h, UNIT),
        tl.load(weights_ptr + piece * HEAD_DIM * HEAD_DIM + at, mask=inside, other=0.0),
        grad_stride_n,
        mixed_stride_n,
        dmixed_stride_n,
        first,
        tl.minimum(first + chunk, tokens),
        HEAD_DIM,
        BLOCK_D,
        UNIT,
        PRECISION,
        BLOCK_M,
    )
    piece += part.to(tl.int64) * batch * heads
    tl.store(partials_ptr + piece * HEAD_DIM * HEAD_DIM + at, total, mask=inside)


@triton.jit(do_not_specialize=[*_SIZES, *_STRIDES])
def _channel_bwd_kernel(
    left_ptr,
    right_ptr,
    mixed_ptr,
    grad_ptr,
    weights_ptr,  # [B, heads, HEAD_DIM, HEAD_DIM]
    scores_ptr,  # like weights: the gradient of the products; not read if FUSED
    dleft_ptr,
    dright_ptr,
    dmixed_ptr,  # written if FUSED
    scale,
    left_stride_b,
    left_stride_n,
    left_stride_h,
    right_stride_b,
    right_stride_n,
    right_stride_h,
    mixed_stride_b,
    mixed_stride_n,
    mixed_stride_h,
    grad_stride_b,
    grad_stride_n,
    grad_stride_h,
    dleft_stride_b,
    dleft_stride_n,
    dleft_stride_h,
    dright_stride_b,
    dright_stride_n,
    dright_stride_h,
    dmixed_stride_b,
    dmixed_stride_n,
    dmixed_stride_h,
    tokens,
    heads,
    parts,
    chunk,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    UNIT: tl.constexpr,
    PRECISION: tl.constexpr,
    FUSED: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    image, head, part = _program(heads, parts)
    at, inside = _square(0, HEAD_DIM, BLOCK_D, BLOCK_D)
    at += (image * heads + head) * HEAD_DIM * HEAD_DIM
    if FUSED:
        weights = tl.load(weights_ptr + at, mask=inside, other=0.0)
        products = _products_and_mixed(
            _start(grad_ptr, image, head, grad_stride_b, grad_stride_h, UNIT),
            _start(mixed_ptr, image, head, mixed_stride_b, mixed_stride_h, UNIT),
            _start(dmixed_ptr, image, head, dmixed_stride_b, dmixed_stride_h, UNIT),
            weights,
            grad_stride_n,
            mixed_stride_n,
            dmixed_stride_n,
            0,
            tokens,
            HEAD_DIM,
            BLOCK_D,
            UNIT,
            PRECISION,
            BLOCK_M,
        )
        scores = _through_softmax(products, weights, scale)
    else:
        scores = tl.load(scores_ptr + at, mask=inside, other=0.0)
    # sums over a whole map leave the range of float16
    largest = tl.maximum(tl.max(tl.max(tl.abs(scores), 1), 0), 1e-30)
    dtype = left_ptr.dtype.element_ty
    scores = (scores / largest).to(dtype)

    left = _start(left_ptr, image, head, left_stride_b, left_stride_h, UNIT)
    right = _start(right_ptr, image, head, right_stride_b, right_stride_h, UNIT)
    dleft = _start(dleft_ptr, image, head, dleft_stride_b, dleft_stride_h, UNIT)
    dright = _start(dright_ptr, image, head, dright_stride_b, dright_stride_h, UNIT)
    last = tl.minimum((part + 1) * chunk, tokens)
    for start in range(part * chunk, last, BLOCK_M):
        rows = start + tl.arange(0, BLOCK_M)
        there = _inside(rows, last, HEAD_DIM, BLOCK_D)
        x = tl.load(_at(left, rows, left_stride_n, UNIT, BLOCK_D), mask=there, other=0.0)
        y = tl.load(_at(right, rows, right_stride_n, UNIT, BLOCK_D), mask=there, other=0.0)
        dx = tl.dot(y, tl.trans(scores), input_precision=PRECISION) * largest
        dy = tl.dot(x, scores, input_precision=PRECISION) * largest
        tl.store(_at(dleft, rows, dleft_stride_n, UNIT, BLOCK_D), dx.to(dtype), mask=there)
        tl.store(_at(dright, rows, dright_stride_n, UNIT, BLOCK_D), dy.to(dtype), mask=there)
