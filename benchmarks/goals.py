"""What the next run on an H200 is to show, and what `against` predicts of it.

An operation's goal is a time or a share of its floor; a block's is its time over the block floor,
or the speed of PT-DiT/XL beside DiT/XL on cuDNN's attention. A block is predicted as it was
measured, less what its kernels are predicted to gain: each operation's measured time, times the
model's now over the model's then. All else in it (linear layers, copies, GELU) stays as it was.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from benchmarks.against import Compared, Key

IMAGE, LARGE_IMAGE, VIDEO = "1024 px w1x8x8", "2048 px w1x16x16", "video 512 px w4x4x4"
BLOCKS = {"block 1024 px b1": IMAGE, "block 2048 px b1": LARGE_IMAGE, "block 48×512 px b1": VIDEO}
# Operations of a block, and how many: four norm passes, one of them with means.
PARTS = {
    "norm-pool": 1, "norm": 3, "window": 1, "shifted": 1, "cross": 1, "text": 1, "proxy": 1,
}  # fmt: skip
OURS, RIVAL = "PT-DiT/XL", "DiT/XL cudnn"


@dataclass(frozen=True)
class Measure:
    """How a goal is counted, from the seconds of a call and of what it is held against."""

    value: Callable[[float, float], float]
    show: str
    least: bool  # whether the limit is the least, not the most

    def met(self, value: float, limit: float) -> bool:
        return value >= limit if self.least else value <= limit


TIME = Measure(lambda seconds, _: seconds * 1e6, "{:.0f} µs", least=False)
SHARE = Measure(lambda seconds, floor: 100 * floor / seconds, "{:.0f} % of floor", least=True)
OVER_FLOOR = Measure(lambda seconds, floor: seconds / floor, "{:.2f} × floor", least=False)
SPEED = Measure(lambda seconds, rival: rival / seconds, "{:.2f} × DiT/XL", least=True)

# Case and task, measure, limit.
OPERATIONS = (
    (f"norm XL {LARGE_IMAGE} b1", "backward", SHARE, 60),
    (f"norm XL {VIDEO} b1", "backward", SHARE, 60),
    (f"window XL {VIDEO} b1", "forward", SHARE, 75),
    (f"window XL {VIDEO} b1", "backward", SHARE, 55),
    (f"window XL {LARGE_IMAGE} b1", "forward", TIME, 75),
    (f"window XL {LARGE_IMAGE} b1", "backward", TIME, 280),
    (f"cross XL {LARGE_IMAGE} b1", "backward", TIME, 110),
)
OF_BLOCKS = (
    ("block 2048 px b1", "forward", OVER_FLOOR, 1.2),
    ("block 2048 px b1", "training", OVER_FLOOR, 1.4),
    ("block 1024 px b1", "forward", SPEED, 0.95),
    ("block 2048 px b1", "forward", SPEED, 2.2),
    ("block 48×512 px b1", "forward", SPEED, 5.7),
)


def report(rows: Sequence[Compared], blocks: Sequence[dict[str, Any]]) -> Iterator[str]:
    """In Markdown: the goals for which all rows are there; `blocks` are those of `ptattn bench
    block`, at most none."""
    found = {row.measured.key: row for row in rows if row.scaled is not None}
    measured = {(row["case"], row["task"], row["contender"]): row for row in blocks}
    yield "| goal | measured then | by the model now | scaled | limit |"
    yield "| --- | ---: | ---: | ---: | --- |"
    for case, task, measure, limit in OPERATIONS:
        if (case, task) in found:
            row = found[case, task]
            times = (row.measured.seconds, row.now, row.scaled)
            yield _line(f"{case}, {task}", times, row.measured.floor, measure, limit)
    for case, task, measure, limit in OF_BLOCKS:
        keys = _parts(case, task)
        if (case, task, OURS) in measured and all(key in found for key in keys):
            ours, rival = (measured[case, task, name] for name in (OURS, RIVAL))
            then = ours["timing"]["median"]
            times = (then, None, then - _gain(found[key] for key in keys))
            against = ours["floor"] if measure is OVER_FLOOR else rival["timing"]["median"]
            yield _line(f"{case}, {task}", times, against, measure, limit)


def _parts(case: str, task: str) -> list[Key]:
    """The operations of a block, each as often as it is there."""
    tasks = ("forward",) if task == "forward" else ("forward", "backward")
    return [
        (f"{op} XL {BLOCKS[case]} b1", task)
        for op, number in PARTS.items()
        for task in tasks * number
    ]


def _gain(rows: Iterator[Compared]) -> float:
    return sum(row.measured.seconds - (row.scaled or 0.0) for row in rows)


def _line(
    name: str, times: Sequence[float | None], against: float, measure: Measure, limit: float
) -> str:
    values = [None if t is None else measure.value(t, against) for t in times]
    cells = ["–" if value is None else measure.show.format(value) for value in values]
    sign, verdict = "≥" if measure.least else "≤", "met"
    if not measure.met(values[-1] or 0.0, limit):
        verdict = "not met"
    return f"| {name} | {' | '.join(cells)} | {sign} {limit}: {verdict} |"
