"""The command `ptattn bench`: its arguments, and what they make it measure."""

from __future__ import annotations

import argparse
import dataclasses
import re
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from .. import backends
from ..command_line import UsageError, count, number, pattern
from ..models import list_models
from ..paper import TRAINING_MEMORY
from . import clocks, gpu, memory, op_workloads, parallel, predict, workloads
from .clocks import WallClock
from .floor import FORWARD, TASKS
from .harness import Bench, Workload
from .model_run import model_workloads
from .op_run import OperationWorkload
from .options import add_dtype, add_measuring, add_out, carry_out, settings_of
from .workloads import DTYPES, FIGURE_SIZES, FIGURES, Settings, Size

Commands = Any  # argparse's own type of a group of subcommands has no public name
# Seconds for a task at a size, all implementations together.
SECONDS = {"cuda": 0.3, "cpu": 10.0}


def add_parser(commands: Commands) -> None:
    text = "times and memory of operations, blocks and models, each checked before it is timed"
    parser = commands.add_parser(
        "bench", help=text, description=f"Measure {text}. Exit status 1 if a result is wrong, or "
        "slower than in the file of --against beyond noise.",
    )  # fmt: skip
    kinds = parser.add_subparsers(dest="kind", required=True, metavar="WHAT")
    ops = _add(kinds, "ops", "the operations, against torch's own and the time floor", _ops)
    ops.add_argument("--only", metavar="PATTERN", type=pattern, default=re.compile(""),
                     help="operations whose name matches, such as 'window XL 1024'")  # fmt: skip
    _add_timing(ops, 120.0)
    ops.set_defaults(dtype="bf16")  # whatever the machine: the kernels' own cases
    for kind, what, models, sizes in (
        ("block", "one block of each model", workloads.MODELS[:3], (256, 512, 1024, 2048)),
        ("model", "whole models", workloads.MODELS, (256, 512)),
    ):
        own = _add(kinds, kind, f"{what}, proxy-tokenized and full attention", _models)
        _add_models(own, models)
        _add_sizes(own, [Size(side) for side in sizes])
        own.add_argument("--tasks", nargs="+", choices=TASKS, default=[FORWARD],
                         help="default: forward")  # fmt: skip
        own.add_argument("--batch", type=count, default=1, help="default: %(default)s")
        add_dtype(own)
        own.add_argument("--quantize", choices=("fp8",),
                         help="also every linear layer in float8 by torchao, compiled; its error "
                         "is in the table")  # fmt: skip
        _add_timing(own, 1200.0)
        own.set_defaults(depth=None)
    own.add_argument("--depth", type=count, metavar="BLOCKS",
                     help="of every model (default: its own)")  # fmt: skip
    gpu.add_parser(_add(kinds, "gpu", "models, blocks and operations on a GPU, the most important "
                        "first", gpu.run))  # fmt: skip
    own = _add(kinds, "memory", "training: its peak, predicted, and measured on a GPU", _memory)
    own.add_argument("--models", nargs="+", metavar="MODEL", choices=memory.choices(),
                     default=list(TRAINING_MEMORY), help=f"of {', '.join(memory.choices())} "
                     f"(default: {' '.join(TRAINING_MEMORY)})")  # fmt: skip
    own.add_argument("--frames", nargs="+", metavar="N", type=count, default=memory.FRAMES,
                     help=f"latent frames of {memory.SIDE} px "
                     f"(default: {' '.join(map(str, memory.FRAMES))})")  # fmt: skip
    text = "one sample over several GPUs: what it sends; nothing is measured"
    own = _add(kinds, parallel.KIND, text, _parallel)
    _add_sizes(own, parallel.SIZES)
    own.add_argument("--gpus", nargs="+", metavar="N", type=count, default=parallel.RANKS,
                     help=f"default: {' '.join(map(str, parallel.RANKS))}")  # fmt: skip
    text = "what a GPU would take, from a model; nothing is measured"
    own = _add(kinds, "predict", text, _predict)
    _add_models(own, FIGURES)
    _add_sizes(own, FIGURE_SIZES)
    own.add_argument("--device", choices=tuple(predict.DEVICES), default="h200",
                     help="default: %(default)s")  # fmt: skip


def _add(kinds: Commands, kind: str, text: str, run: Any) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser
    parser = kinds.add_parser(kind, help=text, description=f"Of {text}.")
    add_out(parser, f"{kind}.json, .md and .png", "results/bench")
    parser.add_argument("--against", metavar="FILE", type=Path,
                        help="an earlier result to compare with")  # fmt: skip
    parser.set_defaults(run=run)
    return parser


def _add_models(parser: argparse.ArgumentParser, models: Sequence[str]) -> None:
    parser.add_argument("--models", nargs="+", metavar="MODEL", choices=list_models(),
                        default=list(models), help=f"default: {' '.join(models)}")  # fmt: skip


def _add_sizes(parser: argparse.ArgumentParser, sizes: Sequence[Size]) -> None:
    shown = " ".join(f"{s.frames}x{s.side}" if s.frames > 1 else str(s.side) for s in sizes)
    parser.add_argument("--sizes", nargs="+", metavar="SIZE", type=workloads.image_or_video,
                        default=list(sizes), help="pixels a side, or latent frames and pixels a "
                        f"side (default: {shown})")  # fmt: skip


def _add_timing(parser: argparse.ArgumentParser, budget: float) -> None:
    add_measuring(parser, budget=budget)
    parser.add_argument("--compile", action="store_true", help="by torch.compile, too")
    parser.add_argument("--seconds", type=number, help="for a task at a size, all implementations "
                        f"together (default: {SECONDS['cuda']} on a GPU, {SECONDS['cpu']:.0f} on "
                        "the CPU)")  # fmt: skip


def _ops(options: argparse.Namespace, command: str) -> int:
    found = [o for o in op_workloads.operations() if options.only.search(str(o))]
    if not found:
        raise UsageError(f"argument --only: no operation matches {options.only.pattern!r}")
    chosen = [OperationWorkload(operation, options.compile) for operation in found]
    return _measure(options, command, settings_of(options), chosen)


def _models(options: argparse.Namespace, command: str) -> int:
    settings = settings_of(options)
    chosen = model_workloads(
        options.kind, options.models, options.sizes, options.tasks, settings, batch=options.batch,
        depth=options.depth, compiled=options.compile, quantized=options.quantize is not None,
    )  # fmt: skip
    return _measure(options, command, settings, chosen)


def _measure(
    options: argparse.Namespace, command: str, settings: Settings, chosen: Sequence[Workload]
) -> int:
    device = settings.device

    def prepare() -> tuple[Sequence[Workload], Bench]:
        torch.manual_seed(0)
        rates = clocks.rates(device, DTYPES[settings.dtype])
        return chosen, Bench(
            WallClock(device), rates, device, settings.backend,
            time.monotonic() + options.budget, options.seconds or SECONDS[device],
        )  # fmt: skip

    known = {**dataclasses.asdict(settings), "budget": options.budget}
    return carry_out(options, command, known, prepare)


def _memory(options: argparse.Namespace, command: str) -> int:
    if reasons := backends.reasons_against("triton", torch.empty(1, device="meta")):
        raise UsageError(f"the triton backend is what is predicted, and {'; '.join(reasons)}")
    known = {"device": "cuda", "dtype": "bf16"}
    if not torch.cuda.is_available():
        known["predicted_for"] = "any GPU"
    chosen = memory.workloads(options.models, options.frames)
    return carry_out(options, command, known, lambda: (chosen, Bench()), notes=memory.NOTES)


def _predict(options: argparse.Namespace, command: str) -> int:
    device = predict.DEVICES[options.device]
    settings = Settings("cuda", "bf16", "triton")
    known = {**dataclasses.asdict(settings), "predicted_for": device.name}
    chosen = [
        predict.Prediction(workload, device)
        for kind in ("model", "block")
        for workload in model_workloads(kind, options.models, options.sizes, TASKS, settings)
    ]
    bench = Bench(rates=device.rates)
    return carry_out(options, command, known, lambda: (chosen, bench), notes=predict.notes(device))


def _parallel(options: argparse.Namespace, command: str) -> int:
    if min(options.gpus) < 2:
        raise UsageError("argument --gpus: one sample is over 2 GPUs at least")
    device = parallel.DEVICE
    known = {"device": "cuda", "dtype": "bf16", "predicted_for": device.name}
    sizes, gpus = dict.fromkeys(options.sizes), dict.fromkeys(options.gpus)
    chosen = [parallel.Split(size, number) for size in sizes for number in gpus]
    bench = Bench(rates=device.rates)
    return carry_out(options, command, known, lambda: (chosen, bench), notes=parallel.NOTES)
