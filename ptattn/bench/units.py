"""Numbers as people read them: three digits and a unit."""

from __future__ import annotations


def seconds(value: float) -> str:
    """1.2 µs, 123 µs, 12.3 ms, 4.56 s, 123 s."""
    if value < 0.9995e-3:
        micro = value * 1e6
        return f"{micro:.1f} µs" if micro < 99.95 else f"{micro:.0f} µs"
    return f"{digits(value * 1e3)} ms" if value < 0.9995 else f"{digits(value)} s"


def memory(value: float) -> str:
    """12.3 MB, 4.56 GB."""
    return f"{digits(value / 1e6)} MB" if value < 0.9995e9 else f"{digits(value / 1e9)} GB"


def giga(value: float) -> str:
    """Billions without a unit: 12.3, 4,560."""
    return digits(value / 1e9)


def ratio(value: float) -> str:
    """0.56×, 12.3×."""
    return f"{value:.2f}×" if value < 9.995 else f"{digits(value)}×"


def digits(value: float) -> str:
    """0.123, 1.23, 12.3, 1,234."""
    for places, limit in ((3, 0.9995), (2, 9.995), (1, 99.95)):
        if value < limit:
            return f"{value:.{places}f}"
    return f"{value:,.0f}"
