"""Pictures of a result, PNG: multiply-adds and time against tokens, memory against frames."""

from __future__ import annotations

import io
import itertools
import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from .. import flops
from . import memory, parallel, results
from .floor import FORWARD
from .model_run import GEMMS
from .results import EAGER, GRAPH, OK, PREDICTED, Result, Row
from .workloads import TEXT_TOKENS

CANDIDATES = ("#1266a8", "#5bb0e8", "#0b3c5d")
BASELINES = ("#c8323c", "#e8920c", "#6a3d9a", "#555555", "#8c564b")
DASHES: dict[str, Any] = dict(linestyle=(0, (4, 2)), linewidth=1.6)
LEGEND: dict[str, Any] = dict(fontsize=11, edgecolor="none")
SIZE = 17, 6.25  # inches of three panels
PANELS = 3

Points = list[tuple[int, float]]  # tokens and seconds, fewest tokens first
Make = Callable[[Result], bytes | None]


def draw(result: Result) -> list[tuple[str, str, bytes]]:
    """Caption, file and picture of each; none where there is nothing to draw."""
    known = pictures(result.kind)
    return [(text, name, png) for text, name, make in known if (png := make(result))]


def pictures(kind: str) -> list[tuple[str, str, Make]]:
    """Caption, file and maker of all that a result of this kind can have."""
    if kind == memory.KIND:
        return [("Peak memory of training against frames", f"{kind}.png", peaks)]
    if kind == parallel.KIND:
        return [("What a GPU sends in a block, against GPUs", f"{kind}.png", traffic)]
    name = "latency.png" if kind == "compare" else f"{kind}.png"
    found: list[tuple[str, str, Make]] = [("Forward time against tokens", name, times)]
    if kind == "compare":
        found.insert(0, ("Multiply-adds against tokens", "gflops.png", multiply_adds))
    if kind == "gpu":
        found.insert(0, ("Speed against full attention and the floor", "speed.png", speed))
    return found


# Images at batch 1.


def times(result: Result) -> bytes | None:
    """Forward time, the fastest implementation of each model; of blocks times depth.

    A panel for PT-DiT with the baselines of its width, or of its number of parameters; None where
    none of them has two models at two sizes. On a GPU solid lines are CUDA graphs, dashed ones
    eager mode.
    """
    images = [row for row in result.rows if _is_image(row)]
    colors, panels = _colors(images), {}
    for title, models in _panels(images).items():
        lines = {model: line for model in models if len(line := _points(images, model)) > 1}
        if len(lines) > 1 and not all(colors[model] in BASELINES for model in lines):
            panels[title] = lines
    panels = dict(list(panels.items())[:PANELS])
    if not panels:
        return None
    figure, all_axes = _figure(len(panels), _title(result))
    for axes, (title, lines) in zip(all_axes, panels.items(), strict=True):
        styles: list[Line2D] = []
        for model, line in lines.items():
            _line(axes, line, colors[model], label=model)
            eager = _points(images, model, EAGER)
            if eager != line:
                _line(axes, eager, colors[model], marker="", **DASHES)
                styles = _styles("CUDA graph", "eager")
        for ours, theirs in _pairs(lines, colors):
            for tokens, seconds in _crossings(lines[ours], lines[theirs]):
                text = f"{ours} = {theirs}: ≈ {float(f'{tokens:.2g}'):,.0f} tokens"
                _mark(axes, tokens, seconds, text, colors[theirs])
        _finish(axes, title, lines, "seconds", styles)
    return _png(figure)


def multiply_adds(result: Result) -> bytes | None:
    """Of one forward pass: in full (solid) and by the paper's convention (dashed)."""
    rows = [row for row in result.rows if _is_image(row) and row.mode == EAGER]
    if not rows:
        return None
    figure, (axes,) = _figure(1, "Multiply-adds of one forward pass")
    lines, colors = {}, _colors(rows)
    for model, color in colors.items():
        own = [row for row in rows if row.model == model]
        lines[model] = [(row.tokens, row.facts["macs"] / 1e9) for row in own]
        _line(axes, lines[model], color, label=model)
        paper = [(row.tokens, row.facts["macs_paper"] / 1e9) for row in own]
        _line(axes, paper, color, marker="", **DASHES)
    first = {row.model: row for row in rows}
    for ours, theirs in _pairs(lines, colors):
        one, other = first[ours], first[theirs]
        if results.equal(one, other) != "width":
            continue
        names = one.facts["model"], other.facts["model"]
        tokens = flops.crossover(*names, text_tokens=TEXT_TOKENS)
        if tokens and lines[ours][0][0] <= tokens <= lines[ours][-1][0]:
            side = math.isqrt(tokens) * one.facts["side"] // math.isqrt(one.tokens)
            macs = flops.count(names[1], side, text_tokens=TEXT_TOKENS).total / 1e9
            _mark(axes, tokens, macs, f"{ours} = {theirs}: {tokens:,} tokens", colors[theirs])
    styles = _styles("counted in full", "as in the paper")
    _finish(axes, "", lines, "GMACs (10⁹ multiply-adds)", styles)
    return _png(figure)


# Of a GPU.


def speed(result: Result) -> bytes | None:
    """How many times as fast as full attention of its width one block of PT-DiT is, by size and
    mode; and the share of the floor that operations reach at 2048 px. None without their rows."""
    blocks = [r for r in result.rows if r.facts.get("kind") == "block" and r.task == FORWARD]
    operations = [r for r in result.rows if "XL 2048 px" in r.workload and not r.baseline]
    operations = [r for r in operations if "op" in r.facts and r.share]
    if not blocks or not operations:
        return None
    figure, (left, right) = _figure(2, f"{result.where}, {result.settings['dtype']}, batch 1")
    _speeds(left, sorted(blocks, key=lambda row: (row.facts["frames"], row.tokens)))
    _shares(right, operations)
    return _png(figure)


def _speeds(axes: Any, rows: Sequence[Row]) -> None:
    group, names = results.groups(rows), list(dict.fromkeys(row.size for row in rows))
    own = {GEMMS, *(row.model for row in rows if not row.baseline)}
    models = dict.fromkeys(row.model for row in rows if row.model not in own)
    styles: dict[str, dict[str, Any]] = {GRAPH: {}, EAGER: DASHES}
    for (model, color), mode in itertools.product(zip(models, BASELINES, strict=False), styles):
        points = []
        for row in rows:
            if row.name == row.model and not row.baseline and row.mode == mode:
                ratio = results.speedup(row, group[row.workload, row.task], model)
                points += [(names.index(row.size), ratio)] if ratio else []
        if points:
            _line(axes, points, color, label=f"{model}, {mode}", **styles[mode])
    axes.axhline(1, color="0.35", linewidth=1)
    _scale(axes, "One block, forward: times as fast as", "", "")
    axes.set_xticks(range(len(names)), names)
    axes.legend(**LEGEND, loc="upper left")


def _shares(axes: Any, rows: Sequence[Row]) -> None:
    labels = list(dict.fromkeys(_operation(row) for row in rows))
    for task, offset, color in (("forward", -0.2, CANDIDATES[0]), ("backward", 0.2, CANDIDATES[1])):
        own = {_operation(row): 100 * (row.share or 0) for row in rows if row.task == task}
        places = [labels.index(label) + offset for label in own]
        axes.barh(places, list(own.values()), 0.38, color=color, label=task)
    axes.set_yticks(range(len(labels)), labels)
    axes.invert_yaxis()
    axes.set_title("Operations at 2048 px: % of the floor", loc="left", fontsize=13)
    axes.grid(True, axis="x", color="0.9")
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(**LEGEND, loc="lower right")


def _operation(row: Row) -> str:
    return f"{row.facts['op']}, {'×'.join(map(str, row.facts['window']))}"


def _is_image(row: Row) -> bool:
    """In use: whole models at their own depth, not fused, or blocks."""
    known = row.facts
    return (
        row.task == FORWARD
        and (known.get("frames"), known.get("batch")) == (1, 1)
        and known.get("kind") in ("block", "model")
        and (known["kind"] == "block" or known["blocks"] == known["depth"])
        and row.model != GEMMS
        and not row.name.endswith(("fused", "roll-and-mask", "fp8"))
    )


def _panels(rows: Sequence[Row]) -> dict[str, list[str]]:
    """The models of each panel, by its title: PT-DiT of the largest width first."""
    first = {row.model: row for row in rows}
    candidates = [row for row in first.values() if not row.baseline]
    panels: dict[str, list[str]] = {}
    for how in ("width", "parameters"):
        for row in sorted(candidates, key=lambda row: -row.facts["width"]):
            peers = [r.model for r in first.values() if r.baseline and results.equal(row, r) == how]
            what = f"D = {row.facts['width']}"
            if how == "parameters":
                what = f"{float(f'{row.facts[how]:.2g}') / 1e9:g} B"
            if peers:
                panels[f"at equal {how}, {what}"] = [row.model, *peers]
    return panels


def _points(rows: Sequence[Row], model: str, mode: str | None = None) -> Points:
    """The shortest time at each size: of whole models, or of blocks where these have more sizes; in
    a mode, or in CUDA graphs where there are some."""
    wanted = mode or (GRAPH if any(row.mode == GRAPH for row in rows) else EAGER)
    found: dict[str, dict[int, float]] = {"model": {}, "block": {}}
    for row in rows:
        if (row.model, row.mode) == (model, wanted) and row.whole:
            best = found[row.facts["kind"]]
            best[row.tokens] = min(best.get(row.tokens, math.inf), row.whole)
    return sorted(max(found.values(), key=len).items())


def _colors(rows: Sequence[Row]) -> dict[str, str]:
    models = {row.model: row.baseline for row in rows}
    colors: dict[str, str] = {}
    for palette, baseline in ((CANDIDATES, False), (BASELINES, True)):
        own = [model for model, is_baseline in models.items() if is_baseline == baseline]
        colors |= {model: palette[i % len(palette)] for i, model in enumerate(own)}
    return colors


def _pairs(lines: dict[str, Points], colors: dict[str, str]) -> list[tuple[str, str]]:
    """Each PT-DiT with each baseline."""
    ours = [model for model in lines if colors[model] in CANDIDATES]
    return [(one, other) for one in ours for other in lines if other not in ours]


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


# Memory.


def peaks(result: Result) -> bytes | None:
    """Peak memory of training against frames, a panel per model, beside the paper's.

    None before the first row.
    """
    models = list(dict.fromkeys(row.model for row in result.rows))
    if not models:
        return None
    title = f"Peak of training on one sample at {memory.SIDE} px, {result.where}"
    figure, panels = _figure(len(models), title, width=3 + 5 * len(models), sharey=True)
    for axes, model in zip(panels, models, strict=True):
        _peaks(axes, model, [row for row in result.rows if row.model == model and row.peak])
    known = {line.get_label(): line for axes in panels for line in axes.lines}
    figure.legend(known.values(), known.keys(), loc="outside right upper", fontsize=11)
    return _png(figure)


def _peaks(axes: Any, model: str, rows: Sequence[Row]) -> None:
    lines: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        if row.status == PREDICTED:
            lines.setdefault((row.facts["recipe"], row.name), []).append(row)
    styles = dict(zip(memory.RECIPES, ("-", DASHES["linestyle"]), strict=True))
    colors = dict(zip(dict.fromkeys(kept for _, kept in lines), CANDIDATES, strict=False))
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
    _scale(axes, model, "latent frames", "GB")


# Several GPUs.


def traffic(result: Result) -> bytes | None:
    """What a rank sends in a block's forward against their number, a panel per size."""
    rows = [row for row in result.rows if row.timing]
    sizes = list(dict.fromkeys(row.size for row in rows))
    if not sizes:
        return None
    figure, panels = _figure(len(sizes), "Sent by a GPU in one block's forward, mean, PREDICTED")
    colors = dict(zip(parallel.MODELS, (CANDIDATES[0], *BASELINES), strict=False))
    for axes, size in zip(panels, sizes, strict=True):
        own = [row for row in rows if row.size == size]
        for name, color in colors.items():
            line = [(r.facts["ranks"], r.facts["sent"] / 1e6) for r in own if r.name == name]
            models = {row.model for row in own if row.name == name}
            _line(axes, line, color, label=f"{', '.join(models)}, {name}")
        _ticks(axes, {row.facts["ranks"] for row in own}, str)
        _scale(axes, size, "GPUs", "MB")
        axes.legend(**LEGEND)
    return _png(figure)


# Figures.


def _figure(panels: int, title: str, width: float | None = None, **options: Any) -> Any:
    """A figure and its panels."""
    width = width or (SIZE[0] * panels / 3 + 2 if panels > 1 else 10)
    figure = Figure(figsize=(width, SIZE[1]), dpi=130, layout="constrained")
    figure.suptitle(title, x=0.01, ha="left", fontsize=15, fontweight="bold")
    return figure, figure.subplots(1, panels, squeeze=False, **options)[0]


def _title(result: Result) -> str:
    where, dtype = result.where, result.settings["dtype"]
    blocks = result.kind in ("compare", "block", "gpu")
    kind = ", depth × one measured block" if blocks else ""
    return f"One forward pass, {where}, {dtype}{kind}"


def _styles(solid: str, dashed: str) -> list[Line2D]:
    """For the legend."""
    return [
        Line2D([], [], color="0.35", linewidth=2.2, label=solid),
        Line2D([], [], color="0.35", label=dashed, **DASHES),
    ]


def _line(axes: Any, points: Points, color: str, **style: Any) -> None:
    style = dict(marker="o", markersize=6, linewidth=2.2) | style
    axes.plot(*zip(*points, strict=True), color=color, **style)


def _mark(axes: Any, tokens: float, value: float, text: str, color: str) -> None:
    """A ring where two lines cross, explained in the legend: next to it is too little room."""
    ring = dict(marker="o", markersize=15, markerfacecolor="none", markeredgewidth=2)
    axes.plot([tokens], [value], color=color, zorder=5, linestyle="", label=text, **ring)


def _finish(
    axes: Any, title: str, lines: dict[str, Points], unit: str, more: Sequence[Line2D] = ()
) -> None:
    _ticks(axes, {tokens for line in lines.values() for tokens, _ in line}, "{:,}".format)
    axes.xaxis.set_minor_locator(NullLocator())
    _scale(axes, title, "tokens", unit)
    handles, _ = axes.get_legend_handles_labels()
    axes.legend(handles=[*handles, *more], **LEGEND, loc="best")


def _ticks(axes: Any, values: set[int], show: Callable[[int], str]) -> None:
    axes.set_xscale("log", base=2)
    axes.set_xticks(sorted(values), list(map(show, sorted(values))))


def _scale(axes: Any, title: str, x: str, y: str) -> None:
    axes.set_title(title, loc="left", fontsize=13)
    axes.set_xlabel(x, fontsize=12)
    axes.set_ylabel(y, fontsize=12)
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.12g}"))
    axes.grid(True, color="0.9")
    axes.spines[["top", "right"]].set_visible(False)


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()
