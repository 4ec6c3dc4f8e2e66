"""The autoencoder's weights on disk: Open-Sora-Plan's folder in and out, and ours.

Both use the same names. Open-Sora-Plan's folder holds config.json and a checkpoint of its trainer:
averaged weights (`ema_state_dict`), the model's (`gen_model` within `state_dict`), and more.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .. import files, state_dicts
from ..checkpoint import CONFIG_FILE, WEIGHTS_FILE
from .causal_vae import LEVELS, CausalVAE
from .components import check_numbers

# Open-Sora-Plan's names, and the published values; sizes alone may be others.
_SIZES: dict[str, Any] = {
    "hidden_size": 128,
    "hidden_size_mult": [1, 2, 4, 4],
    "z_channels": 4,
    "num_res_blocks": 2,
}
_FIXED: dict[str, Any] = {
    "attn_resolutions": [],
    "double_z": True,
    "dropout": 0.0,
    "use_quant_layer": True,
    "q_conv": "CausalConv3d",
    "encoder_conv_in": "Conv2d",
    "encoder_conv_out": "CausalConv3d",
    "encoder_attention": "AttnBlock3DFix",
    "encoder_resnet_blocks": ["ResnetBlock2D", "ResnetBlock2D", "ResnetBlock3D", "ResnetBlock3D"],
    "encoder_spatial_downsample": [
        *("Downsample", "Spatial2xTime2x3DDownsample", "Spatial2xTime2x3DDownsample", ""),
    ],
    "encoder_temporal_downsample": ["", "", "", ""],
    "encoder_mid_resnet": "ResnetBlock3D",
    "decoder_conv_in": "CausalConv3d",
    "decoder_conv_out": "CausalConv3d",
    "decoder_attention": "AttnBlock3DFix",
    "decoder_resnet_blocks": ["ResnetBlock3D"] * 4,
    "decoder_spatial_upsample": [
        *("", "SpatialUpsample2x", "Spatial2xTime2x3DUpsample", "Spatial2xTime2x3DUpsample"),
    ],
    "decoder_temporal_upsample": ["", "", "", ""],
    "decoder_mid_resnet": "ResnetBlock3D",
}
# The release's inference configuration calls the same attention so.
_RELEASE_ATTENTION = {"AttnBlock3D": "AttnBlock3DFix"}

# Where a checkpoint may keep its weights, the preferred first.
_SETS = ("ema_state_dict", "state_dict.gen_model", "state_dict", "model")


def load(folder: str | Path) -> CausalVAE:
    """Read a folder of ours, as diffusers keeps a component; strictly.

    Raises:
        FileNotFoundError, ValueError: as `checkpoint.load_model`.
    """
    folder = Path(folder)
    path = folder / CONFIG_FILE
    content = files.read_json(path)
    if content.get("_class_name") != CausalVAE.__name__:
        raise ValueError(
            f"{path}: _class_name must be CausalVAE; got {content.get('_class_name')!r}"
        )
    sizes = {key: value for key, value in content.items() if not key.startswith("_")}
    tensors, where = state_dicts.read_folder(folder)
    return _built(sizes, tensors, str(path), str(where))


def save(vae: CausalVAE, folder: str | Path) -> None:
    """Write a folder that `load` and diffusers' `from_pretrained` read, its files whole or not at
    all."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    files.write_tensors(vae.state_dict(), folder / WEIGHTS_FILE)
    sizes = {key: value for key, value in vae.config.items() if not key.startswith("_")}
    files.write_json({"_class_name": CausalVAE.__name__, **sizes}, folder / CONFIG_FILE)


def load_original(
    path: str | Path, config: str | Path | None = None, *, key: str | None = None
) -> CausalVAE:
    """Read Open-Sora-Plan's autoencoder.

    Args:
        path: its folder, or the checkpoint, a pickle read with `weights_only=True` or safetensors.
        config: its config.json, or the release's inference configuration; by default the
            config.json beside the checkpoint or, where there is none, the published sizes.
        key: which weights, such as "state_dict.gen_model"; by default averaged ones come first.

    Returns:
        The model in its saved dtypes, on the CPU.

    Raises:
        FileNotFoundError: no file.
        ValueError: another architecture, unknown, missing or misshapen tensors; no weights, or
            several files to choose from.
    """
    path = Path(path)
    checkpoint = _only_checkpoint(path) if path.is_dir() else path
    beside = checkpoint.with_name(CONFIG_FILE)
    sizes: dict[str, Any] = {}
    if config is not None or beside.is_file():
        sizes = _sizes(Path(config) if config else beside)
    tensors = _weights(files.read(checkpoint), str(checkpoint), key)
    return _built(sizes, tensors, "config", str(checkpoint))


def save_original(vae: CausalVAE, path: str | Path) -> None:
    """Write Open-Sora-Plan's checkpoint, and its config.json beside it.

    A pickle holds the weights as `state_dict`, where both its loader and the release's look.

    Raises:
        ValueError: another ending, a config.json that is there already, or sizes that
            Open-Sora-Plan has no name for.
        OSError: a file that cannot be written.
    """
    path = Path(path)
    beside = path.with_name(CONFIG_FILE)
    if beside.exists():
        raise ValueError(f"{beside} exists already")
    config = _original_config(vae.config)
    path.parent.mkdir(parents=True, exist_ok=True)
    files.write_tensors(vae.state_dict(), path, within="state_dict")
    files.write_json(config, beside)


def _built(
    sizes: Mapping[str, Any], tensors: Mapping[str, Tensor], own: str, where: str
) -> CausalVAE:
    known = set(inspect.signature(CausalVAE).parameters)
    state_dicts.refuse(f"{own} does not fit", unknown=set(sizes) - known)
    with torch.device("meta"):
        vae = CausalVAE(**{k: tuple(v) if isinstance(v, list) else v for k, v in sizes.items()})
    wanted = vae.state_dict()
    tensors = state_dicts.unwrapped(tensors, wanted)
    state_dicts.check(tensors, wanted, f"{where} does not fit the autoencoder's configuration")
    vae.load_state_dict(tensors, assign=True)
    return vae.eval()


def _only_checkpoint(folder: Path) -> Path:
    found = sorted(p for p in folder.iterdir() if p.suffix in files.ENDINGS)
    if len(found) != 1:
        names = ", ".join(p.name for p in found) or f"no file ending in {', '.join(files.ENDINGS)}"
        raise ValueError(f"{folder} must hold one checkpoint: give the file itself; got {names}")
    return found[0]


def _weights(content: Any, where: str, key: str | None) -> dict[str, Tensor]:
    """The preferred of the sets of weights in a checkpoint, or the one that `key` names."""
    for name in _SETS if key is None else [key]:
        inner = content
        for part in name.split("."):
            inner = inner.get(part) if isinstance(inner, Mapping) else None
        if isinstance(inner, Mapping) and inner:  # no averages may be kept, by their name
            return files.tensors_in(inner, f"{where}, {name}")
    if key is not None:
        names = ", ".join(map(str, content)) if isinstance(content, Mapping) else "no dictionary"
        raise ValueError(f"{where} holds no weights at key {key!r}; it holds {names[:200]}")
    return files.tensors_in(content, where)


def _sizes(path: Path) -> dict[str, Any]:
    """Our sizes from Open-Sora-Plan's configuration, or from the release's."""
    content = files.read_json(path)
    config = content.get("ae", content)
    if not isinstance(config, dict):
        raise ValueError(f"{path}: ae must be an object; got {config!r}")
    if config.get("model_id") == "casualvae":  # the release's own spelling
        config = {k: _RELEASE_ATTENTION.get(str(v), v) for k, v in config.items()}
    unsupported = {
        f"{name} (got {config[name]!r}, expected {value!r})"
        for name, value in _FIXED.items()
        if config.get(name, value) != value
    }
    sizes = {**_SIZES, **{name: config[name] for name in _SIZES if name in config}}
    _check_sizes(path, **sizes)
    if config.get("embed_dim", sizes["z_channels"]) != sizes["z_channels"]:
        unsupported.add(f"embed_dim (got {config['embed_dim']!r}, expected z_channels)")
    state_dicts.refuse(f"{path} is of another autoencoder", unsupported=unsupported)
    return {
        "block_out_channels": [sizes["hidden_size"] * n for n in sizes["hidden_size_mult"]],
        "layers_per_block": sizes["num_res_blocks"],
        "latent_channels": sizes["z_channels"],
    }


def _check_sizes(path: Path, hidden_size: Any, hidden_size_mult: Any, **numbers: Any) -> None:
    if not isinstance(hidden_size_mult, list) or len(hidden_size_mult) != LEVELS:
        raise ValueError(
            f"{path}: hidden_size_mult must be a list of {LEVELS}; got {hidden_size_mult!r}"
        )
    numbers |= {f"hidden_size_mult[{i}]": value for i, value in enumerate(hidden_size_mult)}
    numbers["hidden_size"] = hidden_size
    check_numbers(**{f"{path}: {name}": value for name, value in numbers.items()})
    if any(hidden_size * value % 32 for value in hidden_size_mult):
        raise ValueError(
            f"{path}: hidden_size times hidden_size_mult must be multiples of 32, the groups of "
            f"its norms; got {hidden_size} times {hidden_size_mult}"
        )


def _original_config(config: Any) -> dict[str, Any]:
    widths = config.block_out_channels
    if config.norm_num_groups != 32 or any(width % widths[0] for width in widths):
        raise ValueError(
            "Open-Sora-Plan's autoencoder has norms of 32 groups, and widths that are multiples of "
            f"the first; got norm_num_groups {config.norm_num_groups}, widths {tuple(widths)}"
        )
    return {
        "_class_name": "CausalVAEModel",
        "hidden_size": widths[0],
        "hidden_size_mult": [width // widths[0] for width in widths],
        "z_channels": config.latent_channels,
        "embed_dim": config.latent_channels,
        "num_res_blocks": config.layers_per_block,
        **_FIXED,
    }
