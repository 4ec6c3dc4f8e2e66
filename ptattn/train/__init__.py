"""`ptattn train` and `ptattn sample`: a model learns from data, and draws.

`config` says what a run is, `data` gives examples, `loop` trains, `state` keeps what a run needs to
go on, `sampling` draws, `pictures` shows, `log` reports. `commands` is the command line and `demo`
what `make demo` runs. `pip install ptattn[train]` brings the packages that they need,
`ptattn[demo]` the bundled data and the text encoder, too.
"""
