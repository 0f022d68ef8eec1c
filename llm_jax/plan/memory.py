"""What lies in a device's memory during a step, and which tensors take most of it."""

import dataclasses
from collections.abc import Iterator

from llm_jax.plan.compile import Compiled
from llm_jax.plan.cost import HOST
from llm_jax.plan.hlo import Instruction, Program
from llm_jax.plan.setting import Setting

STARTUP = 0.9  # JAX gives a GPU's program three quarters of its memory unless told otherwise; this much is usual


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes of a device. `other`: the batch, the program itself. `host`: beside the device, in the host's memory."""

    parameters: float
    optimizer: float
    gradients: float
    activations: float
    temporaries: float
    other: float
    host: float = 0.0

    @property
    def total(self) -> float:
        return sum(vars(self).values()) - self.host


def compiled_memory(setting: Setting, compiled: Compiled) -> Memory:
    """The compiler's own sums, split by what we know of them: arguments into parameters, optimizer and batch; what it
    allocates into gradients (all of them exist at the end of the backward pass), saved activations and the rest."""
    said, state = compiled.result["memory"], setting.state_bytes()
    known = state["parameters"] + state["optimizer"]
    output = max(said["output"] - said["alias"], 0)
    temporary = said["temp"]
    activations = min(saved_activations(compiled.program), temporary)
    gradients = min(state["gradients"], temporary - activations)
    return Memory(
        state["parameters"],
        state["optimizer"],
        gradients,
        activations,
        temporary - gradients - activations,
        max(said["argument"] - known, 0) + output + said["generated_code"],
        said["host_argument"] + said["host_temp"],
    )


def program_memory(program: Program) -> list[tuple[str, float]]:
    """What the text alone tells of a program from elsewhere: arguments, and what its forward loops keep."""
    entry = program.computations[program.entry].values()
    arguments = sum(one.bytes for one in entry if one.opcode == "parameter")
    return [("arguments", arguments), ("saved activations", saved_activations(program))]


def saved_activations(program: Program) -> int:
    """Bytes of what loops of the forward pass stack up for the backward pass, a layer (or a chunk) after the other."""
    most = 0
    for one, _, _ in program.every():
        forward = "transpose(" not in one.op_name and ("jvp" in one.op_name or "checkpoint" in one.op_name)
        if one.opcode == "while" and forward:
            most += sum(shape.bytes for shape in stacked(program, one))
    return most


def stacked(program: Program, loop: Instruction) -> Iterator:
    """Shapes of what a loop writes piece by piece: as long as it turns, in device memory, and not handed through."""
    body = program.computations[loop.called("body")]
    root, trips = next(one for one in body.values() if one.root), program.trips(loop)
    if len(root.operands) != len(root.shapes):
        return
    for name, shape in zip(root.operands, root.shapes, strict=True):
        kept = body[name].opcode in ("get-tuple-element", "copy-done")
        if not kept and shape.dims[:1] == (trips,) and len(shape.dims) > 1 and shape.space != HOST:
            yield shape


def largest_tensors(program: Program, count: int = 8) -> list[tuple[int, str, str]]:
    """(bytes, shape, where in the model) of the largest arrays that the program makes, largest first."""
    found: dict[tuple[str, str], int] = {}
    for one, _, _ in program.every():
        if one.opcode in ("parameter", "get-tuple-element", "tuple", "bitcast", "while", "conditional", "copy-done"):
            continue
        for shape in one.shapes:
            if shape.space == 0:
                found.setdefault((str(shape), short_name(one.op_name)), shape.bytes)
    ordered = sorted(((size, shape, name) for (shape, name), size in found.items() if name), reverse=True)
    seen: set[str] = set()
    return [row for row in ordered if not (row[1] in seen or seen.add(row[1]))][:count]


def short_name(op_name: str) -> str:
    """The part of JAX's name for an operation that says where in the model it is."""
    dropped = (
        "jit(",
        "jvp(",
        "transpose(",
        "while",
        "body",
        "closed_call",
        "checkpoint",
        "eval_jaxpr",
        "cond",
        "shard_map",
    )
    parts = [part for part in op_name.split("/") if not part.startswith(dropped) and "Decoder" not in part]
    backward = " (backward)" if "transpose(" in op_name else ""
    return "/".join(parts[-3:]) + backward if parts else ""
