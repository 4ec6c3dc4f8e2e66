"""Progress on stderr: a line per row, and on a terminal a bar with the time left."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, ProgressColumn, Task, TextColumn
from rich.progress import Progress as Bar
from rich.text import Text

from . import units
from .results import NOT_REACHED, OK, Row


class Progress:
    """Of so many workloads, within a `with` statement; `keep` is called after each of them."""

    def __init__(self, total: int, keep: Callable[[], None]) -> None:
        self._keep = keep
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

    def __enter__(self) -> Progress:
        self._bar.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._bar.stop()

    def start(self, workload: object, left: float) -> None:
        until = time.monotonic() + left if left < math.inf else None
        self._bar.update(self._task, description=str(workload), until=until)

    def finish(self, rows: Sequence[Row]) -> None:
        self._bar.advance(self._task)
        for row in rows:
            if row.status != NOT_REACHED:
                self._console.print(line(row), markup=False, highlight=False, soft_wrap=True)
        self._keep()


def line(row: Row) -> str:
    place = f"{row.workload}  {row.task}  {row.name}"
    if row.timing is None:
        known = row.note if row.peak is None else units.memory(row.peak)
        return f"{place}: {row.status} {known}".rstrip()
    share = "" if row.share is None else f", {row.share:.0%} of floor"
    mode = f"{row.mode} " if row.status == OK else f"{row.status} "
    return f"{place}: {mode}{units.seconds(row.timing.median)}{share}"


class _Left(ProgressColumn):
    """Counts down the time that all workloads are expected to take."""

    def render(self, task: Task) -> Text:
        until = task.fields["until"]
        if until is None:
            return Text("")
        return Text(f"about {max(0, until - time.monotonic()):.0f} s left")
