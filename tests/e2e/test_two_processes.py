"""Two real processes on this machine train one run: killed, restarted, and as one process would."""

import signal
import socket

import numpy as np
import pytest
import runs

from llm_jax.training import checkpoint

STEPS = 60


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def start_both(workdir, of_second=()):
    """The same command on processes 0 and 1, each with one device; `of_second` are further flags of process 1."""
    address = f"127.0.0.1:{free_port()}"
    arguments = ("train", "--config=smoke/everything", "--config.log.trackers=", f"--config.train.steps={STEPS}",
                 "--config.generate.max_tokens=8", f"--workdir={workdir}")  # fmt: skip
    return [
        runs.start(
            *arguments, *(of_second if number else ()), NPROC="8",
            LLM_JAX_COORDINATOR=address, LLM_JAX_NUM_PROCESSES="2", LLM_JAX_PROCESS_ID=str(number),
        )
        for number in (0, 1)
    ]  # fmt: skip


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """The same run by one process on one device."""
    workdir = tmp_path_factory.mktemp("alone")
    runs.run("train", "--config=smoke/everything", "--config.log.trackers=", f"--config.train.steps={STEPS}",
             "--config.generate.max_tokens=0", f"--workdir={workdir}")  # fmt: skip
    return runs.losses(workdir)


@pytest.mark.slow
def test_killed_and_restarted_two_processes_have_the_losses_of_one(alone, tmp_path):
    """Killed once with -9, both; stopped once by SIGTERM to one alone, at which both save the same step."""
    both = start_both(tmp_path)
    runs.wait_until(both[0], lambda: checkpoint.steps(tmp_path) and runs.last_step(tmp_path) >= 8)
    for process in both:
        process.kill()
    for process in both:
        process.communicate()
        assert process.returncode == -signal.SIGKILL

    before = runs.last_step(tmp_path)
    both = start_both(tmp_path)
    runs.wait_until(both[0], lambda: runs.last_step(tmp_path) > before)
    both[1].send_signal(signal.SIGTERM)
    for process in both:
        _, err = runs.outcome(process, 4)
        assert f"step {checkpoint.steps(tmp_path)[-1]} of {STEPS} is saved" in err

    both = start_both(tmp_path)
    (out, _), (quiet, _) = [runs.outcome(process, 0) for process in both]
    assert "goes on from step" in out and "The run is in" in out
    assert "step " not in quiet.replace("run folder", "")  # one of them speaks
    found = runs.losses(tmp_path)
    np.testing.assert_allclose([found[i] for i in sorted(found)], [alone[i] for i in sorted(alone)], rtol=1e-5)


@pytest.mark.slow
def test_different_configs_are_refused_on_both_naming_the_host(tmp_path):
    both = start_both(tmp_path, of_second=("--config.optim.learning_rate=1e-3",))
    for process in both:
        _, err = runs.outcome(process, 2)
        assert err.strip().splitlines()[-1].startswith("error: ")
        assert f"of process 1 (host {socket.gethostname()}) is not that of process 0" in err and "config" in err
    assert checkpoint.steps(tmp_path) == []
