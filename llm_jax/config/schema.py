"""Every key of a run: its type, default, range and meaning, in one place.

The classes are plain frozen dataclasses. `resolve.py` turns a ConfigDict (a config file plus command-line
overrides) into them once; below the command line nothing else is passed around. A layer or a loader takes
only its own small part, never the whole run's `Config`.
"""

import dataclasses
import math
from typing import Any


def one_of(*choices: str) -> Any:
    """A string field restricted to `choices`; the first is the default."""
    return dataclasses.field(default=choices[0], metadata={"choices": choices})


def bounded(default: float, low: float = -math.inf, high: float = math.inf, *, open_low: bool = False) -> Any:
    """A number field in [low, high], or in (low, high] with `open_low`."""
    return dataclasses.field(default=default, metadata={"low": low, "high": high, "open_low": open_low})


def at_least(low: float, default: float) -> Any:
    return bounded(default, low)


def positive(default: float) -> Any:
    return bounded(default, 0.0, open_low=True)


def fraction(default: float) -> Any:
    return bounded(default, 0.0, 1.0)


def nested(cls: type, **changes: Any) -> Any:
    return dataclasses.field(default_factory=lambda: cls(**changes))


# ---------------------------------------------------------------------------------------------------- model


@dataclasses.dataclass(frozen=True)
class RopeConfig:
    """Rotary positions (Su et al. 2021, arXiv 2104.09864) and the ways to stretch them to longer contexts."""

    base: float = positive(10_000.0)  # wavelengths run from 2*pi to 2*pi*base
    fraction: float = bounded(1.0, 0.0, 1.0, open_low=True)  # share of each head that rotates
    scaling: str = one_of("none", "linear", "llama3", "yarn")
    factor: float = at_least(1.0, 1.0)  # how many times longer than original_length
    original_length: int = at_least(1, 8192)  # the context the unscaled model was trained on (llama3, yarn)
    low_freq_factor: float = positive(1.0)  # llama3: wavelengths above original_length / this are fully scaled
    high_freq_factor: float = positive(4.0)  # llama3: wavelengths below original_length / this are left alone
    beta_fast: float = positive(32.0)  # yarn: rotations in original_length above which nothing is scaled
    beta_slow: float = positive(1.0)  # yarn: rotations below which all is scaled
    truncate: bool = True  # yarn: the ends of its ramp are whole pairs (GPT-OSS: not)
    attention_factor: float = at_least(0.0, 0.0)  # yarn: scales sine and cosine; 0: 0.1 ln(factor) + 1


@dataclasses.dataclass(frozen=True)
class DropoutConfig:
    """The four usual places (Vaswani et al. 2017, section 5.4; GPT-2)."""

    embedding: float = bounded(0.0, 0.0, 0.999)  # after token plus position
    attention: float = bounded(0.0, 0.0, 0.999)  # attention probabilities
    attention_output: float = bounded(0.0, 0.0, 0.999)  # before the attention residual
    mlp_output: float = bounded(0.0, 0.0, 0.999)  # before the MLP residual


@dataclasses.dataclass(frozen=True)
class LatentConfig:
    """Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434, section 2.1).

    `model.head_dim` is then the part of a head that has no positions.
    """

    kv_rank: int = at_least(0, 0)  # keys and values of all heads come from so many numbers a token; 0: off
    query_rank: int = at_least(0, 0)  # queries likewise; 0: from the residual stream
    rope_dim: int = at_least(2, 64)  # numbers of each query, and of one key for all heads, that rotate
    value_dim: int = at_least(0, 0)  # of a head's value; 0: head_dim


@dataclasses.dataclass(frozen=True)
class LoraConfig:
    """Low-rank adapters on the blocks' linear layers (Hu et al. 2021, arXiv 2106.09685): they alone train.

    y = x W + s (x A) B with A (in, rank), from U(+-1/sqrt(in)), and B (rank, out), from 0: both in at least float32.
    """

    rank: int = at_least(0, 0)  # 0: no adapters
    alpha: float = positive(16.0)  # s = alpha / rank
    rank_stabilized: bool = False  # s = alpha / sqrt(rank) (arXiv 2312.03732)
    targets: tuple[str, ...] = (".*",)  # patterns of linear layers' names, as "query", "value", "up|gate|down"

    @property
    def scale(self) -> float:
        return self.alpha / (math.sqrt(self.rank) if self.rank_stabilized else self.rank)


@dataclasses.dataclass(frozen=True)
class MoEConfig:
    """A mixture of experts in place of each block's MLP (Shazeer et al. 2017, arXiv 1701.06538; Mixtral)."""

    num_experts: int = at_least(0, 0)  # 0: one dense MLP
    top_k: int = at_least(1, 2)  # experts that each token goes to
    expert_dim: int = at_least(0, 0)  # width of an expert's MLP; 0: mlp_dim
    shared_dim: int = at_least(0, 0)  # width of an MLP that every token takes besides (arXiv 2401.06066); 0: none
    dense_layers: int = at_least(0, 0)  # the first layers, which have one MLP of mlp_dim instead
    scores: str = one_of("softmax", "sigmoid")  # of the router's logits (sigmoid: DeepSeek-V3, arXiv 2412.19437)
    groups: int = at_least(1, 1)  # of experts; a token's experts lie in top_groups of them
    top_groups: int = at_least(1, 1)
    renormalize: bool = True  # the chosen experts' scores are scaled to add up to 1 (Mixtral)
    scale: float = positive(1.0)  # factor on the experts' sum
    router_bias: bool = False  # a learned bias in the router's logits (GPT-OSS)
    balance_bias: bool = False  # a bias on the scores that choose, moved to even the load (arXiv 2408.15664)
    balance_rate: float = at_least(0.0, 0.001)  # how far balance_bias moves in an update
    capacity_factor: float = at_least(0.0, 0.0)  # room for a row's tokens, relative to an even load; 0: nothing dropped
    balance_loss: float = at_least(0.0, 0.01)  # coefficient of the load-balance term (arXiv 2101.03961), row by row
    router_z_loss: float = at_least(0.0, 0.0)  # coefficient on the router's log(Z)^2 (ST-MoE, arXiv 2202.08906)


@dataclasses.dataclass(frozen=True)
class TransformerConfig:
    """What every stack of transformer blocks has, and the embedding below it."""

    family: str = one_of("")  # each family names itself
    vocab_size: int = at_least(0, 0)  # 0: the tokenizer's
    vocab_multiple: int = at_least(1, 1)  # embedding rows are padded up to a multiple of this
    padded_vocab_in_softmax: bool = False  # nanoGPT's habit; otherwise padded ids get probability zero
    num_layers: int = at_least(1, 4)
    embed_dim: int = at_least(1, 128)
    num_heads: int = at_least(1, 4)
    num_kv_heads: int = at_least(0, 0)  # 0: num_heads; 1: multi-query; between: grouped-query
    head_dim: int = at_least(0, 0)  # 0: embed_dim / num_heads
    mlp_dim: int = at_least(0, 0)  # 0: 4 * embed_dim
    max_length: int = at_least(1, 1024)  # longest context; rows of a learned position table
    positions: str = one_of("rotary", "learned", "sinusoidal", "relative", "none")
    rope: RopeConfig = nested(RopeConfig)
    window_rope_base: float = at_least(0.0, 0.0)  # windowed layers rotate by this base, unscaled (Gemma 3); 0: as all
    relative_buckets: int = at_least(2, 32)  # relative-bias positions (T5, arXiv 1910.10683)
    relative_max_distance: int = at_least(2, 128)
    norm: str = one_of("rmsnorm", "layernorm")
    norm_eps: float = positive(1e-5)
    norm_scale: str = one_of("one", "zero", "none")  # times w, which starts at 1; 1 + w, w from 0 (Gemma); nothing
    norm_placement: str = one_of("pre", "post", "sandwich", "output", "parallel")  # equations: models/transformer.py
    activation: str = one_of("swiglu", "geglu", "geglu_erf", "gelu", "gelu_tanh", "relu", "clamped_swiglu")
    bias: str = one_of("none", "all", "qkv", "attention")  # linear layers with one; "all": LayerNorms too
    tie_embeddings: bool = True  # the output head is the embedding, transposed
    embedding_scale: bool = False  # multiply embeddings by sqrt(embed_dim) (Vaswani et al. 2017, section 3.4)
    qk_norm: str = one_of("none", "head", "all")  # RMSNorm of each query and key head, or of all heads together
    attention_scale: float = at_least(0.0, 0.0)  # factor on the scores; 0: 1 / sqrt(head_dim)
    attention_softcap: float = at_least(0.0, 0.0)  # c*tanh(x/c) on attention scores; 0: off
    logits_softcap: float = at_least(0.0, 0.0)  # the same on the logits
    sliding_window: int = at_least(0, 0)  # each token sees itself and this many minus one before it; 0: all
    layer_pattern: tuple[str, ...] = ()  # of LAYER_KINDS, repeated over the layers; (): all alike
    attention_sinks: bool = False  # a learned score a head that takes part in the softmax and holds no value (GPT-OSS)
    attention_output_scale: float = positive(1.0)  # factor on each attention block's output
    latent: LatentConfig = nested(LatentConfig)
    moe: MoEConfig = nested(MoEConfig)
    lora: LoraConfig = nested(LoraConfig)
    dropout: DropoutConfig = nested(DropoutConfig)
    init: str = one_of("normal", "torch")  # torch: linear layers U(+-1/sqrt(fan_in)), as torch.nn.Linear
    init_std: float = positive(0.02)
    residual_init_scale: bool = True  # projections into the residual stream start 1/sqrt(2*num_layers) smaller
    scan_layers: bool = True  # one compiled layer, looped; False: every layer compiled (faster on small models)
    remat: str = one_of("none", "full", "dots", "dots_no_batch", "names")  # what the backward pass recomputes
    remat_save: tuple[str, ...] = ()  # names: tensors of a block that are kept; "NAME=host": in pinned host memory
    attention_kernel: str = one_of("auto", "reference", "xla", "cudnn", "splash", "ring", "all_to_all")


@dataclasses.dataclass(frozen=True)
class DecoderConfig(TransformerConfig):
    """A decoder-only transformer, from GPT-2/3 to the LLaMA line, DeepSeek and GPT-OSS."""

    family: str = one_of("decoder")


@dataclasses.dataclass(frozen=True)
class EncoderConfig(TransformerConfig):
    """A bidirectional encoder with one head: BERT (arXiv 1810.04805), RoBERTa, ELECTRA, DeBERTa, ModernBERT and so on.

    Its window is half on each side of a token, its relative positions have buckets for both directions.
    """

    family: str = one_of("encoder")
    norm: str = one_of("layernorm", "rmsnorm")
    norm_eps: float = positive(1e-12)
    norm_placement: str = one_of("post", "pre", "sandwich", "output", "parallel")
    activation: str = one_of("gelu", "gelu_tanh", "relu", "swiglu", "geglu", "geglu_erf", "clamped_swiglu")
    bias: str = one_of("all", "none", "qkv", "attention")
    positions: str = one_of("learned", "rotary", "sinusoidal", "relative", "disentangled", "none")  # DeBERTa's
    max_length: int = at_least(1, 512)
    residual_init_scale: bool = False
    first_position: int = at_least(0, 0)  # learned positions: what a text's first token has (RoBERTa: 2)
    token_types: int = at_least(0, 2)  # learned vectors that tell the texts of a pair apart; 0: none
    embedding_dim: int = at_least(0, 0)  # of tokens, positions and types, which are projected (ELECTRA); 0: embed_dim
    embedding_norm: bool = True  # of their sum; with norm_placement=pre it is the first attention's (ModernBERT)
    head: str = one_of("masked", "masked_pairs", "text", "token", "embedding", "pooled", "replaced")
    head_form: str = one_of("bert", "roberta", "distilbert", "electra", "deberta", "modernbert")  # of text and token
    head_pooling: str = one_of("first", "mean")  # what text reads: a text's first token, or the mean of all
    head_dropout: float = bounded(0.1, 0.0, 0.999)  # before the classifier of text and token
    num_labels: int = at_least(1, 2)  # of text and token
    generator_divisor: int = at_least(0, 0)  # replaced: a generator so many times narrower trains beside it; 0: none


LAYER_KINDS = ("full", "window", "full_without_positions")  # of model.layer_pattern
MODEL_FAMILIES = {"decoder": DecoderConfig, "encoder": EncoderConfig}
ModelConfig = DecoderConfig | EncoderConfig


# ----------------------------------------------------------------------------------------------------- data

TOKEN_FORMATS = ("nanogpt", "llmc", "megatron")  # their files hold token ids, not text
BUILT_IN = ("stdlib", "docstrings", "package_docstrings", "synthetic")  # texts that every machine has
DATA_FORMATS = ("auto", "text", "jsonl", "parquet", "arrayrecord", *TOKEN_FORMATS, "hf", *BUILT_IN, "csv", "tsv")
TABLE_FORMATS = ("auto", "jsonl", "csv", "tsv", "parquet", "docstrings")  # of labelled records


@dataclasses.dataclass(frozen=True)
class SourceConfig:
    """One corpus of a mixture."""

    path: str = ""  # file, folder or glob; "hf:owner/name" for a hub dataset
    format: str = one_of(*DATA_FORMATS)  # auto: by the file's ending and first bytes
    validation_path: str = ""  # held-out files; "": split off path by data.validation_fraction
    text_key: str = "text"  # field of a record that holds the text (jsonl, parquet, arrayrecord, hf)
    separator: str = ""  # splits one text file into documents; "": a file is a document
    weight: float = positive(1.0)  # share of tokens, relative to the others


TASKS = (
    "language", "masked", "replaced", "classification", "multilabel", "regression", "tokens", "questions", "choice",
    "similarity",
)  # fmt: skip
MASKED_TASKS = TASKS[1:3]  # their data are texts with hidden or exchanged tokens
LABELLED_TASKS = TASKS[3:]  # their data are records with labels, not running text


@dataclasses.dataclass(frozen=True)
class MaskingConfig:
    """How text becomes rows of masked language modelling (Devlin et al. 2018, arXiv 1810.04805, appendix A.1)."""

    rate: float = bounded(0.15, 0.0, 1.0, open_low=True)  # share of a row's tokens that are predicted
    max_predictions: int = at_least(0, 0)  # of a row, at most; 0: rate * sequence_length, rounded up
    whole_words: bool = False  # all pieces of a word (those that begin with ##) are masked together
    redraw: bool = True  # masks are drawn anew each epoch; False: they come back, as in BERT's own files
    next_sentence: bool = True  # rows are pairs, half of them with a second text of another document
    short_rows: float = fraction(0.1)  # share of rows that aim at a shorter, random length
    copies: int = at_least(1, 1)  # times the text is cut into rows anew; after as many epochs the first cut returns
    phases: tuple[str, ...] = ()  # "STEPS=LENGTH" at the run's start, before data.sequence_length: "900000=128"


@dataclasses.dataclass(frozen=True)
class ColumnsConfig:
    """Which columns of labelled records hold what."""

    text: str = "text"  # the text; tokens: a list of words; questions: the question
    pair: str = ""  # the second text, if there is one; questions: the context; similarity: what is like the text
    label: str = "label"  # the label; multilabel: a list; tokens: a list, one a word; questions: the answers
    choices: tuple[str, ...] = ()  # choice: the columns of the endings, which label counts from 0
    negative: str = ""  # similarity: a text that is unlike, if there is one
    names: tuple[str, ...] = ()  # all labels in the order of their ids; none: those of the training records, sorted


@dataclasses.dataclass(frozen=True)
class DataConfig:
    path: str = "stdlib"  # file, folder, glob, "hf:owner/name", or one of BUILT_IN
    format: str = one_of(*DATA_FORMATS)
    validation_path: str = ""
    text_key: str = "text"
    separator: str = ""
    mixture: dict[str, SourceConfig] = dataclasses.field(default_factory=dict)  # replaces path when not empty
    mixture_temperature: float = positive(1.0)  # weights to the power 1/temperature: above 1 is more even
    tokenizer: str = "byte"  # byte, char, bpe or wordpiece (trained here), none, or a tokenizer.json / .model
    tokenizer_vocab_size: int = at_least(257, 4096)  # for bpe and wordpiece
    eos: str = one_of("append", "prepend", "none", "lines")  # where the end-of-document token goes; lines: behind each
    sequence_length: int = at_least(1, 256)
    packing: str = one_of("concat", "first_fit", "best_fit", "crops")
    long_documents: str = one_of("split", "drop", "error")  # longer than sequence_length under first_fit, best_fit
    mask_documents: bool = True  # no attention or loss across document borders; positions restart
    task: str = one_of(*TASKS)  # what the model learns from the records
    masking: MaskingConfig = nested(MaskingConfig)
    columns: ColumnsConfig = nested(ColumnsConfig)
    buckets: tuple[str, ...] = ()  # lengths that batches of labelled texts are padded to; none: sequence_length alone
    pack_texts: bool = False  # several short labelled texts share a row, each its own segment
    stride: int = at_least(1, 128)  # questions: tokens that two windows on a long context share
    answer_length: int = at_least(1, 30)  # questions: tokens of the longest answer
    shuffle: bool = True
    validation_fraction: float = bounded(0.05, 0.0, 0.5)
    validation_split: str = one_of("auto", "documents", "tail")  # auto: tail for a single document
    max_bad_records: int = at_least(0, 0)  # records that may be skipped before the run is refused
    cache_dir: str = ""  # prepared token stores; "": $LLM_JAX_CACHE or ~/.cache/llm_jax
    prefetch: int = at_least(1, 8)  # batches read ahead
    workers: int = at_least(0, 0)  # processes that read; 0: threads (enough for prepared stores)

    def sources(self) -> dict[str, SourceConfig]:
        """The corpora by name, one or many."""
        if self.mixture:
            return dict(self.mixture)
        single = SourceConfig(self.path, self.format, self.validation_path, self.text_key, self.separator)
        return {"data": single}


# ------------------------------------------------------------------------------------------------- training


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    steps: int = at_least(0, 0)  # exactly one of steps, tokens, epochs is set
    tokens: int = at_least(0, 0)
    epochs: float = at_least(0.0, 0.0)
    global_batch_size: int = at_least(1, 32)  # sequences a step over all devices and micro-batches
    per_device_batch_size: int = at_least(0, 0)  # 0: unchecked; else must agree with the global one
    accumulation: int = at_least(1, 1)  # micro-batches a step
    z_loss: float = at_least(0.0, 0.0)  # coefficient on log(Z)^2 (PaLM, t5x)
    label_smoothing: float = bounded(0.0, 0.0, 0.999)
    discriminator_weight: float = positive(50.0)  # with a generator: on the encoder's own loss (ELECTRA's lambda)
    temperature: float = positive(0.05)  # similarity: cosines are divided by it (SimCSE, arXiv 2104.08821)
    loss_chunk: int = at_least(0, 0)  # tokens of a row whose logits exist at a time; 0: all
    max_bad_steps: int = at_least(1, 5)  # non-finite steps in a row that stop the run
    ema_decay: float = bounded(0.0, 0.0, 0.999999)  # 0: no average; else evaluation uses it


@dataclasses.dataclass(frozen=True)
class OptimConfig:
    name: str = one_of("adamw", "adafactor", "lamb", "lion", "muon", "sgd")
    learning_rate: float = positive(3e-4)
    schedule: str = one_of("cosine", "linear", "constant", "inverse_sqrt", "wsd")
    warmup_steps: int = at_least(0, 0)
    warmup_ratio: float = fraction(0.0)  # of all steps; instead of warmup_steps
    warmup_form: str = one_of("(i+1)/(w+1)", "(i+1)/w", "i/w")  # factor at update i of a w-update warm-up
    decay_steps: int = at_least(0, 0)  # update at which the decay ends; 0: the last
    cooldown_ratio: float = fraction(0.2)  # wsd: share of all steps spent decaying, linearly
    final_ratio: float = fraction(0.1)  # learning rate at the end, relative to the peak
    beta1: float = bounded(0.9, 0.0, 0.999999)  # also the momentum of sgd and muon
    beta2: float = bounded(0.95, 0.0, 0.999999)
    eps: float = positive(1e-8)
    bias_correction: bool = True  # of adamw and lamb; BERT was trained without
    weight_decay: float = at_least(0.0, 0.1)
    decay_mask: str = one_of("matrices", "hidden", "all")  # matrices: linears and embeddings; hidden: linears
    clip_norm: float = at_least(0.0, 1.0)  # global gradient norm; 0: off
    normalize_gradients: bool = False  # divide each tensor's gradient by its own norm
    lr_multipliers: tuple[str, ...] = ()  # "PATTERN=FACTOR" on parameter paths (re.fullmatch)
    freeze: tuple[str, ...] = ()  # patterns of parameter paths that do not train
    offload: tuple[str, ...] = ()  # patterns of parameter paths whose optimizer state waits in pinned host memory


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Sizes of the device mesh's axes; at most one may be -1 (all remaining devices)."""

    stage: int = at_least(-1, 1)  # splits the layers: a pipeline
    data: int = at_least(-1, -1)  # replicas of the parameters, each with its part of the batch
    fsdp: int = at_least(-1, 1)  # shards the batch, the parameters and the optimizer state
    expert: int = at_least(-1, 1)  # splits the experts, and the batch
    sequence: int = at_least(-1, 1)  # splits each row's tokens; model.attention_kernel says how attention goes on
    tensor: int = at_least(-1, 1)  # splits heads, MLP and vocabulary
    across_slices: tuple[str, ...] = ()  # "AXIS=SIZE": the part of an axis that goes over slices or nodes (DCN)
    stage_microbatches: int = at_least(0, 0)  # pieces of a batch that follow one another through the stages; 0: as many
    stage_repeats: int = at_least(1, 1)  # times a piece goes round all stages; above 1: circular, a smaller bubble
    parameter_rules: tuple[str, ...] = ()  # changes to the rule tables: "logical_axis=mesh_axis+mesh_axis"
    gradient_rules: tuple[str, ...] = ()  # the gradients', where they should differ from the parameters'
    optimizer_rules: tuple[str, ...] = ()  # the optimizer state's, where it should differ from the parameters'
    activation_rules: tuple[str, ...] = ()  # "residual_length=sequence+tensor": blocks hand on split tokens


@dataclasses.dataclass(frozen=True)
class PrecisionConfig:
    params: str = one_of("float32", "bfloat16", "float64")  # bfloat16 loses updates below 1/512 of a parameter
    compute: str = one_of("float32", "bfloat16", "float64")
    products: str = one_of("native", "int8", "fp8")  # numbers that the blocks' linear layers multiply (extra: qwix)


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
    every: int = at_least(0, 1000)  # steps; 0: only at the end
    keep_latest: int = at_least(1, 2)
    keep_best: int = at_least(0, 1)  # by eval.best
    use: str = one_of("latest", "best")  # the checkpoint that evaluate, predict and export take from a finished run
    keep_every: int = at_least(0, 0)  # also keep every multiple of this; 0: none
    resume: str = one_of("auto", "must", "never")  # auto: go on where the work directory stands
    resume_from: str = ""  # another run's folder: its whole state, at its latest step
    init_from: str = ""  # another run's folder, or hf:PATH of a checkpoint: its parameters only


@dataclasses.dataclass(frozen=True)
class EvalConfig:
    every: int = at_least(0, 500)  # steps; 0: only at the end
    batches: int = at_least(0, 0)  # of the fixed set, from its start; 0: the whole validation split
    batch_size: int = at_least(0, 0)  # sequences; 0: as a micro-batch, global_batch_size / accumulation
    sampling: str = one_of("sequential", "random")  # random: fresh random crops, as nanoGPT's estimate
    best: str = "loss"  # the figure that says which checkpoint is best: loss, or one that is better when higher
    patience: int = at_least(0, 0)  # evaluations in a row that may not better it before the run ends; 0: no early end


@dataclasses.dataclass(frozen=True)
class LogConfig:
    every: int = at_least(1, 10)
    trackers: tuple[str, ...] = ("tensorboard",)  # of tensorboard, wandb, mlflow; metrics.jsonl is always written
    profile_start: int = at_least(0, 0)  # first step of a profiler trace
    profile_steps: int = at_least(0, 0)  # its length; 0: none


@dataclasses.dataclass(frozen=True)
class GenerateConfig:
    """How text is sampled: at the end of a run, and by `llm-jax generate`."""

    prompt: str = ""
    max_tokens: int = at_least(0, 128)  # 0: none
    temperature: float = at_least(0.0, 0.8)  # 0: greedy
    top_k: int = at_least(0, 0)  # 0: all
    top_p: float = bounded(1.0, 0.0, 1.0, open_low=True)
    min_p: float = fraction(0.0)
    stop: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Config:
    """One run."""

    name: str = "run"
    seed: int = at_least(0, 0)
    model: ModelConfig = nested(DecoderConfig)
    data: DataConfig = nested(DataConfig)
    train: TrainConfig = nested(TrainConfig)
    optim: OptimConfig = nested(OptimConfig)
    mesh: MeshConfig = nested(MeshConfig)
    precision: PrecisionConfig = nested(PrecisionConfig)
    checkpoint: CheckpointConfig = nested(CheckpointConfig)
    eval: EvalConfig = nested(EvalConfig)
    log: LogConfig = nested(LogConfig)
    generate: GenerateConfig = nested(GenerateConfig)
