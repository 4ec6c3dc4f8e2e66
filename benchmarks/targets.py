"""What this project wants to reach on a GPU, and whether results do.

    python -m benchmarks.targets RESULT.json ...

The files are those of `ptattn bench`; of each target the last row that it concerns counts.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from ptattn.bench import results
from ptattn.bench.results import EAGER, GRAPH, Row
from ptattn.command_line import UsageError

IMAGE, LARGE_IMAGE, VIDEO = "1024 px w1x8x8", "2048 px w1x16x16", "video 512 px w4x4x4"
XL, BASELINE = "PT-DiT/XL", "DiT/XL"
# Of a row, given all rows of its workload and task.
Value = Callable[[Row, Sequence[Row]], float | None]


@dataclass(frozen=True)
class Target:
    workload: str
    task: str
    name: str
    modes: tuple[str, ...]
    value: Value
    show: str
    limit: float
    least: bool  # whether the limit is the least, not the most

    def met(self, value: float) -> bool:
        return value >= self.limit if self.least else value <= self.limit


def _operation(workload: str, task: str, value: Value, show: str, limit: float) -> Target:
    modes = (results.GPU_ALONE,)
    return Target(f"{workload} b1", task, "ptattn", modes, value, show, limit, show == SHARE)


def _speed(size: str, limit: float, name: str = XL) -> Target:
    return Target(f"model {size} b1", "forward", name, (GRAPH,), _faster, SPEED, limit, True)


def _over_floor(task: str, limit: float) -> Target:
    modes = (GRAPH, EAGER)
    return Target("block 2048 px b1", task, XL, modes, _floors, "{:.2f} × floor", limit, False)


def _time(row: Row, group: Sequence[Row]) -> float | None:
    return row.seconds and row.seconds * 1e6


def _share(row: Row, group: Sequence[Row]) -> float | None:
    return row.share and row.share * 100


def _floors(row: Row, group: Sequence[Row]) -> float | None:
    return 1 / row.share if row.share else None


def _faster(row: Row, group: Sequence[Row]) -> float | None:
    return results.speedup(row, group, BASELINE)


TIME, SHARE, SPEED = "{:.0f} µs", "{:.0f} % of floor", "{:.2f} × " + BASELINE
TARGETS = (
    _operation(f"norm XL {LARGE_IMAGE}", "backward", _share, SHARE, 60),
    _operation(f"norm XL {VIDEO}", "backward", _share, SHARE, 60),
    _operation(f"window XL {VIDEO}", "forward", _share, SHARE, 75),
    _operation(f"window XL {VIDEO}", "backward", _share, SHARE, 55),
    _operation(f"window XL {LARGE_IMAGE}", "forward", _time, TIME, 75),
    _operation(f"window XL {LARGE_IMAGE}", "backward", _time, TIME, 280),
    _operation(f"cross XL {LARGE_IMAGE}", "backward", _time, TIME, 110),
    _over_floor("forward", 1.2),
    _over_floor("training", 1.4),
    _speed("1024 px", 0.95),
    _speed("2048 px", 2.2),
    _speed("48×512 px", 5.7),
    _speed("1024 px", 0.95, f"{XL} fused"),
    _speed("2048 px", 2.2, f"{XL} fused"),
    _speed("48×512 px", 5.7, f"{XL} fused"),
)


def report(rows: Sequence[Row]) -> list[str]:
    """In Markdown: the targets that a row concerns."""
    lines = ["| target | limit | measured | |", "| --- | ---: | ---: | --- |"]
    groups = results.groups(rows)
    for target in TARGETS:
        group = groups.get((target.workload, target.task), [])
        for mode in target.modes:
            own = [r for r in group if (r.name, r.mode) == (target.name, mode) and r.timing]
            value = target.value(own[-1], group) if own else None
            if value is None:
                continue
            sign, verdict = "≥" if target.least else "≤", "met" if target.met(value) else "not met"
            what = f"{target.workload}, {target.task}, {target.name}, {mode}"
            shown = target.show.format(value)
            lines.append(f"| {what} | {sign} {target.limit:g} | {shown} | {verdict} |")
            break
    return lines


def main(paths: Sequence[str] | None = None) -> int:
    given = sys.argv[1:] if paths is None else paths
    if not given:
        print("usage: python -m benchmarks.targets RESULT.json ...", file=sys.stderr)
        return 2
    try:
        rows = [row for path in given for row in results.load(Path(path)).rows]
    except UsageError as error:
        print(f"benchmarks.targets: {error}", file=sys.stderr)
        return 2
    print(*report(rows), sep="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
