"""Reading and writing safetensors: against the format's own library, and what is damaged is refused by name."""

import json
import threading

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from llm_jax.convert import pieces
from llm_jax.convert import safetensors as ours
from llm_jax.convert.safetensors import Planned
from llm_jax.errors import DataError

ARRAYS = {
    "a": np.arange(6, dtype=np.float32).reshape(2, 3),
    "b": np.arange(4, dtype=ml_dtypes.bfloat16),
    "c": np.array(7, np.int64),
    "d": np.zeros((0, 3), np.float16),
}


def write(folder, arrays=ARRAYS, largest=1 << 30):
    planned = [Planned(name, array.dtype, array.shape) for name, array in arrays.items()]
    ours.write_folder(folder, planned, lambda tensor: arrays[tensor.name], largest=largest)
    return folder


def rewrite(path, change):
    """The file with its header changed, the tensors as they were."""
    raw = path.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + length])
    change(header)
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + raw[8 + length :])


def test_the_library_reads_what_we_write_and_we_what_it_writes(tmp_path):
    theirs = safetensors.numpy.load_file(write(tmp_path) / "model.safetensors")
    for name, array in ARRAYS.items():
        np.testing.assert_array_equal(theirs[name], array)
        assert theirs[name].dtype == array.dtype
    (tmp_path / "other").mkdir()
    safetensors.numpy.save_file(ARRAYS, tmp_path / "other" / "model.safetensors", metadata={"x": "y"})
    for name, tensor in ours.read_folder(tmp_path / "other").items():
        assert tensor.dtype == ARRAYS[name].dtype and tensor.shape == ARRAYS[name].shape
        np.testing.assert_array_equal(tensor.read(), ARRAYS[name])


def test_shards_hold_whole_tensors_in_order():
    tensors = [Planned(str(i), np.dtype(np.int8), (size,)) for i, size in enumerate((4, 5, 20, 1, 1))]
    assert [[t.name for t in part] for part in ours.shards(tensors, 10)] == [["0", "1"], ["2"], ["3", "4"]]


def test_an_index_and_its_files(tmp_path):
    write(tmp_path, largest=10)
    index = json.loads((tmp_path / ours.INDEX).read_text())
    assert index["metadata"]["total_size"] == 6 * 4 + 4 * 2 + 8
    assert index["weight_map"]["a"] == "model-00001-of-00003.safetensors"
    for name, tensor in ours.read_folder(tmp_path).items():
        np.testing.assert_array_equal(tensor.read(), ARRAYS[name])


def test_no_tensor_is_written_otherwise_than_planned(tmp_path):
    with pytest.raises(ValueError, match="planned was"):
        ours.write_folder(tmp_path, [Planned("a", np.dtype(np.int8), (3,))], lambda _: np.zeros(4, np.int8), largest=9)


# ---------------------------------------------------------------------------------------------- refused


def damaged_header(change):
    return lambda folder: rewrite(folder / "model.safetensors", change)


def cut(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-3])


def lengthen(folder):
    with open(folder / "model.safetensors", "ab") as stream:
        stream.write(b"12345")


def garble(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes().replace(b'"a":{', b'"a":[', 1))


def empty(folder):
    (folder / "model.safetensors").write_bytes(b"abc")


DAMAGE = {
    "cut off": (cut, "model.safetensors is cut off: it has .* bytes, and [a-d] ends at"),
    "bytes behind the last": (lengthen, "5 bytes behind its last tensor belong to none"),
    "a header that is no JSON": (garble, "its header is damaged"),
    "hardly a file": (empty, "no safetensors file, or a cut one: 3 bytes"),
    "a shape that lies": (
        damaged_header(lambda h: h["a"].update(shape=[2, 4])),
        r"wrong about a: F32\[2, 4\] takes 32 bytes, and its offsets are",
    ),
    "a dtype that lies": (damaged_header(lambda h: h["a"].update(dtype="F16")), "the header is wrong about a"),
    "an unknown dtype": (damaged_header(lambda h: h["a"].update(dtype="Q4")), "a has the dtype 'Q4'; known are F64"),
    "a negative size": (damaged_header(lambda h: h["a"].update(shape=[-2, -3])), "the header is wrong about a"),
    "tensors that overlap": (
        damaged_header(lambda h: h["b"].update(data_offsets=[0, 8])), "lies at byte .*, and the one before ends at"
    ),
    "a lost key": (damaged_header(lambda h: h["a"].pop("shape")), "its header is damaged"),
}  # fmt: skip


@pytest.mark.parametrize("name", DAMAGE)
def test_a_damaged_file_is_refused_by_name(name, tmp_path):
    damage, message = DAMAGE[name]
    damage(write(tmp_path))
    with pytest.raises(DataError, match=message) as error:
        ours.read_folder(tmp_path)
    assert str(tmp_path / "model.safetensors") in str(error.value)


def test_a_header_of_absurd_length_is_not_read(tmp_path):
    (tmp_path / "model.safetensors").write_bytes((1 << 60).to_bytes(8, "little") + b" " * 64)
    with pytest.raises(DataError, match="cannot hold a header of"):
        ours.read_folder(tmp_path)


def test_a_file_cut_after_it_was_opened_is_refused(tmp_path):
    tensors = ours.read_folder(write(tmp_path))
    cut(tmp_path)
    with pytest.raises(DataError, match="the file ends inside"):
        for tensor in tensors.values():
            tensor.read()


def change_index(change):
    def act(folder):
        index = json.loads((folder / ours.INDEX).read_text())
        change(index["weight_map"])
        (folder / ours.INDEX).write_text(json.dumps(index))

    return act


INDEX_DAMAGE = {
    "a file is missing": (
        lambda folder: (folder / "model-00002-of-00003.safetensors").unlink(),
        "model-00002-of-00003.safetensors is missing: .* says that it holds b",
    ),
    "an entry is missing": (change_index(lambda m: m.pop("d")), "00003-of-.*: the tensor d has no entry in"),
    "an entry of no tensor": (
        change_index(lambda m: m.update(x="model-00001-of-00003.safetensors")), "the tensor x is missing, and .* there"
    ),
    "an entry of another file": (
        change_index(lambda m: m.update(a="model-00003-of-00003.safetensors")), "the tensor a is missing"
    ),
    "a path": (change_index(lambda m: m.update(a="../model.safetensors")), "model.safetensors is missing"),
    "no JSON": (lambda folder: (folder / ours.INDEX).write_text("{"), "index.json is damaged"),
    "no map": (lambda folder: (folder / ours.INDEX).write_text("{}"), "index.json is damaged .KeyError"),
}  # fmt: skip


@pytest.mark.parametrize("name", INDEX_DAMAGE)
def test_an_index_that_does_not_fit_its_files(name, tmp_path):
    damage, message = INDEX_DAMAGE[name]
    damage(write(tmp_path, ARRAYS | {"c2": np.ones(1, np.int8)}, largest=10))
    with pytest.raises(DataError, match=message):
        ours.read_folder(tmp_path)


def test_pickles_are_refused_with_the_reason_and_the_way_out(tmp_path):
    (tmp_path / "pytorch_model.bin").write_bytes(b"x")
    with pytest.raises(DataError, match="pytorch_model.bin alone, a pickle: .*runs whatever code.*save_pretrained"):
        ours.read_folder(tmp_path)


def test_a_folder_of_nothing_or_of_nameless_files(tmp_path):
    with pytest.raises(DataError, match="holds no model.safetensors"):
        ours.read_folder(tmp_path)
    (tmp_path / "part.safetensors").write_bytes(b"x")
    with pytest.raises(DataError, match="holds part.safetensors, and neither"):
        ours.read_folder(tmp_path)


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16, np.int8], ids=str)
def test_arrays_are_read_and_written_in_pieces(tmp_path, monkeypatch, dtype):
    monkeypatch.setattr(pieces, "PIECE_BYTES", 90)
    monkeypatch.setattr(pieces, "TILE", 3)
    plain = np.arange(7 * 10 * 4).reshape(7, 10, 4).astype(dtype)
    arrays = {"plain": plain, "turned": plain[:, :, 0].T, "experts": plain.swapaxes(1, 2), "cut": plain[:, 2:5]}
    arrays |= {"row": plain[:1, :1], "one": plain[0, 0, 0].reshape(())}
    write(tmp_path, arrays)
    for name, tensor in ours.read_folder(tmp_path).items():
        np.testing.assert_array_equal(tensor.read(), arrays[name])


def test_an_array_of_many_rows_is_cut_into_as_many_as_fit(monkeypatch):
    monkeypatch.setattr(pieces, "PIECE_BYTES", 90)
    rows = lambda *shape: pieces.rows_in(np.zeros(shape, np.float32))  # noqa: E731
    assert (rows(10, 7), rows(10, 30), rows(0, 3)) == (3, 1, 1)


def test_the_next_is_made_ahead_where_both_have_room():
    made, used = [], []
    sizes = {"a": 3, "b": 4, "c": 4, "d": 8}
    for item, double in pieces.ahead(list(sizes), lambda item: made.append(item) or 2 * item, sizes.get):
        used.append((item, double))
    assert used == [(item, 2 * item) for item in sizes] and made == list(sizes)

    begun = threading.Event()
    each = pieces.ahead(["a", "b"], lambda item: item == "b" and begun.set(), lambda item: 1 if item == "a" else 2)
    assert next(each)[0] == "a" and not begun.is_set()  # a and b are 3 bytes together, and there is room for 2
    each = pieces.ahead(["a", "b", "c"], lambda item: item == "b" and begun.set(), lambda item: 2 if item == "c" else 1)
    assert next(each)[0] == "a" and begun.wait(60)


def test_what_making_raises_is_raised_at_its_place():
    each = pieces.ahead([1, 0, 2], lambda item: 1 / item, lambda item: 1 if item < 2 else 3)
    assert next(each) == (1, 1.0)
    with pytest.raises(ZeroDivisionError):
        next(each)


def test_each_thread_has_memory_of_its_own_that_it_uses_again(monkeypatch):
    monkeypatch.setattr(pieces, "WORKERS", 2)
    both = threading.Barrier(2)

    def work(number):
        mine = workers.scratch((2, 3), np.dtype(np.int32))
        mine[...] = number
        both.wait(60)
        again = workers.scratch((5,), np.dtype(np.int16))
        return mine.tolist(), np.shares_memory(mine, again)

    with pieces.Workers() as workers:
        found = workers.each(work, [1, 2])
    assert found == [([[1] * 3] * 2, True), ([[2] * 3] * 2, True)]


def test_what_a_thread_raises_is_raised_when_all_have_ended():
    done = []
    with pieces.Workers() as workers, pytest.raises(ZeroDivisionError):
        workers.each(lambda number: done.append(1 // number), [1, 0, 1, 1])
    assert done == [1, 1, 1]
