"""Counted multiply-adds against torch's counter and against the numbers printed in the paper."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from ptattn import paper
from ptattn.flops import Part, attention_ratio, count, crossover
from ptattn.geometry import WindowGrid
from ptattn.models import create_model, get_config

DOC = Path(__file__).resolve().parent.parent / "docs" / "PAPER_REPRODUCTION.md"


def _create(name: str, **overrides: Any) -> nn.Module:
    with torch.device("meta"):
        return create_model(name, backend="sdpa", **overrides)


def _measure(model: nn.Module, size: tuple[int, int], frames: int, text_tokens: int) -> Part:
    """What torch's flop counter sees; it counts two for each multiply-add.

    On meta tensors SDPA runs as batched products, on CPU tensors as one operator that counts zero.
    """
    latents = torch.empty(1, 4, frames, size[0] // 8, size[1] // 8, device="meta")
    timestep = torch.empty(1, device="meta")
    condition: dict[str, torch.Tensor] = {}
    if model.config.num_classes is None:
        condition["caption"] = torch.empty(1, text_tokens, 4096, device="meta")
    else:
        condition["labels"] = torch.empty(1, dtype=torch.int64, device="meta")
    with FlopCounterMode(display=False) as counter:
        model(latents, timestep, **condition)
    flops = {str(op): n for op, n in counter.get_flop_counts()["Global"].items()}
    assert not sum(flops.values()) % 2
    products = sum(n for op, n in flops.items() if "bmm" in op or "attention" in op)
    return Part((sum(flops.values()) - products) // 2, products // 2)


@pytest.mark.parametrize(
    ("name", "size", "frames", "overrides"),
    [
        pytest.param("pt-dit-xl", (512, 512), 1, {}, id="text"),
        pytest.param("pt-dit-xl", (544, 480), 1, {}, id="text-ragged"),
        pytest.param("pt-dit-l", (208, 368), 1, {"window": (3, 5)}, id="text-odd-window"),
        pytest.param("pt-dit-b", (256, 384), 1, {"shift": False}, id="text-no-shift"),
        pytest.param(
            "pt-dit-b",
            (240, 272),
            1,
            {"window": (4, 4), "proxy_window": (2, 3)},
            id="text-fine-proxies",
        ),
        pytest.param("pt-dit-b", (272, 240), 7, {}, id="text-video"),
        pytest.param("pt-dit-b", (256, 256), 4, {"patch_size": 4}, id="text-patch-4"),
        pytest.param("qihoo-t2i", (1024, 768), 1, {}, id="release"),
        pytest.param("pt-dit-s-class", (256, 256), 1, {}, id="class"),
        pytest.param("pt-dit-s-class", (240, 304), 5, {}, id="class-video"),
        pytest.param("dit-b", (240, 304), 1, {}, id="dit"),
        pytest.param("dit-s", (256, 256), 3, {}, id="dit-video"),
        pytest.param("pixart-alpha", (240, 304), 1, {}, id="pixart"),
        pytest.param("pixart-alpha", (256, 256), 3, {}, id="pixart-video"),
    ],
)
def test_full_count_is_torchs_count(
    name: str, size: tuple[int, int], frames: int, overrides: dict[str, Any]
) -> None:
    model = _create(name, depth=2, **overrides)
    measured = _measure(model, size, frames, text_tokens=77)
    ours = count(model, size, frames, text_tokens=77)
    assert measured.products > 0
    assert (ours.linear, ours.products) == (measured.linear, measured.products)


def test_parts_of_a_block() -> None:
    """The released block: 22 D² per token, 6 D² per proxy, 2 D² per text token, and products."""
    d, n, m, t = 1152, 64 * 64, 8 * 8, 200
    parts = count("qihoo-t2i", 1024, text_tokens=t).parts
    outside = ("embeddings", "caption", "modulation", "output")
    assert list(parts) == [
        *outside[:3],
        "proxy self-attention",
        "proxy-to-token attention",
        "window attention",
        "shifted-window attention",
        "Z layers",
        "text attention",
        "MLP",
        "output",
    ]
    block = [part for name, part in parts.items() if name not in outside]
    assert sum(part.linear for part in block) == 28 * d * d * (22 * n + 6 * m + 2 * t)
    shifted = WindowGrid((1, 64, 64), (1, 8, 8), (0, 4, 4)).num_pairs
    pairs = m * m + n * m + 64 * n + shifted + t * n
    assert sum(part.products for part in block) == 28 * 2 * d * pairs


def test_model_and_name_agree() -> None:
    by_name = count("pt-dit-b", (256, 512), 3)
    assert count(_create("pt-dit-b"), [256, 512], 3) == by_name
    assert by_name.total == by_name.linear + by_name.products
    assert by_name.total == sum(part.total for part in by_name.parts.values())


def test_paper_convention_is_the_formula_in_the_docs() -> None:
    d, layers, n, m, t = 1440, 30, 48 * 64 * 64, 12 * 8 * 8, 120
    blocks = (
        layers * (16 * d * d * n + 6 * d * d * m + 2 * d * d * t) + (layers // 2 - 1) * d * d * n
    )
    outside = (4096 * d + d * d) * t + 48 * d * n + 256 * d + 7 * d * d
    norms = (6 * layers + 2) * d * n
    ours = count("pt-dit-h", 1024, 48, convention="paper")
    assert ours.total == blocks + outside + norms
    assert ours.products == 0


@pytest.mark.parametrize(
    "row", paper.rows(), ids=lambda row: f"{row.model}-{row.resolution}-{row.frames}"
)
def test_printed_number(row: paper.Row) -> None:
    if (row.model, row.resolution) == ("pt-dit-l", 2048):
        # 5664.9 is one digit away from the 5654.9 that the formula behind all the others gives.
        assert row.ours == pytest.approx(5654.9, rel=1e-5)
    elif row.model == "dit-b":
        # No formula was found that fits all three; this one is off by what is said here.
        found = {256: 0.0201, 512: 0.0019, 1024: 0.0102}
        assert row.deviation == pytest.approx(found[row.resolution], abs=5e-5)
    elif row.printed > 1000:
        assert abs(row.deviation) < 3e-5
    else:
        assert abs(row.deviation) < 6e-4


@pytest.mark.parametrize(
    ("name", "tolerance"),
    [
        *((f"pt-dit-{size}", 0.07) for size in "blh"),
        *(("pt-dit-s-class", 0.01), ("pt-dit-xl", 0.015)),
        *((f"dit-{size}", 0.005) for size in ("s", "b", "l", "xl")),
        ("pixart-alpha", 0.02),
    ],
)
def test_printed_parameters(name: str, tolerance: float) -> None:
    assert paper.parameters(name) / 1e6 == pytest.approx(paper.PARAMETERS[name], rel=tolerance)


def test_what_the_printed_sizes_lack() -> None:
    """Without Z1 and Z2 the B model has the printed size; L and H with one D x D in some blocks."""
    for name, extra in (("pt-dit-b", 0), ("pt-dit-l", 13), ("pt-dit-h", 14)):
        config = get_config(name)
        layer = config.dim**2 + config.dim
        ours = paper.parameters(name) - (2 * config.depth - extra) * layer
        assert abs(ours / 1e6 - paper.PARAMETERS[name]) < 1, name


def test_attention_ratio() -> None:
    for size, printed in paper.ATTENTION_RATIOS.items():
        n, r = (size // 16) ** 2, (size // 128) ** 2
        ours = attention_ratio((size // 16, size // 16), (size // 128, size // 128))
        assert ours == pytest.approx(1 / r**2 + 1 / r + 2 * r / n, rel=1e-12)
        # The paper cuts off at a tenth of a percent; its last number is wrong.
        expected = 0.035 if size == 2048 else printed
        assert ours == pytest.approx(expected, abs=1e-3)
    assert attention_ratio((1, 3), (1, 2)) == (2 * 2 + 3 * 2 + 2 * (4 + 1)) / 3**2


def test_crossover() -> None:
    tokens = crossover("pt-dit-xl", "pixart-alpha")
    assert tokens == 70 * 70
    assert count("pt-dit-xl", 70 * 16).total < count("pixart-alpha", 70 * 16).total
    assert count("pt-dit-xl", 69 * 16).total >= count("pixart-alpha", 69 * 16).total
    assert crossover("pt-dit-xl", "dit-xl") == 79 * 79
    assert crossover("pt-dit-xl", "dit-xl", convention="paper") == 52 * 52
    # By the paper's own count PT-DiT never costs less at equal width: 16.5 D² per token against 14.
    assert crossover("pt-dit-xl", "pixart-alpha", convention="paper") is None
    assert crossover("pt-dit-s-class", "pixart-alpha") == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"model": "dit-xxl"}, "one of pt-dit-s-class, .*; got 'dit-xxl'"),
        ({"convention": "half"}, "convention must be one of full, paper; got 'half'"),
        ({"resolution": 250}, "positive multiples of 16 pixels; got 250"),
        ({"resolution": (256, 264)}, r"positive multiples of 16 pixels; got \(256, 264\)"),
        ({"resolution": (256, 256, 256)}, r"a side or \(height, width\).*got \(256, 256, 256\)"),
        ({"resolution": 0}, "positive multiples of 16 pixels; got 0"),
        ({"resolution": 256.0}, "positive multiples of 16 pixels; got 256.0"),
        ({"resolution": "256"}, "positive multiples of 16 pixels; got '256'"),
        ({"frames": 0}, "frames must be an integer >= 1; got 0"),
        ({"frames": 1.5}, "frames must be an integer >= 1; got 1.5"),
        ({"text_tokens": True}, "text_tokens must be an integer >= 1; got True"),
    ],
)
def test_errors(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        count(**{"model": "pt-dit-xl", "resolution": 256, **arguments})


def test_other_modules_are_refused() -> None:
    with pytest.raises(TypeError, match="a name, or a PTDiT, DiT or PixArt; got Linear"):
        count(nn.Linear(2, 2), 256)


def test_tables_in_the_docs_are_the_codes(capsys: pytest.CaptureFixture[str]) -> None:
    paper.main()
    printed = capsys.readouterr().out
    # All but the section of what was measured.
    counted = re.sub(
        r"^## Time$.*?(?=^## )", "", DOC.read_text(encoding="utf-8"), flags=re.M | re.S
    )
    lines = re.findall(r"^\|.*$", counted, flags=re.M)
    assert lines == re.findall(r"^\|.*$", printed, flags=re.M), "update with python -m ptattn.paper"
