"""Labelled records: tables of every format, labels of every task, and bad values told with file, row and column."""

import json

import numpy as np
import pytest

from llm_jax.config import ColumnsConfig, DataConfig, SourceConfig
from llm_jax.data import labelled, questions
from llm_jax.data.labelled import Encoder, label_names, prepare, texts_a_record
from llm_jax.data.labelled_rows import LabelledRows, LabelledStream, evaluation_batches, pack
from llm_jax.data.labelled_scores import measures, predictions
from llm_jax.data.tables import Record, read_table
from llm_jax.data.tasks import feature_shapes
from llm_jax.data.tokenizers import train_wordpiece
from llm_jax.errors import DataError

TEXT = "the cat sat on the mat. a dog ran in the park, and the bird sang. Ada lives in Turin! what is it? unhappy cats"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("labelled")
    train_wordpiece([TEXT] * 20, 200).save(folder / "tokenizer")
    return folder


@pytest.fixture(scope="module")
def tokenizer(folder):
    return labelled.tokenizers.read(str(folder / "tokenizer" / "tokenizer.json"))


def write(folder, rows, name="train.jsonl"):
    path = folder / name
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def config(folder, rows=(), task="classification", columns=None, **changes):
    changes.setdefault("path", write(folder, rows) if rows else "none.jsonl")
    changes.setdefault("validation_fraction", 0.0)
    tokenizer = str(folder / "tokenizer" / "tokenizer.json")
    return DataConfig(
        task=task, tokenizer=tokenizer, columns=ColumnsConfig(**columns or {}),
        sequence_length=changes.pop("length", 16), **changes,
    )  # fmt: skip


def record(**values):
    return Record("given.jsonl", 3, values, "given:3")


# -------------------------------------------------------------------------------------------------- tables


@pytest.mark.parametrize("format", ["jsonl", "csv", "tsv", "parquet"])
def test_tables(tmp_path, format):
    rows = [{"text": "a, b", "label": "x"}, {"text": 'say "c"', "label": "y"}]
    path = tmp_path / f"t.{format}"
    if format == "jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif format == "csv":
        path.write_text('\ufefftext,label\n"a, b",x\n\n"say ""c""",y\n')
    elif format == "tsv":
        path.write_text('text\tlabel\na, b\tx\nsay "c"\ty\n')
    else:
        pyarrow = pytest.importorskip("pyarrow")
        from pyarrow import parquet

        parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    found = list(read_table(SourceConfig(path=str(path))))
    assert [one.values for one in found] == rows
    assert [one.row for one in found] == [1, 2] and found[0].file == str(path)


@pytest.mark.parametrize(
    "name, content, words",
    [
        ("t.jsonl", '{"text": "a"}\n[1]\n', ["t.jsonl, row 2", "a JSON list", "write one object a line"]),
        ("t.jsonl", '{"text": "a"}\n{\n', ["t.jsonl, row 2", "not JSON"]),
        ("t.csv", "text,label\na,b,c\n", ["t.csv, row 1", "3 values stand below 2 columns", "quote"]),
        ("t.csv", "text,label\n", ["holds no record"]),
        ("t.txt", "text", ["t.txt is not known to be a table", "data.format"]),
        ("t.jsonl", '{"a": 1}\n{"a": }\n', ["t.jsonl, row 2", "Expecting value at character 7"]),
        ("t.csv", "text,label,label\na,b,c\n", ["two columns are named 'label'"]),
        ("t.csv", 'text,label\na,x\nb,"y\nc,x\n', ["t.csv, row 2", "unexpected end of data", "close every quote"]),
        ("t.csv", "text,label\n\na,x\ncaf\udce9,y\n", ["t.csv, row 2", "can't decode byte 0xe9"]),
        ("t.csv", "t\udce9xt,label\na,x\n", ["t.csv, its first line", "can't decode byte 0xe9"]),
        ("t.jsonl", '{"a": "b"}\n{"a": "\udce9"}\n', ["t.jsonl, row 2", "can't decode byte 0xe9"]),
    ],
)
def test_unsound_tables(tmp_path, name, content, words):
    (tmp_path / name).write_bytes(content.encode("utf-8", "surrogateescape"))
    with pytest.raises(DataError) as caught:
        list(read_table(SourceConfig(path=str(tmp_path / name))))
    for word in words:
        assert word in str(caught.value)


def test_docstrings_are_labelled_by_area():
    found = [one for one, _ in zip(read_table(SourceConfig(path="docstrings")), range(300), strict=False)]
    assert {one.values["label"] for one in found} <= {
        "concurrency",
        "data",
        "development",
        "files",
        "interface",
        "network",
    }
    assert len({one.group for one in found}) > 1
    assert all(len(one.values["text"]) >= 40 for one in found)


# -------------------------------------------------------------------------------------------- bad values


ANSWERS = {"text": ["mat"], "answer_start": [4]}


@pytest.mark.parametrize(
    "task, columns, values, words",
    [
        ("classification", {}, {"text": "a", "label": "z"},
         ["column 'label'", "the label 'z' is not one of the 2 labels (x, y)"]),
        ("classification", {}, {"text": " ", "label": "x"}, ["column 'text'", "the text is empty"]),
        ("classification", {}, {"text": 3, "label": "x"}, ["column 'text'", "3 (int) stands where a text belongs"]),
        ("classification", {}, {"words": "a", "label": "x"},
         ["column 'text'", "no such column, its columns are words, label"]),
        ("classification", {}, {"text": "a", "label": 0.5}, ["column 'label'", "0.5 stands where a label belongs"]),
        ("classification", {"pair": "second"}, {"text": "a", "label": "x"}, ["column 'second'", "no such column"]),
        ("multilabel", {}, {"text": "a", "label": ["x", "w"]}, ["the label 'w' is not one of"]),
        ("multilabel", {}, {"text": "a", "label": 3}, ["a list of labels belongs"]),
        ("regression", {}, {"text": "a", "label": "much"}, ["'much' stands where a finite number belongs"]),
        ("regression", {}, {"text": "a", "label": float("nan")}, ["finite number"]),
        ("regression", {}, {"text": "a", "label": -1e39}, ["column 'label'", "-1e+39 stands where a finite number"]),
        ("similarity", {"pair": "c"}, {"text": "a", "c": "\x01"}, ["column 'c'", "leaves nothing of the text"]),
        ("classification", {"pair": "c"}, {"text": "a", "c": "\x01", "label": "x"}, ["column 'c'", "leaves nothing"]),
        ("choice", {"choices": ("c", "d")}, {"text": "a", "c": "b", "d": "\x01", "label": 1},
         ["column 'd'", "leaves nothing"]),
        ("tokens", {}, {"text": ["a", "b"], "label": ["x"]}, ["1 labels for 2 words"]),
        ("tokens", {}, {"text": ["a", ""], "label": ["x", "x"]}, ["not a list of words, none of them empty"]),
        ("choice", {"choices": ("c", "d")}, {"text": "a", "c": "b", "d": "e", "label": 2},
         ["2 names none of the 2 choices"]),
        ("questions", {"pair": "c"}, {"text": "what", "c": "the cat", "label": ANSWERS},
         ["column 'label'", "the answer 'mat' does not stand at character 4 of the context"]),
        ("questions", {"pair": "c"}, {"text": "what", "c": "the cat", "label": "cat"},
         ["not of the form", "as SQuAD does"]),
        ("questions", {"pair": "c"},
         {"text": "what is it the cat " * 9, "c": "the cat", "label": {"text": [], "answer_start": []}},
         ["the question alone fills a row of 16 tokens"]),
        ("similarity", {"pair": "c"}, {"text": "a", "c": ""}, ["column 'c'", "empty"]),
        ("classification", {}, {"text": "\x01", "label": "x"},
         ["column 'text'", "the tokenizer leaves nothing of the text"]),
        ("classification", {}, {"text": "a \ud800", "label": "x"}, ["column 'text'", "holds half of a surrogate pair"]),
        ("tokens", {}, {"text": ["a", "\ud800"], "label": ["x", "x"]},
         ["column 'text'", "holds half of a surrogate pair"]),
        ("tokens", {}, {"text": ["a", "\x01", "b"], "label": ["x", "x", "x"]},
         ["nothing of the word '\\x01'", "with its label"]),
        ("tokens", {}, {"text": ["a"] * 21, "label": ["x"] * 20}, ["20 labels for 21 words"]),
        ("choice", {"choices": ("c", "d")}, {"text": "a", "c": "b", "d": "e", "label": "\u00b2"},
         ["names none of the 2 choices"]),
        ("questions", {"pair": "c"}, {"text": "what", "c": "the cat", "label": {"text": ["cat"], "answer_start": [-3]}},
         ["does not stand at character -3"]),
        ("questions", {"pair": "c"}, {"text": "what", "c": "the cat", "label": {"text": ["h"], "answer_start": [True]}},
         ["does not stand at character True"]),
        ("questions", {"pair": "c"}, {"text": "what", "c": "\x01", "label": {"text": [], "answer_start": []}},
         ["column 'c'", "the tokenizer leaves nothing of the context"]),
    ],
)  # fmt: skip
def test_bad_values_name_file_row_and_column(folder, tokenizer, task, columns, values, words):
    changes = {"stride": 4} if task == "questions" else {}
    encode = Encoder(config(folder, task=task, columns=columns, **changes), tokenizer, ("x", "y"))
    with pytest.raises(DataError) as caught:
        encode([record(**values)])
    message = str(caught.value)
    assert message.startswith("given.jsonl, row 3, column ")
    for word in words:
        assert word in message


def test_names_of_labels(folder):
    rows = [record(text="a", label=label) for label in (10, 9, 9)]
    assert label_names(config(folder), rows) == ("9", "10")  # numbers by their size
    assert label_names(config(folder, columns={"names": ("10", "9")}), rows) == ("10", "9")
    with pytest.raises(DataError, match="no training record has the label '8'"):
        label_names(config(folder, columns={"names": ("10", "9", "8")}), rows)
    with pytest.raises(DataError, match="the label '10' is not one of the 2 labels"):
        label_names(config(folder, columns={"names": ("9", "8")}), rows)
    with pytest.raises(DataError, match="the training records have no other label than 'x'"):
        label_names(config(folder), [record(text="a", label="x")])
    with pytest.raises(DataError, match="the training records have no label, so that there is nothing to learn"):
        label_names(config(folder, task="multilabel"), [record(text="a", label=[])])
    zeros = [record(text="a", label=label) for label in ("1", "01", "\u0663")]
    assert label_names(config(folder), zeros) == label_names(config(folder), zeros[::-1]) == ("01", "1", "\u0663")
    assert label_names(config(folder), [record(label=label) for label in ("\u00b2", "3")]) == ("3", "\u00b2")


def test_questions_none_of_which_has_an_answer(folder):
    none = {"text": [], "answer_start": []}
    rows = [{"text": "what", "c": "the cat", "label": none}] * 3
    with pytest.raises(DataError, match="train.jsonl, column 'label': no training record has an answer in its context"):
        prepare(config(folder, rows, task="questions", columns={"pair": "c"}, stride=4))


def test_a_validation_label_that_training_never_saw(folder):
    cfg = config(
        folder, [{"text": "a", "label": "x"}, {"text": "b", "label": "y"}],
        validation_path=write(folder, [{"text": "c", "label": "w"}], "dev.jsonl"),
    )  # fmt: skip
    with pytest.raises(DataError, match=r"dev.jsonl, row 1, column 'label': the label 'w' is not one of the 2 labels"):
        prepare(cfg)


# ----------------------------------------------------------------------------------------------- encoding


def test_a_pair_has_both_texts_and_their_types(folder, tokenizer):
    encode = Encoder(config(folder, columns={"pair": "second"}), tokenizer, ("x", "y"))
    found = encode([record(text="the cat", second="a dog", label="y")])
    assert tokenizer.decode(found.tokens.tolist()).split() == ["the", "cat", "a", "dog"]
    assert found.tokens.tolist().count(tokenizer.special_ids["[SEP]"]) == 2
    assert found.types.tolist() == [0, 0, 0, 0, 1, 1, 1]
    assert found.labels.tolist() == [1]


def test_words_carry_their_label_at_the_first_piece(folder, tokenizer):
    encode = Encoder(config(folder, task="tokens"), tokenizer, ("O", "X"))
    found = encode([record(text=["the", "catson", "cat"], label=["O", "X", "O"])])
    pieces = found.pieces[0].words
    assert (pieces == 1).sum() > 1  # the long word is cut
    labelled_places = np.flatnonzero(found.labels >= 0)
    assert found.labels[labelled_places].tolist() == [0, 1, 0]
    assert pieces[labelled_places].tolist() == [0, 1, 2]


def test_windows_on_a_long_context(folder, tokenizer):
    context = "the cat sat on the mat. a dog ran in the park, and the bird sang."
    start = context.index("park")
    cfg = config(folder, task="questions", columns={"pair": "context", "label": "answers"}, length=20, stride=4)
    one = record(text="what is it?", context=context, answers={"text": ["the park"], "answer_start": [start - 4]})
    none = record(text="what is it?", context="a dog ran", answers={"text": [], "answer_start": []})
    found = Encoder(cfg, tokenizer, ())([one, none])
    assert len(found) > 2 and found.record.tolist() == [0] * (len(found) - 1) + [1]
    told = set()
    for window, (first, last) in zip(found.pieces, found.labels.tolist(), strict=True):
        if (first, last) != (0, 0):
            told.add(context[window.spans[first][0] : window.spans[last][1]])
    assert told == {"the park"}
    assert found.labels[-1].tolist() == [0, 0]


def test_the_best_span_over_windows(folder, tokenizer):
    cfg = config(folder, task="questions", columns={"pair": "context"}, length=20, stride=4)
    found = Encoder(cfg, tokenizer, ())([record(text="what is it?", context="the cat sat on the mat")], labelled=False)
    (window,) = found.pieces
    places = np.flatnonzero(window.sequence == 1)
    scores = np.zeros((len(window.tokens), 2))
    scores[places[1], 0], scores[places[2], 1] = 5, 4  # "cat sat"
    scores[places[4], 0], scores[places[0], 1] = 8, 8  # an end before the start is no answer
    scores[0] = 1
    answer = questions.best_answer([(scores, window)], "the cat sat on the mat", 3)
    assert answer["answer"] == "cat sat" and answer["score"] == pytest.approx(9 - 2)
    scores[places[4], 0] = scores[places[0], 1] = 0
    answer = questions.best_answer([(scores, window)], "the cat sat on the mat", 3)
    assert answer == {"answer": "cat sat", "score": pytest.approx(7), "start": 4, "end": 11}
    scores[0] = 6
    answer = questions.best_answer([(scores, window)], "the cat sat on the mat", 3)
    assert answer == {"answer": "", "score": pytest.approx(-3), "start": None, "end": None}


def test_exact_match_and_overlap():
    assert questions.exact_match("The  Mat!", ["mat"]) == 1
    assert questions.exact_match("", []) == 1 and questions.exact_match("x", []) == 0
    assert questions.overlap_f1("on the red mat", ["mat", "the red mat"]) == pytest.approx(2 * 2 / (3 + 2))
    assert questions.overlap_f1("cat", ["dog"]) == 0


# ------------------------------------------------------------------------------------------------------ rows


def words(count, seed=0):
    rng = np.random.default_rng(seed)
    names = ["cat", "dog", "mat", "park", "bird", "the", "a", "on", "in"]
    return [
        {"text": " ".join(rng.choice(names, rng.integers(1, 14))), "label": "xyz"[int(rng.integers(3))]}
        for _ in range(count)
    ]


def test_texts_are_padded_to_the_shortest_bucket_that_holds_all(folder):
    store = prepare(config(folder, words(40), buckets=("8", "12")))
    rows = LabelledRows(store.train, config(folder, buckets=("8", "12")))
    lengths = store.train.lengths
    short, long = np.flatnonzero(lengths <= 8)[:3], np.flatnonzero(lengths > 12)[:1]
    assert rows.bucket(short) == 8 and rows.bucket(np.concatenate([short, long])) == 16
    batch = rows.batch(short, np.zeros(3, int), 8)
    assert batch["tokens"].shape == (3, 8)
    for row, text in enumerate(short):
        own = store.train.tokens[store.train.offsets[text] : store.train.offsets[text + 1]]
        assert batch["tokens"][row, : len(own)].tolist() == own.tolist() and not batch["tokens"][row, len(own) :].any()
        assert batch["segment_ids"][row].sum() == len(own) and batch["text_ids"][row].tolist() == [text]
    assert batch["labels"][:, 0].tolist() == store.train.labels[short].tolist()


def test_texts_of_one_bucket_are_drawn_together(folder):
    cfg = config(folder, words(960), buckets=("8", "12"))
    stream = LabelledStream(prepare(cfg), cfg, seed=5)
    batches = [stream.batch(first, 10, np.arange(10)) for first in range(0, 1920, 10)]
    for epoch in (batches[:96], batches[96:]):  # four pools of 240 rows, 24 batches, with a run of each bucket
        assert sorted(text for batch in epoch for text in batch["text_ids"][:, 0]) == list(range(960))
        widths = np.array([batch["tokens"].shape[1] for batch in epoch])
        assert set(widths) == {8, 12, 16}
        for bucket in (8, 12):  # at most one batch at each border of a run needs more than its own rows
            fitting = (stream.rows.filled <= bucket).mean()
            assert fitting - 4 * 2 / 96 <= (widths <= bucket).mean() <= fitting
    assert len({batch["tokens"].shape[1] for batch in batches[::24]}) > 1  # no bucket always comes first


def test_texts_that_are_told_from_one_another_are_of_any_length(folder):
    rows = [{"text": row["text"], "second": "a dog"} for row in words(960)]
    cfg = config(folder, rows, task="similarity", columns={"pair": "second"}, buckets=("8", "12"))
    stream = LabelledStream(prepare(cfg), cfg, seed=5)
    widths = [stream.batch(first, 10, np.arange(20))["tokens"].shape[1] for first in range(0, 960, 10)]
    assert np.mean(np.array(widths) == 16) > 0.7


def test_packed_rows_hold_every_text_once(folder):
    cfg = config(folder, words(60), length=32, pack_texts=True)
    store = prepare(cfg)
    rows = LabelledRows(store.train, cfg)
    assert sorted(text for members in rows.members for text in members) == list(range(60))
    assert rows.filled.max() <= 32
    assert store.train.lengths.sum() / (len(rows) * 32) > 0.9
    batch = rows.batch(np.arange(len(rows)), np.zeros(len(rows), int), 32)
    there = batch["text_ids"] >= 0
    row, slot = np.nonzero(there)
    assert (batch["labels"][row, slot] == store.train.labels[batch["text_ids"][row, slot]]).all()
    assert (batch["segment_ids"][row, batch["starts"][row, slot]] == slot + 1).all()
    assert (batch["positions"][row, batch["starts"][row, slot]] == 0).all()


def test_packing_takes_the_longest_first():
    assert pack(np.array([3, 7, 5, 2]), 10, 4) == [[1, 0], [2, 3]]
    assert pack(np.array([2, 2, 2]), 10, 2) == [[0, 1], [2]]


def test_an_epoch_holds_each_record_once_and_batches_follow_from_their_number(folder):
    cfg = config(folder, words(24), buckets=("8",))
    stream = LabelledStream(prepare(cfg), cfg, seed=5)
    batches = [stream.batch(first, 6, np.arange(6)) for first in range(0, 48, 6)]
    ids = [batch["text_ids"][:, 0].tolist() for batch in batches]
    assert sorted(sum(ids[:4], [])) == sorted(sum(ids[4:], [])) == list(range(24)) and ids[:4] != ids[4:]
    half = stream.batch(6, 6, np.arange(3, 6))  # another process's rows have the same bucket
    assert half["tokens"].tolist() == batches[1]["tokens"][3:].tolist()


def test_records_of_several_texts_stand_apart_in_the_batch(folder):
    rows = [{"text": f"the {name}", "c": "sat", "d": f"ran {name}", "label": 1} for name in ("cat", "dog", "bird")]
    cfg = config(folder, rows, task="choice", columns={"choices": ("c", "d")})
    store = prepare(cfg)
    batch = LabelledStream(store, cfg, 0).batch(0, 3, np.arange(6))
    ids = batch["text_ids"][:, 0]
    assert texts_a_record(cfg) == 2
    assert (ids[3:] == ids[:3] + 1).all() and (ids[:3] % 2 == 0).all()
    assert batch["labels"][:, 0].tolist() == [1] * 6


# ---------------------------------------------------------------------------------------------- predictions


def scored(rows, cfg, scores_of):
    """Batches as the evaluation keeps them, with made scores."""
    found = []
    for batch in evaluation_batches(rows, 4, np.arange):
        ids = batch["text_ids"]
        scores = np.array([[scores_of(int(text)) for text in row] for row in ids])
        found.append({"scores": scores, "text_ids": ids, "starts": batch["starts"]})
    return found


def test_predictions_come_back_in_the_order_of_the_records(folder):
    cfg = config(folder, words(13), buckets=("8",))
    store = prepare(cfg)
    rows = LabelledRows(store.train, cfg)
    batches = scored(rows, cfg, lambda text: [0.0, 3.0 if text % 2 else -3.0, 1.0])
    found = predictions(cfg, store.names, store.train, batches)
    assert [one["label"] for one in found] == ["y" if text % 2 else "z" for text in range(13)]
    assert found[0]["scores"].keys() == {"x", "y", "z"} and sum(found[0]["scores"].values()) == pytest.approx(
        1, abs=1e-5
    )
    truth = store.train.labels
    got = measures(cfg, store.names, store.train, batches)
    assert got["accuracy"] == pytest.approx(np.mean([truth[t] == (1 if t % 2 else 2) for t in range(13)]))
    few = measures(cfg, store.names, store.train, batches[:1])  # of the texts that were scored
    ids = batches[0]["text_ids"][:, 0]
    assert few["accuracy"] == pytest.approx(np.mean([truth[t] == (1 if t % 2 else 2) for t in ids]))


@pytest.mark.parametrize(
    "task", ["classification", "multilabel", "regression", "tokens", "questions", "choice", "similarity"]
)
def test_the_shapes_of_a_batch_are_those_that_are_planned_for(folder, task):
    row = {"text": "the cat", "second": "a dog", "label": 1, "answers": {"text": ["a"], "answer_start": [0]}}
    rows = [row | {"label": label} for label in (0, 1)] * 3
    columns = {"label": "answers" if task == "questions" else "label"}
    if task in ("questions", "similarity"):
        columns["pair"] = "second"
    if task == "choice":
        columns["choices"] = ("second", "text")
    if task == "tokens":
        rows = [{"text": ["a", "cat"], "label": ["x", "y"]}] * 6
    if task == "multilabel":
        rows = [one | {"label": ["x"] if one["label"] else ["y"]} for one in rows]
    cfg = config(folder, rows, task=task, columns=columns, stride=4)
    store = prepare(cfg)
    planned = feature_shapes(cfg, 6, max(len(store.names), 1))
    count = 6 * texts_a_record(cfg)
    batch = LabelledStream(store, cfg, 0).batch(0, 6, np.arange(count))
    assert {name: (array.shape, array.dtype.type) for name, array in batch.items()} == planned
