"""`ptattn bench memory`: the peak of a training step, predicted without a GPU and measured on one.

The step runs on the meta device, where tensors have shapes and no numbers, and every storage is
counted while it lives. Not counted are what kernels allocate for themselves (parts of sums: some
ten MB), the allocator's rounding and the CUDA context.
"""

from __future__ import annotations

import argparse
import math
import textwrap
import weakref
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from .. import backends, environment, files
from ..command_line import UsageError, count, now, open_folder
from ..compare.cases import TEXT_TOKENS
from ..flops import VAE_FACTOR, token_grid
from ..models import PTDiT, create_model, find_model, get_config, list_models
from ..paper import TRAINING_MEMORY

SCHEMA = 1
SIDE = 512  # pixels, as in the paper's table
FRAMES = (48, 96, 144, 192, 240)  # latent
DTYPE = torch.bfloat16
TITLE = f"Peak memory of a training step on one sample at {SIDE}², GB: predicted, not measured"
NOTES = (
    "Every number is predicted, on the meta device; one after a slash is measured on this GPU.",
    "Fixed: weights, gradients and optimizer state, by recipe. master: bf16 weights and gradients, "
    "AdamW in fp32 on fp32 master weights, 16 bytes per parameter. plain: all in bf16, 8 bytes.",
    "Keeps: what the forward keeps: all; or, with model.blocks.checkpoint(), each block's input "
    "and its attentions' outputs, or its input alone.",
    "Paper: printed in arXiv 2409.04005, which says neither recipe nor batch. Keeping all takes "
    "more than an 80 GB GPU has, and 192 frames more took only 10 to 11 GB: most likely it kept "
    "block inputs alone, with AdamW in fp32, so that 'Keeps inputs' by recipe master compares. "
    "It may have held a text encoder and an autoencoder besides; they are not counted here.",
)
# What stays for the backward: everything, block inputs and attention outputs, block inputs.
KEPT = ("all", "attention", "inputs")


@dataclass(frozen=True)
class Recipe:
    """Bytes per parameter beside its bf16 weight and gradient, of 2 bytes each."""

    state: int  # of the optimizer, always there
    step: int  # more while the optimizer steps, when all activations are gone
    about: str


RECIPES = {
    "master": Recipe(12, 4, "bf16 weights and gradients, AdamW in fp32 on fp32 master weights"),
    "plain": Recipe(4, 0, "bf16 weights, gradients and AdamW state"),
}


@dataclass(frozen=True)
class Row:
    """A training step on one sample, bytes; `measured` is None where it did not run."""

    model: str
    frames: int
    tokens: int
    recipe: str
    kept: str
    fixed: int  # weights, gradients, optimizer state
    predicted: int
    measured: int | None
    printed: float | None  # in the paper, bytes


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of all storages made while it is on, and not of `known` tensors."""

    def __init__(self, known: Sequence[Tensor]) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._sizes = {t.untyped_storage()._cdata: 0 for t in known}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        tree_map_only(Tensor, self._note, out)
        return out

    def _note(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._sizes:
            return
        self._sizes[key] = storage.nbytes()
        self.now += storage.nbytes()
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._drop, key)

    def _drop(self, key: int) -> None:
        self.now -= self._sizes.pop(key)


def build(name: str, frames: int, kept: str, device: str) -> tuple[Any, list[Tensor]]:
    """A model in bf16 with one sample: latents, timestep, caption and the velocity to learn."""
    side = SIDE // VAE_FACTOR
    with torch.device(device):
        model: Any = create_model(name, backend="triton").to(DTYPE)
        channels = get_config(name).caption_channels or 0
        caption = torch.zeros(1, TEXT_TOKENS, channels, dtype=DTYPE)
        latents = torch.zeros(1, 4, frames, side, side, dtype=DTYPE)
        inputs = [latents, torch.zeros(1), caption, torch.zeros_like(latents)]
    if kept != "all":
        model.blocks.checkpoint(keep_attention=kept == "attention")
    return model, inputs


def backward(
    model: nn.Module, latents: Tensor, timestep: Tensor, caption: Tensor, target: Tensor
) -> None:
    velocity = model(latents, timestep, caption)[:, : target.shape[1]]
    F.mse_loss(velocity, target).backward()


def predict(name: str, frames: int, kept: str) -> tuple[int, int]:
    """The number of parameters, and the most bytes that gradients and activations take at once."""
    model, inputs = build(name, frames, kept, "meta")
    with LiveBytes(list(model.parameters())) as live:
        backward(model, *inputs)
    return sum(p.numel() for p in model.parameters()), live.peak


def measure(name: str, frames: int, kept: str, recipe: Recipe) -> int:
    """The peak on the GPU. The optimizer's state is there as so many bytes; it does not step."""
    model, inputs = build(name, frames, kept, "cuda")
    parameters = sum(p.numel() for p in model.parameters())
    state = torch.empty(parameters * recipe.state, dtype=torch.uint8, device="cuda")
    backward(model, *inputs)  # what is loaded at first use, too
    model.zero_grad()
    torch.cuda.reset_peak_memory_stats()
    backward(model, *inputs)
    del state
    return torch.cuda.max_memory_allocated()


def rows(models: Sequence[str], frames: Sequence[int]) -> list[Row]:
    """Every case; those that fit are measured where there is a GPU."""
    from rich.console import Console
    from rich.progress import track

    cases = [(model, length, kept) for model in models for length in frames for kept in KEPT]
    found = []
    for model, length, kept in track(
        cases, "Predicting", console=Console(stderr=True), transient=True
    ):
        parameters, live = predict(model, length, kept)
        printed = TRAINING_MEMORY.get(model, {}).get(length)
        for name, recipe in RECIPES.items():
            fixed = parameters * (4 + recipe.state)
            peak = max(fixed - 2 * parameters + live, fixed + recipe.step * parameters)
            fits = torch.cuda.is_available() and peak < torch.cuda.mem_get_info()[0]
            measured = measure(model, length, kept, recipe) if fits else None
            tokens = math.prod(token_grid(get_config(model), SIDE, length))
            found.append(
                Row(model, length, tokens, name, kept, fixed, peak, measured,
                    None if printed is None else printed * 1e9)
            )  # fmt: skip
    return found


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    text = f"peak memory of a training step at {SIDE}², predicted, and measured on a GPU"
    parser = commands.add_parser("memory", help=text, description=f"The {text}.")
    choices = [
        name
        for name in list_models()
        if find_model(name)[0] is PTDiT and get_config(name).caption_channels is not None
    ]
    parser.add_argument("--models", nargs="+", metavar="MODEL", choices=choices,
                        default=list(TRAINING_MEMORY), help=f"of {', '.join(choices)} "
                        f"(default: {' '.join(TRAINING_MEMORY)})")  # fmt: skip
    parser.add_argument("--frames", nargs="+", metavar="N", type=count, default=FRAMES,
                        help=f"latent frames (default: {' '.join(map(str, FRAMES))})")  # fmt: skip
    parser.add_argument("--out", metavar="FOLDER", type=Path, default=Path("results/memory"),
                        help="where the results are written (default: %(default)s)")  # fmt: skip
    parser.set_defaults(run=run)


def run(options: argparse.Namespace, command: str) -> int:
    """Print the table; write it as memory.md and memory.json."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    if reasons := backends.reasons_against("triton", torch.empty(1, device="meta")):
        raise UsageError(f"the triton backend is what is predicted, and {'; '.join(reasons)}")
    open_folder(options.out)
    found = rows(options.models, options.frames)
    head, lines = table(found)
    report = {
        "schema": SCHEMA,
        "kind": "memory",
        "command": command,
        "date": now(),
        "environment": environment.describe(),
        "recipes": {name: recipe.about for name, recipe in RECIPES.items()},
        "rows": [asdict(row) for row in found],
    }
    files.write_json(report, options.out / "memory.json")
    cells = [head, ["---:"] * len(head), *lines]
    markdown = "\n".join("| " + " | ".join(line) + " |" for line in cells)
    notes = "\n".join(f"- {note}" for note in NOTES)
    text = f"# {TITLE}\n\nMade by `{command}`.\n\n{markdown}\n\n{notes}"
    files.write(text + "\n", options.out / "memory.md")
    shown = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for title in head:
        shown.add_column(title, justify="right", overflow="fold")
    for line in lines:
        shown.add_row(*line)
    console = Console()
    console.print(TITLE, shown, sep="\n", highlight=False, markup=False)
    for note in NOTES:
        wrapped = textwrap.fill(f"- {note}", console.width, subsequent_indent="  ")
        console.print(wrapped, highlight=False, markup=False)
    console.print(f"Written to {options.out}: memory.md, memory.json.", highlight=False)
    return 0


def table(found: Sequence[Row]) -> tuple[list[str], list[list[str]]]:
    """A line per model, number of frames and recipe; GB, a measured peak after a slash."""
    groups: dict[tuple[str, str, int], list[Row]] = {}
    for row in found:
        groups.setdefault((row.model, row.recipe, row.frames), []).append(row)
    lines = []
    for (model, recipe, frames), group in groups.items():
        first = group[0]
        cells = [f"{row.predicted / 1e9:.1f}" for row in group]
        for i, row in enumerate(group):
            if row.measured is not None:
                cells[i] += f" / {row.measured / 1e9:.1f}"
        printed = "" if first.printed is None else f"{first.printed / 1e9:.1f}"
        fixed = f"{first.fixed / 1e9:.1f}"
        lines.append([model, str(frames), recipe, fixed, *cells, printed])
    head = ["Model", "Frames", "Recipe", "Fixed", *(f"Keeps {kept}" for kept in KEPT), "Paper"]
    return head, lines
