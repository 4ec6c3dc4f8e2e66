"""The command `ptattn bench`: its arguments, and what they make it measure."""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import re
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from .. import backends, flops
from ..command_line import UsageError, count, now, number, open_folder, require
from ..compare import cases, settings_of
from ..compare.cases import Size
from ..compare.worker import DTYPES, Settings
from ..models import get_config, list_models
from ..paper import TRAINING_MEMORY
from . import harness, memory, op_cases, predict, result, timing
from .floor import FORWARD, TASKS
from .harness import Bench
from .model_run import ModelCase
from .op_run import Measured
from .result import Result

Commands = Any  # argparse's own type of a group of subcommands has no public name
# The paper's figures: B, L, XL and H beside the models of their width or number of parameters.
FIGURES = ("pt-dit-b", "dit-b", "pt-dit-l", "pt-dit-xl", "pixart-alpha", "dit-xl", "pt-dit-h")
FIGURE_SIZES = tuple(map(Size, (256, 512, 1024, 2048))) + tuple(
    Size(side, 48) for side in (256, 512, 1024)
)
# Seconds for a task at a size, all contenders together.
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
    _add_measuring(ops, 120.0)
    ops.set_defaults(dtype="bf16")  # whatever the machine: its cases are the kernels'
    for kind, what, models, sizes, budget in (
        ("block", "one block of each model", cases.MODELS[:3], (256, 512, 1024, 2048), 1200.0),
        ("model", "whole models", cases.MODELS, (256, 512), 1200.0),
    ):
        own = _add(kinds, kind, f"{what}, proxy-tokenized and full attention", _models)
        _add_table(own, models, [Size(side) for side in sizes])
        own.add_argument("--tasks", nargs="+", choices=TASKS, default=[FORWARD],
                         help="default: forward")  # fmt: skip
        own.add_argument("--batch", type=count, default=1, help="default: %(default)s")
        own.add_argument("--dtype", choices=("auto", *DTYPES), default="auto",
                         help="default: bf16 where that multiplies faster, else fp32")  # fmt: skip
        _add_measuring(own, budget)
        own.set_defaults(depth=None)
    own.add_argument("--depth", type=count, metavar="BLOCKS",
                     help="of every model (default: its own)")  # fmt: skip
    own = _add(kinds, "memory", "training: its peak, predicted, and measured on a GPU", _memory)
    own.add_argument("--models", nargs="+", metavar="MODEL", choices=memory.choices(),
                     default=list(TRAINING_MEMORY), help=f"of {', '.join(memory.choices())} "
                     f"(default: {' '.join(TRAINING_MEMORY)})")  # fmt: skip
    own.add_argument("--frames", nargs="+", metavar="N", type=count, default=memory.FRAMES,
                     help=f"latent frames of {memory.SIDE} px "
                     f"(default: {' '.join(map(str, memory.FRAMES))})")  # fmt: skip
    own = _add(
        kinds, "predict", "what a GPU would take, from a model; nothing is measured", _predict
    )
    _add_table(own, FIGURES, FIGURE_SIZES)
    own.add_argument("--device", choices=tuple(predict.DEVICES), default="h200",
                     help="default: %(default)s")  # fmt: skip


def _add(kinds: Commands, kind: str, text: str, run: Any) -> argparse.ArgumentParser:
    parser = kinds.add_parser(kind, help=text, description=f"Of {text}.")
    parser.add_argument("--out", metavar="FOLDER", type=Path, default=Path("results/bench"),
                        help=f"where {kind}.json, .md and .png are written "
                        "(default: %(default)s)")  # fmt: skip
    parser.add_argument("--against", metavar="FILE", type=Path,
                        help="an earlier result to compare with")  # fmt: skip
    parser.set_defaults(run=run)
    return parser


def _add_table(
    parser: argparse.ArgumentParser, models: Sequence[str], sizes: Sequence[Size]
) -> None:
    shown = " ".join(f"{s.frames}x{s.side}" if s.frames > 1 else str(s.side) for s in sizes)
    parser.add_argument("--models", nargs="+", metavar="MODEL", choices=list_models(),
                        default=list(models), help=f"default: {' '.join(models)}")  # fmt: skip
    parser.add_argument("--sizes", nargs="+", metavar="SIZE", type=_size, default=list(sizes),
                        help="pixels a side, or latent frames and pixels a side "
                        f"(default: {shown})")  # fmt: skip


def _add_measuring(parser: argparse.ArgumentParser, budget: float) -> None:
    add = parser.add_argument
    add("--compile", action="store_true", help="contenders by torch.compile too")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="default: %(default)s")
    add(
        "--backend", choices=backends.CHOICES, default="auto", help="of ours (default: %(default)s)"
    )
    add("--threads", type=count, metavar="N", help="CPU threads (default: torch's own choice)")
    add("--seconds", type=number, help="for a task at a size, all contenders together "
        f"(default: {SECONDS['cuda']} on a GPU, {SECONDS['cpu']:.0f} on the CPU)")  # fmt: skip
    add("--budget", type=number, metavar="SECONDS", default=budget,
        help="what would end after it is not begun (default: %(default)s)")  # fmt: skip


def _ops(options: argparse.Namespace, command: str) -> int:
    chosen = [case for case in op_cases.cases() if options.only.search(str(case))]
    if not chosen:
        raise UsageError(f"argument --only: no operation matches {options.only.pattern!r}")
    return _measure(options, command, lambda settings: [Measured(case) for case in chosen])


def _models(options: argparse.Namespace, command: str) -> int:
    return _measure(options, command, lambda settings: list(model_cases(
        options.kind, options.models, options.sizes, options.tasks, settings,
        batch=options.batch, depth=options.depth)))  # fmt: skip


def model_cases(
    kind: str, models: Sequence[str], sizes: Sequence[Size], tasks: Sequence[str],
    settings: Settings, *, batch: int = 1, depth: int | None = None,
) -> list[ModelCase]:  # fmt: skip
    """The table: every size in every task, all models of a size in one case."""
    planned = cases.plan(list(dict.fromkeys(models)), sizes)
    by_size = itertools.groupby(planned, key=lambda entry: entry.size)
    entries = {size: tuple(own) for size, own in by_size}
    return [
        ModelCase(kind, size, own, settings, task, batch, depth)
        for task in dict.fromkeys(tasks)
        for size, own in entries.items()
    ]


def _measure(options: argparse.Namespace, command: str, table: Any) -> int:
    """Check all that can be wrong, then measure the rates and the table."""
    require("rich", "matplotlib")
    from . import session

    settings = settings_of(options)
    known = {**dataclasses.asdict(settings), "budget": options.budget}
    done = Result(options.kind, known, {}, command, now())
    earlier = _prepare(options, done)
    torch.manual_seed(0)
    dtype, clock = DTYPES[settings.dtype], timing.clock_of(settings.device)
    rates = timing.rates(clock, settings.device, dtype)
    done.rates.update(dataclasses.asdict(rates))
    bench = Bench(
        clock, rates, settings.device, settings.backend, time.monotonic() + options.budget, dtype,
        options.seconds or SECONDS[settings.device], options.compile,
    )  # fmt: skip
    return session.carry_out(done, harness.measure(table(settings), bench), options.out, earlier)


def _prepare(options: argparse.Namespace, done: Result) -> Result | None:
    """The result of --against, if it can be compared with; and then the folder of --out."""
    earlier = None if options.against is None else result.load(options.against)
    if earlier is not None:
        result.check_comparable(earlier, done)
    open_folder(options.out)
    return earlier


def _memory(options: argparse.Namespace, command: str) -> int:
    require("rich", "matplotlib")
    from . import session

    if reasons := backends.reasons_against("triton", torch.empty(1, device="meta")):
        raise UsageError(f"the triton backend is what is predicted, and {'; '.join(reasons)}")
    known = {"device": "cuda", "dtype": "bf16"}
    if not torch.cuda.is_available():
        known["predicted_for"] = "any GPU"
    done = Result(memory.KIND, known, {}, command, now())
    earlier = _prepare(options, done)
    found = memory.rows(options.models, options.frames)
    return session.carry_out(done, found, options.out, earlier, memory.NOTES)


def _predict(options: argparse.Namespace, command: str) -> int:
    require("rich", "matplotlib")
    from . import session

    device = predict.DEVICES[options.device]
    settings = Settings("cuda", "bf16", "triton")
    known = {**dataclasses.asdict(settings), "predicted_for": device.name}
    done = Result("predict", known, dataclasses.asdict(device.rates), command, now())
    earlier = _prepare(options, done)
    chosen = options.models, options.sizes
    blocks = model_cases("block", *chosen, TASKS, settings)
    models = model_cases("model", *chosen, TASKS, settings)
    rows = predict.rows([*models, *blocks], device)
    return session.carry_out(done, [rows], options.out, earlier, predict.notes(device))


def _size(text: str) -> Size:
    frames, _, side = text.rpartition("x")
    try:
        size = Size(int(side), int(frames or "1"))
        for model in list_models():
            flops.token_grid(get_config(model), size.side, size.frames)
    except ValueError as error:
        raise argparse.ArgumentTypeError(
            f"expected SIDE or FRAMESxSIDE, got {text!r}: {error}"
        ) from None
    return size


def pattern(text: str) -> re.Pattern[str]:
    try:
        return re.compile(text)
    except re.error as error:
        raise argparse.ArgumentTypeError(f"expected a regular expression: {error}") from None
