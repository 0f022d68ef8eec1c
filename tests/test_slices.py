"""Checkpoints read slice by slice: of any mesh, streamed or saved, in little memory, and never other numbers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from tiny import mesh_layout

from llm_jax.config import CheckpointConfig
from llm_jax.convert import pieces
from llm_jax.errors import UserError
from llm_jax.training import arrays, checkpoint
from llm_jax.training.record import DamagedCheckpoint
from llm_jax.training.slices import SavedArrays
from llm_jax.training.streamed import StreamedCheckpoint

VALUES = {
    "params/stack/w": np.random.default_rng(0).normal(size=(3, 8, 16)).astype(np.float32),
    "params/experts": np.random.default_rng(1).normal(size=(3, 2, 8, 4)).astype(jnp.bfloat16),
    "params/norm": np.random.default_rng(2).normal(size=8).astype(np.float32),
}
DEPTHS = {"params/stack/w": 1, "params/experts": 2, "params/norm": 0}
SHAPES = {path: jax.ShapeDtypeStruct(value.shape, value.dtype) for path, value in VALUES.items()}


def save(folder, **mesh):
    """As a run saves; split over fsdp, tensor and stages."""
    layout = mesh_layout(**mesh)
    specs = {"params/stack/w": ("stage", "fsdp", "tensor"), "params/experts": ("stage", None, "fsdp")}
    state = {
        path: jax.device_put(value, NamedSharding(layout.mesh, PartitionSpec(*specs.get(path, ()))))
        for path, value in VALUES.items()
    }
    with checkpoint.Checkpointer(folder, CheckpointConfig()) as saving:
        saving.save(0, arrays.nested(state | {"step": jnp.int32(0)}), {})
    return folder / "checkpoints" / "0"


def stream(folder):
    folder.mkdir()
    streamed = StreamedCheckpoint(folder / "arrays", SHAPES, DEPTHS)
    for path, value in VALUES.items():
        for index in np.ndindex(value.shape[: DEPTHS[path]]):
            streamed.write(path, index, value[index], "here")
    streamed.finish(folder, 0)
    return folder / "checkpoints" / "0"


def read_all(path):
    with SavedArrays(path, SHAPES) as saved:
        for name, value in VALUES.items():
            for index in np.ndindex(value.shape[: DEPTHS[name]]):
                found = saved.read(name, index)
                assert found.dtype == value.dtype
                np.testing.assert_array_equal(found, value[index])


@pytest.mark.parametrize("mesh", [{}, dict(fsdp=2, tensor=4), dict(stage=3, fsdp=2)], ids=["one", "split", "stages"])
def test_a_run_of_any_mesh_is_read_slice_by_slice(tmp_path, mesh):
    read_all(save(tmp_path / "run", **mesh))


def test_a_streamed_checkpoint_is_read_alike(tmp_path):
    read_all(stream(tmp_path / "run"))


def test_large_arrays_are_saved_in_chunks_of_one_layer(tmp_path, monkeypatch):
    monkeypatch.setattr(arrays, "CHUNK_BYTES", 256)
    path = save(tmp_path / "run", fsdp=2)
    read_all(path)
    with SavedArrays(path, SHAPES) as saved:
        chunk = saved._open("params/stack/w", 1).chunk_layout.read_chunk.shape
        assert chunk[0] == 1 and np.prod(chunk) * 4 <= 256
        assert saved._open("params/experts", 2).chunk_layout.read_chunk.shape[:2] == (1, 1)
    monkeypatch.undo()
    found, _ = arrays.load(path, SHAPES, partial=True)
    for name, value in VALUES.items():
        np.testing.assert_array_equal(found[name], value)


def test_pieces_that_are_summed_add_up(tmp_path, monkeypatch):
    monkeypatch.setattr(pieces, "PIECE_BYTES", 40)
    read_all(save(tmp_path / "run"))
    read_all(stream(tmp_path / "streamed"))


def test_another_number_is_noticed(tmp_path):
    path = stream(tmp_path / "run")
    file = next((path / "state" / "params.norm").rglob("c/*"))
    content = bytearray(file.read_bytes())
    content[5] ^= 1
    file.write_bytes(content)
    with (
        pytest.raises(DamagedCheckpoint, match="params/norm is not what was saved"),
        SavedArrays(path, SHAPES) as saved,
    ):
        saved.read("params/norm")


@pytest.mark.parametrize("streamed", [True, False])
def test_what_cannot_be_read_is_damage(tmp_path, streamed):
    path = stream(tmp_path / "run") if streamed else save(tmp_path / "run")
    for file in path.joinpath("state").rglob("*"):
        if file.is_file() and (file.name == "zarr.json" or file.parent.name == "d"):
            file.write_bytes(b"x" * 40)
    with pytest.raises(DamagedCheckpoint, match="params/norm cannot be read"), SavedArrays(path, SHAPES) as saved:
        saved.read("params/norm")


def test_another_shape_is_refused(tmp_path):
    other = SHAPES | {"params/norm": jax.ShapeDtypeStruct((9,), np.float32)}
    with pytest.raises(UserError, match=r"params/norm is float32\[8\] there and float32\[9\] here"):
        SavedArrays(stream(tmp_path / "run"), other)


def test_half_an_array_has_no_fingerprint(tmp_path):
    with (
        pytest.raises(ValueError, match="128 numbers were read"),
        SavedArrays(stream(tmp_path / "run"), SHAPES) as saved,
    ):
        saved.read("params/stack/w", (1,))
