"""``vitarium convert``: a checkpoint file in our layout, or in the authors'."""

from __future__ import annotations

import json
import sys
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from vitarium.checkpoints.cards import card_path, check_files, write
from vitarium.checkpoints.conversion import plan
from vitarium.tools._common import check_model

_SHOWN = 5
_KINDS = {  # what the report calls names, and what that means
    "matched": "fit the model",
    "renamed": "have other names in the checkpoint",
    "dropped": "of the checkpoint are left out",
    "resized": "are for another size",
    "initialised": "are not in the checkpoint",
    "missing": "the model has, the checkpoint lacks",
    "unexpected": "the checkpoint has, the model lacks",
    "misshapen": "differ in shape or kind",
}


def run(args: Namespace) -> int:
    """Convert a file, or only say what would happen to each name.

    Raises:
        ValueError: unknown model, or what does not fit; nothing is written.
        OSError: the result cannot be written.
    """
    check_model(args.entry.partition(".")[0], pretrained=False)
    check_files(args.source, args.out, args.to)
    conversion = plan(
        args.entry,
        args.source,
        to=args.to,
        task=args.task,
        head=args.head,
        wrapper=args.wrapper,
        img_size=args.img_size,
        resize=args.resize,
        num_classes=args.num_classes,
    )
    report = conversion.key_report()
    if not args.json:
        _show(report)
    if args.dry_run or conversion.fault is not None:
        if args.json:
            print(json.dumps(report, indent=2))
        conversion.require_fit()
        return 0
    card = write(conversion, args.source, args.out)
    if args.json:
        print(json.dumps(card, indent=2))
    else:
        written = card["output"]
        print(f"wrote {args.out}, {written['size']:,} bytes, sha256 {written['sha256']}")
        print(f"wrote {card_path(Path(args.out))}")
    return 0


def _show(report: dict[str, Any]) -> None:
    """Print how many names there are of each kind, and the first few."""
    wrapper = " ".join(report["wrapper"]) or "nothing"
    task = "".join(f", {report[key]}" for key in ("task", "head") if report[key])
    console = Console(markup=False, highlight=False, width=None if sys.stdout.isatty() else 140)
    console.print(
        f"{report['entry']}{task}, to {report['to']}; found around the tensors: {wrapper}"
    )
    table = Table(box=None, pad_edge=False, show_header=False)
    table.add_column(justify="right")
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for kind, meaning in _KINDS.items():
        names = report[kind]
        if names or kind == "matched":
            shown = [] if kind == "matched" else [*_lines(kind, names)]
            more = [f"and {len(shown) - _SHOWN} more"] if len(shown) > _SHOWN else []
            table.add_row(str(len(names)), kind, "\n".join([meaning, *shown[:_SHOWN], *more]))
    console.print(table)


def _lines(kind: str, names: dict[str, Any] | Sequence[str]) -> list[str]:
    if not isinstance(names, dict):
        return list(names)
    written = {
        "renamed": lambda name, x: f"{' + '.join(x)} -> {name}",
        "resized": lambda name, x: f"{name}: {x['from']} -> {x['to']}, {x['rule']}",
        "misshapen": lambda name, x: f"{name}: expected {x['expected']}, got {x['got']}",
    }
    line = written.get(kind, lambda name, why: f"{name}: {why}")
    return [line(name, x) for name, x in names.items()]
