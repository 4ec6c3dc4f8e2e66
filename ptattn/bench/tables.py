"""A result as markdown, and on a terminal of any width."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Sequence

from rich import box
from rich.console import Console
from rich.measure import Measurement
from rich.table import Table

from . import memory, parallel_table, results, units
from .columns import Column, Line, Section
from .op_run import OTHERS
from .results import (
    COMPILED,
    EAGER,
    ERROR,
    FAILED,
    GPU_ALONE,
    GRAPH,
    PREDICTED,
    SKIPPED,
    Result,
    Row,
    groups,
)

MODES = {EAGER: "Eager", COMPILED: "Compiled", GRAPH: "CUDA graph", GPU_ALONE: "GPU alone"}


MOST_WIDE = 8  # a column of speed-ups on a narrow terminal


TITLES = {
    "compare": "Proxy-tokenized against full attention",
    "ops": "Operations",
    "block": "One block",
    "model": "Whole models",
    "memory": "Peak memory of training on one sample",
    "parallel": "One sample over several GPUs, PREDICTED, not measured",
    "predict": "Whole models and blocks, PREDICTED, not measured",
    "gpu": "Models, blocks and operations on a GPU",
}
TIMED = (
    "Times are medians with their 20–80 % quantiles; implementations took turns, each after its "
    "result had passed the gate. Blocks and models are timed until their result is there: in "
    "eager mode, compiled block by block, and as the replay of a CUDA graph; operations on a GPU "
    "by the GPU's time alone. The floor is the block floor, or an operation's bytes and products, "
    "at the rates above; the share is floor ÷ the shortest time. Memory is what a call adds at its "
    "peak, without the weights. Error is relative, in the norm. Speed-ups are over the fastest "
    "baseline of a model, mode by mode."
)


def markdown(result: Result, notes: Sequence[str] = ()) -> str:
    took = f" in {result.seconds:.0f} s" if result.seconds >= 1 else ""
    parts = [f"# {_title(result)}", f"{result.machine}.\nMade by `{result.command}`{took}."]
    parts += notes or ([ceilings(result), TIMED] if result.rates else [])
    for section in _sections(result):
        columns = [column for column in section.columns if column.wide]
        titles = [column.title for column in columns]
        marks = ["---" if column.left else "---:" for column in columns]
        body = [[column.show(line) for column in columns] for line in section.lines]
        lines = "\n".join("| " + " | ".join(cells) + " |" for cells in (titles, marks, *body))
        parts += [f"## {section.title}"] if section.title else []
        parts += [lines, *_listed("Columns", _notes(result, titles))]
    parts += _listed("Left out", results.omissions(result.rows))
    parts += _listed("Findings", result.findings)
    return "\n\n".join([*parts, f"Rows: {results.summary(result.rows)}."]) + "\n"


def _listed(head: str, texts: Sequence[str]) -> list[str]:
    return [f"{head}:\n\n" + "\n".join(f"- {text}" for text in texts)] if texts else []


def show(result: Result, console: Console, notes: Sequence[str] = ()) -> None:
    """Print the tables, with all columns where they fit."""

    def say(text: str = "") -> None:
        console.print(text, highlight=False, markup=False)

    def listed(head: str, texts: Sequence[str]) -> None:
        if texts:
            say(f"{head}:")
            for text in texts:
                wrapped = textwrap.fill(
                    f"- {text}", console.width, subsequent_indent="  ", break_on_hyphens=False
                )
                say(wrapped)
            say()

    say(f"{_title(result)}\n{result.machine}")
    if notes or result.rates:
        say("\n".join(notes) or ceilings(result))
    for section in _sections(result):
        columns = [column for column in section.columns if column.wide]
        unlimited = console.options.update(max_width=1000)
        if Measurement.get(console, unlimited, _table(section, columns)).maximum > console.width:
            columns = [column for column in section.columns if column.narrow]
        if section.title:
            say(f"\n{section.title}")
        console.print(_table(section, columns))
        listed("Columns", _notes(result, [column.title for column in columns]))
    listed("Left out", results.omissions(result.rows))
    listed("Findings", result.findings)


def _title(result: Result) -> str:
    return TITLES[result.kind] + (" (interrupted)" if result.interrupted else "")


def ceilings(result: Result) -> str:
    """What the machine does at best."""
    copy, products = result.rates["copy"], result.rates["products"]
    return (
        f"Measured here: a copy at {units.digits(copy / 1e9)} GB/s, a product of matrices at "
        f"{units.digits(products / 1e12)} TFLOP/s, an operation with nothing to do in "
        f"{result.rates['launch'] * 1e6:.1f} µs."
    )


def _notes(result: Result, titles: Sequence[str]) -> list[str]:
    """What the columns of `ptattn compare` mean, by the beginning of their titles."""
    if result.kind != "compare":
        return []
    calls = [row.timing.calls for row in result.rows if row.timing]
    memory = "GPU memory" if result.settings["device"] == "cuda" else "the process's memory"
    known = {
        "GMACs": "billions of multiply-adds of the whole model, in full or as in the paper.",
        "Block": "measured time of one block's forward, the median of "
        f"{min(calls, default=0)} to {max(calls, default=0)} runs.",
        "Fastest": "the fastest of them.",
        "CUDA graph": "the same, as the replay of a CUDA graph.",
        "All blocks": "not measured but extrapolated, depth × block.",
        "Memory": f"what a block's forward added to {memory} at its peak, without the weights.",
        "vs": "the baseline's time over PT-DiT's; below 1.00× PT-DiT is slower.",
    }
    return [
        f"{start}: {note}"
        for start, note in known.items()
        if any(title.startswith(start) for title in titles)
    ]


# Sections.


def _sections(result: Result) -> list[Section]:
    if result.kind == memory.KIND:
        return [_memory(result.rows)]
    if result.kind == parallel_table.KIND:
        return [parallel_table.section(result.rows)]
    group = groups(row for row in result.rows if row.timing)
    if result.kind == "compare":
        lines = _lines(result.rows)
        return [Section("", lines, _compared(lines, group), lambda row: row.workload)]
    found = []
    for title, kind in (("Operations", None), ("One block", "block"), ("Whole models", "model")):
        rows = [row for row in result.rows if row.timing and row.facts.get("kind") == kind]
        if kind is None:
            rows = [row for row in rows if not row.baseline]
        if rows:
            lines = _lines(rows)
            columns = _operations(lines, group) if kind is None else _models(lines, group)
            used = [c for c in columns if any(c.show(line) for line in lines)]
            several = len(lines) > len(groups(rows))  # else they would only take space
            place = (lambda row: f"{row.workload}, {row.task}") if several else (lambda row: "")
            found.append(Section(title, lines, used, place))
    return found


def _lines(rows: Sequence[Row]) -> list[Line]:
    found: dict[tuple[str, str, str], Line] = {}
    for row in rows:
        found.setdefault((row.workload, row.task, row.name), []).append(row)
    return list(found.values())


Groups = dict[tuple[str, str], list[Row]]


def _operations(lines: Sequence[Line], group: Groups) -> list[Column]:
    """Ours alone, with the fastest baseline beside."""

    def baseline(line: Line) -> str:
        row = line[0]
        best = results.fastest(group[row.workload, row.task], OTHERS, row.mode)
        return best.name if best else "none ran"

    return [
        Column("Operation", lambda line: line[0].workload, left=True),
        Column("Task", lambda line: line[0].task, left=True),
        *_times(lines, "Time"),
        Column("Floor", _floor, narrow=False),
        Column("Of floor", _share),
        Column("Error ÷ eager", lambda line: _known("{:.2f}", line[0].error), narrow=False),
        Column("Baseline", baseline, left=True),
        *_speedups(lines, group),
    ]


def _models(lines: Sequence[Line], group: Groups) -> list[Column]:
    predicted = any(row.status == PREDICTED for line in lines for row in line)
    room = len(_modes(lines)) == 1
    floors = [Column("Floor", _floor, narrow=False), Column("Of floor", _share, narrow=room)]
    return [
        Column("Workload", lambda line: line[0].workload, left=True, narrow=False),
        Column("Task", lambda line: line[0].task, left=True, narrow=False),
        Column("Model", lambda line: line[0].name, left=True),
        *_times(lines, "Time"),
        Column("Tokens/s", _tokens_per_second, narrow=False),
        Column("Memory", _peak, narrow=False),
        *([] if predicted else floors),
        Column("Error", lambda line: _known("{:.1e}", _worst(line)), narrow=False),
        *_speedups(lines, group),
    ]


def _compared(lines: Sequence[Line], group: Groups) -> list[Column]:
    room = len(_modes(lines)) == 1

    def fact(name: str, show: Callable[[float], str]) -> Callable[[Line], str]:
        return lambda line: show(line[0].facts[name])

    def block(line: Line) -> str:
        if line[0].seconds:
            return units.seconds(line[0].seconds)
        return line[0].status if line[0].status in (FAILED, ERROR) else SKIPPED

    def least(line: Line) -> str:
        return units.seconds(line[0].timing.least) if line[0].timing else ""

    def extrapolated(line: Line) -> str:
        return f"≈ {units.seconds(line[0].whole)}" if line[0].whole else ""

    return [
        Column("Size", lambda line: line[0].size, left=True),
        Column("Tokens", lambda line: f"{line[0].tokens:,}", narrow=False),
        Column("Model", lambda line: line[0].model, left=True),
        Column("Parameters", fact("parameters", lambda n: f"{n / 1e6:,.0f} M"), narrow=False),
        Column("GMACs (paper)", fact("macs_paper", units.giga), narrow=False),
        Column("GMACs (full)", fact("macs", units.giga), narrow=room),
        Column("Block", block),
        *_times(lines, "")[1:],
        Column("Fastest", least, narrow=False),
        Column("All blocks", extrapolated, narrow=False),
        Column("Memory", _peak, narrow=room),
        *_speedups(lines, group),
    ]


# Columns.


def _times(lines: Sequence[Line], alone: str) -> list[Column]:
    """A column per mode, of the title `alone` where there is but one; the first with quantiles."""
    modes = _modes(lines)

    def median(mode: str) -> Callable[[Line], str]:
        return lambda line: next(
            (units.seconds(row.seconds) for row in line if row.mode == mode and row.seconds), ""
        )

    found = [Column(MODES[m] if len(modes) > 1 else alone, median(m)) for m in modes]
    if alone:
        found.insert(1, Column("20–80 %", _quantiles, narrow=False))
    return found


def _modes(lines: Sequence[Line]) -> list[str]:
    return [mode for mode in MODES if any(row.mode == mode for line in lines for row in line)]


def _quantiles(line: Line) -> str:
    timing = line[0].timing
    if timing is None or line[0].status == PREDICTED:
        return ""
    return f"{units.seconds(timing.low)} – {units.seconds(timing.high)}"


def _speedups(lines: Sequence[Line], group: Groups) -> list[Column]:
    models = dict.fromkeys(
        row.model for line in lines for row in group.get((line[0].workload, line[0].task), ())
        if row.baseline
    )  # fmt: skip
    own = {row.model for line in lines for row in line if not row.baseline}

    def over(model: str, line: Line) -> list[str]:
        ratios = [results.speedup(r, group.get((r.workload, r.task), ()), model) for r in line]
        known = any(ratio is not None for ratio in ratios)
        return ["–" if ratio is None else units.ratio(ratio) for ratio in ratios] if known else []

    def of_all(model: str) -> Callable[[Line], str]:
        return lambda line: " / ".join(over(model, line))

    def of_last(model: str) -> Callable[[Line], str]:
        return lambda line: "".join(over(model, line)[-1:])

    columns = []
    for model in models:
        if model not in own:
            columns.append(Column(f"vs {model}", of_all(model), narrow=False))
            columns.append(Column(f"vs {model}", of_last(model), wide=False))
    return columns


def _best(line: Line) -> Row:
    return min(line, key=lambda row: row.seconds or float("inf"))


def _floor(line: Line) -> str:
    return units.seconds(line[0].floor) if line[0].floor else ""


def _share(line: Line) -> str:
    return _known("{:.0%}", _best(line).share)


def _worst(line: Line) -> float | None:
    return max((row.error for row in line if row.error is not None), default=None)


def _peak(line: Line) -> str:
    return "" if line[0].peak is None else units.memory(line[0].peak)


def _known(form: str, value: float | None) -> str:
    return "" if value is None else form.format(value)


def _tokens_per_second(line: Line) -> str:
    best = _best(line)
    return f"{units.digits(best.tokens / best.seconds / 1e3)} k" if best.seconds else ""


def _memory(rows: Sequence[Row]) -> Section:
    """A line per model, recipe and number of frames; GB, a measured peak after a slash."""
    group = groups(rows)

    def peak(name: str) -> Column:
        def show(line: Line) -> str:
            own = [row for row in line if row.name == name and row.peak]
            return " / ".join(f"{(row.peak or 0) / 1e9:.1f}" for row in own)

        return Column(name.capitalize(), show)

    columns = [
        Column("Model", lambda line: line[0].model, left=True),
        Column("Recipe", lambda line: line[0].facts["recipe"], left=True),
        Column("Frames", lambda line: str(line[0].facts["frames"])),
        Column("Tokens", lambda line: f"{line[0].tokens:,}", narrow=False),
        Column("Fixed", lambda line: f"{line[0].facts['fixed'] / 1e9:.1f}"),
        *(peak(name) for name in dict.fromkeys(row.name for row in rows)),
        Column("Paper", lambda line: f"{line[0].facts['printed'] or '–'}"),
    ]
    models = list(dict.fromkeys(row.model for row in rows))
    lines = list(group.values())
    lines.sort(key=lambda line: (models.index(line[0].model), line[0].facts["recipe"]))
    title = f"A training step at {memory.SIDE} px, GB"
    return Section(title, lines, columns, lambda row: "")


def _table(section: Section, columns: Sequence[Column]) -> Table:
    """A narrow one of models has their workload and task in a line of its own."""
    narrow = not all(column.wide for column in columns)
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=narrow)
    for column in columns:
        wrap = column.left or column.title.startswith("vs ")
        table.add_column(
            column.title, justify="left" if column.left else "right", no_wrap=not wrap,
            overflow="fold", max_width=None if column.wide else MOST_WIDE,
        )  # fmt: skip
    place = ""
    for line in section.lines:
        if place != section.apart(line[0]):
            if place:
                table.add_section()
            place = section.apart(line[0])
            if columns[0].title == "Model" and section.columns[0].title == "Workload":
                table.add_row(place)
        table.add_row(*(column.show(line) for column in columns))
    return table
