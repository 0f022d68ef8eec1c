"""What the partitioner makes of a train step: its collectives, by kind, mesh axes and count.

A process of its own (`python tests/collectives.py CELL`) has 512 fake CPU devices, compiles a cell's step for as many
of them as its mesh has, and reads the module as it leaves the SPMD partitioner: from there on CPU's passes, which
merge collectives and know no reduce-scatter, are not those of an accelerator.
"""

import dataclasses
import functools
import json
import math
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import jax
import numpy as np
import tiny

from llm_jax.config import Config, check, check_devices, load
from llm_jax.config.mesh import MESH_AXES
from llm_jax.sharding import make_layout
from llm_jax.training.lower import lower_step

KINDS = ("all-gather", "reduce-scatter", "all-reduce", "collective-permute", "all-to-all")
PASSED_ON = ("copy", "convert", "reshape", "bitcast", "transpose", "tuple")  # what may stand before the slice is taken


@dataclasses.dataclass(frozen=True)
class Collective:
    """One collective of the program; inside a loop it runs as often as the loop turns."""

    kind: str
    axes: str  # of the mesh, as "data+fsdp"
    shape: tuple[int, ...]  # of the result; of a reduce-scatter, before each device keeps its part
    dtype: str
    loop: bool
    backward: bool
    name: str  # where in the model

    @property
    def size(self) -> int:
        return math.prod(self.shape)


@dataclasses.dataclass(frozen=True)
class Instruction:
    name: str
    dtype: str
    shape: tuple[int, ...]
    opcode: str
    operands: tuple[str, ...]
    rest: str


def parse(text: str) -> tuple[dict[str, list[Instruction]], set[str]]:
    """The module's computations, and the names of those that run inside a loop."""
    computations: dict[str, list[Instruction]] = {}
    current: list[Instruction] = []
    line_form = re.compile(r"\s+(?:ROOT )?%?([\w.-]+) = (.+?) ([\w-]+)\((.*?)\)(.*)$")
    for line in text.splitlines():
        if head := re.match(r"(?:ENTRY )?%?([\w.-]+) \(.*\) -> .* \{$", line):
            current = computations.setdefault(head[1], [])
        elif found := line_form.match(line):
            name, result, opcode, operands, rest = found.groups()
            kind = re.match(r"\(?(\w+)\[([\d,]*)\]", result)
            dtype, shape = (kind[1], kind[2]) if kind else ("", "")
            shape = tuple(int(n) for n in shape.split(",") if n)
            current.append(Instruction(name, dtype, shape, opcode, tuple(re.findall(r"%([\w.-]+)", operands)), rest))

    loops: set[str] = set()

    def mark(name: str) -> None:
        if name in loops or name not in computations:
            return
        loops.add(name)
        for instruction in computations[name]:
            for called in re.findall(r"%([\w.-]+)", instruction.rest):
                mark(called)

    for instructions in computations.values():
        for instruction in instructions:
            if instruction.opcode == "while":
                mark(re.search(r"body=%?([\w.-]+)", instruction.rest)[1])
    return computations, loops


def collectives(text: str, mesh: dict[str, int]) -> list[Collective]:
    """All that move arrays (not scalars). An all-reduce of which each device keeps a slice counts as reduce-scatter.

    That is how the partitioner writes one; the compilers of TPU and GPU join the two.
    """
    computations, loops = parse(text)
    found = []
    for name, instructions in computations.items():
        by_name = {instruction.name: instruction for instruction in instructions}
        users: dict[str, list[Instruction]] = {}
        for instruction in instructions:
            for operand in instruction.operands:
                users.setdefault(operand, []).append(instruction)
        for one in instructions:
            kind = one.opcode.removesuffix("-start")
            if kind not in KINDS or not one.shape:
                continue
            if kind == "all-reduce" and keeps_a_slice(one, users):
                kind = "reduce-scatter"
            shape = by_name[one.operands[0]].shape if one.opcode == "reduce-scatter" else one.shape
            where = re.search(r'op_name="([^"]*)"', one.rest)
            path = where[1] if where else ""
            axes = axes_of(one.rest, mesh)
            found.append(Collective(kind, axes, shape, one.dtype, name in loops, "transpose(" in path, path))
    return found


def keeps_a_slice(reduced: Instruction, users: dict[str, list[Instruction]]) -> bool:
    """Whether nothing but a slice of the result is used, whatever copies and casts stand between."""
    next_ones = users.get(reduced.name, [])
    while len(next_ones) == 1:
        (one,) = next_ones
        if one.opcode == "dynamic-slice":
            return one.shape != reduced.shape
        if one.opcode not in PASSED_ON:
            return False
        next_ones = users.get(one.name, [])
    return False


def axes_of(rest: str, mesh: dict[str, int]) -> str:
    """The mesh axes along which the devices of a group differ. Devices are numbered in the mesh's order."""
    pairs = re.search(r"source_target_pairs=\{\{(.*?)\}\}", rest)
    groups = [[int(n) for n in pair.split(",")] for pair in pairs[1].split("},{")] if pairs else replica_groups(rest)
    varying = set()
    for group in groups:
        places = [coordinates(device, mesh) for device in group]
        varying |= {axis for axis in mesh if len({place[axis] for place in places}) > 1}
    return "+".join(axis for axis in mesh if axis in varying)


def coordinates(device: int, mesh: dict[str, int]) -> dict[str, int]:
    place = {}
    for axis, size in reversed(mesh.items()):
        device, place[axis] = divmod(device, size)
    return place


def replica_groups(rest: str) -> list[list[int]]:
    """The groups of devices, of whichever of XLA's three spellings: lists, [4,2]<=[8], mesh['a'=4,'b'=2] {'b'}."""

    def iota(shape: str, order: str | None) -> np.ndarray:
        sizes = [int(n) for n in shape.split(",")]
        devices = np.arange(math.prod(sizes)).reshape(sizes)
        return devices.transpose([int(n) for n in order.split(",")]) if order else devices

    if found := re.search(r"replica_groups=\{\{(.*?)\}\}", rest):
        return [[int(n) for n in group.split(",")] for group in found[1].split("},{")]
    if found := re.search(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", rest):
        return iota(found[2], found[3]).reshape([int(n) for n in found[1].split(",")]).tolist()
    named = r"replica_groups=mesh\[(.*?)\](?:, device_ids=\(\[([\d,]+)\](?:T\(([\d,]+)\))?\))? \{(.*?)\}"
    found = re.search(named, rest)
    assert found, f"replica groups in a form that this parser does not know: {rest[:300]}"
    sizes = {axis: int(size) for axis, size in re.findall(r"'(\w+)'=(\d+)", found[1])}
    over = re.findall(r"'(\w+)'", found[4])
    assert "(" not in found[4], f"a part of an axis, which this parser does not know: {rest[:300]}"
    devices = iota(found[2] or str(math.prod(sizes.values())), found[3]).reshape(list(sizes.values()))
    last = [list(sizes).index(axis) for axis in over]
    devices = np.moveaxis(devices, last, range(-len(last), 0))
    return devices.reshape(-1, math.prod(sizes[axis] for axis in over)).tolist()


def counts(found: list[Collective]) -> dict[str, dict[str, int]]:
    """{"all-gather": {"fsdp": 17}, ...}: how many instructions of each kind, by the mesh axes they go over."""
    table: dict[str, dict[str, int]] = {}
    for one in sorted(found, key=lambda one: (KINDS.index(one.kind), one.axes)):
        if one.axes:  # else a group of one device
            kind = table.setdefault(one.kind, {})
            kind[one.axes] = kind.get(one.axes, 0) + 1
    return table


# ------------------------------------------------------------------------------------------------------ the cells

SPLIT_RESIDUAL = "mesh.activation_rules=residual_length=sequence+tensor"
LONG_ROWS = (
    "data.sequence_length=32768",
    "train.global_batch_size=128",
    "mesh.fsdp=64",
    "mesh.sequence=8",
)  # two a device

# By name: a config with its machine, and overrides. The first two are small enough for the default suite.
CELLS = {
    "llama3-8b 64 data+fsdp": ("llama3/8b:h100x64", ()),
    "mixtral-8x7b 32 fsdp+expert": ("mixtral/8x7b:v5p-64", ("mesh.fsdp=4", "mesh.expert=8")),
    "llama2-7b 512 fsdp": ("llama2/7b:v5p-1024", ()),
    "llama3-70b 512 data+fsdp": ("llama3/70b:v5p-1024", ("mesh.data=8", "mesh.fsdp=64")),
    "llama3-405b 512 fsdp": ("llama3/405b:h100x512", ()),
    "llama3-405b 256 fsdp+tensor": (
        "llama3/405b",
        ("mesh.fsdp=32", "mesh.tensor=8", "train.accumulation=64", SPLIT_RESIDUAL),  # two rows a device
    ),
    "llama3-405b 512 fsdp+tensor": ("llama3/405b:v5p-1024", ("mesh.fsdp=64", "mesh.tensor=8", SPLIT_RESIDUAL)),
    "mixtral-8x22b 512 fsdp+expert": ("mixtral/8x22b:h100x512", ("mesh.fsdp=64", "mesh.expert=8")),
    "llama3-8b 512 fsdp+ring": ("llama3/8b:v5p-1024", (*LONG_ROWS, "model.attention_kernel=ring")),
    "llama3-8b 512 fsdp+all_to_all": ("llama3/8b:v5p-1024", (*LONG_ROWS, "model.attention_kernel=all_to_all")),
    "llama3-70b 512 stage+fsdp": (
        "llama3/70b:v5p-1024",
        ("mesh.stage=4", "mesh.fsdp=128", "mesh.stage_microbatches=8", "train.accumulation=1"),
    ),
}
QUICK = tuple(CELLS)[:2]
SLOW = tuple(CELLS)[2:]


# ---------------------------------------------------------------------------------------- the process of its own

DEVICES = 512


@functools.cache
def measure(cell: str) -> dict:
    """Seconds, mesh sizes, what the partitioner warned of, and the collectives. Runs another process."""
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    done = subprocess.run([sys.executable, __file__, cell], env=environment, capture_output=True, text=True)
    assert not done.returncode, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    warnings = [line for line in done.stderr.splitlines() if "rematerialization" in line]
    moved = [Collective(**one | {"shape": tuple(one["shape"])}) for one in found["collectives"]]
    return found | {"collectives": moved, "warnings": warnings}


def cell_config(cell: str) -> tuple[Config, int]:
    """The checked config of a cell, and the devices of its mesh."""
    spec, overrides = CELLS[cell]
    cfg = load(spec, overrides)
    check(cfg)
    devices = math.prod(getattr(cfg.mesh, axis) for axis in MESH_AXES)
    check_devices(cfg, devices)
    return cfg, devices


def compile_cell(cell: str) -> dict:
    cfg, devices = cell_config(cell)
    began = time.monotonic()
    layout = make_layout(cfg.mesh, jax.devices()[:devices])
    lowered = lower_step(cfg, layout)
    after = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        options = {"xla_dump_to": folder, "xla_dump_hlo_pass_re": "spmd-partitioning"}
        lowered.compile(compiler_options=options | tiny.QUICK)
        (file,) = Path(folder).glob("*train_step*after_spmd-partitioning*")
        text = file.read_text(encoding="utf-8")
    mesh = {axis: layout.mesh.shape[axis] for axis in MESH_AXES}
    return {
        "mesh": mesh,
        "lower_seconds": round(after - began, 1),
        "compile_seconds": round(time.monotonic() - after, 1),
        "collectives": [dataclasses.asdict(one) for one in collectives(text, mesh)],
    }


if __name__ == "__main__":
    jax.config.update("jax_num_cpu_devices", DEVICES)
    print(json.dumps(compile_cell(sys.argv[1])))
