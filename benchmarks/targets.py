"""What this project wants to reach on a GPU, and whether results do.

    python -m benchmarks.targets RESULT.json ...

The files are those of `ptattn bench`; of each target the last row that it concerns counts.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from benchmarks.tables import table
from ptattn.bench import results
from ptattn.bench.results import EAGER, GPU_ALONE, GRAPH, Row
from ptattn.command_line import UsageError

IMAGE, VIDEO = "2048 px w1x16x16 b1", "video 512 px w4x4x4 b1"
XL, FUSED, BASELINE = "PT-DiT/XL", "PT-DiT/XL fused", "DiT/XL"


class Kind(NamedTuple):
    """What is limited, of a row with a time and the rows of its workload and task; None where a row
    has none. The limit is the least or the most; the first of the modes counts that there is."""

    value: Callable[[Row, Sequence[Row]], float | None]
    show: str
    least: bool
    modes: tuple[str, ...]


SHARE = Kind(lambda row, _: row.share and row.share * 100, "{:.0f} % of floor", True, (GPU_ALONE,))
TIME = Kind(lambda row, _: (row.seconds or 0.0) * 1e6, "{:.0f} µs", False, (GPU_ALONE,))
FLOORS = Kind(lambda row, _: row.share and 1 / row.share, "{:.2f} × floor", False, (GRAPH, EAGER))
SPEED = Kind(
    lambda row, group: results.speedup(row, group, BASELINE), f"{{:.2f}} × {BASELINE}", True,
    (GRAPH,),
)  # fmt: skip
TARGETS = (
    (f"norm XL {IMAGE}", "backward", "ptattn", SHARE, 60),
    (f"norm XL {VIDEO}", "backward", "ptattn", SHARE, 60),
    (f"window XL {VIDEO}", "forward", "ptattn", SHARE, 75),
    (f"window XL {VIDEO}", "backward", "ptattn", SHARE, 55),
    (f"window XL {IMAGE}", "forward", "ptattn", TIME, 75),
    (f"window XL {IMAGE}", "backward", "ptattn", TIME, 280),
    (f"cross XL {IMAGE}", "backward", "ptattn", TIME, 110),
    ("block 2048 px b1", "forward", XL, FLOORS, 1.2),
    ("block 2048 px b1", "training", XL, FLOORS, 1.4),
    *(
        (f"model {size} b1", "forward", name, SPEED, limit)
        for name in (XL, FUSED)
        for size, limit in (("1024 px", 0.95), ("2048 px", 2.2), ("48×512 px", 5.7))
    ),
)


def report(rows: Sequence[Row]) -> str:
    """In Markdown: the targets that a row concerns."""
    lines, groups = [], results.groups(rows)
    for workload, task, name, kind, limit in TARGETS:
        group = groups.get((workload, task), [])
        own = {row.mode: row for row in group if row.name == name and row.timing}
        mode = next((mode for mode in kind.modes if mode in own), None)
        value = None if mode is None else kind.value(own[mode], group)
        if value is not None:
            met = value >= limit if kind.least else value <= limit
            what = f"{workload}, {task}, {name}, {mode}"
            bound = f"{'≥' if kind.least else '≤'} {limit:g}"
            lines.append((what, bound, kind.show.format(value), "met" if met else "not met"))
    return table(("target", "limit", "measured", ""), lines)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.targets", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("files", metavar="RESULT.json", nargs="+", type=Path)
    args = parser.parse_args(argv)
    try:
        print(report([row for path in args.files for row in results.load(path).rows]))
    except UsageError as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
