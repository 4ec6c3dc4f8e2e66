"""The command lines of `ptattn train` and `ptattn sample`."""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from .. import files
from ..capture import CaptureError
from ..checkpoint import load_model
from ..command_line import UsageError, count, number
from ..graphs import graphed
from ..parallel import split_tokens
from ..parallel.launch import launched
from . import config as configs
from .config import Config
from .state import CLASSES, MODEL, read_config


def add_parsers(commands: Any) -> None:
    """Add `train` and `sample` to the subparsers of `ptattn`."""
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

    sample = commands.add_parser(
        "sample",
        help="draw with a model that `ptattn train` has trained",
        description="Draw with a trained model: a PNG grid of images, a GIF of videos and views. "
        "Several processes share the tokens of each: torchrun -m ptattn sample ...",
    )
    sample.add_argument("folder", metavar="FOLDER", help="of a run")
    sample.add_argument(
        "conditions", metavar="WHAT", nargs="+",
        help="what to draw, one or several: captions, or names of classes",
    )  # fmt: skip
    sample.add_argument("--count", type=count, default=1, help="pictures of each (default: 1)")
    sample.add_argument("--steps", type=count, help="of the sampler (default: the run's)")
    sample.add_argument("--guidance", type=number, help="1 is none (default: the run's)")
    sample.add_argument("--seed", type=int, default=0, help="default: %(default)s")
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


def _sample(options: argparse.Namespace, command: str) -> int:
    folder = Path(options.folder)
    with _clear_errors():
        from .pictures import save_grid
        from .sampling import draw

        config = read_config(folder)
        if not (folder / MODEL).is_dir():
            raise ValueError(f"{folder} holds no checkpoint yet")
        names = [name for name in options.conditions for _ in range(options.count)]
        conditions = _conditions(names, config, folder)
        kind = "cuda" if torch.cuda.is_available() else "cpu"
        if options.graph and kind != "cuda":
            raise UsageError("argument --graph: needs a CUDA GPU, and torch finds none")
        with launched(kind) as mesh:
            if options.graph and mesh is not None:
                raise UsageError("argument --graph: no graph holds a model of several processes")
            model: Any = load_model(folder / MODEL).eval().to(kind)
            if mesh is not None:
                split_tokens(model, mesh)
            elif kind == "cuda" and options.graph is not False:
                model = graphed(model)
            pictures = draw(
                model,
                config,
                conditions,
                device=kind,
                seed=options.seed,
                steps=options.steps,
                guidance=options.guidance,
            )
            if mesh is None or mesh.get_rank() == 0:
                print(save_grid(pictures, names, Path(options.out)))
    return 0


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
