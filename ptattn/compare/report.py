"""The results, one row per model and size, and their files."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any

from . import units
from .cases import TEXT_TOKENS, Entry
from .runner import Result

SCHEMA = 1
BUSY = 0.5  # cores that others keep busy, from which on times are worth doubting
FILES = ("compare.json", "compare.md", "gflops.png", "latency.png")


@dataclass
class Row:
    """A model at a size. Times in seconds, memory in bytes; None where the case was skipped."""

    model: str
    name: str
    proxy_tokenized: bool
    size: str
    side: int
    frames: int
    tokens: int
    width: int
    depth: int
    parameters: int
    macs_paper: int
    macs_full: int
    block_median: float | None
    block_fastest: float | None
    block_runs: list[float]
    block_predicted: float | None
    model_extrapolated: float | None
    peak_memory: int | None
    skipped: str | None
    # How many times as long an opponent's model takes, by its name; PT-DiT only.
    speedup: dict[str, float] = field(default_factory=dict)


def rows(entries: Sequence[Entry], result: Result) -> list[Row]:
    """Join what was planned with what was measured."""
    table = [_row(entry, result) for entry in entries]
    for ours in table:
        for theirs in table:
            if (ours.side, ours.frames) != (theirs.side, theirs.frames):
                continue
            if not ours.proxy_tokenized or theirs.proxy_tokenized:
                continue
            if ours.model_extrapolated and theirs.model_extrapolated:
                ours.speedup[theirs.name] = theirs.model_extrapolated / ours.model_extrapolated
    return table


def _row(entry: Entry, result: Result) -> Row:
    outcome = result.outcomes[entry.block]
    middle = median(outcome.seconds) if outcome.seconds else None
    return Row(
        model=entry.model,
        name=entry.name,
        proxy_tokenized=entry.is_proxy_tokenized,
        size=str(entry.size),
        side=entry.size.side,
        frames=entry.size.frames,
        tokens=entry.block.tokens,
        width=entry.block.config.dim,
        depth=entry.depth,
        parameters=entry.parameters,
        macs_paper=entry.paper.total,
        macs_full=entry.full.total,
        block_median=middle,
        block_fastest=min(outcome.seconds, default=None),
        block_runs=list(outcome.seconds),
        block_predicted=outcome.predicted,
        model_extrapolated=None if middle is None else middle * entry.depth,
        peak_memory=outcome.peak,
        skipped=outcome.skipped,
    )


@dataclass(frozen=True)
class Report:
    """Everything that is shown and written."""

    findings: list[str]
    environment: dict[str, Any]
    settings: dict[str, Any]  # device, dtype, backend, threads, budget
    command: str
    date: str
    seconds: float  # that measuring took
    interrupted: bool
    rows: list[Row]

    @property
    def machine(self) -> str:
        """One line: machine, versions, how it was measured."""
        known, used = self.environment, self.settings
        if used["device"] == "cuda":
            name = known["gpus"][0]
        else:
            memory = "" if known["memory"] is None else f", {units.memory(known['memory'])}"
            threads = "1 thread" if used["threads"] == 1 else f"{used['threads']} threads"
            name = f"{known['cpu']}, {threads}{memory}"
        others = "" if (known["load"] or 0) < BUSY else f"; load {known['load']:.1f} at the start"
        commit = "" if known["commit"] is None else f" ({_short(known['commit'])})"
        return (
            f"{name}; ptattn {known['ptattn']}{commit}, torch {known['torch']}, "
            f"Python {known['python']}; {used['dtype']}, backend {used['backend']}, batch 1, "
            f"{TEXT_TOKENS} text tokens; {self.date[:10]}{others}"
        )

    @property
    def notes(self) -> dict[str, str]:
        """What the columns mean, by the beginning of their titles."""
        runs = [len(row.block_runs) for row in self.rows if row.block_runs]
        memory = "GPU memory" if self.settings["device"] == "cuda" else "the process's memory"
        return {
            "GMACs": "billions of multiply-adds of the whole model, in full or as in the paper.",
            "Block": "measured time of one block's forward, the median of "
            f"{min(runs, default=0)} to {max(runs, default=0)} runs.",
            "Fastest": "the fastest of them.",
            "All blocks": "not measured but extrapolated, depth × block.",
            "Memory": f"what a block's forward added to {memory} at its peak, without the weights.",
            "vs": "the opponent's time over PT-DiT's; below 1.00× PT-DiT is slower.",
        }

    @property
    def skipped(self) -> list[str]:
        """Every case without a measurement, and why."""
        cases: dict[str, list[str]] = {}
        for row in self.rows:
            if row.skipped:
                cases.setdefault(row.skipped, []).append(f"{row.name} {row.size}")
        return [f"{', '.join(names)}: {reason}" for reason, names in cases.items()]

    def to_json(self) -> str:
        fields = {"schema": SCHEMA, **dataclasses.asdict(self)}
        return json.dumps(fields, indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def _short(commit: str) -> str:
    return commit[:10] + ("-dirty" if commit.endswith("-dirty") else "")
