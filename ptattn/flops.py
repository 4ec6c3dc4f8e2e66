"""Multiply-adds of the models, part by part, computed from the geometry.

Papers on diffusion transformers call a multiply-add a FLOP; for hardware it is two.

Two conventions. "full" is every matrix product that the model does: linear layers, the patch
convolution, attention products. "paper" is what the numbers printed in arXiv 2409.04005 contain.
The paper does not say what that is; this was found by fitting, and gives all but one of the numbers
for PT-DiT and PixArt-α to 0.06 % (docs/PAPER_REPRODUCTION.md):

- PT-DiT and PixArt-α: no attention products, but two operations for every element that a layer norm
  over the tokens normalises;
- PT-DiT also: one of the two window attentions, and D² per token in L/2 - 1 of the L blocks in
  place of 2·D² in every block for Z1 and Z2;
- DiT: linear layers and attention products of the blocks, no conditioning.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import nn

from .geometry import Triple, WindowGrid
from .models import DiT, ModelConfig, PixArt, PTDiT, find_model
from .models.condition import TimestepEmbed
from .models.configs import check_positive, is_positive

VAE_FACTOR = 8  # image pixels per latent pixel
LARGEST = 8192  # pixels a side that `crossover` looks up to
CONVENTIONS = ("full", "paper")

Model = PTDiT | DiT | PixArt


@dataclass(frozen=True)
class Part:
    """Multiply-adds of a part of a model: with weights (linear), and of attention's products."""

    linear: int = 0
    products: int = 0

    @property
    def total(self) -> int:
        return self.linear + self.products

    def __mul__(self, times: int) -> Part:
        return Part(self.linear * times, self.products * times)


@dataclass(frozen=True)
class Count:
    """Multiply-adds of one sample's forward pass, by part, in the order in which they run."""

    parts: Mapping[str, Part]

    @property
    def linear(self) -> int:
        return sum(part.linear for part in self.parts.values())

    @property
    def products(self) -> int:
        return sum(part.products for part in self.parts.values())

    @property
    def total(self) -> int:
        return self.linear + self.products


def count(
    model: str | nn.Module,
    resolution: int | Sequence[int],
    frames: int = 1,
    *,
    text_tokens: int = 120,
    convention: str = "full",
) -> Count:
    """Count the multiply-adds of one forward pass of one sample.

    Args:
        model: a name of `models.list_models()`, or a PTDiT, DiT or PixArt, on any device.
        resolution: pixels, a side or (height, width), multiples of 8 · patch_size.
        frames: latent frames.
        text_tokens: length of the caption; text models only.
        convention: "full" or "paper", see the module.

    Raises:
        ValueError: naming what it got and what was expected.

    Examples:
        >>> round(count("pt-dit-xl", 1024).total / 1e9)  # GFLOPs, as papers call them
        3453
    """
    family, config = _find(model)
    if convention not in CONVENTIONS:
        raise ValueError(f"convention must be one of {', '.join(CONVENTIONS)}; got {convention!r}")
    check_positive("text_tokens", text_tokens)
    grid = token_grid(config, resolution, frames)
    tokens = math.prod(grid)
    if family is PTDiT:
        block = _proxy_tokenized(config, grid)
    else:
        block = {"self-attention": _self_attention(config.dim, tokens, tokens**2)}
    parts = _whole_model(
        config, tokens, text_tokens, block, modulations=4 if family is PTDiT else 2
    )
    return Count(parts if convention == "full" else _as_printed(family, config, tokens, parts))


def token_grid(config: ModelConfig, resolution: int | Sequence[int], frames: int = 1) -> Triple:
    """The tokens (f, h, w) of an image or video: one per 8 · patch_size pixels and latent frame."""
    check_positive("frames", frames)
    size = resolution if isinstance(resolution, Sequence) else (resolution, resolution)
    step = VAE_FACTOR * config.patch_size
    if len(size) != 2 or not all(is_positive(pixels) and pixels % step == 0 for pixels in size):
        raise ValueError(
            f"resolution must be a side or (height, width), positive multiples of {step} pixels; "
            f"got {resolution!r}"
        )
    height, width = size
    return (frames, height // step, width // step)


def attention_ratio(grid: Sequence[int], window: Sequence[int]) -> float:
    """Attention products of proxy-tokenized attention over those of full self-attention.

    (M² + N·M + 2 · pairs within windows) / N² for N tokens and M proxies: the paper's
    1/r² + 1/r + 2r/N where windows of r tokens divide the grid (arXiv 2409.04005, section 3.3).
    As there, shifted windows count like unshifted ones; those at the rim are smaller in truth.

    Args:
        grid: (f, h, w) or (h, w) tokens.
        window: (pf, ph, pw) or (ph, pw) tokens.

    Examples:
        >>> attention_ratio((16, 16), (2, 2))
        0.34375
    """
    windows = WindowGrid(grid, window)
    n, m = windows.num_tokens, windows.num_windows
    return (m * m + n * m + 2 * windows.num_pairs) / n**2


def crossover(
    model: str | nn.Module,
    baseline: str | nn.Module,
    *,
    text_tokens: int = 120,
    convention: str = "full",
) -> int | None:
    """The number of image tokens from which on `model` takes fewer multiply-adds than `baseline`.

    Square images up to `LARGEST` pixels a side, with the windows that the model chooses for each.

    Returns:
        The tokens of the smallest image from which on all are cheaper; None if the largest is not.

    Raises:
        ValueError: as `count`.

    Examples:
        >>> crossover("pt-dit-xl", "pixart-alpha")  # 70 x 70 tokens, 1120 x 1120 pixels
        4900
    """

    def total(which: str | nn.Module, resolution: int) -> int:
        return count(which, resolution, text_tokens=text_tokens, convention=convention).total

    step = VAE_FACTOR * _find(model)[1].patch_size
    most = LARGEST // step
    # Downwards: a wider window at a larger size may make the dearer model cheaper for a while.
    for side in range(most, 0, -1):
        if total(model, side * step) >= total(baseline, side * step):
            return None if side == most else (side + 1) ** 2
    return 1


def _self_attention(dim: int, tokens: int, pairs: int) -> Part:
    """Query, key, value and output layers, and the products of that many query-key pairs."""
    return Part(4 * dim**2 * tokens, 2 * dim * pairs)


def _cross_attention(dim: int, queries: int, keys: int) -> Part:
    return Part(2 * dim**2 * (queries + keys), 2 * dim * queries * keys)


def _proxy_tokenized(config: ModelConfig, grid: Triple) -> dict[str, Part]:
    """What one PT-DiT block has in place of self-attention."""
    proxies, windows = config.window_grids(grid)
    shifted = windows.shifted() if config.shift else windows
    d, n, m = config.dim, windows.num_tokens, proxies.num_windows
    return {
        "proxy self-attention": _self_attention(d, m, m**2),
        "proxy-to-token attention": _cross_attention(d, n, m),
        "window attention": _self_attention(d, n, windows.num_pairs),
        "shifted-window attention": _self_attention(d, n, shifted.num_pairs),
        "Z layers": Part(2 * d**2 * n),
    }


def _whole_model(
    config: ModelConfig, tokens: int, text_tokens: int, block: dict[str, Part], modulations: int
) -> dict[str, Part]:
    """The whole model, given the attention parts and the number of adaLN modulations of a block."""
    d, patch, text = config.dim, config.patch_size**2, config.caption_channels
    embeddings = patch * config.in_channels * d * tokens + TimestepEmbed.FEATURES * d + d**2
    output = patch * config.out_channels * d * tokens
    if text is not None:
        block = {**block, "text attention": _cross_attention(d, tokens, text_tokens)}
        conditioning = {
            "caption": Part((text * d + d**2) * text_tokens),
            "modulation": Part(6 * d**2),  # adaLN-single: one layer for all blocks
        }
    else:
        conditioning = {"modulation": Part(3 * modulations * d**2 * config.depth)}
        output += 2 * d**2  # its own modulation
    block = {**block, "MLP": Part(8 * d**2 * tokens)}
    return {
        "embeddings": Part(embeddings),
        **conditioning,
        **{name: part * config.depth for name, part in block.items()},
        "output": Part(output),
    }


def _as_printed(
    family: type[Model], config: ModelConfig, tokens: int, full: dict[str, Part]
) -> dict[str, Part]:
    """The parts as far as the paper's numbers contain them; see the module."""
    if family is DiT:
        return {name: full[name] for name in ("self-attention", "MLP")}
    d, depth = config.dim, config.depth
    parts = {name: Part(part.linear) for name, part in full.items()}
    norms = 2 * depth + 1
    if family is PTDiT:
        del parts["shifted-window attention"]
        parts["Z layers"] = Part(max(depth // 2 - 1, 0) * d**2 * tokens)
        norms += depth
    return {**parts, "layer norms": Part(2 * norms * d * tokens)}


def _find(model: str | nn.Module) -> tuple[type[Model], ModelConfig]:
    if isinstance(model, PTDiT | DiT | PixArt):
        return type(model), model.model_config
    if isinstance(model, str):
        return find_model(model)
    raise TypeError(f"model must be a name, or a PTDiT, DiT or PixArt; got {type(model).__name__}")
