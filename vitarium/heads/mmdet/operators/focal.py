"""Focal losses.

Paper: Focal Loss for Dense Object Detection (Lin et al., ICCV 2017, arXiv 1708.02002), equation 5.
Shapes: N examples, C classes. Probabilities below float32's smallest normal number count as that
number in logarithms. A weight [C] multiplies the loss of an example by that of its class; an empty
tensor stands for none.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vitarium.heads.mmdet.operators._precision import operator, wide

__all__ = [
    "sigmoid_focal_loss_backward",
    "sigmoid_focal_loss_forward",
    "softmax_focal_loss_backward",
    "softmax_focal_loss_forward",
]

_TINY = torch.finfo(torch.float32).tiny


def _log(p: Tensor) -> Tensor:
    return p.clamp(min=_TINY).log()


def _of_class(weight: Tensor, target: Tensor) -> Tensor | float:
    return wide(weight)[target] if weight.numel() else 1.0


@operator
def sigmoid_focal_loss_forward(
    input: Tensor, target: Tensor, weight: Tensor, output: Tensor, gamma: float, alpha: float
) -> None:
    """Fill ``output`` [N, C] with the loss of every class by itself.

    Args:
        input: logits [N, C].
        target: int64 [N]; a class out of range, such as C, stands for none of them.
        weight: [C] or empty.
        output: [N, C].
        gamma: exponent that lowers the loss of what is already right.
        alpha: weight of the class that is there; 1 - alpha that of the others.
    """
    p = wide(input).sigmoid()
    there = target[:, None] == torch.arange(input.shape[1], device=input.device)
    positive = -alpha * (1 - p).pow(gamma) * _log(p)
    negative = -(1 - alpha) * p.pow(gamma) * _log(1 - p)
    loss = torch.where(there, positive, negative)
    output.copy_(loss.mT.mul(_of_class(weight, target)).mT)


@operator
def sigmoid_focal_loss_backward(
    input: Tensor, target: Tensor, weight: Tensor, grad_input: Tensor, gamma: float, alpha: float
) -> None:
    """Fill ``grad_input`` [N, C] with the derivative of every loss by its logit."""
    p = wide(input).sigmoid()
    there = target[:, None] == torch.arange(input.shape[1], device=input.device)
    positive = -alpha * (1 - p).pow(gamma) * (1 - p - gamma * p * _log(p))
    negative = -(1 - alpha) * p.pow(gamma) * (gamma * (1 - p) * _log(1 - p) - p)
    slope = torch.where(there, positive, negative)
    grad_input.copy_(slope.mT.mul(_of_class(weight, target)).mT)


@operator
def softmax_focal_loss_forward(
    input: Tensor, target: Tensor, weight: Tensor, output: Tensor, gamma: float, alpha: float
) -> None:
    """Fill ``output`` [N] with the loss of the class that is there.

    Args:
        input: probabilities [N, C], the softmax of the logits.
        target: int64 [N]; negative for an example without a loss.
        weight: [C] or empty.
        output: [N].
        gamma: exponent that lowers the loss of what is already right.
        alpha: factor of all losses.
    """
    used, label = target >= 0, target.clamp(min=0)
    p = wide(input).gather(1, label[:, None])[:, 0]
    loss = -alpha * (1 - p).pow(gamma) * _log(p) * _of_class(weight, label)
    output.copy_(torch.where(used, loss, 0))


@operator
def softmax_focal_loss_backward(
    input: Tensor,
    target: Tensor,
    weight: Tensor,
    buff: Tensor,
    grad_input: Tensor,
    gamma: float,
    alpha: float,
) -> None:
    """Fill ``grad_input`` [N, C] with the derivative by the logits; ``buff`` is working memory."""
    probabilities = wide(input)
    used, label = target >= 0, target.clamp(min=0)
    p = probabilities.gather(1, label[:, None])[:, 0]
    slope = -(1 - p).pow(gamma) + gamma * (1 - p).pow(gamma - 1) * p * _log(p)
    slope = torch.where(used, alpha * slope * _of_class(weight, label), 0)
    one_hot = torch.nn.functional.one_hot(label, input.shape[1])
    grad_input.copy_(slope[:, None] * (one_hot - probabilities))
