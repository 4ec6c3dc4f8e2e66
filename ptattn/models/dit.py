"""DiT: the full-attention class-conditional baseline (arXiv 2212.09748), for images and video."""

from __future__ import annotations

from torch import Tensor, nn

from ..layers import Residual, SelfAttention
from .blocks import (
    AdaLNZero,
    Blocks,
    Mlp,
    Output,
    PatchEmbed,
    initialize_weights,
)
from .condition import ClassCondition, Condition
from .configs import Configured, ModelConfig
from .inputs import check_inputs


class DiTBlock(nn.Module):
    """Full self-attention and MLP, modulated by adaLN-zero."""

    def __init__(self, config: ModelConfig, *, backend: str = "auto") -> None:
        super().__init__()
        self.backend = backend
        self.attn = SelfAttention(config.dim, config.num_heads, backend=backend)
        self.mlp = Mlp(config.dim)
        self.modulation = AdaLNZero(config.dim, count=2)

    def forward(self, stream: Residual, condition: Condition) -> Residual:
        """(B, N, D) tokens."""
        attn, mlp = self.modulation(condition.modulation)
        x, normed = stream.norm(attn, self.backend)
        stream = Residual(x, self.attn(normed), attn.gate)
        x, normed = stream.norm(mlp, self.backend)
        return Residual(x, self.mlp(normed), mlp.gate)


class DiT(Configured, nn.Module):
    """Diffusion transformer. Positions are embedded as in PT-DiT, so that it takes video too.

    Args:
        config: sizes and number of classes.
        backend: of every attention, "auto", "reference", "sdpa" or "triton".
    """

    def __init__(self, config: ModelConfig, *, backend: str = "auto") -> None:
        super().__init__()
        self.model_config = config
        self.patch_embed = PatchEmbed(config)
        self.condition = ClassCondition(config)
        self.blocks = Blocks(DiTBlock(config, backend=backend) for _ in range(config.depth))
        self.output = Output(config, backend=backend)
        initialize_weights(self)

    def forward(self, latents: Tensor, timestep: Tensor, labels: Tensor) -> Tensor:
        """Predict from noisy latents, as `PTDiT.forward` does.

        Args:
            latents: (B, 4, F, H, W) for video or (B, 4, H, W), H and W multiples of the patch size.
            timestep: (B,), 0 to 1000, one per sample.
            labels: (B,) int64 in [0, num_classes]; num_classes is the null class.

        Returns:
            (B, 8, F, H, W) or (B, 8, H, W).

        Raises:
            TypeError, ValueError: naming the argument, what it got and what was expected.
        """
        check_inputs(self.model_config, latents, timestep, labels=labels)
        condition = self.condition(timestep, labels=labels)
        x, grid = self.patch_embed(latents)
        stream = self.blocks(Residual(x), condition)
        x = self.output(stream, grid, condition)
        return x if latents.ndim == 5 else x.squeeze(2)
