"""The command `ptattn`: arguments and exit codes. 0 is done, 2 is misuse, 130 is Ctrl-C."""

from __future__ import annotations

import argparse
import math
import os
import shlex
import sys
from collections.abc import Sequence

import torch

from . import __version__, backends, convert, environment, flops
from .bench import command as bench
from .command_line import UsageError, count, number
from .compare import cases, compare
from .compare.cases import Size
from .compare.worker import DTYPES
from .models import get_config, list_models
from .train import commands as train


def main(argv: Sequence[str] | None = None) -> int:
    """Run `ptattn` with these arguments, by default the process's own; returns the exit code."""
    argv = sys.argv[1:] if argv is None else list(argv)
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")  # a terminal without "×" must not cost a run
    options = _parser().parse_args(argv)
    try:
        code: int = options.run(options, shlex.join(["ptattn", *argv]))
        sys.stdout.flush()
        return code
    except UsageError as error:
        print(f"ptattn {options.command}: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # `ptattn ... | head`; Python would complain once more at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141  # as if ended by SIGPIPE


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="ptattn",
        description="Proxy-tokenized attention for diffusion transformers (arXiv 2409.04005).",
    )
    parser.add_argument("--version", action="version", version=f"ptattn {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    _add_compare(commands)
    bench.add_parser(commands)
    _add_flops(commands)
    train.add_parsers(commands)
    convert.add_parser(commands)
    info = commands.add_parser("info", help="versions, devices, and which backends can run here")
    info.set_defaults(run=_info)
    return parser


def _add_compare(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser(
        "compare",
        help="proxy-tokenized against full attention: multiply-adds, latency, memory",
        description="Compare proxy-tokenized with full attention: multiply-adds, and the latency "
        "and memory of one block measured on this machine. Writes a table, its numbers and two "
        "plots. What exceeds the time or the memory is skipped and named.",
    )
    sizes = [Size(side) for side in cases.SIZES]
    videos = [Size(side, frames) for frames, side in cases.VIDEOS]
    shown = " ".join(f"{frames}x{side}" for frames, side in cases.VIDEOS)

    def add(option: str, text: str, **settings: object) -> None:
        parser.add_argument(option, help=text, **settings)  # type: ignore[arg-type]

    add("--models", f"of {', '.join(list_models())} (default: {' '.join(cases.MODELS)})",
        nargs="+", metavar="MODEL", choices=list_models(), default=cases.MODELS)  # fmt: skip
    add("--sizes", f"square images, pixels a side (default: {' '.join(map(str, cases.SIZES))})",
        nargs="+", metavar="SIDE", type=_image, default=sizes)  # fmt: skip
    add("--video", f"latent frames and pixels a side, or none (default: {shown})",
        nargs="+", metavar="FRAMESxSIDE", type=_video, default=videos)  # fmt: skip
    add("--device", "default: %(default)s, cuda if there is one",
        choices=("auto", "cpu", "cuda"), default="auto")  # fmt: skip
    add("--dtype", "of weights and activations (default: bf16 where that multiplies faster, else "
        "fp32)", choices=("auto", *DTYPES), default="auto")  # fmt: skip
    add("--backend", "of the attention; full attention runs on sdpa beside triton "
        "(default: %(default)s, triton on a GPU)",
        choices=backends.CHOICES, default="auto")  # fmt: skip
    add("--threads", "CPU threads (default: torch's own choice)", type=count, metavar="N")
    add("--budget", "time to measure in (default: %(default)s)",
        type=number, metavar="SECONDS", default=150.0)  # fmt: skip
    add("--out", "where the results are written (default: %(default)s)",
        metavar="FOLDER", default="results/compare")  # fmt: skip
    parser.set_defaults(run=_compare)


def _add_flops(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    text = "multiply-adds of a model, part by part"
    parser = commands.add_parser("flops", help=text, description=f"Count the {text}.")
    add = parser.add_argument
    add("model", metavar="MODEL", choices=list_models(), help=", ".join(list_models()))
    add("resolution", metavar="RESOLUTION", type=_resolution, help="pixels: SIDE or HEIGHTxWIDTH")
    add("--frames", type=count, default=1, help="latent frames (default: %(default)s)")
    add("--text-tokens", type=count, metavar="TOKENS",
        help=f"length of the caption (default: {cases.TEXT_TOKENS})")  # fmt: skip
    parser.set_defaults(run=_flops)


def _compare(options: argparse.Namespace, command: str) -> int:
    if None in options.video and len(options.video) > 1:
        raise UsageError("argument --video: none stands alone")
    options.video = [size for size in options.video if size is not None]
    return compare(options, command)


def _flops(options: argparse.Namespace, command: str) -> int:
    model, text_tokens = options.model, options.text_tokens or cases.TEXT_TOKENS
    takes_text = get_config(model).caption_channels is not None
    if options.text_tokens is not None and not takes_text:
        raise UsageError(f"argument --text-tokens: {model} takes classes, no text")
    height, width = options.resolution
    full, paper = (
        flops.count(
            model, (height, width), options.frames, text_tokens=text_tokens, convention=convention
        )
        for convention in flops.CONVENTIONS
    )
    grid = flops.token_grid(get_config(model), (height, width), options.frames)
    frames = "" if options.frames == 1 else f", {options.frames} latent frames"
    text = f", {text_tokens} of text" if takes_text else ""
    print(f"{model}, {height}x{width} px{frames}: {math.prod(grid):,} tokens{text}")
    print("GMACs (10⁹ multiply-adds) of one forward pass; paper: counted as in arXiv 2409.04005\n")
    print(f"{'':26}{'linear':>12}{'products':>12}{'full':>12}{'paper':>12}")
    none = flops.Part()
    for name in dict.fromkeys([*full.parts, *paper.parts]):
        part, printed = full.parts.get(name, none), paper.parts.get(name, none)
        _print_counts(name, part.linear, part.products, part.total, printed.total)
    _print_counts("total", full.linear, full.products, full.total, paper.total)
    return 0


def _print_counts(name: str, *counts: int) -> None:
    cells = (f"{count / 1e9:12,.2f}" if count else f"{'–':>12}" for count in counts)
    print(f"{name:26}" + "".join(cells))


def _info(options: argparse.Namespace, command: str) -> int:
    known = environment.describe()
    memory = "unknown" if known["memory"] is None else f"{known['memory'] / 1e9:.1f} GB"
    lines = {
        "ptattn": f"{known['ptattn']}, {environment.PACKAGE}",
        "commit": known["commit"] or "not a checkout",
        "python": f"{known['python']}, {known['os']}",
        "torch": known["torch"],
        "triton": known["triton"] or "not installed",
        "cpu": f"{known['cpu']}, {known['cores']} cores, {known['threads']} threads, {memory}",
        "gpu": ", ".join(known["gpus"]) or "none that torch can use",
    }
    sample = torch.empty(1, device="cuda" if known["gpus"] else "cpu")
    for name in backends.BACKENDS:
        reasons = backends.reasons_against(name, sample)
        lines[f"backend {name}"] = "no: " + "; ".join(reasons) if reasons else "usable"
    lines["backend auto"] = f"takes {backends.resolve('auto', sample)} on {sample.device.type}"
    for label, value in lines.items():
        print(f"{label:18} {value}")
    return 0


def _image(text: str) -> Size:
    return _size(text, text, "1")


def _video(text: str) -> Size | None:
    if text == "none":
        return None
    frames, _, side = text.partition("x")
    return _size(text, side, frames)


def _size(text: str, side: str, frames: str) -> Size:
    step = _step()
    if not (side.isdecimal() and frames.isdecimal() and int(frames) and int(side)):
        raise argparse.ArgumentTypeError(f"expected positive integers; got {text!r}")
    if int(side) % step:
        raise argparse.ArgumentTypeError(f"expected a multiple of {step} pixels; got {text!r}")
    return Size(int(side), int(frames))


def _resolution(text: str) -> tuple[int, int]:
    height, _, width = text.partition("x")
    return _size(text, height, "1").side, _size(text, width or height, "1").side


def _step() -> int:
    """Pixels a side per token, the same for every published model."""
    (step,) = {flops.VAE_FACTOR * get_config(name).patch_size for name in list_models()}
    return step
