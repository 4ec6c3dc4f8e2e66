"""What is wrong on one rank ends all of them with a message; none waits forever."""

import copy
import datetime
import os
import pickle
import re
import time

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch._subclasses import FakeTensorMode
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

import ptattn
from ptattn.models import DiT, ModelConfig
from ptattn.parallel import agreement, join_tokens, split_tokens
from tests.parallel import cases
from tests.parallel.ranks import Ranks

# What ranks do.


def call(mesh, change):
    """A call whose inputs `change` changes, and one more as it should be."""
    made, given = split_tokens(cases.model("image"), mesh), cases.inputs("image")
    failed = None
    try:
        made(**change(dict(given)))
    except ValueError as error:
        failed = error
    made(**given)
    return failed


def unchanged(given):
    return given


def of_another_shape(given):
    return {**given, "latents": given["latents"][..., :-8]}


def of_other_values(given):
    return {**given, "latents": given["latents"] + 1}


def of_the_same_values_elsewhere(given):
    return {**given, "latents": given["latents"].flip(-1)}


def that_require_a_gradient(given):
    return {**given, "latents": given["latents"].requires_grad_()}


def without_a_mask(given):
    return {**given, "caption_mask": None}


def call_without_gradients(mesh, off):
    made, given = split_tokens(cases.model("image"), mesh), cases.inputs("image")
    with torch.set_grad_enabled(not off):
        made(**given)


def call_partly_frozen(mesh, layer):
    """As many parameters on both ranks."""
    made, given = split_tokens(cases.model("image"), mesh), cases.inputs("image")
    made.blocks[layer].requires_grad_(False)
    made(**given)


def split_other_weights(mesh, seed):
    torch.manual_seed(seed)
    split_tokens(ptattn.ProxyAttention(32, 2), mesh)


def split_on_the_first_rank(mesh):
    split_tokens(cases.model("image"), DeviceMesh("cpu", [0]))


def call_with_dropout(mesh):
    made = cases.model("image")
    made.condition.caption.append(nn.Dropout(0.1))
    split_tokens(made, mesh)
    made.eval()(**cases.inputs("image"))
    made.train()(**cases.inputs("image"))


def call_in_another_mode(mesh, training):
    made = cases.model("image")
    made.condition.caption.append(nn.Dropout(0.1))
    split_tokens(made, mesh).train(training)(**cases.inputs("image"))


def call_on_too_few_windows(mesh):
    split_tokens(cases.model("image"), mesh)(torch.randn(1, 4, 4, 4), torch.ones(1))


def end_within_a_call(mesh, ends):
    made = split_tokens(cases.model("video"), mesh)
    if ends:
        made.blocks[1].register_forward_pre_hook(lambda *_: os._exit(1))
    made(**cases.inputs("video"))


def end_within_a_backward(mesh, ends):
    made = split_tokens(cases.model("video"), mesh)
    if ends:
        made.blocks[1].mlp.register_full_backward_pre_hook(lambda *_: os._exit(1))
    made(**cases.inputs("video")).sum().backward()


def end_before_a_call(mesh, ends):
    made = split_tokens(cases.model("video"), mesh)
    if ends:
        os._exit(1)
    made(**cases.inputs("video"))


def miss_a_call(mesh, misses):
    made = split_tokens(cases.model("video"), mesh)
    if misses:
        time.sleep(3)
        raise KeyError("something of this rank's own")
    made(**cases.inputs("video"))


# Ranks that do not do the same.


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (of_another_shape, r"latents: float32 \(1, 4, 1, 32, 32\).*rank 0, .*24\).* on rank 1"),
        (of_other_values, r"latents: .* values of checksum -?\d+ on rank 0, .* on rank 1"),
        (of_the_same_values_elsewhere, r"latents: .* values of checksum .* on rank 1"),
        (that_require_a_gradient, r"latents: .* on rank 0, .* that requires grad, .* on rank 1"),
        (without_a_mask, r"caption_mask: bool .* on rank 0, None on rank 1"),
    ],
)
def test_other_inputs_on_one_rank(two, change, message):
    """All ranks raise the same error, and the next call works."""
    results = two(call, each=[unchanged, change])
    for error in results:
        assert isinstance(error, ValueError)
        assert str(error).startswith("a call of PTDiT must be the same on all ranks")
    assert len({str(error) for error in results}) == 1
    with pytest.raises(ValueError, match=message):
        raise results[0]


def test_gradients_on_one_rank_alone(two):
    for error in two(call_without_gradients, each=[False, True]):
        assert "mode: training, grad on rank 0, training, no grad on rank 1" in str(error)


def test_other_parameters_frozen_on_one_rank(two):
    """Gradients of different parameters would be averaged."""
    for error in two(call_partly_frozen, each=[0, 1]):
        assert re.search(r"parameters: (\d+) trained, .* on rank 0, \1 trained, .* 1$", str(error))


def test_other_weights_on_one_rank(two):
    for error in two(split_other_weights, each=[0, 1]):
        assert "the model given to split_tokens must be the same on all ranks" in str(error)
        assert str(error).endswith("more")  # the first of many weights


def test_a_rank_outside_the_mesh(two):
    first, second = two(split_on_the_first_rank)
    assert first is None
    assert isinstance(second, ValueError)
    assert "this rank, 1, is not of the mesh, whose ranks are [0]" in str(second)


def test_dropout_in_training(two):
    for error in two(call_with_dropout):
        assert "condition.caption.3 drops out in training" in str(error)


def test_another_mode_on_one_rank(two):
    """It drops out, and is not the only one to raise."""
    for error in two(call_in_another_mode, each=[False, True]):
        assert "mode: no training, grad on rank 0, training, grad on rank 1" in str(error)


def test_more_ranks_than_windows(two):
    for error in two(call_on_too_few_windows):
        assert "2 ranks cannot share a grid of (1, 2, 2) tokens" in str(error)


@pytest.mark.parametrize("fault", [end_before_a_call, end_within_a_call, end_within_a_backward])
def test_a_rank_that_ends(fault):
    ranks = Ranks(2)
    try:
        begin = time.monotonic()
        first, second = ranks(fault, each=[False, True])
        assert isinstance(second, ProcessLookupError)
        assert isinstance(first, RuntimeError)
        assert "another rank of the split has failed" in str(first)
        assert time.monotonic() - begin < 60
    finally:
        ranks.close()


def test_a_rank_that_does_not_come():
    ranks = Ranks(2, timeout=2)
    try:
        first, second = ranks(miss_a_call, each=[False, True])
        assert isinstance(second, KeyError)
        assert "or has not come here within the time-out of the process group" in str(first)
    finally:
        ranks.close()


# What one process can be told by itself.


@pytest.fixture
def alone(tmp_path):
    """A mesh of one rank."""
    store = f"file://{tmp_path / 'store'}"
    dist.init_process_group("gloo", init_method=store, rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    if dist.is_initialized():
        dist.destroy_process_group()


def test_no_process_group(alone):
    dist.destroy_process_group()
    with pytest.raises(RuntimeError, match="init_process_group"):
        split_tokens(cases.model("image"), alone)


def test_no_mesh():
    with pytest.raises(TypeError, match="DeviceMesh; got int"):
        split_tokens(cases.model("image"), 2)


def test_a_mesh_of_two_dimensions(alone):
    with pytest.raises(ValueError, match=r"one dimension, .* got 2 of shape \(1, 1\)"):
        split_tokens(cases.model("image"), init_device_mesh("cpu", (1, 1)))


def test_a_mesh_of_another_device(alone):
    mesh = DeviceMesh("cuda", [0], _init_backend=False)
    with pytest.raises(ValueError, match="device type, cpu; got one of cuda"):
        split_tokens(cases.model("image"), mesh)


def test_gpus_with_gloo(alone):
    mesh = DeviceMesh.from_group(dist.group.WORLD, "cuda")
    with pytest.raises(ValueError, match=r"ranks on cuda need .* such as nccl; got gloo"):
        split_tokens(cases.model("image").to("meta"), mesh)


def test_nothing_to_split(alone):
    dit = DiT(ModelConfig(1, 32, 2, caption_channels=None, num_classes=3))
    for function in (lambda: split_tokens(dit, alone), lambda: join_tokens(dit)):
        with pytest.raises(ValueError, match="no PTDiT and no ProxyAttention"):
            function()


def test_split_twice(alone):
    made = split_tokens(cases.model("image"), alone)
    with pytest.raises(RuntimeError, match="split already"):
        split_tokens(made, alone)


def test_join_a_whole_model():
    with pytest.raises(RuntimeError, match="not split"):
        join_tokens(cases.model("image"))


def test_a_split_leaves_the_model_as_it_was(alone):
    made, given = cases.model("image"), cases.inputs("image")
    before = {name: t.clone() for name, t in made.state_dict().items()}
    out = made(**given)
    split_tokens(made, alone)
    assert torch.equal(made(**given), out)  # one rank has all tokens
    assert all(torch.equal(t, before[name]) for name, t in made.state_dict().items())
    assert made.state_dict().keys() == before.keys()
    twin = copy.deepcopy(made)
    assert torch.equal(twin(**given), out)
    with pytest.raises(TypeError, match=r"join_tokens\(model\) first"):
        pickle.dumps(made)
    pickle.dumps(join_tokens(made))
    assert torch.equal(made(**given), out)


def test_values_of_every_part_are_compared_once_on_a_gpu(alone, monkeypatch):
    """Looking at them waits for the GPU; yet the second layer's are not those of the first."""
    layers = split_tokens(nn.ModuleList([ptattn.ProxyAttention(32, 2) for _ in range(2)]), alone)
    split = layers[0].token_split
    said = []
    monkeypatch.setattr("ptattn.parallel.split.bits", lambda t: "seen")
    monkeypatch.setattr(split.agreement, "check", lambda what, own: said.append(own["x"]))
    with FakeTensorMode():
        x = torch.empty(2, device="cuda")
    for layer in (*layers, *layers):
        split.check(layer, x=x)
    assert ["seen" in own for own in said] == [True, True, False, False]


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (torch.tensor([1, 3, 3, 1]), torch.tensor([3, 1, 1, 3])),
        (torch.tensor([1, 4, 1]), torch.tensor([2, 2, 2])),
        (torch.tensor([True, False]), torch.tensor([False, True])),
        (torch.tensor([1.0, 2.0]).double(), torch.tensor([2.0, 1.0]).double()),
        (torch.zeros(3), torch.tensor([-0.0, 0.0, 0.0])),
        (torch.ones(2, dtype=torch.complex128), torch.ones(2, dtype=torch.complex128) * 1j),
        (torch.tensor([1 + 2j]), torch.tensor([1 + 2j]).conj()),
        (torch.arange(6.0).view(2, 3), torch.arange(6.0).view(3, 2).T),
    ],
)
def test_a_checksum_tells_values_and_places_apart(ours, theirs):
    assert agreement.bits(ours) == agreement.bits(ours.clone())
    assert agreement.bits(ours) != agreement.bits(theirs)


def test_ranks_are_compared_within_the_time_out_of_their_group(tmp_path, monkeypatch):
    """Also where its backend takes no CPU tensors, and another group is made beside it."""
    limit = datetime.timedelta(seconds=7)
    store = f"file://{tmp_path / 'store'}"
    dist.init_process_group("gloo", init_method=store, rank=0, world_size=1, timeout=limit)
    try:
        monkeypatch.setattr(dist, "get_backend_config", lambda group: "cuda:nccl")
        beside = agreement.Agreement(dist.group.WORLD).group
        assert beside is not dist.group.WORLD
        assert beside._get_backend(torch.device("cpu")).options._timeout == limit
    finally:
        dist.destroy_process_group()


def test_no_graph_holds_a_split(alone, monkeypatch):
    made = split_tokens(cases.model("image"), alone)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(RuntimeError, match="CUDA graph"):
        made(**cases.inputs("image"))
