"""What long work says: a bar on a terminal, plain lines elsewhere."""

import contextlib
import sys
import time
from collections.abc import Callable, Iterator

LINE_EVERY = 10.0  # seconds between plain lines


class Progress:
    """`say` takes finished lines; None: standard error, with a bar where that is a terminal."""

    def __init__(self, say: Callable[[str], None] | None = None):
        self._bars = say is None and sys.stderr.isatty()
        self._say = say or (lambda line: print(line, file=sys.stderr, flush=True))

    def note(self, line: str) -> None:
        self._say(line)

    @contextlib.contextmanager
    def counting(self, title: str, total_bytes: int) -> Iterator[Callable[[int, int], None]]:
        """Yields advance(bytes of input, documents). `total_bytes` 0: unknown."""
        if self._bars:
            with self._bar(title, total_bytes) as advance:
                yield advance
        else:
            yield self._lines(title, total_bytes)

    @contextlib.contextmanager
    def _bar(self, title: str, total_bytes: int) -> Iterator[Callable[[int, int], None]]:
        from rich import progress
        from rich.console import Console

        columns = (
            progress.TextColumn("{task.description}"),
            progress.BarColumn(),
            progress.DownloadColumn(),
            progress.TextColumn("{task.fields[rate]}"),
            progress.TimeRemainingColumn(),
        )
        with progress.Progress(*columns, console=Console(stderr=True), transient=True) as bar:
            task = bar.add_task(title, total=total_bytes or None, rate="")
            started, documents = time.monotonic(), 0

            def advance(bytes: int, more_documents: int) -> None:
                nonlocal documents
                documents += more_documents
                rate = documents / max(time.monotonic() - started, 1e-9)
                bar.update(task, advance=bytes, rate=f"{rate:,.0f} documents/s")

            yield advance

    def _lines(self, title: str, total_bytes: int) -> Callable[[int, int], None]:
        started = last = time.monotonic()
        read = documents = 0

        def advance(bytes: int, more_documents: int) -> None:
            nonlocal read, documents, last
            read, documents = read + bytes, documents + more_documents
            now = time.monotonic()
            if now - last < LINE_EVERY:
                return
            last = now
            share = f" ({read / total_bytes:.0%})" if total_bytes else ""
            rate = documents / (now - started)
            self._say(f"{title}: {read / 1e6:,.1f} MB{share}, {documents:,} documents, {rate:,.0f} documents/s")

        return advance
