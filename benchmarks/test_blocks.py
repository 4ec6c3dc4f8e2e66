"""Time of one block at small sizes: `pytest benchmarks/test_blocks.py`.

`ptattn bench block` is the better judge: there the contenders take turns.
"""

from __future__ import annotations

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from ptattn.bench import model_run
from ptattn.bench.contenders import block_subject, contenders
from ptattn.bench.floor import TASKS
from ptattn.compare.cases import Size, plan
from ptattn.compare.worker import Settings

MODELS = ("pt-dit-b", "dit-b", "pixart-alpha")


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("side", [256, 512])
@pytest.mark.parametrize("model", MODELS)
def test_block(benchmark: BenchmarkFixture, model: str, side: int, task: str) -> None:
    benchmark.group = f"block, {side} px, {task}"
    (entry,) = plan([model], [Size(side)])
    subject = block_subject(entry, Settings(backend="sdpa"), batch=1)
    make = next(iter(next(contenders(subject, compiled=False)).values()))
    contender = make()
    model_run.Gate(subject, task).check(contender, subject)
    benchmark.name = contender.name
    benchmark.pedantic(model_run.bind(contender, subject, task), rounds=5, warmup_rounds=1)
