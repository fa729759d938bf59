"""Feature pyramids: the one form in which heads see a backbone."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

import timm
from timm.layers import Format
from timm.models._features import FeatureGetterNet
from timm.models._manipulate import group_with_matcher
from torch import Tensor, nn

from vitarium import checkpoints
from vitarium.backbones._registry import entries, released
from vitarium.tools.list import did_you_mean

_TASKS = ("det", "seg")
_SOURCES = ("state_dict", "file", "url", "hf_hub_id")  # of weights, in timm's overlay


class FeatureBackbone(nn.Module):
    """Any backbone of vitarium or timm as a list of feature maps [B, C, H, W].

    >>> backbone = FeatureBackbone("nat_mini", task="det")
    >>> backbone.channels, backbone.strides
    ((64, 128, 256, 512), (4, 8, 16, 32))

    Args:
        name: a model's name, with or without a tag; also that of a released detector or segmenter,
            ``nat_mini.shi_mask_rcnn_3x_coco``, whose ``task`` it implies and whose backbone
            ``pretrained=True`` loads.
        out_indices: ascending indices of the maps, from 0; negative ones count from the last
            one. None for all maps of a vitarium model, and for timm's own choice of another.
        task: ``det`` or ``seg`` for the form that a family's authors give their backbone in
            detection or segmentation, such as a norm for each map or other dilations; None for
            the maps as they are in the classifier.
        checkpoint: a file, or what such a file holds, to load: of the classifier, of a detector
            around the backbone, or of this module.
        **model_kwargs: further arguments of ``timm.create_model``.

    Attributes:
        channels: of each map.
        strides: of each map, in pixels; sizes are rounded up in vitarium's models.
        out_indices: of each map, none negative.
        num_stages: how many maps the model has to choose from.
        size_divisor: what a side of an image, in pixels, must be a multiple of for maps that cover
            it: 1 for vitarium's models, which pad where they must; the last stride for timm's.
        min_size: of the shorter side of an image, in pixels.
        pretrained_cfg: timm's description of the model's weights and of the images it expects.

    Raises:
        ValueError: an unknown name, indices out of range or order, an unknown task, or one for
            which the family has no form of its own or the released file is not; a checkpoint
            beside the pretrained one.
        CheckpointError: the checkpoint cannot be had or read, or does not fit.
    """

    def __init__(
        self,
        name: str,
        out_indices: Sequence[int] | None = None,
        task: str | None = None,
        checkpoint: str | os.PathLike[str] | Mapping[str, Any] | None = None,
        **model_kwargs: Any,
    ) -> None:
        super().__init__()
        if task is not None and task not in _TASKS:
            raise ValueError(f"task: expected None or one of {_TASKS}, got {task!r}")
        entry, _, tag = name.partition(".")
        known = _names(with_tags=bool(tag))
        if not timm.is_model(name) or (tag and name not in known):
            hint = did_you_mean(name, known)
            raise ValueError(f"name: expected a model of vitarium or timm, got {name!r}{hint}")
        family = entries().get(entry)
        weight = released(entry).get(name)
        if weight is not None and weight.task in _TASKS:
            if task not in (None, weight.task):
                raise ValueError(f"task: expected None or {weight.task!r} of {name}, got {task!r}")
            if model_kwargs.pop("pretrained", False):
                if checkpoint is not None:
                    raise ValueError(
                        f"checkpoint: expected None with the weights of {name}, got another one"
                    )
                overlay = model_kwargs.get("pretrained_cfg_overlay") or {}
                for key in ("checkpoint_path", *_SOURCES):
                    if {**overlay, **model_kwargs}.get(key) is not None:
                        raise ValueError(
                            f"{key}: expected none with the weights of {name}; a file of your own "
                            f"is given as checkpoint, without pretrained"
                        )
                cache_dir = model_kwargs.pop("cache_dir", None)
                checkpoint = checkpoints.fetch(weight, name, cache_dir=cache_dir)
            name, task = entry, weight.task
        adapter = getattr(family, "dense_adapter", None)
        if task is not None and adapter is None:
            raise ValueError(f"task: expected None, {name} has no form of its own, got {task!r}")
        self._ignored: dict[str, str] = {}
        self._groups: Any = None  # patterns of the stages' parameters
        self._frozen = False
        model: Any
        if family is None:
            self.model = model = _timm_features(name, out_indices, model_kwargs)
            info = model.feature_info
            self.out_indices = _ascending(name, info.out_indices, len(info))
        else:
            adapt_kwargs = getattr(family, "dense_kwargs", None)
            if task is not None and adapt_kwargs is not None:
                model_kwargs = adapt_kwargs(entry, task, model_kwargs)
            model = timm.create_model(name, **model_kwargs)
            self._groups = model.group_matcher(coarse=True)
            info = model.feature_info
            self.out_indices = _ascending(name, out_indices, len(info))
            whole = {*model.state_dict(), f"{model.pretrained_cfg['classifier']}.*"}
            if adapter is not None and task is not None:
                self.model = adapter(model, task, self.out_indices)
                others = [i for i in range(len(info)) if i not in self.out_indices]
                norms = {f"{norm}{i}.*" for norm in ("norm", "extra_norms.") for i in others}
                unused = norms | whole - self.model.state_dict().keys()
            else:
                self.model = FeatureGetterNet(model, self.out_indices)
                unused = whole - model.state_dict().keys()
            self._ignored = dict.fromkeys(sorted(unused), "no output depends on it")
        self.pretrained_cfg: dict[str, Any] = model.pretrained_cfg
        self.channels = tuple(info[i]["num_chs"] for i in self.out_indices)
        self.strides = tuple(info[i]["reduction"] for i in self.out_indices)
        self.num_stages = len(info)
        self.size_divisor = max(self.strides) if family is None else 1
        least = self.pretrained_cfg.get("min_input_size") or (3, 0, 0)
        self.min_size = max(self.size_divisor, *least[1:])
        self._channels_last = _is_channels_last(name, self.model)
        if checkpoint is not None:
            checkpoints.load(self, checkpoint)

    def checkpoint_ignore(self) -> dict[str, str]:
        """Names of tensors that a classifier's checkpoint has and this module needs not: why."""
        return self._ignored

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute blocks in the backward pass instead of storing their intermediate values."""
        method = "set_grad_checkpointing"
        owner: Any = next(m for m in self.model.modules() if hasattr(m, method))
        owner.set_grad_checkpointing(enable)

    def freeze(self, stages: int | bool) -> None:
        """Let the first stages keep their parameters and statistics, in training too.

        Args:
            stages: how many of ``num_stages``, with all that comes before them; they are what
                timm's ``group_matcher`` says. True for the whole backbone, also its norms.

        Raises:
            ValueError: more stages than the model has, or a negative number.
        """
        if not 0 <= stages <= self.num_stages:
            raise ValueError(
                f"freeze: expected True or 0 to {self.num_stages} stages, got {stages}"
            )
        frozen = self.parameters() if stages is True else self._first(int(stages))
        for parameter in frozen:
            parameter.requires_grad_(False)
        self._frozen = stages > 0
        self.train(self.training)

    def _first(self, stages: int) -> list[nn.Parameter]:
        """Parameters of the stem and of the first stages; none for 0."""
        if stages == 0:
            return []
        owner = next((m for m in self.model.modules() if hasattr(m, "group_matcher")), self.model)
        groups = self._groups
        if groups is None and owner is not self.model:
            groups = owner.group_matcher(coarse=True)
        if groups is not None:
            named = group_with_matcher(owner.named_parameters(), groups, return_values=True)
            return [p for group in range(stages + 1) for p in named[group]]
        # timm's own list of modules, in the order in which they run; dots of names are replaced.
        last = self.model.feature_info.info[stages - 1]["module"].replace(".", "_")
        names = [name for name, _ in self.model.named_children()]
        made = [*self.model.children()][: names.index(last) + 1]
        return [p for module in made for p in module.parameters()]

    def train(self, mode: bool = True) -> FeatureBackbone:
        """Training mode, except for what is frozen."""
        super().train(mode)
        if mode and self._frozen:
            for module in self.modules():
                frozen = [not p.requires_grad for p in module.parameters()]
                if frozen and all(frozen):
                    module.eval()
        return self

    def forward(self, x: Tensor) -> list[Tensor]:
        """Image [B, in_chans, H, W] -> maps [B, channels[i], H / strides[i], W / strides[i]]."""
        maps: list[Tensor] = self.model(x)
        if self._channels_last:
            return [y.permute(0, 3, 1, 2).contiguous() for y in maps]
        return maps


def _names(with_tags: bool) -> list[str]:
    """What can be built, and with tags also whose weights."""
    if not with_tags:
        return timm.list_models()
    detectors = [name for entry in entries() for name in released(entry)]
    return timm.list_models(include_tags=True) + detectors


def _ascending(name: str, indices: Sequence[int] | None, count: int) -> tuple[int, ...]:
    """Indices without negative ones, checked."""
    if indices is None:
        return tuple(range(count))
    counted = tuple(i + count if i < 0 else i for i in indices)
    if not counted or counted[0] < 0 or counted[-1] >= count or sorted({*counted}) != [*counted]:
        raise ValueError(
            f"out_indices: expected ascending indices of {name}'s {count} maps, "
            f"got {tuple(indices)}"
        )
    return counted


def _timm_features(name: str, out_indices: Sequence[int] | None, kwargs: dict[str, Any]) -> Any:
    if out_indices is None:
        return timm.create_model(name, features_only=True, **kwargs)
    try:
        return timm.create_model(name, features_only=True, out_indices=tuple(out_indices), **kwargs)
    except (AssertionError, IndexError) as error:  # timm's word for an index out of range
        raise ValueError(
            f"out_indices: expected indices of {name}'s maps, got {tuple(out_indices)} ({error})"
        ) from error


def _is_channels_last(name: str, features: nn.Module) -> bool:
    layout = Format(getattr(features, "output_fmt", Format.NCHW))
    if layout not in (Format.NCHW, Format.NHWC):
        raise ValueError(f"name: expected a model with feature maps, {name} gives {layout.value}")
    return layout is Format.NHWC
