"""Sums of parts: tiles of several rows of them, of any number and width, exactly."""

import pytest
import torch

pytest.importorskip("triton")
from ptattn.kernels import host, reduce

# (outer, splits, inner): less than a tile and one more part and column than it, short tiles and
# tall ones, and several of both.
SHAPES = [
    (2, 1, 8),
    (2, 3, 5),
    (3, 8, 128),
    (2, 9, 129),
    (1, 64, 32),
    (2, 65, 33),
    (3, 256, 40),
    (2, 600, 48),
]


def integers(*shape, dtype):
    """Whose sums are exact in every order."""
    return torch.randint(-9, 10, shape, generator=torch.Generator().manual_seed(0)).to(dtype)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_part_is_added_once(shape):
    parts = integers(*shape, dtype=torch.float32)
    assert torch.equal(reduce.sum_parts(parts, parts.new_empty(shape[0], shape[2])), parts.sum(1))


def test_parts_of_float64_stay_float64():
    parts = integers(2, 70, 16, dtype=torch.float64) + 2.0**-40
    assert torch.equal(reduce.sum_parts(parts, parts.new_empty(2, 16)), parts.sum(1))


def test_sums_of_parts_are_rounded_once():
    parts = torch.full((1, 9, 16), 1 + 2.0**-6)
    out = reduce.sum_parts(parts, parts.new_empty(1, 16, dtype=torch.bfloat16))
    assert torch.equal(out, parts.sum(1).bfloat16())


@pytest.mark.parametrize("splits", [4, 9, 60, 1000])
def test_parts_are_added_in_one_order_in_every_batch(splits):
    """Tiles, warps and so the order follow from the number of parts and their width alone."""
    with host.record("sm90") as launches:
        for outer in (1, 8):
            parts = torch.empty(outer, splits, 72, device="meta")
            reduce.sum_parts(parts, parts.new_empty(outer, 72))
    one, eight = launches
    assert (one.constants, one.config) == (eight.constants, eight.config)
    assert eight.programs == 8 * one.programs
