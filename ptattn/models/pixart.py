"""PixArt-α: the full-attention text-to-image baseline (arXiv 2310.00426), for images and video."""

from __future__ import annotations

from torch import Tensor, nn

from ..layers import CrossAttention, Residual, SelfAttention, ZeroLinear
from .blocks import (
    AdaLNSingle,
    Blocks,
    Captioned,
    Mlp,
    Output,
    PatchEmbed,
    initialize_weights,
)
from .condition import Condition, PreparedCaption, TextCondition
from .configs import ModelConfig
from .inputs import check_inputs


class PixArtBlock(nn.Module):
    """Full self-attention, text cross-attention and MLP, modulated by adaLN-single."""

    def __init__(self, config: ModelConfig, *, backend: str = "auto") -> None:
        super().__init__()
        dim, heads, self.backend = config.dim, config.num_heads, backend
        self.attn = SelfAttention(dim, heads, backend=backend)
        self.text_attn = CrossAttention(dim, heads, backend=backend)
        self.text_attn.proj = ZeroLinear(dim, dim)
        self.mlp = Mlp(dim)
        self.modulation = AdaLNSingle(dim)

    def forward(self, stream: Residual, condition: Condition) -> Residual:
        """(B, N, D) tokens."""
        attn, mlp = self.modulation(condition.modulation)
        x, normed = stream.norm(attn, self.backend)
        stream = Residual(x, self.attn(normed), attn.gate)
        x = stream.total()  # text attention takes its queries from the un-normed tokens
        stream = Residual(x, self.text_attn(x, condition.text, condition.text_mask))
        x, normed = stream.norm(mlp, self.backend)
        return Residual(x, self.mlp(normed), mlp.gate)


class PixArt(Captioned, nn.Module):
    """PixArt-α. Positions are embedded as in PT-DiT, so that it takes video too.

    Args:
        config: sizes and width of the text encoder.
        backend: of every attention, "auto", "reference", "sdpa" or "triton".
    """

    def __init__(self, config: ModelConfig, *, backend: str = "auto") -> None:
        super().__init__()
        self.model_config = config
        self.patch_embed = PatchEmbed(config)
        self.condition = TextCondition(config)
        self.blocks = Blocks(PixArtBlock(config, backend=backend) for _ in range(config.depth))
        self.output = Output(config, backend=backend)
        initialize_weights(self)

    def forward(
        self,
        latents: Tensor,
        timestep: Tensor,
        caption: Tensor | PreparedCaption,
        caption_mask: Tensor | None = None,
    ) -> Tensor:
        """Predict from noisy latents, as `PTDiT.forward` does.

        Args:
            latents: (B, 4, F, H, W) for video or (B, 4, H, W), H and W multiples of the patch size.
            timestep: (B,), 0 to 1000, one per sample.
            caption: (B, T, caption_channels), or what `prepare_caption` made of it and its mask.
            caption_mask: (B, T) bool or a tokenizer's integers, True or 1 at real tokens; None
                means all.

        Returns:
            (B, 8, F, H, W) or (B, 8, H, W).

        Raises:
            TypeError, ValueError: naming the argument, what it got and what was expected.
        """
        caption_mask = check_inputs(self.model_config, latents, timestep, caption, caption_mask)
        condition = self.condition(timestep, caption, caption_mask)
        x, grid = self.patch_embed(latents)
        stream = self.blocks(Residual(x), condition)
        x = self.output(stream, grid, condition)
        return x if latents.ndim == 5 else x.squeeze(2)
