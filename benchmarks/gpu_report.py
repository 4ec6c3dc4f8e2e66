"""The results as Markdown, and which targets they meet."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.gpu_cases import WINDOWED, Case
from benchmarks.gpu_run import ERROR, FAILED, NOT_REACHED, OK, SKIPPED, Row
from benchmarks.timing import Rates

# A floor below this is of the order of one launch, which no kernel can hide.
LAUNCH_BOUND = 15e-6
COLUMNS = (
    ("Case", "---"), ("Task", "---"), ("Time, µs", "---:"), ("20–80 %", "---:"),
    ("Floor, µs", "---:"), ("÷ floor", "---:"), ("TFLOP/s", "---:"), ("Error ÷ eager", "---:"),
    ("Opponent", "---"), ("Its time, µs", "---:"), ("Speed-up", "---:"), ("Host, µs", "---:"),
)  # fmt: skip


def cells(row: Row) -> list[str]:
    """One line of the table; a row without a time says why."""
    head = [str(row.case), row.task]
    if row.ours is None:
        return [*head, row.status, row.note, *[""] * (len(COLUMNS) - 4)]
    ours, best = row.ours, row.best
    return [
        *head,
        _micro(ours.median),
        f"{_micro(ours.low)}–{_micro(ours.high)}",
        _micro(row.floor),
        f"{row.ratio:.2f}",
        f"{row.rate / 1e12:.0f}" if row.rate else "",
        f"{max(row.errors.values()):.2f}",
        best[0] if best else "none ran",
        _micro(best[1].median) if best else "",
        f"{row.speedup:.2f}×" if best else "",
        _micro(ours.host),
    ]


def table(rows: Sequence[Row]) -> str:
    heads, marks = zip(*COLUMNS, strict=True)
    lines = [heads, marks, *(cells(row) for row in rows if row.status != NOT_REACHED)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def omissions(rows: Sequence[Row]) -> list[str]:
    """What the table does not hold, and which opponents did not run, and why."""
    missing = dict.fromkeys(str(row.case) for row in rows if row.status == NOT_REACHED)
    lines = [f"{len(missing)} cases not reached in time: {', '.join(missing)}"] if missing else []
    refusals: dict[tuple[str, str], list[str]] = {}
    for row in rows:
        for name, reason in row.refused.items():
            refusals.setdefault((name, reason), []).append(f"{row.case} {row.task}")
    for (name, reason), where in refusals.items():
        others = f" and {len(where) - 1} more" if len(where) > 1 else ""
        lines.append(f"{name} did not run for {where[0]}{others}: {reason}")
    return lines


@dataclass(frozen=True)
class Target:
    """What a class of cases is to reach: a ratio to the floor, or a rate in operations per second.

    `concerns` picks the cases.
    """

    name: str
    task: str
    concerns: Callable[[Case], bool]
    ratio: float | None = None
    rate: float | None = None

    def met(self, row: Row) -> bool:
        if self.ratio is not None:
            return row.ratio is not None and row.ratio <= self.ratio
        return row.rate is not None and row.rate >= (self.rate or 0)

    def value(self, row: Row) -> float:
        """What the target is about; rates in TFLOP/s."""
        return (row.ratio or 0) if self.ratio is not None else (row.rate or 0) / 1e12


def _tokens(case: Case) -> int:
    f, h, w = case.window
    return f * h * w


def _small_window(case: Case) -> bool:
    return case.op in WINDOWED and _tokens(case) <= 64


def _few_proxies(case: Case) -> bool:
    return case.op == "cross" and case.keys <= 64


def _pool(case: Case) -> bool:
    return case.op == "pool"


def _many_products(case: Case) -> bool:
    large = _tokens(case) in (256, 1024) if case.op in WINDOWED else case.keys >= 1024
    return case.head_dim == 72 and case.op in (*WINDOWED, "cross", "proxy") and large


TARGETS = (
    Target("windows ≤ 64 tokens: ≤ 1.25 × floor", "forward", _small_window, ratio=1.25),
    Target("windows ≤ 64 tokens: ≤ 1.5 × floor", "backward", _small_window, ratio=1.5),
    Target("cross-attention to ≤ 64 keys: ≤ 1.25 × floor", "forward", _few_proxies, ratio=1.25),
    Target("cross-attention to ≤ 64 keys: ≤ 1.5 × floor", "backward", _few_proxies, ratio=1.5),
    Target("LayerNorm + means: ≤ 1.2 × floor", "forward", _pool, ratio=1.2),
    Target("LayerNorm + means: ≤ 1.2 × floor", "backward", _pool, ratio=1.2),
    Target("windows of 256 and 1024, ≥ 1024 keys: ≥ 400 TFLOP/s", "forward", _many_products,
           rate=400e12),
)  # fmt: skip


def verdicts(rows: Sequence[Row]) -> list[str]:
    """One line per target. Launch-bound cases are counted, not judged."""
    return [_verdict(target, rows) for target in TARGETS]


def _verdict(target: Target, rows: Sequence[Row]) -> str:
    own = [row for row in rows if row.task == target.task and target.concerns(row.case)]
    judged = [row for row in own if row.ours and row.floor >= LAUNCH_BOUND]
    small = sum(row.ours is not None for row in own) - len(judged)
    name = f"{target.name}, {target.task}"
    tail = f"; {small} launch-bound cases not judged" if small else ""
    if not judged:
        return f"not judged: {name}: no case{tail}"
    missed = [row for row in judged if not target.met(row)]
    if missed:
        worst = ", ".join(f"{row.case} ({target.value(row):.3g})" for row in missed)
        return f"missed: {name}: {len(missed)} of {len(judged)} cases: {worst}{tail}"
    values = [target.value(row) for row in judged]
    return f"met: {name}: {len(judged)} cases, {min(values):.3g} to {max(values):.3g}{tail}"


def summary(rows: Sequence[Row]) -> str:
    count = Counter(row.status for row in rows)
    return ", ".join(f"{count[s]} {s}" for s in (OK, FAILED, ERROR, SKIPPED, NOT_REACHED))


def markdown(facts: dict[str, Any], rates: Rates, rows: Sequence[Row]) -> str:
    known = "\n".join(f"- {key}: {value}" for key, value in facts.items())
    ceilings = (
        f"Measured here: a copy at {rates.copy / 1e12:.2f} TB/s, a bf16 product at "
        f"{rates.products / 1e12:.0f} TFLOP/s, a kernel with nothing to do in "
        f"{rates.launch * 1e6:.1f} µs."
    )
    explained = (
        "Times are of the GPU alone, cache cold; the floor is the larger of bytes over the copy "
        "rate and operations over the product rate. The backward is that of torch.autograd.grad "
        "with the forward's graph kept. Error ÷ eager is the largest error of an output, or of a "
        "gradient, over that of plain torch in bf16, both against float64. The opponent is the "
        "fastest that ran. Host is what our call takes to launch, not part of the time."
    )
    parts = [f"# Kernels on {', '.join(facts['gpus']) or 'no GPU'}", known, ceilings, explained]
    parts += [table(rows), "## Targets", _bullets(verdicts(rows))]
    if left := omissions(rows):
        parts += ["## Left out", _bullets(left)]
    return "\n\n".join([*parts, f"Rows: {summary(rows)}."]) + "\n"


def _bullets(lines: Sequence[str]) -> str:
    return "\n".join(f"- {line}" for line in lines)


def _micro(seconds: float) -> str:
    value = seconds * 1e6
    return f"{value:.1f}" if value < 1000 else f"{value:,.0f}"
