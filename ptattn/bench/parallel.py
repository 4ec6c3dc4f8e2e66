"""`ptattn bench parallel`: what one sample over several GPUs sends, and about how long that takes.

Bytes are counted by formula (`communication`), which tests hold to what torch's collectives are
given; times are predicted by the block floor's model and published rates of links.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

from .. import communication, flops
from ..communication import Traffic
from ..models import PTDiT, find_model
from ..parallel import Share, find_cut, split_tokens
from . import floor, memory
from .floor import FORWARD
from .harness import Bench, Workload
from .memory import DTYPE
from .predict import DEVICES, predicted
from .results import PREDICTED, REFUSED, Row
from .workloads import TEXT_TOKENS, Size, plan

KIND = "parallel"
# The model that each scheme splits, ours first.
MODELS = {"windows": "pt-dit-xl", "ulysses": "dit-xl", "ring": "dit-xl"}
OTHERS = tuple(MODELS)[1:]
SIZES = (Size(512, 48), Size(1024, 48), Size(1024, 96))
RANKS = (2, 4, 8, 16, 32, 64)
DEVICE = DEVICES["h200"]
# Bytes per second that a GPU sends, of which SHARE is reached, and seconds that a message takes at
# least: NVLink 4 (900 GB/s both ways together) and one 400 Gb/s InfiniBand port per GPU.
LINKS = {"NVLink": (450e9, 10e-6), "InfiniBand": (50e9, 20e-6)}
SHARE = 0.8
NOTES = (
    f"PREDICTED for {DEVICE.name}s, bf16, one sample; nothing here was measured. “Sent” is of one "
    "block's forward: the mean over ranks, and the rank that sends most. A training step sends "
    "twice as much (ring: three times), and with checkpointed blocks three times (ring: four).",
    "Block: the block floor's time, its linear layers, passes and attention divided by the ranks; "
    "of PT-DiT every rank computes all proxies' self-attention, and the rank with most tokens for "
    "shifted attention counts. Links: the bytes of the rank that sends most at "
    f"{SHARE:.0%} of 450 GB/s (NVLink 4) or 50 GB/s (a 400 Gb/s InfiniBand port per GPU), and "
    "10 or 20 µs for each message that is waited for. Neither counts as hidden behind the other: "
    "`split_tokens` sends while it projects, ring attention while it attends.",
    "Memory: weights, gradients and activations of a rank in training, blocks checkpointed, no "
    "optimizer: on the meta device, of the rank with most tokens for shifted attention; of DiT the "
    "whole's activations divided by the ranks.",
)


@dataclass(frozen=True)
class Split(Workload):
    """A size over a number of GPUs: a row per scheme."""

    size: Size
    ranks: int

    def __str__(self) -> str:
        return f"{self.size}, {self.ranks} GPUs"

    def measure(self, bench: Bench) -> list[Row]:
        ours, *others = rows = self.blank(PREDICTED)
        for row, (scheme, model) in zip(rows, MODELS.items(), strict=True):
            try:
                _fill(row, model, self.size, self.ranks, scheme)
            except ValueError as error:
                row.status, row.note = REFUSED, str(error)
        for other in others:
            if ours.timing and other.timing:
                ours.facts[f"of {other.name}"] = ours.facts["sent"] / other.facts["sent"]
        return rows

    def blank(self, status: str, note: str = "") -> list[Row]:
        entries = {entry.model: entry for entry in plan(sorted(set(MODELS.values())), [self.size])}
        known: dict[str, Any] = dict(kind=KIND, frames=self.size.frames, side=self.size.side)
        return [
            Row(
                str(self), FORWARD, scheme, entries[model].name, scheme != "windows", status=status,
                note=note, tokens=entries[model].tokens, facts=known | {"ranks": self.ranks},
            )
            for scheme, model in MODELS.items()
        ]  # fmt: skip


def _fill(row: Row, model: str, size: Size, ranks: int, scheme: str) -> None:
    """Raises ValueError for what cannot be split so."""
    family, config = find_model(model)
    if scheme == "ulysses" and config.num_heads % ranks:
        raise ValueError(f"{config.num_heads} heads, which the ranks must divide")
    grid = flops.token_grid(config, size.side, size.frames)
    sent = communication.of_model(model, grid, ranks, scheme)
    width = config.dim * DTYPE.itemsize
    busiest = sent.most() * width
    row.facts |= dict(sent=sent.mean() * width, busiest=busiest)
    for link, (rate, latency) in LINKS.items():
        row.facts[link] = busiest / (SHARE * rate) + sent.messages * latency
    row.timing = predicted(_block(model, size, ranks, sent))
    if family is PTDiT:
        proxies, windows = config.window_grids(grid)
        cut = find_cut(windows, proxies, ranks)
        row.facts["parts"] = cut.parts
        tokens = [Share.of(windows, cut, r, "").shifted().num_tokens for r in range(ranks)]
        row.peak = _peak(model, size, ranks, rank=tokens.index(max(tokens)))
    else:
        fixed, activations = _peak_of_whole(model, size)
        row.peak = fixed + activations // ranks


def _block(model: str, size: Size, ranks: int, sent: Traffic) -> float:
    """Seconds of the rank that computes most."""
    family, config = find_model(model)
    rates = DEVICE.rates
    seconds = DEVICE.seconds(floor.work(model, size, FORWARD), config)
    if family is not PTDiT:
        return seconds / ranks
    parts = flops.count(model, size.side, size.frames, text_tokens=TEXT_TOKENS).parts
    grid = flops.token_grid(config, size.side, size.frames)
    proxies, windows = config.window_grids(grid)
    keys = 2 * config.dim**2 * proxies.num_windows  # of the proxies, for all tokens
    everywhere = 2 * (parts["proxy self-attention"].total / config.depth + keys) / rates.products
    projected = 2 * 3 * config.dim**2 * windows.num_tokens / ranks / rates.products
    own = (seconds - everywhere) / ranks * sent.held
    return own + everywhere + (sent.shifted - sent.held) * projected


def _peak(model: str, size: Size, ranks: int, rank: int) -> int:
    """Bytes of one rank."""
    with communication.pretended(ranks, rank) as mesh:
        split = functools.partial(split_tokens, mesh=mesh)
        weights, live = memory.predict(model, size, "inputs", split)
    return weights * DTYPE.itemsize + live


@functools.cache
def _peak_of_whole(model: str, size: Size) -> tuple[int, int]:
    """Bytes of weights and gradients, and of activations."""
    parameters, live = memory.predict(model, size, "inputs")
    weights = parameters * DTYPE.itemsize
    return 2 * weights, live - weights
