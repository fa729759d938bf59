"""`vitarium list`: the models of the zoo, read from the generated models.json.

The program loads this file without the package above it, and thus without torch: it may import the
standard library and rich only.
"""

from __future__ import annotations

import json
from argparse import Namespace
from collections.abc import Iterable
from difflib import get_close_matches
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

_MODELS = Path(__file__).parents[1] / "models.json"
_PERMISSIVE = {"mit", "apache-2.0", "bsd-2-clause", "bsd-3-clause"}


def catalogue() -> list[dict[str, Any]]:
    """Every model and weight file with its facts, in order (see `vitarium.tools.catalogue`)."""
    models: list[dict[str, Any]] = json.loads(_MODELS.read_text(encoding="utf-8"))
    return models


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """``"; did you mean a, b?"`` with the names nearest to ``name``, or nothing."""
    near = get_close_matches(name.strip("*?"), list(known), n=3, cutoff=0.5)
    return f"; did you mean {', '.join(near)}?" if near else ""


def run(args: Namespace) -> int:
    """Print the models that match.

    Raises:
        ValueError: none does.
    """
    models = catalogue()
    named = [m for m in models if _matches(m, args.patterns)]
    if not named:
        known = {text for m in models for text in (m["name"], m["entry"])}
        hints = "".join(did_you_mean(pattern, sorted(known)) for pattern in args.patterns)
        raise ValueError(f"no model matches {' '.join(args.patterns)}{hints}")
    chosen = [m for m in named if _passes(m, args)]
    if not chosen:
        raise ValueError(f"the filters leave none of {len(named)} models (--task {args.task})")
    if args.json:
        print(json.dumps(chosen, indent=2))
    else:
        console = Console(markup=False, highlight=False)
        if classifiers := [m for m in chosen if m["task"] == "cls"]:
            console.print(_table(classifiers))
        if dense := [m for m in chosen if m["task"] != "cls"]:
            console.print(_dense_table(dense))
    return 0


def _matches(model: dict[str, Any], patterns: list[str]) -> bool:
    return not patterns or any(
        fnmatchcase(name, pattern)
        for pattern in patterns
        for name in (model["name"], model["entry"])
    )


def _passes(model: dict[str, Any], args: Namespace) -> bool:
    millions = model["params"] / 1e6
    # Without weights there is only the code's licence; "none stated" is one that permits nothing.
    licences = {licence.lower() for licence in model["licence"].values() if licence}
    return (
        args.task in (model["task"], "all")
        and (args.params_min is None or millions >= args.params_min)
        and (args.params_max is None or millions <= args.params_max)
        and (not args.weights or model["weights"]["source"] in ("packaged", "download"))
        and (
            args.licence == "any"
            or (args.licence == "permissive" and licences <= _PERMISSIVE)
            or args.licence.lower() in licences
        )
    )


def _table(models: list[dict[str, Any]]) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("model", overflow="fold")
    for column in ("params", "GFLOPs", "top-1", "input"):
        table.add_column(column, justify="right", min_width=len(column))
    table.add_column("weights", min_width=len("download"))
    table.add_column("their licence")
    for model in models:
        height, width = model["input_size"][1:]
        table.add_row(
            model["name"],
            f"{model['params'] / 1e6:.1f}M",
            _number(model["gflops"]),
            _number(model["top1"]),
            f"{height}" if height == width else f"{height}x{width}",
            model["weights"]["source"],
            model["licence"]["weights"] or "-",
        )
    return table


def _dense_table(models: list[dict[str, Any]]) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("detector or segmenter", overflow="fold")
    table.add_column("result, %")
    table.add_column("weights", min_width=len("download"))
    table.add_column("their licence")
    for model in models:
        table.add_row(
            model["name"],
            ", ".join(f"{name} {value}" for name, value in model["metrics"].items()),
            model["weights"]["source"],
            model["licence"]["weights"],
        )
    return table


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f}"
