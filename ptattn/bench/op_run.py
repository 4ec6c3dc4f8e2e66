"""One operation: the gate, the opponents that can run, and the times of all, in turns."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterable

import torch
from torch import Tensor

from . import op_opponents, op_parity, timing
from .harness import Bench, first_line
from .op_cases import TASKS, Case, Inputs
from .op_opponents import Call
from .result import REFUSED, Row
from .timing import Run, Timing

OURS, OTHERS = "ptattn", "torch"
# The cases for which an opponent is compiled, and the seconds that must be left for it.
COMPILE_RESERVE = 100.0
COMPILED = tuple(
    f"{op} XL {size} w{window} b1"
    for size, window in (("1024 px", "1x8x8"), ("2048 px", "1x16x16"))
    for op in ("window", "shifted", "norm", "norm-pool", "pool")
)


@dataclasses.dataclass(frozen=True)
class Measured:
    """A case as the harness takes it."""

    case: Case

    def __str__(self) -> str:
        return str(self.case)

    @property
    def memory(self) -> int:
        return self.case.memory

    def blank(self, status: str, note: str = "") -> list[Row]:
        return [_row(self.case, task, OURS, status=status, note=note) for task in TASKS]

    def measure(self, bench: Bench) -> list[Row]:
        case, inputs = self.case, self.case.inputs(bench.device)
        errors = op_parity.check(case, inputs, bench.backend)
        calls, refused = _contenders(case, inputs, bench)
        found = []
        for task in TASKS:
            times, refused_now = _times(calls, inputs, task, bench)
            worst = max(e for k, e in errors.items() if k.startswith("d") == (task != "forward"))
            floor = case.floor(task, bench.rates)
            found += [
                _row(case, task, name, timing=t, floor=floor, error=worst if name == OURS else None)
                for name, t in times.items()
            ]
            found += [
                _row(case, task, name, status=REFUSED, note=why)
                for name, why in (refused | refused_now).items()
            ]
        return found


def _row(case: Case, task: str, name: str, **fields: object) -> Row:
    ours = name == OURS
    model = OURS if ours else OTHERS
    known = dict(ours=ours, tokens=case.tokens, facts=case.facts(task))
    return Row(str(case), task, name, model, **known, **fields)  # type: ignore[arg-type]


def _contenders(case: Case, inputs: Inputs, bench: Bench) -> tuple[dict[str, Call], dict[str, str]]:
    """Ours, and the opponents whose forward runs and computes the same."""
    backend = bench.backend
    calls: dict[str, Call] = {OURS: lambda tensors: case.call(backend, tensors, inputs.key_mask)}
    refused: dict[str, str] = {}
    left = bench.deadline - time.monotonic()
    compiled = bench.compiled and left > COMPILE_RESERVE and str(case) in COMPILED
    offered = op_opponents.opponents(case, inputs.key_mask, backend=backend, compiled=compiled)
    with torch.no_grad():
        ours = calls[OURS](inputs.tensors)
        for makers in offered:
            for name, make in makers.items():
                try:
                    call = make()
                    op_parity.check_opponent(ours, call(inputs.tensors))
                    calls[name] = call
                except Exception as error:  # refusals have many types
                    refused[name] = first_line(error)
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
            runs[name] = step = bind(call, inputs, task)
            if task == "backward":
                grads = step()
                ours = grads if name == OURS else ours
                op_parity.check_opponent(ours, grads)
        except Exception as error:
            if name == OURS:
                raise
            runs.pop(name, None)
            refused[name] = first_line(error)
    with torch.set_grad_enabled(task == "backward"):
        return timing.measure(bench.clock, runs, bench.seconds), refused


def bind(call: Call, inputs: Inputs, task: str) -> Run:
    """The forward without gradients; the backward by torch.autograd.grad, alone, again and again"""
    if task == "forward":
        return lambda: call(inputs.tensors)
    outs = call(inputs.tensors)
    return lambda: torch.autograd.grad(outs, inputs.tensors, inputs.upstream, retain_graph=True)
