"""What is measured on a GPU: every kernel at the paper's shapes, its inputs and its time floor.

Shapes: B batch, N tokens, M keys or proxies, H heads, D head dim, C = H·D channels; all in bf16.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from benchmarks.timing import Rates
from ptattn import ops
from ptattn.geometry import Triple, WindowGrid, default_window
from ptattn.models.configs import PT_DIT

DTYPE, ELEMENT = torch.bfloat16, 2
TASKS = ("forward", "backward")
TEXT = 120  # tokens of a caption, as in the paper
DENSE = ("cross", "text", "proxy")
WINDOWED = ("window", "shifted")
ATTENTION = (*WINDOWED, *DENSE)
MEANS = ("pool", "mean")
OPS = (*ATTENTION, *MEANS)

MODELS = {"XL": "pt-dit-xl", "H": "pt-dit-h", "B": "pt-dit-b"}
GRIDS = {
    "1024 px": (1, 64, 64),
    "2048 px": (1, 128, 128),
    "video 512 px": (48, 32, 32),
    "video 1024 px": (48, 64, 64),
    "512 px": (1, 32, 32),
    "256 px": (1, 16, 16),
}
BATCHES = (1, 2, 8)
# Beyond the paper's windows: finer proxies, and windows of 1024 tokens.
EXTRA = (
    ("cross", "2048 px", (1, 128, 128), (1, 4, 4)),
    ("cross", "video 1024 px", (48, 64, 64), (4, 4, 4)),
    ("proxy", "2048 px", (1, 128, 128), (1, 4, 4)),
    ("proxy", "video 1024 px", (48, 64, 64), (4, 4, 4)),
    ("window", "short video 2048 px", (8, 128, 128), (4, 16, 16)),
    ("shifted", "short video 2048 px", (8, 128, 128), (4, 16, 16)),
)


@dataclass
class Inputs:
    """Leaves that require grad, an upstream gradient for every output, and the keys' mask."""

    tensors: tuple[Tensor, ...]
    upstream: tuple[Tensor, ...]
    key_mask: Tensor | None = None


@dataclass(frozen=True)
class Case:
    """One operation at one shape.

    `op` is one of OPS: window attention plain or shifted, attention of the tokens to the proxies or
    to a padded caption and of the proxies to themselves, LayerNorm with window means, means alone.
    `window` is that of the attention or of the proxies.
    """

    op: str
    model: str
    size: str
    grid: Triple
    window: Triple
    heads: int
    head_dim: int
    batch: int = 1

    def __str__(self) -> str:
        window = "x".join(map(str, self.window))
        return f"{self.op} {self.model} {self.size} w{window} b{self.batch}"

    @cached_property
    def windows(self) -> WindowGrid:
        windows = WindowGrid(self.grid, self.window)
        return windows.shifted() if self.op == "shifted" else windows

    @property
    def channels(self) -> int:
        return self.heads * self.head_dim

    @property
    def queries(self) -> int:
        """Queries of a sample; tokens of the means."""
        return self.windows.num_windows if self.op == "proxy" else self.windows.num_tokens

    @property
    def keys(self) -> int:
        """Keys of a sample; proxies of the means."""
        if self.op in WINDOWED:
            return self.queries
        return TEXT if self.op == "text" else self.windows.num_windows

    @property
    def pairs(self) -> int:
        """Query-key pairs of a sample and head."""
        if self.op in MEANS:
            return 0
        return self.windows.num_pairs if self.op in WINDOWED else self.queries * self.keys

    def bytes(self, task: str) -> int:
        """What must be read and written, every input and output once."""
        # Forward: q and out; x and normed; x.  Backward: q, g and dq; x, dnormed and dx; dx.
        # For the keys: k and v, also dk and dv; the proxies or their gradients.
        rows, key_rows = {
            "forward": {"pool": (2, 1), "mean": (1, 1)},
            "backward": {"pool": (3, 1), "mean": (1, 1)},
        }[task].get(self.op, (2, 2) if task == "forward" else (3, 4))
        row = self.channels * ELEMENT
        return self.batch * row * (rows * self.queries + key_rows * self.keys)

    def flops(self, task: str) -> int:
        """Two per multiply-add, of two products forward and five backward."""
        products = 2 if task == "forward" else 5
        return 2 * products * self.batch * self.channels * self.pairs

    def floor(self, task: str, rates: Rates) -> float:
        """Seconds."""
        return max(self.bytes(task) / rates.copy, self.flops(task) / rates.products)

    @property
    def memory(self) -> int:
        """Bytes that a measurement takes: ours, the check of one head, and the opponents' copies,
        those that each keeps for its backward included."""
        tensor = self.batch * self.queries * self.channels * ELEMENT
        copies = {"window": 32, "shifted": 48}.get(self.op, 20)
        check = 6 * 8 * (self.pairs if self.op in ATTENTION else self.queries * self.channels)
        return copies * tensor + check

    def inputs(self, device: str) -> Inputs:
        """Random; queries, keys and values are views of one projection, as in the layers."""
        torch.manual_seed(0)
        b, n, m, heads = self.batch, self.queries, self.keys, (self.heads, self.head_dim)

        def draw(*shape: int) -> Tensor:
            return torch.randn(shape, device=device, dtype=DTYPE)

        if self.op in MEANS:
            tensors, upstream = (draw(b, n, self.channels),), (draw(b, m, self.channels),)
            if self.op == "pool":
                upstream = (draw(b, n, self.channels), *upstream)
        else:
            if self.op in ("cross", "text"):
                tensors = (draw(b, n, *heads), *draw(b, m, 2, *heads).unbind(2))
            else:
                tensors = draw(b, n, 3, *heads).unbind(2)
            upstream = (draw(b, n, *heads),)
        leaves = tuple(t.detach().requires_grad_() for t in tensors)
        return Inputs(leaves, upstream, self._key_mask(device) if self.op == "text" else None)

    def _key_mask(self, device: str) -> Tensor:
        """Captions of different lengths."""
        lengths = torch.arange(self.batch, device=device)[:, None] * 7 % 60 + 60
        return torch.arange(TEXT, device=device)[None] < lengths

    def call(
        self, backend: str, tensors: tuple[Tensor, ...], key_mask: Tensor | None
    ) -> tuple[Tensor, ...]:
        """The outputs by one of ptattn's backends."""
        if self.op == "mean":
            return (ops.window_mean(*tensors, self.grid, self.window, backend=backend),)
        if self.op == "pool":
            return ops.layer_norm_window_mean(*tensors, self.grid, self.window, backend=backend)
        if self.op in DENSE:
            return (ops.attention(*tensors, key_mask=key_mask, backend=backend),)
        geometry = self.grid, self.window, self.windows.shift
        return (ops.window_attention(*tensors, *geometry, backend=backend),)


def _model(name: str) -> tuple[int, int]:
    """Heads and head dim of a published model."""
    config = PT_DIT[MODELS[name]]
    return config.num_heads, config.dim // config.num_heads


def cases(quick: bool = False) -> list[Case]:
    """The most important first."""
    found = list(_quick() if quick else _all())
    return list(dict.fromkeys(found))


def _quick() -> Iterator[Case]:
    for size, op in itertools.product(("1024 px", "512 px"), OPS):
        yield _case(op, "XL", size, 1)
    yield _case("window", "XL", "2048 px", 1)


def _all() -> Iterator[Case]:
    images = [size for size in GRIDS if size.startswith(("1024", "2048"))]
    for size, op in itertools.product(images, OPS):
        yield _case(op, "XL", size, 1)
    for op, size, grid, window in EXTRA:
        yield Case(op, "XL", size, grid, window, *_model("XL"))
    for batch, model, size, op in itertools.product(BATCHES, MODELS, GRIDS, OPS):
        yield _case(op, model, size, batch)


def _case(op: str, model: str, size: str, batch: int) -> Case:
    grid = GRIDS[size]
    return Case(op, model, size, grid, default_window(grid), *_model(model), batch)
