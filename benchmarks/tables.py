"""Rows as a table on a terminal: all columns where they fit, else those that matter most."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

Row = TypeVar("Row")


@dataclass(frozen=True)
class Column(Generic[Row]):
    title: str
    show: Callable[[Row], str]
    narrow: bool = True  # shown on a narrow terminal too


def table(rows: Sequence[Row], columns: Sequence[Column[Row]], width: int) -> str:
    text = _table(rows, columns)
    if len(text.splitlines()[0]) > width:
        text = _table(rows, [column for column in columns if column.narrow])
    return text


def _table(rows: Sequence[Row], columns: Sequence[Column[Row]]) -> str:
    cells = [[c.title for c in columns], *([c.show(row) for c in columns] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = ("  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)) for row in cells)
    return "\n".join(lines)
