"""`vitarium info`: all that the generated models.json tells about one model.

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
        known = [text for m in models for text in (m["name"], m["entry"])]
        raise ValueError(f"unknown model {args.model!r}{did_you_mean(args.model, known)}")
    model = found[0]
    if args.json:
        print(json.dumps(model, indent=2))
        return 0
    tags = [m["tag"] for m in models if m["entry"] == model["entry"] and m != model]
    facts = _facts(model) | ({"other tags": ", ".join(tags)} if tags else {})
    width = max(map(len, facts))
    for name, fact in facts.items():
        print(f"{name:{width}}  {fact}")
    return 0


def _facts(model: dict[str, Any]) -> dict[str, str]:
    paper, weights = model["paper"], model["weights"]
    height, width = model["input_size"][1:]
    published = f" ({model['source']})" if model["source"] else ""
    facts = {
        "model": model["name"],
        "family": f"{model['family']}: {paper['title']}, {paper['id']}",
        "code": f"{model['code'] or 'vitarium'}, {model['licence']['code']}",
        "params": f"{model['params']:,}",
        "GFLOPs": f"{model['gflops']:.2f} multiply-adds, counted at {height} x {width}",
        "published": _known(model["published_gflops"], f" GFLOPs{published}"),
        "top-1": _known(model["top1"], f" %{published}"),
        "classes": str(model["num_classes"]),
        "input": f"{height} x {width}, crop {model['crop_pct']}, {model['interpolation']}",
        "mean, std": f"{_row(model['mean'])}; {_row(model['std'])}",
        "channels": f"{_row(model['channels'])} at strides {_row(model['strides'])}",
        "ops": _row(model["ops"]),
        "weights": weights["source"],
    }
    if weights["source"] != "none":
        size = f"{weights['size']:,} bytes" if weights["size"] else "size not stated"
        facts["weights"] += f": {weights['address']}, {size}"
        facts["sha256"] = weights["sha256"] or "not stated"
        facts["licence"] = f"of the weights: {model['licence']['weights']}"
    return facts


def _known(value: float | None, unit: str) -> str:
    return "not stated" if value is None else f"{value}{unit}"


def _row(values: list[Any]) -> str:
    return ", ".join(map(str, values))
