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
from ..command_line import UsageError, count, now, number, open_folder, require
from ..models import list_models
from ..paper import TRAINING_MEMORY
from . import (
    clocks,
    compare,
    gpu,
    harness,
    memory,
    op_workloads,
    parallel,
    predict,
    results,
    workloads,
)
from .compare import settings_of
from .floor import FORWARD, TASKS
from .harness import Bench
from .model_run import model_workloads
from .op_run import OperationWorkload
from .results import Result
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
    _add_measuring(ops, 120.0)
    ops.set_defaults(dtype="bf16", quantize=None)  # whatever the machine: the kernels' own cases
    for kind, what, models, sizes in (
        ("block", "one block of each model", workloads.MODELS[:3], (256, 512, 1024, 2048)),
        ("model", "whole models", workloads.MODELS, (256, 512)),
    ):
        own = _add(kinds, kind, f"{what}, proxy-tokenized and full attention", _models)
        _add_table(own, models, [Size(side) for side in sizes])
        own.add_argument("--tasks", nargs="+", choices=TASKS, default=[FORWARD],
                         help="default: forward")  # fmt: skip
        own.add_argument("--batch", type=count, default=1, help="default: %(default)s")
        compare.add_dtype(own)
        own.add_argument("--quantize", choices=("fp8",),
                         help="also every linear layer in float8 by torchao, compiled; its error "
                         "is in the table")  # fmt: skip
        _add_measuring(own, 1200.0)
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
    own = _add(
        kinds, parallel.KIND, "one sample over several GPUs: what it sends; nothing is measured",
        _parallel,
    )  # fmt: skip
    _add_sizes(own, parallel.SIZES)
    own.add_argument("--gpus", nargs="+", metavar="N", type=count, default=parallel.RANKS,
                     help=f"default: {' '.join(map(str, parallel.RANKS))}")  # fmt: skip
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
    parser.add_argument("--models", nargs="+", metavar="MODEL", choices=list_models(),
                        default=list(models), help=f"default: {' '.join(models)}")  # fmt: skip
    _add_sizes(parser, sizes)


def _add_sizes(parser: argparse.ArgumentParser, sizes: Sequence[Size]) -> None:
    shown = " ".join(f"{s.frames}x{s.side}" if s.frames > 1 else str(s.side) for s in sizes)
    parser.add_argument("--sizes", nargs="+", metavar="SIZE", type=workloads.image_or_video,
                        default=list(sizes), help="pixels a side, or latent frames and pixels a "
                        f"side (default: {shown})")  # fmt: skip


def _add_measuring(parser: argparse.ArgumentParser, budget: float) -> None:
    compare.add_options(parser, budget=budget)
    parser.add_argument("--compile", action="store_true", help="by torch.compile, too")
    parser.add_argument("--seconds", type=number, help="for a task at a size, all implementations "
                        f"together (default: {SECONDS['cuda']} on a GPU, {SECONDS['cpu']:.0f} on "
                        "the CPU)")  # fmt: skip


def _ops(options: argparse.Namespace, command: str) -> int:
    chosen = [o for o in op_workloads.operations() if options.only.search(str(o))]
    if not chosen:
        raise UsageError(f"argument --only: no operation matches {options.only.pattern!r}")
    return _measure(options, command, lambda settings: [OperationWorkload(o) for o in chosen])


def _models(options: argparse.Namespace, command: str) -> int:
    return _measure(options, command, lambda settings: list(model_workloads(
        options.kind, options.models, options.sizes, options.tasks, settings,
        batch=options.batch, depth=options.depth)))  # fmt: skip


def _measure(options: argparse.Namespace, command: str, table: Any) -> int:
    """Check all that can be wrong, then measure the rates and the table."""
    require("rich", "matplotlib")
    from . import report
    from .progress import Progress

    if options.quantize:
        require("torchao", install="torchao")
    settings = settings_of(options)
    known = {**dataclasses.asdict(settings), "budget": options.budget}
    done = Result(options.kind, known, {}, command, now())
    earlier = prepare(options, done)
    torch.manual_seed(0)
    dtype, device = DTYPES[settings.dtype], settings.device
    rates = clocks.rates(device, dtype)
    done.rates.update(dataclasses.asdict(rates))
    bench = Bench(
        clocks.clock_of(device, wall=options.kind != "ops"), rates, device, settings.backend,
        time.monotonic() + options.budget, options.seconds or SECONDS[device],
        compiled=options.compile, quantized=options.quantize is not None,
    )  # fmt: skip
    chosen = table(settings)
    progress = Progress(len(chosen))
    found = harness.measure(chosen, bench, progress)
    return report.carry_out(done, found, options.out, progress, earlier)


def prepare(options: argparse.Namespace, done: Result) -> Result | None:
    """The result of --against, if it can be compared with; and then the folder of --out."""
    earlier = None
    if options.against is not None:
        try:
            earlier = results.load(options.against)
        except UsageError as error:
            raise UsageError(f"argument --against: {error}") from None
        results.check_comparable(earlier, done)
    open_folder(options.out)
    return earlier


def _memory(options: argparse.Namespace, command: str) -> int:
    require("rich", "matplotlib")
    from . import report
    from .progress import Progress

    if reasons := backends.reasons_against("triton", torch.empty(1, device="meta")):
        raise UsageError(f"the triton backend is what is predicted, and {'; '.join(reasons)}")
    known = {"device": "cuda", "dtype": "bf16"}
    if not torch.cuda.is_available():
        known["predicted_for"] = "any GPU"
    done = Result(memory.KIND, known, {}, command, now())
    earlier = prepare(options, done)
    found = memory.rows(options.models, options.frames)
    progress = Progress(len(set(options.models)) * len(set(options.frames)))
    return report.carry_out(done, found, options.out, progress, earlier, memory.NOTES)


def _predict(options: argparse.Namespace, command: str) -> int:
    require("rich", "matplotlib")
    from . import report
    from .progress import Progress

    device = predict.DEVICES[options.device]
    settings = Settings("cuda", "bf16", "triton")
    known = {**dataclasses.asdict(settings), "predicted_for": device.name}
    done = Result("predict", known, dataclasses.asdict(device.rates), command, now())
    earlier = prepare(options, done)
    chosen = options.models, options.sizes
    blocks = model_workloads("block", *chosen, TASKS, settings)
    models = model_workloads("model", *chosen, TASKS, settings)
    found = [predict.rows([*models, *blocks], device)]
    return report.carry_out(done, found, options.out, Progress(1), earlier, predict.notes(device))


def _parallel(options: argparse.Namespace, command: str) -> int:
    require("rich", "matplotlib")
    from . import report
    from .progress import Progress

    if min(options.gpus) < 2:
        raise UsageError("argument --gpus: one sample is over 2 GPUs at least")
    device = parallel.DEVICE
    known = {"device": "cuda", "dtype": "bf16", "predicted_for": device.name}
    done = Result(parallel.KIND, known, dataclasses.asdict(device.rates), command, now())
    earlier = prepare(options, done)
    found = parallel.rows(options.sizes, options.gpus)
    progress = Progress(len(set(options.sizes)) * len(set(options.gpus)))
    return report.carry_out(done, found, options.out, progress, earlier, parallel.NOTES)


def pattern(text: str) -> re.Pattern[str]:
    try:
        return re.compile(text)
    except re.error as error:
        raise argparse.ArgumentTypeError(f"expected a regular expression: {error}") from None
