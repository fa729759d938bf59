"""FeatureBackbone as mmdet's detectors build it."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

from mmdet.registry import MODELS
from torch import Tensor, nn

from vitarium.heads import features
from vitarium.heads.mmdet.released import for_backbone


@MODELS.register_module()
class FeatureBackbone(features.FeatureBackbone):
    """Any backbone of vitarium or timm in an mmdet config.

    The state dict is that of :class:`vitarium.heads.features.FeatureBackbone`, and no parameter is
    left without a use, so distributed training needs no ``find_unused_parameters``. A neck's
    ``in_channels`` are the attribute ``channels``. Images are padded by the detector's data
    preprocessor: its ``pad_size_divisor`` should be a multiple of ``size_divisor``.

    Args:
        name: a model's name, with or without a tag.
        out_indices: ascending indices of the maps, from 0. None for all of them.
        task: ``det`` or ``seg`` for the form that the authors give their backbone there.
        pretrained: load the weights that the name's tag stands for.
        checkpoint: a file to load instead; of the classifier, of a detector around the backbone, or
            of this module.
        frozen_stages: how many stages, with all that comes before them, keep their parameters and
            statistics; -1 for none. mmdet's 0, the stem alone, is not offered.
        norm_eval: batch norms keep their running statistics in training.
        with_cp: recompute blocks in the backward pass instead of storing their intermediate values.
        init_cfg: None, or mmengine's ``dict(type="Pretrained", checkpoint=...)``, which is the same
            as ``checkpoint``. There is nothing else to initialise: a model is built initialised.
        **model_kwargs: further arguments of ``timm.create_model``, such as ``drop_path_rate``.

    Raises:
        ValueError: what :class:`vitarium.heads.features.FeatureBackbone` raises; another
            ``init_cfg``.
        CheckpointError: the weights cannot be had or read, or do not fit.
    """

    def __init__(
        self,
        name: str,
        out_indices: Sequence[int] | None = None,
        task: str | None = None,
        pretrained: bool = False,
        checkpoint: str | os.PathLike[str] | None = None,
        frozen_stages: int = -1,
        norm_eval: bool = False,
        with_cp: bool = False,
        init_cfg: Mapping[str, Any] | None = None,
        **model_kwargs: Any,
    ) -> None:
        if frozen_stages == 0 or frozen_stages < -1:
            raise ValueError(
                f"frozen_stages: expected -1 (none) or a number of stages, got {frozen_stages}"
            )
        if init_cfg is not None:
            if checkpoint is not None:
                raise ValueError(f"checkpoint: expected None beside init_cfg, got {checkpoint!r}")
            checkpoint = _checkpoint_of(init_cfg)
        self.norm_eval = False  # read by train(), which freeze() calls
        super().__init__(name, out_indices, task, checkpoint, pretrained=pretrained, **model_kwargs)
        self.norm_eval = norm_eval
        if with_cp:
            self.set_grad_checkpointing()
        self.freeze(max(frozen_stages, 0))

    def init_weights(self) -> None:
        """Leaves the weights as they are, random or loaded: mmengine calls this before training."""

    def train(self, mode: bool = True) -> FeatureBackbone:
        """Training mode, except for what is frozen and with ``norm_eval`` the batch norms."""
        super().train(mode)
        if mode and self.norm_eval:
            for module in self.modules():
                if isinstance(module, nn.modules.batchnorm._BatchNorm):
                    module.eval()
        return self

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *args: Any) -> None:
        """Takes the authors' names too, so that whatever loads a detector loads a released one."""
        names = [name for name in state_dict if name.startswith(prefix)]
        theirs = {name.removeprefix(prefix): state_dict.pop(name) for name in names}
        ours, _ = for_backbone(theirs, self)
        state_dict.update({prefix + name: x for name, x in ours.items()})
        super()._load_from_state_dict(state_dict, prefix, *args)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:  # type: ignore[override]
        """Image [B, in_chans, H, W] -> maps [B, channels[i], H / strides[i], W / strides[i]]."""
        return tuple(super().forward(x))


def _checkpoint_of(init_cfg: Mapping[str, Any]) -> str:
    if {*init_cfg} != {"type", "checkpoint"} or init_cfg["type"] != "Pretrained":
        raise ValueError(
            f"init_cfg: expected None or dict(type='Pretrained', checkpoint=...), got {init_cfg}"
        )
    return init_cfg["checkpoint"]
