"""`ptattn bench memory`: the peak of a training step, predicted without a GPU and measured on one.

The step runs on the meta device, where tensors have shapes and no numbers, and every storage is
counted while it lives. Not counted are what kernels allocate for themselves (parts of sums: some
ten MB), the allocator's rounding and the CUDA context.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from ..flops import VAE_FACTOR
from ..models import PTDiT, create_model, find_model, get_config, list_models
from ..paper import TRAINING_MEMORY
from .floor import TRAINING
from .harness import first_line, free_memory
from .results import ERROR, OK, PREDICTED, SKIPPED, Row
from .workloads import TEXT_TOKENS, Entry, Size, plan

KIND = "memory"
SIDE = 512  # pixels, as in the paper's table
FRAMES = (48, 96, 144, 192, 240)  # latent
DTYPE = torch.bfloat16
NOTES = (
    "Every number is predicted, on the meta device; one after a slash is measured on this GPU.",
    "Fixed: weights, gradients and optimizer state, by recipe. master: bf16 weights and gradients, "
    "AdamW in fp32 on fp32 master weights, 16 bytes per parameter. plain: all in bf16, 8 bytes.",
    "Keeps: what the forward keeps: all; or, with model.blocks.checkpoint(), each block's input "
    "and its attentions' outputs, or its input alone.",
    "Paper: printed in arXiv 2409.04005 for so many frames, without recipe or batch. From 48 to "
    "240 latent frames the inputs of all blocks alone grow by 12.7 GB (XL) and 17.0 GB (H), the "
    "printed peaks by 11.2 and 10.0. So either a sample was spread over several GPUs, or the "
    "frames are a video's, four to a latent one, and the rows of 12 to 60 latent frames compare. "
    "A text encoder and an autoencoder may be in the printed peaks; here they are not.",
)
# What stays for the backward: everything, block inputs and attention outputs, block inputs.
KEPT = ("all", "attention", "inputs")


@dataclass(frozen=True)
class Recipe:
    """Bytes per parameter beside its bf16 weight and gradient, of 2 bytes each."""

    state: int  # of the optimizer, always there
    step: int  # more while the optimizer steps, when all activations are gone


RECIPES = {"master": Recipe(12, 4), "plain": Recipe(4, 0)}  # NOTES say what they are


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of all storages made while it is on, and not of `known` tensors."""

    def __init__(self, known: Sequence[Tensor]) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.sizes = {t.untyped_storage()._cdata: 0 for t in known}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        tree_map_only(Tensor, self._note, out)
        return out

    def _note(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self.sizes:
            return
        self.sizes[key] = storage.nbytes()
        self.now += storage.nbytes()
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._drop, key)

    def _drop(self, key: int) -> None:
        self.now -= self.sizes.pop(key)


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
    torch.cuda.empty_cache()  # what other cases left would lie in the way
    model, inputs = build(name, frames, kept, "cuda")
    parameters = sum(p.numel() for p in model.parameters())
    state = torch.empty(parameters * recipe.state, dtype=torch.uint8, device="cuda")
    backward(model, *inputs)  # what is loaded at first use, too
    model.zero_grad()
    torch.cuda.reset_peak_memory_stats()
    backward(model, *inputs)
    del state
    return torch.cuda.max_memory_allocated()


def choices() -> list[str]:
    """The models that take part: PT-DiT for text."""
    return [
        name
        for name in list_models()
        if find_model(name)[0] is PTDiT and get_config(name).caption_channels is not None
    ]


def rows(models: Sequence[str], frames: Sequence[int]) -> Iterator[list[Row]]:
    """Of one model and number of frames after the other: a row per recipe and what is kept.

    With a GPU those that fit have a second row, measured.
    """
    for entry in plan(models, [Size(SIDE, length) for length in frames]):
        yield _rows(entry)


def _rows(entry: Entry) -> list[Row]:
    found, length = [], entry.size.frames
    lives = {kept: predict(entry.model, length, kept) for kept in KEPT}
    for name, recipe in RECIPES.items():
        for kept, (parameters, live) in lives.items():
            fixed = parameters * (4 + recipe.state)
            peak = max(fixed - 2 * parameters + live, fixed + recipe.step * parameters)
            facts = dict(
                kind=KIND, model=entry.name, frames=length, recipe=name, parameters=parameters,
                fixed=fixed, printed=TRAINING_MEMORY.get(entry.model, {}).get(length),
            )  # fmt: skip
            row = Row(
                f"{entry.name} {entry.size}, {name}", TRAINING, f"keeps {kept}", entry.name,
                status=PREDICTED, tokens=entry.block.tokens, peak=peak, facts=facts,
            )  # fmt: skip
            found.append(row)
            if torch.cuda.is_available() and peak < (free_memory("cuda") or 0):
                found.append(_measured(row, entry.model, length, kept, recipe))
    return found


def _measured(row: Row, *case: Any) -> Row:
    try:
        return replace(row, status=OK, peak=measure(*case))
    except torch.OutOfMemoryError as error:
        return replace(row, status=SKIPPED, peak=None, note=first_line(error))
    except Exception as error:  # the others of the table must survive it
        return replace(row, status=ERROR, peak=None, note=first_line(error))
