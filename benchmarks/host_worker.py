"""What a call costs the host: measured here, in a process of its own, and printed by `host`.

Every tensor is tiny, so that arithmetic is next to nothing, and launches are recorded, not run:
what is left is the way from a public function to a kernel. As a script this reads
[case, task, seconds] from each line that it is given and answers with a `Sample`, both as JSON. It
runs on the checkout that PYTHONPATH names, which may be an older one.
"""

from __future__ import annotations

import functools
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import ptattn
from ptattn import ops
from ptattn.models.configs import ModelConfig
from ptattn.models.dit import DiT
from ptattn.models.pt_dit import PTDiT

PACKAGE = Path(ptattn.__file__).resolve().parent
OWN = (PACKAGE, (PACKAGE / "kernels").resolve())  # a checkout has a link to kernels/

if (PACKAGE / "kernels" / "host.py").is_file():
    from ptattn.kernels.host import record
else:  # an older checkout
    from ptattn.kernels.launch import record

# Gradients off; on; on, with the backward too.
TASKS = NO_GRAD, FORWARD, TRAINING = "no grad", "forward", "training"
ARCH = "sm90"
GRID, HEADS, HEAD_DIM = (8, 8), 2, 16
TOKENS, CHANNELS = 64, HEADS * HEAD_DIM
# A window of more than 64 tokens takes the other kernels, also where it is larger than the grid.
SMALL, LARGE = (4, 4), (16, 16)
WARM_UP = 5  # calls


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


# What is measured.


def _tokens(count: int) -> list[Tensor]:
    return [torch.randn(1, TOKENS, CHANNELS, requires_grad=True) for _ in range(count)]


def _vectors(count: int) -> list[Tensor]:
    return [torch.randn(1, CHANNELS, requires_grad=True) for _ in range(count)]


def _heads() -> list[Tensor]:
    """q, k and v as a packed projection gives them."""
    packed = torch.randn(1, TOKENS, 3, HEADS, HEAD_DIM)
    return [t.requires_grad_() for t in packed.unbind(2)]


def _operation(name: str, tensors: Sequence[Tensor], *geometry: Sequence[int]) -> Call:
    return Call(partial(getattr(ops, name), *tensors, *geometry, backend="triton"), tensors)


def _proxy_attention() -> Call:
    module = ptattn.ProxyAttention(CHANNELS, HEADS, SMALL, backend="triton")
    x = torch.randn(1, *GRID, CHANNELS, requires_grad=True)
    return Call(partial(module, x), [x, *module.parameters()])


BY_TEXT: dict[str, Any] = dict(caption_channels=8)
BY_CLASS: dict[str, Any] = dict(caption_channels=None, num_classes=3)


def _block(model_class: Any, kind: dict[str, Any], **condition: Tensor) -> Call:
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


@dataclass(frozen=True)
class Case:
    """`attentions` and `norms` count the calls of torch's own that it is compared with."""

    make: Callable[[], Call]
    attentions: int = 0
    norms: int = 0


# Made when they are measured.
CASES = {
    "window_mean": Case(lambda: _operation("window_mean", _tokens(1), GRID, SMALL), norms=1),
    "layer_norm": Case(lambda: _operation("layer_norm", _tokens(1) + _vectors(2)), norms=1),
    "residual_layer_norm": Case(
        lambda: _operation("residual_layer_norm", _tokens(2) + _vectors(3)), norms=1
    ),
    "layer_norm_window_mean": Case(
        lambda: _operation("layer_norm_window_mean", _tokens(1), GRID, SMALL), norms=1
    ),
    "residual_layer_norm_window_mean": Case(
        lambda: _operation(
            "residual_layer_norm_window_mean", _tokens(2) + _vectors(1), GRID, SMALL
        ),
        norms=1,
    ),
    "attention": Case(lambda: _operation("attention", _heads()), attentions=1),
    "window_attention": Case(
        lambda: _operation("window_attention", _heads(), GRID, SMALL), attentions=1
    ),
    "window_attention, large windows": Case(
        lambda: _operation("window_attention", _heads(), GRID, LARGE), attentions=1
    ),
    "ProxyAttention": Case(_proxy_attention, attentions=4, norms=2),
    "PT-DiT block, text": Case(
        lambda: _block(PTDiT, BY_TEXT, caption=torch.randn(1, 5, 8)), attentions=5, norms=4
    ),
    "PT-DiT block, classes": Case(
        lambda: _block(PTDiT, BY_CLASS, labels=torch.tensor([1])), attentions=4, norms=4
    ),
    "DiT block": Case(
        lambda: _block(DiT, BY_CLASS, labels=torch.tensor([1])), attentions=1, norms=2
    ),
}


def torch_own(attentions: int, norms: int) -> Call:
    """So many calls of torch's own on the shapes of the cases."""
    q, k, v = _heads()
    (x,) = _tokens(1)

    def attend() -> Tensor:
        return F.scaled_dot_product_attention(
            q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        )

    def function() -> list[Tensor]:
        attended = [attend() for _ in range(attentions)]
        return attended + [F.layer_norm(x, (CHANNELS,)) for _ in range(norms)]

    return Call(function, [*([q, k, v] if attentions else []), *([x] if norms else [])])


# How it is measured.


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


@dataclass(frozen=True)
class Sample:
    """Of one call: frames, kernels of ours and of torch's, median seconds of it and of torch's."""

    calls: int
    launches: int
    operations: int
    seconds: float
    torch_seconds: float


@contextmanager
def _ready(name: str, task: str) -> Iterator[tuple[Callable[[], Any], list[Any]]]:
    """A warm run of a case, and the launches recorded since."""
    with record(ARCH) as launches, torch.set_grad_enabled(task != NO_GRAD):
        run = CASES[name].make().run(task)
        for _ in range(WARM_UP):
            run()
        launches.clear()
        yield run, launches


def count(name: str, task: str) -> tuple[int, int, int]:
    """Own calls, launches and torch's operations.

    Frames are counted first and alone: a dispatch mode sends the operations another way.
    """
    with _ready(name, task) as (run, launches):
        calls = own_calls(run)
        launches.clear()
        with Operations() as operations:
            run()
        return calls, len(launches), operations.count


def measure(name: str, task: str, seconds: float) -> Sample:
    case = CASES[name]
    with _ready(name, task) as (run, launches):
        own = torch_own(case.attentions, case.norms).run(task)

        def forgetful() -> None:
            launches.clear()  # they hold their tensors
            run()

        times = _in_turns((forgetful, own), seconds)
    return Sample(*count(name, task), *times)


def _in_turns(runs: Sequence[Callable[[], object]], seconds: float) -> list[float]:
    """Median seconds of each; of `ptattn.bench` nothing is used, which other checkouts may lack."""
    samples: list[list[float]] = [[] for _ in runs]
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(samples[0]) < 10:
        for run, own in zip(runs, samples, strict=True):
            begin = time.perf_counter()
            run()
            own.append(time.perf_counter() - begin)
    return [statistics.median(own) for own in samples]


def check_modules() -> None:
    """An editable install lends a checkout the modules that it lacks."""
    for name, module in sorted(sys.modules.items()):
        if name.split(".")[0] == "ptattn" and not _is_own(str(module.__file__)):
            raise SystemExit(f"{PACKAGE.parent} has no {name}: it came from {module.__file__}")


def main() -> None:
    check_modules()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    for line in sys.stdin:
        print(json.dumps(asdict(measure(*json.loads(line)))), flush=True)


if __name__ == "__main__":
    main()
