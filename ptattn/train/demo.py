"""`make demo`: PT-DiT and a DiT of equal size learn digits for equal time, and are examined.

The examiner is a classifier trained on the real digits. Each model draws the same number of every
digit, from the same noise; all of what it draws is scored.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from .. import environment, files
from ..checkpoint import load_model
from . import config as configs
from .config import Config
from .data.bundled import mnist_digits
from .loop import Record, train
from .pictures import save_grid
from .sampling import draw
from .state import MODEL, STATE

try:
    from matplotlib.figure import Figure
    from sklearn.svm import SVC
except ImportError as error:
    raise ImportError(f"{error}; it comes with: pip install ptattn[demo]") from error

MINUTES = 6.0  # of training, for each model
PER_DIGIT = 50
SEED = 1  # of the noise to draw from
SMOOTHING = 50  # steps that a point of the loss curve is the mean of
COLORS = {"pt-dit": "#1266a8", "dit": "#c8323c"}
NAMES = {"pt-dit": "PT-DiT", "dit": "DiT"}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m ptattn.train.demo", description=__doc__)
    parser.add_argument("--minutes", type=float, default=MINUTES, help="for each model")
    parser.add_argument("--out", type=Path, default=Path("results/demo"))
    options = parser.parse_args(arguments)
    examiner, accuracy = examine_real_digits()
    found, curves = {}, {}
    for name in ("pt-dit", "dit"):
        config = configs.read("mnist" if name == "pt-dit" else "mnist-dit")
        config = dataclasses.replace(config, save_every=10**9, sample_every=10**9, steps=10**6)
        folder = options.out / name
        (folder / STATE).unlink(missing_ok=True)  # each demo begins anew
        curves[name] = train(config, folder, minutes=options.minutes)
        model = load_model(folder / MODEL).eval()
        digits, labels = draw_digits(model, config)
        agree = examiner.predict(_features(digits)) == labels
        found[name] = {
            "agreement": float(agree.mean()),
            "agreement_by_digit": [float(agree[labels == digit].mean()) for digit in range(10)],
            "samples": len(labels),
            "weights": sum(weight.numel() for weight in model.parameters()),
            "steps": len(curves[name]),
            "training_seconds": curves[name][-1].seconds,
            "last_loss": float(np.mean([record.loss for record in curves[name][-SMOOTHING:]])),
        }
        shown = digits.view(PER_DIGIT, 10, *digits.shape[1:])[:5].flatten(0, 1)
        save_grid(shown, [""] * len(shown), options.out / f"{name}-samples")
    plot(curves, options.out / "loss.png")
    report = {"models": found, "examiner_accuracy": accuracy, "machine": environment.describe()}
    (options.out / "demo.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    show(found, accuracy, options.out)


def examine_real_digits() -> tuple[SVC, float]:
    """A classifier of digits trained on four fifths of them, and its accuracy on the others."""
    pixels, labels = mnist_digits()
    features = _features(torch.from_numpy(pixels))
    held_out = np.arange(len(labels)) % 5 == 0
    examiner = SVC(C=10).fit(features[~held_out], labels[~held_out])
    return examiner, float(examiner.score(features[held_out], labels[held_out]))


def _features(digits: Tensor) -> np.ndarray:
    return digits.flatten(1).numpy().astype(np.float32) / 255


def draw_digits(model: torch.nn.Module, config: Config) -> tuple[Tensor, np.ndarray]:
    labels = list(range(10)) * PER_DIGIT
    return draw(model, config, labels, seed=SEED), np.array(labels)


def plot(curves: dict[str, list[Record]], path: Path) -> None:
    figure = Figure(figsize=(8, 5), dpi=120, layout="constrained")
    axes = figure.subplots()
    for name, records in curves.items():
        losses = np.array([record.loss for record in records])
        seconds = np.array([record.seconds for record in records])
        whole = len(losses) // SMOOTHING * SMOOTHING or len(losses)
        smooth = losses[:whole].reshape(-1, min(SMOOTHING, whole)).mean(axis=1)
        times = seconds[:whole].reshape(-1, min(SMOOTHING, whole)).mean(axis=1)
        axes.plot(times / 60, smooth, color=COLORS[name], linewidth=2, label=NAMES[name])
    axes.set_title("Loss at equal wall time", loc="left", fontweight="bold")
    axes.set_xlabel("minutes of training")
    axes.set_ylabel(f"loss, mean of {SMOOTHING} steps")
    axes.grid(True, color="0.9")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    with files.replacing(path) as temporary:
        figure.savefig(temporary, format="png")


def show(found: dict[str, dict], accuracy: float, out: Path) -> None:
    print(f"\n{'':8}{'weights':>10}{'steps':>8}{'loss':>8}   samples that show what they should")
    for name, result in found.items():
        share = f"{result['agreement']:.1%} of {result['samples']}"
        weights = f"{result['weights'] / 1e6:.2f} M"
        print(
            f"{NAMES[name]:8}{weights:>10}{result['steps']:>8}{result['last_loss']:>8.3f}   {share}"
        )
    print(f"as judged by a classifier that knows {accuracy:.1%} of real digits it has not seen")
    print(f"written to {out}/: loss.png, pt-dit-samples.png, dit-samples.png, demo.json")


if __name__ == "__main__":
    main()
