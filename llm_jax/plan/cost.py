"""How long a compiled step takes: one model for every program, our own or another trainer's.

The schedule is followed in order with two clocks, one of the core and one of each set of links. The core's time is the
compiler's estimated cycles (TPU) or the larger of FLOPs and bytes over what the card reaches (GPU); kernels that the
compiler cannot see into go by their FLOPs and bytes. A collective that has a start and a done runs beside what lies
between them; what is left at its done is waited for. Loops count as often as they turn.
"""

import dataclasses
import re
from collections import Counter

from llm_jax.plan import network
from llm_jax.plan.bytes import touched_bytes
from llm_jax.plan.flops import instruction_flops, kernel_flops
from llm_jax.plan.hlo import Computation, Instruction, Program
from llm_jax.plan.network import Placed

FREE = frozenset(
    ("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "partition-id", "replica-id",
     "opt-barrier", "domain", "copy-start", "copy-done", "async-update", "add-dependency", "iota")
)  # fmt: skip
HOST = 5  # memory space of the host
HOST_BANDWIDTH = 15e9  # bytes/s of a device to its host's memory: PCIe, shared by the chips of a host


@dataclasses.dataclass(frozen=True)
class Constants:
    """What no data sheet says: shares of the peak that are reached, and seconds that a launch takes.

    Attributes:
      cycles: factor on the TPU compiler's cycles.
      matrix: share of peak FLOP/s of a GPU's matrix products.
      memory: share of a GPU's memory bandwidth.
      links: share of a link's bandwidth that a collective reaches; `slow` between slices or nodes is part of it.
      kernels: by kind, share of peak FLOP/s.
      launch: of a GPU kernel.
    """

    cycles: float
    matrix: float
    memory: float
    links: float
    kernels: dict[str, float]
    launch: float


# Fitted on the v5p and the H100 rows of benchmarks/plan_accuracy.py; all other machines take them as they are.
TPU = Constants(0.9, 1.0, 0.8, 0.8, {"attention": 0.5, "attention backward": 0.5, "grouped product": 0.65}, 0.0)
GPU = Constants(1.0, 0.72, 0.85, 0.75, {"attention": 0.6, "attention backward": 0.5, "grouped product": 0.6}, 3e-6)


@dataclasses.dataclass
class Moved:
    """All collectives of one kind over the same mesh axes, a step."""

    count: int = 0
    bytes: float = 0.0
    seconds: float = 0.0
    waited: float = 0.0

    def add(self, other: "Moved", times: int) -> None:
        self.count += other.count * times
        self.bytes += other.bytes * times
        self.seconds += other.seconds * times
        self.waited += other.waited * times


@dataclasses.dataclass
class Times:
    """Of a step of one device, in seconds.

    Attributes:
      matrix: products. kernel: Pallas and library kernels. memory: everything else. waited: for the network.
      moved: by (kind, mesh axes).
      flops: of products and kernels.
      unknown: kernels whose FLOPs are not known, by name; they count by their bytes.
    """

    matrix: float = 0.0
    kernel: float = 0.0
    memory: float = 0.0
    waited: float = 0.0
    flops: float = 0.0
    cycles: int = 0
    moved: dict[tuple[str, str], Moved] = dataclasses.field(default_factory=dict)
    unknown: Counter = dataclasses.field(default_factory=Counter)

    @property
    def busy(self) -> float:
        return self.matrix + self.kernel + self.memory

    @property
    def total(self) -> float:
        return self.busy + self.waited

    def add(self, other: "Times", times: int = 1) -> None:
        for name in ("matrix", "kernel", "memory", "waited", "flops", "cycles"):
            setattr(self, name, getattr(self, name) + getattr(other, name) * times)
        for key, moved in other.moved.items():
            self.moved.setdefault(key, Moved()).add(moved, times)
        for name, count in other.unknown.items():
            self.unknown[name] += count * times


def step_times(program: Program, on: Placed, constants: Constants | None = None) -> Times:
    """The time of one run of the program on each device of a machine, whose mesh lies there as `on` says."""
    constants = constants or (TPU if on.machine.hardware.tpu else GPU)
    return Walk(program, on, constants).run(program.entry)


@dataclasses.dataclass
class Flight:
    """Collectives under way: when each set of links is free again, and when each started one ends."""

    free: dict[str, float]
    ends: dict[str, tuple[float, tuple[str, str]]]


def marked(inside: Computation, target: str) -> bool:
    return any(part.target == target for part in inside.values())


def chain(moving: Instruction) -> str:
    """What joins the start, middle and end of a collective that a TPU program spreads over several instructions."""
    found = re.search(r'(?:chain_id|_xla_host_transfer_rendezvous)="([^"]*)"', moving.rest)
    return f"chain {found[1]}" if found else ""


def wait(end: float, key: tuple[str, str], times: Times) -> None:
    left = max(end - times.total, 0.0)
    times.waited += left
    times.moved[key].waited += left


class Walk:
    """Follows the schedule of a program."""

    def __init__(self, program: Program, on: Placed, constants: Constants):
        self.program, self.on, self.machine, self.constants = program, on, on.machine, constants

    def run(self, name: str) -> Times:
        """One pass through a computation."""
        times, flight = Times(), Flight({}, {})
        for one in self.program.computations[name].values():
            started = self.started(one)
            if started is not None:
                self.start(started, one, name, times, flight)
            elif one.opcode.endswith("-done") or marked(self.program.fused(one), "AsyncCollectiveDone"):
                self.finish(one, name, times, flight)
            elif one.opcode == "while":
                times.add(self.run(one.called("body")), self.program.trips(one))
            elif one.opcode == "conditional":
                times.add(max(map(self.run, one.branches), key=lambda branch: branch.total))
            elif one.opcode == "call":
                times.add(self.run(one.called("to_apply")))
            elif one.opcode not in FREE:
                times.add(self.work(one, name))
        return times

    # ------------------------------------------------------------------------------------------------ the network

    def started(self, one: Instruction) -> Instruction | None:
        """The collective that an instruction is, starts, or carries in a fusion; None where it has none."""
        if network.kind_of(one):
            return one
        inside = self.program.fused(one)
        moving = next((part for part in inside.values() if network.kind_of(part)), None)
        if moving is None or (chain(moving) and not marked(inside, "AsyncCollectiveStart")):
            return None  # the middle or the end of one that was started before
        return moving

    def start(self, moving: Instruction, one: Instruction, name: str, times: Times, flight: Flight) -> None:
        """Put a collective on its links; wait for it at once unless a later instruction does."""
        inside = self.program.computations[name] if moving is one else self.program.fused(one)
        found = network.collective(moving, inside, self.on, self.constants.links)
        if not found.axes:
            return
        if (
            found.kind == "all-reduce"
            and any(part.opcode == "dynamic-slice" for part in inside.values())
            and (moving is not one)
        ):  # each device keeps its piece: how a TPU program writes a reduce-scatter
            found = dataclasses.replace(found, kind="reduce-scatter", sent=found.sent / 2, seconds=found.seconds / 2)
        key = (found.kind, found.axes)
        times.moved.setdefault(key, Moved()).add(Moved(1, found.sent, found.seconds), 1)
        # Neighbours are reached over a link each way; what goes the other way has links of its own.
        links = moving.rest.partition("metadata=")[0] if found.kind == "collective-permute" else found.axes
        links = "between slices" if moving.opcode == "send" else links  # not those inside of one
        end = flight.free[links] = max(times.total, flight.free.get(links, 0.0)) + found.seconds
        if one.opcode == "fusion":
            times.add(self.work(one, name))
        if one.opcode.endswith("-start") or chain(moving):
            flight.ends[chain(moving) or one.name] = (end, key)
        else:
            wait(end, key, times)

    def finish(self, one: Instruction, name: str, times: Times, flight: Flight) -> None:
        """Wait for what an instruction ends."""
        if one.opcode == "send-done":
            return  # its sum is waited for where it is received
        moving = next((part for part in self.program.fused(one).values() if network.kind_of(part)), None)
        computation = self.program.computations[name]
        begun = [chain(computation[operand]) or operand for operand in one.operands if operand in computation]
        for key in [chain(moving)] if moving is not None else begun:
            if key in flight.ends:
                wait(*flight.ends.pop(key), times)

    # --------------------------------------------------------------------------------------------------- the core

    def work(self, one: Instruction, name: str) -> Times:
        """What the core does for one instruction."""
        flops = instruction_flops(self.program, one, name)
        if one.opcode == "custom-call" and not flops:
            return self.kernel(one, name)
        seconds = self.tpu_seconds(one, flops) if self.machine.hardware.tpu else self.gpu_seconds(one, name, flops)
        kind = "matrix" if flops else "memory"
        return Times(**{kind: seconds}, flops=flops, cycles=one.cycles)

    def tpu_seconds(self, one: Instruction, flops: float) -> float:
        """By the compiler's cycles, and by the peak where they are more hopeful than that."""
        hardware = self.machine.hardware
        parts = (one, *self.program.fused(one).values())
        narrow = any(shape.dtype.startswith(("s8", "f8")) for part in parts for shape in part.shapes)
        peak = hardware.flops * (2 if narrow else 1)  # products of 8 bits take half the time
        return max(one.cycles / hardware.clock * self.constants.cycles, flops / peak)

    def gpu_seconds(self, one: Instruction, name: str, flops: float) -> float:
        hardware, constants = self.machine.hardware, self.constants
        moved = touched_bytes(self.program, one, name) / (hardware.bandwidth * constants.memory)
        return max(flops / (hardware.flops * constants.matrix), moved) + constants.launch

    def kernel(self, one: Instruction, name: str) -> Times:
        """A kernel that the compiler cannot see into: the larger of its FLOPs and its bytes."""
        if one.target not in ("tpu_custom_call",) and "fmha" not in one.target:
            return Times()  # allocations, annotations
        hardware = self.machine.hardware
        kind, flops = kernel_flops(one, self.program.computations[name])
        share = self.constants.kernels.get(kind, 1.0)
        moved = touched_bytes(self.program, one, name) / (hardware.bandwidth * self.constants.memory)
        times = Times(kernel=max(flops / (hardware.flops * share), moved), flops=flops)
        if not flops:
            times.unknown[one.name.rstrip("0123456789.")] += 1
        return times
