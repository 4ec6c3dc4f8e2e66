"""`ptattn bench gpu`: models, blocks and operations on a GPU, in one go and within minutes.

The most important come first, and files are written on the way: a run that is cut off is of use.
All kernels are compiled in parallel before anything is timed.
"""

from __future__ import annotations

import argparse
import dataclasses
import multiprocessing
import os
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass

import torch

from ..command_line import UsageError, now, number, require
from . import clocks, command, harness, op_workloads, predict
from .floor import FORWARD, TASKS, TRAINING
from .harness import Bench, first_line
from .implementations import block_model, implementations
from .model_run import ModelWorkload, bind, model_workloads
from .op_run import OperationWorkload
from .op_run import bind as bind_operation
from .results import Result, Row
from .workloads import Settings, Size

BUDGET = 500.0  # seconds
SETTINGS = Settings("cuda", "bf16", "triton")
XL = ("pt-dit-xl", "dit-xl", "pixart-alpha")
IMAGES, VIDEO = (Size(1024), Size(2048)), Size(512, 48)
# Of a compiling process, at most: the whole of its device's context and one block.
COMPILING = 16
SECONDS = 0.15  # for a task at a size, all implementations together
# What a stage takes on an H200: seconds for each of its workloads, and calls of each model in it.
SETUP, CALLS = {"model": 3.0, "block": 1.5, "op": 0.9}, 60


Timed = ModelWorkload | OperationWorkload


@dataclass(frozen=True)
class Stage:
    name: str
    workloads: Sequence[Timed]
    compiled: bool = False
    quantized: bool = False

    @property
    def expected(self) -> float:
        """Seconds on an H200, roughly."""
        rates = predict.DEVICES["h200"].rates
        total = 0.0
        for workload in self.workloads:
            if isinstance(workload, OperationWorkload):
                total += SETUP["op"]
                continue
            own = sum(workload.floor(entry, rates) for entry in workload.entries)
            total += SETUP[workload.kind] + CALLS * own
            total += 12 * len(workload.entries) * (self.compiled + self.quantized)
        return total


def stages(quantize: str | None = None) -> list[Stage]:
    """The most important first."""
    operations = [OperationWorkload(o) for o in op_workloads.operations()]
    first = [w for w in operations if w.operation.model == "XL" and w.operation.batch == 1]
    blocks = [
        *model_workloads("block", XL, [*IMAGES, VIDEO], TASKS, SETTINGS),
        *model_workloads("block", XL, [Size(512), Size(256, 48)], TASKS, SETTINGS),
    ]
    whole = [
        *model_workloads("model", XL, IMAGES, [FORWARD], SETTINGS),
        *model_workloads("model", XL[:2], [VIDEO], [FORWARD], SETTINGS),
    ]
    smaller = ("pt-dit-l", "pixart-alpha"), ("pt-dit-b", "dit-b")
    others = [
        *model_workloads("model", XL, [Size(256), Size(512)], [FORWARD], SETTINGS),
        *(
            workload
            for models in smaller
            for workload in model_workloads(
                "model", models, [Size(256), Size(512), *IMAGES], [FORWARD], SETTINGS
            )
        ),
        *model_workloads("model", XL[:2], IMAGES[:1], [TRAINING], SETTINGS),
    ]
    compiled = [
        dataclasses.replace(workload, one=True)
        for size in IMAGES[::-1]
        for workload in model_workloads("block", XL, [size], [FORWARD], SETTINGS)
    ]
    return [
        Stage("whole models", whole),
        Stage("blocks", blocks),
        Stage("operations of XL", first),
        Stage("compiled blocks", compiled, compiled=True, quantized=quantize is not None),
        Stage("other models", others),
        Stage("other operations", [w for w in operations if w not in first]),
    ]


def add_parser(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--budget", type=number, metavar="SECONDS", default=BUDGET,
        help="what would end after it is not begun (default: %(default)s)")  # fmt: skip
    add("--quantize", choices=("fp8",), help="also linear layers in float8 by torchao, compiled")
    add("--plan", action="store_true", help="print the order and what it should take on an H200")


def run(options: argparse.Namespace, typed: str) -> int:
    planned = stages(options.quantize)
    if options.plan:
        return _show(planned, options.budget)
    require("rich", "matplotlib")
    if options.quantize:
        require("torchao", install="torchao")
    if not torch.cuda.is_available():
        raise UsageError(
            "a CUDA GPU is needed, and torch finds none; --plan shows what it would do"
        )
    from . import report
    from .progress import Progress

    begin = time.monotonic()
    done = Result("gpu", dataclasses.asdict(SETTINGS), {}, typed, now())
    earlier = command.prepare(options, done)
    torch.manual_seed(0)
    compile_kernels([workload for stage in planned[:3] for workload in stage.workloads])
    rates = clocks.rates("cuda")
    done.rates.update(dataclasses.asdict(rates))
    bench = Bench(
        clocks.clock_of("cuda"), rates, "cuda", "triton", begin + options.budget, seconds=SECONDS
    )
    progress = Progress(sum(len(stage.workloads) for stage in planned))
    found = _measure(planned, bench, progress)
    return report.carry_out(done, found, options.out, progress, earlier)


def _measure(planned: Sequence[Stage], bench: Bench, watch: harness.Watch) -> Iterator[list[Row]]:
    alone = clocks.clock_of("cuda", wall=False)
    for stage in planned:
        operations = isinstance(stage.workloads[0], OperationWorkload)
        own = dataclasses.replace(
            bench, clock=alone if operations else bench.clock, compiled=stage.compiled,
            quantized=stage.quantized,
        )  # fmt: skip
        yield from harness.measure(stage.workloads, own, watch)


def _show(planned: Sequence[Stage], budget: float) -> int:
    print("Order, and seconds on an H200, roughly; kernels are compiled before, in half a minute.")
    total = 30.0
    for stage in planned:
        total += stage.expected
        late = "" if total <= budget else f"  beyond the budget of {budget:.0f} s"
        counted = f"{len(stage.workloads):4} workloads {stage.expected:6.0f} s"
        print(f"{stage.name:20} {counted}, until {total:5.0f} s{late}")
    return 0


# Compiling.


def compile_kernels(workloads: Sequence[Timed]) -> None:
    """Run each workload's kernels once, on all cores: Triton keeps on disk what it compiled."""
    begin, todo = time.monotonic(), _to_compile(workloads)
    workers = max(1, min(COMPILING, (os.cpu_count() or 2) - 1))
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=context) as pool:
        jobs = {pool.submit(_run_once, workload): workload for workload in todo}
        for job in as_completed(jobs):
            if error := job.exception():  # it will show again where it is measured
                print(f"compiling {jobs[job]}: {first_line(error)}", file=sys.stderr)
    seconds = time.monotonic() - begin
    print(f"compiled the kernels of {len(todo)} workloads in {seconds:.0f} s", file=sys.stderr)


def _to_compile(workloads: Sequence[Timed]) -> list[Timed]:
    """Those that fit beside one another, of models a block of the first, which is PT-DiT's."""
    free = (harness.free_memory("cuda") or 0) / COMPILING
    found = [w for w in workloads if isinstance(w, OperationWorkload) and w.memory < free]
    blocks = [
        dataclasses.replace(w, entries=w.entries[:1])
        for w in workloads
        if isinstance(w, ModelWorkload) and w.kind == "block"
    ]
    return [*(w for w in blocks if w.memory < free), *found]


def _run_once(workload: Timed) -> None:
    if isinstance(workload, OperationWorkload):
        inputs = workload.operation.inputs("cuda")
        for task in op_workloads.TASKS:
            with torch.set_grad_enabled(task == "backward"):
                bind_operation(
                    lambda tensors: workload.operation.call("triton", tensors, inputs.key_mask),
                    inputs,
                    task,
                )()
    else:
        model = block_model(workload.entries[0], workload.settings, workload.batch)
        make = next(iter(next(implementations(model, one=True)).values()))
        with torch.set_grad_enabled(workload.task != FORWARD):
            bind(make(), model, workload.task)
    torch.cuda.synchronize()
