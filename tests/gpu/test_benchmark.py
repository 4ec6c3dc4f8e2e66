"""The operations of `ptattn bench` and benchmarks.gpu without a GPU: cases, floors, gate, tuning.

The clock is a fake; the kernels run under Triton's interpreter.
"""

import json
import re
import time

import pytest
import torch

from benchmarks import gpu, tune
from ptattn import ops
from ptattn.bench import harness, op_cases, op_opponents, op_parity, op_run, session, timing
from ptattn.bench.harness import Bench
from ptattn.bench.op_cases import OPS, Case
from ptattn.bench.op_run import Measured
from ptattn.bench.result import FAILED, NOT_REACHED, OK, REFUSED, SKIPPED, Result, status
from ptattn.bench.timing import Rates
from ptattn.kernels import configs

RATES = Rates(copy=4.3e12, products=790e12, launch=2e-6)
LARGEST = 2**62


def tiny(op, **changes):
    sizes = dict(grid=(1, 3, 5), window=(1, 2, 4), heads=2, head_dim=16, batch=2) | changes
    return Case(op, "tiny", "3x5", **sizes)


class FakeClock:
    """Runs every call, and says that it took as long as told, by its number."""

    def __init__(self, seconds=(1e-5,)):
        self.seconds, self.samples = seconds, []

    calls = (2, 2)  # the interpreter takes milliseconds where a GPU takes microseconds

    def warm_up(self, run):
        run()
        return 3e-5

    def sample(self, run, host):
        run()
        self.samples.append(run)
        return self.seconds[(len(self.samples) - 1) % len(self.seconds)]


def bench(free=LARGEST, **changes):
    known = dict(seconds=0.0, free_memory=lambda device: free) | changes
    return Bench(FakeClock(), RATES, "cpu", "triton", **known)


def run(case, found=None):
    return harness.run(Measured(case), found or bench())


def ours(rows):
    return [row for row in rows if row.ours]


def first(name):
    return next(case for case in op_cases.cases() if str(case).startswith(name))


# Cases and floors.


def test_cases_are_distinct_and_the_important_come_first():
    cases = op_cases.cases()
    assert len({str(case) for case in cases}) == len(cases) > 350
    assert [case.op for case in cases[: len(OPS)]] == list(OPS)
    assert {str(case) for case in op_cases.cases(quick=True)} <= {str(case) for case in cases}
    assert set(op_run.COMPILED) <= {str(case) for case in cases}


@pytest.mark.parametrize(
    ("name", "heads", "head_dim"), [("XL", 16, 72), ("H", 20, 72), ("B", 10, 64)]
)
def test_models_have_the_published_heads(name, heads, head_dim):
    case = first(f"window {name} 1024 px")
    assert (case.heads, case.head_dim) == (heads, head_dim)
    assert case.window == (1, 8, 8)


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
    case = first(f"{op} XL 1024 px")
    assert case.bytes("forward") == 1152 * (forward * 4096 + forward_keys * keys)
    assert case.bytes("backward") == 1152 * (backward * 4096 + backward_keys * keys)


def test_proxies_attend_to_one_another():
    case = first("proxy XL 1024 px")
    assert (case.queries, case.keys) == (64, 64)
    assert case.bytes("forward") == 64 * 1152 * 8
    assert case.flops("forward") == 4 * 1152 * 64 * 64


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
    case = tiny(op)
    inputs = case.inputs("cpu")
    tensors = tuple(t.detach().double() for t in inputs.tensors)
    gold = case.call("reference", tensors, inputs.key_mask)
    for ours, theirs in zip(op_parity.formula(case, tensors, inputs.key_mask), gold, strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("op", ["shifted", "cross", "norm", "norm-pool"])
def test_a_right_case_is_timed(op):
    rows = run(tiny(op))
    forward, backward = ours(rows)
    assert (forward.task, backward.task) == ("forward", "backward"), rows
    assert forward.status == backward.status == OK, rows
    assert forward.timing.median == 1e-5
    assert forward.share == tiny(op).floor("forward", RATES) / 1e-5
    assert forward.error is not None
    assert any(row.timing and not row.ours for row in rows)


def wrong(monkeypatch, which, factor=1.05):
    """Falsify an output, or with `which` a gradient, of the last head."""
    whole = ops.window_attention

    def run(q, k, v, *args, backend, **kwargs):
        out = whole(q, k, v, *args, backend=backend, **kwargs)
        if backend == "triton" and which == "out":
            return torch.cat([out[:, :, :-1], out[:, :, -1:] * factor], dim=2)
        if backend == "triton":
            out.register_hook(lambda g: g * factor)
        return out

    monkeypatch.setattr(ops, "window_attention", run)


def record(found, out):
    facts = dict(device="cpu", dtype="bf16")
    result = Result("ops", facts, vars(RATES), "a command", "2030-01-01")
    return result, session.carry_out(result, found, out)


@pytest.mark.parametrize("which", ["out", "gradient"])
def test_a_wrong_result_has_no_time(which, monkeypatch, tmp_path):
    wrong(monkeypatch, which)
    rows = run(tiny("window"))
    assert [row.status for row in rows] == [FAILED, FAILED]
    assert rows[0].note.startswith("out: " if which == "out" else "d")
    assert rows[0].timing is None
    assert record([rows], tmp_path)[1] == 1
    line = next(x for x in (tmp_path / "ops.md").read_text().splitlines() if "tiny" in x)
    assert "FAILED" in line
    assert "µs" not in line


def test_a_failing_kernel_is_an_error(monkeypatch):
    def fail(*args, **kwargs):
        raise RuntimeError("no such kernel\nand more")

    monkeypatch.setattr(ops, "window_attention", fail)
    rows = run(tiny("window"))
    assert [row.status for row in rows] == ["ERROR", "ERROR"]
    assert rows[0].note == "RuntimeError: no such kernel"
    assert status(rows) == 1


def test_a_case_too_large_is_skipped_with_its_size():
    rows = run(tiny("window"), bench(free=1000))
    assert {row.status for row in rows} == {SKIPPED}
    assert "are free" in rows[0].note
    assert status(rows) == 0


def test_opponents_that_refuse_or_err_say_why(monkeypatch):
    def refuse():
        raise ValueError("NYI: head dim 72\nstack")

    def opponents(case, key_mask, *, backend, compiled):
        yield {"refuses": lambda: refuse(), "errs": lambda: lambda t: (t[0] * 2,)}
        yield {"late": lambda: lambda t: case.call("sdpa", t, key_mask)}

    monkeypatch.setattr(op_opponents, "opponents", opponents)
    rows = [row for row in run(tiny("window", grid=(1, 2, 5))) if row.task == "forward"]
    refused = {row.contender: row.note for row in rows if row.status == REFUSED}
    assert refused["refuses"] == "ValueError: NYI: head dim 72"
    assert refused["errs"].startswith("WrongError: error ")
    assert [row.contender for row in rows if row.timing] == ["ptattn", "late"]


# Budget and files.


def test_cases_after_the_deadline_are_listed_not_measured(tmp_path):
    cases = [Measured(tiny("window")), Measured(tiny("cross"))]
    found = list(harness.measure(cases, bench(deadline=time.monotonic() - 1)))
    assert {row.status for rows in found for row in rows} == {NOT_REACHED}
    assert record(found, tmp_path)[1] == 0
    text = (tmp_path / "ops.md").read_text()
    assert "not reached: window tiny 3x5 w1x2x4 b2 forward and 3 more" in text
    written = json.loads((tmp_path / "ops.json").read_text())
    assert written["command"] == "a command"
    assert {"commit", "torch", "triton", "gpus"} <= written["environment"].keys()


def test_the_gpu_command_covers_the_kernels_and_the_models_of_the_figures():
    names = [str(case) for case in [*gpu.blocks(quick=False), *gpu.models(quick=False)]]
    assert "block 2048 px b1" in names
    assert "model 48×1024 px b1" in names
    assert len(gpu.select(gpu.kernels(quick=False), re.compile("window XL 1024"))) >= 1
    assert not gpu.select(gpu.blocks(quick=True), re.compile("no such case"))


def test_no_gpu(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu.main([]) == 2
    assert "needs a CUDA GPU" in capsys.readouterr().err


# Timing.


def test_summary_of_samples():
    t = timing.summarize([5.0, 1.0, 2.0, 3.0, 4.0, 6.0], host=0.5)
    assert (t.median, t.low, t.high, t.host, t.calls) == (3.5, 2.0, 5.0, 0.5, 6)


def test_contenders_take_turns():
    clock, order = FakeClock(), []
    runs = {name: lambda name=name: order.append(name) for name in "abc"}
    times = timing.measure(clock, runs, 0.0)
    assert times["a"].calls == 2
    assert order == [*"abc", *"abc", *"bca"]  # the first of each to warm up


def test_rates():
    got = timing.rates(FakeClock((1e-3,)), "cpu", copied=2**12, side=8)
    assert got.copy == pytest.approx(2 * 2**12 / 1e-3)
    assert got.products == pytest.approx(2 * 8**3 / 1e-3)


# Tuning.


@pytest.fixture
def job(monkeypatch):
    bounds = (("max_bytes", 2), ("max_channels", 96))
    job = tune.Job("window_forward", bounds, (tiny("window", grid=(1, 2, 5), heads=1, batch=1),))
    monkeypatch.setattr(tune, "jobs", lambda: [job])
    return job


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "configs.json"
    path.write_text(json.dumps(configs.table()))
    return path


def test_tuning_writes_the_fastest_and_leaves_the_default(job, path):
    slow_then_fast = FakeClock((4.0, 4.0, 3.0, 3.0, 1.0, 1.0))
    assert tune.search([job], "cpu", slow_then_fast, "cpu", time.monotonic() + 60, path) == 0
    before, after = configs.table(), json.loads(path.read_text())
    assert after["default"] == before["default"]
    assert set(after) - set(before) <= {"cpu"}
    winner = tune.candidates("window_forward")[2]
    mine, *rest = after["cpu"]["window_forward"]
    assert mine == dict(job.bounds) | winner
    assert rest == before["default"]["window_forward"]
    assert tune.present(after, "cpu", job) == winner


def test_tuning_keeps_a_default_that_is_as_fast(job, path):
    before = path.read_text()
    tune.search([job], "cpu", FakeClock(), "cpu", time.monotonic() + 60, path)
    assert path.read_text() == before


def test_tuning_stops_at_its_deadline(job, path, capsys):
    tune.search([job], "cpu", FakeClock(), "cpu", time.monotonic() - 1, path)
    assert capsys.readouterr().out == "not reached: window_forward max_bytes=2 max_channels=96\n"


def test_tuning_rejects_wrong_results(job, monkeypatch):
    wrong(monkeypatch, "out")
    first = tune.present(configs.table(), "cpu", job)
    best, seen = tune.try_job(job, first, "cpu", FakeClock(), "cpu", 0.0)
    assert best == first
    assert "WrongError: out" in seen


def test_a_setting_holds_only_while_it_is_tried():
    table, found = json.dumps(configs.table()), configs.find("window_forward", "cpu", bytes=2)
    with tune.setting("cpu", "window_forward", dict(rows=128, warps=8)):
        assert configs.find("window_forward", "cpu", bytes=2) == configs.Config(8, rows=128)
    assert configs.find("window_forward", "cpu", bytes=2) == found
    assert {k: v for k, v in configs.table().items() if v} == {
        k: v for k, v in json.loads(table).items() if v
    }


def test_tuning_covers_every_kernel_of_the_table():
    jobs = tune.jobs()
    assert {job.kernel for job in jobs} == set(configs.table()["default"])
    for job in jobs:
        assert tune.present(configs.table(), "cpu", job)
        assert all(configs.Config(**entry) for entry in tune.candidates(job.kernel))


def test_the_table_of_configurations_is_written_as_it_is_laid_out(tmp_path):
    tune.write(tmp_path / "configs.json", configs.table())
    assert json.loads((tmp_path / "configs.json").read_text()) == configs.table()
