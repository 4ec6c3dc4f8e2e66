"""The released weights' layout in and out.

The release is the state dict of the authors' `pt_dit_diffusers.py` with a dictionary of sizes. It
keeps queries, keys and values in separate layers and each block's modulation in two tables; ours
are packed, so each of our tensors is one or several of theirs stacked along the first axis.
"""

from __future__ import annotations

import pickle
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .models import ModelConfig, PTDiT

# Our layer and the released layers that it stacks; each has a weight and a bias.
_MODEL_LAYERS = {
    "patch_embed.proj": ("pos_embed.proj",),
    "condition.timestep.mlp.0": ("adaln_single.emb.timestep_embedder.linear_1",),
    "condition.timestep.mlp.2": ("adaln_single.emb.timestep_embedder.linear_2",),
    "condition.modulation.1": ("adaln_single.linear",),
    "condition.caption.0": ("caption_projection.linear_1",),
    "condition.caption.2": ("caption_projection.linear_2",),
    "output.proj": ("proj_out",),
}
_BLOCK_LAYERS = {
    "global_interaction.zero": ("linear_1_visual",),
    "texture_complement.zero": ("linear_2",),
    "mlp.0": ("ff.net.0.proj",),
    "mlp.2": ("ff.net.2",),
}
_SELF_ATTENTIONS = {
    "global_interaction.proxy_attn": "proxy_attn1",
    "texture_complement.window_attn": "attn1",
    "texture_complement.shifted_attn": "attn3",
}
_CROSS_ATTENTIONS = {"global_interaction.cross_attn": "pvisual_attn2", "text_attn": "attn2"}

# The released configuration's keys and our fields; the second set says nothing about the model.
_CONFIG = {
    "num_layers": "depth",
    "num_heads": "num_heads",
    "window": "window",
    "proxy_window": "proxy_window",
    "shift_window": "shift",
    "in_channels": "in_channels",
    "out_channels": "out_channels",
    "patch_size": "patch_size",
    "sample_size": "sample_size",
    "caption_channels": "caption_channels",
}
_CONFIG_UNUSED = {"name", "latent_shape", "grid", "text_len"}


def from_official(
    state_dict: Mapping[str, Tensor], config: Mapping[str, Any], *, backend: str = "auto"
) -> PTDiT:
    """Build a PTDiT from the released model's weights.

    Args:
        state_dict: tensors by released name, such as `transformer_blocks.0.attn1.to_q.weight`.
        config: num_layers, num_heads, head_dim, window, proxy_window, shift_window, in_channels,
            out_channels, patch_size, sample_size, caption_channels; name, latent_shape, grid and
            text_len are accepted and unused.
        backend: of every attention.

    Returns:
        A model that shares no memory with `state_dict` and has its dtype and device.

    Raises:
        ValueError: every unknown or missing key of `config`, or every unknown, missing or
            misshapen tensor.
    """
    with torch.device("meta"):
        model = PTDiT(_model_config(config), backend=backend)
    _check_tensors(state_dict, to_official(model))
    own = {}
    for name, parts in _stacks(model.config.depth):
        stacked = torch.cat([state_dict[part] for part in parts])
        own[name] = stacked.reshape(model.get_parameter(name).shape)
    model.load_state_dict(own, assign=True)
    return model


def to_official(model: PTDiT) -> dict[str, Tensor]:
    """The model's weights by their released names, as views of its parameters.

    Raises:
        ValueError: a class-conditional model, which the release has no layout for.
    """
    if model.config.num_classes is not None:
        raise ValueError("the released layout is for text models; got a class-conditional one")
    theirs: dict[str, Tensor] = {}
    for name, parts in _stacks(model.config.depth):
        tensor = model.get_parameter(name).detach()
        if name.endswith("modulation.table"):
            pieces = tensor.flatten(0, 1).split([6, 3])
        else:
            pieces = tensor.chunk(len(parts))
        theirs.update(zip(parts, pieces, strict=True))
    return theirs


def load_official(path: str | Path, config: Mapping[str, Any], *, backend: str = "auto") -> PTDiT:
    """`from_official` on a file: .safetensors, or .pt / .pth / .bin read with `weights_only=True`.

    Raises:
        FileNotFoundError: no such file.
        ValueError: another ending, a corrupt or truncated file, or content that `from_official`
            refuses.
        ImportError: .safetensors without the safetensors package (`pip install ptattn[hub]`).
    """
    path = Path(path)
    if path.suffix not in (".safetensors", ".pt", ".pth", ".bin"):
        raise ValueError(f"path must end in .safetensors, .pt, .pth or .bin; got {path}")
    if not path.is_file():
        raise FileNotFoundError(f"no checkpoint file at {path}")
    read = _read_safetensors if path.suffix == ".safetensors" else _read_pickle
    return from_official(read(path), config, backend=backend)


def _stacks(depth: int) -> Iterator[tuple[str, tuple[str, ...]]]:
    """Every parameter of ours and the released tensors that it stacks."""
    layers: dict[str, tuple[str, ...]] = dict(_MODEL_LAYERS)
    yield "output.table", ("scale_shift_table",)
    for i in range(depth):
        ours, theirs = f"blocks.{i}.", f"transformer_blocks.{i}."
        tables = ("scale_shift_table", "proxy_scale_shift_table")
        yield f"{ours}modulation.table", tuple(theirs + t for t in tables)
        for name, parts in _block_layers().items():
            layers[ours + name] = tuple(theirs + part for part in parts)
    for name, parts in layers.items():
        for kind in ("weight", "bias"):
            yield f"{name}.{kind}", tuple(f"{part}.{kind}" for part in parts)


def _block_layers() -> dict[str, tuple[str, ...]]:
    layers: dict[str, tuple[str, ...]] = dict(_BLOCK_LAYERS)
    for ours, theirs in (_SELF_ATTENTIONS | _CROSS_ATTENTIONS).items():
        q, k, v = (f"{theirs}.to_{letter}" for letter in "qkv")
        if ours in _SELF_ATTENTIONS:
            layers[f"{ours}.qkv"] = (q, k, v)
        else:
            layers[f"{ours}.q"], layers[f"{ours}.kv"] = (q,), (k, v)
        layers[f"{ours}.proj"] = (f"{theirs}.to_out.0",)
    return layers


def _model_config(config: Mapping[str, Any]) -> ModelConfig:
    needed = {*_CONFIG, "head_dim"}
    unknown, missing = set(config) - needed - _CONFIG_UNUSED, needed - set(config)
    if unknown or missing:
        raise ValueError("config does not fit: " + _listing(unknown=unknown, missing=missing))
    fields = {ours: config[theirs] for theirs, ours in _CONFIG.items()}
    return ModelConfig(dim=config["num_heads"] * config["head_dim"], **fields)


def _check_tensors(given: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> None:
    misshapen = {
        f"{name} (got {tuple(given[name].shape)}, expected {tuple(tensor.shape)})"
        for name, tensor in wanted.items()
        if name in given and given[name].shape != tensor.shape
    }
    unknown, missing = set(given) - set(wanted), set(wanted) - set(given)
    if unknown or missing or misshapen:
        found = _listing(unknown=unknown, missing=missing, misshapen=misshapen)
        raise ValueError("state_dict does not fit the configuration: " + found)
    kinds = {(t.dtype, t.device) for t in given.values()}
    if len(kinds) > 1:
        found = ", ".join(sorted(f"{dtype} on {device}" for dtype, device in kinds))
        raise ValueError(f"state_dict must have one dtype and device; got {found}")


def _listing(**groups: set[str]) -> str:
    return "; ".join(f"{name}: {', '.join(sorted(keys))}" for name, keys in groups.items() if keys)


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        from safetensors import SafetensorError
        from safetensors.torch import load_file
    except ImportError as error:
        raise ImportError(f"reading {path} needs safetensors: pip install ptattn[hub]") from error
    try:
        return load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path} is not a whole safetensors file: {error}") from error


def _read_pickle(path: Path) -> dict[str, Tensor]:
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError) as error:
        raise ValueError(f"{path} is not a whole file of plain tensors: {error}") from error
    if not isinstance(content, dict) or not all(isinstance(t, Tensor) for t in content.values()):
        raise ValueError(f"{path} must hold a dictionary of tensors; got {type(content).__name__}")
    return content
