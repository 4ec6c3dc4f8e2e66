"""The fastest tile sizes of every kernel on the GPU at hand.

    python -m benchmarks.tune --write FILE [--only PATTERN] [--budget SECONDS]

For each kernel and each class of sizes that configs.json tells apart, a small grid of settings runs
on a few shapes; each is held to the tolerance rule before it is timed. A setting that is at least
2 % faster than the present one takes its place. The file has the kernels of which one has changed,
under the GPU's architecture, the present settings of their other classes and the defaults after
them; the environment variable PTATTN_CONFIGS then names it.
"""

from __future__ import annotations

import argparse
import itertools
import math
import multiprocessing
import os
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from ptattn import files
from ptattn.bench import clocks, op_gate
from ptattn.bench.clocks import Clock, Run
from ptattn.bench.command import pattern
from ptattn.bench.harness import first_line
from ptattn.bench.op_run import bind
from ptattn.bench.op_workloads import Operation
from ptattn.kernels import configs, host
from ptattn.kernels.configs import Config

GAIN = 0.98
IMAGE, LARGE, VIDEO = (1, 64, 64), (1, 128, 128), (12, 64, 64)
# Of tiles that hold a head dim of 64, 72 and 128, the paper's first.
HEAD_DIMS = {96: 72, 64: 64, 128: 128}
HEADS = 16


@dataclass(frozen=True)
class Job:
    """One kernel in one class of sizes: the bounds of its entry, and the shapes it is timed on."""

    kernel: str
    bounds: tuple[tuple[str, int], ...]
    cases: tuple[Operation, ...]

    @property
    def task(self) -> str:
        return "forward" if self.kernel.endswith("_forward") else "backward"

    def __str__(self) -> str:
        return " ".join([self.kernel, *(f"{name}={value}" for name, value in self.bounds)])


def _case(op: str, head_dim: int, grid: Any, window: Any, batch: int = 1) -> Operation:
    return Operation(op, "tune", str(grid), grid, window, HEADS, head_dim, batch)


def jobs() -> list[Job]:
    """The most important first: the paper's head dim before the others."""
    bounds = (("max_bytes", 2), ("max_channels", 2048))  # wide tokens need their own warps
    norms, pools = (
        (_case(op, 72, LARGE, (1, 16, 16)), _case(op, 72, VIDEO, (4, 4, 4)))
        for op in ("norm", "norm-pool")
    )
    found = [
        Job("norm_forward", bounds, norms),
        Job("pool_forward", bounds, pools),
        Job("norm_backward", (*bounds, ("max_means", 0)), norms),
        Job("norm_backward", bounds, pools),
    ]
    for channels, head_dim in HEAD_DIMS.items():
        found += _attention_jobs(channels, head_dim)
    return found


def _attention_jobs(channels: int, head_dim: int) -> Iterator[Job]:
    bounds = (("max_bytes", 2), ("max_channels", channels))
    alone = (
        _case("window", head_dim, IMAGE, (1, 8, 8), 4),
        _case("shifted", head_dim, VIDEO, (4, 4, 4)),
    )
    together = (_case("window", head_dim, (1, 32, 32), (1, 4, 4), 8),)  # in one tile
    for task in ("forward", "backward"):
        yield Job(f"window_{task}", (*bounds, ("max_slots", 32)), together)
        yield Job(f"window_{task}", bounds, alone)
    for keys, op in ((64, "cross"), (128, "text")):
        cases = (_case(op, head_dim, IMAGE, (1, 8, 8), 4), _case(op, head_dim, LARGE, (1, 16, 16)))
        for task in ("forward", "backward"):
            yield Job(f"few_keys_{task}", (*bounds, ("max_keys", keys)), cases)
    few = (
        _case("window", head_dim, LARGE, (1, 16, 16)),
        _case("shifted", head_dim, (4, 128, 128), (4, 16, 16)),
        _case("proxy", head_dim, VIDEO, (4, 4, 4), 4),
    )
    many = (_case("cross", head_dim, LARGE, (1, 4, 4)), _case("cross", head_dim, VIDEO, (4, 4, 4)))
    for name in ("forward", "backward_q", "backward_kv"):
        yield Job(f"flash_{name}", (*bounds, ("max_queries", 2048)), few)
        # Masks and larger windows, which these cases do not have, may spill in tall tiles.
        dense = (("max_masked", 0), ("max_windowed", 0)) if name == "forward" else ()
        yield Job(f"flash_{name}", (*bounds, *dense), many)


def candidates(kernel: str) -> list[Config]:
    """Settings worth a try. A warp group multiplies 64 rows: fewer would lose wgmma, and a tile of
    128 leaves no registers to 4 warps but in `flash_forward`."""
    if kernel.startswith(("pool", "norm")):
        return [Config(warps, stages) for warps in (2, 4, 8) for stages in (1, 3)]
    tiles = ((64, 4), (64, 8), (128, 8))
    if kernel.startswith(("window", "few_keys")):
        return [Config(warps, stages, rows) for rows, warps in tiles for stages in (1, 2, 3)]
    if kernel == "flash_forward":
        tiles = (*tiles, (128, 4))
    # The side whose gradient is kept in registers sets the warps.
    own, other = ("keys", "rows") if kernel.endswith("_kv") else ("rows", "keys")
    return [
        Config(warps, stages, **{own: size, other: across})
        for (size, warps), across, stages in itertools.product(tiles, (64, 128), (2, 3))
    ]


# The table of configurations.


def present(job: Job, arch: str) -> Config:
    """What a job's class has; a class of flash without `max_queries` is dense, one of small windows
    without `max_slots` of those alone in their tile."""
    sizes = {"queries": math.inf, "windowed": 0, "slots": 64, "means": 1}
    sizes |= {name.removeprefix("max_"): value for name, value in job.bounds}
    return configs.find(job.kernel, arch, **sizes)


@contextmanager
def setting(arch: str, kernel: str, config: Config) -> Iterator[None]:
    """Let a kernel have this setting for all sizes, in this process."""
    own = configs.table().setdefault(arch, {})
    before = own.get(kernel)
    own[kernel] = [asdict(config)]
    host.forget_plans()
    try:
        yield
    finally:
        own.pop(kernel)
        if before is not None:
            own[kernel] = before
        host.forget_plans()


def entries(kernel: str, settings: Mapping[Job, Config]) -> list[dict[str, int]]:
    """Of all classes of a kernel, as bounds are upper ones only: without entries of their own the
    others would take that of the one that changed. Narrow bounds first, the defaults after them."""
    names = ("max_channels", "max_keys", "max_queries", "max_means")
    own = [dict(job.bounds) | asdict(settings[job]) for job in settings if job.kernel == kernel]
    own.sort(key=lambda entry: [entry.get(name, math.inf) for name in names])
    return own + configs.table()["default"][kernel]


# Trying.


def try_job(
    job: Job, first: Config, arch: str, clock: Clock, device: str, seconds: float
) -> tuple[Config, str]:
    """The fastest setting for a job that has `first`, and what was seen, in words."""
    times: dict[Config, float] = {}
    refused = []
    for config in dict.fromkeys((first, *candidates(job.kernel))):
        try:
            with setting(arch, job.kernel, config):
                times[config] = _time(job, clock, device, seconds)
        except Exception as error:  # too much shared memory, a wrong result: no candidate
            refused.append(f"\n    {config}: {first_line(error)}")
    if first not in times:
        return first, "the present setting does not run here" + "".join(refused)
    best = min(times, key=times.__getitem__)
    if times[best] > GAIN * times[first]:
        best = first
    seen = f"{times[best] * 1e6:.1f} µs with {best}, {times[first] * 1e6:.1f} with {first}"
    return best, seen + "".join(refused)


def _time(job: Job, clock: Clock, device: str, seconds: float) -> float:
    """The geometric mean over the job's shapes, each checked before."""
    logs = []
    for case in job.cases:
        inputs = case.inputs(device)
        op_gate.check(case, inputs)
        run = _bind(case, inputs, job.task)
        with torch.set_grad_enabled(job.task == "backward"):
            logs.append(math.log(clocks.measure(clock, {"": run}, seconds)[""].median))
    return math.exp(sum(logs) / len(logs))


def _bind(case: Operation, inputs: Any, task: str) -> Run:
    return bind(lambda tensors: case.call("triton", tensors, inputs.key_mask), inputs, task)


def compile_setting(job: Job, arch: str, config: Config) -> None:
    """Run a setting once, in a process of its own: Triton keeps what it compiled on disk."""
    with setting(arch, job.kernel, config):
        for case in job.cases:
            _bind(case, case.inputs("cuda"), job.task)()


def precompile(todo: Sequence[Job], arch: str, seconds: float) -> None:
    """Compile all settings on all cores, before any is timed; failures show again in `try_job`."""
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(min(8, os.cpu_count() or 1), mp_context=context)
    tried = ((job, arch, config) for job in todo for config in candidates(job.kernel))
    futures = [pool.submit(compile_setting, *one) for one in tried]
    done, _ = wait(futures, timeout=seconds)
    well = sum(future.exception() is None for future in done)
    print(f"compiled ahead: {well} of {len(futures)} settings", flush=True)
    pool.shutdown(wait=True, cancel_futures=True)


def search(
    todo: Sequence[Job], arch: str, clock: Clock, device: str, deadline: float, path: Path
) -> None:
    """Try the jobs in turn and write after each; those not reached keep what they have."""
    settings = {job: present(job, arch) for job in jobs()}
    changed: dict[str, None] = {}  # kernels
    for job in todo:
        if time.monotonic() > deadline:
            print(f"not reached: {job}")
            continue
        best, seen = try_job(job, settings[job], arch, clock, device, seconds=0.05)
        print(f"{job}: {seen}", flush=True)
        if best != settings[job]:
            settings[job] = best
            changed[job.kernel] = None
            found = {kernel: entries(kernel, settings) for kernel in changed}
            files.write_json({arch: found}, path)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.tune", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--only", metavar="PATTERN", type=pattern, default=re.compile(""),
                        help="jobs whose name matches, such as 'flash.*channels=96'")  # fmt: skip
    parser.add_argument("--budget", type=float, default=500.0, help="seconds (%(default)s)")
    parser.add_argument("--write", metavar="FILE", type=Path, required=True,
                        help="for the entries")  # fmt: skip
    args = parser.parse_args(argv)
    deadline = time.monotonic() + args.budget
    todo = [job for job in jobs() if args.only.search(str(job))]
    if not todo:
        parser.error(f"argument --only: no job matches {args.only.pattern!r}")
    if not torch.cuda.is_available():
        parser.error("tuning needs a CUDA GPU, and torch finds none")
    arch = "sm{}{}".format(*torch.cuda.get_device_capability())
    precompile(todo, arch, 0.4 * args.budget)
    search(todo, arch, clocks.GpuClock(), "cuda", deadline, args.write)


if __name__ == "__main__":
    main()
