"""The estimate without compiling: arithmetic on sizes, in the form of the compiled one.

Held against the compilers on ten settings (tests/golden/plan_compiled.json): memory within 15 %, time within 25 %.
Where a number here is not arithmetic, it was fitted to those.
"""

import dataclasses
import math

import jax
import numpy as np

from llm_jax.config import TransformerConfig
from llm_jax.config.kinds import segments
from llm_jax.models.attention import head_dim, num_kv_heads
from llm_jax.plan.cost import GPU, TPU, Constants, Moved, Times
from llm_jax.plan.estimate import Estimate
from llm_jax.plan.memory import Memory
from llm_jax.plan.network import Placed, placed, seconds, varying_axes
from llm_jax.plan.setting import Setting
from llm_jax.sharding import HOST_MEMORY

WEIGHT = 2  # bytes of a number in the compute dtype, bfloat16
# Share of the peak that the compilers' own estimates reach in matrix products. v6e: with its default of fast memory.
MATRIX = {"v4": 0.80, "v5e": 0.84, "v5p": 0.79, "v6e": 0.25, "tpu7x": 0.72}
HIDDEN = {"v4": 0.0, "v5p": 0.0, "tpu7x": 0.5, "v5e": 0.8, "v6e": 0.5}  # of the weights' gathering; GPUs: 0.6
GPU_HIDDEN = 0.6
PASSES = {"tpu": 140.0, "gpu": 60.0}  # times that a layer's activations go through memory
PASSES_EXPERTS = 2.4  # as many again: rows are sorted, copied and put back
PASSES_SAVED = 6.0  # and what is kept for the backward pass: stacked, read back


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Of what one device works on at a time.

    Attributes:
      tokens: of a micro-batch; micro: micro-batches; layers: of this device's stages.
      width, mlp, heads, kv: numbers a token, the device's part of what is split.
      rows: of the experts' products for each token (1 without experts).
      results: of experts for each token, once they are back at it (1 without experts).
      residual: parts of the residual stream.
    """

    tokens: float
    micro: int
    layers: float
    width: int
    mlp: float
    heads: float
    kv: float
    rows: float
    results: float
    residual: int
    gated: bool


def sizes(setting: Setting) -> Sizes:
    cfg, model, mesh, layout = setting.cfg, setting.cfg.model, setting.mesh, setting.layout
    split = layout.batch_shards * layout.activation_pieces("length")
    experts = model.moe.num_experts
    rows = float(model.moe.top_k) if experts else 1.0
    if experts and mesh["expert"] > 1:
        rows = float(mesh["expert"] * min(model.moe.top_k, experts // mesh["expert"]))
    width = (model.moe.expert_dim if experts else 0) or model.mlp_dim or 4 * model.embed_dim
    return Sizes(
        tokens=setting.tokens / split / cfg.train.accumulation,
        micro=cfg.train.accumulation,
        layers=sum(len(s.kinds) / (layout.stages if s.name == "blocks" else 1) for s in segments(model)),
        width=model.embed_dim,
        mlp=width / mesh["tensor"],
        heads=model.num_heads * head_dim(model) / mesh["tensor"],
        kv=num_kv_heads(model) * head_dim(model) / mesh["tensor"],
        rows=rows,
        results=model.moe.top_k * (model.moe.capacity_factor or 1.0) if experts else 1.0,
        residual=max(layout.activation_pieces("residual_length") // layout.activation_pieces("length"), 1),
        gated="glu" in model.activation,
    )


def quick_estimate(setting: Setting) -> Estimate:
    """Memory, times and rates of a setting, in well under a second."""
    size = sizes(setting)
    return Estimate(setting, memory(setting, size), times(setting, size), "estimated without compiling", [])


# ------------------------------------------------------------------------------------------------------ memory


def kept(model: TransformerConfig, size: Sizes) -> dict[str, float]:
    """Numbers a token and layer that the backward pass finds kept, by name. "=host" names are left out."""
    names = named(size)
    stream, up = names["layer_input"], names["mlp_up"]
    if not needs_output(model):
        names["mlp_output"] = 0
    if model.remat == "names":
        return {"layer_input": stream} | {name: names[name] for name in model.remat_save if name in names}
    if model.remat == "full":
        return {"layer_input": stream}
    if model.remat in ("dots", "dots_no_batch"):
        attention = {name: names[name] for name in ("layer_input", "query", "key", "value", "attention_output")}
        return attention | {name: names[name] for name in MLP_NAMES if keeps_products(model)}
    rotated = (size.heads + size.kv) * (model.positions == "rotary")
    inside = {"norms": 4 * stream, "middle": stream, "rotated": rotated, "hidden": up * (3 if size.gated else 5)}
    return names | inside


MLP_NAMES = ("mlp_up", "mlp_gate", "mlp_output")


def needs_output(model: TransformerConfig) -> bool:
    """Whether some gradient needs what the MLP gives: of experts' weights, of a norm behind it."""
    return model.moe.num_experts > 0 or model.norm_placement in ("post", "sandwich", "output")


def keeps_products(model: TransformerConfig) -> bool:
    """Whether remat "dots" finds the MLP's products: grouped ones are no dots; with capacity, experts are batches."""
    return not model.moe.num_experts or (model.moe.capacity_factor > 0 and model.remat == "dots")


def named(size: Sizes) -> dict[str, float]:
    """Numbers a token and layer of the tensors that `model.remat_save` can name."""
    stream, up = size.width / size.residual, size.mlp * size.rows
    attention = {"query": size.heads, "key": size.kv, "value": size.kv, "attention": size.heads}
    mlp = {"mlp_up": up, "mlp_gate": up * size.gated, "mlp_output": size.width * size.results}
    return {"layer_input": stream} | attention | {"attention_output": stream} | mlp


def memory(setting: Setting, size: Sizes) -> Memory:
    state, cfg = setting.state_bytes(), setting.cfg
    saved = sum(kept(cfg.model, size).values()) * size.tokens * size.layers * item_bytes(setting)
    return Memory(
        state["parameters"],
        state["optimizer"],
        state["gradients"],
        saved,
        temporaries(setting, size),
        setting.tokens / setting.layout.batch_shards * 20,
        host_bytes(setting, size),
    )


def temporaries(setting: Setting, size: Sizes) -> float:
    """One block's inside, forward and backward, with its gathered weights and their gradients; or the logits."""
    wide = item_bytes(setting)
    stream, up = size.width / size.residual, size.mlp * size.rows
    inside = size.tokens * wide * (INSIDE_WIDTH * stream + INSIDE_HEADS * size.heads + INSIDE_MLP * up)
    weights = layer_weights(setting, size) * wide * WEIGHT_COPIES
    head = size.width * setting.cfg.model.vocab_size / vocab_parts(setting)
    chunk = setting.cfg.train.loss_chunk or setting.cfg.data.sequence_length
    logits = size.tokens * min(chunk / setting.cfg.data.sequence_length, 1) * setting.cfg.model.vocab_size * 4
    return max(inside + weights, 2 * logits / vocab_parts(setting)) + head * HEAD_BYTES


INSIDE_WIDTH, INSIDE_HEADS, INSIDE_MLP = 6.0, 6.0, 4.0  # copies of each that are alive at the fullest moment
WEIGHT_COPIES = 1.6  # gathered weights, and their gradient before it is scattered
HEAD_BYTES = 6  # a number of the gathered head, and of its gradient


def layer_weights(setting: Setting, size: Sizes) -> float:
    """Numbers of one layer's weights as a device multiplies them: gathered over fsdp, split over tensor and expert."""
    model, mesh = setting.cfg.model, setting.mesh
    attention = size.width * (2 * size.heads + 2 * size.kv)
    experts = max(model.moe.num_experts, 1) / mesh["expert"]
    return attention + size.width * size.mlp * (2 + size.gated) * experts


def vocab_parts(setting: Setting) -> int:
    return setting.layout.activation_pieces("vocab")


def item_bytes(setting: Setting) -> int:
    return {"bfloat16": 2, "float32": 4, "float64": 8}[setting.cfg.precision.compute]


def host_bytes(setting: Setting, size: Sizes) -> float:
    """Saved tensors that wait in the host's memory, and offloaded optimizer state."""
    host = [name.removesuffix("=host") for name in setting.cfg.model.remat_save if name.endswith("=host")]
    saved = sum(named(size).get(name, 0) for name in host) * size.tokens * size.layers * item_bytes(setting)
    waiting = [leaf for leaf in jax.tree.leaves(setting.state.opt_state) if leaf.sharding.memory_kind == HOST_MEMORY]
    return saved + sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in waiting)


# -------------------------------------------------------------------------------------------------------- time


def times(setting: Setting, size: Sizes) -> Times:
    machine = setting.machine
    constants = TPU if machine.hardware.tpu else GPU
    products, kernels = computed_flops(setting, size)
    share = MATRIX[machine.hardware.name] if machine.hardware.tpu else constants.matrix
    reached = constants.kernels
    attention = kernels[0] / reached["attention"] + kernels[1] / reached["attention backward"]
    found = Times(
        matrix=products["dense"] / (machine.hardware.flops * share) * constants.cycles,
        kernel=(attention + products["experts"] / reached["grouped product"]) / machine.hardware.flops,
        memory=memory_seconds(setting, size, constants) * constants.cycles,
        flops=products["dense"] + products["experts"] + sum(kernels),
    )
    network(setting, size, constants, found)
    if setting.layout.stages > 1:  # turns in which a stage has nothing of its own cost as much as the others
        turns = setting.layout.stage_microbatches * setting.layout.stage_repeats
        for name in ("matrix", "kernel", "memory"):
            setattr(found, name, getattr(found, name) * (turns + setting.layout.stages - 1) / turns)
    return found


def computed_flops(setting: Setting, size: Sizes) -> tuple[dict[str, float], tuple[float, float]]:
    """({"dense", "experts"}: matrix products, (attention kernels forward, backward)) of a device and step.

    What is computed again counts again.
    """
    model, tokens = setting.cfg.model, size.tokens * size.micro
    qkv, out = 2 * size.width * (size.heads + 2 * size.kv), 2 * size.width * size.heads
    up, down = 2 * size.width * size.mlp * (1 + size.gated), 2 * size.width * size.mlp
    again = {"full": qkv + out, "names": out}.get(model.remat, 0.0)
    again_up, saved = 0.0, set()
    if model.remat == "names":
        saved = {name.removesuffix("=host") for name in model.remat_save}
        again -= out if "attention_output" in saved else 0.0
        again += 0.0 if {"query", "key", "value"} <= saved else qkv
        again_up = 0.0 if "mlp_up" in saved and ("mlp_gate" in saved or not size.gated) else up
        again_up += down if needs_output(model) and "mlp_output" not in saved else 0.0
    elif model.remat == "full" or (model.remat != "none" and not keeps_products(model)):
        again_up = up + (down if needs_output(model) else 0.0)
    experts = model.moe.num_experts > 0
    head = 2 * size.width * model.vocab_size / vocab_parts(setting) * (4 if setting.cfg.train.loss_chunk else 3)
    layer = 3 * (qkv + out) + again
    mlp = (3 * (up + down) + again_up) * (size.rows if experts else 1.0)
    dense = tokens * (size.layers * (layer + (0 if experts else mlp)) + head)
    visible = setting.cfg.data.sequence_length / 2
    once = 4 * size.heads * visible * tokens * size.layers
    tpu = setting.machine.hardware.tpu
    backward = 3.5 if tpu else 2.5  # times the forward's: queries' and keys' gradients apart, or not
    once_only = model.remat == "none" or (tpu and "attention" in saved)
    kernels = once * (1 if once_only else 2), once * backward
    return {"dense": dense, "experts": tokens * size.layers * mlp if experts else 0.0}, kernels


def memory_seconds(setting: Setting, size: Sizes, constants: Constants) -> float:
    """Operations on whole activations, and the optimizer's pass over the state."""
    hardware, model = setting.machine.hardware, setting.cfg.model
    numbers = size.width / size.residual + size.rows * size.mlp * 0.2 + size.heads * 0.5
    passes = PASSES["tpu" if hardware.tpu else "gpu"] * (PASSES_EXPERTS if model.moe.num_experts else 1.0)
    numbers = passes * numbers + PASSES_SAVED * sum(kept(model, size).values())
    moved = numbers * size.tokens * size.micro * size.layers * item_bytes(setting)
    state = setting.state_bytes()
    moved += 2 * (state["parameters"] + state["optimizer"]) + state["gradients"]
    return moved / (hardware.bandwidth * constants.memory)


def network(setting: Setting, size: Sizes, constants: Constants, found: Times) -> None:
    """Put what the mesh axes move into `found`."""
    on = placed(setting.machine, setting.mesh)
    busy = found.busy
    weights = layer_weights(setting, size) * size.layers * WEIGHT
    turns = size.micro * (setting.layout.stage_microbatches if setting.layout.stages > 1 else 1)
    hidden = HIDDEN.get(setting.machine.hardware.name, GPU_HIDDEN)
    if setting.mesh["fsdp"] > 1:
        add(found, on, constants, "all-gather", ("fsdp",), 2 * turns * weights, hidden, busy)
        add(found, on, constants, "reduce-scatter", ("fsdp",), turns * weights, hidden / 2, busy)
    if setting.mesh["data"] > 1:
        shard = weights / setting.mesh["fsdp"]
        add(found, on, constants, "all-reduce", ("data",), turns * shard, hidden / 2, busy)
    if setting.mesh["tensor"] > 1:
        stream = size.tokens * size.micro * size.width * WEIGHT * size.layers
        add(found, on, constants, "all-gather", ("tensor",), 5 * stream, 0.3, busy)
        add(found, on, constants, "reduce-scatter", ("tensor",), 4 * stream, 0.3, busy)
    if setting.mesh["expert"] > 1:
        moved = size.tokens * size.micro * size.width * size.rows * WEIGHT * size.layers
        add(found, on, constants, "all-to-all", ("expert",), 6 * moved, 0.0, busy)


def add(
    found: Times, on: Placed, constants: Constants, kind: str, axes: tuple[str, ...], whole: float, hidden: float,
    busy: float,
) -> None:  # fmt: skip
    """A collective of `whole` bytes over mesh axes; the share `hidden` of it runs beside work, if there is enough."""
    devices = np.arange(len(on.places)).reshape(tuple(on.mesh.values()))
    over = [list(on.mesh).index(axis) for axis in axes]
    groups = np.moveaxis(devices, over, range(-len(over), 0)).reshape(-1, math.prod(on.mesh[axis] for axis in axes))
    share = (groups.shape[1] - 1) / groups.shape[1] * (2 if kind == "all-reduce" else 1)
    time = seconds(kind, whole * share, groups, on) / constants.links
    waited = time - min(hidden * time, 0.9 * busy)
    moved = Moved(1, whole * share, time, waited)
    found.moved.setdefault((kind, varying_axes(groups, on.mesh)), Moved()).add(moved, 1)
    found.waited += waited
