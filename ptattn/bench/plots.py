"""Latency against tokens, at equal width and at equal parameters; memory against frames: PNG."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from ..compare.plots import DASHES, OPPONENT_COLORS, PROXY_COLORS
from . import memory
from .floor import FORWARD
from .result import OK, PREDICTED, Result, Row, fastest, groups

# Models of one width, D = 1152, and of one number of parameters within 10 %.
PANELS = {
    "at equal width, D = 1152": ("PT-DiT/XL", "DiT/XL", "PixArt-α"),
    "at equal parameters, 0.6 B": ("PT-DiT/L", "PixArt-α"),
    "at equal parameters, 0.13 B": ("PT-DiT/B", "DiT/B"),
}
SIZE = 17, 6.25  # inches

Points = list[tuple[int, float]]  # tokens and seconds, fewest tokens first


def draw(result: Result) -> tuple[str, bytes] | None:
    """The picture of a result and what it shows; None where there is nothing to draw."""
    if result.kind == memory.KIND:
        caption, picture = "Peak memory of training against frames", peaks(result)
    else:
        caption, picture = "Forward time against tokens", crossover(result)
    return None if picture is None else (caption, picture)


def crossover(result: Result) -> bytes | None:
    """Forward time of images at batch 1, the fastest contender of each model; blocks times depth.

    None where no panel has a PT-DiT and an opponent at two sizes.
    """
    panels = {title: _points(result.rows, models) for title, models in PANELS.items()}
    panels = {title: lines for title, lines in panels.items() if len(lines) > 1}
    if not panels:
        return None
    figure = Figure(figsize=(SIZE[0] * len(panels) / 3 + 2, SIZE[1]), dpi=130, layout="constrained")
    predicted = any(row.status == PREDICTED for row in result.rows)
    figure.suptitle(_title(result, predicted), x=0.01, ha="left", fontsize=15, fontweight="bold")
    for axes, (title, lines) in zip(figure.subplots(1, len(panels), squeeze=False)[0],
                                    panels.items(), strict=True):  # fmt: skip
        _panel(axes, title, lines)
    return _png(figure)


def peaks(result: Result) -> bytes | None:
    """Peak memory of training against frames, a panel per model, beside the paper's.

    None before the first row.
    """
    models = list(dict.fromkeys(row.model for row in result.rows))
    if not models:
        return None
    figure = Figure(figsize=(3 + 5 * len(models), SIZE[1]), dpi=130, layout="constrained")
    title = f"Peak of training on one sample at {memory.SIDE} px, {result.machine.split(';')[0]}"
    figure.suptitle(title, x=0.01, ha="left", fontsize=15, fontweight="bold")
    panels = figure.subplots(1, len(models), squeeze=False, sharey=True)[0]
    for axes, model in zip(panels, models, strict=True):
        _peaks(axes, [row for row in result.rows if row.model == model and row.peak])
        axes.set_title(model, loc="left", fontsize=13)
    known = {line.get_label(): line for axes in panels for line in axes.lines}
    figure.legend(known.values(), known.keys(), loc="outside right upper", fontsize=11)
    return _png(figure)


def _peaks(axes: Any, rows: Sequence[Row]) -> None:
    lines: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        if row.status == PREDICTED:
            lines.setdefault((row.facts["recipe"], row.contender), []).append(row)
    styles = dict(zip(memory.RECIPES, ("-", DASHES["linestyle"]), strict=True))
    colors = dict(zip(dict.fromkeys(kept for _, kept in lines), PROXY_COLORS, strict=False))
    for (recipe, kept), own in lines.items():
        axes.plot([row.facts["frames"] for row in own], [(row.peak or 0) / 1e9 for row in own],
                  label=f"{recipe}, {kept}", color=colors[kept],
                  linestyle=styles[recipe], linewidth=2.2)  # fmt: skip
    measured = [(r.facts["frames"], (r.peak or 0) / 1e9) for r in rows if r.status == OK]
    printed = {(r.facts["frames"], r.facts["printed"]) for r in rows if r.facts["printed"]}
    for points, label, color in ((measured, "measured", "0.5"), (printed, "paper", "k")):
        if points:
            axes.plot(*zip(*points, strict=True), "o", label=label, color=color)
    axes.set_xticks(sorted({row.facts["frames"] for row in rows}))
    _finish(axes, "latent frames", "GB")


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()


def _title(result: Result, predicted: bool) -> str:
    where = result.settings.get("predicted_for") if predicted else result.machine.split(";")[0]
    return f"One forward pass, {'PREDICTED for' if predicted else 'measured on'} {where}"


def _points(rows: Sequence[Row], models: Sequence[str]) -> dict[str, Points]:
    """Of the models that have two sizes or more; empty unless a PT-DiT is among them."""
    found: dict[str, Points] = {}
    for kind in ("block", "model"):  # whole models take the place of blocks
        own = [row for row in rows if _fits(row, kind)]
        lines: dict[str, Points] = {}
        for group in groups(own).values():
            for model in models:
                best = fastest(group, model)
                if best and best.seconds:
                    times = best.facts["depth"] if kind == "block" else 1
                    lines.setdefault(model, []).append((best.tokens, times * best.seconds))
        lines = {model: sorted(line) for model, line in lines.items() if len(line) > 1}
        if len(lines) > 1 and any(model.startswith("PT-DiT") for model in lines):
            found = lines
    return found


def _fits(row: Row, kind: str) -> bool:
    """Images at batch 1, as they are in use: whole models at their own depth, not fused."""
    known = row.facts
    return (
        row.task == FORWARD
        and (known.get("kind"), known.get("frames"), known.get("batch")) == (kind, 1, 1)
        and (kind == "block" or known["blocks"] == known["depth"])
        and not row.contender.endswith(("fused", "roll-and-mask"))
    )


def _panel(axes: Any, title: str, lines: dict[str, Points]) -> None:
    palettes = {True: iter(PROXY_COLORS), False: iter(OPPONENT_COLORS)}
    colors = {model: next(palettes[model.startswith("PT-DiT")]) for model in lines}
    for model, line in lines.items():
        style = dict(marker="o", markersize=6, linewidth=2.2, color=colors[model])
        axes.plot(*zip(*line, strict=True), label=model, **style)
    for ours, theirs in ((a, b) for a in lines for b in lines):
        if ours.startswith("PT-DiT") and not theirs.startswith("PT-DiT"):
            for tokens, seconds in _crossings(lines[ours], lines[theirs]):
                ring = dict(marker="o", markersize=15, markerfacecolor="none", markeredgewidth=2)
                text = f"{ours} = {theirs}: ≈ {float(f'{tokens:.2g}'):,.0f} tokens"
                axes.plot(
                    [tokens], [seconds], color=colors[theirs], linestyle="", label=text, **ring
                )
    axes.set_title(title, loc="left", fontsize=13)
    axes.set_xscale("log", base=2)
    ticks = sorted({tokens for line in lines.values() for tokens, _ in line})
    axes.set_xticks(ticks, [f"{tokens:,}" for tokens in ticks])
    axes.xaxis.set_minor_locator(NullLocator())
    _finish(axes, "tokens", "seconds")
    axes.legend(fontsize=11, edgecolor="none", loc="upper left")


def _finish(axes: Any, x: str, y: str) -> None:
    axes.set_xlabel(x, fontsize=12)
    axes.set_ylabel(y, fontsize=12)
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.12g}"))
    axes.grid(True, color="0.9")
    axes.spines[["top", "right"]].set_visible(False)


def _crossings(ours: Points, theirs: Points) -> Points:
    """Where ours becomes the faster one, on straight lines of the log-log plot."""
    other = dict(theirs)
    points = [
        (math.log(tokens), math.log(other[tokens] / seconds), math.log(seconds))
        for tokens, seconds in ours
        if tokens in other
    ]
    found = []
    for (x0, gain0, y0), (x1, gain1, y1) in pairwise(points):
        if gain0 < 0 <= gain1:
            t = gain0 / (gain0 - gain1)
            found.append((round(math.exp(x0 + t * (x1 - x0))), math.exp(y0 + t * (y1 - y0))))
    return found
