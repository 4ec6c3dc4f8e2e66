"""One operation: the gate, the baselines that can run, and the times of all, in turns."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator

import torch

from . import clocks, op_baselines, op_gate
from .clocks import Run
from .harness import Bench, Found, Workload, first_line, first_that_run, timed
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
class OperationWorkload(Workload):
    """An operation as the harness takes it."""

    operation: Operation
    compiled: bool = False  # a baseline by torch.compile, too

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
        clock = clocks.gpu_clock() if bench.device == "cuda" else bench.clock
        rows = []
        for task in TASKS:
            found = list(self._checked(task, inputs, bench))
            ours, _ = found[0]
            ours.error = max(
                e for k, e in errors.items() if k.startswith("d") == (task != "forward")
            )
            with torch.set_grad_enabled(task == "backward"):
                rows += timed(found, clock, bench, peaked=())
        return rows

    def _row(self, task: str, name: str, **fields: object) -> Row:
        model, baseline = (OURS, False) if name == OURS else (OTHERS, True)
        known = dict(tokens=self.operation.tokens, facts=self.operation.facts(task))
        return Row(str(self), task, name, model, baseline, **known, **fields)  # type: ignore[arg-type]

    def _checked(self, task: str, inputs: Inputs, bench: Bench) -> Iterator[Found]:
        """Ours, and the baselines that run and compute the same, or refuse."""
        operation, backend = self.operation, bench.backend
        known = dict(
            mode=GPU_ALONE if bench.device == "cuda" else EAGER,
            floor=None if bench.rates is None else operation.floor(task, bench.rates),
        )
        ours = bind(lambda tensors: operation.call(backend, tensors, inputs.key_mask), inputs, task)
        with torch.set_grad_enabled(task == "backward"):
            expected = ours()

        def attempt(name: str, make: Callable[[], Call]) -> Iterator[Found]:
            row = self._row(task, name, **known)
            try:
                with torch.set_grad_enabled(task == "backward"):
                    run = bind(make(), inputs, task)
                    op_gate.check_baseline(expected, run())
            except Exception as error:  # refusals have many types
                row.status, row.note, row.floor = REFUSED, first_line(error), None
                yield row, None
            else:
                yield row, run

        left = bench.deadline - time.monotonic()
        compiled = self.compiled and left > COMPILE_RESERVE and str(self) in COMPILED
        yield self._row(task, OURS, **known), ours
        yield from first_that_run(
            op_baselines.baselines_of(operation, inputs, backend=backend, compiled=compiled),
            attempt,
        )


def bind(call: Call, inputs: Inputs, task: str) -> Run:
    """The forward without gradients; the backward by torch.autograd.grad, alone, again and again"""
    if task == "forward":
        return lambda: call(inputs.tensors)
    outs = call(inputs.tensors)
    return lambda: torch.autograd.grad(outs, inputs.tensors, inputs.upstream, retain_graph=True)
