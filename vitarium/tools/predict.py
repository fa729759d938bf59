"""`vitarium predict`: the likeliest classes of images, by any model, or objects, by a detector."""

from __future__ import annotations

import csv
import json
import os
import sys
from argparse import Namespace
from pathlib import Path
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
from vitarium.tools._common import check_model, pick_device, read_image, save
from vitarium.tools.train import config_file, require_detection

_TOPK = 5  # classes of an image
_THRESHOLD = 0.3  # least score of what is shown


def run(args: Namespace) -> int:
    """Predict every image; one that cannot be read gets a line on stderr, and the rest goes on.

    Raises:
        ValueError: unknown model or config, no weights, a checkpoint that does not fit, no such
            device, an option that does not apply.
        OSError: a file cannot be written.
    """
    device = pick_device(args.device)
    if args.config is not None:
        return _detect(args, device)
    for option in ("set", "out", "threshold"):
        if getattr(args, option) not in (None, []):
            raise ValueError(f"--{option}: not for --model, which classifies")
    topk = args.topk or _TOPK
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
            probabilities, indices = logits.softmax(0).topk(min(topk, len(logits)))
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


def _detect(args: Namespace, device: torch.device) -> int:
    """Find objects, print them, and draw them on copies of the images."""
    path = config_file(args.config)
    if path.suffix != ".py":
        raise ValueError(f"--config: expected that of a detector, got {args.config}")
    if args.checkpoint is None:
        raise ValueError("--checkpoint: expected the detector's weights, got none")
    if args.topk is not None:
        raise ValueError("--topk: not for --config; --threshold says what is shown")
    threshold = _THRESHOLD if args.threshold is None else args.threshold
    if not 0 <= threshold <= 1:
        raise ValueError(f"--threshold: expected 0 ... 1, got {threshold}")
    out = Path(args.out or "outputs")
    pictures = [out / f"{Path(name).stem}.objects.png" for name in args.images]
    twice = next((x for x in pictures if pictures.count(x) > 1), None)
    if twice is not None:
        raise ValueError(f"IMAGE: expected names that differ, two would be drawn to {twice}")
    require_detection()
    from vitarium.detection.pictures import draw
    from vitarium.detection.predictor import Predictor

    predictor = Predictor(path, args.checkpoint, device, args.set)
    out.mkdir(parents=True, exist_ok=True)
    results: list[dict[str, Any]] = []
    with open(args.csv or os.devnull, "w", newline="", encoding="utf-8") as file:
        table = csv.writer(file)
        table.writerow(("image", "rank", "index", "label", "score", "x1", "y1", "x2", "y2"))
        for name, picture in zip(args.images, pictures, strict=True):
            try:
                image = read_image(name)
            except ValueError as error:
                print(f"vitarium: error: {error}", file=sys.stderr)
                results.append({"image": name, "error": str(error)})
                continue
            objects = predictor(image, threshold)
            save(draw(image, objects, predictor.names), picture)
            rows = objects.rows(predictor.names)
            results.append({"image": name, "picture": str(picture), "predictions": rows})
            for rank, row in enumerate(rows, 1):
                values = (row["index"], row["label"], row["score"], *row["box"])
                table.writerow((name, rank, *values))
            if not args.json:
                print(name)
                for row in rows:
                    sides = " ".join(f"{x:.0f}" for x in row["box"])
                    print(f"  {row['score']:7.2%}  {row['label']}  [{sides}]")
                print(f"wrote {picture}")
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
