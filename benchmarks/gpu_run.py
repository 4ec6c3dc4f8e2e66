"""One case on a GPU: the gate, the opponents that can run, and the times of all, in turns."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from benchmarks import gpu_opponents, gpu_parity, timing
from benchmarks.gpu_cases import TASKS, Case, Inputs
from benchmarks.gpu_opponents import Call
from benchmarks.timing import Clock, Rates, Run, Timing

OURS = "ptattn"
# What became of a row. FAILED: ours is wrong; ERROR: ours did not run.
OK, FAILED, ERROR, SKIPPED, NOT_REACHED = "ok", "FAILED", "ERROR", "skipped", "not reached"


@dataclass
class Row:
    """One task of one case; times in seconds."""

    case: Case
    task: str
    status: str
    note: str = ""
    ours: Timing | None = None
    floor: float = 0.0
    errors: dict[str, float] = field(default_factory=dict)
    opponents: dict[str, Timing] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)  # why an opponent did not run

    @property
    def ratio(self) -> float | None:
        """Our time over the floor."""
        return self.ours.median / self.floor if self.ours else None

    @property
    def rate(self) -> float | None:
        """Useful operations per second; None where there are no products."""
        flops = self.case.flops(self.task)
        return flops / self.ours.median if self.ours and flops else None

    @property
    def best(self) -> tuple[str, Timing] | None:
        """The fastest opponent."""
        known = self.opponents.items()
        return min(known, key=lambda pair: pair[1].median) if known else None

    @property
    def speedup(self) -> float | None:
        return self.best[1].median / self.ours.median if self.ours and self.best else None


def free_memory() -> int:
    """Bytes that torch could still take, those that it keeps for reuse included."""
    kept = torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
    return torch.cuda.mem_get_info()[0] + kept


@dataclass(frozen=True)
class Bench:
    """What every case is measured with."""

    clock: Clock
    rates: Rates
    device: str
    seconds: float = 0.4  # for a task, all contenders together
    free_memory: Callable[[], int] = free_memory


def rows(case: Case, status: str, note: str = "") -> list[Row]:
    """The rows of a case that has no times."""
    return [Row(case, task, status, note) for task in TASKS]


def run(case: Case, bench: Bench, *, compiled: bool) -> list[Row]:
    """Check a case and time it; whatever goes wrong becomes its rows' status."""
    if case.memory > (free := bench.free_memory()):
        needs = f"needs about {case.memory / 1e9:.0f} GB, {free / 1e9:.0f} GB are free"
        return rows(case, SKIPPED, needs)
    try:
        return _measure(case, bench, compiled)
    except gpu_parity.WrongError as error:
        return rows(case, FAILED, str(error))
    except torch.OutOfMemoryError as error:
        return rows(case, SKIPPED, f"out of memory: {_first_line(error)}")
    except Exception as error:  # a table of hundreds of cases must survive one
        return rows(case, ERROR, _first_line(error))


def _measure(case: Case, bench: Bench, compiled: bool) -> list[Row]:
    inputs = case.inputs(bench.device)
    errors = gpu_parity.check(case, inputs)
    calls, refused = _contenders(case, inputs, compiled)
    found = []
    for task in TASKS:
        times, refused_now = _times(calls, inputs, task, bench)
        row = Row(case, task, OK, ours=times.pop(OURS), floor=case.floor(task, bench.rates))
        row.errors = {k: v for k, v in errors.items() if k.startswith("d") == (task != "forward")}
        row.opponents, row.refused = times, refused | refused_now
        found.append(row)
    return found


def _contenders(
    case: Case, inputs: Inputs, compiled: bool
) -> tuple[dict[str, Call], dict[str, str]]:
    """Ours, and the opponents whose forward runs and computes the same."""
    calls: dict[str, Call] = {OURS: lambda tensors: case.call("triton", tensors, inputs.key_mask)}
    refused: dict[str, str] = {}
    with torch.no_grad():
        ours = calls[OURS](inputs.tensors)
        for makers in gpu_opponents.opponents(case, inputs.key_mask, compiled=compiled):
            for name, make in makers.items():
                try:
                    call = make()
                    gpu_parity.check_opponent(ours, call(inputs.tensors))
                    calls[name] = call
                except Exception as error:  # refusals have many types
                    refused[name] = _first_line(error)
            if len(calls) > 1:
                break
    return calls, refused


def _times(
    calls: dict[str, Call], inputs: Inputs, task: str, bench: Bench
) -> tuple[dict[str, Timing], dict[str, str]]:
    runs: dict[str, Run] = {}
    refused: dict[str, str] = {}
    ours: Iterable[Tensor] = ()
    for name, call in calls.items():
        try:
            runs[name] = run = _bind(call, inputs, task)
            if task == "backward":
                grads = run()
                ours = grads if name == OURS else ours
                gpu_parity.check_opponent(ours, grads)
        except Exception as error:
            if name == OURS:
                raise
            runs.pop(name, None)
            refused[name] = _first_line(error)
    with torch.set_grad_enabled(task == "backward"):
        return timing.measure(bench.clock, runs, bench.seconds), refused


def _bind(call: Call, inputs: Inputs, task: str) -> Run:
    """The forward without gradients; the backward by torch.autograd.grad, alone, again and again"""
    if task == "forward":
        return lambda: call(inputs.tensors)
    outs = call(inputs.tensors)
    return lambda: torch.autograd.grad(outs, inputs.tensors, inputs.upstream, retain_graph=True)


def _first_line(error: BaseException) -> str:
    text = str(error).strip() or type(error).__name__
    return f"{type(error).__name__}: {text.splitlines()[0]}"[:160]


def as_dict(row: Row) -> dict[str, Any]:
    """For JSON."""

    def plain(t: Timing | None) -> dict[str, Any] | None:
        return vars(t) if t else None

    case = row.case
    return {
        "case": str(case),
        "op": case.op,
        "model": case.model,
        "grid": list(case.grid),
        "window": list(case.window),
        "shift": list(case.windows.shift),
        "batch": case.batch,
        "heads": case.heads,
        "head_dim": case.head_dim,
        "queries": case.queries,
        "keys": case.keys,
        "task": row.task,
        "bytes": case.bytes(row.task),
        "flops": case.flops(row.task),
        "status": row.status,
        "note": row.note,
        "floor_s": row.floor or None,
        "ours": plain(row.ours),
        "ratio": row.ratio,
        "rate": row.rate,
        "error_over_eager": row.errors,
        "opponents": {name: plain(t) for name, t in row.opponents.items()},
        "refused": row.refused,
        "speedup": row.speedup,
    }
