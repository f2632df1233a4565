"""How far an evaluation is."""

from __future__ import annotations

import time

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn


class CellProgress:
    """Rich bar of the running cell with rate and time left; without a terminal, one line a cell.

    verb: what is being done, "scoring".
    """

    def __init__(self, verb: str, enabled: bool) -> None:
        self._console = Console(stderr=True, quiet=not enabled)
        self._bar = Progress(
            TextColumn(f"[bold]{verb}[/] {{task.description}}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[rate]}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=self._console,
            disable=not (enabled and self._console.is_terminal),
            transient=True,
        )
        self._task = self._bar.add_task("", total=None, rate="")
        self._clock = 0.0
        self._tokens = 0

    def __enter__(self) -> CellProgress:
        self._bar.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._bar.stop()

    def start(self, text: str, total: int, done: int = 0) -> None:
        """The next cell, of `total` samples or answers, `done` of them by an earlier attempt."""
        self._clock, self._tokens = time.perf_counter(), 0
        self._bar.reset(self._task, description=text, total=total, completed=done, rate="")

    def advance(self, done: int, tokens: int) -> None:
        """`done` more of the cell, and the tokens that they took."""
        self._tokens += tokens
        rate = self._tokens / max(time.perf_counter() - self._clock, 1e-9)
        self._bar.update(self._task, advance=done, rate=f"{rate:,.0f} tokens/s")

    def finish(self, text: str) -> None:
        """Leave a line that says what came out."""
        self._console.print(text, highlight=False)
