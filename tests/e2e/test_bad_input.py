"""What bad input gets: one line that names file, record or key and what to do, exit code 2, and nothing is lost."""

import gzip
import shutil

import numpy as np
import pytest
import runs
from tiny import quick_compiler

from llm_jax import cli
from llm_jax.training import checkpoint

RANDOM = np.random.default_rng(0).bytes(6000)
STORY = "The quick brown fox jumps over the lazy dog.\n"


def llmc(tokens, promised):
    header = np.zeros(256, np.int32)
    header[:3] = [20240520, 1, promised]
    return header.tobytes() + np.asarray(tokens, np.uint16).tobytes()


FILES = {
    "story.txt": STORY * 200,
    "short.txt": "hi\n",
    "empty.txt": "",
    "random.txt": RANDOM,
    "latin.txt": "caf\xe9 ".encode("latin-1") * 400,
    "picture.png": b"\x89PNG\r\n\x1a\n" + bytes(3000),
    "bad.jsonl": '{"text": "%s"}\n{"text": oops}\n{"text": "fine"}\n' % ("good " * 500),
    "nokey.jsonl": '{"body": "good"}\n' * 50,
    "random.jsonl": RANDOM,
    "random.parquet": RANDOM,
    "cut.jsonl.gz": gzip.compress(b'{"text": "abc abc"}\n' * 2000)[:-50],
    "large_id.bin": np.array([1, 2, 3, 700, 5] * 400, np.uint16).tobytes(),
    "odd.bin": b"\x01\x00\x02\x00\x03",
    "random.bin": RANDOM,
    "cut_llmc.bin": llmc(range(100), promised=5000),
    "tokenizer.json": "{}",
}  # fmt: skip


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("files")
    for name, content in FILES.items():
        (folder / name).write_bytes(content.encode() if isinstance(content, str) else content)
    (folder / "empty_folder").mkdir()
    return folder


@pytest.fixture
def llm_jax(capsys):
    """A command in this process; gives its stdout and stderr, and asserts the exit code."""

    def call(*arguments, code=0):
        capsys.readouterr()
        with quick_compiler():
            found = cli.main([str(a) for a in arguments])
        out, err = capsys.readouterr()
        assert found == code, (found, err)
        return out, err

    return call


@pytest.fixture
def refused(llm_jax, tmp_path):
    """The error line of a training command that must be refused."""

    def train(*overrides, workdir=None):
        arguments = [f"--config.{override}" for override in overrides]
        out, err = llm_jax("train", runs.TINY, f"--workdir={workdir or tmp_path / 'run'}", *arguments, code=2)
        assert "Traceback" not in err and "step 1/" not in out
        *notes, line = err.splitlines()
        assert line.startswith("error: ") and not any(note.startswith("error") for note in notes)
        return line

    return train


NONE = ("data.tokenizer=none", "data.eos=none", "model.vocab_size=500")
DATA = [  # file, further overrides, words of the line
    ("missing.txt", (), ["missing.txt does not exist", "data.path"]),
    ("missing/*.txt", (), ["missing/*.txt matches no file", "data.path"]),
    ("empty_folder", (), ["empty_folder is an empty folder", "data.path"]),
    ("empty.txt", (), ["empty.txt is empty"]),
    ("short.txt", (), ["data.sequence_length", "give more data"]),
    ("story.txt", ("train.global_batch_size=4096",), ["fewer than one batch", "train.global_batch_size"]),
    ("random.txt", (), ["random.txt is not UTF-8: byte 0x", "at offset", "Correct it"]),
    ("random.txt", ("data.tokenizer=char", "data.validation_fraction=0"), ["random.txt is not UTF-8", "Correct it"]),
    ("random.txt", ("data.tokenizer=bpe", "data.validation_fraction=0"), ["random.txt is not UTF-8", "Correct it"]),
    ("latin.txt", (), ["latin.txt is not UTF-8: byte 0xe9 at offset 3", "Correct it"]),
    ("picture.png", (), ["picture.png is not UTF-8: byte 0x89 at offset 0"]),
    ("bad.jsonl", (), ["bad.jsonl:2 is not JSON", "data.max_bad_records"]),
    ("nokey.jsonl", (), ["nokey.jsonl:1 has no field 'text'", "body", "data.text_key"]),
    ("random.jsonl", (), ["random.jsonl:1 is not"]),
    ("random.parquet", (), ["random.parquet"]),
    ("cut.jsonl.gz", (), ["cut.jsonl.gz ends in the middle", "fetch it again"]),
    (
        "large_id.bin",
        NONE,
        ["large_id.bin holds the token id 700 (token 3 of the train split)", "model.vocab_size=701"],
    ),
    ("random.bin", NONE, ["random.bin holds the token id", "model.vocab_size"]),
    ("odd.bin", NONE, ["odd.bin has 5 bytes, an odd number", "copy it again"]),
    ("cut_llmc.bin", NONE, ["cut_llmc.bin promises 5000 tokens in its header and holds 100", "copy it again"]),
    ("story.txt", NONE, ["story.txt is text", "data.tokenizer=none"]),
    ("story.txt", ("data.packing=best_fit", "data.long_documents=error"), ["Document 0", "data.long_documents"]),
    ("story.txt", ("data.tokenizer=tokenizer.json",), ["tokenizer.json is not a tokenizer.json"]),
    ("story.txt", ("data.tokenizer=nowhere.json",), ["data.tokenizer='nowhere.json'", "tokenizer.json"]),
    ("story.txt", ("data.validation_path=gone.txt",), ["gone.txt does not exist", "data.validation_path"]),
    ("story.txt", ("data.format=jsonl",), ["story.txt:1 is not JSON"]),
    ("story.txt", ("data.format=megatron", *NONE), ["story.idx cannot be read"]),
    ("story.txt", ("model.vocab_size=100",), ["model.vocab_size = 100", "257"]),
    ("story.txt", ("data.cache_dir=/proc/cache",), ["/proc/cache", "data.cache_dir"]),
    ("story.txt", ("data.cache_dir=story.txt",), ["story.txt", "data.cache_dir"]),
    ("hf:nobody/nothing", (), ["hf:nobody/nothing"]),
]


@pytest.mark.parametrize(("path", "overrides", "words"), DATA, ids=lambda x: x if isinstance(x, str) else "")
def test_data_that_cannot_be_used(refused, files, monkeypatch, path, overrides, words):
    monkeypatch.chdir(files)
    before = {file: file.read_bytes() for file in files.iterdir() if file.is_file()}
    line = refused(f"data.path={path}", *overrides)
    assert all(word in line for word in words), line
    assert before == {file: file.read_bytes() for file in files.iterdir() if file.is_file()}


def test_a_token_id_of_another_source_of_a_mixture(refused, files, monkeypatch):
    """The first source's ids fit; the second's would index beyond the table, in silence."""
    monkeypatch.chdir(files)
    (files / "small_ids.bin").write_bytes(np.array([1, 2, 3] * 400, np.uint16).tobytes())
    line = refused("data.path=stdlib", "data.mixture.a.path=small_ids.bin", "data.mixture.b.path=large_id.bin", *NONE)
    assert "large_id.bin holds the token id 700" in line


KEYS = [
    (["optim.learning_rte=1"], ["optim.learning_rte", "no such key", "optim.learning_rate"]),
    (["lr=1"], ["lr = '1'", "optim.learning_rate"]),
    (["train.steps=True"], ["train.steps", "True"]),
    (["train.steps=1.5"], ["train.steps"]),
    (["train.steps=-5"], ["train.steps"]),
    (["train.steps=0"], ["train.steps"]),
    (["optim.learning_rate=nan"], ["optim.learning_rate", "nan"]),
    (["optim.learning_rate=-1"], ["optim.learning_rate"]),
    (["optim.learning_rate=inf"], ["optim.learning_rate"]),
    (["model.tie_embeddings=2"], ["model.tie_embeddings"]),
    (["train.global_batch_size=12"], ["train.global_batch_size = 12", "8 or 16"]),  # eight devices
    (["train.per_device_batch_size=2"], ["train.per_device_batch_size = 2"]),
    (["mesh.data=3"], ["mesh.data = 3", "8"]),
    (["mesh.data=-1", "mesh.fsdp=-1"], ["mesh.fsdp = -1"]),
    (["mesh.data=1", "mesh.tensor=8"], ["model.num_heads = 2", "mesh.tensor"]),
    (["mesh.tensor=2", "model.num_heads=3", "model.head_dim=8"], ["model.num_heads = 3", "mesh.tensor"]),
    (["mesh.parameter_rules=embed=fdsp"], ["fdsp"]),
    (["eval.batch_size=5"], ["eval.batch_size = 5"]),
    (["data.sequence_length=64"], ["data.sequence_length = 64", "model.max_length"]),
    (["model.attention_kernel=cudnn"], ["model.attention_kernel='cudnn'"]),
    (["model.attention_kernel=cudnn", "precision.compute=bfloat16"], ["model.attention_kernel='cudnn'", "cpu"]),
    (["model.attention_kernel=flash"], ["model.attention_kernel"]),
    (["optim.freeze=stak/.*"], ["optim.freeze", "stak/.*", "matches no parameter", "stack/"]),
    (["log.trackers=wandb"], ["wandb", "pip install"]),
    (["checkpoint.init_from=/nowhere"], ["/nowhere"]),
    (["checkpoint.resume=must"], ["checkpoint.resume='must'"]),
    (["optim.schedule=wsd", "optim.warmup_steps=8", "optim.cooldown_ratio=0.5"], ["optim.cooldown_ratio"]),
]


@pytest.mark.parametrize(("overrides", "words"), KEYS, ids=lambda x: " ".join(x) if isinstance(x, list) else "")
def test_keys_that_cannot_be_meant(refused, overrides, words):
    line = refused(*overrides)
    assert all(word in line for word in words), line


@pytest.mark.parametrize("workdir", ["/proc/run", "gs://bucket/run"])
def test_a_work_directory_that_cannot_be(refused, workdir):
    assert workdir in refused(workdir=workdir)


# ----------------------------------------------------------------------------------------- what lies about damaged


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained") / "run"
    flags = (f"--workdir={folder}", "--config.train.steps=4", "--config.checkpoint.every=2")
    assert cli.main(["train", runs.TINY, *flags]) == 0
    return folder


@pytest.fixture
def run(trained, tmp_path):
    """A copy of a finished run, for tests that damage it."""
    return shutil.copytree(trained, tmp_path / "damaged")


@pytest.mark.parametrize("name", ["config.json", "sessions.json", "parameters.json"])
@pytest.mark.parametrize("damage", ["{", None, "[]"])
def test_damaged_descriptions_are_named(llm_jax, refused, run, name, damage):
    path = run / name
    path.unlink() if damage is None else path.write_text(damage)
    if name == "config.json" or damage == "{":
        _, err = llm_jax("evaluate", f"--workdir={run}", code=2)
        assert err.count("\n") == 1 and name in err
    if damage == "{" and name != "parameters.json":  # which is written anew
        assert name in refused("train.steps=6", workdir=run)


def test_a_damaged_tokenizer_is_named(llm_jax, refused, run):
    (run / "tokenizer" / "tokenizer_info.json").write_text("{")
    _, err = llm_jax("generate", f"--workdir={run}", code=2)
    assert err.count("\n") == 1 and "tokenizer" in err
    assert "tokenizer" in refused("train.steps=6", workdir=run)
    shutil.rmtree(run / "tokenizer")
    _, err = llm_jax("generate", f"--workdir={run}", code=2)
    assert err.count("\n") == 1 and "tokenizer" in err


def test_damaged_checkpoints_fall_back_and_then_stop_the_run(llm_jax, run):
    """The newest is put aside; where all are damaged the run stops with code 5 and never starts over by itself."""

    def damage(step):
        for file in (run / "checkpoints" / str(step)).rglob("*"):
            if file.is_file() and file.parent.name == "d":
                file.write_bytes(RANDOM)

    damage(4)
    out, err = llm_jax("train", runs.TINY, f"--workdir={run}", "--config.train.steps=4", "--config.checkpoint.every=2")
    assert "goes on from step 2" in out and "is damaged" in err and "4.corrupt" in err
    assert len(runs.losses(run)) == 4
    for step in checkpoint.steps(run):
        damage(step)
    _, err = llm_jax("train", runs.TINY, f"--workdir={run}", "--config.train.steps=4", code=5)
    assert "no checkpoint in" in err.splitlines()[-1] and "can be restored" in err
    _, err = llm_jax("evaluate", f"--workdir={run}", code=2 if not checkpoint.steps(run) else 5)
    assert "checkpoint" in err.splitlines()[-1]


def test_torn_metrics_do_not_stop_a_run(llm_jax, run):
    with open(run / "metrics.jsonl", "ab") as file:
        file.write(b'{"step": 4, "lo')
    llm_jax("train", runs.TINY, f"--workdir={run}", "--config.train.steps=6", "--config.checkpoint.every=2")
    assert len(runs.losses(run)) == 6


def test_a_checkpoint_that_is_not_there_is_named(llm_jax, run):
    _, err = llm_jax("evaluate", f"--workdir={run}", "--step=3", code=2)
    assert err.count("\n") == 1 and "no checkpoint of step 3" in err and "2, 4" in err
    shutil.rmtree(run / "checkpoints")
    _, err = llm_jax("generate", f"--workdir={run}", code=2)
    assert err.count("\n") == 1 and "there are no checkpoints" in err


def test_data_that_changed_under_a_run_is_refused(llm_jax, refused, tmp_path):
    """Ids would mean other text: the model must neither be trained on nor measured with them."""
    text, flags = tmp_path / "text.txt", ("data.tokenizer=char", "train.steps=2", f"data.path={tmp_path}/text.txt")
    text.write_text(STORY * 100)
    llm_jax("train", runs.TINY, f"--workdir={tmp_path}/run", *(f"--config.{flag}" for flag in flags))
    text.write_text(STORY.swapcase() * 100)
    line = refused(*flags[:1], "train.steps=4", *flags[2:], workdir=tmp_path / "run")
    assert "The data stream is not the one that this run was trained on" in line
    _, err = llm_jax("evaluate", f"--workdir={tmp_path}/run", code=2)
    assert "tokenizer" in err.splitlines()[-1] and "text.txt" in err.splitlines()[-1]
    text.unlink()
    _, err = llm_jax("evaluate", f"--workdir={tmp_path}/run", code=2)
    assert "text.txt does not exist" in err.splitlines()[-1]
    llm_jax("generate", f"--workdir={tmp_path}/run", "--prompt=The", "--max_tokens=3")  # needs the folder alone


def test_a_corrupt_compile_cache_costs_a_compilation_and_no_more(tmp_path):
    """In a process of its own: JAX is given its cache once. Programs that compile fast are kept too: the step itself
    cannot be where it has oneDNN's products."""
    cache = {"LLM_JAX_CACHE": str(tmp_path / "cache"), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    arguments = ("train", runs.TINY, "--config.train.steps=2", "--config.model.num_layers=2")
    runs.run(*arguments, f"--workdir={tmp_path}/a", **cache)
    compiled = [file for file in (tmp_path / "cache" / "xla").rglob("*-cache")]
    assert compiled
    for file in compiled:
        file.write_bytes(RANDOM)
    runs.run(*arguments, f"--workdir={tmp_path}/b", **cache)
    assert runs.numbers(tmp_path / "a") == runs.numbers(tmp_path / "b")
