"""What a GPU would take by the block floor's model: predicted, not measured.

Everything of `floor` runs at the device's rates with nothing between; full attention runs at the
rate published for FlashAttention-3, which is kinder to the baselines than to PT-DiT: theirs is a
kernel's best, and torch's own kernels are slower at their head dim.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

from ..models import get_config
from . import floor
from .clocks import Rates, Timing
from .floor import FORWARD
from .model_run import ModelWorkload
from .results import PREDICTED, Row

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
        "its floor: measured it will be slower, so that a narrow margin here may be "
        "lost in truth.",
        "“fused” is PT-DiT after `ptattn.fuse`: past 2·D tokens 20·D² of linear layers per token "
        "in place of 22·D², and 2·D³ that make the matrices. Memory: `ptattn bench memory`.",
    ]


def rows(workloads: Iterable[ModelWorkload], device: Device) -> list[Row]:
    """A row per model, and one for the fused PT-DiT in a whole model's forward."""
    found = []
    for workload in workloads:
        for entry in workload.entries:
            found.append(_row(workload, entry.model, device, fused=False))
            whole = workload.kind == "model" and workload.task == FORWARD
            if entry.is_proxy_tokenized and whole:
                found.append(_row(workload, entry.model, device, fused=True))
    return found


def _row(workload: ModelWorkload, model: str, device: Device, fused: bool) -> Row:
    (entry,) = (entry for entry in workload.entries if entry.model == model)
    config = get_config(model)
    depth = None if workload.kind == "block" else workload.blocks(entry)
    work = floor.work(
        model, workload.size, workload.task, batch=workload.batch, depth=depth, fused=fused
    )
    head_dim = config.dim // config.num_heads
    full = FULL_ATTENTION * head_dim / PADDED[head_dim]
    seconds = work.seconds(device.rates, full)
    name = f"{entry.name} fused" if fused else entry.name
    row = workload.row(entry, name, not entry.is_proxy_tokenized, status=PREDICTED)
    return replace(row, timing=Timing(seconds, seconds, seconds, seconds, 0))
