"""Which pipelines there can be, and what share of their time the stages wait: arithmetic of three numbers."""

from llm_jax.config.values import refuse


def check_pipeline(
    layers: int,
    stages: int,
    repeats: int,
    microbatches: int,
    rows: int,
    batch_shards: int,
    *,
    others: int = 0,
    period: int = 1,
) -> None:
    """Refuse a pipeline that cannot run as asked.

    Args:
      layers: of the pipeline.
      stages, repeats: `mesh.stage`, `mesh.stage_repeats`.
      microbatches: `mesh.stage_microbatches`, with 0 already replaced by `stages`.
      rows: rows that one call of the model gets: the global batch over `train.accumulation`.
      batch_shards: into how many pieces the mesh splits those rows.
      others: layers before or behind the pipeline, which every stage computes.
      period: of the layers' kinds: what is advised has a multiple of it in each stage.

    Raises:
      ConfigError: key, value, reason, fix.
    """
    if stages == 1:
        if repeats > 1:
            raise refuse("mesh.stage_repeats", repeats, "mesh.stage is 1, so there is no pipeline", "leave it 1")
        if microbatches > 1:
            reason = "mesh.stage is 1, so there is no pipeline"
            raise refuse("mesh.stage_microbatches", microbatches, reason, "leave it 0; train.accumulation splits steps")
        return
    if layers % (stages * repeats):
        beside = f", less the {others} that every stage computes," if others else ""
        reason = f"model.num_layers = {layers + others}{beside} does not split into stages of equal depth"
        if repeats > 1:
            reason += f", {repeats} times round (mesh.stage_repeats)"
        fits = [size for size in range(2, layers // repeats + 1) if layers % (size * repeats * period) == 0]
        fix = f"give one of {', '.join(map(str, fits))}" if fits else "set mesh.stage_repeats=1, or mesh.stage=1"
        raise refuse("mesh.stage", stages, reason, fix)
    if repeats > 1 and microbatches < stages:
        reason = f"the last of mesh.stage = {stages} has not finished the first piece when it is due again"
        fix = f"give at least {stages}, or mesh.stage_repeats=1"
        raise refuse("mesh.stage_microbatches", microbatches, reason, fix)
    if rows % (microbatches * batch_shards):
        pieces = f", on each of the {batch_shards} parts of the batch" if batch_shards > 1 else ""
        reason = f"the model's {rows} rows (train.global_batch_size over train.accumulation) do not split evenly"
        local = rows // batch_shards
        fits = [size for size in range(stages if repeats > 1 else 1, local + 1) if local % size == 0]
        more = f"make the rows a multiple of {microbatches * batch_shards}"
        fix = f"give one of {', '.join(map(str, fits))}, or {more}" if fits and rows % batch_shards == 0 else more
        raise refuse("mesh.stage_microbatches", microbatches, reason + pieces, fix)


def bubble(stages: int, repeats: int, microbatches: int) -> float:
    """The share of their time that stages wait: (S - 1) / (R M + S - 1) (arXiv 1811.06965; 2104.04473, section 2.2)."""
    return (stages - 1) / (repeats * microbatches + stages - 1)
