"""What the project wants to reach, and whether a result does."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from .floor import FORWARD, TRAINING
from .memory import RECIPES
from .model_run import YARDSTICK
from .op_cases import WINDOWED
from .result import OK, PREDICTED, Result, Row, fastest, groups

# A floor below this is of the order of one launch, which no kernel can hide.
LAUNCH_BOUND = 15e-6  # seconds


@dataclass(frozen=True)
class Target:
    """`value` of the rows that it `concerns`, given all rows of their case and task, is at most
    `limit`, or at least, where `least`."""

    name: str
    kinds: tuple[str, ...]  # of results
    device: str
    concerns: Callable[[Row], bool]
    value: Callable[[Row, Sequence[Row]], float | None]
    limit: float
    least: bool = False

    def met(self, value: float) -> bool:
        return value >= self.limit if self.least else value <= self.limit


def verdicts(result: Result) -> list[str]:
    """One line per target of this kind of result and device; of those that no row concerns, none.

    Operations whose floor is of the order of one launch are not judged.
    """
    device = result.settings["device"]
    own = [t for t in TARGETS if result.kind in t.kinds and t.device == device]
    lines = [_verdict(target, result.rows) for target in own]
    return [line for line in lines if line]


def _verdict(target: Target, rows: Sequence[Row]) -> str:
    found: dict[str, float] = {}
    predicted: dict[str, bool] = {}
    for group in groups(rows).values():
        for row in group:
            if row.status in (OK, PREDICTED) and target.concerns(row):
                value, name = target.value(row, group), f"{row.contender} {row.case}"
                if value is not None:  # a measured one takes the place of its prediction
                    found[name], predicted[name] = value, row.status == PREDICTED
    if not found:
        return ""
    missed = {name: value for name, value in found.items() if not target.met(value)}
    worst = "; ".join(f"{name}: {value:.3g}" for name, value in (missed or found).items())
    if not missed and len(found) > 3:
        worst = f"{len(found)} rows, {min(found.values()):.3g} to {max(found.values()):.3g}"
    head = ("predicted " if any(predicted.values()) else "") + ("NOT MET" if missed else "met")
    return f"{head}: {target.name} ({worst})"


def _over_floor(row: Row, group: Sequence[Row]) -> float | None:
    bound = row.facts.get("op") is not None and (row.floor or 0) < LAUNCH_BOUND
    return None if bound or not row.share else 1 / row.share


def _rate(row: Row, group: Sequence[Row]) -> float | None:
    """TFLOP/s."""
    if not row.timing or (row.floor or 0) < LAUNCH_BOUND:
        return None
    return row.facts["flops"] / row.timing.median / 1e12


def _faster_than(model: str) -> Callable[[Row, Sequence[Row]], float | None]:
    """How many times as long the fastest of a model takes."""

    def value(row: Row, group: Sequence[Row]) -> float | None:
        other = fastest(group, model)
        return other.seconds / row.seconds if other and other.seconds and row.seconds else None

    return value


def _over(contender: str) -> Callable[[Row, Sequence[Row]], float | None]:
    """Our time over that of a contender."""

    def value(row: Row, group: Sequence[Row]) -> float | None:
        other = next((r for r in group if r.contender == contender), None)
        return row.seconds / other.seconds if other and other.seconds and row.seconds else None

    return value


def _over_paper(row: Row, group: Sequence[Row]) -> float | None:
    """Our peak of memory over the printed one."""
    printed = row.facts["printed"]
    return row.peak / (printed * 1e9) if row.peak and printed else None


def _op(task: str, fits: Callable[[Row], bool]) -> Callable[[Row], bool]:
    return lambda row: row.ours and row.task == task and "op" in row.facts and fits(row)


def _window(row: Row) -> int:
    return math.prod(row.facts["window"])


def _small_window(row: Row) -> bool:
    return row.facts["op"] in WINDOWED and _window(row) <= 64


def _few_proxies(row: Row) -> bool:
    return row.facts["op"] == "cross" and row.facts["keys"] <= 64


def _passes(row: Row) -> bool:
    return row.facts["op"] in ("pool", "norm", "norm-pool")


def _many_products(row: Row) -> bool:
    known = row.facts
    windowed = known["op"] in WINDOWED
    large = _window(row) in (256, 1024) if windowed else known["keys"] >= 1024
    return known["head_dim"] == 72 and known["op"] in (*WINDOWED, "cross", "proxy") and large


def _model(
    name: str, task: str = FORWARD, side: int | None = None, frames: int = 1, tokens: int = 0
) -> Callable[[Row], bool]:
    """Batch 1 of a contender, at one size or from a number of tokens on."""

    def concerns(row: Row) -> bool:
        known = row.facts
        return (
            (row.contender, row.task, known.get("batch")) == (name, task, 1)
            and row.tokens >= tokens
            and (side is None or (known["side"], known["frames"]) == (side, frames))
        )

    return concerns


def _own_block(task: str) -> Callable[[Row], bool]:
    return lambda row: row.ours and row.task == task and row.facts.get("kind") == "block"


def _keeps_inputs(recipe: str) -> Callable[[Row], bool]:
    return lambda row: row.contender == "keeps inputs" and row.facts["recipe"] == recipe


_OPS = ("ops", "gpu")
_BLOCKS, _MODELS = ("block", "gpu", "predict"), ("model", "gpu", "predict")
XL, DIT, PIXART = "PT-DiT/XL", "DiT/XL", "PixArt-α"


def _speedup(ours: str, theirs: str, least: float, *size: int) -> Target:
    where = f"{size[0]} px" if len(size) == 1 else f"{size[1]} frames of {size[0]} px"
    name = f"{ours} at least {least:g} × as fast as {theirs} at {where}"
    fits, value = _model(ours, FORWARD, *size), _faster_than(theirs)

    def concerns(row: Row) -> bool:
        return row.facts.get("kind") == "model" and fits(row)

    return Target(name, _MODELS, "cuda", concerns, value, least, least=True)


def _kernel(name: str, task: str, fits: Callable[[Row], bool], limit: float) -> Target:
    text = f"{name}: at most {limit:g} × floor, {task}"
    return Target(text, _OPS, "cuda", _op(task, fits), _over_floor, limit)


TARGETS = (
    _kernel("windows of at most 64 tokens", "forward", _small_window, 1.25),
    _kernel("windows of at most 64 tokens", "backward", _small_window, 1.5),
    _kernel("cross-attention to at most 64 keys", "forward", _few_proxies, 1.25),
    _kernel("cross-attention to at most 64 keys", "backward", _few_proxies, 1.5),
    _kernel("fused norm passes", "forward", _passes, 1.2),
    _kernel("fused norm passes", "backward", _passes, 1.2),
    Target("windows of 256 and 1024, 1024 keys and more: at least 400 TFLOP/s", _OPS, "cuda",
           _op("forward", _many_products), _rate, 400, least=True),
    Target("block forward: at most 1.15 × block floor", ("block", "gpu"), "cuda",
           _own_block(FORWARD), _over_floor, 1.15),
    Target("block training step: at most 1.3 × block floor", ("block", "gpu"), "cuda",
           _own_block(TRAINING), _over_floor, 1.3),
    _speedup(XL, DIT, 2.0, 2048),
    _speedup(XL, DIT, 5.0, 512, 48),
    _speedup(XL, DIT, 18.0, 1024, 48),
    _speedup(f"{XL} fused", DIT, 1.0, 1024),
    _speedup("PT-DiT/L", PIXART, 1.6, 1024),
    *(
        Target(f"training, {recipe}, block inputs kept: less memory than in the paper", ("memory",),
               "cuda", _keeps_inputs(recipe), _over_paper, 1.0)
        for recipe in RECIPES
    ),
    Target("block, 16,384 tokens, compiled: at most 1.5 × its 21 GEMMs", ("block",), "cpu",
           _model(f"{XL} compiled", side=2048), _over(YARDSTICK), 1.5),
    Target("block, 4,096 tokens, compiled: at most 1.7 × its 21 GEMMs", ("block",), "cpu",
           _model(f"{XL} compiled", side=1024), _over(YARDSTICK), 1.7),
    Target("block, from 4,096 tokens on: faster than diffusers' PixArt block", ("block",), "cpu",
           _model(XL, tokens=4096), _over(f"{PIXART} diffusers"), 1.0),
)  # fmt: skip
