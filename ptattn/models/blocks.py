"""What PT-DiT, DiT and PixArt-α share: patches, positions, conditioning, modulation, output."""

from __future__ import annotations

import math
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

from ..geometry import Triple
from ..layers import Modulation, Residual, ZeroLinear
from .configs import ModelConfig


class PatchEmbed(nn.Module):
    """Latents to tokens: a convolution per frame plus the position embedding."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.channels, self.patch_size = config.in_channels, config.patch_size
        self.position_scale = max(config.sample_size // 64, 1)
        self.proj = nn.Conv2d(config.in_channels, config.dim, config.patch_size, config.patch_size)

    def forward(self, latents: Tensor) -> tuple[Tensor, Triple]:
        """(B, C, F, H, W) or (B, C, H, W) -> (B, N, D) tokens and their grid (f, h, w)."""
        p = self.patch_size
        if latents.ndim not in (4, 5) or latents.shape[1] != self.channels:
            raise ValueError(
                f"latents must have shape (B, {self.channels}, F, H, W) or "
                f"(B, {self.channels}, H, W); got {tuple(latents.shape)}"
            )
        if latents.shape[-2] % p or latents.shape[-1] % p:
            raise ValueError(f"latents need H and W divisible by {p}; got {tuple(latents.shape)}")
        if latents.ndim == 4:
            latents = latents.unsqueeze(2)
        b, _, f, h, w = latents.shape
        grid = (f, h // p, w // p)
        x = self.proj(latents.transpose(1, 2).flatten(0, 1))  # (B·F, D, h, w)
        x = x.unflatten(0, (b, f)).flatten(3).transpose(2, 3).flatten(1, 2)
        x = x.to(self.proj.weight.dtype)  # under autocast the residual stream stays wide
        return x + position_embedding(grid, x, self.position_scale), grid


def position_embedding(grid: Triple, like: Tensor, scale: float = 1) -> Tensor:
    """Fixed 3-D sin-cos embedding (N, D) of a token grid, with the dtype and device of `like`.

    Channels [0, D/4) encode the frame, [D/4, 5D/8) the column, [5D/8, D) the row, each as [sin,
    cos] of position · 10000^(-i / (n/2)); rows and columns are divided by `scale`.
    """
    f, h, w = grid
    dim = like.shape[-1]
    frame, side = dim // 4, 3 * dim // 8

    def axis(length: int, channels: int, scale: float) -> Tensor:
        # float64 keeps the angles of far positions exact; MPS has none.
        exact = torch.float32 if like.device.type == "mps" else torch.float64
        steps = torch.arange(channels // 2, device=like.device, dtype=exact) / (channels // 2)
        position = torch.arange(length, device=like.device, dtype=exact) / scale
        angle = position[:, None] * 10000.0**-steps
        return torch.cat([angle.sin(), angle.cos()], dim=1).to(like.dtype)

    parts = (
        axis(f, frame, 1)[:, None, None].expand(f, h, w, frame),
        axis(w, side, scale)[None, None].expand(f, h, w, side),
        axis(h, side, scale)[None, :, None].expand(f, h, w, side),
    )
    return torch.cat(parts, dim=-1).flatten(0, 2)


class TimestepEmbed(nn.Module):
    """Sinusoidal timestep features (256) through a two-layer MLP."""

    FEATURES = 256

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(self.FEATURES, dim), nn.SiLU(), nn.Linear(dim, dim))

    def forward(self, timestep: Tensor) -> Tensor:
        """(B,) in any dtype -> (B, D)."""
        half = self.FEATURES // 2
        steps = torch.arange(half, device=timestep.device, dtype=torch.float32)
        angle = timestep.float()[:, None] * torch.exp(-math.log(10000) / half * steps)
        features = torch.cat([angle.cos(), angle.sin()], dim=1)
        first: Any = self.mlp[0]
        return self.mlp(features.to(first.bias.dtype))  # its weight may be quantized


class Condition(NamedTuple):
    """What a model's blocks are conditioned on."""

    embedding: Tensor  # (B, D), of the timestep or of timestep and class
    modulation: Tensor  # what a block's modulation takes: (B, 6D) for text, (B, D) for classes
    text: Tensor | None = None  # (B, T, D)
    text_mask: Tensor | None = None  # (B, T) bool


class TextCondition(nn.Module):
    """Timestep and caption, as in PixArt-α's adaLN-single (arXiv 2310.00426, section 2.3)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        d = config.dim
        self.caption_channels = config.caption_channels or 0
        self.timestep = TimestepEmbed(d)
        self.modulation = nn.Sequential(nn.SiLU(), nn.Linear(d, 6 * d))
        self.caption = nn.Sequential(
            nn.Linear(self.caption_channels, d), nn.GELU(approximate="tanh"), nn.Linear(d, d)
        )

    def forward(
        self,
        timestep: Tensor,
        caption: Tensor | None = None,
        caption_mask: Tensor | None = None,
        labels: Tensor | None = None,
    ) -> Condition:
        """caption (B, T, caption_channels), caption_mask (B, T) bool or None for all real."""
        if caption is None or labels is not None:
            raise ValueError("this model is conditioned on text: give caption, and no labels")
        _check_timestep(timestep, caption.shape[0])
        if caption.ndim != 3 or caption.shape[-1] != self.caption_channels:
            raise ValueError(
                f"caption must have shape (B, T, {self.caption_channels}); "
                f"got {tuple(caption.shape)}"
            )
        embedding = self.timestep(timestep)
        return Condition(embedding, self.modulation(embedding), self.caption(caption), caption_mask)


class ClassCondition(nn.Module):
    """Timestep and class label, as in DiT (arXiv 2212.09748, section 3.2)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.timestep = TimestepEmbed(config.dim)
        self.label = nn.Embedding((config.num_classes or 0) + 1, config.dim)

    def forward(
        self,
        timestep: Tensor,
        caption: Tensor | None = None,
        caption_mask: Tensor | None = None,
        labels: Tensor | None = None,
    ) -> Condition:
        """labels (B,) int64 in [0, num_classes]; num_classes itself is the null class."""
        if labels is None or caption is not None or caption_mask is not None:
            raise ValueError("this model is conditioned on classes: give labels, and no caption")
        if labels.ndim != 1 or labels.dtype != torch.int64:
            raise ValueError(f"labels must be int64 (B,); got {labels.dtype} {tuple(labels.shape)}")
        _check_timestep(timestep, labels.shape[0])
        embedding = self.timestep(timestep) + self.label(labels)
        return Condition(embedding, embedding)


def _check_timestep(timestep: Tensor, batch: int) -> None:
    if timestep.shape != (batch,):
        raise ValueError(f"timestep must have shape ({batch},); got {tuple(timestep.shape)}")


class AdaLNSingle(nn.Module):
    """Modulations from the model's one (B, 6D) vector plus a learned table of this block's own.

    The vector holds two (shift, scale, gate); `sources` says which of the two each modulation
    starts from.
    """

    def __init__(self, dim: int, sources: tuple[int, ...] = (0, 1)) -> None:
        super().__init__()
        self.sources = sources
        self.table = nn.Parameter(torch.randn(len(sources), 3, dim) / dim**0.5)

    def forward(self, vector: Tensor) -> list[Modulation]:
        groups = vector.unflatten(-1, (2, *self.table.shape[1:]))  # (B, 2, 3, D)
        return [
            Modulation(*(groups[:, source] + table).unbind(1))
            for source, table in zip(self.sources, self.table, strict=True)
        ]


class AdaLNZero(nn.Module):
    """Modulations by a zero-initialised linear layer of the block's own (arXiv 2212.09748)."""

    def __init__(self, dim: int, count: int) -> None:
        super().__init__()
        self.count = count
        self.linear = ZeroLinear(dim, 3 * count * dim)

    def forward(self, embedding: Tensor) -> list[Modulation]:
        vectors = self.linear(F.silu(embedding)).chunk(3 * self.count, dim=-1)
        return [Modulation(*vectors[3 * i : 3 * i + 3]) for i in range(self.count)]


class Mlp(nn.Sequential):
    """Linear(D, 4D), tanh-GELU, Linear(4D, D)."""

    def __init__(self, dim: int) -> None:
        super().__init__(nn.Linear(dim, 4 * dim), nn.GELU("tanh"), nn.Linear(4 * dim, dim))


class Blocks(nn.ModuleList):
    """A model's blocks, one after the other."""

    _checkpoint: dict[str, Any] | None = None  # options of torch's, while it is on

    def checkpoint(self, enabled: bool = True, *, keep_attention: bool = False) -> None:
        """Activation checkpointing: in the backward, blocks run again from what they took.

        Each then keeps C numbers per token, in place of some 34·C of a text block.

        Args:
            enabled: False ends it.
            keep_attention: keep what the attentions give too, 4·C numbers per token of a text
                block, so that none of them runs again.
        """
        options: dict[str, Any] = dict(use_reentrant=False)
        if keep_attention:
            options["context_fn"] = partial(create_selective_checkpoint_contexts, _keep_attention)
        self._checkpoint = options if enabled else None

    @property
    def checkpointed(self) -> bool:
        return self._checkpoint is not None

    def forward(self, stream: Residual, *others: Any) -> Residual:
        """`others` go to every block."""
        for block in self:
            if self._checkpoint is None or not torch.is_grad_enabled():
                stream = block(stream, *others)
            else:
                stream = checkpoint(partial(_summed, block), stream, *others, **self._checkpoint)
        return stream


def _summed(block: nn.Module, stream: Residual, *others: Any) -> Residual:
    """The stream alone: with a branch beside it there would be two tensors to keep."""
    return Residual(block(stream, *others).total())


def _keep_attention(ctx: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    keep = "attention" in op.name()  # ours, and each of torch's
    return CheckpointPolicy.MUST_SAVE if keep else CheckpointPolicy.PREFER_RECOMPUTE


class Output(nn.Module):
    """Tokens to latents: modulated norm (by a table for text, a layer for classes), unpatchify."""

    def __init__(self, config: ModelConfig, *, backend: str = "auto") -> None:
        super().__init__()
        d, self.backend = config.dim, backend
        self.patch_size = config.patch_size
        self.table: nn.Parameter | None = None
        if config.num_classes is None:
            self.table = nn.Parameter(torch.randn(2, d) / d**0.5)
        else:
            self.linear = ZeroLinear(d, 2 * d)
        self.proj = ZeroLinear(d, config.patch_size**2 * config.out_channels)

    def forward(self, stream: Residual, grid: Triple, embedding: Tensor) -> Tensor:
        """(B, N, D) tokens on grid (f, h, w) -> (B, C, f, h·patch, w·patch)."""
        if self.table is not None:
            modulation = (self.table + embedding[:, None]).unbind(1)
        else:
            modulation = self.linear(F.silu(embedding)).chunk(2, dim=-1)
        _, x = stream.norm(modulation, self.backend)
        f, h, w = grid
        p = self.patch_size
        cut = "b (f h w) (p q c) -> b c f (h p) (w q)"
        return rearrange(self.proj(x), cut, f=f, h=h, w=w, p=p, q=p)


def initialize_weights(model: nn.Module) -> None:
    """Xavier for linear and patch layers, 0.02 for embeddings; what starts at zero stays there."""
    for module in model.modules():
        if isinstance(module, nn.Linear | nn.Conv2d) and not isinstance(module, ZeroLinear):
            nn.init.xavier_uniform_(module.weight.flatten(1))
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    for module in model.modules():
        if isinstance(module, TextCondition | ClassCondition):
            for weight in module.parameters():
                if weight.ndim == 2:
                    nn.init.normal_(weight, std=0.02)
