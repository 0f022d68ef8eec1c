"""Machines that a plan is made for, by the numbers of their data sheets: `v5p:4x4x4`, `h100:16x8`.

Sources: the pages "TPU v4", "TPU v5e", "TPU v5p", "TPU v6e" and "TPU7x" of Google Cloud's documentation; NVIDIA's data
sheets of A100 80GB SXM, H100 SXM, H200 SXM, HGX B200 and GB200 NVL72. `clock` follows from the peak and the FLOPs of a
cycle (matrix units x 2 x width^2). `memory` of TPUs is what their compiler says it may use.
"""

import dataclasses
import math
import re

from llm_jax.config.values import did_you_mean
from llm_jax.errors import UserError

GB, GIB = 10**9, 2**30


@dataclasses.dataclass(frozen=True)
class Hardware:
    """One device as JAX counts them, and its network.

    Attributes:
      flops: dense bfloat16 FLOP/s.
      memory: bytes that a program may use.
      bandwidth: bytes/s of that memory.
      link: bytes/s of one link inside a slice, one way; of a GPU, of all its NVLinks.
      slow: bytes/s of a device's share of the network between slices or nodes, one way.
      clock: cycles/s (TPU).
      torus: dimensions of the slice's torus (TPU); 0: a switch (GPU).
      devices_a_chip: that JAX sees.
    """

    name: str
    kind: str
    flops: float
    memory: float
    bandwidth: float
    link: float
    slow: float
    clock: float = 0.0
    torus: int = 0
    devices_a_chip: int = 1

    @property
    def tpu(self) -> bool:
        return self.torus > 0


HARDWARE = {
    one.name: one
    for one in (
        Hardware("v4", "TPU v4", 275e12, 30.75 * GIB, 1228 * GB, 50 * GB, 6.25 * GB, 1.05e9, 3),
        Hardware("v5e", "TPU v5 lite", 197e12, 15.75 * GIB, 819 * GB, 50 * GB, 3.125 * GB, 1.5e9, 2),
        Hardware("v5p", "TPU v5", 459e12, 95.74 * GIB, 2765 * GB, 100 * GB, 6.25 * GB, 1.75e9, 3),
        Hardware("v6e", "TPU v6 lite", 918e12, 31.25 * GIB, 1640 * GB, 100 * GB, 12.5 * GB, 1.75e9, 2),
        Hardware("tpu7x", "TPU7x", 1153.5e12, 94.75 * GIB, 3690 * GB, 50 * GB, 6.25 * GB, 2.2e9, 3, 2),
        Hardware("a100", "NVIDIA A100", 312e12, 80 * GB, 2039 * GB, 300 * GB, 25 * GB),
        Hardware("h100", "NVIDIA H100 80GB HBM3", 989e12, 80 * GB, 3350 * GB, 450 * GB, 50 * GB),
        Hardware("h200", "NVIDIA H200", 989e12, 141 * GB, 4800 * GB, 450 * GB, 50 * GB),
        Hardware("b200", "NVIDIA B200", 2250e12, 180 * GB, 8000 * GB, 900 * GB, 50 * GB),
        Hardware("gb200", "NVIDIA GB200", 2450e12, 186 * GB, 8000 * GB, 900 * GB, 50 * GB),
    )
}
EXAMPLES = "v5p:4x4x4, v5e:16x16, v6e:16x16, tpu7x:4x4x4, h100:16x8 (16 nodes of 8)"


@dataclasses.dataclass(frozen=True)
class Topology:
    """A machine: chips of one or more slices, or nodes of GPUs.

    Attributes:
      shape: chips along each dimension of a slice's torus; of GPUs (nodes, GPUs a node).
      slices: of TPUs.
    """

    hardware: Hardware
    shape: tuple[int, ...]
    slices: int = 1

    @property
    def chips(self) -> int:
        return math.prod(self.shape) * self.slices

    @property
    def devices(self) -> int:
        return self.chips * self.hardware.devices_a_chip

    @property
    def domain(self) -> int:
        """Devices joined by the fast network: of a slice, or of a node."""
        return self.devices // self.domains

    @property
    def domains(self) -> int:
        return self.slices if self.hardware.tpu else self.shape[0]

    @property
    def name(self) -> str:
        return f"{self.hardware.name}:{'x'.join(map(str, self.shape))}"

    @property
    def wrap(self) -> tuple[bool, ...]:
        """Of a TPU slice, whether each dimension is closed to a ring: all of them in slices of whole cubes of 4 on v4,
        v5p and tpu7x, those as long as a pod's side on v5e and v6e."""
        if self.hardware.torus == 3:
            return (all(size % 4 == 0 for size in self.shape),) * 3
        return tuple(size == 16 for size in self.shape)

    def __str__(self) -> str:
        return f"{self.name} x {self.slices} slices" if self.slices > 1 else self.name


def topology(text: str, slices: int = 1) -> Topology:
    """The machine of `--topology=v5p:8x8x8 --slices=2`. Raises UserError where there is none such."""
    family, _, sizes = text.partition(":")
    if family not in HARDWARE:
        close = did_you_mean(family, HARDWARE, f"there are {', '.join(HARDWARE)}")
        raise UserError(f"--topology={text}: no machine {family!r} is known; {close}, written as {EXAMPLES}")
    hardware = HARDWARE[family]
    if not re.fullmatch(r"[1-9]\d*(x[1-9]\d*)*", sizes):
        raise UserError(f"--topology={text}: behind the colon stand sizes, as in {EXAMPLES}")
    shape = tuple(map(int, sizes.split("x")))
    wanted, what = (hardware.torus, "a torus") if hardware.tpu else (2, "NODESxGPUS")
    if len(shape) != wanted:
        raise UserError(f"--topology={text}: {family} has {wanted} sizes ({what}), as in {EXAMPLES}")
    if slices < 1 or (slices > 1 and not hardware.tpu):
        raise UserError(f"--slices={slices}: slices are of TPUs, 1 or more; nodes of GPUs stand in --topology")
    return Topology(hardware, shape, slices)


# Of a card, what XLA's description asks for: (streaming multiprocessors, GHz at boost, shared memory of one in bytes,
# L2 cache in bytes, float32 units of one, compute capability). From NVIDIA's architecture papers and tuning guides.
CARDS = {
    "a100": (108, 1.41, 167_936, 40 * 2**20, 64, (8, 0)),
    "h100": (132, 1.98, 233_472, 50 * 2**20, 128, (9, 0)),
    "h200": (132, 1.98, 233_472, 50 * 2**20, 128, (9, 0)),
    "b200": (148, 1.965, 233_472, 126 * 2**20, 128, (10, 0)),
    "gb200": (152, 2.062, 233_472, 126 * 2**20, 128, (10, 0)),
}
CUDNN = (9, 12)  # the version that plans are made for; attention needs 9


def card_description(hardware: Hardware) -> str:
    """The card as text of XLA's GpuTargetConfigProto."""
    cores, clock, shared, cache, units, (major, minor) = CARDS[hardware.name]
    reserved = 1024  # of each multiprocessor's shared memory, by the CUDA runtime
    return f"""gpu_device_info {{
  threads_per_block_limit: 1024
  threads_per_warp: 32
  shared_memory_per_block: 49152
  shared_memory_per_core: {shared}
  threads_per_core_limit: 2048
  core_count: {cores}
  fpus_per_core: {units}
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  memory_bandwidth: {hardware.bandwidth:.0f}
  l2_cache_size: {cache}
  clock_rate_ghz: {clock}
  device_memory_size: {hardware.memory:.0f}
  shared_memory_per_block_optin: {shared - reserved}
  cuda_compute_capability {{ major: {major} minor: {minor} }}
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
}}
platform_name: "CUDA"
dnn_version_info {{ major: {CUDNN[0]} minor: {CUDNN[1]} }}
device_description_str: "{hardware.kind}"
"""
