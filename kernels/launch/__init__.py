"""The host side of the kernels: shapes, outputs, configurations, launches. No math."""

from ..runtime import INTERPRETED, TRITON, KernelError, Launch, record
from .attention import (
    FEW_KEYS,
    attention,
    attention_backward,
    loops_over_windows,
    window_attention,
    window_attention_backward,
)
from .norms import norm, norm_backward, total_dtype, window_mean, window_mean_backward
from .shared import MAX_WINDOW, alignment, geometry, split_channels

__all__ = [
    "FEW_KEYS",
    "INTERPRETED",
    "MAX_WINDOW",
    "TRITON",
    "KernelError",
    "Launch",
    "alignment",
    "attention",
    "attention_backward",
    "geometry",
    "loops_over_windows",
    "norm",
    "norm_backward",
    "record",
    "split_channels",
    "total_dtype",
    "window_attention",
    "window_attention_backward",
    "window_mean",
    "window_mean_backward",
]
