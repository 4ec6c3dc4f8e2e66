"""Models on disk: our own folders, and the released weights' layout in and out.

A folder of ours holds a model as diffusers keeps a component: config.json and one safetensors file.

The release is the state dict of the authors' `pt_dit_diffusers.py` with a dictionary of sizes. It
keeps queries, keys and values in separate layers and each block's modulation in two tables; ours
are packed, so each of our tensors is one or several of theirs stacked along the first axis.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from . import files, state_dicts
from .models import DiT, ModelConfig, PixArt, PTDiT

CONFIG_FILE = "config.json"
WEIGHTS_FILE = f"{state_dicts.WEIGHTS}.safetensors"

Model = PTDiT | DiT | PixArt
_CLASSES: dict[str, type[Model]] = {family.__name__: family for family in (PTDiT, DiT, PixArt)}

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

# The released configuration's keys and our fields.
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
# The release's own JSON calls these two otherwise, states what its one architecture has, and more
# that says nothing about the model.
_CONFIG_ALIASES = {"compress_ratios": "window", "proxy_compress_ratios": "proxy_window"}
_CONFIG_FIXED = {
    "model_id": "ptdit",
    "dropout": 0.0,
    "attention_bias": True,
    "attention_type": "default",
    "activation_fn": "gelu-approximate",
    "norm_type": "ada_norm_single",
    "norm_elementwise_affine": False,
    "norm_eps": 1e-6,
}
_CONFIG_UNUSED = {
    *("name", "latent_shape", "grid", "text_len"),
    *("dtype", "from_pretrained", "cross_attention_dim", "frame"),
    *("norm_num_groups", "num_embeds_ada_norm", "upcast_attention"),
}

# What diffusers' EMAModel writes into the configuration of averaged weights.
_EMA_NUMBERS = {
    *("decay", "min_decay", "update_after_step", "use_ema_warmup", "inv_gamma", "power"),
    "optimization_step",
}


def save_model(model: Model, folder: str | Path) -> None:
    """Write a model to a folder: config.json and diffusion_pytorch_model.safetensors.

    This is the layout of a diffusers component. Both files are replaced whole or not at all.

    Raises:
        TypeError: another kind of model, or one within a wrapper, such as DDP's.
        ValueError: tensors that are not of its configuration, such as LoRA's, or quantized ones; a
            folder that holds shards.
        OSError: a folder or file that cannot be written, such as on a full disk.
        ImportError: no safetensors (`pip install ptattn[hub]`).
    """
    name = _family(model)
    weights = model.state_dict()
    with torch.device("meta"):
        plain = _CLASSES[name](model.model_config)
    state_dicts.check(
        weights,
        plain.state_dict(),
        "model has other tensors than its configuration: merge adapters, undo torch.compile(block)",
    )
    odd = {name for name, tensor in weights.items() if type(tensor) is not Tensor}
    state_dicts.refuse("model must have plain tensors, not quantized or sharded ones", got=odd)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / WEIGHTS_FILE
    if (other := state_dicts.find(folder).get("", path)).suffix == ".json":
        raise ValueError(f"{folder} holds the shards of {other.name}: remove them first")
    files.write_tensors(weights, path)
    config = {"_class_name": name, **dataclasses.asdict(model.model_config)}
    files.write_json(config, folder / CONFIG_FILE)


def load_model(folder: str | Path, *, variant: str | None = None, backend: str = "auto") -> Model:
    """Read a model that `save_model`, or diffusers' `save_pretrained`, has written.

    Args:
        folder: of config.json and diffusion_pytorch_model.safetensors, or the .bin of older
            diffusers, whole or in shards.
        variant: which weights, such as "fp16"; by default the plain ones, or the only ones.
        backend: of every attention.

    Returns:
        The model in its saved dtypes, on the CPU.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: unknown, missing or wrong entries of config.json, or unknown, missing or
            misshapen tensors; a corrupt or truncated file; several variants to choose from.
        ImportError: no safetensors (`pip install ptattn[hub]`).
    """
    folder = Path(folder)
    family, config = _own_config(folder / CONFIG_FILE)
    with torch.device("meta"):
        model = family(config, backend=backend)
    found, path = state_dicts.read_folder(folder, variant)
    own = model.state_dict()
    weights = state_dicts.unwrapped(found, own)
    state_dicts.check(weights, own, f"{path} does not fit the configuration")
    model.load_state_dict(weights, assign=True)
    return model


def from_official(
    state_dict: Mapping[str, Any],
    config: Mapping[str, Any],
    *,
    key: str | None = None,
    backend: str = "auto",
) -> PTDiT:
    """Build a PTDiT from the released model's weights.

    Args:
        state_dict: tensors by released name, such as `transformer_blocks.0.attn1.to_q.weight`, also
            within what a training script has saved, or with the prefixes of wrappers.
        config: num_layers, num_heads, head_dim, window, proxy_window, shift_window, in_channels,
            out_channels, patch_size, sample_size, caption_channels; or the "predictor" of the
            release's inference configuration, which has more keys.
        key: where state_dict holds several sets of weights, such as "ema".
        backend: of every attention.

    Returns:
        A model that shares no memory with `state_dict` and has its dtype and device.

    Raises:
        ValueError: unknown, missing or unsupported keys of `config`, or unknown, missing or
            misshapen tensors; no weights, or several sets and no key.
    """
    tensors = files.tensors_in(state_dict, "state_dict", key)
    return _from_official(tensors, config, backend, "state_dict")


def to_official(model: PTDiT) -> dict[str, Tensor]:
    """The model's weights by their released names, as views of its parameters.

    Raises:
        ValueError: a class-conditional model, which the release has no layout for, or one with
            other tensors than its own, such as LoRA's.
    """
    if model.model_config.num_classes is not None:
        raise ValueError("the released layout is for text models; got a class-conditional one")
    stacks = list(_stacks(model.model_config.depth))
    unknown = set(model.state_dict()) - {name for name, _ in stacks}
    state_dicts.refuse(
        "the released layout has no place for adapters: merge them first", unknown=unknown
    )
    theirs: dict[str, Tensor] = {}
    for name, parts in stacks:
        tensor = model.get_parameter(name).detach()
        if name.endswith("modulation.table"):
            pieces = tensor.flatten(0, 1).split([6, 3])
        else:
            pieces = tensor.chunk(len(parts))
        theirs.update(zip(parts, pieces, strict=True))
    return theirs


def official_config(config: ModelConfig) -> dict[str, Any]:
    """The dictionary that `from_official` takes for this configuration."""
    fields = {theirs: getattr(config, ours) for theirs, ours in _CONFIG.items()}
    return {**fields, "head_dim": config.dim // config.num_heads}


def load_official(
    path: str | Path, config: Mapping[str, Any], *, key: str | None = None, backend: str = "auto"
) -> PTDiT:
    """`from_official` on a file: .safetensors, or a pickle (.pt, .pth, .bin, .ckpt), read with
    `weights_only=True`.

    Raises:
        FileNotFoundError: no such file.
        ValueError: another ending, a corrupt or truncated file, or content that `from_official`
            refuses.
        ImportError: .safetensors without the safetensors package (`pip install ptattn[hub]`).
    """
    return _from_official(files.read_tensors(Path(path), key), config, backend, str(path))


def save_official(model: PTDiT, path: str | Path) -> None:
    """Write `to_official` to a file: .safetensors, or .pt / .pth / .bin / .ckpt.

    Raises:
        ValueError: another ending, a class-conditional model, adapters, or several dtypes.
        OSError: a file that cannot be written, such as on a full disk.
        ImportError: .safetensors without the safetensors package (`pip install ptattn[hub]`).
    """
    tensors = to_official(model)
    _check_one_kind(tensors, "model")
    files.write_tensors(tensors, Path(path))


def _from_official(
    tensors: Mapping[str, Tensor], config: Mapping[str, Any], backend: str, where: str
) -> PTDiT:
    with torch.device("meta"):
        model = PTDiT(_model_config(config), backend=backend)
    wanted = to_official(model)
    tensors = state_dicts.unwrapped(tensors, wanted)
    state_dicts.check(tensors, wanted, f"{where} does not fit the configuration")
    _check_one_kind(tensors, where)
    own = {}
    for name, parts in _stacks(model.model_config.depth):
        stacked = torch.cat([tensors[part] for part in parts])
        own[name] = stacked.reshape(model.get_parameter(name).shape)
    model.load_state_dict(own, assign=True)
    return model


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
    given = {_CONFIG_ALIASES.get(key, key): value for key, value in config.items()}
    needed = {*_CONFIG, "head_dim"}
    unsupported = {
        f"{key} (got {given[key]!r}, expected {value!r})"
        for key, value in _CONFIG_FIXED.items()
        if given.get(key, value) != value
    }
    state_dicts.refuse(
        "config does not fit",
        unknown=set(given) - needed - set(_CONFIG_FIXED) - _CONFIG_UNUSED,
        missing=needed - set(given),
        unsupported=unsupported,
    )
    fields = {ours: given[theirs] for theirs, ours in _CONFIG.items()}
    return ModelConfig(dim=given["num_heads"] * given["head_dim"], **fields)


def _family(model: nn.Module) -> str:
    for name, family in _CLASSES.items():
        if isinstance(model, family):
            return name
    message = f"model must be a {', '.join(_CLASSES)}; got {type(model).__name__}"
    inner = model.named_modules() if isinstance(model, nn.Module) else ()
    for path, module in inner:
        if isinstance(module, tuple(_CLASSES.values())):
            message += f", which holds a {type(module).__name__}: give its .{path}"
            break
    raise TypeError(message)


def _check_one_kind(tensors: Mapping[str, Tensor], where: str) -> None:
    """What stacks tensors cannot keep the dtype of each."""
    kinds = {(t.dtype, t.device) for t in tensors.values()}
    if len(kinds) > 1:
        found = ", ".join(sorted(f"{dtype} on {device}" for dtype, device in kinds))
        raise ValueError(f"{where} must have one dtype and device; got {found}")


def _own_config(path: Path) -> tuple[type[Model], ModelConfig]:
    content = files.read_json(path)
    name = content.get("_class_name", "")
    # The pipelines' transformer is a PTDiT, with the same weights.
    families = {**_CLASSES, "PTDiTTransformer": PTDiT}
    if not isinstance(name, str) or name not in families:
        raise ValueError(f"{path}: _class_name must be {', '.join(_CLASSES)}; got {name!r}")
    given: dict[str, Any] = {  # what begins with _ is diffusers' own
        key: tuple(value) if isinstance(value, list) else value
        for key, value in content.items()
        if not key.startswith("_") and key not in _EMA_NUMBERS
    }
    known = dataclasses.fields(ModelConfig)
    needed = {field.name for field in known if field.default is dataclasses.MISSING}
    state_dicts.refuse(
        f"{path} does not fit",
        unknown=set(given) - {field.name for field in known},
        missing=needed - set(given),
    )
    try:
        return families[name], ModelConfig(**given)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
