"""From pre-training to labels: one's own head over another run's trunk, the best checkpoint, early ends, predict."""

import json
import pathlib
import subprocess
import sys

import numpy as np
import pytest
from tiny import quick_compiler

import llm_jax
from llm_jax import cli, config
from llm_jax.config import EvalConfig
from llm_jax.errors import ConfigError, DataError
from llm_jax.metrics import read_jsonl
from llm_jax.training import checkpoint, finetune, report, restore, train
from llm_jax.training.evaluate import Judge
from llm_jax.training.heads import origins

SMALL = dict(
    family="encoder", num_layers=1, embed_dim=16, num_heads=2, mlp_dim=16, max_length=24, scan_layers=False,
)  # fmt: skip
WORDS = ["cat", "dog", "bird", "park", "mat", "tree", "sky", "red", "blue", "green", "one", "two"]


def stories(count, seed=0):
    rng = np.random.default_rng(seed)
    line = lambda: " ".join(rng.choice(WORDS, rng.integers(3, 8)))  # noqa: E731
    return "\n\n".join("\n".join(line() for _ in range(4)) for _ in range(count)) + "\n"


def labelled(count, seed=0):
    """The label is whether there is a "cat" in the text."""
    rng = np.random.default_rng(seed)
    texts = [" ".join(rng.choice(WORDS, rng.integers(3, 8))) for _ in range(count)]
    return [{"text": text, "label": "with" if "cat" in text else "without"} for text in texts]


def pretrain(folder, task, masking, **model):
    """The folder of a run of pre-training, of four steps."""
    (folder / "text.txt").write_text(stories(60))
    cfg = config.from_dict(
        dict(
            model=SMALL | model,
            data=dict(
                task=task, path=str(folder / "text.txt"), separator="\n\n", tokenizer="wordpiece",
                tokenizer_vocab_size=300, eos="lines", sequence_length=24, masking=masking, validation_fraction=0.2,
            ),
            train=dict(steps=4, global_batch_size=8),
            eval=dict(every=2), checkpoint=dict(every=0), log=dict(trackers=[], every=2), generate=dict(max_tokens=0),
            optim=dict(schedule="constant"),
        )
    )  # fmt: skip
    config.check(cfg)
    with quick_compiler():
        train.train(cfg, str(folder / "run"))
    return folder / "run"


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory):
    return pretrain(tmp_path_factory.mktemp("pretrained"), "masked", dict(phases=["2=16"]), head="masked_pairs")


@pytest.fixture(scope="module")
def tuned(pretrained, tmp_path_factory):
    folder = tmp_path_factory.mktemp("tuned")
    with quick_compiler():
        return llm_jax.finetune(
            str(pretrained), labelled(64), labelled(24, seed=1), output_dir=str(folder), num_train_epochs=6,
            per_device_train_batch_size=1, per_device_eval_batch_size=1, learning_rate=1e-2, max_length=16,
            overrides=["log.trackers=", "eval.every=8", "eval.best=accuracy", "data.buckets=8", "log.every=4"],
        )  # fmt: skip


def test_pretraining_tells_both_losses(pretrained):
    records = read_jsonl(pretrained / "metrics.jsonl")
    last = [record for record in records if "eval/loss" in record][-1]
    assert {"eval/accuracy", "eval/pair_loss", "eval/pair_accuracy"} <= last.keys()
    step = next(record for record in records if "pair_loss" in record)
    assert 4 < step["loss"] < 8 and 0.3 < step["pair_loss"] < 2
    assert checkpoint.steps(pretrained) == [4]


def test_a_run_that_was_stopped_goes_on_with_the_same_masks(pretrained, tmp_path):
    """Stopped behind the third step, which is in the second phase: the fourth is the same to the last bit."""
    whole = restore.read_config(pretrained)
    for steps in (3, 4):
        cfg = config.override(whole, [f"train.steps={steps}"])
        with quick_compiler():
            train.train(cfg, str(tmp_path / "run"))
    once, twice = (
        [record for record in read_jsonl(folder / "metrics.jsonl") if "grad_norm" in record][-1]
        for folder in (pretrained, tmp_path / "run")
    )
    for name in ("step", "loss", "pair_loss", "accuracy", "pair_accuracy", "grad_norm"):
        assert once[name] == twice[name]


def test_the_trunk_comes_from_the_other_run_and_the_head_is_fresh(pretrained, tuned):
    said = tuned.cfg.checkpoint.init_from
    assert said == str(pretrained) and tuned.cfg.model.head == "text" and tuned.cfg.model.num_labels == 2
    ours = {
        "stack/w": np.zeros((2, 3)),
        "labels/pooler/linear/kernel": np.zeros((3, 3)),
        "labels/classifier/w": np.zeros(2),
    }
    theirs = {"stack/w": np.zeros((2, 3)), "pairs/pooler/linear/kernel": np.zeros((3, 3)), "masked/bias": np.zeros(4)}
    assert origins(ours, theirs, "there") == {
        "stack/w": "stack/w", "labels/pooler/linear/kernel": "pairs/pooler/linear/kernel"
    }  # fmt: skip
    beside = ours | {"generator/a": np.zeros(2), "generator/b": np.zeros((2, 2))}
    both = {"generator/a": np.zeros(2), "generator/b": np.zeros((3, 3))}
    assert origins(beside, theirs | both, "there").keys() == {"stack/w", "labels/pooler/linear/kernel"}
    same = {name: beside[name] for name in both}
    assert origins(beside, theirs | same, "there").keys() == {"stack/w", "labels/pooler/linear/kernel", *both}
    with pytest.raises(DataError, match=r"stack/w is \[2, 3\] here, and the one there has it as \[2, 4\]"):
        origins(ours, theirs | {"stack/w": np.zeros((2, 4))}, "there")


def test_a_dry_run_tells_what_another_run_gives_and_whether_it_fits(pretrained, tuned, tmp_path, capsys):
    (tmp_path / "run.json").write_text(json.dumps(config.to_dict(tuned.cfg)))
    dry = ["train", f"--config={tmp_path / 'run.json'}", "--dry_run", f"--workdir={tmp_path / 'new'}"]
    assert cli.main(dry) == 0
    fresh = "labels/classifier/linear/bias, labels/classifier/linear/kernel"
    told = f"begins at step 0 with the parameters of step 4 of {pretrained}; fresh: {fresh}"
    *_, line, labels = capsys.readouterr().out.splitlines()
    assert line == told and labels == "its head is told as for 2 labels; how many there are the data will say"
    assert cli.main([*dry[:-1], f"--workdir={tuned.workdir}"]) == 0
    assert f"goes on from step {checkpoint.steps(tuned.workdir)[-1]} of" in capsys.readouterr().out.splitlines()[-1]
    assert cli.main([*dry, "--config.model.scan_layers=True"]) == 0
    assert '"scan_layers": false' in capsys.readouterr().out  # as the run has its layers
    assert cli.main([*dry, "--config.model.num_layers=2"]) == 2
    assert "does not fit this config: it has no params/stack/block_1/" in capsys.readouterr().err
    assert cli.main([*dry, "--config.precision.params=bfloat16"]) == 2
    assert "is float32[16] there and bfloat16[16] here" in capsys.readouterr().err
    assert cli.main([*dry, f"--config.checkpoint.init_from={tmp_path}"]) == 2
    assert f"{tmp_path} is not a run's folder" in capsys.readouterr().err


def test_the_best_checkpoint_is_the_one_that_is_used(tuned):
    records = [record for record in read_jsonl(f"{tuned.workdir}/metrics.jsonl") if "eval/accuracy" in record]
    best = max(records, key=lambda record: record["eval/accuracy"])
    assert checkpoint.best_step(tuned.workdir) == best["step"]
    with quick_compiler():
        found = tuned.evaluate()
    assert found["step"] == best["step"]
    assert found["eval/accuracy"] == pytest.approx(best["eval/accuracy"])
    assert found["eval/loss"] == pytest.approx(best["eval/loss"], rel=1e-4)
    assert best["eval/accuracy"] > 0.9


def test_predictions_in_memory_and_from_a_file_agree(tuned, tmp_path, capsys):
    records = labelled(11, seed=2)
    with quick_compiler():
        found = tuned.predict([record["text"] for record in records])
    assert len(found) == 11 and {one["label"] for one in found} <= {"with", "without"}
    path = tmp_path / "new.csv"
    path.write_text("text\n" + "".join(record["text"] + "\n" for record in records))
    with quick_compiler():
        code = cli.main(
            ["predict", f"--workdir={tuned.workdir}", f"--input={path}", f"--output={tmp_path / 'out.jsonl'}",
             "--batch_size=5"]
        )  # fmt: skip
    assert code == 0, capsys.readouterr().err
    lines = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [line["row"] for line in lines] == list(range(1, 12))
    for line, one in zip(lines, found, strict=True):
        assert line["label"] == one["label"] and line["score"] == pytest.approx(one["score"], abs=1e-4)


def test_a_bad_row_of_the_input_is_named_and_nothing_half_is_left(tuned, tmp_path, capsys):
    path = tmp_path / "new.jsonl"
    path.write_text('{"text": "a cat"}\n{"text": ""}\n')
    with quick_compiler():
        code = cli.main(["predict", f"--workdir={tuned.workdir}", f"--input={path}", f"--output={tmp_path / 'out'}"])
    error = capsys.readouterr().err
    assert code == 2 and f"{path}, row 2, column 'text': the text is empty" in error
    assert [file.name for file in tmp_path.iterdir()] == ["new.jsonl"]


def test_an_input_that_is_not_there_is_told_by_its_flag(tuned, tmp_path, capsys):
    assert cli.main(["predict", f"--workdir={tuned.workdir}", f"--input={tmp_path / 'no.jsonl'}"]) == 2
    assert f"{tmp_path / 'no.jsonl'} does not exist: correct --input." in capsys.readouterr().err


def test_predictions_do_not_replace_what_they_are_made_of(tuned, tmp_path, capsys):
    path = tmp_path / "new.jsonl"
    path.write_text('{"text": "a cat"}\n')
    assert cli.main(["predict", f"--workdir={tuned.workdir}", f"--input={path}", f"--output={path}"]) == 2
    assert "that is the input, which would be lost" in capsys.readouterr().err
    assert path.read_text() == '{"text": "a cat"}\n'


def test_predict_is_for_labels(pretrained, tmp_path, capsys):
    (tmp_path / "new.jsonl").write_text('{"text": "a cat"}\n')
    code = cli.main(["predict", f"--workdir={pretrained}", f"--input={tmp_path / 'new.jsonl'}"])
    told = "predict gives labels, and this run's data.task is 'masked'; fine-tune it"
    assert code == 2 and told in capsys.readouterr().err


def test_texts_in_memory_are_as_many_as_the_run_reads(tuned):
    assert tuned.predict([]) == []
    with pytest.raises(DataError, match="row 2: 2 of them where the run reads 1 a record .text."):
        tuned.predict(["a cat", ("a cat", "a dog")])
    with pytest.raises(DataError, match="'a cat' is one text where a list of them belongs"):
        tuned.predict("a cat")


def test_records_of_numpy_are_written_as_they_are(tmp_path):
    records = [{"text": np.str_("a cat"), "label": np.int64(3)}, {"text": "a dog", "label": np.arange(2)}]
    lines = pathlib.Path(finetune.as_file(records, str(tmp_path), "train")).read_text().splitlines()
    assert [json.loads(line)["label"] for line in lines] == [3, [0, 1]]
    with pytest.raises(DataError, match="record 1 of train: .* is a set"):
        finetune.as_file([{"text": "a", "label": {1}}], str(tmp_path), "train")


ALONE = """
import sys, llm_jax
records = [{"text": "a cat", "label": "x"}, {"text": "a dog", "label": "y"}] * 8
wide = ["precision.params=float64", "precision.compute=float64", "log.trackers="]
model = llm_jax.finetune(sys.argv[1], records, records, num_train_epochs=1, max_length=16, overrides=wide)
print(model.evaluate()["eval/loss"])
"""


@pytest.mark.slow
def test_a_process_that_begins_in_float64_stays_there(pretrained):
    """In a process of its own: 64 bits are a setting of the whole process."""
    found = subprocess.run(
        [sys.executable, "-W", "error::UserWarning", "-c", ALONE, str(pretrained)], capture_output=True, text=True
    )
    assert found.returncode == 0, found.stderr
    assert 0 < float(found.stdout.splitlines()[-1]) < 2 and "truncated" not in found.stderr


def test_only_similarity_has_embeddings(tuned, tmp_path, capsys):
    (tmp_path / "new.jsonl").write_text('{"text": "a cat"}\n')
    with quick_compiler():
        code = cli.main(["predict", f"--workdir={tuned.workdir}", f"--input={tmp_path / 'new.jsonl'}", "--embeddings"])
    assert code == 2 and "this run's is 'classification'; train one" in capsys.readouterr().err


def test_records_with_half_a_character_are_refused_with_their_row(pretrained, tmp_path):
    with pytest.raises(DataError, match="train.jsonl, row .*, column 'text': .* holds half of a surrogate pair"):
        records = [dict(text="a \ud800", label=n) for n in range(8)]
        llm_jax.finetune(str(pretrained), records, output_dir=str(tmp_path / "run"), max_length=16)


@pytest.mark.parametrize("command", ["prepare", "inspect"])
def test_the_data_of_a_labelled_task_can_be_looked_at(tuned, command, capsys):
    code = cli.main(["data", command, f"--config={tuned.workdir}/config.json"])
    told = capsys.readouterr().out
    assert code == 0
    if command == "prepare":
        rows = "train: 64 records, 64 texts, 484 tokens in 64 rows an epoch\nvalidation: 24 records, 24 texts, "
        assert told.startswith(rows) and told.endswith(" tokens\nlabels: with, without\n")
    else:
        assert "text 1: label 'with'" in told and "[CLS]" in told and "[SEP]" in told


def test_another_models_tokenizer_is_refused(pretrained, tmp_path):
    from llm_jax.data.tokenizers import train_wordpiece

    train_wordpiece(["other words altogether"] * 30, 300).save(tmp_path)
    with pytest.raises(ConfigError, match="it is not the tokenizer of the checkpoint"):
        llm_jax.finetune(
            str(pretrained), labelled(8), output_dir=str(tmp_path / "run"),
            overrides=[f"data.tokenizer={tmp_path}/tokenizer.json"],
        )  # fmt: skip


@pytest.mark.parametrize(
    "best, figures, waited",
    [("loss", [3, 2, 2.5, 2.1], 2), ("accuracy", [0.5, 0.7, 0.6, 0.8], 0), ("accuracy", [0.9, 0.7, 0.6, 0.8], 3)],
)
def test_how_long_the_best_was_ago(best, figures, waited):
    history = [{"step": 1, "loss": 1.0}, *({f"eval/{best}": value} for value in figures[:2])]
    judge = Judge(EvalConfig(best=best, patience=3), history)  # as a run that goes on
    for value in figures[2:]:
        judge.add({f"eval/{best}": value})
    assert judge.waited == waited and judge.has_enough == (waited >= 3)


def test_a_figure_that_there_is_not():
    with pytest.raises(ConfigError, match="eval.best = 'f2': the evaluation has no such figure; it has loss, f1"):
        Judge(EvalConfig(best="f2"), []).add({"eval/loss": 1.0, "eval/f1": 0.5})


def test_a_run_ends_early_where_nothing_gets_better(pretrained, tmp_path):
    """A learning rate of nearly nothing: the second evaluation is no better than the first."""
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps(record) + "\n" for record in labelled(48)))
    with quick_compiler():
        run = llm_jax.finetune(
            str(pretrained), str(rows), output_dir=str(tmp_path / "run"), num_train_epochs=20, learning_rate=1e-9,
            per_device_train_batch_size=1, per_device_eval_batch_size=1, max_length=16,
            overrides=["log.trackers=", "eval.every=2", "eval.best=accuracy", "eval.patience=2", "data.buckets="],
        )  # fmt: skip
        steps = [record["step"] for record in read_jsonl(f"{run.workdir}/metrics.jsonl") if "loss" in record]
        assert max(steps) == 6  # the first evaluation, and two more
        train.train(run.cfg, run.workdir)  # and it does not begin again
    assert max(record["step"] for record in read_jsonl(f"{run.workdir}/metrics.jsonl")) == 6
    assert restore.read_config(run.workdir).eval.patience == 2


OTHER_TASKS = {  # columns, a record, what is predicted for it
    "multilabel": ({}, dict(text="a cat", label=["x", "y"]), {"labels", "scores"}),
    "regression": ({}, dict(text="a cat", label=0.5), {"value"}),
    "tokens": ({}, dict(text=["a", "cat", "sat"], label=["O", "B-X", "I-X"]), {"labels", "scores"}),
    "questions": (
        dict(pair="context"), dict(text="what", context="a cat sat", label={"text": ["cat"], "answer_start": [2]}),
        {"answer", "score", "start", "end"},
    ),
    "choice": ({}, dict(text="a cat", b="sat", c="ran", label=1), {"choice", "scores"}),
    "similarity": (dict(pair="pair"), dict(text="a cat", pair="one cat"), {"similarity"}),
}  # fmt: skip


@pytest.mark.parametrize(
    "task", [pytest.param(task, marks=[] if task == "tokens" else [pytest.mark.slow]) for task in OTHER_TASKS]
)
def test_every_task_trains_evaluates_and_predicts(pretrained, tmp_path, task):
    columns, one, predicted = OTHER_TASKS[task]
    more = {"choice": ["data.columns.choices=b,c"], "questions": ["data.stride=2"]}.get(task, [])
    with quick_compiler():
        model = llm_jax.finetune(
            str(pretrained), [one] * 16, [one] * 11, task=task, output_dir=str(tmp_path), num_train_epochs=1,
            per_device_train_batch_size=1, per_device_eval_batch_size=1, max_length=16,
            overrides=["log.trackers=", "optim.warmup_ratio=0", *more], **columns,
        )  # fmt: skip
        found = model.evaluate()
        (answer,) = model.predict([one])
    assert np.isfinite(found["eval/loss"]) and found["eval/examples"] in (11, 33)  # of tokens: words
    assert answer.keys() == predicted
    if task == "tokens":
        assert len(answer["labels"]) == 3
    if task in ("tokens", "questions"):
        assert 0 <= found["eval/f1"] <= 1
    if task == "similarity":
        similarity_and_embeddings_agree(model, one, answer, tmp_path)


def similarity_and_embeddings_agree(model, record, answer, folder):
    """A text's vector is of length 1, the product of two is their similarity, and the command writes the same."""
    path = folder / "texts.csv"
    path.write_text(f"text\n{record['text']}\n{record['pair']}\n")
    with quick_compiler():
        one, two = model.embed([record["text"], record["pair"]])
        out = folder / "vectors.jsonl"
        code = cli.main(["predict", f"--workdir={folder}", f"--input={path}", f"--output={out}", "--embeddings"])
    assert code == 0 and one.shape == (16,)
    np.testing.assert_allclose([one @ one, two @ two, one @ two], [1, 1, answer["similarity"]], rtol=1e-5)
    written = [json.loads(line) for line in out.read_text().splitlines()]
    assert [line["row"] for line in written] == [1, 2]
    np.testing.assert_allclose([line["embedding"] for line in written], [one, two], atol=1e-6)


@pytest.mark.parametrize("name", [name for name in config.config_names() if "/finetune" in name])
def test_the_recipes_lack_nothing_but_a_checkpoint(name):
    cfg = config.load(name)
    with pytest.raises(ConfigError, match="checkpoint.init_from=hf:PATH, which brings it along"):
        config.check(cfg)
    config.check(config.override(cfg, ["data.tokenizer=tokenizer.json"]))
    short = config.load(name, ["init_from=hf:somewhere"])
    assert short.checkpoint.init_from == "hf:somewhere" and short.checkpoint.use == "best"


@pytest.mark.parametrize("task, advised", [("language", ["generate"]), ("masked", []), ("tokens", ["predict"])])
def test_the_last_words_advise_what_can_be_done(task, advised):
    said = report.closing_block("runs/x", [], {}, "", task)
    commands = [line.split()[0] for line in said.splitlines() if line.startswith("  ")]
    assert commands == ["resume", *advised, "evaluate", "export"]
