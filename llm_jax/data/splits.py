"""Which documents, or which part of the text, are held out for validation."""

import dataclasses
import hashlib
from collections.abc import Iterator

from llm_jax.data.sources import BadRecord, Document, Source
from llm_jax.errors import DataError

TRAIN, VALIDATION = "train", "validation"


@dataclasses.dataclass(frozen=True)
class Split:
    """`files`: own files are held out. `documents`: a stable hash of the group decides, so that new documents do not
    move old ones. `tail`: the end of the source, from `border` characters (or tokens) on; a document across the
    border becomes two. `none`: everything trains."""

    kind: str
    fraction: float = 0.0
    border: int = 0

    def divide(self, document: Document, position: int) -> Iterator[tuple[str, Document]]:
        """The sides of a document that begins `position` characters (or tokens) after the start of the source."""
        if self.kind == "documents":
            yield (VALIDATION if held_out(document.group, self.fraction) else TRAIN), document
        elif self.kind != "tail" or position + len(document) <= self.border:
            yield TRAIN, document
        elif position >= self.border:
            yield VALIDATION, document
        else:
            yield from zip((TRAIN, VALIDATION), _cut(document, self.border - position), strict=True)


def held_out(group: str, fraction: float) -> bool:
    digest = hashlib.blake2b(group.encode("utf-8", "surrogateescape"), digest_size=8, salt=b"split").digest()
    return int.from_bytes(digest, "little") < fraction * 2**64


def _cut(document: Document, place: int) -> tuple[Document, Document]:
    def half(content_of, start):
        text = None if document.text is None else document.text[content_of]
        tokens = None if document.tokens is None else document.tokens[content_of]
        continues = document.continues and start == 0
        return dataclasses.replace(
            document, text=text, tokens=tokens, start=document.start + start, continues=continues
        )

    return half(slice(place), 0), half(slice(place, None), place)


def plan_split(source: Source, fraction: float, choice: str, own_files: bool) -> Split:
    """Settles data.validation_split for one source; reads as much of it as the decision needs."""
    if own_files:
        return Split("files")
    if fraction == 0:
        return Split("none")
    if choice == "auto" and source.format in ("nanogpt", "llmc"):
        choice = "tail"
    if choice != "tail" and _both_sides_get_documents(source, fraction):
        return Split("documents", fraction)
    total = sum(len(document) for document in _documents(source))
    border = int(total * (1 - fraction))
    if not 0 < border < total:
        unit = "characters" if source.has_text else "tokens"
        too_few = f"{source.path} has {total} {unit}, too few to hold out {fraction:g} of them"
        if bad := next((record.reason for _, record in source.read() if isinstance(record, BadRecord)), ""):
            raise DataError(f"{bad}. Correct it: without such records {too_few}.")
        raise DataError(f"{too_few}: give more data, data.validation_path, or data.validation_fraction=0.")
    return Split("tail", fraction, border)


def _both_sides_get_documents(source: Source, fraction: float) -> bool:
    """Reads until both are seen: most often a few dozen documents."""
    sides = set()
    for document in _documents(source):
        sides.add(held_out(document.group, fraction))
        if len(sides) == 2:
            return True
    return False


def _documents(source: Source) -> Iterator[Document]:
    for _, document in source.read():
        if not isinstance(document, BadRecord) and len(document):
            yield document
