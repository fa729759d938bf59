"""`vitarium train`: train what a config describes, on one process or many, and go on later."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path

from vitarium.tools.list import did_you_mean
from vitarium.training.config import Config
from vitarium.training.toml import load_config

_CONFIGS = Path(__file__).resolve().parent.parent / "configs"


def run(args: Namespace) -> int:
    """Train to the end and print the last validation.

    Raises:
        ValueError: the config, or what it names, does not fit.
        OSError: the output cannot be written.
        KeyboardInterrupt: it was interrupted; a snapshot was written first.
    """
    config, name = chosen(args.config, args.set)
    from vitarium.training.engine import Engine

    output = Path(args.output or f"outputs/{name}")
    with Engine(config, args.device) as engine:
        measures = engine.train(output, args.resume)
        if engine.main:
            print("  ".join(f"{key} {value:.6g}" for key, value in measures.items()))
            print(f"wrote {output}")
    return 0


def chosen(config: str, overrides: list[str]) -> tuple[Config, str]:
    """A config by its path, or by its name among those that ship, and what to call the run.

    Raises:
        ValueError: there is none, or it does not describe a run.
    """
    path = Path(config)
    if path.suffix != ".toml" or not path.exists():
        shipped = {file.stem: file for file in sorted(_CONFIGS.rglob("*.toml"))}
        name = path.name.removesuffix(".toml")
        if name not in shipped or path.parent != Path():
            hint = did_you_mean(name, [*shipped])
            raise ValueError(
                f"config: expected a TOML file or the name of one that ships, got {config!r}{hint}"
            )
        path = shipped[name]
    return load_config(path, overrides), path.stem
