"""The table of the results, as markdown and on a terminal of any width."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from rich import box
from rich.console import Console
from rich.measure import Measurement
from rich.table import Table

from . import units
from .report import Report, Row

TITLE = "Proxy-tokenized against full attention"


@dataclass(frozen=True)
class Column:
    title: str
    show: Callable[[Row], str]
    left: bool = False  # aligned
    narrow: bool = True  # shown on a narrow terminal too


def markdown(report: Report) -> str:
    columns = _columns(report.rows)
    head = [column.title for column in columns]
    align = ["---" if column.left else "---:" for column in columns]
    body = [[column.show(row) for column in columns] for row in report.rows]
    table = ["| " + " | ".join(cells) + " |" for cells in (head, align, *body)]
    paragraphs = [
        f"# {_title(report)}",
        f"{report.machine}.\nMade by `{report.command}` in {report.seconds:.0f} s.",
        "\n".join(table),
        *(
            f"{head}\n\n" + "\n".join(f"- {line}" for line in lines)
            for head, lines in _lists(report, columns)
        ),
        "![Multiply-adds against resolution](gflops.png)",
        "![Latency against resolution](latency.png)",
    ]
    return "\n\n".join(paragraphs) + "\n"


def show(report: Report, console: Console, files: str) -> None:
    """Print the table, with all columns where they fit, and what there is to say about it."""

    def say(line: str = "") -> None:
        console.print(line, highlight=False, markup=False)

    columns = _columns(report.rows)
    unlimited = console.options.update(max_width=1000)
    if Measurement.get(console, unlimited, _rich_table(report, columns)).maximum > console.width:
        columns = [column for column in columns if column.narrow]
        files += ", with the columns that did not fit here"
    say(f"{_title(report)}\n{report.machine}")
    console.print(_rich_table(report, columns))
    for head, lines in _lists(report, columns):
        say(head)
        for line in lines:
            say(_wrap(f"- {line}", console.width))
        say()
    say(f"Written to {files}.")


def _wrap(text: str, width: int) -> str:
    return textwrap.fill(text, width, subsequent_indent="  ", break_on_hyphens=False)


def _lists(report: Report, columns: Sequence[Column]) -> list[tuple[str, list[str]]]:
    """What stands below the table: headings with their lines."""
    shown = [column.title for column in columns]
    notes = [
        f"{start}: {note}"
        for start, note in report.notes.items()
        if any(title.startswith(start) for title in shown)
    ]
    lists = [("Columns:", notes), ("Skipped:", report.skipped), ("Findings:", report.findings)]
    return [(head, lines) for head, lines in lists if lines]


def _rich_table(report: Report, columns: Sequence[Column]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for column in columns:
        wrap = column.title.startswith("vs ")
        table.add_column(column.title, justify="left" if column.left else "right", no_wrap=not wrap)
    size = None
    for row in report.rows:
        if size not in (None, row.size):
            table.add_section()
        size = row.size
        table.add_row(*(column.show(row) for column in columns))
    return table


def _title(report: Report) -> str:
    return TITLE + (" (interrupted)" if report.interrupted else "")


def _columns(rows: Sequence[Row]) -> list[Column]:
    opponents = list(dict.fromkeys(row.name for row in rows if not row.proxy_tokenized))
    return [
        Column("Size", lambda row: row.size, left=True),
        Column("Tokens", lambda row: f"{row.tokens:,}", narrow=False),
        Column("Model", lambda row: row.name, left=True),
        Column("Parameters", lambda row: f"{row.parameters / 1e6:,.0f} M", narrow=False),
        Column("GMACs (paper)", lambda row: units.giga(row.macs_paper), narrow=False),
        Column("GMACs (full)", lambda row: units.giga(row.macs_full)),
        Column("Block", lambda row: _known(units.seconds, row.block_median, "skipped")),
        Column("Fastest", lambda row: _known(units.seconds, row.block_fastest), narrow=False),
        Column("All blocks", _extrapolated, narrow=False),
        Column("Memory", lambda row: _known(units.memory, row.peak_memory)),
        *(_speedup(name) for name in opponents),
    ]


def _speedup(opponent: str) -> Column:
    def show(row: Row) -> str:
        return _known(units.ratio, row.speedup.get(opponent))

    return Column(f"vs {opponent}", show)


def _extrapolated(row: Row) -> str:
    return _known(lambda value: f"≈ {units.seconds(value)}", row.model_extrapolated)


def _known(show: Callable[[float], str], value: float | None, otherwise: str = "") -> str:
    return otherwise if value is None else show(value)
