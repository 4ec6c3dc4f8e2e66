"""Small operations and blocks under pytest-benchmark: `make bench`.

`ptattn bench` is the better judge: there the implementations take turns.
"""

from __future__ import annotations

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from ptattn.bench import model_run, op_gate, op_run, op_workloads
from ptattn.bench.floor import FORWARD, TASKS
from ptattn.bench.gate import Gate
from ptattn.bench.implementations import block_model
from ptattn.bench.op_workloads import Operation
from ptattn.bench.workloads import Settings, Size, plan

OPERATIONS = [o for o in op_workloads.operations() if " XL 512 px w1x4x4 b1" in str(o)]


@pytest.mark.parametrize("task", op_workloads.TASKS)
@pytest.mark.parametrize("operation", OPERATIONS, ids=str)
def test_operation(benchmark: BenchmarkFixture, operation: Operation, task: str) -> None:
    benchmark.group = f"{operation} {task}"
    inputs = operation.inputs("cpu")
    op_gate.check(operation, inputs, "sdpa")

    def call(tensors: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        return operation.call("sdpa", tensors, inputs.key_mask)

    with torch.set_grad_enabled(task == "backward"):
        benchmark.pedantic(op_run.bind(call, inputs, task), rounds=5, warmup_rounds=1)


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("side", [256, 512])
@pytest.mark.parametrize("name", ["pt-dit-b", "dit-b", "pixart-alpha"])
def test_block(benchmark: BenchmarkFixture, name: str, side: int, task: str) -> None:
    benchmark.group = f"block, {side} px, {task}"
    (entry,) = plan([name], [Size(side)])
    model = block_model(entry, Settings(backend="sdpa"), batch=1)
    benchmark.name = entry.name
    with torch.set_grad_enabled(task != FORWARD):
        step, results = model_run.bind(model, task)
        Gate(model, task).check(model, results)
        benchmark.pedantic(step, rounds=5, warmup_rounds=1)
