"""The whole equivalence matrix: every mesh with every combination, against one device in float64.

    python -m benchmarks.equivalence [--parts=NAME,NAME] [--jobs=2] [--only=TEXT] [--results=FILE] [--table=FILE]

`tests/equivalence.py` and `tests/encoder_cells.py` say what a cell is and how it is compared; the tests run a covering
array of the same cells. Each worker is a process with eight fake CPU devices. A finished cell is a line of the results
file (JSON), with a hash of the code that it ran: a run that was stopped goes on where it stood, and cells of other code
are run again. At the end the table is written from all lines of the present code; it has three parts (`matrix`,
`families`, `encoders`), and those that were not asked for stay as they are. About an hour on one free core.
"""

import argparse
import concurrent.futures
import contextlib
import dataclasses
import hashlib
import json
import multiprocessing
import os
import re
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests"))
os.environ["JAX_PLATFORMS"] = "cpu"  # before anything imports jax, here and in the workers
os.environ.setdefault("NPROC", "8")  # XLA's CPU collectives need a thread for each fake device

import jax  # noqa: E402
import rich.progress  # noqa: E402
from encoder_cells import CELLS, EncoderCell, measure_encoder  # noqa: E402
from equivalence import (  # noqa: E402
    DEVICES,
    FAMILIES,
    GRADIENT_TOLERANCE,
    LENGTH,
    LOSS_TOLERANCE,
    MESHES,
    ROWS,
    Cell,
    covering_array,
    family_cells,
    measure,
    product,
    refusal,
)

CELLS_A_WORKER = 60  # then a new process: compiled programs are never given back to the system
# What a cell runs through; a change elsewhere cannot change a number.
CODE = (
    "llm_jax/config", "llm_jax/kernels", "llm_jax/models", "llm_jax/objectives", "llm_jax/sharding.py",
    "llm_jax/precision.py", "llm_jax/rng.py", "llm_jax/training/step.py", "tests/equivalence.py", "tests/tiny.py",
    "tests/encoder_cells.py", "tests/tiny_encoders.py",
)  # fmt: skip


def code_version() -> str:
    """A hash of the files that the cells run through, and JAX's version."""
    digest = hashlib.sha256(jax.__version__.encode())
    for name in CODE:
        path = ROOT / name
        for file in sorted(path.rglob("*.py")) if path.is_dir() else [path]:
            digest.update(file.relative_to(ROOT).as_posix().encode() + b"\0" + file.read_bytes() + b"\0")
    return digest.hexdigest()[:16]


# ------------------------------------------------------------------------------------------------ running


def prepare_worker() -> None:
    def end_with_parent() -> None:  # a killed parent cannot say that there is no more work
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=end_with_parent, daemon=True).start()
    jax.config.update("jax_num_cpu_devices", DEVICES)
    jax.config.update("jax_numpy_rank_promotion", "raise")


def run(cell: Cell | EncoderCell) -> dict[str, Any]:
    """The cell's record, in a worker."""
    try:
        found = measure_encoder(cell) if isinstance(cell, EncoderCell) else measure(cell)
        record = dataclasses.asdict(found) | {"passed": found.equal}
    except Exception as error:  # a crash is a result: the others go on
        record = {"passed": False, "error": f"{type(error).__name__}: {error}"[:2000]}
    jax.clear_caches()
    return {"cell": str(cell), **record}


def read(path: Path, code: str) -> dict[str, dict[str, Any]]:
    """Records of the present code by cell. A line that was cut off as it was written is none."""
    records = {}
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        with contextlib.suppress(json.JSONDecodeError):
            record = json.loads(line)
            if record["code"] == code:
                records[record["cell"]] = record
    return records


def run_all(cells: list[Cell], path: Path, code: str, jobs: int) -> None:
    """Runs `cells` and adds a line for each to the results file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    size = jobs * CELLS_A_WORKER
    with path.open("a", encoding="utf-8") as file, progress(len(cells)) as tell:
        for first in range(0, len(cells), size):
            for record in run_some(cells[first : first + size], jobs):
                file.write(json.dumps(record | {"code": code}) + "\n")
                file.flush()
                tell(record)


def run_some(cells: list[Cell], jobs: int) -> Iterator[dict[str, Any]]:
    """In workers of their own; the executor's own way of replacing workers can stop for good (Python 3.12.1)."""
    pool = concurrent.futures.ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn"), prepare_worker)
    try:
        for done in concurrent.futures.as_completed([pool.submit(run, cell) for cell in cells]):
            yield done.result()
    except concurrent.futures.process.BrokenProcessPool:
        raise SystemExit("error: a worker process died; run again with --jobs=1 to see in which cell.") from None
    finally:
        pool.shutdown(cancel_futures=True)


def in_words(record: dict[str, Any]) -> str:
    if "error" in record:
        return f"FAILED {record['cell']}: {record['error'].splitlines()[0]}"
    figures = f"loss {record['loss_error']:.1e}, gradients {record['gradient_error']:.1e}, {record['seconds']:.1f} s"
    complaint = "".join(f"; {line}" for line in record["complaints"][:1])
    return f"{'equal' if record['passed'] else 'FAILED'} {record['cell']}: {figures}{complaint}"


@contextlib.contextmanager
def progress(total: int) -> Iterator[Callable[[dict[str, Any]], None]]:
    """A bar on a terminal, with failures above it; elsewhere a line for each cell."""
    if not sys.stdout.isatty():
        count = iter(range(1, total + 1))
        yield lambda record: print(f"[{next(count)}/{total}] {in_words(record)}", flush=True)
        return
    columns = (*rich.progress.Progress.get_default_columns(), rich.progress.MofNCompleteColumn())
    with rich.progress.Progress(*columns) as bar:
        task = bar.add_task("cells", total=total)

        def tell(record: dict[str, Any]) -> None:
            if not record["passed"]:
                bar.console.print(in_words(record), markup=False, highlight=False)
            bar.advance(task)

        yield tell


# ------------------------------------------------------------------------------------------------ the table

TABLE = """\
# Any mesh, any combination, equal to one device

    python -m benchmarks.equivalence

Every mesh of {devices} fake CPU devices with each of 32 combinations: rows packed or not, accumulation 1 or 4,
layers scanned or not, the loss in chunks or not, a dense MLP or a mixture of experts. Each is the gradient of a whole
training batch ({rows} rows of {length} tokens) in float64, with z-loss, label smoothing and the router's terms, against
one plain program on one device: no mesh, one batch, reference attention, all the logits at once. By turns: both shapes
of a pair (2 x 4, 4 x 2), pipelines of one round and of two, dropless experts and experts with a capacity.

**{passed} cells are equal, {failed} are not, {refused} are refused when the config is read{missing}.** The largest
error of a loss is {loss} (allowed {loss_allowed:.0e}), of a gradient {gradient} (allowed {gradient_allowed:.0e}).

The loss's error is relative, the largest of its terms and their sum; a gradient's is the norm of its difference over
the norm of all gradients, the largest of all parameters. A cell in which XLA had to replicate a tensor ("involuntary
full rematerialization") would count as unequal.

| mesh | equal | refused | largest error of a loss | of a gradient |
|---|---|---|---|---|
{table}

{notes}
Cell by cell: `=` equal, `x` not equal, `-` refused, `.` not run.

```
{grid}
```

{versions}
"""

FAMILY_TABLE = """\
## Families

On each mesh one cell of every family's own layers (`FAMILIES` of `tests/equivalence.py`), the other levels by turns:
packed or not, accumulation 1 or 4, scanned or not, all logits or in chunks. Pipelines have 8 to 26 layers, of one round
or two. The largest error of a gradient:

| mesh | {families} |
|---|{lines}
{rows}

{versions}
"""

ENCODER_TABLE = """\
## Encoders

BERT with masked tokens and pairs of texts, and what each cell names besides (`tests/encoder_cells.py`): packed texts,
dropout where it is named, one micro-batch or two, against one plain program on one device in float64.

| cell | error of a loss | of a gradient |
|---|---|---|
{rows}

{versions}
"""


def versions() -> str:
    return f"jax {jax.__version__}, Python {sys.version_info[0]}.{sys.version_info[1]}."


def matrix_text(records: dict[str, dict[str, Any]]) -> str:
    """Markdown: a row for each mesh, its 32 combinations summed up."""
    cells, notes = product(), Notes()
    by_mesh = {mesh: [cell for cell in cells if cell.mesh == mesh] for mesh in MESHES}
    rows = [row(mesh, by_mesh[mesh], records, notes) for mesh in MESHES]
    found = [records[str(cell)] for cell in cells if str(cell) in records]
    passed = [record for record in found if record["passed"]]
    refused = sum(bool(refusal(cell)) for cell in cells)
    missing = len(cells) - refused - len(found)
    return TABLE.format(
        devices=DEVICES,
        rows=ROWS,
        length=LENGTH,
        passed=len(passed),
        failed=len(found) - len(passed),
        refused=refused,
        missing=f", {missing} were not run yet" if missing else "",
        loss=largest(passed, "loss_error"),
        loss_allowed=LOSS_TOLERANCE,
        gradient=largest(passed, "gradient_error"),
        gradient_allowed=GRADIENT_TOLERANCE,
        table="\n".join(rows),
        grid="\n".join(grid(by_mesh, records)),
        notes="\n".join([*notes.lines(), *failures(found)]),
        versions=versions(),
    )


class Notes:
    """Reasons of refusals, each under a letter: the key, and the message of the first cell."""

    def __init__(self) -> None:
        self._messages: dict[str, str] = {}

    def letter(self, reason: str) -> str:
        key = reason.partition(" = ")[0]
        self._messages.setdefault(key, reason)
        return "abcdefgh"[list(self._messages).index(key)]

    def lines(self) -> list[str]:
        listed = [f"- {self.letter(reason)}: `{reason}`" for reason in self._messages.values()]
        return ["Refused, for example with:", "", *listed, ""]


def row(mesh: tuple[str, ...], cells: list[Cell], records: dict[str, dict[str, Any]], notes: Notes) -> str:
    reasons = [refusal(cell) for cell in cells if refusal(cell)]
    letters = ", ".join(sorted({notes.letter(reason) for reason in reasons}))
    passed = [record for cell in cells if (record := records.get(str(cell))) and record["passed"]]
    equal = f"{len(passed)} of {len(cells) - len(reasons)}"
    refused = f"{len(reasons)} ({letters})" if reasons else ""
    values = (" x ".join(mesh), equal, refused, largest(passed, "loss_error"), largest(passed, "gradient_error"))
    return f"| {' | '.join(values)} |"


def figure(cell: Cell | EncoderCell, records: dict[str, dict[str, Any]], name: str) -> str:
    record = records.get(str(cell))
    return "not run" if record is None else f"{record[name]:.1e}" if record["passed"] else "not equal"


def families_text(records: dict[str, dict[str, Any]]) -> str:
    """For each mesh the error of the gradient in each family's cell."""
    rows = []
    for cells in zip(*map(family_cells, FAMILIES), strict=True):
        errors = [figure(cell, records, "gradient_error") for cell in cells]
        rows.append(f"| {' x '.join(cells[0].mesh)} | {' | '.join(errors)} |")
    families, lines = " | ".join(FAMILIES), "---|" * len(FAMILIES)
    return FAMILY_TABLE.format(families=families, lines=lines, rows="\n".join(rows), versions=versions())


def encoders_text(records: dict[str, dict[str, Any]]) -> str:
    rows = []
    for cell in map(EncoderCell, CELLS):
        errors = [figure(cell, records, name) for name in ("loss_error", "gradient_error")]
        rows.append(f"| {cell.name} | {' | '.join(errors)} |")
    return ENCODER_TABLE.format(rows="\n".join(rows), versions=versions())


def grid(by_mesh: dict[tuple[str, ...], list[Cell]], records: dict[str, dict[str, Any]]) -> list[str]:
    """A line for each mesh with a letter for each of its cells; above, lines that say which is which."""

    def line(name: str, letters: list[str]) -> str:
        groups = ["".join(letters[i : i + 4]) for i in range(0, len(letters), 4)]
        return f"{name:<20} {' '.join(groups)}".rstrip()

    def state(cell: Cell) -> str:
        if refusal(cell):
            return "-"
        record = records.get(str(cell))
        return "." if record is None else "=" if record["passed"] else "x"

    cells = next(iter(by_mesh.values()))
    return [
        line("p: packed", ["p" if cell.packed else " " for cell in cells]),
        line("4: accumulation 4", ["4" if cell.accumulation > 1 else " " for cell in cells]),
        line("s: layers scanned", ["s" if cell.scan else " " for cell in cells]),
        line("c: chunked loss", ["c" if cell.chunked else " " for cell in cells]),
        line("e: experts", ["e" if cell.moe else " " for cell in cells]),
        "",
        *(line(" x ".join(mesh), list(map(state, cells))) for mesh, cells in by_mesh.items()),
    ]


def largest(records: list[dict[str, Any]], name: str) -> str:
    return f"{max(record[name] for record in records):.1e}" if records else "-"


def failures(found: list[dict[str, Any]]) -> list[str]:
    lines = [f"- {in_words(record)}" for record in found if not record["passed"]]
    return ["Not equal:", "", *lines, ""] if lines else []


def matrix_cells() -> list[Cell]:
    """Those that are not refused; the tests' come first, which have all pairs of levels."""
    allowed = [cell for cell in product() if not refusal(cell)]
    return list(dict.fromkeys([*covering_array(allowed), *allowed]))


# The table's parts: what each begins with, its cells, its text.
PARTS: dict[str, tuple[str, Callable[[], list[Any]], Callable[..., str]]] = {
    "matrix": ("# ", matrix_cells, matrix_text),
    "families": ("## Families", lambda: [cell for name in FAMILIES for cell in family_cells(name)], families_text),
    "encoders": ("## Encoders", lambda: list(map(EncoderCell, CELLS)), encoders_text),
}


def write_table(path: Path, records: dict[str, dict[str, Any]], chosen: list[str]) -> None:
    """The table with `chosen` parts of these records, and the others as they stand there."""
    present = path.read_text(encoding="utf-8") if path.exists() else ""
    pieces = re.split(r"^(?=# |## )", present, flags=re.MULTILINE)
    found = []
    for name, (start, _, text) in PARTS.items():
        kept = next((piece for piece in pieces if piece.startswith(start)), "")
        found.append(text(records) if name in chosen else kept)
    path.write_text("\n".join(f"{piece.rstrip()}\n" for piece in found if piece), encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--jobs", type=int, default=2, help="worker processes; one keeps about one core busy")
    parser.add_argument("--parts", default=",".join(PARTS), help="of the table, to be run and written")
    parser.add_argument("--only", default="", help='cells whose name has this text, such as "ring 2 x tensor 4"')
    parser.add_argument("--results", type=Path, default=ROOT / "runs/equivalence.jsonl", help="finished cells")
    parser.add_argument("--table", type=Path, default=ROOT / "benchmarks/equivalence.md", help="where the table goes")
    args = parser.parse_args()

    code, chosen = code_version(), args.parts.split(",")
    if wrong := set(chosen) - set(PARTS):
        parser.error(f"--parts: {', '.join(sorted(wrong))} is none of {', '.join(PARTS)}")
    ordered = [cell for name in chosen for cell in PARTS[name][1]()]
    records = read(args.results, code)
    waiting = [cell for cell in ordered if args.only in str(cell) and str(cell) not in records]
    run_all(waiting, args.results, code, args.jobs)
    records = read(args.results, code)
    write_table(args.table, records, chosen)
    done = [records[str(cell)] for cell in ordered if str(cell) in records]
    failed = sum(not record["passed"] for record in done)
    print(f"{len(done)} of {len(ordered)} cells were run, {failed} are not equal; the table is {args.table}")
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
