"""A model whose tokens several processes share computes what one process does."""

from __future__ import annotations

import pytest
import torch

from tests.parallel import cases
from tests.parallel.ranks import Ranks

# Relative: that of float64 shows every fault of a split, that of float32 is what users see.
LIMITS = {torch.float64: 1e-12, torch.float32: 1e-5}


@pytest.fixture(scope="module")
def started():
    """Ranks by their number, started when first asked for."""
    found = {}
    yield found
    for ranks in found.values():
        ranks.close()


@pytest.fixture(params=[2, 3, pytest.param(4, marks=pytest.mark.long)])
def ranks(request, started):
    number = request.param
    if number not in started:
        started[number] = Ranks(number)
    yield started[number]


def assert_close(results, limit=LIMITS[torch.float64]):
    for rank, result in enumerate(results):
        for case, differences in result.items():
            wrong = {name: value for name, value in differences.items() if not value <= limit}
            assert not wrong, f"{case}, rank {rank}: {wrong}"


def able(ranks):
    found = [name for name in cases.MODELS if cases.can_split(name, ranks.number)]
    assert len(found) > 10
    return found


def test_models_split_as_they_are_whole(ranks):
    assert_close(ranks.all(cases.compare, able(ranks), torch.float64))


@pytest.mark.long
def test_models_in_float32(ranks):
    assert_close(ranks.all(cases.compare, able(ranks), torch.float32), LIMITS[torch.float32])


def test_a_model_in_float32(ranks):
    results = ranks.all(cases.compare, ["classes-ragged", "video"], torch.float32)
    assert_close(results, LIMITS[torch.float32])


def test_proxy_attention_split_as_it_is_whole(ranks):
    assert_close(ranks.all(cases.compare_attention))
