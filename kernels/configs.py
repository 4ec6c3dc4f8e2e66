"""Tile sizes, warps and pipeline stages of every kernel, read from configs.json: their one place.

The file maps architecture -> kernel -> entries. The first entry whose bounds hold is taken:
`bytes` is the size of an element, `channels` the width of the tiles that hold the head dim, `keys`
that of the tile of a few keys, `slots` the rows that a small window takes of its tile, `queries`
how many there are; `windowed` is 1 for windows, `masked` for a key mask, `means` for a norm with
window means.
"default" serves every architecture and kernel that has no entries of its own.
`python -m benchmarks.tune` writes entries for the GPU at hand into a file of the user's: the
entries of the file that the environment variable PTATTN_CONFIGS names come before these.

"dense_by_torch" is no kernel of ours: it has the dense attentions that a kernel of torch's was
measured to do faster, as `Faster` has it. It is written by hand, from a run of `ptattn bench ops`.
"""

from __future__ import annotations

import functools
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

PATH = Path(__file__).with_name("configs.json")


@dataclass(frozen=True)
class Config:
    """`rows` of queries and `keys` per block, where the kernel has a choice."""

    warps: int
    stages: int = 1
    rows: int = 64
    keys: int = 64


@dataclass(frozen=True)
class Faster:
    """Dense attention without a mask that `kernel` of torch.nn.attention.SDPBackend does faster.

    It was measured in the run of the folder `run`, for this dtype and head dim, and for no fewer
    `heads` of all samples together, `queries` and `keys` than these; with its backward for no fewer
    than `training_keys`.
    """

    dtype: str
    head_dim: int
    heads: int
    queries: int
    keys: int
    training_keys: int
    kernel: str
    run: str


@functools.cache
def table() -> dict[str, dict[str, list[dict[str, Any]]]]:
    """Raises ValueError if PTATTN_CONFIGS names a file that cannot be read."""
    entries = json.loads(PATH.read_text(encoding="utf-8"))
    if path := os.environ.get("PTATTN_CONFIGS"):
        try:
            for arch, kernels in json.loads(Path(path).read_text(encoding="utf-8")).items():
                own = entries.setdefault(arch, {})
                for kernel, first in kernels.items():
                    own[kernel] = [*first, *(own.get(kernel) or entries["default"].get(kernel, ()))]
        except (OSError, ValueError, AttributeError, TypeError) as error:
            raise ValueError(f"cannot read {path}, which PTATTN_CONFIGS names: {error}") from None
    return entries


@functools.lru_cache(1024)  # sizes have no end
def find(kernel: str, arch: str, **sizes: int) -> Config:
    """The configuration of a kernel on an architecture such as "sm90"."""
    entries = table().get(arch, {}).get(kernel) or table()["default"][kernel]
    for entry in entries:
        if all(size <= entry.get(f"max_{name}", size) for name, size in sizes.items()):
            return Config(**{k: v for k, v in entry.items() if not k.startswith("max_")})
    raise LookupError(f"configs.json has no entry for {kernel} on {arch} with {sizes}")


def faster(arch: str) -> tuple[Faster, ...]:
    return tuple([Faster(**entry) for entry in table().get(arch, {}).get("dense_by_torch", ())])
