"""Time of the operations at small sizes, ours and torch's: `pytest benchmarks/test_ops.py`.

`ptattn bench ops` is the better judge: there the contenders take turns.
"""

from __future__ import annotations

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from ptattn.bench import op_cases, op_parity
from ptattn.bench.op_run import bind

CASES = [case for case in op_cases.cases(quick=True) if case.size == "512 px"]


@pytest.mark.parametrize("task", op_cases.TASKS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_op(benchmark: BenchmarkFixture, case: op_cases.Case, task: str) -> None:
    benchmark.group = f"{case} {task}"
    inputs = case.inputs("cpu")
    op_parity.check(case, inputs, "sdpa")
    run = bind(lambda tensors: case.call("sdpa", tensors, inputs.key_mask), inputs, task)
    with torch.set_grad_enabled(task == "backward"):
        benchmark.pedantic(run, rounds=5, warmup_rounds=1)
