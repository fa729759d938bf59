"""Every backbone family; importing this registers them with timm."""

from vitarium.backbones.nat import *
