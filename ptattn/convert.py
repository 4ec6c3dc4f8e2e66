"""`ptattn convert`: the released weights to a folder of ours, and back."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from torch import nn

from . import checkpoint, files
from .command_line import UsageError
from .models import PTDiT, get_config

RELEASED = "qihoo-t2i"


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser(
        "convert",
        help="the released weights to a folder of config.json and safetensors, and back",
        description="Convert the released weights, a file, to a folder that "
        "ptattn.checkpoint.load_model and diffusers read; or such a folder to the file, with its "
        "configuration beside it in JSON. With --vae, the same of the autoencoder, whose source "
        "may be Open-Sora-Plan's folder. Every tensor must fit.",
    )
    add = parser.add_argument
    add("source", metavar="SRC", type=Path, help=f"file ({', '.join(files.ENDINGS)}) or folder")
    add("target", metavar="DST", type=Path, help="folder or file; nothing may be there yet")
    add("--config", metavar="JSON", type=Path,
        help="of the released file: the release's inference configuration, or what the way back "
        f"writes (default: SRC with the ending .json, else the sizes of {RELEASED}; with --vae the "
        "config.json beside SRC, else the published sizes)")  # fmt: skip
    add("--key", help="of the weights, where the released file holds several sets, such as ema")
    add("--vae", action="store_true",
        help="the autoencoder; of several sets of weights, averaged ones come first")  # fmt: skip
    parser.set_defaults(run=run)


def run(options: argparse.Namespace, command: str) -> int:
    """Convert, and say what was written; `options` as `add_parser` parses them.

    Raises:
        UsageError: a path that is not there or already taken, or weights that do not fit.
    """
    source, target = options.source, options.target
    if target.exists() and not (target.is_dir() and not any(target.iterdir())):
        raise UsageError(f"argument DST: {target} exists already")
    try:
        back = source.is_dir() and not (options.vae and _is_original(source))
        for name in ("config", "key") if back else ():
            if getattr(options, name) is not None:
                raise UsageError(f"argument --{name}: {source} is a folder and has its own")
        if options.vae:
            model: nn.Module = _vae(source, target, back, options.config, options.key)
        elif back:
            model = _to_file(source, target)
        else:
            model = _to_folder(source, target, options.config, options.key)
    except (ImportError, OSError, ValueError) as error:
        raise UsageError(str(error)) from error
    print(f"{target}: {_summary(model)}")
    return 0


def _to_folder(source: Path, target: Path, config: Path | None, key: str | None) -> PTDiT:
    model = checkpoint.load_official(source, _released_config(source, config), key=key)
    checkpoint.save_model(model, target)
    return model


def _to_file(source: Path, target: Path) -> PTDiT:
    files.check_ending(target)
    beside = target.with_suffix(".json")
    if beside.exists():
        raise ValueError(f"{beside} exists already")
    model = checkpoint.load_model(source)
    if not isinstance(model, PTDiT):
        raise ValueError(f"{source} holds a {type(model).__name__}; the released model is a PTDiT")
    target.parent.mkdir(parents=True, exist_ok=True)
    checkpoint.save_official(model, target)
    files.write_json(checkpoint.official_config(model.model_config), beside)
    return model


def _is_original(folder: Path) -> bool:
    """Whether a folder of an autoencoder is Open-Sora-Plan's, not ours."""
    config = folder / checkpoint.CONFIG_FILE
    return not config.is_file() or files.read_json(config).get("_class_name") != "CausalVAE"


def _vae(source: Path, target: Path, back: bool, config: Path | None, key: str | None) -> nn.Module:
    from .pipelines import causal_vae_weights as weights

    if back:
        files.check_ending(target)
        vae = weights.load(source)
        weights.save_original(vae, target)
    else:
        vae = weights.load_original(source, config, key=key)
        weights.save(vae, target)
    return vae


def _released_config(source: Path, path: Path | None) -> dict[str, Any]:
    beside = source.with_suffix(".json")
    if path is None and not beside.is_file():
        return checkpoint.official_config(get_config(RELEASED))
    content = files.read_json(path or beside)
    # The release's inference configuration holds those of the text encoder and more, too.
    predictor = content.get("predictor", content)
    if not isinstance(predictor, dict):
        raise ValueError(f"{path or beside}: predictor must be an object; got {predictor!r}")
    return predictor


def _summary(model: Any) -> str:
    weights = list(model.parameters())
    count = sum(parameter.numel() for parameter in weights)
    dtype = str(weights[0].dtype).removeprefix("torch.")
    if isinstance(model, PTDiT):
        config = model.model_config
        window = "by resolution" if config.window is None else tuple(config.window)
        sizes = (
            f"PTDiT of {config.depth} blocks, {config.dim} channels, {config.num_heads} heads, "
            f"window {window}"
        )
    else:
        sizes = f"CausalVAE of widths {tuple(model.config.block_out_channels)}"
    return f"{sizes}: {count:,} parameters, {dtype}"
