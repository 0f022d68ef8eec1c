"""Compiles the best candidates side by side and ranks them by the compiled step."""

import contextlib
import dataclasses
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence

from llm_jax.errors import UserError
from llm_jax.plan.candidates import Candidate
from llm_jax.plan.compile import POLL, Job
from llm_jax.plan.estimate import Estimate, estimate_compiled

AT_ONCE = 2  # compilers side by side; each wants a core and some gigabytes


@dataclasses.dataclass(frozen=True)
class Tried:
    """A candidate with what came of it: an estimate, or why there is none."""

    candidate: Candidate
    found: Estimate | None
    why_not: str = ""


def try_all(chosen: Sequence[Candidate]) -> list[Tried]:
    """Compile them, some at a time; those that fit come first, the fastest of them foremost."""
    with counting(len(chosen)) as advance:
        tried = list(compile_all(chosen, advance))

    def place(one: Tried) -> tuple[bool, float]:
        return (one.found is None or not one.found.fits, one.found.times.total if one.found else one.candidate.seconds)

    return sorted(tried, key=place)


def compile_all(chosen: Sequence[Candidate], advance: Callable[[str], None]) -> Iterator[Tried]:
    waiting, running = list(chosen), []
    limit = max(min(AT_ONCE, os.cpu_count() or 1), 1)
    try:
        while waiting or running:
            while waiting and len(running) < limit:
                candidate = waiting.pop(0)
                running.append((candidate, Job(candidate.setting)))
            for pair in list(running):
                if (tried := outcome(*pair)) is not None:
                    running.remove(pair)
                    advance(describe(tried))
                    yield tried
            time.sleep(POLL)
    finally:
        for _, job in running:
            job.stop()


def outcome(candidate: Candidate, job: Job) -> Tried | None:
    """None while it is being compiled."""
    try:
        if not job.poll():
            return None
        compiled = job.result()
    except UserError as error:
        return Tried(candidate, None, str(error))
    if compiled.refused:
        return Tried(candidate, None, "does not fit")
    found = estimate_compiled(candidate.setting, compiled)
    return Tried(candidate, found, "" if found.fits else "does not fit")


def describe(tried: Tried) -> str:
    return f"{tried.found.times.total:.3f} s a step" if tried.found and not tried.why_not else tried.why_not


@contextlib.contextmanager
def counting(total: int) -> Iterator[Callable[[str], None]]:
    """Yields advance(what came of one): a bar on a terminal, plain lines elsewhere."""
    if not sys.stderr.isatty():
        done = iter(range(1, total + 1))
        yield lambda words: print(f"compiled {next(done)} of {total}: {words}", file=sys.stderr, flush=True)
        return
    from rich import progress
    from rich.console import Console

    columns = (progress.TextColumn("{task.description}"), progress.BarColumn(), progress.MofNCompleteColumn(),
               progress.TimeElapsedColumn())  # fmt: skip
    with progress.Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("compiling candidates", total=total)
        yield lambda words: bar.update(task, advance=1, description=f"compiling candidates (last: {words})")
