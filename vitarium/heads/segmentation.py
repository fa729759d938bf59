"""Semantic segmentation: decode heads on feature pyramids, and networks of backbone and heads.

Heads take a list of maps [B, C, H, W], the finest first, and give logits [B, classes, H, W] of the
finest map's size. Tensors are named as in mmsegmentation 1.x (Apache-2.0), to whose `UPerHead`,
`FPNHead` behind an `FPN`, and `FCNHead` the three heads are numerically equal, corners not aligned.

Sources: UPerNet, Xiao et al., arXiv 1807.10221; Semantic FPN, Kirillov et al., arXiv 1901.02446;
ViTDet's simple pyramid, Li et al., arXiv 2203.16527.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import ConvNormAct, LayerNorm2d
from torch import Tensor, nn
from torchvision.ops import FeaturePyramidNetwork

from vitarium import checkpoints
from vitarium.backbones._registry import released
from vitarium.checkpoints import Renames
from vitarium.heads.features import FeatureBackbone

NORMS = ("batchnorm2d", "layernorm2d", "groupnorm")
_CLASSES = {"ade20k": 150}  # of released segmenters, by the data set that their names end with
_BACKBONE = "backbone."
_EPS = 1e-12  # below a sum without pixels


class ConvNormReLU(ConvNormAct):
    """A convolution without bias that keeps the size, a norm and a ReLU.

    Args:
        in_channels: of the map that comes in.
        out_channels: of the map that goes out.
        kernel_size: odd, in pixels.
        norm: ``batchnorm2d``; ``layernorm2d``, over channels; or ``groupnorm``, of 32 groups, or
            as many of them as divide the channels.

    Raises:
        ValueError: an unknown norm; in training, one value per channel for batch statistics.
    """

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int, norm: str) -> None:
        if norm not in NORMS:
            raise ValueError(f"norm: expected one of {NORMS}, got {norm!r}")
        groups = {"num_groups": math.gcd(32, out_channels)} if norm == "groupnorm" else {}
        super().__init__(
            in_channels,
            out_channels,
            kernel_size,
            norm_layer=norm,
            act_layer=None,  # torch's conversion to SyncBatchNorm drops what is inside the norm
            norm_kwargs=groups,
        )
        nn.init.kaiming_normal_(self.conv.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        """[B, in_channels, H, W] -> [B, out_channels, H, W]."""
        y = self.conv(x)
        if isinstance(self.bn, nn.BatchNorm2d) and self.bn.training and y[:, 0].numel() == 1:
            raise ValueError(
                "images: expected more than one in a batch, or larger ones: in training, batch "
                "norm has no statistics of a single map of 1 x 1, such as UPerNet pools; got one "
                "(norm='groupnorm' and 'layernorm2d' do without them)"
            )
        return F.relu(self.bn(y))


class DecodeHead(nn.Module):
    """What the heads share: dropout of whole channels and a 1 x 1 convolution that classifies.

    Args:
        channels: of the map to classify.
        num_classes: of logits.
        drop_rate: of channels, in training.
    """

    def __init__(self, channels: int, num_classes: int, drop_rate: float) -> None:
        super().__init__()
        self.dropout = nn.Dropout2d(drop_rate)
        self.conv_seg = _classifier(channels, num_classes)

    def reset_classifier(self, num_classes: int) -> None:
        """Begin anew with another number of classes."""
        weight = self.conv_seg.weight
        self.conv_seg = _classifier(weight.shape[1], num_classes).to(weight)

    def classify(self, x: Tensor) -> Tensor:
        """[B, channels, H, W] -> logits [B, num_classes, H, W]."""
        return self.conv_seg(self.dropout(x))


class UPerNet(DecodeHead):
    """UPerNet: pyramid pooling of the last map, a top-down path, and all levels joined.

    Args:
        in_channels: of the maps, the finest first.
        num_classes: of logits.
        channels: of every map inside.
        pool_scales: sides of the maps, in cells, to which the last one is averaged.
        drop_rate: of channels before the classifier, in training.
        norm: as in `ConvNormReLU`. With batch norm, training needs more than one image per batch.
    """

    def __init__(
        self,
        in_channels: Sequence[int],
        num_classes: int,
        channels: int = 512,
        pool_scales: Sequence[int] = (1, 2, 3, 6),
        drop_rate: float = 0.1,
        norm: str = "batchnorm2d",
    ) -> None:
        super().__init__(channels, num_classes, drop_rate)
        *finer, last = in_channels
        self.psp_modules = nn.ModuleList(
            nn.Sequential(nn.AdaptiveAvgPool2d(scale), ConvNormReLU(last, channels, 1, norm))
            for scale in pool_scales
        )
        joined = last + len(pool_scales) * channels
        self.bottleneck = ConvNormReLU(joined, channels, 3, norm)
        self.lateral_convs = nn.ModuleList(ConvNormReLU(c, channels, 1, norm) for c in finer)
        self.fpn_convs = nn.ModuleList(ConvNormReLU(channels, channels, 3, norm) for _ in finer)
        self.fpn_bottleneck = ConvNormReLU(len(in_channels) * channels, channels, 3, norm)

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        """Maps [B, in_channels[i], H_i, W_i] -> logits [B, num_classes, H_0, W_0]."""
        *finer, last = maps
        pooled = [_resized(pool(last), last.shape[2:]) for pool in self.psp_modules]
        path = self.bottleneck(torch.cat([last, *pooled], 1))
        levels = [path]
        for x, lateral, conv in zip(
            reversed(finer), reversed(self.lateral_convs), reversed(self.fpn_convs), strict=True
        ):
            path = lateral(x) + _resized(path, x.shape[2:])
            levels.insert(0, conv(path))
        size = maps[0].shape[2:]
        joined = torch.cat([_resized(level, size) for level in levels], 1)
        return self.classify(self.fpn_bottleneck(joined))


class SemanticFPN(DecodeHead):
    """Semantic FPN: a feature pyramid network whose levels are brought to one size and added.

    Args:
        in_channels: of the maps, the finest first.
        strides: of the maps, in pixels; each a power of two times the first one.
        num_classes: of logits.
        channels: of the maps that are added.
        neck_channels: of the feature pyramid network.
        drop_rate: of channels before the classifier, in training.
        norm: as in `ConvNormReLU`; the neck has none.

    Raises:
        ValueError: strides that are no such multiples.
    """

    def __init__(
        self,
        in_channels: Sequence[int],
        strides: Sequence[int],
        num_classes: int,
        channels: int = 128,
        neck_channels: int = 256,
        drop_rate: float = 0.1,
        norm: str = "batchnorm2d",
    ) -> None:
        super().__init__(channels, num_classes, drop_rate)
        self.neck = FeaturePyramidNetwork([*in_channels], neck_channels)
        self.scale_heads = nn.ModuleList()
        for stride in strides:
            doublings = _log2(stride, strides[0], "strides")
            layers: list[nn.Module] = []
            for i in range(max(1, doublings)):
                layers += [ConvNormReLU(channels if i else neck_channels, channels, 3, norm)]
                layers += [nn.Upsample(scale_factor=2, mode="bilinear")] if doublings else []
            self.scale_heads.append(nn.Sequential(*layers))

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        """Maps [B, in_channels[i], H_i, W_i] -> logits [B, num_classes, H_0, W_0]."""
        levels = self.neck({str(i): x for i, x in enumerate(maps)}).values()
        size = maps[0].shape[2:]
        scaled = [
            _resized(head(level), size)
            for head, level in zip(self.scale_heads, levels, strict=True)
        ]
        return self.classify(sum(scaled[1:], scaled[0]))


class FCNHead(DecodeHead):
    """One convolution on one map: the auxiliary head.

    Args:
        in_channels: of the maps, the finest first; the last but one is used, or the only one.
        num_classes: of logits.
        channels: of the convolution.
        drop_rate: of channels before the classifier, in training.
        norm: as in `ConvNormReLU`.
    """

    def __init__(
        self,
        in_channels: Sequence[int],
        num_classes: int,
        channels: int = 256,
        drop_rate: float = 0.1,
        norm: str = "batchnorm2d",
    ) -> None:
        super().__init__(channels, num_classes, drop_rate)
        self.convs = nn.Sequential(ConvNormReLU(in_channels[-2:][0], channels, 3, norm))

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        """Maps [B, in_channels[i], H_i, W_i] -> logits [B, num_classes, H_-2, W_-2]."""
        return self.classify(self.convs(maps[-2:][0]))


class SimplePyramid(nn.Module):
    """Maps of several strides from the one map of a plain vision transformer, as in ViTDet.

    Each is made from the given map alone: finer ones by transposed convolutions that double the
    size and halve the channels, with a LayerNorm and a GELU between two of them, coarser ones by
    max pooling (sizes rounded up); then a 1 x 1 and a 3 x 3 convolution with a LayerNorm each.

    Args:
        in_channels: of the map.
        stride: of the map, in pixels.
        channels: of every map that is made.
        strides: of these, in pixels.

    Attributes:
        channels: of each map.
        strides: of each map.

    Raises:
        ValueError: a stride that is no power of two times, or part of, the others.
    """

    def __init__(
        self,
        in_channels: int,
        stride: int,
        channels: int = 256,
        strides: Sequence[int] = (4, 8, 16, 32),
    ) -> None:
        super().__init__()
        self.channels = (channels,) * len(strides)
        self.strides = tuple(strides)
        self.levels = nn.ModuleList()
        for target in strides:
            coarser = _log2(target, stride, "stride")
            dim = in_channels
            layers: list[nn.Module] = []
            if coarser > 0:
                layers.append(nn.MaxPool2d(2**coarser, ceil_mode=True))
            for i in range(-coarser):
                layers += [LayerNorm2d(dim), nn.GELU()] if i else []
                layers.append(nn.ConvTranspose2d(dim, dim // 2, 2, stride=2))
                dim //= 2
            for inner, size in ((dim, 1), (channels, 3)):
                layers.append(nn.Conv2d(inner, channels, size, padding=size // 2, bias=False))
                layers.append(LayerNorm2d(channels))
            self.levels.append(nn.Sequential(*layers))

    def forward(self, x: Tensor) -> list[Tensor]:
        """[B, in_channels, H, W] -> maps [B, channels, H * stride / strides[i], ...]."""
        return [level(x) for level in self.levels]


HEADS: dict[str, type[DecodeHead]] = {"upernet": UPerNet, "semantic_fpn": SemanticFPN}


class Segmenter(nn.Module):
    """A backbone, a decode head and, where wanted, an auxiliary head that helps in training.

    >>> segmenter = Segmenter("nat_atto", num_classes=11, channels=32, task="seg").eval()
    >>> segmenter(torch.zeros(1, 3, 50, 70)).shape
    torch.Size([1, 11, 50, 70])

    With one class there is one logit, of foreground against background whose logit is 0: labels
    are 0 (background) and 1, as if there were two classes. Two classes have two logits.

    Images smaller than the backbone takes, or whose sides a model of timm's cannot divide, are
    padded with zeros on the right and below; logits of the padding are cut off. A backbone all of
    whose maps have one stride (a plain vision transformer) gets a `SimplePyramid` on the last one.

    Args:
        name: a model's name, as `FeatureBackbone` takes it. That of a released UPerNet or Semantic
            FPN, ``nat_mini.shi_upernet_160k_ade20k``, implies head, task and number of classes.
        num_classes: of logits; None for the released segmenter's.
        head: ``upernet`` or ``semantic_fpn``; None for the released segmenter's, else UPerNet.
        channels: of the head; None for its own default, 512 or 128.
        auxiliary_channels: of the auxiliary head, 0 for none; None for 256 beside a UPerNet and
            none beside a Semantic FPN, as they are published.
        norm: of the heads, as in `ConvNormReLU`: ``batchnorm2d``, ``layernorm2d``, ``groupnorm``.
            Batches of few images train badly with batch norm, and UPerNet with one not at all.
        drop_rate: of channels before the classifiers, in training.
        freeze: how many of the backbone's stages, counted as its maps and with all that comes
            before them, keep their weights and statistics; True for the whole backbone.
        class_weight: of each class in the cross entropy; with one class, of background and it.
        dice_weight: of the Dice loss, 0 for none.
        auxiliary_weight: of the auxiliary head's cross entropy.
        ignore_index: the label of pixels that do not count.
        avg_non_ignore: whether the cross entropy's divisor leaves out ignored pixels, see `loss`.
        pretrained: load the released segmenter that ``name`` is, with new classifiers where
            ``num_classes`` is another; else the backbone's weights, as timm does.
        **backbone_kwargs: further arguments of `FeatureBackbone`: ``task="seg"`` for the form that
            the authors give their backbone in segmentation, ``checkpoint`` of the backbone,
            ``out_indices``, ``drop_path_rate``, ... The heads take its device and dtype.

    Attributes:
        num_classes: of logits.
        num_labels: that targets and predictions have: ``num_classes``, or 2 where that is 1.
        pretrained_cfg: timm's description of the images that the backbone expects.

    Raises:
        ValueError: arguments that are unknown, out of range or do not go together.
        CheckpointError: a checkpoint cannot be had or read, or does not fit.
    """

    class_weight: Tensor | None

    def __init__(
        self,
        name: str,
        num_classes: int | None = None,
        head: str | None = None,
        *,
        channels: int | None = None,
        auxiliary_channels: int | None = None,
        norm: str = "batchnorm2d",
        drop_rate: float = 0.1,
        freeze: int | bool = 0,
        class_weight: Sequence[float] | None = None,
        dice_weight: float = 0.0,
        auxiliary_weight: float = 0.4,
        ignore_index: int = 255,
        avg_non_ignore: bool = False,
        pretrained: bool = False,
        **backbone_kwargs: Any,
    ) -> None:
        super().__init__()
        weight = released(name.partition(".")[0]).get(name)
        theirs = next((x for x in HEADS if weight is not None and f"_{x}_" in name), None)
        if head not in (None, *HEADS) or (head and theirs and head != theirs):
            expected = f"None or {theirs!r} of {name}" if theirs else f"None or one of {(*HEADS,)}"
            raise ValueError(f"head: expected {expected}, got {head!r}")
        head = head or theirs or "upernet"
        known = None if theirs is None else _CLASSES.get(name.rpartition("_")[2])
        num_classes = known if num_classes is None else num_classes
        if num_classes is None or num_classes < 1:
            raise ValueError(f"num_classes: expected at least 1, got {num_classes}")
        whole = weight if pretrained and theirs is not None else None
        if whole is not None and backbone_kwargs.get("checkpoint") is not None:
            raise ValueError(f"checkpoint: expected None with the weights of {name}, got another")
        backbone_kwargs["pretrained"] = pretrained and whole is None
        self.backbone = FeatureBackbone(name, **backbone_kwargs)
        self.backbone.freeze(freeze)
        self.pretrained_cfg = self.backbone.pretrained_cfg
        self.dice_weight, self.auxiliary_weight = dice_weight, auxiliary_weight
        self.ignore_index, self.avg_non_ignore = ignore_index, avg_non_ignore
        self.register_buffer("class_weight", None, persistent=False)
        self.num_classes = num_classes if known is None or whole is None else known

        like = next(self.backbone.parameters())
        dims, strides = self.backbone.channels, self.backbone.strides
        if auxiliary_channels is None:
            auxiliary_channels = 256 if head == "upernet" else 0
        options: dict[str, Any] = {"drop_rate": drop_rate, "norm": norm}
        sizes: dict[str, Any] = {} if channels is None else {"channels": channels}
        self.pyramid: SimplePyramid | None = None
        self.auxiliary_head: FCNHead | None = None
        with torch.device(like.device):
            if len({*strides}) == 1:
                if len(backbone_kwargs.get("out_indices") or (-1,)) > 1:
                    raise ValueError(
                        f"out_indices: expected one index, the maps of {name} have one stride, "
                        f"got {tuple(backbone_kwargs['out_indices'])}"
                    )
                self.pyramid = SimplePyramid(dims[-1], strides[-1])
                dims, strides = self.pyramid.channels, self.pyramid.strides
            self.decode_head: DecodeHead
            if head == "upernet":
                self.decode_head = UPerNet(dims, self.num_classes, **sizes, **options)
            else:
                self.decode_head = SemanticFPN(dims, strides, self.num_classes, **sizes, **options)
            if auxiliary_channels:
                self.auxiliary_head = FCNHead(dims, self.num_classes, auxiliary_channels, **options)
        self.to(like.dtype)
        if whole is not None:
            cache_dir = backbone_kwargs.get("cache_dir")
            checkpoints.load(self, checkpoints.fetch(whole, name, cache_dir=cache_dir))
        if num_classes != self.num_classes:
            self.reset_classifier(num_classes)
        self._set_class_weight(class_weight)

    @property
    def num_labels(self) -> int:
        """How many labels there are: one class is told from background."""
        return max(self.num_classes, 2)

    def reset_classifier(
        self, num_classes: int, class_weight: Sequence[float] | None = None
    ) -> None:
        """Begin both heads' classifiers anew, with another number of classes and their weights."""
        if num_classes < 1:
            raise ValueError(f"num_classes: expected at least 1, got {num_classes}")
        self.num_classes = num_classes
        for head in (self.decode_head, self.auxiliary_head):
            if head is not None:
                head.reset_classifier(num_classes)
        self._set_class_weight(class_weight)

    def _set_class_weight(self, class_weight: Sequence[float] | None) -> None:
        if 0 <= self.ignore_index < self.num_labels:
            raise ValueError(
                f"ignore_index: expected none of the {self.num_labels} labels, "
                f"got {self.ignore_index}"
            )
        if class_weight is not None and len(class_weight) != self.num_labels:
            raise ValueError(
                f"class_weight: expected {self.num_labels} numbers, got {len(class_weight)}"
            )
        device = self.decode_head.conv_seg.weight.device
        given = None if class_weight is None else torch.tensor([*class_weight], device=device)
        self.class_weight = given

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute the backbone's blocks in the backward pass instead of storing their values."""
        self.backbone.set_grad_checkpointing(enable)

    def checkpoint_ignore(self) -> dict[str, str]:
        """Names of tensors that a whole segmenter's checkpoint may have beside: why."""
        ignored = {f"backbone.{k}": why for k, why in self.backbone.checkpoint_ignore().items()}
        if self.auxiliary_head is None:
            ignored["auxiliary_head.*"] = "this segmenter has no auxiliary head"
        return ignored

    def forward(self, images: Tensor, target: Tensor | None = None) -> Any:
        """Images -> logits; with a target, `loss`, for wrappers that only see forward passes.

        Args:
            images: [B, in_chans, H, W], normalised as ``pretrained_cfg`` says.
            target: None, or as in `loss`.

        Returns:
            Logits [B, num_classes, H, W], resized bilinearly from the finest map's size; or losses.
        """
        if target is not None:
            return self.loss(images, target)
        return self._at_size(self.decode_head(self._maps(images)), images)

    def loss(self, images: Tensor, target: Tensor) -> dict[str, Tensor]:
        """Losses, whose sum is to be minimised.

        The cross entropy is a weighted mean over the pixels of the batch. As in mmsegmentation,
        its divisor is the sum of the weights of all labels, 1 each without ``class_weight``; an
        ignored pixel adds nothing above, and 1 below, or nothing with ``avg_non_ignore``. Dice is
        1 minus the mean over all labels of (2 sum(p t) + 1) / (sum(p^2) + sum(t) + 1), with
        probabilities p and labels t of the batch's pixels that count (V-Net, arXiv 1606.04797).
        Without any such pixel all losses are 0. They are computed in float32 at least.

        Args:
            images: [B, in_chans, H, W].
            target: labels [B, H, W] of an integer type: 0 to ``num_labels`` - 1, or
                ``ignore_index``.

        Returns:
            ``ce``; ``dice``, unless its weight is 0; ``aux``, the auxiliary head's cross entropy,
            where there is one. Weights are multiplied already.

        Raises:
            ValueError: a target of another size or type, or a label out of range (this is not
                looked for in compiled code).
        """
        target = self._checked(target, images)
        maps = self._maps(images)
        scores = self._scores(self._at_size(self.decode_head(maps), images))
        losses = {"ce": self._cross_entropy(scores, target)}
        if self.dice_weight:
            losses["dice"] = self.dice_weight * self._dice(scores, target)
        if self.auxiliary_head is not None:
            scores = self._scores(self._at_size(self.auxiliary_head(maps), images))
            losses["aux"] = self.auxiliary_weight * self._cross_entropy(scores, target)
        return losses

    def infer(
        self,
        images: Tensor,
        mode: str = "whole",
        crop_size: int | tuple[int, int] | None = None,
        stride: int | tuple[int, int] | None = None,
    ) -> Tensor:
        """Logits of whole images, or averaged over windows that slide over them.

        Args:
            images: [B, in_chans, H, W].
            mode: ``whole`` or ``slide``.
            crop_size: of a window, (H, W) or both in pixels; only in mode ``slide``.
            stride: from one window to the next, likewise, at most ``crop_size``. The last window is
                moved back inside the image; on smaller images windows are the image.

        Returns:
            Logits [B, num_classes, H, W]: where windows overlap, their mean.

        Raises:
            ValueError: an unknown mode, or sizes that it has no use for, lacks, or that leave gaps.
        """
        if mode not in ("whole", "slide"):
            raise ValueError(f"mode: expected 'whole' or 'slide', got {mode!r}")
        if mode == "whole":
            if crop_size is not None or stride is not None:
                raise ValueError(
                    f"crop_size, stride: expected None in mode 'whole', got {crop_size}, {stride}"
                )
            return self(images)
        if crop_size is None or stride is None:
            raise ValueError(
                f"crop_size, stride: expected both in mode 'slide', got {crop_size}, {stride}"
            )
        crops = (crop_size, crop_size) if isinstance(crop_size, int) else crop_size
        steps = (stride, stride) if isinstance(stride, int) else stride
        if not all(1 <= step <= crop for step, crop in zip(steps, crops, strict=True)):
            raise ValueError(f"stride: expected 1 to {tuple(crops)} pixels, got {tuple(steps)}")
        rows, columns = map(_windows, images.shape[2:], crops, steps)
        dtype = torch.promote_types(images.dtype, torch.float32)
        size = images.shape[2:]
        total = images.new_zeros((len(images), self.num_classes, *size), dtype=dtype)
        count = images.new_zeros(size, dtype=dtype)
        for window in ((..., row, column) for row in rows for column in columns):
            total[window] += self(images[window])
            count[window] += 1
        return total / count

    @torch.no_grad()
    def predict(
        self,
        images: Tensor,
        mode: str = "whole",
        crop_size: int | tuple[int, int] | None = None,
        stride: int | tuple[int, int] | None = None,
    ) -> Tensor:
        """Labels [B, H, W] of the largest logits that `infer` gives; its arguments are these."""
        return self._scores(self.infer(images, mode, crop_size, stride)).argmax(1)

    def _padded_size(self, images: Tensor) -> list[int]:
        divisor, smallest = self.backbone.size_divisor, self.backbone.min_size
        return [-(-max(n, smallest) // divisor) * divisor for n in images.shape[2:]]

    def _maps(self, images: Tensor) -> Sequence[Tensor]:
        """Images [B, in_chans, H, W] -> the maps that the heads see."""
        if images.ndim != 4 or 0 in images.shape:
            raise ValueError(f"images: expected [B, C, H, W], got {list(images.shape)}")
        height, width = self._padded_size(images)
        padding = (0, width - images.shape[3], 0, height - images.shape[2])
        maps: Sequence[Tensor] = self.backbone(F.pad(images, padding) if any(padding) else images)
        return maps if self.pyramid is None else self.pyramid(maps[-1])

    def _at_size(self, logits: Tensor, images: Tensor) -> Tensor:
        """Logits of a map -> of the images' size [B, num_classes, H, W]."""
        height, width = images.shape[2:]
        return _resized(logits, self._padded_size(images))[:, :, :height, :width]

    def _scores(self, logits: Tensor) -> Tensor:
        """A logit for each label: [B, num_classes, H, W] -> [B, num_labels, H, W]."""
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        return F.pad(logits, (0, 0, 0, 0, 1, 0)) if self.num_classes == 1 else logits

    def _checked(self, target: Tensor, images: Tensor) -> Tensor:
        expected = [len(images), *images.shape[2:]]
        if list(target.shape) != expected or target.is_floating_point():
            raise ValueError(
                f"target: expected labels {expected} of an integer type, "
                f"got {list(target.shape)} of {target.dtype}"
            )
        target = target.long()
        if not torch.compiler.is_compiling():
            _require_labels(target, self.num_labels, self.ignore_index, "target")
        return target

    def _cross_entropy(self, scores: Tensor, target: Tensor) -> Tensor:
        weight = self.class_weight
        if weight is not None:
            weight = weight.to(scores.dtype)
        loss = F.cross_entropy(
            scores, target, weight, ignore_index=self.ignore_index, reduction="sum"
        )
        counted = target != self.ignore_index
        if weight is None:
            divisor = counted.sum().to(scores.dtype)
        else:
            divisor = (weight[target.where(counted, 0)] * counted).sum()
        if not self.avg_non_ignore:
            divisor = divisor + (~counted).sum()
        return loss / divisor.clamp(min=_EPS)

    def _dice(self, scores: Tensor, target: Tensor) -> Tensor:
        labels = torch.arange(self.num_labels, device=target.device)[:, None, None]
        truth = target[:, None] == labels  # nowhere in ignored pixels
        chance = scores.softmax(1) * (target != self.ignore_index)[:, None]
        overlap = (chance * truth).sum((0, 2, 3))
        total = (chance.square() + truth).sum((0, 2, 3))
        return 1 - ((2 * overlap + 1) / (total + 1)).mean()


class MeanIoU:
    """Mean intersection over union, from a confusion matrix that grows with every batch.

    >>> metric = MeanIoU(num_classes=3)
    >>> metric.update(torch.tensor([[0, 1, 1]]), torch.tensor([[0, 0, 1]]))
    >>> metric.compute()
    {'mIoU': 0.5, 'aAcc': 0.6666666666666666, 'IoU': [0.5, 0.5, nan]}

    Processes that saw different images sum their matrices: ``dist.all_reduce(metric.confusion)``.

    Args:
        num_classes: as a `Segmenter` has; 1 counts as 2, background and the class.
        ignore_index: the label of pixels that do not count.
        device: of the matrix.

    Attributes:
        confusion: pixels [labels, labels], int64: rows are the target's labels, columns the
            prediction's.
    """

    def __init__(
        self,
        num_classes: int,
        ignore_index: int = 255,
        device: torch.device | str | None = None,
    ) -> None:
        if num_classes < 1:
            raise ValueError(f"num_classes: expected at least 1, got {num_classes}")
        self.ignore_index = ignore_index
        labels = max(num_classes, 2)
        self.confusion = torch.zeros(labels, labels, dtype=torch.int64, device=device)

    def update(self, prediction: Tensor, target: Tensor) -> None:
        """Count the pixels of two maps of labels, of one shape and on one device.

        Raises:
            ValueError: shapes differ, or a label is out of range.
        """
        if prediction.shape != target.shape:
            raise ValueError(
                f"prediction: expected the target's shape {list(target.shape)}, "
                f"got {list(prediction.shape)}"
            )
        labels = len(self.confusion)
        counted = target != self.ignore_index
        prediction, target = prediction[counted].long(), target[counted].long()
        _require_labels(target, labels, self.ignore_index, "target")
        _require_labels(prediction, labels, None, "prediction")
        pairs = torch.bincount(labels * target + prediction, minlength=labels**2)
        self.confusion += pairs.view(labels, labels).to(self.confusion.device)

    def compute(self) -> dict[str, Any]:
        """``IoU`` of each label, its mean ``mIoU``, and ``aAcc``, the share of right pixels.

        A label that neither targets nor predictions have is nan, and not part of the mean; without
        any pixel everything is nan.
        """
        confusion = self.confusion.double()
        right = confusion.diagonal()
        iou = right / (confusion.sum(0) + confusion.sum(1) - right)
        accuracy = right.sum() / confusion.sum()
        return {"mIoU": iou.nanmean().item(), "aAcc": accuracy.item(), "IoU": iou.tolist()}

    def reset(self) -> None:
        """Forget all pixels."""
        self.confusion.zero_()


RENAMES = Renames(  # in mmsegmentation a Semantic FPN's neck is no part of its head
    [
        ("neck.lateral_convs.{i}.conv.", "decode_head.neck.inner_blocks.{i}.0."),
        ("neck.fpn_convs.{i}.conv.", "decode_head.neck.layer_blocks.{i}.0."),
    ]
)


def checkpoint_filter_fn(state_dict: Mapping[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """A state dict of mmsegmentation, whose backbone is its authors', for a `Segmenter`."""
    if not isinstance(model, Segmenter):
        return dict(state_dict)
    inner = {k.removeprefix(_BACKBONE): x for k, x in state_dict.items() if k.startswith(_BACKBONE)}
    heads = {k: x for k, x in state_dict.items() if not k.startswith(_BACKBONE)}
    converted = checkpoints.convert(inner, model.backbone)
    found = {_BACKBONE + name: tensor for name, tensor in converted.items()}
    return found | RENAMES.to_ours(heads, model)


def _classifier(channels: int, num_classes: int) -> nn.Conv2d:
    conv = nn.Conv2d(channels, num_classes, 1)
    nn.init.normal_(conv.weight, std=0.01)
    nn.init.constant_(conv.bias, 0.0)  # type: ignore[arg-type]
    return conv


def _resized(x: Tensor, size: Sequence[int]) -> Tensor:
    """Bilinearly, corners not aligned."""
    return F.interpolate(x, list(size), mode="bilinear", align_corners=False)


def _log2(value: int, base: int, argument: str) -> int:
    power = round(math.log2(value / base))
    if value != base * 2.0**power:
        raise ValueError(
            f"{argument}: expected powers of two times each other, got {value} and {base}"
        )
    return power


def _windows(length: int, crop: int, step: int) -> list[slice]:
    last = max(length - crop, 0)
    starts = (min(i * step, last) for i in range(-(-last // step) + 1))
    return [slice(start, start + crop) for start in starts]


def _require_labels(labels: Tensor, count: int, ignore_index: int | None, argument: str) -> None:
    wrong = (labels < 0) | (labels >= count)
    if ignore_index is not None:
        wrong &= labels != ignore_index
    if wrong.any():
        ignored = "" if ignore_index is None else f" or {ignore_index}"
        raise ValueError(
            f"{argument}: expected labels from 0 to {count - 1}{ignored} of {count} classes, "
            f"got {labels[wrong][0].item()}"
        )
