"""`vitarium train`: train what a config describes, on one process or many, and go on later."""

from __future__ import annotations

import os
from argparse import Namespace
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

from vitarium.tools.list import did_you_mean
from vitarium.training.config import Config
from vitarium.training.toml import load_config

_CONFIGS = Path(__file__).resolve().parent.parent / "configs"
_KINDS = (".toml", ".py")
_PICTURES = 4  # images of the best, and as many of the worst


def run(args: Namespace) -> int:
    """Train to the end and print the last validation.

    Raises:
        ValueError: the config, or what it names, does not fit.
        OSError: the output cannot be written.
        KeyboardInterrupt: it was interrupted; a snapshot was written first.
    """
    path = config_file(args.config)
    output = Path(args.output or f"outputs/{path.stem}")
    if path.suffix == ".py":
        check_options(args)
        from vitarium.detection.runner import train

        measures = train(
            path,
            output,
            args.set,
            resume=args.resume,
            device=args.device,
            launcher=args.launcher,
            pictures=pictures(args),
        )
        main = os.environ.get("RANK", "0") == "0"
    else:
        config, _ = chosen(args.config, overrides(args))
        from vitarium.training.engine import Engine

        with Engine(config, args.device) as engine:
            measures = engine.train(output, args.resume)
            main = engine.main
    if main:
        if measures:  # a detector's config may leave validation out
            print("  ".join(f"{key} {value:.6g}" for key, value in measures.items()))
        print(f"wrote {output}")
    return 0


def config_file(config: str) -> Path:
    """A config by its path, or by its name among those that ship.

    Raises:
        ValueError: there is none.
    """
    path = Path(config)
    if path.suffix in _KINDS and path.exists():
        return path
    files = (file for kind in _KINDS for file in sorted(_CONFIGS.rglob(f"*{kind}")))
    shipped = {file.stem: file for file in files if file.parent.name != "_base_"}
    name = path.name.removesuffix(path.suffix) if path.suffix in _KINDS else path.name
    if (
        name not in shipped
        or path.parent != Path()
        or path.suffix not in ("", shipped[name].suffix)
    ):
        hint = did_you_mean(name, [*shipped])
        raise ValueError(
            f"config: expected a TOML file, a Python file or the name of one that ships, got "
            f"{config!r}{hint}"
        )
    return shipped[name]


def chosen(config: str, overrides: list[str]) -> tuple[Config, str]:
    """A config of TOML by its path or name, and what to call the run.

    Raises:
        ValueError: there is none, or it does not describe a run.
    """
    path = config_file(config)
    return load_config(path, overrides), path.stem


def overrides(args: Namespace) -> list[str]:
    """What the command line says instead of a TOML file.

    Raises:
        ValueError: an option that detection has alone.
    """
    if args.pictures is not None:
        raise ValueError(f"--pictures: not for {args.config}, which is no detector's")
    if args.launcher is not None:
        raise ValueError(
            f"--launcher: not for {args.config}, which finds torchrun's processes by itself"
        )
    return [*args.set, *(["data.strict=true"] if args.strict else [])]


def check_options(args: Namespace) -> None:
    """See that detectors can be trained here, as the command line asks.

    Raises:
        ValueError: a package is missing, or an option does not apply.
    """
    if args.strict:
        raise ValueError(
            f"--strict: not for {args.config}: mmdet stops at an image that cannot be read"
        )
    require_detection()


def pictures(args: Namespace) -> int:
    """How many of a detector's best and worst images are drawn."""
    return _PICTURES if args.pictures is None else args.pictures


def require_detection() -> None:
    """See that mmdet is there.

    Raises:
        ValueError: a package is missing, or OpenCV lacks a display's libraries.
    """
    for package in ("mmdet", "mmcv", "mmengine"):
        if find_spec(package) is None:
            raise ValueError(f'{package} is not installed: pip install "vitarium[det]"')
    try:
        import_module("cv2")
    except ImportError as error:
        raise ValueError(
            f"opencv cannot be imported ({error}): pip uninstall -y opencv-python && "
            f"pip install --force-reinstall --no-deps opencv-python-headless"
        ) from error
