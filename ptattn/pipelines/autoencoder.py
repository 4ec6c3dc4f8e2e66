"""What the pipelines ask of an autoencoder, for any of diffusers: compression, encode, decode.

diffusers has no common interface for these: an autoencoder of images takes (B, C, H, W), one of
videos (B, C, F, H, W), and what normalises the latents has several names.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

_locks: WeakKeyDictionary[nn.Module, threading.Lock] = WeakKeyDictionary()  # of autoencoders


def compression(vae: Any) -> tuple[int, int]:
    """Frames per latent frame after the first, and pixels a side per latent pixel.

    Raises:
        ValueError: an autoencoder that does not say.
    """
    temporal = _setting(vae, "temporal_compression_ratio", "scale_factor_temporal")
    spatial = _setting(vae, "spatial_compression_ratio", "scale_factor_spatial")
    if not _takes_video(vae):
        temporal = 1
    if spatial is None and (blocks := _setting(vae, "block_out_channels")):
        spatial = 2 ** (len(blocks) - 1)
    if temporal is None or spatial is None:
        raise ValueError(f"{type(vae).__name__} does not say how much it compresses")
    return int(temporal), int(spatial)


def encode(vae: Any, pixels: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Images or videos to normalised latents, what a PT-DiT is trained on.

    Args:
        vae: an autoencoder of diffusers; one of images takes the frames one by one.
        pixels: (B, 3, F, H, W) in [-1, 1].
        generator: of the sample that a variational autoencoder draws.

    Returns:
        (B, C, f, h, w) in the autoencoder's dtype.
    """

    def one(x: Tensor) -> Tensor:
        output = vae.encode(x)
        if hasattr(output, "latent_dist"):
            return output.latent_dist.sample(generator)
        return output.latents if hasattr(output, "latents") else output.latent

    raw = _by_frame(vae, one, pixels.to(vae.dtype))
    scale, shift = _normalisation(vae, raw)
    return (raw - shift) / scale


def decode(vae: Any, latents: Tensor) -> Tensor:
    """Normalised latents (B, C, f, h, w) to videos (B, 3, F, H, W), about [-1, 1]."""
    latents = latents.to(vae.dtype)
    scale, shift = _normalisation(vae, latents)
    return _by_frame(vae, lambda z: vae.decode(z, return_dict=False)[0], latents * scale + shift)


@contextmanager
def tiling(vae: Any, wanted: bool) -> Iterator[None]:
    """Tiles where they are wanted, else what the autoencoder is set to; then as it was before.

    The setting is the autoencoder's, which threads may share, so it has one decode at a time.
    """
    with _locks.setdefault(vae, threading.Lock()):
        if not wanted or vae.use_tiling:
            yield
            return
        vae.enable_tiling()
        try:
            yield
        finally:
            vae.disable_tiling()


def _by_frame(vae: Any, function: Any, x: Tensor) -> Tensor:
    if _takes_video(vae):
        return function(x)
    # One frame at a time: 24 views of 512² at once would take more memory than the transformer.
    return torch.stack([function(frame) for frame in x.unbind(2)], dim=2)


def _takes_video(vae: Any) -> bool:
    return any(isinstance(module, nn.Conv3d) for module in vae.modules())


def _normalisation(vae: Any, like: Tensor) -> tuple[Tensor, Tensor]:
    """Scale and shift, such that the autoencoder's own latents are latents · scale + shift."""

    def channels(value: Any) -> Tensor:
        value = torch.as_tensor(value, device=like.device, dtype=like.dtype)
        return value.reshape(1, -1, 1, 1, 1)

    std = _setting(vae, "latents_std", default=1.0)
    mean = _setting(vae, "latents_mean", "shift_factor", default=0.0)
    return channels(std) / _setting(vae, "scaling_factor", default=1.0), channels(mean)


def _setting(vae: Any, *names: str, default: Any = None) -> Any:
    for name in names:
        # Attributes first: some are computed where the configuration leaves them open.
        for home in (vae.__dict__, vae._buffers, vae.config):
            if home.get(name) is not None:
                return home[name]
    return default
