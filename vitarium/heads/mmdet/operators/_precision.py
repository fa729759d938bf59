"""In what precision an operator computes."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import TypeVar

import torch
from torch import Tensor

_Result = TypeVar("_Result")


def operator(function: Callable[..., _Result]) -> Callable[..., _Result]:
    """The function without autocast and without autograd, as a compiled one runs.

    mmcv's ``autograd.Function`` calls it inside of autocast, which would change the precision of
    the products in it. Its first argument is a tensor.
    """

    @wraps(function)
    def run(tensor: Tensor, *args: object, **kwargs: object) -> _Result:
        with torch.no_grad(), torch.autocast(tensor.device.type, enabled=False):
            return function(tensor, *args, **kwargs)

    return run


def wide(tensor: Tensor) -> Tensor:
    """Half precision as float32; every other tensor as it is."""
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor
