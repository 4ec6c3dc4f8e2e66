"""The training loop."""

from __future__ import annotations

import dataclasses
import math
import time
from pathlib import Path
from typing import NamedTuple

import torch
from accelerate import Accelerator
from accelerate.utils.memory import should_reduce_batch_size
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh

from .. import files, flow
from ..parallel import split_tokens
from .config import Config
from .data import Conditions, batches, load
from .log import Log
from .pictures import grid, save_grid, still
from .sampling import as_pictures, examples, name_conditions, sample
from .state import CLASSES, CONFIG, STATE, State, check_data, check_folder


class Record(NamedTuple):
    """A step, the seconds since the run began, and its loss."""

    step: int
    seconds: float
    loss: float


class DivergedError(ArithmeticError):
    """The loss or the gradient is no longer a number."""


def train(config: Config, folder: str | Path, *, minutes: float | None = None) -> list[Record]:
    """Train a model, or go on where the run in `folder` was left, killed or not.

    Under accelerate's launcher or torchrun, on as many processes as there are; on the GPU where
    there is one.

    Args:
        config: of the run.
        folder: for its configuration, checkpoints, pictures and tensorboard's files.
        minutes: stop after that long, with a checkpoint.

    Returns:
        A record of every step made.

    Raises:
        ValueError: data that does not fit the configuration, or a folder with a run of another
            configuration or of other classes; token_ranks that do not divide the processes.
        DivergedError: a loss or gradient that is not finite; the last checkpoint is kept.
        MemoryError: a batch that does not fit into memory.
        OSError: a checkpoint that cannot be written; the one before is kept.
        ImportError: a package that is not installed.
    """
    folder = Path(folder)
    limit = math.inf if minutes is None else 60 * minutes
    trainer = Trainer(config, folder, limit)
    begin = time.monotonic()
    records: list[Record] = []
    with trainer.log as log:
        trainer.begin()
        while trainer.state.step < config.steps:
            loss, norm = trainer.gradients()
            trainer.update()
            step, seconds = trainer.state.step, time.monotonic() - begin
            records.append(Record(step, seconds, loss))
            log.step(step, loss, gradient_norm=norm)
            done = step == config.steps or trainer.any_process(seconds > limit)
            if done or step % config.save_every == 0:
                trainer.save()
            if done or step % config.sample_every == 0:
                trainer.show()
            if done:
                break
    return records


class Trainer:
    """One process of a run: its part of every batch, and if it is the first, the run's files."""

    def __init__(self, config: Config, folder: Path, limit: float = math.inf) -> None:
        resuming = check_folder(folder, config)
        self.config, self.folder = config, folder
        self.accelerator = Accelerator(
            mixed_precision="bf16" if config.precision == "bf16" else "no",
            gradient_accumulation_steps=config.accumulation,
        )
        self.device, self.first = self.accelerator.device, self.accelerator.is_main_process
        Conditions(config)  # what is missing for captions is said before files are read
        self.data = load(config)
        examples = len(self.data)
        self.changes = check_data(folder, self.data.classes, examples) if resuming else []
        self.state = State.fresh(config, self.device)
        if resuming:
            self.state.restore(folder)
        rank, processes = self._split_tokens()
        self.model, self.optimizer = self.accelerator.prepare(
            self.state.model, self.state.optimizer
        )
        self._parts = batches(self.data, config, self.state.step, rank, processes)
        start, quiet = self.state.step, not self.first
        self.log = Log(folder, start, config.steps, config.batch_size, limit, quiet)

    def _split_tokens(self) -> tuple[int, int]:
        """Which part of the batch is this process's, and how many there are."""
        rank, processes = self.accelerator.process_index, self.accelerator.num_processes
        together = self.config.token_ranks
        if processes % together:
            raise ValueError(
                f"token_ranks must divide the number of processes, {processes}; got {together}"
            )
        if together > 1:
            shape, names = (processes // together, together), ("data", "tokens")
            mesh = init_device_mesh(self.device.type, shape, mesh_dim_names=names)
            for model in (self.state.model, self.state.ema.module):
                split_tokens(model, mesh["tokens"])
        self.draws = rank < together
        return rank // together, processes // together

    def begin(self) -> None:
        """Say what the run is, and write down its configuration."""
        for path, reason in self.data.skipped:
            self.log.note(f"skipped {path}: {reason}")
        if self.data.skipped:
            self.log.note(f"{len(self.data.skipped)} files skipped")
        for note in [*self.data.notes, *self.changes]:
            self.log.note(note)
        captions = len(self.data.captions)
        several = f" with {captions} captions" if captions > len(self.data) else ""
        weights = sum(weight.numel() for weight in self.state.model.parameters())
        going_on = f", going on after step {self.state.step}" if self.state.step else ""
        self.log.note(
            f"{len(self.data)} examples{several}, {weights / 1e6:.2f} M weights, {self.device}, "
            f"{self.accelerator.num_processes} processes{going_on}"
        )
        if self.state.step >= self.config.steps:
            made = f"the run has made {self.state.step} of {self.config.steps} steps"
            self.log.note(f"nothing is left to do: {made}")
        if self.first:
            self.folder.mkdir(parents=True, exist_ok=True)
            files.write_json(dataclasses.asdict(self.config), self.folder / CONFIG)
            found = {"classes": self.data.classes, "examples": len(self.data)}
            files.write_json(found, self.folder / CLASSES)

    def gradients(self) -> tuple[float, float]:
        """The next batch's gradients, clipped; its loss and their norm, over all processes."""
        config, accelerator = self.config, self.accelerator
        total = torch.zeros((), device=self.device)
        norm = torch.zeros(())
        try:
            for _ in range(config.accumulation):
                batch = {name: value.to(self.device) for name, value in next(self._parts).items()}
                with accelerator.accumulate(self.model):
                    loss = batch_loss(self.model, batch, config.flow)
                    accelerator.backward(loss)
                    total += loss.detach() / config.accumulation
            norm = accelerator.clip_grad_norm_(self.model.parameters(), config.clip)
        except RuntimeError as error:
            if not should_reduce_batch_size(error):
                raise
            raise MemoryError(
                f"step {self.state.step + 1}: a batch of {config.batch_size} examples of shape "
                f"{config.shape} in {config.accumulation} parts does not fit into memory: raise "
                "accumulation, or lower batch_size, data.frames or data.size"
            ) from error
        mean, length = float(accelerator.reduce(total, "mean")), float(norm)
        if not (math.isfinite(mean) and math.isfinite(length)):
            kept = f"{self.folder / STATE}" if (self.folder / STATE).exists() else "none yet"
            raise DivergedError(
                f"step {self.state.step + 1}: loss {mean}, gradient norm {length}; the last "
                f"checkpoint is kept: {kept}. A lower learning_rate or clip may help"
            )
        return mean, length

    def update(self) -> None:
        """One step of the optimizer with these gradients, and of the averaged weights."""
        warm = min(1.0, (self.state.step + 1) / max(1, self.config.warmup))
        for group in self.optimizer.param_groups:
            group["lr"] = self.config.learning_rate * warm
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.state.ema.update_parameters(self.state.model)
        self.state.step += 1

    def any_process(self, value: bool) -> bool:
        """Whether it is so in one of the processes: all of them go on or stop together."""
        flag = torch.tensor(float(value), device=self.device)
        return bool(self.accelerator.reduce(flag, "sum") > 0)

    def save(self) -> None:
        if not self.first:
            return
        try:
            self.state.save(self.folder)
        except OSError as error:
            raise OSError(
                f"step {self.state.step}: cannot save the checkpoint, the one before is kept: "
                f"{error}"
            ) from error

    def show(self) -> None:
        """Draw pictures with the averaged weights, all processes that share an example's tokens;
        the first decodes and writes them."""
        if not self.draws:
            return
        conditions = examples(self.data, self.config)
        samples = sample(self.state.ema.module, self.config, conditions, device=self.device)
        if not self.first:
            return
        pictures = as_pictures(samples, self.config)
        names = name_conditions(conditions, self.data.classes)
        path = self.folder / "samples" / f"step-{self.state.step:07}"
        path = save_grid(pictures, names, path)
        self.log.picture(self.state.step, path, grid(still(pictures), names))


def batch_loss(model: nn.Module, batch: dict[str, Tensor], objective: flow.Objective) -> Tensor:
    """The loss of a batch as `data.batches` gives it."""
    pixels, noise, timestep = (batch[name] for name in ("pixels", "noise", "timestep"))
    condition = {name: batch[name] for name in batch.keys() - {"pixels", "noise", "timestep"}}
    clean = pixels.float() / 127.5 - 1 if pixels.dtype == torch.uint8 else pixels
    noisy, target = objective.corrupt(clean, noise, timestep)
    return flow.loss(model(noisy, timestep, **condition), target)
