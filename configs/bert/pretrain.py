"""BERT base from scratch: masked tokens and next sentences, 128 tokens a row and then 512.

Command    llm-jax train --config=bert/pretrain --config.data.path=TEXT/ --config.mesh.fsdp=-1
           llm-jax train --config=bert/pretrain:tiny
Data       a sentence a line, a blank line between documents: what BERT's create_pretraining_data.py takes. Masks are
           drawn anew each epoch; data.masking.redraw=False with copies=10 is the published form, where they come back.
           `tiny` needs nothing: the docstrings of Python's standard library and of the packages that this one stands
           on (numpy, scipy, jax and others), 12 MB, a file being a document; some files are held out whole, though the
           same docstring may stand in two
Hardware   a TPU or GPU slice for days; BERT's own took four days on 16 TPU chips. `tiny`: two CPU cores, minutes
Expected   `base`: masked accuracy about 0.70 and pair accuracy about 0.97 (BERT's README: 0.6988 and 0.9685 on its own
           data). `tiny`, in three minutes: masked accuracy 0.18, where the most frequent token alone has 0.06, and pair
           accuracy 0.75, where the more frequent answer has 0.52, over all held-out files, as `python -m
           benchmarks.bert --parts=pretraining` measures it
Source     Devlin et al. 2018, arXiv 1810.04805, appendix A.2; google-research/bert run_pretraining.py

`large_batch` is the recipe of LAMB (You et al. 2019, arXiv 1904.00962) with one batch size for both phases.
"""

from ml_collections import ConfigDict


def get_config(arg: str = "base") -> ConfigDict:
    """`arg`: base (a batch of 256), large_batch (32,768 with LAMB), or tiny (a few minutes on two CPU cores)."""
    assert arg in ("base", "large_batch", "tiny"), f"bert/pretrain:{arg} is not one of base, large_batch, tiny"
    tiny, large = arg == "tiny", arg == "large_batch"
    steps = 600 if tiny else 8_599 if large else 1_000_000
    dropout = 0.0 if tiny else 0.1
    return ConfigDict(
        dict(
            name=f"bert_{arg}",
            seed=12345,
            model=dict(
                family="encoder",
                head="masked_pairs",
                num_layers=2 if tiny else 12,
                embed_dim=128 if tiny else 768,
                num_heads=2 if tiny else 12,
                max_length=128 if tiny else 512,
                activation="gelu",
                dropout=dict(embedding=dropout, attention=dropout, attention_output=dropout, mlp_output=dropout),
                scan_layers=not tiny,
            ),
            data=dict(
                task="masked",
                path="package_docstrings" if tiny else "text/",
                separator="" if tiny else "\n\n",
                eos="lines",  # the end of each line is the end of a sentence
                tokenizer="wordpiece",  # or bert-base-uncased's tokenizer.json
                tokenizer_vocab_size=4_096 if tiny else 30_522,
                sequence_length=128 if tiny else 512,
                masking=dict(
                    rate=0.15,
                    whole_words=False,
                    short_rows=0.1,
                    # Short rows for most of the steps, where attention is cheap: nine tenths, or LAMB's share.
                    phases=("400=64",) if tiny else ("7038=128",) if large else ("900000=128",),
                ),
            ),
            train=dict(
                steps=steps,
                global_batch_size=64 if tiny else 32_768 if large else 256,
                accumulation=4 if tiny else 1,  # 16 rows at a time take less memory
            ),
            optim=dict(
                name="lamb" if large else "adamw",
                learning_rate=2e-3 if tiny else 5e-3 if large else 1e-4,
                schedule="linear",
                warmup_steps=50 if tiny else 2_000 if large else 10_000,
                warmup_form="i/w",
                final_ratio=0.0,
                beta2=0.98 if tiny else 0.999,
                eps=1e-6,
                bias_correction=large,  # BERT's Adam has none
                weight_decay=0.01,
                clip_norm=1.0,
            ),
            precision=dict(compute="float32" if tiny else "bfloat16"),
            eval=dict(every=200 if tiny else 10_000, batches=100),
            checkpoint=dict(every=200 if tiny else 10_000),
        )
    )
