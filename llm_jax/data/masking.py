"""Rows of masked language modelling: pairs of texts, the places to predict, and what stands there instead.

A batch is a dict of arrays, with B rows of T places, S texts a row and P predictions:

    tokens, segment_ids, positions, token_types   (B, T) int32    what the model sees; segment 0: padding
    masked_positions, masked_targets              (B, P) int32    where, and the token that stood there
    masked_weights                                (B, P) float32  1 where a prediction counts
    starts, pair_labels                           (B, S) int32    each text's first token; 1: its second part is random
    pair_weights                                  (B, S) float32  1 where there is a pair
    masked_draws                                  (B, P) float32  (task "replaced" alone) in [0, 1): by which the model
                                                                  draws what it puts in these places

The rules are BERT's (arXiv 1810.04805, section 3.1 and appendix A): 15 % of the tokens, of which 80 % become [MASK],
10 % a token drawn from the whole vocabulary, and 10 % stay. In task "replaced" 85 % of them become [MASK] and the rest
stay, as in ELECTRA's code (google-research/electra; the paper hides all). Every draw is a pure function of seed and
sample number.
"""

import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from llm_jax.config import tasks
from llm_jax.config.schema import DataConfig
from llm_jax.data.labelled_rows import MOST_TEXTS, pack
from llm_jax.data.mixture import BLOCK, shuffled_block
from llm_jax.data.packing import Rows
from llm_jax.data.sentence_pairs import VERSION, Pairs, find_sentences, make_pairs
from llm_jax.data.shuffle import stream_key, uniform
from llm_jax.data.text_pieces import ENDS, MASKS, STARTS, special_id
from llm_jax.data.tokenizers import Tokenizer
from llm_jax.errors import ConfigError


class MaskedRows:
    """The rows of one length of a split: `copies` passes over its documents, one after the other."""

    def __init__(self, split: Any, tokenizer: Tokenizer, cfg: DataConfig, length: int, seed: int):
        masking = cfg.masking
        self.length, self.masking, self.replaced = length, masking, cfg.task == "replaced"
        self.predictions = predictions(cfg, length)
        purpose = f"data.task={cfg.task}"
        self._cls, self._sep, self._mask = (
            special_id(tokenizer, names, purpose) for names in (STARTS, ENDS, MASKS)
        )  # fmt: skip
        if tokenizer.eos_id != self._sep:
            raise ConfigError("data.tokenizer: the token that ends a line (data.eos) is not the one that ends a text; "
                              "give the tokenizer.json of an encoder")  # fmt: skip
        self._vocab_size = tokenizer.vocab_size
        self._goes_on = tokenizer.continues_word() if masking.whole_words else None
        self._tokens = np.asarray(split.tokens)
        longest = 0 if masking.next_sentence else length - 2
        self._sentences = find_sentences(split.tokens, split.offsets, self._sep, longest)
        passes = [make_pairs(self._sentences, length, masking, seed, copy) for copy in range(masking.copies)]
        self._pairs = Pairs(*(np.concatenate([getattr(one, name) for one in passes]) for name in vars(passes[0])))
        self._members, self.ends = self._rows([len(one.lengths) for one in passes], cfg.pack_texts)
        self.most = max(map(len, self._members))
        self.filled = float(self._pairs.lengths.sum()) / (len(self) * length)

    def _rows(self, counts: list[int], packed: bool) -> tuple[list[list[int]], np.ndarray]:
        """The pairs of each row, and the first row behind each pass."""
        members: list[list[int]] = []
        ends, first = [], 0
        for count in counts:
            lengths = self._pairs.lengths[first : first + count]
            rows = pack(lengths, self.length, MOST_TEXTS) if packed else [[i] for i in range(count)]
            members += [[first + pair for pair in row] for row in rows]
            ends.append(len(members))
            first += count
        return members, np.array(ends)

    def __len__(self) -> int:
        """Rows of all passes together."""
        return len(self._members)

    def batch(self, numbers: np.ndarray, draws: np.ndarray, key: np.ndarray) -> Rows:
        """Rows by number; -1 is a row of padding.

        Args:
          numbers: (n,) of the rows.
          draws: (n,) int64, under which number each row's masks are drawn.
          key: of the draws.
        """
        rows = self._unmasked(numbers)
        candidates = (rows["segment_ids"] > 0) & (rows["tokens"] != self._cls) & (rows["tokens"] != self._sep)
        counts = (rows["segment_ids"] > 0).sum(1)
        places = np.arange(self.length)
        chance = lambda kind: uniform((draws[:, None] * 4 + kind) * self.length + places, key)  # noqa: E731
        goes_on = None if self._goes_on is None else self._goes_on[rows["tokens"]]
        chosen = choose(candidates, goes_on, self._wanted(counts), chance(0))
        masked_places(rows, chosen, self.predictions)
        if self.replaced:
            drawn_by = np.take_along_axis(chance(3), rows["masked_positions"], axis=1)
            # Multiples of 2**-23: their product with a total is below it in float32.
            rows["masked_draws"] = (np.floor(drawn_by * 2**23) / 2**23).astype(np.float32)
            seen = np.where(chosen & (chance(1) < 0.85), self._mask, rows["tokens"])
        else:
            drawn = np.minimum((chance(3) * self._vocab_size).astype(np.int32), self._vocab_size - 1)
            other = np.where(chance(2) < 0.5, rows["tokens"], drawn)
            seen = np.where(chosen, np.where(chance(1) < 0.8, self._mask, other), rows["tokens"])
        return rows | {"tokens": seen.astype(np.int32)}

    def _wanted(self, counts: np.ndarray) -> np.ndarray:
        """How many tokens of rows with so many are predicted; a half is rounded to even, as Python does."""
        return np.minimum(self.predictions, np.maximum(1, np.rint(counts * self.masking.rate))).astype(np.int64)

    def _unmasked(self, numbers: np.ndarray) -> Rows:
        shape, texts = (len(numbers), self.length), (len(numbers), self.most)
        rows = {name: np.zeros(shape, np.int32) for name in ("tokens", "segment_ids", "positions", "token_types")}
        rows |= {"starts": np.zeros(texts, np.int32), "pair_labels": np.zeros(texts, np.int32)}
        rows["pair_weights"] = np.zeros(texts, np.float32)
        for row, number in enumerate(numbers.tolist()):
            place = 0
            for slot, pair in enumerate(self._members[number] if number >= 0 else ()):
                tokens, types = self._text(pair)
                here = slice(place, place + len(tokens))
                rows["tokens"][row, here], rows["token_types"][row, here] = tokens, types
                rows["segment_ids"][row, here] = slot + 1
                rows["positions"][row, here] = np.arange(len(tokens))
                rows["starts"][row, slot] = place
                rows["pair_labels"][row, slot] = self._pairs.random[pair]
                rows["pair_weights"][row, slot] = self.masking.next_sentence
                place += len(tokens)
        return rows

    def _text(self, pair: int) -> tuple[np.ndarray, np.ndarray]:
        """[CLS] A [SEP] or [CLS] A [SEP] B [SEP], and its token types."""
        cut = self._pairs.cut[pair]
        a = self._part(self._pairs.first[pair], cut[0], cut[1])
        parts = [[self._cls], a, [self._sep]]
        if self.masking.next_sentence:
            parts += [self._part(self._pairs.second[pair], cut[2], cut[3]), [self._sep]]
        tokens = np.concatenate(parts).astype(np.int32)
        return tokens, (np.arange(len(tokens)) >= len(a) + 2).astype(np.int32)

    def _part(self, which: np.ndarray, front: int, back: int) -> np.ndarray:
        """The tokens of some neighbouring sentences without the ends between them, cut at both sides."""
        first, last = int(which[0]), int(which[1])
        tokens = self._tokens[self._sentences.starts[first] : self._sentences.ends[last - 1]]
        tokens = tokens[tokens != self._sep]
        return tokens[front : len(tokens) - back]


def predictions(cfg: DataConfig, length: int) -> int:
    """P: the places that a row of `length` tokens has for predictions."""
    return cfg.masking.max_predictions or math.ceil(cfg.masking.rate * length)


def choose(candidates: np.ndarray, goes_on: np.ndarray | None, wanted: np.ndarray, chance: np.ndarray) -> np.ndarray:
    """The places to predict.

    Groups of places (a word's pieces, or single places) are taken in random order; one that would exceed the number
    wanted is passed over.

    Args:
      candidates: (B, T) bool, places that may be chosen.
      goes_on: (B, T) bool, the piece belongs to the word of the candidate before; None: every piece is a group.
      wanted: (B,) places to choose, at most.
      chance: (B, T) random numbers in [0, 1).

    Returns:
      (B, T) bool.
    """
    if goes_on is None:
        rank = np.argsort(np.argsort(np.where(candidates, chance, 2.0), axis=1), axis=1)
        return candidates & (rank < wanted[:, None])
    batch, length = candidates.shape
    heads = candidates & ~goes_on
    heads[np.arange(batch), candidates.argmax(1)] |= candidates.any(1)  # the first piece has no word to go on with
    group = np.where(candidates, np.cumsum(heads, axis=1) - 1, length)  # of each place; the last: none
    sizes = np.zeros((batch, length + 1), np.int64)
    np.add.at(sizes, (np.arange(batch)[:, None], group), 1)
    score = np.full((batch, length + 1), 2.0)
    row, place = np.nonzero(heads)
    score[row, group[row, place]] = chance[row, place]
    order = np.argsort(score[:, :length], axis=1)
    taken, count, rows = np.zeros((batch, length + 1), bool), np.zeros(batch, np.int64), np.arange(batch)
    for rank in range(int(heads.sum(1).max(initial=0))):
        which = order[:, rank]
        size = sizes[rows, which]
        fits = (score[rows, which] < 2) & (count + size <= wanted)
        taken[rows, which] |= fits
        count += size * fits
    return taken[rows[:, None], group] & candidates


def masked_places(rows: Rows, chosen: np.ndarray, predictions: int) -> None:
    """Adds the features of the places to predict, in the row's order, filled up with places of no weight."""
    places = np.argsort(~chosen, axis=1, kind="stable")[:, :predictions]
    weights = np.take_along_axis(chosen, places, axis=1)
    rows["masked_positions"] = (places * weights).astype(np.int32)
    rows["masked_targets"] = (np.take_along_axis(rows["tokens"], places, axis=1) * weights).astype(np.int32)
    rows["masked_weights"] = weights.astype(np.float32)


# -------------------------------------------------------------------------------------------------- the stream


class MaskedStream:
    """The endless training stream: phases of rows of growing length, each epoch of each a permutation of its rows."""

    rows_a_sample = 1

    def __init__(self, store: Any, cfg: DataConfig, seed: int):
        self._phases = tasks.phases(cfg)
        split, tokenizer = store.split("train"), store.tokenizer
        self._rows = {length: MaskedRows(split, tokenizer, cfg, length, seed) for _, length in self._phases}
        self._name, self._seed, self._shuffle = store.name, seed, cfg.shuffle
        self._redraw = cfg.masking.redraw
        self.facts = {
            "order version": f"masked {VERSION}",
            "seed": str(seed),
            "data.task": cfg.task,
            "data.sequence_length": str(cfg.sequence_length),
            "data.shuffle": str(cfg.shuffle),
            "data.pack_texts": str(cfg.pack_texts),
            f"tokens of source {store.name}": split.fingerprint,
        }
        self.facts |= {f"data.masking.{name}": str(value) for name, value in vars(cfg.masking).items()}

    @property
    def epoch_rows(self) -> int:
        """Rows of one pass over the documents, in the longest phase's rows."""
        return int(self._rows[self._phases[-1][1]].ends[0])

    def batch(self, first: int, batch_size: int, local_rows: np.ndarray) -> Rows:
        """Some rows of the batch that begins with sample `first`."""
        begun, length = self._phase(first, batch_size)
        samples = first - begun + local_rows
        numbers = self._numbers(samples, length)
        draws = samples if self._redraw else numbers  # masks of a row that comes back are new, or come back too
        return self._rows[length].batch(numbers, draws, stream_key(self._seed, "masks", self._name, length))

    def _phase(self, sample: int, batch_size: int) -> tuple[int, int]:
        """The samples of the phases before that of `sample`, and the length of its rows."""
        begun = 0
        for steps, length in self._phases:
            if not steps or sample < begun + steps * batch_size:
                return begun, length
            begun += steps * batch_size
        raise AssertionError("the last phase has no end")

    def _numbers(self, samples: np.ndarray, length: int) -> np.ndarray:
        """The row of each sample: pass after pass, each shuffled by itself."""
        rows = self._rows[length]
        cycles, place = np.divmod(samples, len(rows))
        copies = np.searchsorted(rows.ends, place, "right")
        numbers = place.copy()
        if not self._shuffle:
            return numbers
        for cycle, copy in set(zip(cycles.tolist(), copies.tolist(), strict=True)):
            begin = int(rows.ends[copy - 1]) if copy else 0
            size = int(rows.ends[copy]) - begin
            blocks = (place - begin) // BLOCK
            epoch = cycle * len(rows.ends) + copy
            for block in set(blocks[(cycles == cycle) & (copies == copy)].tolist()):
                here = (cycles == cycle) & (copies == copy) & (blocks == block)
                order = shuffled_block(self._seed, f"{self._name} {length}", size, epoch, block)
                numbers[here] = begin + order[(place[here] - begin) % BLOCK]
        return numbers


def evaluation_batches(
    rows: MaskedRows, batch_size: int, local_rows: Callable[[int], np.ndarray], seed: int, batches: int = 0
) -> Iterator[Rows]:
    """All rows of the first pass over a split, always with the same masks; the last batch is filled up with padding."""
    mine, count = local_rows(batch_size), int(rows.ends[0])
    for number, first in enumerate(range(0, count, batch_size)):
        if batches and number >= batches:
            return
        numbers = np.where(first + mine < count, first + mine, -1)
        yield rows.batch(numbers, first + mine, stream_key(seed, "evaluation masks"))
