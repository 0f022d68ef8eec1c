"""GPT-2 with 124M parameters, three published recipes.

Command    llm-jax train --config=gpt2/124m:openwebtext --config.data.path=DATA   (nanoGPT's train_gpt2)
           llm-jax train --config=gpt2/124m:fineweb --config.data.path=DATA       (llm.c, the usual race)
           llm-jax train --config=gpt2/124m:rotary --config.data.path=DATA        (modded-nanogpt's AdamW baseline)
Data       token files with GPT-2's vocabulary and 50256 between documents: nanoGPT's train.bin (give its val.bin as
           --config.data.validation_path), or llm.c's fineweb_train_*.bin with fineweb_val_*.bin
Hardware   8 GPUs of 80 GB: about 4 days, 45 minutes and 30 minutes on 8 H100 for the published runs
Expected   openwebtext 2.85 at step 600,000; fineweb 3.2722 at step 19,560; rotary 3.2760 at step 9,536 (5B tokens)
"""

from ml_collections import ConfigDict

RECIPES = ("fineweb", "openwebtext", "rotary")


def get_config(arg: str = "fineweb") -> ConfigDict:
    """`arg`: which recipe."""
    assert arg in RECIPES, f"gpt2/124m:{arg} is not one of {', '.join(RECIPES)}"
    cfg = ConfigDict(
        dict(
            name=f"gpt2_124m_{arg}",
            model=dict(
                vocab_size=50_257,
                num_layers=12,
                num_heads=12,
                embed_dim=768,
                max_length=1024,
                scan_layers=False,  # a loop would copy all that the backward pass needs into arrays of 12 layers
            ),
            data=dict(
                path="train.bin",
                validation_path="val.bin",
                tokenizer="none",
                eos="none",  # the token files have theirs
                sequence_length=1024,
                mask_documents=False,  # samples cross documents
            ),
            train=dict(global_batch_size=512),
            optim=dict(beta2=0.95, weight_decay=0.1),
            precision=dict(compute="bfloat16"),
            checkpoint=dict(every=1_000),
            generate=dict(max_tokens=0),  # token files bring no tokenizer
        )
    )
    cfg.update({"openwebtext": openwebtext, "fineweb": fineweb, "rotary": rotary}[arg]())
    return cfg


def openwebtext() -> ConfigDict:
    """karpathy/nanoGPT config/train_gpt2.py: no biases, random crops, 491,520 tokens a step, 600,000 steps."""
    return ConfigDict(
        dict(
            model=dict(
                positions="learned",
                norm="layernorm",
                activation="gelu",
                vocab_multiple=128,  # 50,304 rows
                padded_vocab_in_softmax=True,
            ),
            data=dict(packing="crops"),
            train=dict(steps=600_000, global_batch_size=480, accumulation=5),
            optim=dict(learning_rate=6e-4, warmup_steps=2_000, final_ratio=0.1),
            eval=dict(every=1_000, batches=200, batch_size=16, sampling="random"),
        )
    )


def fineweb() -> ConfigDict:
    """karpathy/llm.c scripts/run_gpt2_124M.sh: GPT-2 as published, 524,288 tokens a step, one pass over 10B tokens."""
    return ConfigDict(
        dict(
            model=dict(
                positions="learned",
                norm="layernorm",
                activation="gelu_tanh",
                bias="all",
                vocab_multiple=128,  # 50,304 rows; the softmax is over the true 50,257
            ),
            data=dict(shuffle=False),  # in the order of the files
            train=dict(steps=19_560),
            optim=dict(learning_rate=6e-4, warmup_steps=700, warmup_form="(i+1)/w", final_ratio=0.0),
            eval=dict(every=250, batches=20),  # the first 10,485,760 tokens
        )
    )


def rotary() -> ConfigDict:
    """KellerJordan/modded-nanogpt, 2024-06-06: rotary, no affine parameters, one gradient norm a tensor."""
    return ConfigDict(
        dict(
            model=dict(
                positions="rotary",
                norm="rmsnorm",
                norm_scale="none",
                norm_eps=1e-6,
                activation="gelu",
                attention_output_scale=(2 * 12) ** -0.5,  # in place of a smaller start
                residual_init_scale=False,
                init="torch",
            ),
            data=dict(shuffle=False),
            train=dict(steps=9_536),
            optim=dict(
                learning_rate=1.8e-3,
                schedule="wsd",
                warmup_steps=256,
                warmup_form="(i+1)/w",
                cooldown_ratio=2_048 / 9_536,
                final_ratio=0.0,
                decay_mask="all",
                clip_norm=0.0,
                normalize_gradients=True,
            ),
            eval=dict(every=128, batches=20),
        )
    )
