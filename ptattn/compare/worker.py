"""Measuring one block at a time in a child process, so that an end by the kernel costs one case."""

from __future__ import annotations

import contextlib
import ctypes
import multiprocessing
import platform
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from ..layers import CrossAttention, Residual, SelfAttention
from ..models.blocks import Condition
from ..models.dit import DiTBlock
from ..models.pixart import PixArtBlock
from ..models.pt_dit import PTDiTBlock
from .cases import TEXT_TOKENS, Block

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
MIN_RUNS, MAX_RUNS = 2, 20
# A first run this long counts: what a warm-up hides takes some ten milliseconds.
LONG_RUN = 1.0  # seconds
START_LIMIT = 120.0  # seconds for a child to import torch
LONGEST_WAIT = 1e6  # seconds; the system call counts milliseconds in 31 bits


@dataclass(frozen=True)
class Settings:
    """How blocks are measured."""

    device: str = "cpu"  # or "cuda"
    dtype: str = "bf16"
    backend: str = "auto"
    threads: int = 1


@dataclass(frozen=True)
class Measurement:
    """Seconds of every run, and the bytes by which a forward call raised the memory in use."""

    seconds: tuple[float, ...]
    peak: int | None

    @property
    def median(self) -> float:
        return median(self.seconds)


class CaseError(Exception):
    """A case that gave no measurement; the message says why."""


Measure = Callable[[Block, Settings, float], Measurement]


def measure(block: Block, settings: Settings, share: float) -> Measurement:
    """Time a block's forward for about `share` seconds, MIN_RUNS to MAX_RUNS times."""
    forward = build(block, settings)
    with torch.inference_mode():
        first, peak = watched(forward, settings.device)
        seconds = [first]
        if first < LONG_RUN or settings.device == "cuda":  # there it may have compiled kernels
            # The warm-up allocates what is kept, too. Where no peak can be reset, only it has one.
            peak = watched(forward, settings.device)[1] or peak
            seconds = []
        while len(seconds) < MIN_RUNS or (len(seconds) < MAX_RUNS and sum(seconds) < share):
            seconds.append(_timed(forward, settings.device))
    return Measurement(tuple(seconds), peak)


def build(block: Block, settings: Settings) -> Callable[[], Tensor]:
    """The block with random weights and inputs of batch 1, as a function that runs its forward."""
    module, inputs = make(block, settings)
    return lambda: module(*inputs).total()


def make(block: Block, settings: Settings, batch: int = 1) -> tuple[nn.Module, tuple[Any, ...]]:
    """The block with random weights, and what it takes: tokens, their windows, the condition."""
    options: dict[str, Any] = dict(device=settings.device, dtype=DTYPES[settings.dtype])
    config, dim = block.config, block.config.dim
    classes = {"PT-DiT": PTDiTBlock, "DiT": DiTBlock, "PixArt": PixArtBlock}
    module = classes[block.family](config, backend=settings.backend).to(**options).eval()
    if block.family != "PT-DiT" and settings.backend == "triton":
        full_attention_by_torch(module)
    for parameter in module.parameters():
        # No layer stays zero: a GPU clocks higher when it multiplies zeros.
        nn.init.normal_(parameter, std=0.02)
    rows = 1 if config.num_classes is not None else 6
    condition = Condition(
        embedding=torch.randn(batch, dim, **options),
        modulation=torch.randn(batch, rows * dim, **options),
        text=torch.randn(batch, TEXT_TOKENS, dim, **options),
    )
    x = torch.randn(batch, block.tokens, dim, **options)
    grids = config.window_grids(block.grid) if block.family == "PT-DiT" else ()
    return module, (Residual(x), *grids, condition)


def full_attention_by_torch(module: nn.Module) -> None:
    """Full attention is at its best on torch's own kernels, and those it gets."""
    for attention in module.modules():
        if isinstance(attention, SelfAttention | CrossAttention):
            attention.backend = "sdpa"


class Worker:
    """A child process that measures blocks.

    Args:
        settings: how.
        measure: what the child runs for each block, a function that it can import.

    Attributes:
        reusable: whether one child can measure memory more than once.

    Raises:
        CaseError: the child did not start.
    """

    def __init__(self, settings: Settings, measure: Measure = measure) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(
            target=_serve, args=(theirs, settings, measure), daemon=True
        )
        # Ctrl-C reaches the whole process group; the child, which inherits this, leaves it to us.
        handler = signal.signal(signal.SIGINT, signal.SIG_IGN)
        try:
            self._process.start()
        finally:
            signal.signal(signal.SIGINT, handler)
        theirs.close()  # else the pipe stays open when the child dies
        self.reusable = bool(self._receive(START_LIMIT))

    def measure(self, block: Block, share: float, limit: float) -> Measurement:
        """Measure a block, `limit` seconds at most. After an error this worker is of no more use.

        Raises:
            CaseError: the block raised, the child died, or the limit was reached.
        """
        reply = self._receive(limit, send=(block, share))
        if isinstance(reply, Measurement):
            return reply
        raise CaseError(str(reply))

    def close(self) -> None:
        self._process.kill()
        self._process.join()
        self._pipe.close()

    def _receive(self, limit: float, send: object = None) -> object:
        try:
            if send is not None:
                self._pipe.send(send)
            if self._pipe.poll(min(limit, LONGEST_WAIT)):
                return self._pipe.recv()
        except (EOFError, OSError):
            self._process.join(10)  # the pipe is closed: it has ended, or is about to
            raise CaseError(_why(self._process.exitcode)) from None
        self.close()
        raise CaseError(f"stopped after {limit:.0f} s")


def _why(exitcode: int | None) -> str:
    if exitcode is None or exitcode >= 0:
        return f"the measuring process ended with exit code {exitcode}"
    name = signal.Signals(-exitcode).name
    hint = ", most likely out of memory" if name == "SIGKILL" else ""
    return f"the measuring process was ended by {name}{hint}"


def _serve(pipe: Connection, settings: Settings, measure: Measure) -> None:
    """The child: measure what comes through the pipe until an error or until the parent is gone."""
    torch.set_num_threads(settings.threads)
    torch.manual_seed(0)
    pipe.send(settings.device == "cuda" or _reset_peak())
    while True:
        try:
            block, share = pipe.recv()
        except EOFError:
            return
        try:
            pipe.send(measure(block, settings, share))
        except Exception as error:
            lines = str(error).splitlines() or [""]
            pipe.send(f"{type(error).__name__}: {lines[0][:160]}")
            return


def _timed(forward: Callable[[], Tensor], device: str) -> float:
    if device == "cuda":
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        start.record()
        forward()
        end.record()
        torch.cuda.synchronize()
        return start.elapsed_time(end) / 1000
    begin = time.perf_counter()
    forward()
    return time.perf_counter() - begin


def watched(forward: Callable[[], Tensor], device: str) -> tuple[float, int | None]:
    """Seconds of one run, and the bytes by which it raised the memory in use."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        seconds = _timed(forward, device)
        return seconds, torch.cuda.max_memory_allocated() - before
    _trim()
    _reset_peak()
    held = _process_peak()
    seconds = _timed(forward, device)
    peak = _process_peak()
    return seconds, None if held is None or peak is None else peak - held


def _trim() -> None:
    """Return freed memory to the system: what the allocator kept would hide what a call needs."""
    with contextlib.suppress(AttributeError, OSError, TypeError):  # glibc only
        ctypes.CDLL(None).malloc_trim(0)


def _reset_peak() -> bool:
    """Lower the peak of resident memory to what the process holds now; whether that works."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def _process_peak() -> int | None:
    """The process's peak of resident memory in bytes; None where it cannot be read."""
    try:
        status = Path("/proc/self/status").read_text()
        (line,) = (line for line in status.splitlines() if line.startswith("VmHWM:"))
        return int(line.split()[1]) * 1024
    except (OSError, ValueError):
        pass
    try:
        import resource
    except ImportError:  # Windows
        return None
    unit = 1 if platform.system() == "Darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
