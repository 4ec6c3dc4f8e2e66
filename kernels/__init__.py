"""The Triton kernels, installed as `ptattn.kernels`.

Jit helpers (tile), launch settings (configs) and one module per kernel family: pool, flash, window,
norm. A link, ptattn/kernels, brings this folder into the package: another project owns the
top-level name `kernels`. Importing this needs triton; only `ptattn.autograd` does so.
"""
