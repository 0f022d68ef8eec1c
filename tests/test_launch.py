"""launch/local.sh and .ci/run: with a stand-in for Python where that is enough, else with a real install (slow)."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
TOOLS = ("bash", "cat", "cut", "dirname", "flock", "mkdir", "mktemp", "rm", "env")

# A Python that "installs" by writing to a log: `-m venv`, `-m pip` and everything else are recorded.
FAKE_PYTHON = """#!/usr/bin/env bash
case "$*" in
  *version_info*realpath*) {describe} ;;
  *version_info*) echo " $3 is {version}." ;;
  "-m venv "*) mkdir -p "$3/bin"; cat "$0" >"$3/bin/python"; chmod +x "$3/bin/python"; echo venv >>"{log}"; {venv} ;;
  "-m pip "*) echo "pip in $PWD: $*" >>"{log}"; {pip} ;;
  *) echo "python in $PWD: $*" >>"{log}" ;;
esac
"""

FAKE_UV = """#!/usr/bin/env bash
echo "uv $*" >>"{log}"
folder=${{@: -1}}/bin
if [ "$1" = venv ]; then mkdir -p "$folder"; cat "{python}" >"$folder/python"; chmod +x "$folder/python"; fi
"""


class Clone:
    """A copy of what local.sh reads, with a PATH that holds nothing but the usual tools and fake Pythons."""

    def __init__(self, folder: Path):
        self.root, self.bin, self.log = folder / "my clone", folder / "bin", folder / "log"
        for name in ("launch/local.sh", "pyproject.toml", "constraints.txt"):
            target = self.root / name
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, target)
        self.bin.mkdir()
        for tool in (*TOOLS, "chmod"):
            if found := shutil.which(tool):
                (self.bin / tool).symlink_to(found)

    def python(self, name: str, version: str, venv: str = "true", pip: str = "true") -> Path:
        supported = (3, 11) <= tuple(map(int, version.split(".")[:2])) <= (3, 13)
        describe = f"echo '{version} /fake/{version}'" if supported else "true"
        path = self.bin / name
        path.write_text(FAKE_PYTHON.format(describe=describe, version=version, log=self.log, venv=venv, pip=pip))
        path.chmod(0o755)
        return path

    def run(self, *arguments: str, cwd: Path | None = None, **environment: str) -> subprocess.CompletedProcess:
        environment = {"PATH": str(self.bin), "HOME": str(self.root)} | environment
        command = ["bash", str(self.root / "launch/local.sh"), *arguments]
        return subprocess.run(command, capture_output=True, text=True, cwd=cwd or self.root.parent, env=environment)

    def lines(self) -> list[str]:
        lines = self.log.read_text().splitlines() if self.log.exists() else []
        self.log.unlink(missing_ok=True)
        return lines


@pytest.fixture
def clone(tmp_path):
    return Clone(tmp_path)


@pytest.mark.parametrize("script", ["launch/local.sh", ".ci/run"])
def test_scripts_are_valid_bash_and_executable(script):
    subprocess.run(["bash", "-n", str(ROOT / script)], check=True)
    assert os.access(ROOT / script, os.X_OK)
    assert "set -euo pipefail" in (ROOT / script).read_text()


def test_first_run_installs_and_later_runs_do_not(clone, tmp_path):
    clone.python("python3.12", "3.12.1")
    result = clone.run("train", "--config=x y")
    assert result.returncode == 0
    assert "making" in result.stderr and "ready after" in result.stderr
    venv, pip, command = clone.lines()
    assert venv == "venv"
    assert f"--constraint {clone.root}/constraints.txt --editable {clone.root}[test]" in pip
    assert command == f"python in {tmp_path}: -m llm_jax.cli train --config=x y"
    result = clone.run("doctor")
    assert result.stderr == ""
    assert clone.lines() == [f"python in {tmp_path}: -m llm_jax.cli doctor"]


def test_relative_paths_are_the_callers_and_tests_run_in_the_clone(clone, tmp_path):
    clone.python("python3.12", "3.12.1")
    clone.run()
    clone.lines()
    clone.run("python", "-c", "1", cwd=tmp_path)
    clone.run("test", "-k", "a b", cwd=tmp_path)
    tests = "-m pytest --numprocesses=auto --dist=loadfile --no-loadscope-reorder -k a b"
    assert clone.lines() == [f"python in {tmp_path}: -c 1", f"python in {clone.root}: {tests}"]


@pytest.mark.parametrize("name", ["pyproject.toml", "constraints.txt"])
def test_changed_requirements_are_installed_into_the_same_environment(clone, name):
    clone.python("python3.12", "3.12.1")
    clone.run()
    clone.lines()
    (clone.root / name).write_text((clone.root / name).read_text() + "\n# changed\n")
    clone.run()
    assert [line.split()[0] for line in clone.lines()] == ["pip", "python"]


def test_another_python_makes_another_environment(clone):
    clone.python("python3.12", "3.12.1")
    clone.run()
    clone.lines()
    other = clone.python("other", "3.11.7")
    assert "with Python 3.11.7" in clone.run(LLM_JAX_PYTHON=str(other)).stderr
    assert [line.split()[0] for line in clone.lines()] == ["venv", "pip", "python"]
    clone.run()  # stays with what it has
    assert [line.split()[0] for line in clone.lines()] == ["python"]


def test_half_made_environment_is_made_again(clone):
    clone.python("python3.12", "3.12.1", pip="kill -9 $PPID; exit 1")
    assert clone.run().returncode != 0
    assert (clone.root / ".venv/bin/python").exists()
    clone.lines()
    clone.python("python3.12", "3.12.1")
    assert clone.run().returncode == 0
    assert [line.split()[0] for line in clone.lines()] == ["venv", "pip", "python"]


def test_broken_environment_is_made_again(clone):
    clone.python("python3.12", "3.12.1")
    clone.run()
    (clone.root / ".venv/bin/python").unlink()
    clone.lines()
    assert clone.run().returncode == 0
    assert [line.split()[0] for line in clone.lines()] == ["venv", "pip", "python"]


def test_newest_supported_python_is_taken(clone):
    clone.python("python3", "3.9.2")
    clone.python("python3.11", "3.11.4")
    assert "with Python 3.11.4" in clone.run().stderr


@pytest.mark.parametrize(
    "python, environment, words",
    [
        (("python3", "3.9"), {}, ["3.11, 3.12 or 3.13 is needed", "python3 is 3.9.", "LLM_JAX_PYTHON"]),
        (("python3", "3.14"), {}, ["3.11, 3.12 or 3.13 is needed", "python3 is 3.14."]),
        (None, {}, ["none is on PATH. Install one"]),
        (("python3.12", "3.12.1"), {"LLM_JAX_PYTHON": "/no/python"}, ["LLM_JAX_PYTHON=/no/python is not a working"]),
    ],
)
def test_without_a_usable_python_it_says_what_is_needed(clone, python, environment, words):
    if python:
        clone.python(*python)
    result = clone.run(**environment)
    assert result.returncode == 1
    for word in words:
        assert word in result.stderr
    assert not (clone.root / ".venv").exists()


def test_failed_install_says_so_and_the_next_try_works(clone):
    clone.python("python3.12", "3.12.1", pip="echo 'no such package' >&2; exit 1")
    result = clone.run()
    assert result.returncode == 1
    assert "no such package" in result.stderr and "could not be installed" in result.stderr
    clone.python("python3.12", "3.12.1", venv="exit 1")
    result = clone.run()
    assert result.returncode == 1 and "python3-venv" in result.stderr
    clone.python("python3.12", "3.12.1")
    assert clone.run().returncode == 0


def test_uv_makes_the_environment_where_it_is_present(clone):
    clone.python("python3.12", "3.12.1")
    uv = clone.bin / "uv"
    uv.write_text(FAKE_UV.format(log=clone.log, python=clone.bin / "python3.12"))
    uv.chmod(0o755)
    assert clone.run().returncode == 0
    made, installed, command = clone.lines()
    assert made == f"uv venv --quiet --seed --python {clone.bin}/python3.12 {clone.root}/.venv"
    assert (
        f"--constraint {clone.root}/constraints.txt" in installed
        and f"--python {clone.root}/.venv/bin/python" in installed
    )
    assert "llm_jax.cli" in command


def test_constraints_are_exact_and_without_addresses():
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = [line for line in lines if line and not line.startswith("#")]
    assert all("==" in line and "://" not in line for line in pins)
    names = {line.partition("==")[0].lower().replace("_", "-") for line in pins}
    assert {"jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy", "pytest"} <= names


# ------------------------------------------------------------------------------------------- real installs


@pytest.fixture(scope="module")
def fresh_clone(tmp_path_factory):
    folder = tmp_path_factory.mktemp("fresh") / "a clone"
    if subprocess.run(["git", "clone", "--quiet", str(ROOT), str(folder)], capture_output=True).returncode:
        pytest.skip("not a git clone")
    return folder


@pytest.mark.slow
def test_fresh_clone_after_a_killed_install(fresh_clone, tmp_path):
    environment = {**os.environ, "LLM_JAX_PYTHON": sys.executable}
    environment.pop("LLM_JAX_VENV", None)
    script = str(fresh_clone / "launch/local.sh")
    killed = subprocess.Popen([script, "--version"], cwd=tmp_path, env=environment, start_new_session=True)
    time.sleep(8)
    os.killpg(killed.pid, signal.SIGKILL)
    killed.wait()
    result = subprocess.run([script, "--version"], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert result.returncode == 0 and result.stdout.startswith("llm-jax "), result.stderr
    command = [script, "python", "-m", "pip", "list", "--format=freeze"]
    listed = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout.splitlines()
    runners = ("pip", "setuptools", "wheel", "pytest", "pytest-xdist", "execnet", "iniconfig", "pluggy")
    installed = [line for line in listed if line.partition("==")[0] not in runners]
    assert len(installed) <= 52
    command = [script, "train", "--config=quickstart", "--print_config"]
    result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert '"name": "quickstart"' in result.stdout and result.stderr == ""


@pytest.mark.slow
def test_wheel_brings_the_configs(fresh_clone, tmp_path):
    build = [sys.executable, "-m", "pip", "wheel", "-qq", "--no-deps", "--wheel-dir", str(tmp_path), str(fresh_clone)]
    subprocess.run(build, check=True)
    (wheel,) = tmp_path.glob("*.whl")
    shutil.unpack_archive(wheel, tmp_path / "site", "zip")
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "site")}
    command = [sys.executable, "-m", "llm_jax.cli", "train", "--config=quickstart", "--print_config"]
    result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert '"name": "quickstart"' in result.stdout, result.stderr
    code = "from llm_jax.config import *; [load(name) for name in config_names()]; print(find_config('quickstart'))"
    result = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert result.stdout.strip() == str(tmp_path / "site/llm_jax/configs/quickstart.py"), result.stderr
