"""PTDiT as a component of diffusers' pipelines."""

from __future__ import annotations

import dataclasses
import inspect
from typing import Any, ClassVar

from diffusers import ConfigMixin, ModelMixin
from diffusers.loaders import PeftAdapterMixin

from .. import backends
from ..models import ModelConfig, PTDiT


class PTDiTTransformer(PTDiT, ModelMixin, ConfigMixin, PeftAdapterMixin):
    """A PTDiT with what diffusers' models have: `from_pretrained` and `save_pretrained`, `config`
    as a mapping, adapters (`add_adapter`, `load_lora_adapter` and so on, by peft), quantized and
    offloaded weights, `enable_gradient_checkpointing`, `compile_repeated_blocks`.

    The weights have PTDiT's names, so `from_pretrained` reads what `ptattn.checkpoint.save_model`
    and `ptattn convert` write, and `ptattn.checkpoint.load_model` what `save_pretrained` writes.

    Args:
        **sizes: the fields of `ModelConfig`.

    Examples:
        >>> model = PTDiTTransformer.from_pretrained("folder", dtype=torch.bfloat16)
    """

    # The fields of `model_config`, and what diffusers notes beside them.
    config = ConfigMixin.config

    def __init__(self, **sizes: Any) -> None:
        super().__init__(ModelConfig(**sizes))
        ConfigMixin.register_to_config(self, **dataclasses.asdict(self.model_config))

    # diffusers takes the names of what it reads from a file from the signature.
    __init__.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
        [
            *list(inspect.signature(__init__).parameters.values())[:1],
            *inspect.signature(ModelConfig).parameters.values(),
        ]
    )

    _supports_gradient_checkpointing = True
    _repeated_blocks: ClassVar[list[str]] = ["PTDiTBlock"]
    # What reads parameters of its own, or of a layer before its hooks have run, beside its layers.
    _no_split_modules: ClassVar[list[str]] = [
        *("PTDiTBlock", "PatchEmbed", "TextCondition", "ClassCondition", "Output")
    ]
    # These read a layer's dtype before its hooks have run.
    _skip_layerwise_casting_patterns = ("patch_embed", "condition.timestep")

    def set_attention_backend(self, backend: str) -> None:
        """Choose what every attention runs on, by this package's names, not diffusers'.

        Args:
            backend: "auto", "reference", "sdpa" or "triton".

        Raises:
            ValueError: another name.
        """
        backends.check(backend)
        for module in self.modules():
            if "backend" in vars(module):
                module.backend = backend  # type: ignore[assignment]

    def reset_attention_backend(self) -> None:
        """Back to "auto"."""
        self.set_attention_backend("auto")

    def enable_gradient_checkpointing(self, gradient_checkpointing_func: None = None) -> None:
        """`blocks.checkpoint()` by diffusers' name; it takes no function of another kind."""
        if gradient_checkpointing_func is not None:
            raise ValueError("gradient_checkpointing_func must be None: the blocks bring their own")
        self.blocks.checkpoint()

    def disable_gradient_checkpointing(self) -> None:
        self.blocks.checkpoint(False)

    @property
    def is_gradient_checkpointing(self) -> bool:
        return self.blocks.checkpointed
