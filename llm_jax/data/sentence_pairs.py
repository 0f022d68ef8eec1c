"""How running text becomes the texts and pairs that BERT is pre-trained on, before anything is masked.

Documents are lines, one sentence each, every one followed by the end token (data.eos=lines). The rules are those of
BERT's create_pretraining_data.py (Devlin et al. 2018, arXiv 1810.04805, appendix A.2): sentences of a document are
gathered until a row is full; half of the rows then get their second part from another document.
"""

import dataclasses
import math

import numpy as np

from llm_jax.config.schema import MaskingConfig
from llm_jax.data.shuffle import stream_key
from llm_jax.errors import DataError

TRIES = 10  # to find another document
VERSION = 1  # of the rules and of their random draws


@dataclasses.dataclass(frozen=True, eq=False)
class Sentences:
    """Sentence j is tokens[starts[j]:ends[j]], without its end; document d has sentences bounds[d]:bounds[d + 1]."""

    starts: np.ndarray
    ends: np.ndarray
    bounds: np.ndarray


def find_sentences(tokens: np.ndarray, offsets: np.ndarray, end_id: int, longest: int = 0) -> Sentences:
    """The sentences of a store's split; empty ones and documents without any are left out.

    Args:
      longest: cut longer ones into parts of so many tokens; 0: leave them whole.
    """
    ends = np.flatnonzero(np.asarray(tokens) == end_id)
    starts = np.concatenate([[0], ends[:-1] + 1]) if ends.size else ends
    if longest:
        parts = np.maximum(-(-(ends - starts) // longest), 1)
        number = np.arange(parts.sum()) - np.repeat(np.cumsum(parts) - parts, parts)
        starts, ends = np.repeat(starts, parts) + number * longest, np.repeat(ends, parts)
        ends = np.minimum(starts + longest, ends)
    full = ends > starts
    starts, ends = starts[full], ends[full]
    document = np.searchsorted(offsets, starts, "right") - 1
    bounds = np.flatnonzero(np.diff(document, prepend=-1)) if document.size else np.zeros(0, np.int64)
    return Sentences(starts, ends, np.concatenate([bounds, [len(starts)]]))


@dataclasses.dataclass(frozen=True, eq=False)
class Pairs:
    """Row i: sentences first[i, 0]:first[i, 1] as A and second[i, 0]:second[i, 1] as B (empty: A alone).

    Attributes:
      first, second: (rows, 2) int64 sentence numbers.
      cut: (rows, 4) int32: tokens taken away from A's front and back, and from B's.
      random: (rows,) bool: B comes from another document.
      lengths: (rows,) int32: tokens with the special ones.
    """

    first: np.ndarray
    second: np.ndarray
    cut: np.ndarray
    random: np.ndarray
    lengths: np.ndarray


def make_pairs(sentences: Sentences, length: int, cfg: MaskingConfig, seed: int, copy: int) -> Pairs:
    """One pass over all documents.

    Args:
      length: T, tokens of a row.
      copy: number of the pass; each draws anew.

    Raises:
      DataError: there are not two documents to make pairs of.
    """
    if cfg.next_sentence and len(sentences.bounds) < 3:
        raise DataError(
            "data.masking.next_sentence needs at least two documents on each side of the validation split, and there "
            f"are {len(sentences.bounds) - 1}; set data.separator to what divides them (a blank line: '\\n\\n'), raise "
            "data.validation_fraction, or set next_sentence to False"
        )
    return _Maker(sentences, length, cfg, seed, copy).pairs()


class _Maker:
    """The walk over the documents, with its random numbers."""

    def __init__(self, sentences: Sentences, length: int, cfg: MaskingConfig, seed: int, copy: int):
        self.sizes = (sentences.ends - sentences.starts).tolist()
        self.bounds = sentences.bounds.tolist()
        self.next_sentence, self.short_rows = cfg.next_sentence, cfg.short_rows
        self.room = length - (3 if cfg.next_sentence else 2)  # [CLS], [SEP] and, of pairs, one more [SEP]
        self.special = length - self.room
        self.rng = np.random.default_rng(stream_key(seed, "pairs", length, copy))
        self.rows: list[tuple[int, ...]] = []

    def pairs(self) -> Pairs:
        for document in range(len(self.bounds) - 1):
            self._walk(document)
        if not self.rows:
            raise DataError("The training data hold not one sentence; write one a line")
        table = np.array(self.rows, np.int64)
        first, second, cut, random, lengths = np.split(table, [2, 4, 8, 9], axis=1)
        return Pairs(first, second, cut.astype(np.int32), random[:, 0] > 0, lengths[:, 0].astype(np.int32))

    def _walk(self, document: int) -> None:
        i, end = self.bounds[document], self.bounds[document + 1]
        target, begin, gathered = self._target(), i, 0
        while i < end:
            gathered += self.sizes[i]
            i += 1
            if i == end or gathered >= target:
                i -= self._row(document, begin, i, target)
                target, begin, gathered = self._target(), i, 0

    def _target(self) -> int:
        if self.short_rows and self.rng.random() < self.short_rows:
            return int(self.rng.integers(2, self.room, endpoint=True))
        return self.room

    def _row(self, document: int, begin: int, end: int, target: int) -> int:
        """Makes a row of the sentences begin:end of a document; returns how many of them it left unused."""
        count = end - begin
        if not self.next_sentence:
            self._add((begin, end), (0, 0), False)
            return 0
        split = begin + (1 if count == 1 else int(self.rng.integers(1, count)))
        if count > 1 and self.rng.random() >= 0.5:
            self._add((begin, split), (split, end), False)
            return 0
        wanted = target - sum(self.sizes[begin:split])
        self._add((begin, split), self._elsewhere(document, wanted), True)
        return end - split

    def _elsewhere(self, document: int, wanted: int) -> tuple[int, int]:
        """Sentences from a random place of another document on, until there are `wanted` tokens."""
        other = document
        for _ in range(TRIES):
            other = int(self.rng.integers(len(self.bounds) - 1))
            if other != document:
                break
        first = last = int(self.rng.integers(self.bounds[other], self.bounds[other + 1]))
        gathered = 0
        while last < self.bounds[other + 1]:
            gathered += self.sizes[last]
            last += 1
            if gathered >= wanted:
                break
        return first, last

    def _add(self, first: tuple[int, int], second: tuple[int, int], random: bool) -> None:
        a, b = sum(self.sizes[slice(*first)]), sum(self.sizes[slice(*second)])
        a_cut, b_cut = cuts(a, b, self.room)
        fronts = [int(self.rng.binomial(cut, 0.5)) if cut else 0 for cut in (a_cut, b_cut)]
        cut = (fronts[0], a_cut - fronts[0], fronts[1], b_cut - fronts[1])
        self.rows.append((*first, *second, *cut, int(random), a + b - a_cut - b_cut + self.special))


def cuts(a: int, b: int, room: int) -> tuple[int, int]:
    """Tokens to take from texts of a and b tokens until both fit: one at a time from the longer, in a tie from b."""
    over = max(a + b - room, 0)
    level = min(over, abs(a - b))  # the longer comes down to the other
    rest = over - level
    from_b = math.ceil(rest / 2)
    return (level + rest - from_b, from_b) if a > b else (rest - from_b, level + from_b)
