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
    """A number that tensors of other values hardly have; exact, whatever the order of sums."""
    kinds = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    whole = t.detach().contiguous().flatten().view(kinds[t.element_size()])
    return str(int(whole.sum(dtype=torch.int64)))


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
    ranks = dist.get_process_group_ranks(group)
    return dist.new_group(ranks, backend="gloo", use_local_synchronization=True)
