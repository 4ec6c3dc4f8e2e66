"""What a GPU would take by the block floor's model: predicted, not measured.

Everything of `floor` runs at the device's rates with nothing between; full attention runs at the
rate published for FlashAttention-3, which is kinder to the opponents than to ours: theirs is a
kernel's best, and torch's own kernels are slower at their head dim.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

from ..models import get_config
from . import floor
from .floor import FORWARD
from .model_run import ModelCase
from .result import PREDICTED, Row
from .timing import Rates, Timing

# Published for FlashAttention-3's forward at head dim 128 and 16k tokens on an H100, whose products
# are as fast as an H200's (arXiv 2407.08608).
FULL_ATTENTION, PADDED = 648e12, {48: 64, 64: 64, 72: 96, 80: 96, 96: 96, 128: 128}


@dataclass(frozen=True)
class Device:
    name: str
    rates: Rates


DEVICES = {"h200": Device("NVIDIA H200", Rates(copy=4.3e12, products=790e12, launch=0.0))}


def notes(device: Device) -> list[str]:
    """The model behind the numbers, in words."""
    copy, products = device.rates.copy / 1e12, device.rates.products / 1e12
    full = FULL_ATTENTION / 1e12
    return [
        f"PREDICTED for an {device.name}, bf16, batch 1; nothing here was measured. The model: "
        "every part at full speed, one after the other, with nothing between. Linear layers at "
        f"{products:.0f} TFLOP/s; per block, the fused residual and norm passes of 8·C bytes per "
        "token each (four of PT-DiT, two of DiT and PixArt-α) and the MLP's activation of 16·C "
        f"bytes at {copy:.1f} TB/s; each attention the larger of its bytes and its products. A "
        "training step is three times the linear layers, 3.5 times the attention products, and "
        "the bytes of forward and backward.",
        f"Full attention runs at {full:.0f} TFLOP/s, what FlashAttention-3 publishes for head dim "
        f"128 on an H100, times head dim over the padded one (72 of 96: {0.75 * full:.0f}); its "
        "backward at the same rate, which is kinder than what is published. Ours is predicted at "
        "its floor: measured it will be slower, so that a target met by a small margin here may "
        "be missed in truth.",
        "“fused” is PT-DiT after `ptattn.fuse`: past 2·D tokens 20·D² of linear layers per token "
        "in place of 22·D², and 2·D³ that make the matrices. Memory: `ptattn bench memory`.",
    ]


def rows(cases: Iterable[ModelCase], device: Device) -> list[Row]:
    """A row per model, and one for the fused PT-DiT in a whole model's forward."""
    found = []
    for case in cases:
        for entry in case.entries:
            found.append(_row(case, entry.model, device, fused=False))
            if entry.is_proxy_tokenized and case.kind == "model" and case.task == FORWARD:
                found.append(_row(case, entry.model, device, fused=True))
    return found


def _row(case: ModelCase, model: str, device: Device, fused: bool) -> Row:
    (entry,) = (entry for entry in case.entries if entry.model == model)
    config = get_config(model)
    depth = None if case.kind == "block" else case.blocks(entry)
    work = floor.work(model, case.size, case.task, batch=case.batch, depth=depth, fused=fused)
    head_dim = config.dim // config.num_heads
    full = FULL_ATTENTION * head_dim / PADDED[head_dim]
    seconds = work.seconds(device.rates, full)
    name = f"{entry.name} fused" if fused else entry.name
    row = case.row(entry, name, entry.is_proxy_tokenized, PREDICTED)
    return replace(row, timing=Timing(seconds, seconds, seconds, 0.0, 0))
