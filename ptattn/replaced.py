"""Models whose attention was replaced, on disk: what was replaced by what, beside the weights.

The host's own `save_pretrained` knows nothing of it, and its `from_pretrained` would make the old
attention again, with random weights. So nothing here is named as the host looks for it, but for a
diffusers model's configuration.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from torch import Tensor, nn

from . import files, state_dicts
from .replace import ReplacedAttention, replace_attention, restore_attention

RECORD_FILE = "replaced_attention.json"
WEIGHTS_FILE = "replaced_model.safetensors"

Model = TypeVar("Model", bound=nn.Module)


def _are(kind: type, value: object) -> bool:
    return isinstance(value, list) and bool(value) and all(type(v) is kind for v in value)


# What is recorded of attentions that were replaced alike, and how to tell that it is.
_RECORDED: dict[str, Callable[[Any], bool]] = {
    "names": partial(_are, str),
    "window": partial(_are, int),
    "proxy_window": partial(_are, int),
    "grid": lambda value: value is None or _are(int, value),
    "backend": lambda value: isinstance(value, str),
}


def save_replaced(model: nn.Module, folder: str | Path) -> None:
    """Write a model whose attention `replace_attention` has replaced, for `load_replaced`.

    The folder gets replaced_attention.json, which says what was replaced by what, all weights in
    replaced_model.safetensors and, for a model of diffusers, its config.json. Weights that are
    shared, as of one module in two places, are written for each.

    Raises:
        TypeError: a model within a wrapper, such as DDP's.
        ValueError: nothing in the model was replaced, or it has adapters.
        OSError: a folder or file that cannot be written, such as on a full disk.
        ImportError: no safetensors (`pip install ptattn[hub]`).
    """
    if len(model._modules) == 1 and (inner := {"module", "_orig_mod"} & model._modules.keys()):
        raise TypeError(f"model is within a {type(model).__name__}: give its .{inner.pop()}")
    groups: dict[str, dict[str, Any]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if type(module).__module__.startswith("peft."):
            raise ValueError(f"{name or 'the model'} has adapters: merge them first")
        if isinstance(module, ReplacedAttention):
            options = module.options()
            group = groups.setdefault(repr(options), {"names": [], **options})
            group["names"].append(state_dicts.plain_name(name))
    if not groups:
        raise ValueError(f"{type(model).__name__} has no attention that replace_attention made")
    weights: dict[str, Tensor] = {}
    memories = set()
    for name, tensor in model.state_dict().items():
        # safetensors takes no memory twice, as of tied weights or of one module in two places.
        memory = tensor.untyped_storage().data_ptr()
        weights[state_dicts.plain_name(name)] = tensor.clone() if memory in memories else tensor
        memories.add(memory)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    files.write_tensors(weights, folder / WEIGHTS_FILE)
    files.write_json({"replaced": list(groups.values())}, folder / RECORD_FILE)
    if callable(save_config := getattr(model, "save_config", None)):
        save_config(folder)


def load_replaced(model: type[Model] | Model, folder: str | Path) -> Model:
    """Read a model that `save_replaced` has written.

    Args:
        model: its class, for a model of diffusers; or, such as of timm, a model made as that one
            was before anything was replaced, which is changed in place.
        folder: as `save_replaced` wrote it.

    Returns:
        The model that was given. Of a class: a new one in eval mode, on the CPU and in the saved
        dtype, which has no old attention for `restore_attention`.

    Raises:
        TypeError: neither an nn.Module nor a class of diffusers'.
        FileNotFoundError: a file is missing.
        ValueError: the model has other attentions or weights than the one saved, or something in it
            was replaced; a file that `save_replaced` has not written so. It is then as it was.
        ImportError: no safetensors (`pip install ptattn[hub]`).

    Examples:
        >>> ptattn.save_replaced(model, "folder")
        >>> model = ptattn.load_replaced(PixArtTransformer2DModel, "folder")
    """
    folder = Path(folder)
    groups = _read_record(folder / RECORD_FILE)
    weights = files.read_tensors(folder / WEIGHTS_FILE)
    if isinstance(model, nn.Module):
        _fit(model, groups, weights, folder)
        model.load_state_dict(weights)
        return model
    family: Any = model
    if not hasattr(family, "from_config"):
        raise TypeError(f"model must be an nn.Module or a class of diffusers'; got {model!r}")
    made: Model = family.from_config(family.load_config(folder))
    _fit(made, groups, weights, folder)
    dtype, *others = {t.dtype for t in weights.values() if t.is_floating_point()}
    if not others:
        made.to(dtype)  # what is in no state dict, too
    made.load_state_dict(weights, assign=True)
    for module in made.modules():
        if isinstance(module, ReplacedAttention):
            module.drop_old()
    return made.eval()


def _read_record(path: Path) -> list[dict[str, Any]]:
    content = files.read_json(path)
    groups = content.pop("replaced", None)
    if content or not groups or not isinstance(groups, list):
        raise ValueError(f"{path} must have a list `replaced` and nothing else")
    for group in groups:
        if not isinstance(group, dict) or group.keys() != _RECORDED.keys():
            raise ValueError(f"{path} must give {', '.join(_RECORDED)} of each group; got {group}")
        for key, fits in _RECORDED.items():
            if not fits(group[key]):
                raise ValueError(f"{path}: {key} is not as it is saved; got {group[key]!r}")
    return groups


def _fit(model: nn.Module, groups: Any, weights: dict[str, Tensor], folder: Path) -> None:
    """Replace in a model what was replaced in the one saved."""
    name = type(model).__name__
    if any(isinstance(module, ReplacedAttention) for module in model.modules()):
        raise ValueError(f"attention in this {name} is replaced already: load into a fresh one")
    there = {path for path, _ in model.named_modules(remove_duplicate=False)}
    missing = {path for group in groups for path in group["names"]} - there
    state_dicts.refuse(
        f"{name} has not all attention that was replaced in {folder}", missing=missing
    )
    try:
        for group in groups:
            match = "|".join(map(re.escape, group.pop("names")))
            replace_attention(model, match=match, **group)
        why = f"{WEIGHTS_FILE} does not fit this {name}"
        state_dicts.check(weights, model.state_dict(), why)
    except ValueError as error:
        if any(isinstance(module, ReplacedAttention) for module in model.modules()):
            restore_attention(model)
        raise ValueError(f"{folder}: {error}") from error
