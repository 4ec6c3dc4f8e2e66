"""Multiply-adds and latency of images against resolution, as PNG."""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from .. import flops
from .cases import TEXT_TOKENS
from .report import Report, Row

PROXY_COLORS = ("#1266a8", "#5bb0e8", "#0b3c5d")
OPPONENT_COLORS = ("#c8323c", "#e8920c", "#6a3d9a", "#555555", "#8c564b")
DASHES: dict[str, Any] = dict(linestyle=(0, (4, 2)), linewidth=1.6)


def gflops(report: Report) -> bytes:
    """Multiply-adds of one forward pass: in full (solid) and by the paper's convention (dashed)."""
    rows = _images(report)
    figure, axes = _axes(rows, "Multiply-adds of one forward pass", "GMACs (10⁹ multiply-adds)")
    colors = _colors(rows)
    for name, color in colors.items():
        own = [row for row in rows if row.name == name]
        _line(axes, own, lambda row: row.macs_full / 1e9, color, label=name)
        _line(axes, own, lambda row: row.macs_paper / 1e9, color, marker="", **DASHES)
    for ours, theirs in _equal_width(rows):
        tokens = flops.crossover(ours.model, theirs.model, text_tokens=TEXT_TOKENS)
        side = 0 if tokens is None else math.isqrt(tokens) * ours.side // math.isqrt(ours.tokens)
        if min(row.side for row in rows) <= side <= max(row.side for row in rows):
            macs = flops.count(theirs.model, side, text_tokens=TEXT_TOKENS).total / 1e9
            text = f"{ours.name} = {theirs.name}: {tokens:,} tokens"
            _mark(axes, side, macs, text, colors[theirs.name])
    styles = [
        Line2D([], [], color="0.35", linewidth=2.2, label="counted in full"),
        Line2D([], [], color="0.35", label="as in the paper", **DASHES),
    ]
    return _png(figure, axes, styles)


def latency(report: Report) -> bytes:
    """Time of one forward pass, extrapolated from one measured block; skipped cases are absent."""
    rows = [row for row in _images(report) if row.model_extrapolated is not None]
    figure, axes = _axes(_images(report), "Time of one forward pass", "seconds")
    figure.suptitle(_machine(report), x=0.985, y=0.975, ha="right", fontsize=11, color="0.4")
    colors = _colors(_images(report))
    for name, color in colors.items():
        own = [row for row in rows if row.name == name]
        if own:
            _line(axes, own, lambda row: row.model_extrapolated or 0.0, color, label=name)
    for ours, theirs in _equal_width(rows):
        for side, seconds in _measured_crossovers(rows, ours.name, theirs.name):
            tokens = float(f"{(side / ours.side) ** 2 * ours.tokens:.2g}")
            text = f"{ours.name} = {theirs.name}: ≈ {tokens:,.0f} tokens"
            _mark(axes, side, seconds, text, colors[theirs.name])
    return _png(figure, axes, [])


def _images(report: Report) -> list[Row]:
    return [row for row in report.rows if row.frames == 1]


def _machine(report: Report) -> str:
    gpu, known = report.settings["device"] == "cuda", report.environment
    name = known["gpus"][0] if gpu else f"{known['cpu']}, {report.settings['threads']} threads"
    return f"{name}, {report.settings['dtype']}, depth × one measured block"


def _colors(rows: Sequence[Row]) -> dict[str, str]:
    names = {row.name: row.proxy_tokenized for row in rows}
    ours = [name for name, proxy_tokenized in names.items() if proxy_tokenized]
    theirs = [name for name in names if name not in ours]
    return {
        name: palette[i % len(palette)]
        for group, palette in ((ours, PROXY_COLORS), (theirs, OPPONENT_COLORS))
        for i, name in enumerate(group)
    }


def _equal_width(rows: Sequence[Row]) -> list[tuple[Row, Row]]:
    """One row of each PT-DiT with one of each opponent of its width."""
    models = {row.model: row for row in rows}.values()
    return [
        (ours, theirs)
        for ours in models
        for theirs in models
        if ours.proxy_tokenized and not theirs.proxy_tokenized and ours.width == theirs.width
    ]


def _measured_crossovers(rows: Sequence[Row], ours: str, theirs: str) -> list[tuple[float, float]]:
    """Where ours becomes the faster one: (side, seconds), on straight lines of the log-log plot."""
    points = [
        (math.log(row.side), math.log(row.speedup[theirs]), math.log(row.model_extrapolated))
        for row in rows
        if row.name == ours and theirs in row.speedup and row.model_extrapolated
    ]
    found = []
    for (x0, gain0, y0), (x1, gain1, y1) in pairwise(points):
        if gain0 < 0 <= gain1:
            t = gain0 / (gain0 - gain1)
            found.append((math.exp(x0 + t * (x1 - x0)), math.exp(y0 + t * (y1 - y0))))
    return found


def _axes(rows: Sequence[Row], title: str, unit: str) -> tuple[Figure, Any]:
    figure = Figure(figsize=(10, 6.25), dpi=160, layout="constrained")  # 1600 × 1000 pixels
    axes = figure.subplots()
    axes.set_title(title, loc="left", fontsize=17, fontweight="bold", pad=14)
    axes.set_xlabel("image, pixels a side (tokens)", fontsize=14, labelpad=8)
    axes.set_ylabel(unit, fontsize=14)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    tokens = {row.side: row.tokens for row in rows}
    axes.set_xticks(list(tokens), [f"{side}\n({n:,})" for side, n in tokens.items()])
    axes.set_xlim(min(tokens) / 1.15, max(tokens) * 1.15)
    axes.xaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.12g}"))
    axes.tick_params(labelsize=13, length=0)
    axes.grid(True, color="0.9")
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color("0.7")
    return figure, axes


def _line(
    axes: Any, rows: Sequence[Row], value: Callable[[Row], float], color: str, **style: Any
) -> None:
    style = {"marker": "o", "markersize": 7, "linewidth": 2.2, **style}
    axes.plot([row.side for row in rows], [value(row) for row in rows], color=color, **style)


def _mark(axes: Any, side: float, value: float, text: str, color: str) -> None:
    """A ring where two lines cross, explained in the legend: next to it is too little room."""
    ring = dict(marker="o", markersize=15, markerfacecolor="none", markeredgewidth=2)
    axes.plot([side], [value], color=color, zorder=5, linestyle="", label=text, **ring)


def _png(figure: Figure, axes: Any, styles: Sequence[Line2D]) -> bytes:
    handles, _ = axes.get_legend_handles_labels()
    axes.legend(handles=[*handles, *styles], fontsize=13, edgecolor="none", loc="best")
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()
