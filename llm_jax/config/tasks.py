"""What a run's task (data.task) asks of its other keys, refused when the config is read."""

from collections.abc import Iterator
from typing import Any

from llm_jax.config.schema import (
    BUILT_IN,
    LABELLED_TASKS,
    MASKED_TASKS,
    TABLE_FORMATS,
    Config,
    DataConfig,
    MaskingConfig,
    TrainConfig,
)
from llm_jax.config.values import refuse

# Keys that are read under some tasks only (see checks.ONLY_WITH).
ONLY_WITH_TASK = (
    *((f"data.masking.{name}", "data.task", MASKED_TASKS) for name in vars(MaskingConfig())),
    ("data.columns.text", "data.task", LABELLED_TASKS),
    ("data.columns.pair", "data.task", LABELLED_TASKS),
    ("data.columns.label", "data.task", tuple(task for task in LABELLED_TASKS if task != "similarity")),
    ("data.columns.choices", "data.task", ("choice",)),
    ("data.columns.negative", "data.task", ("similarity",)),
    ("data.columns.names", "data.task", ("classification", "multilabel", "tokens")),
    ("data.buckets", "data.task", LABELLED_TASKS),
    ("train.discriminator_weight", "data.task", ("replaced",)),
    ("data.pack_texts", "data.task", (*MASKED_TASKS, "classification", "multilabel", "regression", "tokens")),
    ("data.stride", "data.task", ("questions",)),
    ("data.answer_length", "data.task", ("questions",)),
    ("train.temperature", "data.task", ("similarity",)),
)
# The head of an encoder that each task trains.
HEADS = {
    "masked": ("masked_pairs", "masked"), "replaced": ("replaced",), "classification": ("text",),
    "multilabel": ("text",), "regression": ("text",), "choice": ("text",), "tokens": ("token",),
    "questions": ("token",), "similarity": ("embedding", "pooled"),
}  # fmt: skip


def check_task(cfg: Config) -> None:
    """Refuse a task that the model, the data or the step cannot have."""
    data, task = cfg.data, cfg.data.task
    if task == "language":
        if cfg.model.family == "encoder":
            reason = "an encoder sees both sides of a token, so that there is no next one to predict"
            raise refuse("data.task", task, reason, "set data.task=masked, or another of an encoder's")
        for name, source in data.sources().items():
            if source.format in ("csv", "tsv"):
                key = f"data.mixture.{name}.format" if data.mixture else "data.format"
                raise refuse(key, source.format, "tables are read by labelled tasks", "set data.task, or format=text")
        return
    if cfg.model.family != "encoder":
        raise refuse("data.task", task, f"it trains an encoder, and model.family = {cfg.model.family!r}",
                     "set model.family=encoder")  # fmt: skip
    head, fitting = cfg.model.head, HEADS[task]
    if head not in fitting:
        raise refuse("model.head", head, f"data.task = {task!r} trains another", f"set model.head={fitting[0]}")
    if task == "masked" and data.masking.next_sentence and head == "masked":
        raise refuse("data.masking.next_sentence", True, "model.head = 'masked' has no output for pairs",
                     "set model.head=masked_pairs, or next_sentence=False")  # fmt: skip
    if data.mixture:
        raise refuse("data.mixture", list(data.mixture), f"data.task = {task!r} reads one source", "set data.path")
    if cfg.train.tokens:
        raise refuse("train.tokens", cfg.train.tokens, f"rows of data.task = {task!r} hold unequal numbers of tokens",
                     "set train.steps or train.epochs")  # fmt: skip
    if task in MASKED_TASKS:
        check_masking(cfg)
    else:
        check_labelled(cfg)


def row_lengths(data: DataConfig) -> Iterator[tuple[str, Any, int]]:
    """(key, its value, tokens) of every length that rows of a batch may have."""
    yield "data.sequence_length", data.sequence_length, data.sequence_length
    for length in buckets(data):
        yield "data.buckets", length, length
    for steps, length in phases(data):
        yield "data.masking.phases", f"{steps}={length}", length


def buckets(data: DataConfig) -> list[int]:
    """The lengths that rows of labelled texts may have, ascending, data.sequence_length being the last."""
    for entry in data.buckets:
        if not entry.strip().isdecimal() or not 0 < int(entry) <= data.sequence_length:
            reason = f"it is not a length from 1 to data.sequence_length = {data.sequence_length}"
            raise refuse("data.buckets", entry, reason, "give lengths such as 32,64,128")
    return sorted({*map(int, data.buckets), data.sequence_length})


def phases(data: DataConfig) -> list[tuple[int, int]]:
    """(steps, length) of each phase of masked rows; the last one, of data.sequence_length, has no end (0)."""
    found = []
    for entry in data.masking.phases:
        steps, _, length = (part.strip() for part in entry.partition("="))
        if not steps.isdecimal() or not length.isdecimal() or not int(steps) or int(length) < 8:
            raise refuse("data.masking.phases", entry, "it is not STEPS=LENGTH", "write it as 900000=128")
        found.append((int(steps), int(length)))
    return [*found, (0, data.sequence_length)]


def check_masking(cfg: Config) -> None:
    data, masking = cfg.data, cfg.data.masking
    weight = cfg.train.discriminator_weight
    if weight != TrainConfig().discriminator_weight and not cfg.model.generator_divisor:
        reason = "there is no generator whose loss stands beside it"
        raise refuse("train.discriminator_weight", weight, reason, "set model.generator_divisor, or leave it out")
    if data.eos != "lines":
        raise refuse("data.eos", data.eos, f"data.task = {data.task!r} is made of sentences, one a line",
                     "set data.eos=lines")  # fmt: skip
    if data.sequence_length < 8:
        raise refuse("data.sequence_length", data.sequence_length, "no pair of texts fits", "give at least 8")
    if masking.phases and not cfg.train.steps:
        raise refuse("data.masking.phases", masking.phases, "phases are counted in steps", "set train.steps")
    for _, length in phases(data)[:-1]:
        if length > cfg.model.max_length:
            reason = f"the model's longest context is model.max_length = {cfg.model.max_length}"
            raise refuse("data.masking.phases", masking.phases, reason, "give a shorter length")
    if masking.phases and sum(steps for steps, _ in phases(data)) >= cfg.train.steps:
        reason = f"they leave none of train.steps = {cfg.train.steps} to data.sequence_length"
        raise refuse("data.masking.phases", masking.phases, reason, "shorten them, or leave the last one out")


def check_labelled(cfg: Config) -> None:
    data, task, columns = cfg.data, cfg.data.task, cfg.data.columns
    if data.format not in TABLE_FORMATS:
        raise refuse("data.format", data.format, f"data.task = {task!r} reads records", "give a jsonl, csv, tsv or "
                     "parquet file")  # fmt: skip
    if data.path in BUILT_IN and data.path not in TABLE_FORMATS:
        raise refuse("data.path", data.path, f"data.task = {task!r} needs labels, which of the built-in texts only "
                     "docstrings has", "give that, or a file of your own")  # fmt: skip
    if data.tokenizer in ("byte", "char", "bpe", "wordpiece", "none"):
        raise refuse("data.tokenizer", data.tokenizer, f"data.task = {task!r} goes on with an encoder's own tokenizer",
                     "give its tokenizer.json, or checkpoint.init_from=hf:PATH, which brings it along")  # fmt: skip
    buckets(data)  # refuses what is none
    if task == "choice" and len(columns.choices) < 2:
        raise refuse("data.columns.choices", columns.choices, "there is nothing to choose", "name two columns or more")
    if task in ("questions", "similarity") and not columns.pair:
        what = "the context" if task == "questions" else "the text that is like data.columns.text"
        raise refuse("data.columns.pair", "", f"data.task = {task!r} needs a second column", f"name {what}")
    if task == "tokens" and columns.pair:
        raise refuse("data.columns.pair", columns.pair, "words with labels are one text", "leave it out")
    if task == "similarity" and cfg.train.accumulation > 1:
        reason = "a text is told from all others of the batch, so that the loss is no sum over micro-batches"
        raise refuse("train.accumulation", cfg.train.accumulation, reason, "set it to 1")
    if task not in ("classification", "tokens") and cfg.train.label_smoothing:
        raise refuse("train.label_smoothing", cfg.train.label_smoothing, f"data.task = {task!r} smooths none",
                     "set it to 0")  # fmt: skip
