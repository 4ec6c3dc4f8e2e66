"""Whom ptattn is timed against on a GPU: torch's own attentions, with the copies that they need."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks import baselines
from benchmarks.gpu_cases import DENSE, MEANS, WINDOWED, Case

Outputs = tuple[Tensor, ...]
Call = Callable[[tuple[Tensor, ...]], Outputs]

FUSED = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
}
LAST_RESORT = {"math": SDPBackend.MATH}
# FlexAttention looks at every pair of tokens to make its block mask.
MOST_FLEX_TOKENS = 2**14


def opponents(
    case: Case, key_mask: Tensor | None, *, compiled: bool
) -> Iterator[dict[str, Callable[[], Call]]]:
    """Makers of the opponents by name; those of a later dict are tried if no earlier one runs.

    An opponent may refuse when it is made, or when it is called. `compiled` adds those that take
    torch.compile's time.
    """
    if case.op in MEANS:
        first: dict[str, Callable[[], Call]] = {"torch": lambda: _means(case)}
        if compiled:
            first["torch.compile"] = lambda: _compiled_means(case)
        yield first
        return
    first = dict(_attentions(case, key_mask, FUSED))
    if compiled and case.op in WINDOWED:
        first["flex"] = lambda: _flex(case)
    yield first
    yield dict(_attentions(case, key_mask, LAST_RESORT))


def _means(case: Case) -> Call:
    return lambda tensors: case.call("sdpa", tensors, None)


def _compiled_means(case: Case) -> Call:
    _keep_for_repeats()
    compiled = torch.compile(_means(case), dynamic=False)
    return lambda tensors: compiled(tensors)


def _attentions(
    case: Case, key_mask: Tensor | None, kinds: dict[str, SDPBackend]
) -> Iterator[tuple[str, Callable[[], Call]]]:
    for name, kind in kinds.items():
        yield f"sdpa {name}", lambda kind=kind: _sdpa(case, key_mask, kind)
        if case.op == "shifted":
            yield f"roll-mask {name}", lambda kind=kind: _roll_mask(case, kind)


def _sdpa(case: Case, key_mask: Tensor | None, kind: SDPBackend) -> Call:
    """ptattn's own portable backend; windows as slabs of equal ones, so without a mask."""

    def call(tensors: tuple[Tensor, ...]) -> Outputs:
        with sdpa_kernel(kind):
            return case.call("sdpa", tensors, key_mask if case.op in DENSE else None)

    return call


def _roll_mask(case: Case, kind: SDPBackend) -> Call:
    masks: list[Tensor] = []

    def call(tensors: tuple[Tensor, ...]) -> Outputs:
        if not masks:
            q = tensors[0]
            masks.append(baselines.region_mask(case.windows, q.dtype).to(q.device))
        with sdpa_kernel(kind):
            return (baselines.roll_mask_attention(*tensors, case.windows, masks[0]),)

    return call


def _flex(case: Case) -> Call:
    """On the tokens in raster order: a block mask says which blocks of them share windows."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    n = case.queries
    if n > MOST_FLEX_TOKENS:
        raise ValueError(f"its block mask of {n} tokens would look at {n**2:.0e} pairs")
    ids = case.windows.window_ids("cuda")

    def same_window(_batch: Tensor, _head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return ids[query] == ids[key]

    mask = create_block_mask(same_window, None, None, n, n, device="cuda")
    _keep_for_repeats()
    compiled = torch.compile(flex_attention, dynamic=False)

    def call(tensors: tuple[Tensor, ...]) -> Outputs:
        q, k, v = (t.transpose(1, 2) for t in tensors)
        return (compiled(q, k, v, block_mask=mask).transpose(1, 2),)

    return call


def _keep_for_repeats() -> None:
    """A compiled backward may overwrite what the forward saved; timing runs it again and again."""
    import torch._functorch.config

    torch._functorch.config.donated_buffer = False
