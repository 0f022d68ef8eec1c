"""Temporary memory of a training gradient, as XLA reckons it when it compiles for a CPU, beside a formula.

    python -m benchmarks.memory [--json=OUT]

Nothing is run: the figures are `memory_analysis().temp_size_in_bytes` of the compiled gradient of a small decoder
(tied embedding, GELU, learned positions, attention that keeps its scores, scanned layers, float32), and hold neither
parameters nor the gradient returned. Length, batch, layers, what the backward pass recomputes (`model.remat`) and the
cross-entropy (from all the logits, or `train.loss_chunk` tokens of a row at a time) are changed in turn.

The formula counts numbers of 4 bytes. B rows, T tokens, L layers, D embed_dim, F mlp_dim, N heads, V vocabulary,
C chunk:

    total = B T L kept + max(loss, layer)

    kept, for each token and layer until its backward pass has come
      full           D                        the block's input
      dots_no_batch  5 D + F                  and query, key, value, attention's projection, the MLP's first product
      dots           6 D + F + N T            and the scores and their product with the values
      none           10 D + 4 F + 2 N T + 2 N + 2
                                              inputs of both norms (2 D) and of all products (the three of query, key
                                              and value each keep theirs; in all 5 D + F), query, key, value (3 D),
                                              three more of GELU (3 F), twice the scores; statistics
                                              of softmax and norms
    loss   plain     B T (2 V + 3 D) + D V    logits and their gradient; x, its gradient, one more; the head's gradient
           chunked   3 B C V + 2 B T D + 2 D V
                                              a piece's logits, their exponentials and their gradient; x, its gradient;
                                              the head's gradient, and the piece's part of it
    layer            B T (none + max(N T, 2 F + 3 D)) + 2 D V
                                              all that one layer keeps without remat, again; the gradients of scores or
                                              of the MLP; the tied table's gradient, from the head and from the look-up

`kept` is what the scan over layers stacks (exact with remat, within 0.1 % without; jax 0.12). `loss` and `layer` say
what must live at once if XLA fuses nothing more; it often does, so the measured figure may be a quarter lower. The last
column says by how much.

Then the gradient of attention alone on rows whose tokens lie on 8 devices (N heads of H, t = T / 8 tokens a device),
for each device:

    reference    3 N t T             the scores of its queries with all keys, their exponentials, a gradient
    all_to_all   3 (N / 8) T T       the same of whole rows, for its share of the heads
    ring         12 N H t + 3 N tile^2
                                     queries, keys, values, the result, their gradients and what travels; a tile's
                                     scores: linear in the length, once t is above two tiles
"""

import argparse
import dataclasses
import functools
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from llm_jax.config import DecoderConfig, MeshConfig
from llm_jax.kernels.attention import AttentionOptions, select
from llm_jax.kernels.masks import causal_mask
from llm_jax.models import registry
from llm_jax.objectives.language import LanguageObjective
from llm_jax.precision import Precision
from llm_jax.sharding import Layout, make_layout
from llm_jax.training import step

MODEL = DecoderConfig(
    vocab_size=8192,
    embed_dim=128,
    num_heads=4,
    mlp_dim=512,
    positions="learned",
    activation="gelu",
    attention_kernel="reference",
)
CHUNK = 64
REMAT = ("none", "dots", "dots_no_batch", "full")


@dataclasses.dataclass(frozen=True)
class Case:
    """One compiled gradient; `chunk` 0 is the plain cross-entropy."""

    length: int = 256
    batch: int = 4
    layers: int = 4
    remat: str = "none"
    chunk: int = 0


SHAPES = (Case(), Case(length=512), Case(length=1024), Case(batch=8), Case(layers=8))


def measured(case: Case) -> int:
    """Bytes of temporary memory, by the compiler's own account."""
    cfg = dataclasses.replace(MODEL, max_length=case.length, num_layers=case.layers, remat=case.remat)
    model = registry.build(cfg, Layout(), Precision())
    objective = LanguageObjective(segments=False, chunk=case.chunk)
    shape = (case.batch, case.length)
    batch = {name: jax.ShapeDtypeStruct(shape, jnp.int32) for name in ("tokens", "targets")}
    batch["loss_weights"] = jax.ShapeDtypeStruct(shape, jnp.float32)
    gradients = functools.partial(step.gradients, model, objective, layout=Layout(), seed=0, step=0)
    return jax.jit(gradients).lower(model.shapes(), batch).compile().memory_analysis().temp_size_in_bytes


def formula(case: Case) -> int:
    """Bytes, as the docstring above counts them."""
    d, f, n, v = MODEL.embed_dim, MODEL.mlp_dim, MODEL.num_heads, MODEL.vocab_size
    tokens, scores = case.batch * case.length, n * case.length
    kept = {
        "none": 10 * d + 4 * f + 2 * scores + 2 * n + 2,
        "dots": 6 * d + f + scores,
        "dots_no_batch": 5 * d + f,
        "full": d,
    }
    loss = tokens * (2 * v + 3 * d) + d * v
    if case.chunk:
        loss = 3 * case.batch * case.chunk * v + 2 * tokens * d + 2 * d * v
    layer = tokens * (kept["none"] + max(scores, 2 * f + 3 * d)) + 2 * d * v
    return 4 * (tokens * case.layers * kept[case.remat] + max(loss, layer))


HEADS, HEAD_DIM, PARTS, TILE = 8, 32, 8, 512
ATTENTIONS = {
    "reference": lambda length: 3 * HEADS * (length // PARTS) * length,
    "all_to_all": lambda length: 3 * (HEADS // PARTS) * length * length,
    "ring": lambda length: 12 * HEADS * HEAD_DIM * (length // PARTS) + 3 * HEADS * min(TILE, length // PARTS // 2) ** 2,
}


def measured_attention(name: str, length: int) -> int:
    """Bytes of temporary memory on each of 8 devices that share a row's tokens."""
    layout = make_layout(MeshConfig(data=1, sequence=PARTS))
    shape = dict(heads=HEADS, kv_heads=HEADS, head_dim=HEAD_DIM, length=length, length_parts=PARTS)
    kernel = select(name, AttentionOptions(**shape), "cpu")
    sharding = layout.activation_sharding("batch", "length", "heads", "head_dim")
    x = jax.ShapeDtypeStruct((1, length, HEADS, HEAD_DIM), jnp.float32, sharding=sharding)

    def loss(query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
        return jnp.square(kernel.attend(query, key, value, causal_mask(length), layout=layout)).sum()

    compiled = jax.jit(jax.grad(loss, (0, 1, 2))).lower(x, x, x).compile()
    return compiled.memory_analysis().temp_size_in_bytes


def attention_table() -> list[dict[str, Any]]:
    print("\n{:>6} {:>11} {:>11} {:>10} {:>5}".format("length", "attention", "measured MB", "formula MB", "ratio"))
    records = []
    for name, count in ATTENTIONS.items():
        for length in (1024, 2048, 4096, 8192, 16384, 32768):
            found, expected = measured_attention(name, length), 4 * count(length)
            records.append({"attention": name, "length": length, "measured": found, "formula": expected})
            row = f"{length:>6} {name:>11} {found / 1e6:>11.1f} {expected / 1e6:>10.1f} {found / expected:>5.2f}"
            print(row, flush=True)
    return records


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="where the figures go")
    args = parser.parse_args()
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", PARTS)

    titles = ("length", "batch", "layers", "remat", "loss", "measured MB", "formula MB", "ratio")
    print("{:>6} {:>5} {:>6} {:>13} {:>7} {:>11} {:>10} {:>5}".format(*titles))
    records = []
    for shape in SHAPES:
        for remat in REMAT:
            for chunk in (0, CHUNK):
                case = dataclasses.replace(shape, remat=remat, chunk=chunk)
                found, expected = measured(case), formula(case)
                records.append(dataclasses.asdict(case) | {"measured": found, "formula": expected})
                loss = "chunked" if chunk else "plain"
                row = f"{case.length:>6} {case.batch:>5} {case.layers:>6} {remat:>13} {loss:>7} "
                row += f"{found / 1e6:>11.1f} {expected / 1e6:>10.1f} {found / expected:>5.2f}"
                print(row, flush=True)
    records += attention_table()
    if args.json:
        args.json.write_text(json.dumps({"jax": jax.__version__, "cases": records}, indent=2) + "\n")


if __name__ == "__main__":
    main()
