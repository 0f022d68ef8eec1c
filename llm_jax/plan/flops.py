"""FLOPs of an instruction, counted from shapes: matrix products, convolutions, and kernels that XLA cannot see into."""

import re

import numpy as np

from llm_jax.plan.hlo import Computation, Instruction, Program, Shape

PRODUCTS = ("dot", "convolution")


def product_flops(one: Instruction, computation: Computation) -> float:
    """2 x output x contracted size of a `dot` or `convolution`; 0 of anything else."""
    if one.opcode not in PRODUCTS or len(one.operands) < 2:
        return 0.0
    left, right = (computation[name].shapes[0] for name in one.operands[:2] if name in computation)
    if one.opcode == "dot":
        found = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", one.rest)
        dims = [int(n) for n in found[1].split(",") if n] if found else []
        return 2.0 * one.shapes[0].size * float(np.prod([left.dims[d] for d in dims]))
    return convolution_flops(one, left, right)


def convolution_flops(one: Instruction, left: Shape, right: Shape) -> float:
    """Of a convolution: TPU programs write all their matrix products so, batched ones with windows over the batch.

    Multiplications with padding do not count: of a window over the batch, one place in each is real.
    """
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", one.rest)
    if not labels:
        return 0.0
    lhs, rhs, out = labels.groups()
    window = dict(re.findall(r"(\w+)=([\dx_-]+)", (re.search(r"window=\{([^}]*)\}", one.rest) or [None, ""])[1]))
    spatial = sorted(c for c in out if c.isdigit())
    entries = {key: value.split("x") for key, value in window.items()}
    places = 1.0
    for i, name in enumerate(spatial):
        size = int(entries["size"][i]) if "size" in entries else 1
        stride, dilation, rhs_dilation = (int(entries[k][i]) if k in entries else 1
                                          for k in ("stride", "lhs_dilate", "rhs_dilate"))  # fmt: skip
        low = int(entries["pad"][i].split("_")[0]) if "pad" in entries else 0
        places *= valid_places(
            one.shapes[0].dims[out.index(name)], size, left.dims[lhs.index(name)], stride, low, dilation, rhs_dilation
        )
    batch, features = one.shapes[0].dims[out.index("b")], one.shapes[0].dims[out.index("f")]
    groups = re.search(r"batch_group_count=(\d+)", one.rest)
    return 2.0 * batch * features * right.dims[rhs.index("i")] * places / (int(groups[1]) if groups else 1)


def valid_places(out: int, size: int, given: int, stride: int, low: int, dilation: int, rhs_dilation: int) -> float:
    """Pairs (output place, window place) that read a number of the input, and not padding or a gap of its dilation."""
    if size == 1 and dilation == 1 and not low:
        return float(out)
    at = np.arange(out)[:, None] * stride + np.arange(size)[None] * rhs_dilation - low
    return float(((at >= 0) & (at % dilation == 0) & (at // dilation < given)).sum())


def instruction_flops(program: Program, one: Instruction, computation: str) -> float:
    """Of an instruction with all that is fused into it."""
    inside = program.fused(one)
    if inside:
        return sum(nested_flops(program, part, inside) for part in inside.values())
    return product_flops(one, program.computations[computation]) + library_flops(one, program.computations[computation])


def nested_flops(program: Program, part: Instruction, around: Computation) -> float:
    deeper = program.fused(part)
    if deeper:
        return sum(nested_flops(program, one, deeper) for one in deeper.values())
    return product_flops(part, around)


def library_flops(one: Instruction, computation: Computation) -> float:
    """Of a cuBLAS call: 2 x output x the contracted size, named in its configuration."""
    if "cublas" not in one.target:
        return 0.0
    left = computation[one.operands[0]].shapes[0]
    found = re.search(r'"lhs_contracting_dimensions":\["?([\d",]*?)"?\]', one.rest)
    dims = [int(n) for n in re.findall(r"\d+", found[1])] if found else []
    return 2.0 * one.shapes[0].size * float(np.prod([left.dims[d] for d in dims]))


# ------------------------------------------------------------------------------------------------------ kernels

ATTENTION = (  # (a word in the kernel's name, matrix products over all pairs of tokens)
    ("splash_mha_dkv", 4), ("splash_mha_dq", 3), ("splash_mha_fwd", 2), ("splash_mqa_dkv", 4), ("splash_mqa_dq", 3),
    ("splash_mqa_fwd", 2),
)  # fmt: skip
CUDNN = "__cudnn$fmha"  # then what is done to the scores, and "Backward"


def kernel_flops(one: Instruction, computation: Computation) -> tuple[str, float]:
    """(what kind of kernel, its FLOPs) of a Pallas or cuDNN call; ("other", 0.0) of one that is not known.

    Attention is taken as causal: blocks beyond the diagonal are skipped.
    """
    name = one.target + " " + one.name + " " + one.op_name.rsplit("/", 2)[-1]
    shapes = [computation[o].shapes[0] for o in one.operands if o in computation and computation[o].shapes]
    if one.target.startswith(CUDNN):
        backward = one.target.endswith("Backward")
        return ("attention backward" if backward else "attention"), cudnn_flops(5 if backward else 2, one, shapes)
    for word, products in ATTENTION:
        if word in name:
            fused = products == 4 and re.search(
                r"use_fused_bwd_kernel\W+true", one.rest
            )  # with the gradient of queries
            kind = "attention backward" if products > 2 else "attention"
            return kind, splash_flops(5 if fused else products, shapes)
    matrices = [s for s in shapes if s.dtype in ("bf16", "f32", "f8e4m3fn", "f8e5m2", "s8") and len(s.dims) >= 2]
    if ("ragged-dot" in name or "gmm" in name) and len(matrices) >= 2:
        rows, other = matrices[-2:]
        if len(other.dims) == 3:  # rows (m, k) times a matrix (k, n) of each group
            return "grouped product", 2.0 * rows.dims[0] * rows.dims[1] * other.size / other.dims[0] / rows.dims[1]
        return "grouped product", 2.0 * rows.size * other.dims[-1]  # (m, k) and (m, n): a gradient of each group's
    return "other", 0.0


def cudnn_flops(products: int, one: Instruction, shapes: list[Shape]) -> float:
    """Of queries (B, T, N, H)."""
    batch, length, heads, size = shapes[0].dims
    seen = 0.5 if "CAUSAL" in one.rest else 1.0
    return products * 2.0 * batch * heads * length**2 * size * seen


def splash_flops(products: int, shapes: list[Shape]) -> float:
    """Of queries (N, T, H) or (B, N, T, H), in blocks; those beyond the diagonal are skipped."""
    query = next((s for s in shapes if s.dtype in ("bf16", "f32") and len(s.dims) >= 3), None)
    if query is None:
        return 0.0
    heads, length, size = query.dims[-3:]
    blocks = next((s.dims[-1] for s in shapes if s.dtype in ("s8", "s32") and len(s.dims) == 3), length // 512)
    return products * query.size // size * 2.0 * length * size * 0.5 * (1 + 1 / max(blocks, 1))
