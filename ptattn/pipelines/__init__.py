"""Text to image, video and views in diffusers' own form; needs `pip install ptattn[t2x]`."""

try:
    import diffusers as _diffusers  # noqa: F401
    import transformers as _transformers  # noqa: F401
except ImportError as error:
    raise ImportError(f"{error}; it comes with: pip install ptattn[t2x]") from error

from .autoencoder import compression, decode, encode
from .causal_vae import CausalVAE
from .pipeline import PTDiTPipeline, VideoPipelineOutput
from .released import qihoo_t2i
from .transformer import PTDiTTransformer

__all__ = [
    "CausalVAE",
    "PTDiTPipeline",
    "PTDiTTransformer",
    "VideoPipelineOutput",
    "compression",
    "decode",
    "encode",
    "qihoo_t2i",
]
