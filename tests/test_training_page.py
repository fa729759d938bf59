"""docs/training.md: names exist, and the Slurm job does what the page says."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest

import vitarium_cli
from vitarium.tools.train import chosen

PAGE = (Path(__file__).parent.parent / "docs" / "training.md").read_text(encoding="utf-8")
STUBS = {
    "scontrol": 'echo "scontrol $*" >> calls\n[ "$1" != show ] || printf "first\\nsecond\\n"',
    "srun": 'shift\nSLURM_PROCID=3 SLURM_LOCALID=1 SLURM_NTASKS=8 exec "$@"',
    "vitarium": 'echo "$RANK $LOCAL_RANK $WORLD_SIZE $MASTER_ADDR $MASTER_PORT $*" >> calls\n'
    "exit $STATUS",
}


def test_commands_parse_and_configs_exist():
    lines = PAGE.replace("\\\n", " ").splitlines()
    found = [line for line in lines if re.search(r"\bvitarium(_cli)? (train|data) [a-z]", line)]
    assert len(found) > 8
    for line in found:
        if "`" in line or line.startswith("exec"):
            continue
        words = shlex.split(re.sub(r"^.*\bvitarium(_cli)? (?=train|data)", "", line), comments=True)
        args = vitarium_cli._parser().parse_args(words)
        if args.tool == "train":
            chosen(args.config, args.set)


@pytest.mark.skipif(shutil.which("bash") is None, reason="no bash")
@pytest.mark.parametrize(
    ("status", "restarts", "begun", "requeued"),
    [
        (130, 0, False, True),
        (143, 3, True, True),
        (137, 50, True, False),
        (0, 0, True, False),
        (1, 0, False, False),
    ],
)
def test_the_slurm_job_goes_on_after_signals_only(tmp_path, status, restarts, begun, requeued):
    for name, text in STUBS.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{text}\n")
        (tmp_path / name).chmod(0o755)
    if begun:
        (tmp_path / "runs/nat_mini").mkdir(parents=True)
        (tmp_path / "runs/nat_mini/config.toml").touch()
    script = re.search("```bash\n(.*?)```", PAGE, re.DOTALL)[1]
    environment = {
        **{"PATH": f"{tmp_path}:{os.environ['PATH']}", "STATUS": str(status)},
        **{"SLURM_JOB_ID": "123", "SLURM_JOB_NODELIST": "n[1-2]"},
        "SLURM_RESTART_COUNT": str(restarts),
    }
    result = subprocess.run(["bash", "-c", script], cwd=tmp_path, env=environment, timeout=60)
    assert result.returncode == status
    calls = (tmp_path / "calls").read_text().splitlines()
    resume = " --resume" if begun else ""
    assert f"3 1 8 first 20123 train nat_mini --output runs/nat_mini{resume}" in calls
    assert ("scontrol requeue 123" in calls) == requeued
