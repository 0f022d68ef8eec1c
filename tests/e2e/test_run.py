"""A user's session with real processes: train, generate, evaluate, go on longer, elsewhere and from another run."""

import json
import math
import os
import signal
import stat

import numpy as np
import pytest
import runs
from tiny import quick_compiler

from llm_jax import cli, metrics
from llm_jax.training import checkpoint

SMOKE = ("--config=smoke/everything", "--config.log.trackers=", "--config.generate.max_tokens=8")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("session")


@pytest.fixture(scope="module")
def trained(folder):
    """A finished run of 10 steps, trained by name from a relative folder; and what the command said."""
    here = os.getcwd()
    os.chdir(folder)
    try:
        out, err = runs.run("train", *SMOKE, "--workdir=runs/first", "--config.train.steps=10")
    finally:
        os.chdir(here)
    return folder / "runs" / "first", out, err


@pytest.fixture
def here(capsys):
    """`llm-jax` inside this process, which has eight devices; asserts the exit code and that there is no traceback."""

    def call(*arguments, code=0):
        capsys.readouterr()
        with quick_compiler():
            found = cli.main([str(a) for a in arguments])
        out, err = capsys.readouterr()
        assert found == code, err
        assert "Traceback" not in err
        return out, err

    return call


# ----------------------------------------------------------------------------------------- train and what follows


def test_train_says_where_it_is_and_what_to_type_next(trained):
    workdir, out, _ = trained
    assert out.startswith(f"run folder: {workdir}\n{workdir} begins from scratch\n")
    assert f"The run is in {workdir}\n" in out and f"llm-jax generate --workdir={workdir}" in out
    assert "step 10/10  loss" in out and "held-out loss" in out and "bits per byte" in out
    assert len(runs.losses(workdir)) == 10
    assert {p.name for p in workdir.iterdir()} >= {"config.json", "tokenizer", "parameters.json", "sessions.json"}


def test_each_record_has_what_is_promised(here, tmp_path):
    here("train", runs.TINY, f"--workdir={tmp_path}", "--config.train.steps=7",
         "--config.log.every=3", "--config.checkpoint.every=2")  # fmt: skip
    found = [r for r in runs.records(tmp_path) if "loss" in r]
    always = {"step", "loss", "bits_per_byte", "grad_norm", "learning_rate", "tokens", "bad_in_a_row", "bad_total"}
    rates = {"tokens_per_second", "tokens_per_second_per_device", "seconds_per_step", "data_wait_share",
             "padding_share", "process_bytes_in_use"}  # fmt: skip
    assert [r["step"] for r in found] == [1, 2, 3, 4, 5, 6, 7]
    assert all(always <= record.keys() for record in found)
    timed = [record for record in found if rates <= record.keys()]
    assert [r["step"] for r in timed] == [3, 6, 7]  # every third, and the last
    for record in timed:
        assert record["tokens_per_second"] == pytest.approx(8 * record["tokens_per_second_per_device"])
        # a token is a byte, but for the ends of documents, which are tokens of no bytes
        assert 1 <= record["bits_per_byte"] * math.log(2) / record["loss"] < 1.1
    evaluation = next(r for r in runs.records(tmp_path) if "eval/loss" in r)
    assert {"step", "eval/loss", "eval/bits_per_byte", "eval/accuracy", "eval/tokens"} == evaluation.keys()


def test_evaluate_gives_what_the_run_measured(trained, here):
    workdir, _, _ = trained
    out, _ = runs.run("evaluate", f"--workdir={workdir}", "--json")
    expected = next(r for r in reversed(runs.records(workdir)) if "eval/loss" in r)
    assert json.loads(out) == expected
    table, _ = here("evaluate", f"--workdir={workdir}")  # on eight devices
    found = dict(line.split() for line in table.splitlines())
    assert found.keys() == expected.keys()
    assert math.isclose(float(found["eval/loss"]), expected["eval/loss"], rel_tol=1e-5)
    smaller, _ = here("evaluate", f"--workdir={workdir}", "--config.eval.batches=1", "--json")
    assert json.loads(smaller)["eval/tokens"] < expected["eval/tokens"]


def test_generate_streams_one_prompt_and_lists_several(trained, here):
    workdir, _, _ = trained
    flag = f"--workdir={workdir}"
    first, _ = runs.run("generate", flag, "--prompt=Ada is", "--max_tokens=12")
    assert first.startswith("Ada is") and len(first) > len("Ada is\n") and first.count("\n") >= 1
    assert here("generate", flag, "--prompt=Ada is", "--max_tokens=12")[0] == first  # on eight devices
    assert here("generate", flag, "--prompt=Ada is", "--max_tokens=12", "--seed=1")[0] != first

    prompts = ("--prompt=Ada is", "--prompt=Ben has a long one")
    several, _ = here("generate", flag, *prompts, "--num_samples=2", "--max_tokens=12")
    parts = several.split("--- ")[1:]
    assert [part.split("\n")[0] for part in parts] == [f"{i} of 4" for i in (1, 2, 3, 4)]
    bodies = [part.partition("\n")[2] for part in parts]
    assert bodies[0] == first and bodies[1] != first  # a row does not depend on its neighbours
    assert bodies[2].startswith("Ben has a long one")

    greedy = [here("generate", flag, "--prompt=Ada", "--temperature=0", f"--seed={seed}")[0] for seed in (0, 1)]
    assert greedy[0] == greedy[1]
    text = greedy[0][len("Ada") :]
    stop = text.strip()[2:4]
    cut = here("generate", flag, "--prompt=Ada", "--temperature=0", f"--stop={stop}")[0]
    assert cut == "Ada" + text[: text.index(stop)] + "\n"


def test_generate_reads_a_file_and_goes_beyond_the_context(trained, here, tmp_path):
    (tmp_path / "prompt").write_text("Ben is in the tower.\n" * 30)
    out, _ = here("generate", f"--workdir={trained[0]}", f"--prompt_file={tmp_path}/prompt", "--max_tokens=70")
    assert out.startswith("Ben is in the tower.\n" * 30) and len(out) > 30 * 21 + 10


# ------------------------------------------------------------------------------------------ going on, four ways


@pytest.mark.slow
def test_go_on_longer_on_another_mesh_and_from_its_own_config(trained, here, tmp_path):
    """Ten steps more on one device; the same on eight, restored there: the losses agree to 1e-5."""
    workdir, _, _ = trained
    config = json.loads((workdir / "config.json").read_text())
    assert config["data"]["sequence_length"] == 64 and config["train"]["steps"] == 10
    saved = f"--config={workdir}/config.json"
    state = f"--config.checkpoint.resume_from={workdir}"
    longer = ("--config.train.steps=20", "--config.generate.max_tokens=0")
    here("train", saved, f"--workdir={tmp_path}/eight", "--config.mesh.data=2", "--config.mesh.fsdp=2",
         "--config.mesh.tensor=2", state, *longer)  # fmt: skip
    out, _ = runs.run("train", saved, f"--workdir={workdir}", *longer)
    assert f"goes on from step 10 of {workdir}" in out
    one = runs.losses(workdir)
    assert list(one) == list(range(1, 21))
    eight = {r["step"]: r["loss"] for r in runs.records(tmp_path / "eight") if "loss" in r}
    assert list(eight) == list(range(11, 21))
    np.testing.assert_allclose([eight[i] for i in eight], [one[i] for i in eight], rtol=1e-5)


def test_four_ways_to_start(here, tmp_path):
    workdir, base = tmp_path / "first", ("train", runs.TINY, "--config.train.steps=3")
    here("train", runs.TINY, f"--workdir={workdir}")
    new = f"--workdir={tmp_path}/new"
    _, err = here(*base, new, "--config.checkpoint.resume=must", code=2)
    assert err.count("\n") == 1 and "checkpoint.resume='must', but there are no checkpoints" in err
    out, _ = here(*base, new, f"--config.checkpoint.init_from={workdir}", "--config.optim.learning_rate=1e-3")
    assert "begins at step 0 with the parameters of step" in out
    fresh = metrics.read_jsonl(workdir / "metrics.jsonl")[0]["loss"]
    assert runs.losses(tmp_path / "new")[1] < fresh - 0.1
    _, err = here(*base, new, "--config.checkpoint.resume=never", "--config.optim.learning_rate=1e-3", code=2)
    assert err.count("\n") == 1 and "checkpoint.resume='never'" in err and "holds checkpoints" in err
    _, err = here(*base, f"--workdir={tmp_path}/other", f"--config.checkpoint.init_from={tmp_path}/nothing", code=2)
    assert err.count("\n") == 1 and f"{tmp_path}/nothing" in err


def test_another_config_is_refused_with_the_keys_that_differ(trained, here):
    workdir, _, _ = trained
    before = {p: p.stat().st_mtime_ns for p in workdir.rglob("*") if p.is_file() and p.name != "run.lock"}
    changes = ("--config.optim.learning_rate=1", "--config.model.num_kv_heads=4", "--config.seed=5")
    _, err = here("train", *SMOKE, f"--workdir={workdir}", "--config.train.steps=20", *changes, code=2)
    assert "optim.learning_rate: 0.003 there, 1.0 here" in err
    assert "model.num_kv_heads: 2 there, 4 here" in err and "seed: 0 there, 5 here" in err
    assert "train.steps" not in err
    assert before == {p: p.stat().st_mtime_ns for p in before}


@pytest.mark.slow
def test_random_evaluation_is_the_same_after_a_restart(here, tmp_path):
    flags = ("--config.eval.sampling=random", "--config.eval.batches=2", "--config.eval.every=2",
             "--config.checkpoint.every=2")  # fmt: skip
    base = ("train", runs.TINY, *flags)
    here(*base, f"--workdir={tmp_path}/whole", "--config.train.steps=4")
    here(*base, f"--workdir={tmp_path}/parts", "--config.train.steps=2")
    here(*base, f"--workdir={tmp_path}/parts", "--config.train.steps=4")
    assert runs.numbers(tmp_path / "whole") == runs.numbers(tmp_path / "parts")
    found = [r for r in runs.records(tmp_path / "whole") if "eval/loss" in r]
    measured, _ = here("evaluate", f"--workdir={tmp_path}/whole", "--json", "--step=2")
    assert math.isclose(json.loads(measured)["eval/loss"], found[0]["eval/loss"], rel_tol=1e-6)


@pytest.mark.slow
def test_a_profile_of_steps_that_a_restart_divides(here, tmp_path):
    """Begun in one session, ended by its end; the next session, beyond the window, traces nothing and stops nothing."""
    base = ("train", runs.TINY, f"--workdir={tmp_path}",
            "--config.log.profile_start=2", "--config.log.profile_steps=3")  # fmt: skip
    here(*base, "--config.train.steps=4")
    traces = list((tmp_path / "profile").rglob("*.xplane.pb"))
    assert len(traces) == 1
    here(*base, "--config.train.steps=7")
    assert len(list((tmp_path / "profile").rglob("*.xplane.pb"))) == 2


# ------------------------------------------------------------------------------------------------- the folder


def test_a_second_process_on_a_living_run_is_refused(here, tmp_path):
    base = ("train", *SMOKE, f"--workdir={tmp_path}", "--config.train.steps=100000", "--config.eval.every=0")
    process = runs.start(*base)
    runs.wait_until(process, lambda: runs.last_step(tmp_path) >= 3)
    _, err = here(*base, code=2)
    assert err.count("\n") == 1 and f"another run is using {tmp_path}" in err and f"process {process.pid}" in err
    step = runs.last_step(tmp_path)
    runs.wait_until(process, lambda: runs.last_step(tmp_path) > step + 1)  # the first is not disturbed
    process.send_signal(signal.SIGTERM)
    runs.outcome(process, 4)
    runs.losses(tmp_path)


def test_a_folder_that_cannot_hold_a_run_is_refused_before_anything_is_computed(here, tmp_path):
    (tmp_path / "file").write_text("x")
    for place in (tmp_path / "file", tmp_path / "file" / "below"):
        _, err = here("train", *SMOKE, f"--workdir={place}", code=2)
        assert err.count("\n") == 1 and f"--workdir={place}" in err
    if os.getuid():
        locked = tmp_path / "locked"
        locked.mkdir(mode=stat.S_IRUSR | stat.S_IXUSR)
        _, err = here("train", *SMOKE, f"--workdir={locked}", code=2)
        assert err.count("\n") == 1 and "Permission denied" in err
    _, err = here("train", *SMOKE, "--workdir=/proc/run", code=2)
    assert err.count("\n") == 1 and "--workdir=/proc/run" in err


def test_evaluate_and_generate_without_a_run(here, tmp_path):
    for command in ("evaluate", "generate"):
        _, err = here(command, f"--workdir={tmp_path}/none", code=2)
        assert err.count("\n") == 1 and "there is no run folder" in err
        _, err = here(command, f"--workdir={tmp_path}", code=2)
        assert err.count("\n") == 1 and "is not a run's folder: config.json is missing" in err
    assert checkpoint.steps(tmp_path) == []
