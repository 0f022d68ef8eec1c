"""Finding the other processes, agreeing with them, stopping together; with real processes where it matters."""

import importlib.util
import os
import signal
import socket
import subprocess
import sys
import time

import jax
import pytest
from test_checkpoint import SMALL, abstract, assert_equal, make_state

from llm_jax import distributed
from llm_jax.errors import UserError
from llm_jax.training import checkpoint

OWN = {"LLM_JAX_COORDINATOR": "10.0.0.1:1234", "LLM_JAX_NUM_PROCESSES": "4", "LLM_JAX_PROCESS_ID": "3"}
HERE = os.path.dirname(__file__)


def spawn(script, *arguments, **environment):
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([os.path.dirname(HERE), HERE])} | environment
    return subprocess.Popen(
        [sys.executable, "-c", script, *arguments],
        env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


# --------------------------------------------------------------------------------------- finding the others


def test_processes_from_our_own_variables():
    assert distributed.find_processes(OWN) == {
        "coordinator_address": "10.0.0.1:1234",
        "num_processes": 4,
        "process_id": 3,
        "cluster_detection_method": "deactivate",
    }
    alone = OWN | {"LLM_JAX_NUM_PROCESSES": "1", "LLM_JAX_PROCESS_ID": "0"}
    assert distributed.find_processes(alone) is None


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"LLM_JAX_PROCESS_ID": ""}, "LLM_JAX_COORDINATOR, LLM_JAX_NUM_PROCESSES is set but LLM_JAX_PROCESS_ID is not"),
        ({"LLM_JAX_COORDINATOR": "", "LLM_JAX_PROCESS_ID": ""}, "LLM_JAX_COORDINATOR, LLM_JAX_PROCESS_ID is not"),
        ({"LLM_JAX_COORDINATOR": "10.0.0.1"}, "not HOST:PORT"),
        ({"LLM_JAX_NUM_PROCESSES": "four"}, "LLM_JAX_NUM_PROCESSES='four' is not a whole number"),
        ({"LLM_JAX_PROCESS_ID": "4"}, "LLM_JAX_PROCESS_ID=4 must be below"),
    ],
)
def test_variables_that_do_not_fit_together_are_refused(changes, words):
    with pytest.raises(UserError, match=words):
        distributed.find_processes(OWN | changes)


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, None),
        ({"SLURM_JOB_ID": "1", "SLURM_NTASKS": "4"}, None),  # a shell inside an allocation
        ({"SLURM_STEP_NODELIST": "n1", "SLURM_NTASKS": "1"}, None),
        ({"SLURM_STEP_NODELIST": "n[1-4]", "SLURM_NTASKS": "4"}, "slurm"),
        ({"OMPI_COMM_WORLD_SIZE": "1"}, None),
        ({"OMPI_COMM_WORLD_SIZE": "2", "OMPI_MCA_orte_hnp_uri": "1.0;tcp://h:1"}, "ompi"),
        ({"KUBERNETES_SERVICE_HOST": "h"}, None),  # a pod that is not of an Indexed Job
        ({"TPU_WORKER_HOSTNAMES": "a,b", "JAX_PLATFORMS": "cpu"}, None),
    ],
)
def test_launchers_are_told_by_their_variables(environment, expected):
    found = distributed.find_processes(environment)
    assert (found and found["cluster_detection_method"]) == expected


@pytest.mark.parametrize(
    ("environment", "package", "method"),
    [
        ({"OMPI_COMM_WORLD_SIZE": "2"}, "mpi4py", "mpi4py"),
        ({"KUBERNETES_SERVICE_HOST": "h", "JOB_COMPLETION_INDEX": "0"}, "kubernetes", "k8s"),
    ],
)
def test_launchers_that_need_a_package(monkeypatch, environment, package, method):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=f"pip install {package}"):
        distributed.find_processes(environment)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    assert distributed.find_processes(environment) == {"cluster_detection_method": method}


def test_a_tpu_machine_finds_its_own(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    assert distributed.find_processes({"TPU_WORKER_HOSTNAMES": "a,b"}) == {}


def test_one_process_is_alone():
    distributed.initialize({})
    distributed.barrier("nobody")
    distributed.assert_same_everywhere("config", "x")
    assert distributed.is_main() and distributed.all_true(True) and not distributed.all_true(False)
    distributed.leave(3)
    assert not jax.distributed.is_initialized()


JOIN = "import sys; from llm_jax import distributed; distributed.initialize(timeout=int(sys.argv[1]))"


def test_processes_that_cannot_meet_say_so_in_time():
    names = dict(LLM_JAX_COORDINATOR=f"127.0.0.1:{free_port()}", LLM_JAX_NUM_PROCESSES="2")
    process = spawn(JOIN, "1", **names, LLM_JAX_PROCESS_ID="1")
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 2
    assert "error: process 1 of 2" in errors and "waited 1 s" in errors


def test_a_port_that_is_taken_is_an_error():
    with socket.socket(socket.AF_INET6) as s:
        s.bind(("::", 0))
        s.listen()
        names = dict(LLM_JAX_COORDINATOR=f"127.0.0.1:{s.getsockname()[1]}", LLM_JAX_NUM_PROCESSES="2")
        process = spawn(JOIN, "60", **names, LLM_JAX_PROCESS_ID="0")
        _, errors = process.communicate(timeout=60)
    assert "UserError: process 0 of 2" in errors and "Address already in use" in errors and process.returncode == 1


# ------------------------------------------------------------------------------------------------ two processes

TWO = """
import os, sys, time, jax, numpy as np
jax.config.update("jax_num_cpu_devices", 1)
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from llm_jax import distributed
from llm_jax.errors import UserError
from llm_jax.training import checkpoint, starts
from pathlib import Path
workdir = Path(sys.argv[1])
distributed.initialize(timeout=60)
from test_checkpoint import SMALL, abstract, flip_a_byte, largest_file, make_state  # makes arrays
me = jax.process_index()
assert jax.process_count() == 2 and distributed.is_main() == (me == 0)
assert distributed.all_true(True) and not distributed.all_true(me == 0)
distributed.assert_same_everywhere("config", "the same")
try:
    distributed.assert_same_everywhere("config", f"of process {me}")
    raise SystemExit("different configs passed")
except UserError as error:
    assert "the config of process 1 (host" in str(error), error

did = []
distributed.on_main(lambda: did.append(me))
assert did == [0] * (me == 0)
def leave():
    if me == 0:
        time.sleep(0.5)
        Path(workdir, "left").write_text("of process 0")
    return me, Path(workdir, "left").read_text()
assert distributed.main_first(leave) == (me, "of process 0")
def refuse():
    raise UserError("there is no room")
try:
    distributed.on_main(refuse)
    raise SystemExit("process 0 refused, and that passed")
except UserError as error:
    assert str(error) == ("process 0 cannot go on, and says why" if me else "there is no room"), error

mesh = jax.make_mesh((2,), ("fsdp",), axis_types=(AxisType.Auto,))
specs = {0: (), 2: ("fsdp",), 3: (None, "fsdp")}
def place(state):
    put = lambda x: jax.make_array_from_callback(
        x.shape, NamedSharding(mesh, PartitionSpec(*specs[x.ndim])), lambda index: np.asarray(x)[index])
    return jax.tree.map(put, state)
def same(a, b):
    return all(bool((x == y).all()) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b)))

with checkpoint.Checkpointer(workdir, SMALL) as checkpointer:
    for step in (1, 2):
        checkpointer.save(step, place(make_state(step)), {"samples": step * 10})
with checkpoint.Checkpointer(workdir, SMALL) as checkpointer, distributed.Preemption() as preemption:
    try:
        checkpoint.Checkpointer(workdir, SMALL)
        raise SystemExit("a second run was let in")
    except UserError:
        pass
    distributed.barrier("before the damage")
    if me == 0:
        flip_a_byte(largest_file(workdir / "checkpoints" / "2" / "state"))
    distributed.barrier("after the damage")
    found = starts.start(SMALL, checkpointer, abstract(place(make_state())), make_state)
    assert found.step == 1 and same(found.state, place(make_state(1))), found.step
    step, state = found.step, found.state
    print("looping", flush=True)
    for step in range(2, 10_000):
        time.sleep(0.01)
        if preemption.preempted(step):
            break
    checkpointer.save(step, place(make_state(step)), {"samples": step * 10})
print("stopped at", step, flush=True)
distributed.FAREWELL_SECONDS = 2
distributed.leave(4)
"""


def test_two_processes_agree_fall_back_and_stop_at_the_same_step(tmp_path):
    names = dict(LLM_JAX_COORDINATOR=f"127.0.0.1:{free_port()}", LLM_JAX_NUM_PROCESSES="2")
    processes = [spawn(TWO, str(tmp_path), **names, LLM_JAX_PROCESS_ID=str(i)) for i in (0, 1)]
    try:
        for process in processes:
            assert "looping\n" in iter(process.stdout.readline, "")  # after what the collectives' library prints
        time.sleep(0.2)
        processes[1].send_signal(signal.SIGTERM)
        output = [process.communicate(timeout=60) for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.communicate()
    assert [process.returncode for process in processes] == [4, 4], output
    assert output[0][0] == output[1][0] and output[0][0].startswith("stopped at"), output
    step = int(output[0][0].split()[-1])
    assert checkpoint.steps(tmp_path) == [1, step] and (tmp_path / "checkpoints" / "2.corrupt").is_dir()
    with checkpoint.Checkpointer(tmp_path, SMALL) as checkpointer:  # saved by two processes, read by one
        restored, data = checkpointer.restore(step, abstract(make_state()))
    assert_equal(restored, make_state(step))
    assert data == {"samples": step * 10}


# -------------------------------------------------------------------------------------------------- preemption


def test_sigterm_sets_a_flag_and_a_second_one_changes_nothing():
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    with distributed.Preemption() as preemption:
        assert not preemption.preempted(1)
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)
        assert preemption.preempted(2) and preemption.preempted(3)
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before


def test_the_first_ctrl_c_asks_and_the_second_interrupts():
    with distributed.Preemption() as preemption, pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGINT)
        assert preemption.preempted(1)
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(1)


# ---------------------------------------------------------------------------------------------------- watchdog

WATCH = """
import sys, time
from llm_jax import distributed
def stuck_here():
    time.sleep(30)
with distributed.Watchdog(seconds=0.5, first=20) as watchdog:
    time.sleep(1)  # the first step compiles: longer than a step may take
    for _ in range(4):
        watchdog.progress()
        time.sleep(0.2)
    print("alive", flush=True)
    stuck_here()
"""


def test_the_watchdog_ends_a_process_that_hangs_and_shows_where():
    process = spawn(WATCH)
    began = time.monotonic()
    output, errors = process.communicate(timeout=60)
    assert process.returncode == 1 and output == "alive\n"
    assert "stuck_here" in errors and time.monotonic() - began < 25


def test_a_watchdog_can_be_off_and_ends_with_its_block():
    with distributed.Watchdog(seconds=0) as watchdog:
        watchdog.progress()
    with distributed.Watchdog(seconds=0.05, first=0.05):
        pass
    time.sleep(0.1)
