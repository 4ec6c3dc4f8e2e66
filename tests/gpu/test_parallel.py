"""A model whose tokens two ranks share, with the compiled kernels and NCCL.

Both ranks may be on one GPU. NCCL refuses that on one host, so each rank names a host of its own,
and the two talk over the loopback interface.
"""

import datetime
import os
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.distributed.device_mesh import init_device_mesh

from ptattn.models import ModelConfig, PTDiT
from ptattn.parallel import join_tokens, split_tokens
from tests.parallel.cases import MODELS, differences, inputs, measured, randomized
from tests.support.gpu import needs_gpu

pytestmark = needs_gpu

RANKS = 2
NAMES = ("image-batch", "classes-ragged", "finer-proxies", "video", "video-ragged", "paper-window")
# Relative. The kernels see other tiles of the same tokens; sums over ranks have another order.
LIMITS = {torch.float32: 1e-5, torch.bfloat16: 2e-2}
# Gradients that are sums over all tokens, of summands that cancel, in bfloat16.
BLURRED = ("timestep.grad", "caption.grad")


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """By rank, then by what was compared: the relative differences of each tensor."""
    folder = tmp_path_factory.mktemp("ranks")
    mp.spawn(_rank, (str(folder),), nprocs=RANKS)
    return [torch.load(folder / f"{rank}.pt") for rank in range(RANKS)]


@pytest.mark.parametrize("dtype", LIMITS)
@pytest.mark.parametrize("name", NAMES)
def test_a_split_model_is_the_whole_one(found, name, dtype):
    for own in found:
        seen = {
            key: value
            for key, value in own[name, dtype].items()
            if dtype == torch.float32 or key not in BLURRED
        }
        assert {"output", "latents.grad", "all"} <= seen.keys()
        assert not {key: value for key, value in seen.items() if not value <= LIMITS[dtype]}


def test_what_is_joined_again_has_the_same_bits(found):
    for own in found:
        assert own["joined"]


def test_repeats_have_the_same_bits(found):
    """Nothing reads what another stream has not written yet, or writes what one still reads."""
    for own in found:
        assert own["repeats"] == [True] * len(own["repeats"]) != []


def _rank(rank, folder):
    os.environ |= dict(NCCL_HOSTID=f"rank{rank}", NCCL_SOCKET_IFNAME="lo", NCCL_IB_DISABLE="1")
    torch.cuda.set_device(rank % torch.cuda.device_count())
    dist.init_process_group(
        "nccl", init_method=f"file://{Path(folder) / 'store'}", rank=rank, world_size=RANKS,
        timeout=datetime.timedelta(seconds=60),
    )  # fmt: skip
    mesh = init_device_mesh("cuda", (RANKS,), mesh_dim_names=("tokens",))
    results = {
        (name, dtype): differences(_run(mesh, name, dtype), _run(None, name, dtype))
        for name in NAMES
        for dtype in LIMITS
    }
    made, given = _made("video", torch.bfloat16), _given("video", torch.bfloat16)
    first = measured(made, **given)
    split_tokens(made, mesh)
    split = measured(made, **given)
    results["repeats"] = [_same(split, measured(made, **given)) for _ in range(20)]
    results["joined"] = _same(first, measured(join_tokens(made), **given))
    torch.save(results, Path(folder) / f"{rank}.pt")
    dist.destroy_process_group()


def _run(mesh, name, dtype):
    made = _made(name, dtype)
    return measured(made if mesh is None else split_tokens(made, mesh), **_given(name, dtype))


def _made(name, dtype):
    torch.manual_seed(0)
    made = randomized(PTDiT(ModelConfig(2, 64, 2, **MODELS[name][2]), backend="triton"))
    return made.to("cuda", dtype)


def _given(name, dtype):
    return {
        key: value.to("cuda", dtype if value.is_floating_point() else None)
        for key, value in inputs(name).items()
    }


def _same(ours, theirs):
    return all(torch.equal(value, theirs[key]) for key, value in ours.items())
