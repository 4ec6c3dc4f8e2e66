"""PTDiT as a component of diffusers' pipelines."""

from __future__ import annotations

import inspect
from typing import Any

from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config

from ..models import ModelConfig, PTDiT


class PTDiTTransformer(PTDiT, ModelMixin, ConfigMixin):
    """A PTDiT with diffusers' `from_pretrained` and `save_pretrained`.

    The weights have PTDiT's names, so `from_pretrained` reads what `ptattn.checkpoint.save_model`
    and `ptattn convert` write, and `ptattn.checkpoint.load_model` what `save_pretrained` writes.

    Args:
        **sizes: the fields of `ModelConfig`.

    Example:
        >>> model = PTDiTTransformer.from_pretrained("folder", torch_dtype=torch.bfloat16)
    """

    config: ModelConfig = None  # type: ignore[assignment]  # hides diffusers' read-only property

    def __init__(self, **sizes: Any) -> None:
        for name, value in sizes.items():
            if isinstance(value, list):  # as JSON has a window
                sizes[name] = tuple(value)
        super().__init__(ModelConfig(**sizes))

    # diffusers takes the names and defaults of what it saves from the signature.
    __init__.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
        [
            *list(inspect.signature(__init__).parameters.values())[:1],
            *inspect.signature(ModelConfig).parameters.values(),
        ]
    )
    __init__ = register_to_config(__init__)
