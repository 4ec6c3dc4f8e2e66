"""A run from its rows to its files: what `ptattn bench` and benchmarks.gpu have in common."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path

from .. import files
from ..command_line import UsageError, console
from . import plots, result, tables, targets
from .memory import KIND
from .result import NOT_REACHED, Result, Row

WRITE_EVERY = 30.0  # seconds: what a run leaves behind that is killed


def carry_out(
    done: Result,
    found: Iterable[list[Row]],
    out: Path,
    against: Result | None = None,
    notes: Sequence[str] = (),
) -> int:
    """Gather the rows, write OUT/KIND.json, .md and .png whatever ends the run, print them.

    Args:
        done: a result without rows yet.
        found: the rows as they come; Ctrl-C ends them.
        against: an earlier result that this one is compared with.
        notes: paragraphs above the table, in place of how times are measured.

    Returns:
        The exit code: 1 if something of ours is wrong, does not run, or is slower than in `against`
        beyond noise; 130 after Ctrl-C.
    """
    interrupted = False
    try:
        for rows in _written_now_and_then(done, found, out, notes):
            for row in rows:
                if row.status != NOT_REACHED:
                    print(tables.line(row), file=sys.stderr, flush=True)
    except KeyboardInterrupt:
        interrupted = True
    finally:
        done.verdicts = targets.verdicts(done)
        drawn = _write(done, out, notes)
    tables.show(done, console(), notes)
    print(f"Written to {out}/ ({done.kind}.json, .md" + (", .png)." if drawn else ")."))
    slower = 0 if against is None else _compare(against, done)
    return 130 if interrupted else max(slower, result.status(done.rows))


def _written_now_and_then(
    done: Result, found: Iterable[list[Row]], out: Path, notes: Sequence[str]
) -> Iterator[list[Row]]:
    written = time.monotonic()
    for rows in found:
        done.rows += rows
        yield rows
        if time.monotonic() - written > WRITE_EVERY:
            _write(done, out, notes)
            written = time.monotonic()


def _write(done: Result, out: Path, notes: Sequence[str]) -> bool:
    """Whether there is a picture."""
    text, picture = tables.markdown(done, notes), plots.draw(done)
    if picture:
        caption, png = picture
        text += f"\n![{caption}]({done.kind}.png)\n"
        files.write(png, out / f"{done.kind}.png")
    else:  # that of an earlier run would contradict the table
        with suppress(FileNotFoundError):
            (out / f"{done.kind}.png").unlink()
    files.write(done.to_json(), out / f"{done.kind}.json")
    files.write(text, out / f"{done.kind}.md")
    return picture is not None


def _compare(old: Result, new: Result) -> int:
    """Say what became worse; 1 if anything did."""
    worse, common = result.regressions(old, new)
    more = f"{result.SLOWER - 1:.0%}"
    rule = (
        f"{more} more memory"
        if new.kind == KIND
        else f"20th percentile above the earlier 80th and median {more} up"
    )
    print(
        f"\nAgainst {old.command} of {old.date[:10]}: {len(worse)} of {common} results of ours are "
        f"worse beyond noise ({rule})."
    )
    for line in worse:
        print(f"- {line}")
    if not common and not worse:
        raise UsageError("argument --against: the two results have no row in common")
    return int(bool(worse))
