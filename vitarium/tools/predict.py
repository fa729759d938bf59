"""`vitarium predict`: the likeliest classes of images, by any vitarium or timm model."""

from __future__ import annotations

import csv
import json
import os
import sys
from argparse import Namespace
from typing import Any

import timm
import torch
from timm.data import (
    ImageNetInfo,
    create_transform,
    infer_imagenet_subset,
    resolve_model_data_config,
)

from vitarium.checkpoints import load
from vitarium.tools._common import check_model, pick_device, read_image


def run(args: Namespace) -> int:
    """Predict every image; one that cannot be read gets a line on stderr, and the rest goes on.

    Raises:
        ValueError: unknown model, no weights, a checkpoint that does not fit, no such device.
        OSError: the CSV file cannot be written.
    """
    device = pick_device(args.device)
    cfg = check_model(args.model, pretrained=args.checkpoint is None)
    if cfg.num_classes == 0:
        raise ValueError(f"{args.model} has no classifier")
    model = timm.create_model(args.model, pretrained=args.checkpoint is None)
    if args.checkpoint is not None:
        load(model, args.checkpoint)
    model = model.to(device).eval()
    transform = create_transform(**resolve_model_data_config(model), is_training=False)
    labels = label_names(model)

    results: list[dict[str, Any]] = []
    with open(args.csv or os.devnull, "w", newline="", encoding="utf-8") as file:
        table = csv.writer(file)
        table.writerow(("image", "rank", "index", "label", "probability"))
        for path in args.images:
            try:
                image = read_image(path)
            except ValueError as error:
                print(f"vitarium: error: {error}", file=sys.stderr)
                results.append({"image": path, "error": str(error)})
                continue
            with torch.inference_mode():
                logits = model(transform(image)[None].to(device))[0].float()
            probabilities, indices = logits.softmax(0).topk(min(args.topk, len(logits)))
            found = [
                {"index": i, "label": labels[i], "probability": p}
                for i, p in zip(indices.tolist(), probabilities.tolist(), strict=True)
            ]
            results.append({"image": path, "predictions": found})
            table.writerows((path, rank, *row.values()) for rank, row in enumerate(found, 1))
            if not args.json:
                print(path)
                for row in found:
                    print(f"  {row['probability']:7.2%}  {row['label']}")
    if args.json:
        print(json.dumps(results, indent=2))
    if args.csv:
        print(f"wrote {args.csv}")
    return int(any("error" in result for result in results))


def label_names(model: Any) -> list[str]:
    """A name for each of a classifier's classes.

    Returns:
        What its weights' configuration names them; ImageNet's names where the number of classes
        is that of ImageNet-1k or one of the 21k sets; otherwise their indices.
    """
    count: int = model.num_classes
    cfg = model.pretrained_cfg
    names = cfg.get("label_names")
    if names and len(names) == count:
        descriptions = cfg.get("label_descriptions") or {}
        return [descriptions.get(name, name) for name in names]
    subset = infer_imagenet_subset(model)
    if subset is None:
        return [str(index) for index in range(count)]
    info = ImageNetInfo(subset)
    return [info.index_to_description(index) for index in range(count)]
