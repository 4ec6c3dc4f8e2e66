"""Whether the components of a pipeline fit each other."""

from __future__ import annotations

from typing import Any

from ..flow import OBJECTIVES, Objective
from ..models import PTDiT
from .autoencoder import compression


def objective_of(scheduler: Any) -> Objective:
    """What a scheduler says that the transformer predicts.

    Raises:
        ValueError: one that is set for neither objective.
    """
    for objective in OBJECTIVES.values():
        if _settings(scheduler) == _settings(objective.scheduler()):
            return objective
    raise ValueError(
        "scheduler must be set as ptattn.flow.FLOW.scheduler() or V.scheduler() is; "
        f"got {scheduler}"
    )


def check_fit(transformer: Any, text_encoder: Any, vae: Any) -> None:
    """Whether the widths of three components agree; there may be no text encoder.

    Raises:
        TypeError: another transformer.
        ValueError: widths that differ, a transformer for classes, an autoencoder that does not say
            how much it compresses.
    """
    own = getattr(transformer, "_orig_mod", transformer)  # what torch.compile has wrapped
    if not isinstance(own, PTDiT):
        raise TypeError(f"transformer must be a PTDiTTransformer; got {type(own).__name__}")
    config = transformer.config
    if config.caption_channels is None:
        raise ValueError("transformer must be one for text; got one for classes")
    width = config.caption_channels if text_encoder is None else text_encoder.config.d_model
    if config.caption_channels != width:
        raise ValueError(
            f"transformer has caption_channels {config.caption_channels}, but text_encoder "
            f"has width {width}"
        )
    compression(vae)
    channels = vae.config.get("latent_channels", vae.config.get("z_dim"))
    if channels is not None and config.in_channels != channels:
        raise ValueError(
            f"transformer has in_channels {config.in_channels}, but vae has {channels} "
            "latent channels"
        )


def _settings(scheduler: Any) -> tuple[type, dict[str, Any]]:
    """Its class, and its configuration without what diffusers notes about the file."""
    return type(scheduler), {k: v for k, v in scheduler.config.items() if not k.startswith("_")}
