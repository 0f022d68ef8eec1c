"""Checkpoints through kills, damage, other meshes and restarts: what comes back is what was saved, or an error."""

import dataclasses
import gc
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from llm_jax.config import CheckpointConfig
from llm_jax.errors import CorruptCheckpointError, UserError
from llm_jax.training import checkpoint, starts
from llm_jax.training.checkpoint import Checkpointer

SMALL = CheckpointConfig(keep_latest=2, keep_best=1)

# What Orbax's reading tasks leave behind when they meet a damaged file.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


@pytest.fixture(autouse=True)
def _leave_nothing_behind():
    yield
    gc.collect()


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class State:
    step: jax.Array
    params: Any
    opt_state: Any
    ema: Any = None


def make_state(seed=0, *, ema=False, dtype=jnp.float32):
    numbers = np.random.default_rng(seed)
    params = {
        "embed": {"table": jnp.asarray(numbers.normal(size=(16, 8)), dtype)},
        "blocks": {"up": {"kernel": jnp.asarray(numbers.normal(size=(2, 8, 32)), dtype)}},
    }
    opt_state = ((jnp.int32(seed), jax.tree.map(lambda p: p * 2, params)), ())
    return State(jnp.int32(seed), params, opt_state, jax.tree.map(jnp.copy, params) if ema else None)


def abstract(state):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)


def assert_equal(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert x.dtype == y.dtype
        np.testing.assert_array_equal(np.asarray(x), np.asarray(y))


def save_all(workdir, steps, cfg=SMALL, losses=None):
    with Checkpointer(workdir, cfg) as checkpointer:
        for step in steps:
            metrics = {"eval/loss": losses[step]} if losses and step in losses else None
            checkpointer.save(step, make_state(step), {"samples": step * 10}, metrics)


def start(workdir, cfg=SMALL, state=None):
    state = state or make_state()
    with Checkpointer(workdir, cfg) as checkpointer:
        return starts.start(cfg, checkpointer, abstract(state), lambda: state)


# ------------------------------------------------------------------------------------------- save and restore


def test_what_is_restored_is_what_was_saved(tmp_path):
    state, data = make_state(7, ema=True), {"samples": 123, "names": ["a", "b"], "nested": {"x": 1.5, "none": None}}
    with Checkpointer(tmp_path, SMALL) as checkpointer:
        checkpointer.save(7, state, data, {"eval/loss": 1.0, "eval/tokens": 5})
        checkpointer.wait()
        restored, restored_data = checkpointer.restore(7, abstract(state))
        assert checkpointer.steps() == [7]
    assert_equal(restored, state)
    assert restored_data == data


def test_a_relative_path_and_donation_in_the_next_step(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    step = jax.jit(lambda s: jax.tree.map(lambda x: x + 1, s), donate_argnums=0)
    state, kept = make_state(1), make_state(1)
    with Checkpointer("run", SMALL) as checkpointer:
        checkpointer.save(1, state, {})
        for _ in range(3):
            state = step(state)
        checkpointer.save(4, state, {})
    with Checkpointer("run", SMALL) as checkpointer:
        assert_equal(checkpointer.restore(1, abstract(kept))[0], kept)


def test_the_data_state_must_come_back_as_it_was(tmp_path):
    with Checkpointer(tmp_path, SMALL) as checkpointer, pytest.raises(TypeError, match="plain JSON"):
        checkpointer.save(1, make_state(), {"position": (1, 2)})


@pytest.mark.parametrize("devices", [4, 1])
def test_saved_on_eight_devices_restored_on_fewer(tmp_path, devices):
    def place(state, shape):
        chosen = jax.devices()[: int(np.prod(shape))]
        mesh = jax.make_mesh(shape, ("fsdp", "tensor"), axis_types=(AxisType.Auto,) * 2, devices=chosen)
        specs = {0: (), 2: ("tensor", "fsdp"), 3: (None, "fsdp", "tensor")}
        return jax.device_put(state, jax.tree.map(lambda x: NamedSharding(mesh, PartitionSpec(*specs[x.ndim])), state))

    state = make_state(3)
    with Checkpointer(tmp_path, SMALL) as checkpointer:
        checkpointer.save(3, place(state, (4, 2)), {"samples": 3})
        checkpointer.wait()
        target = abstract(place(state, (2, 2))) if devices == 4 else abstract(state)
        restored, _ = checkpointer.restore(3, target)
    assert_equal(restored, state)
    assert jax.tree.map(lambda x: x.sharding, restored) == jax.tree.map(lambda x: x.sharding, target)


def test_parameters_alone(tmp_path):
    state = make_state(5, ema=True)
    state = dataclasses.replace(state, ema=jax.tree.map(lambda p: p + 1, state.params))
    with Checkpointer(tmp_path, SMALL) as checkpointer:
        checkpointer.save(5, state, {})
    target = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), state.params)
    for name, expected in (("params", state.params), ("ema", state.ema)):
        params, step = checkpoint.restore_params(tmp_path, None, target, name)
        assert step == 5
        assert_equal(params, expected)
    with pytest.raises(UserError, match="no checkpoint of step 6.*there are 5"):
        checkpoint.restore_params(tmp_path, 6, target)
    with pytest.raises(UserError, match="no checkpoints"):
        checkpoint.restore_params(tmp_path / "elsewhere", None, target)


@pytest.mark.parametrize(
    ("other", "words"),
    [
        (make_state(dtype=jnp.bfloat16), r"params/embed/table is float32\[16, 8\] there and bfloat16\[16, 8\] here"),
        (
            dataclasses.replace(make_state(), params={"embed": {"table": jnp.ones((16, 9))}}),
            r"\[16, 8\] there.*\[16, 9\]",
        ),
        (dataclasses.replace(make_state(), params={"new": jnp.ones(3)}), "has no params/new.*it has params/blocks"),
        (make_state(ema=True), "has no ema/"),
    ],
)
def test_a_state_that_does_not_fit_is_refused_and_left_in_peace(tmp_path, other, words):
    save_all(tmp_path, [1, 2])
    with pytest.raises(UserError, match=words):
        start(tmp_path, state=other)
    assert checkpoint.steps(tmp_path) == [1, 2]
    with pytest.raises(UserError, match="has no params/new"):
        checkpoint.restore_params(tmp_path, 1, {"new": jnp.ones(3)})


# ------------------------------------------------------------------------------------------------- retention


def test_latest_best_and_every_are_kept_across_restarts(tmp_path):
    cfg = CheckpointConfig(keep_latest=2, keep_best=1, keep_every=5)
    losses = {1: 3.0, 2: 1.0, 3: float("nan"), 4: 2.0, 6: 2.0, 8: 0.5}
    save_all(tmp_path, [1, 2, 3], cfg, losses)
    assert checkpoint.steps(tmp_path) == [2, 3]
    save_all(tmp_path, [4, 5, 6], cfg, losses)
    assert checkpoint.steps(tmp_path) == [2, 5, 6]
    assert checkpoint.best_step(tmp_path) == 2
    save_all(tmp_path, [7, 8, 9, 10, 11], cfg, losses)
    assert checkpoint.steps(tmp_path) == [5, 8, 10, 11]
    assert checkpoint.best_step(tmp_path) == 8


def test_without_evaluations_only_the_latest_stay(tmp_path):
    save_all(tmp_path, [1, 2, 3, 4])
    assert checkpoint.steps(tmp_path) == [3, 4]
    assert checkpoint.best_step(tmp_path) is None


def test_a_step_is_saved_once(tmp_path):
    save_all(tmp_path, [1])
    with Checkpointer(tmp_path, SMALL) as checkpointer:
        checkpointer.save(1, make_state(2), {})
        checkpointer.wait()
        assert_equal(checkpointer.restore(1, abstract(make_state()))[0], make_state(1))


# ---------------------------------------------------------------------------------------------------- damage


def files_of(folder):
    return sorted(path for path in folder.rglob("*") if path.is_file())


def flip_a_byte(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def largest_file(folder):
    return max(files_of(folder), key=lambda path: path.stat().st_size)


def test_a_flipped_byte_is_rejected_put_aside_and_passed_again(tmp_path, capsys):
    save_all(tmp_path, [10, 20])
    flip_a_byte(largest_file(tmp_path / "checkpoints" / "20" / "state"))
    state = make_state()
    with Checkpointer(tmp_path, SMALL) as checkpointer:
        found = starts.start(SMALL, checkpointer, abstract(state), lambda: state)
        assert (found.step, found.data_state) == (10, {"samples": 100})
        assert_equal(found.state, make_state(10))
        assert "checkpoints/20 is damaged" in capsys.readouterr().err
        assert (tmp_path / "checkpoints" / "20.corrupt").is_dir()
        for step in (15, 20):  # training goes on, and past the step that was rejected
            checkpointer.save(step, make_state(step), {"samples": step * 10})
    assert checkpoint.steps(tmp_path) == [15, 20]
    assert_equal(start(tmp_path).state, make_state(20))


SLOW = [pytest.param(how, marks=pytest.mark.slow) for how in ("flip", "empty", "delete")]


@pytest.mark.parametrize("how", [*SLOW, "truncate"])
def test_no_damaged_file_gives_other_numbers(tmp_path, how, capsys):
    """Each file of a checkpoint in turn: it restores bit for bit, or it is rejected."""
    save_all(tmp_path / "whole", [1, 2])
    names = [path.relative_to(tmp_path / "whole") for path in files_of(tmp_path / "whole" / "checkpoints" / "2")]
    assert len(names) >= 6
    target = abstract(make_state())
    rejected = 0
    for name in names:
        run = tmp_path / "run"
        shutil.copytree(tmp_path / "whole", run)
        path = run / name
        data = path.read_bytes()
        if how == "delete":
            path.unlink()
        elif how == "flip" and data:
            flip_a_byte(path)
        else:
            path.write_bytes(data[: len(data) // 2] if how == "truncate" else b"")
        with Checkpointer(run, SMALL) as checkpointer:
            found = starts.start(SMALL, checkpointer, target, make_state)
        assert_equal(found.state, make_state(found.step))
        assert found.data_state == {"samples": found.step * 10}
        rejected += found.step == 1
        shutil.rmtree(run)
    assert rejected >= 3


def test_all_damaged_is_an_error_now_and_at_the_next_start(tmp_path):
    save_all(tmp_path, [1, 2])
    for step in ("1", "2"):
        flip_a_byte(largest_file(tmp_path / "checkpoints" / step / "state"))
    for _ in range(2):
        with pytest.raises(CorruptCheckpointError):
            start(tmp_path)


def test_a_damaged_step_asked_for_by_name_is_an_error(tmp_path, capsys):
    save_all(tmp_path, [1, 2])
    flip_a_byte(largest_file(tmp_path / "checkpoints" / "2" / "state"))
    target = abstract(make_state().params)
    with pytest.raises(CorruptCheckpointError):
        checkpoint.restore_params(tmp_path, 2, target)
    params, step = checkpoint.restore_params(tmp_path, None, target)  # of a run that is not ours: nothing is renamed
    assert step == 1 and checkpoint.steps(tmp_path) == [1, 2]
    assert_equal(params, make_state(1).params)


def test_too_little_memory_does_not_condemn_a_checkpoint(tmp_path, monkeypatch):
    save_all(tmp_path, [1])

    def no_memory(*_args, **_kwargs):
        raise ValueError("outer") from MemoryError("RESOURCE_EXHAUSTED")

    monkeypatch.setattr(checkpoint.ocp, "load_checkpointables", no_memory)
    with pytest.raises(ValueError, match="outer"):
        start(tmp_path)
    assert checkpoint.steps(tmp_path) == [1]


# ------------------------------------------------------------------------------------------- where a run starts


def test_the_four_starts(tmp_path):
    fresh = make_state()
    found = start(tmp_path / "a")
    assert (found.step, found.data_state) == (0, None) and "from scratch" in found.how
    assert_equal(found.state, fresh)

    save_all(tmp_path / "a", [3])
    found = start(tmp_path / "a")
    assert (found.step, found.data_state) == (3, {"samples": 30}) and "step 3" in found.how

    cfg = dataclasses.replace(SMALL, resume_from=str(tmp_path / "a"))
    found = start(tmp_path / "b", cfg)
    assert (found.step, found.data_state) == (3, {"samples": 30})
    assert_equal(found.state, make_state(3))
    assert str(tmp_path / "a") in found.how

    cfg = dataclasses.replace(SMALL, init_from=str(tmp_path / "a"))
    found = start(tmp_path / "c", cfg, make_state(0, ema=True))
    assert (found.step, found.data_state) == (0, None)
    assert_equal(found.state.params, make_state(3).params)
    assert_equal(found.state.ema, make_state(3).params)
    assert_equal(found.state.opt_state, fresh.opt_state)
    assert "parameters of step 3" in found.how

    save_all(tmp_path / "c", [1])
    assert start(tmp_path / "c", cfg).step == 1  # its own checkpoints come first


def test_an_average_stays_wider_than_the_parameters_it_begins_with(tmp_path):
    """In bfloat16 it would never move."""
    half = make_state(3, dtype=jnp.bfloat16)
    with Checkpointer(tmp_path / "a", SMALL) as checkpointer:
        checkpointer.save(3, half, {})
    wide = dataclasses.replace(half, ema=jax.tree.map(lambda p: jnp.zeros(p.shape, jnp.float32), half.params))
    found = start(tmp_path / "b", dataclasses.replace(SMALL, init_from=str(tmp_path / "a")), wide)
    assert_equal(found.state.ema, jax.tree.map(lambda p: p.astype(jnp.float32), half.params))


def test_must_and_never(tmp_path):
    with pytest.raises(UserError, match="resume='must'.*no checkpoints"):
        start(tmp_path, dataclasses.replace(SMALL, resume="must"))
    save_all(tmp_path, [1])
    assert start(tmp_path, dataclasses.replace(SMALL, resume="must")).step == 1
    with pytest.raises(UserError, match="resume='never'.*holds checkpoints"):
        start(tmp_path, dataclasses.replace(SMALL, resume="never"))


def test_a_folder_that_cannot_be_used_is_refused_at_once(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written"):
        Checkpointer(tmp_path / "file" / "run", SMALL)
    with pytest.raises(UserError, match="is a URL"):
        Checkpointer("gs://bucket/run", SMALL)
    with pytest.raises(UserError, match="no checkpoints"):
        start(tmp_path / "run", dataclasses.replace(SMALL, resume_from=str(tmp_path / "nothing")))


# -------------------------------------------------------------------------------------- exceptions and kills


def test_an_exception_right_after_a_save_loses_nothing(tmp_path):
    with pytest.raises(RuntimeError, match="the loop"), Checkpointer(tmp_path, SMALL) as checkpointer:
        checkpointer.save(5, make_state(5), {"samples": 50})
        raise RuntimeError("the loop failed")
    assert start(tmp_path).step == 5


def test_a_save_that_fails_is_loud_and_the_older_one_intact(tmp_path):
    """A disk that fills up while the arrays are written, in the background."""
    large = dataclasses.replace(make_state(2), ema=jnp.asarray(np.random.default_rng(0).normal(size=500_000)))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    with Checkpointer(tmp_path, SMALL) as checkpointer:
        checkpointer.save(1, make_state(1), {"samples": 10})
        checkpointer.wait()
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
        try:
            checkpointer.save(2, large, {})
            with pytest.raises(UserError, match="step 2 could not be written.*File too large.*older.* are intact"):
                checkpointer.wait()
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert checkpointer.steps() == [1]
        for step in (2, 3):  # the next ones work
            checkpointer.save(step, make_state(step), {"samples": step * 10})
        checkpointer.close()
    assert checkpoint.steps(tmp_path) == [2, 3]
    assert_equal(start(tmp_path).state, make_state(3))


CHILD = """
import sys, threading, time, os
import jax
jax.config.update("jax_num_cpu_devices", 1)
sys.path[:0] = [os.environ["TESTS"]]
import test_checkpoint as t
from llm_jax.training.checkpoint import Checkpointer
mode, workdir = sys.argv[1:]
checkpointer = Checkpointer(workdir, t.SMALL)
print("ready", flush=True)
if mode == "hold":
    time.sleep(60)
for step in range(1, 10_000):
    checkpointer.save(step, t.make_state(step), {"samples": step * 10})
    print(step, flush=True)
"""


def child(mode, workdir):
    here = os.path.dirname(__file__)
    environment = os.environ | {"TESTS": here, "PYTHONPATH": os.path.dirname(here)}
    return subprocess.Popen(
        [sys.executable, "-c", CHILD, mode, str(workdir)], env=environment, stdout=subprocess.PIPE, text=True
    )


def kill(process):
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()


@pytest.mark.parametrize("times", [2, pytest.param(20, marks=pytest.mark.slow)])
def test_killed_while_it_saves_again_and_again(tmp_path, times):
    """kill -9 at random times: the newest finished step is whole, leftovers go, and the dead run's lock is taken."""
    for seed in range(times):
        process = child("save", tmp_path)
        assert process.stdout.readline() == "ready\n"
        while int(process.stdout.readline()) < 5:
            pass
        time.sleep(np.random.default_rng(seed).uniform(0, 0.1))
        kill(process)
        found = start(tmp_path)
        assert found.step >= 4
        assert_equal(found.state, make_state(found.step))
        assert found.data_state == {"samples": found.step * 10}
        assert not list((tmp_path / "checkpoints").glob("*tmp*"))
        shutil.rmtree(tmp_path / "checkpoints")


def test_a_second_run_on_the_same_folder_is_refused(tmp_path):
    process = child("hold", tmp_path)
    try:
        assert process.stdout.readline() == "ready\n"
        with pytest.raises(UserError, match=rf"another run is using {tmp_path}.*process {process.pid}"):
            Checkpointer(tmp_path, SMALL)
    finally:
        kill(process)
    Checkpointer(tmp_path, SMALL).close()  # the dead run's lock is taken over


def test_orbax_metadata_is_where_the_record_is(tmp_path):
    """The record survives as JSON that a person can read."""
    save_all(tmp_path, [1])
    text = (tmp_path / "checkpoints" / "1" / "_CHECKPOINT_METADATA").read_text()
    record = json.loads(text)["custom_metadata"]["record"]
    assert record["step"] == 1 and record["data"] == {"samples": 10}
