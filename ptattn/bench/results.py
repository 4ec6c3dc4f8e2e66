"""What was found: rows, their file, speed-ups, and the comparison with an earlier file."""

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
from . import units
from .clocks import Timing
from .workloads import Size

SCHEMA = "ptattn.bench/2"
# What became of a row. FAILED: a wrong result; ERROR: it did not run; REFUSED: a baseline that does
# not take this workload; PREDICTED: not measured, but computed from a model.
OK, FAILED, ERROR, REFUSED = "ok", "FAILED", "ERROR", "refused"
SKIPPED, NOT_REACHED, PREDICTED = "skipped", "not reached", "predicted"
# What a time is: until the result is there, of torch's eager mode, compiled, or as the replay of a
# CUDA graph; or the GPU's alone.
EAGER, COMPILED, GRAPH, GPU_ALONE = "eager", "compiled", "CUDA graph", "GPU alone"
# A median must also be this much above the earlier one to count as slower.
SLOWER = 1.03
EQUAL_PARAMETERS = 0.1  # relative difference
BUSY = 0.5  # cores that others keep busy, from which on times are worth doubting


@dataclass
class Row:
    """One implementation of one workload in one task and mode; times in seconds, memory in bytes.

    It is a candidate, which is this library's, or a baseline.
    """

    workload: str
    task: str
    name: str
    model: str  # implementations of one model compute the same, and the fastest stands for it
    baseline: bool = False
    mode: str = EAGER
    quantized: bool = False  # compares with others that are
    status: str = OK
    note: str = ""
    tokens: int = 0  # of all samples
    timing: Timing | None = None
    floor: float | None = None
    peak: int | None = None
    error: float | None = None
    facts: dict[str, Any] = field(default_factory=dict)  # of the workload

    @property
    def seconds(self) -> float | None:
        return self.timing.median if self.timing else None

    @property
    def share(self) -> float | None:
        """The floor over the time."""
        return self.floor / self.timing.median if self.floor and self.timing else None

    @property
    def size(self) -> str:
        """Of a model's images or video."""
        return str(Size(self.facts["side"], self.facts["frames"]))

    @property
    def whole(self) -> float | None:
        """Seconds of the model that the row's block or model belongs to: of all its blocks."""
        known = self.facts
        return self.seconds and self.seconds * known["depth"] / known["blocks"]


@dataclass
class Result:
    """A run: what was measured, how, on what."""

    kind: str  # compare, ops, block, model, memory, predict, gpu
    settings: dict[str, Any]
    rates: dict[str, float]
    command: str
    date: str
    environment: dict[str, Any] = field(default_factory=environment.describe)
    rows: list[Row] = field(default_factory=list)
    findings: list[str] = field(default_factory=list)
    seconds: float = 0.0  # that measuring took
    interrupted: bool = False

    def to_json(self) -> str:
        fields = {"schema": SCHEMA, **dataclasses.asdict(self)}
        return json.dumps(fields, indent=1, ensure_ascii=False, allow_nan=False) + "\n"

    @property
    def where(self) -> str:
        """What ran it, in short."""
        known, used = self.environment, self.settings
        if "predicted_for" in used:
            return f"predicted for {used['predicted_for']}"
        if used["device"] == "cuda":
            return str(known["gpus"][0])
        threads = known["threads"]
        return f"{known['cpu']}, {threads} thread{'' if threads == 1 else 's'}"

    @property
    def machine(self) -> str:
        """One line: what the times depend on."""
        known, used = self.environment, self.settings
        commit = "not a checkout" if known["commit"] is None else _short(known["commit"])
        busy = (known["load"] or 0) >= BUSY and "predicted_for" not in used
        memory = "" if known["memory"] is None else f", {units.memory(known['memory'])}"
        return (
            f"{self.where}{memory if used['device'] == 'cpu' else ''}; ptattn {known['ptattn']} "
            f"({commit}), torch {known['torch']}, triton {known['triton'] or 'none'}, Python "
            f"{known['python']}; {used['dtype']}, backend {used.get('backend', 'triton')}; "
            f"{self.date[:10]}" + (f"; load {known['load']:.1f} at the start" if busy else "")
        )


def _short(commit: str) -> str:
    return commit[:10] + ("-dirty" if commit.endswith("-dirty") else "")


def load(path: Path) -> Result:
    """Read a file of `Result.to_json`.

    Raises:
        UsageError: no such file, no JSON, another schema, or fields missing.
    """
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UsageError(f"cannot read {path}: {error}") from None
    schema = fields.get("schema") if isinstance(fields, dict) else None
    if schema != SCHEMA:
        raise UsageError(
            f"{path} must be a result of `ptattn`, schema {SCHEMA}; got schema {schema!r}"
        )
    del fields["schema"]
    try:
        fields["rows"] = [_row(row) for row in fields["rows"]]
        return Result(**fields)
    except (KeyError, TypeError) as error:
        raise UsageError(f"{path} is damaged: {type(error).__name__}: {error}") from None


def _row(fields: dict[str, Any]) -> Row:
    timing = fields["timing"]
    return Row(**{**fields, "timing": Timing(**timing) if timing else None})


def check_comparable(old: Result, new: Result) -> None:
    """Raise UsageError unless times of the two say something about each other."""
    for what, theirs, ours in (
        ("kind", old.kind, new.kind),
        ("device", old.where, new.where),
        ("dtype", old.settings["dtype"], new.settings["dtype"]),
        ("threads", old.environment["threads"], new.environment["threads"]),
    ):
        if what == "threads" and "predicted_for" in new.settings:
            continue
        if theirs != ours:
            raise UsageError(f"argument --against: its {what} is {theirs!r}, of this run {ours!r}")


def regressions(old: Result, new: Result) -> tuple[list[str], int]:
    """Candidates that became worse beyond noise, in words, and how many rows both results have.

    Slower beyond noise: the 20th percentile lies above the earlier 80th, and the median is at least
    3 % above the earlier one. Of memory, which has no noise: a peak 3 % above the earlier one. A
    row that was well and has a wrong result or an error now counts too.
    """
    before = {
        _key(row): row for row in old.rows if not row.baseline and row.status in (OK, PREDICTED)
    }
    after = {_key(row): row for row in new.rows if not row.baseline}
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


def _key(row: Row) -> tuple[str, str, str, str]:
    return row.workload, row.task, row.name, row.mode


Groups = dict[tuple[str, ...], list[Row]]


def groups(rows: Iterable[Row], *by: str) -> Groups:
    """The rows that are equal in `by`, by default in workload and task."""
    found: Groups = {}
    for row in rows:
        key = tuple(getattr(row, name) for name in by or ("workload", "task"))
        found.setdefault(key, []).append(row)
    return found


def fastest(rows: Iterable[Row], model: str, mode: str, *, quantized: bool = False) -> Row | None:
    """Of the rows with a time, the fastest of a model in a mode."""
    wanted = model, mode, quantized
    own = [row for row in rows if (row.model, row.mode, row.quantized) == wanted and row.timing]
    return min(own, key=lambda row: row.seconds or 0.0, default=None)


def speedup(row: Row, group: Iterable[Row], model: str) -> float | None:
    """How many times as long as a candidate a baseline takes at its fastest, in the same mode;
    None unless both have a time and models of one width, or of as many parameters."""
    best = fastest(group, model, row.mode, quantized=row.quantized)
    if row.baseline or best is None or not best.seconds or not row.seconds:
        return None
    if "width" in row.facts:
        if equal(row, best) is None:
            return None
        return (best.whole or 0.0) / (row.whole or 1.0)
    return best.seconds / row.seconds


def equal(a: Row, b: Row) -> str | None:
    """In what two models are equal, if in anything."""
    if a.facts["width"] == b.facts["width"]:
        return "width"
    near = abs(a.facts["parameters"] / b.facts["parameters"] - 1) <= EQUAL_PARAMETERS
    return "parameters" if near else None


def summary(rows: Sequence[Row]) -> str:
    count = Counter(row.status for row in rows)
    return ", ".join(f"{number} {status}" for status, number in count.items())


def omissions(rows: Sequence[Row]) -> list[str]:
    """What was not measured, and why: each reason once."""
    reasons: dict[tuple[str, str, str], list[str]] = {}
    for row in rows:
        if row.status not in (OK, PREDICTED):
            where = f"{row.workload} {row.task}"
            reasons.setdefault((row.name, row.status, row.note), []).append(where)
    lines = []
    for (who, status, note), places in reasons.items():
        more = f" and {len(places) - 1} more" if len(places) > 1 else ""
        lines.append(f"{who} {status}: {places[0]}{more}" + (f": {note}" if note else ""))
    return lines


def status(rows: Sequence[Row]) -> int:
    """The exit status: 1 where a candidate is wrong or did not run."""
    return int(any(row.status in (FAILED, ERROR) for row in rows if not row.baseline))
