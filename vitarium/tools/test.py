"""`vitarium test`: validate what `vitarium train` trained, or any other weights for its config."""

from __future__ import annotations

import csv
import json
import os
from argparse import Namespace
from pathlib import Path
from typing import Any

from vitarium.tools.train import check_options, chosen, config_file, overrides, pictures


def run(args: Namespace) -> int:
    """Print the measures, for a classifier in the columns of timm's validate.py.

    Raises:
        ValueError: the config, or what it names, does not fit, or there are no weights.
        OSError: the results cannot be written.
    """
    path = config_file(args.config)
    output = Path(args.output or f"outputs/{path.stem}")
    if path.suffix == ".py":
        check_options(args)
        from vitarium.detection.runner import measure

        measures = measure(
            path,
            output,
            args.set,
            checkpoint=args.checkpoint,
            device=args.device,
            launcher=args.launcher,
            pictures=pictures(args),
        )
        if os.environ.get("RANK", "0") == "0":
            _show(measures, args)
        return 0
    config, _ = chosen(args.config, overrides(args))
    from vitarium.training.engine import Engine

    with Engine(config, args.device) as engine:
        best = output / "best.safetensors"
        if args.checkpoint is not None:
            engine.load(args.checkpoint)
        elif best.exists():
            engine.load(best)
        elif not config.model.pretrained and config.model.checkpoint is None:
            raise ValueError(f"--checkpoint: expected weights, {best} is not there")
        row = engine.row(engine.test())
        if engine.main:
            _show(row, args)
    return 0


def _show(row: dict[str, Any], args: Namespace) -> None:
    if args.json:
        print(json.dumps(row, indent=2))
    else:
        width = max(map(len, row))
        for key, value in row.items():
            print(
                f"{key:{width}}  {value:.6g}"
                if isinstance(value, float)
                else f"{key:{width}}  {value}"
            )
    if args.csv is not None:
        path = Path(args.csv)
        part = path.with_name(path.name + ".part")
        with part.open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, [*row], lineterminator="\n")
            writer.writeheader()
            writer.writerow(row)
        part.replace(path)
