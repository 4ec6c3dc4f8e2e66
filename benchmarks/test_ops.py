"""Time of the operations on the portable backend: `pytest benchmarks/test_ops.py`.

Window attention stands beside the same attention by roll, partition and mask.
"""

from __future__ import annotations

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from benchmarks.cases import DTYPES, OPS, OpCase

WAYS = [
    pytest.param(case, backend, id=f"{case}-{backend}")
    for case in OPS
    for backend in (("sdpa", "roll-mask") if case.op == "window_attention" else ("sdpa",))
]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("case", "backend"), WAYS)
def test_op(benchmark: BenchmarkFixture, case: OpCase, backend: str, dtype: str) -> None:
    benchmark.group = f"{case} {dtype}"
    benchmark.name = backend
    with torch.inference_mode():
        case.check(backend, DTYPES[dtype])
        run = case.bind(backend, case.inputs(DTYPES[dtype]))
        benchmark.pedantic(run, rounds=7, warmup_rounds=2)
