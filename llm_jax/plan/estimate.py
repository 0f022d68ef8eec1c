"""The numbers of a plan, however they were found: memory, time, network, rates, cost."""

import dataclasses
from typing import Any

from llm_jax.config.pipeline import bubble
from llm_jax.plan.compile import Compiled
from llm_jax.plan.cost import Times, step_times
from llm_jax.plan.hlo import Program
from llm_jax.plan.memory import Memory, compiled_memory, largest_tensors
from llm_jax.plan.network import placed
from llm_jax.plan.setting import Setting


@dataclasses.dataclass(frozen=True)
class Estimate:
    """Attributes:
    setting: what was planned.
    memory: of a device.
    times: of a step.
    how: in words, where the numbers come from.
    largest: (bytes, shape, where) of the largest tensors.
    """

    setting: Setting
    memory: Memory
    times: Times
    how: str
    largest: list[tuple[int, str, str]]

    @property
    def fits(self) -> bool:
        return self.memory.total <= self.setting.machine.hardware.memory

    @property
    def bubble(self) -> float:
        """The share of the step's work that pipeline stages spend on nothing of their own."""
        layout = self.setting.layout
        return bubble(layout.stages, layout.stage_repeats, layout.stage_microbatches) if layout.stages > 1 else 0.0

    @property
    def tokens_per_second(self) -> float:
        return self.setting.tokens / self.times.total

    @property
    def mfu(self) -> float:
        """Model FLOPs, attention counted causally and nothing that is computed twice, over the peak."""
        needed = self.setting.flops.total * self.tokens_per_second
        return needed / (self.setting.machine.hardware.flops * self.setting.machine.devices)

    def days(self, tokens: float) -> float:
        return tokens / self.tokens_per_second / 86_400

    def cost(self, tokens: float, price: float) -> float:
        """At a price a chip-hour."""
        return self.days(tokens) * 24 * self.setting.machine.chips * price


def estimate_compiled(setting: Setting, compiled: Compiled) -> Estimate:
    """From what the compiler made. Not for a step that was refused for want of memory."""
    program: Program = compiled.program
    times = step_times(program, placed(setting.machine, setting.mesh, compiled.result["places"]))
    return Estimate(setting, compiled_memory(setting, compiled), times, how_compiled(compiled.result),
                    largest_tensors(program))  # fmt: skip


def how_compiled(result: dict[str, Any]) -> str:
    seconds = result["compile_seconds"]
    return f"compiled by {result['compiler']} (jax {result['jax']}) in {seconds:.0f} s"
