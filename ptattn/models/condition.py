"""What a model's blocks are conditioned on: timestep, and caption or class."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..context import observed
from ..layers import KeysValues, check_like_weights
from .configs import ModelConfig


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


class PreparedCaption(NamedTuple):
    """A caption as every block attends to it: what `prepare_caption` of a model makes of it."""

    keys_values: tuple[KeysValues, ...]  # of each block
    mask: Tensor | None = None  # (B, T) bool


class Condition(NamedTuple):
    """What a model's blocks, or one of them, are conditioned on.

    A block takes its modulation and its text as the model has them, or as they are made for it:
    with its table added, (B, K, 3, D), and projected.
    """

    embedding: Tensor  # (B, D), of the timestep or of timestep and class
    modulation: Tensor  # (B, 6D) for text; for classes the SiLU of the embedding, (B, D)
    text: Tensor | KeysValues | PreparedCaption | None = None  # (B, T, D)
    text_mask: Tensor | None = None  # (B, T) bool


class TextCondition(nn.Module):
    """Timestep and caption, as in PixArt-α's adaLN-single (arXiv 2310.00426, section 2.3)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        d = config.dim
        self.depth, self.dim = config.depth, d
        self.timestep = TimestepEmbed(d)
        self.modulation = nn.Sequential(nn.SiLU(), nn.Linear(d, 6 * d))
        self.caption = nn.Sequential(
            nn.Linear(config.caption_channels or 0, d), nn.GELU(approximate="tanh"), nn.Linear(d, d)
        )

    def forward(
        self,
        timestep: Tensor,
        caption: Tensor | PreparedCaption | None = None,
        caption_mask: Tensor | None = None,
        labels: Tensor | None = None,
    ) -> Condition:
        """caption (B, T, caption_channels), caption_mask (B, T) bool or None for all real."""
        if caption is None or labels is not None:
            raise ValueError("this model is conditioned on text: give caption, and no labels")
        text: Tensor | PreparedCaption
        if isinstance(caption, PreparedCaption):
            self._check_prepared(caption, caption_mask, timestep)
            embedding = self.timestep(timestep)
            _check_dtype(caption, embedding)
            text, caption_mask = caption, caption.mask
        else:
            text, embedding = self.text(caption), self.timestep(timestep)
        return Condition(embedding, self.modulation(embedding), text, caption_mask)

    def text(self, caption: Tensor) -> Tensor:
        """(B, T, caption_channels) -> (B, T, D)."""
        check_like_weights("caption", caption, self.caption[0])
        return self.caption(caption)

    def _check_prepared(
        self, caption: PreparedCaption, caption_mask: Tensor | None, timestep: Tensor
    ) -> None:
        if caption_mask is not None:
            raise ValueError("a prepared caption has its mask: give no caption_mask")
        batch, _, channels = caption.keys_values[0].packed.shape
        depth, dim = len(caption.keys_values), channels // 2
        if (depth, dim) != (self.depth, self.dim):
            raise ValueError(
                f"caption was prepared by a model of {depth} blocks of {dim} channels; "
                f"this one has {self.depth} of {self.dim}"
            )
        if timestep.shape != (batch,):
            raise ValueError(
                f"caption was prepared for a batch of {batch}; got timestep of shape "
                f"{tuple(timestep.shape)}"
            )


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
        """labels (B,) in [0, num_classes]; num_classes itself is the null class."""
        if labels is None or caption is not None or caption_mask is not None:
            raise ValueError("this model is conditioned on classes: give labels, and no caption")
        if labels.dtype not in (torch.int32, torch.int64):
            raise TypeError(f"labels must be int64 or int32; got {labels.dtype}")
        self._check_range(labels)
        embedding = self.timestep(timestep) + self.label(labels)
        return Condition(embedding, F.silu(embedding))

    def _check_range(self, labels: Tensor) -> None:
        """Where values are at hand without waiting for a device."""
        if labels.device.type != "cpu" or observed(labels) or not labels.numel():
            return
        low, high = labels.aminmax()
        if low < 0 or high >= self.label.num_embeddings:
            raise ValueError(
                f"labels must be in [0, {self.label.num_embeddings - 1}], the last for no class; "
                f"got {int(low)} to {int(high)}"
            )


def _check_dtype(caption: PreparedCaption, embedding: Tensor) -> None:
    """A linear layer's output, as the embedding is, has the dtype of the weights or of autocast."""
    prepared = caption.keys_values[0].packed.dtype
    if prepared != embedding.dtype:
        raise ValueError(
            f"caption was prepared in {prepared}; the model now computes in {embedding.dtype}: "
            "prepare it with these weights, and under the autocast that it is used in"
        )
