"""Bytes of device memory that an instruction reads and writes."""

from llm_jax.plan.hlo import Computation, Instruction, Program

SLICES = ("dynamic-slice", "slice", "gather")
VIEWS = ("bitcast", "reshape", "transpose", "copy", "convert", "get-tuple-element", "tuple")


def touched_bytes(program: Program, one: Instruction, name: str) -> int:
    """Operands read and result written; of an array of which a fusion takes or replaces a slice, the slice alone."""
    computation = program.computations[name]
    inside = program.fused(one)
    if not inside:
        return own_bytes(one, computation)
    parameters = {}
    for part in inside.values():
        if part.opcode == "parameter":
            parameters[int(part.rest.split(")")[0].split(",")[0])] = part
    read = sum(read_bytes(parameters[i], inside) for i in parameters)
    return read + written_bytes(inside)


def own_bytes(one: Instruction, computation: Computation) -> int:
    if one.opcode in SLICES:
        return 2 * one.bytes
    if one.opcode == "dynamic-update-slice":
        return 2 * computation[one.operands[1]].bytes if one.operands[1] in computation else one.bytes
    return one.bytes + sum(computation[operand].bytes for operand in one.operands if operand in computation)


def read_bytes(part: Instruction, inside: Computation) -> int:
    """Of an array inside a fusion: all of it, or what slices take of it; nothing where it is only written into."""
    users = [one for one in inside.values() if part.name in one.operands]
    if not users:
        return part.bytes
    read = 0
    for one in users:
        if one.opcode in SLICES and one.operands[0] == part.name:
            read += one.bytes
        elif one.opcode in VIEWS and not one.root:
            read += read_bytes(one, inside)
        elif one.opcode != "dynamic-update-slice" or one.operands[0] != part.name:
            return part.bytes
    return min(read, part.bytes)


def written_bytes(inside: Computation) -> int:
    root = next(part for part in inside.values() if part.root)
    results = [inside[name] for name in root.operands if name in inside] if root.opcode == "tuple" else [root]
    return sum(result_bytes(result, inside) for result in results)


def result_bytes(result: Instruction, inside: Computation) -> int:
    while result.opcode in VIEWS and result.operands and result.operands[0] in inside:
        result = inside[result.operands[0]]
    if result.opcode == "dynamic-update-slice" and result.operands[1] in inside:
        return inside[result.operands[1]].bytes
    return result.bytes
