"""Blocks and whole models at one size: the gate, then the times of all that passed it, in turns."""

from __future__ import annotations

import copy
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..compare import units, worker
from ..compare.cases import Entry, Size
from ..compare.worker import Settings
from . import baselines, floor, timing
from .contenders import Contender, Subject, block_subject, contenders, model_subject
from .floor import FORWARD
from .harness import Bench, first_line
from .parity import assert_near
from .result import FAILED, NOT_REACHED, OK, REFUSED, Row
from .timing import Run

YARDSTICK = "21 GEMMs"
FINER = {torch.float32: torch.float64}  # what the truth is computed in; of 16 bits, float32
# How many tensors of the tokens a step of one block holds; how many copies of the weights there are
# (as they are, fused, gradients, truth at twice the size); how much larger truth's activations are.
KEPT, COPIES, FINER_TIMES = 45, 5, 2
# What measuring a model takes, its contenders, gate and repeats together, over its floor.
CALLS = 40


@dataclass(frozen=True)
class ModelCase:
    """Models, or with `kind` "block" one block of each, at one size and in one task."""

    kind: str
    size: Size
    entries: tuple[Entry, ...]
    settings: Settings
    task: str = FORWARD
    batch: int = 1
    depth: int | None = None  # of the models, where it is not their own

    def __str__(self) -> str:
        return f"{self.kind} {self.size} b{self.batch}" + (
            "" if self.depth is None else f" depth {self.depth}"
        )

    def blocks(self, entry: Entry) -> int:
        return 1 if self.kind == "block" else self.depth or entry.depth

    @property
    def memory(self) -> int:
        """About how many bytes measuring takes: weights of all, activations of one at a time."""
        itemsize = worker.DTYPES[self.settings.dtype].itemsize
        weights, activations = [], []
        for entry in self.entries:
            dim, blocks = entry.block.config.dim, self.blocks(entry)
            weights.append(24 * dim**2 * blocks)
            kept = KEPT * (1 if self.task == FORWARD else blocks)
            activations.append(kept * self.batch * entry.block.tokens * dim)
        return itemsize * (COPIES * sum(weights) + FINER_TIMES * max(activations))

    def blank(self, status: str, note: str = "") -> list[Row]:
        return [self.row(e, e.name, e.is_proxy_tokenized, status, note) for e in self.entries]

    def row(
        self, entry: Entry, name: str, ours: bool, status: str, note: str = "", **known: Any
    ) -> Row:
        config = entry.block.config
        facts = {
            "kind": self.kind,
            "model": entry.model,
            "side": entry.size.side,
            "frames": entry.size.frames,
            "width": config.dim,
            "parameters": entry.parameters,
            "blocks": self.blocks(entry),
            "depth": entry.depth,
            "batch": self.batch,
        }
        tokens = self.batch * entry.block.tokens
        return Row(
            str(self), self.task, name, entry.name, ours, status, note, tokens, facts=facts, **known
        )

    def floor(self, entry: Entry, bench: Bench, fused: bool = False) -> float:
        depth = None if self.kind == "block" else self.blocks(entry)
        sizes = dict(batch=self.batch, itemsize=bench.dtype.itemsize, depth=depth, fused=fused)
        return floor.work(entry.model, self.size, self.task, **sizes).seconds(bench.rates)  # type: ignore[arg-type]

    def measure(self, bench: Bench) -> list[Row]:
        expected = CALLS * sum(self.floor(entry, bench) for entry in self.entries)
        if time.monotonic() + expected > bench.deadline:
            return self.blank(NOT_REACHED, f"would take some {units.seconds(expected)}")
        rows: list[Row] = []
        runs: dict[str, Run] = {}
        passed: dict[str, tuple[Entry, Contender, float]] = {}
        for entry in self.entries:
            subject = self._subject(entry)
            gate = Gate(subject, self.task)
            for name, contender, problem in _offered(subject, gate, bench.compiled):
                if contender is None or isinstance(problem, str):
                    ours = entry.is_proxy_tokenized and not name.endswith(baselines.RELEASED)
                    rows.append(
                        self.row(entry, name, ours, FAILED if ours else REFUSED, str(problem))
                    )
                else:
                    passed[name] = entry, contender, problem
                    runs[name] = bind(contender, subject, self.task)
            if YARDSTICK not in runs and self.kind == "block" and self.task == FORWARD:
                runs[YARDSTICK] = baselines.gemms_21(subject.leaves[0])
        with torch.set_grad_enabled(self.task != FORWARD):
            times = timing.measure(bench.clock, runs, bench.seconds)
            peaks = {name: worker.watched(run, bench.device)[1] for name, run in runs.items()}
        for name, (entry, contender, error) in passed.items():
            known: dict[str, Any] = dict(timing=times[name], peak=peaks[name], error=error)
            known["floor"] = self.floor(entry, bench, contender.fused)
            rows.append(self.row(entry, name, contender.ours, OK, **known))
        if YARDSTICK in runs:
            first = self.row(self.entries[0], YARDSTICK, False, OK, timing=times[YARDSTICK])
            rows.append(replace(first, model=YARDSTICK))
        return rows

    def _subject(self, entry: Entry) -> Subject:
        torch.manual_seed(0)
        if self.kind == "block":
            return block_subject(entry, self.settings, self.batch)
        return model_subject(entry, self.settings, self.batch, self.depth)


class Gate:
    """What a subject's contenders are held to: truth in a finer dtype, and plain torch's error.

    Both are, for PT-DiT, by the backend `reference`, the specification; for full attention, whose
    scores would not fit, by `sdpa`.
    """

    def __init__(self, subject: Subject, task: str) -> None:
        self.task = task
        dtype = subject.leaves[0].dtype
        self.upstream = subject.upstream
        by = "reference" if subject.proxy_tokenized else "sdpa"
        finer = FINER.get(dtype, torch.float32)
        self.truth = self._by(subject, by, finer)
        self.plain = self._by(subject, by, dtype)

    def _by(self, subject: Subject, backend: str, dtype: torch.dtype) -> list[Tensor]:
        module = copy.deepcopy(subject.module).to(dtype)
        for part in module.modules():
            if hasattr(part, "backend"):
                part.backend = backend  # type: ignore[assignment]
        contender = Contender(backend, module, partial(subject.call, module))
        return self._outputs(contender, tuple(leaf.to(dtype) for leaf in subject.leaves))

    def check(self, contender: Contender, subject: Subject) -> float:
        """The largest relative error; raises WrongError where it is beyond the limit."""
        outputs = self._outputs(contender, subject.leaves)
        return assert_near(contender.name, outputs, self.truth, self.plain)

    def _outputs(self, contender: Contender, leaves: tuple[Tensor, ...]) -> list[Tensor]:
        """The output, and in training the gradients of the leaves."""
        first, *others = leaves
        own = [contender.enter(first), *others]
        if self.task == FORWARD:
            with torch.inference_mode():
                return [contender.leave(contender.call(*own))]
        own = [t.detach().requires_grad_() for t in own]
        out = contender.call(*own)
        upstream = contender.enter(self.upstream.to(out.dtype))
        dx, *grads = torch.autograd.grad(out, own, upstream)
        return [contender.leave(out.detach()), contender.leave(dx), *grads]


def _offered(
    subject: Subject, gate: Gate, compiled: bool
) -> Iterator[tuple[str, Contender | None, float | str]]:
    """Every contender with its error, or with the reason why it does not take part."""
    for makers in contenders(subject, compiled=compiled):
        ran = False
        for name, make in makers.items():
            try:
                contender = make()
                if contender.fused and gate.task != FORWARD:
                    continue
                yield name, contender, gate.check(contender, subject)
                ran = True
            except Exception as error:  # refusals have many types
                yield name, None, first_line(error)
        if ran:
            return


def bind(contender: Contender, subject: Subject, task: str) -> Run:
    """One forward without gradients; or forward and backward, to all inputs and weights."""
    first, *others = subject.leaves
    own = [contender.enter(first), *others]
    if task == FORWARD:
        return torch.inference_mode()(partial(contender.call, *own))
    own = [t.detach().requires_grad_() for t in own]
    wanted = [*own, *contender.module.parameters()]
    upstream = contender.enter(subject.upstream)

    def step() -> tuple[Tensor, ...]:
        return torch.autograd.grad(contender.call(*own), wanted, upstream)

    return step
