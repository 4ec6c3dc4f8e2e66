"""Drawing with a trained model."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .. import flow
from .config import Config
from .data import Conditions, Dataset
from .data.stream import PICTURE, generator
from .encode import decode


def examples(data: Dataset, config: Config) -> Sequence[int | str]:
    """`samples.count` conditions to draw: all classes in turn, or captions spread over the data."""
    count = config.samples.count
    if config.model.num_classes is not None:
        return [i % config.model.num_classes for i in range(count)]
    captions = sorted(set(data.captions))
    return [captions[i * len(captions) // count % len(captions)] for i in range(count)]


def name_conditions(conditions: Sequence[int | str], classes: Sequence[str]) -> list[str]:
    """What to write below pictures."""
    return [classes[item] if isinstance(item, int) else item for item in conditions]


def draw(model: nn.Module, config: Config, *args: Any, **options: Any) -> Tensor:
    """Pictures of labels or captions; takes what `sample` takes.

    Returns:
        uint8 (n, C, H, W) or (n, C, F, H, W), on the CPU; of latents, what they decode to.
    """
    return as_pictures(sample(model, config, *args, **options), config)


def as_pictures(samples: Tensor, config: Config) -> Tensor:
    """What `draw` returns, of what `sample` does."""
    if config.data.source == "latents":
        return decode(samples, Path(config.data.folder or ""))
    return samples.add(1).mul(127.5).round().clamp(0, 255).byte().cpu()


def sample(
    model: nn.Module,
    config: Config,
    conditions: Sequence[int | str],
    *,
    device: torch.device | str = "cpu",
    seed: int | None = None,
    steps: int | None = None,
    guidance: float | None = None,
) -> Tensor:
    """What the model makes of labels or captions, before it is decoded.

    Args:
        model: of `config.model`, on `device`.
        conditions: one per picture.
        seed: by default the run's; picture i depends on the seed and i, not on the others.
        steps, guidance: by default those of `config.samples`, else the objective's.

    Returns:
        float (n, *config.shape), on `device`.
    """
    seed = config.seed if seed is None else seed
    encode = Conditions(config)
    found = []
    for first in range(0, len(conditions), config.batch_size):
        part = range(first, min(first + config.batch_size, len(conditions)))
        noise = [torch.randn(config.shape, generator=generator(seed, PICTURE, i)) for i in part]
        condition, null = (
            {name: value.to(device) for name, value in encode.batch(wanted).items()}
            for wanted in ([conditions[i] for i in part], [None for _ in part])
        )
        with torch.autocast(
            torch.device(device).type, torch.bfloat16, enabled=config.precision == "bf16"
        ):
            x = flow.sample(
                model,
                torch.stack(noise).to(device),
                condition,
                null,
                objective=config.flow,
                steps=config.samples.steps if steps is None else steps,
                guidance=config.samples.guidance if guidance is None else guidance,
                shift=config.noise_shift,
            )
        found.append(x)
    return torch.cat(found)
