"""mmcv's and mmdet's own tests, of the versions that `vitarium[det]` pins, on our operators.

    python tests/mmdet_suite.py [--mmcv FOLDER] [--mmdet FOLDER] [PART ...]

Runs what CPUs can run: mmcv's tests of the operators, mmdet's of dense heads, RoI heads, detectors,
layers, losses and necks. No distribution of either holds its tests: they come by git from the
public repositories, at the pinned commits, into a temporary folder, or out of FOLDER, a checkout
of such a commit.

mmcv's tests ask for CUDA by name: in the temporary copy "cuda" reads "cpu". There gradcheck
compares products of the Jacobian (its fast mode): whole ones of a thousand channels take hours.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ET
from dataclasses import dataclass
from pathlib import Path

import mmdet

_MMCV_CONFTEST = """
import functools
import torch.autograd
import vitarium.heads.mmdet

torch.autograd.gradcheck = functools.partial(torch.autograd.gradcheck, fast_mode=True)
"""
_GLIP = "tests.test_models.test_detectors.test_glip.TestGLIP"
_MMDET_CONFTEST = """
import vitarium.heads.mmdet  # before anything of mmdet that asks mmcv for operators

import socket

import mmdet.testing._utils as utils
from mmdet.models.detectors import kd_one_stage
from mmengine.model.weight_init import PretrainedInit


def refuse(*args, **kwargs):
    raise ConnectionRefusedError("these tests run without a network")


socket.getaddrinfo = socket.socket.connect = refuse
# Weights that tests would download, without looking at them.
PretrainedInit.__call__ = kd_one_stage.load_checkpoint = lambda *args, **kwargs: None
utils._get_config_directory = lambda: "configs"
"""


@dataclass(frozen=True)
class Source:
    """Tests of one package.

    Attributes:
        url: the public repository.
        tag: of the pinned version.
        commit: what the tag stands for.
        conftest: what makes the tests run here.
        parts: what is run, each in a process of its own: a name and paths.
        exceptions: tests that fail, by pytest's class and name, and why.
    """

    url: str
    tag: str
    commit: str
    conftest: str
    parts: dict[str, tuple[str, ...]]
    exceptions: dict[str, str]


SOURCES = {
    "mmcv": Source(
        url="https://github.com/open-mmlab/mmcv",
        tag="v2.1.0",
        commit="57c4e25e06e2d4f8a9357c84bcd24089a284dc88",
        conftest=_MMCV_CONFTEST,
        parts={
            "operators": tuple(
                f"tests/test_ops/test_{name}.py"
                for name in (
                    "nms",
                    "roi_align",
                    "roi_pool",
                    "deform_conv",
                    "modulated_deform_conv",
                    "saconv",
                    "focal_loss",
                    "ms_deformable_attn",
                    "masked_conv2d",
                    "carafe",
                    "corner_pool",
                    "merge_cells",
                    "cc_attention",
                    "bilinear_grid_sample",
                    "bbox",
                    "info",
                )
            )
        },
        exceptions={
            "tests.test_ops.test_carafe.TestCarafe::test_carafe_naive_gradcheck": "mmcv's "
            "CARAFENaive asks for gradients on a GPU; what it calls is compared in "
            "tests/mmdet_operators.py",
        },
    ),
    "mmdet": Source(
        url="https://github.com/open-mmlab/mmdetection",
        tag="v3.3.0",
        commit="44ebd17b145c2372c4b700bfb9cb20dbd28ab64a",
        conftest=_MMDET_CONFTEST,
        parts={
            name: (f"tests/test_models/test_{name}",)
            for name in ("dense_heads", "roi_heads", "detectors", "layers", "losses", "necks")
        },
        exceptions=dict.fromkeys(
            (
                f"{_GLIP}::test_{name}_0_glip_glip_atss_swin_t_a_fpn_dyhead_pretrain_obj365_py"
                for name in ("init", "glip_forward_predict_mode")
            ),
            "GLIP asks for transformers and the weights of BERT",
        ),
    ),
}


def clone(source: Source, folder: Path) -> Path:
    """The tests of the pinned commit, and nothing else of the repository."""
    git = ["git", "-c", "advice.detachedHead=false", "clone", "--quiet", "--depth=1"]
    commands = [
        [*git, f"--branch={source.tag}", "--filter=blob:none", "--sparse", source.url, str(folder)],
        ["git", "-C", str(folder), "sparse-checkout", "set", "tests"],
        ["git", "-C", str(folder), "rev-parse", "HEAD"],
    ]
    for command in commands:
        run = subprocess.run(command, capture_output=True, text=True)
        if run.returncode:
            reason = (run.stderr.strip() or "git failed").splitlines()[0]
            sys.exit(f"mmdet_suite: {source.url} cannot be had: {reason}")
    if run.stdout.strip() != source.commit:
        sys.exit(
            f"mmdet_suite: {source.url}: expected {source.tag} to be {source.commit}, "
            f"got {run.stdout.strip()}"
        )
    return folder


def on_a_cpu(text: str) -> str:
    """A test of mmcv's with the CPU in place of a CUDA device."""
    text = re.sub(r"""(['"])cuda(:0)?\1""", "'cpu'", text)
    text = text.replace("torch.cuda.is_available()", "True").replace(".cuda()", ".cpu()")
    text = text.replace("autocast(enabled=True)", "torch.autocast('cpu', torch.float16)")
    return text.replace("not IS_CUDA_AVAILABLE", "False")


def prepare(source: Source, checkout: Path, folder: Path) -> None:
    """Copy the tests below ``folder`` and make them run there."""
    shutil.copytree(checkout / "tests", folder / "tests")
    (folder / "configs").symlink_to(Path(mmdet.__file__).parent / ".mim" / "configs")
    (folder / "conftest.py").write_text(source.conftest, encoding="utf-8")
    for path in (folder / "tests").glob("test_ops/test_*.py"):  # mmcv's
        path.write_text(on_a_cpu(path.read_text(encoding="utf-8")), encoding="utf-8")


def run(paths: tuple[str, ...], folder: Path, packages: Path) -> dict[str, str]:
    """What became of every test: passed, skipped or a failure's first line."""
    report = folder / "report.xml"
    report.unlink(missing_ok=True)
    root = Path(__file__).resolve().parents[1]
    path = os.pathsep.join([str(root), str(packages), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, "-m", "pytest", "-q", "-c", os.devnull, f"--rootdir={folder}"]
    command += ["-p", "no:cacheprovider", "--disable-warnings", "--tb=no", f"--junitxml={report}"]
    done = subprocess.run(
        [*command, *paths],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
    )
    if not report.exists():
        sys.exit(f"mmdet_suite: {paths}: pytest ended early\n{done.stdout}{done.stderr}")
    outcomes = {}
    for case in ET.parse(report).iter("testcase"):
        failure = next((x for x in case if x.tag in ("failure", "error")), None)
        if failure is not None:
            outcome = (failure.get("message") or failure.tag).splitlines()[0]
        else:
            outcome = "skipped" if case.find("skipped") is not None else "passed"
        outcomes[f"{case.get('classname')}::{case.get('name')}"] = outcome
    return outcomes


def check(part: str, source: Source, outcomes: dict[str, str]) -> list[str]:
    """Print a line of counts; what is not as the list of exceptions says."""
    failed = {name: why for name, why in outcomes.items() if why not in ("passed", "skipped")}
    expected = failed.keys() & source.exceptions
    counts = [*outcomes.values()]
    print(
        f"{part}: {counts.count('passed')} passed, {counts.count('skipped')} skipped, "
        f"{len(expected)} excepted, {len(failed) - len(expected)} failed",
        flush=True,
    )
    wrong = [f"{name}: {why}" for name, why in failed.items() if name not in source.exceptions]
    return wrong + [
        f"{name}: {outcomes[name]}, but listed as an exception"
        for name in source.exceptions.keys() & outcomes.keys() - failed.keys()
    ]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name in SOURCES:
        parser.add_argument(f"--{name}", type=Path, metavar="FOLDER", help="a checkout")
    known = [part for source in SOURCES.values() for part in source.parts]
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"of {', '.join(known)}; or all")
    args = parser.parse_args()
    if unknown := {*args.parts} - {*known}:
        parser.error(f"no part {', '.join(sorted(unknown))}; there are {', '.join(known)}")
    wrong: list[str] = []
    with tempfile.TemporaryDirectory() as temporary:
        packages = Path(temporary) / "packages"
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target"]
        subprocess.run([*pip, str(packages), "parameterized==0.9.0"], check=True)
        for name, source in SOURCES.items():
            parts = [part for part in source.parts if not args.parts or part in args.parts]
            if not parts:
                continue
            folder = Path(temporary) / name
            checkout = getattr(args, name) or clone(source, Path(temporary) / f"{name}-git")
            prepare(source, checkout, folder)
            for part in parts:
                wrong += check(f"{name} {part}", source, run(source.parts[part], folder, packages))
    print(*wrong, sep="\n")
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
