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
from .bench import compare, workloads
from .command_line import UsageError, count
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
    compare.add_parser(commands)
    bench.add_parser(commands)
    _add_flops(commands)
    train.add_parsers(commands)
    convert.add_parser(commands)
    info = commands.add_parser("info", help="versions, devices, and which backends can run here")
    info.set_defaults(run=_info)
    return parser


def _add_flops(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    text = "multiply-adds of a model, part by part"
    parser = commands.add_parser("flops", help=text, description=f"Count the {text}.")
    add = parser.add_argument
    add("model", metavar="MODEL", choices=list_models(), help=", ".join(list_models()))
    add("resolution", metavar="RESOLUTION", type=_resolution, help="pixels: SIDE or HEIGHTxWIDTH")
    add("--frames", type=count, default=1, help="latent frames (default: %(default)s)")
    add("--text-tokens", type=count, metavar="TOKENS",
        help=f"length of the caption (default: {workloads.TEXT_TOKENS})")  # fmt: skip
    parser.set_defaults(run=_flops)


def _flops(options: argparse.Namespace, command: str) -> int:
    model, text_tokens = options.model, options.text_tokens or workloads.TEXT_TOKENS
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


def _resolution(text: str) -> tuple[int, int]:
    height, _, width = text.partition("x")
    return workloads.image(height, text).side, workloads.image(width or height, text).side
