"""Labels and captions as the model takes them."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from ..config import Config
from .captions import repair
from .dataset import need, package_folder

CHANNELS = 256
# No token is longer than 16 characters, and what lies four times as far changes none before it.
CHARACTERS_PER_TOKEN = 4 * 16


class Conditions:
    """Turns labels or captions into a model's arguments.

    A caption is the sequence of its tokens' embeddings in WordLlama (MIT): small, frozen, and
    without any notion of word order.

    Raises:
        ValueError: a text model for captions of another width.
        ImportError: no WordLlama, where captions are wanted.
    """

    def __init__(self, config: Config) -> None:
        self.classes, self.tokens = config.model.num_classes, config.data.text_tokens
        if self.classes is None and config.model.caption_channels != CHANNELS:
            raise ValueError(
                f"model.caption_channels must be {CHANNELS}, the width of the text encoder; "
                f"got {config.model.caption_channels}"
            )
        if self.classes is None:
            package_folder("wordllama")  # to miss it before the first step

    def one(self, condition: int | str | None) -> dict[str, Tensor]:
        """Of one example, without batch; None is the null class or the empty caption."""
        if self.classes is not None:
            label = self.classes if condition is None else int(condition)
            return {"labels": torch.tensor(label)}
        text = repair(str(condition or "")[: CHARACTERS_PER_TOKEN * self.tokens])
        ids = _tokenizer().encode(text).ids[: self.tokens]
        caption = torch.zeros(self.tokens, CHANNELS)
        caption[: len(ids)] = _embeddings()[ids]
        return {"caption": caption, "caption_mask": torch.arange(self.tokens) < len(ids)}

    def batch(self, conditions: Sequence[int | str | None]) -> dict[str, Tensor]:
        return torch.utils.data.default_collate([self.one(condition) for condition in conditions])


@functools.cache
def _tokenizer():  # type: ignore[no-untyped-def]
    path = package_folder("wordllama") / "tokenizers/l2_supercat_tokenizer_config.json"
    return need("tokenizers").Tokenizer.from_file(str(path))


@functools.cache
def _embeddings() -> Tensor:
    """float16 (32000, 256)."""
    path = package_folder("wordllama") / f"weights/l2_supercat_{CHANNELS}.safetensors"
    return need("safetensors.torch").load_file(path)["embedding.weight"]
