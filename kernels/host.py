"""What all launchers share: plans of launches, starting kernels, recording them, what errors say.

A call pays for each fact once: what follows from shapes, strides, dtypes, windows and flags (tile
sizes, constants, how many programs, every number that a kernel takes) is a `Plan`, found again by
these facts. Numbers go to kernels one by one: Triton compiles anew for the values in a tuple.
"""

from __future__ import annotations

import functools
import math
import operator
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

import torch
import triton
from torch import Tensor
from triton.compiler import CompiledKernel

from ..geometry import WindowGrid
from . import configs, tile
from .configs import Config

TRITON: tuple[int, int] = tuple(int(part) for part in triton.__version__.split(".")[:2])  # type: ignore[assignment]
# Whether the kernels take CPU tensors, and only those: TRITON_INTERPRET=1 when first imported.
INTERPRETED = not isinstance(tile.product, triton.JITFunction)
# The largest window, in tokens: up to it the window coordinates' fast division is exact.
MAX_WINDOW = 2**20

Need = tuple[bool, bool, bool]


class KernelError(RuntimeError):
    """A kernel did not compile or does not fit the device; names kernel, shapes, configuration."""


# What a plan may depend on of a tensor: shape, strides, dtype, device.
Facts = tuple[torch.Size, tuple[int, ...], torch.dtype, torch.device]


def facts(*tensors: Tensor | None) -> tuple[Any, ...]:
    """Facts of each; None of None."""
    return tuple([None if t is None else (t.shape, t.stride(), t.dtype, t.device) for t in tensors])


# Recording.


@dataclass
class _Recorder:
    arch: str
    launches: list[Launch]


_recorder: _Recorder | None = None


@contextmanager
def record(arch: str) -> Iterator[list[Launch]]:
    """Collect launches as they would be on an architecture, such as "sm90", and run none."""
    global _recorder
    outer, _recorder = _recorder, _Recorder(arch, [])
    try:
        yield _recorder.launches
    finally:
        _recorder = outer


def target(x: Tensor) -> tuple[str, str]:
    """The architecture, "sm90", "gfx942" or "cpu", or the one recorded for, and how products of
    float32 are made; plans depend on both."""
    # Of torch's two settings this one can be read whichever was set.
    tf32 = x.dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32"
    return _recorder.arch if _recorder else arch_of(x.device), "tf32" if tf32 else "ieee"


@functools.cache
def arch_of(device: torch.device) -> str:
    if device.type != "cuda":
        return device.type
    if torch.version.hip:
        return str(torch.cuda.get_device_properties(device).gcnArchName).split(":")[0]
    return "sm{}{}".format(*torch.cuda.get_device_capability(device))


# Plans and their start.


@dataclass(frozen=True)
class Launch:
    """One kernel's launch."""

    kernel: Any
    programs: int
    args: tuple[Any, ...]
    constants: dict[str, Any]
    config: Config

    def run(self) -> Any:
        """Through Triton's binder, which compiles what it has not yet; returns what it started."""
        options = dict(num_warps=self.config.warps, num_stages=self.config.stages)
        try:
            with _interpretable(self.args) if INTERPRETED else _on(self.args) as args:
                return self.kernel[(self.programs,)](*args, **self.constants, **options)
        except (triton.CompilationError, triton.OutOfResources) as error:
            shapes = [tuple(a.shape) for a in self.args if isinstance(a, Tensor)]
            raise KernelError(
                f"{self.kernel.__name__} failed for tensors of shapes {shapes} with {self.config} "
                f"and {self.constants}: {error}"
            ) from error


class Plan:
    """A kernel's launch but for its tensors, which come first among its arguments.

    All tensors that it is started with have the dtypes of the first ones, as the kernel is compiled
    for these: a plan is kept under all that decides them.

    Args:
        programs: how many; none are started for an empty batch.
        numbers: the arguments after the tensors.
        constants: the compile-time arguments, by name.
    """

    def __init__(
        self, kernel: Any, programs: int, *numbers: Any, config: Config, **constants: Any
    ) -> None:
        self.kernel, self.programs, self.numbers = kernel, programs, numbers
        self.constants, self.config = constants, config
        self._started: Callable[[list[int]], None] | None = None

    def start(self, *tensors: Tensor) -> None:
        """Run the kernel, or record its launch."""
        if _recorder is None and self._started is not None:
            pointers = [*map(Tensor.data_ptr, tensors)]
            # Of pointers that 16 divides, as of those that it was compiled for.
            if not functools.reduce(operator.or_, pointers) & 15 and _undisturbed(tensors[0]):
                self._started(pointers)
                return
        args = (*tensors, *self.numbers)
        launch = Launch(self.kernel, self.programs, args, self.constants, self.config)
        if _recorder is not None:
            _recorder.launches.append(launch)
        elif self.programs:
            compiled = launch.run()
            aligned = not any(t.data_ptr() & 15 for t in tensors)
            if self._started is None and aligned and _can_start(compiled):
                self._started = _without_binder(compiled, self, tensors[0].device)


def _can_start(compiled: Any) -> bool:
    """Not what the interpreter returns, nor on AMD, where tensors' sizes are compiled in, too."""
    return isinstance(compiled, CompiledKernel) and not torch.version.hip


def _without_binder(
    compiled: CompiledKernel, plan: Plan, device: torch.device
) -> Callable[[list[int]], None]:
    """Start a compiled kernel by its pointers alone, sparing Triton's binder and its queries.

    `CompiledKernel.run` is called as JITFunction.run does, alike in Triton 3.3 to 3.8; constants
    keep their places and are not read.
    """
    run, function, packed = compiled.run, compiled.function, compiled.packed_metadata
    rest = (*plan.numbers, *plan.constants)
    stream, index = torch._C._cuda_getCurrentRawStream, device.index

    def start(pointers: list[int], kept: CompiledKernel = compiled) -> None:
        run(plan.programs, 1, 1, stream(index), function, packed, None, None, None,
            *pointers, *rest)  # fmt: skip

    return start


def _undisturbed(x: Tensor) -> bool:
    """Whether x lies on the current device, and nobody has asked Triton to tell of launches."""
    enter, leave = _hooks.launch_enter_hook, _hooks.launch_exit_hook
    # From Triton 3.5 on, hooks are chains that may be empty.
    hooked = getattr(enter, "calls", enter) or getattr(leave, "calls", leave)
    return not hooked and torch._C._cuda_getDevice() == x.device.index


_hooks: Any = triton.knobs.runtime if TRITON >= (3, 4) else CompiledKernel

R = TypeVar("R")
_plans: list[Any] = [configs.find]


def planned(make: Callable[..., R]) -> Callable[..., R]:
    """Keep what a function makes of its arguments, for as many of them as come up in practice."""
    kept = functools.lru_cache(1024)(make)
    _plans.append(kept)
    return kept


def forget_plans() -> None:
    """Make all plans anew: after a change of the configurations."""
    for kept in _plans:
        kept.cache_clear()


@contextmanager
def _on(args: tuple[Any, ...]) -> Iterator[tuple[Any, ...]]:
    with torch.cuda.device(args[0].device):
        yield args


@contextmanager
def _interpretable(args: tuple[Any, ...]) -> Iterator[tuple[Any, ...]]:
    """The arguments with every bfloat16 memory as float32, rounded back afterwards: the interpreter
    multiplies bfloat16 as bit patterns. It also warns of infinities, NaN and its own use of numpy.
    """
    memories: dict[int, tuple[Tensor, Tensor]] = {}

    def exact(t: Any) -> Any:
        if not isinstance(t, Tensor) or t.dtype != torch.bfloat16:
            return t
        storage = t.untyped_storage()
        if storage.data_ptr() not in memories:
            whole = t.new_empty(0).set_(storage)
            memories[storage.data_ptr()] = whole, whole.float()
        return memories[storage.data_ptr()][1].as_strided(t.shape, t.stride(), t.storage_offset())

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        warnings.simplefilter("ignore", DeprecationWarning)
        yield tuple(exact(a) for a in args)
    for whole, copy in memories.values():
        whole.copy_(copy)


# Tensors.


def empty(x: Tensor, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
    return x.new_empty(shape, dtype=dtype)


class Places(NamedTuple):
    """What a plan may depend on of `Gradients`: the strides of those that are needed."""

    q: tuple[int, ...] | None
    k: tuple[int, ...] | None
    v: tuple[int, ...] | None
    packed: bool

    @property
    def need(self) -> Need:
        return self.q is not None, self.k is not None, self.v is not None

    @property
    def of_queries(self) -> tuple[int, ...]:
        """Strides of samples and tokens."""
        return (self.q or (0, 0))[:2]

    @property
    def of_keys(self) -> tuple[int, ...]:
        """The same of k and v, which lie alike."""
        return (self.k or self.v or (0, 0))[:2]


class Gradients(NamedTuple):
    """Memory for gradients, (B, N, H, D) and (B, M, H, D), with the heads of a token one after the
    other; None where one is not needed. `packed`: so lie the k and v of a token, too."""

    q: Tensor | None
    k: Tensor | None
    v: Tensor | None
    packed: bool = False

    @property
    def facts(self) -> Places:
        q, k, v, packed = self
        return Places(
            None if q is None else q.stride(),
            None if k is None else k.stride(),
            None if v is None else v.stride(),
            packed,
        )


def or_(unused: Tensor, *tensors: Tensor | None) -> list[Tensor]:
    """What kernels write to; `unused` where there is nothing to write."""
    return [unused if t is None else t for t in tensors]


def rows(*tensors: Any) -> list[Any]:
    """The kernels read rows of channels one after the other: a copy where they are not."""
    return [
        t if t is None or t.stride(-1) == 1 or t.shape[-1] == 1 else t.contiguous() for t in tensors
    ]


def mask_bytes(key_mask: Tensor | None, unused: Tensor) -> Tensor:
    return unused if key_mask is None else key_mask.contiguous().view(torch.uint8)


def accumulator(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


# What plans are made of.


def config_of(kernel: str, arch: str, dtype: torch.dtype, **sizes: int) -> Config:
    return configs.find(kernel, arch, bytes=dtype.itemsize, **sizes)


def split_channels(channels: int) -> tuple[int, int]:
    """Two tile widths, each 0 or a power of two from 16 on, that hold `channels` with little waste.

    The second is 0 where one power of two is as small.
    """
    whole = max(16, next_power_of_2(channels))
    first = whole // 2
    if channels == whole or first < 16:
        return whole, 0
    second = max(16, next_power_of_2(channels - first))
    return (first, second) if first + second < whole else (whole, 0)


def alignment(*tensors: Facts | None) -> int:
    """The power of two, 16 at most, that divides every stride but the last; those of one index
    do not matter."""
    strides = (
        stride
        for t in tensors
        if t is not None
        for stride, length in zip(t[1][:-1], t[0][:-1], strict=True)
        if length > 1
    )
    return math.gcd(16, *strides)


def strides_of(*tensors: Facts) -> list[int]:
    return [stride for t in tensors for stride in t[1][:-1]]


def attention_tiles(precision: str, *tensors: Facts) -> dict[str, Any]:
    """The constants that every attention kernel has."""
    head_dim = tensors[0][0][-1]
    first, second = split_channels(head_dim)
    return dict(D=head_dim, D0=first, D1=second, ALIGN=alignment(*tensors), PRECISION=precision)


def needs(need: Need) -> dict[str, bool]:
    return dict(zip(("NEED_Q", "NEED_K", "NEED_V"), need, strict=True))


def geometry(windows: WindowGrid | None) -> tuple[int, ...]:
    """Grid, window and offset -shift mod window on each axis, the kernels' geometry."""
    if windows is None:
        return (1,) * 6 + (0,) * 3
    grid, size, shift = windows.grid, windows.window, windows.shift
    return (*grid, *size, *(-s % p for s, p in zip(shift, size, strict=True)))


def largest_window(windows: WindowGrid) -> int:
    """Tokens of the largest window that the grid can hold."""
    return math.prod(min(n, p) for n, p in zip(windows.grid, windows.window, strict=True))


def num_blocks(rows: int | WindowGrid, size: int) -> int:
    """Blocks of `size` slots that hold so many rows, or the largest window that the grid can."""
    if isinstance(rows, int):
        return cdiv(rows, size)
    return blocks_of_box([min(n, p) for n, p in zip(rows.grid, rows.window, strict=True)], size)


def blocks_of_box(extents: Sequence[int], size: int) -> int:
    """Blocks of `size` slots that hold a window as it is cut; the twin of `blocks.cut`."""
    frames, lines, columns = extents
    depth, height, width = (max(size // n, 1) for n in (lines * columns, columns, 1))
    return cdiv(frames, depth) * cdiv(lines, height) * cdiv(columns, width)


def cdiv(a: int, b: int) -> int:
    return -(-a // b)


def next_power_of_2(n: int) -> int:
    return 1 << (n - 1).bit_length()
