"""What a long conversion says, in bytes and tensors."""

import contextlib
import sys
import time
from collections.abc import Callable, Iterator

LINE_EVERY = 10.0  # seconds between plain lines


@contextlib.contextmanager
def told(title: str, total: int) -> Iterator[Callable[[int, int], None]]:
    """Yields advance(bytes, tensors): a bar on a terminal, plain lines elsewhere."""
    if sys.stderr.isatty():
        with bar(title, total) as advance:
            yield advance
        return
    last, done, tensors = time.monotonic(), 0, 0

    def advance(more: int, more_tensors: int) -> None:
        nonlocal last, done, tensors
        done, tensors = done + more, tensors + more_tensors
        if time.monotonic() - last >= LINE_EVERY:
            last = time.monotonic()
            line = f"{title}: {done / 1e6:,.1f} of {total / 1e6:,.1f} MB, {tensors:,} tensors"
            print(line, file=sys.stderr, flush=True)

    yield advance


@contextlib.contextmanager
def bar(title: str, total: int) -> Iterator[Callable[[int, int], None]]:
    from rich import progress
    from rich.console import Console

    columns = (
        progress.TextColumn("{task.description}"),
        progress.BarColumn(),
        progress.DownloadColumn(),
        progress.TransferSpeedColumn(),
        progress.TextColumn("{task.fields[tensors]} tensors"),
        progress.TimeRemainingColumn(),
    )
    with progress.Progress(*columns, console=Console(stderr=True), transient=True) as shown:
        task, tensors = shown.add_task(title, total=total, tensors=0), 0

        def advance(more: int, more_tensors: int) -> None:
            nonlocal tensors
            tensors += more_tensors
            shown.update(task, advance=more, tensors=tensors)

        yield advance
