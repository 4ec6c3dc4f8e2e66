"""The operations that are measured: at the paper's shapes, with inputs and time floor.

Shapes: B batch, N tokens, M keys or proxies, H heads, D head dim, C = H·D channels; all in bf16.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor

from .. import ops
from ..geometry import Triple, WindowGrid, default_window
from ..models.configs import PT_DIT
from .clocks import Rates

DTYPE, ELEMENT = torch.bfloat16, 2
TASKS = ("forward", "backward")
TEXT = 120  # tokens of a caption, as in the paper
DENSE = ("cross", "text", "proxy")
WINDOWED = ("window", "shifted")
ATTENTION = (*WINDOWED, *DENSE)
# Over rows of channels: residual + gate · branch with LayerNorm and modulation, the same ending in
# window means, LayerNorm with window means, means alone.
RESIDUAL = ("norm", "norm-pool")
ROWWISE = (*RESIDUAL, "pool", "mean")
OPS = (*ATTENTION, *ROWWISE)
OUTPUTS = {
    **dict.fromkeys(ATTENTION, ("out",)),
    "norm": ("total", "normed"),
    "norm-pool": ("total", "normed", "means"),
    "pool": ("normed", "means"),
    "mean": ("means",),
}
INPUTS = {
    **dict.fromkeys(ATTENTION, ("q", "k", "v")),
    "norm": ("x", "y", "gate", "shift", "scale"),
    "norm-pool": ("x", "y", "gate"),
    "pool": ("x",),
    "mean": ("x",),
}
# Tensors of (B, N, C), then of (B, M, C), that must be read or written, each once; q and out, k and
# v where nothing else is said, in the backward q, g and dq, k, v, dk and dv.
ROWS = {
    "forward": {"norm": (4, 0), "norm-pool": (4, 1), "pool": (2, 1), "mean": (1, 1)},
    "backward": {"norm": (6, 0), "norm-pool": (6, 1), "pool": (3, 1), "mean": (1, 1)},
}
DENSE_ROWS = {"forward": (2, 2), "backward": (3, 4)}

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
class Operation:
    """One operation at one shape.

    `op` is one of OPS: window attention plain or shifted, attention of the tokens to the proxies or
    to a padded caption and of the proxies to themselves, and those of ROWWISE. `window` is that of
    the attention or of the proxies.
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
    def tokens(self) -> int:
        """Of all samples."""
        return self.batch * self.windows.num_tokens

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
        if self.op in ROWWISE:
            return 0
        return self.windows.num_pairs if self.op in WINDOWED else self.queries * self.keys

    def bytes(self, task: str) -> int:
        """What must be read and written, every input and output once."""
        rows, key_rows = ROWS[task].get(self.op, DENSE_ROWS[task])
        row = self.channels * ELEMENT
        return self.batch * row * (rows * self.queries + key_rows * self.keys)

    def flops(self, task: str) -> int:
        """Two per multiply-add, of two products forward and five backward."""
        products = 2 if task == "forward" else 5
        return 2 * products * self.batch * self.channels * self.pairs

    def floor(self, task: str, rates: Rates) -> float:
        """Seconds."""
        return max(self.bytes(task) / rates.copy, self.flops(task) / rates.products)

    def facts(self, task: str) -> dict[str, Any]:
        """What a result file says of it."""
        known = {k: v for k, v in vars(self).items() if k not in ("size", "windows")}
        more = dict(queries=self.queries, keys=self.keys)
        more |= dict(bytes=self.bytes(task), flops=self.flops(task))
        return known | dict(shift=list(self.windows.shift)) | more

    @property
    def memory(self) -> int:
        """Bytes that a measurement takes: ours, the check of one head, and the baselines' copies,
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

        if self.op in ROWWISE:
            rows: dict[str, tuple[int, ...]] = {"x": (n,), "y": (n,), "means": (m,)}
            rows |= {"total": (n,), "normed": (n,)}  # the others have one for each sample
            tensors = [draw(b, *rows.get(name, ()), self.channels) for name in INPUTS[self.op]]
            upstream = [draw(b, *rows[name], self.channels) for name in OUTPUTS[self.op]]
        else:
            if self.op in ("cross", "text"):
                tensors = [draw(b, n, *heads), *draw(b, m, 2, *heads).unbind(2)]
            else:
                tensors = list(draw(b, n, 3, *heads).unbind(2))
            upstream = [draw(b, n, *heads)]
        leaves = tuple(t.detach().requires_grad_() for t in tensors)
        mask = self._key_mask(device) if self.op == "text" else None
        return Inputs(leaves, tuple(upstream), mask)

    def _key_mask(self, device: str) -> Tensor:
        """Captions of different lengths."""
        lengths = torch.arange(self.batch, device=device)[:, None] * 7 % 60 + 60
        return torch.arange(TEXT, device=device)[None] < lengths

    def call(
        self, backend: str, tensors: tuple[Tensor, ...], key_mask: Tensor | None
    ) -> tuple[Tensor, ...]:
        """The outputs by one of ptattn's backends."""
        geometry = self.grid, self.window
        known: dict[str, tuple[Callable[..., Any], tuple[Any, ...]]] = {
            "mean": (ops.window_mean, geometry),
            "pool": (ops.layer_norm_window_mean, geometry),
            "norm": (ops.residual_layer_norm, ()),
            "norm-pool": (ops.residual_layer_norm_window_mean, geometry),
        }
        known |= dict.fromkeys(DENSE, (partial(ops.attention, key_mask=key_mask), ()))
        known |= dict.fromkeys(WINDOWED, (ops.window_attention, (*geometry, self.windows.shift)))
        function, more = known[self.op]
        out = function(*tensors, *more, backend=backend)
        return out if isinstance(out, tuple) else (out,)


def _model(name: str) -> tuple[int, int]:
    """Heads and head dim of a published model."""
    config = PT_DIT[MODELS[name]]
    return config.num_heads, config.dim // config.num_heads


def operations() -> list[Operation]:
    """The most important first."""
    return list(dict.fromkeys(_all()))


def _all() -> Iterator[Operation]:
    images = [size for size in GRIDS if size.startswith(("1024", "2048"))]
    for size, op in itertools.product(images, OPS):
        yield _operation(op, "XL", size, 1)
    for op, size, grid, window in EXTRA:
        yield Operation(op, "XL", size, grid, window, *_model("XL"))
    for batch, model, size, op in itertools.product(BATCHES, MODELS, GRIDS, OPS):
        yield _operation(op, model, size, batch)


def _operation(op: str, model: str, size: str, batch: int) -> Operation:
    grid = GRIDS[size]
    return Operation(op, model, size, grid, default_window(grid), *_model(model), batch)
