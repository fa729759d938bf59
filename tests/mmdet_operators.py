"""mmcv's functions on vitarium's operators against loops in float64, on random cases.

    python tests/mmdet_operators.py [--cases 500] [--seed 0] [operator ...]

Prints a line per operator: the greatest error of its values and its gradients, relative to the
greatest value where that is above 1. The references are written from what mmcv computes, one number
at a time. Fails where an error is above 1e-6.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Callable, Iterator
from itertools import product

import numpy as np
import torch
from numpy.random import Generator
from torch import Tensor

import vitarium.heads.mmdet  # noqa: F401  (provides the operators)

from mmcv import ops  # isort: skip
from mmcv.ops.carafe import ext_module  # isort: skip
from mmcv.ops.multi_scale_deform_attn import MultiScaleDeformableAttnFunction  # isort: skip

TOLERANCE = 1e-6
Corner = tuple[float, int, int]


def error(got: Tensor | np.ndarray, expected: Tensor | np.ndarray) -> float:
    got, expected = np.asarray(got), np.asarray(expected)
    assert got.shape == expected.shape, (got.shape, expected.shape)
    if not expected.size:
        return 0.0
    return float(np.abs(got - expected).max() / max(1.0, np.abs(expected).max()))


def gradients(output: Tensor, leaves: list[Tensor], grad: np.ndarray) -> list[Tensor]:
    return list(torch.autograd.grad(output, leaves, torch.from_numpy(grad)))


def leaf(values: np.ndarray) -> Tensor:
    return torch.from_numpy(values).requires_grad_()


# Suppression


def boxes_and_scores(rng: Generator) -> tuple[np.ndarray, np.ndarray]:
    """Boxes on a coarse grid, so that overlaps meet thresholds, some without area, scores tie."""
    count = int(rng.integers(0, 25))
    corner = rng.integers(0, 8, (count, 2))
    boxes = np.concatenate([corner, corner + rng.integers(0, 6, (count, 2))], 1)
    dtype = rng.choice([np.float32, np.float64])
    scale = rng.choice([1, 0.25, 7.3])
    scores = rng.choice([rng.random(count), rng.integers(0, 5, count) / 8])
    return (boxes * scale).astype(dtype), scores.astype(dtype)


def overlap(a: np.ndarray, b: np.ndarray, offset: int) -> float:
    one = a.dtype.type
    width = max(one(0), min(a[2], b[2]) - max(a[0], b[0]) + one(offset))
    height = max(one(0), min(a[3], b[3]) - max(a[1], b[1]) + one(offset))
    areas = [(x[2] - x[0] + one(offset)) * (x[3] - x[1] + one(offset)) for x in (a, b)]
    shared = width * height
    return shared / (areas[0] + areas[1] - shared) if shared > 0 else one(0)


def threshold(rng: Generator) -> float:
    return float(rng.choice([0.1, 0.2, 0.25, 0.3, 0.5, 0.6, 0.7, 0.9, float(rng.random())]))


def bbox_overlaps(rng: Generator) -> float:
    (first, _), (second, _) = boxes_and_scores(rng), boxes_and_scores(rng)
    first, second = first.astype(np.float64), second.astype(np.float64)
    offset, aligned = int(rng.integers(0, 2)), bool(rng.integers(0, 2))
    mode = str(rng.choice(["iou", "iof"]))
    if aligned:
        first, second = first[: len(second)], second[: len(first)]
    expected = np.zeros((len(first), len(second)))
    for i, j in np.ndindex(*expected.shape):
        value = overlap(first[i], second[j], offset)
        if mode == "iof" and value:
            areas = [np.prod(x[2:] - x[:2] + offset) for x in (first[i], second[j])]
            value = value / (1 + value) * sum(areas) / areas[0]  # shared / (a + b) = v / (1 + v)
        expected[i, j] = value
    expected = expected.diagonal() if aligned else expected
    arrays = torch.from_numpy(first), torch.from_numpy(second)
    return error(ops.bbox_overlaps(*arrays, mode, aligned, offset), expected)


def by_score(scores: np.ndarray) -> list[int]:
    return sorted(range(len(scores)), key=lambda i: (-scores[i], i))


def nms(rng: Generator) -> float:
    boxes, scores = boxes_and_scores(rng)
    limit, offset = threshold(rng), int(rng.integers(0, 2))
    low = float(rng.choice([0.0, 0.2]))
    most = int(rng.choice([-1, 3]))
    left = [i for i in by_score(scores) if low == 0 or scores[i] > low]
    kept = []
    while left:
        best, *left = left
        kept.append(best)
        bound = boxes.dtype.type(limit)
        left = [i for i in left if not overlap(boxes[best], boxes[i], offset) > bound]
    kept = kept[:most] if most > 0 else kept
    dets, got = ops.nms(boxes, scores, limit, offset, score_threshold=low, max_num=most)
    assert got.tolist() == kept, (got, kept, boxes, scores, limit, offset)
    return error(dets, np.concatenate([boxes[kept], scores[kept, None]], 1))


def soft_nms(rng: Generator) -> float:
    boxes, scores = boxes_and_scores(rng)
    limit, offset, sigma = threshold(rng), int(rng.integers(0, 2)), 0.2 + rng.random()
    low = float(rng.choice([1e-3, 0.1, 0.3]))
    method = str(rng.choice(["naive", "linear", "gaussian"]))
    left, now, kept = [*range(len(boxes))], scores.copy(), []
    bound = boxes.dtype.type(limit)
    while left:
        best = max(left, key=lambda i: (now[i], -i))
        kept.append(best)
        left.remove(best)
        for i in left:
            shared = overlap(boxes[best], boxes[i], offset)
            if method == "gaussian":
                now[i] *= np.exp(-(shared * shared) / boxes.dtype.type(sigma))
            elif shared >= bound:
                now[i] *= 0 if method == "naive" else 1 - shared
        left = [i for i in left if now[i] >= boxes.dtype.type(low)]
    dets, got = ops.soft_nms(boxes, scores, limit, sigma, low, method, offset)
    assert got.tolist() == kept, (got, kept)
    return error(dets, np.concatenate([boxes[kept], now[kept, None]], 1))


def nms_match(rng: Generator) -> float:
    boxes, scores = boxes_and_scores(rng)
    limit = threshold(rng)
    left, groups = by_score(scores), []
    while left:
        best, *left = left
        close = [i for i in left if overlap(boxes[best], boxes[i], 0) >= boxes.dtype.type(limit)]
        groups.append([best, *close])
        left = [i for i in left if i not in close]
    dets = torch.from_numpy(np.concatenate([boxes, scores[:, None]], 1))
    got = [group.tolist() for group in ops.nms_match(dets, limit)]
    assert got == groups, (got, groups)
    return 0.0


# Regions


def regions(rng: Generator, scale: float) -> tuple[np.ndarray, np.ndarray]:
    B, C, H, W = (int(rng.integers(1, n)) for n in (3, 4, 9, 9))
    count = int(rng.integers(0, 4))
    corner = rng.uniform(-3, 10, (count, 2)) / scale
    extent = rng.uniform(0, 9, (count, 2)) * rng.choice([0, 1], (count, 2), p=[0.1, 0.9]) / scale
    if rng.random() < 0.3:
        corner, extent = corner.round(), extent.round()
    image = rng.integers(0, B, (count, 1))
    return rng.standard_normal((B, C, H, W)), np.concatenate([image, corner, corner + extent], 1)


def around(y: float, x: float, height: int, width: int) -> list[Corner]:
    """The pixels that a point of RoIAlign is interpolated from, with their weights."""
    if y < -1 or y > height or x < -1 or x > width:
        return []
    y, x = max(y, 0.0), max(x, 0.0)
    rows, columns = [int(y), int(y) + 1], [int(x), int(x) + 1]
    if rows[0] >= height - 1:
        rows, y = [height - 1, height - 1], float(height - 1)
    if columns[0] >= width - 1:
        columns, x = [width - 1, width - 1], float(width - 1)
    down, across = y - rows[0], x - columns[0]
    return [
        ((1 - down) * (1 - across), rows[0], columns[0]),
        ((1 - down) * across, rows[0], columns[1]),
        (down * (1 - across), rows[1], columns[0]),
        (down * across, rows[1], columns[1]),
    ]


def roi_align(rng: Generator) -> float:
    scale = float(rng.choice([1, 0.5, 0.25]))
    maps, rois = regions(rng, scale)
    PH, PW, ratio = (int(rng.integers(a, 4)) for a in (1, 1, 0))
    aligned, mode = bool(rng.integers(0, 2)), str(rng.choice(["avg", "max"]))
    _, C, H, W = maps.shape
    output, into = np.zeros((len(rois), C, PH, PW)), np.zeros_like(maps)
    grad = rng.standard_normal(output.shape)
    for r, (image, *corners) in enumerate(rois):
        b = int(image)
        x1, y1, x2, y2 = (c * scale - (0.5 if aligned else 0) for c in corners)
        width, height = x2 - x1, y2 - y1
        if not aligned:
            width, height = max(width, 1.0), max(height, 1.0)
        step = (height / PH, width / PW)
        ny, nx = (ratio, ratio) if ratio else (math.ceil(step[0]), math.ceil(step[1]))
        for i, j, c in product(range(PH), range(PW), range(C)):
            shown = []
            for p, q in product(range(ny), range(nx)):
                y = y1 + i * step[0] + (p + 0.5) * step[0] / ny
                x = x1 + j * step[1] + (q + 0.5) * step[1] / nx
                corners = around(y, x, H, W)
                shown.append((sum(w * maps[b, c, h, v] for w, h, v in corners), corners))
            if not shown:
                continue
            if mode == "avg":
                output[r, c, i, j] = sum(value for value, _ in shown) / len(shown)
                taken = [(w / len(shown), h, v) for _, corners in shown for w, h, v in corners]
            else:
                output[r, c, i, j], taken = max(shown, key=lambda s: s[0])
            for w, h, v in taken:
                into[b, c, h, v] += w * grad[r, c, i, j]
    x = leaf(maps)
    got = ops.roi_align(x, torch.from_numpy(rois), (PH, PW), scale, ratio, mode, aligned)
    return max(error(got.detach(), output), error(gradients(got, [x], grad)[0], into))


def roi_pool(rng: Generator) -> float:
    scale = float(rng.choice([1, 0.5, 0.25]))
    maps, rois = regions(rng, scale)
    if rng.random() < 0.5:
        maps = maps.round()  # equal pixels: the first one counts
    if len(rois) and rng.random() < 0.2:
        rois[0, 3] = rois[0, 1] - 2 / scale  # ends before it begins
    PH, PW = int(rng.integers(1, 4)), int(rng.integers(1, 4))
    _, C, H, W = maps.shape
    output, into = np.zeros((len(rois), C, PH, PW)), np.zeros_like(maps)
    grad = rng.standard_normal(output.shape)
    for r, (image, x1, y1, x2, y2) in enumerate(rois):
        b = int(image)
        x1, y1, x2, y2 = x1 * scale, y1 * scale, (x2 + 1) * scale, (y2 + 1) * scale
        if x2 <= x1 or y2 <= y1:
            continue
        step = ((y2 - y1) / PH, (x2 - x1) / PW)
        for i, j, c in product(range(PH), range(PW), range(C)):
            top, left = math.floor(i * step[0] + y1), math.floor(j * step[1] + x1)
            bottom, right = math.ceil((i + 1) * step[0] + y1), math.ceil((j + 1) * step[1] + x1)
            pixels = [
                *product(range(max(top, 0), min(bottom, H)), range(max(left, 0), min(right, W)))
            ]
            if pixels:
                best = max(pixels, key=lambda p: maps[b, c, p[0], p[1]])
                output[r, c, i, j] = maps[b, c, best[0], best[1]]
                into[b, c, best[0], best[1]] += grad[r, c, i, j]
    x = leaf(maps)
    got = ops.roi_pool(x, torch.from_numpy(rois), (PH, PW), scale)
    return max(error(got.detach(), output), error(gradients(got, [x], grad)[0], into))


# Deformable convolution and attention


def taps(
    y: float, x: float, height: int, width: int
) -> Iterator[tuple[float, float, float, int, int]]:
    """Of the pixels that show at a point: weight, its slopes by y and by x, row and column."""
    if y <= -1 or y >= height or x <= -1 or x >= width:
        return
    top, left = math.floor(y), math.floor(x)
    for row, down, slope_y in ((top, top + 1 - y, -1), (top + 1, y - top, 1)):
        for column, across, slope_x in ((left, left + 1 - x, -1), (left + 1, x - left, 1)):
            if 0 <= row < height and 0 <= column < width:
                yield down * across, slope_y * across, slope_x * down, row, column


def deform(rng: Generator, modulated: bool) -> float:
    groups, deform_groups = int(rng.integers(1, 3)), int(rng.integers(1, 3))
    B, per_group, per_out = (
        int(rng.integers(1, 3)),
        int(rng.integers(1, 3)),
        int(rng.integers(1, 3)),
    )
    C, CO = groups * deform_groups * per_group, groups * per_out
    KH, KW, H, W = (int(rng.integers(a, b)) for a, b in ((1, 4), (1, 4), (4, 7), (4, 7)))
    stride, padding, dilation = (tuple(int(n) for n in rng.integers(a, 3, 2)) for a in (1, 0, 1))
    HO, WO = (
        (n + 2 * p - d * (k - 1) - 1) // s + 1
        for n, p, d, k, s in zip((H, W), padding, dilation, (KH, KW), stride, strict=True)
    )
    if HO < 1 or WO < 1:
        return deform(rng, modulated)
    size = (HO, WO)
    if modulated and rng.random() < 0.3:
        size = (HO + int(rng.integers(0, 2)), WO + 1)  # read as flat memory
    x, weight = rng.standard_normal((B, C, H, W)), rng.standard_normal((CO, C // groups, KH, KW))
    offset = rng.standard_normal((B, 2 * deform_groups * KH * KW, *size)) * 2
    offset[rng.random(offset.shape) < 0.4] = 0  # on the border's line: -1 where padding is 1
    mask = rng.random((B, deform_groups * KH * KW, *size)) if modulated else np.ones(0)
    bias = rng.standard_normal(CO) if modulated and rng.random() < 0.7 else None
    output = np.zeros((B, CO, HO, WO)) + (0 if bias is None else bias[:, None, None])
    grad = rng.standard_normal(output.shape)
    into = [np.zeros_like(a) for a in (x, weight, offset, mask)]
    by_x, by_weight, by_offset, by_mask = into
    for b, i, j, u, v, c in product(*map(range, (B, HO, WO, KH, KW, C))):
        g, d = c // (C // groups), c // (C // deform_groups)
        tap = (d * KH + u) * KW + v
        places = [
            np.unravel_index((2 * tap + axis) * HO * WO + i * WO + j, offset.shape[1:])
            for axis in (0, 1)
        ]
        y_at, x_at = ((b, *place) for place in places)
        y = i * stride[0] - padding[0] + u * dilation[0] + offset[y_at]
        z = j * stride[1] - padding[1] + v * dilation[1] + offset[x_at]
        at = (
            (b, *np.unravel_index(tap * HO * WO + i * WO + j, mask.shape[1:]))
            if modulated
            else None
        )
        factor = 1.0 if at is None else mask[at]
        rows = slice(g * (CO // groups), (g + 1) * (CO // groups))
        kernel = weight[rows, c % (C // groups), u, v]
        pull = float(kernel @ grad[b, rows, i, j])
        shown = 0.0
        for w, slope_y, slope_x, row, column in taps(y, z, H, W):
            pixel = x[b, c, row, column]
            shown += w * pixel
            by_x[b, c, row, column] += pull * factor * w
            by_offset[y_at] += pull * factor * slope_y * pixel
            by_offset[x_at] += pull * factor * slope_x * pixel
        output[b, rows, i, j] += kernel * shown * factor
        by_weight[rows, c % (C // groups), u, v] += grad[b, rows, i, j] * shown * factor
        if at is not None:
            by_mask[at] += pull * shown
    leaves = [leaf(a) for a in (x, weight, offset, mask)]
    shape = (stride, padding, dilation, groups, deform_groups)
    if not modulated:
        got = ops.deform_conv2d(
            leaves[0], leaves[2], leaves[1], *shape, False, 1 + rng.integers(0, 2) * 31
        )
        leaves.pop()
    else:
        shift = None if bias is None else leaf(bias)
        got = ops.modulated_deform_conv2d(leaves[0], leaves[2], leaves[3], leaves[1], shift, *shape)
        if shift is not None:
            leaves.append(shift)
            into.append(grad.sum((0, 2, 3)))
    worst = error(got.detach(), output)
    for have, want in zip(gradients(got, leaves, grad), into, strict=False):
        worst = max(worst, error(have, want))
    return worst


def deform_conv(rng: Generator) -> float:
    return deform(rng, modulated=False)


def modulated_deform_conv(rng: Generator) -> float:
    return deform(rng, modulated=True)


def ms_deform_attn(rng: Generator) -> float:
    B, Q, heads, L, P, D = (int(n) for n in rng.integers(1, 4, 6))
    shapes = [(int(h), int(w)) for h, w in rng.integers(1, 5, (L, 2))]
    starts = np.cumsum([0] + [h * w for h, w in shapes])
    value = rng.standard_normal((B, int(starts[-1]), heads, D))
    places = rng.uniform(-0.4, 1.4, (B, Q, heads, L, P, 2))
    weights = rng.random(places.shape[:-1])
    output = np.zeros((B, Q, heads, D))
    grad = rng.standard_normal((B, Q, heads * D))
    by_value, by_place, by_weight = (np.zeros_like(a) for a in (value, places, weights))
    for at in np.ndindex(*weights.shape):
        b, q, head, level, _ = at
        H, W = shapes[level]
        pull = grad[b, q].reshape(heads, D)[head]
        y, x = places[at][1] * H - 0.5, places[at][0] * W - 0.5
        for w, slope_y, slope_x, row, column in taps(y, x, H, W):
            pixel = value[b, starts[level] + row * W + column, head]
            output[b, q, head] += weights[at] * w * pixel
            by_value[b, starts[level] + row * W + column, head] += weights[at] * w * pull
            by_weight[at] += w * (pull @ pixel)
            by_place[at] += weights[at] * (pull @ pixel) * np.array([slope_x * W, slope_y * H])
    leaves = [leaf(a) for a in (value, places, weights)]
    got = MultiScaleDeformableAttnFunction.apply(
        leaves[0], torch.tensor(shapes), torch.from_numpy(starts[:-1]), *leaves[1:], 64
    )
    pairs = zip(gradients(got, leaves, grad), (by_value, by_place, by_weight), strict=True)
    value_error = error(got.detach(), output.reshape(B, Q, -1))
    return max(value_error, *(error(have, want) for have, want in pairs))


# Losses


def log(p: float) -> float:
    return math.log(max(p, float(np.finfo(np.float32).tiny)))


def sigmoid_focal_loss(rng: Generator) -> float:
    N, C = int(rng.integers(0, 6)), int(rng.integers(1, 6))
    gamma, alpha = float(rng.choice([0, 0.5, 2.0, 3.1])), float(rng.random())
    weight = rng.random(C) if rng.random() < 0.5 else None
    # Some logits far out; a class out of range stands for none, where no weight is asked for.
    logits = rng.standard_normal((N, C)) * rng.choice([1, 30], (N, 1))
    target = rng.integers(0, C + (weight is None), N)
    loss, slope = np.zeros((N, C)), np.zeros((N, C))
    for n, c in np.ndindex(N, C):
        p = 1 / (1 + math.exp(-logits[n, c]))
        factor = 1.0 if weight is None else weight[target[n]]
        if target[n] == c:
            loss[n, c] = -alpha * (1 - p) ** gamma * log(p) * factor
            slope[n, c] = -alpha * (1 - p) ** gamma * (1 - p - gamma * p * log(p)) * factor
        else:
            loss[n, c] = -(1 - alpha) * p**gamma * log(1 - p) * factor
            slope[n, c] = -(1 - alpha) * p**gamma * (gamma * (1 - p) * log(1 - p) - p) * factor
    x = leaf(logits)
    kinds = ("none", "sum", "mean") if N else ("none", "sum")
    kind = str(rng.choice(kinds))
    factor = None if weight is None else torch.from_numpy(weight)
    got = ops.sigmoid_focal_loss(x, torch.from_numpy(target), gamma, alpha, factor, kind)
    by = torch.autograd.grad(got.sum(), x)[0]
    count = N if kind == "mean" else 1
    expected = loss if kind == "none" else np.array(loss.sum() / count)
    return max(error(got.detach(), expected), error(by, slope / count))


def softmax_focal_loss(rng: Generator) -> float:
    N, C = int(rng.integers(1, 6)), int(rng.integers(2, 6))
    gamma, alpha = float(rng.choice([0.5, 2.0, 3.1])), float(rng.random())
    weight = rng.random(C) if rng.random() < 0.5 else None
    logits, target = rng.standard_normal((N, C)) * 2, rng.integers(-1, C, N)
    loss, slope = np.zeros(N), np.zeros((N, C))
    for n in range(N):
        if target[n] < 0:
            continue
        powers = np.exp(logits[n] - logits[n].max())
        probabilities = powers / powers.sum()
        p = probabilities[target[n]]
        factor = alpha * (1.0 if weight is None else weight[target[n]])
        loss[n] = -factor * (1 - p) ** gamma * log(p)
        by_log = factor * (gamma * (1 - p) ** (gamma - 1) * p * log(p) - (1 - p) ** gamma)
        slope[n] = by_log * (np.eye(C)[target[n]] - probabilities)
    x = leaf(logits)
    factor = None if weight is None else torch.from_numpy(weight)
    got = ops.softmax_focal_loss(x, torch.from_numpy(target), gamma, alpha, factor, "sum")
    by = torch.autograd.grad(got, x)[0]
    return max(error(got.detach(), np.array(loss.sum())), error(by, slope))


# Masked convolution, reassembly


def masked_conv2d(rng: Generator) -> float:
    C, CO, H, W = (int(n) for n in rng.integers(1, 6, 4))
    KH, KW = int(rng.choice([1, 3, 5])), int(rng.choice([1, 3]))
    PH, PW = KH // 2 + int(rng.integers(0, 2)), KW // 2
    x, weight, bias = (rng.standard_normal(s) for s in ((1, C, H, W), (CO, C, KH, KW), CO))
    mask = rng.random((1, H, W)) < rng.choice([0, 0.5, 1])
    output = np.zeros((1, CO, H + 2 * PH - KH + 1, W + 2 * PW - KW + 1))
    for _, i, j in np.argwhere(mask):
        output[0, :, i, j] = bias
        for u, v in np.ndindex(KH, KW):
            row, column = i + u - PH, j + v - PW
            if 0 <= row < H and 0 <= column < W:
                output[0, :, i, j] += weight[:, :, u, v] @ x[0, :, row, column]
    arrays = (torch.from_numpy(a) for a in (x, mask.astype(float), weight, bias))
    return error(ops.masked_conv2d(*arrays, (PH, PW)), output)


def reassembly(rng: Generator) -> tuple[list[np.ndarray], tuple[int, int, int]]:
    """Features, masks, output, its gradient, and the gradients of the first two."""
    K, groups, scale = int(rng.choice([1, 3, 5])), int(rng.integers(1, 3)), int(rng.integers(1, 4))
    B, C, H, W = int(rng.integers(1, 3)), groups * int(rng.integers(1, 3)), *rng.integers(1, 5, 2)
    x = rng.standard_normal((B, C, H, W))
    masks = rng.standard_normal((B, groups * K * K, H * scale, W * scale))
    output = np.zeros((B, C, H * scale, W * scale))
    grad, by_x, by_masks = rng.standard_normal(output.shape), np.zeros_like(x), np.zeros_like(masks)
    for b, c, i, j, u, v in np.ndindex(*output.shape, K, K):
        row, column = i // scale + u - K // 2, j // scale + v - K // 2
        if 0 <= row < H and 0 <= column < W:
            at = (b, (c // (C // groups) * K + u) * K + v, i, j)
            output[b, c, i, j] += x[b, c, row, column] * masks[at]
            by_x[b, c, row, column] += masks[at] * grad[b, c, i, j]
            by_masks[at] += x[b, c, row, column] * grad[b, c, i, j]
    return [x, masks, output, grad, by_x, by_masks], (K, groups, scale)


def carafe(rng: Generator) -> float:
    (x, masks, output, grad, *by), shape = reassembly(rng)
    leaves = [leaf(x), leaf(masks)]
    got = ops.carafe(*leaves, *shape)
    pairs = zip(gradients(got, leaves, grad), by, strict=True)
    return max(error(got.detach(), output), *(error(have, want) for have, want in pairs))


def carafe_naive(rng: Generator) -> float:
    """mmcv's own function refuses gradients on a CPU: what it calls is called here."""
    (x, masks, output, grad, *by), shape = reassembly(rng)
    got = ops.carafe_naive(torch.from_numpy(x), torch.from_numpy(masks), *shape)
    into = [torch.zeros(x.shape).double(), torch.zeros(masks.shape).double()]
    names = ("kernel_size", "group_size", "scale_factor")
    ext_module.carafe_naive_backward(
        *(torch.from_numpy(a) for a in (grad, x, masks)),
        *into,
        **dict(zip(names, shape, strict=True)),
    )
    return max(error(got, output), error(into[0], by[0]), error(into[1], by[1]))


CASES: dict[str, Callable[[Generator], float]] = {
    case.__name__: case
    for case in (
        bbox_overlaps,
        nms,
        soft_nms,
        nms_match,
        roi_align,
        roi_pool,
        deform_conv,
        modulated_deform_conv,
        ms_deform_attn,
        sigmoid_focal_loss,
        softmax_focal_loss,
        masked_conv2d,
        carafe,
        carafe_naive,
    )
}


def worst(name: str, cases: int, seed: int) -> float:
    """The greatest error of an operator; each case has a generator of its own."""
    return max(CASES[name](np.random.default_rng([seed, case])) for case in range(cases))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    every = [[], *CASES]  # argparse compares the default with the choices too
    parser.add_argument("operators", nargs="*", choices=every, help="all by default")
    parser.add_argument("--cases", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    failed = False
    for name in args.operators or CASES:
        start = time.perf_counter()
        value = worst(name, args.cases, args.seed)
        failed |= value > TOLERANCE
        seconds = time.perf_counter() - start
        print(f"{name:22} {args.cases} cases  worst error {value:.1e}  {seconds:.1f} s", flush=True)
    return int(failed)


if __name__ == "__main__":
    torch.set_num_threads(1)
    sys.exit(main())
