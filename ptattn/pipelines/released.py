"""The released text-to-image model, with the settings of its own script."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import AutoTokenizer, T5EncoderModel

from ..flow import FLOW
from .causal_vae import CausalVAE
from .pipeline import PTDiTPipeline
from .transformer import PTDiTTransformer


def qihoo_t2i(
    text: str | Path, transformer: str | Path, vae: str | Path, dtype: torch.dtype = torch.bfloat16
) -> PTDiTPipeline:
    """A pipeline of Qihoo-T2I: T5 in float32, captions cleaned, the autoencoder in tiles.

    200 tokens, 30 steps, guidance 4 and the schedule shifted by the resolution are defaults of
    every call. `save_pretrained` keeps all of it but the dtypes: `from_pretrained` takes them as
    `dtype={"default": torch.bfloat16, "text_encoder": torch.float32}`.

    Args:
        text: a folder, or a name on the Hub, with T5 in `text_encoder` and `tokenizer`.
        transformer, vae: folders that `ptattn convert` and `ptattn convert --vae` write.
        dtype: of the transformer and the autoencoder.

    Raises:
        OSError: a folder without its files.
        ValueError: components that do not fit each other.
        ImportError: no ftfy or BeautifulSoup, which clean captions.

    Examples:
        >>> pipeline = qihoo_t2i("t5", "qihoo-t2i", "vae")
        >>> pipeline("a lighthouse at dusk").images[0].save("out.png")
    """
    return PTDiTPipeline(
        tokenizer=AutoTokenizer.from_pretrained(text, subfolder="tokenizer"),
        text_encoder=T5EncoderModel.from_pretrained(
            text, subfolder="text_encoder", dtype=torch.float32
        ),
        transformer=PTDiTTransformer.from_pretrained(transformer, dtype=dtype),
        vae=CausalVAE.from_pretrained(vae, dtype=dtype),
        scheduler=FLOW.scheduler(),
        clean_caption=True,
        tile_vae=True,
    )
