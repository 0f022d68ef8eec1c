"""What launch/tpu_pod.sh and launch/slurm.sbatch have in common."""

import os
import re
import shutil
import subprocess

import pytest
from clusters import ROOT

from llm_jax.errors import Preempted


@pytest.mark.parametrize("script", ["tpu_pod.sh", "slurm.sbatch"])
def test_scripts_are_valid_bash_and_executable(script):
    subprocess.run(["bash", "-n", str(ROOT / "launch" / script)], check=True)
    assert os.access(ROOT / "launch" / script, os.X_OK)
    if shutil.which("shellcheck"):
        subprocess.run(["shellcheck", "--shell=bash", str(ROOT / "launch" / script)], check=True)


@pytest.mark.parametrize("script", ["tpu_pod.sh", "slurm.sbatch"])
def test_the_exit_code_is_that_of_the_package(script):
    assert f"PREEMPTED={Preempted.exit_code}" in (ROOT / "launch" / script).read_text()


@pytest.mark.parametrize("script", ["tpu_pod.sh", "slurm.sbatch"])
def test_help_names_every_option(cluster, script):
    out, _ = cluster.run(script, "--help")
    text = (ROOT / "launch" / script).read_text()
    names = re.findall(r"^      ([a-z_ |]+)\)$", text, re.MULTILINE)
    options = [name for line in names for name in line.split(" | ")]
    assert len(options) >= 8
    for option in options:
        assert re.search(rf"^  --{option}\b", out, re.MULTILINE), option
    assert cluster.calls() == []
