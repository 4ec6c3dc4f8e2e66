"""A result as markdown, and on a terminal of any width."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

from rich import box
from rich.console import Console
from rich.measure import Measurement
from rich.table import Table

from . import memory, parallel, results, units
from .op_run import OTHERS
from .results import Groups, Result, Row, groups

MODES = {
    results.EAGER: "Eager",
    results.COMPILED: "Compiled",
    results.GRAPH: "CUDA graph",
    results.GPU_ALONE: "GPU alone",
}
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


# A line of a table: the rows of one implementation, equal in these, a row per mode.
Line = list[Row]
ROW = ("workload", "task", "name")


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


def markdown(result: Result, notes: Sequence[str] = ()) -> str:
    took = f" in {result.seconds:.0f} s" if result.seconds >= 1 else ""
    parts = [f"# {_title(result)}", f"{result.machine}.\nMade by `{result.command}`{took}."]
    parts += notes or ([ceilings(result), TIMED] if result.rates else [])
    for section in _sections(result):
        columns = _wide(section)
        marks = ["---" if column.left else "---:" for column in columns]
        body = [[column.show(line) for column in columns] for line in section.lines]
        lines = ([column.title for column in columns], marks, *body)
        parts += [f"## {section.title}"] if section.title else []
        parts += ["\n".join("| " + " | ".join(cells) + " |" for cells in lines)]
        parts += _listed([("Columns", _notes(result, columns))], "\n\n")
    parts += _listed(_remarks(result), "\n\n")
    return "\n\n".join([*parts, f"Rows: {results.summary(result.rows)}."]) + "\n"


def show(result: Result, console: Console, notes: Sequence[str] = ()) -> None:
    """Print the tables, with all columns where they fit."""

    def say(text: str) -> None:
        console.print(text, highlight=False, markup=False)

    def wrap(text: str) -> str:
        return textwrap.fill(text, console.width, subsequent_indent="  ", break_on_hyphens=False)

    say(f"{_title(result)}\n{result.machine}")
    if notes or result.rates:
        say("\n".join(notes) or ceilings(result))
    for section in _sections(result):
        columns = _wide(section)
        unlimited = console.options.update(max_width=1000)
        if Measurement.get(console, unlimited, _table(section, columns)).maximum > console.width:
            columns = [column for column in section.columns if column.narrow]
        if section.title:
            say(f"\n{section.title}")
        console.print(_table(section, columns))
        for text in _listed([("Columns", _notes(result, columns))], "\n", wrap):
            say(f"{text}\n")
    for text in _listed(_remarks(result), "\n", wrap):
        say(f"{text}\n")


def _wide(section: Section) -> list[Column]:
    return [column for column in section.columns if column.wide]


def _remarks(result: Result) -> list[tuple[str, Sequence[str]]]:
    return [("Left out", results.omissions(result.rows)), ("Findings", result.findings)]


def _listed(
    lists: Iterable[tuple[str, Sequence[str]]], apart: str, wrap: Callable[[str], str] = str
) -> list[str]:
    """Each with its head, if there is anything in it."""
    return [
        f"{head}:{apart}" + "\n".join(wrap(f"- {text}") for text in texts)
        for head, texts in lists
        if texts
    ]


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


def _notes(result: Result, columns: Sequence[Column]) -> list[str]:
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
        if any(column.title.startswith(start) for column in columns)
    ]


# Sections.


def _sections(result: Result) -> list[Section]:
    if result.kind == memory.KIND:
        return [_memory([row for row in result.rows if row.peak])]
    if result.kind == parallel.KIND:
        return [_parallel([row for row in result.rows if row.timing])]
    group = groups(row for row in result.rows if row.timing)
    if result.kind == "compare":
        lines = list(groups(result.rows, *ROW).values())
        return [Section("", lines, _compared(lines, group), lambda row: row.workload)]
    found = []
    for title, kind in (("Operations", None), ("One block", "block"), ("Whole models", "model")):
        rows = [row for row in result.rows if row.timing and row.facts.get("kind") == kind]
        if kind is None:
            rows = [row for row in rows if not row.baseline]
        if rows:
            lines = list(groups(rows, *ROW).values())
            columns = _operations(lines, group) if kind is None else _models(lines, group)
            used = [c for c in columns if any(c.show(line) for line in lines)]
            several = len(lines) > len(groups(rows))  # else they would only take space
            place = (lambda row: f"{row.workload}, {row.task}") if several else (lambda row: "")
            found.append(Section(title, lines, used, place))
    return found


def _operations(lines: Sequence[Line], group: Groups) -> list[Column]:
    """Ours alone, with the fastest baseline beside."""

    def baseline(row: Row) -> str:
        best = results.fastest(group[row.workload, row.task], OTHERS, row.mode)
        return best.name if best else "none ran"

    return [
        Column("Operation", of(lambda row: row.workload), left=True),
        Column("Task", of(lambda row: row.task), left=True),
        *_times(lines, "Time"),
        Column("Floor", of(lambda row: row.floor, units.seconds), narrow=False),
        Column("Of floor", of_fastest(lambda row: row.share, "{:.0%}".format)),
        Column("Error ÷ eager", of(lambda row: row.error, "{:.2f}".format), narrow=False),
        Column("Baseline", of(baseline), left=True),
        *_speedups(lines, group),
    ]


def _models(lines: Sequence[Line], group: Groups) -> list[Column]:
    predicted = any(row.status == results.PREDICTED for line in lines for row in line)
    room = len(_modes(lines)) == 1
    floors = [
        Column("Floor", of(lambda row: row.floor, units.seconds), narrow=False),
        Column("Of floor", of_fastest(lambda row: row.share, "{:.0%}".format), narrow=room),
    ]

    def error(line: Line) -> str:
        known = [row.error for row in line if row.error is not None]
        return f"{max(known):.1e}" if known else ""

    def rate(row: Row) -> float | None:
        return row.tokens / row.seconds if row.seconds else None

    return [
        Column("Workload", of(lambda row: row.workload), left=True, narrow=False),
        Column("Task", of(lambda row: row.task), left=True, narrow=False),
        Column("Model", of(lambda row: row.name), left=True),
        *_times(lines, "Time"),
        Column("Tokens/s", of_fastest(rate, lambda n: f"{units.digits(n / 1e3)} k"), narrow=False),
        Column("Memory", of(lambda row: row.peak, units.memory), narrow=False),
        *([] if predicted else floors),
        Column("Error", error, narrow=False),
        *_speedups(lines, group),
    ]


def _compared(lines: Sequence[Line], group: Groups) -> list[Column]:
    room = len(_modes(lines)) == 1

    def block(row: Row) -> str:
        if row.seconds:
            return units.seconds(row.seconds)
        return row.status if row.status in (results.FAILED, results.ERROR) else results.SKIPPED

    return [
        Column("Size", of(lambda row: row.size), left=True),
        Column("Tokens", of(lambda row: row.tokens, "{:,}".format), narrow=False),
        Column("Model", of(lambda row: row.model), left=True),
        Column("Parameters", fact("parameters", lambda n: f"{n / 1e6:,.0f} M"), narrow=False),
        Column("GMACs (paper)", fact("macs_paper", units.giga), narrow=False),
        Column("GMACs (full)", fact("macs", units.giga), narrow=room),
        Column("Block", of(block)),
        *_times(lines, "")[1:],
        Column("Fastest", of(lambda row: row.timing and row.timing.least, units.seconds),
               narrow=False),
        Column("All blocks", of(lambda row: row.whole, lambda s: f"≈ {units.seconds(s)}"),
               narrow=False),
        Column("Memory", of(lambda row: row.peak, units.memory), narrow=room),
        *_speedups(lines, group),
    ]  # fmt: skip


def _memory(rows: Sequence[Row]) -> Section:
    """A line per model, recipe and number of frames; GB, a measured peak after a slash."""

    def peak(name: str) -> Column:
        def show(line: Line) -> str:
            return " / ".join(f"{(row.peak or 0) / 1e9:.1f}" for row in line if row.name == name)

        return Column(name.capitalize(), show)

    columns = [
        Column("Model", of(lambda row: row.model), left=True),
        Column("Recipe", fact("recipe"), left=True),
        Column("Frames", fact("frames")),
        Column("Tokens", of(lambda row: row.tokens, "{:,}".format), narrow=False),
        Column("Fixed", fact("fixed", lambda n: f"{n / 1e9:.1f}")),
        *(peak(name) for name in dict.fromkeys(row.name for row in rows)),
        Column("Paper", of(lambda row: row.facts["printed"] or "–")),
    ]
    models = list(dict.fromkeys(row.model for row in rows))
    lines = list(groups(rows).values())
    lines.sort(key=lambda line: (models.index(line[0].model), line[0].facts["recipe"]))
    title = f"A training step at {memory.SIDE} px, GB"
    return Section(title, lines, columns, lambda row: "")


def _parallel(rows: Sequence[Row]) -> Section:
    """A line per size, number of GPUs and scheme."""
    columns = [
        Column("Size", of(lambda row: row.size), left=True),
        Column("GPUs", fact("ranks")),
        Column("Split", of(lambda row: f"{row.model}, {row.name}"), left=True),
        Column("Parts", fact("parts", lambda parts: "×".join(map(str, parts))), narrow=False),
        Column("Sent", fact("sent", units.memory)),
        Column("Busiest", fact("busiest", units.memory), narrow=False),
        *(Column(f"of {name}", fact(f"of {name}", "{:.1%}".format), narrow=name == "ulysses")
          for name in parallel.OTHERS),
        Column("Block", of(lambda row: row.seconds, units.seconds)),
        *(Column(link, fact(link, units.seconds)) for link in parallel.LINKS),
        Column("Memory", of(lambda row: row.peak, units.memory), narrow=False),
    ]  # fmt: skip
    return Section("", [[row] for row in rows], columns, lambda row: row.workload)


# Columns.


def of(get: Callable[[Row], Any], show: Callable[[Any], str] = str) -> Callable[[Line], str]:
    """Of a line's first row; empty where that has nothing."""

    def cell(line: Line) -> str:
        value = get(line[0])
        return "" if value is None else show(value)

    return cell


def of_fastest(get: Callable[[Row], Any], show: Callable[[Any], str]) -> Callable[[Line], str]:
    cell = of(get, show)
    return lambda line: cell([min(line, key=lambda row: row.seconds or float("inf"))])


def fact(name: str, show: Callable[[Any], str] = str) -> Callable[[Line], str]:
    return of(lambda row: row.facts.get(name), show)


def _times(lines: Sequence[Line], alone: str) -> list[Column]:
    """A column per mode, of the title `alone` where there is but one; the first with quantiles."""
    modes = _modes(lines)

    def median(mode: str) -> Callable[[Line], str]:
        return lambda line: next(
            (units.seconds(row.seconds) for row in line if row.mode == mode and row.seconds), ""
        )

    def quantiles(row: Row) -> str | None:
        if row.timing is None or row.status == results.PREDICTED:
            return None
        return f"{units.seconds(row.timing.low)} – {units.seconds(row.timing.high)}"

    found = [Column(MODES[m] if len(modes) > 1 else alone, median(m)) for m in modes]
    if alone:
        found.insert(1, Column("20–80 %", of(quantiles), narrow=False))
    return found


def _modes(lines: Sequence[Line]) -> list[str]:
    return [mode for mode in MODES if any(row.mode == mode for line in lines for row in line)]


def _speedups(lines: Sequence[Line], group: Groups) -> list[Column]:
    """Over each baseline, in every mode; where there is little room, in the last one."""
    places = dict.fromkeys((row.workload, row.task) for row, *_ in lines)
    rows = [row for place in places for row in group.get(place, ())]
    own = {row.model for line in lines for row in line if not row.baseline}

    def over(model: str, modes: slice) -> Callable[[Line], str]:
        def cell(line: Line) -> str:
            ratios = [results.speedup(r, group.get((r.workload, r.task), ()), model) for r in line]
            shown = ["–" if ratio is None else units.ratio(ratio) for ratio in ratios]
            return " / ".join(shown[modes]) if any(ratio is not None for ratio in ratios) else ""

        return cell

    return [
        column
        for model in dict.fromkeys(row.model for row in rows if row.baseline)
        if model not in own
        for column in (
            Column(f"vs {model}", over(model, slice(None)), narrow=False),
            Column(f"vs {model}", over(model, slice(-1, None)), wide=False),
        )
    ]


def _table(section: Section, columns: Sequence[Column]) -> Table:
    """A narrow one of models has their workload and task in a line of its own."""
    narrow = not all(column.wide for column in columns)
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=narrow)
    for column in columns:
        wrap = column.left or column.title.startswith(("vs ", "Keeps "))
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
