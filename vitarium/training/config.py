"""A training run as data: what a TOML file may say, and what it means where it is silent."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Which network, and what it starts from.

    Attributes:
        name: of vitarium or timm, with or without a tag.
        pretrained: whether to start from the tag's weights.
        checkpoint: a file to start from instead, in any layout that ``vitarium convert`` reads.
        drop_path_rate: stochastic depth of the last block, in [0, 1]; absent: the model's own.
        kwargs: further arguments of ``timm.create_model``.
    """

    name: str
    pretrained: bool = False
    checkpoint: str | None = None
    drop_path_rate: float | None = None
    kwargs: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Where the images are, and how they are read.

    Attributes:
        source: ``folder``, ``digits``, ``torchvision/NAME``, ``hf/NAME`` (Hugging Face data sets,
            local or from the hub) or ``webdataset``; `vitarium.training.sources` has them.
        root: folder of the data; of ``webdataset`` a pattern of shards.
        train: name of the split, or pattern of shards, to train on.
        val: the same to validate on.
        stream: whether to read ``hf/NAME`` as a stream.
        image_key: column of the images, of ``hf/NAME`` and ``webdataset``.
        target_key: column of the targets, of the same.
        classes: names, in the order of their numbers; absent: as the data states them.
        samples: how many a pass has, which streams do not say.
        shuffle_buffer: samples among which a stream is shuffled.
        repeats: times that a pass takes an image in a row, varied anew each time; it takes so
            many fewer images (repeated augmentation, Hoffer et al., arXiv 1901.09335).
        image_size: (height, width) of the model's input in pixels; one number for both.
        workers: processes that read, for each process that trains.
        strict: whether an image that cannot be read stops the run; else it is reported by name
            and another one takes its place.
    """

    source: str
    root: str | None = None
    train: str = "train"
    val: str = "val"
    stream: bool = False
    image_key: str | None = None
    target_key: str | None = None
    classes: tuple[str, ...] | None = None
    samples: int | None = None
    shuffle_buffer: int | None = None
    repeats: int = 1
    image_size: tuple[int, int]
    workers: int = 4
    strict: bool = False


@dataclass(frozen=True, kw_only=True)
class AugmentConfig:
    """How training images are varied, and all are brought to size; names are timm's.

    Attributes:
        crop: ``random_resized``, or ``resize`` for the whole picture, without any crop.
        scale: least and largest share of the area that a random crop takes.
        ratio: least and largest ratio of width to height of a random crop.
        hflip: probability of a horizontal flip.
        color_jitter: strength for brightness, contrast and saturation.
        auto_augment: timm's description, such as ``rand-m9-mstd0.5-inc1``.
        random_erasing: probability.
        rotation: largest turn in degrees, either way.
        translate: largest shift as a share of each side.
        zoom: largest change of width and of height, each by itself, as a share.
        shear: largest shear in degrees, either way.
        bend: largest shift of a coarse grid of knots, between which all moves smoothly, as a
            share of half the picture.
        interpolation: for every change of size.
        mean: of the channels, in [0, 1]; absent: the model's.
        std: of the channels; absent: the model's.
        crop_pct: share of the side that validation keeps; absent: the model's.
    """

    crop: Literal["random_resized", "resize"] = "random_resized"
    scale: tuple[float, float] = (0.08, 1.0)
    ratio: tuple[float, float] = (0.75, 4 / 3)
    hflip: float = 0.5
    color_jitter: float = 0.0
    auto_augment: str | None = None
    random_erasing: float = 0.0
    rotation: float = 0.0
    translate: float = 0.0
    zoom: float = 0.0
    shear: float = 0.0
    bend: float = 0.0
    interpolation: Literal["bilinear", "bicubic", "random"] = "bicubic"
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    crop_pct: float | None = None


@dataclass(frozen=True, kw_only=True)
class LossConfig:
    """A classifier's loss.

    Attributes:
        kind: ``cross_entropy``, or ``bce``, a binary one for each class.
        label_smoothing: probability that is spread over all classes.
        mixup: parameter of the beta distribution that mixes images; 0 for none.
        cutmix: the same for pasted rectangles.
        mixup_prob: share of the batches that are mixed in either way.
        switch_prob: share of those that are pasted where both are on.
    """

    kind: Literal["cross_entropy", "bce"] = "cross_entropy"
    label_smoothing: float = 0.0
    mixup: float = 0.0
    cutmix: float = 0.0
    mixup_prob: float = 1.0
    switch_prob: float = 0.5


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """timm's optimizer.

    Attributes:
        name: as timm knows it, such as ``adamw``, ``sgd``, ``lars``.
        lr: the largest learning rate.
        lr_batch: images a step that ``lr`` is for; this and the schedule's ``warmup_lr`` and
            ``min_lr`` are scaled linearly to the real number. Absent: they count as they are.
        weight_decay: of weights with two dimensions or more, those excepted that the model names.
        momentum: of SGD and its kin; absent: timm's own, as for the next two.
        betas: of Adam and its kin.
        eps: of Adam and its kin.
        layer_decay: factor of the learning rate from each layer to the one below it.
        clip_grad: largest norm of all gradients together; absent: any.
    """

    name: str = "adamw"
    lr: float
    lr_batch: int | None = None
    weight_decay: float = 0.05
    momentum: float | None = None
    betas: tuple[float, float] | None = None
    eps: float | None = None
    layer_decay: float | None = None
    clip_grad: float | None = None


@dataclass(frozen=True, kw_only=True)
class ScheduleConfig:
    """How long, and which learning rate when.

    Attributes:
        epochs: passes over the data; either these or ``updates``.
        updates: steps of the optimizer.
        name: timm's schedule: ``cosine``, ``poly`` (with ``power``), ``step`` or ``constant``.
        warmup_epochs: in which the rate rises from ``warmup_lr``; either these or
            ``warmup_updates``.
        warmup_updates: the same, counted in steps.
        warmup_lr: where it starts.
        warmup_prefix: whether the schedule begins where the warm-up ends; else it is as far by
            then as without a warm-up. Neither changes when it ends.
        min_lr: where it ends.
        cooldown_epochs: that come after the end of ``cosine`` or ``poly``, at ``min_lr``.
        power: of ``poly``.
        milestones: epochs after which ``step`` multiplies the rate by ``decay_rate``.
        decay_rate: of ``step``.
    """

    epochs: float | None = None
    updates: int | None = None
    name: Literal["cosine", "poly", "step", "constant"] = "cosine"
    warmup_epochs: float | None = None
    warmup_updates: int | None = None
    warmup_lr: float = 1e-6
    warmup_prefix: bool = False
    min_lr: float = 0.0
    cooldown_epochs: float = 0.0
    power: float | None = None
    milestones: tuple[float, ...] | None = None
    decay_rate: float | None = None


@dataclass(frozen=True, kw_only=True)
class EmaConfig:
    """An average of the weights over the last steps, which is validated and saved.

    Attributes:
        decay: share of the old average that a step keeps.
        warmup: whether that share rises from 0 over the first steps, as timm does it.
    """

    decay: float
    warmup: bool = False


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """How a step is computed, and when something is written.

    Attributes:
        batch_size: images of a process at a time.
        accumulation: batches whose gradients are added before a step.
        precision: ``fp32``, ``bf16`` or ``fp16`` (autocast).
        parallel: of several processes: ``ddp``, or ``fsdp2`` which also shards the weights.
        channels_last: memory format of images and convolutions.
        compile: whether torch.compile takes the model.
        grad_checkpointing: whether blocks are computed again in the backward pass, to save memory.
        sync_batchnorm: whether batch norms of several processes share their statistics (CUDA).
        log_every: updates between two lines of the log.
        validate_every: epochs between two validations; there is always one in the end.
        checkpoint_every: updates between two checkpoints; absent: one for each epoch.
        keep: checkpoints that stay, the newest ones.
        tensorboard: whether to write its event files too.
    """

    batch_size: int
    accumulation: int = 1
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    parallel: Literal["ddp", "fsdp2"] = "ddp"
    channels_last: bool = False
    compile: bool = False
    grad_checkpointing: bool = False
    sync_batchnorm: bool = False
    log_every: int = 50
    validate_every: float = 1.0
    checkpoint_every: int | None = None
    keep: int = 2
    tensorboard: bool = False


@dataclass(frozen=True, kw_only=True)
class SegmentationAugmentConfig:
    """How training images and their maps are varied; crops have ``data.image_size``.

    Attributes:
        resize: what the shorter and the longer side may have at most, in pixels: images are
            scaled to that first, for validation too. Absent: they stay as they are.
        scale: least and largest factor on that size, in training.
        category_max: largest share of a crop that one class may fill; ten crops are tried.
        hflip: probability of a horizontal flip.
        photometric: whether brightness, contrast, saturation and hue vary, as for SSD.
        mean: of the channels, in [0, 1]; absent: the model's.
        std: of the channels; absent: the model's.
    """

    resize: tuple[int, int] | None = None
    scale: tuple[float, float] = (1.0, 1.0)
    category_max: float = 1.0
    hflip: float = 0.5
    photometric: bool = False
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None


@dataclass(frozen=True, kw_only=True)
class SegmentationHeadConfig:
    """The heads on the feature maps, and their loss: arguments of `heads.segmentation.Segmenter`.

    Attributes:
        name: ``upernet`` or ``semantic_fpn``.
        channels: of the decoder; absent: 512 or 128.
        auxiliary_channels: of the auxiliary head, 0 for none; absent: as published.
        norm: ``batchnorm2d``, ``layernorm2d`` or ``groupnorm``.
        drop_rate: of channels before the classifiers.
        freeze: stages of the backbone that stay as they start.
        class_weight: factor of each class in the loss.
        dice_weight: of the Dice loss, 0 for none.
        auxiliary_weight: of the auxiliary head's loss.
        ignore_index: value of pixels that count neither in the loss nor in the result.
        predict: ``whole`` images, or ``slide``, windows of ``data.image_size``.
        stride: of those windows, (height, width) in pixels.
        lr_factor: of the heads' learning rate over the backbone's.
    """

    name: Literal["upernet", "semantic_fpn"] = "upernet"
    channels: int | None = None
    auxiliary_channels: int | None = None
    norm: Literal["batchnorm2d", "layernorm2d", "groupnorm"] = "batchnorm2d"
    drop_rate: float = 0.1
    freeze: int = 0
    class_weight: tuple[float, ...] | None = None
    dice_weight: float = 0.0
    auxiliary_weight: float = 0.4
    ignore_index: int = 255
    predict: Literal["whole", "slide"] = "whole"
    stride: tuple[int, int] | None = None
    lr_factor: float = 1.0


@dataclass(frozen=True, kw_only=True)
class ProbeConfig:
    """The head on frozen features.

    Attributes:
        pooling: a name of `heads.probing.POOLINGS`; ``gap`` and ``cls`` are linear probes.
        tokens: ``patch``, or ``all`` with class tokens and registers; absent: what the pooling
            needs.
        kwargs: further arguments of the pooling.
    """

    pooling: str = "ep"
    tokens: Literal["patch", "all"] | None = None
    kwargs: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Config:
    """One run; what a task has beside this, its subclass says.

    Attributes:
        task: what the network learns to do.
        seed: of weights, order and augmentation.
        deterministic: whether only deterministic algorithms are used.
    """

    task: str
    seed: int = 0
    deterministic: bool = False
    model: ModelConfig
    data: DataConfig
    optimizer: OptimizerConfig
    schedule: ScheduleConfig
    train: TrainConfig
    ema: EmaConfig | None = None


@dataclass(frozen=True, kw_only=True)
class ClassificationConfig(Config):
    """A classifier's run."""

    augment: AugmentConfig = field(default_factory=AugmentConfig)
    loss: LossConfig = field(default_factory=LossConfig)


@dataclass(frozen=True, kw_only=True)
class SegmentationConfig(Config):
    """A segmenter's run."""

    augment: SegmentationAugmentConfig = field(default_factory=SegmentationAugmentConfig)
    head: SegmentationHeadConfig = field(default_factory=SegmentationHeadConfig)


@dataclass(frozen=True, kw_only=True)
class ProbingConfig(Config):
    """A probe's run."""

    augment: AugmentConfig = field(default_factory=AugmentConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    probe: ProbeConfig = field(default_factory=ProbeConfig)


TASKS: dict[str, type[Config]] = {
    "classification": ClassificationConfig,
    "segmentation": SegmentationConfig,
    "probing": ProbingConfig,
}
