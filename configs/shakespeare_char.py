"""A character-level GPT on one text file: nanoGPT's `shakespeare_char`, to be compared one to one.

Command    llm-jax train --config=shakespeare_char --config.data.path=input.txt
           llm-jax train --config=shakespeare_char:cpu --config.data.path=input.txt
Data       any text file; the published figures are for the 1.1 MB of Shakespeare known as tinyshakespeare
Hardware   one GPU, about a minute; with `cpu` a small model for two CPU cores, about two minutes
Expected   best validation loss 1.4655 (mean of five seeds of the original); with `cpu` about 1.90 after 2,000 steps
"""

from ml_collections import ConfigDict


def get_config(arg: str = "gpu") -> ConfigDict:
    """`arg`: gpu or cpu, the two sizes of the original's README."""
    assert arg in ("gpu", "cpu"), f"shakespeare_char:{arg} is not one of gpu, cpu"
    cpu = arg == "cpu"
    dropout = 0.0 if cpu else 0.2
    length = 64 if cpu else 256
    steps = 2_000 if cpu else 5_000
    return ConfigDict(
        dict(
            name=f"shakespeare_char_{arg}",
            seed=1337,
            model=dict(
                num_layers=4 if cpu else 6,
                num_heads=4 if cpu else 6,
                embed_dim=128 if cpu else 384,
                max_length=length,
                positions="learned",
                norm="layernorm",
                activation="gelu",
                dropout=dict(embedding=dropout, attention=dropout, attention_output=dropout, mlp_output=dropout),
                scan_layers=False,
            ),
            data=dict(
                path="input.txt",
                tokenizer="char",
                eos="none",
                sequence_length=length,
                packing="crops",  # start offsets uniform, with replacement; no epochs
                mask_documents=False,
                validation_fraction=0.1,
                validation_split="tail",
            ),
            train=dict(steps=steps + 1, global_batch_size=12 if cpu else 64),  # iterations 0 to `steps`
            optim=dict(
                learning_rate=1e-3,
                beta2=0.99,  # larger than usual, since a step has few tokens
                warmup_steps=100,
                decay_steps=steps,
                final_ratio=0.1,
            ),
            precision=dict(compute="float32" if cpu else "bfloat16"),
            eval=dict(every=250),
            checkpoint=dict(every=1_000),
            generate=dict(prompt="\n", temperature=0.8, top_k=200, max_tokens=200),
        )
    )
