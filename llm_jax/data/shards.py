"""Prepared documents on their way into a store, in shards that become valid one by one.

Work that is killed at any moment goes on behind the last whole shard; the shards of an uninterrupted and of a resumed
run are different cuts of the same sequence.
"""

import dataclasses
import json
import os
import zipfile
from collections.abc import Iterator

import numpy as np


@dataclasses.dataclass(frozen=True)
class State:
    """Where reading stands behind a shard, with the counts so far."""

    part: int = 0  # 0: the source, 1: its own validation files, 2: all is read
    file: int = 0
    record: int = 0
    position: int = 0  # characters, or tokens, of this part so far
    bad: int = 0
    examples: tuple[str, ...] = ()  # the first few bad records
    empty: int = 0
    bytes: int = 0  # of all documents, UTF-8
    validation_bytes: int = 0
    sampled: int = 0  # bytes of validation text kept for the yardsticks
    largest_id: int = -1


class Shards:
    def __init__(self, folder: str):
        self.folder = folder
        os.makedirs(folder, exist_ok=True)
        names = set(os.listdir(folder))
        self._count = next(n for n in range(len(names) + 1) if self._name(n) not in names)
        while self._count and not self._last_is_whole():
            self._count -= 1

    def state(self) -> State:
        if not self._count:
            return State()
        fields = json.loads(bytes(self._load(self._count - 1)["state"]))
        return State(**fields | {"examples": tuple(fields["examples"])})

    def add(self, arrays: dict[str, np.ndarray], state: State) -> None:
        state_bytes = np.frombuffer(json.dumps(dataclasses.asdict(state)).encode(), np.uint8)
        path = os.path.join(self.folder, self._name(self._count))
        with open(path + ".tmp", "wb") as stream:
            np.savez(stream, state=state_bytes, **arrays)
            sync_file(stream)
        os.replace(path + ".tmp", path)
        sync_folder(self.folder)
        self._count += 1

    def __iter__(self) -> Iterator[dict[str, np.ndarray]]:
        return (self._load(n) for n in range(self._count))

    def _load(self, number: int) -> dict[str, np.ndarray]:
        # Opened here, as numpy leaves a damaged file open.
        with open(os.path.join(self.folder, self._name(number)), "rb") as stream, np.load(stream) as arrays:
            return dict(arrays)

    def _last_is_whole(self) -> bool:
        """A machine that lost power may have kept the name and not the bytes; the archive's checksums tell."""
        try:
            return bool(self._load(self._count - 1))
        except (OSError, ValueError, EOFError, zipfile.BadZipFile):
            return False

    @staticmethod
    def _name(number: int) -> str:
        return f"{number:06d}.npz"


def sync_file(stream) -> None:
    stream.flush()
    os.fsync(stream.fileno())


def sync_folder(folder: str) -> None:
    """Makes renames inside it last."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
