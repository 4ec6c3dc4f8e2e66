"""`ptattn bench memory`: the peak of a training step, predicted without a GPU and measured on one.

The step runs on the meta device, where tensors have shapes and no numbers, and every storage is
counted while it lives. Not counted are what kernels allocate for themselves (parts of sums: some
ten MB), the allocator's rounding and the CUDA context.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
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
from .harness import Bench, Workload, free_memory, outcome
from .results import OK, PREDICTED, Row
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
        self.peak = self._now = 0
        self._seen = {t.untyped_storage()._cdata for t in known}
        self._living: dict[Any, tuple[int, int]] = {}  # where a storage is, and its bytes
        # Filled by list.append, which runs no code of Python: a Ctrl-C raised there would be lost.
        self._dead: list[Any] = []

    @property
    def now(self) -> int:
        self._bury()
        return self._now

    @property
    def living(self) -> list[int]:
        """The bytes of each storage that is alive."""
        self._bury()
        return [size for _, size in self._living.values()]

    def _bury(self) -> None:
        while self._dead:
            place, size = self._living.pop(self._dead.pop())
            self._now -= size
            self._seen.remove(place)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        tree_map_only(Tensor, self._note, out)
        return out

    def _note(self, tensor: Tensor) -> None:
        storage, now = tensor.untyped_storage(), self.now
        place, size = storage._cdata, storage.nbytes()
        if place not in self._seen:
            self._seen.add(place)
            self._living[weakref.ref(storage, self._dead.append)] = place, size
            self._now = now + size
            self.peak = max(self.peak, self._now)


Step = tuple[nn.Module, list[Tensor], dict[str, Tensor]]


def build(name: str, size: Size, kept: str, device: str) -> Step:
    """A model in bf16; one sample's latents, timestep and velocity to learn; and its condition."""
    side, config = size.side // VAE_FACTOR, get_config(name)
    with torch.device(device):
        model: Any = create_model(name, backend="triton").to(DTYPE)
        latents = torch.zeros(1, 4, size.frames, side, side, dtype=DTYPE)
        condition = {"labels": torch.zeros(1, dtype=torch.int64)}
        if config.num_classes is None:
            shape = 1, TEXT_TOKENS, config.caption_channels or 0
            condition = {"caption": torch.zeros(shape, dtype=DTYPE)}
        inputs = [latents, torch.zeros(1), torch.zeros_like(latents)]
    if kept != "all":
        model.blocks.checkpoint(keep_attention=kept == "attention")
    return model, inputs, condition


def backward(step: Step) -> None:
    model, (latents, timestep, target), condition = step
    velocity = model(latents, timestep, **condition)[:, : target.shape[1]]
    F.mse_loss(velocity, target).backward()


def predict(
    name: str, size: Size, kept: str, change: Callable[[Any], object] = bool
) -> tuple[int, int]:
    """The number of parameters, and the most bytes that gradients and activations take at once.

    `change` does something to the model before.
    """
    step = build(name, size, kept, "meta")
    change(step[0])
    parameters = list(step[0].parameters())
    with LiveBytes(parameters) as live:
        backward(step)
    return sum(p.numel() for p in parameters), live.peak


def measure(name: str, size: Size, kept: str, recipe: Recipe) -> int:
    """The peak on the GPU. The optimizer's state is there as so many bytes; it does not step."""
    torch.cuda.empty_cache()  # what other cases left would lie in the way
    step = build(name, size, kept, "cuda")
    parameters = sum(p.numel() for p in step[0].parameters())
    state = torch.empty(parameters * recipe.state, dtype=torch.uint8, device="cuda")
    backward(step)  # what is loaded at first use, too
    step[0].zero_grad()
    torch.cuda.reset_peak_memory_stats()
    backward(step)
    del state
    return torch.cuda.max_memory_allocated()


def choices() -> list[str]:
    """The models that take part: PT-DiT for text."""
    return [
        name
        for name in list_models()
        if find_model(name)[0] is PTDiT and get_config(name).caption_channels is not None
    ]


@dataclass(frozen=True)
class TrainingMemory(Workload):
    """A model and number of frames: a row per recipe and what is kept.

    With a GPU those that fit have a second row, measured.
    """

    entry: Entry

    def __str__(self) -> str:
        return f"{self.entry.name} {self.entry.size}"

    def measure(self, bench: Bench) -> list[Row]:
        entry, found = self.entry, []
        lives = {kept: predict(entry.model, entry.size, kept) for kept in KEPT}
        for name, recipe in RECIPES.items():
            for kept, (parameters, live) in lives.items():
                fixed = parameters * (4 + recipe.state)
                peak = max(fixed - 2 * parameters + live, fixed + recipe.step * parameters)
                row = self._row(name, kept, peak=peak, status=PREDICTED)
                row.facts |= dict(parameters=parameters, fixed=fixed)
                found.append(row)
                if torch.cuda.is_available() and peak < (free_memory("cuda") or 0):
                    found.append(self._measured(row, kept, recipe))
        return found

    def blank(self, status: str, note: str = "") -> list[Row]:
        return [self._row(r, kept, status=status, note=note) for r in RECIPES for kept in KEPT]

    def _row(self, recipe: str, kept: str, **known: Any) -> Row:
        entry, frames = self.entry, self.entry.size.frames
        printed = TRAINING_MEMORY.get(entry.model, {}).get(frames)
        facts = dict(kind=KIND, model=entry.name, frames=frames, recipe=recipe, printed=printed)
        return Row(
            f"{self}, {recipe}", TRAINING, f"keeps {kept}", entry.name,
            tokens=entry.tokens, facts=facts, **known,
        )  # fmt: skip

    def _measured(self, row: Row, kept: str, recipe: Recipe) -> Row:
        try:
            peak = measure(self.entry.model, self.entry.size, kept, recipe)
        except Exception as error:  # the others of the table must survive it
            return replace(row, peak=None, **outcome(error))
        return replace(row, status=OK, peak=peak)


def workloads(models: Sequence[str], frames: Sequence[int]) -> list[TrainingMemory]:
    return [TrainingMemory(e) for e in plan(models, [Size(SIDE, length) for length in frames])]
