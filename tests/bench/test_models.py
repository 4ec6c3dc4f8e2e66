"""Blocks and whole models: held to the gate, then timed, in eager mode, compiled and as graphs."""

import copy
import dataclasses
from typing import ClassVar

import pytest
import torch
from torch._inductor.compile_fx import compile_fx
from torch.nn.attention import SDPBackend

from ptattn.bench import clocks, floor, implementations, model_run, peaks
from ptattn.bench.gate import Gate
from ptattn.bench.implementations import Model
from ptattn.bench.model_run import ModelWorkload
from ptattn.bench.parity import WrongError
from ptattn.bench.results import COMPILED, EAGER, ERROR, FAILED, GRAPH, REFUSED, status
from ptattn.bench.workloads import Settings, Size, plan
from tests.support.measured import SETTINGS, TINY, bench, workload

OURS, THEIRS = "PT-DiT/S-Class", "DiT/S flash"


@pytest.mark.parametrize("task", floor.TASKS)
def test_a_block_is_checked_and_timed_beside_its_baselines(task):
    rows = workload("block", task, "pt-dit-s-class", "pt-dit-b", "dit-s").measure(bench())
    timed = {row.name: row for row in rows if row.timing}
    expected = {OURS, "PT-DiT/B", "PT-DiT/B roll-and-mask", THEIRS}
    assert timed.keys() == expected | ({"21 GEMMs"} if task == "forward" else set())
    assert {row.name for row in timed.values() if not row.baseline} == {OURS, "PT-DiT/B"}
    for row in timed.values():
        assert row.name == "21 GEMMs" or row.error < 1e-5
        assert row.tokens == 2 * 16
        assert row.mode == EAGER
        assert row.timing.low <= row.timing.median <= row.timing.high
    assert "DiT/S cudnn" in [row.name for row in rows if row.status == REFUSED]


@pytest.mark.parametrize("task", floor.TASKS)
def test_a_model_is_checked_and_timed(task):
    timed = {row.name for row in workload("model", task, *TINY).measure(bench()) if row.timing}
    fused = {f"{OURS} fused"} if task == "forward" else set()
    assert timed == {OURS, THEIRS} | fused


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("model", ["pt-dit-s-class", "dit-s", "pixart-alpha", "pt-dit-b"])
def test_one_implementation_of_every_family_on_its_grid_s_corner(model, backend):
    """As `ptattn compare` measures them."""
    size, settings = Size(32, frames=2), Settings(backend=backend, dtype="fp32")
    (entry,) = plan([model], [size])
    one = ModelWorkload("block", size, (entry,), settings, one=True, checked=1024)
    (row,) = one.measure(bench(rates=None))
    assert row.name == row.model == entry.name
    assert row.baseline is not entry.is_proxy_tokenized
    assert row.timing.calls == 2
    assert row.error < 1e-5
    assert row.floor is None


# The gate.


def falsify(monkeypatch, when=bool):
    """Multiply what the candidate computes by 1.001, `when` so of its model."""

    def change(model):
        wrong = dataclasses.replace(model, forward=lambda *x: 1.001 * model.forward(*x))
        return wrong if when(model) else model

    def offered(model, *, one=False):
        yield {"": change}

    monkeypatch.setattr(model_run, "implementations", offered)


def test_a_wrong_block_has_no_time(monkeypatch):
    falsify(monkeypatch)
    rows = workload("block", "training", "pt-dit-s-class").measure(bench())
    assert [(row.status, row.timing) for row in rows] == [(FAILED, None)]
    assert rows[0].note.startswith("output error 1.0e-03, limit")
    assert status(rows) == 1


def test_a_block_wrong_at_the_corner_has_no_time(monkeypatch):
    """Of its 256 tokens the gate sees 64, with the weights of the whole block."""
    one = workload("block", "forward", "pt-dit-s-class", side=256, one=True, checked=64)
    (entry,) = one.entries
    seen = one.model(entry.corner(64))
    weights = (model.module.parameters() for model in (seen, one.model(entry)))
    assert all(map(torch.equal, *weights))
    falsify(monkeypatch, lambda model: model.leaves[0].shape[1] == 64)
    (row,) = one.measure(bench())
    assert (row.status, row.timing) == (FAILED, None)


@pytest.mark.parametrize("what", ["output", "gradient"])
def test_gradients_are_part_of_the_gate(what):
    (entry,) = plan(["pt-dit-b"], [Size(64)])
    model = implementations.block_model(entry, SETTINGS, batch=2)
    gate = Gate(model, floor.TRAINING)

    def forward(module, x, vector):
        if what == "gradient":
            vector = vector.detach() + 1.01 * (vector - vector.detach())
        return model.forward(module, x, vector) * (1.001 if what == "output" else 1)

    assert gate.check(model, model_run.bind(model, floor.TRAINING)[1]) < 1e-5
    wrong = dataclasses.replace(model, forward=forward)
    with pytest.raises(WrongError, match=f"{what} error"):
        gate.check(wrong, model_run.bind(wrong, floor.TRAINING)[1])


# Modes.


@pytest.fixture
def device(monkeypatch):
    """A GPU that is none: what was captured there, and what was compiled."""

    class Done(list):
        graphs: ClassVar = []

    done, compiling = Done(), torch.compile
    graphs = done.graphs = []

    def captured(run):
        done.append("captured")
        return run, run()

    def compiled(*args, **options):
        inductor = options.pop("backend")
        assert inductor.func is compile_fx
        assert options == dict(fullgraph=True, dynamic=False)
        done.append("compiled")

        def backend(graph, inputs):  # one for each, as torch keeps graphs by it
            graphs.append(inductor)
            return graph.forward

        return compiling(*args, backend=backend, **options)

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)  # torchao asks
    monkeypatch.setattr(clocks, "captured", captured)
    monkeypatch.setattr(torch, "compile", compiled)
    monkeypatch.setattr(peaks, "added", lambda run, device: (10**6, 1e-5))
    return done


def modes(rows, name):
    return [row.mode for row in rows if row.name == name and row.timing]


def test_a_gpu_s_times_are_eager_compiled_and_of_a_graph(device):
    compiling = workload("block", "forward", "pt-dit-s-class", compiled=True)
    rows = compiling.measure(bench(device="cuda"))
    assert modes(rows, OURS) == [EAGER, COMPILED, GRAPH]
    assert device == ["compiled", "captured"]
    assert all(row.error < 1e-5 for row in rows if row.name == OURS)


def test_what_is_checked_at_a_corner_is_timed_as_a_graph_too(device):
    """It once was timed in eager mode a second time."""
    one = workload("block", "forward", "dit-s", side=256, one=True, checked=64)
    (eager, graph) = one.measure(bench(device="cuda", rates=None))
    assert (eager.mode, graph.mode) == (EAGER, GRAPH)
    assert device == ["captured"] * 2  # at the corner, and whole


def test_a_mode_that_does_not_run_costs_that_mode_alone(device, monkeypatch):
    def captured(run):
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(clocks, "captured", captured)
    rows = workload("block", "forward", "pt-dit-s-class").measure(bench(device="cuda"))
    assert modes(rows, OURS) == [EAGER]
    (failed,) = (row for row in rows if row.mode == GRAPH)
    assert (failed.status, failed.timing) == (ERROR, None)
    assert failed.note == "RuntimeError: operation not permitted when stream is capturing"


def test_each_kind_of_full_attention_is_compiled_for_itself(device):
    """torch once ran the first one's graph for all, as it does not look at the kernel asked for."""
    (entry,) = plan(["dit-s"], [Size(64)])
    model = implementations.block_model(entry, SETTINGS, batch=1)
    kinds = SDPBackend.FLASH_ATTENTION, SDPBackend.MATH
    ran = [implementations._by_kernel(kind, model).compiled() for kind in kinds]
    for one in ran * 2:
        with torch.no_grad():
            one.forward(one.module, *one.leaves)
    assert device == ["compiled"] * 2
    assert len(device.graphs) == 2


# fp8.


def test_fp8_where_it_does_not_run_says_why_and_costs_nothing_else(device):
    """torchao has it for GPUs alone. What it refuses once took the compiled row's time."""
    rows = workload("block", "forward", *TINY, compiled=True, quantized=True).measure(bench())
    assert modes(rows, OURS) == modes(rows, THEIRS) == [EAGER, COMPILED]
    refused = {row.name: row for row in rows if row.name.endswith("fp8")}
    assert {f"{OURS} fp8", f"{THEIRS} fp8"} <= refused.keys()
    for row in refused.values():
        assert (row.status, row.timing) == (REFUSED, None)
        assert "quantiz" in row.note or "torchao" in row.note
    assert status(rows) == 0


def eight_bits(own, scale):
    """Its weights rounded to float8."""
    module = copy.deepcopy(own.module)
    for p in module.parameters():
        p.data = scale * p.detach().to(torch.float8_e4m3fn).to(p.dtype)
    return dataclasses.replace(own, module=module, quantized=True, for_inference=True)


@pytest.mark.parametrize(
    ("scale", "limit"), [(1.0, 0.2), pytest.param(2.0, None, marks=pytest.mark.long)]
)
def test_fp8_shows_its_error_up_to_a_limit(scale, limit, device, monkeypatch):
    monkeypatch.setattr(Model, "fp8", lambda own: eight_bits(own, scale))
    rows = workload("block", "forward", "pt-dit-s-class", quantized=True).measure(bench())
    (row,) = (row for row in rows if row.name == f"{OURS} fp8")
    if limit is None:
        assert (row.status, row.timing) == (FAILED, None)
        assert "limit 2.0e-01" in row.note
        assert status(rows) == 1
    else:
        assert row.timing
        assert (row.mode, row.model, row.baseline) == (COMPILED, OURS, False)
        assert 1e-3 < row.error < limit
    assert modes(rows, OURS) == [EAGER]  # untouched
