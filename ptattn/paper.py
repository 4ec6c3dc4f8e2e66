"""What arXiv 2409.04005 prints, beside what this package counts; `python -m ptattn.paper` shows it.

docs/PAPER_REPRODUCTION.md holds these tables and explains them; a test keeps the two equal.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import nn

from .flops import attention_ratio, count, crossover
from .geometry import default_window
from .models import create_model, get_config

# Parameters in millions. PT-DiT: table 4. DiT: arXiv 2212.09748. PixArt-α: "0.6B".
PARAMETERS = {
    "pt-dit-s-class": 32,
    "pt-dit-b": 144,
    "pt-dit-l": 605,
    "pt-dit-xl": 1142,
    "pt-dit-h": 1795,
    "dit-s": 33,
    "dit-b": 130,
    "dit-l": 458,
    "dit-xl": 675,
    "pixart-alpha": 600,
}

# "GFLOPs", which are multiply-adds / 1e9, by (resolution, latent frames). Figures 2, 8 and 9.
GFLOPS = {
    "pt-dit-b": {(512, 1): 86.1, (1024, 1): 334.2},
    "pt-dit-l": {(256, 1): 101.7, (512, 1): 366.1, (1024, 1): 1423.9, (2048, 1): 5664.9},
    "pt-dit-h": {
        (256, 1): 302.1,
        (512, 1): 1089.1,
        (1024, 1): 4236.9,
        (2048, 1): 16828.3,
        (1024, 48): 201764.7,
    },
    "pt-dit-xl": {(256, 48): 7701.7, (512, 48): 30264.2, (1024, 48): 120514.0},
    "pixart-alpha": {(256, 1): 142.8, (512, 1): 542.5, (1024, 1): 2141.2, (2048, 1): 8536.1},
    "dit-b": {(256, 1): 22.5, (512, 1): 106.1, (1024, 1): 650.5},
}
# The same for models that this package does not have.
OTHER_GFLOPS = {
    "DAM/B": {(512, 1): 90.0, (1024, 1): 360.1},
    "Lumina-Next": {(256, 1): 1513.9, (512, 1): 6061.5, (1024, 1): 24027.7, (2048, 1): 96069.1},
    "CogVideoX": {(256, 48): 16624.3, (512, 48): 65590.2, (1024, 48): 261454.3},
    "EasyAnimateV4": {(1024, 48): 244614.1},
}

# Training memory in GB at 512², by latent frames; `ptattn bench memory` sets predictions beside it.
TRAINING_MEMORY = {
    "pt-dit-xl": {48: 41.6, 96: 43.4, 144: 43.9, 192: 48.2, 240: 52.8},
    "pt-dit-h": {48: 60.7, 96: 60.8, 144: 64.2, 192: 65.5, 240: 70.7},
}
OTHER_TRAINING_MEMORY = {"EasyAnimateV4": {48: 44.6, 96: 49.1, 144: 55.7, 192: 66.4, 240: 77.2}}

# Attention products over those of full attention, section 3.3, by resolution.
ATTENTION_RATIOS = {256: 0.343, 512: 0.097, 1024: 0.047, 2048: 0.023}

# (PT-DiT, full attention): as the paper compares them, then at equal width.
PAIRS = (
    ("pt-dit-b", "dit-b"),
    ("pt-dit-l", "pixart-alpha"),
    ("pt-dit-xl", "dit-xl"),
    ("pt-dit-xl", "pixart-alpha"),
)


class Row(NamedTuple):
    """One printed number beside ours; multiply-adds in units of 1e9."""

    model: str
    resolution: int
    frames: int
    printed: float
    ours: float  # convention "paper"
    deviation: float  # ours / printed - 1
    full: float  # convention "full"


def rows() -> list[Row]:
    """Every printed number of a model that this package has, in the order of `GFLOPS`."""
    found = []
    for model, numbers in GFLOPS.items():
        for (resolution, frames), printed in numbers.items():
            ours, full = (
                count(model, resolution, frames, convention=convention).total / 1e9
                for convention in ("paper", "full")
            )
            row = Row(model, resolution, frames, printed, ours, ours / printed - 1, full)
            found.append(row)
    return found


def parameters(name: str) -> int:
    """The number of parameters of a model by name, without allocating it."""
    with torch.device("meta"):
        return sum(p.numel() for p in create_model(name).parameters())


def tables() -> dict[str, str]:
    """Title -> markdown table."""
    return {
        "Parameters": _parameter_table(),
        "Printed multiply-adds, in units of 10⁹": _gflops_table(),
        "Full multiply-adds against full attention": _pair_table(),
        "Where PT-DiT begins to win": _crossover_table(),
        "Attention products against full attention": _ratio_table(),
    }


def _parameter_table() -> str:
    lines = []
    for name, printed in PARAMETERS.items():
        config, ours = get_config(name), parameters(name) / 1e6
        shape = (config.depth, config.dim, config.num_heads)
        lines.append((name, *shape, printed, f"{ours:.1f}", _signed(ours / printed - 1, 1)))
    head = ("model", "layers", "D", "heads", "printed, M", "here, M", "deviation")
    return _markdown(head, lines)


def _gflops_table() -> str:
    lines: list[tuple[object, ...]] = []
    for r in rows():
        ours = (f"{r.ours:.1f}", _signed(r.deviation, 2), f"{r.full:.1f}")
        lines.append((r.model, f"{r.resolution}²", r.frames, r.printed, *ours))
    for model, numbers in OTHER_GFLOPS.items():
        for (resolution, frames), printed in numbers.items():
            lines.append((model, f"{resolution}²", frames, printed, "", "", ""))
    head = ("model", "pixels", "frames", "printed", "paper's way", "deviation", "full")
    return _markdown(head, lines)


def _pair_table() -> str:
    """PT-DiT's multiply-adds over a baseline's: full count, and as printed in parentheses."""
    sizes = tuple(ATTENTION_RATIOS)

    def cell(model: str, baseline: str, size: int) -> str:
        ours = count(model, size).total / count(baseline, size).total
        key = (size, 1)
        if key not in GFLOPS[model] or key not in GFLOPS.get(baseline, {}):
            return f"{ours:.0%}"
        return f"{ours:.0%} ({GFLOPS[model][key] / GFLOPS[baseline][key]:.0%})"

    head = ("PT-DiT", "full attention", *(f"{size}²" for size in sizes))
    return _markdown(head, ((*pair, *(cell(*pair, size) for size in sizes)) for pair in PAIRS))


def _crossover_table() -> str:
    with torch.device("meta"):
        by_class = create_model("pt-dit-xl", caption_channels=None, num_classes=1000)

    def cell(model: str | nn.Module, baseline: str, convention: str) -> str:
        tokens = crossover(model, baseline, convention=convention)
        return "never" if tokens is None else f"{tokens} ({round(tokens**0.5) * 16}²)"

    compared: tuple[tuple[str, str | nn.Module, str], ...] = (
        ("pt-dit-xl", "pt-dit-xl", "pixart-alpha"),
        ("pt-dit-xl", "pt-dit-xl", "dit-xl"),
        ("pt-dit-xl, classes for text", by_class, "dit-xl"),
    )
    head = ("PT-DiT", "full attention", "full count, tokens (pixels)", "paper's way")
    return _markdown(
        head,
        (
            (label, baseline, *(cell(model, baseline, c) for c in ("full", "paper")))
            for label, model, baseline in compared
        ),
    )


def _ratio_table() -> str:
    lines = []
    for size, printed in ATTENTION_RATIOS.items():
        grid = (1, size // 16, size // 16)
        window = default_window(grid)
        ours = attention_ratio(grid, window)
        lines.append((f"{size}²", grid[1] * grid[2], window, f"{printed:.1%}", f"{ours:.1%}"))
    return _markdown(("pixels", "N", "window", "printed", "here"), lines)


def _markdown(head: Sequence[str], lines: Iterable[Sequence[object]]) -> str:
    cells = [head, ["---"] * len(head), *lines]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in cells)


def _signed(ratio: float, digits: int) -> str:
    return f"{round(ratio, digits + 2) + 0.0:+.{digits}%}"  # + 0.0 turns -0.0 into 0.0


def main() -> None:
    print("\n\n".join(f"## {title}\n\n{table}" for title, table in tables().items()))


if __name__ == "__main__":
    main()
