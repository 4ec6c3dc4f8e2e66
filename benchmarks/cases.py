"""The one table of what is measured: operations and blocks, at the paper's shapes.

Every case can check itself, and raises where an output is wrong: a wrong result has no speed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import baselines
from ptattn import ops
from ptattn.geometry import Triple, WindowGrid, default_window
from ptattn.layers import Residual
from ptattn.models.blocks import Condition
from ptattn.models.configs import ModelConfig
from ptattn.models.pixart import PixArtBlock
from ptattn.models.pt_dit import PTDiTBlock

DIM, HEADS, TEXT = 1152, 16, 120  # PT-DiT/XL; text tokens as in the paper
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
# Relative error that two codes for one block may differ by; rounding alone makes about a third.
BLOCK_LIMITS = {torch.bfloat16: 2e-2, torch.float32: 2e-6}
Run = Callable[[], Tensor]


@dataclass(frozen=True)
class OpCase:
    """One operation, batch 1, on views of packed projections as the layers pass them."""

    op: str
    grid: Triple
    window: Triple
    shifted: bool = False

    def __str__(self) -> str:
        grid, window = ("x".join(map(str, size)) for size in (self.grid, self.window))
        return f"{self.op}{'-shifted' if self.shifted else ''} {grid} w{window}"

    @property
    def windows(self) -> WindowGrid:
        windows = WindowGrid(self.grid, self.window)
        return windows.shifted() if self.shifted else windows

    def inputs(self, dtype: torch.dtype, heads: int = HEADS) -> tuple[Tensor, ...]:
        torch.manual_seed(0)
        n, m, d = self.windows.num_tokens, self.windows.num_windows, DIM // HEADS
        if self.op == "window_mean":
            return (torch.randn(1, n, heads * d).to(dtype),)
        if self.op == "cross_attention":
            kv = torch.randn(1, m, 2, heads, d).to(dtype)
            return (torch.randn(1, n, heads, d).to(dtype), *kv.unbind(2))
        return torch.randn(1, n, 3, heads, d).to(dtype).unbind(2)

    def bind(self, backend: str, inputs: tuple[Tensor, ...]) -> Run:
        """The operation on `backend`: one of ptattn's, or "roll-mask" for window attention."""
        windows = self.windows
        if self.op == "window_mean":
            return lambda: ops.window_mean(*inputs, self.grid, self.window, backend=backend)
        if self.op == "cross_attention":
            return lambda: ops.attention(*inputs, backend=backend)
        if backend == "roll-mask":
            mask = baselines.region_mask(windows, inputs[0].dtype) if self.shifted else None
            return lambda: baselines.roll_mask_attention(*inputs, windows, mask)
        sizes = (self.grid, self.window, windows.shift)
        return lambda: ops.window_attention(*inputs, *sizes, backend=backend)

    def check(self, backend: str, dtype: torch.dtype) -> None:
        """Against the reference in float64 on two windows per axis.

        The limit is twice the error that the reference makes in `dtype`: summing in another order
        is no fault.
        """
        grid = tuple(min(n, 2 * p) for n, p in zip(self.grid, self.window, strict=True))
        small = OpCase(self.op, grid, self.window, self.shifted)
        inputs = small.inputs(dtype, heads=2)
        gold = small.bind("reference", tuple(t.double() for t in inputs))()
        eager = small.bind("reference", inputs)().double()
        out = small.bind(backend, inputs)().double()
        error, own = ((t - gold).abs().max().item() for t in (out, eager))
        limit = 2 * own + 4 * torch.finfo(dtype).eps * gold.abs().max().item()
        if not error <= limit:
            raise AssertionError(f"{small} on {backend}: error {error:.1e}, limit {limit:.1e}")


IMAGE_1K, IMAGE_2K, VIDEO = (1, 64, 64), (1, 128, 128), (8, 32, 32)

OPS = [
    OpCase("window_mean", IMAGE_1K, (1, 8, 8)),
    OpCase("window_mean", IMAGE_2K, (1, 16, 16)),
    OpCase("window_mean", VIDEO, (4, 8, 8)),
    OpCase("cross_attention", IMAGE_1K, (1, 8, 8)),
    OpCase("cross_attention", IMAGE_2K, (1, 16, 16)),
    OpCase("cross_attention", VIDEO, (4, 8, 8)),
    *(
        OpCase("window_attention", grid, window, shifted)
        for grid, window in [(IMAGE_1K, (1, 8, 8)), (IMAGE_2K, (1, 16, 16)), (VIDEO, (4, 8, 8))]
        for shifted in (False, True)
    ),
]

SIDES = {1024: 32, 4096: 64, 16384: 128}  # tokens: side of a square image's grid

# What each block is held against before it is timed; None is the time floor, with nothing to check.
BLOCKS = {
    "21 GEMMs": None,
    "ptattn PT-DiT": "roll-and-mask PT-DiT",
    "roll-and-mask PT-DiT": "ptattn PT-DiT",
    "ptattn PixArt": "diffusers PixArt",
    "diffusers PixArt": "ptattn PixArt",
}
COMPILED = " compiled"


def _alone(block: nn.Module) -> Callable[..., Tensor]:
    """A block as a function of tokens, which leaves no addition to the next."""
    return lambda x, *rest: block(Residual(x), *rest).total


class BlockCase:
    """The blocks of one square image, batch 1, at PT-DiT/XL's width, on the same inputs."""

    def __init__(self, tokens: int, dtype: torch.dtype, dim: int = DIM, heads: int = HEADS) -> None:
        if tokens not in SIDES:
            raise ValueError(f"tokens must be one of {', '.join(map(str, SIDES))}; got {tokens}")
        self.tokens, self.dtype, self.dim, self.heads = tokens, dtype, dim, heads
        grid = (1, SIDES[tokens], SIDES[tokens])
        self.windows = WindowGrid(grid, default_window(grid))
        torch.manual_seed(0)
        self.config = ModelConfig(1, dim, heads)
        self.pt_dit = self._randomized(PTDiTBlock(self.config))
        self.pixart = self._randomized(PixArtBlock(self.config))
        self.x = torch.randn(1, tokens, dim).to(dtype)
        text_mask = torch.arange(TEXT)[None] < TEXT - 20  # a padded caption, as in use
        embedding, vector, text = (
            torch.randn(shape).to(dtype) for shape in ((1, dim), (1, 6 * dim), (1, TEXT, dim))
        )
        self.condition = Condition(embedding, vector, text, text_mask)
        self._runs: dict[str, Run] = {}

    def _randomized(self, block: nn.Module) -> nn.Module:
        for p in block.parameters():
            # Layers that start at zero would hide every error before them.
            nn.init.normal_(p, std=p.shape[-1] ** -0.5)
        return block.to(self.dtype).eval()

    def run(self, name: str) -> Run:
        """The block of this name; with " compiled" at its end, through torch.compile."""
        if name not in self._runs:
            self._runs[name] = self._bind(name)
        return self._runs[name]

    def _bind(self, name: str) -> Run:
        if name.endswith(COMPILED):
            module, *inputs = self._call(name.removesuffix(COMPILED))
            module = torch.compile(module, fullgraph=True)
        elif name == "21 GEMMs":
            return baselines.gemms_21(self.tokens, self.dim, self.dtype)
        else:
            module, *inputs = self._call(name)
        return lambda: module(*inputs)

    def _call(self, name: str) -> tuple[Any, ...]:
        if name == "ptattn PT-DiT":
            return _alone(self.pt_dit), self.x, self.windows, self.windows, self.condition
        if name == "ptattn PixArt":
            return _alone(self.pixart), self.x, self.condition
        if name == "roll-and-mask PT-DiT":
            block = baselines.RollMaskBlock(self.dim, self.heads).to(self.dtype).eval()
            shifted = self.windows.shifted()
            rows = baselines.partition(self.x, shifted)
            mask = baselines.region_mask(shifted, self.dtype)
            return block.copy_weights(self.pt_dit), rows, shifted, *self.condition[1:], mask
        if name == "diffusers PixArt":
            block = baselines.DiffusersPixArtBlock(self.dim, self.heads).to(self.dtype).eval()
            return block.copy_weights(self.pixart), self.x, self.condition
        raise ValueError(f"name must be one of {', '.join(BLOCKS)}; got {name!r}")

    def check(self, name: str) -> None:
        """Against other code for the same block, on the same weights and inputs."""
        other = BLOCKS[name.removesuffix(COMPILED)]
        if other is None:
            return
        ours, theirs = (self._raster(n, self.run(n)()) for n in (name, other))
        error = ((ours - theirs).norm() / theirs.norm()).item()
        limit = BLOCK_LIMITS[self.dtype]
        if not error <= limit:
            raise AssertionError(f"{name} against {other}: error {error:.1e}, limit {limit:.1e}")

    def _raster(self, name: str, out: Tensor) -> Tensor:
        windowed = name.startswith("roll-and-mask")
        return (baselines.reverse(out, self.windows) if windowed else out).float()
