"""Efficient-attention vision backbones, registered with timm on import.

>>> import timm, vitarium
>>> model = timm.create_model("nat_tiny")
>>> model = vitarium.use_ops(timm.create_model("swin_tiny_patch4_window7_224"))
"""

from vitarium import backbones as backbones
from vitarium.backbones.fused import UsedOps as UsedOps
from vitarium.backbones.fused import restore as restore
from vitarium.backbones.fused import use_ops as use_ops
from vitarium.backbones.fused import used_ops as used_ops

__version__ = "0.1.0"
