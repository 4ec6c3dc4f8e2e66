"""What the numbers say, in plain sentences."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import product

from . import results, units
from .floor import FORWARD
from .results import EAGER, Result, Row

INTERPRETED = "The kernels ran in Triton's interpreter: no time here says how fast they are."


def sentences(result: Result) -> list[str]:
    """Of models against models, forward: where PT-DiT wins, where it loses, what the counts hide;
    only what the rows can answer. Times of interpreted kernels answer nothing."""
    if result.kind != "compare":
        return []
    rows = [row for row in result.rows if "macs" in row.facts and row.task == FORWARD]
    found = [_wins(rows), _losses(rows), _counts(rows)]
    if result.settings["backend"] == "triton" and result.settings["device"] == "cpu":
        found[:2] = [INTERPRETED]
    return [sentence for sentence in found if sentence]


Ratios = list[tuple[Row, float]]


def _ratios(rows: Sequence[Row]) -> Iterator[tuple[str, str, Ratios]]:
    """The measured speed-ups of each PT-DiT over each baseline, smallest size first."""
    group = results.groups(rows)
    names = {row.model: row.baseline for row in rows}
    for ours, theirs in product(names, names):
        if names[ours] or not names[theirs]:
            continue
        own = [row for row in rows if (row.model, row.mode) == (ours, EAGER)]
        known = [(r, results.speedup(r, group[r.workload, r.task], theirs)) for r in own]
        if found := [(row, ratio) for row, ratio in known if ratio is not None]:
            yield ours, theirs, found


def _wins(rows: Sequence[Row]) -> str:
    clauses: dict[str, list[str]] = {}
    for ours, theirs, ratios in _ratios(rows):
        head = f"{_terms(rows, ours, theirs)} {ours} is "
        clauses.setdefault(head, []).append(_wins_against(theirs, ratios))
    said = "; ".join(head + " and ".join(known) for head, known in clauses.items())
    return f"On this machine, {said}." if said else ""


def _terms(rows: Sequence[Row], ours: str, theirs: str) -> str:
    one, other = (next(row for row in rows if row.model == name) for name in (ours, theirs))
    if results.equal(one, other) == "width":
        return f"at equal width (D = {one.facts['width']})"
    return f"at equal parameters (within {results.EQUAL_PARAMETERS:.0%})".replace("%", " %")


def _wins_against(theirs: str, ratios: Ratios) -> str:
    """ "faster than X from 1024 px on (1.20× to 2.50×)", or slower."""
    won = [ratio > 1 for _, ratio in ratios]
    if not any(won):
        return f"slower than {theirs} at every size measured"
    lowest, highest = (f([ratio for _, ratio in ratios if ratio > 1]) for f in (min, max))
    span = " to ".join(dict.fromkeys(map(units.ratio, (lowest, highest))))
    first = won.index(True)
    if all(won[first:]) and len(won) - first > 1:
        row = ratios[first][0]
        start = f"from {row.size} ({row.tokens:,} tokens) on" if first else "at every size measured"
        return f"faster than {theirs} {start} ({span})"
    sizes = _join([row.size for row, ratio in ratios if ratio > 1])
    return f"faster than {theirs} at {sizes} ({span})"


def _losses(rows: Sequence[Row]) -> str:
    lost: dict[str, dict[str, list[str]]] = {}
    for ours, theirs, ratios in _ratios(rows):
        for row, ratio in ratios:
            if ratio < 1:
                speeds = lost.setdefault(ours, {}).setdefault(row.size, [])
                speeds.append(f"{units.ratio(ratio)} {theirs}'s")
    clauses = [
        f"{ours} loses at "
        + _join([f"{size} ({', '.join(speeds)} speed)" for size, speeds in sizes.items()])
        for ours, sizes in lost.items()
    ]
    return "; ".join(clauses) + "." if clauses else ""


def _counts(rows: Sequence[Row]) -> str:
    """How the two conventions compare the first PT-DiT with each baseline at the largest image."""
    images = [row for row in rows if row.facts["frames"] == 1]
    last = [r for r in images if r.facts["side"] == max(r.facts["side"] for r in images)]
    ours = next((row for row in last if not row.baseline), None)
    baselines = [row for row in last if row.baseline]
    if ours is None or not baselines:
        return ""
    ratios = [
        f"{units.ratio(ours.facts['macs_paper'] / row.facts['macs_paper'])} and "
        f"{units.ratio(ours.facts['macs'] / row.facts['macs'])} of {row.model}'s"
        for row in baselines
    ]
    return (
        "The paper's count leaves out one of PT-DiT's two window attentions, most of its Z layers, "
        "and the attention products of PT-DiT and PixArt-α but not those of DiT: by that count and "
        f"in full, {ours.model} at {ours.size} takes {_join(ratios)} multiply-adds."
    )


def _join(words: Sequence[str]) -> str:
    return " and ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)
