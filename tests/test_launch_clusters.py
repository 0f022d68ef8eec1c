"""launch/tpu_pod.sh and launch/slurm.sbatch, against stand-ins for gcloud, sbatch and srun that record their calls."""

import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from llm_jax.errors import Preempted

ROOT = Path(__file__).resolve().parent.parent
TOOLS = ("bash", "cat", "dirname", "env", "git", "gzip", "head", "mkdir", "rm", "sed", "seq", "tail", "tar", "tr")
ODD = ["it's", 'a "b" c', "$HOME `x` \\ *", "", "--config.data.path=train_*.bin", "two  spaces", "line\nbreak"]

# Records its arguments in one write. Answers with the next line "CODE TEXT" of the file named by what it was asked;
# the last line stays for good.
FAKE = r"""#!/usr/bin/env bash
line=$(printf '%s\037' "${0##*/}" "$@"; printf '\036')
printf '%s' "$line" >>"$LOG"
case "${0##*/} $*" in
  *" ssh "*"tar -xzf"*) asked=install ;;
  *" ssh "*) asked=run-$5 ;;
  *" scp "*) asked=copy ;;
  "gcloud compute tpus queued-resources "*) asked=$4 ;;
  *) asked=${0##*/} ;;
esac
answers=$ANSWERS/$asked
code=0 text=""
if [ -f "$answers" ]; then
  read -r code text <"$answers"
  if [ -n "$(sed 1d "$answers")" ]; then sed -i 1d "$answers"; fi
fi
if [ "$asked$HANG" = "run-my-runyes" ]; then exec /bin/sleep 60; fi
if [ "$code" -eq 0 ]; then printf '%s\n' "$text"; else printf '%s\n' "$text" >&2; fi
exit "$code"
"""

# sbatch runs a copy of the script from a folder of its own, as Slurm does.
FAKE_SBATCH = r"""
options=()
while [[ $1 == -* ]]; do options+=("$1"); shift; done
mkdir -p "$ANSWERS/spool/job"
cat "$1" >"$ANSWERS/spool/job/slurm_script"
shift
export SLURM_JOB_ID=${JOB:-77} SLURM_SUBMIT_DIR=$PWD
for option in "${options[@]}"; do
  case $option in
    --nodes=*) export SLURM_JOB_NUM_NODES=${option#*=} ;;
    --gpus-per-node=*) export SLURM_GPUS_ON_NODE=${option#*=} ;;
    --cpus-per-task=*) export SLURM_CPUS_PER_TASK=${option#*=} ;;
  esac
done
exec bash "$ANSWERS/spool/job/slurm_script" "$@"
"""

# srun on one machine: starts the tasks, ends with the highest exit code.
LOCAL_SRUN = r"""#!/usr/bin/env bash
while [[ $1 == --* ]]; do
  case $1 in --ntasks=*) tasks=${1#*=} ;; esac
  shift
done
export SLURM_STEP_NODELIST=localhost SLURM_STEP_NUM_NODES=1 SLURM_NTASKS=$tasks SLURM_STEP_ID=0
pids=() worst=0
for ((i = 0; i < tasks; i++)); do
  SLURM_PROCID=$i SLURM_LOCALID=$i "$@" &
  pids+=($!)
done
for pid in "${pids[@]}"; do
  code=0
  wait "$pid" || code=$?
  if [ "$code" -gt "$worst" ]; then worst=$code; fi
done
exit "$worst"
"""


class Cluster:
    """A git clone with the launchers, and a PATH of nothing but the usual tools and stand-ins."""

    def __init__(self, folder: Path):
        self.root, self.bin, self.log, self.answers = (folder / name for name in ("my clone", "bin", "log", "answers"))
        for name in ("launch/tpu_pod.sh", "launch/slurm.sbatch"):
            target = self.root / name
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, target)
        self.bin.mkdir()
        self.answers.mkdir()
        for tool in TOOLS:
            if found := shutil.which(tool):
                (self.bin / tool).symlink_to(found)
        for name in ("gcloud", "srun", "scontrol", "sleep"):
            self.tool(name, FAKE)
        self.tool("sbatch", FAKE.replace('exit "$code"\n', FAKE_SBATCH))
        self.python("#!/usr/bin/env bash\n")
        (self.root / ".gitignore").write_text("/build/\n.venv/\n")
        self.git("init", "-q")
        self.commit()

    def tool(self, name: str, content: str) -> None:
        (self.bin / name).unlink(missing_ok=True)
        (self.bin / name).write_text(content)
        (self.bin / name).chmod(0o755)

    def python(self, content: str) -> None:
        path = self.root / ".venv/bin/python"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
        path.chmod(0o755)

    def git(self, *arguments: str) -> None:
        who = ("-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false")
        subprocess.run(["git", *who, "-C", str(self.root), *arguments], check=True)

    def commit(self) -> None:
        self.git("add", "--all")
        self.git("commit", "-q", "-m", "all")

    def answer(self, asked: str, *lines: str) -> None:
        (self.answers / asked).write_text("".join(line + "\n" for line in lines))

    def start(self, script: str, *arguments: str, **environment: str) -> subprocess.Popen:
        environment = {
            "PATH": str(self.bin), "HOME": str(self.root.parent), "LOG": str(self.log), "ANSWERS": str(self.answers),
            "HANG": "",
        } | environment  # fmt: skip
        command = ["bash", str(self.root / "launch" / script), *arguments]
        return subprocess.Popen(
            command, cwd=self.root.parent, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )

    def run(self, script: str, *arguments: str, code: int = 0, **environment: str) -> tuple[str, str]:
        """Its stdout and stderr."""
        process = self.start(script, *arguments, **environment)
        out, err = process.communicate(timeout=60)
        assert process.returncode == code, f"exit code {process.returncode}, not {code}\n{out}\n{err}"
        return out, err

    def calls(self) -> list[list[str]]:
        """What was called since the last time, one list of words a call."""
        text = self.log.read_text() if self.log.exists() else ""
        self.log.unlink(missing_ok=True)
        return [call.split("\037")[:-1] for call in text.split("\036")[:-1]]


@pytest.fixture
def cluster(tmp_path):
    return Cluster(tmp_path)


def shown(calls: list[list[str]]) -> list[str]:
    """The calls in short: what tells them apart."""
    found = []
    for call in calls:
        if call[0] != "gcloud":
            found.append(" ".join(call))
        elif call[3] == "queued-resources":
            found.append(call[4])
        else:
            kind = "copy" if call[4] == "scp" else "install" if "tar -xzf" in call[-1] else "run"
            found.append(f"{kind} {call[6].partition(':')[0] if kind == 'copy' else call[5]}")
    return found


def split_lines(text: str) -> list[list[str]]:
    """The commands of a dry run as the shell reads them; a word may hold a line break."""
    quoted, lines = "", []
    for line in text.splitlines():
        quoted = f"{quoted}\n{line}" if quoted else line
        try:
            lines.append(shlex.split(quoted))
            quoted = ""
        except ValueError:  # within quotes
            continue
    assert not quoted
    return lines


TPU = ("--name=my-run", "--zone=us-east5-b")
MAKE = ("--create", "--accelerator_type=v5litepod-16", "--runtime_version=v2-alpha-tpuv5-lite")
ACTIVE = "0 ACTIVE"
GONE = "1 ERROR: (gcloud) NOT_FOUND: Resource 'my-run' was not found"


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


# ------------------------------------------------------------------------------------------------------ TPUs


def test_a_slice_is_made_awaited_filled_and_run(cluster):
    cluster.answer("describe", GONE, "0 WAITING_FOR_RESOURCES", "0 WAITING_FOR_RESOURCES", "0 PROVISIONING", ACTIVE)
    _, err = cluster.run("tpu_pod.sh", *TPU, "--project=p", *MAKE, "--spot", "--delete", "train", "--config=x")
    calls = cluster.calls()
    where = ["--zone=us-east5-b", "--project=p"]
    resource = ["gcloud", "compute", "tpus", "queued-resources"]
    look = [*resource, "describe", "my-run", *where, "--format=value(state.state)"]
    wait = ["sleep", "30"]
    assert calls[:9] == [
        look,
        [*resource, "create", "my-run", *where, "--accelerator-type=v5litepod-16",
         "--runtime-version=v2-alpha-tpuv5-lite", "--node-id=my-run", "--spot", "--quiet"],
        wait, look, wait, look, wait, look, wait,
    ]  # fmt: skip
    assert calls[9] == look
    archive = str(cluster.root / "build/my-run.tar.gz")
    machine = ["gcloud", "compute", "tpus", "tpu-vm"]
    assert calls[10] == [*machine, "scp", archive, "my-run:llm_jax.tar.gz", "--worker=all", *where, "--quiet"]
    assert calls[11][:-1] == [*machine, "ssh", "my-run", "--worker=all", *where, "--quiet"]
    assert "--constraint constraints.txt --editable '.[tpu]'" in calls[11][-1]
    assert calls[12] == [*machine, "ssh", "my-run", "--worker=all", *where, "--quiet",
                         "--command=cd llm_jax && ./launch/local.sh train --config=x"]  # fmt: skip
    assert calls[13:] == [[*resource, "delete", "my-run", *where, "--force", "--quiet"]]
    states = [line for line in err.splitlines() if line.startswith("tpu_pod.sh: my-run is")]
    assert [line.split()[-1] for line in states] == ["WAITING_FOR_RESOURCES", "PROVISIONING", "ACTIVE"]


def test_the_extra_tpu_exists():
    assert re.search(r"^tpu = \[", (ROOT / "pyproject.toml").read_text(), re.MULTILINE)


def test_a_resource_that_exists_is_used(cluster):
    cluster.answer("describe", ACTIVE)
    _, err = cluster.run("tpu_pod.sh", *TPU, *MAKE, "train")
    assert shown(cluster.calls()) == ["describe", "copy my-run", "install my-run", "run my-run"]
    assert "my-run exists already and is used as it is" in err


def test_several_slices_run_at_once(cluster):
    cluster.answer("describe", GONE, ACTIVE)
    cluster.run("tpu_pod.sh", *TPU, *MAKE, "--node-count=3", "train")
    calls = cluster.calls()
    assert "--node-count=3" in calls[1] and "--node-prefix=my-run" in calls[1]
    found = shown(calls)[4:]
    for i, kind in enumerate(("copy", "install", "run")):
        assert sorted(found[3 * i : 3 * i + 3]) == [f"{kind} my-run-{slice}" for slice in range(3)]
    assert len(found) == 9


@pytest.mark.parametrize(
    ("codes", "expected"), [((0, 0), 0), ((0, 3), 3), ((5, 3), 5), ((1, 4), 4), ((4, 255), 4), ((255, 0), 255)]
)
def test_the_exit_code_is_that_of_the_run(cluster, codes, expected):
    cluster.answer("describe", ACTIVE)
    for i, code in enumerate(codes):
        cluster.answer(f"run-my-run-{i}", f"{code} ended")
    cluster.run("tpu_pod.sh", *TPU, "--node_count=2", "--delete", "train", code=expected)
    assert shown(cluster.calls())[-1] == "delete"


def test_a_preempted_run_is_tried_again_on_a_slice_made_anew(cluster):
    cluster.answer("describe", ACTIVE, "0 SUSPENDING", "0 SUSPENDED", "0 PROVISIONING", ACTIVE)
    cluster.answer("run-my-run", "4 saved", "4 saved", "0 done")
    _, err = cluster.run("tpu_pod.sh", *TPU, *MAKE, "--retries=5", "train")
    once = ["copy my-run", "install my-run", "run my-run"]
    wait = "sleep 30"
    assert shown(cluster.calls()) == [
        "describe", *once, wait, "describe", wait, "describe", "delete", "create", wait, "describe", wait, "describe",
        *once, wait, "describe", *once,
    ]  # fmt: skip
    assert "trying again (1 of 5)" in err and "trying again (2 of 5)" in err


@pytest.mark.parametrize(("retries", "code", "runs"), [(0, 4, 1), (2, 4, 3), (2, 3, 1), (2, 2, 1), (2, 255, 1)])
def test_retries_are_counted_and_for_saved_runs_alone(cluster, retries, code, runs):
    cluster.answer("describe", ACTIVE)
    cluster.answer("run-my-run", f"{code} ended")
    cluster.run("tpu_pod.sh", *TPU, f"--retries={retries}", "train", code=code)
    assert shown(cluster.calls()).count("run my-run") == runs


def test_arguments_reach_the_run_as_they_were_given(cluster, tmp_path):
    cluster.answer("describe", ACTIVE)
    cluster.run("tpu_pod.sh", *TPU, "--", "train", *ODD)
    command = cluster.calls()[-1][-1].removeprefix("--command=")
    worker = tmp_path / "worker/llm_jax/launch/local.sh"
    worker.parent.mkdir(parents=True)
    worker.write_text("#!/usr/bin/env bash\nprintf '%s\\0' \"$@\"\n")
    worker.chmod(0o755)
    found = subprocess.run(["bash", "-c", command], cwd=tmp_path / "worker", capture_output=True, text=True, check=True)
    assert found.stdout.split("\0")[:-1] == ["train", *ODD]


def test_a_worker_unpacks_the_commit_and_keeps_its_runs(cluster, tmp_path):
    (cluster.root / "llm_jax").mkdir()
    (cluster.root / "llm_jax/new.py").write_text("")
    local = cluster.root / "launch/local.sh"
    local.write_text('#!/usr/bin/env bash\nprintf "%s\\n" "$LLM_JAX_PYTHON" "$*" "$PWD"\n')
    local.chmod(0o755)
    cluster.commit()
    cluster.answer("describe", ACTIVE)
    cluster.run("tpu_pod.sh", *TPU, "--setup=echo mounted; echo 'in order'", "train")
    install = cluster.calls()[2][-1].removeprefix("--command=")
    home = tmp_path / "worker"
    for old in ("llm_jax/llm_jax/old.py", "llm_jax/runs/x/config.json"):
        (home / old).parent.mkdir(parents=True)
        (home / old).write_text("")
    shutil.copy(cluster.root / "build/my-run.tar.gz", home / "llm_jax.tar.gz")
    cluster.tool("uv", '#!/usr/bin/env bash\n[ "$2" != find ] || echo /fake/python3.12\n')
    environment = {"PATH": str(cluster.bin), "HOME": str(home)}
    done = subprocess.run(["bash", "-c", install], cwd=home, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [
        "/fake/python3.12",
        "python -m pip install --quiet --constraint constraints.txt --editable .[tpu]",
        str(home / "llm_jax"),
        "mounted",
        "in order",
    ]
    assert (home / "llm_jax/llm_jax/new.py").exists() and (home / "llm_jax/runs/x/config.json").exists()
    assert not (home / "llm_jax/llm_jax/old.py").exists()


@pytest.mark.parametrize("options", [(), ("--node_count=2", "--project=p", "--spot", "--setup=it's")])
def test_a_dry_run_prints_what_is_called(cluster, options):
    arguments = (*TPU, *MAKE, "--delete", *options, "--", "train", *ODD)
    out, err = cluster.run("tpu_pod.sh", "--dry_run", *arguments)
    assert cluster.calls() == [] and err == "" and not (cluster.root / "build").exists()
    printed = [line for line in split_lines(out) if line[0] == "gcloud"]
    assert [line[0] for line in split_lines(out) if line[0] != "gcloud"] == ["mkdir", "git"]
    cluster.answer("describe", GONE, ACTIVE)
    cluster.run("tpu_pod.sh", *arguments)
    called = [call for call in cluster.calls() if call[0] == "gcloud"]
    assert sorted(called) == sorted(printed)
    assert [call[4] for call in called] == [line[4] for line in printed]


def test_a_dry_run_is_one_line_a_command(cluster):
    out, _ = cluster.run("tpu_pod.sh", "--dry_run", *TPU, *MAKE, "train", "--config=x")
    assert [line.split()[0] for line in out.splitlines()] == ["gcloud"] * 3 + ["mkdir", "git"] + ["gcloud"] * 3


def test_a_dry_run_needs_no_gcloud(cluster):
    (cluster.bin / "gcloud").unlink()
    cluster.run("tpu_pod.sh", "--dry_run", *TPU, "train")


@pytest.mark.parametrize(
    ("answers", "options", "code", "words", "calls"),
    [
        ({"describe": [GONE]}, (), 2, "no queued resource my-run in us-east5-b; --create makes it", ["describe"]),
        ({"describe": ["1 ERROR: Please run: $ gcloud auth login"]}, MAKE, 2, "not logged in", ["describe"]),
        ({"describe": ["1 You do not currently have an active account selected."]}, (), 2, "not logged in",
         ["describe"]),
        ({"describe": ["1 PERMISSION_DENIED"]}, (), 1, "PERMISSION_DENIED", ["describe"]),
        ({"describe": [GONE], "create": ["1 quota of 0"]}, (*MAKE, "--delete"), 1, "could not create my-run",
         ["describe", "create"]),
        ({"describe": ["0 FAILED"]}, MAKE, 1, "my-run has FAILED", ["describe"]),
        ({"describe": ["0 FAILED"]}, ("--delete",), 1, "my-run has FAILED", ["describe", "delete"]),
        ({"describe": ["0 SUSPENDED"]}, (), 1, "my-run was preempted", ["describe"]),
        ({"describe": ["0 SUSPENDED"], "delete": ["1 no"]}, MAKE, 1, "preempted my-run could not be deleted",
         ["describe", "delete"]),
        ({"describe": ["0 ACCEPTED"]}, ("--wait_minutes=1",), 1, "still ACCEPTED after 1 minutes",
         ["describe", "sleep 30", "describe", "sleep 30", "describe"]),
        ({"describe": [ACTIVE], "copy": ["1 no key"]}, (), 1, "could not be copied", ["describe", "copy my-run"]),
        ({"describe": [ACTIVE], "install": ["1 no pip"]}, ("--delete",), 1, "could not be installed",
         ["describe", "copy my-run", "install my-run", "delete"]),
        ({"describe": [ACTIVE], "delete": ["1 no"]}, ("--delete",), 1, "could not be deleted",
         ["describe", "copy my-run", "install my-run", "run my-run", "delete"]),
    ],
)  # fmt: skip
def test_what_goes_wrong_is_said_and_ends_it(cluster, answers, options, code, words, calls):
    for asked, lines in answers.items():
        cluster.answer(asked, *lines)
    _, err = cluster.run("tpu_pod.sh", *TPU, *options, "train", code=code)
    assert words in err
    assert shown(cluster.calls()) == calls


def test_without_gcloud(cluster):
    (cluster.bin / "gcloud").unlink()
    _, err = cluster.run("tpu_pod.sh", *TPU, "train", code=2)
    assert "gcloud is not on PATH" in err and len(err.splitlines()) == 1


def test_changes_that_would_not_be_copied_are_refused(cluster):
    (cluster.root / "mine.py").write_text("")
    _, err = cluster.run("tpu_pod.sh", *TPU, "train", code=2)
    assert "mine.py" in err and cluster.calls() == []


def test_only_making_and_only_deleting(cluster):
    cluster.answer("describe", GONE, ACTIVE)
    cluster.run("tpu_pod.sh", *TPU, *MAKE)
    assert shown(cluster.calls()) == ["describe", "create", "sleep 30", "describe"]
    cluster.run("tpu_pod.sh", *TPU, "--delete")
    assert shown(cluster.calls()) == ["delete"]


def test_an_interruption_ends_gcloud_and_leaves_the_slice(cluster):
    cluster.answer("describe", ACTIVE)
    process = cluster.start("tpu_pod.sh", *TPU, "--delete", "train", HANG="yes")
    deadline = time.monotonic() + 30
    while not (cluster.log.exists() and "local.sh train" in cluster.log.read_text()):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=30)  # ends only when gcloud, which holds the pipe too, has ended
    assert process.returncode == 143
    assert "goes on costing" in err and "--name=my-run --zone=us-east5-b --delete" in err
    assert shown(cluster.calls())[-1] == "run my-run"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("train",), "--name=NAME"),
        (("--name=a", "train"), "--zone=ZONE"),
        (("--name=My", "--zone=us-east5-b", "train"), "--name=My cannot"),
        (("--name=a", "--zone=us-east5", "train"), "--zone=us-east5 is not a zone"),
        (TPU, "command is missing"),
        ((*TPU, "--retries=-1", "train"), "--retries=-1 is not a whole number of 0 or more"),
        ((*TPU, "--node_count=0", "train"), "--node_count=0 is not a whole number of 1 or more"),
        ((*TPU, "--wait_minutes=soon", "train"), "--wait_minutes=soon is not"),
        ((*TPU, "--name", "train"), "--name needs a value"),
        ((*TPU, "--spot=yes", "train"), "--spot takes no value"),
        ((*TPU, "--spot", "train"), "only with --create"),
        ((*TPU, "--create", "train"), "--create needs --accelerator_type"),
        ((*TPU, "--create", "--accelerator_type=v6e-8", "train"), "--create needs --runtime_version"),
        ((*TPU, *MAKE, "--delete"), "for nothing"),
        ((*TPU, *MAKE, "--retries=1"), "only with a command"),
        ((*TPU, "--workdir=x", "train"), "no option --workdir=x"),
    ],
)
def test_wrong_options_for_tpus_are_one_sentence(cluster, arguments, words):
    out, err = cluster.run("tpu_pod.sh", *arguments, code=2)
    assert words in err and out == "" and len(err.splitlines()) == 1
    assert cluster.calls() == []


# ----------------------------------------------------------------------------------------------------- Slurm


def test_it_submits_itself_and_runs_one_process_a_node(cluster):
    arguments = ("--nodes=2", "--gpus_per_node=4", "--time=1-0", "--save_minutes=10", "--sbatch=--partition=a b")
    cluster.run("slurm.sbatch", *arguments, "train", *ODD)
    script = str(cluster.root / "launch/slurm.sbatch")
    assert cluster.calls() == [
        ["sbatch", "--nodes=2", "--ntasks-per-node=1", "--cpus-per-task=8", "--signal=TERM@600", "--export=ALL",
         "--gpus-per-node=4", "--time=1-0", "--partition=a b", script, "--gpus_per_node=4", "--max_requeues=100",
         "train", *ODD],
        ["srun", "--nodes=2", "--ntasks=2", "--ntasks-per-node=1", "--cpus-per-task=8", "--kill-on-bad-exit=0",
         "--wait=600", "--export=ALL", "--gpu-bind=none", "env", "JAX_LOCAL_DEVICE_IDS=0,1,2,3",
         str(cluster.root / ".venv/bin/python"), "-m", "llm_jax.cli", "train", *ODD],
    ]  # fmt: skip


def test_one_process_a_gpu(cluster):
    cluster.run("slurm.sbatch", "--nodes=2", "--gpus_per_node=4", "--per_gpu", "--cpus_per_task=3", "train")
    submit, srun = cluster.calls()
    assert {"--ntasks-per-node=4", "--cpus-per-task=3", "--per_gpu"} <= set(submit)
    assert {"--ntasks=8", "--ntasks-per-node=4", "--cpus-per-task=3", "--gpu-bind=none"} <= set(srun)
    assert not any("JAX_LOCAL_DEVICE_IDS" in word for word in srun)


def test_given_to_sbatch_itself_it_takes_what_the_job_has(cluster):
    script = str(cluster.root / "launch/slurm.sbatch")
    environment = {"PATH": str(cluster.bin), "LOG": str(cluster.log), "ANSWERS": str(cluster.answers), "HANG": ""}
    command = ["sbatch", "--nodes=3", "--gpus-per-node=2", "--cpus-per-task=5", script, "train"]
    subprocess.run(command, cwd=cluster.root, env=environment, check=True, executable=cluster.bin / "sbatch")
    srun = cluster.calls()[1]
    assert {"--nodes=3", "--ntasks=3", "--cpus-per-task=5", "JAX_LOCAL_DEVICE_IDS=0,1"} <= set(srun)


def test_headers_say_what_a_submission_says(cluster):
    text = (ROOT / "launch/slurm.sbatch").read_text()
    headers = re.findall(r"^#SBATCH (\S+)$", text, re.MULTILINE)
    assert text.splitlines()[len(headers) + 1].startswith("# ")  # all of them before the first command
    out, _ = cluster.run("slurm.sbatch", "--dry_run", "train")
    submitted = split_lines(out)[0]
    shared = ("--nodes", "--cpus-per-task", "--signal")
    assert {word for word in headers if word.startswith(shared)} == {w for w in submitted if w.startswith(shared)}
    assert "--requeue" in headers


@pytest.mark.parametrize("options", [(), ("--nodes=2", "--gpus_per_node=4", "--per_gpu", "--sbatch=--mem=0")])
def test_a_dry_run_for_slurm_prints_what_is_called(cluster, options):
    out, err = cluster.run("slurm.sbatch", "--dry_run", *options, "train", *ODD)
    assert cluster.calls() == [] and err == ""
    cluster.run("slurm.sbatch", *options, "train", *ODD)
    assert cluster.calls() == split_lines(out)


@pytest.mark.parametrize(
    ("code", "restarts", "requeue", "words"),
    [
        (4, "", "0", "job 77 is queued again"),
        (4, "99", "0", "job 77 is queued again"),
        (4, "100", None, "queued again 100 times already"),
        (4, "", "1", "could not be queued again"),
        (0, "", None, ""),
        (3, "", None, ""),
        (143, "", None, ""),
    ],
)
def test_a_run_that_has_saved_is_queued_again(cluster, code, restarts, requeue, words):
    cluster.answer("srun", f"{code} ended")
    cluster.answer("scontrol", f"{requeue or 0} x")
    _, err = cluster.run("slurm.sbatch", "train", code=code, **({"SLURM_RESTART_COUNT": restarts} if restarts else {}))
    assert words in err
    asked = [call for call in cluster.calls() if call[0] == "scontrol"]
    assert asked == ([["scontrol", "requeue", "77"]] if requeue else [])


def test_a_signal_to_the_script_waits_for_the_run_to_save(cluster):
    cluster.tool("srun", FAKE.replace('exit "$code"', "/bin/sleep 0.5; exit 4"))
    process = cluster.start("slurm.sbatch", "train", SLURM_JOB_ID="77")
    deadline = time.monotonic() + 30
    while not cluster.log.exists():
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=30)
    assert process.returncode == 4 and "job 77 is queued again" in err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((), "command is missing"),
        (("--nodes=0", "train"), "--nodes=0 is not a whole number of 1 or more"),
        (("--gpus-per-node=x", "train"), "--gpus_per_node=x is not"),
        (("--per_gpu", "train"), "--per_gpu needs GPUs"),
        (("--per_gpu=4", "train"), "--per_gpu takes no value"),
        (("--time", "train"), "--time needs a value"),
        (("--save_minutes=0", "train"), "--save_minutes=0 is not"),
        (("--partition=gpu", "train"), "given as --sbatch=--partition=gpu"),
        (("--sbatch=gpu", "train"), "--sbatch=gpu is not an option of sbatch"),
    ],
)
def test_wrong_options_for_slurm_are_one_sentence(cluster, arguments, words):
    out, err = cluster.run("slurm.sbatch", *arguments, code=2)
    assert words in err and out == "" and len(err.splitlines()) == 1
    assert cluster.calls() == []


def test_what_is_missing_for_slurm_is_said(cluster):
    shutil.rmtree(cluster.root / ".venv")
    _, err = cluster.run("slurm.sbatch", "train", code=2)
    assert "there is no environment at" in err and "--editable '.[cuda]'" in err
    cluster.python("#!/usr/bin/env bash\n")
    (cluster.bin / "sbatch").unlink()
    _, err = cluster.run("slurm.sbatch", "train", code=2)
    assert "sbatch is not on PATH" in err
    assert cluster.calls() == []


SUM = """
import sys
from llm_jax import distributed
distributed.initialize(timeout=60)
import jax, numpy as np
from jax.experimental import multihost_utils
total = multihost_utils.process_allgather(np.int32([10 + jax.process_index()])).sum()
print(f"process {jax.process_index()} of {jax.process_count()}: {total}", *sys.argv[1:])
sys.exit(4)
"""


def free_job_id() -> str:
    """A job's id whose port, as JAX reckons it from the id, is free."""
    for number in range(os.getpid(), os.getpid() + 4096):
        with socket.socket() as s:
            try:
                s.bind(("", number % 4096 + 61440))
            except OSError:
                continue
            return str(number)
    raise AssertionError("no port is free")


def test_real_processes_under_slurm_join_and_agree(cluster, tmp_path):
    """Two tasks on this machine, with the variables that srun sets; both end as preempted runs do."""
    program = tmp_path / "sum.py"
    program.write_text(SUM)
    cluster.tool("srun", LOCAL_SRUN)
    run = f"exec {shlex.quote(sys.executable)} {shlex.quote(str(program))}"
    cluster.python(f'#!/usr/bin/env bash\nshift 2\n{run} "$@"\n')
    job = free_job_id()
    process = cluster.start("slurm.sbatch", "--gpus_per_node=2", "--per_gpu", "train", "a b", JOB=job, NPROC="8",
                            JAX_PLATFORMS="cpu", PYTHONPATH=str(ROOT))  # fmt: skip
    out, err = process.communicate(timeout=120)
    assert process.returncode == 4, err
    lines = [line for line in out.splitlines() if line.startswith("process")]
    assert sorted(lines) == [f"process {i} of 2: 21 train a b" for i in (0, 1)]
    assert cluster.calls()[1:] == [["scontrol", "requeue", job]]
