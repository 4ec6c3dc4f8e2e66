"""`ptattn encode`: your own images or videos to latents, what a latent model is trained on."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .. import files
from ..models import ModelConfig
from .config import Config, DataConfig
from .data import captions as captioning
from .data import folders
from .data.dataset import Dataset, need
from .data.stream import LATENT, generator

ABOUT = ".encoding.json"  # hidden, so it is no data


def encode(
    folder: Path,
    out: Path,
    vae: Path,
    size: tuple[int, int],
    frames: int = 1,
    *,
    captions: Path | None = None,
    seed: int = 0,
) -> Iterator[str]:
    """Write a folder of latents, one file for each example.

    Every example is one sample of the autoencoder's distribution, times its scaling factor. The
    folder is there once it is whole: with a `metadata.jsonl` where there are captions, else with a
    subfolder for each class.

    Args:
        folder: of images, or of videos where there are frames, as `ptattn train` takes them.
        out: the folder to write; nothing may be there yet.
        vae: the folder of an autoencoder, ours or one of diffusers.
        size: height and width in pixels that pictures are scaled and cropped to.
        frames: of each piece of a video; 1 takes images.
        captions: their file, by default metadata.jsonl in the folder, if it is there.
        seed: latents of example i depend on the seed and i; 0 or more.

    Returns:
        What there is to say; the folder is written as this is read.

    Raises:
        ValueError: a negative seed, a path that does not fit, sizes that the autoencoder cannot
            give; as it is read, no file that can be used.
        ImportError: a package that is not installed.
    """
    if seed < 0:
        raise ValueError(f"seed must be 0 or more; got {seed}")
    if out.exists():
        raise ValueError(f"{out} exists already")
    model = load_vae(vae)
    temporal, spatial = _compression(model)
    if any(side % spatial for side in size):
        raise ValueError(f"size must be multiples of {spatial}, as {vae} has it; got {size}")
    if (frames - 1) % temporal:
        raise ValueError(f"frames must be 1 more than a multiple of {temporal}; got {frames}")
    data = _pictures(folder, size, frames, captions)
    about = {"vae": str(vae.resolve()), "size": size, "frames": frames}
    return _encode(data, folder, out, model, seed, about)


def _encode(
    data: Dataset, folder: Path, out: Path, vae: Any, seed: int, about: dict[str, Any]
) -> Iterator[str]:
    for path, reason in data.skipped:
        yield f"skipped {path}: {reason}"
    yield from data.notes
    if not len(data):
        raise ValueError(f"none of {len(data.skipped)} files in {folder} can be used")

    partial = out.with_name(f".{out.name}.{os.getpid()}.partial")
    try:
        shape = _write(data, vae, partial, seed)
        files.write_json(about, partial / ABOUT)
        partial.rename(out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    yield f"{out}: {len(data)} examples of latents {shape}"


def _write(data: Dataset, vae: Any, out: Path, seed: int) -> tuple[int, ...]:
    """Latents and captions; the shape of the latents."""
    lines = []
    for i in range(len(data)):
        latents = _latents(vae, data.pixels(i), generator(seed, LATENT, i))
        name, condition = f"{i:07}.safetensors", data.conditions[i]
        if isinstance(condition, int):
            name = f"{data.classes[condition]}/{name}"
        else:
            texts = [condition] if isinstance(condition, str) else condition
            lines += [{"file_name": name, "text": text} for text in texts]
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        files.write_tensors({"latents": latents}, out / name)
    if lines:
        text = "".join(f"{json.dumps(line)}\n" for line in lines)
        files.write(text, out / captioning.FILE)
    return tuple(latents.shape)


def decode(latents: Tensor, folder: Path) -> Tensor:
    """Pictures, uint8 (n, 3, [F,] H, W), of latents (n, C, [f,] h, w) like those in a folder.

    Raises:
        ValueError, OSError: as `encoder`.
    """
    from ..pipelines import decode as decode_video

    vae = encoder(folder).to(latents.device)
    video = latents if latents.ndim == 5 else latents[:, :, None]
    with torch.no_grad():  # one by one: pixels take far more memory than latents
        pictures = torch.cat([_bytes(decode_video(vae, one)) for one in video.split(1)])
    return pictures if latents.ndim == 5 else pictures[:, :, 0]


def encoder(folder: Path) -> Any:
    """The autoencoder that a folder of latents was written by.

    Raises:
        ValueError, OSError: a folder that `encode` has not written, or whose autoencoder is gone.
    """
    path = folder / ABOUT
    if not path.is_file():
        raise ValueError(f"{folder} was not written by `ptattn encode`: there is no {ABOUT}")
    vae = files.read_json(path).get("vae")
    if not isinstance(vae, str):
        raise ValueError(f"{path}: vae must be the folder of an autoencoder; got {vae!r}")
    return load_vae(Path(vae))


def load_vae(folder: Path) -> Any:
    """An autoencoder of ours or of diffusers from its folder, in float32."""
    path = folder / "config.json"
    if not path.is_file():
        raise ValueError(f"{folder} holds no autoencoder: there is no config.json")
    name = files.read_json(path).get("_class_name")
    if name == "CausalVAE":
        from ..pipelines import causal_vae_weights

        return causal_vae_weights.load(folder).float().requires_grad_(False)
    family: Any = getattr(need("diffusers"), str(name), None)
    if not hasattr(family, "decode"):
        raise ValueError(f"{path}: _class_name must be of an autoencoder; got {name!r}")
    return family.from_pretrained(folder, dtype=torch.float32).eval().requires_grad_(False)


def _compression(vae: Any) -> tuple[int, int]:
    from ..pipelines import compression

    return compression(vae)


def _pictures(folder: Path, size: tuple[int, int], frames: int, listing: Path | None) -> Dataset:
    """Examples with labels or captions, as the folder has them."""
    captioned = listing is not None or (folder / captioning.FILE).is_file()
    condition = (
        {"caption_channels": 1} if captioned else {"caption_channels": None, "num_classes": 1}
    )
    source = "images" if frames == 1 else "videos"
    text = None if listing is None else str(listing)
    config = Config(
        DataConfig(source, size, frames, str(folder), text),
        ModelConfig(1, 16, 1, in_channels=3, patch_size=1, **condition),  # type: ignore[arg-type]
        steps=1,
        batch_size=1,
    )
    return (folders.images if frames == 1 else folders.videos)(config)


@torch.no_grad()
def _latents(vae: Any, pixels: Tensor, random: torch.Generator) -> Tensor:
    """(C, h, w), or (C, f, h, w) of a video."""
    from ..pipelines import encode as encode_video

    video = pixels if pixels.ndim == 4 else pixels[:, None]
    device = "cuda" if torch.cuda.is_available() else "cpu"
    video = video[None].to(device, torch.float32) / 127.5 - 1
    latents = encode_video(vae.to(device), video, random)[0].float().cpu()
    return latents if pixels.ndim == 4 else latents[:, 0]


def _bytes(pixels: Tensor) -> Tensor:
    return pixels.float().add(1).mul(127.5).round().clamp(0, 255).byte().cpu()
