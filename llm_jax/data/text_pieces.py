"""Texts and pairs of texts as a model reads them: special tokens, token types, cutting, and where pieces come from."""

import dataclasses
import json
from collections.abc import Sequence
from typing import Any

import numpy as np

from llm_jax.data.tokenizers import JsonTokenizer, Tokenizer
from llm_jax.errors import ConfigError

MASKS, STARTS, ENDS, PADS = (
    ("[MASK]", "<mask>"), ("[CLS]", "<s>", "<cls>"), ("[SEP]", "</s>", "<sep>"), ("[PAD]", "<pad>"),
)  # fmt: skip


@dataclasses.dataclass(frozen=True, eq=False)
class Pieces:
    """One encoded text or pair.

    Attributes:
      tokens: (n,) int32 ids with the special tokens.
      types: (n,) int32, 1 in the second text where the model tells the two apart.
      sequence: (n,) int32: 0 in the first text, 1 in the second, -1 at special tokens.
      words: (n,) int32, number of the word (of texts given as words), -1 at special tokens.
      spans: (n, 2) int32, first character and the one behind the last, in the piece's own text.
    """

    tokens: np.ndarray
    types: np.ndarray
    sequence: np.ndarray
    words: np.ndarray
    spans: np.ndarray


def special_id(tokenizer: Tokenizer, names: Sequence[str], purpose: str) -> int:
    """The id of the first of `names` that the tokenizer has. Raises ConfigError where it has none."""
    known = getattr(tokenizer, "special_ids", {})
    found = next((known[name] for name in names if name in known), None)
    if found is None:
        raise ConfigError(
            f"data.tokenizer: it has no special token {' or '.join(names)}, which {purpose} needs; give the "
            "tokenizer.json of an encoder (BERT, RoBERTa, ...), or data.tokenizer=wordpiece, which is trained here"
        )
    return found


class TextEncoder:
    """Encodes texts and pairs as the tokenizer's own template says, cut to `length` tokens.

    Args:
      tokenizer: of an encoder; a template for the special tokens is part of its file.
      length: tokens of a row, special ones included.
      stride: tokens that two windows share where the second text is longer than a row; 0: it is cut.
    """

    def __init__(self, tokenizer: Tokenizer, length: int, stride: int = 0):
        special_id(tokenizer, STARTS, "a task on whole texts")
        if not isinstance(tokenizer, JsonTokenizer) or not json.loads(tokenizer.content).get("post_processor"):
            raise ConfigError(
                "data.tokenizer: its file has no template for the special tokens of a text (post_processor); give the "
                "tokenizer.json of an encoder (BERT, RoBERTa, ...)"
            )
        import tokenizers

        library = tokenizers.Tokenizer.from_str(tokenizer.content)
        library.no_padding()
        library.encode_special_tokens = True  # a text may quote "[SEP]"
        if stride:
            room = length - library.num_special_tokens_to_add(True)
            if stride >= room:
                raise ConfigError(
                    f"data.stride = {stride}: windows of data.sequence_length = {length} tokens that share so many "
                    f"would not move on; give less than {room}"
                )
            library.enable_truncation(length, stride=stride, strategy="only_second")
        else:
            library.enable_truncation(length, strategy="longest_first")
        self._library, self.length = library, length

    def encode(self, texts: Sequence[str | tuple[str, str]]) -> list[Pieces]:
        return [pieces(encoding) for encoding in self._library.encode_batch(list(texts))]

    def encode_words(self, texts: Sequence[Sequence[str]]) -> list[Pieces]:
        """Of texts that are split into words already."""
        return [pieces(encoding) for encoding in self._library.encode_batch(list(texts), is_pretokenized=True)]

    def windows(self, question: str, context: str) -> list[Pieces]:
        """The question with each window on the context, which overlap by the stride."""
        first = self._library.encode(question, context)
        return [pieces(encoding) for encoding in (first, *first.overflowing)]


def pieces(encoding: Any) -> Pieces:
    absent = lambda values: [-1 if value is None else value for value in values]  # noqa: E731
    as_int = lambda values: np.array(values, np.int32)  # noqa: E731
    sequence, words = absent(encoding.sequence_ids), absent(encoding.word_ids)
    spans = as_int(encoding.offsets).reshape(-1, 2)
    return Pieces(as_int(encoding.ids), as_int(encoding.type_ids), as_int(sequence), as_int(words), spans)
