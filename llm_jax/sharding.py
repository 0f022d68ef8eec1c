"""Where every array lives: the device mesh, the rules from logical axes to mesh axes, and `Layout`, which joins them.

This is the only file that makes a mesh. Models name the axes of each parameter and activation ("embed", "mlp",
"batch", ...); a rule table says over which mesh axes such an axis is split. A name without a rule is an error, so
a misspelt axis can never leave a tensor replicated in silence.
"""

import dataclasses
import difflib
import functools
import math
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from llm_jax.config import MeshConfig
from llm_jax.config.mesh import BATCH_AXES, MESH_AXES, mesh_sizes, slice_sizes, stage_microbatches
from llm_jax.errors import ConfigError, UserError

Rules = tuple[tuple[str, tuple[str, ...]], ...]  # (logical axis, mesh axes) pairs: hashable, unlike a dict

PARAMETER_RULES: Rules = (
    ("embed", ("fsdp",)),
    ("vocab", ("tensor", "stage")),  # all stages share the head's work: no one has it alone
    ("heads", ("tensor",)),
    ("kv_heads", ("tensor",)),
    ("mlp", ("tensor",)),
    ("expert", ("expert",)),
    ("router", ()),
    ("balance", ()),
    ("latent", ("fsdp",)),  # of latent attention: what is projected up from
    ("rank", ()),  # the same numbers, where they are projected down to
    ("adapter", ()),
    ("layers", ("stage",)),
    ("first_layers", ()),  # before the pipeline: every stage computes them
    ("last_layers", ()),  # likewise behind it
    ("position", ()),
    ("buckets", ()),
    ("head_dim", ()),
    ("norm", ()),
)

ACTIVATION_RULES: Rules = (
    ("batch", BATCH_AXES),
    ("length", ("sequence",)),
    ("residual_length", ("sequence",)),
    ("stage", ("stage",)),
    ("expert", ("expert",)),
    ("embed", ()),
    ("heads", ("tensor",)),
    ("kv_heads", ("tensor",)),
    ("head_dim", ()),
    ("mlp", ("tensor",)),
    ("adapter", ()),
    ("vocab", ("tensor", "stage")),
    ("position", ()),
    ("buckets", ()),
)


def change_rules(rules: Rules, changes: tuple[str, ...], key: str) -> Rules:
    """`rules` with "axis=mesh_axis+mesh_axis" changes applied; "axis=" replicates. `key` is named in errors."""
    table = dict(rules)
    for change in changes:
        axis, equals, value = change.partition("=")
        mesh_axes = tuple(name for name in value.split("+") if name)
        if axis == "stage":
            raise ConfigError(f"{key}: {change!r} cannot be: mesh.stage alone says how many stages a pipeline has.")
        if not equals or axis not in table:
            near = difflib.get_close_matches(axis, table, 1)
            raise ConfigError(
                f"{key}: {change!r} does not read as LOGICAL_AXIS=MESH_AXIS+MESH_AXIS with one of {', '.join(table)}"
                + (f"; did you mean {near[0]!r}?" if near else ".")
            )
        for name in mesh_axes:
            if name not in MESH_AXES:
                raise ConfigError(f"{key}: {change!r} names the mesh axis {name!r}; there are {', '.join(MESH_AXES)}.")
        table[axis] = mesh_axes
    return tuple(table.items())


@dataclasses.dataclass(frozen=True)
class Layout:
    """A mesh with its rules: a frozen, hashable value that models carry as a field.

    `Layout()` has no mesh: everything is on the default device and `layout(x, ...)` is the identity.
    """

    mesh: Mesh | AbstractMesh | None = None
    parameter_rules: Rules = PARAMETER_RULES
    gradient_rules: Rules = PARAMETER_RULES
    optimizer_rules: Rules = PARAMETER_RULES
    activation_rules: Rules = ACTIVATION_RULES
    stage_microbatches: int = 1  # of a pipeline
    stage_repeats: int = 1
    platform: str = ""  # of the devices: cpu, gpu, tpu; "": this process's

    @property
    def runs_on(self) -> str:
        """cpu, gpu or tpu: of the layout's devices, which need not be this machine's; else JAX's own."""
        return self.platform or jax.default_backend()

    def spec(self, axes: tuple[str | None, ...], rules: Rules) -> PartitionSpec:
        """The partition of an array with these logical axes (None: not split).

        Raises ValueError on a name without a rule, ConfigError where the rules use a mesh axis twice.
        """
        table = dict(rules)
        parts: list[tuple[str, ...]] = []
        for axis in axes:
            if axis is not None and axis not in table:
                near = difflib.get_close_matches(axis, table, 1)
                raise ValueError(
                    f"No sharding rule for the logical axis {axis!r} of {axes}; the rules know {', '.join(table)}."
                    + (f" Did you mean {near[0]!r}?" if near else "")
                )
            parts.append(table[axis] if axis is not None else ())
        used = [name for part in parts for name in part]
        if len(used) != len(set(used)):
            raise ConfigError(
                f"The axes {axes} would be split over {used}: a mesh axis can split only one of them. Change "
                "mesh.parameter_rules, mesh.gradient_rules, mesh.optimizer_rules or mesh.activation_rules."
            )
        return PartitionSpec(*(part or None for part in parts))

    def __call__(self, x: jax.Array, *axes: str | None) -> jax.Array:
        """`x`, constrained to be split as its logical axes say. Raises if their number is not the rank of x."""
        if len(axes) != x.ndim:
            raise ValueError(f"An array of shape {x.shape} was given {len(axes)} logical axes: {axes}.")
        spec = self.spec(axes, self.activation_rules)
        return x if self.mesh is None else jax.lax.with_sharding_constraint(x, NamedSharding(self.mesh, spec))

    def parameter_shardings(self, shapes: Any, axes: Any, rules: Rules | None = None) -> Any:
        """Shardings for a tree of parameters, or of what has their shapes.

        Args:
          shapes: nested dict of ShapeDtypeStruct.
          axes: the same tree, a tuple of logical names in place of each leaf.
          rules: of the gradients or of the optimizer's state; None: the parameters'.

        Returns:
          The same tree of NamedSharding, or of None without a mesh.
        """
        rules = self.parameter_rules if rules is None else rules

        def sharding(path: tuple[Any, ...], shape: jax.ShapeDtypeStruct, names: tuple[str, ...]) -> Any:
            spec = self.spec(names, rules)
            if self.mesh is None:
                return None
            for size, name in zip(shape.shape, names, strict=True):
                pieces = self._pieces(name, rules)
                if size % pieces:
                    raise ConfigError(
                        f"The parameter {path_name(path)} of shape {shape.shape} cannot be split: its axis {name!r} of "
                        f"{size} is not a multiple of the {pieces} parts of mesh axes {' x '.join(dict(rules)[name])}. "
                        "Change that size, the mesh, or that axis's rule (mesh.parameter_rules, mesh.gradient_rules, "
                        "mesh.optimizer_rules)."
                    )
            return NamedSharding(self.mesh, spec)

        return jax.tree_util.tree_map_with_path(sharding, shapes, axes)

    def summed(self, parts: jax.Array, *axes: str) -> jax.Array:
        """The sum over the first two axes of (S, P, ...), of which each device has a part, placed as a parameter.

        S is split as "batch" is and P as "length". The sum goes over the mesh axes that split the parameter first: each
        device keeps its piece of it, and only pieces go over the other axes, between slices or nodes.
        """
        if self.mesh is None:
            return parts.sum((0, 1))
        table = dict(self.activation_rules)
        over = [*table["batch"], *table["length"]]
        places = [dict(self.parameter_rules)[axis] for axis in axes]
        parts = parts.reshape(*(self.mesh.shape[name] for name in over), *parts.shape[2:])
        for name in sorted(over, key=lambda name: not any(name in place for place in places)):
            parts = parts.sum(over.index(name))
            over.remove(name)
            done = [tuple(n for n in place if n not in over) or None for place in places]
            parts = jax.lax.with_sharding_constraint(parts, NamedSharding(self.mesh, PartitionSpec(*over, *done)))
        return parts

    @property
    def replicated(self) -> NamedSharding | None:
        return None if self.mesh is None else NamedSharding(self.mesh, PartitionSpec())

    def batch_sharding(self, ndim: int = 2) -> NamedSharding | None:
        """How a batch feature is split: (batch, length), or with another rank (batch, ...)."""
        return self.activation_sharding(*(("batch", "length") if ndim == 2 else ("batch",) + (None,) * (ndim - 1)))

    def feature_sharding(self, shape: tuple[int, ...], length: int) -> NamedSharding | None:
        """How a batch feature of this shape is split, rows having `length` tokens: one that has something for each
        token as they are, one of a row's texts or hidden places by rows alone."""
        if len(shape) == 2 and shape[1] != length:
            return self.activation_sharding("batch", None)
        return self.batch_sharding(len(shape))

    def activation_sharding(self, *axes: str | None) -> NamedSharding | None:
        """How an activation of these logical axes is split."""
        return None if self.mesh is None else NamedSharding(self.mesh, self.spec(axes, self.activation_rules))

    @property
    def batch_shards(self) -> int:
        """Into how many pieces the batch is split."""
        return self.activation_pieces("batch")

    def activation_pieces(self, axis: str) -> int:
        """Into how many pieces this logical axis of activations is split."""
        return 1 if self.mesh is None else self._pieces(axis, self.activation_rules)

    @property
    def stages(self) -> int:
        """Stages of the pipeline; 1: there is none."""
        return self.activation_pieces("stage")

    @property
    def num_devices(self) -> int:
        return 1 if self.mesh is None else self.mesh.size

    def _pieces(self, axis: str, rules: Rules) -> int:
        return math.prod(self.mesh.shape[mesh_axis] for mesh_axis in dict(rules)[axis])

    def batch_rows(self, global_batch_size: int) -> np.ndarray:
        """Numbers of the global batch's rows that this process must supply, ascending, int64."""
        if self.mesh is None:
            return np.arange(global_batch_size)
        indices = self.batch_sharding(1).addressable_devices_indices_map((global_batch_size,)).values()
        return np.unique(np.concatenate([np.arange(global_batch_size)[index] for index in indices]))

    def put_batch(self, local: Mapping[str, np.ndarray], global_batch_size: int) -> dict[str, jax.Array]:
        """Global arrays from this process's rows.

        Args:
          local: features of shape (rows, ...), holding exactly the rows `batch_rows(global_batch_size)`, in order.
          global_batch_size: rows of the global arrays.

        Raises:
          UserError: a feature has another number of rows. JAX itself would accept it and give wrong sums.
        """
        rows = self.batch_rows(global_batch_size)
        for name, array in local.items():
            if len(array) != len(rows):
                raise UserError(
                    f"The batch feature {name!r} has {len(array)} rows on process {jax.process_index()}, which must "
                    f"supply {len(rows)} of the global batch's {global_batch_size}."
                )
        if self.mesh is None:
            return {name: jax.numpy.asarray(array) for name, array in local.items()}

        length = local["tokens"].shape[1] if "tokens" in local else 0

        def put(array: np.ndarray) -> jax.Array:
            shape = (global_batch_size, *array.shape[1:])

            def piece(index: tuple[slice, ...]) -> np.ndarray:
                first, last, _ = index[0].indices(global_batch_size)
                start = int(np.searchsorted(rows, first))
                return array[(slice(start, start + last - first), *index[1:])]

            return jax.make_array_from_callback(shape, self.feature_sharding(shape, length), piece)

        return {name: put(array) for name, array in local.items()}


def path_name(path: tuple[Any, ...]) -> str:
    """A parameter's path as users see it: "blocks/attention/query/kernel"."""
    return "/".join(str(getattr(part, "key", getattr(part, "name", part))) for part in path)


def mesh_shape(cfg: MeshConfig, num_devices: int) -> tuple[int, ...]:
    """Sizes of `MESH_AXES` with -1 filled in. Raises ConfigError where they do not fit the devices."""
    return tuple(mesh_sizes(cfg, num_devices).values())


def make_layout(cfg: MeshConfig, devices: list[jax.Device] | None = None) -> Layout:
    """The mesh over `devices` (default: all of every process) and the rules that `cfg` asks for.

    Axis types are Auto: under JAX's default, Explicit, products over partitioned parameters raise.
    """
    devices = jax.devices() if devices is None else devices
    shape, types = mesh_shape(cfg, len(devices)), (AxisType.Auto,) * len(MESH_AXES)
    across = slice_sizes(cfg)
    grid = devices_over_slices(shape, tuple(across.get(axis, 1) for axis in MESH_AXES), devices)
    mesh = Mesh(grid, MESH_AXES, types)
    return dataclasses.replace(abstract_layout(cfg, len(devices), devices[0].platform), mesh=mesh)


def devices_over_slices(shape: tuple[int, ...], across: tuple[int, ...], devices: list[jax.Device]) -> np.ndarray:
    """Devices in the shape of a mesh whose axes go over slices (or nodes) for `across` of their size, slowest first.

    Neighbours along an axis lie in one slice as long as they can, so that a sum over it is one over fast links (ICI,
    NVLink) and a small one over the network between slices.
    """
    inner = tuple(size // outer for size, outer in zip(shape, across, strict=True))
    # A mesh axis may go along part of a torus's axis: published sizes do not all follow the torus.
    torus = functools.partial(mesh_utils.create_device_mesh, inner, allow_split_physical_axes=True)
    grids = [torus(part) for part in slices_of(devices, math.prod(across))]
    grid = np.array(grids).reshape(*across, *inner)
    rank = len(shape)
    return grid.transpose([axis for i in range(rank) for axis in (i, rank + i)]).reshape(shape)


def slices_of(devices: list[jax.Device], count: int) -> list[list[jax.Device]]:
    """The devices of each slice: by slice number (TPU), else by process (a node of GPUs), else, on fake CPU devices, in
    equal runs. Raises ConfigError where they do not form `count` equal slices."""
    if count == 1:
        return [devices]
    numbers = [getattr(device, "slice_index", None) for device in devices]
    if len(set(numbers)) == 1:
        numbers = [device.process_index for device in devices]
    if len(set(numbers)) == 1 and devices[0].platform == "cpu" and len(devices) % count == 0:
        numbers = [i // (len(devices) // count) for i in range(len(devices))]
    parts = [[d for d, n in zip(devices, numbers, strict=True) if n == number] for number in sorted(set(numbers))]
    if len(parts) != count and len(parts) % count == 0:  # several processes a slice
        share = len(parts) // count
        parts = [sum(parts[i : i + share], []) for i in range(0, len(parts), share)]
    if len(parts) != count or len({len(part) for part in parts}) > 1:
        raise ConfigError(
            f"mesh.across_slices asks for {count} slices or nodes of the same size, and the {len(devices)} devices "
            f"form {len(parts)} of {', '.join(str(len(part)) for part in parts)}. Make the sizes' product the number "
            "there is."
        )
    return parts


def abstract_layout(cfg: MeshConfig, num_devices: int, platform: str = "") -> Layout:
    """The layout for a machine that need not be there: shapes and shardings, no arrays.

    Raises ConfigError where sizes do not fit, or a rule cannot be followed by the arrays that a model has.
    """
    parameter_rules = change_rules(PARAMETER_RULES, cfg.parameter_rules, "mesh.parameter_rules")
    gradient_rules = change_rules(parameter_rules, cfg.gradient_rules, "mesh.gradient_rules")
    optimizer_rules = change_rules(parameter_rules, cfg.optimizer_rules, "mesh.optimizer_rules")
    activation_rules = change_rules(ACTIVATION_RULES, cfg.activation_rules, "mesh.activation_rules")
    mesh = AbstractMesh(mesh_shape(cfg, num_devices), MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES))
    microbatches = stage_microbatches(cfg, mesh.shape["stage"])
    rules = (parameter_rules, gradient_rules, optimizer_rules, activation_rules)
    layout = Layout(mesh, *rules, microbatches, cfg.stage_repeats, platform)
    for axis, mesh_axes in activation_rules:  # refused here, and not when the step is traced
        if "stage" in mesh_axes and axis not in ("stage", "vocab"):
            raise ConfigError(
                f"mesh.activation_rules: {axis}={'+'.join(mesh_axes)} cannot be: within a stage of the pipeline "
                "nothing is split over the mesh axis stage. Only vocab may be."
            )
    for axes in (("heads", "head_dim"), ("kv_heads", "head_dim"), ("mlp",), ("vocab",)):
        layout.spec(("batch", "length", *axes), activation_rules)
    layout.spec(("batch", "residual_length", "embed"), activation_rules)
    layout.spec(("expert", "embed", "mlp"), activation_rules)
    return layout


HOST_MEMORY = "pinned_host"


def bytes_a_device(tree: Any) -> int:
    """Bytes of its own memory that each device gives to a tree of arrays or sharded ShapeDtypeStructs; what waits in
    the host's memory does not count."""

    def size(leaf: jax.ShapeDtypeStruct) -> int:
        here = leaf.sharding.memory_kind != HOST_MEMORY
        return here * math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize

    return sum(size(leaf) for leaf in jax.tree.leaves(tree))
