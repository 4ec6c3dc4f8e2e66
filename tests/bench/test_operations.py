"""`ptattn bench ops`: operations and their floors, the gate, baselines that refuse.

The clock is a fake; the kernels run under Triton's interpreter.
"""

import time

import pytest
import torch

from ptattn import ops
from ptattn.bench import harness, op_gate, op_run, op_workloads
from ptattn.bench.op_run import OperationWorkload
from ptattn.bench.op_workloads import OPS, Operation
from ptattn.bench.results import ERROR, FAILED, OK, REFUSED, SKIPPED, status
from tests.support.measured import RATES, bench


def tiny(op, **changes):
    sizes = dict(grid=(1, 3, 5), window=(1, 2, 4), heads=2, head_dim=16, batch=2)
    return Operation(op, "tiny", "3x5", **(sizes | changes))


def run(operation, found=None):
    return harness.run_here(OperationWorkload(operation), found or bench(backend="triton"))


def first(name):
    return next(o for o in op_workloads.operations() if str(o).startswith(name))


# Operations and floors.


def test_operations_are_distinct_and_the_important_come_first():
    operations = op_workloads.operations()
    names = {str(o) for o in operations}
    assert len(names) == len(operations) > 350
    assert [o.op for o in operations[: len(OPS)]] == list(OPS)
    assert {*op_run.COMPILED} <= names


@pytest.mark.parametrize(
    ("name", "heads", "head_dim"), [("XL", 16, 72), ("H", 20, 72), ("B", 10, 64)]
)
def test_models_have_the_published_heads(name, heads, head_dim):
    operation = first(f"window {name} 1024 px")
    assert (operation.heads, operation.head_dim) == (heads, head_dim)
    assert operation.window == (1, 8, 8)


# Bytes per token and channel, plus those of the 64 proxies or 120 text tokens.
@pytest.mark.parametrize(
    ("op", "forward", "backward", "keys", "forward_keys", "backward_keys"),
    [
        ("window", 8, 14, 0, 0, 0),
        ("shifted", 8, 14, 0, 0, 0),
        ("cross", 4, 6, 64, 4, 8),
        ("text", 4, 6, 120, 4, 8),
        ("norm", 8, 12, 0, 0, 0),
        ("norm-pool", 8, 12, 64, 2, 2),
        ("pool", 4, 6, 64, 2, 2),
        ("mean", 2, 2, 64, 2, 2),
    ],
)
def test_bytes(op, forward, backward, keys, forward_keys, backward_keys):
    operation = first(f"{op} XL 1024 px")
    assert operation.bytes("forward") == 1152 * (forward * 4096 + forward_keys * keys)
    assert operation.bytes("backward") == 1152 * (backward * 4096 + backward_keys * keys)


def test_proxies_attend_to_one_another():
    operation = first("proxy XL 1024 px")
    assert (operation.queries, operation.keys) == (64, 64)
    assert operation.bytes("forward") == 64 * 1152 * 8
    assert operation.flops("forward") == 4 * 1152 * 64 * 64


def test_floor_of_memory_and_of_products():
    window = first("window XL 1024 px")
    assert window.floor("forward", RATES) / 4096 == pytest.approx(2.14e-9, rel=2e-3)
    assert window.floor("backward", RATES) / 4096 == pytest.approx(3.75e-9, rel=2e-3)
    assert window.flops("forward") == 4 * 1152 * 4096 * 64
    large = first("window XL short video")
    assert large.queries == 8 * 128 * 128
    products = 4 * 1152 * large.queries * 1024
    assert large.flops("backward") == 2.5 * products
    assert large.floor("forward", RATES) == pytest.approx(products / 790e12)


# The gate.


@pytest.mark.parametrize("op", OPS)
def test_formula_is_the_reference(op):
    operation = tiny(op)
    inputs = operation.inputs("cpu")
    tensors = tuple(t.detach().double() for t in inputs.tensors)
    gold = operation.call("reference", tensors, inputs.key_mask)
    found = op_gate.formula(operation, tensors, inputs.key_mask)
    for ours, theirs in zip(found, gold, strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("op", ["shifted", "cross", "norm-pool"])
def test_a_right_operation_is_timed(op):
    rows = run(tiny(op))
    forward, backward = (row for row in rows if not row.baseline)
    assert (forward.task, backward.task) == ("forward", "backward"), rows
    assert forward.status == backward.status == OK, rows
    assert forward.seconds == 1e-5
    assert forward.share == tiny(op).floor("forward", RATES) / 1e-5
    assert forward.error is not None
    assert any(row.timing and row.baseline for row in rows)


def falsify(monkeypatch, which, factor=1.05):
    """An output of the kernels, or with `which` a gradient, of the last head."""
    whole = ops.window_attention

    def wrong(q, k, v, *args, backend, **kwargs):
        out = whole(q, k, v, *args, backend=backend, **kwargs)
        if backend == "triton" and which == "out":
            return torch.cat([out[:, :, :-1], out[:, :, -1:] * factor], dim=2)
        if backend == "triton":
            out.register_hook(lambda g: g * factor)
        return out

    monkeypatch.setattr(ops, "window_attention", wrong)


@pytest.mark.parametrize("which", ["out", "gradient"])
def test_a_wrong_result_has_no_time(which, monkeypatch):
    falsify(monkeypatch, which)
    rows = run(tiny("window"))
    assert [(row.status, row.timing) for row in rows] == [(FAILED, None)] * 2
    assert rows[0].note.startswith("out: " if which == "out" else "d")
    assert status(rows) == 1


def test_a_failing_kernel_is_an_error(monkeypatch):
    def fail(*args, **kwargs):
        raise RuntimeError("no such kernel\nand more")

    monkeypatch.setattr(ops, "window_attention", fail)
    rows = run(tiny("window"))
    assert [(row.status, row.note) for row in rows] == [(ERROR, "RuntimeError: no such kernel")] * 2
    assert status(rows) == 1


def test_an_operation_too_large_is_skipped_with_its_size():
    rows = run(tiny("window"), bench(free_memory=lambda device: 1000))
    assert {row.status for row in rows} == {SKIPPED}
    assert rows[0].note.startswith("needs about ")
    assert rows[0].note.endswith("GB available")
    assert status(rows) == 0


def test_baselines_that_refuse_or_err_say_why(monkeypatch):
    def refuse():
        raise ValueError("NYI: head dim 72\nstack")

    def offered(operation, inputs, **known):
        yield {"refuses": refuse, "errs": lambda: lambda t: (t[0] * 2,)}
        yield {"late": lambda: lambda t: operation.call("sdpa", t, inputs.key_mask)}
        raise AssertionError("one of them ran")

    monkeypatch.setattr(op_run, "baselines_of", offered)
    rows = run(tiny("window"), bench(backend="sdpa"))
    rows = [row for row in rows if row.task == "forward"]
    refused = {row.name: row.note for row in rows if row.status == REFUSED}
    assert refused["refuses"] == "ValueError: NYI: head dim 72"
    assert refused["errs"].startswith("WrongError: error ")
    assert [row.name for row in rows if row.timing] == ["ptattn", "late"]


@pytest.mark.parametrize(("left", "compiles"), [(1e3, True), (50.0, False)])
def test_a_baseline_is_compiled_where_there_is_time(left, compiles, monkeypatch):
    asked = []

    def offered(*args, compiled, **known):
        asked.append(compiled)
        yield {}

    operation = tiny("window")
    monkeypatch.setattr(op_run, "baselines_of", offered)
    monkeypatch.setattr(op_run, "COMPILED", (str(operation),))
    known = bench(backend="sdpa", deadline=time.monotonic() + left)
    harness.run_here(OperationWorkload(operation, compiled=True), known)
    assert asked == [compiles] * 2  # forward and backward
