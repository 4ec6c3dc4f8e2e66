"""The memory that a run adds at its peak: of the GPU, or of this process."""

from __future__ import annotations

import contextlib
import ctypes
import platform
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch


def added(run: Callable[[], Any], device: str) -> tuple[int | None, float]:
    """Bytes by which a run raises the memory in use at its peak, None where that cannot be seen,
    and its seconds."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before: int | None = torch.cuda.memory_allocated()
    else:
        _trim()
        reset()
        before = _process_peak()
    begin = time.perf_counter()
    run()
    seconds = time.perf_counter() - begin
    peak = torch.cuda.max_memory_allocated() if device == "cuda" else _process_peak()
    return None if before is None or peak is None else peak - before, seconds


def _trim() -> None:
    """Return freed memory to the system: what the allocator kept would hide what a call needs."""
    with contextlib.suppress(AttributeError, OSError, TypeError):  # glibc only
        ctypes.CDLL(None).malloc_trim(0)


def reset() -> bool:
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
