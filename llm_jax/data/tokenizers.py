"""Text to token ids and back: bytes, characters, byte-level BPE trained here, tokenizer.json, SentencePiece.

A tokenizer saves itself into a folder (a run's or a store's), and `load` restores it from that folder alone.
"""

import abc
import functools
import hashlib
import json
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np

from llm_jax.data.sources.documents import require
from llm_jax.errors import ConfigError, DataError

INFO = "tokenizer_info.json"
CHARACTERS_AN_ENTRY = 2_000  # of text that a BPE is trained on, at most: a larger vocabulary needs more
UNKNOWN = "\ufffd".encode()  # what an id beyond the vocabulary decodes to
END_OF_TEXT = "<|endoftext|>"
EOS_NAMES = (END_OF_TEXT, "</s>", "<|end_of_text|>", "<eos>", "<|im_end|>", "[SEP]")  # in this order of preference


class Tokenizer(abc.ABC):
    kind: str
    vocab_size: int  # every id is below
    eos_id: int | None

    @abc.abstractmethod
    def encode(self, texts: list[str]) -> list[np.ndarray]:
        """One array of ids (n,) a text, uint16 where vocab_size allows it, else uint32; never an eos by itself."""

    @abc.abstractmethod
    def decode_bytes(self, ids: Sequence[int]) -> bytes:
        """Bytes of the ids one after the other, nothing for special tokens. May end inside a character, so that text
        made token by token can be joined before it is decoded."""

    def decode(self, ids: Sequence[int]) -> str:
        """Text of the ids; what is not UTF-8 becomes U+FFFD."""
        return self.decode_bytes(ids).decode("utf-8", "replace")

    def token_bytes(self) -> np.ndarray | None:
        """(vocab_size,) int32: how many bytes of UTF-8 each id stands for, 0 for special tokens. Over the tokens of
        any text they add up to its length in bytes; None where the tokenizer cannot promise that."""
        return None

    @property
    def dtype(self) -> np.dtype:
        """The smallest unsigned type that holds every id."""
        return token_dtype(self.vocab_size)

    def save(self, folder: str | os.PathLike) -> None:
        os.makedirs(folder, exist_ok=True)
        info = {"kind": self.kind, "vocab_size": self.vocab_size, "eos_id": self.eos_id, "identity": self.identity()}
        with open(os.path.join(folder, INFO), "w", encoding="utf-8") as stream:
            json.dump(info | self._extra_info(), stream, indent=1)
        for name, content in self.files().items():
            with open(os.path.join(folder, name), "wb") as stream:
                stream.write(content)

    def identity(self) -> str:
        """Hash of everything that the ids depend on."""
        facts = json.dumps([self.kind, self.vocab_size, self.eos_id, self._extra_info()]).encode()
        return hashlib.blake2b(b"\0".join([facts, *self.files().values()]), digest_size=16).hexdigest()

    def _extra_info(self) -> dict[str, Any]:
        return {}

    def files(self) -> dict[str, bytes]:
        """Its content by file name; those that other libraries read."""
        return {}


def token_dtype(vocab_size: int) -> np.dtype:
    return np.dtype(np.uint16 if vocab_size <= 1 << 16 else np.uint32)


# --------------------------------------------------------------------------------- bytes, characters, bare ids


class ByteTokenizer(Tokenizer):
    """The bytes of UTF-8, and id 256 for the end of a document."""

    kind, vocab_size, eos_id = "byte", 257, 256

    def encode(self, texts: list[str]) -> list[np.ndarray]:
        return [np.frombuffer(text.encode(), np.uint8).astype(np.uint16) for text in texts]

    def decode_bytes(self, ids: Sequence[int]) -> bytes:
        return b"".join(bytes([id]) if id < 256 else UNKNOWN if id > 256 else b"" for id in ids)

    def token_bytes(self) -> np.ndarray:
        return (np.arange(self.vocab_size) < 256).astype(np.int32)


class CharTokenizer(Tokenizer):
    """The characters of a corpus in the order of their code points, then, if wanted, an id for a document's end."""

    kind = "char"

    def __init__(self, characters: Iterable[str], with_eos: bool):
        self.characters = "".join(sorted(set(characters)))
        if not self.characters:
            raise DataError("There is no text to take the characters of data.tokenizer=char from.")
        self.eos_id = len(self.characters) if with_eos else None
        self.vocab_size = len(self.characters) + with_eos
        self._codes = np.array([ord(c) for c in self.characters])
        self._ids = np.full(self._codes[-1] + 2, -1, np.int32)  # by code point; the last for all beyond
        self._ids[self._codes] = np.arange(len(self.characters))

    def encode(self, texts: list[str]) -> list[np.ndarray]:
        return [self._encode(text) for text in texts]

    def _encode(self, text: str) -> np.ndarray:
        codes = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), "<u4")
        ids = self._ids[np.minimum(codes, len(self._ids) - 1)]
        if len(ids) and ids.min() < 0:
            place = int(np.argmax(ids < 0))
            raise DataError(
                f"The character {text[place]!r} (U+{codes[place]:04X}, position {place}) is not among the "
                f"{len(self.characters)} that the tokenizer was made from: leave it out, or use data.tokenizer=byte."
            )
        return ids.astype(self.dtype)

    def decode_bytes(self, ids: Sequence[int]) -> bytes:
        count = len(self.characters)
        known = (self.characters[id].encode() if id < count else UNKNOWN for id in ids if id != self.eos_id)
        return b"".join(known)

    def token_bytes(self) -> np.ndarray:
        lengths = [len(c.encode()) for c in self.characters]
        return np.array(lengths + [0] * (self.vocab_size - len(lengths)), np.int32)

    def _extra_info(self) -> dict[str, Any]:
        return {"characters": self.characters}


class NoTokenizer(Tokenizer):
    """For token files of unknown origin: ids without a text."""

    kind, eos_id = "none", None

    def __init__(self, vocab_size: int):
        self.vocab_size = vocab_size

    def encode(self, texts: list[str]) -> list[np.ndarray]:
        raise DataError("This run has no tokenizer (data.tokenizer=none), so that no text can be turned into ids.")

    def decode_bytes(self, ids: Sequence[int]) -> bytes:
        return "".join(f"<{int(id)}>" for id in ids).encode()


# --------------------------------------------------------------------------------------------- tokenizer.json


class JsonTokenizer(Tokenizer):
    """A tokenizer.json of the `tokenizers` library. Names of special tokens inside a text are read as plain text."""

    kind = "tokenizer.json"

    def __init__(self, content: str, path: str = "tokenizer.json"):
        import tokenizers

        self._content = content
        try:
            self._library = tokenizers.Tokenizer.from_str(content)
            self._spec = json.loads(content)
        except Exception as error:  # the library raises bare Exceptions
            raise DataError(f"{path} is not a tokenizer.json ({error}): give one saved by `tokenizers`.") from error
        self._library.no_truncation()
        self._library.no_padding()
        self._library.encode_special_tokens = True  # a text may quote "<|endoftext|>"
        if getattr(self._library.model, "dropout", None):
            self._library.model.dropout = None  # BPE dropout would give other ids every time
        vocab = self._library.get_vocab(with_added_tokens=True)
        self.vocab_size = max(vocab.values()) + 1
        self._added = self._library.get_added_tokens_decoder()  # id -> token beside the model's vocabulary
        special = {token.content: id for id, token in self._added.items() if token.special}
        self.eos_id = next((special[name] for name in EOS_NAMES if name in special), None)
        self.special_ids = special  # {"[CLS]": 101, ...}
        self._lines_are_apart = not self._spec.get("normalizer") and self._pre_tokens_end_at_lines()

    @property
    def content(self) -> str:
        """The file's text."""
        return self._content

    def continues_word(self) -> np.ndarray:
        """(vocab_size,) bool: the pieces that go on with the word of the piece before ("##ing")."""
        begun = np.zeros(self.vocab_size, bool)
        for token, id in self._library.get_vocab(with_added_tokens=False).items():
            begun[id] = token.startswith("##")
        return begun

    def encode(self, texts: list[str]) -> list[np.ndarray]:
        pieces: list[str] = []
        counts = []
        for text in texts:
            cut = list(line_pieces(text)) if self._lines_are_apart else [text]
            pieces += cut
            counts.append(len(cut))
        ids = list(self._encode_batches(pieces))
        ends = np.cumsum(counts)
        return [np.concatenate(ids[end - count : end]) for end, count in zip(ends, counts, strict=True)]

    def _encode_batches(self, pieces: list[str]) -> Iterator[np.ndarray]:
        """In batches of a few million characters, as the library keeps about 100 bytes a token."""
        first = size = 0
        for last, piece in enumerate(pieces, 1):
            size += len(piece)
            if size >= 1 << 22 or last == len(pieces):
                for encoding in self._library.encode_batch_fast(pieces[first:last], add_special_tokens=False):
                    yield np.array(encoding.ids, self.dtype)
                first, size = last, 0

    def decode_bytes(self, ids: Sequence[int]) -> bytes:
        pieces = self._pieces
        return b"".join(pieces[id] if id < len(pieces) else UNKNOWN for id in ids)

    def token_bytes(self) -> np.ndarray | None:
        return np.array([len(piece) for piece in self._pieces], np.int32) if self._is_exact() else None

    def _is_exact(self) -> bool:
        """Whether the ids of a text spell its bytes: byte-level, nothing normalised, added or swallowed."""
        levels = [part for part in self._parts("pre_tokenizer") if part["type"] == "ByteLevel"]
        vocab = self._library.get_vocab(with_added_tokens=False)
        return (
            len(levels) == 1
            and not levels[0].get("add_prefix_space")
            and not self._spec.get("normalizer")
            and all(byte in vocab for byte in _byte_alphabet())
            and not any((t.lstrip or t.rstrip) and not t.special for t in self._added.values())
        )

    @functools.cached_property
    def _pieces(self) -> list[bytes]:
        """The bytes that each id adds to a text."""
        spell = self._speller()
        pieces = [UNKNOWN] * self.vocab_size
        for token, id in self._library.get_vocab(with_added_tokens=False).items():
            pieces[id] = spell(token)
        for id, token in self._added.items():
            pieces[id] = b"" if token.special else token.content.encode()
        return pieces

    def _speller(self):
        """token -> bytes, by what the decoder says."""
        kinds = [part["type"] for part in self._parts("decoder")]
        if "ByteLevel" in kinds:
            alphabet = _byte_alphabet()
            # A vocabulary may hold a token that is not spelt in the byte alphabet; it stands for itself.
            return lambda token: (
                bytes(alphabet[c] for c in token) if all(c in alphabet for c in token) else token.encode()
            )
        if "WordPiece" in kinds:
            return lambda token: token[2:].encode() if token.startswith("##") else b" " + token.encode()
        return _metaspace_bytes

    def _parts(self, stage: str) -> list[dict[str, Any]]:
        part = self._spec.get(stage)
        if not part:
            return []
        return part.get("pretokenizers") or part.get("decoders") or [part]

    def _pre_tokens_end_at_lines(self) -> bool:
        """Whether a text may be cut behind the line ends that `line_pieces` cuts at, without changing its ids."""
        split = self._library.pre_tokenizer
        if split is None or any("\n" in t.content or t.lstrip for t in self._added.values()):
            return False
        for left, right in (("ab\n", "cd"), ("a1\n", "2b"), ("x_\n", "_y"), ("é\n", "é")):
            parts = [piece for half in (left, right) for piece, _ in split.pre_tokenize_str(half)]
            if [piece for piece, _ in split.pre_tokenize_str(left + right)] != parts:
                return False
        return True

    def files(self) -> dict[str, bytes]:
        return {"tokenizer.json": self._content.encode()}


def train_wordpiece(texts: Iterable[str], vocab_size: int) -> JsonTokenizer:
    """An uncased WordPiece tokenizer with BERT's special tokens, [PAD] being id 0 (arXiv 1810.04805). The same texts
    give the same tokenizer. It has fewer than `vocab_size` tokens where the texts have too few repetitions."""
    from tokenizers import Tokenizer as LibraryTokenizer
    from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    library = LibraryTokenizer(models.WordPiece(unk_token="[UNK]"))
    library.normalizer = normalizers.BertNormalizer(lowercase=True)
    library.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    library.decoder = decoders.WordPiece()
    trainer = trainers.WordPieceTrainer(vocab_size=vocab_size, special_tokens=special, show_progress=False)
    library.train_from_iterator((piece for text in texts for piece in line_pieces(text)), trainer)
    library.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    return JsonTokenizer(library.to_str())


def train_bpe(texts: Iterable[str], vocab_size: int) -> JsonTokenizer:
    """A byte-level BPE (Radford et al. 2019, section 2.2) with <|endoftext|> as id 0. The same texts give the same
    tokenizer. It has fewer than `vocab_size` tokens where the texts have too few repetitions."""
    from tokenizers import Tokenizer as LibraryTokenizer
    from tokenizers import decoders, models, pre_tokenizers, trainers

    library = LibraryTokenizer(models.BPE())
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    library.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=2,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=sorted(_byte_alphabet()),
        show_progress=False,
    )
    library.train_from_iterator((piece for text in texts for piece in line_pieces(text)), trainer)
    return JsonTokenizer(library.to_str())


_LINE_END = re.compile(r"(?<=\w)\n(?=\w)")  # a newline between two words: no pre-token spans it


def line_pieces(text: str, size: int = 1 << 16) -> Iterator[str]:
    """The text in pieces of `size` characters or somewhat more, cut behind newlines between words: so that a long
    text is worked on by all cores."""
    start = 0
    while len(text) - start > size and (end := _LINE_END.search(text, start + size)):
        yield text[start : end.end()]
        start = end.end()
    yield text[start:]


@functools.cache
def _byte_alphabet() -> dict[str, int]:
    """GPT-2's spelling of bytes as printable characters."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + n): byte for n, byte in enumerate(others)}


def _metaspace_bytes(token: str) -> bytes:
    """SentencePiece's spelling: a low line for a space, <0x0A> for a byte."""
    if re.fullmatch(r"<0x[0-9A-F]{2}>", token):
        return bytes([int(token[3:5], 16)])
    return token.replace("\u2581", " ").encode()


# ---------------------------------------------------------------------------------------------- SentencePiece


class SentencePieceTokenizer(Tokenizer):
    """A SentencePiece .model (Kudo and Richardson 2018)."""

    kind = "sentencepiece"

    def __init__(self, content: bytes, path: str = "tokenizer.model"):
        sentencepiece = require("sentencepiece", "hf", f"Reading {path}")
        self._content = content
        try:
            self._library = sentencepiece.SentencePieceProcessor(model_proto=content)
        except RuntimeError as error:
            raise DataError(f"{path} is not a SentencePiece model ({error}).") from error
        self.vocab_size = self._library.vocab_size()
        self.eos_id = self._library.eos_id() if self._library.eos_id() >= 0 else None

    def encode(self, texts: list[str]) -> list[np.ndarray]:
        return [np.array(ids, self.dtype) for ids in self._library.encode(texts, out_type=int)]

    def decode_bytes(self, ids: Sequence[int]) -> bytes:
        return b"".join(self._piece(int(id)) for id in ids)

    def _piece(self, id: int) -> bytes:
        if id >= self.vocab_size or self._library.is_unknown(id):
            return UNKNOWN
        return b"" if self._library.is_control(id) else _metaspace_bytes(self._library.id_to_piece(id))

    def files(self) -> dict[str, bytes]:
        return {"tokenizer.model": self._content}


# -------------------------------------------------------------------------------------------------- by name


def read(path: str) -> Tokenizer:
    """The tokenizer of a tokenizer.json, a .model, or a folder that holds one."""
    path = os.path.expanduser(path)
    if os.path.isdir(path):
        return load(path)
    if not os.path.isfile(path):
        raise ConfigError(
            f"data.tokenizer={path!r} is neither byte, char, bpe, wordpiece, none nor a file: give the path of a "
            "tokenizer.json or of a SentencePiece .model."
        )
    with open(path, "rb") as stream:
        content = stream.read()
    if not content:
        raise DataError(f"{path} is empty: fetch the tokenizer again.")
    if path.endswith(".model"):
        return SentencePieceTokenizer(content, path)
    try:
        return JsonTokenizer(content.decode("utf-8"), path)
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not a tokenizer.json: it is not UTF-8 text.") from error


def content_hash(path: str) -> str:
    """Of the files that `read(path)` would read."""
    path = os.path.expanduser(path)
    names = [os.path.join(path, name) for name in (INFO, "tokenizer.json", "tokenizer.model")]
    digest = hashlib.blake2b(digest_size=16)
    for name in filter(os.path.isfile, names if os.path.isdir(path) else [path]):
        with open(name, "rb") as stream:
            digest.update(stream.read())
    return digest.hexdigest()


def load(folder: str | os.PathLike) -> Tokenizer:
    """What `save` wrote, or a folder with nothing but a tokenizer.json or tokenizer.model; checked by its hash."""
    folder = os.fspath(folder)
    info_path = os.path.join(folder, INFO)
    if not os.path.exists(info_path):
        for name in ("tokenizer.json", "tokenizer.model"):
            if os.path.isfile(os.path.join(folder, name)):
                return read(os.path.join(folder, name))
        raise DataError(f"{folder} holds no tokenizer: neither {INFO} nor tokenizer.json nor tokenizer.model.")
    try:
        with open(info_path, encoding="utf-8") as stream:
            info = json.load(stream)
        tokenizer = _restore(info, folder)
        intact = tokenizer.identity() == info["identity"]
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{info_path} is damaged ({type(error).__name__}: {error}).") from error
    if not intact:
        raise DataError(f"The tokenizer in {folder} is not the one that was saved there: its hash differs.")
    return tokenizer


def _restore(info: dict[str, Any], folder: str) -> Tokenizer:
    kind = info["kind"]
    if kind == "byte":
        return ByteTokenizer()
    if kind == "char":
        return CharTokenizer(info["characters"], info["eos_id"] is not None)
    if kind == "none":
        return NoTokenizer(info["vocab_size"])
    if kind in ("tokenizer.json", "sentencepiece"):
        return read(os.path.join(folder, "tokenizer.json" if kind == "tokenizer.json" else "tokenizer.model"))
    raise DataError(f"{folder}/{INFO} names the unknown kind {kind!r}: it was written by another version.")
