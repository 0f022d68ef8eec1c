"""GPT-2 with 355M, 774M and 1,558M parameters, as llm.c trains them on FineWeb.

Command    llm-jax train --config=gpt2/larger:355m --config.data.path='fineweb_train_*.bin'
           llm-jax train --config=gpt2/larger:1558m --config.data.path='fineweb_train_*.bin'
Data       token files with GPT-2's vocabulary and 50256 between documents, fineweb_val_*.bin as data.validation_path
Hardware   8 GPUs of 80 GB: 14 hours on A100 for 355m, 5.6 days for 774m; 24 hours on H100 for 1558m
Expected   355m 2.9282 at step 60,000; the others were published as curves
Source     karpathy/llm.c, scripts and discussion 677; Radford et al. 2019, table 2. Learning rates of 355m and 774m
           are GPT-3's for those sizes (arXiv 2005.14165, table 2.1)
"""

from ml_collections import ConfigDict

COLUMNS = ("num_layers", "num_heads", "embed_dim")
SIZES = {  # layers, heads, width; rows a step, steps, learning rate
    "355m": ((24, 16, 1_024), 512, 60_000, 3e-4),
    "774m": ((36, 20, 1_280), 512, 286_102, 2.5e-4),
    "1558m": ((48, 25, 1_600), 1_024, 32_000, 6e-4),
}


def get_config(arg: str = "355m") -> ConfigDict:
    """`arg`: which size."""
    assert arg in SIZES, f"gpt2/larger:{arg} is not one of {', '.join(SIZES)}"
    shape, rows, steps, learning_rate = SIZES[arg]
    return ConfigDict(
        dict(
            name=f"gpt2_{arg}",
            model=dict(zip(COLUMNS, shape, strict=True))
            | dict(
                vocab_size=50_257,
                vocab_multiple=128,  # 50,304 rows; the softmax is over the true 50,257
                max_length=1024,
                positions="learned",
                norm="layernorm",
                activation="gelu_tanh",
                bias="all",
                remat="full",
            ),
            data=dict(
                path="train.bin",
                validation_path="val.bin",
                tokenizer="none",
                eos="none",  # the token files have theirs
                sequence_length=1024,
                mask_documents=False,  # samples cross documents
                shuffle=False,  # in the order of the files
            ),
            train=dict(steps=steps, global_batch_size=rows),
            optim=dict(
                learning_rate=learning_rate,
                beta2=0.95,
                weight_decay=0.1,
                warmup_steps=700,
                warmup_form="(i+1)/w",
                final_ratio=0.0,
            ),
            precision=dict(compute="bfloat16"),
            eval=dict(every=250, batches=20),
            checkpoint=dict(every=1_000),
            generate=dict(max_tokens=0),  # token files bring no tokenizer
        )
    )
