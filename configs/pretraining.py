"""Pre-training on token files, as the recipes of published models share it: they give a model and their own numbers."""

from ml_collections import ConfigDict

from configs.machines import fit, model_size


def on_token_files(
    name: str,
    machine: str,
    model: dict,
    *,
    length: int,
    rows: int = 1_024,
    tokens: int,
    learning_rate: float,
    mask_documents: bool = False,
    optim: dict | None = None,
) -> ConfigDict:
    """The config of one model on a machine of configs/machines.py.

    Args:
      machine: "" for all devices there are, sharding the parameters.
      model: keys of `model.*`, on those of the LLaMA line.
      length, rows: of a row, and rows a step.
      tokens: of the run.
      mask_documents: documents of a row do not see each other.
      optim: what differs from AdamW as LLaMA 2 had it (arXiv 2307.09288, section 2.2).
    """
    model = dict(positions="rotary", norm="rmsnorm", activation="swiglu", tie_embeddings=False, remat="full") | model
    moe = model.get("moe", {})
    size = model_size(
        layers=model["num_layers"],
        width=model["embed_dim"],
        mlp=moe.get("expert_dim") or model["mlp_dim"],
        heads=model["num_heads"],
        kv_heads=model.get("num_kv_heads", model["num_heads"]),
        vocab=model["vocab_size"],
        length=length,
        experts=moe.get("num_experts", 0),
        top_k=moe.get("top_k", 0),
        split=model.get("latent", {}).get("kv_rank", 0),
    )
    usual = dict(beta1=0.9, beta2=0.95, eps=1e-5, weight_decay=0.1, clip_norm=1.0, warmup_steps=2_000, final_ratio=0.1)
    cfg = ConfigDict(
        dict(
            name=name,
            model=model,
            data=dict(
                path="train.bin",
                validation_path="val.bin",
                tokenizer="none",
                eos="none",  # the token files have theirs
                sequence_length=length,
                mask_documents=mask_documents,
            ),
            train=dict(tokens=tokens, global_batch_size=rows, loss_chunk=512),
            optim=usual | dict(learning_rate=learning_rate) | (optim or {}),
            precision=dict(compute="bfloat16"),
            eval=dict(batches=20),
            generate=dict(max_tokens=0),  # token files bring no tokenizer
        )
    )
    cfg.update(fit(machine, size, rows))
    return cfg
