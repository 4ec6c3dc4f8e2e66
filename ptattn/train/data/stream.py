"""What a run sees, step by step: all that is random is a function of the seed and the position.

So a run that goes on from a checkpoint sees what it would have seen, and any number of processes
and accumulated parts sees the same batches with the same noise.
"""

from __future__ import annotations

import functools
import multiprocessing
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, default_collate

from ..config import Config
from .conditions import Conditions
from .dataset import Condition, Dataset

Batch = dict[str, Tensor]
ORDER, EXAMPLE, PICTURE, CAPTION, LATENT = range(5)  # what random numbers are for


def generator(*key: int) -> torch.Generator:
    """Random numbers that depend on a key of non-negative integers alone, on the CPU."""
    state = np.random.SeedSequence(key).generate_state(1, np.uint64)
    return torch.Generator().manual_seed(int(state[0]))


class Stream(torch.utils.data.Dataset[Batch]):
    """Example at a position: epoch after epoch, each in an order of its own."""

    def __init__(self, data: Dataset, config: Config) -> None:
        self.data, self.config = data, config
        self.conditions = Conditions(config)
        self.order = functools.lru_cache(maxsize=2)(self._order)

    def _order(self, epoch: int) -> Tensor:
        return torch.randperm(len(self.data), generator=generator(self.config.seed, ORDER, epoch))

    def __getitem__(self, position: int) -> Batch:
        config = self.config
        epoch, place = divmod(position, len(self.data))
        index = int(self.order(epoch)[place])
        random = generator(config.seed, EXAMPLE, position)
        drop = torch.rand((), generator=random) < config.drop_condition
        return {
            "pixels": self.data.pixels(index),
            "noise": torch.randn(config.shape, generator=random),
            "timestep": config.flow.timesteps(1, config.noise_shift, random)[0],
            **self.conditions.one(
                None if drop else self._one(self.data.conditions[index], position)
            ),
        }

    def __getitems__(self, positions: Sequence[int]) -> list[Batch] | ValueError:
        """Examples, or the error that says what is wrong with one.

        It is handed on as a value: where it is raised in a worker, torch puts the worker's
        traceback in place of its message.
        """
        try:
            return [self[position] for position in positions]
        except ValueError as error:
            return error

    def _one(self, condition: Condition, position: int) -> int | str:
        """The label, or one of the captions."""
        if isinstance(condition, int | str):
            return condition
        random = generator(self.config.seed, CAPTION, position)
        return condition[int(torch.randint(len(condition), (), generator=random))]


def batches(
    data: Dataset, config: Config, start: int, rank: int = 0, processes: int = 1
) -> Iterator[Batch]:
    """This process's part of every batch from step `start` on, one per accumulated part.

    A batch holds pixels uint8 (b, C, [F,] H, W), or latents as float32, noise like it, timestep
    (b,) and the model's arguments.

    Raises:
        ValueError: a batch that processes · accumulation does not divide, or workers where there
            can be none; from the iterator, an example that can no longer be used.
    """
    parts = processes * config.accumulation
    size, rest = divmod(config.batch_size, parts)
    if rest:
        raise ValueError(
            f"batch_size must be a multiple of {processes} processes · accumulation "
            f"{config.accumulation}; got {config.batch_size}"
        )

    positions = (
        list(range(first := step * config.batch_size + part * size, first + size))
        for step in range(start, config.steps)
        for part in range(rank, parts, processes)
    )
    workers = config.data.workers
    if workers and "fork" not in multiprocessing.get_all_start_methods():
        raise ValueError(f"data.workers must be 0 where processes cannot fork; got {workers}")
    loader = DataLoader(
        Stream(data, config),
        batch_sampler=positions,
        collate_fn=_collate,
        num_workers=workers,
        multiprocessing_context="fork" if workers else None,  # what reads files does not pickle
    )
    return map(_usable, loader)


def _collate(examples: list[Batch] | ValueError) -> Batch | ValueError:
    return examples if isinstance(examples, ValueError) else default_collate(examples)


def _usable(batch: Batch | ValueError) -> Batch:
    if isinstance(batch, ValueError):
        raise batch
    return batch
