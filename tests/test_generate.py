"""Text from prompts: the cache against full passes, rows against the same rows alone, stops, streams, long texts."""

import dataclasses
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import QUICK, build, decoder, mesh_layout, numbers

from llm_jax.config import GenerateConfig, check, from_dict
from llm_jax.errors import ConfigError, UserError
from llm_jax.generation import generate
from llm_jax.generation.generate import Generator, Row
from llm_jax.sharding import Layout

LETTERS = "abcdefghijklmnopqrstuvwxyzABCD"  # the 30 tokens of the tiny models


class Letters:
    """A character for each token. `eos_id` is never in a text."""

    def __init__(self, eos_id=None):
        self.eos_id = eos_id

    def encode(self, texts):
        return [np.array([LETTERS.index(letter) for letter in text], np.uint16) for text in texts]

    def decode_bytes(self, ids):
        return "".join(LETTERS[i] for i in ids).encode()


GREEDY = GenerateConfig(temperature=0.0, max_tokens=11)

# --------------------------------------------------------------------------------------- the cache is the model


def by_full_passes(model, params, prompts, count):
    """Greedy continuation without a cache: the whole text is read again for every token."""
    apply = jax.jit(lambda tokens: model.apply(params, tokens), compiler_options=QUICK)
    rows = [list(ids) for ids in Letters().encode(prompts)]
    for _ in range(count):
        tokens = np.zeros((len(rows), model.cfg.max_length), np.int32)
        for number, row in enumerate(rows):
            tokens[number, : len(row)] = row
        logits = np.asarray(apply(tokens))
        for number, row in enumerate(rows):
            row.append(int(logits[number, len(row) - 1, : model.cfg.vocab_size].argmax()))
    return ["".join(LETTERS[i] for i in row[len(prompt) :]) for row, prompt in zip(rows, prompts, strict=True)]


@pytest.mark.parametrize(
    "changes",
    [
        dict(num_kv_heads=2),
        dict(positions="learned", norm="layernorm", bias="all", activation="gelu"),
        dict(positions="sinusoidal", num_kv_heads=1, vocab_multiple=32),
        dict(positions="relative", relative_buckets=8, relative_max_distance=12),
        dict(positions="none", sliding_window=3, qk_norm="head"),
        dict(sliding_window=4, scan_layers=False, attention_kernel="xla"),
    ],
    ids=str,
)
def test_the_cache_gives_what_full_passes_give(changes):
    """Token for token, for prompts of different lengths in one batch, up to the end of the context."""
    model = build(decoder(**changes))
    params = numbers(model, scale=0.5)
    prompts = ["hello", "b", "cdc"]
    expected = by_full_passes(model, params, prompts, 11)
    assert Generator(model, params, Letters())(prompts, GREEDY) == expected
    assert len(set("".join(expected))) > 3  # and says more than one thing


def test_padded_ids_are_never_drawn():
    """Also where the model keeps them in its softmax: no text has them."""
    model = build(decoder(vocab_size=3, vocab_multiple=32, padded_vocab_in_softmax=True))
    text = Generator(model, numbers(model), Letters())(["abc"] * 8, GenerateConfig(temperature=5.0, max_tokens=12))
    assert set("".join(text)) == set("abc")


@pytest.fixture(scope="module")
def tiny_generator():
    model = build(decoder(num_layers=1, scan_layers=False))
    return Generator(model, numbers(model, scale=0.7), Letters())


def test_rows_say_what_they_say_alone(tiny_generator):
    """Neither unequal prompts nor neighbours with a full context change a text longer than the context."""
    cfg = GenerateConfig(temperature=1.0, max_tokens=40)
    alone = tiny_generator(["hello"], cfg, seed=5)
    for neighbour in ("a", "abcdefghijklmno", "b" * 40):
        assert tiny_generator(["hello", neighbour], cfg, seed=5)[0] == alone[0]


def test_text_longer_than_the_context(tiny_generator):
    """A full context is cut to its last half, 8 tokens of 16, and goes on from there."""
    model, params = tiny_generator.model, tiny_generator.params
    text = tiny_generator(["hello"], dataclasses.replace(GREEDY, max_tokens=30))[0]
    whole = "hello" + text
    assert len(text) == 30
    cut = 5 + 12  # the 17th token is one too many to be read: it is the last of the 8 that the model goes on from
    assert by_full_passes(model, params, ["hello"], 11)[0] == text[:11]
    assert by_full_passes(model, params, [whole[cut - 8 : cut]], 8)[0] == text[12:20]


def test_long_prompts_keep_their_end(tiny_generator):
    model, params = tiny_generator.model, tiny_generator.params
    full = "abcdefghijklmnop"  # 16: fits, and one token more can be made from it
    one = dataclasses.replace(GREEDY, max_tokens=1)
    logits = model.apply(params, Letters().encode([full])[0][None].astype(np.int32))
    assert tiny_generator([full], one)[0] == LETTERS[int(logits[0, -1].argmax())]
    assert tiny_generator(["zzz" + full], one) == tiny_generator([full[8:]], one)


def test_the_same_seed_gives_the_same_text(tiny_generator):
    cfg = GenerateConfig(temperature=1.0, max_tokens=10)
    first = tiny_generator(["a", "a"], cfg, seed=1)
    assert tiny_generator(["a", "a"], cfg, seed=1) == first
    assert tiny_generator(["a", "a"], cfg, seed=2) != first
    assert first[0] != first[1]  # each row has its own stream
    assert tiny_generator(["a"], cfg, seed=2**32 - 1) != tiny_generator(["a"], cfg, seed=0)


def test_nothing_is_compiled_again_for_the_same_shapes(tiny_generator):
    """Neither for another prompt, stop or length of text, nor for new parameters of the same model."""
    tiny_generator(["abc"], GenerateConfig(max_tokens=10))
    sizes = generate._prefill._cache_size(), generate._decode._cache_size()
    model = build(tiny_generator.model.cfg)
    other = Generator(model, numbers(model, seed=1), Letters())
    other(["defg"], GenerateConfig(max_tokens=7, stop=("zz",), prompt="x"), seed=3)
    assert (generate._prefill._cache_size(), generate._decode._cache_size()) == sizes


def test_on_a_mesh_it_is_the_same(tiny_generator):
    """A batch that the mesh cannot split evenly too; and every process has the tokens."""
    layout = mesh_layout(2, 2, 2)
    model = build(tiny_generator.model.cfg, layout)
    params = jax.device_put(tiny_generator.params, layout.parameter_shardings(model.shapes(), model.axes()))
    assert Generator(model, params, Letters())(["hello"], GREEDY) == tiny_generator(["hello"], GREEDY)
    ids = np.zeros((3, 4), np.int32)
    positions = np.tile(np.arange(4, dtype=np.int32), (3, 1))
    lengths = np.full(3, 4, np.int32)
    token, _ = generate._prefill(model, GREEDY, 16, params, ids, positions, lengths, np.uint32(0), np.int32(0))
    assert token.is_fully_replicated


# ------------------------------------------------------------------------------------ what happens to the tokens


@dataclasses.dataclass(frozen=True)
class Script:
    """A model that says what its parameters hold: after a text of n tokens in row r comes params[r, n]."""

    vocab_size: int = 256
    cfg = SimpleNamespace(max_length=64, vocab_size=256)
    module = SimpleNamespace(layout=Layout())

    def apply_cached(self, params, cache, tokens, positions, cache_length):
        following = jnp.take_along_axis(params, jnp.minimum(positions + 1, params.shape[1] - 1), axis=1)
        return jax.nn.one_hot(following, self.vocab_size), cache


class Bytes:
    eos_id = 0

    def encode(self, texts):
        return [np.frombuffer(text.encode(), np.uint8).astype(np.uint16) for text in texts]

    def decode_bytes(self, ids):
        return bytes(ids)


def say(*texts, prompts=None, stop=(), max_tokens=40):
    """Continuations, and the pieces as they came, of prompts of one byte each that a model continues with `texts`."""
    prompts = prompts or ["?"] * len(texts)
    script = np.zeros((len(texts), 100), np.int32)
    for row, (prompt, text) in enumerate(zip(prompts, texts, strict=True)):
        written = list(prompt.encode() + (text if isinstance(text, bytes) else text.encode()))
        script[row, : len(written)] = written
    pieces = [[] for _ in texts]
    cfg = GenerateConfig(temperature=0.0, max_tokens=max_tokens, stop=stop)
    generator = Generator(Script(), script, Bytes(), default_prompt="?")
    found = generator(prompts, cfg, on_text=lambda row, piece: pieces[row].append(piece))
    assert ["".join(row) for row in pieces] == found
    assert all(piece for row in pieces for piece in row)
    return found, pieces


def test_the_end_token_ends_a_row():
    found, _ = say("one\0more", "three and", "\0")
    assert found == ["one", "three and", ""]


def test_max_tokens():
    assert say("abcdef", max_tokens=3)[0] == ["abc"]
    assert say("abcdef", max_tokens=0)[0] == [""]


@pytest.mark.parametrize(
    ("text", "stop", "expected"),
    [
        ("hello END more", ("END",), "hello "),
        ("hello END more", ("E", "END"), "hello "),
        ("hello EN", ("END",), "hello EN"),  # begun, never finished
        ("hello ENEND x", ("END",), "hello EN"),
        ("aaab tail", ("aab",), "a"),
        ("abababac tail", ("ababac",), "ab"),
        ("ENDless", ("END",), ""),
        ("x\n\ny", ("\n\n",), "x"),
        ("one two", ("two", "one"), ""),
        ("crème brûlée", ("û",), "crème br"),
        ("nothing", ("zzz",), "nothing"),
    ],
)
def test_stop_strings_across_token_borders(text, stop, expected):
    found, pieces = say(text, stop=stop)
    assert found == [expected]


def test_what_may_begin_a_stop_string_is_held_back():
    _, (pieces,) = say("abEfENDx", stop=("END",))
    assert pieces == ["a", "b", "Ef"]
    _, (pieces,) = say("abEN", stop=("END",))
    assert pieces == ["a", "b", "EN"]  # at the end it is text after all


def test_characters_of_several_bytes_come_whole():
    _, (pieces,) = say("né€😀!")
    assert pieces == ["n", "é", "€", "😀", "!"]
    _, (pieces,) = say("a😀".encode()[:3] + b"b")
    assert "".join(pieces) == "a\ufffdb"
    found, _ = say("€€", max_tokens=4)  # cut inside the second
    assert found == ["€\ufffd"]


def test_rows_stop_by_themselves():
    found, _ = say("ab STOP cd", "much longer text STOP", "to the end of all things", stop=("STOP",), max_tokens=21)
    assert found == ["ab ", "much longer text ", "to the end of all thi"]


def test_a_row_that_is_done_does_not_hold_up_the_others(monkeypatch):
    """The first row ends with a full context; the others must not be read anew for each of their tokens."""
    reads = []
    prefill = generate._prefill
    monkeypatch.setattr(generate, "_prefill", lambda *arguments: reads.append(1) or prefill(*arguments))
    found, _ = say("\0", "x" * 30, prompts=["p" * 64, "?"], max_tokens=30)
    assert found == ["", "x" * 30]
    assert len(reads) == 2


def test_prompts_without_tokens():
    assert Generator(Script(), np.zeros((0, 64), np.int32), Bytes())([], GREEDY) == []
    with pytest.raises(UserError, match="Prompt 2 .* has no tokens"):
        Generator(Script(), np.zeros((2, 64), np.int32), Bytes(), default_prompt="")(["a", ""], GREEDY)


def test_an_empty_prompt_is_the_default_one():
    script = np.zeros((1, 64), np.int32)
    script[0, :4] = list(b"\nabc")
    assert Generator(Script(), script, Bytes())([""], dataclasses.replace(GREEDY, max_tokens=3)) == ["abc"]


@pytest.mark.parametrize("seed", [-1, 2**32])
def test_seeds_have_32_bits(tiny_generator, seed):
    with pytest.raises(UserError, match=f"seed of the sampling is {seed}"):
        tiny_generator(["a"], GREEDY, seed=seed)


def test_an_empty_stop_string_is_refused(tiny_generator):
    """Every text holds it, so nothing would ever be said."""
    with pytest.raises(UserError, match="stop strings is empty"):
        tiny_generator(["a"], dataclasses.replace(GREEDY, stop=("x", "")))
    with pytest.raises(ConfigError, match="generate.stop"):
        check(from_dict({"train": {"steps": 1}, "generate": {"stop": ("",)}}))


def test_a_row_by_itself():
    row = Row([1], stop=("stop",))
    assert [row.add(piece) for piece in (b"a", b"s", b"t", b"x", b"sto")] == ["a", "", "", "stx", ""]
    assert row.finish() == "sto" and row.finish() == "" and row.done and row.text == "astxsto"
