"""Every backbone family; importing this registers them with timm."""

from vitarium.backbones.agent import *
from vitarium.backbones.biformer import *
from vitarium.backbones.dinat import *
from vitarium.backbones.dinat_isotropic import *
from vitarium.backbones.dinat_s import *
from vitarium.backbones.fused import *
from vitarium.backbones.nat import *
