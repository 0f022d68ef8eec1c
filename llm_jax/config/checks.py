"""Pairs of keys that do not go together, refused when the config is read: nothing here touches a device.

`schema.py` gives each key its own range; here stands what depends on two or more of them.
"""

import re
from typing import Any

from llm_jax.config.mesh import MESH_AXES, check_mesh, check_padded_vocab, check_splits, mesh_sizes, own_rules
from llm_jax.config.model import check_model
from llm_jax.config.resolve import to_dict
from llm_jax.config.schema import (
    TOKEN_FORMATS,
    Config,
    DataConfig,
    OptimConfig,
    SourceConfig,
)
from llm_jax.config.tasks import ONLY_WITH_TASK, check_task
from llm_jax.config.values import did_you_mean, nearest_multiples, refuse

TRACKERS = ("tensorboard", "wandb", "mlflow")
MAX_SEED = 2**32 - 1  # jax.random keeps 32 bits without x64; a larger seed would repeat a smaller one's numbers

# A key that was changed but is read only when another has one of these values: its author expects something of it.
# Left out are keys that go with a choice one often overrides (as data.tokenizer_vocab_size with bpe).
ONLY_WITH = (
    ("model.rope.factor", "model.rope.scaling", ("linear", "llama3", "yarn")),
    ("model.rope.original_length", "model.rope.scaling", ("llama3", "yarn")),
    ("model.rope.low_freq_factor", "model.rope.scaling", ("llama3",)),
    ("model.rope.high_freq_factor", "model.rope.scaling", ("llama3",)),
    ("model.rope.beta_fast", "model.rope.scaling", ("yarn",)),
    ("model.rope.beta_slow", "model.rope.scaling", ("yarn",)),
    ("model.rope.truncate", "model.rope.scaling", ("yarn",)),
    ("model.rope.attention_factor", "model.rope.scaling", ("yarn",)),
    ("model.rope.base", "model.positions", ("rotary",)),
    ("model.rope.fraction", "model.positions", ("rotary",)),
    ("model.rope.scaling", "model.positions", ("rotary",)),
    ("model.relative_buckets", "model.positions", ("relative", "disentangled")),
    ("model.relative_max_distance", "model.positions", ("relative", "disentangled")),
    ("model.init_std", "model.init", ("normal",)),
    ("optim.decay_steps", "optim.schedule", ("cosine", "linear", "wsd")),
    ("optim.cooldown_ratio", "optim.schedule", ("wsd",)),
    ("data.long_documents", "data.packing", ("first_fit", "best_fit")),
    ("model.remat_save", "model.remat", ("names",)),
    ("optim.bias_correction", "optim.name", ("adamw", "lamb")),
    *ONLY_WITH_TASK,
)


def check(cfg: Config) -> None:
    """Refuse what cannot be trained, whatever the machine. Raises ConfigError: key, value, reason, fix."""
    check_run(cfg)
    check_model(cfg.model)
    check_data(cfg)
    check_optim(cfg.optim, run_steps(cfg))
    check_mesh(cfg.mesh)
    check_splits(cfg, {axis: getattr(cfg.mesh, axis) for axis in MESH_AXES})
    check_task(cfg)
    check_unread_keys(cfg)


def check_run(cfg: Config) -> None:
    if not cfg.name.strip() or cfg.name in (".", "..") or re.search(r"[/\\\x00-\x1f]", cfg.name):
        raise refuse("name", cfg.name, "the run's folder is named after it", "give a plain name without slashes")
    if cfg.seed > MAX_SEED:
        raise refuse("seed", cfg.seed, "seeds have 32 bits", f"give one up to {MAX_SEED}")
    check_duration(cfg)
    train, saved = cfg.train, cfg.checkpoint
    if train.global_batch_size % train.accumulation:
        reason = f"it does not split into train.accumulation = {train.accumulation} equal micro-batches"
        raise refuse(
            "train.global_batch_size",
            train.global_batch_size,
            reason,
            f"give {nearest_multiples(train.global_batch_size, train.accumulation)}",
        )
    if saved.resume_from and saved.init_from:
        reason = f"checkpoint.init_from = {saved.init_from!r} is set too, and a run starts from one of them"
        raise refuse(
            "checkpoint.resume_from",
            saved.resume_from,
            reason,
            "keep resume_from for the whole state or init_from for the parameters alone",
        )
    if cfg.eval.sampling == "random" and not cfg.eval.batches:
        raise refuse("eval.batches", 0, "eval.sampling=random draws crops without end", "say how many batches to draw")
    if cfg.log.profile_start and not cfg.log.profile_steps:
        raise refuse(
            "log.profile_start",
            cfg.log.profile_start,
            "log.profile_steps is 0, so nothing is traced",
            "set log.profile_steps too",
        )
    if "" in cfg.generate.stop:
        raise refuse("generate.stop", cfg.generate.stop, "every text holds the empty string", "leave it out")
    for name in cfg.log.trackers:
        if name not in TRACKERS:
            listed = f"it can be {', '.join(TRACKERS)}"
            raise refuse("log.trackers", name, "there is no such tracker", did_you_mean(name, TRACKERS, listed))


def check_duration(cfg: Config) -> None:
    train = cfg.train
    durations = {"steps": train.steps, "tokens": train.tokens, "epochs": train.epochs}
    given = {name: value for name, value in durations.items() if value}
    if not given:
        reason = "a run has a length, and train.tokens and train.epochs are 0 too"
        raise refuse("train.steps", 0, reason, "set exactly one of train.steps, train.tokens, train.epochs")
    if len(given) > 1:
        (first, value), (second, other) = list(given.items())[:2]
        reason = f"train.{second} = {other} is set too, and a run has one length"
        raise refuse(f"train.{first}", value, reason, f"set one of them to 0, for example train.{first}=0")


def run_steps(cfg: Config) -> int | None:
    """How many steps the run has, a step begun being a whole one; None where only the data can tell (epochs)."""
    tokens_a_step = cfg.train.global_batch_size * cfg.data.sequence_length
    return cfg.train.steps or -(-cfg.train.tokens // tokens_a_step) or None


def check_vocab(cfg: Config, tokenizer_vocab_size: int, num_devices: int | None = None) -> int:
    """The model's vocabulary, once the tokenizer is known: the given size, or the tokenizer's where it is 0."""
    vocab_size = cfg.model.vocab_size or tokenizer_vocab_size
    if vocab_size < tokenizer_vocab_size:
        reason = f"the tokenizer ({cfg.data.tokenizer}) has {tokenizer_vocab_size} tokens"
        raise refuse(
            "model.vocab_size", vocab_size, reason, f"give 0 for the tokenizer's, or at least {tokenizer_vocab_size}"
        )
    known = {axis: getattr(cfg.mesh, axis) for axis in MESH_AXES}
    if "vocab" not in own_rules(cfg.mesh):
        check_padded_vocab(cfg.model, vocab_size, mesh_sizes(cfg.mesh, num_devices) if num_devices else known)
    return vocab_size


# ----------------------------------------------------------------------------------------------------- data


def check_data(cfg: Config) -> None:
    data, default = cfg.data, DataConfig()
    if data.sequence_length > cfg.model.max_length:
        reason = f"the model's longest context is model.max_length = {cfg.model.max_length}"
        raise refuse(
            "data.sequence_length",
            data.sequence_length,
            reason,
            f"set model.max_length={data.sequence_length} or a shorter sequence",
        )
    if data.packing == "crops" and data.mask_documents:
        raise refuse(
            "data.mask_documents",
            True,
            "data.packing = 'crops' cuts anywhere and knows no documents",
            "set data.mask_documents=False, or another packing",
        )
    if data.packing in ("first_fit", "best_fit") and not data.mask_documents:
        raise refuse(
            "data.mask_documents",
            False,
            f"data.packing = {data.packing!r} puts whole documents side by side, none of which continues another",
            "set data.mask_documents=True, or data.packing='concat'",
        )
    if data.mixture:
        for name in ("path", "format", "validation_path", "text_key", "separator"):
            if getattr(data, name) != getattr(default, name):
                reason = "data.mixture is set too, and replaces it"
                raise refuse(
                    f"data.{name}", getattr(data, name), reason, f"set data.mixture.NAME.{name} of each source"
                )
    elif data.mixture_temperature != default.mixture_temperature:
        raise refuse(
            "data.mixture_temperature",
            data.mixture_temperature,
            "there is no data.mixture whose weights it changes",
            "give a mixture, or leave this out",
        )
    for name, source in data.sources().items():
        check_source(cfg, f"data.mixture.{name}" if data.mixture else "data", source)


def check_source(cfg: Config, key: str, source: SourceConfig) -> None:
    if not source.path:
        raise refuse(f"{key}.path", "", "a source is a file, folder, glob or dataset", f"set {key}.path")
    if cfg.data.tokenizer != "none":
        return
    if source.format not in ("auto", *TOKEN_FORMATS):
        reason = f"data.tokenizer = 'none' reads token ids, and {source.format} files hold text"
        raise refuse(
            f"{key}.format", source.format, reason, f"set data.tokenizer, or a format of {', '.join(TOKEN_FORMATS)}"
        )
    if not cfg.model.vocab_size:
        raise refuse(
            "model.vocab_size",
            0,
            "data.tokenizer = 'none' cannot tell how many tokens there are",
            "set model.vocab_size to the largest id plus one, or more",
        )


# ------------------------------------------------------------------------------------------------ optimizer


def check_optim(optim: OptimConfig, steps: int | None) -> None:
    """Refuse a schedule that cannot be followed; of a run whose length the data alone can tell, what shows without."""
    if optim.warmup_steps and optim.warmup_ratio:
        reason = f"optim.warmup_ratio = {optim.warmup_ratio:g} is set too, and there is one warm-up"
        raise refuse("optim.warmup_steps", optim.warmup_steps, reason, "set one of them to 0")
    if steps:
        check_schedule(optim, steps)
    if optim.schedule == "wsd" and optim.warmup_ratio + optim.cooldown_ratio > 1:
        reason = f"with optim.warmup_ratio = {optim.warmup_ratio:g} it is more than the whole run"
        raise refuse("optim.cooldown_ratio", optim.cooldown_ratio, reason, "make the two add up to at most 1")


def warmup_updates(optim: OptimConfig, steps: int) -> int:
    return optim.warmup_steps or round(optim.warmup_ratio * steps)


def check_schedule(optim: OptimConfig, steps: int) -> None:
    warmup = warmup_updates(optim, steps)
    if warmup >= steps:
        key, value = (
            ("warmup_steps", optim.warmup_steps) if optim.warmup_steps else ("warmup_ratio", optim.warmup_ratio)
        )
        reason = f"the run has {steps} steps, so the learning rate would never reach its peak"
        raise refuse(f"optim.{key}", value, reason, "shorten the warm-up or lengthen the run")
    if optim.decay_steps > steps:
        raise refuse("optim.decay_steps", optim.decay_steps, f"the run has {steps} steps", "give 0 for the last step")
    if optim.decay_steps and optim.decay_steps <= warmup:
        reason = f"the warm-up lasts until update {warmup}"
        raise refuse(
            "optim.decay_steps", optim.decay_steps, reason, "let the decay end after it, or give 0 for the last step"
        )
    cooldown, end = round(optim.cooldown_ratio * steps), optim.decay_steps or steps
    if optim.schedule == "wsd" and warmup + cooldown > end:
        reason = f"its {cooldown} steps and the warm-up's {warmup} do not fit into {end}"
        raise refuse("optim.cooldown_ratio", optim.cooldown_ratio, reason, "make either shorter")


# ------------------------------------------------------------------------------------------------ all keys


def check_unread_keys(cfg: Config) -> None:
    """Refuse a key that was changed though nothing reads it."""
    values, defaults = to_dict(cfg), to_dict(type(cfg)(model=type(cfg.model)()))
    for key, other, needed in ONLY_WITH:
        value, condition = look_up(values, key), look_up(values, other)
        if value != look_up(defaults, key) and condition not in needed:
            raise refuse(
                key,
                value,
                f"it is read only with {other} = {' or '.join(needed)}, and that is {condition!r}",
                "change that, or leave this key out",
            )


def look_up(nested: dict[str, Any], key: str) -> Any:
    for name in key.split("."):
        nested = nested[name]
    return nested
