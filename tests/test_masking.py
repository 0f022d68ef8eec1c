"""Pre-training rows: how texts are put together, which places are hidden and how; all follows from the number."""

import dataclasses
from types import SimpleNamespace

import numpy as np
import pytest

from llm_jax.config import DataConfig, MaskingConfig
from llm_jax.data.masking import MaskedRows, MaskedStream, choose, evaluation_batches, masked_places
from llm_jax.data.sentence_pairs import cuts, find_sentences, make_pairs
from llm_jax.data.shuffle import stream_key
from llm_jax.data.tasks import feature_shapes
from llm_jax.errors import ConfigError, DataError

PAD, UNK, CLS, SEP, MASK = range(5)
VOCAB = 60


class Words:
    """A tokenizer of ids alone: from 40 on they go on with the word before."""

    vocab_size, eos_id = VOCAB, SEP
    special_ids = {"[PAD]": PAD, "[UNK]": UNK, "[CLS]": CLS, "[SEP]": SEP, "[MASK]": MASK}

    def continues_word(self):
        return np.arange(VOCAB) >= 40


def split(documents):
    """Documents of sentences of ids, as a store has them."""
    tokens = [[*sentence, SEP] for document in documents for sentence in document]
    sizes = [sum(len(sentence) + 1 for sentence in document) for document in documents]
    return SimpleNamespace(
        tokens=np.array(sum(tokens, []), np.uint16), offsets=np.cumsum([0, *sizes]), fingerprint="content"
    )


def corpus(count=30, seed=0):
    rng = np.random.default_rng(seed)
    return [
        [rng.integers(5, VOCAB, rng.integers(1, 12)).tolist() for _ in range(rng.integers(1, 9))] for _ in range(count)
    ]


def config(length=32, task="masked", **masking):
    return DataConfig(task=task, eos="lines", sequence_length=length, masking=MaskingConfig(**masking))


def rows_of(cfg, documents=None, seed=0):
    return MaskedRows(split(documents or corpus()), Words(), cfg, cfg.sequence_length, seed)


def batch_of(rows, numbers=None, key=0):
    numbers = np.arange(len(rows)) if numbers is None else numbers
    return rows.batch(numbers, numbers, stream_key(key, "test"))


def unmasked(batch):
    """The tokens with what was hidden put back."""
    tokens = batch["tokens"].copy()
    row, slot = np.nonzero(batch["masked_weights"])
    tokens[row, batch["masked_positions"][row, slot]] = batch["masked_targets"][row, slot]
    return tokens


# ------------------------------------------------------------------------------------------------- sentences


def test_sentences_and_documents():
    found = find_sentences(*map(np.asarray, ([7, 8, SEP, SEP, 9, SEP, 5, 6, 7, SEP], [0, 6, 10])), SEP)
    assert found.starts.tolist() == [0, 4, 6] and found.ends.tolist() == [2, 5, 9]
    assert found.bounds.tolist() == [0, 2, 3]


def test_long_sentences_are_cut_where_asked():
    found = find_sentences(np.array([5, 6, 7, 8, 9, SEP, 5, SEP]), np.array([0, 8]), SEP, longest=2)
    assert list(zip(found.starts.tolist(), found.ends.tolist(), strict=True)) == [(0, 2), (2, 4), (4, 5), (6, 7)]


@pytest.mark.parametrize("a, b, room", [(5, 5, 4), (9, 1, 4), (1, 9, 4), (3, 2, 8), (7, 6, 4), (0, 9, 3)])
def test_cuts_take_one_token_at_a_time_from_the_longer(a, b, room):
    left = [a, b]
    while sum(left) > room:
        left[0 if left[0] > left[1] else 1] -= 1
    assert cuts(a, b, room) == (a - left[0], b - left[1])


def test_pairs_follow_the_published_rules():
    """Half of the second parts are of other documents; the sentences that these displaced are used again."""
    documents = corpus(200)
    sentences = find_sentences(*(split(documents).tokens, split(documents).offsets), SEP)
    pairs = make_pairs(sentences, 32, MaskingConfig(), seed=1, copy=0)
    document = np.searchsorted(sentences.bounds, np.arange(len(sentences.starts)), "right") - 1
    own, other = document[pairs.first[:, 0]], document[pairs.second[:, 0]]
    true = ~pairs.random
    assert (own[true] == other[true]).all()
    assert (pairs.first[true, 1] == pairs.second[true, 0]).all()  # B goes on where A ends
    assert (own[pairs.random] != other[pairs.random]).all()
    several = np.array([len(documents[d]) > 1 for d in own])
    share = pairs.random[several & (np.diff(pairs.first, axis=1)[:, 0] < 5)].mean()
    assert 0.4 < share < 0.75  # a half, and all chunks of one sentence
    used = np.zeros(len(sentences.starts), bool)
    for first, last in [*pairs.first.tolist(), *pairs.second[true].tolist()]:
        used[first:last] = True
    assert used.all()
    assert pairs.lengths.max() <= 32 and (pairs.cut >= 0).all()
    short = pairs.lengths < 20
    assert 0.02 < short.mean() < 0.6


def test_one_document_has_no_other_to_take_from():
    sentences = find_sentences(np.array([5, 6, SEP, 7, SEP]), np.array([0, 5]), SEP)
    with pytest.raises(DataError, match="at least two documents"):
        make_pairs(sentences, 16, MaskingConfig(), 0, 0)
    single = make_pairs(sentences, 16, MaskingConfig(next_sentence=False, short_rows=0.0), 0, 0)
    assert single.first.tolist() == [[0, 2]] and single.lengths.tolist() == [5]


# --------------------------------------------------------------------------------------------------- masks


def test_a_row_is_cls_a_sep_b_sep():
    documents = [[[10, 11], [12]], [[20], [21]]]
    rows = rows_of(config(16, short_rows=0.0), documents, seed=3)
    batch = batch_of(rows)
    texts, types = unmasked(batch), batch["token_types"]
    for row in range(len(rows)):
        real = batch["segment_ids"][row] > 0
        tokens = texts[row][real].tolist()
        assert tokens[0] == CLS and tokens[-1] == SEP and tokens.count(SEP) == 2
        first = tokens.index(SEP)
        assert types[row][real].tolist() == [0] * (first + 1) + [1] * (len(tokens) - first - 1)
        a, b = tokens[1:first], tokens[first + 1 : -1]
        other = {tuple(a), tuple(b)} - {(10, 11), (12,), (20,), (21,), (10, 11, 12), (20, 21)}
        assert not other
        assert batch["pair_labels"][row, 0] == ((a[0] < 20) != (b[0] < 20))
        assert batch["positions"][row][real].tolist() == list(range(len(tokens)))
        assert not batch["tokens"][row][~real].any() and not batch["positions"][row][~real].any()


@pytest.mark.parametrize("whole_words", [False, True])
def test_fifteen_percent_are_hidden(whole_words):
    rows = rows_of(config(whole_words=whole_words))
    batch = batch_of(rows)
    counts = (batch["segment_ids"] > 0).sum(1)
    wanted = np.minimum(5, np.maximum(1, np.rint(0.15 * counts)))  # 5: 0.15 * 32, rounded up
    hidden = batch["masked_weights"].sum(1)
    assert (hidden <= wanted).all()
    if not whole_words:
        assert (hidden == np.minimum(wanted, counts - 3)).all()
    places = batch["masked_positions"][batch["masked_weights"] > 0]
    originals = unmasked(batch)
    row = np.nonzero(batch["masked_weights"])[0]
    assert not np.isin(originals[row, places], [CLS, SEP, PAD]).any()
    for one, weights in zip(batch["masked_positions"], batch["masked_weights"], strict=True):
        kept = one[weights > 0]
        assert (np.diff(kept) > 0).all()


def test_eighty_ten_ten():
    rows = rows_of(config(copies=3), corpus(300))
    batch = batch_of(rows)
    row, slot = np.nonzero(batch["masked_weights"])
    seen = batch["tokens"][row, batch["masked_positions"][row, slot]]
    target = batch["masked_targets"][row, slot]
    error = 4 * np.sqrt(0.8 * 0.2 / len(seen))
    same = 0.1 + 0.1 / VOCAB
    assert abs((seen == MASK).mean() - 0.8 - 0.1 / VOCAB) < error
    assert abs(((seen == target) & (seen != MASK)).mean() - same) < error
    random = seen[(seen != MASK) & (seen != target)]
    assert np.isin([PAD, UNK, SEP], random).any()  # the whole vocabulary, special tokens too


def test_whole_words_are_hidden_as_wholes():
    rows = rows_of(config(64, whole_words=True, next_sentence=False), corpus(60))
    batch = batch_of(rows)
    tokens = unmasked(batch)
    for row in range(len(rows)):
        hidden = set(batch["masked_positions"][row][batch["masked_weights"][row] > 0].tolist())
        word: list[int] = []
        for place in range(int((batch["segment_ids"][row] > 0).sum())):
            if tokens[row, place] in (CLS, SEP):
                continue
            if tokens[row, place] < 40 or not word:
                assert len(hidden & set(word)) in (0, len(word))
                word = []
            word.append(place)


def test_a_word_that_would_exceed_the_number_is_passed_over():
    candidates = np.ones((1, 6), bool)
    goes_on = np.array([[False, True, True, False, False, True]])  # words of 3, 1 and 2 pieces
    chance = np.array([[0.1, 0, 0, 0.5, 0.3, 0]])  # in this order: 3, 2, 1
    assert choose(candidates, goes_on, np.array([3]), chance).tolist() == [[True, True, True, False, False, False]]
    assert choose(candidates, goes_on, np.array([2]), chance).tolist() == [[False, False, False, False, True, True]]
    assert choose(candidates, goes_on, np.array([1]), chance).tolist() == [[False, False, False, True, False, False]]


def test_a_piece_without_a_word_before_begins_one():
    found = choose(np.ones((1, 2), bool), np.array([[True, True]]), np.array([2]), np.array([[0.5, 0.5]]))
    assert found.all()


def test_places_are_told_in_order_and_filled_up():
    rows = {"tokens": np.array([[9, 8, 7, 6]])}
    masked_places(rows, np.array([[False, True, False, True]]), 3)
    assert rows["masked_positions"].tolist() == [[1, 3, 0]]
    assert rows["masked_targets"].tolist() == [[8, 6, 0]]
    assert rows["masked_weights"].tolist() == [[1, 1, 0]]


def test_places_to_fill_are_hidden_or_left_and_have_their_draws():
    rows = rows_of(config(task="replaced", next_sentence=False), corpus(300))
    batch = batch_of(rows)
    real, original = batch["masked_weights"] > 0, unmasked(batch)
    changed = batch["tokens"] != original
    assert (batch["tokens"][changed] == MASK).all() and 0.8 < changed.sum() / real.sum() < 0.9
    assert (np.take_along_axis(original, batch["masked_positions"], 1)[real] == batch["masked_targets"][real]).all()
    draws = batch["masked_draws"][real]
    assert draws.min() >= 0 and draws.max() < 1 and len(np.unique(draws)) > 0.99 * len(draws)
    assert abs(draws.mean() - 0.5) < 5 / np.sqrt(12 * len(draws))
    assert same(batch, batch_of(rows)) and not same(batch, batch_of(rows, key=1))


def test_several_short_texts_share_a_row():
    cfg = dataclasses.replace(config(64, next_sentence=False, short_rows=0.5), pack_texts=True)
    rows = rows_of(cfg)
    plain = rows_of(dataclasses.replace(cfg, pack_texts=False))
    assert len(rows) < len(plain) and rows.filled > 1.3 * plain.filled
    batch = batch_of(rows)
    assert batch["segment_ids"].max() > 1
    for row in range(len(rows)):
        starts = batch["starts"][row][: batch["segment_ids"][row].max()]
        assert (unmasked(batch)[row, starts] == CLS).all()
        assert (batch["positions"][row, starts] == 0).all()


# --------------------------------------------------------------------------------------------------- stream


def stream_of(seed=0, documents=None, **masking):
    store = SimpleNamespace(name="data", tokenizer=Words(), split=lambda _: split(documents or corpus()))
    return MaskedStream(store, config(**masking), seed)


def same(a, b):
    return all((a[name] == b[name]).all() for name in a)


def test_a_batch_follows_from_its_number_whoever_makes_it():
    stream = stream_of()
    whole = stream.batch(16, 8, np.arange(8))
    assert same(whole, stream_of().batch(16, 8, np.arange(8)))
    half = stream.batch(16, 8, np.arange(4, 8))
    assert same({name: array[4:] for name, array in whole.items()}, half)
    assert not same(whole, stream.batch(24, 8, np.arange(8)))
    assert not same(whole, stream_of(seed=1).batch(16, 8, np.arange(8)))


@pytest.mark.parametrize("redraw", [True, False])
def test_masks_are_drawn_anew_each_epoch_or_come_back(redraw):
    stream = stream_of(redraw=redraw)
    size = stream.epoch_rows
    first, second = (stream.batch(epoch * size, size, np.arange(size)) for epoch in range(2))
    by_text = [
        {tuple(text): row.tolist() for text, row in zip(unmasked(batch).tolist(), batch["tokens"], strict=True)}
        for batch in (first, second)
    ]
    assert by_text[0].keys() == by_text[1].keys()  # every row once an epoch
    again = sum(by_text[0][text] == by_text[1][text] for text in by_text[0])
    assert again == len(by_text[0]) if not redraw else again < 0.2 * len(by_text[0])
    assert not same(first, second)  # in another order


def test_copies_are_other_cuts_of_the_text():
    stream = stream_of(copies=2)
    size = stream.epoch_rows
    first, second = (stream.batch(begin, 8, np.arange(8)) for begin in (0, size))
    assert not same(first, second)
    total = len(stream._rows[32])
    assert total > size
    numbers = stream._numbers(np.arange(total), 32)
    assert sorted(numbers.tolist()) == list(range(total)) and numbers[:size].max() < size


def test_phases_have_their_own_lengths():
    stream = stream_of(phases=("3=16",))
    assert [stream.batch(step * 4, 4, np.arange(4))["tokens"].shape for step in range(5)] == [(4, 16)] * 3 + [
        (4, 32)
    ] * 2
    assert stream.batch(0, 4, np.arange(4))["masked_positions"].shape == (4, 3)


def test_validation_rows_always_have_the_same_masks():
    rows = rows_of(config())
    size = len(rows) - 2  # the last batch is not full
    first, second = (list(evaluation_batches(rows, size, np.arange, seed=0)) for _ in range(2))
    assert all(same(a, b) for a, b in zip(first, second, strict=True))
    assert sum(int((batch["segment_ids"] > 0).any(1).sum()) for batch in first) == len(rows)
    last = first[-1]
    padding = ~(last["segment_ids"] > 0).any(1)
    assert padding.any() and not last["masked_weights"][padding].any() and not last["pair_weights"][padding].any()


def test_a_tokenizer_without_a_mask_is_refused():
    tokenizer = SimpleNamespace(vocab_size=VOCAB, eos_id=SEP, special_ids={"[CLS]": CLS, "[SEP]": SEP})
    with pytest.raises(ConfigError, match=r"\[MASK\] or <mask>, which data.task=masked needs"):
        MaskedRows(split(corpus()), tokenizer, config(), 32, 0)


@pytest.mark.parametrize("task", ["masked", "replaced"])
def test_the_shapes_of_a_batch_are_those_that_are_planned_for(task):
    cfg = config(task=task)
    batch = batch_of(rows_of(cfg), np.arange(6))
    assert {name: (array.shape, array.dtype.type) for name, array in batch.items()} == feature_shapes(cfg, 6, 1)
