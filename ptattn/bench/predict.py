"""What a GPU would take by the block floor's model: predicted, not measured.

Everything of `floor` runs at the device's rates with nothing between; full attention runs at the
rate published for FlashAttention-3, which is kinder to the baselines than to PT-DiT: theirs is a
kernel's best, and torch's own kernels are slower at their head dim.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..models import ModelConfig
from .clocks import Rates, Timing
from .floor import FORWARD, Work
from .harness import Bench, Workload
from .implementations import FUSED, OWN
from .model_run import ModelWorkload
from .results import PREDICTED, Row

# Published for FlashAttention-3's forward at head dim 128 and 16k tokens on an H100, whose products
# are as fast as an H200's (arXiv 2407.08608).
FULL_ATTENTION, PADDED = 648e12, {48: 64, 64: 64, 72: 96, 80: 96, 96: 96, 128: 128}


@dataclass(frozen=True)
class Device:
    name: str
    rates: Rates

    def seconds(self, work: Work, config: ModelConfig) -> float:
        head_dim = config.dim // config.num_heads
        return work.seconds(self.rates, FULL_ATTENTION * head_dim / PADDED[head_dim])


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


@dataclass(frozen=True)
class Prediction(Workload):
    """Of a workload: a row per model, and one for the fused PT-DiT in a whole model's forward."""

    of: ModelWorkload
    device: Device

    def __str__(self) -> str:
        return str(self.of)

    def measure(self, bench: Bench) -> list[Row]:
        rows = []
        for entry in self.of.entries:
            whole = self.of.kind == "model" and self.of.task == FORWARD
            for kind in (OWN, FUSED) if entry.is_proxy_tokenized and whole else (OWN,):
                work = self.of.work(entry, fused=kind == FUSED)
                timing = predicted(self.device.seconds(work, entry.config))
                name = f"{entry.name} {kind}".rstrip()
                known = dict(status=PREDICTED, timing=timing)
                rows.append(self.of.row(entry, name, not entry.is_proxy_tokenized, **known))
        return rows

    def blank(self, status: str, note: str = "") -> list[Row]:
        return self.of.blank(status, note)


def predicted(seconds: float) -> Timing:
    """A time of no call."""
    return Timing(seconds, seconds, seconds, seconds, 0)
