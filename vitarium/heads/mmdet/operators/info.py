"""What mmcv's report of the environment asks the compiled module."""

from __future__ import annotations

__all__ = ["get_compiler_version", "get_compiling_cuda_version"]


def get_compiler_version() -> str:
    """The compiler of the operators."""
    return "none: vitarium's operators on torch and torchvision"


def get_compiling_cuda_version() -> str:
    """The CUDA version of the operators."""
    return "none: that of torch"
