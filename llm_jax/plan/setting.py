"""A config on a machine: what is known before anything is compiled."""

import dataclasses
import math
import sys

import jax
import jax.numpy as jnp

from llm_jax import sharding
from llm_jax.config import Config, check, check_devices, run_steps
from llm_jax.config.mesh import MESH_AXES, mesh_sizes, slice_sizes
from llm_jax.errors import UserError
from llm_jax.models import flops, registry
from llm_jax.models.registry import Model, count_parameters
from llm_jax.plan.hardware import Topology
from llm_jax.precision import Precision
from llm_jax.sharding import Layout
from llm_jax.training import optim
from llm_jax.training import state as train_state
from llm_jax.training.back_end import check_attention
from llm_jax.training.lower import model_flops


@dataclasses.dataclass(frozen=True)
class Setting:
    """Attributes:
    cfg: checked, for the devices of `machine`; its mesh has all sizes.
    layout: abstract, of the machine's platform.
    state: of ShapeDtypeStructs with shardings.
    """

    cfg: Config
    machine: Topology
    layout: Layout
    model: Model
    state: train_state.TrainState

    @property
    def mesh(self) -> dict[str, int]:
        return {axis: self.layout.mesh.shape[axis] for axis in MESH_AXES}

    @property
    def tokens(self) -> int:
        """Of a step, over all devices."""
        return self.cfg.train.global_batch_size * self.cfg.data.sequence_length

    @property
    def parameters(self) -> int:
        return count_parameters(self.model.shapes())

    @property
    def flops(self) -> flops.Flops:
        """Of training on one token: what MFU counts."""
        return model_flops(self.cfg, self.model)

    def state_bytes(self) -> dict[str, int]:
        """Of each device: "parameters", "optimizer" (with the average, if there is one) and "gradients"."""
        state, model, layout = self.state, self.model, self.layout
        places = layout.parameter_shardings(model.shapes(), model.axes(), layout.gradient_rules)
        placed = lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place)  # noqa: E731
        gradients = jax.tree.map(placed, state.params, places)
        size = sharding.bytes_a_device(gradients)
        if self.cfg.train.accumulation > 1:  # the sum, in at least float32, beside a micro-batch's own
            wide = lambda leaf: leaf.update(dtype=jnp.promote_types(leaf.dtype, jnp.float32))  # noqa: E731
            size += sharding.bytes_a_device(jax.tree.map(wide, gradients))
        return {
            "parameters": sharding.bytes_a_device(state.params),
            "optimizer": sharding.bytes_a_device((state.opt_state, state.ema)),
            "gradients": size,
        }


def make_setting(cfg: Config, machine: Topology) -> Setting:
    """Raises ConfigError where the config cannot run on this machine, UserError where it leaves the vocabulary open."""
    check(cfg)
    devices = machine.devices
    cfg = dataclasses.replace(cfg, mesh=dataclasses.replace(cfg.mesh, **mesh_sizes(cfg.mesh, devices)))
    check_devices(cfg, devices)
    if not cfg.model.vocab_size:
        raise UserError(
            "model.vocab_size is 0, so it is the tokenizer's, which only the data tell; a plan looks at no data: set "
            "--config.model.vocab_size"
        )
    platform = "tpu" if machine.hardware.tpu else "gpu"
    layout = sharding.abstract_layout(cfg.mesh, devices, platform)
    check_attention(cfg, layout)
    model = registry.build(cfg.model, layout, Precision.make(cfg.precision))
    tx = optim.make(
        cfg.optim,
        run_steps(cfg) or sys.maxsize,
        model.shapes(),
        model.axes(),
        balance_rate=cfg.model.moe.balance_rate,
    )
    state = train_state.abstract(model, tx, layout, ema=cfg.train.ema_decay > 0, offload=cfg.optim.offload)
    return Setting(cfg, machine, layout, model, state)


# Seen with libtpu 0.0.52: `wrap` has no effect beside `num_slices`.
OPEN_SLICES = (
    "a compiled plan of several slices overstates the times of the network and of memory: the compiler cannot be told "
    "that a slice's dimensions are rings, and gathers by sums over zeros; a plan of one slice has those inside of it"
)


def slices_note(setting: Setting) -> str:
    """What the reader must know of a plan for several slices or nodes; "" if nothing."""
    given, domains = math.prod(slice_sizes(setting.cfg.mesh).values()), setting.machine.domains
    if domains == 1:
        return ""
    if given == domains:
        rings = setting.machine.hardware.tpu and any(setting.machine.wrap)
        return OPEN_SLICES if rings else ""
    what = "slices" if setting.machine.hardware.tpu else "nodes"
    return (
        f"mesh.across_slices says {given} {what} and there are {domains}: name the axis that goes over them, as "
        f"--config.mesh.across_slices=data={domains}, or neighbours on the mesh may lie in different ones"
    )
