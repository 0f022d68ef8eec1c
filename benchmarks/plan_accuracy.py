"""Published step times beside what `llm-jax plan` predicts for the same settings.

    python -m benchmarks.plan_accuracy --texts=FOLDER [--write]

Rows of TPUs are another trainer's runs (MaxText's): its own step, compiled for the machine by itself, is timed by the
model that times ours. `benchmarks/plan_peer.py` makes those texts, in an environment of its own with
`pip install "maxtext[tpu]==0.2.5"` (Python 3.12); a row without its text is left out and said so. Rows of GPUs are
published runs of MaxText too, timed on our step for the same setting, for there the plugin compiles in seconds.

The constants of llm_jax/plan/cost.py were fitted on the rows marked "fitted" (v5p, H100) alone. `--write` puts the
table into launch/planning.md.
"""

import argparse
import dataclasses
import re
import statistics
import sys
from pathlib import Path

from llm_jax.config import load
from llm_jax.errors import UserError
from llm_jax.plan import hlo
from llm_jax.plan.compile import compile_setting
from llm_jax.plan.cost import Times, step_times
from llm_jax.plan.estimate import estimate_compiled
from llm_jax.plan.hardware import topology
from llm_jax.plan.network import placed
from llm_jax.plan.setting import make_setting

GUIDE = Path(__file__).parent.parent / "launch" / "planning.md"
RECIPES = "AI-Hypercomputer/tpu-recipes, training"


@dataclasses.dataclass(frozen=True)
class Row:
    """One published run.

    Attributes:
      seconds: of a step, as published, or from published tokens/s or FLOP/s by `how`.
      text: of the peer's compiled step, made by plan_peer.py; "" for our own step.
      config, overrides: of our own step.
      mesh: of the text.
    """

    name: str
    machine: str
    seconds: float
    source: str
    how: str
    fitted: bool = False
    text: str = ""
    mesh: tuple[tuple[str, int], ...] = ()
    config: str = ""
    overrides: tuple[str, ...] = ()


def synthetic(width: int, mlp: int, layers: int, heads: int, tokens: int, length: int, teraflops: float) -> float:
    """Seconds of a step of MaxText's scaled model, whose tables give TFLOP/s a chip by its formula of that time: 6 a
    parameter and token, and attention as if it were not causal. Vocabulary 32,000, gated MLP, heads of 128."""
    inner = heads * 128
    matrices = layers * (4 * width * inner + 3 * width * mlp) + width * 32_000
    return tokens * (6 * matrices + 12 * layers * inner * length) / (teraflops * 1e12)


ROWS = (
    Row("GPT 32B", "v5p:4x4x4", 0.0, "MaxText, configs/tpu/v5p/README.md and 32b.sh", "328 TFLOP/s a chip", True,
        "v5p_32b", (("fsdp", 16), ("tensor", 4))),
    Row("GPT 64B", "v5p:4x4x4", 0.0, "MaxText, configs/tpu/v5p/README.md and 64b.sh", "323 TFLOP/s a chip", True,
        "v5p_64b", (("fsdp", 16), ("tensor", 4))),
    Row("LLaMA-2 7B", "h100:1x8", 0.721, "NVIDIA JAX-Toolbox, docs/frameworks/maxtext/README.md", "as published", True,
        config="llama2/7b", overrides=("mesh.fsdp=8", "train.global_batch_size=16", "model.remat=dots")),
    Row("LLaMA-3 70B", "h100:16x8", 256 * 8192 / 128 / 1052, "NGC, MaxText Llama3 70B 25.02", "1,052 tokens/s a GPU",
        True, config="llama3/70b", overrides=("mesh.fsdp=128", "mesh.across_slices=fsdp=16",
        "train.global_batch_size=256", "train.accumulation=1", "model.remat=names",
        "model.remat_save=layer_input,query,key,value,attention", "data.mask_documents=False")),
    Row("LLaMA-2 7B", "h100:1x8", 0.0, "MaxText, configs/gpu/a3/llama_2_7b/README.md", "492 TFLOP/s a GPU", True,
        config="llama2/7b", overrides=("mesh.fsdp=8", "train.global_batch_size=32", "model.remat=dots")),
    Row("LLaMA-2 7B", "h100:8x8", 0.0, "MaxText, configs/gpu/a3/llama_2_7b/README.md", "409 TFLOP/s a GPU", True,
        config="llama2/7b", overrides=("mesh.data=8", "mesh.fsdp=8", "mesh.across_slices=data=8",
        "train.global_batch_size=256", "model.remat=dots")),
    Row("GPT 16B", "v5e:16x16", 0.0, "MaxText, configs/tpu/v5e/README.md and 16b.sh", "120 TFLOP/s a chip",
        text="v5e_16b", mesh=(("fsdp", 256),)),
    Row("GPT 32B", "v5e:16x16", 0.0, "MaxText, configs/tpu/v5e/README.md and 32b.sh", "132 TFLOP/s a chip",
        text="v5e_32b", mesh=(("fsdp", 256),)),
    Row("LLaMA-3.1 8B", "v6e:16x16", 4.546, f"{RECIPES}/trillium/Llama3.1-8B-MaxText/v6e-256", "as published",
        text="v6e_8b", mesh=(("fsdp", 256),)),
    Row("LLaMA-3.1 70B", "v6e:16x16", 4 * 8192 / 960, "MaxText, docs/reference/models/tiering.md",
        "960 tokens/s a chip", text="v6e_70b", mesh=(("fsdp", 256),)),
    Row("Mixtral 8x7B", "v6e:16x16", 13.484, f"{RECIPES}/trillium/Mixtral-8x7B-MaxText", "as published",
        text="v6e_mixtral", mesh=(("fsdp", 256),)),
    Row("LLaMA-3.1 70B", "tpu7x:4x4x4", 2 * 2 * 8192 / 2687, f"{RECIPES}/ironwood/llama3.1-70b/8k-bf16-tpu7x-4x4x4",
        "2,687 tokens/s a chip", text="tpu7x_70b", mesh=(("fsdp", 128),)),
    Row("LLaMA-3.1 70B", "h200:32x8", 2 * 8192 / 1056, "AI-Hypercomputer/gpu-recipes, a3ultra/llama3-1-70b (MaxText)",
        "1,056 tokens/s a GPU", config="llama3/70b", overrides=("mesh.fsdp=256", "mesh.across_slices=fsdp=32",
        "train.global_batch_size=512", "train.accumulation=1", "model.remat=names",
        "model.remat_save=layer_input,query,key,value,attention", "data.mask_documents=False")),
)  # fmt: skip
# Sizes of MaxText's scaled models, as its own log prints them: width, MLP, layers, heads, tokens a chip.
SCALED = {
    "v5p_32b": (8192, 28_672, 32, 64, 12_288, 328.0),
    "v5p_64b": (8192, 28_672, 64, 64, 6_144, 323.0),
    "v5e_16b": (4096, 28_672, 32, 64, 12_288, 120.0),
    "v5e_32b": (8192, 28_672, 32, 64, 8_192, 132.0),
}


def published(row: Row) -> float:
    if row.source.endswith("llama_2_7b/README.md"):  # batch 4 of 4,096 a GPU; width 4,096, 32 layers of 32 heads
        return synthetic(4096, 11_008, 32, 32, 4 * 4096, 4096, float(row.how.split()[0]))
    if row.text not in SCALED:
        return row.seconds
    width, mlp, layers, heads, tokens, teraflops = SCALED[row.text]
    return synthetic(width, mlp, layers, heads, tokens, 2048, teraflops)


def predict(row: Row, texts: Path) -> Times | None:
    """None where the peer's text is missing, or the compiler of the machine is."""
    machine = topology(row.machine)
    if row.text:
        file = texts / f"{row.text}.hlo"
        if not file.exists():
            return None
        return step_times(hlo.parse(file.read_text(encoding="utf-8")), placed(machine, dict(row.mesh)))
    try:
        setting = make_setting(load(row.config, ("mesh.data=1", *row.overrides)), machine)
        return estimate_compiled(setting, compile_setting(setting, waiting=lambda _: None)).times
    except UserError as error:
        print(error, file=sys.stderr)
        return None


def table(texts: Path) -> tuple[str, str]:
    """The table, and what it says of the rows that were not fitted."""
    head = [
        "run",
        "machine",
        "published, s",
        "predicted, s",
        "error",
        "matrix",
        "kernels",
        "memory",
        "network",
        "source",
    ]
    lines = ["| " + " | ".join(head) + " |", "|" + " --- |" * len(head)]
    errors = []
    for row in ROWS:
        times = predict(row, texts)
        if times is None:
            print(f"{row.name} on {row.machine}: no text {row.text}.hlo or no compiler; left out", file=sys.stderr)
            continue
        error = times.total / published(row) - 1
        errors += [] if row.fitted else [abs(error)]
        parts = [f"{getattr(times, part):.2f}" for part in ("matrix", "kernel", "memory", "waited")]
        name = f"{row.name}{' (fitted)' if row.fitted else ''}"
        cells = [name, row.machine, f"{published(row):.2f}", f"{times.total:.2f}", f"{error:+.0%}", *parts,
                 f"{row.source}; {row.how}"]  # fmt: skip
        lines.append("| " + " | ".join(cells) + " |")
    if not errors:
        return "\n".join(lines), "no row that was not fitted could be predicted"
    said = f"{len(errors)} rows not fitted: median error {statistics.median(errors):.0%}, largest {max(errors):.0%}"
    return "\n".join(lines), said


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--texts", type=Path, default=Path("plan_texts"), help="folder of the peers' compiled texts")
    parser.add_argument("--write", action="store_true", help="put the table into the guide")
    args = parser.parse_args()
    rows, said = table(args.texts)
    print(f"{rows}\n\n{said}")
    if args.write:
        text = GUIDE.read_text(encoding="utf-8")
        place = re.compile(r"(<!-- table: accuracy -->\n).*?(<!-- end -->)", re.DOTALL)
        GUIDE.write_text(place.sub(lambda m: f"{m[1]}{rows}\n\n{said}\n{m[2]}", text), encoding="utf-8")


if __name__ == "__main__":
    main()
