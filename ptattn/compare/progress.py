"""Progress on stderr: a bar with the time left on a terminal, else a line per case."""

from __future__ import annotations

import time
from statistics import median

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, ProgressColumn, Task, TextColumn
from rich.progress import Progress as Bar
from rich.text import Text

from . import units
from .cases import Entry
from .runner import Outcome


class Progress:
    """What `runner.run` reports to, within a `with` statement."""

    def __init__(self, total: int) -> None:
        self._console = Console(stderr=True)
        self._bar = Bar(
            TextColumn("{task.description:24}"),
            BarColumn(),
            MofNCompleteColumn(),
            _Left(),
            console=self._console,
            transient=True,
            disable=not self._console.is_terminal,
        )
        self._task = self._bar.add_task("starting", total=total, until=None)
        self._done, self._total = 0, total

    def __enter__(self) -> Progress:
        self._bar.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._bar.stop()

    def start(self, entry: Entry, left: float) -> None:
        until = time.monotonic() + left
        self._bar.update(self._task, description=f"{entry.name} {entry.size}", until=until)

    def finish(self, entry: Entry, outcome: Outcome) -> None:
        self._bar.advance(self._task)
        self._done += 1
        if not self._console.is_terminal:
            what = f"skipped: {outcome.skipped}"
            if outcome.seconds:
                what = f"{units.seconds(median(outcome.seconds))} ({len(outcome.seconds)} runs)"
            line = f"[{self._done}/{self._total}] {entry.name} {entry.size}: {what}"
            self._console.print(line, markup=False, highlight=False, soft_wrap=True)


class _Left(ProgressColumn):
    """Counts down the time that all cases are expected to take."""

    def render(self, task: Task) -> Text:
        until = task.fields["until"]
        if until is None:
            return Text("")
        return Text(f"about {max(0, until - time.monotonic()):.0f} s left")
