"""What a run needs to go on: weights, averaged weights, the optimizer's state and the step."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from torch.optim.swa_utils import AveragedModel

from .. import files
from ..checkpoint import Model, save_model
from .config import Config, differences, parse

# The files of a run.
CONFIG, CLASSES, STATE, MODEL = "config.json", "classes.json", "state.safetensors", "model"


@dataclass
class State:
    """A run between two steps. All that is random follows from the seed and the step."""

    model: Model
    ema: AveragedModel
    optimizer: torch.optim.AdamW
    step: int = 0

    @classmethod
    def fresh(cls, config: Config, device: torch.device) -> State:
        with torch.random.fork_rng():
            torch.manual_seed(config.seed)
            model = config.create_model().to(device)
        ema = AveragedModel(model, multi_avg_fn=_averaging(config.ema)).eval()
        ema.requires_grad_(False)
        optimizer = torch.optim.AdamW(
            model.parameters(), config.learning_rate, weight_decay=config.weight_decay
        )
        return cls(model, ema, optimizer)

    def save(self, folder: Path) -> None:
        """Write the averaged weights as a model of their own, and the state.

        The state comes last: whoever goes on after a kill between the two writes both again.

        Raises:
            OSError: a file that cannot be written, such as on a full disk; the state saved before
                is as it was.
        """
        save_model(cast(Model, self.ema.module), folder / MODEL)
        files.write_tensors(self._tensors(), folder / STATE)

    def restore(self, folder: Path) -> None:
        """Go on from what `save` has written; ValueError if it is no state of this model."""
        saved = files.read_tensors(folder / STATE)
        moments = {i: _below(f"optimizer.{name}.", saved) for i, name in enumerate(self._names())}
        try:
            self.model.load_state_dict(_below("model.", saved))
            self.ema.load_state_dict(_below("ema.", saved))
            self.optimizer.load_state_dict({**self.optimizer.state_dict(), "state": moments})
            self.step = int(saved["step"])
        except (KeyError, RuntimeError) as error:
            raise ValueError(f"{folder / STATE} is no state of this model: {error}") from error

    def _names(self) -> list[str]:
        return [name for name, _ in self.model.named_parameters()]

    def _tensors(self) -> dict[str, Tensor]:
        names, moments = self._names(), self.optimizer.state_dict()["state"]
        return {
            "step": torch.tensor(self.step),
            **{f"model.{name}": value for name, value in self.model.state_dict().items()},
            **{f"ema.{name}": value for name, value in self.ema.state_dict().items()},
            **{
                f"optimizer.{names[i]}.{key}": value
                for i, own in moments.items()
                for key, value in own.items()
            },
        }


def read_config(folder: Path) -> Config:
    """The configuration of the run in a folder.

    Raises:
        ValueError: no run, or one whose configuration this version does not know.
    """
    path = folder / CONFIG
    if not path.is_file():
        raise ValueError(f"{folder} holds no run: there is no {CONFIG}")
    try:
        return parse(files.read_json(path))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def check_folder(folder: Path, config: Config) -> bool:
    """Whether there is a run in the folder to go on with.

    Raises:
        ValueError: it is one of another configuration; the message has every difference.
    """
    if not (folder / STATE).exists():
        return False
    if different := differences(read_config(folder), config):
        raise ValueError(
            f"{folder} holds a run of another configuration ({'; '.join(different)}); "
            "use another folder"
        )
    return True


def check_data(folder: Path, classes: Sequence[str], examples: int) -> list[str]:
    """Notes on how the data differ from those that the run in the folder had.

    Raises:
        ValueError: other classes, so that the run's labels would change their names.
    """
    path = folder / CLASSES
    if not path.is_file():
        raise ValueError(f"{folder} holds a run without {CLASSES}, the names of its classes")
    saved = files.read_json(path)
    there, here = list(saved["classes"]), list(classes)
    if there != here:
        changes = [
            *(f"{name} is there, not here" for name in there if name not in here),
            *(f"{name} is here, not there" for name in here if name not in there),
        ]
        raise ValueError(
            f"{folder} holds a run of other classes ({'; '.join(changes) or 'in another order'}); "
            "use another folder"
        )
    before = saved.get("examples", examples)  # early runs have not written it
    return [] if before == examples else [f"the run had {before} examples, it has {examples} now"]


def _below(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {
        name.removeprefix(prefix): value
        for name, value in tensors.items()
        if name.startswith(prefix)
    }


def _averaging(decay: float) -> Callable[[Any, Any, Any], None]:
    """A decay that rises with the number of steps n as (1 + n) / (10 + n)."""

    def average(averaged: list[Tensor], current: list[Tensor], count: Tensor) -> None:
        n = float(count)
        torch._foreach_lerp_(averaged, current, 1 - min(decay, (1 + n) / (10 + n)))

    return average
