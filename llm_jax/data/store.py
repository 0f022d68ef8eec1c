"""Prepared token stores: one folder a source, made once, opened in milliseconds, checked whenever opened.

    manifest.json                          what it was made from, counts, hashes, yardsticks
    tokenizer/                             as Tokenizer.save writes it
    train.bin, validation.bin              flat token ids, uint16 or uint32
    train.idx.npy, validation.idx.npy      int64 starts of the documents, then the number of tokens

A store lies in the cache under a hash of everything that decides its content: input files with their sizes and dates,
format, tokenizer, eos, split. It appears there by a rename, so that there is never half a store.
"""

import contextlib
import dataclasses
import errno
import functools
import hashlib
import json
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from llm_jax.backend import cache_folder
from llm_jax.config.schema import DataConfig
from llm_jax.data import tokenizers, vocabulary
from llm_jax.data.locks import locked
from llm_jax.data.progress import Progress
from llm_jax.data.shards import sync_folder
from llm_jax.data.sources import open_source
from llm_jax.data.tokenizers import Tokenizer
from llm_jax.data.writer import MANIFEST, VERSION, Job, digest_of, write_store
from llm_jax.errors import DataError


@dataclasses.dataclass(frozen=True, eq=False)
class TokenSplit:
    """Document d is tokens[offsets[d]:offsets[d + 1]], its eos included. `fingerprint` hashes the content of both."""

    tokens: np.memmap  # (n,) uint16 or uint32, read only
    offsets: np.ndarray  # (documents + 1,) int64
    fingerprint: str


@dataclasses.dataclass(frozen=True, eq=False)
class Store:
    name: str  # of the source in the config
    weight: float
    folder: str
    manifest: dict[str, Any]

    @functools.cached_property
    def tokenizer(self) -> Tokenizer:
        return tokenizers.load(os.path.join(self.folder, "tokenizer"))

    def split(self, name: str) -> TokenSplit:
        """The "train" or "validation" tokens."""
        counts = self.manifest["splits"].get(name)
        if counts is None:
            raise DataError(
                f"The data of {self.manifest['source']['path']} has no {name} split: set data.validation_fraction or "
                "data.validation_path."
            )
        tokens = np.memmap(os.path.join(self.folder, f"{name}.bin"), np.dtype(counts["dtype"]), "r")
        offsets = np.load(os.path.join(self.folder, f"{name}.idx.npy"))
        sound = len(tokens) == counts["tokens"] == offsets[-1] and len(offsets) == counts["documents"] + 1
        if not sound or offsets[0] != 0 or (np.diff(offsets) <= 0).any():
            raise _damaged(os.path.join(self.folder, f"{name}.idx.npy"), "does not fit its tokens")
        return TokenSplit(tokens, offsets, counts["fingerprint"])


def open_store(folder: str | os.PathLike, name: str = "", weight: float = 1.0, verify: bool = False) -> Store:
    """A prepared store. Its files are checked by size, and with `verify` by their hashes (reads everything)."""
    folder = os.fspath(folder)
    path = os.path.join(folder, MANIFEST)
    try:
        with open(path, encoding="utf-8") as stream:
            manifest = json.load(stream)
        version, files = manifest["version"], manifest["files"]
    except FileNotFoundError as error:
        raise DataError(f"{folder} is not a prepared store: it has no {MANIFEST}.") from error
    except (ValueError, KeyError, TypeError) as error:
        raise _damaged(path, f"cannot be read ({type(error).__name__}: {error})") from error
    if version != VERSION:
        raise DataError(f"{folder} was prepared by another version ({version}, not {VERSION}): prepare it again.")
    for file, expected in files.items():
        path = os.path.join(folder, file)
        if not os.path.isfile(path):
            raise _damaged(path, "is missing")
        if os.path.getsize(path) != expected["size"]:
            raise _damaged(path, f"has {os.path.getsize(path)} bytes instead of {expected['size']}")
        if verify and digest_of(path) != expected["blake2b"]:
            raise _damaged(path, "was changed: its hash is not the one in the manifest")
    return Store(name, weight, folder, manifest)


def _damaged(path: str, what: str) -> DataError:
    return DataError(f"{path} {what}: delete the folder of this store, and it is prepared again.")


# -------------------------------------------------------------------------------------------------- preparing


def prepare(cfg: DataConfig, progress: Callable[[str], None] | None = None) -> list[Store]:
    """The stores of cfg.sources(), in that order; makes those that the cache lacks.

    All share one tokenizer. With data.tokenizer=none each has as many ids as its own files need; the largest counts.
    Any number of processes may call this at once, and be killed at any time.

    Args:
      progress: takes lines of text; None: standard error, with a bar where that is a terminal.
    """
    talk = Progress(progress)
    jobs = _jobs(cfg)
    cache = os.path.abspath(os.path.expanduser(cfg.cache_dir or cache_folder()))
    recipe = vocabulary.recipe(cfg, jobs)
    folders = [_folder(cache, job, recipe) for job in jobs]
    if missing := [(job, folder) for job, folder in zip(jobs, folders, strict=True) if not os.path.exists(folder)]:
        with _plain_disk_errors():
            _make_cache(cache)
            tokenizer = vocabulary.make(cfg, jobs, os.path.join(cache, "tokenizers"), talk)
            for job, folder in missing:
                _prepare_one(job, tokenizer, folder, talk)
    weights = [source.weight for source in cfg.sources().values()]
    stores = [open_store(f, job.name, w) for f, job, w in zip(folders, jobs, weights, strict=True)]
    for store in stores:
        _require_few_bad_records(store, cfg)
    return stores


def vocab_size(cfg: DataConfig) -> int:
    """The vocabulary that `prepare` would give; only a character tokenizer needs the data to tell."""
    if cfg.tokenizer == "byte":
        return tokenizers.ByteTokenizer().vocab_size
    if cfg.tokenizer in ("bpe", "wordpiece"):
        return cfg.tokenizer_vocab_size
    if cfg.tokenizer in ("char", "none"):
        return prepare(cfg)[0].tokenizer.vocab_size
    return tokenizers.read(cfg.tokenizer).vocab_size


def _make_cache(cache: str) -> None:
    try:
        os.makedirs(os.path.join(cache, "stores"), exist_ok=True)
    except (FileNotFoundError, FileExistsError, NotADirectoryError) as error:  # /proc, or a file in the way
        raise DataError(
            f"There can be no folder {cache} for prepared data ({error.strerror}): correct data.cache_dir."
        ) from error


def _jobs(cfg: DataConfig) -> list[Job]:
    sources = cfg.sources()
    powers = [source.weight ** (1 / cfg.mixture_temperature) for source in sources.values()]
    return [
        Job(
            name=name,
            share=power / sum(powers),
            source=open_source(source),
            own_validation=open_source(source, validation=True) if source.validation_path else None,
            cfg=cfg,
        )
        for (name, source), power in zip(sources.items(), powers, strict=True)
    ]


def _folder(cache: str, job: Job, recipe: Any) -> str:
    facts = json.dumps([VERSION, job.identity(), recipe, job.cfg.eos])
    key = hashlib.blake2b(facts.encode("utf-8", "surrogateescape"), digest_size=10).hexdigest()
    label = re.sub(r"[^\w.-]+", "_", os.path.basename(job.source.path.rstrip("/")))[:40]
    return os.path.join(cache, "stores", f"{label}-{key}")


def _require_few_bad_records(store: Store, cfg: DataConfig) -> None:
    """A store may have been made when more were allowed."""
    bad = store.manifest["bad_records"]
    if bad["count"] > cfg.max_bad_records:
        raise DataError(
            f"{bad['count']} bad records were skipped in {store.manifest['source']['path']}, and "
            f"data.max_bad_records is {cfg.max_bad_records}; the first: {bad['first'][0]}."
        )


def _prepare_one(job: Job, tokenizer: Tokenizer, folder: str, talk: Progress) -> None:
    with locked(folder + ".lock", talk.note):
        if os.path.exists(folder):  # by the process that was waited for
            return
        started = time.monotonic()
        talk.note(f"{job.name}: preparing {job.source.path} ({job.source.format}, {len(job.source.files):,} files).")
        partial = folder + ".partial"
        os.rename(write_store(job, tokenizer, partial, talk), folder)
        sync_folder(os.path.dirname(folder))
        shutil.rmtree(partial, ignore_errors=True)
    talk.note(f"{job.name}: {_summary(open_store(folder))}; {time.monotonic() - started:.1f} s; in {folder}")


def _summary(store: Store) -> str:
    counts = store.manifest["splits"].items()
    parts = [f"{c['tokens']:,} {side} tokens in {c['documents']:,} documents" for side, c in counts]
    bad, empty = store.manifest["bad_records"]["count"], store.manifest["empty_documents"]
    parts += [f"{bad:,} bad records skipped"] if bad else []
    parts += [f"{empty:,} empty documents left out"] if empty else []
    return ", ".join(parts)


def require_ids_below(stores: Sequence[Store], vocab_size: int) -> None:
    """Refuse token files with an id that the model does not have. Raises DataError: file, id and place."""
    for store in stores:
        if store.manifest["tokenizer"]["kind"] != "none" or store.tokenizer.vocab_size <= vocab_size:
            continue
        for name in store.manifest["splits"]:
            tokens = store.split(name).tokens
            if (beyond := np.flatnonzero(tokens >= vocab_size)).size:
                place = int(beyond[0])
                raise DataError(
                    f"{store.manifest['source']['path']} holds the token id {tokens[place]} (token {place:,} of the "
                    f"{name} split), and model.vocab_size={vocab_size:,}: give the files that were made for this "
                    f"vocabulary, or set model.vocab_size={store.tokenizer.vocab_size} or more."
                )


@contextlib.contextmanager
def _plain_disk_errors() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM):
            raise DataError(
                f"The prepared data cannot be written ({error.strerror}: {error.filename or 'the cache'}): make room, "
                "or set data.cache_dir to another folder."
            ) from error
        raise
