"""One workload after another within a time limit; what goes wrong with one costs that one alone."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any, Protocol, TypeVar

import torch
import torch._functorch.config

from .. import environment
from . import clocks, peaks
from .clocks import LONG_RUN, Clock, Rates, Run, WallClock
from .parity import WrongError
from .results import COMPILED, ERROR, FAILED, NOT_REACHED, SKIPPED, Row

GRAPHS = 64  # of torch.compile, of one workload's implementations


def free_memory(device: str) -> int | None:
    """Bytes that could still be taken, those that torch keeps for reuse included."""
    free = environment.available_memory(device)
    if free is None or device != "cuda":
        return free
    return free + torch.cuda.memory_reserved() - torch.cuda.memory_allocated()


@dataclass(frozen=True)
class Bench:
    """What every workload is measured with."""

    clock: Clock = field(default_factory=WallClock)
    rates: Rates | None = None  # where no floor is wanted
    device: str = "cpu"
    backend: str = "auto"  # of the candidates
    deadline: float = math.inf  # by time.monotonic
    seconds: float = 0.3  # for a task, all implementations together
    calls: tuple[int, int] | None = None  # the clock's, where it is None
    free_memory: Callable[[str], int | None] = free_memory


class Workload:
    """Something that can be measured, and rows that say why it was not."""

    family = ""  # workloads of one family take time in proportion to their cost

    @property
    def memory(self) -> int:
        """About how many bytes measuring takes."""
        return 0

    @property
    def cost(self) -> float:
        """What its time is predicted from; 0 where that cannot be said."""
        return 0.0

    @property
    def checks(self) -> int:
        """Calls that the gate takes as long as."""
        return 0

    @property
    def compiling(self) -> int:
        """Implementations that torch.compile takes part in."""
        return 0

    def measure(self, bench: Bench) -> list[Row]:
        raise NotImplementedError

    def blank(self, status: str, note: str = "") -> list[Row]:
        raise NotImplementedError


class Watch(Protocol):
    def start(self, workload: Workload, left: float) -> None:
        """One begins; all of them are expected to be done in `left` seconds."""

    def finish(self, rows: Sequence[Row]) -> None:
        """It is done."""


Runner = Callable[[Workload, Bench], list[Row]]


def run_here(workload: Workload, bench: Bench) -> list[Row]:
    """Check a workload and time it; whatever goes wrong becomes its rows' status."""
    free = bench.free_memory(bench.device)
    if free is not None and workload.memory > free:
        needed = f"needs about {workload.memory / 1e9:.3g} GB of memory"
        return workload.blank(SKIPPED, f"{needed}, {free / 1e9:.3g} GB available")
    try:
        with _room_for_graphs() if workload.compiling else nullcontext():
            return workload.measure(bench)
    except Exception as error:  # a table of hundreds of workloads must survive one
        return workload.blank(**outcome(error))


def measure(
    workloads: Sequence[Workload],
    bench: Bench,
    watch: Watch,
    found: dict[int, list[Row]],
    run: Runner = run_here,
) -> None:
    """Measure them in turn; what would end after the deadline is not begun.

    Args:
        found: gets the rows of each, by its place.
        run: measures one of them.

    Raises:
        KeyboardInterrupt: what it keeps from being measured has rows that say so.
    """
    pace = Pace()
    try:
        for i, workload in enumerate(workloads):
            begin = time.monotonic()
            left = bench.deadline - begin
            watch.start(workload, min(left, sum(pace.expected(w, bench) for w in workloads[i:])))
            expected = pace.expected(workload, bench)
            if left <= 0:
                found[i] = workload.blank(NOT_REACHED, "the budget is used up")
            elif expected > left:
                reason = f"predicted {expected:.0f} s, {left:.0f} s of it left"
                found[i] = workload.blank(NOT_REACHED, reason)
            else:
                found[i] = run(workload, bench)
                pace.learn(workload, bench, found[i], time.monotonic() - begin)
            watch.finish(found[i])
    except KeyboardInterrupt:
        for i, workload in enumerate(workloads):
            if i not in found:
                found[i] = workload.blank(NOT_REACHED, "interrupted")
        raise


@dataclass
class Pace:
    """Seconds of one call per cost, by family of workloads, the latest last; and of compiling."""

    rates: dict[str, float] = field(default_factory=dict)
    compiling: float = 0.0  # an implementation, as the last workload's took

    def expected(self, workload: Workload, bench: Bench) -> float:
        """Seconds at the pace of the family's last workload, or else of the last one, and those of
        compiling; 0 of the first, and of what has no cost those of compiling alone."""
        compiling = workload.compiling * self.compiling
        if not self.rates or not workload.cost:
            return compiling
        rate = self.rates.get(workload.family, list(self.rates.values())[-1])
        fewest, most = bench.calls or bench.clock.calls
        once = workload.cost * rate
        fewest = min(fewest, 3) if once > LONG_RUN else fewest
        return compiling + max(once * (fewest + workload.checks), min(bench.seconds, most * once))

    def learn(self, workload: Workload, bench: Bench, rows: Sequence[Row], took: float) -> None:
        seconds = sum(row.seconds for row in rows if row.seconds)
        if not seconds or not workload.cost:
            return
        self.rates.pop(workload.family, None)
        self.rates[workload.family] = seconds / workload.cost
        compiled = sum(row.mode == COMPILED and row.timing is not None for row in rows)
        if compiled:
            beside = self.expected(workload, bench) - workload.compiling * self.compiling
            self.compiling = max(0.0, took - beside) / compiled


def outcome(error: Exception) -> dict[str, Any]:
    """The status and note of what raised it."""
    if isinstance(error, WrongError):
        return dict(status=FAILED, note=str(error))
    if isinstance(error, torch.OutOfMemoryError):
        return dict(status=SKIPPED, note=f"out of memory: {first_line(error)}")
    return dict(status=ERROR, note=first_line(error))


@contextmanager
def _room_for_graphs() -> Iterator[None]:
    """What is compiled shares its outermost code, of which torch keeps so many graphs: those of
    other workloads are dropped first. No graph comes from disk, where torch finds one again
    whatever attention kernel is asked for now."""
    torch.compiler.reset()
    with ExitStack() as stack:
        stack.enter_context(torch._dynamo.config.patch(cache_size_limit=GRAPHS))
        stack.enter_context(torch._functorch.config.patch(enable_autograd_cache=False))
        yield


def first_line(error: BaseException) -> str:
    text = str(error).strip() or type(error).__name__
    return f"{type(error).__name__}: {text.splitlines()[0]}"[:160]


# What workloads of several implementations share.

Found = tuple[Row, Run | None]  # a row, and how to run what it is of, or it says why not
Make = TypeVar("Make")


def first_that_run(
    offered: Iterable[dict[str, Make]], attempt: Callable[[str, Make], Iterable[Found]]
) -> Iterator[Found]:
    """Attempts, by name; those of a later dict only if none of an earlier one runs."""
    for makers in offered:
        found = [one for name, make in makers.items() for one in attempt(name, make)]
        yield from found
        if any(run is not None for _, run in found):
            return


def timed(found: Sequence[Found], clock: Clock, bench: Bench, peaked: Sequence[str]) -> list[Row]:
    """The rows with times, taken in turns, and in the modes of `peaked` with the memory added."""
    runs = {i: run for i, (_, run) in enumerate(found) if run is not None}
    seen = {
        i: peaks.added(run, bench.device) for i, run in runs.items() if found[i][0].mode in peaked
    }
    before = {i: seconds for i, (_, seconds) in seen.items()}
    times = clocks.measure(clock, runs, bench.seconds, bench.calls, before)
    return [
        replace(row, timing=times.get(i), peak=seen[i][0] if i in seen else None)
        for i, (row, _) in enumerate(found)
    ]
