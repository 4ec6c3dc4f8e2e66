"""What a measurement ran on: machine, versions, commit. The one home of such facts."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from . import __version__

PACKAGE = Path(__file__).resolve().parent


def describe() -> dict[str, Any]:
    """Machine and versions as a dict that JSON can hold; memory in bytes, None where unknown."""
    return {
        "cpu": f"{cpu_name()} ({torch.backends.cpu.get_cpu_capability()})",
        "cores": usable_cores(),
        "threads": torch.get_num_threads(),
        "load": load(),
        "memory": total_memory(),
        "gpus": gpu_names(),
        "os": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": version("triton"),
        "ptattn": __version__,
        "commit": commit(),
    }


def version(package: str) -> str | None:
    """The installed version, or None. Imports nothing."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def cpu_name() -> str:
    for line in _lines("/proc/cpuinfo"):
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    if platform.system() == "Darwin":
        return _output("sysctl", "-n", "machdep.cpu.brand_string") or platform.machine()
    return platform.processor() or platform.machine()


def gpu_names() -> list[str]:
    return [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]


def usable_cores() -> int:
    """Cores that this process may run on, which a container can make fewer than the machine has."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def load() -> float | None:
    """The average number of busy cores over the last minute; None where unknown."""
    return os.getloadavg()[0] if hasattr(os, "getloadavg") else None


def total_memory() -> int | None:
    """Bytes of memory, within the control group's limit."""
    return _smaller(_meminfo("MemTotal") or _pages("SC_PHYS_PAGES"), _group_limit())


def bf16_is_fast(device: str) -> bool:
    """Whether matrices multiply faster in bf16 than in fp32; on a GPU they are taken to.

    A CPU without bf16 instructions emulates them, many times slower than it computes in fp32.
    """
    if device != "cpu":
        return True

    def seconds(dtype: torch.dtype) -> float:
        x, times = torch.ones(512, 512, dtype=dtype), []
        for _ in range(5):
            begin = time.perf_counter()
            F.linear(x, x)
            times.append(time.perf_counter() - begin)
        return min(times)

    return seconds(torch.bfloat16) < seconds(torch.float32)


def available_memory(device: str = "cpu") -> int | None:
    """Bytes that a new process could take on "cpu" or "cuda"; None where unknown."""
    if device == "cuda":
        return torch.cuda.mem_get_info()[0]
    free = _meminfo("MemAvailable") or _pages("SC_AVPHYS_PAGES")
    limit = _group_limit()
    # Not memory.current: that counts file caches too, which the kernel would drop.
    return _smaller(free, None if limit is None else max(0, limit - _group_in_use()))


def commit() -> str | None:
    """The checkout's commit, "-dirty" if files differ from it; None unless this is a checkout."""
    top = _output("git", "-C", str(PACKAGE), "rev-parse", "--show-toplevel")
    # An environment inside somebody else's checkout must not report that one's commit.
    if top is None or Path(top) / "ptattn" != PACKAGE:
        return None
    describe = ("describe", "--always", "--dirty", "--abbrev=40", "--exclude=*")
    return _output("git", "-C", str(PACKAGE), *describe)


def _output(*command: str) -> str | None:
    """What a program prints, or None where it is missing, fails or hangs."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _lines(path: str) -> list[str]:
    try:
        return Path(path).read_text().splitlines()
    except OSError:
        return []


def _meminfo(key: str) -> int | None:
    kilobytes = (line.split()[1] for line in _lines("/proc/meminfo") if line.startswith(f"{key}:"))
    return next((int(value) * 1024 for value in kilobytes), None)


def _pages(key: str) -> int | None:
    """Where there is no /proc/meminfo."""
    known = getattr(os, "sysconf_names", {})
    return os.sysconf(key) * os.sysconf("SC_PAGE_SIZE") if key in known else None


def _group_limit() -> int | None:
    """The memory limit of a container (control groups, version 2)."""
    limit = _lines("/sys/fs/cgroup/memory.max")
    return int(limit[0]) if limit and limit[0].isdigit() else None


def _group_in_use() -> int:
    anonymous = (line for line in _lines("/sys/fs/cgroup/memory.stat") if line.startswith("anon "))
    return sum(int(line.split()[1]) for line in anonymous)


def _smaller(a: int | None, b: int | None) -> int | None:
    known = [value for value in (a, b) if value is not None]
    return min(known, default=None)
