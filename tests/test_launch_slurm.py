"""launch/slurm.sbatch, against stand-ins for sbatch and srun that record their calls; and with real processes."""

import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time

import pytest
from clusters import FAKE, LOCAL_SRUN, ODD, ROOT, split_lines


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


def test_gpus_asked_for_as_sbatch_does_are_all_used(cluster):
    """Without --gpus_per_node the job says how many it has."""
    cluster.run("slurm.sbatch", "--sbatch=--gres=gpu:2", "train", SLURM_GPUS_ON_NODE="2")
    submit, srun = cluster.calls()
    assert "--gres=gpu:2" in submit and not any(word.startswith("--gpus_per_node") for word in submit)
    assert {"--gpu-bind=none", "JAX_LOCAL_DEVICE_IDS=0,1"} <= set(srun)


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
