"""Overlaps of boxes, and non-maximum suppression.

Boxes [N, 4] are x1, y1, x2, y2 in pixels; with ``offset`` 1 a box covers its last pixel, so its
width is ``x2 - x1 + 1``. Two boxes without area overlap by 0. Boxes of equal scores keep their
order; mmcv leaves it open.
"""

from __future__ import annotations

import torch
import torchvision
from torch import Tensor

from vitarium.heads.mmdet.operators._precision import operator, wide

__all__ = ["bbox_overlaps", "nms", "nms_match", "softnms"]

_NAIVE, _LINEAR = 0, 1  # mmcv's numbers of the methods of soft-NMS; 2 is gaussian


def _single(value: float) -> float:
    """A number rounded to float32, as mmcv's C++ takes thresholds.

    Against float32 overlaps this decides whether one that equals the threshold is above it: 0.3 is
    0.30000001 there.
    """
    return torch.tensor(value, dtype=torch.float32).item()


def _threshold(value: float, boxes: Tensor) -> float:
    return value if boxes.dtype == torch.float64 else _single(value)


@operator
def nms(boxes: Tensor, scores: Tensor, iou_threshold: float, offset: int) -> Tensor:
    """Indices of the boxes that no kept box with a higher score overlaps by more than a threshold.

    Args:
        boxes: [N, 4].
        scores: [N].
        iou_threshold: boxes are dropped above it, and kept at it.
        offset: 0 or 1.

    Returns:
        int64 [kept], by falling score.
    """
    boxes, scores = wide(boxes), wide(scores)
    common = torch.promote_types(boxes.dtype, scores.dtype)
    boxes, scores = boxes.to(common), scores.to(common)
    if offset:
        boxes = boxes + boxes.new_tensor([0, 0, offset, offset])
    return torchvision.ops.nms(boxes, scores, _threshold(iou_threshold, boxes))


def _overlaps(a: Tensor, b: Tensor, offset: int, of_first: bool = False) -> Tensor:
    """What boxes [..., 4] share, over what they cover together or over the first: [...]."""
    size = torch.minimum(a[..., 2:], b[..., 2:]) - torch.maximum(a[..., :2], b[..., :2]) + offset
    shared = size.clamp(min=0).prod(-1)
    whole = (a[..., 2:] - a[..., :2] + offset).prod(-1)
    if not of_first:
        whole = whole + (b[..., 2:] - b[..., :2] + offset).prod(-1) - shared
    return torch.where(shared > 0, shared / whole, 0)


@operator
def bbox_overlaps(
    bboxes1: Tensor, bboxes2: Tensor, ious: Tensor, mode: int, aligned: bool, offset: int
) -> None:
    """Fill ``ious`` with the overlaps of boxes.

    Args:
        bboxes1: [N, 4].
        bboxes2: [M, 4].
        ious: [N, M], or [N] of the pairs where boxes are aligned.
        mode: 0 for intersection over union, 1 for that over the area of the first box.
        aligned: whether box i is compared with box i only.
        offset: 0 or 1.
    """
    first, second = wide(bboxes1), wide(bboxes2)
    ious.copy_(_overlaps(first if aligned else first[:, None], second, offset, mode == 1))


@operator
def softnms(
    boxes: Tensor,
    scores: Tensor,
    dets: Tensor,
    iou_threshold: float,
    sigma: float,
    min_score: float,
    method: int,
    offset: int,
) -> Tensor:
    """Take the best box, lower the scores of those that overlap it, and again.

    Args:
        boxes: [N, 4].
        scores: [N].
        dets: [N, 5], whose first rows become the boxes taken and their scores at that time.
        iou_threshold: from which overlap on a score is lowered; gaussian lowers all.
        sigma: width of the gaussian.
        min_score: a box whose score falls below it is dropped; the first is taken in any case.
        method: 0 naive (the score becomes 0), 1 linear (times 1 - overlap), 2 gaussian.
        offset: 0 or 1.

    Returns:
        int64 [taken], in the order of ``dets``.
    """
    boxes, scores = wide(boxes), wide(scores)
    left = torch.arange(len(boxes), device=boxes.device)
    taken: list[Tensor] = []
    threshold = _threshold(iou_threshold, boxes)
    while len(left):
        best = scores.argmax()
        box = boxes[best]
        dets[len(taken), :4], dets[len(taken), 4] = box, scores[best]
        taken.append(left[best])
        overlaps = _overlaps(box, boxes, offset)
        if method == _NAIVE:
            scores = torch.where(overlaps >= threshold, 0, scores)
        elif method == _LINEAR:
            scores = torch.where(overlaps >= threshold, scores * (1 - overlaps), scores)
        else:
            scores = scores * (-overlaps.square() / sigma).exp()
        keep = scores >= min_score
        keep[best] = False
        boxes, scores, left = boxes[keep], scores[keep], left[keep]
    return torch.stack(taken) if taken else left


@operator
def nms_match(dets: Tensor, iou_threshold: float) -> list[list[int]]:
    """Every kept box with those that it suppresses.

    Args:
        dets: [N, 5], boxes and scores.
        iou_threshold: a box is suppressed at it and above.

    Returns:
        Groups of indices by falling score, the kept box first.
    """
    dets = wide(dets)
    threshold = _threshold(iou_threshold, dets)
    left = dets[:, 4].argsort(descending=True, stable=True)
    groups: list[list[int]] = []
    while len(left):
        best, others = left[0], left[1:]
        close = _overlaps(dets[best, :4], dets[others, :4], offset=0) >= threshold
        groups.append([int(best), *others[close].tolist()])
        left = others[~close]
    return groups
