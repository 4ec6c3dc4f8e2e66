"""The autoencoder that the released model decodes with: Open-Sora-Plan 1.2's CausalVAE.

Pixels (B, 3, F, H, W) to latents (B, 4, f, h, w): 8 times fewer rows and columns, 4 times fewer
frames after the first. A level of the encoder halves the sides, two of them the frames as well; the
decoder goes the way back.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.models.autoencoders.vae import (
    DecoderOutput,
    DiagonalGaussianDistribution,
)
from diffusers.models.modeling_outputs import AutoencoderKLOutput
from diffusers.utils.accelerate_utils import apply_forward_hook
from torch import Tensor, nn

from ..layers import check_like_weights
from .causal_vae_layers import (
    AttnBlock,
    CausalConv3d,
    Conv2d,
    Downsample,
    GroupNorm,
    ResnetBlock,
    Upsample,
)
from .causal_vae_tiling import Tiling
from .components import check_numbers

LEVELS = 4
TEMPORAL, SPATIAL = 4, 8  # frames per latent frame after the first, pixels a side per latent


class Level(nn.Module):
    """Residual blocks, the first of which changes the width, and what changes the size."""

    def __init__(
        self, widths: Sequence[int], groups: int, causal: bool, **resize: nn.Module
    ) -> None:
        super().__init__()
        self.block = nn.ModuleList(
            ResnetBlock(*pair, groups, causal) for pair in itertools.pairwise(widths)
        )
        for name, module in resize.items():
            self.add_module(name, module)


def _steps(levels: Any) -> list[nn.Module]:
    """What runs in the levels, one after the other."""
    parts = (part for level in levels for part in level.children())
    return [
        step for part in parts for step in (part if isinstance(part, nn.ModuleList) else [part])
    ]


class Middle(nn.Module):
    """A residual block, attention, a residual block."""

    def __init__(self, channels: int, groups: int) -> None:
        super().__init__()
        self.block_1 = ResnetBlock(channels, channels, groups, causal=True)
        self.attn_1 = AttnBlock(channels, groups)
        self.block_2 = ResnetBlock(channels, channels, groups, causal=True)


class _Half(nn.Module):
    """What encoder and decoder share: checkpointed steps, and the last convolution."""

    norm_out: GroupNorm
    conv_out: CausalConv3d
    _gradient_checkpointing_func: Callable[..., Tensor]  # diffusers sets it

    def __init__(self) -> None:
        super().__init__()
        self.gradient_checkpointing = False

    def _run(self, x: Tensor, steps: Sequence[nn.Module]) -> Tensor:
        # Gradients and hooks are given feature maps that must stay as they are.
        overwrite = not torch.is_grad_enabled() and not any(
            module._forward_hooks or module._forward_pre_hooks for module in self.modules()
        )
        for step in steps:
            if torch.is_grad_enabled() and self.gradient_checkpointing:
                x = self._gradient_checkpointing_func(step, x)
            elif overwrite and isinstance(step, ResnetBlock):
                x = step(x, overwrite=True)
            else:
                x = step(x)
        return x

    def _finish(self, x: Tensor) -> Tensor:
        return self.conv_out(self.norm_out(x)).movedim(-1, 1)


class Encoder(_Half):
    """(B, 3, F, H, W) to (B, 2·latent_channels, f, h, w)."""

    def __init__(
        self, widths: Sequence[int], layers: int, latent_channels: int, groups: int
    ) -> None:
        super().__init__()
        self.conv_in = Conv2d(3, widths[0], 3)
        self.down = nn.ModuleList()
        for i, (before, width) in enumerate(zip([widths[0], *widths], widths, strict=False)):
            resize = {} if i == LEVELS - 1 else {"downsample": Downsample(width, causal=i > 0)}
            self.down.append(Level([before] + layers * [width], groups, i > 1, **resize))
        self.mid = Middle(widths[-1], groups)
        self.norm_out = GroupNorm(groups, widths[-1])
        self.conv_out = CausalConv3d(widths[-1], 2 * latent_channels)

    def forward(self, x: Tensor) -> Tensor:
        batch = len(x)
        x = x.movedim(1, -1).contiguous().flatten(0, 1)[:, None]  # each frame by itself
        *images, shrink = _steps(self.down[:2])
        x = self._run(self.conv_in(x), images)
        x = x.squeeze(1).unflatten(0, (batch, -1))
        x = self._run(x, [shrink, *_steps(self.down[2:]), *self.mid.children()])
        return self._finish(x)


class Decoder(_Half):
    """(B, latent_channels, f, h, w) to (B, 3, F, H, W)."""

    def __init__(
        self, widths: Sequence[int], layers: int, latent_channels: int, groups: int
    ) -> None:
        super().__init__()
        self.conv_in = CausalConv3d(latent_channels, widths[-1])
        self.mid = Middle(widths[-1], groups)
        self.up = nn.ModuleList()
        for i, (before, width) in enumerate(zip([*widths[1:], widths[-1]], widths, strict=True)):
            resize = {"upsample": Upsample(width, time=i > 1)} if i else {}
            self.up.append(Level([before] + (layers + 1) * [width], groups, True, **resize))
        self.norm_out = GroupNorm(groups, widths[0])
        self.conv_out = CausalConv3d(widths[0], 3)

    def forward(self, z: Tensor) -> Tensor:
        x = self.conv_in(z.movedim(1, -1).contiguous())
        steps = [*self.mid.children(), *_steps(reversed(self.up))]
        return self._finish(self._run(x, steps))


class CausalVAE(ModelMixin, Tiling, ConfigMixin):
    """The autoencoder of the released text-to-image model, for images and videos.

    It is Open-Sora-Plan 1.2's, with its names of weights. Convolutions look back in time only, but
    norms average over all frames of a clip. Under `torch.no_grad()` or `inference_mode()` a block
    takes the memory of its input, unless a module of its half has forward hooks, which may keep it.

    Args:
        block_out_channels: of the four levels, from the pixels on.
        layers_per_block: residual blocks of a level; the decoder has one more.
        latent_channels: of the latents.
        norm_num_groups: of every norm; divides all of `block_out_channels`.
        scaling_factor: what latents are multiplied with for the transformer (`pipelines.encode`).

    Raises:
        ValueError: other than four levels, numbers that are no positive integers, or widths that
            the groups do not divide.

    Examples:
        >>> vae = CausalVAE.from_pretrained("vae", dtype=torch.bfloat16)
        >>> latents = vae.encode(video).latent_dist.sample()  # (B, 3, 29, 512, 512) in [-1, 1]
        >>> video = vae.decode(latents).sample
    """

    _supports_gradient_checkpointing = True
    _no_split_modules = ("ResnetBlock", "AttnBlock")

    @register_to_config
    def __init__(
        self,
        block_out_channels: tuple[int, ...] = (128, 256, 512, 512),
        layers_per_block: int = 2,
        latent_channels: int = 4,
        norm_num_groups: int = 32,
        scaling_factor: float = 0.18215,
    ) -> None:
        super().__init__()
        if len(block_out_channels) != LEVELS:
            raise ValueError(f"block_out_channels must be {LEVELS}; got {block_out_channels}")
        check_numbers(
            layers_per_block=layers_per_block,
            latent_channels=latent_channels,
            norm_num_groups=norm_num_groups,
            **{f"block_out_channels[{i}]": width for i, width in enumerate(block_out_channels)},
        )
        if any(width % norm_num_groups for width in block_out_channels):
            raise ValueError(
                f"block_out_channels must be multiples of norm_num_groups, {norm_num_groups}; "
                f"got {block_out_channels}"
            )
        sizes = block_out_channels, layers_per_block, latent_channels, norm_num_groups
        self.encoder = Encoder(*sizes)
        self.decoder = Decoder(*sizes)
        self.quant_conv = CausalConv3d(2 * latent_channels, 2 * latent_channels, 1)
        self.post_quant_conv = CausalConv3d(latent_channels, latent_channels, 1)
        self.temporal_compression_ratio, self.spatial_compression_ratio = TEMPORAL, SPATIAL
        self.use_slicing = self.use_tiling = False

    @apply_forward_hook
    def encode(
        self, x: Tensor, return_dict: bool = True
    ) -> AutoencoderKLOutput | tuple[DiagonalGaussianDistribution]:
        """Pixels to a distribution of latents.

        Args:
            x: (B, 3, F, H, W), about [-1, 1], sides of at least 8. Multiples of 8 and 1 + 4k
                frames are coded whole. Of other sizes, the rest may change the last latents, but
                has none of its own, and `decode` does not give it back.
            return_dict: False returns a tuple.

        Returns:
            `.latent_dist`, of (B, latent_channels, 1 + (F - 1) // 4, H // 8, W // 8), not scaled.

        Raises:
            TypeError: no tensor.
            ValueError: another shape, or a dtype or device that the weights do not have.
        """
        self._check("x", x, self.encoder.conv_in, SPATIAL)
        moments = self._by_sample(self._encode, x)
        distribution = DiagonalGaussianDistribution(moments)
        return AutoencoderKLOutput(latent_dist=distribution) if return_dict else (distribution,)

    @apply_forward_hook
    def decode(self, z: Tensor, return_dict: bool = True) -> DecoderOutput | tuple[Tensor]:
        """Latents to pixels.

        Args:
            z: (B, latent_channels, f, h, w), not scaled.
            return_dict: False returns a tuple.

        Returns:
            `.sample`, (B, 3, 4·f - 3, 8·h, 8·w), about [-1, 1].

        Raises:
            TypeError: no tensor.
            ValueError: another shape, or a dtype or device that the weights do not have.
        """
        self._check("z", z, self.post_quant_conv.conv, 1)
        pixels = self._by_sample(self._decode, z)
        return DecoderOutput(sample=pixels) if return_dict else (pixels,)

    def forward(
        self,
        sample: Tensor,
        sample_posterior: bool = False,
        return_dict: bool = True,
        generator: torch.Generator | None = None,
    ) -> DecoderOutput | tuple[Tensor]:
        """Pixels to latents, a random sample or the mode, and back."""
        posterior = self.encode(sample).latent_dist
        z = posterior.sample(generator) if sample_posterior else posterior.mode()
        return self.decode(z, return_dict)

    def _by_sample(self, function: Any, x: Tensor) -> Tensor:
        if self.use_slicing and len(x) > 1:
            return torch.cat([function(one) for one in x.split(1)])
        return function(x)

    def _encode(self, x: Tensor) -> Tensor:
        return self._tiled_encode(x) if self._exceeds(x, pixels=True) else self._moments(x)

    def _decode(self, z: Tensor) -> Tensor:
        return self._tiled_decode(z) if self._exceeds(z, pixels=False) else self._pixels(z)

    def _moments(self, x: Tensor) -> Tensor:
        """The encoder and its quant convolution, in one pass."""
        return self.quant_conv(self.encoder(x).movedim(1, -1)).movedim(-1, 1).contiguous()

    def _pixels(self, z: Tensor) -> Tensor:
        z = self.post_quant_conv(z.movedim(1, -1).contiguous()).movedim(-1, 1)
        return self.decoder(z).contiguous()

    def _check(self, name: str, x: Tensor, first: Any, least: int) -> None:
        """What the first convolution takes, with sides of `least`."""
        if not isinstance(x, Tensor):
            raise TypeError(f"{name} must be a tensor; got {type(x).__name__}")
        channels = first.in_channels
        if x.ndim != 5 or x.shape[1] != channels or min(x.shape) < 1 or min(x.shape[3:]) < least:
            sides = f", H and W of at least {least}" if least > 1 else ""
            raise ValueError(
                f"{name} must have shape (B, {channels}, F, H, W) with B and F of at least 1"
                f"{sides}; got {tuple(x.shape)}"
            )
        check_like_weights(name, x, first)
