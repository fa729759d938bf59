"""What mmcv compiles, on torch and torchvision: the module ``mmcv._ext`` where mmcv has none.

mmcv's Python files hold the public functions and their autograd, and call a compiled module by
name. The wheel mmcv-lite ships those files without that module, so ``import mmcv.ops`` fails. Here
the module is made of ordinary functions for any device; what is not among them raises when it is
called, not when it is imported.

All compute outside of autocast, in the precision of their arguments: float16 and bfloat16 are
computed in float32 and rounded once.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any, NoReturn

from vitarium.heads.mmdet.operators import attention, carafe, deform, focal, info, masked, nms, roi

_NAME = "mmcv._ext"
_TOPICS = (attention, carafe, deform, focal, info, masked, nms, roi)


class Extension(ModuleType):
    """A module with an attribute for every name: an operator, or a function that raises."""

    def __init__(self) -> None:
        super().__init__(_NAME, __doc__)
        self.__spec__ = ModuleSpec(_NAME, loader=None, origin=__name__)
        for topic in _TOPICS:
            for name in topic.__all__:
                setattr(self, name, getattr(topic, name))

    def __getattr__(self, name: str) -> Callable[..., NoReturn]:
        """The function that stands for an operator which is not provided."""
        if name.startswith("__"):
            raise AttributeError(f"module {_NAME!r} has no attribute {name!r}")

        def missing(*args: Any, **kwargs: Any) -> NoReturn:
            raise NotImplementedError(
                f"{name}: this operator of mmcv is not among those that vitarium provides; "
                f"it needs an mmcv that is compiled"
            )

        return missing


def provide() -> None:
    """Make ``mmcv.ops`` importable where mmcv was installed without compiled operators."""
    if _NAME not in sys.modules and importlib.util.find_spec(_NAME) is None:
        sys.modules[_NAME] = Extension()
