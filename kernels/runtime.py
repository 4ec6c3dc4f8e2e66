"""How a kernel is started: the device, the interpreter, recording, and what errors say."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor

from . import flash
from .configs import Config

TRITON = tuple(int(part) for part in triton.__version__.split(".")[:2])
INTERPRETED = not isinstance(flash.flash_forward, triton.JITFunction)


class KernelError(RuntimeError):
    """A kernel did not compile or does not fit the device; names kernel, shapes, configuration."""


@dataclass(frozen=True)
class Launch:
    """One kernel's launch."""

    kernel: Any
    programs: int
    args: tuple[Any, ...]
    constants: dict[str, Any]
    config: Config

    def run(self, device: torch.device) -> None:
        options = dict(num_warps=self.config.warps, num_stages=self.config.stages)
        try:
            with _interpretable(self.args) if INTERPRETED else _on(device, self.args) as args:
                self.kernel[(self.programs,)](*args, **self.constants, **options)
        except (triton.CompilationError, triton.OutOfResources) as error:
            shapes = [tuple(a.shape) for a in self.args if isinstance(a, Tensor)]
            raise KernelError(
                f"{self.kernel.__name__} failed for tensors of shapes {shapes} with {self.config} "
                f"and {self.constants}: {error}"
            ) from error


@contextmanager
def _on(device: torch.device, args: tuple[Any, ...]) -> Iterator[tuple[Any, ...]]:
    with torch.cuda.device(device):
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


def start(kernel: Any, programs: int, *args: Any, config: Config, **constants: Any) -> None:
    """Run a kernel, or record its launch; nothing for no programs."""
    launch = Launch(kernel, programs, args, constants, config)
    if _recorder is not None:
        _recorder.launches.append(launch)
    elif programs:
        launch.run(args[0].device)


def arch(device: torch.device) -> str:
    """ "sm90", "gfx942" or "cpu"; while recording, the architecture recorded for."""
    return _recorder.arch if _recorder else _arch(device)


@functools.cache
def _arch(device: torch.device) -> str:
    if device.type != "cuda":
        return device.type
    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip:
        return str(properties.gcnArchName).split(":")[0]
    return f"sm{properties.major}{properties.minor}"
