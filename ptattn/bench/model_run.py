"""Blocks and whole models at one size: held to the gate as they are then timed, in turns."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from . import baselines, clocks, floor
from .clocks import Run
from .floor import FORWARD
from .gate import Gate
from .harness import Bench, Found, Workload, first_line, first_that_run, outcome, timed
from .implementations import FUSED, Make, Model, block_model, implementations, whole_model
from .parity import WrongError
from .results import COMPILED, EAGER, GRAPH, REFUSED, Row
from .workloads import DTYPES, LIVE_TENSORS, Entry, Settings, Size, plan

GEMMS = "21 GEMMs"
# Of a training step: how many tensors of the tokens a block holds. Of any: how many copies of the
# weights there are (as they are, fused, gradients, truth at twice the size), how much larger
# truth's activations are, and how many implementations a model has.
KEPT, COPIES, FINER_TIMES, IMPLEMENTATIONS = 45, 5, 2, 2


@dataclass(frozen=True)
class ModelWorkload(Workload):
    """Models, or with `kind` "block" one block of each, at one size and in one task."""

    kind: str
    size: Size
    entries: tuple[Entry, ...]
    settings: Settings
    task: str = FORWARD
    batch: int = 1
    depth: int | None = None  # of the models, where it is not their own
    one: bool = False  # implementation of each model, and no 21 GEMMs
    checked: int | None = None  # tokens of the corner that the gate sees, where that is not all
    compiled: bool = False  # by torch.compile, too
    quantized: bool = False  # the linear layers in fp8, too, in the forward

    def __str__(self) -> str:
        return f"{self.kind} {self.size} b{self.batch}" + (
            "" if self.depth is None else f" depth {self.depth}"
        )

    def blocks(self, entry: Entry) -> int:
        return 1 if self.kind == "block" else self.depth or entry.depth

    @property
    def cost(self) -> float:
        """A training step is three forwards."""
        steps = 1 if self.task == FORWARD else 3
        return steps * self.batch * sum(entry.cost * self.blocks(entry) for entry in self.entries)

    @property
    def checks(self) -> int:
        return 6 if self.checked is None else 1

    @property
    def compiling(self) -> int:
        modes = self.compiled + self.in_fp8
        return modes * sum(map(self._implementations, self.entries))

    @property
    def in_fp8(self) -> bool:
        """What is quantized does not train."""
        return self.quantized and self.task == FORWARD

    def _implementations(self, entry: Entry) -> int:
        """About how many; a fused model does not train."""
        alone = self.kind == "model" and self.task != FORWARD and entry.is_proxy_tokenized
        return 1 if self.one or alone else IMPLEMENTATIONS

    @property
    def family(self) -> str:  # type: ignore[override]
        families = dict.fromkeys(entry.family for entry in self.entries)
        return " ".join([self.kind, self.task, *families])

    @property
    def memory(self) -> int:
        """About how many bytes measuring takes: weights of all, activations of one at a time, and
        of every CUDA graph, which keeps its own."""
        dtype, total, most = DTYPES[self.settings.dtype], 0, 0
        for entry in self.entries:
            blocks, number = self.blocks(entry), self._implementations(entry)
            kept = LIVE_TENSORS if self.task == FORWARD else KEPT * blocks
            live = self.batch * entry.activations(dtype, self.settings.backend, kept)
            # What is quantized is copied once more when it is compiled.
            copies = COPIES + number * (self.compiled + 2 * self.in_fp8)
            total += copies * 24 * entry.config.dim**2 * blocks * dtype.itemsize
            if self.settings.device == "cuda":
                total += number * (1 + self.in_fp8) * live
            most = max(most, live)
        return total + most * (FINER_TIMES if self.checked is None else 1)

    def blank(self, status: str, note: str = "") -> list[Row]:
        return [
            self.row(e, e.name, not e.is_proxy_tokenized, status=status, note=note)
            for e in self.entries
        ]

    def row(self, entry: Entry, name: str, baseline: bool, **known: Any) -> Row:
        facts = {
            "kind": self.kind,
            "model": entry.model,
            "side": entry.size.side,
            "frames": entry.size.frames,
            "width": entry.config.dim,
            "parameters": entry.parameters,
            "blocks": self.blocks(entry),
            "depth": entry.depth,
            "batch": self.batch,
            "macs": entry.full.total,
            "macs_paper": entry.paper.total,
        }
        known |= dict(tokens=self.batch * entry.tokens, facts=facts)
        return Row(str(self), self.task, name, entry.name, baseline, **known)

    def work(self, entry: Entry, *, fused: bool = False) -> floor.Work:
        """What a model or block does, as the floor counts it."""
        return floor.work(
            entry.model, self.size, self.task, batch=self.batch, fused=fused,
            itemsize=DTYPES[self.settings.dtype].itemsize,
            depth=None if self.kind == "block" else self.blocks(entry),
        )  # fmt: skip

    def model(self, entry: Entry) -> Model:
        torch.manual_seed(0)
        if self.kind == "block":
            return block_model(entry, self.settings, self.batch)
        return whole_model(entry, self.settings, self.batch, self.depth)

    def measure(self, bench: Bench) -> list[Row]:
        found: list[Found] = []
        for entry in self.entries:
            model = self.model(entry)
            rows = list(self._checked(entry, model, bench))
            if not found and self.kind == "block" and self.task == FORWARD and not self.one:
                gemms = replace(self.row(entry, GEMMS, True), model=GEMMS)
                rows.append((gemms, baselines.gemms_21(model.leaves[0])))
            found += rows
        with torch.set_grad_enabled(self.task != FORWARD):
            # A graph's memory is its own, and a replay adds nothing.
            return timed(found, bench.clock, bench, peaked=(EAGER, COMPILED))

    def _checked(self, entry: Entry, model: Model, bench: Bench) -> Iterator[Found]:
        """A row of each implementation and mode, and how to run it, or the row says why not."""
        models = [model]
        if self.checked is not None:
            models.insert(0, self.model(entry.corner(self.checked)))
        gate = Gate(models[0], self.task)
        return first_that_run(
            implementations(model, one=self.one),
            lambda name, make: self._attempt(entry, name, make, models, gate, bench),
        )

    def _attempt(
        self, entry: Entry, name: str, make: Make, models: list[Model], gate: Gate, bench: Bench
    ) -> Iterator[Found]:
        """Of one implementation: the gate sees the first of these models, and the last is timed."""
        baseline = not entry.is_proxy_tokenized or name == baselines.RELEASED
        made: list[Model] = []
        for mode, kind, change in self._modes(name, bench):
            row = self.row(entry, " ".join(filter(None, (entry.name, name, kind))), baseline)
            row.mode = mode
            try:
                made = made or [make(model) for model in models]
                if made[0].for_inference and self.task != FORWARD:
                    return
                with torch.set_grad_enabled(self.task != FORWARD):
                    seen, *whole = map(change, made)
                    run, results = bind(seen, self.task, graph=mode == GRAPH)
                    row.error, row.quantized = gate.check(seen, results), seen.quantized
                    for one in whole:
                        run, _ = bind(one, self.task, graph=mode == GRAPH)
            except Exception as problem:  # refusals have many types
                # torchao takes some devices and layers alone: to refuse is no fault of the model's.
                excused = baseline or (kind and not isinstance(problem, WrongError))
                refusal: dict[str, Any] = dict(status=REFUSED, note=first_line(problem))
                yield replace(row, **(refusal if excused else outcome(problem))), None
                if mode == EAGER:
                    return
                continue
            if bench.rates is not None and not seen.quantized:  # of which the rate is unknown
                row.floor = self.work(entry, fused=name == FUSED).seconds(bench.rates)
            yield row, run

    def _modes(
        self, name: str, bench: Bench
    ) -> Iterator[tuple[str, str, Callable[[Model], Model]]]:
        """The modes of an implementation, what their names add to its own, and what they change."""
        yield EAGER, "", lambda own: own
        if self.compiled:
            yield COMPILED, "", Model.compiled
        if bench.device == "cuda":
            yield GRAPH, "", lambda own: own
        if self.in_fp8 and name != FUSED:
            made: dict[int, Model] = {}

            def in_fp8(own: Model) -> Model:
                if id(own) not in made:  # compiled once for both modes
                    made[id(own)] = own.fp8().compiled()
                return made[id(own)]

            yield COMPILED, "fp8", in_fp8
            if bench.device == "cuda":
                yield GRAPH, "fp8", in_fp8


def model_workloads(
    kind: str, models: Sequence[str], sizes: Sequence[Size], tasks: Sequence[str],
    settings: Settings, **known: Any,
) -> list[ModelWorkload]:  # fmt: skip
    """Every size in every task, all models of a size in one workload; `known` are its others."""
    planned = plan(list(dict.fromkeys(models)), sizes)
    by_size = itertools.groupby(planned, key=lambda entry: entry.size)
    entries = {size: tuple(own) for size, own in by_size}
    return [
        ModelWorkload(kind, size, own, settings, task, **known)
        for task in dict.fromkeys(tasks)
        for size, own in entries.items()
    ]


def bind(model: Model, task: str, *, graph: bool = False) -> tuple[Run, tuple[Tensor, ...]]:
    """How to compute it once more, and what it computed: the output, and in training the gradients
    of all inputs and weights. `graph`: as the replay of a CUDA graph."""
    leaves = [leaf.detach() for leaf in model.leaves]
    if task == FORWARD:

        def step() -> tuple[Tensor, ...]:
            with torch.inference_mode():
                return (model.forward(model.module, *leaves),)
    else:
        leaves = [leaf.requires_grad_() for leaf in leaves]
        wanted = [*leaves, *model.module.parameters()]

        def step() -> tuple[Tensor, ...]:
            out = model.forward(model.module, *leaves)
            return out.detach(), *torch.autograd.grad(out, wanted, model.upstream)

    results = step()
    if not graph:
        return step, results
    replay, results = clocks.captured(step)
    replay()
    return replay, results
