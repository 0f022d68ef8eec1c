"""Every format read from small real files; every kind of bad file refused by name."""

import dataclasses
import gzip
import json
import struct
import sys
import types

import numpy as np
import pytest

from llm_jax.config.schema import SourceConfig
from llm_jax.data.sources import BadRecord, Position, open_source, token_files
from llm_jax.data.sources import text as text_files
from llm_jax.data.sources.builtin import module_group
from llm_jax.errors import ConfigError, DataError


def read(path, **keys):
    source = open_source(SourceConfig(str(path), **keys))
    return source, [document for _, document in source.read()]


def texts(path, **keys):
    return [document.text for document in read(path, **keys)[1]]


def tokens(path, **keys):
    return [document.tokens.tolist() for document in read(path, **keys)[1]]


def refused(path, **keys) -> str:
    """The sentence of a fatal error."""
    with pytest.raises(DataError) as caught:
        read(path, **keys)
    assert str(path).removesuffix(".bin") in str(caught.value)  # or the .idx beside it
    return str(caught.value)


def bad(path, **keys) -> str:
    """The reason of the one bad record."""
    (reason,) = [d.reason for d in read(path, **keys)[1] if isinstance(d, BadRecord)]
    assert str(path) in reason
    return reason


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def assert_resumes_anywhere(source):
    """Going on from any position gives the rest, and nothing else."""
    whole = list(source.read())
    for place, (position, _) in enumerate(whole):
        rest = [(p, d.id) for p, d in source.read(position)]
        assert rest == [(p, d.id) for p, d in whole[place + 1 :]]


# --------------------------------------------------------------------------------------------------------- text


def test_a_text_file_is_one_document_byte_for_byte(tmp_path):
    path = write(tmp_path / "a.txt", "one\r\ntwo\u00e9\U0001f642\n\n")
    source, (document,) = read(path)
    assert source.format == "text"
    assert (document.text, document.id, document.group) == ("one\r\ntwo\u00e9\U0001f642\n\n", str(path), "a.txt")


def test_a_separator_divides_a_text_file(tmp_path):
    path = write(tmp_path / "a.txt", "onexxtwo\u00e9xx\u00e9xxx")
    source, documents = read(path, separator="xx")
    assert [d.text for d in documents] == ["one", "two\u00e9", "\u00e9", "x"]
    assert documents[1].id == f"{path}:2"
    assert_resumes_anywhere(source)


@pytest.mark.parametrize("block", [1, 2, 3, 5, 8])
def test_separators_across_read_blocks(block):
    class Slow:
        def __init__(self, content):
            self.content = content

        def read(self, size):
            head, self.content = self.content[:block], self.content[block:]
            return head

    text = b"aa--b---c----d" * 3
    assert list(text_files._split(Slow(text), b"--")) == text.split(b"--")


def test_folders_are_walked_in_sorted_order_without_hidden_files(tmp_path):
    for name in ("b.txt", "a/z.txt", "a/b/c.txt", ".hidden", ".git/x.txt", "__pycache__/y.txt", "a.txt"):
        write(tmp_path / name, name)
    source, documents = read(tmp_path)
    assert [d.group for d in documents] == ["a/b/c.txt", "a/z.txt", "a.txt", "b.txt"]
    assert_resumes_anywhere(source)


def test_a_circle_of_links_ends(tmp_path):
    write(tmp_path / "a/x.txt", "x")
    (tmp_path / "a/loop").symlink_to(tmp_path)
    (tmp_path / "other").symlink_to(tmp_path / "a")
    assert set(texts(tmp_path)) == {"x"}


def test_a_glob(tmp_path):
    for name in ("x/1.txt", "x/2.txt", "y/1.txt", "y/1.md"):
        write(tmp_path / name, name)
    _, documents = read(tmp_path / "*/*.txt")
    assert [d.group for d in documents] == ["x/1.txt", "x/2.txt", "y/1.txt"]
    assert "matches no file" in refused(tmp_path / "*.csv")


def test_missing_and_empty_paths(tmp_path):
    assert "does not exist" in refused(tmp_path / "nothing.txt")
    assert "empty folder" in refused(tmp_path)
    assert "is empty" in bad(write(tmp_path / "empty.txt", ""))
    with pytest.raises(ConfigError, match="data.path is empty"):
        open_source(SourceConfig(""))
    with pytest.raises(DataError, match="local"):
        open_source(SourceConfig("gs://bucket/x.txt"))


def test_bytes_that_are_not_text(tmp_path):
    assert "not UTF-8: byte 0xff at offset 2" in bad(write(tmp_path / "a.txt", b"ab\xff"))
    assert "NUL byte at character 1" in bad(write(tmp_path / "b.txt", b"a\x00b"))
    assert f"{tmp_path}/c.txt:2 is not UTF-8" in bad(write(tmp_path / "c.txt", b"ok|\xe9|ok"), separator="|")


def test_a_huge_file_needs_a_separator(tmp_path):
    path = tmp_path / "huge.txt"
    with path.open("wb") as stream:
        stream.truncate(text_files.LARGEST_DOCUMENT + 1)
    assert "data.separator" in refused(path)


def test_mixed_formats_are_not_guessed(tmp_path):
    write(tmp_path / "a.jsonl", '{"text": "x"}')
    write(tmp_path / "README.md", "read me")
    assert "several formats: README.md (text), a.jsonl (jsonl)" in refused(tmp_path)
    assert texts(tmp_path, format="jsonl") == ["x"]
    assert texts(tmp_path / "*.jsonl") == ["x"]
    assert "holds no parquet file" in refused(tmp_path, format="parquet")


# --------------------------------------------------------------------------------------------------- compressed


def test_gzip(tmp_path):
    lines = "".join(json.dumps({"text": f"document {i}"}) + "\n" for i in range(500))
    whole = gzip.compress(lines.encode())
    assert len(texts(write(tmp_path / "a.jsonl.gz", whole))) == 500
    assert texts(write(tmp_path / "a.txt.gz", gzip.compress(b"one") + gzip.compress(b"two"))) == ["onetwo"]
    assert "cut short" in refused(write(tmp_path / "b.jsonl.gz", whole[: len(whole) // 2]))
    assert "not a sound gzip file" in refused(write(tmp_path / "c.txt.gz", "plain text"))


def test_zstandard(tmp_path):
    zstandard = pytest.importorskip("zstandard", reason="needs the library zstandard (extra: data)")
    rng = np.random.default_rng(0)
    lines = "".join(json.dumps({"text": rng.bytes(500).hex()}) + "\n" for i in range(500)).encode()
    half = len(lines) // 2
    compress = zstandard.ZstdCompressor().compress
    whole = compress(lines[:half]) + compress(lines[half:])  # two frames
    expected = [json.loads(line)["text"] for line in lines.splitlines()]
    assert texts(write(tmp_path / "a.jsonl.zst", whole)) == expected
    for length in (10, 200_000, len(whole) - 1):
        assert "cut short" in refused(write(tmp_path / "b.jsonl.zst", whole[:length]))
    assert "not a sound Zstandard file" in refused(write(tmp_path / "c.txt.zst", "plain text"))


@pytest.mark.parametrize(
    "name, module, extra",
    [("a.txt.zst", "zstandard", "data"), ("a.parquet", "pyarrow", "data"), ("d", "datasets", "hf")],
)
def test_a_missing_library_names_its_extra(tmp_path, monkeypatch, name, module, extra):
    path = write(tmp_path / name, "x")
    monkeypatch.setitem(sys.modules, module, None)
    assert f"llm-jax[{extra}]" in refused(path, format="hf" if module == "datasets" else "auto")


# ------------------------------------------------------------------------------------------------------ records


def test_json_lines(tmp_path):
    path = write(tmp_path / "a.jsonl", '\ufeff{"text": "one"}\r\n\n{"body": 1, "text": "tw\\u00f6"}\n{"text": ""}')
    source, documents = read(path)
    assert [(d.text, d.id) for d in documents] == [("one", f"{path}:1"), ("tw\u00f6", f"{path}:3"), ("", f"{path}:4")]
    assert_resumes_anywhere(source)
    assert texts(write(tmp_path / "records", '{"text": "no ending"}\n')) == ["no ending"]


@pytest.mark.parametrize(
    "line, reason",
    [
        ('{"text": "cut', "a.jsonl:2 is not JSON"),
        ('["text"]', "a.jsonl:2 is a JSON list, not an object"),
        ('{"body": "x"}', "a.jsonl:2 has no field 'text' (its fields: body;"),
        ('{"text": 7}', "a.jsonl:2 has 7 (int) in field 'text'"),
        ('{"text": null}', "a.jsonl:2 has None (NoneType)"),
        ('{"text": "a\\u0000"}', "a.jsonl:2 holds binary data"),
        ('{"text": "a\\ud800"}', "a.jsonl:2 is not valid Unicode: a lone surrogate at character 1"),
        (b'{"text": "\xe9"}', "a.jsonl:2 is not UTF-8"),
        ("[" * 100_000, "a.jsonl:2 is not JSON"),
    ],
)
def test_bad_json_records_are_named(tmp_path, line, reason):
    line = line if isinstance(line, bytes) else line.encode()
    path = write(tmp_path / "a.jsonl", b'{"text": "ok"}\n' + line + b'\n{"text": "ok"}\n')
    assert reason in bad(path)
    assert len(read(path)[1]) == 3


def test_a_json_array_is_refused(tmp_path):
    assert "JSON array" in refused(write(tmp_path / "a.json", '[{"text": "x"}]'))


def test_parquet(tmp_path):
    pyarrow = pytest.importorskip("pyarrow", reason="needs the library pyarrow (extra: data)")
    from pyarrow import parquet

    path = tmp_path / "a.parquet"
    parquet.write_table(
        pyarrow.table({"text": ["one", "tw\u00f6", None, "four"], "n": [1, 2, 3, 4]}), path, row_group_size=2
    )
    source, documents = read(path)
    assert source.format == "parquet"
    assert [getattr(d, "text", None) for d in documents] == ["one", "tw\u00f6", None, "four"]
    assert documents[2].reason.startswith(f"{path}:3 has None")
    for after, rest in ((1, ["tw\u00f6", None, "four"]), (2, [None, "four"]), (3, ["four"]), (4, [])):
        assert [getattr(d, "text", None) for _, d in source.read(Position(0, after))] == rest
    assert "no column 'body' but text, n" in refused(path, text_key="body")
    assert "1 (int)" in read(path, text_key="n")[1][0].reason

    content = path.read_bytes()
    assert "not a Parquet file" in refused(write(tmp_path / "b.parquet", content[: len(content) // 2]))
    assert "not a Parquet file" in refused(write(tmp_path / "c.parquet", "plain text"))
    assert open_source(SourceConfig(str(write(tmp_path / "no_ending", content)))).format == "parquet"

    strings = pyarrow.array([b"ok", b"\xff"]).cast(pyarrow.binary()).view(pyarrow.string())
    parquet.write_table(pyarrow.table({"text": strings}), tmp_path / "d.parquet")
    assert "d.parquet:2 is not UTF-8" in bad(tmp_path / "d.parquet")


def write_arrayrecord(path, records):
    module = pytest.importorskip("array_record.python.array_record_module", reason="needs array_record (with grain)")
    writer = module.ArrayRecordWriter(str(path), "group_size:1")
    for record in records:
        writer.write(record)
    writer.close()
    return path


def test_arrayrecord(tmp_path):
    path = write_arrayrecord(tmp_path / "a.array_record-00000-of-00001", [b"one", "tw\u00f6".encode(), b"{not json"])
    source, documents = read(path)
    assert [d.text for d in documents] == ["one", "tw\u00f6", "{not json"]
    assert documents[1].id == f"{path}:2"
    assert_resumes_anywhere(source)

    path = write_arrayrecord(tmp_path / "b.arrayrecord", [b'{"text": "one"}', b'{"body": "two"}'])
    assert read(path)[1][0].text == "one"
    assert "b.arrayrecord:2 has no field 'text'" in bad(path)

    content = path.read_bytes()
    assert "cut short or not an ArrayRecord" in refused(write(tmp_path / "c.arrayrecord", content[: len(content) // 2]))
    assert "cut short or not an ArrayRecord" in refused(write(tmp_path / "d.arrayrecord", "plain text"))


# ------------------------------------------------------------------------------------------------- Hugging Face


class FakeDataset:
    """What is used of `datasets.Dataset`."""

    info = types.SimpleNamespace(download_checksums={"hub/file@abc": {}})
    column_names = ["text", "n"]

    def __init__(self, rows):
        self.rows = rows

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, rows):
        return {"text": self.rows[rows]}

    def select_columns(self, names):
        assert names == ["text"]
        return self


def test_hub_names(monkeypatch):
    asked = []

    def load_dataset(name, config, split):
        asked.append((name, config, split))
        if split == "missing":
            raise ValueError("no such split")
        return FakeDataset([f"{split} {i}" for i in range(1500)])

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    cfg = SourceConfig("hf:owner/name:en", validation_path="hf:owner/name:en:test")
    source = open_source(cfg)
    assert [d.text for _, d in source.read(Position(0, 1022))][:3] == ["train 1022", "train 1023", "train 1024"]
    assert next(open_source(cfg, validation=True).read())[1].text == "test 0"
    validation = open_source(SourceConfig("x", validation_path="hf:owner/name"), validation=True)
    assert next(validation.read())[1].text == "validation 0"
    assert asked == [("owner/name", "en", "train"), ("owner/name", "en", "test"), ("owner/name", None, "validation")]
    assert source.identity() != open_source(cfg, validation=True).identity()
    assert "'missing'" in refused("hf:owner/name::missing")
    assert "no column 'body'" in refused("hf:owner/name", text_key="body")


def test_saved_datasets(tmp_path):
    datasets = pytest.importorskip("datasets", reason="needs the library datasets (extra: hf)")
    both = datasets.DatasetDict(
        train=datasets.Dataset.from_dict({"text": ["one", "two"]}),
        validation=datasets.Dataset.from_dict({"text": ["v"]}),
    )
    both.save_to_disk(tmp_path / "dict")
    assert texts(tmp_path / "dict") == ["one", "two"]
    cfg = SourceConfig("x", validation_path=str(tmp_path / "dict"))
    assert [d.text for _, d in open_source(cfg, validation=True).read()] == ["v"]
    both["train"].save_to_disk(tmp_path / "single")
    assert texts(tmp_path / "single") == ["one", "two"]
    (tmp_path / "folder").mkdir()
    both["train"].to_parquet(tmp_path / "folder/train.parquet")
    assert texts(tmp_path / "folder", format="hf") == ["one", "two"]


# -------------------------------------------------------------------------------------------------- token files


def llmc_file(path, ids, magic=20240520, version=1, count=None):
    header = np.zeros(256, np.int32)
    header[:3] = magic, version, len(ids) if count is None else count
    return write(path, header.tobytes() + np.array(ids, np.uint16).tobytes())


def megatron_pair(path, sequences, documents, kind=np.uint16, code=8):
    """A .bin with its .idx as Megatron-LM writes them; `documents` are borders counted in sequences."""
    lengths = np.array([len(s) for s in sequences], np.int32)
    pointers = np.concatenate([[0], np.cumsum(lengths)[:-1]]).astype(np.int64) * np.dtype(kind).itemsize
    index = b"MMIDIDX\x00\x00" + struct.pack("<QBQQ", 1, code, len(sequences), len(documents))
    index += lengths.tobytes() + pointers.tobytes() + np.array(documents, np.int64).tobytes()
    write(path.with_suffix(".idx"), index)
    return write(path, np.concatenate(sequences).astype(kind).tobytes())


def test_nanogpt_tokens(tmp_path):
    path = write(tmp_path / "train.bin", np.array([5, 6, 0, 7, 0, 8], np.uint16).tobytes())
    source, documents = read(path)
    assert source.format == "nanogpt"
    assert [d.tokens.tolist() for d in documents] == [[5, 6, 0, 7, 0, 8]]
    assert "odd number" in refused(write(tmp_path / "odd.bin", b"abc"))
    assert "data.format=llmc" in refused(llmc_file(tmp_path / "l.bin", [1]), format="nanogpt")


def test_documents_of_flat_tokens_are_marked_by_the_eos(tmp_path):
    import dataclasses

    behind = write(tmp_path / "a.bin", np.array([5, 6, 0, 7, 0, 8], np.uint16).tobytes())
    ahead = llmc_file(tmp_path / "b.bin", [0, 5, 6, 0, 7, 0, 0, 8])
    for path, spans in ((behind, [[5, 6, 0], [7, 0], [8]]), (ahead, [[0, 5, 6], [0, 7], [0], [0, 8]])):
        source = dataclasses.replace(open_source(SourceConfig(str(path))), eos_id=0)
        documents = [d for _, d in source.read()]
        assert [d.tokens.tolist() for d in documents] == spans
        assert documents[1].start == 3
        assert_resumes_anywhere(source)


def test_long_documents_of_tokens_come_in_pieces(tmp_path, monkeypatch):
    monkeypatch.setattr(token_files, "PIECE", 4)
    path = write(tmp_path / "train.bin", np.arange(10, dtype=np.uint16).tobytes())
    source, documents = read(path)
    assert [(d.tokens.tolist(), d.continues, d.start) for d in documents] == [
        ([0, 1, 2, 3], False, 0),
        ([4, 5, 6, 7], True, 4),
        ([8, 9], True, 8),
    ]
    assert_resumes_anywhere(source)


def test_llmc_tokens(tmp_path):
    path = llmc_file(tmp_path / "a.bin", [1, 2, 65535])
    assert open_source(SourceConfig(str(path))).format == "llmc"
    assert tokens(path) == [[1, 2, 65535]]
    assert "promises 4 tokens in its header and holds 3" in refused(llmc_file(tmp_path / "b.bin", [1, 2, 3], count=4))
    assert "holds 3.5" in refused(write(tmp_path / "c.bin", path.read_bytes() + b"x"))
    assert "version 2" in refused(llmc_file(tmp_path / "d.bin", [1], version=2))
    assert "magic" in refused(llmc_file(tmp_path / "e.bin", [1], magic=20240801), format="llmc")
    assert "inside llm.c's header" in refused(write(tmp_path / "f.bin", path.read_bytes()[:600]))


@pytest.mark.parametrize("kind, code", [(np.uint8, 1), (np.int32, 4), (np.int64, 5), (np.uint16, 8)])
def test_megatron_tokens(tmp_path, kind, code):
    path = megatron_pair(tmp_path / "a.bin", [[1, 2], [3], [4, 5, 6]], [0, 2, 3], kind, code)
    for form in (path, path.with_suffix(".idx"), tmp_path):
        source, documents = read(form)
        assert source.format == "megatron"
        assert [d.tokens.tolist() for d in documents] == [[1, 2, 3], [4, 5, 6]]
        assert [d.group for d in documents] == ["a.bin:1", "a.bin:2"]
    assert_resumes_anywhere(source)
    assert len(source.identity()["files"]) == 2


def test_bad_megatron_pairs(tmp_path):
    path = megatron_pair(tmp_path / "a.bin", [[1, 2], [3]], [0, 1, 2])
    index = path.with_suffix(".idx")
    whole = index.read_bytes()
    write(path, path.read_bytes()[:-1])
    assert "has 5 bytes where" in refused(path)
    for length in (20, len(whole) - 1):
        write(index, whole[:length])
        assert "cut short" in refused(path)
    write(index, b"FOREIGN" + whole[7:])
    assert "not a Megatron index" in refused(path)
    write(index, whole[:17] + b"\x07" + whole[18:])  # floats
    assert "type 7" in refused(path)
    index.unlink()
    assert "cannot be read" in refused(path, format="megatron")


# ----------------------------------------------------------------------------------------------------- built in


def test_the_standard_library():
    source, documents = read("stdlib")
    assert not [d for d in documents if isinstance(d, BadRecord)]
    groups = {d.group for d in documents}
    assert {"asyncio", "json", "argparse", "typing"} <= groups
    assert not {"test", "encodings", "pydoc_data", "site-packages", "keyword", "opcode"} & groups
    names = {file.name for file in source.files}
    assert "asyncio/base_events.py" in names
    assert not [n for n in names if "/test/" in n or "/tests/" in n or "/idle_test/" in n or "__pycache__" in n]
    assert 5e6 < sum(len(d.text) for d in documents) < 2e7


def test_docstrings_of_the_packages_that_are_there():
    source = open_source(SourceConfig("package_docstrings"))
    names = [file.name for file in source.files]
    groups = {module_group(name) for name in names}
    assert {"asyncio", "jax/_src/numpy/linalg", "numpy/linalg/_linalg", "flax/linen/attention"} <= groups
    assert not [name for name in names if "/test_" in name or "/tests/" in name or name.endswith("_test.py")]
    assert len(names) > 3 * len(open_source(SourceConfig("docstrings")).files)
    some = dataclasses.replace(source, files=source.files[-40:])
    documents = [document for _, document in some.read()]
    assert len(documents) > 20 and not [d for d in documents if isinstance(d, BadRecord) or "\0" in d.text]


@pytest.mark.parametrize(
    "name, group",
    [("json/decoder.py", "json"), ("abc.py", "abc"), ("scipy/stats/_qmc.py", "scipy/stats/_qmc")],
)
def test_what_stays_on_one_side_of_the_split(name, group):
    assert module_group(name) == group


def test_the_synthetic_text_is_always_the_same():
    first, second = texts("synthetic"), texts("anything", format="synthetic")
    assert first == second
    assert 1_000_000 <= sum(map(len, first)) < 1_001_000
    assert first[0].startswith(
        "Nora is in the market and has 6 keys.\nLena gives Nora 8 more, so now Nora has 14 keys.\n"
    )
    assert len(set(first)) > 0.99 * len(first)
    source = open_source(SourceConfig("synthetic"))
    assert next(source.read(Position(0, 10)))[1].text == first[10]
