"""What the numbers say, in plain sentences."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby

from . import units
from .report import Row

EQUAL_PARAMETERS = 0.1  # relative difference


INTERPRETED = "The kernels ran in Triton's interpreter: no time here says how fast they are."


def sentences(rows: Sequence[Row], interpreted: bool = False) -> list[str]:
    """Where PT-DiT wins, where it loses, what the counts hide; only what the rows can answer.

    Times of `interpreted` kernels answer nothing.
    """
    if interpreted:
        return [sentence for sentence in (INTERPRETED, _counts(rows)) if sentence]
    by_model = {row.name: row for row in rows}
    pairs = [
        (ours, theirs)
        for ours in by_model.values()
        for theirs in by_model.values()
        if ours.proxy_tokenized and not theirs.proxy_tokenized
    ]
    found = [_wins(rows, pairs), _losses(rows, pairs), _counts(rows)]
    return [sentence for sentence in found if sentence]


def _wins(rows: Sequence[Row], pairs: Sequence[tuple[Row, Row]]) -> str:
    clauses = []
    for (name, terms), group in groupby(pairs, lambda pair: (pair[0].name, _terms(*pair))):
        against = [_wins_against(rows, name, theirs.name) for _, theirs in group]
        if known := [clause for clause in against if clause]:
            clauses.append(f"{terms} {name} is {' and '.join(known)}")
    return _sentence("On this machine, " + "; ".join(clauses)) if clauses else ""


def _terms(ours: Row, theirs: Row) -> str:
    if ours.width == theirs.width:
        return f"at equal width (D = {ours.width})"
    if abs(ours.parameters / theirs.parameters - 1) <= EQUAL_PARAMETERS:
        return "at equal parameters (within 10 %)"
    return "at unequal width and parameters"


def _wins_against(rows: Sequence[Row], name: str, opponent: str) -> str:
    """ "faster than X from 1024 px on (1.20× to 2.50×)", or slower; empty if neither is known."""
    ratios = _ratios(rows, name, opponent)
    if not ratios:
        return ""
    won = [ratio > 1 for _, ratio in ratios]
    if not any(won):
        return f"slower than {opponent} at every size measured"
    lowest, highest = (f([ratio for _, ratio in ratios if ratio > 1]) for f in (min, max))
    span = " to ".join(dict.fromkeys(map(units.ratio, (lowest, highest))))
    first = won.index(True)
    if all(won[first:]) and len(won) - first > 1:
        row = ratios[first][0]
        start = f"from {row.size} ({row.tokens:,} tokens) on" if first else "at every size measured"
        return f"faster than {opponent} {start} ({span})"
    sizes = _join([row.size for row, ratio in ratios if ratio > 1])
    return f"faster than {opponent} at {sizes} ({span})"


def _losses(rows: Sequence[Row], pairs: Sequence[tuple[Row, Row]]) -> str:
    clauses = []
    for name, group in groupby(pairs, lambda pair: pair[0].name):
        lost: dict[str, list[str]] = {}
        for _, theirs in group:
            for row, ratio in _ratios(rows, name, theirs.name):
                if ratio < 1:
                    lost.setdefault(row.size, []).append(f"{units.ratio(ratio)} {theirs.name}'s")
        sizes = [f"{size} ({', '.join(speeds)} speed)" for size, speeds in lost.items()]
        if sizes:
            clauses.append(f"{name} loses at {_join(sizes)}")
    return _sentence("; ".join(clauses)) if clauses else ""


def _counts(rows: Sequence[Row]) -> str:
    """How the two conventions compare the first PT-DiT with each opponent at the largest image."""
    images = [row for row in rows if row.frames == 1]
    last = [row for row in images if row.side == max(row.side for row in images)]
    ours = next((row for row in last if row.proxy_tokenized), None)
    opponents = [row for row in last if not row.proxy_tokenized]
    if ours is None or not opponents:
        return ""
    ratios = [
        f"{units.ratio(ours.macs_paper / row.macs_paper)} and "
        f"{units.ratio(ours.macs_full / row.macs_full)} of {row.name}'s"
        for row in opponents
    ]
    return (
        "The paper's count leaves out one of PT-DiT's two window attentions, most of its Z layers, "
        "and the attention products of PT-DiT and PixArt-α but not those of DiT: by that count and "
        f"in full, {ours.name} at {ours.size} takes {_join(ratios)} multiply-adds."
    )


def _ratios(rows: Sequence[Row], name: str, opponent: str) -> list[tuple[Row, float]]:
    """The measured speed-ups, smallest size first."""
    return [
        (row, row.speedup[opponent]) for row in rows if row.name == name and opponent in row.speedup
    ]


def _join(words: Sequence[str]) -> str:
    return " and ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)


def _sentence(text: str) -> str:
    return text[0].upper() + text[1:] + "."
