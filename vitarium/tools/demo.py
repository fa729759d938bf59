"""`vitarium demo`: digits classified, features and attention pictured, a detector trained.

Everything it needs is on the machine: the digits and photographs are scikit-learn's, the weights
are in the package, scenes for the detector are composed of the digits.
"""

from __future__ import annotations

import shlex
import shutil
import sys
import sysconfig
import time
from argparse import Namespace
from functools import partial
from pathlib import Path
from textwrap import indent

import timm
import torch
from PIL import Image
from torch import Tensor

from vitarium.data.digits import Digits, split
from vitarium.heads.features import FeatureBackbone
from vitarium.tools._common import require_matplotlib, resized, save, scaled
from vitarium.tools.digits import MODEL, comparison, probabilities
from vitarium.tools.features import comparison_picture, pyramid_picture
from vitarium.tools.train import require_detection
from vitarium.tools.visualize import neighborhood_picture

_PHOTOS = ("china", "flower")
_FAMILIES = (
    *("nat_mini", "biformer_tiny", "agent_swin_tiny"),
    *("fused_davit_tiny", "fused_swin_tiny_patch4_window7_224"),
)
_DILATED = "dinat_mini"
_SIZE = 224  # shorter side of the photograph for families and attention, in pixels
_PIXEL = (106, 90)  # of it: on the pagoda
_COLUMNS, _ROWS = 12, 6


def run(args: Namespace) -> int:
    """Classify the held-out digits, picture features and attention, train a detector of digits.

    Raises:
        ValueError: scikit-learn, matplotlib or mmdet is missing.
        CheckpointError: the packaged weights are damaged.
        OSError: the output cannot be written.
    """
    require_matplotlib()
    if args.updates:
        require_detection()
    start = time.monotonic()
    training, held_out = split()
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)

    count = len(held_out.labels)
    _say(f"1/6 {MODEL} classifies scikit-learn's last {count} digits, which it never saw")
    model = timm.create_model(MODEL, pretrained=True)
    chances = probabilities(model, held_out)
    _say(indent(comparison(chances.argmax(-1), training, held_out), "    "))
    digit = out / "digit.png"
    save(resized(held_out.pictures[0], 64, 64), digit)
    _wrote(digit, f"one of them, a {held_out.labels[0]}, as large as the model sees it")
    sheet = out / "digits.png"
    mistakes = _save_predictions(sheet, held_out, chances)
    _wrote(sheet, f"its answers; the {mistakes} mistakes come first, in red")

    _say(f"2/6 feature pyramids of two photographs, by weights that know only digits ({MODEL})")
    backbone = FeatureBackbone(MODEL, pretrained=True).eval()
    for name in _PHOTOS:
        file = out / f"{name}.png"
        image = _photograph(name)
        save(image, file)
        _wrote(file, f"scikit-learn's {name}.jpg, {image.height} x {image.width} pixels (H x W)")
        pyramid = out / f"{name}.features.png"
        title = f"{name}.jpg, {MODEL} (trained on digits alone)"
        save(pyramid_picture(image, backbone, title), pyramid)
        _wrote(pyramid, "principal components of four feature maps, as colours")

    _say("3/6 the five kinds of attention side by side, with random weights")
    torch.manual_seed(0)
    image = scaled(_photograph(_PHOTOS[0]), _SIZE)
    backbones = {name: FeatureBackbone(name).eval() for name in _FAMILIES}
    families = out / f"{_PHOTOS[0]}.families.png"
    save(comparison_picture(image, backbones, f"{_PHOTOS[0]}.jpg, random weights"), families)
    _wrote(families, f"feature maps of {', '.join(backbones)}")

    _say("4/6 what one pixel attends to: plain neighborhoods (NAT) and dilated ones (DiNAT)")
    torch.manual_seed(0)
    dilated = timm.create_model(_DILATED)
    for name, network, weights in (
        (MODEL, model, "trained on digits alone"),
        (_DILATED, dilated, "random weights"),
    ):
        drawing = out / f"{_PHOTOS[0]}.{name.partition('.')[0]}.neighborhoods.png"
        title = f"{_PHOTOS[0]}.jpg, {name} ({weights})"
        save(neighborhood_picture(image, network.eval(), _PIXEL, title), drawing)
        _wrote(drawing, f"one pixel's neighborhoods in {name} ({weights})")

    detection = _detection(out, args.updates) if args.updates else ()

    _say(f"6/6 done in {time.monotonic() - start:.0f} s; what you may want next")
    for command in _next_commands(digit, out / f"{_PHOTOS[0]}.png", out, detection):
        _say(f"    {command}")
    return 0


def _say(text: str) -> None:
    print(text, flush=True)


def _detection(out: Path, updates: int) -> tuple[str, ...]:
    """Train a detector, measure it, picture what it finds.

    Returns:
        The command that looks at a scene with it.
    """
    from vitarium.tools.demo_detector import CONFIG, train_detector

    start = time.monotonic()
    _say(
        f"5/6 {CONFIG}, from random weights: {updates} updates, on 1000 scenes that are "
        f"made now if they are not there yet"
    )
    trained = train_detector(out, updates, partial(print, file=sys.stdout, flush=True))
    _say(
        f"    box AP {trained.box_ap:.3f}, mask AP {trained.mask_ap:.3f} on 200 scenes of digits "
        f"that it never saw, after {time.monotonic() - start:.0f} s"
    )
    for kind, picture in zip(("best", "worst"), trained.pictures, strict=True):
        _wrote(picture, f"the {kind} of these scenes: found, and what is there")
    _wrote(trained.weights, "the detector")
    _wrote(trained.scene, "one of these scenes")
    where = ("--config", CONFIG, "--checkpoint", str(trained.weights), "--out", str(out / "small"))
    return ("predict", str(trained.scene), *where)


def _wrote(file: Path, what: str) -> None:
    _say(f"    wrote {file}: {what}")


def _photograph(name: str) -> Image.Image:
    from sklearn.datasets import load_sample_image

    return Image.fromarray(load_sample_image(f"{name}.jpg"))


def _save_predictions(file: Path, digits: Digits, chances: Tensor) -> int:
    """A grid of digits with the model's answers: every mistake, then right ones from everywhere.

    Returns:
        The number of mistakes.
    """
    from matplotlib.figure import Figure

    chance, found = chances.max(-1)
    wrong = (found != digits.labels).nonzero().flatten()
    right = (found == digits.labels).nonzero().flatten()
    rows = max(_ROWS, -(-len(wrong) // _COLUMNS))
    evenly = torch.linspace(0, len(right) - 1, rows * _COLUMNS - len(wrong)).long()
    figure = Figure(figsize=(_COLUMNS, 1.2 * rows + 0.6), layout="constrained")
    figure.suptitle(
        f"{MODEL}: {len(right)} of {len(found)} held-out digits right; "
        f"in red what is wrong; in brackets how sure it is"
    )
    cells = figure.subplots(rows, _COLUMNS).flat
    for cell, index in zip(cells, [*wrong.tolist(), *right[evenly].tolist()], strict=True):
        mistake = found[index] != digits.labels[index]
        answer = f"{found[index]}, is {digits.labels[index]}" if mistake else f"{found[index]}"
        colour = "red" if mistake else "black"
        cell.imshow(digits.pictures[index], interpolation="bicubic")
        cell.set_title(f"{answer} ({chance[index]:.0%})", fontsize=9, color=colour)
        cell.set(xticks=[], yticks=[])
        cell.spines[:].set(color=colour, linewidth=3 if mistake else 0.5)
    figure.savefig(file, dpi=100)
    return len(wrong)


def _next_commands(digit: Path, photo: Path, out: Path, detection: tuple[str, ...]) -> list[str]:
    """Commands that work as they stand, in this folder."""
    arguments = (
        ("predict", str(digit), "--model", MODEL, "--topk", "3"),
        ("features", str(photo), "--model", MODEL, "--size", "256", "--out", str(out / "small")),
        (
            *("visualize", str(photo), "--model", _DILATED, "--random", "--size", str(_SIZE)),
            *("--pixel", "0.9,0.9", "--out", str(out / "small")),
        ),
        detection,
        ("list", "nat_*", "--params-max", "30"),
    )
    return [shlex.join((*_program(), *row)) for row in arguments if row]


def _program() -> tuple[str, ...]:
    """How this program is called from a shell, of this environment and in this folder."""
    script = shutil.which("vitarium", path=sysconfig.get_path("scripts"))
    if script is None:
        return (sys.executable, "-m", "vitarium_cli")
    if shutil.which("vitarium") == script:
        return ("vitarium",)
    file = Path(script)
    return (str(file.relative_to(Path.cwd()) if file.is_relative_to(Path.cwd()) else file),)
