"""The Triton kernels, installed as `ptattn.kernels`.

One operation per file, its kernels and what launches them: window, flash and few_keys attend
(attention chooses), norm and pool normalise and average. tile has the jit helpers, reduce the sums
of parts, host what launchers share, configs the tile sizes. A link, ptattn/kernels, brings this
folder into the package: another project owns the top-level name `kernels`. Importing this needs
triton; only the triton backend does so.
"""
