"""`vitarium export-hub`: a model with its weights as a folder for timm and the Hugging Face hub."""

from __future__ import annotations

import json
import os
import shutil
from argparse import Namespace
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from timm.models import get_pretrained_cfg
from timm.models._hub import generate_readme, save_config_for_hf
from torch.utils.flop_counter import FlopCounterMode

import vitarium
from vitarium.backbones._registry import entries
from vitarium.checkpoints import fetch, load
from vitarium.checkpoints.conversion import plan
from vitarium.checkpoints.disk import digest
from vitarium.tools._common import check_model

_WEIGHTS, _CONFIG, _README = "model.safetensors", "config.json", "README.md"
# Licences that the hub has a name for, among those that weights have.
_HUB_LICENCES = {
    *("mit", "apache-2.0", "bsd-2-clause", "bsd-3-clause", "gpl-3.0", "agpl-3.0", "cc0-1.0"),
    *("cc-by-4.0", "cc-by-sa-4.0", "cc-by-nc-4.0", "cc-by-nc-sa-4.0", "cc-by-nc-nd-4.0"),
}
# What a tag says of its own weights and of no others.
_OF_THE_TAG = ("tag", "license", "description", "notes", "label_names", "label_descriptions")
_ABOUT = (
    "an image classifier for timm. Its architecture is in the Python package vitarium, in whose "
    "names and layouts the weights are."
)
_USAGE = """\
    pip install vitarium

```python
import timm
import vitarium  # enters the architecture into timm's registry

model = timm.create_model("hf-hub:OWNER/NAME", pretrained=True).eval()  # this repository's name
transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
logits = model(transform(image)[None])  # image: a PIL.Image in RGB
```

From a folder: `timm.create_model("local-dir:FOLDER", pretrained=True)`."""


def run(args: Namespace) -> int:
    """Write the folder, under another name first.

    Raises:
        ValueError: not a model of the zoo, no weights, weights that do not fit, arguments that
            the model does not take, or a folder that holds something already.
        OSError: the folder cannot be written.
    """
    folder = Path(args.folder).resolve()
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{args.folder}: expected a new or an empty folder")
    name = _full_name(args.model)
    model = _model(args, name)
    exists = folder.exists()
    part = (folder if exists else folder.parent) / f".{folder.name}.{os.getpid()}.part"
    try:
        part.mkdir(parents=True)
        _write(part, model, name, args)
        if exists:  # it stays, for it may be a volume, or where a shell is
            for file in (_WEIGHTS, _README, _CONFIG):  # without the last, nobody reads the others
                (part / file).rename(folder / file)
        else:
            part.rename(folder)
    finally:
        shutil.rmtree(part, ignore_errors=True)
    print(f"wrote {args.folder}: {', '.join(sorted(path.name for path in folder.iterdir()))}")
    return 0


def _full_name(model: str) -> str:
    """``entry.tag`` of a model of the zoo."""
    check_model(model, pretrained=False)
    entry = model.partition(".")[0]
    if entry not in entries():
        raise ValueError(f"{model} is timm's own: timm.models.save_for_hf exports it")
    cfg = get_pretrained_cfg(model)
    assert cfg is not None
    return f"{entry}.{cfg.tag}"


def _model(args: Namespace, name: str) -> Any:
    """The model in evaluation mode, with the weights that the arguments ask for."""
    if args.num_classes is not None and args.checkpoint is None:
        raise ValueError("--num-classes: expected with --checkpoint only, whose classifier it is")
    try:
        model: Any = timm.create_model(name, pretrained=args.checkpoint is None, **_wanted(args))
    except TypeError as error:
        if "img_size" not in str(error):
            raise
        raise ValueError(f"--img-size: {name} takes images of any size") from error
    if args.checkpoint is not None:
        if args.img_size is None:  # otherwise tables may be resized
            plan(name, args.checkpoint).require_fit()
        load(model, args.checkpoint)
        model.pretrained_cfg = {
            key: value for key, value in model.pretrained_cfg.items() if key not in _OF_THE_TAG
        }
    return model.eval()


def _wanted(args: Namespace) -> dict[str, Any]:
    return {"num_classes": args.num_classes, "img_size": args.img_size}


def _write(folder: Path, model: Any, name: str, args: Namespace) -> None:
    tensors = {key: tensor.contiguous() for key, tensor in model.state_dict().items()}
    try:
        save_file(tensors, folder / _WEIGHTS, metadata={"format": "pt"})
    except SafetensorError as error:
        raise OSError(f"{folder / _WEIGHTS}: cannot be written: {error}") from error
    data = {"input_size": (model.in_chans, *args.img_size)} if args.img_size else None
    save_config_for_hf(model, str(folder / _CONFIG), data_config=data)
    shutil.copymode(folder / _CONFIG, folder / _WEIGHTS)  # safetensors lets nobody else read
    entry = name.partition(".")[0]
    cfg = json.loads((folder / _CONFIG).read_text())["pretrained_cfg"]
    own = args.checkpoint is not None
    origin = _own(Path(args.checkpoint)) if own else _of_the_tag(name, args.img_size)
    details = {
        **_network(name, cfg, _wanted(args)),
        **origin,
        f"sha256 of {_WEIGHTS}": digest(folder / _WEIGHTS),
    }
    card = {
        "tags": ["image-classification", "timm", "vitarium"],
        "description": f"{cfg['paper_name']}: {_ABOUT}",
        **_licence(origin["licence of the weights"], cfg.get("origin_url")),
        "details": details,
        "usage": _USAGE,
    }
    readme = generate_readme(card, entry if own else name)
    (folder / _README).write_text(readme, encoding="utf-8", newline="\n")


def _network(name: str, cfg: Mapping[str, Any], wanted: Mapping[str, Any]) -> dict[str, str]:
    """What is known of the network and of the images that it takes."""
    with torch.device("meta"):
        model: Any = timm.create_model(name, **wanted).eval()
    entry = name.partition(".")[0]
    height, width = cfg["input_size"][1:]
    module = entries()[entry]
    weight = module._WEIGHTS.get(name)
    licence = (weight and weight.code_licence) or module._CODE_LICENCE
    return {
        "architecture": f"{entry} of vitarium {vitarium.__version__}",
        "paper": f"{cfg['paper_name']}, {cfg['paper_ids']}",
        "authors' code": f"{cfg['origin_url']}, {licence}" if "origin_url" in cfg else "vitarium",
        "parameters": f"{sum(parameter.numel() for parameter in model.parameters()):,}",
        "GFLOPs": f"{_gflops(model, cfg['input_size']):.2f} multiply-adds at {height} x {width}",
        "classes": str(model.num_classes),
        "images": f"{height} x {width}, {cfg['interpolation']}, crop {cfg['crop_pct']} "
        f"({cfg['crop_mode']}), mean {_row(cfg['mean'])}, standard deviation {_row(cfg['std'])}",
    }


def _of_the_tag(name: str, img_size: tuple[int, int] | None) -> dict[str, str]:
    """What is known of a tag's weights, for images of its own size or another."""
    module = entries()[name.partition(".")[0]]
    weight, published = module._WEIGHTS[name], module._PUBLISHED.get(name)
    source = weight.url or weight.manual or f"{weight.file}, which ships with vitarium"
    weights = f"{source}, sha256 {digest(fetch(weight, name))}"
    top1 = "not stated"
    if img_size is not None:
        weights += f"; made for images of {img_size[0]} x {img_size[1]} here"
    elif published is not None and published.top1 is not None:
        top1 = f"{published.top1} % ({published.source})"
    return {
        "weights": weights,
        "licence of the weights": weight.licence,
        "published top-1": top1,
    }


def _own(checkpoint: Path) -> dict[str, str]:
    """What is known of weights that the user brings."""
    return {
        "weights": f"{checkpoint.name}, sha256 {digest(checkpoint)}",
        "licence of the weights": "none stated",
    }


def _licence(licence: str, link: str | None) -> dict[str, str]:
    """The licence as a card's front matter has it."""
    if licence.lower() in _HUB_LICENCES:
        return {"license": licence.lower()}
    named = {"license": "other", "license_name": "-".join(licence.lower().split())}
    return {**named, "license_link": link} if link else named


def _gflops(model: Any, input_size: Sequence[int]) -> float:
    """Multiply-accumulate operations of one image, in 1e9."""
    with torch.device("meta"), torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(torch.empty(1, *input_size))
    return float(counter.get_total_flops()) / 2e9


def _row(values: Sequence[float]) -> str:
    return " ".join(map(str, values))
