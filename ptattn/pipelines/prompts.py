"""What a call says of its captions: texts or embeddings, each with a negative one."""

from __future__ import annotations

import importlib.util
from typing import Any

import torch
from diffusers import PixArtAlphaPipeline
from diffusers.utils import logging
from torch import Tensor

from ..models.inputs import check_mask

logger = logging.get_logger(__name__)


def as_texts(name: str, value: Any) -> list[str]:
    """One or several texts as a list.

    Raises:
        TypeError: neither a string nor a list of strings.
        ValueError: an empty list.
    """
    texts = [value] if isinstance(value, str) else value
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        raise TypeError(f"{name} must be a string or a list of strings; got {value!r}")
    if not texts:
        raise ValueError(f"{name} must hold at least one text; got an empty list")
    return texts


def as_negatives(value: Any, count: int) -> list[str]:
    """A negative text for each of `count` prompts; None is the empty text."""
    if value is None or isinstance(value, str):
        return [value or ""] * count
    return as_texts("negative_prompt", value)


def check_cleaning() -> None:
    """Raise ImportError unless captions can be cleaned.

    diffusers would leave them as they are, with a warning.
    """
    for package, module in (("ftfy", "ftfy"), ("beautifulsoup4", "bs4")):
        if importlib.util.find_spec(module) is None:
            raise ImportError(f"clean_caption needs {package}: pip install ptattn[t2x]")


def clean(texts: list[str]) -> list[str]:
    """Texts as PixArt-α's are cleaned, twice, by diffusers' own function."""
    check_cleaning()
    # It needs nothing of the pipeline that it is a method of.
    pixart = PixArtAlphaPipeline.__new__(PixArtAlphaPipeline)
    cleaned: list[str] = pixart._text_preprocessing(texts, clean_caption=True)
    return cleaned


def check_prompts(
    channels: int,
    prompt: Any,
    negative_prompt: Any,
    embeds: Tensor | None,
    mask: Tensor | None,
    negative_embeds: Tensor | None,
    negative_mask: Tensor | None,
) -> int:
    """How many prompts a call has.

    Raises:
        TypeError: texts that are none; a mask that is neither bool nor integer.
        ValueError: texts and embeddings, or neither; embeddings without a mask; other shapes than
            (B, T, channels) and (B, T); other negative ones than prompts.
    """
    _check_one("prompt", prompt, embeds, mask, channels)
    _check_one("negative_prompt", negative_prompt, negative_embeds, negative_mask, channels)
    if prompt is None and embeds is None:
        raise ValueError("give prompt or prompt_embeds; got neither")
    count = len(as_texts("prompt", prompt)) if embeds is None else len(embeds)
    if negative_embeds is None:
        negatives = len(as_negatives(negative_prompt, count))
        if negatives != count:
            raise ValueError(
                f"negative_prompt must be one text, or one for each of {count} prompts; "
                f"got {negatives}"
            )
    elif embeds is None or embeds.shape != negative_embeds.shape:
        shape = "no prompt_embeds" if embeds is None else tuple(embeds.shape)
        raise ValueError(
            "negative_prompt_embeds must have the shape of prompt_embeds; "
            f"got {tuple(negative_embeds.shape)} and {shape}"
        )
    return count


def _check_one(
    name: str, text: Any, embeds: Tensor | None, mask: Tensor | None, channels: int
) -> None:
    if text is not None and embeds is not None:
        raise ValueError(f"give {name} or {name}_embeds; got both")
    if embeds is None or mask is None:
        if embeds is not mask:  # without a mask, padding would be attended to
            raise ValueError(f"{name}_embeds and {name}_attention_mask go together; got one alone")
        return
    if embeds.ndim != 3 or embeds.shape[-1] != channels or not len(embeds):
        raise ValueError(
            f"{name}_embeds must have shape (B, T, {channels}); got {tuple(embeds.shape)}"
        )
    check_mask(f"{name}_attention_mask", mask)
    if mask.shape != embeds.shape[:2]:
        raise ValueError(
            f"{name}_attention_mask must have shape (B, T) = {tuple(embeds.shape[:2])}; "
            f"got {tuple(mask.shape)}"
        )


def encode_texts(
    tokenizer: Any,
    text_encoder: Any,
    device: torch.device,
    name: str,
    texts: list[str],
    length: int,
) -> tuple[Tensor, Tensor]:
    """The embeddings of texts cut or padded to `length` tokens, (B, T, C), and their mask (B, T).

    Raises:
        ValueError: no tokenizer or text encoder; `name` is that of the argument with the texts.
    """
    if tokenizer is None or text_encoder is None:
        without = ", or guidance_scale=1" if name == "negative_prompt" else ""
        raise ValueError(
            f"{name} needs the tokenizer and text_encoder that this pipeline is without; "
            f"give {name}_embeds{without}"
        )
    for text, ids in zip(texts, tokenizer(texts).input_ids, strict=True):
        if len(ids) > length:
            logger.warning(f"cut to {length} tokens of {len(ids)}: {text!r}")
    tokens = tokenizer(
        texts, padding="max_length", truncation=True, max_length=length, return_tensors="pt"
    ).to(device)
    mask = tokens.attention_mask
    return text_encoder(tokens.input_ids, attention_mask=mask).last_hidden_state, mask
