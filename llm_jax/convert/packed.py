"""Weights that a checkpoint holds in few bits, read as the bfloat16 numbers that they stand for.

What is written back is bfloat16: of these tensors, and of what is left out (`Source.left_out`), a conversion both ways
does not give the source's bytes; of all others it does.

    MXFP4 (OCP Microscaling Formats 1.0, section 5.4; GPT-OSS): NAME_blocks (E, out, G, 16) holds two 4-bit floats a
          byte, the low half first, NAME_scales (E, out, G) the exponent of 32 of them; NAME is (E, 32 G, out)
    FP8   (DeepSeek-V3, arXiv 2412.19437, section 3.3): NAME (out, in) in e4m3, NAME_scale_inv a float32 factor of each
          block of quantization_config's weight_block_size
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import ml_dtypes
import numpy as np

from llm_jax.convert.keys import Keys
from llm_jax.convert.safetensors import Tensor
from llm_jax.errors import DataError

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
FP8 = np.dtype(ml_dtypes.float8_e4m3fn)
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)  # a 4-bit float without its sign, which is the highest bit
PAIRS = np.array([[sign * value for sign in (1, -1) for value in E2M1]], np.float32).repeat(16, axis=0)  # (16, 16)
PAIRS = np.stack([PAIRS, PAIRS.T], -1).reshape(256, 2)  # of a byte: its low half, its high half
DESCRIBED = {  # keys of quantization_config that say nothing which the tensors do not
    "mxfp4": {"modules_to_not_convert"},
    "fp8": {"activation_scheme", "fmt", "weight_block_size", "modules_to_not_convert"},
}


def read_packing(keys: Keys, method: str) -> None:
    """Take quantization_config: none, or of this method ("mxfp4" or "fp8"). Raises ConfigError for another."""
    packing = keys.take("quantization_config", None)
    if packing is None:
        return
    found = dict(packing)
    if found.pop("quant_method", None) != method:
        raise keys.refuse("quantization_config", packing, f"weights are read as they are, or as {method}")
    if more := found.keys() - DESCRIBED[method]:
        raise keys.refuse("quantization_config", packing, f"{', '.join(sorted(more))} is not known of {method}")


@dataclasses.dataclass(frozen=True)
class Packed(Tensor):
    """A tensor that lies in two. `block`: of FP8, numbers that share a scale: rows, columns; (): MXFP4."""

    numbers: Tensor
    scales: Tensor
    block: tuple[int, ...] = ()

    @property
    def nbytes(self) -> int:
        return self.numbers.nbytes + self.scales.nbytes

    def read(self) -> np.ndarray:
        """One expert, or one row of blocks, after the other: float32 of all would take twice the result."""
        numbers, scales = self.numbers.read(), self.scales.read()
        found = np.empty(self.shape, BFLOAT16)
        if not self.block:
            for expert, room in enumerate(found):
                room[...] = _mxfp4(numbers[expert], scales[expert])
            return found
        height, width = self.block
        for place, of_blocks in enumerate(scales):
            rows = slice(place * height, (place + 1) * height)
            found[rows] = numbers[rows].astype(np.float32) * np.repeat(of_blocks, width)[: self.shape[1]]
        return found


def _mxfp4(blocks: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """(out, G, 16) and (out, G) to (32 G, out)."""
    values = np.ldexp(PAIRS[blocks].reshape(*scales.shape, 32), scales.astype(np.int32)[..., None] - 127)
    return values.reshape(len(values), -1).T.astype(BFLOAT16)


def unpacked(tensors: Mapping[str, Tensor], values: Mapping[str, Any]) -> dict[str, Tensor]:
    """The tensors, each pair of numbers and scales as one. `values`: of config.json.

    Raises DataError where the shapes of a pair do not belong together.
    """
    packing = values.get("quantization_config") or {}
    if packing.get("quant_method") == "mxfp4":
        return _with_pairs(tensors, "_blocks", "_scales", _of_mxfp4)
    if packing.get("quant_method") == "fp8":
        block = tuple(packing.get("weight_block_size") or (128, 128))
        fp8 = lambda numbers, scales: _of_fp8(numbers, scales, block)  # noqa: E731
        return _with_pairs(tensors, "", "_scale_inv", fp8)
    return dict(tensors)


def _with_pairs(tensors: Mapping[str, Tensor], of_numbers: str, of_scales: str, make: Any) -> dict[str, Tensor]:
    found = dict(tensors)
    for name in [name for name in tensors if name.endswith(of_scales)]:
        base = name.removesuffix(of_scales)
        if base + of_numbers in found:
            scales, numbers = found.pop(name), found.pop(base + of_numbers)
            found[base] = dataclasses.replace(make(numbers, scales), name=base)
    return found


def _of_mxfp4(numbers: Tensor, scales: Tensor) -> Packed:
    same = numbers.shape[:-1] == scales.shape and numbers.dtype == scales.dtype == np.uint8
    if not same or len(numbers.shape) != 4 or numbers.shape[-1] != 16:
        raise _do_not_fit(numbers, scales, "MXFP4 has 16 bytes of numbers for each byte of scales")
    experts, out, groups, _ = numbers.shape
    shape = (experts, 32 * groups, out)
    return Packed("", BFLOAT16, shape, numbers.file, numbers.start, numbers, scales)


def _of_fp8(numbers: Tensor, scales: Tensor, block: tuple[int, ...]) -> Packed:
    needed = tuple(-(-size // part) for size, part in zip(numbers.shape, block, strict=False))
    if len(numbers.shape) != 2 or scales.shape != needed or numbers.dtype != FP8:
        raise _do_not_fit(numbers, scales, f"FP8 has one scale for each block of {block[0]} x {block[-1]} numbers")
    return Packed("", BFLOAT16, numbers.shape, numbers.file, numbers.start, numbers, scales, block)


def _do_not_fit(numbers: Tensor, scales: Tensor, rule: str) -> DataError:
    told = f"{numbers.name} is {numbers.dtype.name}{list(numbers.shape)} and {scales.name} {list(scales.shape)}"
    return DataError(f"{numbers.file}: {told}, and {rule}")
