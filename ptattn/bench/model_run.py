"""Blocks and whole models at one size: held to the gate as they are then timed, in turns."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from . import baselines, clocks, floor, peaks
from .clocks import Rates, Run
from .floor import FORWARD
from .gate import Gate
from .harness import Bench, first_line
from .implementations import Implementation, Model, block_model, implementations, whole_model
from .parity import WrongError
from .results import COMPILED, EAGER, ERROR, FAILED, GRAPH, REFUSED, SKIPPED, Row
from .workloads import DTYPES, Entry, Settings, Size, plan

GEMMS = "21 GEMMs"
# How many tensors of the tokens a step of one block holds; how many copies of the weights there are
# (as they are, fused, gradients, truth at twice the size); how much larger truth's activations are.
KEPT, COPIES, FINER_TIMES = 45, 5, 2


@dataclass(frozen=True)
class ModelWorkload:
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

    def __str__(self) -> str:
        return f"{self.kind} {self.size} b{self.batch}" + (
            "" if self.depth is None else f" depth {self.depth}"
        )

    def blocks(self, entry: Entry) -> int:
        return 1 if self.kind == "block" else self.depth or entry.depth

    @property
    def cost(self) -> float:
        """What its time is predicted from; a training step is three forwards."""
        steps = 1 if self.task == FORWARD else 3
        return steps * self.batch * sum(entry.cost * self.blocks(entry) for entry in self.entries)

    @property
    def checks(self) -> int:
        """Calls that the gate takes as long as."""
        return 6 if self.checked is None else 1

    @property
    def family(self) -> str:
        """Workloads of one family take time in proportion to their cost."""
        families = dict.fromkeys(entry.block.family for entry in self.entries)
        return " ".join([self.kind, self.task, *families])

    @property
    def memory(self) -> int:
        """About how many bytes measuring takes: weights of all, activations of one at a time."""
        if self.one:
            dtype, backend = DTYPES[self.settings.dtype], self.settings.backend
            return max(entry.block.memory(dtype, backend) for entry in self.entries)
        itemsize = DTYPES[self.settings.dtype].itemsize
        weights, activations = [], []
        for entry in self.entries:
            dim, blocks = entry.block.config.dim, self.blocks(entry)
            weights.append(24 * dim**2 * blocks)
            kept = KEPT * (1 if self.task == FORWARD else blocks)
            activations.append(kept * self.batch * entry.block.tokens * dim)
        return itemsize * (COPIES * sum(weights) + FINER_TIMES * max(activations))

    def blank(self, status: str, note: str = "") -> list[Row]:
        return [
            self.row(e, e.name, not e.is_proxy_tokenized, status=status, note=note)
            for e in self.entries
        ]

    def row(self, entry: Entry, name: str, baseline: bool, **known: Any) -> Row:
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
            "macs": entry.full.total,
            "macs_paper": entry.paper.total,
        }
        tokens = self.batch * entry.block.tokens
        known |= dict(tokens=tokens, facts=facts)
        return Row(str(self), self.task, name, entry.name, baseline, **known)

    def floor(self, entry: Entry, rates: Rates, fused: bool = False) -> float:
        depth = None if self.kind == "block" else self.blocks(entry)
        itemsize = DTYPES[self.settings.dtype].itemsize
        sizes = dict(batch=self.batch, itemsize=itemsize, depth=depth, fused=fused)
        return floor.work(entry.model, self.size, self.task, **sizes).seconds(rates)  # type: ignore[arg-type]

    def measure(self, bench: Bench) -> list[Row]:
        rows: list[Row] = []
        runs: dict[str, Run] = {}
        for entry in self.entries:
            model = self._model(entry)
            found = list(self._checked(entry, model, bench))
            if self._has_gemms and not runs:
                first = replace(self.row(entry, GEMMS, True), model=GEMMS)
                found.append((first, baselines.gemms_21(model.leaves[0])))
            rows += [row for row, _ in found]
            runs |= {_key(row): run for row, run in found if run is not None}
        with torch.set_grad_enabled(self.task != FORWARD):
            # A graph's memory is its own, and a replay adds nothing.
            eager = {key: run for key, run in runs.items() if not key.endswith(GRAPH)}
            seen = {key: peaks.added(run, bench.device) for key, run in eager.items()}
            peak = {key: bytes_ for key, (bytes_, _) in seen.items()}
            before = {key: seconds for key, (_, seconds) in seen.items()}
            times = clocks.measure(bench.clock, runs, bench.seconds, bench.calls, before)
        return [
            replace(row, timing=times[key], peak=peak.get(key))
            if (key := _key(row)) in runs
            else row
            for row in rows
        ]

    @property
    def _has_gemms(self) -> bool:
        return self.kind == "block" and self.task == FORWARD and not self.one

    def _model(self, entry: Entry) -> Model:
        torch.manual_seed(0)
        if self.kind == "block":
            return block_model(entry, self.settings, self.batch)
        return whole_model(entry, self.settings, self.batch, self.depth)

    def _checked(
        self, entry: Entry, model: Model, bench: Bench
    ) -> Iterator[tuple[Row, Run | None]]:
        """A row of each implementation and mode, and how to run it, or the row says why not."""
        seen = model
        if self.checked is not None and self.kind == "block":
            corner = replace(entry, block=entry.block.corner(self.checked))
            seen = self._model(corner)
        gate = Gate(seen, self.task)
        for makers, theirs in zip(
            implementations(seen, one=self.one), implementations(model, one=self.one), strict=True
        ):
            ran = False
            for name in makers:
                for row, run in self._modes(entry, name, makers[name], gate, seen, bench):
                    if run is not None and seen is not model:
                        run, _ = bind(theirs[name](), model, self.task, graph=row.mode == GRAPH)
                    ran |= run is not None
                    yield row, run
            if ran:
                return

    def _modes(
        self,
        entry: Entry,
        name: str,
        make: Callable[[], Implementation],
        gate: Gate,
        model: Model,
        bench: Bench,
    ) -> Iterator[tuple[Row, Run | None]]:
        baseline = not entry.is_proxy_tokenized or name.endswith(baselines.RELEASED)

        def refused(problem: Exception, mode: str, shown: str) -> Row:
            status = REFUSED if baseline or shown != name else _status(problem)
            return self.row(
                entry, shown, baseline, mode=mode, status=status, note=first_line(problem)
            )

        try:
            own = make()
        except Exception as problem:  # refusals have many types
            yield refused(problem, EAGER, name), None
            return
        if own.for_inference and self.task != FORWARD:
            return
        ways: list[tuple[str, str, Callable[[], Implementation]]] = [(EAGER, name, lambda: own)]
        if bench.compiled:
            ways.append((COMPILED, name, own.compiled))
        if bench.device == "cuda":
            ways.append((GRAPH, name, lambda: own))
        if bench.quantized and self.task == FORWARD and name != f"{entry.name} fused":
            # torchao takes some devices and layers alone: to refuse is no fault of the model's.
            eight = functools.cache(lambda: own.fp8().compiled())
            ways.append((COMPILED, f"{name} fp8", eight))
            if bench.device == "cuda":
                ways.append((GRAPH, f"{name} fp8", eight))
        for mode, shown, way in ways:
            try:
                with torch.set_grad_enabled(self.task != FORWARD):
                    chosen = way()
                    run, results = bind(chosen, model, self.task, graph=mode == GRAPH)
                    error = gate.check(chosen, results)
            except Exception as problem:  # as above
                yield refused(problem, mode, shown), None
                if mode == EAGER:
                    return
                continue
            known: dict[str, Any] = dict(mode=mode, error=error, quantized=chosen.quantized)
            if bench.rates is not None and not chosen.quantized:  # of which the rate is unknown
                known["floor"] = self.floor(entry, bench.rates, chosen.name.endswith(" fused"))
            yield self.row(entry, shown, baseline, **known), run


def _status(problem: Exception) -> str:
    """Of a candidate."""
    if isinstance(problem, WrongError):
        return FAILED
    return SKIPPED if isinstance(problem, torch.OutOfMemoryError) else ERROR


def model_workloads(
    kind: str, models: Sequence[str], sizes: Sequence[Size], tasks: Sequence[str],
    settings: Settings, *, batch: int = 1, depth: int | None = None,
) -> list[ModelWorkload]:  # fmt: skip
    """Every size in every task, all models of a size in one workload."""
    planned = plan(list(dict.fromkeys(models)), sizes)
    by_size = itertools.groupby(planned, key=lambda entry: entry.size)
    entries = {size: tuple(own) for size, own in by_size}
    return [
        ModelWorkload(kind, size, own, settings, task, batch, depth)
        for task in dict.fromkeys(tasks)
        for size, own in entries.items()
    ]


def _key(row: Row) -> str:
    return f"{row.name} {row.mode}"


def bind(
    own: Implementation, model: Model, task: str, *, graph: bool = False
) -> tuple[Run, tuple[Tensor, ...]]:
    """How to compute it once more, and what it computed: the output, and in training the gradients
    of all inputs and weights. `graph`: as the replay of a CUDA graph."""
    first, *others = model.leaves
    leaves = [own.enter(first.detach()), *(leaf.detach() for leaf in others)]
    if task == FORWARD:

        def step() -> tuple[Tensor, ...]:
            with torch.inference_mode():
                return (own(*leaves),)
    else:
        leaves = [leaf.requires_grad_() for leaf in leaves]
        wanted = [*leaves, *own.module.parameters()]
        upstream = own.enter(model.upstream)

        def step() -> tuple[Tensor, ...]:
            out = own(*leaves)
            return out.detach(), *torch.autograd.grad(out, wanted, upstream)

    results = step()
    if not graph:
        return step, results
    replay, results = clocks.captured(step)
    replay()
    return replay, results
