"""What a table is made of."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from .results import Row

# A line of a table: the rows of one implementation, a row per mode.
Line = list[Row]


class Column(NamedTuple):
    title: str
    show: Callable[[Line], str]
    left: bool = False  # aligned
    narrow: bool = True  # shown on a narrow terminal too
    wide: bool = True  # and on a wide one


class Section(NamedTuple):
    title: str
    lines: list[Line]
    columns: list[Column]
    apart: Callable[[Row], str]  # lines of which this differs stand apart
