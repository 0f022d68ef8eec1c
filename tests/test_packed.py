"""Weights in few bits: MXFP4 and FP8 as the numbers they stand for, and a checkpoint of GPT-OSS that holds them."""

import tracemalloc

import hub_models
import jax
import ml_dtypes
import numpy as np
import pytest
from tiny import assert_same_bits, quick_compiler

from llm_jax.convert import safetensors
from llm_jax.convert.packed import unpacked
from llm_jax.convert.safetensors import Planned
from llm_jax.errors import ConfigError, DataError, Unproven
from llm_jax.training import convert, restore

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
FP8 = np.dtype(ml_dtypes.float8_e4m3fn)
MXFP4 = {"quantization_config": {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]}}
E2M1 = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0]


def fp8(block):
    described = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": block}
    return {"quantization_config": described}


def written(folder, arrays):
    planned = [Planned(name, array.dtype, array.shape) for name, array in arrays.items()]
    folder.mkdir(exist_ok=True)
    safetensors.write_folder(folder, planned, lambda tensor: arrays[tensor.name], largest=1 << 30)
    return safetensors.read_folder(folder)


def test_mxfp4_is_two_numbers_a_byte_and_an_exponent_for_32(tmp_path):
    """Low half first; numbers run along what a layer's input is, which comes before its output here."""
    blocks = np.zeros((1, 2, 2, 16), np.uint8)
    blocks[0, 0, 0, :3] = 0x21, 0x7F, 0x80  # 0.5 and 1; -6 and 6; 0 and -0
    blocks[0, 1, 1, 15] = 0xA3  # 1.5 and -1
    scales = np.full((1, 2, 2), 127, np.uint8)
    scales[0, 0, 0], scales[0, 1, 1] = 128, 124
    tensors = unpacked(written(tmp_path, {"w_blocks": blocks, "w_scales": scales, "other": np.ones(2)}), MXFP4)
    assert tensors.keys() == {"w", "other"}
    found = tensors["w"]
    assert (found.name, found.shape, found.dtype) == ("w", (1, 64, 2), BFLOAT16)
    assert found.nbytes == blocks.nbytes + scales.nbytes
    values = found.read()
    assert values.dtype == BFLOAT16 and values.shape == (1, 64, 2)
    assert values[0, :6, 0].tolist() == [1.0, 2.0, -12.0, 12.0, 0.0, 0.0] and np.signbit(values[0, 5, 0])
    assert values[0, 62:, 1].tolist() == [1.5 / 8, -1.0 / 8]
    assert not values[0, 6:, 0].any() and not values[0, :62, 1].any()


def test_fp8_has_a_scale_for_each_block(tmp_path):
    weight = np.arange(-10, 11, dtype=np.float32).reshape(3, 7).astype(FP8)
    scales = np.array([[1.0, 2.0], [0.5, 4.0]], np.float32)
    tensors = unpacked(written(tmp_path, {"w.weight": weight, "w.weight_scale_inv": scales}), fp8([2, 4]))
    assert tensors.keys() == {"w.weight"}
    expected = [[weight[i, j] * scales[i // 2, j // 4] for j in range(7)] for i in range(3)]
    np.testing.assert_array_equal(tensors["w.weight"].read(), np.asarray(expected, np.float32).astype(BFLOAT16))


def test_fp8_ends_in_the_middle_of_a_block(tmp_path):
    rng = np.random.RandomState(0)
    weight, scales = rng.standard_normal((11, 13)).astype(FP8), rng.uniform(0.5, 2, (3, 4)).astype(np.float32)
    tensors = unpacked(written(tmp_path, {"w": weight, "w_scale_inv": scales}), fp8([5, 4]))
    wide = [[scales[i // 5, j // 4] for j in range(13)] for i in range(11)]
    expected = (weight.astype(np.float32) * np.asarray(wide, np.float32)).astype(BFLOAT16)
    assert tensors["w"].read().tobytes() == expected.tobytes()


@pytest.mark.parametrize("method", ["mxfp4", "fp8"])
def test_a_packed_tensor_is_once_in_memory(tmp_path, method):
    """What is read, the result, and little beside."""
    if method == "mxfp4":
        blocks, scales = np.zeros((32, 64, 4, 16), np.uint8), np.full((32, 64, 4), 127, np.uint8)
        tensors = unpacked(written(tmp_path, {"w_blocks": blocks, "w_scales": scales}), MXFP4)
    else:
        arrays = {"w": np.zeros((640, 256), FP8), "w_scale_inv": np.ones((40, 16), np.float32)}
        tensors = unpacked(written(tmp_path, arrays), fp8([16, 16]))
    tensors["w"].read()
    tracemalloc.start()
    values = tensors["w"].read()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < tensors["w"].nbytes + 1.5 * values.nbytes


@pytest.mark.parametrize(
    ("arrays", "values"),
    [
        ({"w_blocks": np.zeros((1, 2, 3, 16), np.uint8), "w_scales": np.zeros((1, 2, 2), np.uint8)}, MXFP4),
        ({"w_blocks": np.zeros((1, 2, 3, 8), np.uint8), "w_scales": np.zeros((1, 2, 3), np.uint8)}, MXFP4),
        ({"w": np.zeros((3, 5), FP8), "w_scale_inv": np.zeros((1, 1), np.float32)}, fp8([2, 4])),
        ({"w": np.zeros((2, 4), np.float32), "w_scale_inv": np.zeros((1, 1), np.float32)}, fp8([2, 4])),
    ],
)
def test_pairs_that_do_not_belong_together_are_refused(tmp_path, arrays, values):
    with pytest.raises(DataError, match="w_(scales|scale_inv) .*and (MXFP4|FP8) has"):
        unpacked(written(tmp_path, arrays), values)


def test_without_a_quantization_nothing_is_joined(tmp_path):
    arrays = {"w_blocks": np.zeros((1, 2, 3, 16), np.uint8), "w_scales": np.zeros((1, 2, 3), np.uint8)}
    assert unpacked(written(tmp_path, arrays), {}).keys() == arrays.keys()


# ---------------------------------------------------------------------------------------------- a checkpoint


def packed_experts(arrays):
    """The experts of a GPT-OSS model as MXFP4, and as the numbers which that stands for."""
    rng, packed, plain = np.random.RandomState(0), dict(arrays), dict(arrays)
    for name in [name for name in arrays if name.endswith(("gate_up_proj", "down_proj"))]:
        experts, size, out = arrays[name].shape
        blocks = rng.randint(0, 256, (experts, out, size // 32, 16)).astype(np.uint8)
        scales = rng.randint(118, 124, (experts, out, size // 32)).astype(np.uint8)
        packed |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
        del packed[name]
        values = np.zeros(arrays[name].shape, np.float32)
        for e, o, g, i in np.ndindex(blocks.shape):
            scale = 2.0 ** (int(scales[e, o, g]) - 127)
            values[e, 32 * g + 2 * i, o] = scale * E2M1[blocks[e, o, g, i] & 15]
            values[e, 32 * g + 2 * i + 1, o] = scale * E2M1[blocks[e, o, g, i] >> 4]
        plain[name] = values
    return packed, plain


def gpt_oss(width):
    config, arrays = hub_models.stored("GPT-OSS")
    shapes = {name: [width if size == 20 else 2 * width if size == 40 else size for size in array.shape]
              for name, array in arrays.items()}  # fmt: skip
    return config | {"intermediate_size": width}, hub_models.weights(shapes)


def source(folder, config, arrays):
    folder.mkdir()
    (folder / "config.json").write_text(hub_models.json.dumps(config))
    bf16 = {n: a if a.dtype == np.uint8 else a.astype(BFLOAT16) for n, a in arrays.items()}
    written(folder, bf16)
    return folder


def test_gpt_oss_in_mxfp4_is_the_model_that_it_stands_for(tmp_path):
    config, arrays = gpt_oss(32)
    packed, plain = packed_experts(arrays)
    with quick_compiler():
        for name, values, tensors in (("packed", config | MXFP4, packed), ("plain", config, plain)):
            folder = source(tmp_path / f"{name}_source", values, tensors)
            with pytest.raises(Unproven):
                convert.from_hub(
                    str(folder), str(tmp_path / name), check=False, overrides=["mesh.data=1", "mesh.fsdp=-1"]
                )
        runs = [
            restore.restore(str(tmp_path / name), overrides=["mesh.data=-1", "mesh.fsdp=1"])
            for name in ("packed", "plain")
        ]
        assert_same_bits(*(jax.tree.map(np.asarray, run.params) for run in runs))
        with pytest.raises(Unproven):
            convert.to_hub(str(tmp_path / "packed"), str(tmp_path / "back"), check=False)
    found, expected = hub_models.read(tmp_path / "back"), hub_models.read(tmp_path / "plain_source")
    assert found.keys() == expected.keys()
    assert all(found[key].tobytes() == array.tobytes() for key, array in expected.items())
    back = hub_models.json.loads((tmp_path / "back" / "config.json").read_text())
    assert "quantization_config" not in back


@pytest.mark.parametrize(
    ("packing", "message"),
    [
        ({"quant_method": "gptq"}, "weights are read as they are, or as mxfp4"),
        ({"quant_method": "mxfp4", "group_size": 64}, "group_size is not known of mxfp4"),
    ],
)
def test_other_quantizations_are_refused(tmp_path, packing, message):
    config, arrays = hub_models.stored("GPT-OSS")
    folder = hub_models.write(tmp_path / "source", config | {"quantization_config": packing}, arrays)
    with pytest.raises(ConfigError, match=message):
        convert.from_hub(str(folder), str(tmp_path / "run"))


def test_a_packed_tensor_is_one_of_the_folder(tmp_path):
    """Half of a pair is left over, and says so by its name."""
    config, arrays = gpt_oss(32)
    packed, _ = packed_experts(arrays)
    del packed[next(name for name in packed if name.endswith("_scales"))]
    folder = source(tmp_path / "source", config | MXFP4, packed)
    with pytest.raises(DataError, match="gate_up_proj|down_proj"):
        convert.from_hub(str(folder), str(tmp_path / "run"))
