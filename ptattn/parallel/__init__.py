"""One sample over several GPUs: every rank has a box of the token grid, whole windows of it."""

from .shares import Cut, Share, find_cut
from .split import TokenSplit, join_tokens, split_tokens

__all__ = ["Cut", "Share", "TokenSplit", "find_cut", "join_tokens", "split_tokens"]
