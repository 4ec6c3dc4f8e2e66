"""What a call of an operation, ProxyAttention or a block costs the host, without a GPU.

    python -m benchmarks.host [--only REGEX]

Tensors are tiny (8 x 8 tokens, 2 heads of 16, fp32, one thread) and the launches of kernels are
recorded as on sm90, not run: what is left is the way from a public function to a kernel. Each case
runs with gradients off ("no grad"), forward with gradients on ("forward") and with its backward
("training"). In the table:

  calls    Python frames of ptattn and its kernels that a call enters, resumed generators among
           them, after a few calls have filled every cache
  limit    the most calls there may be; exit status 1 if a case has more
  kernels  launches of ours, and torch operations that are neither view nor allocation, as a
           dispatch mode sees them: under one, gradients of packed projections are stacked;
           "ours" are the launches alone
  µs       the median of one call, on this machine

Another checkout is compared with by running this in both.
"""

from __future__ import annotations

import argparse
import functools
import os
import re
import statistics
import sys
import timeit
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import ptattn
from benchmarks.tables import table
from ptattn import ops
from ptattn.bench import units
from ptattn.bench.command import pattern
from ptattn.kernels.host import INTERPRETED, record
from ptattn.models.configs import ModelConfig
from ptattn.models.dit import DiT
from ptattn.models.pt_dit import PTDiT

PACKAGE = Path(ptattn.__file__).resolve().parent
OWN = (PACKAGE, (PACKAGE / "kernels").resolve())  # a checkout has a link to kernels/

# Gradients off; on; on, with the backward too.
TASKS = NO_GRAD, FORWARD, TRAINING = "no grad", "forward", "training"
ARCH = "sm90"
GRID, HEADS, HEAD_DIM = (8, 8), 2, 16
TOKENS, CHANNELS = 64, HEADS * HEAD_DIM
# A window of more than 64 tokens takes the other kernels, also where it is larger than the grid.
SMALL, LARGE = (4, 4), (16, 16)
WARM_UP, TIMED = 5, 100  # calls


@dataclass(frozen=True)
class Call:
    """A call, and the tensors whose gradients a backward finds."""

    function: Callable[[], Any]  # gives a tensor, or several
    leaves: Sequence[Tensor]

    def run(self, task: str) -> Callable[[], Any]:
        if task != TRAINING:
            return self.function
        out = self.function()
        upstream = [torch.ones_like(t) for t in ([out] if isinstance(out, Tensor) else out)]

        def step() -> None:
            torch.autograd.grad(self.function(), self.leaves, upstream, allow_unused=True)

        return step


# What is counted.


def _tensors(count: int, *shape: int) -> list[Tensor]:
    return [torch.randn(1, *shape, requires_grad=True) for _ in range(count)]


def _rowwise(name: str, streams: int, vectors: int, *geometry: Sequence[int]) -> Call:
    tensors = _tensors(streams, TOKENS, CHANNELS) + _tensors(vectors, CHANNELS)
    return Call(partial(getattr(ops, name), *tensors, *geometry, backend="triton"), tensors)


def _attention(name: str, *geometry: Sequence[int]) -> Call:
    """q, k and v as a packed projection gives them."""
    packed = torch.randn(1, TOKENS, 3, HEADS, HEAD_DIM)
    heads = [t.requires_grad_() for t in packed.unbind(2)]
    return Call(partial(getattr(ops, name), *heads, *geometry, backend="triton"), heads)


def _proxy_attention() -> Call:
    module = ptattn.ProxyAttention(CHANNELS, HEADS, SMALL, backend="triton")
    (x,) = _tensors(1, *GRID, CHANNELS)
    return Call(partial(module, x), [x, *module.parameters()])


# A model's conditions: what its configuration says of them, and one of them.
TEXT = dict(caption_channels=8), dict(caption=torch.ones(1, 5, 8))
CLASSES = dict(caption_channels=None, num_classes=3), dict(labels=torch.tensor([1]))


def _block(model_class: Any, kind: dict[str, Any], condition: dict[str, Tensor]) -> Call:
    """A model's second block, called with whatever its model gives it."""
    config = ModelConfig(2, CHANNELS, HEADS, window=SMALL, **kind)
    model = model_class(config, backend="triton")
    block, calls = model.blocks[1], []
    hook = block.register_forward_pre_hook(
        lambda _, args, kwargs: calls.append((args, kwargs)), with_kwargs=True
    )
    with torch.no_grad(), record(ARCH):
        model(torch.randn(1, 4, *(2 * length for length in GRID)), torch.ones(1), **condition)
    hook.remove()
    ((args, kwargs),) = calls
    inputs = [t for t in tree_leaves(calls) if isinstance(t, Tensor) and t.is_floating_point()]
    for t in inputs:
        t.requires_grad_()
    return Call(partial(block, *args, **kwargs), [*inputs, *block.parameters()])


# By name: how a call is made, and the most calls of our own, task by task.
SUM, SUM_MEAN, WINDOW = "residual_layer_norm", "residual_layer_norm_window_mean", "window_attention"
CASES: dict[str, tuple[Callable[[], Call], tuple[int, int, int]]] = {
    "window_mean": (partial(_rowwise, "window_mean", 1, 0, GRID, SMALL), (30, 30, 50)),
    "layer_norm": (partial(_rowwise, "layer_norm", 1, 2), (30, 30, 60)),
    SUM: (partial(_rowwise, SUM, 2, 3), (30, 30, 60)),
    "layer_norm_window_mean": (
        partial(_rowwise, "layer_norm_window_mean", 1, 0, GRID, SMALL), (35, 35, 60),
    ),
    SUM_MEAN: (partial(_rowwise, SUM_MEAN, 2, 1, GRID, SMALL), (35, 35, 70)),
    "attention": (partial(_attention, "attention"), (30, 30, 60)),
    WINDOW: (partial(_attention, WINDOW, GRID, SMALL), (30, 30, 60)),
    f"{WINDOW}, large windows": (partial(_attention, WINDOW, GRID, LARGE), (35, 35, 70)),
    "ProxyAttention": (_proxy_attention, (290, 300, 545)),
    "PT-DiT block, text": (partial(_block, PTDiT, *TEXT), (345, 375, 740)),
    "PT-DiT block, classes": (partial(_block, PTDiT, *CLASSES), (310, 345, 695)),
    "DiT block": (partial(_block, DiT, *CLASSES), (95, 120, 265)),
}  # fmt: skip


def limit(name: str, task: str) -> int:
    return CASES[name][1][TASKS.index(task)]


# How it is counted.


class Counts(NamedTuple):
    """Of one call: frames of our own, kernels of ours and of torch's."""

    calls: int
    launches: int
    operations: int


def own_calls(run: Callable[[], Any]) -> int:
    """Python frames of the project that one call enters, resumed generators among them."""
    count, outer = 0, sys.getprofile()

    def enter(frame: Any, event: str, _: Any) -> None:
        nonlocal count
        count += event == "call" and _is_own(frame.f_code.co_filename)

    sys.setprofile(enter)
    try:
        run()
    finally:
        sys.setprofile(outer)
    return count


@functools.cache
def _is_own(filename: str) -> bool:
    path = Path(filename).resolve()
    return any(path.is_relative_to(folder) for folder in OWN)


class Operations(TorchDispatchMode):
    """Counts operations of torch's that start a kernel: views and bare allocations start none."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        free = func.is_view or name == "_unsafe_view" or "empty" in name
        self.count += not free and func.namespace != "ptattn"  # ours show by their launches
        return func(*args, **(kwargs or {}))


@contextmanager
def _ready(name: str, task: str) -> Iterator[tuple[Callable[[], Any], list[Any]]]:
    """A warm run of a case, and the launches recorded since."""
    make, _ = CASES[name]
    with record(ARCH) as launches, torch.set_grad_enabled(task != NO_GRAD):
        run = make().run(task)
        for _ in range(WARM_UP):
            run()
        launches.clear()
        yield run, launches


def count(name: str, task: str) -> Counts:
    """Frames are counted first and alone: a dispatch mode sends the operations another way."""
    with _ready(name, task) as (run, launches):
        calls = own_calls(run)
        launches.clear()
        with Operations() as operations:
            run()
        return Counts(calls, len(launches), operations.count)


def seconds(name: str, task: str) -> float:
    """The median of a call."""
    with _ready(name, task) as (run, _):
        return statistics.median(timeit.repeat(run, number=1, repeat=TIMED))


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.host", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--only", metavar="REGEX", type=pattern, default=re.compile(""),
                        help="cases, such as '^attention$'")  # fmt: skip
    args = parser.parse_args(argv)
    chosen = [name for name in CASES if args.only.search(name)]
    if not chosen:
        parser.error(f"no case matches {args.only.pattern!r}; they are {', '.join(CASES)}")
    if not INTERPRETED:  # kernels that are compiled refuse CPU tensors before a launch is recorded
        known = os.environ | {"TRITON_INTERPRET": "1"}
        os.execve(sys.executable, [sys.executable, "-m", "benchmarks.host", *sys.argv[1:]], known)
    torch.set_num_threads(1)
    rows, failed = [], []
    for name in chosen:
        for task in TASKS:
            calls, launches, operations = count(name, task)
            most, micro = limit(name, task), units.digits(seconds(name, task) * 1e6)
            rows.append((name, task, calls, most, launches + operations, launches, micro))
            if calls > most:
                failed.append(f"{name}, {task}: {calls} calls, of at most {most}")
    print(table(("case", "task", "calls", "limit", "kernels", "ours", "µs"), rows))
    print(f"\nMeasured: {len(rows)}. Over their limit: {len(failed)}.", *failed, sep="\n")
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main())
