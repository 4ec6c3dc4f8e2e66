"""What is measured: models at sizes."""

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
class Entry:
    """One line of a table: a model at a size, and the block and grid that it then has.

    `config` is of one block, with the windows that the model chooses for the grid.
    """

    model: str
    size: Size
    family: str  # "PT-DiT", "DiT" or "PixArt"
    config: ModelConfig
    grid: Triple
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
        return self.family == "PT-DiT"

    @property
    def tokens(self) -> int:
        return math.prod(self.grid)

    @property
    def cost(self) -> float:
        """What one block's time is predicted from: multiply-adds, those of attention weighted."""
        return (self.full.linear + PRODUCT_COST * self.full.products) / self.depth

    def corner(self, most: int) -> Entry:
        """The same block, its windows too, on a grid of at most `most` tokens, if such a one has
        two windows on every axis that has more."""
        grid, window = list(self.grid), [1, 1, 1]
        if self.is_proxy_tokenized:
            window = list(self.config.window_grids(self.grid)[1].window)
        while math.prod(grid) > most:
            windows = [n / p for n, p in zip(grid, window, strict=True)]
            axis = windows.index(max(windows))
            if windows[axis] <= 2:
                break
            grid[axis] = -(-grid[axis] // 2)
        return dataclasses.replace(self, grid=(grid[0], grid[1], grid[2]))

    def activations(self, dtype: torch.dtype, backend: str, tensors: int = LIVE_TENSORS) -> int:
        """About how many bytes live at once that hold so many tensors of the tokens."""
        values = tensors * self.tokens * self.config.dim
        if backend != "reference":
            return values * dtype.itemsize
        keys = self.tokens
        if self.is_proxy_tokenized:
            proxies, _ = self.config.window_grids(self.grid)
            keys = max(proxies.num_windows, TEXT_TOKENS)
        # The reference computes in float32 and holds the scores of all heads three times over.
        return 4 * (values + 3 * self.config.num_heads * self.tokens * keys)


def plan(models: Sequence[str], sizes: Sequence[Size]) -> list[Entry]:
    """Every model at every size, as the table lists them: images, then videos, smallest first."""
    parameters = {model: _parameters(model) for model in models}
    ordered = sorted(set(sizes), key=lambda size: (size.frames, size.side))
    return [_entry(model, size, parameters[model]) for size in ordered for model in parameters]


def _entry(model: str, size: Size, parameters: int) -> Entry:
    family, config = find_model(model)
    config = dataclasses.replace(config, depth=1)
    grid = flops.token_grid(config, size.side, size.frames)
    if family is PTDiT:
        proxies, windows = config.window_grids(grid)
        config = dataclasses.replace(config, window=windows.window, proxy_window=proxies.window)
    full, paper = (
        flops.count(model, size.side, size.frames, text_tokens=TEXT_TOKENS, convention=convention)
        for convention in flops.CONVENTIONS
    )
    return Entry(model, size, _FAMILIES[family], config, grid, parameters, full, paper)


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
