"""What the models ask of their inputs; errors name the argument that their caller gave."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .condition import PreparedCaption
from .configs import ModelConfig

_MASKS = (torch.bool, torch.uint8, torch.int32, torch.int64)


def check_inputs(
    config: ModelConfig,
    latents: Any,
    timestep: Any,
    caption: Any = None,
    caption_mask: Any = None,
    labels: Any = None,
) -> Tensor | None:
    """Raise unless they are what a model takes; that what is given is what it is conditioned on is
    checked there, and a prepared caption, too.

    Returns:
        caption_mask as bool.

    Raises:
        TypeError: no tensor, or one of a dtype that cannot be meant.
        ValueError: another shape, or another device than that of the latents.
    """
    _check_latents(config, latents)
    batch, device = latents.shape[0], latents.device
    _check_tensor("timestep", timestep, "(B,), one per sample")
    if timestep.dtype == torch.bool or timestep.is_complex():
        raise TypeError(f"timestep must be of a real dtype; got {timestep.dtype}")
    _check_shape("timestep", timestep, "(B,)", (batch,), device)
    text = config.caption_channels is not None
    if text and caption is not None and not isinstance(caption, PreparedCaption):
        caption_mask = check_caption(config, caption, caption_mask)
        _check_shape("caption", caption, "(B, T, C)", (batch, *caption.shape[1:]), device)
    if labels is not None:
        _check_tensor("labels", labels, "(B,), int64")
        _check_shape("labels", labels, "(B,)", (batch,), device)
    return caption_mask


def check_caption(config: ModelConfig, caption: Any, caption_mask: Any) -> Tensor | None:
    """As `check_inputs`, for a caption by itself."""
    shape = f"(B, T, {config.caption_channels})"
    _check_tensor("caption", caption, shape)
    if caption.ndim != 3 or caption.shape[2] != config.caption_channels or not caption.shape[1]:
        raise ValueError(f"caption must have shape {shape}; got {tuple(caption.shape)}")
    if caption_mask is None:
        return None
    _check_tensor("caption_mask", caption_mask, "(B, T), True at real tokens")
    check_mask("caption_mask", caption_mask)
    _check_shape("caption_mask", caption_mask, "(B, T)", caption.shape[:2], caption.device)
    return caption_mask.bool()


def check_mask(name: str, mask: Tensor) -> None:
    """Raise TypeError unless it is bool or integer, as tokenizers give; numbers with a point may be
    meant as additions to the scores."""
    if mask.dtype not in _MASKS:
        raise TypeError(
            f"{name} must be bool, or integers that are 1 at real tokens and 0 elsewhere; "
            f"got {mask.dtype}"
        )


def _check_latents(config: ModelConfig, latents: Any) -> None:
    p, channels = config.patch_size, config.in_channels
    shape = f"(B, {channels}, F, H, W) or (B, {channels}, H, W)"
    _check_tensor("latents", latents, shape)
    if latents.ndim not in (4, 5) or latents.shape[1] != channels:
        raise ValueError(f"latents must have shape {shape}; got {tuple(latents.shape)}")
    if latents.shape[-2] % p or latents.shape[-1] % p:
        raise ValueError(f"latents need H and W divisible by {p}; got {tuple(latents.shape)}")
    if 0 in latents.shape[1:]:
        raise ValueError(f"latents may be empty in their batch only; got {tuple(latents.shape)}")


def _check_tensor(name: str, x: Any, shape: str) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a tensor of shape {shape}; got {type(x).__name__}")


def _check_shape(
    name: str, x: Tensor, shape: str, wanted: Sequence[int], device: torch.device
) -> None:
    if x.shape != wanted:
        raise ValueError(f"{name} must have shape {shape} = {tuple(wanted)}; got {tuple(x.shape)}")
    if x.device != device:
        raise ValueError(f"{name} must be on {device}; got {x.device}")
