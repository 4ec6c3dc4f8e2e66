"""Whether all ranks of a split are about to do the same: else they would wait for one another, or
mix what does not belong together."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

SHOWN = 3  # differences in a message
ODD = -0x61C8864680B583EB  # 2**64 over the golden ratio: its multiples look random


class Agreement:
    """Compares what ranks say, over a group that takes CPU tensors, so that no GPU is waited for.

    Args:
        group: of the ranks.
    """

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.ranks, self.group = group.size(), _on_cpu(group)

    def check(self, what: str, said: Mapping[str, str]) -> None:
        """Raise on every rank, or on none.

        Args:
            what: is compared, for the message.
            said: by this rank, in words.

        Raises:
            ValueError: ranks say different things; the message has each of them.
            RuntimeError: a rank has failed, or not come here within the group's time-out.
        """
        if self.group is None:
            return
        own = hashlib.sha256(repr((what, sorted(said.items()))).encode()).digest()
        mine = torch.frombuffer(bytearray(own), dtype=torch.uint8)
        digests = [torch.empty_like(mine) for _ in range(self.ranks)]
        try:
            dist.all_gather(digests, mine, group=self.group)
            if all(torch.equal(mine, other) for other in digests):
                return
            everybody: list[Any] = [None] * self.ranks
            dist.all_gather_object(everybody, (what, dict(said)), group=self.group)
        except RuntimeError as error:
            raise RuntimeError(
                f"{what}: another rank of the split has failed, or has not come here within the "
                "time-out of the process group: what went wrong stands in that rank's error"
            ) from error
        raise ValueError(_differences(what, everybody))


def bits(t: Tensor) -> str:
    """A number that other values, or the same in other places, hardly have.

    A sum of words of at most 32 bits, each by a weight of its place, modulo 2**64: exact, whatever
    the order of summands.
    """
    kinds = {1: torch.int8, 2: torch.int16}
    whole = t.detach().resolve_conj().resolve_neg().contiguous().flatten()
    words = whole.view(kinds.get(t.element_size(), torch.int32))
    places = torch.arange(1, len(words) + 1, device=t.device) * ODD
    return str(int((words * (places ^ places >> 32)).sum()))


def _differences(what: str, everybody: list[tuple[str, dict[str, str]]]) -> str:
    if len({where for where, _ in everybody}) > 1:
        said = [f"rank {rank} {where}" for rank, (where, _) in enumerate(everybody)]
        return f"all ranks of a split must do the same; got {'; '.join(said)}"
    names = dict.fromkeys(name for _, own in everybody for name in own)
    lines = []
    for name in names:
        values = [own.get(name, "nothing") for _, own in everybody]
        if len(set(values)) > 1:
            each = ", ".join(f"{value} on rank {rank}" for rank, value in enumerate(values))
            lines.append(f"{name}: {each}")
    more = f"; and {len(lines) - SHOWN} more" if len(lines) > SHOWN else ""
    return f"{what} must be the same on all ranks of a split; got {'; '.join(lines[:SHOWN])}{more}"


def _on_cpu(group: dist.ProcessGroup) -> dist.ProcessGroup | None:
    """The group itself where it takes CPU tensors, else one of gloo's beside it."""
    config = dist.get_backend_config(group)
    if "fake" in config:
        return None  # nobody else is there
    if "cpu" in config or "gloo" in config:
        return group
    backend = group._get_backend(group._device_types[0])
    return dist.new_group(
        dist.get_process_group_ranks(group), backend="gloo", use_local_synchronization=True,
        timeout=backend.options._timeout,
    )  # fmt: skip
