"""PT-DiT: the proxy-tokenized diffusion transformer (arXiv 2409.04005).

One code path for text and classes, images and video.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from ..geometry import WindowGrid
from ..layers import CrossAttention, GlobalInteraction, Residual, TextureComplement, ZeroLinear
from .blocks import (
    AdaLNSingle,
    AdaLNZero,
    Blocks,
    ClassCondition,
    Condition,
    Mlp,
    Output,
    PatchEmbed,
    TextCondition,
    initialize_weights,
)
from .configs import ModelConfig


class PTDiTBlock(nn.Module):
    """Global interaction, texture complement, text cross-attention, MLP.

    Text models modulate window attention, shifted-window attention and MLP by adaLN-single, the
    first two from the same vector; class models modulate these and the proxy attention by
    adaLN-zero.
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
        """(B, N, D) tokens, one proxy per window of `proxies`, attention within `windows`."""
        window, mlp, shifted, *proxy = self.modulation(condition.modulation)
        x, normed, means = stream.norm_and_means(proxies, self.backend)
        stream = Residual(x, self.global_interaction(normed, means, *proxy))
        x, normed = stream.norm(window, self.backend)
        _, stream = self.texture_complement(x, normed, windows, (window, shifted))
        if self.text_attn is not None:
            x = stream.total()  # the text is asked by tokens that are not normed
            stream = Residual(x, self.text_attn(x, condition.text, condition.text_mask))
        x, normed = stream.norm(mlp, self.backend)
        return Residual(x, self.mlp(normed), mlp.gate)


class PTDiT(nn.Module):
    """Proxy-tokenized diffusion transformer.

    Args:
        config: sizes, windows and kind of condition.
        backend: of every attention, "auto", "reference", "sdpa" or "triton".

    Example:
        >>> model = create_model("pt-dit-s-class")
        >>> latents, t = torch.randn(2, 4, 32, 48), torch.tensor([10, 500])
        >>> model(latents, t, labels=torch.tensor([3, 7])).shape
        torch.Size([2, 8, 32, 48])
    """

    def __init__(self, config: ModelConfig, *, backend: str = "auto") -> None:
        super().__init__()
        self.config = config
        self.patch_embed = PatchEmbed(config)
        text = config.num_classes is None
        self.condition = TextCondition(config) if text else ClassCondition(config)
        self.blocks = Blocks(PTDiTBlock(config, backend=backend) for _ in range(config.depth))
        self.output = Output(config, backend=backend)
        self.fused = False
        initialize_weights(self)

    def fuse_for_inference(self) -> PTDiT:
        """Make one matrix product of two where linear layers follow each other, exactly.

        Z times the output projection of the cross-attention once, for all calls; Z times the gate
        times that of the shifted-window attention in every call that has more than 2·D tokens,
        where it pays. 21·D² to 20·D² multiply-adds per token and block are left of 22·D². The
        state dict stays as it is.

        Returns:
            The model.

        Raises:
            RuntimeError: in training mode, fused already, or with layers that do more than their
                weights say, such as LoRA's, or whose weights are quantized.
        """
        if self.training:
            raise RuntimeError("fuse_for_inference is for inference: call model.eval() first")
        if self.fused:
            raise RuntimeError("the model is fused already")
        for name, module in self.named_modules():
            if isinstance(module, GlobalInteraction | TextureComplement) and not module.foldable:
                raise RuntimeError(
                    f"{name} cannot be fused: its last layers are not plain nn.Linear with plain "
                    "weights. Merge what LoRA adds; quantized weights cannot be fused"
                )
        self._fuse(True)
        return self

    def unfuse(self) -> PTDiT:
        """Undo `fuse_for_inference`.

        Raises:
            RuntimeError: not fused.
        """
        if not self.fused:
            raise RuntimeError("the model is not fused")
        self._fuse(False)
        return self

    def _fuse(self, fused: bool) -> None:
        for module in self.modules():
            if isinstance(module, GlobalInteraction):
                module.fold() if fused else module.unfold()
            elif isinstance(module, TextureComplement):
                module.folds = fused
        self.fused = fused

    def train(self, mode: bool = True) -> PTDiT:
        if mode and self.fused:
            raise RuntimeError("a fused model cannot train: call unfuse() first")
        return super().train(mode)

    def _load_from_state_dict(self, *args: Any) -> None:
        if self.fused:
            raise RuntimeError("a fused model takes no weights: call unfuse() first")
        super()._load_from_state_dict(*args)

    def forward(
        self,
        latents: Tensor,
        timestep: Tensor,
        caption: Tensor | None = None,
        caption_mask: Tensor | None = None,
        labels: Tensor | None = None,
    ) -> Tensor:
        """Predict the velocity (and a learned sigma) of noisy latents.

        Args:
            latents: (B, 4, F, H, W) for video or (B, 4, H, W), H and W multiples of the patch size.
            timestep: (B,), 0 to 1000, one per sample.
            caption: (B, T, caption_channels), for text models.
            caption_mask: (B, T) bool, True at real tokens; None means all.
            labels: (B,) int64, for class models.

        Returns:
            (B, 8, F, H, W) or (B, 8, H, W): 4 channels of prediction, then 4 of sigma.

        Raises:
            ValueError: a shape other than these, or a condition of the other kind.
        """
        condition = self.condition(timestep, caption, caption_mask, labels)
        x, grid = self.patch_embed(latents)
        proxies, windows = self.config.window_grids(grid)
        stream = self.blocks(Residual(x), proxies, windows, condition)
        x = self.output(stream, grid, condition.embedding)
        return x if latents.ndim == 5 else x.squeeze(2)
