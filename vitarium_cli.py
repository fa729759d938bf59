"""The program `vitarium`: arguments and errors; a command's module is imported when it runs."""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import NoReturn


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        argv: the arguments after the program's name; those of the process if None.

    Returns:
        The exit status: 0; 1 after an error, which is one line on stderr; 130 after Ctrl-C.

    Raises:
        SystemExit: for ``--help`` (0) and arguments that do not parse (2).
    """
    parser = _parser()
    args = parser.parse_args(argv)
    if args.version:
        print(f"vitarium {_version()}")
        return 0
    if args.tool is None:
        parser.print_help()
        return 2
    try:
        status: int = _tool(args.tool).run(args)
        sys.stdout.flush()
    except BrokenPipeError:
        # The reader of our output is gone (`| head`); the interpreter's own flush must not notice.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except KeyboardInterrupt as interrupt:
        return _complain(str(interrupt) or "interrupted", 130)
    # What the user gave was wrong. Any other exception is our fault and keeps its traceback.
    except OSError as error:
        named = f"{error.filename}: {error.strerror}" if error.filename else str(error)
        return _complain(named, 1)
    except ValueError as error:
        return _complain(str(error), 1)
    return status


def _complain(message: str, status: int) -> int:
    print(f"vitarium: error: {' '.join(message.split())}", file=sys.stderr)
    return status


class _Parser(argparse.ArgumentParser):
    """A parser whose errors are one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(_complain(f"{message} (see {self.prog} --help)", 2))


def _package() -> Path:
    """The package's folder, found without importing the package."""
    spec = find_spec("vitarium")
    assert spec is not None
    assert spec.submodule_search_locations
    return Path(spec.submodule_search_locations[0])


def _version() -> str:
    text = (_package() / "__init__.py").read_text(encoding="utf-8")
    match = re.search(r'^__version__ = "(.+)"$', text, re.MULTILINE)
    assert match is not None
    return match[1]


def _tool(name: str) -> ModuleType:
    if name not in ("list", "info"):
        return import_module(f"vitarium.tools.{name.replace('-', '_')}")
    # Importing vitarium.tools.list would import the package above it, and with it torch. These two
    # need neither, so the folder is entered once more, as a package with nothing above it.
    tools = ModuleType("vitarium_light_tools")
    tools.__path__ = [str(_package() / "tools")]
    sys.modules[tools.__name__] = tools
    return import_module(f"{tools.__name__}.{name}")


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a positive integer, got {text!r}")
    return int(text)


def _count(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"expected 0 or a positive integer, got {text!r}")
    return int(text)


def _size(text: str) -> int | None:
    return None if text == "native" else _positive(text)


def _height_width(text: str) -> tuple[int, int]:
    """``N`` or ``HxW`` as (height, width)."""
    match = re.fullmatch("([1-9][0-9]*)(?:x([1-9][0-9]*))?", text)
    if match is None:
        raise argparse.ArgumentTypeError(f"expected N or HxW in pixels, got {text!r}")
    return int(match[1]), int(match[2] or match[1])


def _pixel(text: str) -> tuple[float, float]:
    """A pixel as two ints, or fractions as floats."""
    try:
        x, y = (int(n) if n.isdecimal() else float(n) for n in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"expected X,Y in pixels, e.g. 120,80, or fractions, e.g. 0.5,0.5, got {text!r}"
        ) from None
    return x, y


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="vitarium",
        description="Efficient-attention vision backbones: find, try, look into and time them.",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="store_true", help="print the version and exit")
    parser.set_defaults(tool=None)
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", parser_class=_Parser)

    def command(name: str, summary: str) -> argparse.ArgumentParser:
        added = commands.add_parser(name, help=summary, description=summary, allow_abbrev=False)
        added.set_defaults(tool=name)
        return added

    _list_arguments(command("list", "the models of the zoo"))
    _info_arguments(command("info", "all that is known about one model"))
    _download_arguments(command("download", "weights into the cache, verified"))
    _predict_arguments(command("predict", "classify images, or find objects on them"))
    _picture_arguments(command("features", "picture a model's feature pyramid of an image"))
    _visualize_arguments(command("visualize", "picture what a pixel attends to, NAT and DiNAT"))
    command("doctor", "versions, devices, and which implementation each op would run and why")
    _train_arguments(command("train", "train what a config describes"))
    _test_arguments(command("test", "validate what `vitarium train` trained"))
    _data_arguments(command("data", "what of a data set is there, and what is missing; links it"))
    _embed_arguments(command("embed", "embeddings of any number of images, in shards"))
    _convert_arguments(command("convert", "a checkpoint file in our layout, or in the authors'"))
    _export_hub_arguments(command("export-hub", "a folder for timm's local-dir: and for a hub"))
    _bench_arguments(command("bench", "time ops, models and start-up, beside their peers"))
    _demo_arguments(command("demo", "classify digits, picture features and attention"))
    _digits_arguments(command("digits", "the embedded data: write it, test nat_atto on it"))
    return parser


def _list_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "patterns", nargs="*", metavar="GLOB", help="names, e.g. 'nat_*' (default: all)"
    )
    parser.add_argument(
        "--task",
        choices=("cls", "det", "seg", "all"),
        default="cls",
        help="classifiers (default), detectors, segmenters or all",
    )
    parser.add_argument("--params-min", type=float, metavar="M", help="at least M million")
    parser.add_argument("--params-max", type=float, metavar="M", help="at most M million")
    parser.add_argument(
        "--licence",
        default="any",
        metavar="L",
        help="of code and weights: permissive (both), any (default) or a name (either), e.g. MIT",
    )
    parser.add_argument(
        "--weights", action="store_true", help="only those whose weights a program can fetch"
    )
    parser.add_argument("--json", action="store_true", help="print JSON")


def _info_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="NAME[.TAG]", help="a model that `vitarium list` prints")
    parser.add_argument("--json", action="store_true", help="print JSON")


def _download_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "names",
        nargs="+",
        metavar="NAME",
        help="names and globs of `vitarium list`, e.g. nat_tiny 'dinat_*.shi_in1k'",
    )
    parser.add_argument(
        "--task",
        choices=("cls", "det", "seg", "all"),
        default="cls",
        help="what globs mean: classifiers (default), detectors, segmenters or all",
    )
    parser.add_argument(
        "--file", metavar="FILE", help="put this local file into the cache as NAME, once checked"
    )
    parser.add_argument(
        "--cache-dir",
        metavar="DIR",
        help="(default: in torch.hub's folder, which TORCH_HOME moves)",
    )
    parser.add_argument(
        "--lock",
        metavar="FILE",
        help="record sizes and hashes here too, and hold downloads to it (default: VITARIUM_LOCK)",
    )
    parser.add_argument("--quiet", action="store_true", help="no progress bar on a terminal either")


def _predict_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("images", nargs="+", metavar="IMAGE", help="image files")
    kind = parser.add_mutually_exclusive_group(required=True)
    kind.add_argument("--model", metavar="NAME", help="a classifier: a vitarium or timm model")
    text = "a detector: a Python file of mmdet's, which is run, or the name of one that ships"
    kind.add_argument("--config", metavar="CONFIG", help=text)
    parser.add_argument(
        "--checkpoint",
        metavar="FILE",
        help="a classifier's own weights, or a detector's, also by their released name or address",
    )
    parser.add_argument(
        "--topk", type=_positive, metavar="K", help="classes per image (default: 5)"
    )
    text = "of a detector, objects with at least this score (default: 0.3)"
    parser.add_argument("--threshold", type=float, metavar="P", help=text)
    text = "of a detector, where pictures go (default: outputs)"
    parser.add_argument("--out", metavar="DIR", help=text)
    text = "of a detector, instead of what CONFIG says; may be repeated"
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help=text)
    _device_argument(parser)
    output = parser.add_mutually_exclusive_group()
    output.add_argument("--csv", metavar="FILE", help="write the predictions to FILE too")
    output.add_argument("--json", action="store_true", help="print JSON")


def _picture_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("image", metavar="IMAGE", help="an image file")
    parser.add_argument("--model", required=True, metavar="NAME", help="a vitarium or timm model")
    weights = parser.add_mutually_exclusive_group()
    weights.add_argument(
        "--checkpoint", metavar="FILE", help="weights to use instead of the pretrained ones"
    )
    weights.add_argument("--random", action="store_true", help="use random weights")
    parser.add_argument(
        "--size",
        type=_size,
        metavar="native|N",
        help="the image's own size (default), or its shorter side scaled to N pixels",
    )
    parser.add_argument("--out", default="outputs", metavar="DIR", help="(default: outputs)")
    _device_argument(parser)


def _visualize_arguments(parser: argparse.ArgumentParser) -> None:
    _picture_arguments(parser)
    parser.add_argument(
        "--pixel",
        type=_pixel,
        default=(0.5, 0.5),
        metavar="X,Y",
        help="a pixel of IMAGE, or fractions of its width and height (default: 0.5,0.5)",
    )


def _export_hub_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="NAME[.TAG]", help="a model that `vitarium list` prints")
    parser.add_argument("folder", metavar="DIR", help="a new folder, or an empty one")
    parser.add_argument(
        "--checkpoint", metavar="FILE", help="weights to use instead of the pretrained ones"
    )
    parser.add_argument(
        "--num-classes", type=_positive, metavar="N", help="of FILE (default: the model's)"
    )
    parser.add_argument(
        "--img-size",
        type=_height_width,
        metavar="N|HxW",
        help="in pixels, for models that are made for one size (default: the model's)",
    )


def _bench_arguments(parser: argparse.ArgumentParser) -> None:
    kinds = parser.add_subparsers(
        dest="what", metavar="ops|models|compile|convert|digits|embed|startup|plot", required=True
    )

    def kind(what: str, summary: str, rounds: int | None = None) -> argparse.ArgumentParser:
        added = kinds.add_parser(what, help=summary, description=summary, allow_abbrev=False)
        added.set_defaults(names=[], rounds=None, threads=1, device="cpu", quick=False, plot=None)
        if what != "plot":
            added.add_argument("--csv", metavar="FILE", help="write the rows to FILE too")
        if rounds is not None:
            text = f"turns of each, at the most (default: {rounds})"
            added.add_argument("--rounds", type=int, default=rounds, metavar="N", help=text)
        return added

    ops = kind("ops", "each op beside what one would write without it", 25)
    _bench_ops_arguments(ops)
    models = kind("models", "whole networks side by side, ours and timm's", 25)
    _bench_models_arguments(models)
    embed = kind("embed", "whether reading and writing keep up with the model", 5)
    _bench_embed_arguments(embed)
    for timed in (ops, models, embed):
        timed.add_argument("--threads", type=int, metavar="N", help="of the CPU (default: 1)")
        timed.add_argument("--device", help="cpu (default), cuda, cuda:1")
    for timed in (ops, models):
        timed.add_argument("--plot", metavar="DIR", help="draw the results into DIR")
        timed.add_argument("--quick", action="store_true", help="a look, not a result")
    compiled = kind("compile", "what torch.compile makes of the models")
    compiled.add_argument("names", nargs="*", metavar="MODEL", help="(default: every *_atto)")
    kind("convert", "time and memory of converting a checkpoint of 200 M parameters", 5)
    digits = kind("digits", "small models trained on the digits, side by side")
    digits.add_argument("names", nargs="*", metavar="MODEL", help="(default: every *_atto)")
    text = "trainings at a time, a thread each (default: 1)"
    digits.add_argument("--jobs", type=_positive, default=1, metavar="N", help=text)
    digits.add_argument("--plot", metavar="DIR", help="draw the results into DIR")
    kind("startup", "what the program and the package cost before they do anything", 5)
    plot = kind("plot", "pictures of results, of `bench models` and of timm's benchmark.py")
    plot.add_argument("files", nargs="+", metavar="FILE.csv", help="results, of one or more runs")
    plot.add_argument("--out", default="outputs", metavar="DIR", help="(default: outputs)")


def _bench_embed_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("names", nargs="*", metavar="MODEL", help="(default: nat_mini)")
    for option, default, meaning in (("--images", 64, "in all"), ("--batch-size", 16, "per step")):
        text = f"images {meaning} (default: {default})"
        parser.add_argument(option, type=_positive, default=default, metavar="N", help=text)
    text = "processes that read (default: one for every other core)"
    parser.add_argument("--workers", type=_count, metavar="N", help=text)


def _bench_ops_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("names", nargs="*", metavar="OP", help="(default: all)")
    parser.add_argument(
        "--dtype",
        nargs="+",
        choices=("float16", "bfloat16", "float32"),
        help="with --device cuda: of maps and parameters (default: float16 bfloat16)",
    )
    parser.add_argument(
        "--sizes",
        nargs="+",
        choices=("224", "800x1216"),
        help="with --device cuda: images in pixels, whose maps the models have (default: both)",
    )


def _bench_models_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "names",
        nargs="*",
        metavar="MODEL",
        help="names and globs, ours and timm's, e.g. 'nat_*' (default: two of ours, two of timm's);"
        " behind one of timm's +fused_attn for its flag, behind one of ours +aten for no kernels",
    )
    parser.add_argument(
        "--mode",
        choices=("infer", "train", "both"),
        default="infer",
        help="forward, a whole training step, or both (default: infer)",
    )
    parser.add_argument(
        "--batch-size",
        nargs="+",
        type=int,
        metavar="N",
        help="images per step, one or more to try (default: 8, --quick: 1)",
    )
    parser.add_argument(
        "--sizes",
        nargs="+",
        default=["224"],
        metavar="N|HxW",
        help="image sizes in pixels, one or more to try, e.g. 224 800x1216 (default: 224)",
    )
    parser.add_argument("--compile", action="store_true", help="time torch.compile's result too")
    parser.add_argument(
        "--compile-mode",
        choices=("default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs"),
        help="torch.compile's, with --device cuda (default: default)",
    )
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        default="float32",
        help="of weights and images (default: float32)",
    )
    parser.add_argument("--channels-last", action="store_true", help="the layout of images")
    parser.add_argument("--base", metavar="NAME", help="compare with this one (default: the first)")


def _config_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "config",
        metavar="CONFIG",
        help="a TOML file, a Python file of mmdet's (which is run), or the name of one in"
        " vitarium/configs",
    )
    parser.add_argument(
        "--output", metavar="DIR", help="the run's folder (default: outputs/ and CONFIG's name)"
    )
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="SECTION.KEY=VALUE",
        help="instead of what CONFIG says; may be repeated",
    )
    parser.add_argument(
        "--launcher",
        choices=("none", "pytorch", "slurm", "mpi"),
        help="of a detector's processes (default: pytorch where torchrun started them, else none)",
    )
    parser.add_argument(
        "--strict",
        action="store_true",
        help="stop at an image that cannot be read, instead of naming it and going on",
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), help="(default: cuda if there is one)")
    text = "of a detector, best and worst images to draw, 0 for none (default: 4 of each)"
    parser.add_argument("--pictures", type=_count, metavar="N", help=text)


def _train_arguments(parser: argparse.ArgumentParser) -> None:
    _config_arguments(parser)
    parser.add_argument(
        "--resume", action="store_true", help="go on with the run in DIR, from its newest snapshot"
    )


def _test_arguments(parser: argparse.ArgumentParser) -> None:
    _config_arguments(parser)
    text = "of a detector also a released name or an address (default: the best in DIR, of a"
    text += " detector else its newest; or CONFIG's own)"
    parser.add_argument("--checkpoint", metavar="FILE", help=text)
    output = parser.add_mutually_exclusive_group()
    output.add_argument("--csv", metavar="FILE", help="write the results to FILE too")
    output.add_argument("--json", action="store_true", help="print JSON")


def _data_arguments(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(dest="action", metavar="check|layout", required=True)
    for action, summary in (
        ("check", "say what is there and what is missing"),
        ("layout", "link what is unpacked elsewhere, sort and convert; then check"),
    ):
        added = actions.add_parser(action, help=summary, description=summary, allow_abbrev=False)
        added.add_argument("name", choices=("imagenet", "ade20k", "cityscapes", "coco"))
        added.add_argument("root", metavar="DIR", help="data.root of the configs")
        if action == "layout":
            added.add_argument(
                "--from",
                dest="source",
                metavar="DIR",
                help="where it is unpacked (default: DIR itself, inside of which files are sorted)",
            )
            text = "classes of imagenet's validation images, where these are in one folder"
            added.add_argument("--labels", metavar="FILE", help=text)


def _embed_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", required=True, metavar="NAME", help="a vitarium or timm model")
    parser.add_argument(
        "--checkpoint", metavar="FILE", help="weights to use instead of the pretrained ones"
    )
    parser.add_argument(
        "--data",
        required=True,
        metavar="SOURCE",
        help="a folder, with all below it; a pattern of tar files, e.g. 'shards/*.tar'; digits,"
        " torchvision/NAME or hf/NAME, with --split and --root",
    )
    parser.add_argument("--root", metavar="DIR", help="folder of torchvision/NAME or hf/NAME")
    parser.add_argument("--split", metavar="S", help="of digits, torchvision/NAME or hf/NAME")
    parser.add_argument(
        "--out", required=True, metavar="DIR", help="a new folder, or one to go on with"
    )
    parser.add_argument(
        "--what",
        choices=("pooled", "tokens"),
        default="pooled",
        help="the features before the classifier (default), or all patch tokens",
    )
    parser.add_argument("--format", choices=("safetensors", "parquet"), default="safetensors")
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        default="float32",
        help="of computation and embeddings (default: float32)",
    )
    parser.add_argument(
        "--shard-size",
        type=_positive,
        metavar="N",
        help="images of a file (default: 4096, of tokens 256)",
    )
    parser.add_argument(
        "--batch-size", type=_positive, default=64, metavar="N", help="(default: 64)"
    )
    parser.add_argument(
        "--workers",
        type=_count,
        metavar="N",
        help="processes that read, for each that computes (default: one for every other core)",
    )
    _device_argument(parser)
    parser.add_argument(
        "--strict", action="store_true", help="stop at an image that cannot be read"
    )
    parser.add_argument(
        "--ray",
        type=_positive,
        nargs="?",
        const=0,
        metavar="N",
        help="compute on Ray's cluster, with N models (default: one on each GPU, else what fits)",
    )


def _convert_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("entry", metavar="NAME[.TAG]", help="a model that `vitarium list` prints")
    parser.add_argument("source", metavar="IN", help="a checkpoint file, in any known layout")
    parser.add_argument(
        "out",
        metavar="OUT",
        help="NAME.safetensors, or NAME.pth in another layout than ours; a card goes to NAME.json",
    )
    parser.add_argument(
        "--to",
        choices=("ours", "authors", "transformers"),
        default="ours",
        help="the layout (default: ours); transformers has NAT and DiNAT only",
    )
    parser.add_argument(
        "--task",
        choices=("det", "seg"),
        help="the backbone of detection or segmentation (default: the classifier)",
    )
    parser.add_argument(
        "--head",
        choices=("upernet", "semantic_fpn"),
        help="the whole segmenter, with this head (default: its backbone)",
    )
    parser.add_argument(
        "--wrapper",
        metavar="W",
        help="where IN holds its tensors: plain, model, state_dict, model_ema, state_dict_ema"
        " (default: search, averaged weights first)",
    )
    parser.add_argument(
        "--img-size",
        type=_height_width,
        metavar="N|HxW",
        help="resize tables of positions to images of this size, in pixels",
    )
    parser.add_argument(
        "--resize",
        action="store_true",
        help="resize tables of positions to the model's own size of images or windows",
    )
    parser.add_argument(
        "--num-classes",
        type=int,
        metavar="N",
        help="of the classifier, 0 for none (default: as in IN)",
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="say what would happen to each name, write nothing"
    )
    parser.add_argument("--json", action="store_true", help="print all names, as JSON")


def _demo_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", default="outputs", metavar="DIR", help="(default: outputs)")
    text = "to train the detector for, 0 for no detector (default: 150, three minutes on two cores)"
    parser.add_argument("--updates", type=_count, default=150, metavar="N", help=text)


def _digits_arguments(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)
    make = actions.add_parser("make", help="write digits and scenes of them, with boxes and masks")
    make.add_argument("folder", metavar="DIR", help="a new folder, or an empty one")
    text = "for training (default: 1000)"
    make.add_argument("--scenes", type=_positive, default=1000, metavar="N", help=text)
    text = "of held-out digits (default: 200)"
    make.add_argument("--val", type=_positive, default=200, metavar="N", help=text)
    text = "of a scene, in pixels (default: 160)"
    make.add_argument("--size", type=_height_width, default=(160, 160), metavar="N|HxW", help=text)
    make.add_argument("--seed", type=int, default=0, metavar="N", help="(default: 0)")
    test = actions.add_parser("test", help="accuracy on the held-out digits")
    test.add_argument("--checkpoint", metavar="FILE", help="(default: the packaged weights)")


def _device_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", help="e.g. cpu or cuda (default: cuda where there is one)")


if __name__ == "__main__":
    sys.exit(main())
