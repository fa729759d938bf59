"""Kernels of agent attention: means of queries, what agents gather, what tokens read from them.

Maps [B, H, W, heads, HEAD_DIM] are read in place: token t stands in row t // width and column
t % width, and strides (image, row, column, head) come in units of UNIT elements, so that the
compiler sees what divides them. What is as small as the agents, [B, AGENTS, heads, HEAD_DIM], and
what is written for all tokens, [B, tokens, heads, HEAD_DIM], is contiguous. Biases [heads, AGENTS,
tokens] come with strides (head, agent).

Agents are many sums over few tokens each, or few over many: sums run over a program's tokens, and
partial sums of several programs are added afterwards in a fixed order. What needs one image only
(means, gathering, gradients of agents) has programs per image; what is shared by all images (a
bias and its gradient) stays in registers while a program runs through the images of its block of
tokens. Scores are [tokens, agents] but for gathering, whose softmax runs along the tokens.
"""

import triton
import triton.language as tl

_LOG2E = tl.constexpr(1.4426950408889634)
_STEP = tl.constexpr(128)  # tokens; programs that run through an image start at its multiples
_LOWEST = tl.constexpr(-1e30)  # in the place of -inf where one would be subtracted from another


@triton.jit
def _program(heads, parts):
    """Head, part, and image or group of images of this program; heads are neighbors in memory."""
    program = tl.program_id(0)
    head, rest = program % heads, program // heads
    return head.to(tl.int64), rest % parts, (rest // parts).to(tl.int64)


@triton.jit
def _inside(index, count, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    """Which of [index, BLOCK_D] there are."""
    mask = (index < count)[:, None]
    if HEAD_DIM != BLOCK_D:
        mask = mask & (tl.arange(0, BLOCK_D) < HEAD_DIM)[None, :]
    return mask


@triton.jit
def _load(
    x,
    strides,
    image,
    head,
    token,
    tokens,
    width,
    HEAD_DIM,
    BLOCK_D: tl.constexpr,
    FLAT: tl.constexpr,
    UNIT,
):
    """[token, BLOCK_D] of a map, zero where there is nothing."""
    if FLAT:
        offset = token.to(tl.int64) * strides[2]
    else:
        row, column = (token // width).to(tl.int64), (token % width).to(tl.int64)
        offset = row * strides[1] + column * strides[2]
    start = x + (image * strides[0] + head * strides[3]) * UNIT
    at = start + (offset * UNIT)[:, None] + tl.arange(0, BLOCK_D)[None, :]
    return tl.load(at, mask=_inside(token, tokens, HEAD_DIM, BLOCK_D), other=0.0)


@triton.jit
def _at(x, image, index, count, head, heads, HEAD_DIM, BLOCK_D):
    """Addresses [index, BLOCK_D] in a contiguous [B, count, heads, HEAD_DIM]."""
    offset = ((image * count + index) * heads + head) * HEAD_DIM
    return x + offset[:, None] + tl.arange(0, BLOCK_D)[None, :]


@triton.jit
def _load_agents(x, image, head, heads, AGENTS, HEAD_DIM, BLOCK_N: tl.constexpr, BLOCK_D):
    """[BLOCK_N, BLOCK_D] of a contiguous [B, AGENTS, heads, HEAD_DIM]; zero behind its end."""
    n = tl.arange(0, BLOCK_N)
    at = _at(x, image, n, AGENTS, head, heads, HEAD_DIM, BLOCK_D)
    return tl.load(at, mask=_inside(n, AGENTS, HEAD_DIM, BLOCK_D), other=0.0)


@triton.jit
def _store(x, tile, image, index, count, head, heads, HEAD_DIM, BLOCK_D):
    """Write [index, BLOCK_D] to a contiguous [B, count, heads, HEAD_DIM]."""
    at = _at(x, image, index, count, head, heads, HEAD_DIM, BLOCK_D)
    tl.store(at, tile, mask=_inside(index, count, HEAD_DIM, BLOCK_D))


@triton.jit
def _load_levels(lse, image, n, head, heads, AGENTS):
    """Of [B, AGENTS, heads]: log2 of the sum of an agent's weights."""
    at = lse + (image * AGENTS + n) * heads + head
    return tl.load(at, mask=n < AGENTS, other=0.0)


@triton.jit
def _store_levels(lse, level, image, n, head, heads, AGENTS):
    tl.store(lse + (image * AGENTS + n) * heads + head, level, mask=n < AGENTS)


@triton.jit
def _bias(x, strides, head, token, tokens, AGENTS, BLOCK_N: tl.constexpr, ALIGNED):
    """[tokens, agents] for the softmax, whose base is 2; -inf where there is no such agent.

    What is not there is read as zero: that costs nothing, other values a selection for each.
    """
    n = tl.arange(0, BLOCK_N)
    closed = tl.where(n < AGENTS, 0.0, float("-inf"))[None, :]
    if x is None:
        return closed
    else:
        row = (head * strides[0] + n.to(tl.int64) * strides[1]) * ALIGNED
        mask = (token < tokens)[:, None] & (n < AGENTS)[None, :]
        bias = tl.load(x + row[None, :] + token[:, None], mask=mask, other=0.0)
        return bias.to(tl.float32) * _LOG2E + closed


@triton.jit
def _edges(index, length, COUNT: tl.constexpr):
    """First position of a bin of an axis, and the one behind its last."""
    return index * length // COUNT, ((index + 1) * length + (COUNT - 1)) // COUNT


@triton.jit
def _weights(scores):
    """exp2 of what is not closed, and one over its sum along axis 1."""
    top = tl.maximum(tl.max(scores, 1), _LOWEST)
    weights = tl.exp2(scores - top[:, None])
    total = tl.sum(weights, 1)
    return weights, 1.0 / tl.where(total > 0.0, total, 1.0)


@triton.jit
def _reading(q, grad, a, u, bias, scale, PRECISION: tl.constexpr):
    """Weights with which tokens read from agents, and the gradient of their scaled scores."""
    scores = tl.dot(q, tl.trans(a), input_precision=PRECISION) * (scale * _LOG2E) + bias
    weights, inverse = _weights(scores)
    weights = weights * inverse[:, None]
    grads = tl.dot(grad, tl.trans(u), input_precision=PRECISION)
    grads = weights * (grads - tl.sum(weights * grads, 1)[:, None])
    return weights, grads


@triton.jit
def _gathering(k, v, a, grad, lse, delta, bias, scale, PRECISION: tl.constexpr):
    """Weights with which agents gather from tokens, and the gradient of their scaled scores."""
    scores = tl.dot(k, tl.trans(a), input_precision=PRECISION) * (scale * _LOG2E) + bias
    weights = tl.exp2(scores - lse[None, :])
    grads = tl.dot(v, tl.trans(grad), input_precision=PRECISION)
    return weights, weights * (grads - delta[None, :])


@triton.jit(do_not_specialize=["height", "width", "parts", "images"])
def _agent_fwd_pool_kernel(
    query,
    query_strides,
    agents,
    height,
    width,
    heads,
    parts,
    images,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    UNIT: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    """Means of one row of agents, or a part of them: agents [parts, B, n, heads, d].

    A program reads the tokens of that row of bins once, for a block of channels of all heads.
    """
    channels = heads * HEAD_DIM
    blocks = tl.cdiv(channels, BLOCK_C)
    program = tl.program_id(0)
    c, rest = program % blocks * BLOCK_C + tl.arange(0, BLOCK_C), program // blocks
    part, rest = rest % parts, rest // parts
    row, image = rest % ROWS, (rest // ROWS).to(tl.int64)
    top, bottom = _edges(row, height, ROWS)
    column = tl.arange(0, BLOCK_COLUMNS)
    left, right = _edges(column, width, COLUMNS)
    tokens = (bottom - top) * width
    span = tl.cdiv(tl.cdiv(tokens, parts), BLOCK_T) * BLOCK_T
    at = query + (image * query_strides[0] + top.to(tl.int64) * query_strides[1]) * UNIT
    at += (c // HEAD_DIM).to(tl.int64) * query_strides[3] * UNIT + c % HEAD_DIM
    total = tl.zeros([BLOCK_COLUMNS, BLOCK_C], tl.float32)
    for start in range(part * span, tl.minimum((part + 1) * span, tokens), BLOCK_T):
        token = start + tl.arange(0, BLOCK_T)
        y, x = (token // width).to(tl.int64), token % width
        there = token < tokens
        offset = (y * query_strides[1] + x.to(tl.int64) * query_strides[2]) * UNIT
        mask = there[:, None] & (c < channels)[None, :]
        q = tl.load(at[None, :] + offset[:, None], mask=mask, other=0.0)
        inside = (x[None, :] >= left[:, None]) & (x[None, :] < right[:, None])
        inside = tl.where(inside, 1.0, 0.0).to(q.dtype)
        total = tl.dot(inside, q, total, input_precision=PRECISION)
    mean = total / ((bottom - top) * (right - left)).to(tl.float32)[:, None]
    index = (part * images + image) * (ROWS * COLUMNS) + row * COLUMNS + column
    mask = (column < COLUMNS)[:, None] & (c < channels)[None, :]
    tl.store(agents + index[:, None] * channels + c[None, :], mean, mask=mask)


@triton.jit(do_not_specialize=["width", "tokens", "span", "parts", "images"])
def _agent_fwd_gather_kernel(
    key,
    key_strides,
    value,
    value_strides,
    agents,
    bias,
    bias_strides,
    gathered,
    lse,
    width,
    tokens,
    heads,
    span,
    parts,
    images,
    scale,
    AGENTS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    FLAT: tl.constexpr,
    UNIT: tl.constexpr,
    ALIGNED: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    """Agents attend to a part of the tokens: gathered [parts, B, n, heads, d], lse [parts, ...]."""
    tokens *= ALIGNED
    head, part, image = _program(heads, parts)
    n = tl.arange(0, BLOCK_N)
    a = _load_agents(agents, image, head, heads, AGENTS, HEAD_DIM, BLOCK_N, BLOCK_D)
    top = tl.full([BLOCK_N], _LOWEST, tl.float32)
    total = tl.zeros([BLOCK_N], tl.float32)
    mixed = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    for start in range(part * span * _STEP, tl.minimum((part + 1) * span * _STEP, tokens), BLOCK_T):
        token = start + tl.arange(0, BLOCK_T)
        there = token < tokens
        k = _load(
            key, key_strides, image, head, token, tokens, width, HEAD_DIM, BLOCK_D, FLAT, UNIT
        )
        v = _load(
            value, value_strides, image, head, token, tokens, width, HEAD_DIM, BLOCK_D, FLAT, UNIT
        )
        scores = tl.dot(a, tl.trans(k), input_precision=PRECISION) * (scale * _LOG2E)
        if bias is not None:
            row = (head * bias_strides[0] + n.to(tl.int64) * bias_strides[1]) * ALIGNED
            mask = (n < AGENTS)[:, None] & there[None, :]
            b = tl.load(bias + row[:, None] + token[None, :], mask=mask, other=0.0)
            scores += b.to(tl.float32) * _LOG2E
        scores += tl.where(there, 0.0, float("-inf"))[None, :]
        highest = tl.maximum(top, tl.max(scores, 1))
        weights = tl.exp2(scores - highest[:, None])
        shrink = tl.exp2(top - highest)
        total = total * shrink + tl.sum(weights, 1)
        mixed = tl.dot(weights.to(v.dtype), v, mixed * shrink[:, None], input_precision=PRECISION)
        top = highest
    total = tl.where(total > 0.0, total, 1.0)
    image += part.to(tl.int64) * images
    _store(gathered, mixed / total[:, None], image, n, AGENTS, head, heads, HEAD_DIM, BLOCK_D)
    _store_levels(lse, top + tl.log2(total), image, n, head, heads, AGENTS)


@triton.jit(do_not_specialize=["parts", "images"])
def _agent_fwd_combine_kernel(
    parts_gathered,
    parts_lse,
    gathered,
    lse,
    heads,
    parts,
    images,
    AGENTS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """What agents gathered from all parts."""
    head, _, image = _program(heads, 1)
    n = tl.arange(0, BLOCK_N)
    top = tl.full([BLOCK_N], _LOWEST, tl.float32)
    total = tl.zeros([BLOCK_N], tl.float32)
    mixed = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    for part in range(parts):
        at = part * images + image
        u = _load_agents(parts_gathered, at, head, heads, AGENTS, HEAD_DIM, BLOCK_N, BLOCK_D)
        level = _load_levels(parts_lse, at, n, head, heads, AGENTS)
        highest = tl.maximum(top, level)
        weight, shrink = tl.exp2(level - highest), tl.exp2(top - highest)
        total = total * shrink + weight
        mixed = mixed * shrink[:, None] + u * weight[:, None]
        top = highest
    _store(gathered, mixed / total[:, None], image, n, AGENTS, head, heads, HEAD_DIM, BLOCK_D)
    _store_levels(lse, top + tl.log2(total), image, n, head, heads, AGENTS)


@triton.jit(do_not_specialize=["width", "tokens", "span", "images"])
def _agent_fwd_read_kernel(
    query,
    query_strides,
    agents,
    gathered,
    bias,
    bias_strides,
    out,
    width,
    tokens,
    heads,
    span,
    images,
    scale,
    AGENTS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    FLAT: tl.constexpr,
    UNIT: tl.constexpr,
    ALIGNED: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    """A block of tokens attends to the agents, in one image of a group after the other."""
    tokens *= ALIGNED
    head, block, group = _program(heads, tl.cdiv(tokens, BLOCK_T))
    token = block * BLOCK_T + tl.arange(0, BLOCK_T)
    b = _bias(bias, bias_strides, head, token, tokens, AGENTS, BLOCK_N, ALIGNED)
    for image in range(group * span, tl.minimum((group + 1) * span, images)):
        q = _load(
            query, query_strides, image, head, token, tokens, width, HEAD_DIM, BLOCK_D, FLAT, UNIT
        )
        a = _load_agents(agents, image, head, heads, AGENTS, HEAD_DIM, BLOCK_N, BLOCK_D)
        u = _load_agents(gathered, image, head, heads, AGENTS, HEAD_DIM, BLOCK_N, BLOCK_D)
        scores = tl.dot(q, tl.trans(a), input_precision=PRECISION) * (scale * _LOG2E) + b
        weights, inverse = _weights(scores)
        mixed = tl.dot(weights.to(u.dtype), u, input_precision=PRECISION) * inverse[:, None]
        _store(out, mixed, image, token, tokens, head, heads, HEAD_DIM, BLOCK_D)


@triton.jit(do_not_specialize=["width", "tokens", "span", "parts", "images"])
def _agent_bwd_read_kernel(
    grad,
    grad_strides,
    query,
    query_strides,
    agents,
    gathered,
    bias,
    bias_strides,
    grad_gathered,
    grad_agents,
    width,
    tokens,
    heads,
    span,
    parts,
    images,
    scale,
    AGENTS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    FLAT: tl.constexpr,
    UNIT: tl.constexpr,
    ALIGNED: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    """What a part of the reading tokens wants of agents and of what these gathered.

    Both [parts, B, n, heads, d]; that of the agents is still to be scaled.
    """
    tokens *= ALIGNED
    head, part, image = _program(heads, parts)
    n = tl.arange(0, BLOCK_N)
    a = _load_agents(agents, image, head, heads, AGENTS, HEAD_DIM, BLOCK_N, BLOCK_D)
    u = _load_agents(gathered, image, head, heads, AGENTS, HEAD_DIM, BLOCK_N, BLOCK_D)
    grad_a = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    grad_u = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    for start in range(part * span * _STEP, tl.minimum((part + 1) * span * _STEP, tokens), BLOCK_T):
        token = start + tl.arange(0, BLOCK_T)
        q = _load(
            query, query_strides, image, head, token, tokens, width, HEAD_DIM, BLOCK_D, FLAT, UNIT
        )
        g = _load(
            grad, grad_strides, image, head, token, tokens, tokens, HEAD_DIM, BLOCK_D, FLAT, UNIT
        )
        b = _bias(bias, bias_strides, head, token, tokens, AGENTS, BLOCK_N, ALIGNED)
        weights, grads = _reading(q, g, a, u, b, scale, PRECISION)
        grad_u = tl.dot(tl.trans(weights.to(g.dtype)), g, grad_u, input_precision=PRECISION)
        grad_a = tl.dot(tl.trans(grads.to(q.dtype)), q, grad_a, input_precision=PRECISION)
    image += part.to(tl.int64) * images
    _store(grad_gathered, grad_u, image, n, AGENTS, head, heads, HEAD_DIM, BLOCK_D)
    _store(grad_agents, grad_a, image, n, AGENTS, head, heads, HEAD_DIM, BLOCK_D)


@triton.jit(do_not_specialize=["width", "tokens", "span", "parts", "images"])
def _agent_bwd_gather_kernel(
    key,
    key_strides,
    value,
    value_strides,
    agents,
    gathered,
    grad_gathered,
    lse,
    bias,
    bias_strides,
    grad_key,
    grad_value,
    grad_agents,
    width,
    tokens,
    heads,
    span,
    parts,
    images,
    scale,
    AGENTS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    FLAT: tl.constexpr,
    UNIT: tl.constexpr,
    ALIGNED: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    """Gradients of keys and values, and what a part of them wants of the agents, unscaled."""
    tokens *= ALIGNED
    head, part, image = _program(heads, parts)
    n = tl.arange(0, BLOCK_N)
    a = _load_agents(agents, image, head, heads, AGENTS, HEAD_DIM, BLOCK_N, BLOCK_D)
    u = _load_agents(gathered, image, head, heads, AGENTS, HEAD_DIM, BLOCK_N, BLOCK_D)
    grad_u = _load_agents(grad_gathered, image, head, heads, AGENTS, HEAD_DIM, BLOCK_N, BLOCK_D)
    delta = tl.sum(grad_u * u, 1)
    grad_u = grad_u.to(u.dtype)
    level = _load_levels(lse, image, n, head, heads, AGENTS)
    grad_a = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    for start in range(part * span * _STEP, tl.minimum((part + 1) * span * _STEP, tokens), BLOCK_T):
        token = start + tl.arange(0, BLOCK_T)
        k = _load(
            key, key_strides, image, head, token, tokens, width, HEAD_DIM, BLOCK_D, FLAT, UNIT
        )
        v = _load(
            value, value_strides, image, head, token, tokens, width, HEAD_DIM, BLOCK_D, FLAT, UNIT
        )
        b = _bias(bias, bias_strides, head, token, tokens, AGENTS, BLOCK_N, ALIGNED)
        b += tl.where(token < tokens, 0.0, float("-inf"))[:, None]
        weights, grads = _gathering(k, v, a, grad_u, level, delta, b, scale, PRECISION)
        grads = grads.to(k.dtype)
        grad_a = tl.dot(tl.trans(grads), k, grad_a, input_precision=PRECISION)
        grad_k = tl.dot(grads, a, input_precision=PRECISION) * scale
        grad_v = tl.dot(weights.to(v.dtype), grad_u, input_precision=PRECISION)
        _store(grad_key, grad_k, image, token, tokens, head, heads, HEAD_DIM, BLOCK_D)
        _store(grad_value, grad_v, image, token, tokens, head, heads, HEAD_DIM, BLOCK_D)
    image += part.to(tl.int64) * images
    _store(grad_agents, grad_a, image, n, AGENTS, head, heads, HEAD_DIM, BLOCK_D)


@triton.jit
def _store_bias(
    x, total, group, heads, head, token, tokens, AGENTS: tl.constexpr, BLOCK_N: tl.constexpr
):
    """A group's sum over images, of [groups, heads, AGENTS, tokens]."""
    n = tl.arange(0, BLOCK_N)
    at = x + ((group * heads + head) * AGENTS + n)[None, :] * tokens + token[:, None]
    tl.store(at, total, mask=(token < tokens)[:, None] & (n < AGENTS)[None, :])


@triton.jit(do_not_specialize=["height", "width", "wide", "tokens", "span", "images"])
def _agent_bwd_query_kernel(
    grad,
    grad_strides,
    query,
    query_strides,
    agents,
    gathered,
    grad_agents,
    bias,
    bias_strides,
    grad_query,
    grad_bias,
    height,
    width,
    wide,
    tokens,
    heads,
    span,
    images,
    scale,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    FLAT: tl.constexpr,
    UNIT: tl.constexpr,
    ALIGNED: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    """Gradient of a block of queries, which are in means too, in one image after the other.

    The map's ``height`` and ``width`` say to which means a token belongs: the last
    height * width tokens are positions. ``wide`` is the width as which queries are addressed.
    """
    tokens *= ALIGNED
    AGENTS: tl.constexpr = ROWS * COLUMNS
    head, block, group = _program(heads, tl.cdiv(tokens, BLOCK_T))
    token = block * BLOCK_T + tl.arange(0, BLOCK_T)
    n = tl.arange(0, BLOCK_N)
    top, bottom = _edges(n // COLUMNS, height, ROWS)
    left, right = _edges(n % COLUMNS, width, COLUMNS)
    position = token - (tokens - height * width)
    y, x = (position // width)[:, None], (position % width)[:, None]
    member = (y >= top[None, :]) & (y < bottom[None, :])
    member = member & (x >= left[None, :]) & (x < right[None, :])
    member = member & (position >= 0)[:, None]
    member = tl.where(member, 1.0, 0.0).to(query.dtype.element_ty)
    share = scale / ((bottom - top) * (right - left)).to(tl.float32)
    b = _bias(bias, bias_strides, head, token, tokens, AGENTS, BLOCK_N, ALIGNED)
    total = tl.zeros([BLOCK_T, BLOCK_N], tl.float32)
    for image in range(group * span, tl.minimum((group + 1) * span, images)):
        q = _load(
            query, query_strides, image, head, token, tokens, wide, HEAD_DIM, BLOCK_D, FLAT, UNIT
        )
        g = _load(
            grad, grad_strides, image, head, token, tokens, tokens, HEAD_DIM, BLOCK_D, FLAT, UNIT
        )
        a = _load_agents(agents, image, head, heads, AGENTS, HEAD_DIM, BLOCK_N, BLOCK_D)
        u = _load_agents(gathered, image, head, heads, AGENTS, HEAD_DIM, BLOCK_N, BLOCK_D)
        mean = (
            _load_agents(grad_agents, image, head, heads, AGENTS, HEAD_DIM, BLOCK_N, BLOCK_D)
            * share[:, None]
        )
        _, grads = _reading(q, g, a, u, b, scale, PRECISION)
        found = tl.dot(grads.to(a.dtype), a, input_precision=PRECISION) * scale
        found = tl.dot(member, mean.to(a.dtype), found, input_precision=PRECISION)
        _store(grad_query, found, image, token, tokens, head, heads, HEAD_DIM, BLOCK_D)
        if grad_bias is not None:
            total += grads
    if grad_bias is not None:
        _store_bias(grad_bias, total, group, heads, head, token, tokens, AGENTS, BLOCK_N)


@triton.jit(do_not_specialize=["width", "tokens", "span", "images"])
def _agent_bwd_bias_kernel(
    key,
    key_strides,
    value,
    value_strides,
    agents,
    gathered,
    grad_gathered,
    lse,
    bias,
    bias_strides,
    grad_bias,
    width,
    tokens,
    heads,
    span,
    images,
    scale,
    AGENTS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    FLAT: tl.constexpr,
    UNIT: tl.constexpr,
    ALIGNED: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    """Gradient of the agents' bias for a block of tokens, summed over a group of images."""
    tokens *= ALIGNED
    head, block, group = _program(heads, tl.cdiv(tokens, BLOCK_T))
    token = block * BLOCK_T + tl.arange(0, BLOCK_T)
    n = tl.arange(0, BLOCK_N)
    b = _bias(bias, bias_strides, head, token, tokens, AGENTS, BLOCK_N, ALIGNED)
    total = tl.zeros([BLOCK_T, BLOCK_N], tl.float32)
    for image in range(group * span, tl.minimum((group + 1) * span, images)):
        k = _load(
            key, key_strides, image, head, token, tokens, width, HEAD_DIM, BLOCK_D, FLAT, UNIT
        )
        v = _load(
            value, value_strides, image, head, token, tokens, width, HEAD_DIM, BLOCK_D, FLAT, UNIT
        )
        a = _load_agents(agents, image, head, heads, AGENTS, HEAD_DIM, BLOCK_N, BLOCK_D)
        u = _load_agents(gathered, image, head, heads, AGENTS, HEAD_DIM, BLOCK_N, BLOCK_D)
        grad_u = _load_agents(grad_gathered, image, head, heads, AGENTS, HEAD_DIM, BLOCK_N, BLOCK_D)
        delta = tl.sum(grad_u * u, 1)
        level = _load_levels(lse, image, n, head, heads, AGENTS)
        _, grads = _gathering(k, v, a, grad_u.to(u.dtype), level, delta, b, scale, PRECISION)
        total += grads
    _store_bias(grad_bias, total, group, heads, head, token, tokens, AGENTS, BLOCK_N)
