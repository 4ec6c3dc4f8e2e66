"""The fastest tile sizes of every kernel on the GPU at hand.

    python -m benchmarks.tune [--only PATTERN] [--budget SECONDS] [--write FILE]

For each kernel and each class of sizes that configs.json tells apart, a small grid of settings runs
on a few shapes; each is held to the tolerance rule before it is timed. A setting that is at least
2 % faster than the default takes its place. The entries go under the GPU's architecture, into
kernels/configs.json or another file, which the environment variable PTATTN_CONFIGS then names;
"default" is left alone; its entries follow the new ones, for the sizes that none of these covers.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import multiprocessing
import os
import re
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ptattn import files
from ptattn.bench import clocks, op_gate
from ptattn.bench.clocks import Clock, Run
from ptattn.bench.command import pattern
from ptattn.bench.op_run import bind
from ptattn.bench.op_workloads import Operation
from ptattn.kernels import configs, host
from ptattn.kernels.configs import Config

Entry = dict[str, int]
Table = dict[str, dict[str, list[Entry]]]
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
    return Operation(op, "tune", "x".join(map(str, grid)), grid, window, HEADS, head_dim, batch)


def jobs() -> list[Job]:
    """The most important first: the paper's head dim before the others."""
    bounds = (("max_bytes", 2), ("max_channels", 2048))  # wide tokens need their own warps
    found = [
        Job("norm_forward", bounds, _passes("norm")),
        Job("pool_forward", bounds, _passes("norm-pool")),
        Job("norm_backward", (*bounds, ("max_means", 0)), _passes("norm")),
        Job("norm_backward", bounds, _passes("norm-pool")),
    ]
    for channels, head_dim in HEAD_DIMS.items():
        found += _attention_jobs(channels, head_dim)
    return found


def _passes(op: str) -> tuple[Operation, ...]:
    cases = ((LARGE, (1, 16, 16)), (VIDEO, (4, 4, 4)))
    return tuple(_case(op, 72, grid, window) for grid, window in cases)


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


def candidates(kernel: str) -> list[Entry]:
    """Settings worth a try. A warp group multiplies 64 rows: fewer would lose wgmma, and a tile of
    128 leaves no registers to 4 warps but in `flash_forward`."""
    if kernel.startswith(("pool", "norm")):
        return [dict(warps=warps, stages=stages) for warps in (2, 4, 8) for stages in (1, 3)]
    tiles = ((64, 4), (64, 8), (128, 8))
    if kernel.startswith(("window", "few_keys")):
        return [
            dict(rows=rows, warps=warps, stages=stages)
            for (rows, warps), stages in itertools.product(tiles, (1, 2, 3))
        ]
    # The side whose gradient is kept in registers sets the warps.
    own, other = ("keys", "rows") if kernel.endswith("_kv") else ("rows", "keys")
    if kernel == "flash_forward":
        tiles = (*tiles, (128, 4))
    return [
        {own: size, other: across, "warps": warps, "stages": stages}
        for (size, warps), across, stages in itertools.product(tiles, (64, 128), (2, 3))
    ]


# The table of configurations.


def present(table: Table, arch: str, job: Job) -> Entry:
    """The setting that a job's class has; a class of flash without `max_queries` is dense, one of
    small windows without `max_slots` of those alone in their tile."""
    sizes = {"queries": math.inf, "windowed": 0, "slots": 64, "means": 1}
    sizes |= {name.removeprefix("max_"): value for name, value in job.bounds}
    for entry in table.get(arch, {}).get(job.kernel) or table["default"][job.kernel]:
        if all(size <= entry.get(f"max_{name}", size) for name, size in sizes.items()):
            return {k: v for k, v in entry.items() if not k.startswith("max_")}
    raise LookupError(f"configs.json has no setting for {job}")


@contextmanager
def setting(arch: str, kernel: str, entry: Entry) -> Iterator[None]:
    """Let a kernel have this setting for all sizes, in this process."""
    own = configs.table().setdefault(arch, {})
    before = own.get(kernel)
    own[kernel] = [entry]
    host.forget_plans()
    try:
        yield
    finally:
        own.pop(kernel)
        if before is not None:
            own[kernel] = before
        host.forget_plans()


def merged(table: Table, arch: str, found: dict[Job, Entry]) -> Table:
    """The table with the entries found: narrow bounds first, the defaults after them."""
    own = dict(table.get(arch, {}))
    for kernel in dict.fromkeys(job.kernel for job in found):
        settings = {job: entry for job, entry in found.items() if job.kernel == kernel}
        entries = [dict(job.bounds) | settings[job] for job in sorted(settings, key=_narrowness)]
        own[kernel] = entries + table["default"][kernel]
    return {**table, arch: own}


def _narrowness(job: Job) -> tuple[float, ...]:
    bounds = dict(job.bounds)
    names = ("max_channels", "max_keys", "max_queries", "max_means")
    return tuple(bounds.get(name, math.inf) for name in names)


def write(path: Path, table: Table) -> None:
    """As configs.json is laid out: an entry per line, where all do not fit one."""
    archs = []
    for arch, kernels in table.items():
        lines = [
            f'    "{name}": {_entries(entries, len(name))}' for name, entries in kernels.items()
        ]
        archs.append(f'  "{arch}": {{\n' + ",\n".join(lines) + "\n  }")
    files.write("{\n" + ",\n".join(archs) + "\n}\n", path)


def _entries(entries: Sequence[Entry], name: int) -> str:
    each = [json.dumps(entry) for entry in entries]
    if len(each) == 1 and len(each[0]) + name < 88:
        return f"[{each[0]}]"
    return "[\n      " + ",\n      ".join(each) + "\n    ]"


# Trying.


def try_job(
    job: Job, first: Entry, arch: str, clock: Clock, device: str, seconds: float
) -> tuple[Entry, str]:
    """The fastest setting for a job that has `first`, and what was seen, in words."""
    known = Config(**first)
    tried = [first, *(e for e in candidates(job.kernel) if Config(**e) != known)]
    times: dict[int, float] = {}
    refused = []
    for i, entry in enumerate(tried):
        try:
            with setting(arch, job.kernel, entry):
                times[i] = _time(job, clock, device, seconds)
        except Exception as error:  # too much shared memory, a wrong result: no candidate
            reason = str(error).splitlines() or [""]
            refused.append(f"\n    {entry}: {type(error).__name__}: {reason[0][:120]}")
    if 0 not in times:
        return first, "the present setting does not run here" + "".join(refused)
    best = min(times, key=times.__getitem__)
    if times[best] > GAIN * times[0]:
        best = 0
    seen = f"{times[best] * 1e6:.1f} µs with {tried[best]}, {times[0] * 1e6:.1f} with {first}"
    return tried[best], seen + "".join(refused)


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


def compile_setting(job: Job, arch: str, entry: Entry) -> None:
    """Run a setting once, in a process of its own: Triton keeps what it compiled on disk."""
    with setting(arch, job.kernel, entry):
        for case in job.cases:
            _bind(case, case.inputs("cuda"), job.task)()


def precompile(todo: Sequence[Job], arch: str, deadline: float) -> None:
    """Compile all settings on all cores, before any is timed; failures show again in `try_job`."""
    workers = min(8, os.cpu_count() or 1)
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(workers, mp_context=context)
    futures = [
        pool.submit(compile_setting, job, arch, entry)
        for job in todo
        for entry in candidates(job.kernel)
    ]
    done, late = wait(futures, timeout=max(0.0, deadline - time.monotonic()))
    broken = any(isinstance(future.exception(), BrokenProcessPool) for future in done)
    if late or broken:
        why = "a process died" if broken else "time is up"
        print(f"compiled ahead {len(done)} of {len(futures)} settings: {why}")
    pool.shutdown(wait=True, cancel_futures=True)


def search(
    todo: Sequence[Job], arch: str, clock: Clock, device: str, deadline: float, path: Path
) -> int:
    """Try the jobs in turn and write after each; those not reached keep what they have."""
    # Of the package's file alone where that is written, not of the user's beside it.
    known = json.loads(path.read_text("utf-8")) if path == configs.PATH else configs.table()
    table: Table = {name: dict(kernels) for name, kernels in known.items()}
    tuned: dict[str, list[Entry]] = {}
    for job in todo:
        if time.monotonic() > deadline:
            print(f"not reached: {job}")
            continue
        first = present(table, arch, job)
        best, seen = try_job(job, first, arch, clock, device, seconds=0.05)
        print(f"{job}: {seen}", flush=True)
        if best != first:
            # Bounds are upper ones only: without entries of their own, the kernel's other classes
            # would take this one's.
            classes = [other for other in jobs() if other.kernel == job.kernel]
            settings = {other: present(table, arch, other) for other in classes}
            table = merged(table, arch, settings | {job: best})
            tuned |= {job.kernel: table[arch][job.kernel]}
            write(path, table if path == configs.PATH else {arch: tuned})
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.tune", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--only", metavar="PATTERN", type=pattern, default=re.compile(""),
                        help="jobs whose name matches, such as 'flash.*channels=96'")  # fmt: skip
    parser.add_argument("--budget", type=float, default=500.0, help="seconds (%(default)s)")
    parser.add_argument("--write", metavar="FILE", type=Path, default=configs.PATH,
                        help="for the entries (default: the package's configs.json)")  # fmt: skip
    args = parser.parse_args(argv)
    deadline = time.monotonic() + args.budget
    todo = [job for job in jobs() if args.only.search(str(job))]
    if not todo:
        parser.error(f"argument --only: no job matches {args.only.pattern!r}")
    if not torch.cuda.is_available():
        parser.error("tuning needs a CUDA GPU, and torch finds none")
    arch = "sm{}{}".format(*torch.cuda.get_device_capability())
    precompile(todo, arch, deadline - 0.6 * args.budget)
    return search(todo, arch, clocks.GpuClock(), "cuda", deadline, args.write)


if __name__ == "__main__":
    sys.exit(main())
