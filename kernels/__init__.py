"""The Triton kernels, installed as `ptattn.kernels`.

Jit helpers (tile), launch settings (configs) and one module per kernel family: pool, flash, window,
norm. setup.py maps this folder into the package, because another project owns the top-level name
`kernels`. Importing this needs triton; only `ptattn.autograd` does so.
"""
