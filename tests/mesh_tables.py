"""The tables of launch/meshes.md, from the functions that choose the meshes: `python tests/mesh_tables.py` writes them.

Each stands between <!-- table: NAME --> and <!-- end --> in the guide.
"""

import re
import sys
from collections.abc import Callable
from pathlib import Path

from configs import machines
from configs.machines import GIB, fit, machine, model_size

GUIDE = Path(__file__).parent.parent / "launch" / "meshes.md"

# By class: the sizes, and rows a step. 1B is LLaMA-3.2's shape, with a head of its own; the others are shipped configs.
CLASSES = {
    "1B": (model_size(layers=16, width=2048, mlp=8192, heads=32, kv_heads=8, vocab=128_256, length=8192), 512),
    "8B": (model_size(layers=32, width=4096, mlp=14_336, heads=32, kv_heads=8, vocab=128_256, length=8192), 1024),
    "70B": (model_size(layers=80, width=8192, mlp=28_672, heads=64, kv_heads=8, vocab=128_256, length=8192), 1024),
    "405B": (model_size(layers=126, width=16_384, mlp=53_248, heads=128, kv_heads=8, vocab=128_256, length=8192), 2048),
    "8x7B": (
        model_size(
            layers=32, width=4096, mlp=14_336, heads=32, kv_heads=8, vocab=32_000, length=4096, experts=8, top_k=2
        ),
        1024,
    ),
}
NAMES = (
    "v4-128", "v4-1024", "v5e-256", "v5e-256x4", "v5p-64", "v5p-512", "v6e-64", "v6e-256", "tpu7x-128", "tpu7x-512",
    "a100x8", "a100x64", "h100x8", "h100x64", "h100x512", "h200x64", "b200x8", "b200x64",
)  # fmt: skip


def markdown(head: list[str], rows: list[list[str]]) -> str:
    return "\n".join("| " + " | ".join(cells) + " |" for cells in [head, ["---"] * len(head), *rows])


def choice(name: str, kind: str) -> str:
    """The mesh in words: "data 8 (across) x fsdp 8, 2 micro-batches"; "-" where the model does not fit.

    A star: a device has too few tokens at a time to hide the gathering of weights.
    """
    try:
        found = fit(name, *CLASSES[kind])
    except ValueError:
        return "-"
    mesh, pieces = found["mesh"], found["train"]["accumulation"]
    across = [part.partition("=") for part in mesh.get("across_slices", ())]
    spread = {axis: int(size) for axis, _, size in across}
    words = []
    for axis in ("data", "fsdp", "expert", "tensor"):
        if mesh[axis] > 1:
            over = f" ({spread[axis]} across)" if 1 < spread.get(axis, 1) < mesh[axis] else ""
            words.append(f"{axis} {mesh[axis]}" + (" (across)" if spread.get(axis) == mesh[axis] else over))
    star = "" if hidden(name, kind) else " *"
    return " x ".join(words) + (f", {pieces} micro-batches" if pieces > 1 else "") + star


def hidden(name: str, kind: str) -> bool:
    """Does the preset's micro-batch hide the gathering of weights?"""
    one, (size, rows) = machine(name), CLASSES[kind]
    found = fit(name, size, rows)
    tokens = rows * size["length"] / one["devices"] / found["train"]["accumulation"]
    return tokens >= gathering(one, size, found["mesh"])


def gathering(one: dict, size: dict, mesh: dict) -> float:
    """The tokens of a device that hide the gathering of weights on this mesh."""
    spread = mesh["fsdp"] * mesh["expert"] * mesh["tensor"] > one["domain"]
    return machines.fsdp_tokens(one, size, expert=mesh["expert"], tensor=mesh["tensor"], slow=spread)


def presets() -> str:
    return markdown(["machine", *CLASSES], [[name, *(choice(name, kind) for kind in CLASSES)] for name in NAMES])


def facts() -> str:
    head = ["device", "TFLOP/s", "GiB", "GB/s fast", "GB/s slow", "FLOPs a byte, fast", "FLOPs a byte, slow"]
    rows = []
    for family in machines.MACHINES:
        one = machine(f"{family}x8" if machines.MACHINES[family][-1] else f"{family}-8")
        fast, slow = (f"{one['flops'] / one[key]:,.0f}" if one[key] else "-" for key in ("fast", "slow"))
        network = f"{one['slow'] / 1e9:.4g}" if one["slow"] else "-"
        peak, memory, link = f"{one['flops'] / 1e12:.4g}", f"{one['hbm'] / GIB:.0f}", f"{one['fast'] / 1e9:.0f}"
        rows.append([family, peak, memory, link, network, fast, slow])
    return markdown(head, rows)


WORKED = (("h100x64", "70B"), ("v5p-512", "405B"), ("h100x64", "8B"), ("h100x64", "8x7B"))


def worked() -> str:
    """What the choice of a mesh rests on, for two machines: thresholds beside what the presets give."""
    head = ["", *(f"{kind} on {name}" for name, kind in WORKED)]
    columns = [worked_column(name, kind) for name, kind in WORKED]
    return markdown(head, [[row, *(column[row] for column in columns)] for row in columns[0]])


def worked_column(name: str, kind: str) -> dict[str, str]:
    one, (size, rows) = machine(name), CLASSES[kind]
    found = fit(name, size, rows)
    mesh, pieces = found["mesh"], found["train"]["accumulation"]
    a_parameter = machines.STATE_BYTES + machines.SUM_BYTES * (pieces > 1)
    state = a_parameter * machines.parameters(size)
    expert, tensor = mesh["expert"], mesh["tensor"]
    shards = mesh["fsdp"] * expert * tensor
    tokens = rows * size["length"] / one["devices"]  # of a device and step, tensor parallel devices sharing theirs
    micro_rows = rows * tensor // one["devices"] // pieces
    spread = shards > one["domain"]
    summed = machines.data_tokens(one) if mesh["data"] > 1 else 0
    parts = dict(shards=shards, tensor=tensor, expert=expert)
    used = machines.used_bytes(size, **parts, rows=micro_rows, accumulation=pieces)
    weights = machines.working_bytes(size, tensor, expert)
    return {
        "mesh": choice(name, kind),
        "state of all parameters, GiB": f"{state / GIB:,.0f} ({a_parameter} bytes each)",
        "a device holds of it, GiB": f"{state / shards / GIB:.1f}",
        "a layer's or the head's weights and gradient, GiB": f"{weights / GIB:.1f}",
        "a row's activations (remat=full), GiB": f"{machines.row_bytes(size, tensor, expert) / GIB:.1f}",
        "rows at a time": f"{micro_rows}",
        "all of it, of the memory": f"{used / GIB:.0f} of {one['hbm'] / GIB:.0f}",
        "tokens a device and micro-batch": f"{tokens / pieces:,.0f}",
        "needed to hide the weights' gathering": f"{gathering(one, size, mesh):,.0f}" + (" (across)" if spread else ""),
        "needed to hide the sum between nodes": f"{summed:,.0f}" if summed else "-",
        "largest tensor axis that pays": f"{machines.tensor_limit(one, size):.1f}",
        "tokens a device for ring attention": f"{machines.ring_tokens(one, size):,.0f}",
    }


def exchange() -> str:
    """What an expert axis costs and saves: 8x7B on a node of H100s, or several."""
    one, (size, _) = machine("h100x64"), CLASSES["8x7B"]
    head = [
        "mesh.expert", "rows of the products a token", "a row's activations, GiB",
        "a layer's weights and gradient, GiB", "tokens that hide the gathering inside a node", "between nodes",
    ]  # fmt: skip
    rows = []
    for expert in machines.powers(size["experts"]):
        row, weights = machines.row_bytes(size, 1, expert) / GIB, machines.working_bytes(size, 1, expert) / GIB
        inside, across = (machines.fsdp_tokens(one, size, expert=expert, slow=slow) for slow in (False, True))
        numbers = [str(expert), str(machines.exchanged(size, expert)), f"{row:.1f}", f"{weights:.1f}"]
        rows.append([*numbers, f"{inside:,.0f}", f"{across:,.0f}"])
    return markdown(head, rows)


def experts() -> str:
    """Widths below which moving tokens to experts costs more than the experts' products."""
    rows = []
    for family in machines.MACHINES:
        one = machine(f"{family}x8" if machines.MACHINES[family][-1] else f"{family}-8")
        slow = f"{machines.expert_width(one, slow=True):,.0f}" if one["slow"] else "-"
        rows.append([family, f"{machines.expert_width(one):,.0f}", slow])
    return markdown(["device", "inside a slice or node", "between them"], rows)


def bubbles() -> str:
    cases = ((4, 4, 1), (4, 16, 1), (4, 16, 2), (8, 8, 1), (8, 32, 1), (8, 32, 4))
    rows = [[str(s), str(m), str(r), f"{100 * machines.bubble(s, r, m):.1f} %"] for s, m, r in cases]
    return markdown(["mesh.stage", "mesh.stage_microbatches", "mesh.stage_repeats", "idle"], rows)


TABLES: dict[str, Callable[[], str]] = {
    "presets": presets, "facts": facts, "worked": worked, "experts": experts, "exchange": exchange, "bubbles": bubbles,
}  # fmt: skip


def filled(text: str) -> str:
    """The guide with every table made anew."""
    for name, make in TABLES.items():
        place = re.compile(rf"(<!-- table: {name} -->\n).*?(<!-- end -->)", re.DOTALL)
        assert place.search(text), f"the guide has no place for the table {name}"
        table = make()
        text = place.sub(rf"\g<1>{table}\n\g<2>", text)
    return text


if __name__ == "__main__":
    GUIDE.write_text(filled(GUIDE.read_text(encoding="utf-8")), encoding="utf-8")
    sys.exit(0)
