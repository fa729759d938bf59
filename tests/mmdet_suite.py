"""mmcv's and mmdet's own tests, of the versions that `vitarium[det]` pins, on our operators.

    python tests/mmdet_suite.py [--mmcv FOLDER] [--mmdet FOLDER] [part of a path ...]

Runs what CPUs can run: mmcv's tests of the operators, mmdet's of dense heads, RoI heads, detectors,
layers, losses and necks. No distribution of either holds its tests: they come by git from the
public repositories, at the pinned commits, into a temporary folder, or out of FOLDER, a checkout
of such a commit. Parts of paths choose among the folders and files that are run.

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

_CONFTEST = """
import vitarium.heads.mmdet  # before anything of mmdet that asks mmcv for operators

import functools
import os
import socket

import mmdet.testing._utils as utils
import torch.autograd


def refuse(*args, **kwargs):
    raise ConnectionRefusedError("these tests run without a network")


socket.getaddrinfo = socket.socket.connect = refuse
configs = os.path.join(os.path.dirname(utils.__file__), "..", ".mim", "configs")
utils._get_config_directory = lambda: configs
torch.autograd.gradcheck = functools.partial(torch.autograd.gradcheck, fast_mode=True)
"""


@dataclass(frozen=True)
class Source:
    """Tests of one package.

    Attributes:
        url: the public repository.
        tag: of the pinned version.
        commit: what the tag stands for.
        parts: what is run, each in a process of its own.
        exceptions: tests that fail, by file and name, and why.
    """

    url: str
    tag: str
    commit: str
    parts: tuple[str, ...]
    exceptions: dict[str, str]


SOURCES = {
    "mmcv": Source(
        url="https://github.com/open-mmlab/mmcv",
        tag="v2.1.0",
        commit="57c4e25e06e2d4f8a9357c84bcd24089a284dc88",
        parts=tuple(
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
        ),
        exceptions={},
    ),
    "mmdet": Source(
        url="https://github.com/open-mmlab/mmdetection",
        tag="v3.3.0",
        commit="44ebd17b145c2372c4b700bfb9cb20dbd28ab64a",
        parts=tuple(
            f"tests/test_models/test_{name}"
            for name in ("dense_heads", "roi_heads", "detectors", "layers", "losses", "necks")
        ),
        exceptions={},
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


def prepare(name: str, checkout: Path, folder: Path) -> None:
    """Copy the tests below ``folder`` and make them run there."""
    shutil.copytree(checkout / "tests", folder / "tests")
    (folder / "conftest.py").write_text(_CONFTEST, encoding="utf-8")
    if name == "mmcv":
        for path in (folder / "tests" / "test_ops").glob("test_*.py"):
            path.write_text(on_a_cpu(path.read_text(encoding="utf-8")), encoding="utf-8")


def run(part: str, folder: Path, packages: Path) -> dict[str, str]:
    """What became of every test: passed, skipped or a failure's first line."""
    report = folder / "report.xml"
    report.unlink(missing_ok=True)
    root = Path(__file__).resolve().parents[1]
    path = os.pathsep.join([str(root), str(packages), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, "-m", "pytest", "-q", "-c", os.devnull, f"--rootdir={folder}"]
    command += ["-p", "no:cacheprovider", "--disable-warnings", "--tb=no", f"--junitxml={report}"]
    done = subprocess.run(
        [*command, part],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
    )
    if not report.exists():
        sys.exit(f"mmdet_suite: {part}: pytest ended early\n{done.stdout}{done.stderr}")
    outcomes = {}
    for case in ET.parse(report).iter("testcase"):
        modules = [x for x in (case.get("classname") or "").split(".") if x.startswith("test_")]
        file = modules[-1] if modules else part  # none where a file cannot be imported
        failure = next((x for x in case if x.tag in ("failure", "error")), None)
        if failure is not None:
            outcome = (failure.get("message") or failure.tag).splitlines()[0]
        else:
            outcome = "skipped" if case.find("skipped") is not None else "passed"
        outcomes[f"{file}::{case.get('name')}"] = outcome
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
        for name in source.exceptions
        if outcomes.get(name, "failed") in ("passed", "skipped")
    ]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name in SOURCES:
        parser.add_argument(f"--{name}", type=Path, metavar="FOLDER", help="a checkout")
    parser.add_argument("parts", nargs="*", help="only paths that hold one of these")
    args = parser.parse_args()
    wrong = []
    with tempfile.TemporaryDirectory() as temporary:
        packages = Path(temporary) / "packages"
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target"]
        subprocess.run([*pip, str(packages), "parameterized==0.9.0"], check=True)
        for name, source in SOURCES.items():
            parts = [
                path
                for path in source.parts
                if not args.parts or any(part in f"{name}/{path}" for part in args.parts)
            ]
            if not parts:
                continue
            folder = Path(temporary) / name
            checkout = getattr(args, name) or clone(source, Path(temporary) / f"{name}-git")
            prepare(name, checkout, folder)
            for part in parts:
                wrong += check(part, source, run(part, folder, packages))
    print(*wrong, sep="\n")
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
