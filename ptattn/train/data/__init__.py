"""Data: what `data.source` names, and the stream of examples that a run sees."""

from __future__ import annotations

from collections.abc import Callable

from ..config import Config
from . import bundled, folders, meshes
from .conditions import Conditions
from .dataset import Dataset
from .own import own
from .stream import batches

__all__ = ["SOURCES", "Conditions", "Dataset", "batches", "load"]

SOURCES: dict[str, Callable[[Config], Dataset]] = {
    "mnist": bundled.mnist,
    "emoji": bundled.emoji,
    "clips": bundled.clips,
    "views": meshes.views,
    "images": folders.images,
    "videos": folders.videos,
    "latents": folders.latents,
}


def load(config: Config) -> Dataset:
    """The examples of `config.data`, each of `config.shape`, with the model's kind of condition.

    `data.source` is one of `SOURCES`, or a function of your own as "module:function": it takes the
    configuration and returns a `Dataset`.

    Raises:
        ValueError: an unknown source, no example that can be used, or another number of classes
            than the model's; the message says which files were left out and why.
        ImportError: the package that a source needs is not installed, or a module of your own
            cannot be imported.
        MemoryError: videos that the free memory cannot hold.
    """
    source = config.data.source
    if source not in SOURCES and ":" not in source:
        raise ValueError(
            f"data.source must be one of {', '.join(SOURCES)}, or module:function; got {source!r}"
        )
    if source in ("mnist", "emoji", "images") and config.data.frames > 1:
        raise ValueError(
            f"data.source {source} has no frames; got data.frames {config.data.frames}"
        )
    data = SOURCES.get(source, own)(config)
    if not len(data):
        reasons = [f"{path} {why}" for path, why in data.skipped[:5]] + ["...", *data.notes]
        raise ValueError(f"none of {len(data.skipped)} files can be used: {'; '.join(reasons)}")
    classes = config.model.num_classes
    if classes is not None and classes != len(data.classes):
        raise ValueError(
            f"the data has {len(data.classes)} classes ({', '.join(data.classes)}); "
            f"model.num_classes is {classes}"
        )
    return data
