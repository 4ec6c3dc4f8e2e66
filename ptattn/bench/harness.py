"""One case after another within a time limit; what goes wrong with one costs that one alone."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from .. import environment
from .parity import WrongError
from .result import ERROR, FAILED, NOT_REACHED, SKIPPED, Row
from .timing import Clock, Rates

GRAPHS = 64  # of one case's contenders


def free_memory(device: str) -> int | None:
    """Bytes that could still be taken, those that torch keeps for reuse included."""
    free = environment.available_memory(device)
    if free is None or device != "cuda":
        return free
    return free + torch.cuda.memory_reserved() - torch.cuda.memory_allocated()


@dataclass(frozen=True)
class Bench:
    """What every case is measured with."""

    clock: Clock
    rates: Rates
    device: str
    backend: str  # of ours, resolved
    deadline: float = math.inf  # by time.monotonic
    dtype: torch.dtype = torch.bfloat16
    seconds: float = 0.3  # for a task, all contenders together
    compiled: bool = False  # torch.compile takes part
    free_memory: Callable[[str], int | None] = free_memory


class Measurable(Protocol):
    """A case: something with a size that can be measured, and rows that say why it was not."""

    @property
    def memory(self) -> int:
        """About how many bytes measuring takes."""

    def measure(self, bench: Bench) -> list[Row]: ...

    def blank(self, status: str, note: str = "") -> list[Row]: ...


def measure(cases: Sequence[Measurable], bench: Bench) -> Iterator[list[Row]]:
    """The rows of every case in turn; those that come after the deadline are not measured."""
    for case in cases:
        yield case.blank(NOT_REACHED) if time.monotonic() > bench.deadline else run(case, bench)


def run(case: Measurable, bench: Bench) -> list[Row]:
    """Check a case and time it; whatever goes wrong becomes its rows' status.

    Compiled contenders share their outermost code, of which torch keeps so many graphs: those of
    other cases are dropped first.
    """
    torch.compiler.reset()
    free = bench.free_memory(bench.device)
    if free is not None and case.memory > free:
        return case.blank(
            SKIPPED, f"needs about {case.memory / 1e9:.0f} GB, {free / 1e9:.0f} GB are free"
        )
    try:
        with torch._dynamo.config.patch(cache_size_limit=GRAPHS):
            return case.measure(bench)
    except WrongError as error:
        return case.blank(FAILED, str(error))
    except torch.OutOfMemoryError as error:
        return case.blank(SKIPPED, f"out of memory: {first_line(error)}")
    except Exception as error:  # a table of hundreds of cases must survive one
        return case.blank(ERROR, first_line(error))


def first_line(error: BaseException) -> str:
    text = str(error).strip() or type(error).__name__
    return f"{type(error).__name__}: {text.splitlines()[0]}"[:160]
