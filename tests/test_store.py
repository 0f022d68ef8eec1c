"""Stores hold exactly the documents' tokens, split stably; changing and damaging them is safe."""

import hashlib
import json
import lzma
import os
import pathlib
import sys
import time

import numpy as np
import pytest
from stored import MANY, content, jsonl

from llm_jax.config.schema import DataConfig, SourceConfig
from llm_jax.data import store as stores
from llm_jax.data import vocabulary, writer
from llm_jax.data.sources import open_source
from llm_jax.data.splits import held_out
from llm_jax.data.tokenizers import ByteTokenizer
from llm_jax.errors import ConfigError, DataError


@pytest.fixture
def prepare(tmp_path):
    """prepare(path, **keys) -> the store; its lines are in prepare.lines, its config in prepare.cfg."""

    def run(path, **keys):
        run.cfg = DataConfig(str(path), **{"cache_dir": str(tmp_path / "cache")} | keys)
        run.lines.clear()
        return stores.prepare(run.cfg, run.lines.append)[0]

    run.lines = []
    return run


def documents(store, side="train"):
    split = store.split(side)
    return [split.tokens[a:b].tolist() for a, b in zip(split.offsets[:-1], split.offsets[1:], strict=True)]


def decoded(store, side="train"):
    return [store.tokenizer.decode(ids) for ids in documents(store, side)]


# ------------------------------------------------------------------------------------------- tokens and layout


@pytest.mark.parametrize("eos, ends", [("append", ([97, 98, 256], [99, 256])), ("prepend", ([256, 97, 98], [256, 99]))])
def test_eos_belongs_to_its_document(tmp_path, prepare, eos, ends):
    store = prepare(jsonl(tmp_path / "a.jsonl", ["ab", "", "c"]), eos=eos, validation_fraction=0.0)
    assert documents(store) == list(ends)
    assert store.manifest["empty_documents"] == 1
    split = store.split("train")
    assert split.tokens.dtype == np.uint16 and split.offsets.dtype == np.int64
    assert store.manifest["splits"]["train"]["bytes"] == 3


def test_without_eos(tmp_path, prepare):
    store = prepare(jsonl(tmp_path / "a.jsonl", ["ab", "c"]), eos="none", validation_fraction=0.0)
    assert documents(store) == [[97, 98], [99]]


def test_no_validation_split(tmp_path, prepare):
    store = prepare(jsonl(tmp_path / "a.jsonl", MANY), validation_fraction=0.0)
    assert decoded(store) == MANY
    with pytest.raises(DataError, match="no validation split"):
        store.split("validation")
    assert not os.path.exists(os.path.join(store.folder, "validation.bin"))


@pytest.mark.parametrize("tokenizer", ["byte", "char", "bpe"])
def test_all_text_arrives_on_one_side_or_the_other(tmp_path, prepare, tokenizer, monkeypatch):
    monkeypatch.setattr(writer, "SHARD_UNITS", 300)
    store = prepare(jsonl(tmp_path / "a.jsonl", MANY), tokenizer=tokenizer, validation_fraction=0.2)
    train, validation = decoded(store), decoded(store, "validation")
    assert sorted(train + validation) == sorted(MANY)
    assert [t for t in MANY if t in set(train)] == train
    splits = store.manifest["splits"]
    assert splits["validation"]["bytes"] == sum(map(len, validation))
    assert splits["train"]["bytes"] == sum(map(len, train))
    table = store.tokenizer.token_bytes()
    assert table[store.split("train").tokens].sum() == splits["train"]["bytes"]
    assert 20 <= len(validation) <= 60


def test_shard_size_changes_nothing(tmp_path, prepare, monkeypatch):
    path = jsonl(tmp_path / "a.jsonl", MANY)
    one = content(prepare(path, tokenizer="bpe").folder)
    monkeypatch.setattr(writer, "SHARD_UNITS", 100)
    many = content(prepare(path, tokenizer="bpe", cache_dir=str(tmp_path / "other")).folder)
    assert one == many


def test_large_vocabularies_take_four_bytes(tmp_path, prepare):
    characters = "".join(map(chr, range(0x10000, 0x10000 + 66_000)))
    path = tmp_path / "a.txt"
    path.write_text(characters)
    store = prepare(path, tokenizer="char", eos="none", validation_fraction=0.0)
    assert store.split("train").tokens.dtype == np.uint32
    assert decoded(store) == [characters]


# ---------------------------------------------------------------------------------------------------- splitting


def test_a_single_text_is_split_at_its_tail_as_nanogpt_does(tmp_path, prepare):
    text = "".join(chr(97 + i % 26) for i in range(1234)) + "\n"
    path = tmp_path / "input.txt"
    path.write_text(text)
    store = prepare(path, tokenizer="char", eos="none", validation_fraction=0.1)
    border = int(len(text) * 0.9)
    assert decoded(store) == [text[:border]]
    assert decoded(store, "validation") == [text[border:]]
    assert store.tokenizer.vocab_size == 27


def test_the_tail_of_many_documents(tmp_path, prepare):
    store = prepare(
        jsonl(tmp_path / "a.jsonl", ["aaaa", "bbbb", "cc"]), validation_split="tail", validation_fraction=0.4
    )
    assert decoded(store) == ["aaaa", "bb"]
    assert decoded(store, "validation") == ["bb", "cc"]


def test_the_split_is_stable(tmp_path, prepare):
    """New documents do not move old ones, nor does another place on the disk, nor the tokenizer."""
    first = prepare(jsonl(tmp_path / "a.jsonl", MANY))
    (tmp_path / "elsewhere").mkdir()
    more = prepare(jsonl(tmp_path / "elsewhere/a.jsonl", MANY + ["new " * 5] * 50), tokenizer="bpe")
    assert set(decoded(first, "validation")) <= set(decoded(more, "validation"))
    assert set(decoded(first)) <= set(decoded(more))
    assert [held_out(group, 0.5) for group in ("a", "b", "c", "d")] == [True, False, True, False]


def test_one_document_on_one_side_falls_back_to_the_tail(tmp_path, prepare):
    store = prepare(jsonl(tmp_path / "a.jsonl", ["abcdefghij", "klmnopqrst"]), validation_fraction=0.03)
    assert store.manifest["split"] == {"kind": "tail", "fraction": 0.03, "border": 19}
    assert decoded(store, "validation") == ["t"]


def test_too_little_to_split(tmp_path, prepare):
    with pytest.raises(DataError, match="has 1 characters, too few"):
        prepare(jsonl(tmp_path / "a.jsonl", ["a"]))


def test_own_validation_files(tmp_path, prepare):
    train = jsonl(tmp_path / "a.jsonl", ["one", "two"])
    store = prepare(train, validation_path=str(jsonl(tmp_path / "v.jsonl", ["three"])))
    assert (decoded(store), decoded(store, "validation")) == (["one", "two"], ["three"])
    with pytest.raises(DataError, match="no validation tokens"):
        prepare(train, validation_path=str(jsonl(tmp_path / "w.jsonl", [""])))


def test_packages_of_the_standard_library_stay_together():
    sides = {}
    for _, document in open_source(SourceConfig("stdlib")).read():
        sides.setdefault(document.group, set()).add(held_out(document.group, 0.05))
    assert all(len(side) == 1 for side in sides.values())
    assert 0.02 < sum(side == {True} for side in sides.values()) / len(sides) < 0.1


# ------------------------------------------------------------------------------------------------------ mixtures


def test_a_mixture_shares_one_tokenizer(tmp_path):
    mixture = {
        "a": SourceConfig(str(jsonl(tmp_path / "a.jsonl", ["aaab"] * 100)), weight=3.0),
        "b": SourceConfig(str(jsonl(tmp_path / "b.jsonl", ["bbba"] * 100)), weight=1.0),
    }
    cfg = DataConfig(mixture=mixture, tokenizer="bpe", cache_dir=str(tmp_path / "cache"))
    a, b = stores.prepare(cfg, lambda line: None)
    assert [(s.name, s.weight) for s in (a, b)] == [("a", 3.0), ("b", 1.0)]
    assert a.tokenizer.identity() == b.tokenizer.identity() == a.manifest["tokenizer"]["identity"]
    assert len(documents(a)[0]) < 5 and len(documents(b)[0]) < 5


def test_training_text_is_taken_in_proportion(tmp_path):
    mixture = {
        "a": SourceConfig(str(jsonl(tmp_path / "a.jsonl", ["a" * 50] * 100)), weight=3.0),
        "b": SourceConfig(str(jsonl(tmp_path / "b.jsonl", ["b" * 50] * 100)), weight=1.0),
    }
    for temperature, shares in ((1.0, (300, 100)), (1e9, (200, 200))):
        cfg = DataConfig(mixture=mixture, mixture_temperature=temperature)
        text = "".join(vocabulary._training_sample(stores._jobs(cfg), 400))
        assert (text.count("a"), text.count("b")) == shares


def test_the_bpe_sees_no_validation_text(tmp_path, prepare):
    path = tmp_path / "a.txt"
    path.write_text("aaaa " * 200 + "zzzz " * 40)
    store = prepare(path, tokenizer="bpe", validation_fraction=0.2)
    assert b"zz" not in {store.tokenizer.decode_bytes([i]) for i in range(store.tokenizer.vocab_size)}


# --------------------------------------------------------------------------------------------------- token files


def token_file(path, ids, dtype=np.uint16):
    np.array(ids, dtype).tofile(path)
    return path


def test_token_files_without_a_tokenizer(tmp_path, prepare):
    store = prepare(token_file(tmp_path / "a.bin", range(100)), tokenizer="none", validation_fraction=0.1)
    assert documents(store) == [list(range(90))]
    assert documents(store, "validation") == [list(range(90, 100))]
    assert (store.tokenizer.vocab_size, store.tokenizer.eos_id) == (100, None)
    assert store.manifest["yardsticks"] == {}
    assert store.manifest["splits"]["train"]["bytes"] is None


def test_token_files_with_their_tokenizer(tmp_path, prepare):
    ids = [104, 105, 256, 106, 256, 107]
    store = prepare(token_file(tmp_path / "a.bin", ids), tokenizer="byte", validation_fraction=0.0)
    assert documents(store) == [[104, 105, 256], [106, 256], [107]]
    assert store.manifest["splits"]["train"]["bytes"] == 4
    store = prepare(tmp_path / "a.bin", tokenizer="byte", validation_fraction=0.0, eos="none")
    assert documents(store) == [ids]


def test_documents_of_tokens_in_pieces(tmp_path, prepare, monkeypatch):
    from llm_jax.data.sources import token_files

    monkeypatch.setattr(token_files, "PIECE", 8)
    monkeypatch.setattr(writer, "SHARD_UNITS", 10)
    store = prepare(token_file(tmp_path / "a.bin", range(100)), tokenizer="none", validation_fraction=0.1)
    assert documents(store) == [list(range(90))]
    assert documents(store, "validation") == [list(range(90, 100))]


def test_ids_beyond_the_vocabulary_are_named(tmp_path, prepare):
    path = token_file(tmp_path / "a.bin", [1, 2, 50256, 3])
    with pytest.raises(DataError, match=f"{path}:1 holds token 50256 at position 2 .*tokenizer=byte has 257 tokens"):
        prepare(path, validation_fraction=0.0)


def test_tokenizers_that_do_not_fit_their_sources(tmp_path, prepare):
    text, ids = jsonl(tmp_path / "a.jsonl", MANY), token_file(tmp_path / "a.bin", range(100))
    with pytest.raises(ConfigError, match="none is for token files"):
        prepare(text, tokenizer="none")
    with pytest.raises(ConfigError, match="would be made from text"):
        prepare(ids, tokenizer="bpe")
    prepare(text, tokenizer="bpe", tokenizer_vocab_size=300).tokenizer.save(tmp_path / "t")
    path = tmp_path / "t/tokenizer.json"
    assert prepare(text, tokenizer=str(path)).tokenizer.eos_id == 0
    spec = json.loads(path.read_text())
    path.write_text(json.dumps(spec | {"added_tokens": []}))
    with pytest.raises(ConfigError, match="data.eos=append needs an end-of-document token"):
        prepare(text, tokenizer=str(path))
    assert decoded(prepare(text, tokenizer=str(path), eos="none", validation_fraction=0.0)) == MANY


def test_a_tokenizer_that_loses_text_is_refused(tmp_path, prepare, monkeypatch):
    monkeypatch.setattr(ByteTokenizer, "encode", lambda self, texts: [np.zeros(1, np.uint16) for _ in texts])
    with pytest.raises(DataError, match="spells 1 of the 10 bytes of .*a.jsonl:1"):
        prepare(jsonl(tmp_path / "a.jsonl", ["0123456789"]), validation_fraction=0.0)


# -------------------------------------------------------------------------------------------------- bad records


def test_bad_records_are_counted_up_to_the_limit(tmp_path, prepare):
    path = jsonl(tmp_path / "a.jsonl", MANY)
    path.write_text(path.read_text() + '{"body": 1}\nnonsense\n')
    with pytest.raises(DataError, match=f"{path}:201 has no field 'text'.*data.max_bad_records"):
        prepare(path)
    with pytest.raises(DataError, match=f"{path}:202 is not JSON.*bad record number 2, and data.max_bad_records is 1"):
        prepare(path, max_bad_records=1)
    store = prepare(path, max_bad_records=2)
    assert store.manifest["bad_records"]["count"] == 2
    assert f"{path}:202" in store.manifest["bad_records"]["first"][1]
    assert "2 bad records skipped" in prepare.lines[-1]
    with pytest.raises(DataError, match="2 bad records were skipped"):
        prepare(path)


def test_an_empty_file_is_a_bad_record(tmp_path, prepare):
    (tmp_path / "d").mkdir()
    (tmp_path / "d/a.txt").write_text("some text " * 50)
    (tmp_path / "d/b.txt").write_text("")
    with pytest.raises(DataError, match="b.txt is empty"):
        prepare(tmp_path / "d")
    assert prepare(tmp_path / "d", max_bad_records=1).manifest["bad_records"]["count"] == 1
    with pytest.raises(DataError, match="no train tokens"):
        prepare(tmp_path / "d/b.txt", max_bad_records=1, validation_fraction=0.0)


# -------------------------------------------------------------------------------------------------------- cache


def test_a_prepared_store_is_found_again_at_once(prepare):
    prepare("synthetic")
    started = time.perf_counter()
    prepare("synthetic")
    assert time.perf_counter() - started < 0.3
    assert prepare.lines == []


def test_what_decides_the_content_makes_another_store(tmp_path, prepare):
    path = jsonl(tmp_path / "a.jsonl", MANY)
    folders = {prepare(path).folder}
    for keys in (
        {"tokenizer": "char"},
        {"tokenizer": "bpe"},
        {"tokenizer": "bpe", "tokenizer_vocab_size": 300},
        {"eos": "prepend"},
        {"validation_fraction": 0.1},
        {"validation_split": "tail"},
        {"format": "text"},
        {"format": "text", "separator": "x"},
        {"validation_path": str(path)},
    ):
        folders.add(prepare(path, **keys).folder)
    assert len(folders) == 10
    for keys in (
        {"sequence_length": 9},
        {"packing": "best_fit"},
        {"shuffle": False},
        {"separator": "x"},
        {"max_bad_records": 3},
    ):
        assert prepare(path, **keys).folder in folders


def test_a_changed_input_makes_another_store(tmp_path, prepare):
    path = jsonl(tmp_path / "a.jsonl", ["aa", "bb"])
    first = prepare(path, validation_fraction=0.0)
    status = path.stat()
    jsonl(path, ["aa", "bbb"])
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))  # another size only
    second = prepare(path, validation_fraction=0.0)
    jsonl(path, ["aa", "bcd"])
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns + 1))  # another date only
    third = prepare(path, validation_fraction=0.0)
    assert [decoded(s) for s in (first, second, third)] == [["aa", "bb"], ["aa", "bbb"], ["aa", "bcd"]]
    assert len({s.split("train").fingerprint for s in (first, second, third)}) == 3


def test_the_fingerprint_is_of_the_content(tmp_path, prepare):
    path = jsonl(tmp_path / "a.jsonl", MANY)
    first = prepare(path)
    os.utime(path, ns=(1, 1))
    again = prepare(path)
    assert first.folder != again.folder
    for side in ("train", "validation"):
        assert first.split(side).fingerprint == again.split(side).fingerprint


def test_an_input_that_changes_while_it_is_read(tmp_path, prepare, monkeypatch):
    path = jsonl(tmp_path / "a.jsonl", MANY)
    encode = ByteTokenizer.encode

    def meddle(self, texts):
        os.utime(path, ns=(1, 1))
        return encode(self, texts)

    monkeypatch.setattr(ByteTokenizer, "encode", meddle)
    with pytest.raises(DataError, match="changed while it was being prepared"):
        prepare(path)


def test_the_cache_folder_of_the_environment(tmp_path, monkeypatch):
    monkeypatch.setenv("LLM_JAX_CACHE", str(tmp_path / "env"))
    (store,) = stores.prepare(DataConfig(str(jsonl(tmp_path / "a.jsonl", MANY))), lambda line: None)
    assert store.folder.startswith(str(tmp_path / "env" / "stores" / "a.jsonl-"))


def test_a_cache_that_cannot_be_written(tmp_path, prepare, monkeypatch):
    def full(*arguments, **keys):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "savez", full)
    with pytest.raises(DataError, match="No space left on device.*data.cache_dir"):
        prepare("synthetic")


# ---------------------------------------------------------------------------------------------- damaged stores


@pytest.mark.parametrize("name", ["train.bin", "validation.idx.npy", "tokenizer/tokenizer_info.json"])
@pytest.mark.parametrize("damage", ["missing", "empty", "short"])
def test_damaged_files_are_named(tmp_path, prepare, name, damage):
    path = jsonl(tmp_path / "a.jsonl", MANY)
    file = pathlib.Path(prepare(path).folder, name)
    whole = file.read_bytes()
    file.unlink()
    if damage != "missing":
        file.write_bytes(b"" if damage == "empty" else whole[:-2])
    with pytest.raises(DataError, match="delete the folder") as caught:
        prepare(path)
    assert str(file) in str(caught.value)


def test_a_flipped_bit_is_found_when_asked(tmp_path, prepare):
    store = prepare(jsonl(tmp_path / "a.jsonl", MANY))
    assert stores.open_store(store.folder, verify=True).manifest == store.manifest
    file = os.path.join(store.folder, "train.bin")
    with open(file, "r+b") as stream:
        stream.seek(100)
        stream.write(b"\xff")
    stores.open_store(store.folder)
    with pytest.raises(DataError, match="train.bin was changed"):
        stores.open_store(store.folder, verify=True)


def test_bad_manifests(tmp_path, prepare):
    folder = prepare(jsonl(tmp_path / "a.jsonl", MANY)).folder
    path = pathlib.Path(folder, "manifest.json")
    manifest = json.loads(path.read_text())
    for text, words in (
        ("", "cannot be read"),
        ("[]", "cannot be read"),
        (json.dumps(manifest | {"version": 0}), "version"),
    ):
        path.write_text(text)
        with pytest.raises(DataError, match=words):
            stores.open_store(folder)
    path.unlink()
    with pytest.raises(DataError, match="not a prepared store"):
        stores.open_store(folder)


def test_the_manifest_tells_where_the_data_came_from(tmp_path, prepare):
    path = jsonl(tmp_path / "a.jsonl", MANY)
    manifest = prepare(path).manifest
    digest = hashlib.blake2b(path.read_bytes(), digest_size=16).hexdigest()
    assert manifest["inputs"] == [{"path": str(path), "size": path.stat().st_size, "blake2b": digest}]
    assert manifest["tokenizer"]["identity"] == ByteTokenizer().identity()


# --------------------------------------------------------------------------------------------------- yardsticks


def test_yardsticks(tmp_path, prepare, monkeypatch):
    store = prepare(jsonl(tmp_path / "a.jsonl", MANY), validation_fraction=0.2, eos="prepend")
    text = "".join(decoded(store, "validation")).encode()
    marks = store.manifest["yardsticks"]
    assert marks["bytes"] == marks["all_bytes"] == len(text)
    assert marks["xz_bits_per_byte"] == 8 * len(lzma.compress(text, preset=9)) / len(text)
    assert writer.yardsticks(b"abab" * 9, 36)["order0_bits_per_byte"] == 1.0
    assert writer.yardsticks(b"aaaabbcd", 8)["order0_bits_per_byte"] == 1.75

    monkeypatch.setattr(writer, "YARDSTICK_BYTES", 100)
    monkeypatch.setattr(writer, "SHARD_UNITS", 50)
    other = prepare(tmp_path / "a.jsonl", validation_fraction=0.2, cache_dir=str(tmp_path / "other"))
    capped = other.manifest["yardsticks"]
    assert (capped["bytes"], capped["all_bytes"]) == (100, len(text))
    assert capped["order0_bits_per_byte"] == writer.yardsticks(text[:100], 0)["order0_bits_per_byte"]


def test_yardsticks_without_lzma(monkeypatch):
    monkeypatch.setitem(sys.modules, "lzma", None)
    assert writer.yardsticks(b"ab", 2) == {"bytes": 2, "all_bytes": 2, "order0_bits_per_byte": 1.0}
