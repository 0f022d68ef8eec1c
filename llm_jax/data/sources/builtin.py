"""Corpora that every machine has: the sources of Python's standard library and of the packages that this one stands
on, and a small synthetic one."""

import importlib.util
import os
import random
import re
import sysconfig
from collections.abc import Iterator

from llm_jax.data.sources.documents import Document
from llm_jax.errors import DataError

# ------------------------------------------------------------------------------------------ Python's own sources

_SKIPPED_FOLDERS = {
    "site-packages", "dist-packages", "__pycache__", "test", "tests", "idle_test", "encodings", "pydoc_data", "msilib",
    "__phello__", "lib-dynload",
}  # fmt: skip
# Tables, machine-made files, and what differs from one installation to the next.
_SKIPPED_FILES = {
    "keyword.py", "opcode.py", "_opcode_metadata.py", "token.py", "stringprep.py", "html/entities.py",
    "__phello__.foo.py", "sitecustomize.py", "usercustomize.py",
}  # fmt: skip


# What this package needs is there; with scipy, which jax needs, its docstrings are six times those of the library.
PACKAGES = ("flax", "jax", "numpy", "optax", "orbax", "scipy")


def standard_library() -> list[tuple[str, str]]:
    """Path and name of its source files in order, without tests, tables and installed packages."""
    root = sysconfig.get_path("stdlib")
    files = _source_files(root)
    if not files:
        raise DataError(f"This Python has no source files of its standard library in {root}: set data.path to a text.")
    return [(path, name) for path, name in files if name not in _SKIPPED_FILES]


def packages() -> list[tuple[str, str]]:
    """Path and name of the source files of PACKAGES in order, without tests."""
    test = re.compile(r"(^|/)(test_[^/]*|testing|[^/]*_test\.py)(/|$)")
    found = []
    for package in PACKAGES:
        spec = importlib.util.find_spec(package)
        for root in (spec and spec.submodule_search_locations) or ():
            found += [(path, f"{package}/{name}") for path, name in _source_files(root) if not test.search(name)]
    return found


def _source_files(root: str) -> list[tuple[str, str]]:
    names = []
    for folder, folders, files in os.walk(root):
        folders[:] = [f for f in folders if f not in _SKIPPED_FOLDERS and not f.startswith("config-")]
        inside = os.path.relpath(folder, root)
        names += [os.path.normpath(os.path.join(inside, f)) for f in files if f.endswith(".py")]
    return [(os.path.join(root, n), n) for n in sorted(names) if not n.startswith("_sysconfigdata")]


def module_group(name: str) -> str:
    """What stays on one side of the split: a module of the standard library with all below it, a file of a package."""
    whole = name.removesuffix(".py")
    first = whole.split("/")[0]
    return whole if first in PACKAGES else first


# ------------------------------------------------------------------------------------------------- synthetic

SYNTHETIC_VERSION = 1  # goes up when the text changes
SYNTHETIC_BYTES = 1_000_000

_NAMES = (
    "Ada", "Ben", "Cleo", "Dan", "Eva", "Finn", "Gus", "Hana", "Ivan", "Jo", "Kim", "Lena", "Milo", "Nora", "Otto",
    "Pia",
)  # fmt: skip
_THINGS = (
    "apples", "books", "coins", "drums", "eggs", "flags", "keys", "lamps", "maps", "nuts", "pens", "rings",
    "shells", "stones", "stamps", "toys",
)  # fmt: skip
_PLACES = (
    "barn", "cabin", "garden", "harbour", "kitchen", "library", "market", "meadow", "school", "station", "tower",
    "village",
)  # fmt: skip


def read_synthetic(start: int) -> Iterator[tuple[int, Document]]:
    """Little stories that add and subtract: names, things and sums come back, so that there is much to learn."""
    # Only random() is promised to give the same numbers in every version of Python.
    draw = random.Random(0).random
    total = number = 0
    while total < SYNTHETIC_BYTES:
        text = _story(draw)
        total += len(text)
        number += 1
        if number > start:
            yield number, Document(f"synthetic:{number}", f"synthetic:{number}", text=text)


def _story(draw) -> str:
    def pick(choices):
        return choices[int(draw() * len(choices))]

    first, second = pick(_NAMES), pick(_NAMES[:-1])
    if second == first:
        second = _NAMES[-1]
    thing, count = pick(_THINGS), int(draw() * 20) + 1
    lines = [f"{first} is in the {pick(_PLACES)} and has {count} {thing}."]
    for _ in range(int(draw() * 5) + 2):
        change = int(draw() * 9) + 1
        if draw() < 0.5:
            count += change
            lines.append(f"{second} gives {first} {change} more, so now {first} has {count} {thing}.")
        elif change <= count:
            count -= change
            lines.append(f"{first} loses {change} in the {pick(_PLACES)}, so now {first} has {count} {thing}.")
        else:
            lines.append(f"{second} asks for {change} {thing}, but {first} has only {count}.")
    lines.append(f"How many {thing} does {first} have? {count}.")
    return "\n".join(lines) + "\n"
