"""One operation: the gate, the baselines that can run, and the times of all, in turns."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterable

import torch
from torch import Tensor

from . import clocks, op_baselines, op_gate
from .clocks import Run, Timing
from .harness import Bench, first_line
from .op_baselines import Call
from .op_workloads import TASKS, Inputs, Operation
from .results import EAGER, GPU_ALONE, REFUSED, Row

OURS, OTHERS = "ptattn", "torch"
# The operations of which a baseline is compiled, and the seconds that must be left for it.
COMPILE_RESERVE = 100.0
COMPILED = tuple(
    f"{op} XL {size} w{window} b1"
    for size, window in (("1024 px", "1x8x8"), ("2048 px", "1x16x16"))
    for op in ("window", "shifted", "norm", "norm-pool", "pool")
)


@dataclasses.dataclass(frozen=True)
class OperationWorkload:
    """An operation as the harness takes it."""

    operation: Operation

    def __str__(self) -> str:
        return str(self.operation)

    @property
    def memory(self) -> int:
        return self.operation.memory

    def blank(self, status: str, note: str = "") -> list[Row]:
        return [self._row(task, OURS, status=status, note=note) for task in TASKS]

    def measure(self, bench: Bench) -> list[Row]:
        inputs = self.operation.inputs(bench.device)
        errors = op_gate.check(self.operation, inputs, bench.backend)
        calls, refused = self._implementations(inputs, bench)
        mode = GPU_ALONE if bench.device == "cuda" else EAGER
        found = []
        for task in TASKS:
            times, refused_now = _times(calls, inputs, task, bench)
            worst = max(e for k, e in errors.items() if k.startswith("d") == (task != "forward"))
            floor = None if bench.rates is None else self.operation.floor(task, bench.rates)
            known = dict(mode=mode, floor=floor)
            for name, timing in times.items():
                error = worst if name == OURS else None
                found.append(self._row(task, name, timing=timing, error=error, **known))
            for name, why in (refused | refused_now).items():
                found.append(self._row(task, name, status=REFUSED, note=why, mode=mode))
        return found

    def _row(self, task: str, name: str, **fields: object) -> Row:
        model, baseline = (OURS, False) if name == OURS else (OTHERS, True)
        known = dict(tokens=self.operation.tokens, facts=self.operation.facts(task))
        return Row(str(self), task, name, model, baseline, **known, **fields)  # type: ignore[arg-type]

    def _implementations(
        self, inputs: Inputs, bench: Bench
    ) -> tuple[dict[str, Call], dict[str, str]]:
        """Ours, and the baselines whose forward runs and computes the same."""
        operation, backend = self.operation, bench.backend
        calls: dict[str, Call] = {
            OURS: lambda tensors: operation.call(backend, tensors, inputs.key_mask)
        }
        refused: dict[str, str] = {}
        left = bench.deadline - time.monotonic()
        compiled = bench.compiled and left > COMPILE_RESERVE and str(self) in COMPILED
        offered = op_baselines.baselines_of(
            operation, inputs.key_mask, backend=backend, compiled=compiled
        )
        with torch.no_grad():
            ours = calls[OURS](inputs.tensors)
            for makers in offered:
                for name, make in makers.items():
                    try:
                        call = make()
                        op_gate.check_baseline(ours, call(inputs.tensors))
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
                op_gate.check_baseline(ours, grads)
        except Exception as error:
            if name == OURS:
                raise
            runs.pop(name, None)
            refused[name] = first_line(error)
    with torch.set_grad_enabled(task == "backward"):
        return clocks.measure(bench.clock, runs, bench.seconds, bench.calls), refused


def bind(call: Call, inputs: Inputs, task: str) -> Run:
    """The forward without gradients; the backward by torch.autograd.grad, alone, again and again"""
    if task == "forward":
        return lambda: call(inputs.tensors)
    outs = call(inputs.tensors)
    return lambda: torch.autograd.grad(outs, inputs.tensors, inputs.upstream, retain_graph=True)
