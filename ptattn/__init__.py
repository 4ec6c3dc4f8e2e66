"""Proxy-tokenized attention for diffusion transformers (PT-DiT, arXiv 2409.04005)."""

__version__ = "0.1.0"

from . import checkpoint, flops, models
from .explanation import explain
from .geometry import WindowGrid
from .graphs import graphed
from .layers import GlobalInteraction, TextureComplement
from .models.fuse import fuse, unfuse
from .ops import attention, window_attention, window_mean
from .proxy_attention import ProxyAttention
from .replace import AttentionReport, replace_attention, restore_attention
from .replaced import load_replaced, save_replaced

__all__ = [
    "AttentionReport",
    "GlobalInteraction",
    "ProxyAttention",
    "TextureComplement",
    "WindowGrid",
    "attention",
    "checkpoint",
    "explain",
    "flops",
    "fuse",
    "graphed",
    "load_replaced",
    "models",
    "replace_attention",
    "restore_attention",
    "save_replaced",
    "unfuse",
    "window_attention",
    "window_mean",
]
