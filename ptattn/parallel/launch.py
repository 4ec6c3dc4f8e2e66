"""The processes that torchrun or accelerate has started, as a mesh."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh


@contextmanager
def launched(kind: str) -> Iterator[DeviceMesh | None]:
    """A mesh of all processes, one GPU each where `kind` is "cuda"; None of a process alone."""
    processes = int(os.environ.get("WORLD_SIZE", 1))
    if processes == 1:
        yield None
        return
    mesh = init_device_mesh(kind, (processes,), mesh_dim_names=("tokens",))
    try:
        yield mesh
    finally:
        dist.destroy_process_group()
