"""Pythia, eight sizes from 70M to 12B parameters, in the form of GPT-NeoX: attention and MLP side by side.

Command    llm-jax train --config=pythia:160m --config.data.path='train_*.bin'
Data       token files with GPT-NeoX's vocabulary (50,277 in 50,304 rows or more), held-out ones as
           data.validation_path; 300B tokens of the Pile
Hardware   any machine of configs/machines.py, as pythia:1b4:h100x64; it sets the mesh (launch/meshes.md)
Expected   results of 154 checkpoints a size were published, with the order of the data
Source     Biderman et al. 2023, arXiv 2304.01373, table 1 and section 2; config.json of pythia-70m to pythia-12b
"""

from ml_collections import ConfigDict

from configs.pretraining import on_token_files

COLUMNS = ("num_layers", "embed_dim", "num_heads", "vocab_size")
SIZES = {  # and the learning rate
    "70m": ((6, 512, 8, 50_304), 1e-3),
    "160m": ((12, 768, 12, 50_304), 6e-4),
    "410m": ((24, 1_024, 16, 50_304), 3e-4),
    "1b": ((16, 2_048, 8, 50_304), 3e-4),
    "1b4": ((24, 2_048, 16, 50_304), 2e-4),
    "2b8": ((32, 2_560, 32, 50_304), 1.6e-4),
    "6b9": ((32, 4_096, 32, 50_432), 1.2e-4),
    "12b": ((36, 5_120, 40, 50_688), 1.2e-4),
}


def get_config(arg: str = "160m") -> ConfigDict:
    """`arg`: "SIZE" or "SIZE:MACHINE"."""
    size, _, machine = arg.partition(":")
    assert size in SIZES, f"pythia:{size} is not one of {', '.join(SIZES)}"
    shape, learning_rate = SIZES[size]
    model = dict(zip(COLUMNS, shape, strict=True))
    model |= dict(mlp_dim=4 * model["embed_dim"], max_length=2_048, rope=dict(fraction=0.25))
    model |= dict(norm="layernorm", norm_placement="parallel", activation="gelu", bias="all")
    return on_token_files(
        f"pythia_{size}",
        machine,
        model,
        length=2_048,
        tokens=143_000 * 1_024 * 2_048,
        learning_rate=learning_rate,
        optim=dict(eps=1e-8, weight_decay=0.01, warmup_steps=1_430),
    )
