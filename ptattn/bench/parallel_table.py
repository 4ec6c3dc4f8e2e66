"""The table of `ptattn bench parallel`."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from . import units
from .columns import Column, Line, Section
from .parallel import KIND, LINKS, OTHERS
from .results import Row

__all__ = ["KIND", "section"]


def section(rows: Sequence[Row]) -> Section:
    """A line per size, number of GPUs and scheme."""

    def fact(name: str, show: Callable[[float], str] = units.memory) -> Callable[[Line], str]:
        return lambda line: show(line[0].facts[name]) if name in line[0].facts else ""

    columns = [
        Column("Size", lambda line: line[0].size, left=True),
        Column("GPUs", lambda line: str(line[0].facts["ranks"])),
        Column("Split", lambda line: f"{line[0].model}, {line[0].name}", left=True),
        Column("Parts", lambda line: "×".join(map(str, line[0].facts.get("parts", ()))),
               narrow=False),
        Column("Sent", fact("sent")),
        Column("Busiest", fact("busiest"), narrow=False),
        *(Column(f"of {name}", fact(f"of {name}", "{:.1%}".format), narrow=name == "ulysses")
          for name in OTHERS),
        Column("Block", lambda line: units.seconds(line[0].seconds or 0.0)),
        *(Column(link, fact(link, units.seconds)) for link in LINKS),
        Column("Memory", lambda line: units.memory(line[0].peak or 0), narrow=False),
    ]  # fmt: skip
    lines = [[row] for row in rows if row.timing]
    return Section("", lines, columns, lambda row: row.workload)
