"""The order of the measurements, the time budget, and what happens when a case fails."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

from .. import environment
from .cases import Block, Entry
from .worker import (
    DTYPES,
    LONG_RUN,
    MAX_RUNS,
    MIN_RUNS,
    CaseError,
    Measure,
    Settings,
    Worker,
    measure,
)

SHARE = 1 / 50  # of the budget, for repeating one case
GRACE = 10.0  # seconds that a case may take beyond the budget before it is stopped


@dataclass(frozen=True)
class Outcome:
    """What came of a block: the seconds of its runs and its peak memory, or why it was skipped."""

    seconds: tuple[float, ...] = ()
    peak: int | None = None  # bytes
    skipped: str | None = None
    predicted: float | None = None  # seconds of one run, before it was measured


@dataclass
class Result:
    """All outcomes, and whether Ctrl-C ended the run."""

    outcomes: dict[Block, Outcome] = field(default_factory=dict)
    interrupted: bool = False

    @property
    def measured(self) -> bool:
        return any(outcome.seconds for outcome in self.outcomes.values())


class Progress(Protocol):
    def start(self, entry: Entry, left: float) -> None:
        """A case begins; all of them are expected to be done in `left` seconds."""

    def finish(self, entry: Entry, outcome: Outcome) -> None: ...


def run(
    entries: Sequence[Entry],
    settings: Settings,
    budget: float,
    progress: Progress,
    measure: Measure = measure,
) -> Result:
    """Measure the block of every entry once within `budget` seconds: images first, smallest first.

    A case that is predicted to take more than what is left of the budget, or more memory than there
    is, is skipped; one that fails or dies costs itself alone. Ctrl-C ends the run and keeps what
    there is.
    """
    unique = {entry.block: entry for entry in reversed(entries)}
    queue = sorted(
        unique.values(), key=lambda entry: (entry.size.frames, entry.size.side, entry.cost)
    )
    session = _Session(settings, budget, measure)
    result = Result()
    try:
        for index, entry in enumerate(queue):
            progress.start(entry, session.expected(queue[index:]))
            outcome = session.measure(entry)
            result.outcomes[entry.block] = outcome
            progress.finish(entry, outcome)
    except KeyboardInterrupt:
        result.interrupted = True
        for entry in queue[len(result.outcomes) :]:
            result.outcomes[entry.block] = Outcome(skipped="interrupted")
    finally:
        session.close()
    return result


class _Session:
    """One worker after another, the clock, and the rates seen so far."""

    def __init__(self, settings: Settings, budget: float, measure: Measure) -> None:
        self.settings, self.budget, self.run = settings, budget, measure
        self.worker: Worker | None = None
        self.began: float | None = None  # when the first worker was ready
        self.rates: dict[str, float] = {}  # seconds per cost, by family, latest last

    @property
    def left(self) -> float:
        """Seconds left of the budget."""
        return self.budget - (0 if self.began is None else time.monotonic() - self.began)

    def predict(self, entry: Entry) -> float | None:
        """Seconds of one run, at the rate of the family's last block, or else of the last block."""
        if not self.rates:
            return None
        family = entry.block.family
        return entry.cost * self.rates.get(family, list(self.rates.values())[-1])

    def expected(self, entries: Sequence[Entry]) -> float:
        """About how many seconds these cases will take together."""
        share = self.budget * SHARE
        seconds = (self.predict(entry) or 0.0 for entry in entries)
        total = sum(max(_least(one), min(share, MAX_RUNS * one)) for one in seconds)
        return max(0.0, min(self.left, total))

    def measure(self, entry: Entry) -> Outcome:
        predicted = self.predict(entry)
        if reason := self._too_much(entry, predicted):
            return Outcome(skipped=reason, predicted=predicted)
        try:
            if self.worker is None:
                self.worker = Worker(self.settings, self.run)
            self.began = self.began or time.monotonic()
            share, limit = self.budget * SHARE, max(0.0, self.left) + GRACE
            seen = self.worker.measure(entry.block, share, limit)
        except CaseError as failure:
            self.close()
            return Outcome(skipped=str(failure), predicted=predicted)
        if not self.worker.reusable:
            self.close()
        self.rates.pop(entry.block.family, None)
        self.rates[entry.block.family] = seen.median / entry.cost
        return Outcome(seen.seconds, seen.peak, predicted=predicted)

    def _too_much(self, entry: Entry, predicted: float | None) -> str | None:
        """Why the case is not tried."""
        if self.left <= 0:
            return "the budget is used up"
        if predicted is not None and (least := _least(predicted)) > self.left:
            return f"predicted {least:.0f} s, {self.left:.0f} s of the budget left"
        free = environment.available_memory(self.settings.device)
        needed = entry.block.memory(DTYPES[self.settings.dtype], self.settings.backend)
        if free is not None and needed > free:
            return f"needs about {needed / 1e9:.3g} GB of memory, {free / 1e9:.3g} GB available"
        return None

    def close(self) -> None:
        if self.worker is not None:
            self.worker.close()
            self.worker = None


def _least(seconds: float) -> float:
    """Seconds of the fewest runs that a case with runs this long takes."""
    return seconds * (MIN_RUNS if seconds >= LONG_RUN else MIN_RUNS + 2)
