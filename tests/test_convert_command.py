"""`llm-jax convert`: flags, exit codes and messages; and that a converted run is one for the other commands."""

import json
import os

import hub_models
import pytest
from tiny import quick_compiler

from llm_jax import cli
from llm_jax.convert import families, progress, reference


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(reference.importlib.util, "find_spec", lambda name: None)  # as where torch is not installed
    with quick_compiler():
        yield


def llm_jax(capsys, *arguments, code=0):
    assert cli.main(["convert", *map(str, arguments)]) == code, capsys.readouterr().err
    return capsys.readouterr()


def test_list_names_every_architecture(capsys):
    out = llm_jax(capsys, "--list").out
    assert all(f"{name} " in out for name in families.FAMILIES)


def test_both_ways_end_unproven_without_a_reference(capsys, tmp_path):
    source = hub_models.checkpoint(tmp_path / "source", "LLaMA 3.1, tied")
    run, back = tmp_path / "run", tmp_path / "back"
    told = llm_jax(capsys, f"--from=hf:{source}", f"--to={run}", "--config.model.scan_layers=False", code=6)
    assert told.err.splitlines()[-1].startswith("UNPROVEN: ") and "parameters (float32)" in told.out
    told = llm_jax(capsys, f"--from={run}", f"--to=hf:{back}", "--dtype=bfloat16", "--shard_gb=1e-5", code=6)
    assert len(list(back.glob("model-*-of-*.safetensors"))) > 2
    assert json.loads((back / "config.json").read_text())["torch_dtype"] == "bfloat16"


def test_dry_run_writes_nothing(capsys, tmp_path):
    source = hub_models.checkpoint(tmp_path / "source", "GPT-2")
    out = llm_jax(capsys, f"--from=hf:{source}", "--dry_run", "--dtype=bfloat16").out
    assert "transformer.h.1.attn.c_attn.weight" in out and "float32 to bfloat16" in out
    assert os.listdir(tmp_path) == ["source"]


@pytest.mark.parametrize(
    "arguments, message",
    [
        ([], "convert needs --from and --to"),
        (["--from=hf:a"], "convert needs --from and --to"),
        (["--from=hf:a", "--to=hf:b"], "exactly one of the two begins with hf:"),
        (["--from=a", "--to=b"], "exactly one of the two begins with hf:"),
        (["--from=hf:a", "--to=b", "--step=3"], "--step is for converting from a run to hf:"),
        (["--from=hf:a", "--to=b", "--architecture=X"], "--architecture is for converting from a run to hf:"),
        (["--from=a", "--to=hf:b", "--revision=v1"], "--revision is for converting from hf: to a run"),
        (["--from=a", "--to=hf:b", "--dry_run"], "--dry_run is for converting from hf: to a run"),
        (["--from=a", "--to=hf:b", "--config.mesh.data=2"], "--config is for converting from hf: to a run"),
        (["--from=a", "--to=hf:b", "--shard_gb=0"], "--shard_gb=0: give a size above 0"),
        (["--from=a", "--to=hf:gs://b/c"], "give a path; mount remote storage first"),
        (["--from=nowhere", "--to=hf:b"], "--from=nowhere: there is no run folder"),
        (["--from=hf:a", "--to=b", "--dtype=int4"], "int4"),
    ],
)
def test_flags_that_do_not_go_together(capsys, arguments, message):
    assert message in llm_jax(capsys, *arguments, code=2).err


def tokenizer(folder):
    """A byte-level tokenizer.json of at most 61 tokens is none: characters do."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    vocab = {character: number for number, character in enumerate("abcdefghijklmnopqrstuvwxyz .,\n")}
    library = Tokenizer(models.WordLevel(vocab | {"?": len(vocab)}, unk_token="?"))
    library.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    library.add_special_tokens(["</s>"])
    library.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "</s>"}')


def test_the_run_generates_evaluates_trains_and_goes_back(capsys, tmp_path):
    source = hub_models.checkpoint(tmp_path / "source", "Qwen 2, tied")
    tokenizer(source)
    run, text = tmp_path / "run", tmp_path / "text.txt"
    text.write_text("the quick brown fox jumps over the lazy dog.\n" * 200)
    llm_jax(capsys, f"--from=hf:{source}", f"--to={run}", f"--config.data.path={text}",
            f"--config.data.cache_dir={tmp_path / 'cache'}", "--config.data.sequence_length=16", code=6)  # fmt: skip
    assert cli.main(["generate", f"--workdir={run}", "--prompt=the", "--max_tokens=4"]) == 0
    assert cli.main(["evaluate", f"--workdir={run}", "--json"]) == 0
    assert json.loads(capsys.readouterr().out.partition("{")[2].join(["{", ""]))["step"] == 0
    assert cli.main(["export", f"--workdir={run}", f"--to={tmp_path / 'export'}"]) == 0

    tuned = tmp_path / "tuned"
    assert cli.main(["train", f"--config={run}/config.json", f"--workdir={tuned}",
                     f"--config.checkpoint.init_from={run}",
                     "--config.train.steps=1", "--config.train.global_batch_size=8", "--config.log.trackers=()",
                     "--config.generate.max_tokens=0"]) == 0  # fmt: skip
    assert "begins at step 0 with the parameters of step 0" in capsys.readouterr().out
    llm_jax(capsys, f"--from={tuned}", f"--to=hf:{tmp_path / 'back'}", code=6)
    back, its = tmp_path / "back", tmp_path / "source"
    assert (back / "tokenizer.json").read_text() == (its / "tokenizer.json").read_text()
    assert (back / "tokenizer_config.json").read_text() == (its / "tokenizer_config.json").read_text()
    assert hub_models.read(back).keys() == hub_models.read(its).keys()


def test_progress_tells_bytes_and_tensors(capsys, monkeypatch):
    monkeypatch.setattr(progress, "LINE_EVERY", 0.0)
    with progress.told("reading", 4_000_000) as advance:
        advance(1_000_000, 3)
    assert capsys.readouterr().err == "reading: 1.0 of 4.0 MB, 3 tensors\n"
