"""The page that a plan prints."""

import json
import math
from collections.abc import Sequence

from llm_jax.config import Config
from llm_jax.models.flops import FORMULA
from llm_jax.plan.candidates import differing
from llm_jax.plan.cost import Times
from llm_jax.plan.estimate import Estimate
from llm_jax.plan.hardware import Topology
from llm_jax.plan.memory import Memory
from llm_jax.plan.search import Tried
from llm_jax.plan.setting import Setting, slices_note
from llm_jax.training.back_end import attention_line

GIB = 2**30
USUAL_SHARE = 0.75  # of a GPU's memory, which JAX takes unless told otherwise


def page(found: Estimate, *, price: float, tokens: float) -> str:
    """The whole page. `price`: US dollars a chip-hour, 0: not known; `tokens`: of the run, 0: not known."""
    parts = [head(found.setting, found.how), memory_table(found), collectives_table(found.times), time_table(found)]
    parts.append(rates(found, price=price, tokens=tokens))
    return "\n\n".join(parts)


def head(setting: Setting, how: str) -> str:
    cfg, machine = setting.cfg, setting.machine
    chips = f"{machine.chips:,} chips" if machine.hardware.tpu else f"{machine.chips:,} GPUs"
    devices = f", {machine.devices:,} devices" if machine.devices != machine.chips else ""
    mesh = " x ".join(f"{axis} {size}" for axis, size in setting.mesh.items() if size > 1) or "one device"
    lines = [
        f"{cfg.name} on {machine}: {chips}{devices}; {how}",
        f"mesh {mesh}; {attention_line(cfg, setting.layout)}; remat {cfg.model.remat}"
        + (f" ({', '.join(cfg.model.remat_save)})" if cfg.model.remat_save else ""),
        f"{setting.parameters:,} parameters; {cfg.train.global_batch_size:,} rows of {cfg.data.sequence_length:,} = "
        f"{setting.tokens:,} tokens a step, in {cfg.train.accumulation} micro-batches"
        if cfg.train.accumulation > 1
        else f"{setting.parameters:,} parameters; {cfg.train.global_batch_size:,} rows of "
        f"{cfg.data.sequence_length:,} = {setting.tokens:,} tokens a step",
    ]
    if note := slices_note(setting):
        lines.append(f"note: {note}")
    return "\n".join(lines)


def memory_table(found: Estimate) -> str:
    memory, room = found.memory, found.setting.machine.hardware.memory
    rows = [(name, f"{size / GIB:.2f}") for name, size in memory_rows(memory)]
    verdict = "fits" if found.fits else f"does not fit: {(memory.total - room) / GIB:.2f} too many"
    text = table("memory a device, GiB", [*rows, ("all", f"{memory.total / GIB:.2f} of {room / GIB:.2f}: {verdict}")])
    if not found.setting.machine.hardware.tpu and found.fits and memory.total > USUAL_SHARE * room:
        share = math.ceil(100 * memory.total / room + 3)
        text += f"\n  (more than JAX takes by itself: set XLA_PYTHON_CLIENT_MEM_FRACTION=.{min(share, 97)})"
    if memory.host:
        text += f"\n  and {memory.host / GIB:.2f} GiB of the host's memory for each device"
    if found.largest:
        text += "\n  largest tensors: " + "; ".join(
            f"{shape} {size / GIB:.2f} GiB ({where})" for size, shape, where in found.largest[:3]
        )
    return text


def memory_rows(memory: Memory) -> list[tuple[str, float]]:
    return [
        ("parameters", memory.parameters),
        ("optimizer state", memory.optimizer),
        ("gradients", memory.gradients),
        ("saved activations", memory.activations),
        ("temporaries", memory.temporaries),
        ("batch and program", memory.other),
    ]


def collectives_table(times: Times) -> str:
    rows = [("kind", "mesh axes", "a step", "GB sent", "ms at full links", "ms waited", "hidden")]
    for (kind, axes), moved in sorted(times.moved.items(), key=lambda item: -item[1].seconds):
        if moved.seconds < 1e-3 * times.total and len(rows) > 4:
            continue  # thousandths of the step
        hidden = 1 - moved.waited / moved.seconds if moved.seconds else 1.0
        numbers = (f"{moved.count:,}", f"{moved.bytes / 1e9:,.2f}", f"{1e3 * moved.seconds:,.1f}")
        rows.append((kind, axes, *numbers, f"{1e3 * moved.waited:,.1f}", f"{max(hidden, 0):.0%}"))
    if len(rows) == 1:
        return "collectives: none"
    return table("collectives of a device", rows)


def time_table(found: Estimate) -> str:
    times, total = found.times, found.times.total
    rows = [
        ("matrix products", times.matrix),
        ("attention and other kernels", times.kernel),
        ("memory-bound operations", times.memory),
        ("waiting for the network", times.waited),
    ]
    rows = [(name, f"{seconds:.3f}", f"{seconds / total:.0%}") for name, seconds in rows]
    rows.append(("all", f"{total:.3f}", ""))
    text = table("a step, seconds", rows)
    if found.bubble:
        text += f"\n  of the work {found.bubble:.0%} is the pipeline's bubble"
    for name, count in times.unknown.items():
        text += f"\n  kernel {name} ({count:,} times) counts by its bytes alone: its FLOPs are not known"
    return text


def rates(found: Estimate, *, price: float, tokens: float) -> str:
    setting, machine = found.setting, found.setting.machine
    flops = setting.flops.total * setting.tokens
    each = found.times.flops * machine.devices
    lines = [
        f"{flops:.4g} FLOPs a step are needed, {each / flops:.2f} times as many computed; causal MFU {found.mfu:.1%}",
        f"{found.tokens_per_second:,.0f} tokens/s, {found.tokens_per_second / machine.chips:,.0f} a chip",
    ]
    if tokens:
        line = f"{tokens:.4g} tokens take {found.days(tokens):,.2f} days"
        if price:
            hours = found.days(tokens) * 24 * machine.chips
            line += f" = {hours:,.0f} chip-hours, {found.cost(tokens, price):,.0f} at {price:g} a chip-hour"
        lines.append(line)
    lines.append(f"MFU = {FORMULA}, over {machine.hardware.flops:.4g} FLOP/s a device")
    return "\n".join(lines)


def program_page(name: str, machine: Topology, times: Times, memory: list[tuple[str, float]]) -> str:
    """Of a compiled text from elsewhere, whose model and batch are not known."""
    total = times.total
    rows = [("matrix products", times.matrix), ("attention and other kernels", times.kernel),
            ("memory-bound operations", times.memory), ("waiting for the network", times.waited)]  # fmt: skip
    shown = [(what, f"{seconds:.3f}", f"{seconds / total:.0%}") for what, seconds in rows]
    parts = [
        f"{name} on {machine}",
        table("a step, seconds", [*shown, ("all", f"{total:.3f}", "")]),
        collectives_table(times),
        table("memory a device, GiB", [(what, f"{size / GIB:.2f}") for what, size in memory]),
        f"{times.flops:.4g} FLOPs a device and step"
        + (f"; {times.cycles / 1e9:.3f} G estimated cycles outside the kernels" if times.cycles else ""),
    ]
    parts += [f"kernel {what} counts by its bytes alone: its FLOPs are not known" for what in times.unknown]
    return "\n\n".join(parts)


def comparison(first: Estimate, second: Estimate, *, price: float, tokens: float) -> str:
    """Two estimates side by side, number by number."""
    rows = [("", first.setting.cfg.name, second.setting.cfg.name, "second / first")]
    pairs = [(name, a / GIB, b / GIB, "GiB") for (name, a), (_, b) in
             zip(memory_rows(first.memory), memory_rows(second.memory), strict=True)]  # fmt: skip
    pairs += [("memory, all", first.memory.total / GIB, second.memory.total / GIB, "GiB")]
    for name in ("matrix", "kernel", "memory", "waited", "total"):
        label = {"kernel": "kernels", "memory": "memory-bound", "total": "a step"}.get(name, name)
        pairs.append((label, getattr(first.times, name), getattr(second.times, name), "s"))
    pairs.append(("causal MFU", 100 * first.mfu, 100 * second.mfu, "%"))
    pairs.append(("tokens/s", first.tokens_per_second, second.tokens_per_second, ""))
    if tokens:
        pairs.append(("days", first.days(tokens), second.days(tokens), ""))
        if price:
            pairs.append(("cost", first.cost(tokens, price), second.cost(tokens, price), ""))
    for name, a, b, unit in pairs:
        rows.append((name, f"{a:,.4g} {unit}".strip(), f"{b:,.4g} {unit}".strip(), f"{b / a:.2f}" if a else "-"))
    return "\n\n".join([head(first.setting, first.how), head(second.setting, second.how), table("side by side", rows)])


def misfit(setting: Setting, needed: float, tensors: Sequence[tuple[float, str]], good: Sequence[Tried]) -> str:
    """What does not fit, by how much, and what would; `good`: changes that were compiled and fit."""
    room = setting.machine.hardware.memory
    much = f"it needs {needed / GIB:.1f} GiB of each device's {room / GIB:.1f}, {(needed - room) / GIB:.1f} too many"
    rows = [(name, f"{size / GIB:.2f}") for size, name in tensors[:8]]
    parts = [
        f"{setting.cfg.name} does not fit on {setting.machine}: "
        + (much if needed == needed else "its compiler refuses it"),
        table("largest tensors of a device, GiB (reckoned)", rows),
    ]
    if good:
        ways = [(f"{one.found.memory.total / GIB:.1f} GiB", f"{one.found.times.total:.3f} s a step",
                 override_lines(one.candidate.changes)) for one in good]  # fmt: skip
        parts.append(table("changes that make it fit, each compiled", ways))
    else:
        parts.append("no change of mesh, remat or accumulation that was tried makes it fit: take a larger machine")
    return "\n\n".join(parts)


def ranking(cfg: Config, tried: Sequence[Tried]) -> str:
    """All that was compiled, the best first."""
    rows = [("", "s a step", "reckoned", "GiB", "changes")]
    for place, one in enumerate(tried, 1):
        good = one.found if one.found and not one.why_not else None
        seconds = f"{good.times.total:.3f}" if good else one.why_not[:40]
        memory = f"{good.memory.total / GIB:.1f}" if good else "-"
        changes = override_lines(differing(cfg, one.candidate.changes)) or "as it is"
        rows.append((str(place), seconds, f"{one.candidate.seconds:.3f}", memory, changes))
    return table("candidates, compiled", rows)


def override_lines(changes: dict[str, object]) -> str:
    """Settings as flags that can be typed."""
    return " ".join(f"--config.{key}={spelled(value)}" for key, value in changes.items())


def spelled(value: object) -> str:
    if isinstance(value, (list, tuple)):
        return ",".join(map(str, value))
    return value if isinstance(value, str) else json.dumps(value)


def table(title: str, rows: Sequence[tuple[str, ...]]) -> str:
    """Aligned columns, the first to the left and the others to the right."""
    columns = max(map(len, rows))
    widths = [max(len(row[i]) for row in rows if i < len(row)) for i in range(columns)]
    lines = [title]
    for row in rows:
        cells = [cell.ljust(widths[i]) if i == 0 or not numeric(rows, i) else cell.rjust(widths[i])
                 for i, cell in enumerate(row)]  # fmt: skip
        lines.append("  " + "  ".join(cells).rstrip())
    return "\n".join(lines)


def numeric(rows: Sequence[tuple[str, ...]], column: int) -> bool:
    return any(row[column][:1].isdigit() for row in rows if column < len(row))
