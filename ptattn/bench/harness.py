"""One workload after another within a time limit; what goes wrong with one costs that one alone."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol

import torch
import torch._functorch.config

from .. import environment
from .clocks import LONG_RUN, Clock, Rates
from .isolation import Worker, WorkerError
from .parity import WrongError
from .results import ERROR, FAILED, NOT_REACHED, SKIPPED, Row
from .workloads import Settings

GRAPHS = 64  # of torch.compile, of one workload's implementations
GRACE = 10.0  # seconds that a workload may take beyond the budget before it is stopped


def free_memory(device: str) -> int | None:
    """Bytes that could still be taken, those that torch keeps for reuse included."""
    free = environment.available_memory(device)
    if free is None or device != "cuda":
        return free
    return free + torch.cuda.memory_reserved() - torch.cuda.memory_allocated()


@dataclass(frozen=True)
class Bench:
    """What every workload is measured with."""

    clock: Clock
    rates: Rates | None  # None where no floor is wanted
    device: str
    backend: str  # of the candidates, resolved
    deadline: float = math.inf  # by time.monotonic
    seconds: float = 0.3  # for a task, all implementations together
    calls: tuple[int, int] | None = None  # the clock's, where it is None
    compiled: bool = False  # torch.compile takes part
    quantized: bool = False  # linear layers in fp8 take part
    free_memory: Callable[[str], int | None] = free_memory


class Workload(Protocol):
    """Something that can be measured, and rows that say why it was not."""

    @property
    def memory(self) -> int:
        """About how many bytes measuring takes."""

    def measure(self, bench: Bench) -> list[Row]: ...

    def blank(self, status: str, note: str = "") -> list[Row]: ...


Run = Callable[[Workload, Bench], list[Row]]


class Watch(Protocol):
    def start(self, workload: Workload, left: float) -> None:
        """One begins; all of them are expected to be done in `left` seconds."""


def measure(
    workloads: Sequence[Workload], bench: Bench, watch: Watch, run: Run | None = None
) -> Iterator[list[Row]]:
    """The rows of every workload in turn; what would end after the deadline is not begun.

    Args:
        run: measures one of them; in this process by default.

    Raises:
        KeyboardInterrupt: after the rows of all that it keeps from being measured.
    """
    pace = Pace()
    for i, workload in enumerate(workloads):
        try:
            left = bench.deadline - time.monotonic()
            watch.start(workload, min(left, sum(pace.expected(w, bench) for w in workloads[i:])))
            reason = pace.too_late(workload, bench)
            rows = (
                workload.blank(NOT_REACHED, reason)
                if reason
                else (run or run_here)(workload, bench)
            )
        except KeyboardInterrupt:
            yield [row for rest in workloads[i:] for row in rest.blank(NOT_REACHED, "interrupted")]
            raise
        pace.learn(workload, rows)
        yield rows


@dataclass
class Pace:
    """Seconds of one call per cost, by family of workloads, the latest last."""

    rates: dict[str, float] = field(default_factory=dict)

    def expected(self, workload: Any, bench: Bench) -> float:
        """Seconds at the pace of the family's last workload, or else of the last one; 0 of the
        first, and of what has no cost."""
        if not self.rates or not hasattr(workload, "cost"):
            return 0.0
        rate = self.rates.get(workload.family, list(self.rates.values())[-1])
        fewest, most = bench.calls or bench.clock.calls
        once = workload.cost * rate
        fewest = min(fewest, 3) if once > LONG_RUN else fewest
        return max(once * (fewest + workload.checks), min(bench.seconds, most * once))

    def learn(self, workload: Any, rows: Sequence[Row]) -> None:
        seconds = sum(row.seconds for row in rows if row.seconds)
        if seconds and hasattr(workload, "cost"):
            self.rates.pop(workload.family, None)
            self.rates[workload.family] = seconds / workload.cost

    def too_late(self, workload: Any, bench: Bench) -> str:
        """Why it is not begun; empty if it is."""
        left, expected = bench.deadline - time.monotonic(), self.expected(workload, bench)
        if left <= 0:
            return "the budget is used up"
        return "" if expected <= left else f"predicted {expected:.0f} s, {left:.0f} s of it left"


class Isolated:
    """`run_here`, but in a child process: what ends that one costs one workload.

    Args:
        settings: of the child.
        bench: makes there what workloads are measured with; the child must be able to import it.
    """

    def __init__(self, settings: Settings, bench: Callable[[Settings], Bench]) -> None:
        self._settings, self._make = settings, partial(_in_child, bench)
        self._worker: Worker | None = None

    def start(self) -> Worker:
        """Raises WorkerError if the child does not start."""
        self._worker = self._worker or Worker(self._settings, self._make)
        return self._worker

    def __call__(self, workload: Workload, bench: Bench) -> list[Row]:
        try:
            worker = self.start()
            left = max(0.0, bench.deadline - time.monotonic())
            rows: list[Row] = worker.measure(workload, left + GRACE)
        except WorkerError as failure:
            self.close()
            return workload.blank(SKIPPED, str(failure))
        if not worker.reusable:
            self.close()
        return rows

    def close(self) -> None:
        if self._worker is not None:
            self._worker.close()
            self._worker = None


def _in_child(bench: Callable[[Settings], Bench], settings: Settings) -> Callable[[Any], Any]:
    made = bench(settings)
    return lambda workload: run_here(workload, made)


def run_here(workload: Workload, bench: Bench) -> list[Row]:
    """Check a workload and time it; whatever goes wrong becomes its rows' status."""
    free = bench.free_memory(bench.device)
    if free is not None and workload.memory > free:
        needed = f"needs about {workload.memory / 1e9:.3g} GB of memory"
        return workload.blank(SKIPPED, f"{needed}, {free / 1e9:.3g} GB available")
    try:
        with _room_for_graphs() if bench.compiled or bench.quantized else nullcontext():
            return workload.measure(bench)
    except WrongError as error:
        return workload.blank(FAILED, str(error))
    except torch.OutOfMemoryError as error:
        return workload.blank(SKIPPED, f"out of memory: {first_line(error)}")
    except Exception as error:  # a table of hundreds of workloads must survive one
        return workload.blank(ERROR, first_line(error))


def _room_for_graphs() -> AbstractContextManager[Any]:
    """What is compiled shares its outermost code, of which torch keeps so many graphs: those of
    other workloads are dropped first. Nor are graphs kept on disk, where torch finds them again
    whatever attention kernel is asked for now."""
    torch.compiler.reset()
    stack = ExitStack()
    stack.enter_context(torch._dynamo.config.patch(cache_size_limit=GRAPHS))
    stack.enter_context(torch._functorch.config.patch(enable_autograd_cache=False))
    return stack


def first_line(error: BaseException) -> str:
    text = str(error).strip() or type(error).__name__
    return f"{type(error).__name__}: {text.splitlines()[0]}"[:160]
