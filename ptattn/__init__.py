"""Proxy-tokenized attention for diffusion transformers (PT-DiT, arXiv 2409.04005)."""

__version__ = "0.1.0"

from . import checkpoint, flops, models
from .geometry import WindowGrid
from .layers import GlobalInteraction, ProxyAttention, TextureComplement
from .ops import attention, explain, window_attention, window_mean

__all__ = [
    "GlobalInteraction",
    "ProxyAttention",
    "TextureComplement",
    "WindowGrid",
    "attention",
    "checkpoint",
    "explain",
    "flops",
    "models",
    "window_attention",
    "window_mean",
]
