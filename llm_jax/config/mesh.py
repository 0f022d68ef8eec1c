"""What a device mesh of six axes asks of a run: sizes that fit the devices, and parts of equal size for every axis."""

import math

from llm_jax.config.kinds import periods, segments
from llm_jax.config.pipeline import check_pipeline
from llm_jax.config.schema import Config, MeshConfig, TransformerConfig
from llm_jax.config.tasks import row_lengths
from llm_jax.config.values import did_you_mean, divisors, nearest_multiples, refuse

MESH_AXES = ("stage", "data", "fsdp", "expert", "sequence", "tensor")  # neighbours communicate most: they come last
BATCH_AXES = ("data", "fsdp", "expert")

# ------------------------------------------------------------------------------------------------ sizes


def check_mesh(mesh: MeshConfig) -> None:
    sizes = {axis: getattr(mesh, axis) for axis in MESH_AXES}
    for axis, size in sizes.items():
        if size == 0:
            raise refuse(
                f"mesh.{axis}", 0, "an axis has at least one device", "give 1, or -1 for all remaining devices"
            )
    rest = [axis for axis, size in sizes.items() if size == -1]
    if len(rest) > 1:
        reason = f"mesh.{rest[0]} is -1 too, and only one axis can take all remaining devices"
        raise refuse(f"mesh.{rest[1]}", -1, reason, f"give mesh.{rest[0]} or mesh.{rest[1]} a size")
    check_slices(mesh, sizes)


def slice_sizes(mesh: MeshConfig) -> dict[str, int]:
    """The part of each axis that goes over slices or nodes, of `mesh.across_slices`; empty: all in one."""
    sizes: dict[str, int] = {}
    for entry in mesh.across_slices:
        axis, _, size = entry.partition("=")
        if axis not in MESH_AXES or axis in sizes or not size.isdecimal() or int(size) < 2:
            reason = f"it does not read as AXIS=SIZE, with {', '.join(MESH_AXES)} at most once and 2 or more slices"
            fix = did_you_mean(axis, set(MESH_AXES) - {axis}, "data=2 splits the batch over two slices")
            raise refuse("mesh.across_slices", entry, reason, fix)
        sizes[axis] = int(size)
    return sizes


def check_slices(mesh: MeshConfig, sizes: dict[str, int]) -> None:
    """An axis that goes over slices has as many devices in each. `sizes` may hold -1, for what is not known yet."""
    for axis, outer in slice_sizes(mesh).items():
        if sizes[axis] != -1 and sizes[axis] % outer:
            reason = f"mesh.{axis} = {sizes[axis]} does not split into {outer} equal parts"
            raise refuse("mesh.across_slices", f"{axis}={outer}", reason, f"make mesh.{axis} a multiple of {outer}")


def mesh_sizes(mesh: MeshConfig, num_devices: int) -> dict[str, int]:
    """The size of each mesh axis on `num_devices` devices, -1 filled in. Raises ConfigError where they do not fit."""
    sizes = {axis: getattr(mesh, axis) for axis in MESH_AXES}
    fixed = math.prod(size for size in sizes.values() if size != -1)
    rest = [axis for axis, size in sizes.items() if size == -1]
    shown = " * ".join(f"{axis} {size}" for axis, size in sizes.items() if size != -1)
    if rest and num_devices % fixed == 0:
        return sizes | {rest[0]: num_devices // fixed}
    if not rest and fixed == num_devices:
        return sizes
    if rest:
        reason = f"{shown} makes {fixed}, which does not divide the {num_devices} devices there are, of which "
        reason += f"mesh.{rest[0]} = -1 takes what is left"
    else:
        reason = f"{shown} makes {fixed} devices, and there are {num_devices}"
    sized = [axis for axis in reversed(MESH_AXES) if sizes[axis] > 1] or ["data"]
    fitting = {axis: fitting_sizes(fixed // sizes[axis], num_devices, bool(rest)) for axis in sized}
    axis = next((axis for axis in sized if fitting[axis]), sized[0])
    fix = f"set mesh.{axis}={' or '.join(map(str, fitting[axis]))}" if fitting[axis] else "make the sizes' product fit"
    fix += f", or give mesh.{rest[0]} a size, to plan for other devices" if rest else f", or take {fixed} devices"
    raise refuse(f"mesh.{axis}", sizes[axis], reason, fix)


def fitting_sizes(others: int, num_devices: int, rest: bool) -> list[int]:
    """Sizes of one axis that fit beside `others` devices on the other axes, with an axis that takes the rest or not."""
    sizes = divisors(num_devices)
    return [size for size in sizes if num_devices % (size * others) == 0 and (rest or size * others == num_devices)]


# ------------------------------------------------------------------------------------------------ equal parts


def check_splits(cfg: Config, sizes: dict[str, int]) -> None:
    """What each mesh axis splits has as many equal parts. `sizes` may hold -1, for what is not known yet."""
    if sizes["tensor"] > 1:
        check_tensor_axis(cfg.model, sizes["tensor"], own_rules(cfg.mesh))
    if cfg.model.vocab_size and "vocab" not in own_rules(cfg.mesh):
        check_padded_vocab(cfg.model, cfg.model.vocab_size, sizes)
    if sizes["expert"] > 1:
        check_expert_axis(cfg.model, sizes["expert"])
    check_stage_axis(cfg, sizes)
    for key, value, length in row_lengths(cfg.data) if sizes["sequence"] > 1 else ():
        if length % sizes["sequence"]:
            reason = f"it does not split over mesh.sequence = {sizes['sequence']} devices"
            raise refuse(key, value, reason, f"give {nearest_multiples(length, sizes['sequence'])}")


def own_rules(mesh: MeshConfig) -> set[str]:
    """The logical axes that the config itself says how to split; whether that fits, the layout sees."""
    return {rule.partition("=")[0] for rule in (*mesh.parameter_rules, *mesh.activation_rules)}


def check_expert_axis(model: TransformerConfig, expert: int) -> None:
    experts = model.moe.num_experts
    if not experts:
        reason = "model.moe.num_experts is 0, so there is nothing for this axis to split"
        raise refuse("mesh.expert", expert, reason, "set mesh.expert=1, and mesh.fsdp or mesh.data in its place")
    if experts % expert:
        reason = f"it does not split over mesh.expert = {expert} devices"
        raise refuse("model.moe.num_experts", experts, reason, f"give {nearest_multiples(experts, expert)}")


def check_stage_axis(cfg: Config, sizes: dict[str, int]) -> None:
    """The pipeline fits the model and both batches. `sizes` may hold -1, for what is not known yet."""
    stages, mesh = sizes["stage"], cfg.mesh
    if stages == -1:
        return
    if stages > 1 and not cfg.model.scan_layers:
        reason = f"mesh.stage = {stages} splits stacked layers"
        raise refuse("model.scan_layers", False, reason, "set scan_layers=True, or mesh.stage=1")
    microbatches = stage_microbatches(mesh, stages)
    shards = [sizes[axis] for axis in BATCH_AXES]
    rows = cfg.train.global_batch_size // cfg.train.accumulation
    if -1 in shards:  # this rest cannot be told yet: any number of rows would do
        shards, rows = [1], microbatches
    kinds = next((segment.kinds for segment in segments(cfg.model) if segment.name == "blocks"), ())
    others, period = cfg.model.num_layers - len(kinds), periods(kinds)[0] if kinds else 1
    parts = math.prod(shards)
    check_pipeline(len(kinds), stages, mesh.stage_repeats, microbatches, rows, parts, others=others, period=period)
    check_stage_pattern(cfg.model, len(kinds), period, stages * mesh.stage_repeats)
    parts *= microbatches
    if stages > 1 and cfg.eval.batch_size % parts:
        reason = f"it does not split into {parts} equal parts: {microbatches} pieces on each part of the batch"
        fix = f"give {nearest_multiples(cfg.eval.batch_size, parts)}, or 0 for a micro-batch"
        raise refuse("eval.batch_size", cfg.eval.batch_size, reason, fix)


def check_stage_pattern(model: TransformerConfig, layers: int, period: int, pieces: int) -> None:
    """One program computes all stages, so their layers are of the same kinds. `layers`: of the pipeline."""
    depth = layers // pieces
    if pieces > 1 and depth % period:
        reason = f"the {pieces} pieces of a pipeline, {depth} layers each, must all have the same kinds in one order"
        fix = f"choose mesh.stage and mesh.stage_repeats so that a piece has a multiple of {period} layers"
        raise refuse("model.layer_pattern", ",".join(model.layer_pattern), reason, fix)


def stage_microbatches(mesh: MeshConfig, stages: int) -> int:
    return mesh.stage_microbatches or stages


def check_tensor_axis(model: TransformerConfig, tensor: int, own: set[str]) -> None:
    """Heads, key-value heads and MLP are split over the mesh's tensor axis in equal parts, but for `own` rules."""
    mlp_dim, moe = model.mlp_dim or 4 * model.embed_dim, model.moe
    divisor = getattr(model, "generator_divisor", 0) or 1
    dense = not moe.num_experts or moe.dense_layers or not moe.expert_dim
    for key, axis, size in (
        ("num_heads", "heads", model.num_heads),
        ("num_kv_heads", "kv_heads", model.num_kv_heads or model.num_heads),
        ("mlp_dim", "mlp", mlp_dim if dense else tensor),
        ("moe.expert_dim", "mlp", moe.expert_dim),
        ("moe.shared_dim", "mlp", moe.shared_dim),
    ):
        if size // divisor % tensor and axis not in own:
            what = "it" if size % tensor else f"the generator's part ({size // divisor}, of model.generator_divisor)"
            reason = f"{what} does not split over mesh.tensor = {tensor} devices"
            raise refuse(
                f"model.{key}",
                size,
                reason,
                f"give {nearest_multiples(size, tensor * divisor)}, or a smaller mesh.tensor",
            )


def check_padded_vocab(model: TransformerConfig, vocab_size: int, sizes: dict[str, int]) -> None:
    """The vocabulary is split over the mesh axes tensor and stage, sizes of which may be -1: not known yet."""
    padded = -(-vocab_size // model.vocab_multiple) * model.vocab_multiple
    split = {axis: sizes[axis] for axis in ("tensor", "stage") if sizes[axis] > 1}
    parts = math.prod(split.values())
    if padded % parts:
        over = " x ".join(f"mesh.{axis} = {size}" for axis, size in split.items())
        raise refuse(
            "model.vocab_multiple",
            model.vocab_multiple,
            f"it pads {vocab_size} tokens to {padded}, which does not split over {over} devices",
            f"set model.vocab_multiple={math.lcm(model.vocab_multiple, parts)} (a new run), or other mesh sizes",
        )


# ------------------------------------------------------------------------------------------------ devices


def check_devices(cfg: Config, num_devices: int) -> None:
    """Refuse what does not fit on `num_devices` devices (all hosts' together)."""
    sizes = mesh_sizes(cfg.mesh, num_devices)
    check_slices(cfg.mesh, sizes)
    check_splits(cfg, sizes)
    train, shards = cfg.train, math.prod(sizes[axis] for axis in BATCH_AXES)
    parts = shards * train.accumulation
    factors = [f"mesh.{axis} {sizes[axis]}" for axis in BATCH_AXES]
    spelt = " * ".join([*factors, f"train.accumulation {train.accumulation}"])
    if train.global_batch_size % parts:
        raise refuse(
            "train.global_batch_size",
            train.global_batch_size,
            f"it does not split into {parts} equal parts ({spelt})",
            f"give {nearest_multiples(train.global_batch_size, parts)}",
        )
    if train.per_device_batch_size and train.per_device_batch_size * parts != train.global_batch_size:
        reason = (
            f"on {num_devices} devices it makes {train.per_device_batch_size * parts} sequences a step ({spelt}), but "
        )
        reason += f"train.global_batch_size = {train.global_batch_size}"
        raise refuse(
            "train.per_device_batch_size",
            train.per_device_batch_size,
            reason,
            f"set it to {train.global_batch_size // parts}, or leave it 0",
        )
    if cfg.eval.batch_size % shards:
        raise refuse(
            "eval.batch_size",
            cfg.eval.batch_size,
            f"it does not split over {shards} devices ({' * '.join(f'mesh.{axis}' for axis in BATCH_AXES)})",
            f"give {nearest_multiples(cfg.eval.batch_size, shards)}, or 0 for a micro-batch",
        )
