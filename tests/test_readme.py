"""The README's commands, typed as they stand, on a model and a text small enough for a test."""

import re
import shlex
from pathlib import Path

import numpy as np
import pytest

from llm_jax.cli import main
from llm_jax.config import config_names, load

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
COMMANDS = [line.removeprefix("$ ") for line in re.findall(r"^\$ .*$", README, re.MULTILINE)]

# What makes any training command small: it says less than the command, but through the same code.
SHRINK = {
    "model.num_layers": "1",
    "model.embed_dim": "32",
    "model.num_heads": "2",
    "model.mlp_dim": "0",
    "data.sequence_length": "32",
    "train.tokens": "0",
    "train.global_batch_size": "8",
    "train.accumulation": "1",
    "precision.compute": "float32",
    "optim.warmup_steps": "0",
    "optim.warmup_ratio": "0",
    "eval.batches": "1",
    "eval.batch_size": "8",
    "generate.max_tokens": "4",
}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder with what the README's reader has of his own, and his own config."""
    monkeypatch.chdir(tmp_path)
    text = "\n\n".join(f"Chapter {n}. The sum of {n} and {n + 1} is {2 * n + 1}." for n in range(2_000))
    for name in ("notes", "books", "corpora/encyclopedia", "corpora/code"):
        (tmp_path / name).mkdir(parents=True)
        for part in range(4):
            (tmp_path / name / f"{part}.txt").write_text(f"{name} {part}\n{text}")
    tokens = np.arange(20_000, dtype=np.uint16) % 1_000
    for name in ("train_0.bin", "train_1.bin", "val.bin"):
        tokens.tofile(tmp_path / name)
    (tmp_path / "mine.py").write_text(re.search(r"```python\n(from ml_collections.*?)```", README, re.DOTALL)[1])
    return tmp_path


def small(command: str, steps: int) -> list[str]:
    """The arguments of a README command for `llm_jax.cli.main`, with what makes it small behind them."""
    arguments = shlex.split(command)[1:]
    if arguments[0] != "train" or {"--dry_run", "--print_sharding"} & set(arguments):
        return arguments
    changes = SHRINK | {"train.steps": str(steps)}
    if "gpt2" not in command:
        changes["data.tokenizer_vocab_size"] = "300"
    return arguments + [f"--config.{key}={value}" for key, value in changes.items()]


def test_the_readme_shows_the_commands_of_a_first_session():
    words = [shlex.split(command)[:2] for command in COMMANDS]
    assert [command[1] for command in words if command[0] == "./launch/local.sh"] == ["train", "test"]
    verbs = {command[1] for command in words if command[0] == "llm-jax"}
    assert verbs == {"train", "generate", "evaluate", "export", "data", "doctor", "convert"}


@pytest.mark.slow
def test_every_command_runs(folder, capsys):
    steps = 2
    for command in COMMANDS:
        if command == "./launch/local.sh test":
            continue  # that is what runs this
        steps += "--config.train.steps" in command  # the same run, longer
        if "configs/quickstart.py" in command:
            command = command.replace("configs/quickstart.py", str(ROOT / "configs" / "quickstart.py"))
        code = main(small(command, steps))
        output = capsys.readouterr()
        assert code == 0, f"{command}\n{output.out}\n{output.err}"
    assert (folder / "runs" / "quickstart" / "metrics.jsonl").exists()


def test_the_readmes_own_config_is_a_config(folder):
    cfg = load(str(folder / "mine.py"), [])
    assert (cfg.name, cfg.model.embed_dim, cfg.train.steps) == ("mine", 512, 10_000)


def test_every_config_and_file_that_it_names_exists():
    for name in re.findall(r"--config=([\w/]+)", README):
        if name not in ("configs/quickstart", "mine"):
            assert name in config_names()
    for path in re.findall(r"\]\(([\w/.]+)\)", README):
        assert (ROOT / path).exists(), path
