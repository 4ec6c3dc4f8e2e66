"""Data from a function of your own, which `data.source` names as "module:function"."""

from __future__ import annotations

import dataclasses
import importlib
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from numbers import Integral
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..config import Config
from .dataset import Dataset


def own(config: Config) -> Dataset:
    """What `function(config: Config) -> Dataset` returns, checked against the configuration.

    Raises:
        ImportError: a module that cannot be imported, from the working directory either.
        ValueError: no such function, one that fails, or examples that do not fit.
    """
    source = config.data.source
    function = _function(source)
    try:
        data = function(config)
    except Exception as error:
        raise ValueError(f"data.source {source}: the function raised {_what(error)}") from error
    if not isinstance(data, Dataset):
        raise ValueError(
            f"data.source {source} must return a ptattn.train.data.Dataset; "
            f"got {type(data).__name__}"
        )
    if not len(data):
        raise ValueError(f"data.source {source} returned no example")
    wanted = "captions" if config.model.num_classes is None else f"labels of {data.classes}"
    for index, condition in enumerate(data.conditions):
        if not _fits(condition, data, config):
            raise ValueError(
                f"data.source {source}: the conditions must be {wanted}; "
                f"number {index} is {condition!r}"
            )
    checked = dataclasses.replace(
        data,
        # numpy's integers, too, are labels
        conditions=[int(one) if isinstance(one, Integral) else one for one in data.conditions],
        pixels=_checked(data.pixels, config),
    )
    checked.pixels(0)  # what does not fit is best known before the run begins
    return checked


def _function(source: str) -> Callable[[Config], Any]:
    module, _, name = source.partition(":")
    if "" not in sys.path and os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())  # as `python -m ptattn` has it
    try:
        found = getattr(importlib.import_module(module), name, None)
    except Exception as error:
        raise ImportError(
            f"data.source {source}: cannot import {module}: {_what(error)}"
        ) from error
    if not callable(found):
        raise ValueError(f"data.source {source}: {module} has no function {name}")
    return found


def _what(error: Exception) -> str:
    """An exception in one line, with the place where it was raised."""
    *_, last = traceback.extract_tb(error.__traceback__)
    return f"{type(error).__name__}: {error} ({Path(last.filename).name}, line {last.lineno})"


def _fits(condition: Any, data: Dataset, config: Config) -> bool:
    if config.model.num_classes is not None:
        return isinstance(condition, Integral) and 0 <= int(condition) < len(data.classes)
    if isinstance(condition, str):
        return True
    texts = condition if isinstance(condition, Sequence) else ()
    return bool(texts) and all(isinstance(text, str) for text in texts)


def _checked(pixels: Callable[[int], Tensor], config: Config) -> Callable[[int], Tensor]:
    def checked(index: int) -> Tensor:
        try:
            found = pixels(index)
        except Exception as error:
            raise ValueError(
                f"data.source {config.data.source}: pixels({index}) raised {_what(error)}"
            ) from error
        tensor = isinstance(found, Tensor)
        if not tensor or found.dtype != torch.uint8 or found.shape != config.shape:
            got = f"{found.dtype} {tuple(found.shape)}" if tensor else type(found).__name__
            raise ValueError(
                f"data.source {config.data.source}: pixels must be torch.uint8 {config.shape}; "
                f"those of example {index} are {got}"
            )
        return found

    return checked
