"""Benchmarks: `pytest benchmarks --benchmark-only` and `python -m benchmarks.block_ratios`."""
