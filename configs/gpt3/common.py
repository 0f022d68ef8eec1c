"""What all GPT-3 sizes share (Brown et al. 2020, arXiv 2005.14165, table 2.1 and appendix B)."""

from ml_collections import ConfigDict

CONTEXT = 2_048


def gpt3(name: str, *, layers: int, width: int, heads: int, batch_tokens: int, learning_rate: float) -> ConfigDict:
    """The config of one size. Attention is dense in every layer; the paper alternates dense with banded ones.

    Args:
      name: of the size, "125m" to "175b".
      layers, width, heads: as published; the head size is width / heads.
      batch_tokens: tokens a step, rounded to whole rows of 2,048.
      learning_rate: the peak.
    """
    return ConfigDict(
        dict(
            name=f"gpt3_{name}",
            model=dict(
                vocab_size=50_257,
                vocab_multiple=128,
                num_layers=layers,
                embed_dim=width,
                num_heads=heads,
                max_length=CONTEXT,
                positions="learned",
                norm="layernorm",
                activation="gelu_tanh",
                bias="all",
                remat="none" if layers * width < 20_000 else "dots_no_batch",
            ),
            data=dict(
                path="train.bin",
                validation_path="val.bin",
                tokenizer="none",
                eos="none",
                sequence_length=CONTEXT,
                mask_documents=False,  # "documents ... delimited with a special end of text token", no masking
            ),
            train=dict(tokens=300_000_000_000, global_batch_size=batch_tokens // CONTEXT),
            optim=dict(
                learning_rate=learning_rate,
                beta2=0.95,
                weight_decay=0.1,
                warmup_steps=375_000_000 // batch_tokens,
                decay_steps=260_000_000_000 // batch_tokens,
                final_ratio=0.1,
            ),
            mesh=dict(data=1, fsdp=-1),
            precision=dict(compute="bfloat16"),
            generate=dict(max_tokens=0),
        )
    )
