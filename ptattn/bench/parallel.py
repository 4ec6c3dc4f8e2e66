"""`ptattn bench parallel`: what one sample over several GPUs sends, and about how long that takes.

Bytes are counted by formula (`communication`), which tests hold to what torch's collectives are
given; times are predicted by the block floor's model and published rates of links.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F

from .. import communication, flops
from ..communication import Traffic
from ..models import PTDiT, create_model, find_model
from ..parallel import Share, find_cut, split_tokens
from . import floor
from .clocks import Timing
from .floor import FORWARD
from .memory import DTYPE, LiveBytes
from .predict import DEVICES, FULL_ATTENTION, PADDED, Device
from .results import PREDICTED, REFUSED, Row
from .workloads import TEXT_TOKENS, Entry, Size, plan

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


def rows(sizes: Sequence[Size], ranks: Sequence[int]) -> Iterator[list[Row]]:
    """Of one size and number of GPUs after the other: a row per scheme."""
    for size in sizes:
        entries = {entry.model: entry for entry in plan(sorted(set(MODELS.values())), [size])}
        whole = _peak_of_whole(MODELS["ring"], size)
        for number in ranks:
            ours, *others = (_row(entries[model], size, number, name, whole)
                             for name, model in MODELS.items())  # fmt: skip
            for other in others:
                if ours.timing and other.timing:
                    ours.facts[f"of {other.name}"] = ours.facts["sent"] / other.facts["sent"]
            yield [ours, *others]


def _row(entry: Entry, size: Size, ranks: int, scheme: str, whole: tuple[int, int]) -> Row:
    family, config = find_model(entry.model)
    grid = flops.token_grid(config, size.side, size.frames)
    facts: dict[str, Any] = dict(kind=KIND, frames=size.frames, side=size.side, ranks=ranks)
    row = Row(
        f"{size}, {ranks} GPUs", FORWARD, scheme, entry.name, scheme != "windows",
        status=PREDICTED, tokens=grid[0] * grid[1] * grid[2], facts=facts,
    )  # fmt: skip
    if scheme == "ulysses" and config.num_heads % ranks:
        row.status, row.note = REFUSED, f"{config.num_heads} heads, which the ranks must divide"
        return row
    try:
        sent = communication.of_model(entry.model, grid, ranks, scheme)
    except ValueError as error:
        row.status, row.note = REFUSED, str(error)
        return row
    width = config.dim * DTYPE.itemsize
    busiest = sent.most() * width
    facts |= dict(sent=sent.mean() * width, busiest=busiest)
    for link, (rate, latency) in LINKS.items():
        facts[link] = busiest / (SHARE * rate) + sent.messages * latency
    seconds = _block(entry.model, size, ranks, sent, DEVICE)
    row.timing = Timing(seconds, seconds, seconds, seconds, 0)
    if family is PTDiT:
        proxies, windows = config.window_grids(grid)
        cut = find_cut(windows, proxies, ranks)
        facts["parts"] = cut.parts
        tokens = [Share.of(windows, cut, r, "").shifted().num_tokens for r in range(ranks)]
        row.peak = _peak(entry.model, size, ranks, rank=tokens.index(max(tokens)))
    else:
        fixed, activations = whole
        row.peak = fixed + activations // ranks
    return row


def _block(model: str, size: Size, ranks: int, sent: Traffic, device: Device) -> float:
    """Seconds of the rank that computes most."""
    family, config = find_model(model)
    rates, head_dim = device.rates, config.dim // config.num_heads
    full = FULL_ATTENTION * head_dim / PADDED[head_dim]
    seconds = floor.work(model, size, FORWARD).seconds(rates, full)
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
        return sum(_lives(model, size, mesh))


def _peak_of_whole(model: str, size: Size) -> tuple[int, int]:
    """Bytes of weights and gradients, and of activations."""
    weights, live = _lives(model, size, None)
    return 2 * weights, live - weights


def _lives(name: str, size: Size, mesh: Any) -> tuple[int, int]:
    """Bytes of the weights, and the most of gradients and activations, in a training step."""
    _, config = find_model(name)
    side = size.side // flops.VAE_FACTOR
    with torch.device("meta"):
        model: Any = create_model(name, backend="triton").to(DTYPE)
        latents = torch.zeros(1, 4, size.frames, side, side, dtype=DTYPE)
        condition: dict[str, Any] = {"labels": torch.zeros(1, dtype=torch.int64)}
        if config.num_classes is None:
            text = torch.zeros(1, TEXT_TOKENS, config.caption_channels or 0, dtype=DTYPE)
            condition = {"caption": text}
        timestep = torch.zeros(1)
    model.blocks.checkpoint()
    if mesh is not None:
        split_tokens(model, mesh)
    weights = list(model.parameters())
    with LiveBytes(weights) as live:
        out = model(latents, timestep, **condition)[:, : latents.shape[1]]
        F.mse_loss(out, torch.zeros_like(latents)).backward()
    return sum(p.nbytes for p in weights), live.peak
