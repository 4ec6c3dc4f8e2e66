"""Whether the components of a pipeline, and the arguments of a call, fit; what shape they make."""

from __future__ import annotations

from collections.abc import Sequence
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


def check_fit(transformer: Any, text_encoder: Any, vae: Any, tile_vae: bool) -> None:
    """Whether three components agree; there may be no text encoder.

    Raises:
        TypeError: another transformer.
        ValueError: widths that differ, a transformer for classes, an autoencoder that does not say
            how much it compresses, or has no tiles where they are wanted.
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
    if tile_vae and not hasattr(vae, "use_tiling"):
        raise ValueError(f"tile_vae needs an autoencoder with tiles; {type(vae).__name__} has none")


def latent_shape(
    transformer: Any, vae: Any, height: int, width: int, num_frames: int | None
) -> tuple[int, ...]:
    """(C, f, h, w) of what a call draws.

    Raises:
        ValueError: sizes that are no whole latents or patches.
    """
    temporal, spatial = compression(vae)
    config, frames = transformer.config, 1 if num_frames is None else num_frames
    check_numbers(height=height, width=width, num_frames=frames)
    side = spatial * config.patch_size
    if height % side or width % side:
        raise ValueError(f"height and width must be multiples of {side}; got {height}, {width}")
    if (frames - 1) % temporal:
        raise ValueError(f"num_frames must be 1 more than a multiple of {temporal}; got {frames}")
    latent_frames = 1 + (frames - 1) // temporal
    return config.in_channels, latent_frames, height // spatial, width // spatial


def check_numbers(**numbers: Any) -> None:
    """Raise ValueError unless all are positive integers."""
    for name, number in numbers.items():
        if isinstance(number, bool) or not isinstance(number, int) or number < 1:
            raise ValueError(f"{name} must be a positive integer; got {number!r}")


def check_known(name: str, values: Sequence[str], known: Sequence[str]) -> None:
    """Raise ValueError unless all values are known."""
    if unknown := [value for value in values if value not in known]:
        raise ValueError(f"{name}: {', '.join(map(repr, unknown))} not in {', '.join(known)}")


def _settings(scheduler: Any) -> tuple[type, dict[str, Any]]:
    """Its class, and its configuration without what diffusers notes about the file."""
    return type(scheduler), {k: v for k, v in scheduler.config.items() if not k.startswith("_")}
