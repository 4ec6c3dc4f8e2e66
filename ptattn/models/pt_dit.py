"""PT-DiT: the proxy-tokenized diffusion transformer (arXiv 2409.04005).

One code path for text and classes, images and video.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from ..geometry import WindowGrid
from ..layers import CrossAttention, GlobalInteraction, Residual, TextureComplement, ZeroLinear
from ..parallel import TokenSplit
from .blocks import (
    AdaLNSingle,
    AdaLNZero,
    Blocks,
    Captioned,
    Mlp,
    Output,
    PatchEmbed,
    initialize_weights,
)
from .condition import ClassCondition, Condition, PreparedCaption, TextCondition
from .configs import ModelConfig
from .inputs import check_inputs


class PTDiTBlock(nn.Module):
    """Global interaction, texture complement, text cross-attention, MLP.

        p = mean(x);  p = p + SA(LN(p))
        x = x + Z · CA(q = LN(x), kv = LN(p))
        x = x + g · WA(LN(x) · (1 + s) + t)
        x = x + Z' · (g' · SWA(LN(x) · (1 + s') + t'))
        x = x + CA(q = x, kv = text)                      text models
        x = x + g'' · MLP(LN(x) · (1 + s'') + t'')

    SA is self-attention, CA cross-attention, WA and SWA are attention within windows and shifted
    windows. Text models have (t, s, g) of each of the last three modulated terms by adaLN-single,
    the first two from the same vector; class models by adaLN-zero, which also modulates SA:
    p = p + g · SA(LN(p) · (1 + s) + t). Source: arXiv 2409.04005, and its released model.
    """

    def __init__(self, config: ModelConfig, *, backend: str = "auto") -> None:
        super().__init__()
        dim, heads, self.backend = config.dim, config.num_heads, backend
        self.global_interaction = GlobalInteraction(dim, heads, backend=backend)
        self.texture_complement = TextureComplement(dim, heads, shift=config.shift, backend=backend)
        self.mlp = Mlp(dim)
        self.text_attn: CrossAttention | None = None
        self.modulation: nn.Module
        if config.num_classes is None:
            self.text_attn = CrossAttention(dim, heads, backend=backend)
            self.text_attn.proj = ZeroLinear(dim, dim)
            self.modulation = AdaLNSingle(dim, sources=(0, 1, 0))
        else:
            self.modulation = AdaLNZero(dim, count=4)

    def forward(
        self, stream: Residual, proxies: WindowGrid, windows: WindowGrid, condition: Condition
    ) -> Residual:
        """(B, N, D) tokens, one proxy per window of `proxies`, attention within `windows`; the last
        branch is left to the norm that follows."""
        window, mlp, shifted, *proxy = self.modulation(condition.modulation)
        x, normed, means = stream.norm_and_means(proxies, self.backend)
        stream = Residual(x, self.global_interaction._branch(normed, means, *proxy))
        x, normed = stream.norm(window, self.backend)
        _, stream = self.texture_complement._branches(x, normed, windows, (window, shifted))
        if self.text_attn is not None:
            x = stream.total()  # text attention takes its queries from the un-normed tokens
            stream = Residual(x, self.text_attn(x, condition.text, condition.text_mask))
        x, normed = stream.norm(mlp, self.backend)
        return Residual(x, self.mlp(normed), mlp.gate)


class PTDiT(Captioned, nn.Module):
    """Proxy-tokenized diffusion transformer.

    Args:
        config: sizes, windows and kind of condition.
        backend: of every attention, "auto", "reference", "sdpa" or "triton".

    Examples:
        >>> model = create_model("pt-dit-s-class")
        >>> latents, t = torch.randn(2, 4, 32, 48), torch.tensor([10, 500])
        >>> model(latents, t, labels=torch.tensor([3, 7])).shape
        torch.Size([2, 8, 32, 48])
    """

    token_split: TokenSplit | None = None  # while ranks share its tokens

    def __init__(self, config: ModelConfig, *, backend: str = "auto") -> None:
        super().__init__()
        self.model_config = config
        self.patch_embed = PatchEmbed(config)
        text = config.num_classes is None
        self.condition = TextCondition(config) if text else ClassCondition(config)
        self.blocks = Blocks(PTDiTBlock(config, backend=backend) for _ in range(config.depth))
        self.output = Output(config, backend=backend)
        initialize_weights(self)

    def forward(
        self,
        latents: Tensor,
        timestep: Tensor,
        caption: Tensor | PreparedCaption | None = None,
        caption_mask: Tensor | None = None,
        labels: Tensor | None = None,
    ) -> Tensor:
        """Predict the velocity (and a learned sigma) of noisy latents.

        Args:
            latents: (B, 4, F, H, W) for video or (B, 4, H, W), H and W multiples of the patch size.
            timestep: (B,), 0 to 1000, one per sample.
            caption: (B, T, caption_channels), or what `prepare_caption` made of it and its mask;
                for text models.
            caption_mask: (B, T) bool or a tokenizer's integers, True or 1 at real tokens; None
                means all.
            labels: (B,) int64 in [0, num_classes], the last for no class; for class models.

        Returns:
            (B, 8, F, H, W) or (B, 8, H, W): 4 channels of prediction, then 4 of sigma.

        Raises:
            TypeError, ValueError: naming the argument; a condition of the other kind.
        """
        if self.token_split is not None:
            self.token_split.check(
                self, latents=latents, timestep=timestep, caption=caption,
                caption_mask=caption_mask, labels=labels,
            )  # fmt: skip
        caption_mask = check_inputs(
            self.model_config, latents, timestep, caption, caption_mask, labels
        )
        if latents.ndim == 4:
            x = self._predict(latents.unsqueeze(2), timestep, caption, caption_mask, labels)
            return x.squeeze(2)
        return self._predict(latents, timestep, caption, caption_mask, labels)

    def _predict(self, latents: Tensor, timestep: Tensor, caption: Any, *others: Any) -> Tensor:
        """Of checked inputs, latents (B, C, F, H, W)."""
        grids = self.model_config.window_grids(self.patch_embed.grid(latents))
        given = (latents, timestep, caption, *others)
        if self.token_split is None:
            return self._within(*grids, *given)
        return self.token_split.share(
            self, self._within, grids, *given, first=2, scale=self.model_config.patch_size
        )  # fmt: skip

    def _within(
        self, proxies: WindowGrid, windows: WindowGrid, latents: Tensor, *condition: Any
    ) -> Tensor:
        """Within the windows of the whole grid, or within a rank's share of them."""
        prepared = self.condition(*condition)
        x, grid = self.patch_embed(latents, windows)
        stream = self.blocks(Residual(x), prepared, proxies, windows)
        return self.output(stream, grid, prepared)
