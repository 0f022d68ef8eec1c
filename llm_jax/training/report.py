"""What the loop tells: the numbers of a step, read one step late, and the words at a run's start and end."""

import math
import os
import time
from collections.abc import Mapping
from typing import Any

import jax

from llm_jax import metrics, sharding
from llm_jax.config import Config
from llm_jax.config.pipeline import bubble
from llm_jax.config.schema import LABELLED_TASKS
from llm_jax.errors import BadStepsError
from llm_jax.models.flops import FORMULA, Flops
from llm_jax.models.registry import Model, count_parameters
from llm_jax.sharding import path_name
from llm_jax.training.back_end import attention_line


class StepReport:
    """Turns the device's metrics into a line of metrics.jsonl each step, and a full record every `every` steps.

    `add` is given the metrics of the step just dispatched and reads those of the step before: by then they are ready,
    so the device never waits for the host.
    """

    def __init__(self, out: metrics.Metrics, data: Any, flops: Flops, *, every: int, last: int, max_bad_steps: int):
        self.out, self.data, self.flops = out, data, flops
        self.every, self.last, self.max_bad_steps = every, last, max_bad_steps
        self._pending: tuple[int, Mapping[str, jax.Array]] | None = None
        self._restart_clock()

    def add(self, step: int, values: Mapping[str, jax.Array]) -> None:
        """Take the metrics of `step`, on the device; report those of the step before."""
        self.flush()
        self._pending = (step, values)

    def flush(self) -> None:
        """Report the step that is still pending.

        Raises:
          BadStepsError: too many steps in a row were not finite.
        """
        if self._pending is None:
            return
        step, on_device = self._pending
        self._pending = None
        values = {name: value.item() for name, value in jax.device_get(dict(on_device)).items()}
        self._tokens += values["tokens"]
        self._steps += 1
        if values.get("bytes"):
            values["bits_per_byte"] = values["loss"] * values["tokens"] / math.log(2) / values["bytes"]
        if values["bad_in_a_row"]:
            self.out.say(f"step {step}: loss or gradient is not finite; the step was skipped, nothing was changed")
        if step % self.every == 0 or step == self.last or values["bad_in_a_row"] >= self.max_bad_steps:
            self.out.write(step, values | self._rates(values))
            self._restart_clock()
        else:
            self.out.write(step, values, file_only=True)
        if values["bad_in_a_row"] >= self.max_bad_steps:
            raise BadStepsError(
                f"{values['bad_in_a_row']} steps in a row, up to step {step}, had a loss or gradient that is not "
                "finite. None of them changed the model. Look at the data of these steps, lower optim.learning_rate, "
                "or raise train.max_bad_steps if they are expected."
            )

    def pause(self) -> None:
        """Evaluations and saves do not count as time of a step: start the clock anew."""
        self.flush()
        self._restart_clock()

    def _restart_clock(self) -> None:
        self._start, self._tokens, self._steps = time.monotonic(), 0.0, 0
        self._waited = self.data.data_wait_seconds

    def _rates(self, values: dict[str, float]) -> dict[str, float]:
        seconds = max(time.monotonic() - self._start, 1e-9)
        devices = jax.device_count()
        tokens_per_second = self._tokens / seconds
        rates = {
            "tokens_per_second": tokens_per_second,
            "tokens_per_second_per_device": tokens_per_second / devices,
            "seconds_per_step": seconds / max(self._steps, 1),
            "data_wait_share": min((self.data.data_wait_seconds - self._waited) / seconds, 1.0),
            "padding_share": self.data.padding_share,
        }
        if (peak := peak_flops()) is not None:
            rates["mfu"] = self.flops.total * tokens_per_second / devices / peak
        return rates | metrics.memory_stats()


def cost_line(model: Model, cfg: Config, flops: Flops) -> str:
    """Parameters, tokens and FLOPs of a step; and how MFU is reckoned, where the device's peak is known."""
    tokens = cfg.train.global_batch_size * cfg.data.sequence_length
    line = (
        f"{count_parameters(model.shapes()):,} parameters; {tokens:,} tokens a step; {flops.total * tokens:.3g} FLOPs "
        f"a step ({flops.attention / flops.total:.0%} of them attention)"
    )
    layout = model.module.layout
    line += f"; {attention_line(cfg, layout)}"
    if layout.stages > 1:
        idle = bubble(layout.stages, layout.stage_repeats, layout.stage_microbatches)
        line += f"; a pipeline of {layout.stages} stages, each idle {idle:.0%} of the time"
    peak = peak_flops()
    return line if peak is None else f"{line}; MFU = {FORMULA}, over a peak of {peak:.4g} a device"


def peak_flops() -> float | None:
    """FLOP/s of one of this process's devices, where its kind is known."""
    return metrics.peak_flops(jax.devices()[0].device_kind, metrics.devices_a_chip(jax.local_devices()))


def sharding_table(params: Any, axes: Any) -> str:
    """One line a parameter, largest share of a device's memory first, and their sum.

    Args:
      params: tree of ShapeDtypeStruct with NamedShardings.
      axes: the same tree, the logical names of each parameter's axes.
    """
    names = jax.tree.leaves(axes, is_leaf=lambda node: isinstance(node, tuple))
    rows = []
    for (path, leaf), logical in zip(jax.tree_util.tree_leaves_with_path(params), names, strict=True):
        over = [" + ".join(used_axes(leaf.sharding, part)) or "-" for part in leaf.sharding.spec]
        split = ", ".join(over) if any(part != "-" for part in over) else "replicated"
        size = sharding.bytes_a_device(leaf)
        rows.append((size, (path_name(path), f"{leaf.dtype}{list(leaf.shape)}", ", ".join(logical), split)))
    rows.sort(key=lambda row: -row[0])
    header = ("parameter", "shape", "logical axes", "mesh axes")
    widths = [max(len(cells[i]) for cells in [header, *(cells for _, cells in rows)]) for i in range(len(header))]
    line = lambda cells: "  ".join(cell.ljust(width) for cell, width in zip(cells, widths, strict=True))  # noqa: E731
    lines = [f"{line(header)}  bytes a device", *(f"{line(cells)}  {size:,}" for size, cells in rows)]
    return "\n".join([*lines, f"{len(rows)} parameters, {sum(size for size, _ in rows):,} bytes a device"])


def used_axes(placed: jax.sharding.NamedSharding, part: Any) -> list[str]:
    """The mesh axes, of those that a dimension's part of the spec names, that have more than one device."""
    part = (part,) if isinstance(part, str) else part or ()
    return [axis for axis in part if placed.mesh.shape[axis] > 1]


FIGURES = (  # of an encoder's tasks
    "accuracy", "pair_accuracy", "generator_accuracy",
    "exact_match", "f1", "f1_macro", "f1_micro", "matthews", "pearson", "spearman",
)  # fmt: skip
YARDSTICKS = {"xz_bits_per_byte": "xz -9", "order0_bits_per_byte": "byte frequencies alone"}


def closing_block(
    workdir: str, history: list[dict[str, float]], yardsticks: dict[str, float], sample: str, task: str = "language"
) -> str:
    """What a run says at its end: the loss curve, the yardsticks, a sample, where it is, what to type next.

    Args:
      workdir: the run's folder.
      history: all records of the run.
      yardsticks: bits per byte of other models on the same held-out bytes, by their name in the store's manifest.
      sample: text from the trained model; "" for none.
      task: data.task.
    """
    command = os.environ.get("LLM_JAX_COMMAND", "llm-jax")  # launch/local.sh says how it was called
    parts = []
    if curve := metrics.plot(history):
        parts.append(curve)
    last = next((record for record in reversed(history) if "eval/loss" in record), None)
    if last is not None:
        line = f"held-out loss {last['eval/loss']:.4f}"
        if task != "language":
            line += "".join(f", {name} {last[f'eval/{name}']:.3f}" for name in FIGURES if f"eval/{name}" in last)
        else:
            line += " nats a token"
        if "eval/bits_per_byte" in last:
            line += f" = {last['eval/bits_per_byte']:.3f} bits per byte"
            known = [f"{words} {yardsticks[name]:.3f}" for name, words in YARDSTICKS.items() if name in yardsticks]
            if known:
                line += f"; on the same bytes {', '.join(known)}"
        parts.append(line)
    if sample:
        parts.append(f"sampled text:\n{sample}")
    use = ""
    if task == "language":
        use = f"  generate  {command} generate --workdir={workdir} --prompt='def '\n"
    elif task in LABELLED_TASKS:
        use = f"  predict   {command} predict --workdir={workdir} --input=FILE.jsonl\n"
    parts.append(
        f"The run is in {workdir}\n"
        f"  resume    {command} train --config={workdir}/config.json --workdir={workdir} --config.train.steps=N\n"
        f"{use}"
        f"  evaluate  {command} evaluate --workdir={workdir}\n"
        f"  export    {command} export --workdir={workdir} --to={workdir}/export"
    )
    return "\n\n".join(parts)
