"""What is measured: the plan, what a workload costs and takes, its floor, what a GPU would take."""

import dataclasses

import pytest
import torch

from ptattn import flops
from ptattn.bench import floor, predict, results, workloads
from ptattn.bench.harness import Bench
from ptattn.bench.model_run import model_workloads
from ptattn.bench.workloads import FIGURE_SIZES, FIGURES, Settings, Size
from ptattn.models import get_config
from tests.support.measured import SETTINGS, TINY, WIDE, workload

CUDA = dataclasses.replace(SETTINGS, device="cuda")
H200 = predict.DEVICES["h200"]


def plan(*sides, models=TINY):
    return workloads.plan(models, [Size(side) for side in sides])


def test_plan_puts_images_before_videos_and_keeps_the_models_order():
    sizes = [Size(32, frames=4), Size(64), Size(32), Size(64)]
    entries = workloads.plan([*TINY, TINY[0]], sizes)
    assert [str(entry.size) for entry in entries[::2]] == ["32 px", "64 px", "4×32 px"]
    assert [entry.model for entry in entries] == list(TINY) * 3
    assert [entry.grid for entry in entries[::2]] == [(1, 2, 2), (1, 4, 4), (4, 2, 2)]


def test_the_reference_needs_memory_for_all_scores():
    ours, theirs = plan(1024)
    tokens, heads = 64 * 64, 6
    assert theirs.activations(torch.bfloat16, "reference") > 4 * heads * tokens**2
    assert theirs.activations(torch.bfloat16, "sdpa") < 4 * heads * tokens**2
    assert ours.activations(torch.bfloat16, "reference") < 4 * heads * tokens**2


def test_memory_and_cost_grow_with_what_is_done():
    forward, training = (workload("model", task, *WIDE, depth=4) for task in floor.TASKS)
    for more in (training, dataclasses.replace(forward, batch=8)):
        assert more.memory > forward.memory
        assert more.cost >= 3 * forward.cost
    for more in (dict(compiled=True), dict(quantized=True), dict(settings=CUDA)):
        # Copies of the weights, or what every CUDA graph keeps.
        assert dataclasses.replace(forward, **more).memory > forward.memory
    one = workload("block", "forward", *WIDE, side=1024, one=True, checked=1024)
    assert one.memory < workload("block", "forward", *WIDE, side=1024).memory
    assert one.checks < forward.checks  # a corner of the grid is soon checked


@pytest.mark.parametrize(
    ("model", "size", "grid"),
    [
        ("pt-dit-xl", Size(2048), (1, 32, 32)),
        ("pt-dit-xl", Size(512, 48), (12, 8, 8)),
        ("dit-xl", Size(2048), (1, 32, 32)),
        ("pt-dit-xl", Size(256), (1, 16, 16)),
        ("pt-dit-xl", Size(4096), (1, 64, 64)),  # two windows of 32 an axis
    ],
)
def test_a_corner_keeps_the_windows_and_two_of_them_an_axis(model, size, grid):
    block = workloads.plan([model], [size])[0]
    corner = block.corner(1024)
    assert corner.grid == grid
    assert corner.config == block.config
    if block.family == "PT-DiT":
        here, there = (b.config.window_grids(b.grid)[1] for b in (corner, block))
        assert here.window == there.window
        for n, all_of_them, p in zip(corner.grid, block.grid, here.window, strict=True):
            assert n >= min(all_of_them, 2 * p)


# The floor and the prediction.


def test_block_floor_of_the_paper_s_block():
    """Per token 22·D² multiply-adds, four passes of 8·C bytes, 24·C of attention, 16·C of MLP."""
    config, tokens = get_config("pt-dit-xl"), 128 * 128
    dim = config.dim
    work = floor.work("pt-dit-xl", Size(2048), floor.FORWARD)
    proxies, text = 64, 120
    assert work.operations == 2 * dim**2 * (22 * tokens + 6 * proxies + 2 * text)
    assert work.passes == 4 * 8 * dim * tokens
    assert work.activation == 16 * dim * tokens
    assert sum(part.bytes for part in work.attention) == 24 * dim * tokens
    training = floor.work("pt-dit-xl", Size(2048), floor.TRAINING)
    assert training.operations == 3 * work.operations
    assert sum(p.bytes for p in training.attention) == (8 + 8 + 8 + 14 + 14 + 12) * dim * tokens
    fused = floor.work("pt-dit-xl", Size(2048), floor.FORWARD, fused=True)
    assert work.operations - fused.operations == 2 * 2 * dim**2 * (tokens - dim)
    few = (floor.work("pt-dit-xl", Size(512), floor.FORWARD, fused=f) for f in (False, True))
    assert next(few) == next(few)


def test_the_operations_of_a_model_are_those_counted():
    for model in ("pt-dit-l", "dit-xl", "pixart-alpha"):
        depth = get_config(model).depth
        work = floor.work(model, Size(1024), floor.FORWARD, depth=depth)
        products = sum(part.operations for part in work.attention)
        total = depth * (work.operations + products) + work.outside
        assert total == 2 * flops.count(model, 1024).total


def test_predictions_are_marked():
    settings = Settings("cuda", "bf16", "triton")
    found = model_workloads("model", FIGURES, FIGURE_SIZES, [floor.FORWARD], settings)
    rows = [row for w in found for row in predict.Prediction(w, H200).measure(Bench())]
    assert {row.status for row in rows} == {results.PREDICTED}
    times = {row.name: row.seconds for row in rows if row.workload == "model 1024 px b1"}
    assert times["DiT/XL"] < times["PT-DiT/XL fused"] < times["PT-DiT/XL"]
    # One block of DiT/XL at 4,096 tokens: 12·D² per token, attention at 486 TFLOP/s, bytes.
    dim, tokens = 1152, 4096
    linear, attention = 24 * dim**2 * tokens / 790e12, 4 * dim * tokens**2 / 486e12
    block = linear + attention + (2 * 8 + 16) * dim * tokens / 4.3e12
    assert times["DiT/XL"] == pytest.approx(28 * block, rel=0.01)
