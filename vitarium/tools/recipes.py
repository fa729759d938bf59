"""Write the configs of published settings that ship, from the tables below.

``python -m vitarium.tools.recipes`` writes them, ``--check`` only says whether they are stale. The
settings are facts from the authors' files, which every config names; results are models.json's.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from textwrap import wrap
from typing import Any

_PACKAGE = Path(__file__).resolve().parent.parent
_WIDTH = 100

_Settings = dict[str, Any]

_NAT = "SHI-Labs/Neighborhood-Attention-Transformer d334f5b"
_BIFORMER = "rayleizhu/BiFormer 1697bbb"
_AGENT = "LeapLabTHU/Agent-Attention 207ce3e"
_SWIN = "microsoft/Swin-Transformer f82860b"
_SWIN_ADE20K = "SwinTransformer/Swin-Transformer-Semantic-Segmentation 87e6f90"
_DAVIT = "dingmyu/davit fc79470"
_PROBING = "billpsomas/efficient-probing b8f4fb8"

_BF16 = "mixed precision is bfloat16, theirs float16"
_GPUS = "8 GPUs are assumed, their number is not stated"
_DROP_PATH = "this size's drop path is not stated, the one here is their program's default"
_BIASES = "biases have no weight decay, theirs have"
_NORMS = "norms and biases have no weight decay, theirs have"
_ORDER = (
    "model",
    "data",
    "augment",
    "loss",
    "head",
    "probe",
    "optimizer",
    "schedule",
    "ema",
    "train",
)


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """One config.

    Attributes:
        name: of the file, without its ending.
        title: what is trained on what.
        expected: the result, and who says so.
        source: where the settings are from.
        differs: what is not as published.
        gpus: how many the published number of images a step is for.
        settings: what the config says.
    """

    name: str
    title: str
    expected: str
    source: str
    differs: tuple[str, ...]
    gpus: int = 8
    settings: _Settings


def main(argv: Sequence[str] | None = None) -> int:
    """Write the configs, or check them; returns the exit status."""
    return write(generate(), "vitarium.tools.recipes", argv)


def write(texts: Mapping[Path, str], module: str, argv: Sequence[str] | None) -> int:
    """Write generated files, or say with ``--check`` which are stale; returns the exit status.

    Args:
        texts: the files and what belongs in them.
        module: what writes them.
        argv: arguments of the command line; None for the process' own.
    """
    parser = argparse.ArgumentParser(description=f"Write the configs of {module}.")
    parser.add_argument("--check", action="store_true", help="exit 1 if they are stale")
    check = parser.parse_args(argv).check
    stale = {
        path: text
        for path, text in texts.items()
        if not path.exists() or path.read_text(encoding="utf-8") != text
    }
    for path, text in stale.items():
        if check:
            print(f"{path.name} is stale: run python -m {module}", file=sys.stderr)
        else:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8", newline="\n")
            print(f"wrote {path}")
    return int(check and bool(stale))


def generate() -> dict[Path, str]:
    """The configs and what belongs in them."""
    return {
        _PACKAGE / "configs" / recipe.settings["task"] / f"{recipe.name}.toml": _text(recipe)
        for recipe in recipes()
    }


def recipes() -> Iterator[Recipe]:
    """All of them, each family's smallest model first."""
    yield from _nat_classifiers()
    yield from _biformer_classifiers()
    yield from _agent_classifiers()
    yield from _fused_classifiers()
    yield from _nat_segmenters()
    yield from _biformer_segmenters()
    yield from _agent_segmenters()
    yield from _fused_segmenters()
    yield from _cityscapes()
    yield from _probes()


_IMAGENET: _Settings = {
    "task": "classification",
    "data": {"source": "folder", "root": "data/imagenet", "image_size": 224, "workers": 8},
    "augment": {"auto_augment": "rand-m9-mstd0.5-inc1", "random_erasing": 0.25},
    "loss": {"label_smoothing": 0.1, "mixup": 0.8, "cutmix": 1.0},
    "optimizer": {"name": "adamw", "lr": 1e-3, "lr_batch": 1024, "weight_decay": 0.05},
    "schedule": {
        "name": "cosine",
        "epochs": 300,
        "warmup_epochs": 20,
        "warmup_lr": 1e-6,
        "min_lr": 1e-5,
    },
    "train": {"batch_size": 128, "precision": "bf16"},
}


def _nat_classifiers() -> Iterator[Recipe]:
    shi = {
        "augment": {"interpolation": "random"},
        "optimizer": {"clip_grad": 5.0},
        "schedule": {"min_lr": 5e-6, "cooldown_epochs": 10},
    }
    longer = {"schedule": {"warmup_epochs": 50}, "ema": {"decay": 0.9998}}
    for entry, drop_path in (
        *(("nat_mini", 0.2), ("nat_tiny", 0.2), ("nat_small", 0.3), ("nat_base", 0.5)),
        *(("dinat_mini", 0.2), ("dinat_tiny", 0.2), ("dinat_small", 0.3), ("dinat_base", 0.5)),
        *(("dinat_s_tiny", 0.2), ("dinat_s_small", 0.3), ("dinat_s_base", 0.5)),
        *(("nat_isotropic_small", 0.1), ("nat_isotropic_base", 0.4)),
        *(("dinat_isotropic_small", 0.1), ("dinat_isotropic_base", 0.4)),
        *(("vitrpb_small", 0.1), ("vitrpb_base", 0.4)),
    ):
        own = longer if drop_path == 0.4 else {}
        file = f"classification/configs/{entry.replace('vitrpb', 'vit_rpb')}.yml"
        source = f"{_NAT}, {file}, classification/train.py"
        yield _classifier(f"{entry}.shi_in1k", drop_path, source, (_BF16, _GPUS), shi, own)
    fine_tuning = {
        "loss": {"mixup": 0.0, "cutmix": 0.0},
        "optimizer": {"lr": 5e-5, "lr_batch": 512, "weight_decay": 1e-4},
        "schedule": {"name": "poly", "power": 1.0, "epochs": 30, "warmup_epochs": 0}
        | {"cooldown_epochs": 0},
        "train": {"batch_size": 64, "precision": "fp32"},
    }
    for entry in ("dinat_large", "dinat_s_large"):
        start = {"model": {"name": f"{entry}.shi_in22k", "pretrained": True}}
        source = f"{_NAT}, classification/configs/{entry}.yml, classification/train.py"
        tag = f"{entry}.shi_in22k_ft_in1k"
        yield _classifier(tag, 0.35, source, (_GPUS,), shi, fine_tuning, start)


def _biformer_classifiers() -> Iterator[Recipe]:
    settings = {"data": {"repeats": 3}, "schedule": {"warmup_epochs": 5}}
    for entry, drop_path, note in (
        ("biformer_tiny", 0.1, (_DROP_PATH,)),
        ("biformer_small", 0.15, ()),
        ("biformer_base", 0.1, (_DROP_PATH,)),
        ("biformer_stl", 0.1, ()),
        ("biformer_stl_nchw", 0.1, ()),
    ):
        source = f"{_BIFORMER}, README, configs/train_args.yaml, scripts/train.sh"
        average = "no averaged weights, which theirs keep but do not report"
        differs = (_BF16, average, *note)
        yield _classifier(f"{entry}.rayleizhu_in1k", drop_path, source, differs, settings)


def _agent_classifiers() -> Iterator[Recipe]:
    fp32 = {"train": {"precision": "fp32"}}
    half = {"train": {"batch_size": 64}}
    clip = {"optimizer": {"clip_grad": 5.0}}
    later = {"schedule": {"warmup_lr": 2e-6, "min_lr": 2e-5, "cooldown_epochs": 10}}
    pvt = {"schedule": {"warmup_epochs": 5}}
    heavier = {"optimizer": {"weight_decay": 0.1}}
    rows: tuple[tuple[str, str, float, tuple[_Settings, ...]], ...] = (
        ("agent_deit_tiny", "deit_t", 0.0, (clip, {"train": {"batch_size": 512}})),
        ("agent_deit_small", "deit_s", 0.1, (clip,)),
        ("agent_deit_base", "deit_b", 0.3, (clip,)),
        ("agent_pvt_tiny", "pvt_t", 0.1, (later, pvt)),
        ("agent_pvt_small", "pvt_s", 0.1, (later, pvt)),
        ("agent_pvt_medium", "pvt_m", 0.3, (later, pvt, {"optimizer": {"clip_grad": 1.0}})),
        ("agent_pvt_large", "pvt_b", 0.3, (later, pvt, {"optimizer": {"clip_grad": 1.0}}, half)),
        ("agent_swin_tiny", "swin_t", 0.2, (clip,)),
        ("agent_swin_small", "swin_s", 0.3, (clip,)),
        ("agent_swin_base", "swin_b", 0.5, (clip, half)),
        ("agent_cswin_tiny", "cswin_t", 0.2, (later, {"ema": {"decay": 0.99984}})),
        ("agent_cswin_small", "cswin_s", 0.4, (later, {"ema": {"decay": 0.99984}})),
        ("agent_cswin_base", "cswin_b", 0.5, (later, {"ema": {"decay": 0.99992}}, half, heavier)),
    )
    for entry, file, drop_path, own in rows:
        source = f"{_AGENT}, agent_transformer: README, config.py, cfgs/agent_{file}.yaml"
        yield _classifier(f"{entry}.leaplab_in1k", drop_path, source, (), fp32, *own)


def _fused_classifiers() -> Iterator[Recipe]:
    swin = {"optimizer": {"clip_grad": 5.0}, "schedule": {"warmup_prefix": True}}
    large = {"data": {"image_size": 256}}
    for size, drop_path in (("tiny", 0.2), ("small", 0.3), ("base", 0.5)):
        name = f"swin_{size}_patch4_window7_224"
        source = f"{_SWIN}, config.py, configs/swin/{name}.yaml"
        yield _classifier(f"fused_{name}.microsoft_in1k", drop_path, source, (_BF16,), swin)
    for window in (8, 16):
        for size, drop_path in (("tiny", 0.2), ("small", 0.3), ("base", 0.5)):
            tag = f"fused_swinv2_{size}_window{window}_256.microsoft_in1k"
            file = f"configs/swinv2/swinv2_{size}_patch4_window{window}_256.yaml"
            source = f"{_SWIN}, config.py, {file}"
            yield _classifier(tag, drop_path, source, (_BF16,), swin, large)

    davit = {
        "optimizer": {"clip_grad": 1.0},
        "schedule": {"warmup_epochs": 5, "cooldown_epochs": 10},
    }
    for size in ("tiny", "small", "base"):
        differs = (_BF16,) if size == "tiny" else (_BF16, _DROP_PATH)
        source = f"{_DAVIT}, README, train.py"
        yield _classifier(f"fused_davit_{size}.dingmyu_in1k", 0.1, source, differs, davit)


def _classifier(
    tag: str, drop_path: float, source: str, differs: tuple[str, ...], *settings: _Settings
) -> Recipe:
    """A recipe by the tag that its result is published for."""
    row = _published(tag)
    model = {"model": {"name": row["entry"], "drop_path_rate": drop_path}}
    return Recipe(
        name=row["entry"],
        title=f"{row['entry']} on ImageNet-1K",
        expected=f"top-1 {row['top1']} ({row['source']})",
        source=source,
        differs=differs,
        settings=_merged(_IMAGENET, model, *settings),
    )


_MAPS: _Settings = {
    "task": "segmentation",
    "model": {"name": "", "pretrained": True, "kwargs": {"task": "seg"}},
    "augment": {"scale": [0.5, 2.0], "category_max": 0.75, "photometric": True},
    "optimizer": {"name": "adamw", "betas": [0.9, 0.999]},
    "schedule": {"name": "poly"},
    "train": {"batch_size": 2, "precision": "fp32", "sync_batchnorm": True},
}
_TITLES = {"upernet": "UPerNet", "semantic_fpn": "Semantic FPN"}
_UPERNET: _Settings = {
    "head": {"name": "upernet"},
    "optimizer": {"lr": 6e-5, "weight_decay": 0.01},
    "schedule": {"updates": 160000, "power": 1.0, "warmup_updates": 1500, "warmup_lr": 6e-11},
}
_ADE20K: _Settings = {
    "data": {
        "source": "ade20k",
        "root": "data/ADEChallengeData2016",
        "train": "training",
        "val": "validation",
        "image_size": 512,
    },
    "augment": {"resize": [512, 2048]},
}


_FPN: _Settings = {
    "head": {"name": "semantic_fpn"},
    "optimizer": {"lr": 2e-4, "weight_decay": 1e-4},
}
_IN_BF16: _Settings = {"train": {"precision": "bf16"}}


def _nat_segmenters() -> Iterator[Recipe]:
    for entry, drop_path in (
        *(("nat_mini", 0.2), ("nat_tiny", 0.3), ("nat_small", 0.5), ("nat_base", 0.5)),
        *(("dinat_mini", 0.2), ("dinat_tiny", 0.3), ("dinat_small", 0.5), ("dinat_base", 0.5)),
        *(("dinat_s_tiny", 0.3), ("dinat_s_small", 0.3), ("dinat_s_base", 0.3)),
    ):
        family = entry.rpartition("_")[0]
        file = f"segmentation/configs/{family}/upernet_{entry}_512x512_160k_ade20k.py"
        tag = f"{entry}.shi_upernet_160k_ade20k"
        yield _segmenter(tag, drop_path, f"{_NAT}, {file}", (_BF16, _BIASES), _IN_BF16)
    larger = {"data": {"image_size": 640}, "augment": {"resize": [640, 2560]}}
    for entry in ("dinat_large", "dinat_s_large"):
        family = entry.rpartition("_")[0]
        file = f"segmentation/configs/{family}/upernet_{entry}_640x640_160k_ade20k.py"
        start = {"model": {"name": f"{entry}.shi_in22k", "pretrained": True}}
        size = "crops have 640 pixels as its name says, the file itself inherits 512"
        tag = f"{entry}.shi_upernet_160k_ade20k"
        yield _segmenter(tag, 0.3, f"{_NAT}, {file}", (size, _BIASES), larger, start)


def _biformer_segmenters() -> Iterator[Recipe]:
    cosine = {
        "schedule": {"name": "cosine", "updates": 80000, "warmup_updates": 1000}
        | {"warmup_lr": 2e-5, "min_lr": 2e-12},
        "train": {"batch_size": 4},
    }
    aligned = "in validation sides are not rounded to 32 pixels"
    for size, narrow, wide in (("small", 0.15, 0.3), ("base", 0.3, 0.4)):
        file = f"semantic_segmentation/configs/ade20k/sfpn.biformer_{size}.py"
        tag = f"biformer_{size}.rayleizhu_semantic_fpn_80k_ade20k"
        differs = (_BF16, _NORMS, aligned)
        yield _segmenter(tag, narrow, f"{_BIFORMER}, {file}", differs, _FPN, cosine, _IN_BF16)
        file = f"semantic_segmentation/configs/ade20k/upernet.biformer_{size}.py"
        tag = f"biformer_{size}.rayleizhu_upernet_160k_ade20k"
        length = "its schedule file is not in the repository: 160000 updates by its name"
        differs = (_BF16, _BIASES, length)
        yield _segmenter(tag, wide, f"{_BIFORMER}, {file}", differs, _IN_BF16)


def _agent_segmenters() -> Iterator[Recipe]:
    folder = "downstream/segmentation/configs"
    for size, drop_path in (("tiny", 0.3), ("small", 0.3), ("base", 0.5)):
        file = f"{folder}/agent_swin/upernet_agent_swin_{size[0]}_9-12-14-7.py"
        tag = f"agent_swin_{size}.leaplab_upernet_160k_ade20k"
        yield _segmenter(tag, drop_path, f"{_AGENT}, {file}", (_BIASES,))
    power = {"schedule": {"updates": 40000, "power": 0.9}}
    for size, drop_path in (("tiny", 0.1), ("small", 0.1), ("medium", 0.2), ("large", 0.1)):
        file = f"{folder}/agent_pvt/fpn_agent_pvt_{size[0]}_12-16-28-28.py"
        tag = f"agent_pvt_{size}.leaplab_semantic_fpn_40k_ade20k"
        yield _segmenter(tag, drop_path, f"{_AGENT}, {file}", (_NORMS,), _FPN, power)


def _fused_segmenters() -> Iterator[Recipe]:
    for size in ("tiny", "small", "base"):
        name = f"swin_{size}_patch4_window7"
        file = f"configs/swin/upernet_{name}_512x512_160k_ade20k.py"
        tag = f"fused_{name}_224.microsoft_upernet_160k_ade20k"
        start = {"model": {"name": f"fused_{name}_224.microsoft_in1k"}}
        yield _segmenter(tag, 0.3, f"{_SWIN_ADE20K}, {file}", (_BIASES,), start)
    local = {"train": {"sync_batchnorm": False}}
    for size in ("tiny", "small", "base"):
        file = "mmseg/configs/upernet_davit_512x512_160k_ade20k.py"
        tag = f"fused_davit_{size}.dingmyu_upernet_160k_ade20k"
        other = () if size == "tiny" else ("the file is DaViT-Tiny's",)
        yield _segmenter(tag, 0.3, f"{_DAVIT}, {file}", (_NORMS, *other), local)


def _segmenter(
    tag: str, drop_path: float, source: str, differs: tuple[str, ...], *settings: _Settings
) -> Recipe:
    """A recipe for ADE20K by the tag of the released segmenter."""
    row = _published(tag)
    entry = row["entry"]
    head = "semantic_fpn" if "_semantic_fpn_" in tag else "upernet"
    model = {"model": {"name": entry, "drop_path_rate": drop_path}}
    base = _UPERNET if head == "upernet" else {}
    found = _merged(_MAPS, _ADE20K, model, base, *settings)
    results = ", ".join(f"{name} {value}" for name, value in row["metrics"].items())
    return Recipe(
        name=f"{head}_{entry}_ade20k",
        title=f"{_TITLES[head]} on {entry}, ADE20K",
        expected=f"{results} ({row['source']})",
        source=source,
        differs=differs,
        settings=_with_intervals(found, images=20210),
    )


def _cityscapes() -> Iterator[Recipe]:
    """UPerNet for Cityscapes: mmsegmentation's data and length, the optimizer of ADE20K."""
    city = {
        "data": {"source": "cityscapes", "root": "data/cityscapes", "image_size": [512, 1024]},
        "augment": {"resize": [1024, 2048]},
        "schedule": {"updates": 80000},
    }
    swin = "fused_swin_tiny_patch4_window7_224"
    for entry, drop_path in (
        *(("nat_mini", 0.2), ("dinat_mini", 0.2), ("biformer_small", 0.3)),
        *(("agent_swin_tiny", 0.3), (swin, 0.3), ("fused_davit_tiny", 0.3)),
    ):
        name = f"{entry}.microsoft_in1k" if entry == swin else entry
        model = {"model": {"name": name, "drop_path_rate": drop_path}}
        yield Recipe(
            name=f"upernet_{entry}_cityscapes",
            title=f"UPerNet on {entry}, Cityscapes",
            expected="unknown, its authors publish none",
            source=f"{_SWIN_ADE20K}, configs/_base_/datasets/cityscapes.py and "
            "configs/upernet/upernet_r50_512x1024_80k_cityscapes.py for data and length; "
            f"upernet_{entry}_ade20k.toml for the rest",
            differs=(_BIASES,),
            gpus=4,
            settings=_with_intervals(_merged(_MAPS, _UPERNET, model, city), images=2975, gpus=4),
        )


def _with_intervals(settings: _Settings, images: int, gpus: int = 8) -> _Settings:
    """Ten validations in a run of so many images a pass, as mmsegmentation has them."""
    updates = settings["schedule"]["updates"] // 10
    epochs = updates * settings["train"]["batch_size"] * gpus / images
    often = {"validate_every": round(epochs, 2), "checkpoint_every": updates // 10}
    return _merged(settings, {"train": often})


def _probes() -> Iterator[Recipe]:
    """Efficient probing and a linear probe, with the settings that their comparison has."""
    settings: _Settings = {
        "task": "probing",
        "model": {"name": "vit_base_patch16_224.mae", "pretrained": True},
        "data": {"source": "folder", "root": "data/imagenet", "image_size": 224, "workers": 8},
        "augment": {"crop_pct": 0.875},
        "optimizer": {"name": "lars", "lr": 0.1, "lr_batch": 256, "weight_decay": 1e-12}
        | {"momentum": 0.9},
        "schedule": {"name": "cosine", "epochs": 90, "warmup_epochs": 10}
        | {"warmup_lr": 0.0, "warmup_prefix": True},
        "train": {"batch_size": 512, "precision": "bf16"},
    }
    for name, title, pooling, top1 in (
        ("ep_vit_base_mae", "Efficient probing", "ep", 75.5),
        ("linear_vit_base_mae", "A linear probe", "cls", 67.8),
    ):
        yield Recipe(
            name=name,
            title=f"{title} of MAE's ViT-B/16 on ImageNet-1K",
            expected=f"top-1 {top1} (README of billpsomas/efficient-probing, b8f4fb8)",
            source=f"{_PROBING}, README, main_linprobe.py",
            differs=(
                "weight decay is none: 1e-12 only turns timm's LARS on for weights of two "
                "dimensions or more, which are those that theirs scales",
                "random crops are timm's, theirs are drawn without trying again",
            ),
            settings=_merged(settings, {"probe": {"pooling": pooling}}),
        )


@cache
def rows() -> list[dict[str, Any]]:
    """What is known of every tag: models.json."""
    found: list[dict[str, Any]] = json.loads((_PACKAGE / "models.json").read_text(encoding="utf-8"))
    return found


def _published(name: str) -> dict[str, Any]:
    """The facts of a tag."""
    return next(row for row in rows() if row["name"] == name)


def _merged(*settings: _Settings) -> _Settings:
    """Later ones count more; their sections are merged."""
    found: _Settings = {}
    for each in settings:
        for key, value in each.items():
            inner = isinstance(value, dict)
            found[key] = _merged(found.get(key, {}), value) if inner else value
    return found


def _text(recipe: Recipe) -> str:
    """The file: a header and the settings as TOML."""
    settings, gpus = recipe.settings, recipe.gpus
    images = settings["train"]["batch_size"] * gpus
    several = f"-m vitarium_cli train {recipe.name}"
    # where batch norm is synchronised, parts of a step would have statistics of their own
    synchronised = settings["train"].get("sync_batchnorm", False)
    whole = f"batch_size={images}" if synchronised else f"accumulation={gpus}"
    head = [
        f"{recipe.title}: {images} images a step.",
        "",
        f"Command, {gpus} GPUs: torchrun --nproc_per_node {gpus} {several}",
        f"Or: accelerate launch --multi_gpu --num_processes {gpus} {several}",
        f"Command, 1 GPU: vitarium train {recipe.name} --set train.{whole}",
        "",
        f"Hardware: {gpus} GPUs; not run",
        *wrapped("Expected result", recipe.expected),
        *wrapped("Source", recipe.source),
        *wrapped("Differs", "; ".join(recipe.differs) or "in nothing known"),
        *weights(settings["model"]),
    ]
    lines = [f"# {line}".rstrip() for line in head]
    ordered = {key: settings[key] for key in ("task", *_ORDER) if key in settings}
    return "\n".join([*lines, "", *_toml(ordered, "")]) + "\n"


def weights(model: _Settings) -> list[str]:
    """What to do for weights that no program can fetch."""
    name = model["name"]
    used = (
        row for row in rows() if row["name"] == name or (row["entry"] == name and row["default"])
    )
    if model.get("pretrained") and any(row["weights"]["source"] == "manual" for row in used):
        return [f"Weights: from a browser, then vitarium download {name} --file FILE"]
    return []


def wrapped(key: str, text: str) -> list[str]:
    """Lines of a header."""
    return wrap(f"{key}: {text}", _WIDTH - 2, subsequent_indent="    ", break_on_hyphens=False)


def _toml(section: _Settings, prefix: str) -> Iterator[str]:
    # Numbers, strings and lists of them are written in TOML as in JSON.
    for key, value in section.items():
        if not isinstance(value, dict):
            yield f"{key} = {json.dumps(value)}"
    for key, value in section.items():
        if isinstance(value, dict):
            yield f"\n[{prefix}{key}]"
            yield from _toml(value, f"{prefix}{key}.")


if __name__ == "__main__":
    sys.exit(main())
