"""What a run reports: writers (metrics.jsonl, terminal), trackers, hardware (peak FLOP/s, memory), a loss curve."""

from llm_jax.metrics.curve import plot
from llm_jax.metrics.hardware import devices_a_chip, memory_stats, peak_flops
from llm_jax.metrics.writers import Metrics, read_jsonl
