"""What a benchmark found: rows, their file, and the comparison with an earlier file."""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .. import environment
from ..command_line import UsageError
from .timing import Timing

SCHEMA = "ptattn.bench/1"
# What became of a row. FAILED: a wrong result; ERROR: it did not run; REFUSED: an opponent that
# does not take this case; PREDICTED: not measured, but computed from a model.
OK, FAILED, ERROR, REFUSED = "ok", "FAILED", "ERROR", "refused"
SKIPPED, NOT_REACHED, PREDICTED = "skipped", "not reached", "predicted"
# A median must also be this much above the earlier one to count as slower.
SLOWER = 1.03
EQUAL_PARAMETERS = 0.2  # relative difference


@dataclass
class Row:
    """One contender in one task of one case; times in seconds, memory in bytes."""

    case: str
    task: str
    contender: str
    model: str  # contenders of one model compute the same, and the fastest stands for it
    ours: bool = False
    status: str = OK
    note: str = ""
    tokens: int = 0  # of all samples
    timing: Timing | None = None
    floor: float | None = None
    peak: int | None = None
    error: float | None = None
    facts: dict[str, Any] = field(default_factory=dict)  # of the case

    @property
    def seconds(self) -> float | None:
        return self.timing.median if self.timing else None

    @property
    def share(self) -> float | None:
        """The floor over the time."""
        return self.floor / self.timing.median if self.floor and self.timing else None


@dataclass
class Result:
    """A run: what was measured, how, on what."""

    kind: str  # ops, block, model, memory, predict, gpu
    settings: dict[str, Any]
    rates: dict[str, float]
    command: str
    date: str
    environment: dict[str, Any] = field(default_factory=environment.describe)
    rows: list[Row] = field(default_factory=list)
    verdicts: list[str] = field(default_factory=list)

    def to_json(self) -> str:
        fields = {"schema": SCHEMA, **dataclasses.asdict(self)}
        return json.dumps(fields, indent=1, ensure_ascii=False, allow_nan=False) + "\n"

    @property
    def machine(self) -> str:
        """One line: what the times depend on."""
        known, used = self.environment, self.settings
        threads = f"{known['cpu']}, {known['threads']} threads"
        if "predicted_for" in used:
            where = f"predicted for {used['predicted_for']}"
        else:
            where = known["gpus"][0] if used["device"] == "cuda" else threads
        commit = known["commit"] or "not a checkout"
        return (
            f"{where}; ptattn {known['ptattn']} ({commit}), torch {known['torch']}, "
            f"{used['dtype']}; {self.date[:10]}"
        )


def load(path: Path) -> Result:
    """Read a file of `Result.to_json`.

    Raises:
        UsageError: no such file, no JSON, or another schema.
    """
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UsageError(f"argument --against: cannot read {path}: {error}") from None
    schema = fields.get("schema") if isinstance(fields, dict) else None
    if schema != SCHEMA:
        raise UsageError(
            f"argument --against: {path} must be a result of `ptattn bench`, schema {SCHEMA}; "
            f"got schema {schema!r}"
        )
    del fields["schema"]
    fields["rows"] = [_row(row) for row in fields["rows"]]
    return Result(**fields)


def _row(fields: dict[str, Any]) -> Row:
    timing = fields["timing"]
    return Row(**{**fields, "timing": Timing(**timing) if timing else None})


def check_comparable(old: Result, new: Result) -> None:
    """Raise UsageError unless times of the two say something about each other."""
    for what, theirs, ours in (
        ("kind", old.kind, new.kind),
        ("device", _device(old), _device(new)),
        ("dtype", old.settings["dtype"], new.settings["dtype"]),
        ("threads", old.environment["threads"], new.environment["threads"]),
    ):
        if theirs != ours:
            raise UsageError(f"argument --against: its {what} is {theirs!r}, of this run {ours!r}")


def _device(result: Result) -> str:
    if "predicted_for" in result.settings:
        return str(result.settings["predicted_for"])
    known = result.environment
    return str(known["gpus"][0] if result.settings["device"] == "cuda" else known["cpu"])


def regressions(old: Result, new: Result) -> tuple[list[str], int]:
    """Our rows that became worse beyond noise, in words, and how many rows both results have.

    Slower beyond noise: the 20th percentile lies above the earlier 80th, and the median is at least
    3 % above the earlier one. Of memory, which has no noise: a peak 3 % above the earlier one. A
    row that was well and has a wrong result or an error now counts too.
    """
    before = {_key(row): row for row in old.rows if row.ours and row.status in (OK, PREDICTED)}
    after = {_key(row): row for row in new.rows if row.ours}
    found, common = [], 0
    for key in before.keys() & after.keys():
        was, now = before[key], after[key]
        name = " ".join(key)
        if now.status in (FAILED, ERROR):
            found.append(f"{name}: {now.status}, {now.note}")
        elif now.timing and was.timing:
            common += 1
            ratio = now.timing.median / was.timing.median
            if now.timing.low > was.timing.high and ratio >= SLOWER:
                found.append(f"{name}: {ratio:.2f} × the earlier time")
        elif now.peak and was.peak:
            common += 1
            if now.peak >= SLOWER * was.peak:
                found.append(f"{name}: {now.peak / was.peak:.2f} × the earlier peak")
    return sorted(found), common


def _key(row: Row) -> tuple[str, str, str]:
    return row.case, row.task, row.contender


def groups(rows: Iterable[Row]) -> dict[tuple[str, str], list[Row]]:
    """The rows of each case and task."""
    found: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        found.setdefault((row.case, row.task), []).append(row)
    return found


def fastest(rows: Iterable[Row], model: str) -> Row | None:
    """Of the rows with a time, the fastest of a model."""
    own = [row for row in rows if row.model == model and row.timing]
    return min(own, key=lambda row: row.seconds or 0.0, default=None)


def comparable(ours: Row, theirs: Row) -> bool:
    """Whether a speed-up says something: models of one width, or of as many parameters."""
    a, b = ours.facts, theirs.facts
    if "width" not in a:
        return True
    return bool(
        a["width"] == b["width"] or abs(a["parameters"] / b["parameters"] - 1) <= EQUAL_PARAMETERS
    )


def summary(rows: Sequence[Row]) -> str:
    count = Counter(row.status for row in rows)
    return ", ".join(f"{number} {status}" for status, number in count.items())


def omissions(rows: Sequence[Row]) -> list[str]:
    """What was not measured, and why: each reason once."""
    reasons: dict[tuple[str, str, str], list[str]] = {}
    for row in rows:
        if row.status not in (OK, PREDICTED):
            who = "" if row.status == NOT_REACHED else row.contender
            where = f"{row.case} {row.task}"
            reasons.setdefault((who, row.status, row.note), []).append(where)
    lines = []
    for (who, status, note), places in reasons.items():
        more = f" and {len(places) - 1} more" if len(places) > 1 else ""
        head = " ".join(filter(None, [who, status]))
        lines.append(f"{head}: {places[0]}{more}" + (f": {note}" if note else ""))
    return lines


def status(rows: Sequence[Row]) -> int:
    """The exit status: 1 where something of ours is wrong or did not run."""
    return int(any(row.status in (FAILED, ERROR) for row in rows if row.ours))
