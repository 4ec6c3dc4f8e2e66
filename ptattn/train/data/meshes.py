"""Views around an object: the meshes in PyVista (MIT), rendered without a screen."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageColor
from torch import Tensor

from ..config import Config
from .dataset import Dataset, need, package_folder
from .pixels import fit

MESHES = {"airplane": 0, "ant": 90, "nut": 90}  # degrees around x, to stand upright
COLORS = ("red", "orange", "gold", "green", "blue", "purple", "pink", "gray")
ELEVATIONS = {"from the side": 5.0, "from above": 40.0}  # degrees
ANGLE = 30.0  # degrees that the camera sees from top to bottom
DISTANCE = 4.2  # from which it sees the unit sphere whole
OVERSAMPLING = 4


def views(config: Config) -> Dataset:
    """`data.frames` views, evenly over 360° of azimuth, of every mesh, elevation and colour."""
    captions, labels, turns = [], [], []
    for (label, name), (words, elevation) in itertools.product(
        enumerate(MESHES), ELEVATIONS.items()
    ):
        shades = _render(name, elevation, config)
        for color in COLORS:
            captions.append(f"a {color} {name} {words}")
            labels.append(label)
            turns.append(_tint(shades, color, config))
    if config.model.num_classes is None:
        return Dataset(captions, lambda i: turns[i])
    return Dataset(labels, lambda i: turns[i], list(MESHES))


def _render(name: str, elevation: float, config: Config) -> list[np.ndarray]:
    """One turn around a white mesh: uint8 (H, W, 4), its last channel the opacity."""
    pyvista = need("pyvista", "demo")
    pyvista.vtk_verbosity("off")  # it would report that there is no screen
    mesh = pyvista.read(package_folder("pyvista") / f"examples/{name}.ply")
    mesh = mesh.translate(-np.array(mesh.center)).rotate_x(MESHES[name], point=(0, 0, 0))
    mesh = mesh.scale(1 / np.linalg.norm(mesh.points, axis=1).max())
    size = [OVERSAMPLING * side for side in config.data.size[::-1]]
    plotter: Any = pyvista.Plotter(off_screen=True, window_size=size)
    plotter.add_mesh(mesh, color="white")
    plotter.camera.focal_point, plotter.camera.up = (0, 0, 0), (0, 0, 1)
    plotter.camera.view_angle = ANGLE
    rise, pictures = math.radians(elevation), []
    for view in range(config.data.frames):
        azimuth = 2 * math.pi * view / config.data.frames
        direction = (
            math.cos(rise) * math.cos(azimuth),
            math.cos(rise) * math.sin(azimuth),
            math.sin(rise),
        )
        plotter.camera.position = tuple(DISTANCE * part for part in direction)
        plotter.reset_camera_clipping_range()
        plotter.render()
        pictures.append(plotter.screenshot(transparent_background=True, return_img=True))
    plotter.close()
    return pictures


def _tint(shades: list[np.ndarray], color: str, config: Config) -> Tensor:
    """The turn in a colour, uint8 of the config's shape."""
    tint = np.array([*ImageColor.getrgb(color), 255]) / 255
    frames = [
        fit(Image.fromarray((shade * tint).astype(np.uint8)), config.model.in_channels,
            config.data.size)
        for shade in shades
    ]  # fmt: skip
    return torch.stack(frames, dim=1).reshape(config.shape)
