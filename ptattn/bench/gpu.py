"""`ptattn bench gpu`: models, blocks and operations on a GPU, in one go and within minutes.

The most important come first, and files are written on the way: a run that is cut off is of use.
The kernels of XL are compiled in parallel before anything is timed.
"""

from __future__ import annotations

import argparse
import dataclasses
import multiprocessing
import os
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed

import torch

from ..command_line import UsageError
from . import clocks, harness, model_run, op_run, op_workloads, predict
from .clocks import WallClock
from .floor import FORWARD, TASKS, TRAINING
from .harness import Bench, Workload, first_line
from .model_run import ModelWorkload, model_workloads
from .op_run import OperationWorkload
from .options import add_budget, carry_out
from .workloads import Settings, Size

BUDGET = 500.0  # seconds
SETTINGS = Settings("cuda", "bf16", "triton")
XL = ("pt-dit-xl", "dit-xl", "pixart-alpha")
IMAGES, VIDEO = (Size(1024), Size(2048)), Size(512, 48)
SMALLER = (Size(256), Size(512), *IMAGES)
# Of a compiling process, at most: the whole of its device's context and one block.
PROCESSES = 16
LONGEST = 120.0  # seconds of compiling
SECONDS = 0.15  # for a task at a size, all implementations together
# On an H200: seconds for each workload, and calls of each model in it; to compile one of a block.
SETUP, CALLS, COMPILE = {"model": 3.0, "block": 1.5, "op": 0.9}, 60, 5.0


def stages(quantize: str | None = None) -> dict[str, Sequence[Workload]]:
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
    others = [
        *model_workloads("model", XL, [Size(256), Size(512)], [FORWARD], SETTINGS),
        *model_workloads("model", ("pt-dit-l", "pixart-alpha"), SMALLER, [FORWARD], SETTINGS),
        *model_workloads("model", ("pt-dit-b", "dit-b"), SMALLER, [FORWARD], SETTINGS),
        *model_workloads("model", XL[:2], IMAGES[:1], [TRAINING], SETTINGS),
    ]
    compiled = model_workloads(
        "block", XL, IMAGES, [FORWARD], SETTINGS, one=True, compiled=True,
        quantized=quantize is not None,
    )[::-1]  # fmt: skip
    return {
        "whole models": whole,
        "blocks": blocks,
        "operations of XL": first,
        "compiled blocks": compiled,
        "other models": others,
        "other operations": [w for w in operations if w not in first],
    }


def expected(workload: Workload) -> float:
    """Seconds on an H200, roughly."""
    if not isinstance(workload, ModelWorkload):
        return SETUP["op"]
    rates = predict.DEVICES["h200"].rates
    calls = sum(workload.work(entry).seconds(rates) for entry in workload.entries)
    return SETUP[workload.kind] + CALLS * calls + COMPILE * workload.compiling


def add_parser(parser: argparse.ArgumentParser) -> None:
    add_budget(parser, BUDGET)
    add = parser.add_argument
    add("--quantize", choices=("fp8",), help="also linear layers in float8 by torchao, compiled")
    add("--plan", action="store_true", help="print the order and what it should take on an H200")


def run(options: argparse.Namespace, command: str) -> int:
    planned = stages(options.quantize)
    if options.plan:
        return _show(planned, options.budget)

    def prepare() -> tuple[list[Workload], Bench]:
        begin = time.monotonic()
        torch.manual_seed(0)
        first = ("whole models", "blocks", "operations of XL")
        compile_kernels([workload for name in first for workload in planned[name]])
        return [workload for stage in planned.values() for workload in stage], Bench(
            WallClock("cuda"), clocks.rates("cuda"), "cuda", "triton", begin + options.budget,
            seconds=SECONDS,
        )  # fmt: skip

    if not torch.cuda.is_available():
        raise UsageError(
            "a CUDA GPU is needed, and torch finds none; --plan shows what it would do"
        )
    return carry_out(options, command, dataclasses.asdict(SETTINGS), prepare)


def _show(planned: dict[str, Sequence[Workload]], budget: float) -> int:
    print("Order, and seconds on an H200, roughly; kernels are compiled before, in half a minute.")
    total = 30.0
    for name, stage in planned.items():
        seconds = sum(map(expected, stage))
        total += seconds
        late = "" if total <= budget else f"  beyond the budget of {budget:.0f} s"
        counted = f"{len(stage):4} workloads {seconds:6.0f} s"
        print(f"{name:20} {counted}, until {total:5.0f} s{late}")
    return 0


# Compiling.


def compile_kernels(workloads: Sequence[Workload]) -> None:
    """Run each workload's kernels once, on all cores: Triton keeps on disk what it compiled."""
    begin, todo = time.monotonic(), _to_compile(workloads)
    workers = max(1, min(PROCESSES, (os.cpu_count() or 2) - 1))
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(workers, mp_context=context)
    try:
        jobs = {pool.submit(_run_once, workload): workload for workload in todo}
        for job in as_completed(jobs, timeout=LONGEST):
            if error := job.exception():  # it will show again where it is measured
                print(f"compiling {jobs[job]}: {first_line(error)}", file=sys.stderr)
    except TimeoutError:
        print(f"not all kernels were compiled within {LONGEST:.0f} s", file=sys.stderr)
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
    seconds = time.monotonic() - begin
    print(f"compiled the kernels of {len(todo)} workloads in {seconds:.0f} s", file=sys.stderr)


def _to_compile(workloads: Sequence[Workload]) -> list[Workload]:
    """Those that fit beside one another, of models a block of the first, which is PT-DiT's."""
    free = (harness.free_memory("cuda") or 0) / PROCESSES
    found = [w for w in workloads if isinstance(w, OperationWorkload) and w.memory < free]
    blocks = [
        dataclasses.replace(w, entries=w.entries[:1], one=True)
        for w in workloads
        if isinstance(w, ModelWorkload) and w.kind == "block"
    ]
    return [*(w for w in blocks if w.memory < free), *found]


def _run_once(workload: Workload) -> None:
    if isinstance(workload, OperationWorkload):
        operation, inputs = workload.operation, workload.operation.inputs("cuda")
        for task in op_workloads.TASKS:
            with torch.set_grad_enabled(task == "backward"):
                op_run.bind(
                    lambda tensors: operation.call("triton", tensors, inputs.key_mask), inputs, task
                )()
    elif isinstance(workload, ModelWorkload):
        with torch.set_grad_enabled(workload.task != FORWARD):
            model_run.bind(workload.model(workload.entries[0]), workload.task)
    torch.cuda.synchronize()
