"""A run that is killed, stopped or broken in any way goes on as if nothing had happened, bit for bit."""

import random
import signal
import time

import jax
import numpy as np
import pytest
import runs
from tiny import quick_compiler

from llm_jax import cli
from llm_jax.training import checkpoint, report, train

EVERYTHING = ("train", "--config=smoke/everything", "--config.checkpoint.every=5", "--config.log.trackers=")
STEPS = 60


def everything(workdir, **environment):
    return runs.start(*EVERYTHING, f"--workdir={workdir}", f"--config.train.steps={STEPS}", **environment)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("uninterrupted")
    runs.outcome(everything(workdir), 0)
    assert len(runs.losses(workdir)) == STEPS
    return workdir


def test_killed_at_random_steps_the_losses_are_the_same_bit_for_bit(uninterrupted, tmp_path):
    """Packing, mixture, dropout, accumulation and the average are on; killed twice, maybe before the first save."""
    seed = time.time_ns() % 10**6
    print(f"{seed=}")
    first, second = sorted(random.Random(seed).sample(range(1, 40), 2))
    for step in (first, second):
        process = everything(tmp_path)
        runs.wait_until(process, lambda: runs.last_step(tmp_path) >= step)  # noqa: B023 waited for at once
        runs.kill(process)
        assert process.returncode == -signal.SIGKILL
    runs.outcome(everything(tmp_path), 0)
    runs.losses(tmp_path)
    assert runs.numbers(tmp_path) == runs.numbers(uninterrupted)


@pytest.mark.slow
def test_stopped_in_every_other_way_the_losses_are_the_same_bit_for_bit(uninterrupted, tmp_path):
    """SIGTERM, Ctrl-C, kill -9 in the middle of a save, two Ctrl-C."""
    for number in (signal.SIGTERM, signal.SIGINT):
        before = runs.last_step(tmp_path)
        process = everything(tmp_path)
        runs.wait_until(process, lambda: runs.last_step(tmp_path) > before + 3)  # noqa: B023
        process.send_signal(number)
        out, err = runs.outcome(process, 4)
        stopped = runs.last_step(tmp_path)
        assert checkpoint.steps(tmp_path)[-1] == stopped < STEPS
        last_line = err.strip().splitlines()[-1]
        assert last_line.startswith(f"Asked to stop: step {stopped} of {STEPS} is saved in {tmp_path}")

    process = everything(tmp_path)
    saves = tmp_path / "checkpoints"
    newest = checkpoint.steps(tmp_path)[-1]
    runs.wait_until(process, lambda: list(saves.glob("*.orbax-checkpoint-tmp*")))
    runs.kill(process)
    assert process.returncode == -signal.SIGKILL
    assert checkpoint.steps(tmp_path)[-1] >= newest

    out, err = runs.outcome(everything(tmp_path), 0)
    assert "goes on from step" in out
    assert not list(saves.glob("*tmp*"))
    runs.losses(tmp_path)
    assert runs.numbers(tmp_path) == runs.numbers(uninterrupted)


# ----------------------------------------------------------------------------------------- inside one process


@pytest.fixture
def tiny(tmp_path, capsys):
    """Runs a tiny config with changes in this process; gives its exit code, stdout and stderr."""

    def run(*overrides, steps=12):
        with quick_compiler():
            code = cli.main(["train", runs.TINY, f"--workdir={tmp_path}", f"--config.train.steps={steps}", *overrides])
        return code, *capsys.readouterr()

    return run


def test_an_exception_in_the_loop_loses_no_save(tiny, tmp_path, monkeypatch):
    add = report.StepReport.add

    def broken(self, step, values):
        add(self, step, values)
        if step == 8:
            raise RuntimeError("the cable\nwas pulled")

    monkeypatch.setattr(report.StepReport, "add", broken)
    code, _, err = tiny("--config.checkpoint.every=3")
    assert code == 1
    assert "error: RuntimeError: the cable was pulled" in err and "Traceback" not in err
    assert checkpoint.steps(tmp_path)[-1] == 6
    monkeypatch.setattr(report.StepReport, "add", add)
    code, out, _ = tiny("--config.checkpoint.every=3")
    assert code == 0 and "goes on from step 6" in out
    assert len(runs.losses(tmp_path)) == 12


def test_a_run_that_is_finished_can_be_called_again(tiny, tmp_path):
    assert tiny(steps=3)[0] == 0
    before = runs.numbers(tmp_path)
    code, out, _ = tiny(steps=3)
    assert code == 0 and "goes on from step 3" in out
    assert runs.numbers(tmp_path) == before


# --------------------------------------------------------------------------------------- steps that are not finite


def test_a_learning_rate_that_blows_up_stops_the_run_with_code_3(tiny, tmp_path):
    """The first update makes the parameters absurd but finite; later steps are skipped, counted, and change nothing."""
    overrides = ("--config.optim.name=sgd", "--config.optim.learning_rate=1e38", "--config.optim.clip_norm=0",
                 "--config.train.max_bad_steps=3", "--config.checkpoint.every=1",
                 "--config.optim.weight_decay=0")  # fmt: skip
    code, out, err = tiny(*overrides)
    assert code == 3, err
    assert err.count("\n") == 1
    assert err.startswith("3 steps in a row, up to step 4, had a loss or gradient that is not finite")
    assert out.count("the step was skipped") == 3
    found = runs.records(tmp_path)
    assert [r["bad_in_a_row"] for r in found] == [0, 1, 2, 3] == [r["bad_total"] for r in found]
    assert np.isnan(found[-1]["loss"]) or np.isnan(found[-1]["grad_norm"]) or np.isinf(found[-1]["grad_norm"])
    assert checkpoint.steps(tmp_path) == [2, 3]  # each with the parameters of step 1: finite
    code, out, err = tiny(*overrides)
    assert code == 3 and "goes on from step 3" in out
    assert [r["step"] for r in runs.records(tmp_path)] == [1, 2, 3, 4]


def test_a_bad_batch_is_skipped_counted_and_passed(tiny, tmp_path, monkeypatch):
    """One batch with a weight that is not a number: the next step starts from the parameters of the step before."""
    make_train_step, seen = train.make_train_step, []

    def watched(*args, **kwargs):
        step = make_train_step(*args, **kwargs)
        lower = step.lower

        class Step:
            def lower(self, state, batch):
                compiled = lower(state, batch).compile()

                class Lowered:
                    def compile(self, **_):
                        def call(state, batch):
                            i = int(state.step)
                            if i in (4, 5):
                                batch = batch | {"loss_weights": batch["loss_weights"] * np.float32(np.nan)}
                            if i in (4, 6):
                                held = (state.params, state.opt_state, int(state.updates))
                                seen.append(jax.tree.map(np.asarray, held))
                            return compiled(state, batch)

                        return call

                return Lowered()

        return Step()

    monkeypatch.setattr(train, "make_train_step", watched)
    code, out, _ = tiny("--config.train.max_bad_steps=3", "--config.checkpoint.every=0")
    assert code == 0 and out.count("the step was skipped") == 2
    before, after = seen
    assert jax.tree.all(jax.tree.map(np.array_equal, before, after))
    found = [r for r in runs.records(tmp_path) if "loss" in r]
    assert [r["bad_in_a_row"] for r in found] == [0] * 4 + [1, 2] + [0] * 6
    assert found[-1]["bad_total"] == 2
    assert np.isfinite([r["loss"] for r in found if r["step"] not in (5, 6)]).all()
