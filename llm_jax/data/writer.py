"""Makes one store: reads a source, tokenizes it shard by shard, joins the shards, describes the result."""

import dataclasses
import hashlib
import json
import os
import shutil
from typing import Any

import numpy as np

from llm_jax.config.schema import DataConfig
from llm_jax.data import shards as shard_files
from llm_jax.data.progress import Progress
from llm_jax.data.shards import Shards, State
from llm_jax.data.sources import BadRecord, Document, Position, Source
from llm_jax.data.splits import TRAIN, VALIDATION, Split, plan_split
from llm_jax.data.tokenizers import NoTokenizer, Tokenizer, token_dtype
from llm_jax.errors import DataError

VERSION = 2  # of the layout and of what preparing does; a new one makes new stores
MANIFEST = "manifest.json"
SHARD_UNITS = 1 << 23  # characters or tokens a shard, before tokenizing
YARDSTICK_BYTES = 8_000_000
_EXAMPLES = 10  # bad records that the manifest names


@dataclasses.dataclass(frozen=True)
class Job:
    """One source of the config and what becomes of it."""

    name: str
    share: float  # of the mixture
    source: Source
    own_validation: Source | None
    cfg: DataConfig

    @property
    def parts(self) -> list[Source]:
        return [self.source] + ([self.own_validation] if self.own_validation else [])

    def identity(self) -> dict[str, Any]:
        """JSON-able: all that decides which documents there are and which side they are on."""
        own = self.own_validation.identity() if self.own_validation else None
        split = None if own else [self.cfg.validation_fraction, self.cfg.validation_split]
        return {"source": self.source.identity(), "validation": own, "split": split}

    def split(self) -> Split:
        cfg = self.cfg
        return plan_split(self.source, cfg.validation_fraction, cfg.validation_split, self.own_validation is not None)

    def with_marks_of(self, tokenizer: Tokenizer) -> "Job":
        """Flat token files mark their documents by the tokenizer's eos."""
        eos_id = None if self.cfg.eos == "none" else tokenizer.eos_id
        if self.source.format not in ("nanogpt", "llmc") or eos_id is None:
            return self
        source, own = (s and dataclasses.replace(s, eos_id=eos_id) for s in (self.source, self.own_validation))
        return dataclasses.replace(self, source=source, own_validation=own)


def write_store(job: Job, tokenizer: Tokenizer, partial: str, progress: Progress) -> str:
    """Makes the store below `partial`, going on with what is there; returns its folder, ready to be renamed."""
    job = job.with_marks_of(tokenizer)
    split = job.split()
    shards = Shards(os.path.join(partial, f"shards-{tokenizer.identity()}"))
    state = shards.state()
    if state != State():
        progress.note(f"{job.name}: going on behind {state.bytes / 1e6:,.1f} MB that were prepared before.")
    with progress.counting(job.name, sum(part.size for part in job.parts)) as advance:
        state = _Reader(job, split, tokenizer, shards, advance).read_on(state)
    _require_unchanged(job)

    folder = os.path.join(partial, "store")
    shutil.rmtree(folder, ignore_errors=True)
    os.makedirs(folder)
    if isinstance(tokenizer, NoTokenizer):
        tokenizer = NoTokenizer(state.largest_id + 1)
    tokenizer.save(os.path.join(folder, "tokenizer"))
    manifest = _describe(job, split, tokenizer, state)
    sides = (TRAIN,) if split.kind == "none" else (TRAIN, VALIDATION)
    for side in sides:
        manifest["splits"][side] = _join(shards, side, token_dtype(tokenizer.vocab_size), folder)
    _require_both_sides(job, manifest["splits"])
    known = job.source.has_text or tokenizer.token_bytes() is not None
    manifest["splits"][TRAIN]["bytes"] = state.bytes - state.validation_bytes if known else None
    if VALIDATION in sides:
        manifest["splits"][VALIDATION]["bytes"] = state.validation_bytes if known else None
        manifest["yardsticks"] = yardsticks(b"".join(bytes(s["sample"]) for s in shards), state.validation_bytes)
    manifest["files"] = _file_table(folder)
    with open(os.path.join(folder, MANIFEST), "w", encoding="utf-8") as stream:
        json.dump(manifest, stream, indent=1)
        shard_files.sync_file(stream)
    shard_files.sync_folder(folder)
    return folder


# ---------------------------------------------------------------------------------------- documents to shards


class _Reader:
    """Carries the documents of a job into shards."""

    def __init__(self, job: Job, split: Split, tokenizer: Tokenizer, shards: Shards, advance):
        self.job, self.split, self.tokenizer, self.shards, self.advance = job, split, tokenizer, shards, advance
        self.token_bytes = tokenizer.token_bytes()
        self.sides: dict[str, list[Document]] = {TRAIN: [], VALIDATION: []}
        self.units = self.seen = 0

    def read_on(self, state: State) -> State:
        """Writes all shards behind `state`; returns the last state."""
        parts = self.job.parts
        for part in range(state.part, len(parts)):
            for position, document in parts[part].read(Position(state.file, state.record), self._meter):
                state = dataclasses.replace(self._take(document, state), file=position.file, record=position.record)
                if self.units >= SHARD_UNITS:
                    state = self._flush(state)
            state = dataclasses.replace(state, part=part + 1, file=0, record=0, position=0)
        return self._flush(state)

    def _meter(self, count: int) -> None:
        self.advance(count, 0)

    def _take(self, document: Document | BadRecord, state: State) -> State:
        if isinstance(document, BadRecord):
            return self._skip(document, state)
        if not len(document):
            return dataclasses.replace(state, empty=state.empty + 1)
        if state.part == 1:
            self.sides[VALIDATION].append(document)
        else:
            for side, piece in self.split.divide(document, state.position):
                self.sides[side].append(piece)
        self.units += len(document)
        self.seen += 1
        return dataclasses.replace(state, position=state.position + len(document))

    def _skip(self, record: BadRecord, state: State) -> State:
        limit = self.job.cfg.max_bad_records
        if state.bad >= limit:
            many = f" It is bad record number {limit + 1}, and data.max_bad_records is {limit}." if limit else ""
            advice = "Correct it, or let such records be skipped with data.max_bad_records."
            raise DataError(f"{record.reason}.{many} {advice}")
        examples = (*state.examples, record.reason)[:_EXAMPLES]
        return dataclasses.replace(state, bad=state.bad + 1, examples=examples)

    def _flush(self, state: State) -> State:
        arrays = {}
        for side, documents in self.sides.items():
            tokens, starts, size = self._tokenize(documents)
            arrays |= {f"{side}_tokens": tokens, f"{side}_starts": starts}
            own = {"validation_bytes": state.validation_bytes + size} if side == VALIDATION else {}
            largest = max(state.largest_id, int(tokens.max(initial=0)) if len(tokens) else -1)
            state = dataclasses.replace(state, bytes=state.bytes + size, largest_id=largest, **own)
        arrays["sample"] = _head(self.sides[VALIDATION], YARDSTICK_BYTES - state.sampled)
        state = dataclasses.replace(state, sampled=state.sampled + len(arrays["sample"]))
        self.shards.add(arrays, state)
        self.advance(0, self.seen)
        self.sides = {TRAIN: [], VALIDATION: []}
        self.units = self.seen = 0
        return state

    def _tokenize(self, documents: list[Document]) -> tuple[np.ndarray, np.ndarray, int]:
        """All tokens (n,), where documents start in them (d,), and the bytes of their text."""
        if not documents:
            return np.zeros(0, self.tokenizer.dtype), np.zeros(0, np.int64), 0
        if self.job.source.has_text:
            arrays = self._encode(documents)
            size = sum(len(d.text.encode()) for d in documents)
        else:
            arrays = [d.tokens for d in documents]
            self._require_known_ids(documents)
            size = sum(int(self.token_bytes[a].sum()) for a in arrays) if self.token_bytes is not None else 0
        starts = np.cumsum([0] + [len(a) for a in arrays])[:-1]
        return np.concatenate(arrays), starts[[not d.continues for d in documents]], size

    def _encode(self, documents: list[Document]) -> list[np.ndarray]:
        if self.job.cfg.eos == "lines":
            return self._encode_lines(documents)
        arrays = self.tokenizer.encode([d.text for d in documents])
        if self.token_bytes is not None:
            for document, ids in zip(documents, arrays, strict=True):
                spelt, size = int(self.token_bytes[ids].sum()), len(document.text.encode())
                if spelt != size:
                    raise DataError(
                        f"The tokenizer spells {spelt} of the {size} bytes of {document.id}: it loses text."
                    )
        if self.job.cfg.eos == "none":
            return arrays
        eos = np.array([self.tokenizer.eos_id], self.tokenizer.dtype)
        ends = (lambda ids: (eos, ids)) if self.job.cfg.eos == "prepend" else (lambda ids: (ids, eos))
        return [np.concatenate(ends(ids)) for ids in arrays]

    def _encode_lines(self, documents: list[Document]) -> list[np.ndarray]:
        """Each line that is not blank with the end token behind it: what is made of sentences needs their borders."""
        lines = [[line for line in document.text.splitlines() if line.strip()] for document in documents]
        encoded = iter(self.tokenizer.encode([line for piece in lines for line in piece]))
        end = np.array([self.tokenizer.eos_id], self.tokenizer.dtype)
        arrays = [[part for _ in piece for part in (next(encoded), end)] for piece in lines]
        return [np.concatenate(parts or [end]) for parts in arrays]

    def _require_known_ids(self, documents: list[Document]) -> None:
        limit = (1 << 32) if isinstance(self.tokenizer, NoTokenizer) else self.tokenizer.vocab_size
        for document in documents:
            bad = (document.tokens >= limit) | (document.tokens < 0)
            if bad.any():
                place = int(np.argmax(bad))
                raise DataError(
                    f"{document.id} holds token {document.tokens[place]} at position {document.start + place} of the "
                    f"file, and data.tokenizer={self.job.cfg.tokenizer} has {limit} tokens: give the tokenizer that "
                    "wrote the file (its tokenizer.json), or none."
                )


def _head(documents: list[Document], room: int) -> np.ndarray:
    """The first bytes of their joined text."""
    pieces = []
    for document in documents:
        if room <= 0 or document.text is None:
            break
        pieces.append(document.text[:room].encode()[:room])
        room -= len(pieces[-1])
    return np.frombuffer(b"".join(pieces), np.uint8)


# ------------------------------------------------------------------------------------------- shards to a store


def _join(shards: Shards, side: str, dtype: np.dtype, folder: str) -> dict[str, Any]:
    """Writes `side`.bin and `side`.idx.npy; returns their counts and the fingerprint of both."""
    starts, total, digest = [], 0, hashlib.blake2b(dtype.str.encode(), digest_size=16)
    with open(os.path.join(folder, f"{side}.bin"), "wb") as stream:
        for shard in shards:
            tokens = shard[f"{side}_tokens"].astype(dtype)
            starts.append(shard[f"{side}_starts"] + total)
            total += len(tokens)
            stream.write(tokens.data)
            digest.update(tokens.data)
        shard_files.sync_file(stream)
    offsets = np.concatenate([*starts, [total]]).astype(np.int64)
    digest.update(offsets.data)
    with open(os.path.join(folder, f"{side}.idx.npy"), "wb") as stream:
        np.save(stream, offsets)
        shard_files.sync_file(stream)
    return {"tokens": total, "documents": len(offsets) - 1, "dtype": dtype.name, "fingerprint": digest.hexdigest()}


def _require_both_sides(job: Job, splits: dict[str, Any]) -> None:
    for side, counts in splits.items():
        if not counts["tokens"]:
            path = job.own_validation.path if side == VALIDATION and job.own_validation else job.source.path
            raise DataError(f"{path} gives no {side} tokens: every record in it is empty or was skipped.")


def _require_unchanged(job: Job) -> None:
    for file in (f for part in job.parts for f in part.inputs if os.path.isabs(f.path)):
        try:
            status = os.stat(file.path)
            same = (status.st_size, status.st_mtime_ns) == (file.size, file.mtime_ns)
        except OSError:
            same = False
        if not same:
            raise DataError(f"{file.path} changed while it was being prepared: run the command again.")


def _describe(job: Job, split: Split, tokenizer: Tokenizer, state: State) -> dict[str, Any]:
    source = job.source
    return {
        "version": VERSION,
        "source": {
            "path": source.path,
            "validation_path": job.own_validation.path if job.own_validation else "",
            "format": source.format,
            "text_key": source.text_key,
            "separator": source.separator,
        },
        "inputs": [
            {"path": f.path, "size": f.size, "blake2b": digest_of(f.path) if os.path.isabs(f.path) else None}
            for part in job.parts
            for f in part.inputs
        ],
        "tokenizer": {
            "kind": tokenizer.kind,
            "identity": tokenizer.identity(),
            "vocab_size": tokenizer.vocab_size,
            "eos_id": tokenizer.eos_id,
        },
        "eos": job.cfg.eos if source.has_text else "as in the files",
        "split": dataclasses.asdict(split),
        "bad_records": {"count": state.bad, "first": list(state.examples)},
        "empty_documents": state.empty,
        "splits": {},
        "yardsticks": {},
    }


def _file_table(folder: str) -> dict[str, dict[str, Any]]:
    """Every file of the store but the manifest, with its size and hash."""
    paths = [os.path.join(inside, name) for inside, _, names in os.walk(folder) for name in names]
    return {
        os.path.relpath(path, folder): {"size": os.path.getsize(path), "blake2b": digest_of(path)}
        for path in sorted(paths)
    }


def digest_of(path: str) -> str:
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, lambda: hashlib.blake2b(digest_size=16)).hexdigest()


def yardsticks(text: bytes, validation_bytes: int) -> dict[str, float]:
    """What a model has to beat on the validation text, in bits per byte: `xz -9`, and the best model that knows only
    how often each byte occurs. On the first YARDSTICK_BYTES of the documents joined together; empty without text."""
    if not text:
        return {}
    counts = np.bincount(np.frombuffer(text, np.uint8))
    shares = counts[counts > 0] / len(text)
    result = {
        "bytes": len(text),
        "all_bytes": validation_bytes,
        "order0_bits_per_byte": float(-(shares * np.log2(shares)).sum()),
    }
    try:
        import lzma
    except ImportError:  # a Python built without it
        return result
    return result | {"xz_bits_per_byte": 8 * len(lzma.compress(text, preset=9)) / len(text)}
