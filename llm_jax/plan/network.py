"""Collectives of a program: which devices take part, over which mesh axes and links, and how long that takes.

A ring over n devices sends (n-1)/n of the array one way for an all-gather or a reduce-scatter, twice that for an
all-reduce (Thakur et al. 2005; for tori, Jouppi et al. 2023, arXiv 2304.01433).
"""

import dataclasses
import functools
import math
import re

import numpy as np

from llm_jax.plan.hardware import Topology
from llm_jax.plan.hlo import Computation, Instruction, Program

KINDS = ("all-gather", "reduce-scatter", "all-reduce", "all-to-all", "collective-permute")
MIXED = {"ragged-all-to-all": "all-to-all", "collective-broadcast": "collective-permute"}
BETWEEN_SLICES = re.compile(r'_xla_megascale_transfer_type="(\w+)"')  # of a TPU program's `send`


@dataclasses.dataclass(frozen=True)
class Placed:
    """A mesh on a machine.

    Attributes:
      mesh: axes and sizes, in the order that numbers the devices.
      places: (devices, 2 + dimensions) int: slice or node, coordinates, core on its chip; in the mesh's order.
    """

    machine: Topology
    mesh: dict[str, int]
    places: np.ndarray


def placed(machine: Topology, mesh: dict[str, int], places: list[list[int]] | None = None) -> Placed:
    """`places`: as the compiler's devices say; None: row by row through the machine."""
    if places is None:
        hardware = machine.hardware
        sizes = (machine.domains, *(machine.shape if hardware.tpu else machine.shape[1:]), hardware.devices_a_chip)
        at = np.stack(np.unravel_index(np.arange(machine.devices), sizes), -1)
    else:
        at = np.array(places)
    return Placed(machine, mesh, at)


@dataclasses.dataclass(frozen=True)
class Collective:
    """One that the program runs.

    Attributes:
      axes: of the mesh, "data+fsdp"; "" for a group of one device.
      size: devices of a group.
      bytes: of the whole array: gathered, to be scattered or summed, handed on.
      sent: bytes that a device sends.
      seconds: the time it takes when nothing else uses the links.
    """

    kind: str
    axes: str
    size: int
    bytes: int
    sent: float
    seconds: float


def kind_of(one: Instruction) -> str:
    """The kind of collective that an instruction is or starts; "" if none."""
    if one.opcode == "send" and (found := BETWEEN_SLICES.search(one.rest)):
        return found[1].lower().replace("_", "-")
    name = one.opcode.removesuffix("-start")
    return name if name in KINDS else MIXED.get(name, "")


def collective(one: Instruction, computation: Computation, on: Placed, efficiency: float) -> Collective:
    """What a collective instruction moves, and in how many seconds.

    `efficiency`: the share of its links' bandwidth that a collective reaches.
    """
    kind = kind_of(one)
    if one.opcode == "send":
        groups = across_slices(on)
    else:
        devices = len(on.places) // on.machine.slices  # the text of several slices is one slice's
        groups = device_groups(one.rest, devices, kind == "collective-permute")
    given = sum(computation[name].bytes for name in one.operands if name in computation)
    size = groups.shape[1]
    whole = given * size if kind == "all-gather" else given
    axes = varying_axes(groups, on.mesh)
    if not axes:
        return Collective(kind, "", 1, whole, 0.0, 0.0)
    share = (size - 1) / size
    sent = whole * {"all-reduce": 2 * share, "collective-permute": 1.0}.get(kind, share)
    return Collective(kind, axes, size, whole, sent, seconds(kind, sent, groups, on) / efficiency)


# ------------------------------------------------------------------------------------------------------- groups


@functools.lru_cache(maxsize=4096)
def cached_groups(text: str, devices: int) -> np.ndarray:
    groups = replica_groups(text, devices)
    return groups[: max(1, 4096 // groups.shape[1])]  # enough to see along which axes they go


def device_groups(rest: str, devices: int, pairs: bool) -> np.ndarray:
    """(groups, devices of one) numbers of devices, in the order of the mesh; of a permute (pairs, 2)."""
    key = r"source_target_pairs=\{[^}]*(?:\}[,\s]*\{[^}]*)*\}\}" if pairs else (
        r"replica_groups=(?:mesh\[.*?\](?:, device_ids=\(.*?\)\)?)? \{.*?\}|\{\{.*?\}\}|\{\}|"
        r"\[[\d,]+\]<=\[[\d,]+\](?:T\([\d,]+\))?)"
    )  # fmt: skip
    found = re.search(key, rest)
    return cached_groups(found[0] if found else "", devices)


def slices_of(program: Program) -> int:
    """Of how many slices a TPU's program is: the text is one slice's, and what it sends names them ("{1,2}x{0:63}")."""
    sent = (one.rest for computation in program.computations.values() for one in computation.values()
            if one.opcode == "send")  # fmt: skip
    found = (re.search(r'_xla_megascale_target="\{([\d,]+)\}', rest) for rest in sent)
    return max((len(slices[1].split(",")) for slices in found if slices), default=1)


def across_slices(on: Placed) -> np.ndarray:
    """(groups, slices): the devices at one place of each slice."""
    order = np.lexsort((on.places[:, 0], *on.places[:, 1:].T))
    return order.reshape(-1, on.machine.domains)


def replica_groups(text: str, devices: int) -> np.ndarray:
    """Groups in any of XLA's spellings: lists, [4,2]<=[8]T(1,0), mesh['a'=4,'b'=2] {'b'}; "" and {}: all devices."""
    if found := re.search(r"\{\{(.*?)\}\}", text):
        return np.array([[int(n) for n in group.split(",")] for group in re.split(r"\},\s*\{", found[1])])
    if found := re.search(r"\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", text.partition("mesh")[0]):
        return iota(found[2], found[3]).reshape([int(n) for n in found[1].split(",")])
    named = r"mesh\[(.*?)\](?:, device_ids=\(\[([\d,]+)\](?:T\(([\d,]+)\))?\))? \{(.*?)\}$"
    if found := re.search(named, text):
        sizes = {axis: int(size) for axis, size in re.findall(r"'(\w+)'=(\d+)", found[1])}
        order = iota(found[2] or str(math.prod(sizes.values())), found[3])
        return over_axes(order, sizes, re.findall(r"'(\w+)'(?::\((\d+)\)(\d+))?", found[4]))
    return np.arange(devices)[None]


def iota(shape: str, order: str | None) -> np.ndarray:
    sizes = [int(n) for n in shape.split(",")]
    devices = np.arange(math.prod(sizes)).reshape(sizes)
    return devices.transpose([int(n) for n in order.split(",")]) if order else devices


def over_axes(order: np.ndarray, sizes: dict[str, int], over: list[tuple[str, str, str]]) -> np.ndarray:
    """Groups that go over the named axes, or over a part of one: (name, size before it, its size)."""
    dims, place, chosen = [], {}, []
    for axis, size in sizes.items():
        part = next(((int(before), int(inner)) for name, before, inner in over if name == axis and inner), None)
        before, inner = part or (1, size)
        dims += [before, inner, size // (before * inner)]
        place[axis] = len(dims) - 2
    chosen = [place[name] for name, _, _ in over]
    devices = np.moveaxis(order.reshape(dims), chosen, range(-len(chosen), 0))
    return devices.reshape(-1, math.prod(dims[i] for i in chosen))


def varying_axes(groups: np.ndarray, mesh: dict[str, int]) -> str:
    """The mesh axes along which the devices of a group differ."""
    places = np.unravel_index(groups, tuple(mesh.values())) if math.prod(mesh.values()) > groups.max() else ()
    return "+".join(axis for axis, at in zip(mesh, places, strict=False) if (at != at[:, :1]).any())


# -------------------------------------------------------------------------------------------------------- time


def seconds(kind: str, sent: float, groups: np.ndarray, on: Placed) -> float:
    """Of a device that sends `sent` bytes within each group, over as many links as the group can use at once."""
    hardware, places = on.machine.hardware, on.places[groups[:8]]
    outside = max(len(np.unique(group)) for group in places[:, :, 0])
    inside = torus_seconds(kind, sent, places, on.machine) if hardware.tpu else sent / hardware.link
    if outside == 1:
        return inside
    # Pieces go inside a slice or node first, then between them: each device has its share of what crosses.
    own = max(groups.shape[1] // outside, 1)
    share = (outside - 1) / outside * groups.shape[1] / max(groups.shape[1] - 1, 1)
    return max(inside, sent * share / own / hardware.slow)


def torus_seconds(kind: str, sent: float, places: np.ndarray, machine: Topology) -> float:
    """`places`: (groups, devices of one, 2 + dimensions)."""
    hardware = machine.hardware
    if kind == "collective-permute":
        return sent / hardware.link
    at = places[..., 1 : 1 + len(machine.shape)]
    extents = [max(len(np.unique(group)) for group in at[..., d]) for d in range(len(machine.shape))]
    spanned = [d for d, extent in enumerate(extents) if extent > 1]
    if not spanned:  # the two devices of a chip
        return sent / (2 * hardware.torus * hardware.link)
    if kind == "all-to-all":  # the fullest dimension: an eighth of its length times the array crosses each link
        return sent * max(extents) / 8 / hardware.link
    rings = sum(2 if machine.wrap[d] and extents[d] == machine.shape[d] else 1 for d in spanned)
    return sent * hardware.devices_a_chip / (rings * hardware.link)
