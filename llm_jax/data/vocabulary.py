"""The tokenizer that a data config asks for: found by path, or made from the sources' text and kept in the cache."""

import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from typing import Any

from llm_jax.config.schema import DataConfig
from llm_jax.data import tokenizers
from llm_jax.data.locks import locked
from llm_jax.data.progress import Progress
from llm_jax.data.shards import sync_folder
from llm_jax.data.sources import BadRecord
from llm_jax.data.splits import TRAIN, VALIDATION
from llm_jax.data.tokenizers import CHARACTERS_AN_ENTRY, Tokenizer
from llm_jax.data.writer import Job
from llm_jax.errors import ConfigError, DataError

_MADE_HERE = ("char", "bpe", "wordpiece")


def recipe(cfg: DataConfig, jobs: list[Job]) -> Any:
    """JSON-able: equal for two configs only where their tokenizers are the same. Cheap: loads no tokenizer."""
    if cfg.tokenizer in ("byte", "none"):
        return cfg.tokenizer
    if cfg.tokenizer == "char":
        return ["char", cfg.eos != "none", [job.identity() for job in jobs]]
    if cfg.tokenizer in ("bpe", "wordpiece"):
        settings = [cfg.tokenizer_vocab_size, CHARACTERS_AN_ENTRY]
        return [cfg.tokenizer, settings, [[job.share, job.identity()] for job in jobs]]
    return ["file", tokenizers.content_hash(cfg.tokenizer)]


def make(cfg: DataConfig, jobs: list[Job], cache: str, progress: Progress) -> Tokenizer:
    """The tokenizer of a config; a ConfigError where it cannot serve the sources."""
    for job in jobs:
        if cfg.tokenizer == "none" and job.source.has_text:
            raise ConfigError(
                f"data.tokenizer=none is for token files, and {job.source.path} is text ({job.source.format}): choose "
                "byte, char, bpe or the path of a tokenizer.json."
            )
        if cfg.tokenizer in _MADE_HERE and not job.source.has_text:
            raise ConfigError(
                f"data.tokenizer={cfg.tokenizer} would be made from text, and {job.source.path} holds token ids "
                f"({job.source.format}): give the tokenizer.json that they were made with, or none."
            )
    if cfg.tokenizer in _MADE_HERE:
        return _made_once(cfg, jobs, cache, progress)
    if cfg.tokenizer == "none":
        return tokenizers.NoTokenizer(vocab_size=1 << 32)  # until the largest id is known
    tokenizer = tokenizers.ByteTokenizer() if cfg.tokenizer == "byte" else tokenizers.read(cfg.tokenizer)
    if cfg.eos != "none" and tokenizer.eos_id is None and any(job.source.has_text for job in jobs):
        raise ConfigError(
            f"data.eos={cfg.eos} needs an end-of-document token, and {cfg.tokenizer} has none of the usual names "
            f"({', '.join(tokenizers.EOS_NAMES)}): set data.eos=none."
        )
    return tokenizer


def _made_once(cfg: DataConfig, jobs: list[Job], cache: str, progress: Progress) -> Tokenizer:
    key = hashlib.blake2b(json.dumps(recipe(cfg, jobs)).encode(), digest_size=10).hexdigest()
    folder = os.path.join(cache, f"{cfg.tokenizer}-{key}")
    os.makedirs(cache, exist_ok=True)
    if not os.path.exists(folder):
        with locked(folder + ".lock", progress.note):
            if not os.path.exists(folder):
                progress.note(f"Making the {cfg.tokenizer} tokenizer from the text.")
                shutil.rmtree(folder + ".partial", ignore_errors=True)
                tokenizer = _from_text(cfg, jobs)
                tokenizer.save(folder + ".partial")
                sync_folder(folder + ".partial")
                os.rename(folder + ".partial", folder)
    return tokenizers.load(folder)


def _from_text(cfg: DataConfig, jobs: list[Job]) -> Tokenizer:
    if cfg.tokenizer == "char":
        # Of both sides of the split, as in nanoGPT: a rare character must not make the validation text unreadable.
        characters: set[str] = set()
        for job in jobs:
            for _, text in _texts(job):
                characters.update(text)
        if not characters and (bad := _first_bad_record(jobs)):
            raise DataError(f"{bad}. Correct it: without such records there is no text to take the characters from.")
        return tokenizers.CharTokenizer(characters, with_eos=cfg.eos != "none")
    sample = _training_sample(jobs, CHARACTERS_AN_ENTRY * cfg.tokenizer_vocab_size)
    train = tokenizers.train_bpe if cfg.tokenizer == "bpe" else tokenizers.train_wordpiece
    return train(sample, cfg.tokenizer_vocab_size)


def _first_bad_record(jobs: list[Job]) -> str:
    documents = (document for job in jobs for part in job.parts for _, document in part.read())
    return next((document.reason for document in documents if isinstance(document, BadRecord)), "")


def _training_sample(jobs: list[Job], characters: int) -> Iterator[str]:
    """The first training documents of every source, in the mixture's proportions, so many `characters` in all."""
    for job in jobs:
        room = round(characters * job.share)
        for side, text in _texts(job):
            if side == TRAIN:
                yield text[:room]
                room -= len(text)
                if room <= 0:
                    break


def _texts(job: Job) -> Iterator[tuple[str, str]]:
    """(side, text) of every document; the bad records are the business of whoever writes the store."""
    split = job.split()
    position = 0
    for _, document in job.source.read():
        if not isinstance(document, BadRecord):
            yield from ((side, piece.text) for side, piece in split.divide(document, position))
            position += len(document)
    if job.own_validation:
        for _, document in job.own_validation.read():
            if not isinstance(document, BadRecord):
                yield VALIDATION, document.text
