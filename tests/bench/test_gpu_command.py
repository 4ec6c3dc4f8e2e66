"""`ptattn bench gpu` without one: its plan, what it compiles first, and on a GPU that is none."""

import dataclasses
import re
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from ptattn.bench import clocks, gpu, harness, peaks
from ptattn.bench.op_run import OperationWorkload
from ptattn.bench.op_workloads import Operation
from ptattn.cli import main
from tests.bench.test_operations import tiny
from tests.support.measured import SETTINGS, FakeClock, bench, workload


@pytest.fixture(autouse=True)
def _no_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


def test_the_plan_needs_no_gpu_and_says_what_comes_first(capsys, monkeypatch):
    arguments = ["bench", "gpu", "--plan", "--quantize", "fp8"]
    assert main(arguments) == 0
    head, *lines = capsys.readouterr().out.splitlines()
    assert "seconds on an H200, roughly" in head
    found = [re.fullmatch(r"(.+?) +(\d+) workloads +(\d+) s, until +(\d+) s(.*)", s) for s in lines]
    assert [match and match[1] for match in found] == [
        *("whole models", "blocks", "operations of XL"),
        *("compiled blocks", "other models", "other operations"),
    ]
    until = [int(match[4]) for match in found if match]
    assert until == sorted(until)
    assert until[0] <= 120  # useful results after two minutes
    assert [bool(match and match[5]) for match in found] == [end > gpu.BUDGET for end in until]
    assert main([*arguments, "--budget", "10"]) == 0
    assert capsys.readouterr().out.count("beyond the budget of 10 s") == len(lines)


def test_the_stages_cover_what_is_asked():
    stages = gpu.stages("fp8")
    names = {name: list(map(str, stage)) for name, stage in stages.items()}
    sizes = ("1024 px", "2048 px", "48×512 px")
    assert names["whole models"] == [f"model {size} b1" for size in sizes]
    assert names["blocks"][0] == "block 1024 px b1"
    assert {w.task for w in stages["blocks"]} == {"forward", "training"}
    first, others = names["operations of XL"], names["other operations"]
    assert len(first) + len(others) == len({*first, *others}) > 350
    for what in ("compiled", "quantized"):
        found = {s for s, stage in stages.items() if any(getattr(w, what, 0) for w in stage)}
        assert found == {"compiled blocks"}
    assert not any(getattr(w, "quantized", 0) for stage in gpu.stages().values() for w in stage)


def test_without_a_gpu_it_says_so(tmp_path, capsys):
    assert main(["bench", "gpu", "--out", str(tmp_path / "out")]) == 2
    assert "a CUDA GPU is needed, and torch finds none; --plan" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


# Compiling.


@dataclasses.dataclass(frozen=True)
class Here(Operation):
    """Its inputs lie on the CPU, whatever is asked for."""

    def inputs(self, device):
        return super().inputs("cpu")


@pytest.fixture
def card(monkeypatch):
    """A GPU that is none, with 16 GB free, whose processes are threads."""

    def pool(workers, mp_context):
        assert 1 <= workers <= gpu.PROCESSES
        return ThreadPoolExecutor(1)

    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(harness, "free_memory", lambda device: 16 * 10**9)
    monkeypatch.setattr(gpu, "ProcessPoolExecutor", pool)


def operation(op):
    return OperationWorkload(Here(**vars(tiny(op, grid=(1, 2, 5), batch=1, heads=1))))


@pytest.mark.usefixtures("card")
def test_kernels_are_run_once_and_what_fails_is_named(capsys, monkeypatch):
    ran, run_once = [], gpu._run_once

    def watched(one):
        run_once(one)
        ran.append(str(one))

    monkeypatch.setattr(gpu, "_run_once", watched)
    small = workload("block", "training", "pt-dit-s-class", "dit-s", side=32)
    large = workload("block", "training", "pt-dit-xl", side=4096)
    model = workload("model", "forward", "pt-dit-s-class")  # its kernels are its block's
    nowhere = dataclasses.replace(SETTINGS, backend="none")
    broken = dataclasses.replace(small, settings=nowhere, batch=1)
    gpu.compile_kernels([operation("window"), small, large, model, broken])
    assert ran == ["block 32 px b2", str(operation("window"))]
    seen = capsys.readouterr().err
    assert "compiling block 32 px b1: ValueError: " in seen
    assert re.search(r"compiled the kernels of 3 workloads in \d+ s", seen)


def test_operations_are_timed_alone_and_models_as_their_user_waits(monkeypatch):
    seen = []
    alone, waiting = FakeClock(), FakeClock()
    monkeypatch.setattr(clocks, "gpu_clock", lambda: alone)
    monkeypatch.setattr(clocks, "measure", lambda clock, *args: seen.append(clock) or {})
    monkeypatch.setattr(clocks, "captured", lambda run: (run, run()))
    monkeypatch.setattr(peaks, "added", lambda run, device: (10**6, 1e-5))
    for one in (operation("window"), workload("block", "forward", "dit-s", one=True)):
        one.measure(bench(clock=waiting, device="cuda"))
    assert seen == [alone] * 2 + [waiting]  # forward and backward
