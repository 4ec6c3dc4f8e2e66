"""PT-DiT and its full-attention baselines, by class or by published name."""

from __future__ import annotations

import dataclasses
from typing import Any

from torch import nn

from .condition import PreparedCaption
from .configs import DIT, PIXART, PT_DIT, ModelConfig
from .dit import DiT
from .pixart import PixArt
from .pt_dit import PTDiT

__all__ = [
    "DiT",
    "ModelConfig",
    "PTDiT",
    "PixArt",
    "PreparedCaption",
    "create_model",
    "find_model",
    "get_config",
    "list_models",
]

_FAMILIES = ((PTDiT, PT_DIT), (DiT, DIT), (PixArt, PIXART))


def list_models() -> list[str]:
    """The names that `create_model` takes."""
    return [name for _, configs in _FAMILIES for name in configs]


def find_model(name: str) -> tuple[type[PTDiT | DiT | PixArt], ModelConfig]:
    """The class and the configuration of a published model."""
    for family, configs in _FAMILIES:
        if name in configs:
            return family, configs[name]
    raise ValueError(f"name must be one of {', '.join(list_models())}; got {name!r}")


def get_config(name: str) -> ModelConfig:
    """The configuration of a published model."""
    return find_model(name)[1]


def create_model(name: str, *, backend: str = "auto", **overrides: Any) -> nn.Module:
    """Create a published model with fresh weights.

    Args:
        name: one of `list_models()`.
        backend: of every attention, "auto", "reference", "sdpa" or "triton".
        **overrides: fields of `ModelConfig` to replace, such as window=(1, 4, 4) or depth=2.

    Raises:
        ValueError: an unknown name or field, or a value that the model cannot have.

    Examples:
        >>> model = create_model("pt-dit-b", depth=2)
    """
    family, config = find_model(name)
    known = [field.name for field in dataclasses.fields(config)]
    if unknown := sorted(set(overrides) - set(known)):
        raise ValueError(f"unknown overrides {', '.join(unknown)}; known: {', '.join(known)}")
    return family(dataclasses.replace(config, **overrides), backend=backend)
