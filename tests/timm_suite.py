"""timm's own model tests, of the installed version, on vitarium's entries.

    python tests/timm_suite.py [--atto] [further arguments of pytest]

The tests come from timm's source distribution, which pip downloads once into the user's cache.
Every test that timm runs on all of its models runs on ours in their place, whatever timm's lists
of exceptions say. timm's time limits hold where pytest-timeout is installed.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections import Counter
from collections.abc import Generator
from pathlib import Path, PurePosixPath
from typing import Any

import pytest
import timm
from timm.models import get_arch_pretrained_cfgs

from vitarium.backbones._registry import entries

LEFT_OUT = "TorchScript (not supported), timm's own networks, weights that the package lacks"
_SEQUENCES = "deit*"
MARKERS = ("base", "forward", "backward", "cfg", "cfg_nonstd", "torchscript", "features")
MARKERS += ("fxforward", "fxbackward", "timeout(seconds)")


class Suite:
    """A pytest plugin: timm's tests find these entries in place of timm's models."""

    def __init__(self, names: list[str]) -> None:
        self.names = names
        self.ran = Counter[str]()

    def list_models(
        self,
        filter: str | list[str] = "",
        module: object = "",
        pretrained: bool = False,
        exclude_filters: str | list[str] = "",
        name_matches_cfg: bool = False,
        include_tags: bool | None = None,
    ) -> list[str]:
        """In place of timm's function.

        One test of configs is for networks with maps, another one for those with sequences: timm
        names the latter by filters, of which ``deit*`` is the one that fits some of ours.
        """
        names = self.names
        if _SEQUENCES in filter:
            names = [name for name in names if "_deit_" in name]
        elif filter:  # of networks of timm's
            return []
        elif include_tags and _SEQUENCES in exclude_filters:
            names = [name for name in names if "_deit_" not in name]
        cfgs = {tag: cfg for x in names for tag, cfg in get_arch_pretrained_cfgs(x).items()}
        if pretrained:
            return [tag for tag, cfg in cfgs.items() if cfg.file]
        return [*cfgs] if include_tags else names

    def entry(self, item: Any) -> str:
        """The entry that a test runs on, or an empty string."""
        name = item.callspec.params.get("model_name") if hasattr(item, "callspec") else None
        entry = name.partition(".")[0] if isinstance(name, str) else ""
        return entry if entry in self.names else ""

    def pytest_configure(self, config: pytest.Config) -> None:
        for marker in MARKERS:
            config.addinivalue_line("markers", marker)

    def pytest_collection_modifyitems(self, config: pytest.Config, items: list[Any]) -> None:
        kept = [x for x in items if self.entry(x) and "torchscript" not in x.name]
        config.hook.pytest_deselected(items=[x for x in items if x not in kept])
        items[:] = kept

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_call(self, item: Any) -> Generator[None]:
        yield  # raises if the test skips or fails
        self.ran[self.entry(item)] += 1

    def pytest_terminal_summary(self, terminalreporter: Any) -> None:
        terminalreporter.line(
            f"timm {timm.__version__}, entries: {len(self.ran)}, tests passed: "
            f"{sum(self.ran.values())}; left out: {LEFT_OUT}"
        )


def source_distribution() -> Path:
    """timm's archive of the installed version, out of the cache or from the package index."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "vitarium"
    name = f"timm-{timm.__version__}.tar.gz"
    if not (cache / name).exists():
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache) as folder:
            command = [
                sys.executable,
                "-m",
                "pip",
                "download",
                "--quiet",
                "--retries=1",
                "--dest",
                folder,
            ]
            command += ["--no-deps", "--no-binary=timm", f"timm=={timm.__version__}"]
            run = subprocess.run(command, capture_output=True, text=True)
            if run.returncode or not (Path(folder) / name).exists():
                reason = (run.stderr.strip() or f"pip gave no {name}").splitlines()[-1]
                sys.exit(f"timm_suite: timm {timm.__version__} cannot be downloaded: {reason}")
            (Path(folder) / name).replace(cache / name)
    return cache / name


def extract_tests(archive: Path, folder: Path) -> Path:
    """The regular files of the archive's ``tests``, written below ``folder``; nothing else is."""
    root = archive.name.removesuffix(".tar.gz")
    with tarfile.open(archive) as tar:
        for member in tar:
            path = PurePosixPath(member.name)
            if not member.isreg() or path.parts[:2] != (root, "tests") or ".." in path.parts:
                continue
            content = tar.extractfile(member)
            assert content is not None
            target = folder.joinpath(*path.parts[1:])
            target.parent.mkdir(parents=True, exist_ok=True)
            with target.open("xb") as file:
                shutil.copyfileobj(content, file)
    return folder / "tests"


def main() -> int:
    parser = argparse.ArgumentParser(description="timm's own model tests on vitarium's entries")
    parser.add_argument("--atto", action="store_true", help="only each family's smallest entry")
    args, rest = parser.parse_known_args()
    names = [name for name in entries() if name.endswith("_atto") or not args.atto]
    suite = Suite(names)
    timm.list_models = suite.list_models
    os.environ.pop("GITHUB_ACTIONS", None)  # there timm leaves out what needs memory or time
    with tempfile.TemporaryDirectory() as folder:
        tests = extract_tests(source_distribution(), Path(folder))
        alone = ["-c", os.devnull, f"--rootdir={folder}", "-p", "no:cacheprovider", "-q", "-rs"]
        alone += ["-W", "ignore:Module already imported:pytest.PytestAssertRewriteWarning"]
        status = int(pytest.main([*alone, str(tests / "test_models.py"), *rest], [suite]))
    if untested := [name for name in names if not suite.ran[name]]:
        print(f"timm_suite: no test passed on {', '.join(untested)}", file=sys.stderr)
    return status or int(bool(untested))


if __name__ == "__main__":
    sys.exit(main())
