"""PixArt-α: the full-attention text-to-image baseline (arXiv 2310.00426), for images and video."""

from __future__ import annotations

from torch import Tensor, nn

from ..layers import CrossAttention, SelfAttention, ZeroLinear, layer_norm
from .blocks import (
    AdaLNSingle,
    Condition,
    Mlp,
    Output,
    PatchEmbed,
    TextCondition,
    initialize_weights,
)
from .configs import ModelConfig


class PixArtBlock(nn.Module):
    """Full self-attention, text cross-attention and MLP, modulated by adaLN-single."""

    def __init__(self, config: ModelConfig, *, backend: str = "auto") -> None:
        super().__init__()
        dim, heads = config.dim, config.num_heads
        self.attn = SelfAttention(dim, heads, backend=backend)
        self.text_attn = CrossAttention(dim, heads, backend=backend)
        self.text_attn.proj = ZeroLinear(dim, dim)
        self.mlp = Mlp(dim)
        self.modulation = AdaLNSingle(dim)

    def forward(self, x: Tensor, condition: Condition) -> Tensor:
        """(B, N, D) -> (B, N, D)."""
        attn, mlp = self.modulation(condition.modulation)
        x = attn.add_gated(x, self.attn(layer_norm(x, attn)))
        x = x + self.text_attn(x, condition.text, condition.text_mask)
        return mlp.add_gated(x, self.mlp(layer_norm(x, mlp)))


class PixArt(nn.Module):
    """PixArt-α. Positions are embedded as in PT-DiT, so that it takes video too.

    Args:
        config: sizes and width of the text encoder.
        backend: of every attention, "auto", "reference", "sdpa" or "triton".
    """

    def __init__(self, config: ModelConfig, *, backend: str = "auto") -> None:
        super().__init__()
        self.config = config
        self.patch_embed = PatchEmbed(config)
        self.condition = TextCondition(config)
        self.blocks = nn.ModuleList(
            PixArtBlock(config, backend=backend) for _ in range(config.depth)
        )
        self.output = Output(config)
        initialize_weights(self)

    def forward(
        self,
        latents: Tensor,
        timestep: Tensor,
        caption: Tensor,
        caption_mask: Tensor | None = None,
    ) -> Tensor:
        """Predict from noisy latents, as `PTDiT.forward` does.

        Args:
            latents: (B, 4, F, H, W) for video or (B, 4, H, W), H and W multiples of the patch size.
            timestep: (B,), 0 to 1000, one per sample.
            caption: (B, T, caption_channels).
            caption_mask: (B, T) bool, True at real tokens; None means all.

        Returns:
            (B, 8, F, H, W) or (B, 8, H, W).

        Raises:
            ValueError: a shape other than these.
        """
        condition = self.condition(timestep, caption, caption_mask)
        x, grid = self.patch_embed(latents)
        for block in self.blocks:
            x = block(x, condition)
        x = self.output(x, grid, condition.embedding)
        return x if latents.ndim == 5 else x.squeeze(2)
