"""How a run is doing: a bar on a terminal, lines elsewhere, and tensorboard."""

from __future__ import annotations

import datetime
import math
import time
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from PIL import Image
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

EVERY = 10.0  # seconds between lines where there is no terminal


class Log:
    """Loss, throughput and remaining time of a run, within a `with` statement.

    Args:
        folder: of the run; tensorboard's files lie in it.
        start, steps: the first step and the last.
        batch_size: examples per step.
        limit: seconds after which the run ends, however many steps are left.
        quiet: show and write nothing, as all processes but the first do.
    """

    def __init__(
        self, folder: Path, start: int, steps: int, batch_size: int, limit: float, quiet: bool
    ) -> None:
        self._batch_size, self._start, self._steps, self._limit = batch_size, start, steps, limit
        self._console = Console(stderr=True, quiet=quiet)
        self._bar = Progress(
            TextColumn("step"),
            MofNCompleteColumn(),
            BarColumn(bar_width=None),
            TextColumn("loss {task.fields[loss]:.4f}  {task.fields[speed]:.1f} examples/s"),
            TextColumn("{task.fields[left]}"),
            console=self._console,
            disable=not self._console.is_terminal,
        )
        self._task = self._bar.add_task(
            "", total=steps, completed=start, loss=math.nan, speed=0.0, left=""
        )
        self._board: Any = None
        if not quiet:
            from torch.utils.tensorboard import SummaryWriter

            # What a run that was killed has logged beyond its checkpoint is overwritten.
            self._board = SummaryWriter(str(folder / "tensorboard"), purge_step=start + 1)
        self._losses: list[float] = []

    def __enter__(self) -> Log:
        self._begin = self._since = self._lap = time.monotonic()
        self._bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        at: TracebackType | None,
    ) -> None:
        self._bar.stop()
        if self._board is not None:
            self._board.close()

    def step(self, step: int, loss: float, **scalars: float) -> None:
        """After each step; what is shown is the mean since the line before."""
        now = time.monotonic()
        speed, self._lap = self._batch_size / max(now - self._lap, 1e-9), now
        if self._board is not None:
            for name, value in dict(loss=loss, examples_per_second=speed, **scalars).items():
                self._board.add_scalar(name, value, step)
        self._losses.append(loss)
        mean = float(np.mean(self._losses[-100:]))
        left = self._left(step, now)
        self._bar.update(self._task, completed=step, loss=mean, speed=speed, left=left)
        last = step == self._steps or now - self._begin > self._limit
        if self._console.is_terminal or (now - self._since < EVERY and not last):
            return
        speed = self._batch_size * len(self._losses) / max(now - self._since, 1e-9)
        self.note(
            f"step {step}/{self._steps}: loss {np.mean(self._losses):.4f}, {speed:.1f} examples/s, "
            + left
        )
        self._losses, self._since = [], now

    def _left(self, step: int, now: float) -> str:
        """At the pace of this run so far, and not beyond its limit."""
        run = now - self._begin
        seconds = min(run / (step - self._start) * (self._steps - step), self._limit - run)
        return f"about {datetime.timedelta(seconds=round(max(0.0, seconds)))} left"

    def picture(self, step: int, path: Path, sheet: Image.Image) -> None:
        self.note(f"samples: {path}")
        if self._board is not None:
            self._board.add_image("samples", np.array(sheet), step, dataformats="HWC")

    def note(self, text: str) -> None:
        text = text.encode(errors="backslashreplace").decode()  # names of files may be any bytes
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)
