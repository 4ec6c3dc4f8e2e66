"""Numbers as people read them: three digits and a unit."""

from __future__ import annotations


def seconds(value: float) -> str:
    """12.3 ms, 4.56 s, 123 s."""
    return f"{_digits(value * 1e3)} ms" if value < 0.9995 else f"{_digits(value)} s"


def memory(value: float) -> str:
    """12.3 MB, 4.56 GB."""
    return f"{_digits(value / 1e6)} MB" if value < 0.9995e9 else f"{_digits(value / 1e9)} GB"


def giga(value: float) -> str:
    """Billions without a unit: 12.3, 4,560."""
    return _digits(value / 1e9)


def ratio(value: float) -> str:
    """0.56×, 12.3×."""
    return f"{value:.2f}×" if value < 9.995 else f"{_digits(value)}×"


def _digits(value: float) -> str:
    for places, limit in ((2, 9.995), (1, 99.95)):
        if value < limit:
            return f"{value:.{places}f}"
    return f"{value:,.0f}"
