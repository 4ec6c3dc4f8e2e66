"""What is measured: models at sizes, and the blocks of these models."""

from __future__ import annotations

import argparse
import dataclasses
import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from .. import flops
from ..geometry import Triple
from ..models import (
    DiT,
    ModelConfig,
    PixArt,
    PTDiT,
    create_model,
    find_model,
    get_config,
    list_models,
)

TEXT_TOKENS = 120
MODELS = ("pt-dit-xl", "dit-xl", "pixart-alpha", "pt-dit-l")
SIZES = (256, 512, 1024, 2048)  # image pixels a side
VIDEOS = ((48, 256), (48, 512))  # latent frames, pixels a side
# The paper's figures: B, L, XL and H beside the models of their width or number of parameters.
FIGURES = ("pt-dit-b", "dit-b", "pt-dit-l", "pt-dit-xl", "pixart-alpha", "dit-xl", "pt-dit-h")

# A multiply-add of attention products takes about as long as three of a linear layer.
PRODUCT_COST = 3
# Tensors of (N, D) alive at once in a block's forward, most of them the MLP's hidden layer, twice.
LIVE_TENSORS = 20

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}

_FAMILIES = {PTDiT: "PT-DiT", DiT: "DiT", PixArt: "PixArt"}
_NAMES = {
    "pt-dit-s-class": "PT-DiT/S-Class",
    "pt-dit-b": "PT-DiT/B",
    "pt-dit-l": "PT-DiT/L",
    "pt-dit-xl": "PT-DiT/XL",
    "pt-dit-h": "PT-DiT/H",
    "qihoo-t2i": "Qihoo-T2I",
    "dit-s": "DiT/S",
    "dit-b": "DiT/B",
    "dit-l": "DiT/L",
    "dit-xl": "DiT/XL",
    "pixart-alpha": "PixArt-α",
}


@dataclass(frozen=True)
class Settings:
    """How blocks and models are measured."""

    device: str = "cpu"  # or "cuda"
    dtype: str = "bf16"
    backend: str = "auto"  # of PT-DiT's attention
    threads: int = 1


@dataclass(frozen=True)
class Size:
    """A square image, or a video of `frames` latent frames, `side` pixels wide and high."""

    side: int
    frames: int = 1

    def __str__(self) -> str:
        return f"{self.side} px" if self.frames == 1 else f"{self.frames}×{self.side} px"


FIGURE_SIZES = tuple(map(Size, (256, 512, 1024, 2048))) + tuple(
    Size(side, 48) for side in (256, 512, 1024)
)


@dataclass(frozen=True)
class Block:
    """One transformer block on one token grid: what one measurement is of.

    Blocks that do the same work are equal, whichever models they come from: `config` has depth 1
    and the window that the model chooses for the grid.
    """

    family: str  # "PT-DiT", "DiT" or "PixArt"
    config: ModelConfig
    grid: Triple

    @property
    def tokens(self) -> int:
        return math.prod(self.grid)

    def corner(self, most: int) -> Block:
        """The same block, its windows too, on a grid of at most `most` tokens, if such a one has
        two windows on every axis that has more."""
        grid, window = list(self.grid), [1, 1, 1]
        if self.family == "PT-DiT":
            window = list(self.config.window_grids(self.grid)[1].window)
        while math.prod(grid) > most:
            windows = [n / p for n, p in zip(grid, window, strict=True)]
            axis = windows.index(max(windows))
            if windows[axis] <= 2:
                break
            grid[axis] = -(-grid[axis] // 2)
        return dataclasses.replace(self, grid=(grid[0], grid[1], grid[2]))

    def memory(self, dtype: torch.dtype, backend: str) -> int:
        """About how many bytes measuring it takes: weights (at most 24·D²) and activations."""
        dim, tokens = self.config.dim, self.tokens
        values = 24 * dim**2 + LIVE_TENSORS * tokens * dim
        if backend != "reference":
            return values * dtype.itemsize
        keys = tokens
        if self.family == "PT-DiT":
            proxies, _ = self.config.window_grids(self.grid)
            keys = max(proxies.num_windows, TEXT_TOKENS)
        # The reference computes in float32 and holds the scores of all heads three times over.
        return 4 * (values + 3 * self.config.num_heads * tokens * keys)


@dataclass(frozen=True)
class Entry:
    """One line of the comparison: a model at a size."""

    model: str
    size: Size
    block: Block
    parameters: int
    full: flops.Count
    paper: flops.Count

    @property
    def name(self) -> str:
        return _NAMES.get(self.model, self.model)

    @property
    def depth(self) -> int:
        return get_config(self.model).depth

    @property
    def is_proxy_tokenized(self) -> bool:
        return self.block.family == "PT-DiT"

    @property
    def cost(self) -> float:
        """What one block's time is predicted from: multiply-adds, those of attention weighted."""
        return (self.full.linear + PRODUCT_COST * self.full.products) / self.depth


def plan(models: Sequence[str], sizes: Sequence[Size]) -> list[Entry]:
    """Every model at every size, as the table lists them: images, then videos, smallest first."""
    parameters = {model: _parameters(model) for model in models}
    ordered = sorted(set(sizes), key=lambda size: (size.frames, size.side))
    return [_entry(model, size, parameters[model]) for size in ordered for model in parameters]


def _entry(model: str, size: Size, parameters: int) -> Entry:
    full, paper = (
        flops.count(model, size.side, size.frames, text_tokens=TEXT_TOKENS, convention=convention)
        for convention in ("full", "paper")
    )
    return Entry(model, size, _block(model, size), parameters, full, paper)


def _block(model: str, size: Size) -> Block:
    family, config = find_model(model)
    config = dataclasses.replace(config, depth=1)
    grid = flops.token_grid(config, size.side, size.frames)
    if family is PTDiT:
        proxies, windows = config.window_grids(grid)
        config = dataclasses.replace(config, window=windows.window, proxy_window=proxies.window)
    return Block(_FAMILIES[family], config, grid)


@functools.cache
def _parameters(model: str) -> int:
    with torch.device("meta"):
        return sum(p.numel() for p in create_model(model).parameters())


def image(side: str, text: str | None = None) -> Size:
    """Of an argument such as "512", or a side of one such as "512x256"."""
    return _size(text or side, side, "1")


def video(text: str) -> Size:
    """Of an argument such as "48x512", latent frames and pixels a side."""
    frames, _, side = text.partition("x")
    return _size(text, side, frames)


def image_or_video(text: str) -> Size:
    return video(text) if "x" in text else image(text)


def _size(text: str, side: str, frames: str) -> Size:
    # Pixels a side per token, the same for every published model.
    (step,) = {flops.VAE_FACTOR * get_config(name).patch_size for name in list_models()}
    if not (side.isdecimal() and frames.isdecimal() and int(frames) and int(side)):
        raise argparse.ArgumentTypeError(f"expected positive integers; got {text!r}")
    if int(side) % step:
        raise argparse.ArgumentTypeError(f"expected a multiple of {step} pixels; got {text!r}")
    return Size(int(side), int(frames))
