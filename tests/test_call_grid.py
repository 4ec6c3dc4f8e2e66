"""Each call of a model whose attention was replaced has its own grid, whatever runs beside it.

Such a model once kept the grid of its last patch embedding on its layers. Images of as many tokens,
16 x 64 and 64 x 16, got each other's grid where a thread, a nested call or a block computed once
more came between, and nothing showed it.
"""

import asyncio
import copy
import functools
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import ptattn
from ptattn import call_grid
from tests.support.hosts import PixArt, ViT, import_timm, wake

GRIDS = ((4, 6), (6, 4))
UNKNOWN = "the grid of these tokens is not known"


def replaced(make, library, **options):
    """A model that takes each call's grid, and what it returns for each of GRIDS."""
    model = make(library)
    twin = copy.deepcopy(model)
    ptattn.replace_attention(model, window=(2, 3))
    wake(model).eval()
    expected = {}
    for grid in GRIDS:
        fixed = copy.deepcopy(twin).eval()
        ptattn.replace_attention(fixed, window=(2, 3), grid=grid)
        fixed.load_state_dict(model.state_dict())
        expected[grid] = fixed
    return model, expected


@pytest.fixture
def pixart():
    return replaced(PixArt.make, pytest.importorskip("diffusers"))


@pytest.fixture
def vit():
    return replaced(ViT.make, import_timm())


def outputs(host, expected):
    return {grid: host.run(model, grid) for grid, model in expected.items()}


def gradients(output, model):
    model.zero_grad()
    output.square().sum().backward()
    return [parameter.grad for parameter in model.parameters()]


def assert_equal(ours, expected):
    for one, other in zip(ours, expected, strict=True):
        assert torch.equal(one, other)


def assert_same_math(ours, expected):
    """In float64; a checkpoint adds gradients in another order."""
    for one, other in zip(ours, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)


def meet_after(module):
    """Both threads leave the module before either goes on."""
    barrier = threading.Barrier(2, timeout=60)

    def meet(*_):
        barrier.wait()

    module.register_forward_hook(meet)


def test_two_threads(pixart):
    model, fixed = pixart
    expected = outputs(PixArt, fixed)
    meet_after(model.pos_embed)
    with ThreadPoolExecutor(2) as pool:
        for _ in range(3):
            made = list(pool.map(lambda grid: PixArt.run(model, grid), GRIDS))
            assert_equal(made, expected.values())


def replicate(module):
    """As nn.DataParallel copies a module to another device: shallow, hooks and all."""
    replica = module._replicate_for_data_parallel()
    for name, child in module.named_children():
        setattr(replica, name, replicate(child))
    replica._parameters = dict(module._parameters)
    return replica


def test_replicas_in_threads(pixart):
    model, fixed = pixart
    expected = outputs(PixArt, fixed)
    meet_after(model.pos_embed)
    replicas = [replicate(model) for _ in GRIDS]
    with ThreadPoolExecutor(2) as pool:
        made = list(pool.map(PixArt.run, replicas, GRIDS))
    assert_equal(made, expected.values())


def test_a_call_within_a_call(pixart):
    """As guidance by the same model does."""
    model, fixed = pixart
    expected, inner = outputs(PixArt, fixed), []

    def call_once(*_):
        if not inner:
            inner.append(None)
            inner[0] = PixArt.run(model, GRIDS[1])

    model.transformer_blocks[0].register_forward_hook(call_once)
    assert torch.equal(PixArt.run(model, GRIDS[0]), expected[GRIDS[0]])
    assert torch.equal(inner[0], expected[GRIDS[1]])


def test_an_error_ends_the_call(pixart):
    model, fixed = pixart
    block = model.transformer_blocks[1]
    handle = block.register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        PixArt.run(model, GRIDS[0])
    assert call_grid._CALL.get() is None
    handle.remove()
    assert torch.equal(PixArt.run(model, GRIDS[1]), outputs(PixArt, fixed)[GRIDS[1]])


def test_tokens_from_elsewhere_have_no_grid(pixart):
    """Those of the last call once counted."""
    model, _ = pixart
    PixArt.run(model, GRIDS[0])
    attn = model.transformer_blocks[0].attn1
    x = torch.randn(2, 24, attn.dim, dtype=torch.float64)
    with pytest.raises(ValueError, match=UNKNOWN):
        attn(x)
    assert torch.equal(attn(x, GRIDS[0]), attn(x.unflatten(1, GRIDS[0])).flatten(1, 2))


# A model run piece by piece.


def pieces(host, model, grid):
    """A forward that pauses after each block; what it returns is the last that it yields."""
    seed = torch.Generator().manual_seed(1)
    if host is ViT:
        images = torch.randn(2, 3, *(8 * n for n in grid), generator=seed).double()
        x = model._pos_embed(model.patch_embed(images))
        for block in model.blocks:
            yield x
            x = block(x)
    else:
        latents = torch.randn(2, 4, *(2 * n for n in grid), generator=seed).double()
        x = model.pos_embed(latents)
        for block in model.transformer_blocks:
            yield x
            x = block(x, encoder_hidden_states=x, timestep=torch.ones(2, 6 * x.shape[-1]).double())
    yield x


def last(steps):
    *_, x = steps
    return x


def test_by_hand(vit, pixart):
    for host, (model, fixed) in {ViT: vit, PixArt: pixart}.items():
        for grid in (*GRIDS, *GRIDS):
            assert torch.equal(
                last(pieces(host, model, grid)), last(pieces(host, fixed[grid], grid))
            )


def test_interleaved_by_hand(pixart):
    model, fixed = pixart
    steps = zip(*(pieces(PixArt, model, grid) for grid in GRIDS), strict=True)
    assert_equal(last(steps), (last(pieces(PixArt, fixed[grid], grid)) for grid in GRIDS))


def test_interleaved_so_that_nobody_knows(vit):
    """timm makes other tokens of the patch embedding's, with positions."""
    model, fixed = vit
    with pytest.raises(ValueError, match=UNKNOWN):
        last(zip(*(pieces(ViT, model, grid) for grid in GRIDS), strict=True))
    # Behind the first block, they are known.
    first, second = (pieces(ViT, model, grid) for grid in GRIDS)
    next(first), next(first)
    next(second), next(second)
    made = last(zip(first, second, strict=True))
    assert_equal(made, (last(pieces(ViT, fixed[grid], grid)) for grid in GRIDS))


def test_interleaved_tasks(vit):
    model, fixed = vit

    async def task(grid):
        steps = []
        for x in pieces(ViT, model, grid):
            steps.append(x)
            await asyncio.sleep(0)
        return last(steps)

    async def both():
        return await asyncio.gather(*map(task, GRIDS))

    assert_equal(asyncio.run(both()), (last(pieces(ViT, fixed[grid], grid)) for grid in GRIDS))


def test_methods_of_timm_beside_forward(vit):
    model, fixed = vit
    images = torch.randn(2, 3, 32, 48, dtype=torch.float64)
    for _ in range(2):
        for grid, x in zip(GRIDS, (images, images.mT), strict=True):
            for method in ("forward_features", "forward_intermediates"):
                ours, expected = (getattr(m, method)(x) for m in (model, fixed[grid]))
                ours, expected = (y[0] if isinstance(y, tuple) else y for y in (ours, expected))
                assert torch.equal(ours, expected)


# Blocks that are computed once more.


def checkpointed(pixart, **options):
    pixart.train()
    pixart.enable_gradient_checkpointing(functools.partial(checkpoint, **options))


@pytest.mark.parametrize("reentrant", [False, True], ids=["", "reentrant"])
@pytest.mark.parametrize("threaded", [False, True], ids=["", "thread"])
def test_a_block_computed_once_more(pixart, reentrant, threaded):
    """Between forward and backward, the model ran on an image of the other grid. On GPUs, autograd
    has threads of its own."""
    model, fixed = pixart
    checkpointed(model, use_reentrant=reentrant)
    made = [PixArt.run(model, grid) for grid in GRIDS]
    for output, (grid, other) in zip(made, fixed.items(), strict=True):
        expected = PixArt.run(other, grid)
        assert torch.equal(output, expected)
        with ThreadPoolExecutor(1) as pool:
            run = pool.map if threaded else map
            (ours,) = run(gradients, [output], [model])
        assert_same_math(ours, gradients(expected, other))


def test_blocks_computed_once_more_together(vit):
    """Of two blocks in one checkpoint, the second's input is new."""
    model, fixed = vit
    made = []
    for grid in GRIDS:
        x, *_ = pieces(ViT, model, grid)
        made.append(checkpoint(model.blocks, x, use_reentrant=False))
        del x
    for output, (grid, other) in zip(made, fixed.items(), strict=True):
        expected = last(pieces(ViT, other, grid))
        assert torch.equal(output, expected)
        assert_same_math(gradients(output, model.blocks), gradients(expected, other.blocks))


def test_a_method_computed_once_more(vit):
    """With its patch embedding, whose loose calls do not pile up."""
    model, fixed = vit
    images = torch.randn(2, 3, 32, 48, dtype=torch.float64)
    for x, other in zip(
        (images, images.mT, images), (*fixed.values(), fixed[GRIDS[0]]), strict=True
    ):
        output = checkpoint(model.forward_features, x, use_reentrant=False)
        model.forward_features(x.mT)
        expected = gradients(other.forward_features(x), other.blocks)
        assert_same_math(gradients(output, model.blocks), expected)
    call, count = call_grid._CALL.get(), 0
    while call is not None:
        count += call.of is model.blocks[0].attn.calls
        call = call.outer
    assert count <= 2


def test_a_block_computed_once_more_from_a_copy_of_its_input(pixart):
    """Tokens kept elsewhere meanwhile carry no grid; it is known while there is but one."""
    model, fixed = pixart
    checkpointed(model, use_reentrant=False)
    for grid, known in zip(GRIDS, (True, False), strict=True):
        with torch.autograd.graph.saved_tensors_hooks(torch.clone, torch.clone):
            output = PixArt.run(model, grid)
        if known:
            other = fixed[grid]
            expected = gradients(PixArt.run(other, grid), other)
            assert_same_math(gradients(output, model), expected)
        else:
            with pytest.raises(ValueError, match=UNKNOWN):
                gradients(output, model)


# What the model is, after that.


def test_part_of_a_model_restored(pixart):
    """The other blocks once kept the grid of the call before."""
    model, fixed = pixart
    first, second = (f"transformer_blocks.{i}.attn1" for i in range(2))
    for one in (model, *fixed.values()):
        assert ptattn.restore_attention(one.transformer_blocks[0]) == ("attn1",)
        assert not isinstance(one.get_submodule(first), ptattn.ProxyAttention)
        assert isinstance(one.get_submodule(second), ptattn.ProxyAttention)
    for grid, other in fixed.items():
        assert torch.equal(PixArt.run(model, grid), PixArt.run(other, grid))
    assert ptattn.restore_attention(model) == (second,)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


@pytest.mark.long
def test_compiled_blocks(pixart):
    """They read no context variable: one call at a time, or calls of one grid."""
    model, fixed = pixart
    expected = outputs(PixArt, fixed)
    for block in model.transformer_blocks:
        block.compile(fullgraph=True, backend="eager", dynamic=False)
    for grid in (*GRIDS, *GRIDS):
        assert torch.equal(PixArt.run(model, grid), expected[grid])
    meet_after(model.pos_embed)
    with ThreadPoolExecutor(2) as pool:
        calls = {grid: pool.submit(PixArt.run, model, grid) for grid in GRIDS}
    errors = {grid: call.exception() for grid, call in calls.items()}
    assert any(errors.values())
    for grid, error in errors.items():  # once the first has failed, the second is alone
        if error is None:
            assert torch.equal(calls[grid].result(), expected[grid])
        else:
            assert UNKNOWN in str(error)
