"""Write the configs of detectors that ship, from one table per head below.

``python -m vitarium.tools.detection_recipes`` writes them, ``--check`` only says whether they are
stale. The settings are facts from the authors' files, which every config names; results are
models.json's. Networks, data and schedules are mmdet's own configs, by way of ``_base_``.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vitarium.tools.recipes import rows, weights, wrapped, write

FOLDER = Path(__file__).resolve().parent.parent / "configs" / "detection"
_WIDTH = 100
_GPUS = 8
_IMAGES = 16

Settings = dict[str, Any]

TITLES = {
    "mask_rcnn": "Mask R-CNN",
    "cascade_mask_rcnn": "Cascade Mask R-CNN",
    "retinanet": "RetinaNet",
    "dino": "DINO",
    "mask2former": "Mask2Former",
}
_EPOCHS = {"1x": 12, "3x": 36}


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """One config.

    Attributes:
        name: of the file, without its ending.
        title: what is trained on what.
        expected: the result, and who says so.
        source: where the settings are from.
        differs: what is not as published.
        released: name of the released detector, as ``vitarium download`` takes it; None for none.
        settings: what the config says.
    """

    name: str
    title: str
    expected: str
    source: str
    differs: tuple[str, ...]
    released: str | None = None
    settings: Settings


@dataclass(frozen=True, kw_only=True)
class Family:
    """What an author's detectors have in common.

    Attributes:
        repository: whose settings these are, and its commit.
        org: of the tags of the released detectors.
        file: an authors' config, with places for ``head``, ``entry``, ``size`` and ``schedule``.
        heads: what the authors call heads in the names of files.
        crops: whether the authors vary the size of images, in any schedule.
        no_decay: parts of the names of parameters without weight decay.
        amp: the scale of the loss in mixed precision, or None for float32.
        differs: what is not as published in any of them.
        tag: of the classifier that training begins with; None for the entry's first.
    """

    repository: str
    org: str
    file: str
    heads: Mapping[str, str] = field(default_factory=dict)
    crops: bool = True
    no_decay: tuple[str, ...] = ()
    amp: float | str | None = None
    differs: tuple[str, ...] = ()
    tag: str | None = None


_MMCV_AMP = ("mixed precision is torch's, theirs is of the parts that mmdet 2 marks",)
_SHI = Family(
    repository="SHI-Labs/Neighborhood-Attention-Transformer d334f5b",
    org="shi",
    file="detection/configs/{family}/{head}_{entry}_{schedule}_coco.py",
    no_decay=("rpb", "norm"),
    amp=512.0,
    differs=_MMCV_AMP,
)
_AGENT = "LeapLabTHU/Agent-Attention 207ce3e"
_AGENT_GPUS = ("8 GPUs are assumed, their number is not stated",)
_AGENT_HEADS = {"mask_rcnn": "mrcnn", "cascade_mask_rcnn": "crcnn", "retinanet": "rtn"}
_AGENT_FOLDER = "downstream/detection/configs"
_AGENT_BIASES = ("an_bias", "na_bias", "ah_bias", "aw_bias", "ha_bias", "wa_bias")
FAMILIES = {
    "nat": _SHI,
    "dinat": _SHI,
    "dinat_s": _SHI,
    "biformer": Family(
        repository="rayleizhu/BiFormer 1697bbb",
        org="rayleizhu",
        file="object_detection/configs/coco/{head}.{schedule}.{entry}.py",
        heads={"mask_rcnn": "maskrcnn"},
        crops=False,
        amp=512.0,
        differs=_MMCV_AMP,
    ),
    "agent_swin": Family(
        repository=_AGENT,
        org="leaplab",
        file=_AGENT_FOLDER + "/agent_swin/agent_swin_{size}_{head}_{schedule}_9-12-14-7.py",
        heads=_AGENT_HEADS,
        no_decay=("relative_position_bias_table", "norm", *_AGENT_BIASES),
        differs=_AGENT_GPUS,
    ),
    "agent_pvt": Family(
        repository=_AGENT,
        org="leaplab",
        file=_AGENT_FOLDER + "/agent_pvt/agent_pvt_{size}_{head}_{schedule}_12-16-28-28.py",
        heads=_AGENT_HEADS,
        crops=False,
        differs=_AGENT_GPUS,
    ),
    "fused_davit": Family(
        repository="dingmyu/davit fc79470",
        org="dingmyu",
        file="mmdet/configs/davit_{head}_{schedule}_coco.py",
        heads={"mask_rcnn": "maskrcnn"},
    ),
    "fused_swin": Family(
        repository="SwinTransformer/Swin-Transformer-Object-Detection c7b2011",
        org="microsoft",
        file="configs/swin/{head}_{swin}_mstrain_480-800_{giou}adamw_{schedule}_coco.py",
        no_decay=("relative_position_bias_table", "norm"),
        amp="dynamic",
        differs=("mixed precision is torch's, theirs is apex'",),
        tag="microsoft_in1k",
    ),
}


@dataclass(frozen=True, kw_only=True)
class Row:
    """One backbone in the table of a head.

    Attributes:
        drop_path: rate of the last block.
        like: whose settings are taken where the authors have none of their own: the name of a
            config of the same backbone.
        lr: learning rate of 16 images a step.
        weight_decay: of AdamW.
        amp: False where this one detector is trained in float32.
        differs: what else is not as published.
        tag: of the classifier that training begins with, where it is not its family's.
    """

    drop_path: float
    like: str | None = None
    lr: float = 1e-4
    weight_decay: float = 0.05
    amp: bool = True
    differs: tuple[str, ...] = ()
    tag: str | None = None


_DAVIT_TINY = ("the authors' file is DaViT-Tiny's",)
_SWIN_T, _SWIN_S, _SWIN_B = (
    f"fused_swin_{size}_patch4_window7_224" for size in ("tiny", "small", "base")
)

# The tables: by schedule and entry, each family's smallest model first.
MASK_RCNN: Mapping[str, Mapping[str, Row]] = {
    "1x": {
        "nat_mini": Row(drop_path=0.2, like="mask_rcnn_nat_mini_3x_coco"),
        "dinat_mini": Row(drop_path=0.2, like="mask_rcnn_dinat_mini_3x_coco"),
        "dinat_s_tiny": Row(drop_path=0.2, like="mask_rcnn_dinat_s_tiny_3x_coco"),
        "biformer_small": Row(drop_path=0.2),
        "biformer_base": Row(drop_path=0.3),
        "agent_swin_tiny": Row(drop_path=0.1),
        "agent_swin_small": Row(drop_path=0.1),
        "agent_pvt_tiny": Row(drop_path=0.1, lr=2e-4, weight_decay=1e-4),
        "agent_pvt_small": Row(drop_path=0.2, lr=2e-4, weight_decay=1e-4),
        "agent_pvt_medium": Row(drop_path=0.1, lr=2e-4, weight_decay=1e-4),
        "agent_pvt_large": Row(drop_path=0.2, lr=2e-4, weight_decay=1e-4),
        "fused_davit_tiny": Row(drop_path=0.1),
        "fused_davit_small": Row(drop_path=0.1, differs=_DAVIT_TINY),
        "fused_davit_base": Row(drop_path=0.1, differs=_DAVIT_TINY),
        _SWIN_T: Row(drop_path=0.1),
    },
    "3x": {
        "nat_mini": Row(drop_path=0.2),
        "nat_tiny": Row(drop_path=0.2),
        "nat_small": Row(drop_path=0.35),
        "dinat_mini": Row(drop_path=0.2),
        "dinat_tiny": Row(drop_path=0.2),
        "dinat_small": Row(drop_path=0.35),
        "dinat_s_tiny": Row(drop_path=0.2),
        "dinat_s_small": Row(drop_path=0.35),
        "biformer_small": Row(drop_path=0.2, like="mask_rcnn_biformer_small_1x_coco"),
        "agent_swin_tiny": Row(drop_path=0.1),
        "agent_swin_small": Row(drop_path=0.1),
        "agent_pvt_tiny": Row(
            drop_path=0.1, lr=2e-4, weight_decay=1e-4, like="mask_rcnn_agent_pvt_tiny_1x_coco"
        ),
        "fused_davit_tiny": Row(drop_path=0.2),
        "fused_davit_small": Row(drop_path=0.2, differs=_DAVIT_TINY),
        "fused_davit_base": Row(drop_path=0.2, differs=_DAVIT_TINY),
        _SWIN_T: Row(drop_path=0.2),
        _SWIN_S: Row(drop_path=0.2),
    },
}
CASCADE_MASK_RCNN: Mapping[str, Mapping[str, Row]] = {
    "1x": {"agent_swin_tiny": Row(drop_path=0.1), _SWIN_T: Row(drop_path=0.0)},
    "3x": {
        "nat_mini": Row(drop_path=0.2),
        "nat_tiny": Row(drop_path=0.3),
        "nat_small": Row(drop_path=0.3),
        "nat_base": Row(drop_path=0.5),
        "dinat_mini": Row(drop_path=0.2),
        "dinat_tiny": Row(drop_path=0.3),
        "dinat_small": Row(drop_path=0.5),
        "dinat_base": Row(drop_path=0.6, lr=7.5e-5),
        "dinat_large": Row(drop_path=0.6, lr=7.5e-5, amp=False, tag="shi_in22k"),
        "dinat_s_tiny": Row(drop_path=0.3),
        "dinat_s_small": Row(drop_path=0.5),
        "dinat_s_base": Row(drop_path=0.6, lr=7.5e-5),
        "dinat_s_large": Row(drop_path=0.6, lr=5e-5, tag="shi_in22k"),
        "biformer_small": Row(drop_path=0.2, like="mask_rcnn_biformer_small_1x_coco"),
        "agent_swin_tiny": Row(drop_path=0.1),
        "agent_swin_small": Row(drop_path=0.1),
        "agent_swin_base": Row(drop_path=0.4),
        "agent_pvt_tiny": Row(
            drop_path=0.1, lr=2e-4, weight_decay=1e-4, like="mask_rcnn_agent_pvt_tiny_1x_coco"
        ),
        "fused_davit_tiny": Row(drop_path=0.2, like="mask_rcnn_fused_davit_tiny_3x_coco"),
        _SWIN_T: Row(drop_path=0.2),
        _SWIN_S: Row(drop_path=0.2),
        _SWIN_B: Row(drop_path=0.3),
    },
}
RETINANET: Mapping[str, Mapping[str, Row]] = {
    "1x": {
        "nat_mini": Row(drop_path=0.2, like="mask_rcnn_nat_mini_3x_coco"),
        "dinat_mini": Row(drop_path=0.2, like="mask_rcnn_dinat_mini_3x_coco"),
        "dinat_s_tiny": Row(drop_path=0.2, like="mask_rcnn_dinat_s_tiny_3x_coco"),
        "biformer_small": Row(drop_path=0.2, weight_decay=1e-4),
        "biformer_base": Row(drop_path=0.3, weight_decay=1e-4),
        "agent_swin_tiny": Row(drop_path=0.1, like="mask_rcnn_agent_swin_tiny_1x_coco"),
        "agent_pvt_tiny": Row(drop_path=0.1, weight_decay=1e-4),
        "agent_pvt_small": Row(drop_path=0.1, weight_decay=1e-4),
        "agent_pvt_medium": Row(drop_path=0.2, weight_decay=1e-4),
        "agent_pvt_large": Row(drop_path=0.3, weight_decay=1e-4),
        "fused_davit_tiny": Row(drop_path=0.1),
        "fused_davit_small": Row(drop_path=0.1, differs=_DAVIT_TINY),
        "fused_davit_base": Row(drop_path=0.1, differs=_DAVIT_TINY),
        _SWIN_T: Row(drop_path=0.1, like=f"mask_rcnn_{_SWIN_T}_1x_coco"),
    },
    "3x": {
        "fused_davit_tiny": Row(drop_path=0.2),
        "fused_davit_small": Row(drop_path=0.2, differs=_DAVIT_TINY),
        "fused_davit_base": Row(drop_path=0.2, differs=_DAVIT_TINY),
    },
}


def main(argv: Sequence[str] | None = None) -> int:
    """Write the configs, or check them; returns the exit status."""
    return write(generate(), "vitarium.tools.detection_recipes", argv)


def generate() -> dict[Path, str]:
    """The configs and what belongs in them."""
    return {FOLDER / f"{recipe.name}.py": _text(recipe) for recipe in recipes()}


def recipes() -> Iterator[Recipe]:
    """All of them, by head."""
    tables = {"mask_rcnn": MASK_RCNN, "cascade_mask_rcnn": CASCADE_MASK_RCNN}
    for head, table in (tables | {"retinanet": RETINANET}).items():
        for schedule, backbones in table.items():
            for entry, row in backbones.items():
                yield _pyramid(head, schedule, entry, row)
    yield from _transformers()


def _pyramid(head: str, schedule: str, entry: str, row: Row) -> Recipe:
    """A detector on a feature pyramid."""
    family = family_of(entry)
    theirs = FAMILIES[family]
    masks = "detection" if head == "retinanet" else "instance"
    crops = theirs.crops or (schedule == "3x")
    parts = (head, f"coco_{masks}{'_crops' if crops else ''}", f"schedule_{schedule}")
    channels = _entry(entry)["channels"]
    backbone = {"name": _start(entry, row.tag or theirs.tag), "pretrained": True}
    backbone |= {"drop_path_rate": row.drop_path}
    if family == "biformer":
        backbone["norm_eval"] = True
    settings: Settings = {
        "_base_": [f"_base_/{part}.py" for part in parts],
        "model": {
            "backbone": backbone,
            "neck": {"in_channels": channels[1:] if head == "retinanet" else channels},
        },
        "optim_wrapper": {},
    }
    if theirs.amp is not None and row.amp:
        settings["optim_wrapper"] = {"type": "AmpOptimWrapper", "loss_scale": theirs.amp}
    own = {"lr": row.lr, "weight_decay": row.weight_decay}
    settings["optim_wrapper"]["optimizer"] = own
    no_decay = no_decay_of(head, family)
    if no_decay:
        keys = {part: {"decay_mult": 0.0} for part in no_decay}
        settings["optim_wrapper"]["paramwise_cfg"] = {"custom_keys": keys}
    released = f"{entry}.{theirs.org}_{head}_{schedule}_coco"
    published = next((x for x in rows() if x["name"] == released), None)
    differs: tuple[str, ...]
    if published is None:
        source = f"{row.like}.py for the optimizer and the drop path; mmdet 3.3.0 for the rest"
        source += ", Swin's authors for crops" if crops and not theirs.crops else ""
        expected, differs = "unknown, its authors publish none", ()
    else:
        source = f"{theirs.repository}, {_file(theirs, family, head, schedule, entry)}"
        expected = f"{_results(published)} ({published['source']})"
        differs = (*(theirs.differs if row.amp else ()), *row.differs)
    unreleased = published is None or published["weights"]["source"] == "not released"
    return Recipe(
        name=f"{head}_{entry}_{schedule}_coco",
        title=f"{TITLES[head]} on {entry}, COCO, {_EPOCHS[schedule]} epochs",
        expected=expected,
        source=source,
        differs=differs,
        released=None if unreleased else released,
        settings=settings,
    )


def no_decay_of(head: str, family: str) -> tuple[str, ...]:
    """Parts of the names of parameters that have no weight decay with a head."""
    if family == "biformer":  # as UniFormer's with masks, as WaveViT's without
        return () if head == "retinanet" else ("norm",)
    return FAMILIES[family].no_decay


def _transformers() -> Iterator[Recipe]:
    """DINO and Mask2Former."""
    shi, mmdet = _SHI.repository, "mmdet 3.3.0"
    nat = {"name": "nat_mini", "pretrained": True, "drop_path_rate": 0.2}
    channels = _entry("nat_mini")["channels"]
    yield Recipe(
        name="dino_nat_mini_1x_coco",
        title="DINO with four scales on nat_mini, COCO, 12 epochs",
        expected="unknown, its authors publish none",
        source=f"{mmdet}, dino-4scale_r50_8xb2-12e_coco.py; "
        "mask_rcnn_nat_mini_3x_coco.py for the drop path",
        differs=(),
        settings={
            "_base_": ["_base_/dino.py"],
            "model": {"backbone": nat, "neck": {"in_channels": channels[1:]}},
        },
    )
    norms = tuple(f"norm{i}.{leaf}" for i in range(4) for leaf in ("weight", "bias"))
    spared = ("attn.rpb", "patch_embed.norm", "downsample.norm", *norms)
    # as long as "backbone" at least, whose rate they keep: the longest name that fits counts
    undecayed = {key: {"lr_mult": 0.1, "decay_mult": 0.0} for key in spared}
    optimizer = {"paramwise_cfg": {"custom_keys": undecayed}}
    yield Recipe(
        name="mask2former_nat_mini_50e_coco_instance",
        title="Mask2Former on nat_mini, COCO instances, 50 epochs",
        expected="unknown, its authors publish none",
        source=f"{mmdet}, mask2former_r50_8xb2-lsj-50e_coco.py; "
        "mask_rcnn_nat_mini_3x_coco.py for the drop path",
        differs=(),
        settings={
            "_base_": ["_base_/mask2former_instance.py"],
            "model": {"backbone": nat, "panoptic_head": {"in_channels": channels}},
            "optim_wrapper": optimizer,
        },
    )
    entry = "dinat_large_11x11"
    backbone = {"name": f"{entry}.shi_in22k", "pretrained": True, "drop_path_rate": 0.3}
    head = {"in_channels": _entry(entry)["channels"], "num_queries": 200}
    length = {
        "param_scheduler": {"end": 737500, "milestones": [655556, 710184]},
        "train_cfg": {"max_iters": 737500, "dynamic_intervals": [(735001, 737500)]},
    }
    for kind in ("instance", "panoptic"):
        published = next(x for x in rows() if x["name"] == f"{entry}.shi_mask2former_coco_{kind}")
        file = f"mask2former/configs/coco/{kind}-segmentation/dinat, "
        file += "maskformer2_dinat_large_IN21k_384_bs16_100ep.yaml"
        yield Recipe(
            name=f"mask2former_{entry}_100e_coco_{kind}",
            title=f"Mask2Former on {entry}, COCO, {kind}, 100 epochs",
            expected=f"{_results(published)} ({published['source']})",
            source=f"{shi}, {file}; {mmdet}, mask2former for data and network",
            differs=("the authors train with detectron2",),
            released=published["name"],
            settings={
                "_base_": [f"_base_/mask2former_{kind}.py"],
                "model": {"backbone": backbone, "panoptic_head": head},
                "optim_wrapper": optimizer,
                **length,
            },
        )


def family_of(entry: str) -> str:
    """The longest name of a family that an entry begins with."""
    return max((name for name in FAMILIES if entry.startswith(f"{name}_")), key=len)


def _entry(entry: str) -> dict[str, Any]:
    """The facts of an entry."""
    return next(row for row in rows() if row["entry"] == entry and row["default"])


def _start(entry: str, tag: str | None) -> str:
    return entry if tag is None else f"{entry}.{tag}"


def _file(theirs: Family, family: str, head: str, schedule: str, entry: str) -> str:
    return theirs.file.format(
        head=theirs.heads.get(head, head),
        family=family,
        entry=entry,
        size=entry.rpartition("_")[2][0],
        schedule=schedule,
        swin=entry.removeprefix("fused_").removesuffix("_224"),
        giou="giou_4conv1f_" if head == "cascade_mask_rcnn" else "",
    )


def _results(published: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in published["metrics"].items())


def _text(recipe: Recipe) -> str:
    """The file: a header and the settings as Python."""
    name = recipe.name
    head = [
        f"{recipe.title}: {_IMAGES} images a step.",
        "",
        f"Command, {_GPUS} GPUs: torchrun --nproc_per_node {_GPUS} -m vitarium_cli train \\",
        f"    {name}",
        f"Command, 1 GPU: vitarium train {name} \\",
        f"    --set train_dataloader.batch_size={_IMAGES}",
        "",
        f"Hardware: {_GPUS} GPUs; not run",
        *wrapped("Expected result", recipe.expected),
        *wrapped("Source", recipe.source),
        *wrapped("Differs", "; ".join(recipe.differs) or "in nothing known"),
        *weights(recipe.settings["model"]["backbone"]),
    ]
    if recipe.released is not None:
        head += [f"Released detector: {recipe.released}"]
    settings = {"custom_imports": {"imports": ["vitarium.heads.mmdet"]}} | recipe.settings
    lines = [f"# {line}".rstrip() for line in head]
    lines += [f"{key} = {_literal(value, len(key) + 3, 0)}" for key, value in settings.items()]
    return "\n".join(lines) + "\n"


def _literal(value: Any, used: int, indent: int) -> str:
    """A value as Python, as ruff formats it: on one line if it fits there.

    Args:
        value: numbers, strings, and dictionaries, lists and tuples of them.
        used: characters of the line before it and after it.
        indent: of the line.
    """
    text = repr(value).replace("'", '"')
    if used + len(text) <= _WIDTH or not isinstance(value, (dict, list, tuple)):
        return text
    inner = indent + 4
    if isinstance(value, dict):
        items = [(f'"{key}": ', each) for key, each in value.items()]
    else:
        items = [("", each) for each in value]
    lines = [
        f"{' ' * inner}{key}{_literal(each, inner + len(key) + 1, inner)}," for key, each in items
    ]
    opening, closing = text[0], text[-1]
    return "\n".join([opening, *lines, f"{' ' * indent}{closing}"])


if __name__ == "__main__":
    sys.exit(main())
