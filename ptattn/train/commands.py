"""The command lines of `ptattn train`, `ptattn encode` and `ptattn sample`."""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.distributed.device_mesh import DeviceMesh

from .. import files
from ..capture import CaptureError
from ..checkpoint import load_model
from ..command_line import UsageError, count, number, seed
from ..graphs import graphed
from ..parallel import split_tokens
from ..parallel.launch import launched
from . import config as configs
from .config import Config
from .state import CLASSES, MODEL, read_config

PIPELINE = "model_index.json"  # what diffusers writes into the folder of a pipeline


def add_parsers(commands: Any) -> None:
    """Add `train`, `encode` and `sample` to the subparsers of `ptattn`."""
    train = commands.add_parser(
        "train",
        help="train a model on your data, or go on with a run",
        description="Train a model. The same command again goes on where the run was left, killed "
        "or not. Several processes: accelerate launch -m ptattn train ...",
    )
    names = ", ".join(configs.shipped())
    train.add_argument("config", metavar="CONFIG", help=f"a JSON file, or one of {names}")
    train.add_argument(
        "--out", metavar="FOLDER", help="of the run (default: runs/ and the name of CONFIG)"
    )
    train.add_argument("--minutes", metavar="MINUTES", type=number, help="stop after that long")
    train.set_defaults(run=_train)

    encode = commands.add_parser(
        "encode",
        help="your images or videos to latents, to train on",
        description="Encode a folder of images or videos, with captions or with subfolders as "
        "classes, by an autoencoder. A configuration trains on the result with the data.source "
        "latents.",
    )
    encode.add_argument("folder", metavar="FOLDER", type=Path, help="of images or videos")
    encode.add_argument("out", metavar="OUT", type=Path, help="to write; nothing may be there yet")
    encode.add_argument(
        "--vae", metavar="FOLDER", type=Path, required=True, help="of the autoencoder"
    )
    encode.add_argument(
        "--size", metavar="HEIGHTxWIDTH", type=_size, required=True,
        help="in pixels; pictures are scaled and cropped to it",
    )  # fmt: skip
    encode.add_argument(
        "--frames", type=count, default=1, help="of pieces of videos (default: 1, images)"
    )
    encode.add_argument(
        "--captions", metavar="FILE", type=Path,
        help="JSON lines, as for ptattn train (default: metadata.jsonl in FOLDER, if there)",
    )  # fmt: skip
    encode.add_argument("--seed", type=seed, default=0, help="default: %(default)s")
    encode.set_defaults(run=_encode)

    sample = commands.add_parser(
        "sample",
        help="draw with a model that `ptattn train` has trained, or with a pipeline",
        description="Draw with a trained model: a PNG grid of images, a GIF of videos and views. "
        "Or draw images with a text-to-image pipeline that was saved to a folder. Several "
        "processes share the tokens of each: torchrun -m ptattn sample ...",
    )
    sample.add_argument("folder", metavar="FOLDER", help="of a run, or of a pipeline")
    sample.add_argument(
        "conditions", metavar="WHAT", nargs="+",
        help="what to draw, one or several: captions, or names of classes",
    )  # fmt: skip
    sample.add_argument("--count", type=count, default=1, help="pictures of each (default: 1)")
    sample.add_argument("--steps", type=count, help="of the sampler (default: the run's)")
    sample.add_argument("--guidance", type=number, help="1 is none (default: the run's)")
    sample.add_argument(
        "--size", metavar="HEIGHTxWIDTH", type=_size,
        help="in pixels, of a pipeline's images (default: 1024x1024)",
    )  # fmt: skip
    sample.add_argument("--seed", type=seed, default=0, help="default: %(default)s")
    sample.add_argument(
        "--graph", action=argparse.BooleanOptionalAction,
        help="replay the model as a CUDA graph (default: on a GPU)",
    )  # fmt: skip
    sample.add_argument(
        "--out", metavar="FILE", default="sample",
        help="without .png or .gif, which is added (default: %(default)s)",
    )  # fmt: skip
    sample.set_defaults(run=_sample)


def _train(options: argparse.Namespace, command: str) -> int:
    with _clear_errors():
        from .loop import train

        config = configs.read(options.config)
        folder = Path(options.out or Path("runs") / Path(options.config).stem)
        try:
            train(config, folder, minutes=options.minutes)
        except KeyboardInterrupt:
            print("stopped; the same command goes on from the last checkpoint", file=sys.stderr)
            raise
    return 0


def _encode(options: argparse.Namespace, command: str) -> int:
    with _clear_errors():
        from .encode import encode

        names = ("folder", "out", "vae", "size", "frames", "captions", "seed")
        for line in encode(**{name: getattr(options, name) for name in names}):
            print(line)
    return 0


def _sample(options: argparse.Namespace, command: str) -> int:
    folder = Path(options.folder)
    with _clear_errors():
        from .pictures import save_grid

        names = [name for name in options.conditions for _ in range(options.count)]
        kind = "cuda" if torch.cuda.is_available() else "cpu"
        if options.graph and kind != "cuda":
            raise UsageError("argument --graph: needs a CUDA GPU, and torch finds none")
        settings = dict(seed=options.seed, steps=options.steps, guidance=options.guidance)
        with launched(kind) as mesh:
            if options.graph and mesh is not None:
                raise UsageError("argument --graph: no graph holds a model of several processes")
            graph = kind == "cuda" and mesh is None and options.graph is not False
            if (folder / PIPELINE).is_file():
                from .pipelines import draw as draw_images

                size = options.size or (1024, 1024)
                pictures = draw_images(folder, names, size, graph, mesh, **settings)
            elif options.size is not None:
                raise UsageError(f"argument --size: {folder} is no folder of a pipeline")
            else:
                pictures = _draw(folder, names, kind, graph, mesh, **settings)
            if mesh is None or mesh.get_rank() == 0:
                print(save_grid(pictures, names, Path(options.out)))
    return 0


def _draw(
    folder: Path, names: Sequence[str], device: str, graph: bool, mesh: DeviceMesh | None,
    **settings: Any,
) -> torch.Tensor:  # fmt: skip
    """Pictures by the model of a run."""
    from .sampling import draw

    config = read_config(folder)
    if not (folder / MODEL).is_dir():
        raise ValueError(f"{folder} holds no checkpoint yet")
    conditions = _conditions(names, config, folder)
    model: Any = load_model(folder / MODEL).eval().to(device)
    if mesh is not None:
        split_tokens(model, mesh)
    return draw(graphed(model) if graph else model, config, conditions, device=device, **settings)


def _size(text: str) -> tuple[int, int]:
    height, _, width = text.partition("x")
    width = width or height
    if not (height.isdecimal() and width.isdecimal() and int(height) and int(width)):
        raise argparse.ArgumentTypeError(f"expected positive integers; got {text!r}")
    return int(height), int(width)


def _conditions(names: Sequence[str], config: Config, folder: Path) -> Sequence[int | str]:
    if config.model.num_classes is None:
        return list(names)
    classes = files.read_json(folder / CLASSES)["classes"]
    if unknown := sorted(set(names) - set(classes)):
        raise ValueError(f"{', '.join(unknown)}: no class of {folder}; known: {', '.join(classes)}")
    return [classes.index(name) for name in names]


@contextlib.contextmanager
def _clear_errors() -> Iterator[None]:
    """What went wrong in words, not in a traceback."""
    try:
        yield
    except CaptureError as error:
        raise UsageError(f"{error}, with --no-graph") from error
    except (ArithmeticError, ImportError, MemoryError, OSError, ValueError) as error:
        raise UsageError(str(error)) from error
