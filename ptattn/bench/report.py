"""From rows to files and a table: what every command of `ptattn` that measures ends with."""

from __future__ import annotations

import argparse
import dataclasses
import math
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TextColumn
from rich.text import Text

from .. import files
from ..command_line import UsageError, console, now, open_folder, require
from . import findings, harness, plots, results, tables, units
from .harness import Bench, Runner, Workload
from .memory import KIND
from .results import NOT_REACHED, OK, Result, Row

# Makes what is measured, and with what, once all that can be wrong has been checked.
Prepare = Callable[[], tuple[Sequence[Workload], Bench]]
WRITE_EVERY = 30.0  # seconds: what a run leaves behind that is killed


def carry_out(
    options: argparse.Namespace,
    command: str,
    known: dict[str, Any],
    prepare: Prepare,
    notes: Sequence[str] = (),
    run: Runner = harness.run_here,
) -> int:
    """Check what can be wrong, measure, write OUT/KIND.json, .md and pictures whatever ends the
    run, and print them.

    Args:
        options: as the parser has them: `kind`, `out`, and of some `against` and `quantize`.
        command: as it was typed.
        known: the settings, as the result has them.
        notes: paragraphs above the table, in place of how times are measured.
        run: measures one of the workloads.

    Returns:
        The exit code: 1 if a candidate is wrong, does not run, or is slower than in the result of
        --against beyond noise; 2 if that has no row in common; 130 after Ctrl-C. Where nothing was
        measured, files are left alone.

    Raises:
        UsageError: a result of --against that cannot be compared with, no torchao for --quantize, a
            folder that cannot be written: nothing has been measured then.
    """
    if getattr(options, "quantize", None):
        require("torchao", install="torchao")
    done, out, against = Result(options.kind, known, {}, command, now()), options.out, None
    if getattr(options, "against", None):
        try:
            against = results.load(options.against)
        except UsageError as error:
            raise UsageError(f"argument --against: {error}") from None
        results.check_comparable(against, done)
    pictures = [name for _, name, _ in plots.pictures(done.kind)]
    open_folder(out, [f"{done.kind}.json", f"{done.kind}.md", *pictures])
    workloads, bench = prepare()
    if bench.rates is not None:
        done.rates.update(dataclasses.asdict(bench.rates))
    begin = written = time.monotonic()
    found: dict[int, list[Row]] = {}

    def gather() -> None:
        done.rows = [row for i in sorted(found) for row in found[i]]

    def keep() -> None:
        nonlocal written
        gather()
        if _found(done) and time.monotonic() - written > WRITE_EVERY:
            _write(done, out, notes)
            written = time.monotonic()

    try:
        with _Progress(len(workloads), keep) as progress:
            harness.measure(workloads, bench, progress, found, run)
    except KeyboardInterrupt:
        done.interrupted = True
    finally:
        gather()
        done.seconds = time.monotonic() - begin
        done.findings = findings.sentences(done)
        names = _write(done, out, notes) if _found(done) else ""
    if done.interrupted and not names:
        return 130
    tables.show(done, console(), notes)
    print(f"Written to {out}/ ({names})." if names else "Nothing was measured, nothing is written.")
    worse = 0 if against is None else _compare(against, done)
    return 130 if done.interrupted else max(worse, results.status(done.rows))


def _found(done: Result) -> bool:
    return any(row.timing or row.peak for row in done.rows)


def _write(done: Result, out: Path, notes: Sequence[str]) -> str:
    """The names of the files."""
    text, pictures = tables.markdown(done, notes), plots.draw(done)
    for caption, name, picture in pictures:
        text += f"\n![{caption}]({name})\n"
        files.write(picture, out / name)
    drawn = {name for _, name, _ in pictures}
    for _, name, _ in plots.pictures(done.kind):
        if name not in drawn:  # an earlier run's, which would contradict the table
            (out / name).unlink(missing_ok=True)
    files.write(done.to_json(), out / f"{done.kind}.json")
    files.write(text, out / f"{done.kind}.md")
    names = [f"{done.kind}.json", f"{done.kind}.md", *(name for _, name, _ in pictures)]
    return ", ".join(names)


def _compare(old: Result, new: Result) -> int:
    """Say what became worse: 1 if anything did, 2 if there is nothing to compare with."""
    worse, common = results.regressions(old, new)
    more = f"{results.SLOWER - 1:.0%}"
    rule = (
        f"{more} more memory"
        if new.kind == KIND
        else f"20th percentile above the earlier 80th and median {more} up"
    )
    print(
        f"\nAgainst {old.command} of {old.date[:10]}: {len(worse)} of {common} results are worse "
        f"beyond noise ({rule})."
    )
    for line in worse:
        print(f"- {line}")
    if not common and not worse:
        print("argument --against: the two results have no row in common", file=sys.stderr)
        return 2
    return int(bool(worse))


# On stderr: a line per row, and on a terminal a bar with the time left.


class _Progress:
    """Of so many workloads, within a `with` statement; `keep` is called after each of them."""

    def __init__(self, total: int, keep: Callable[[], None]) -> None:
        self._keep = keep
        self._console = Console(stderr=True)
        self._bar = Progress(
            TextColumn("{task.description:24}"),
            BarColumn(),
            MofNCompleteColumn(),
            _Left(),
            console=self._console,
            transient=True,
            disable=not self._console.is_terminal,
        )
        self._task = self._bar.add_task("starting", total=total, until=None)

    def __enter__(self) -> _Progress:
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
                self._console.print(_line(row), markup=False, highlight=False, soft_wrap=True)
        self._keep()


def _line(row: Row) -> str:
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
