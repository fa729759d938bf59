"""Detection with mmdet: FeatureBackbone in its registry, mmcv's operators without a compiler.

A config needs one line, ``custom_imports = dict(imports=["vitarium.heads.mmdet"])``, and then names
any model of vitarium or timm: ``backbone=dict(type="FeatureBackbone", name="nat_mini", ...)``.
Nearly all of mmdet imports mmcv's operators, so this package is imported first; mmengine imports
``custom_imports`` while it reads the config, which is early enough. A worker of a data loader that
is spawned and not forked reads no config: mmengine's ``mp_start_method`` stays ``fork``.
"""

from __future__ import annotations

try:
    import mmcv  # noqa: F401
    import mmdet  # noqa: F401
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        f'{error.name} is not installed: pip install "vitarium[det]"', name=error.name
    ) from error

from vitarium.heads.mmdet import operators, panoptic, stack
from vitarium.heads.mmdet.backbone import FeatureBackbone
from vitarium.heads.mmdet.released import load_detector

__all__ = ["FeatureBackbone", "load_detector"]

operators.provide()
panoptic.provide()
stack.mend()
