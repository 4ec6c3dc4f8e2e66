"""From rows to files and a table: what every command of `ptattn` that measures ends with."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

from .. import files
from ..command_line import UsageError, console
from . import findings, harness, plots, results, tables
from .harness import Bench, Runner, Workload
from .memory import KIND
from .progress import Progress
from .results import Result, Row

WRITE_EVERY = 30.0  # seconds: what a run leaves behind that is killed


def carry_out(
    done: Result,
    workloads: Sequence[Workload],
    bench: Bench,
    out: Path,
    against: Result | None = None,
    notes: Sequence[str] = (),
    run: Runner = harness.run_here,
) -> int:
    """Measure, write OUT/KIND.json, .md and pictures whatever ends the run, print them.

    Args:
        done: a result without rows yet.
        against: an earlier result that this one is compared with.
        notes: paragraphs above the table, in place of how times are measured.
        run: measures one of the workloads; in this process by default.

    Returns:
        The exit code: 1 if a candidate is wrong, does not run, or is slower than in `against`
        beyond noise; 130 after Ctrl-C, which before the first time leaves all files alone.
    """
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
        with Progress(len(workloads), keep) as progress:
            harness.measure(workloads, bench, progress, found, run)
    except KeyboardInterrupt:
        done.interrupted = True
    finally:
        gather()
        done.seconds = time.monotonic() - begin
        done.findings = findings.sentences(done)
        names = _write(done, out, notes) if _found(done) or not done.interrupted else ""
    if not names:
        return 130
    tables.show(done, console(), notes)
    print(f"Written to {out}/ ({names}).")
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
    """Say what became worse; 1 if anything did."""
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
        raise UsageError("argument --against: the two results have no row in common")
    return int(bool(worse))
