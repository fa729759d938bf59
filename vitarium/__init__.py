"""Efficient-attention vision backbones, registered with timm on import.

>>> import timm, vitarium
>>> model = timm.create_model("nat_tiny")
"""

from vitarium import backbones as backbones

__version__ = "0.1.0"
