"""One operation: the gate, the baselines that can run, and the times of all, in turns."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend

from . import baselines, clocks, op_gate
from .baselines import KERNELS, by_kernel
from .clocks import Run
from .harness import Bench, Found, Workload, first_line, first_that_run, timed
from .op_workloads import DTYPE, RESIDUAL, ROWWISE, TASKS, WINDOWED, Inputs, Operation
from .results import EAGER, GPU_ALONE, REFUSED, Row

OURS, OTHERS = "ptattn", "torch"
# The operations of which a baseline is compiled, and the seconds that must be left for it.
COMPILE_RESERVE = 100.0
COMPILED = tuple(
    f"{op} XL {size} w{window} b1"
    for size, window in (("1024 px", "1x8x8"), ("2048 px", "1x16x16"))
    for op in ("window", "shifted", "norm", "norm-pool", "pool")
)
# FlexAttention looks at every pair of tokens to make its block mask.
MOST_FLEX_TOKENS = 2**14

Call = Callable[[tuple[Tensor, ...]], tuple[Tensor, ...]]


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

    @property
    def compiling(self) -> int:
        return int(self.compiled and str(self) in COMPILED)

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
        ours: tuple[Tensor, ...] = ()
        grads: tuple[Tensor, ...] = ()

        def checked(call: Call) -> Run:
            """How to run it, once its outputs, and gradients where it is their time, are ours."""
            nonlocal ours, grads
            with torch.no_grad():
                outs = call(inputs.tensors)
            run = bind(call, inputs, task)
            found = run() if task == "backward" else ()
            ours, grads = ours or outs, grads or found
            op_gate.check_baseline((*ours, *grads), (*outs, *found))
            return run

        def attempt(name: str, make: Callable[[], Call]) -> Iterator[Found]:
            row = self._row(task, name, **known)
            try:
                yield row, checked(make())
            except Exception as error:  # refusals have many types
                refusal = dict(status=REFUSED, note=first_line(error), floor=None)
                yield dataclasses.replace(row, **refusal), None  # type: ignore[arg-type]

        left = bench.deadline - time.monotonic()
        compiled = bool(self.compiling) and left > COMPILE_RESERVE
        own = checked(lambda tensors: operation.call(backend, tensors, inputs.key_mask))
        yield self._row(task, OURS, **known), own
        offered = baselines_of(operation, inputs, backend=backend, compiled=compiled)
        yield from first_that_run(offered, attempt)


def bind(call: Call, inputs: Inputs, task: str) -> Run:
    """The forward without gradients; the backward by torch.autograd.grad, alone, again and again"""
    if task == "forward":
        return lambda: call(inputs.tensors)
    outs = call(inputs.tensors)
    return lambda: torch.autograd.grad(outs, inputs.tensors, inputs.upstream, retain_graph=True)


# The baselines: torch's own, with the copies that they need.


def baselines_of(
    operation: Operation, inputs: Inputs, *, backend: str, compiled: bool
) -> Iterator[dict[str, Callable[[], Call]]]:
    """Makers of the baselines by name; those of a later dict are tried if no earlier one runs.

    One may refuse when it is made, or when it is called. `compiled` adds those that take
    torch.compile's time. What `backend` itself does is no baseline of it.
    """

    def by_torch(tensors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """ptattn's own portable backend; windows as slabs of equal ones, so without a mask."""
        return operation.call("sdpa", tensors, inputs.key_mask)

    if operation.op in ROWWISE:
        found: dict[str, Callable[[], Call]] = {}
        if operation.op in RESIDUAL:  # one operation of torch after the other
            found["eager"] = lambda: (
                lambda tensors: tuple(op_gate.formula(operation, tensors, None))
            )
        if backend != "sdpa":
            found["torch"] = lambda: by_torch
        if compiled:
            found["torch.compile"] = lambda: _compiled(by_torch)
        yield found
        return
    windowed, device = operation.op in WINDOWED, inputs.tensors[0].device
    for kinds in KERNELS:
        found = {}
        for name, kind in kinds.items():
            if backend != "sdpa":
                found[f"sdpa {name}"] = partial(by_kernel, kind, by_torch)
            if windowed and (operation.op == "shifted" or backend == "sdpa"):
                found[f"roll-mask {name}"] = partial(_roll_mask, operation, device, kind)
        if kinds is KERNELS[0] and compiled and windowed and backend != "sdpa":
            found["flex"] = lambda: _flex(operation)
        yield found


def _roll_mask(operation: Operation, device: torch.device, kind: SDPBackend) -> Call:
    windows, mask = operation.windows, None
    if operation.op == "shifted":
        mask = baselines.region_mask(windows, DTYPE).to(device)
    attend = by_kernel(kind, baselines.roll_mask_attention)
    return lambda tensors: (attend(*tensors, windows, mask),)


def _flex(operation: Operation) -> Call:
    """On the tokens in raster order: a block mask says which blocks of them share windows."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    n = operation.queries
    if n > MOST_FLEX_TOKENS:
        raise ValueError(f"its block mask of {n} tokens would look at {n**2:.0e} pairs")
    ids = operation.windows.window_ids("cuda")

    def same_window(_batch: Tensor, _head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return ids[query] == ids[key]

    mask = create_block_mask(same_window, None, None, n, n, device="cuda")
    compiled = _compiled(flex_attention)

    def call(tensors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        q, k, v = (t.transpose(1, 2) for t in tensors)
        return (compiled(q, k, v, block_mask=mask).transpose(1, 2),)

    return call


def _compiled(call: Callable[..., Any]) -> Callable[..., Any]:
    """A compiled backward may overwrite what the forward saved; timing runs it again and again."""
    import torch._functorch.config

    torch._functorch.config.donated_buffer = False
    return torch.compile(call, dynamic=False)
