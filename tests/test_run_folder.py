"""What a run's folder says about the run, and the refusal to mix two runs in one."""

import json
import os
import time

import jax
import jax.numpy as jnp
import pytest

from llm_jax import config
from llm_jax.data.tokenizers import ByteTokenizer, CharTokenizer
from llm_jax.errors import UserError
from llm_jax.training import run_folder

SHAPES = {
    "embed": {"table": jax.ShapeDtypeStruct((256, 8), jnp.float32)},
    "norm": jax.ShapeDtypeStruct((8,), jnp.bfloat16),
}
AXES = {"embed": {"table": ("vocab", "embed")}, "norm": ("norm",)}
CONFIG = config.to_dict(config.from_dict({"train": {"steps": 100}, "data": {"path": "a"}}))


def changed(**keys):
    nested = json.loads(json.dumps(CONFIG))
    for key, value in keys.items():
        *groups, name = key.split("__")
        node = nested
        for group in groups:
            node = node[group]
        node[name] = value
    return nested


def write(workdir, cfg=CONFIG, tokenizer=None):
    run_folder.write(workdir, cfg, tokenizer or ByteTokenizer(), SHAPES, AXES)


def test_the_folder_describes_the_run(tmp_path):
    write(tmp_path / "run")
    found = run_folder.read(tmp_path / "run")
    assert found.config == CONFIG
    assert config.to_dict(config.from_dict(found.config)) == CONFIG
    assert found.parameters == {
        "embed/table": {"shape": [256, 8], "dtype": "float32", "axes": ["vocab", "embed"]},
        "norm": {"shape": [8], "dtype": "bfloat16", "axes": ["norm"]},
    }
    (session,) = found.sessions
    assert session["versions"]["jax"] == jax.__version__ and "git" in session and session["processes"] == 1
    assert sorted(os.listdir(tmp_path / "run")) == ["config.json", "parameters.json", "sessions.json", "tokenizer"]


def test_each_start_adds_a_session_and_the_new_config(tmp_path):
    write(tmp_path)
    write(tmp_path, changed(train__steps=200))
    found = run_folder.read(tmp_path)
    assert len(found.sessions) == 2 and found.config["train"]["steps"] == 200


def test_another_tokenizer_is_refused(tmp_path):
    write(tmp_path)
    with pytest.raises(UserError, match="tokenizer.*not the one"):
        write(tmp_path, tokenizer=CharTokenizer("abc", with_eos=False))


def test_what_is_missing_or_damaged_is_named(tmp_path):
    with pytest.raises(UserError, match="not a run's folder: config.json is missing"):
        run_folder.read(tmp_path)
    write(tmp_path)
    (tmp_path / "parameters.json").write_text('{"torn": ')
    with pytest.raises(UserError, match="parameters.json is damaged"):
        run_folder.read(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(CONFIG | {"unknown": 1}))
    with pytest.raises(UserError, match="cannot be read by this version.*unknown"):
        run_folder.check_same_config(tmp_path, CONFIG)


def test_a_folder_that_cannot_be_written_is_an_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written"):
        write(tmp_path / "file")


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"name": "other"},
        {"log__every": 3, "eval__every": 7, "checkpoint__keep_latest": 9, "generate__max_tokens": 1, "mesh__fsdp": 4},
        {"data__prefetch": 3, "data__workers": 1, "data__cache_dir": "c", "train__max_bad_steps": 9},
        {"train__steps": 1000},
    ],
)
def test_a_run_may_go_on_with_these_changes(tmp_path, changes):
    run_folder.check_same_config(tmp_path, CONFIG)  # a new folder
    write(tmp_path)
    run_folder.check_same_config(tmp_path, changed(**changes))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"train__steps": 50}, r"train.steps: 100 there, 50 here"),
        ({"train__steps": 0, "train__tokens": 10**9}, r"train.steps: 100 there, 0 here"),
        (
            {"optim__learning_rate": 1.0, "data__path": "b"},
            r"data.path: 'a' there, 'b' here\n.*learning_rate.*1.0 here",
        ),
        ({"seed": 5}, "seed: 0 there, 5 here"),
    ],
)
def test_another_run_is_refused_with_the_difference(tmp_path, changes, words):
    write(tmp_path)
    with pytest.raises(UserError, match=words):
        run_folder.check_same_config(tmp_path, changed(**changes))


def test_a_key_that_the_old_config_lacks_has_its_default(tmp_path):
    write(tmp_path)
    old = json.loads((tmp_path / "config.json").read_text())
    del old["optim"]["beta2"]
    (tmp_path / "config.json").write_text(json.dumps(old))
    run_folder.check_same_config(tmp_path, CONFIG)


# -------------------------------------------------------------------------------------------------- the lock


def test_a_lock_is_held_until_it_is_released(tmp_path):
    lock = run_folder.Lock(tmp_path)
    with pytest.raises(UserError, match=f"another run is using {tmp_path}.*process {os.getpid()}"):
        run_folder.Lock(tmp_path)
    lock.release()
    run_folder.Lock(tmp_path).release()


def test_a_lock_of_another_machine_counts_while_it_is_renewed(tmp_path):
    path = tmp_path / "run.lock"
    path.write_text("run 1234 on host faraway, process 1\n")
    with pytest.raises(UserError, match=f"host faraway.*remove {path}"):
        run_folder.Lock(tmp_path)
    old = time.time() - run_folder.STALE_SECONDS - 1
    os.utime(path, (old, old))
    run_folder.Lock(tmp_path).release()


def test_a_lock_is_renewed_while_it_is_held(tmp_path, monkeypatch):
    monkeypatch.setattr(run_folder, "HEARTBEAT_SECONDS", 0.01)
    lock = run_folder.Lock(tmp_path)
    os.utime(tmp_path / "run.lock", (0, 0))
    deadline = time.monotonic() + 10
    while os.stat(tmp_path / "run.lock").st_mtime == 0 and time.monotonic() < deadline:
        time.sleep(0.01)
    assert os.stat(tmp_path / "run.lock").st_mtime > 0
    lock.release()
