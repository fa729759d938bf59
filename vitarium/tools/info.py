"""`vitarium info`: all that the generated models.json tells about one model or weight file.

Like `list`, loaded without the package above it: standard library, rich and `list` only.
"""

from __future__ import annotations

import json
from argparse import Namespace
from typing import Any

from .list import catalogue, did_you_mean


def run(args: Namespace) -> int:
    """Print one model's facts.

    Raises:
        ValueError: the zoo has no such model or tag.
    """
    models = catalogue()
    found = [
        model
        for model in models
        if args.model == model["name"] or (args.model == model["entry"] and model["default"])
    ]
    if not found:
        known = sorted({text for m in models for text in (m["name"], m["entry"])})
        raise ValueError(f"unknown model {args.model!r}{did_you_mean(args.model, known)}")
    model = found[0]
    beside = [m for m in models if m["entry"] == model["entry"] and m["name"] != model["name"]]
    files = {
        title: [m["name"] for m in beside if m["task"] == task]
        for task, title in (("cls", "other tags"), ("det", "detectors"), ("seg", "segmenters"))
    }
    if args.json:
        print(json.dumps(model | {k.replace(" ", "_"): v for k, v in files.items()}, indent=2))
        return 0
    facts = _facts(model)
    facts |= {title: ", ".join(names) for title, names in files.items() if names}
    width = max(map(len, facts))
    for name, fact in facts.items():
        print(f"{name:{width}}  {fact}")
    return 0


def _facts(model: dict[str, Any]) -> dict[str, str]:
    paper, licence = model["paper"], model["licence"]
    return {
        "model": model["name"],
        "family": f"{model['family']}: {paper['title']}, {paper['id']}",
        "code": f"{model['code'] or 'vitarium'}, {licence['code']}",
        "params": f"{model['params']:,}" + ("" if model["task"] == "cls" else ", of the backbone"),
        **(_classifier(model) if model["task"] == "cls" else _dense(model)),
        "channels": f"{_row(model['channels'])} at strides {_row(model['strides'])}",
        "ops": _row(model["ops"]),
        **_weights(model["weights"], licence["weights"]),
    }


def _classifier(model: dict[str, Any]) -> dict[str, str]:
    height, width = model["input_size"][1:]
    crop = f"crop {model['crop_pct']} ({model['crop_mode']})"
    published = f" ({model['source']})" if model["source"] else ""
    setting = {"setting": model["setting"]} if model["setting"] else {}
    return {
        "GFLOPs": f"{model['gflops']:.2f} multiply-adds, counted at {height} x {width}",
        "published": _known(model["published_gflops"], f" GFLOPs{published}"),
        "top-1": _known(model["top1"], f" %{published}"),
        **setting,
        "classes": str(model["num_classes"]),
        "input": f"{height} x {width}, {crop}, {model['interpolation']}",
        "mean, std": f"{_row(model['mean'])}; {_row(model['std'])}",
    }


def _dense(model: dict[str, Any]) -> dict[str, str]:
    results = ", ".join(f"{name} {value} %" for name, value in model["metrics"].items())
    return {"setting": model["setting"], "result": f"{results} ({model['source']})"}


def _weights(weights: dict[str, Any], licence: str | None) -> dict[str, str]:
    if weights["source"] in ("none", "not released"):
        reason = weights.get("address")
        return {"weights": weights["source"] + (f": {reason}" if reason else "")}
    return {
        "weights": f"{weights['source']}: {weights['address']}",
        **({"mirrors": _row(weights["mirrors"])} if weights["mirrors"] else {}),
        "wrapper": weights["wrapper"] or "not stated",
        "size": f"{weights['size']:,} bytes" if weights["size"] else "not published",
        "sha256": weights["sha256"] or "not published",
        "licence": f"of the weights: {licence}",
    }


def _known(value: float | None, unit: str) -> str:
    return "not stated" if value is None else f"{value}{unit}"


def _row(values: list[Any]) -> str:
    return ", ".join(map(str, values))
