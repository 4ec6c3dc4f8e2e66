"""A model whose tokens several processes share computes what one process does."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from tests.parallel import cases

# Relative: that of float64 shows every fault of a split, that of float32 is what users see.
LIMITS = {torch.float64: 1e-12, torch.float32: 1e-5}


few = pytest.mark.parametrize(
    "ranks", [2, *(pytest.param(n, marks=pytest.mark.long) for n in (3, 4))], indirect=True
)


def assert_close(results, limit=LIMITS[torch.float64]):
    for rank, result in enumerate(results):
        for case, differences in result.items():
            wrong = {name: value for name, value in differences.items() if not value <= limit}
            assert not wrong, f"{case}, rank {rank}: {wrong}"


def able(ranks):
    found = [name for name in cases.MODELS if cases.can_split(name, ranks.number)]
    assert len(found) > 10
    return found


@few
def test_models_split_as_they_are_whole(ranks):
    assert_close(ranks.all(cases.compare, able(ranks), torch.float64))


@pytest.mark.long
def test_models_in_float32(ranks):
    assert_close(ranks.all(cases.compare, able(ranks), torch.float32), LIMITS[torch.float32])


def test_a_model_in_float32(ranks):
    results = ranks.all(cases.compare, ["classes-ragged", "video"], torch.float32)
    assert_close(results, LIMITS[torch.float32])


@few
def test_proxy_attention_split_as_it_is_whole(ranks):
    assert_close(ranks.all(cases.compare_attention))


COMBINED = {
    "checkpointed": (cases.checkpointed, {}),
    "checkpointed-but-attention": (cases.checkpointed, dict(keep_attention=True)),
    "checkpointed-reentrant": (cases.reentrant, {}),
    "fused": (cases.fused, {}),
    "accumulated": (cases.accumulated, {}),
    "any-batch": (cases.of_any_batch, {}),
    "partly-frozen": (cases.partly_frozen, {}),
    "guided": (cases.guided, {}),
    "ddp": (cases.in_ddp, {}),
    "fsdp": (cases.sharded, dict(first=True)),
    "fsdp-after": (cases.sharded, dict(first=False)),
}


@few
@pytest.mark.parametrize("name", COMBINED)
def test_a_split_combined(ranks, name):
    function, options = COMBINED[name]
    assert_close([{name: found} for found in ranks.all(partial(function, **options))])


@pytest.mark.parametrize("backend", ["reference", pytest.param("triton", marks=pytest.mark.long)])
def test_every_backend(two, backend):
    if backend == "triton":
        pytest.importorskip("triton")
    assert_close([{backend: found} for found in two.all(cases.on_backend, backend)])


@few
def test_autocast(ranks):
    """In bfloat16, whose rounding error is 0.004."""
    assert_close([{"autocast": found} for found in ranks.all(cases.in_autocast)], 0.01)


@pytest.mark.long
def test_compiled(two):
    """A first, a second and a third size, each a graph of its own: of numbers that are symbols the
    second took minutes. What is exchanged within blocks is in it; a call's begin and end are not.
    """
    assert_close([{"compiled": found} for found in two.all(cases.compiled)])


@pytest.mark.long
def test_anomaly_mode(two):
    """It once looked at gradients that were still on their way."""
    assert_close([{"anomaly mode": found} for found in two.all(cases.in_anomaly_mode)])


@pytest.mark.long
def test_adapters(two):
    """Added to a model that is split, and trained alone."""
    assert_close([{"adapters": found} for found in two.all(cases.with_adapters)])


@pytest.mark.long
@pytest.mark.parametrize("sharding", ["nothing", "all", "data", "both"])
def test_data_and_tokens(four, sharding):
    """By DDP over the data, and by FSDP2 over all ranks, those of the data, or both dimensions."""
    assert_close([{sharding: found} for found in four.all(cases.data_and_tokens, sharding)])
