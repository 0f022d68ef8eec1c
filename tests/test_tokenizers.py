"""Round trips, byte counts that add up exactly, and folders that restore a tokenizer by themselves."""

import io
import json
import subprocess
import sys

import numpy as np
import pytest

from llm_jax.data import tokenizers
from llm_jax.data.tokenizers import ByteTokenizer, CharTokenizer, JsonTokenizer, NoTokenizer
from llm_jax.errors import ConfigError, DataError

TEXTS = [
    "To be, or not to be\n\n    that is  the question.\r\n" * 20,
    "na\u00efve caf\u00e9 \u65e5\u672c\u8a9e \U0001f642\U0001f44d\U0001f3fd\tx_1\n_y 12\n34\n",
    "a <|endoftext|> that is only quoted",
    "",
    " ",
]


@pytest.fixture(scope="module")
def bpe() -> JsonTokenizer:
    return tokenizers.train_bpe(TEXTS, 300)


def library_json(tokenizer, **changes) -> str:
    spec = json.loads(tokenizer.to_str()) | changes
    return json.dumps(spec)


def gpt2_like(**changes) -> str:
    """A tokenizer.json with all bytes, a few merges and nothing special."""
    return library_json(tokenizers.train_bpe(TEXTS, 280)._library, **{"added_tokens": []} | changes)


def every_kind(bpe):
    return [ByteTokenizer(), CharTokenizer("".join(TEXTS), True), CharTokenizer("".join(TEXTS), False), bpe]


def test_round_trips_and_byte_counts(bpe):
    for tokenizer in every_kind(bpe):
        table = tokenizer.token_bytes()
        assert table.shape == (tokenizer.vocab_size,) and table.dtype == np.int32
        for text, ids in zip(TEXTS, tokenizer.encode(TEXTS), strict=True):
            assert ids.dtype == np.uint16
            assert tokenizer.decode(ids) == tokenizer.decode(ids.tolist()) == text
            assert tokenizer.decode_bytes(ids) == text.encode()
            assert table[ids].sum() == len(text.encode())
            assert tokenizer.eos_id is None or tokenizer.eos_id not in ids
            assert b"".join(tokenizer.decode_bytes([id]) for id in ids) == text.encode()


def test_eos(bpe):
    byte, with_eos, without, trained = every_kind(bpe)
    assert (byte.vocab_size, byte.eos_id) == (257, 256)
    assert with_eos.eos_id == with_eos.vocab_size - 1 == without.vocab_size
    assert without.eos_id is None
    assert trained.eos_id == 0
    for tokenizer in (byte, with_eos, trained):
        assert tokenizer.decode([tokenizer.eos_id]) == ""
        assert tokenizer.token_bytes()[tokenizer.eos_id] == 0


def test_half_a_character_and_unknown_ids(bpe):
    assert ByteTokenizer().decode([0xC3]) == "\ufffd"
    for tokenizer in every_kind(bpe):
        assert tokenizer.decode([tokenizer.vocab_size + 5]) == "\ufffd"


def test_byte_ids_are_bytes():
    assert ByteTokenizer().encode(["\u00e9\x00"])[0].tolist() == [0xC3, 0xA9, 0]


def test_char_ids_are_in_code_point_order():
    tokenizer = CharTokenizer("hello\n", with_eos=True)
    assert tokenizer.characters == "\nehlo"
    assert tokenizer.encode(["hole"])[0].tolist() == [2, 4, 3, 1]
    for text, name in (("hex", "'x' (U+0078, position 2)"), ("\U0001f642", "U+1F642, position 0")):
        with pytest.raises(DataError) as caught:
            tokenizer.encode(["ok"[:0], text])
        assert name in str(caught.value)
    with pytest.raises(DataError, match="no text"):
        CharTokenizer("", with_eos=True)


def test_training_is_deterministic_across_processes(bpe):
    script = (
        "import json, sys; from llm_jax.data import tokenizers\n"
        "print(tokenizers.train_bpe(json.load(sys.stdin), 300).identity())"
    )
    run = subprocess.run(
        [sys.executable, "-c", script], input=json.dumps(TEXTS), capture_output=True, text=True, check=True
    )
    assert run.stdout.strip() == bpe.identity()


def test_training_on_little_text_gives_fewer_tokens():
    assert tokenizers.train_bpe(["ab"], 4096).vocab_size == 257


CL100K = (  # how recent byte-level tokenizers split text
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@pytest.mark.parametrize("pattern", ["gpt2", "cl100k"])
def test_cutting_long_texts_does_not_change_ids(bpe, pattern):
    split = {"type": "Split", "pattern": {"Regex": CL100K}, "behavior": "Isolated", "invert": False}
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    if pattern == "cl100k":
        both = {"type": "Sequence", "pretokenizers": [split, level]}
        bpe = JsonTokenizer(library_json(bpe._library, pre_tokenizer=both))
        assert bpe.token_bytes() is not None
    rng = np.random.default_rng(0)
    alphabet = [*"abcdefgh_019 \n\n\n.,'\t", " the", "\r\n", "\u00e9", "\u65e5", "n't", "}\n/"]
    text = "".join(rng.choice(alphabet, 150_000))
    whole = np.array(bpe._library.encode(text, add_special_tokens=False).ids)
    assert bpe._lines_are_apart and len(list(tokenizers.line_pieces(text))) > 2
    assert "".join(tokenizers.line_pieces(text)) == text
    assert np.array_equal(bpe.encode([text])[0], whole)


def test_texts_without_safe_cuts_stay_whole():
    spec = json.loads(gpt2_like())
    spec["pre_tokenizer"] = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    assert not JsonTokenizer(json.dumps(spec))._lines_are_apart
    assert JsonTokenizer(gpt2_like())._lines_are_apart


@pytest.mark.parametrize("name", ["</s>", "<|end_of_text|>", "<eos>", "<|im_end|>"])
def test_the_usual_names_of_eos(name):
    token = {"id": 999, "content": name, "special": True, "single_word": False}
    token |= {"lstrip": False, "rstrip": False, "normalized": False}
    tokenizer = JsonTokenizer(gpt2_like(added_tokens=[token]))
    assert tokenizer.eos_id == tokenizer._library.token_to_id(name)


def test_a_tokenizer_json_without_eos():
    """A name in the vocabulary that text could spell is not a mark."""
    assert "<|endoftext|>" in json.loads(gpt2_like())["model"]["vocab"]
    assert JsonTokenizer(gpt2_like()).eos_id is None


def test_settings_inside_a_tokenizer_json_do_not_change_data():
    truncation = {"direction": "Right", "max_length": 3, "strategy": "LongestFirst", "stride": 0}
    padding = {"strategy": {"Fixed": 9}, "direction": "Right", "pad_to_multiple_of": None}
    padding |= {"pad_id": 0, "pad_type_id": 0, "pad_token": "!"}
    tokenizer = JsonTokenizer(gpt2_like(truncation=truncation, padding=padding))
    assert [tokenizer.decode(ids) for ids in tokenizer.encode(TEXTS)] == TEXTS


def test_byte_counts_are_only_promised_where_exact():
    assert JsonTokenizer(gpt2_like()).token_bytes() is not None
    assert JsonTokenizer(gpt2_like(normalizer={"type": "NFC"})).token_bytes() is None
    prefix = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True}
    assert JsonTokenizer(gpt2_like(pre_tokenizer=prefix)).token_bytes() is None


def test_a_metaspace_tokenizer_streams_with_its_spaces():
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    vocab = {"<unk>": 0, "</s>": 1, "<0xC3>": 2, "<0xA9>": 3, "\u2581a": 4, "b": 5, "\u2581": 6}
    library = Tokenizer(models.BPE(vocab, [], byte_fallback=True, unk_token="<unk>"))
    library.pre_tokenizer = pre_tokenizers.Metaspace()
    library.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()])
    tokenizer = JsonTokenizer(library.to_str())
    assert tokenizer.decode([4, 5, 6, 2, 3]) == " ab \u00e9"
    assert tokenizer.decode_bytes([2]) == b"\xc3"
    assert tokenizer.token_bytes() is None


def test_a_wordpiece_tokenizer():
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    library = Tokenizer(models.WordPiece({"[UNK]": 0, "play": 1, "##ing": 2, "on": 3}, unk_token="[UNK]"))
    library.pre_tokenizer = pre_tokenizers.Whitespace()
    library.decoder = decoders.WordPiece()
    tokenizer = JsonTokenizer(library.to_str())
    assert tokenizer.encode(["playing on"])[0].tolist() == [1, 2, 3]
    assert tokenizer.decode([1, 2, 3]) == " playing on"


def test_sentencepiece(tmp_path):
    sentencepiece = pytest.importorskip("sentencepiece", reason="needs the library sentencepiece (extra: hf)")
    model = io.BytesIO()
    sentences = iter(["the cat sat on the mat", "a dog and a cat", "the dog sat"] * 50)
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=sentences, model_writer=model, vocab_size=290, byte_fallback=True, hard_vocab_limit=False,
        minloglevel=2,
    )  # fmt: skip
    path = tmp_path / "some.model"
    path.write_bytes(model.getvalue())
    tokenizer = tokenizers.read(str(path))
    assert tokenizer.eos_id == 2
    assert tokenizer.token_bytes() is None
    (ids,) = tokenizer.encode(["the dog \u00e9"])
    assert tokenizer.decode(ids) == " the dog \u00e9"
    assert tokenizer.decode([tokenizer.eos_id]) == ""
    tokenizer.save(tmp_path / "saved")
    assert tokenizers.load(tmp_path / "saved").identity() == tokenizer.identity()
    (tmp_path / "bad.model").write_bytes(b"nonsense")
    with pytest.raises(DataError, match="bad.model is not a SentencePiece model"):
        tokenizers.read(str(tmp_path / "bad.model"))


def test_saved_folders_restore_every_kind(tmp_path, bpe):
    identities = set()
    for number, tokenizer in enumerate([*every_kind(bpe), NoTokenizer(50257)]):
        tokenizer.save(tmp_path / str(number))
        restored = tokenizers.load(tmp_path / str(number))
        assert type(restored) is type(tokenizer)
        assert (restored.vocab_size, restored.eos_id) == (tokenizer.vocab_size, tokenizer.eos_id)
        assert restored.identity() == tokenizer.identity()
        if tokenizer.kind != "none":
            assert [a.tolist() for a in restored.encode(TEXTS)] == [a.tolist() for a in tokenizer.encode(TEXTS)]
        identities.add(tokenizer.identity())
    assert len(identities) == 5


def test_a_bare_tokenizer_json_is_enough(tmp_path, bpe):
    bpe.save(tmp_path)
    (tmp_path / tokenizers.INFO).unlink()
    for path in (tmp_path, tmp_path / "tokenizer.json"):
        assert tokenizers.read(str(path)).identity() == bpe.identity()
        assert len(tokenizers.content_hash(str(path))) == 32


def test_no_tokenizer_has_ids_but_no_text():
    tokenizer = NoTokenizer(10)
    assert tokenizer.decode([3, 9]) == "<3><9>"
    with pytest.raises(DataError, match="no tokenizer"):
        tokenizer.encode(["x"])


def test_bad_tokenizers_are_named(tmp_path, bpe):
    with pytest.raises(ConfigError, match="data.tokenizer='gpt2' is neither"):
        tokenizers.read("gpt2")
    for content, words in ((b"", "is empty"), (b"{}", "not a tokenizer.json"), (b"\xff", "not UTF-8")):
        path = tmp_path / "tokenizer.json"
        path.write_bytes(content)
        with pytest.raises(DataError, match=words) as caught:
            tokenizers.read(str(path))
        assert str(path) in str(caught.value)
    with pytest.raises(DataError, match="holds no tokenizer"):
        tokenizers.load(tmp_path / "nowhere")


def test_a_changed_tokenizer_is_noticed(tmp_path, bpe):
    bpe.save(tmp_path)
    path = tmp_path / "tokenizer.json"
    path.write_text(path.read_text().replace("<|endoftext|>", "<|endoftext!>"))
    with pytest.raises(DataError, match="hash differs"):
        tokenizers.load(tmp_path)
    (tmp_path / tokenizers.INFO).write_text('{"kind": "byte"')
    with pytest.raises(DataError, match="damaged"):
        tokenizers.load(tmp_path)
