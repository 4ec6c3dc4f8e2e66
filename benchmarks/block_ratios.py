"""One block of PT-DiT against its own products, the released way and PixArt, as ratios of one run.

    python -m benchmarks.block_ratios --tokens 4096 16384 --dtype bf16 --compile --out results/cpu

All candidates of a shape take turns, round after round, so that a busy machine slows all of them
alike; the ratios are of medians.
"""

from __future__ import annotations

import argparse
import json
import shlex
import statistics
import sys
import time
from datetime import datetime, timezone
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import torch

from benchmarks.cases import BLOCKS, COMPILED, DTYPES, SIDES, BlockCase, Run
from ptattn import environment

FLOOR, OURS, RELEASED = "21 GEMMs", "ptattn PT-DiT", "roll-and-mask PT-DiT"
PEER, OWN_PEER = "diffusers PixArt", "ptattn PixArt"
COMPILABLE = (OURS, PEER)


Result = dict[str, Any]


class Target(NamedTuple):
    """`name` takes at most `factor` times as long as `other`."""

    tokens: int
    dtype: str
    name: str
    factor: float
    other: str


TARGETS = (
    Target(16384, "bf16", OURS, 0.67, RELEASED),
    Target(16384, "bf16", OURS, 0.6, PEER),
    Target(16384, "bf16", OURS + COMPILED, 0.55, RELEASED),
    Target(4096, "bf16", OURS + COMPILED, 1.0, PEER),
    Target(4096, "bf16", OURS + COMPILED, 1.0, PEER + COMPILED),
    Target(4096, "fp32", OURS, 1.35, FLOOR),
)


def interleaved(runs: dict[str, Run], rounds: int) -> dict[str, list[float]]:
    """Milliseconds per call of each, in turns, in an order that moves on by one every round."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    names = list(runs)
    for i in range(rounds):
        start = i % len(names)
        for name in names[start:] + names[:start]:
            begin = time.perf_counter()
            runs[name]()
            times[name].append((time.perf_counter() - begin) * 1e3)
    return times


def measure(tokens: int, dtype: str, *, compiled: bool, peer: bool, rounds: int) -> Result:
    """Check every candidate at this shape, then time them."""
    case = BlockCase(tokens, DTYPES[dtype])
    names = [name for name in BLOCKS if peer or name != PEER]
    if compiled:
        names += [name + COMPILED for name in COMPILABLE if peer or name != PEER]
    for name in names:
        case.check(name)
    times = interleaved({name: case.run(name) for name in names}, rounds)
    return {
        "tokens": tokens,
        "dtype": dtype,
        "window": list(case.windows.window),
        "rounds": rounds,
        "median_ms": {name: statistics.median(t) for name, t in times.items()},
        "min_ms": {name: min(t) for name, t in times.items()},
        "ms": times,
    }


def table(result: Result) -> str:
    """Medians, minima and ratios as a Markdown table."""
    medians, others = result["median_ms"], [FLOOR, RELEASED, PEER]
    others = [name for name in others if name in medians]
    window = "x".join(map(str, result["window"]))
    lines = [
        f"### {result['tokens']} tokens, {result['dtype']}, window {window}",
        "",
        "| Block | Median, ms | Minimum, ms | " + " | ".join(f"÷ {o}" for o in others) + " |",
        "|---|" + "---:|" * (2 + len(others)),
    ]
    for name, median in medians.items():
        ratios = " | ".join(f"{median / medians[other]:.2f}" for other in others)
        lines.append(f"| {name} | {median:.1f} | {result['min_ms'][name]:.1f} | {ratios} |")
    return "\n".join(lines)


def verdicts(results: list[Result]) -> list[str]:
    """One line per target that these results can judge."""
    lines = []
    for target in TARGETS:
        for result in results:
            medians = result["median_ms"]
            shape = (result["tokens"], result["dtype"])
            if shape != target[:2] or not {target.name, target.other} <= medians.keys():
                continue
            ratio = medians[target.name] / medians[target.other]
            met = "met" if ratio <= target.factor else "NOT MET"
            lines.append(
                f"{met}: {target.name} / {target.other} at {target.tokens} tokens, "
                f"{target.dtype}: {ratio:.2f} (target: at most {target.factor})"
            )
    return lines


def profile(tokens: int, dtype: str, *, compiled: bool, rows: int = 15) -> str:
    """Where the time of our block goes, by operator: self CPU time and its share."""
    case = BlockCase(tokens, DTYPES[dtype])
    name = OURS + (COMPILED if compiled else "")
    run = case.run(name)
    for _ in range(2):
        run()
    calls = 3
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as prof:
        for _ in range(calls):
            run()
    events = sorted(prof.key_averages(), key=lambda e: -e.self_cpu_time_total)
    total = sum(e.self_cpu_time_total for e in events)
    lines = [
        f"### {name}, {tokens} tokens, {dtype}: {total / calls / 1e3:.1f} ms",
        "",
        "| Operator | Calls | Self CPU time, ms | Share |",
        "|---|---:|---:|---:|",
    ]
    for event in events[:rows]:
        own = event.self_cpu_time_total
        lines.append(
            f"| `{event.key}` | {event.count // calls} | {own / calls / 1e3:.1f} | "
            f"{own / total:.1%} |"
        )
    return "\n".join(lines)


def facts() -> dict[str, Any]:
    """What the times depend on: machine, versions, date, command."""
    return {
        **environment.describe(),
        "diffusers": environment.version("diffusers"),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": "python -m benchmarks.block_ratios " + shlex.join(sys.argv[1:]),
    }


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.block_ratios", description=__doc__)
    parser.add_argument("--tokens", type=int, nargs="+", choices=SIDES, default=[4096, 16384])
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=["bf16"])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--compile", action="store_true", help="torch.compile too")
    parser.add_argument(
        "--profile", action="store_true", help="where our block's time goes, instead"
    )
    parser.add_argument("--out", type=Path, help="write OUT.json and OUT.md")
    args = parser.parse_args(argv)

    peer = find_spec("diffusers") is not None
    if not peer:
        print("diffusers is not installed (pip install ptattn[t2x]): its block is left out\n")
    results, sections = [], []
    with torch.inference_mode():
        for dtype in args.dtype:
            for tokens in args.tokens:
                if args.profile:
                    modes = (False, True) if args.compile else (False,)
                    texts = [profile(tokens, dtype, compiled=mode) for mode in modes]
                else:
                    options = dict(compiled=args.compile, peer=peer, rounds=args.rounds)
                    results.append(measure(tokens, dtype, **options))
                    texts = [table(results[-1])]
                sections += texts
                print("\n\n".join(texts), end="\n\n", flush=True)
    lines = verdicts(results)
    print("\n".join(lines))
    if args.out:
        write(args.out, results, sections, lines)


def write(out: Path, results: list[Result], sections: list[str], lines: list[str]) -> None:
    """OUT.json with every single time, OUT.md to read; both name the machine and the command."""
    known = facts()
    out.parent.mkdir(parents=True, exist_ok=True)
    record = {"environment": known, "results": results, "targets": lines}
    out.with_suffix(".json").write_text(json.dumps(record, indent=1) + "\n")
    listed = "\n".join(f"- {key}: {value}" for key, value in known.items())
    targets = "\n".join(f"- {line}" for line in lines)
    parts = [listed, *sections, *([targets] if targets else [])]
    out.with_suffix(".md").write_text("\n\n".join(parts) + "\n")


if __name__ == "__main__":
    main()
