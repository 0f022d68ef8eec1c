"""ELECTRA small from scratch: a generator fills hidden tokens, and the encoder tells which are not the text's own.

Command    llm-jax train --config=bert/pretrain_electra --config.data.path=TEXT/ --config.mesh.fsdp=-1
           llm-jax train --config=bert/pretrain_electra:tiny
Data       a sentence a line, a blank line between documents. `tiny` needs nothing: the docstrings of Python's standard
           library and of the packages that this one stands on. 15 % of the chosen tokens are not hidden, as in the code
           of the source; its paper hides all
Hardware   `small`: one GPU for days; ELECTRA's took four on a V100. `tiny`: two CPU cores, minutes
Expected   `small`: GLUE 79.9, after fine-tuning, where BERT of the same size has 75.1 (table 1). `tiny`, in three
           minutes, shows the beginning: the encoder's loss is 0.40, where the share of exchanged tokens (0.15) alone
           gives 0.42, and the generator fills 0.15 of the hidden places rightly
Source     Clark et al. 2020, arXiv 2003.10555, section 3 and appendix A; google-research/electra

The generator lies beside the encoder in the checkpoint and goes no further: fine-tuning begins from the encoder, and
`llm-jax convert` writes ElectraForPreTraining. Without one (model.generator_divisor=0) hidden tokens are exchanged for
any of the vocabulary, which is told apart too easily.
"""

from ml_collections import ConfigDict


def get_config(arg: str = "small") -> ConfigDict:
    """`arg`: small, or tiny (a few minutes on two CPU cores)."""
    assert arg in ("small", "tiny"), f"bert/pretrain_electra:{arg} is not one of small, tiny"
    tiny = arg == "tiny"
    dropout = 0.0 if tiny else 0.1
    return ConfigDict(
        dict(
            name=f"electra_{arg}",
            seed=12345,
            model=dict(
                family="encoder",
                head="replaced",
                num_layers=2 if tiny else 12,
                embed_dim=128 if tiny else 256,
                embedding_dim=64 if tiny else 128,
                num_heads=4,
                mlp_dim=512 if tiny else 1_024,
                max_length=64 if tiny else 512,
                activation="gelu",
                generator_divisor=4,
                dropout=dict(embedding=dropout, attention=dropout, attention_output=dropout, mlp_output=dropout),
                scan_layers=not tiny,
            ),
            data=dict(
                task="replaced",
                path="package_docstrings" if tiny else "text/",
                separator="" if tiny else "\n\n",
                eos="lines",  # the end of each line is the end of a sentence
                tokenizer="wordpiece",  # or bert-base-uncased's tokenizer.json
                tokenizer_vocab_size=4_096 if tiny else 30_522,
                sequence_length=64 if tiny else 128,
                masking=dict(rate=0.15, next_sentence=False),
            ),
            train=dict(steps=600 if tiny else 1_000_000, global_batch_size=64 if tiny else 128),
            optim=dict(
                name="adamw",
                learning_rate=1e-3 if tiny else 5e-4,
                schedule="linear",
                warmup_steps=50 if tiny else 10_000,
                warmup_form="i/w",
                final_ratio=0.0,
                beta2=0.98 if tiny else 0.999,
                eps=1e-6,
                bias_correction=False,
                weight_decay=0.01,
                clip_norm=1.0,
            ),
            precision=dict(compute="float32" if tiny else "bfloat16"),
            eval=dict(every=200 if tiny else 10_000, batches=100),
            checkpoint=dict(every=200 if tiny else 10_000),
        )
    )
