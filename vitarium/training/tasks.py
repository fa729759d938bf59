"""What is learned: the network, its loss and its measure, for each kind of run."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Generic, TypeVar

import timm
import torch
import torch.nn.functional as F
from timm.data import Mixup, resolve_data_config
from timm.loss import BinaryCrossEntropy, SoftTargetCrossEntropy
from torch import Tensor, nn

from vitarium.heads.probing import Probe
from vitarium.heads.segmentation import MeanIoU, Segmenter
from vitarium.tools._common import check_model
from vitarium.training.config import (
    ClassificationConfig,
    Config,
    LossConfig,
    ProbingConfig,
    SegmentationConfig,
)
from vitarium.training.data import Batch, Layout, Transform
from vitarium.training.sources import Source, open_sources
from vitarium.training.transforms import (
    ClassTransform,
    MapTransform,
    Preprocessing,
    validation_interpolation,
)

_Config = TypeVar("_Config", bound=Config)


class Task(ABC, Generic[_Config]):
    """One kind of run.

    Attributes:
        config: of the run.
        train: images to train on.
        val: images to validate on.
        model: the network, with random weights or those that the config names.
        best: name of the measure that decides which weights are the best, the larger the better.
    """

    best: str

    def __init__(self, config: _Config) -> None:
        self.config = config
        maps = config.task == "segmentation"
        self.train, self.val = open_sources(config.data, maps, config.seed)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed)
            try:
                self.model = self._built()
            except (TypeError, RuntimeError, OSError) as error:  # of arguments, of a hub
                raise ValueError(f"{config.model.name}: {error}") from error

    @property
    def classes(self) -> tuple[str, ...]:
        """Names, in the order of their numbers."""
        return self.train.classes

    @abstractmethod
    def _built(self) -> nn.Module:
        """The network, with random weights or those that the config names."""

    @abstractmethod
    def transform(self, training: bool) -> Transform:
        """From an image and its target to tensors."""

    @abstractmethod
    def losses(self, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        """Parts of a batch's loss, by name; ``loss`` is what is minimised."""

    @abstractmethod
    def counts(self, model: nn.Module, batch: Batch) -> Tensor:
        """Numbers of a batch that can be added up, over batches and processes; float64."""

    @abstractmethod
    def measures(self, counts: Tensor) -> dict[str, float]:
        """What the sums of all batches say, in percent where it is a share."""

    @property
    def trained(self) -> nn.Module:
        """What ``best.safetensors`` holds: the model, or the part of it that is trained."""
        return self.model

    def row(self, measures: Mapping[str, float]) -> dict[str, Any]:
        """Measures as a line of a table of results."""
        return {"model": self.config.model.name, **measures}

    def validation_layout(self, layout: Layout) -> Layout:
        """How many images are validated at a time."""
        return layout

    def blank(self) -> Batch:
        """A batch that counts nothing."""
        height, width = self.config.data.image_size
        return Batch(torch.zeros(1, 3, height, width), torch.zeros(0, dtype=torch.long))

    def parameters(self, weight_decay: float) -> nn.Module | list[dict[str, Any]]:
        """What the optimizer changes: a model, from which timm makes groups, or groups."""
        return self.trained


class Classification(Task[ClassificationConfig]):
    """A classifier of whole images, as timm trains and validates it."""

    best = "top1"

    def __init__(self, config: ClassificationConfig) -> None:
        super().__init__(config)
        self._mix = mixing(config.loss, len(self.classes))
        self._loss = classification_loss(config.loss)

    def _built(self) -> nn.Module:
        name, kwargs = model_arguments(self.config)
        check_model(name, kwargs["pretrained"] and self.config.model.checkpoint is None)
        return timm.create_model(name, num_classes=len(self.classes), **kwargs)

    def transform(self, training: bool) -> Transform:
        augment = self.config.augment
        expected = preprocessing(self.model, augment)
        return ClassTransform(augment, self.config.data.image_size, expected, training)

    def losses(self, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        images, targets = batch.images, batch.targets
        if self._mix is not None:
            images, targets = self._mix(images, targets)
        return {"loss": self._loss(model(images).float(), targets)}

    def counts(self, model: nn.Module, batch: Batch) -> Tensor:
        return classification_counts(model(batch.images), batch.targets)

    def measures(self, counts: Tensor) -> dict[str, float]:
        return classification_measures(counts)

    def row(self, measures: Mapping[str, float]) -> dict[str, Any]:
        return classification_row(self, measures)


class Probing(Task[ProbingConfig]):
    """A head on the frozen features of a backbone."""

    best = "top1"

    def __init__(self, config: ProbingConfig) -> None:
        train, model = config.train, config.model
        for name, value, expected in (
            ("model.drop_path_rate", model.drop_path_rate, None),
            ("train.grad_checkpointing", train.grad_checkpointing, False),
            ("train.parallel", train.parallel, "ddp"),
            ("optimizer.layer_decay", config.optimizer.layer_decay, None),
        ):
            if value != expected:
                raise ValueError(
                    f"{name}: expected {'none' if expected is None else expected} for a probe, "
                    f"whose backbone is frozen, got {value}"
                )
        super().__init__(config)
        self._mix = mixing(config.loss, len(self.classes))
        self._loss = classification_loss(config.loss)

    def _built(self) -> nn.Module:
        probe = self.config.probe
        backbone, kwargs = model_arguments(self.config)
        check_model(backbone, kwargs["pretrained"] and self.config.model.checkpoint is None)
        return Probe(
            backbone,
            len(self.classes),
            probe.pooling,
            probe.tokens,
            pooling_kwargs=probe.kwargs,
            **kwargs,
        )

    @property
    def trained(self) -> nn.Module:
        assert isinstance(self.model, Probe)
        return self.model.head

    transform = Classification.transform
    losses = Classification.losses
    counts = Classification.counts
    measures = Classification.measures
    row = Classification.row


class Segmentation(Task[SegmentationConfig]):
    """A class for each pixel, as mmsegmentation trains and validates it."""

    best = "mIoU"

    def __init__(self, config: SegmentationConfig) -> None:
        if config.optimizer.layer_decay is not None:
            raise ValueError(
                f"optimizer.layer_decay: expected none for segmentation, got "
                f"{config.optimizer.layer_decay}"
            )
        if (config.head.predict == "slide") != (config.head.stride is not None):
            raise ValueError(
                f"head.stride: expected a size with slide, else none, got {config.head.stride}"
            )
        super().__init__(config)

    def _built(self) -> nn.Module:
        name, kwargs = model_arguments(self.config)
        head = asdict(self.config.head)
        for key in ("predict", "stride", "lr_factor"):
            del head[key]
        return Segmenter(name, len(self.classes), head.pop("name"), **head, **kwargs)

    def transform(self, training: bool) -> Transform:
        augment, size = self.config.augment, self.config.data.image_size
        expected = preprocessing(self.model, augment)
        return MapTransform(augment, size, expected, training, self.config.head.ignore_index)

    def losses(self, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        parts: dict[str, Tensor] = model(batch.images, batch.targets)
        return {"loss": sum(parts.values(), torch.zeros(()).to(batch.images)), **parts}

    def counts(self, model: nn.Module, batch: Batch) -> Tensor:
        head, target = self.config.head, batch.targets
        window = {}
        if head.predict == "slide":
            window = {"crop_size": self.config.data.image_size, "stride": head.stride}
        logits = self._segmenter.infer(batch.images, head.predict, **window)
        if logits.shape[2:] != target.shape[1:]:  # images were scaled, maps were not
            logits = F.interpolate(logits, target.shape[1:], mode="bilinear", align_corners=False)
        found = logits.argmax(1) if logits.shape[1] > 1 else (logits[:, 0] > 0).long()
        metric = MeanIoU(self._segmenter.num_classes, head.ignore_index, logits.device)
        metric.update(found, target)
        return metric.confusion.double()

    def measures(self, counts: Tensor) -> dict[str, float]:
        metric = MeanIoU(self._segmenter.num_classes)
        metric.confusion = counts.round().long().cpu()
        found = metric.compute()
        each = dict(zip(self._labels, found["IoU"], strict=True))
        return {
            "mIoU": 100 * found["mIoU"],
            "aAcc": 100 * found["aAcc"],
            **{f"IoU/{name}": 100 * iou for name, iou in each.items()},
        }

    @property
    def _segmenter(self) -> Segmenter:
        assert isinstance(self.model, Segmenter)
        return self.model

    @property
    def _labels(self) -> tuple[str, ...]:
        return self.classes if len(self.classes) > 1 else ("background", *self.classes)

    def validation_layout(self, layout: Layout) -> Layout:
        alike = isinstance(self.val, Source) and self.val.same_size
        return layout if alike else replace(layout, batch=1)

    def blank(self) -> Batch:
        height, width = self.config.data.image_size
        ignored = torch.full((1, height, width), self.config.head.ignore_index)
        return Batch(torch.zeros(1, 3, height, width), ignored)

    def parameters(self, weight_decay: float) -> list[dict[str, Any]]:
        exempt = {
            f"{prefix}.{name}"
            for prefix, module in self.model.named_modules()
            if hasattr(module, "no_weight_decay")
            for name in module.no_weight_decay()
        }
        groups: dict[tuple[bool, bool, bool], list[nn.Parameter]] = {}
        for name, parameter in self.model.named_parameters():
            if parameter.requires_grad:
                table = name in exempt
                key = name.startswith("backbone."), parameter.ndim > 1 and not table, table
                groups.setdefault(key, []).append(parameter)
        return [
            {
                "params": parameters,
                "lr_scale": 1.0 if backbone else self.config.head.lr_factor,
                "weight_decay": weight_decay if decayed else 0.0,
                "use_fallback": table,  # of muon, as the engine asks of timm for classifiers
            }
            for (backbone, decayed, table), parameters in groups.items()
        ]


def model_arguments(config: Config) -> tuple[str, dict[str, Any]]:
    """Name and arguments of the model in timm's terms."""
    section = config.model
    kwargs = dict(section.kwargs)
    if "num_classes" in kwargs:
        raise ValueError(
            f"model.kwargs.num_classes: expected none, the data's classes count, got "
            f"{kwargs['num_classes']}"
        )
    if section.checkpoint is not None and not Path(section.checkpoint).is_file():
        raise ValueError(f"model.checkpoint: expected a file, got {section.checkpoint!r}")
    if section.drop_path_rate is not None:
        kwargs["drop_path_rate"] = section.drop_path_rate
    if section.checkpoint is not None:
        kwargs["pretrained_cfg_overlay"] = {"file": section.checkpoint}
    kwargs["pretrained"] = section.pretrained or section.checkpoint is not None
    return section.name, kwargs


def preprocessing(model: nn.Module, augment: Any) -> Preprocessing:
    """What a model's weights expect of images, unless the config says otherwise."""
    found = resolve_data_config(model=model)
    return Preprocessing(
        mean=augment.mean or found["mean"],
        std=augment.std or found["std"],
        crop_pct=getattr(augment, "crop_pct", None) or found["crop_pct"],
    )


def mixing(loss: LossConfig, num_classes: int) -> Mixup | None:
    """Mixup and cutmix of a batch, as timm does them; draws from NumPy's generator."""
    if not loss.mixup and not loss.cutmix:
        return None
    return Mixup(
        mixup_alpha=loss.mixup,
        cutmix_alpha=loss.cutmix,
        prob=loss.mixup_prob,
        switch_prob=loss.switch_prob,
        label_smoothing=loss.label_smoothing,
        num_classes=num_classes,
    )


def classification_loss(loss: LossConfig) -> Callable[[Tensor, Tensor], Tensor]:
    """The loss, timm's, of logits [B, classes] and targets, numbers or mixed ones."""
    mixed = bool(loss.mixup or loss.cutmix)
    if loss.kind == "bce":
        return BinaryCrossEntropy(smoothing=0.0 if mixed else loss.label_smoothing)
    if mixed:  # which smooths the labels itself
        return SoftTargetCrossEntropy()
    return nn.CrossEntropyLoss(label_smoothing=loss.label_smoothing)


def classification_counts(logits: Tensor, targets: Tensor) -> Tensor:
    """Images, those right at once and within five guesses, and the sum of cross entropies."""
    logits = logits[: len(targets)]  # a batch that counts nothing has an image, and no target
    guesses = logits.topk(min(5, logits.shape[1])).indices == targets[:, None]
    loss = F.cross_entropy(logits.float(), targets, reduction="sum")
    counts = [len(targets), guesses[:, 0].sum(), guesses.sum(), loss]
    return torch.stack(
        [torch.as_tensor(x, dtype=torch.float64, device=logits.device) for x in counts]
    )


def classification_measures(counts: Tensor) -> dict[str, float]:
    """Accuracies in percent, loss and number of images."""
    images, top1, top5, loss = counts.tolist()
    if not images:
        raise ValueError("data.val: expected images that can be read, got none")
    return {
        "top1": 100 * top1 / images,
        "top5": 100 * top5 / images,
        "loss": loss / images,
        "images": images,
    }


def classification_row(task: Task[Any], measures: Mapping[str, float]) -> dict[str, Any]:
    """The columns of timm's results files, and the loss."""
    config = task.config
    expected = preprocessing(task.model, config.augment)
    top1, top5 = measures["top1"], measures["top5"]
    return {
        "model": config.model.name,
        "top1": round(top1, 3),
        "top1_err": round(100 - top1, 3),
        "top5": round(top5, 3),
        "top5_err": round(100 - top5, 3),
        "param_count": round(sum(p.numel() for p in task.model.parameters()) / 1e6, 2),
        "img_size": config.data.image_size[-1],
        "crop_pct": expected.crop_pct,
        "interpolation": validation_interpolation(config.augment),
        "loss": measures["loss"],
        "images": int(measures["images"]),
    }


def create_task(config: Config) -> Task[Any]:
    """The task of a config.

    Raises:
        ValueError: what the config names is not there or does not fit together.
    """
    return _TASKS[config.task](config)


_TASKS: Mapping[str, type[Task[Any]]] = {
    "classification": Classification,
    "segmentation": Segmentation,
    "probing": Probing,
}
