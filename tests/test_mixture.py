"""The training stream: epochs, shuffling, shares, and that any sample is a function of its number."""

import collections
import itertools
import time

import numpy as np
import pytest

from llm_jax.config.schema import DataConfig, SourceConfig
from llm_jax.data.mixture import SHARE_UNITS, Mixture, fingerprint, interleave, make_mixture, order_facts, whole_shares
from llm_jax.data.packing import ConcatRows, CropRows, PlannedRows
from llm_jax.data.plans import make_plan
from llm_jax.data.store import TokenSplit

LENGTH = 4


def rows_from(first: int, count: int) -> ConcatRows:
    """`count` rows; the first token of row r is first + 4 * r."""
    tokens = np.arange(first, first + count * LENGTH + 1).astype(np.uint32)
    return ConcatRows(TokenSplit(tokens, np.array([0, len(tokens)]), f"from {first}"), LENGTH, True)


def drawn(mixture: Mixture, samples) -> list[tuple[str, int]]:
    """(source, row) of samples, by their tokens; sources start at 0, 1000, 2000, ..."""
    first = mixture.batch(np.asarray(samples))["tokens"][:, 0]
    names = list(mixture.sources)
    return [(names[token // 1000], token % 1000 // LENGTH) for token in first.tolist()]


def test_every_epoch_is_another_permutation():
    mixture = Mixture({"a": rows_from(0, 50)}, [1.0], seed=3)
    epochs = [[row for _, row in drawn(mixture, range(start, start + 50))] for start in range(0, 500, 50)]
    assert all(sorted(epoch) == list(range(50)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 10
    assert mixture.epoch_rows == 50


def test_unshuffled_rows_come_in_order():
    mixture = Mixture({"a": rows_from(0, 3)}, [1.0], shuffle=False)
    assert [row for _, row in drawn(mixture, range(7))] == [0, 1, 2, 0, 1, 2, 0]


def test_seeds_and_sources_shuffle_differently():
    def order(seed, name):
        return [row for _, row in drawn(Mixture({name: rows_from(0, 50)}, [1.0], seed=seed), range(50))]

    assert order(0, "a") == order(0, "a")
    assert len({tuple(order(seed, name)) for seed, name in itertools.product(range(3), "ab")}) == 6


def test_epochs_longer_than_a_block_of_the_cache():
    rows = rows_from(0, 2500)
    mixture = Mixture({"a": rows}, [1.0])
    _, epoch, row = mixture.locate(np.arange(5000))
    assert epoch.tolist() == [0] * 2500 + [1] * 2500
    assert sorted(row[:2500].tolist()) == sorted(row[2500:].tolist()) == list(range(2500))


def test_a_sample_does_not_depend_on_its_batch():
    mixture = Mixture({"a": rows_from(0, 30), "b": rows_from(1000, 7)}, [2.0, 1.0], seed=1)
    whole = drawn(mixture, range(100))
    assert drawn(mixture, [80, 3, 3, 41]) == [whole[80], whole[3], whole[3], whole[41]]
    for name, array in mixture[41].items():
        np.testing.assert_array_equal(array, mixture.batch(np.arange(100))[name][41])


def test_far_samples_are_as_quick_as_near_ones():
    mixture = Mixture({"a": rows_from(0, 100), "b": rows_from(1000, 7)}, [0.9, 0.1])
    mixture.batch(np.arange(32))
    began = time.perf_counter()
    mixture.batch(10**12 + np.arange(32))
    assert time.perf_counter() - began < 0.5
    source, epoch, row = mixture.locate(10**12 + np.arange(1000))
    assert collections.Counter(source.tolist()) == {0: 900, 1: 100}
    assert epoch[source == 0][0] == pytest.approx(0.9e12 / 100, rel=1e-6)
    assert row[source == 0].max() < 100 and row[source == 1].max() < 7


# ----------------------------------------------------------------------------------------------------- shares


def test_interleaving_is_even_and_complete():
    weights = [0.5, 0.2, 0.2999, 0.0001]
    source, number = interleave(np.arange(200_000), whole_shares(weights))
    for index, weight in enumerate(weights):
        assert number[source == index].tolist() == list(range((source == index).sum()))
        so_far = np.cumsum(source == index)
        assert np.abs(so_far - weight * np.arange(1, 200_001)).max() <= len(weights)


def test_interleaving_two_to_one():
    assert interleave(np.arange(6), (2, 1))[0].tolist().count(0) == 4
    assert interleave(np.arange(3), (1,))[1].tolist() == [0, 1, 2]


def test_far_numbers_are_exact():
    shares = whole_shares([0.3, 0.7])
    for sample in (10**12, 2**62):
        source, number = interleave(np.array([sample]), shares)
        before = sample * shares[1] // SHARE_UNITS  # by Python's integers
        assert number[0] == (sample - before if source[0] == 0 else before)


@pytest.mark.parametrize("weights", [[1.0], [1, 1, 1], [0.7, 0.3], [1e-12, 1.0], [3.0] * 1000])
def test_whole_shares_add_up(weights):
    shares = whole_shares(weights)
    assert sum(shares) == SHARE_UNITS and min(shares) >= 1
    np.testing.assert_allclose(np.array(shares) / SHARE_UNITS, np.array(weights) / sum(weights), atol=1e-6)


def test_weights_are_shares_of_tokens():
    mixture = Mixture({"a": rows_from(0, 50), "b": rows_from(1000, 7), "c": rows_from(2000, 90)}, [6, 1, 3])
    counts = collections.Counter(name for name, _ in drawn(mixture, range(10_000)))
    assert all(abs(counts[name] - share) <= 2 for name, share in (("a", 6000), ("b", 1000), ("c", 3000)))
    per_row = collections.Counter(drawn(mixture, range(10_000)))
    for name, rows in mixture.sources.items():  # repeated evenly: no row is more than one epoch ahead
        times = [per_row[name, row] for row in range(len(rows))]
        assert max(times) - min(times) <= 1
    assert mixture.epoch_rows == 147


def test_a_source_with_padding_gets_more_rows():
    documents = np.arange(0, 301, 3)  # of 3 tokens: 2 positions of a row of 3
    split = TokenSplit(np.zeros(300, np.uint16), documents, "b")
    padded = PlannedRows(split, 3, make_plan(documents, 3, "first_fit", "error"))
    assert padded.fill == pytest.approx(2 / 3)
    full = ConcatRows(TokenSplit(np.ones(301, np.uint16), np.array([0, 301]), "a"), 3, True)
    mixture = Mixture({"a": full, "b": padded}, [1, 1])
    batch = mixture.batch(np.arange(5000))
    real = batch["segment_ids"] > 0
    of_a = (batch["tokens"] == 1) & real
    assert of_a.sum() / real.sum() == pytest.approx(0.5, abs=1e-3)


def test_temperature_evens_out():
    shares = [
        Mixture({"a": rows_from(0, 5), "b": rows_from(1000, 5)}, [9, 1], temperature=t).token_shares for t in (1, 2)
    ]
    assert shares == [pytest.approx({"a": 0.9, "b": 0.1}), pytest.approx({"a": 0.75, "b": 0.25})]


def test_crops_are_never_repeated():
    split = TokenSplit(np.arange(100_000).astype(np.uint32), np.array([0, 100_000]), "a")
    mixture = Mixture({"a": CropRows(split, LENGTH, False, None, 0, "a")}, [1.0])
    first = mixture.batch(np.arange(1000))["tokens"][:, 0]
    later = mixture.batch(mixture.epoch_rows + np.arange(1000))["tokens"][:, 0]
    assert len(set(first.tolist())) > 980 and not (first == later).any()


# ------------------------------------------------------------------------------------------------ from stores


class FakeStore:
    def __init__(self, name, tokens, weight=1.0, fingerprint="f", token_bytes=None):
        self.name, self.weight, self.folder, self.tokenizer = name, weight, "", self
        self._split = TokenSplit(np.arange(tokens).astype(np.uint16), np.array([0, tokens]), fingerprint)
        self._token_bytes = token_bytes

    def split(self, name):
        return {"train": self._split}[name]

    def token_bytes(self):
        return self._token_bytes


def test_bytes_are_counted_for_all_sources_or_none():
    known, unknown = FakeStore("a", 100, token_bytes=np.ones(100, int)), FakeStore("b", 100)
    cfg = DataConfig(sequence_length=LENGTH)
    assert "target_bytes" in make_mixture([known], cfg, 0)[0]
    assert "target_bytes" not in make_mixture([known, unknown], cfg, 0)[0]


def facts(stores=None, seed=0, **changes):
    stores = stores or [FakeStore("a", 100), FakeStore("b", 100, weight=3)]
    cfg = DataConfig(
        **{"sequence_length": LENGTH, "mixture": {store.name: SourceConfig("x") for store in stores}} | changes
    )
    return order_facts(make_mixture(stores, cfg, seed), cfg, seed)


@pytest.mark.parametrize(
    "name, change",
    [
        ("seed", {"seed": 1}),
        ("data.sequence_length", {"sequence_length": 5}),
        ("data.packing", {"packing": "crops"}),
        ("data.mask_documents", {"mask_documents": False}),
        ("data.shuffle", {"shuffle": False}),
        ("share of source b", {"mixture_temperature": 2.0}),
        ("share of source b", {"stores": [FakeStore("a", 100), FakeStore("b", 100)]}),
        ("tokens of source a", {"stores": [FakeStore("a", 100, fingerprint="g"), FakeStore("b", 100, weight=3)]}),
        ("sources", {"stores": [FakeStore("b", 100, weight=3), FakeStore("a", 100)]}),
    ],
)
def test_what_decides_the_order_is_in_the_fingerprint(name, change):
    before, after = facts(), facts(**change)
    assert before[name] != after[name]
    assert fingerprint(before) != fingerprint(after)


def test_what_does_not_decide_the_order_is_not():
    assert facts() == facts(prefetch=2, workers=3, path="elsewhere", long_documents="drop")
    assert len(fingerprint(facts())) == 32
