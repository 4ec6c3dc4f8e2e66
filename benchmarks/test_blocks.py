"""Time of whole blocks, eager and compiled: `pytest benchmarks/test_blocks.py`.

For ratios, `python -m benchmarks.block_ratios` is the better judge: there the blocks take turns.
"""

from __future__ import annotations

import functools

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from benchmarks.cases import BLOCKS, COMPILED, DTYPES, SIDES, BlockCase

COMPILABLE = ("ptattn PT-DiT", "diffusers PixArt")


@functools.lru_cache(maxsize=1)  # one shape's weights and activations at a time
def _case(tokens: int, dtype: str) -> BlockCase:
    return BlockCase(tokens, DTYPES[dtype])


@pytest.mark.parametrize("name", [*BLOCKS, *(name + COMPILED for name in COMPILABLE)])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens", SIDES)
def test_block(benchmark: BenchmarkFixture, tokens: int, dtype: str, name: str) -> None:
    if name.startswith("diffusers") or name == "ptattn PixArt":
        pytest.importorskip("diffusers")
    benchmark.group = f"block, {tokens} tokens, {dtype}"
    benchmark.name = name
    with torch.inference_mode():
        case = _case(tokens, dtype)
        case.check(name)
        benchmark.pedantic(case.run(name), rounds=5, warmup_rounds=1)
