"""A result as markdown, and on a terminal of any width."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

from rich import box
from rich.console import Console
from rich.measure import Measurement
from rich.table import Table

from ..compare import units
from . import memory
from . import result as results
from .op_run import OTHERS
from .result import PREDICTED, Result, Row, comparable, fastest, groups


class Column(NamedTuple):
    title: str
    show: Callable[[Row], str]
    left: bool = False  # aligned
    narrow: bool = True  # shown on a narrow terminal too


TITLES = {
    "ops": "Operations",
    "block": "One block",
    "model": "Whole models",
    "memory": "Peak memory of training on one sample",
    "predict": "Whole models and blocks, PREDICTED, not measured",
    "gpu": "Kernels, blocks and models on a GPU",
}
TIMED = (
    "Times are medians with their 20–80 % quantiles; contenders took turns, each after its result "
    "had passed the gate. The floor is the block floor, or an operation's bytes and products, at "
    "the rates above; the share is floor ÷ time. Memory is what a call adds at its "
    "peak, without the weights. Speed-ups are over the fastest contender of a model."
)


def markdown(result: Result, notes: Sequence[str] = ()) -> str:
    parts = [f"# {TITLES[result.kind]}", f"{result.machine}.\nMade by `{result.command}`."]
    parts += notes or [ceilings(result), TIMED]
    for title, rows, columns in _sections(result):
        titles = [column.title for column in columns]
        marks = ["---" if column.left else "---:" for column in columns]
        body = [[column.show(row) for column in columns] for row in rows]
        lines = "\n".join("| " + " | ".join(cells) + " |" for cells in (titles, marks, *body))
        parts += [f"## {title}", lines]
    for head, texts in _lists(result):
        parts += [f"## {head}", "\n".join(f"- {text}" for text in texts)]
    return "\n\n".join([*parts, f"Rows: {results.summary(result.rows)}."]) + "\n"


def show(result: Result, console: Console, notes: Sequence[str] = ()) -> None:
    """Print the tables, with all columns where they fit."""

    def say(text: str = "") -> None:
        console.print(text, highlight=False, markup=False)

    say(f"{TITLES[result.kind]}\n{result.machine}")
    say("\n".join(notes) or ceilings(result))
    for title, rows, columns in _sections(result):
        unlimited = console.options.update(max_width=1000)
        if Measurement.get(console, unlimited, _table(rows, columns)).maximum > console.width:
            columns = [column for column in columns if column.narrow]
        say(f"\n{title}")
        console.print(_table(rows, columns))
    for head, texts in _lists(result):
        say(f"{head}:")
        for text in texts:
            say(f"- {text}")
        say()


def ceilings(result: Result) -> str:
    """What the machine does at best."""
    copy, products = result.rates["copy"], result.rates["products"]
    return (
        f"Measured here: a copy at {units.digits(copy / 1e9)} GB/s, a product of matrices at "
        f"{units.digits(products / 1e12)} TFLOP/s, an operation with nothing to do in "
        f"{result.rates['launch'] * 1e6:.1f} µs."
    )


def line(row: Row) -> str:
    """A row as it comes, for a log."""
    if row.timing is None:
        known = row.note if row.peak is None else units.memory(row.peak)
        return f"{row.case}  {row.task}  {row.contender}: {row.status} {known}".rstrip()
    share = "" if row.share is None else f", {row.share:.0%} of floor"
    return f"{row.case}  {row.task}  {row.contender}: {duration(row.timing.median)}{share}"


def duration(seconds: float) -> str:
    if seconds < 0.9995e-3:
        value = seconds * 1e6
        return f"{value:.1f} µs" if value < 99.95 else f"{value:.0f} µs"
    return units.seconds(seconds)


Groups = dict[tuple[str, str], list[Row]]


def _sections(result: Result) -> list[tuple[str, list[Row], list[Column]]]:
    """Operations show ours alone, with the fastest opponent beside; blocks and models everyone."""
    if result.kind == memory.KIND:
        return [_memory(result.rows)]
    timed = [row for row in result.rows if row.timing]
    group, found = groups(timed), []
    for title, kind in (("Operations", None), ("One block", "block"), ("Whole models", "model")):
        rows = [row for row in timed if row.facts.get("kind") == kind]
        rows = [row for row in rows if kind is not None or row.ours]
        if rows:
            columns = _columns(rows, group, kind is None)
            used = [c for c in columns if any(c.show(row) for row in rows)]
            found.append((title, rows, used))
    return found


def _columns(rows: Sequence[Row], group: Groups, operations: bool) -> list[Column]:
    def speedup(model: str) -> Column:
        def show(row: Row) -> str:
            best = fastest(group[row.case, row.task], model)
            if not (row.ours and best and best.seconds and row.seconds and comparable(row, best)):
                return ""
            return units.ratio(best.seconds / row.seconds)

        return Column(f"vs {model}", show)

    def opponent(row: Row) -> str:
        best = fastest(group[row.case, row.task], OTHERS)
        return best.contender if best else "none ran"

    own = [
        Column("Case", lambda row: row.case, left=True),
        Column("Task", lambda row: row.task, left=True),
        Column("Contender", lambda row: row.contender, left=True, narrow=not operations),
        Column("Time", lambda row: duration(row.timing.median) if row.timing else ""),
        Column("20–80 %", _quantiles, narrow=False),
    ]
    models = dict.fromkeys(r.model for row in rows for r in group[row.case, row.task] if not r.ours)
    ours = {row.model for row in rows if row.ours}
    opponents = [speedup(model) for model in models if model not in ours]
    floor = Column(
        "Floor", lambda row: "" if row.floor is None else duration(row.floor), False, False
    )
    share = Column("Of floor", lambda row: "" if row.share is None else f"{row.share:.0%}")
    if operations:
        error = Column("Error ÷ eager", lambda r: f"{r.error:.2f}" if r.error is not None else "",
                       narrow=False)  # fmt: skip
        return [*own, floor, share, error, Column("Opponent", opponent, True), *opponents]
    return [
        *own,
        Column("Tokens/s", _tokens_per_second, narrow=False),
        Column(
            "Memory", lambda row: "" if row.peak is None else units.memory(row.peak), narrow=False
        ),
        *([floor, share] if any(row.status != PREDICTED for row in rows) else []),
        *opponents,
    ]


def _memory(rows: Sequence[Row]) -> tuple[str, list[Row], list[Column]]:
    """A line per model, recipe and number of frames; GB, a measured peak after a slash."""
    group = groups(rows)

    def peak(contender: str) -> Column:
        def show(row: Row) -> str:
            own = [r for r in group[row.case, row.task] if r.contender == contender and r.peak]
            return " / ".join(f"{(r.peak or 0) / 1e9:.1f}" for r in own)

        return Column(contender.capitalize(), show)

    columns = [
        Column("Model", lambda row: row.model, left=True),
        Column("Recipe", lambda row: row.facts["recipe"], left=True),
        Column("Frames", lambda row: str(row.facts["frames"])),
        Column("Tokens", lambda row: f"{row.tokens:,}", narrow=False),
        Column("Fixed", lambda row: f"{row.facts['fixed'] / 1e9:.1f}"),
        *(peak(contender) for contender in dict.fromkeys(row.contender for row in rows)),
        Column("Paper", lambda row: f"{row.facts['printed'] or '–'}"),
    ]
    models = list(dict.fromkeys(row.model for row in rows))
    lines = [own[0] for own in group.values()]
    lines.sort(key=lambda row: (models.index(row.model), row.facts["recipe"]))
    return f"A training step at {memory.SIDE} px, GB", lines, columns


def _quantiles(row: Row) -> str:
    if row.timing is None or row.status == PREDICTED:
        return ""
    return f"{duration(row.timing.low)} – {duration(row.timing.high)}"


def _tokens_per_second(row: Row) -> str:
    return f"{units.digits(row.tokens / row.seconds / 1e3)} k" if row.seconds else ""


def _lists(result: Result) -> list[tuple[str, list[str]]]:
    lists = [("Targets", result.verdicts), ("Left out", results.omissions(result.rows))]
    return [(head, lines) for head, lines in lists if lines]


def _table(rows: Sequence[Row], columns: Sequence[Column]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for column in columns:
        table.add_column(column.title, justify="left" if column.left else "right")
    by_place = groups(rows).values()
    for own in by_place:
        for row in own:
            table.add_row(*(column.show(row) for column in columns))
        if len(by_place) < len(rows):  # lines between single rows would only take space
            table.add_section()
    return table
