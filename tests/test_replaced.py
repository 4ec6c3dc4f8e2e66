"""Models whose attention was replaced, saved and loaded."""

import copy
import json

import pytest
import torch

import ptattn
from ptattn import replaced
from tests.support.hosts import PixArt, ViT, import_timm, wake


@pytest.fixture(scope="module")
def diffusers():
    return pytest.importorskip("diffusers")


@pytest.fixture
def pixart(diffusers):
    """With another window in each block, one of them on a grid of its own."""
    model = PixArt.make(diffusers)
    ptattn.replace_attention(model, window=(2, 3), match=r".*\.0\.attn1")
    ptattn.replace_attention(
        model, window=(4, 4), proxy_window=(2, 2), grid=PixArt.grid, backend="sdpa", match=".*attn1"
    )
    return wake(model).eval()


def assert_same(model, other, run):
    assert [str(m) for m in model.modules()] == [str(m) for m in other.modules()]
    assert_same_weights(model, other, run)


def assert_same_weights(model, other, run):
    assert all(map(torch.equal, model.state_dict().values(), other.state_dict().values()))
    assert torch.equal(run(model), run(other))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_a_class_of_diffusers(pixart, diffusers, tmp_path, dtype):
    pixart.to(dtype)
    ptattn.save_replaced(pixart, tmp_path / "deep" / "folder")
    model = ptattn.load_replaced(diffusers.PixArtTransformer2DModel, tmp_path / "deep" / "folder")
    assert not any(module.training for module in model.modules())
    backends = [
        block.attn1.texture_complement.window_attn.backend for block in model.transformer_blocks
    ]
    assert backends == ["auto", "sdpa"]
    assert_same(model.double(), pixart.double(), PixArt.run)
    with pytest.raises(
        ValueError, match=r"old attention of transformer_blocks\.0\.attn1, .* is not"
    ):
        ptattn.restore_attention(model)


def test_a_model_that_is_given(tmp_path):
    fresh = ViT.make(import_timm())
    model = copy.deepcopy(fresh)
    ptattn.replace_attention(model, window=(2, 3))
    ptattn.save_replaced(wake(model), tmp_path)
    before = ViT.run(fresh)
    loaded = ptattn.load_replaced(fresh, tmp_path)
    assert loaded is fresh
    assert_same(fresh, model, ViT.run)
    with pytest.raises(ValueError, match="replaced already"):
        ptattn.load_replaced(fresh, tmp_path)
    ptattn.restore_attention(fresh)
    assert torch.equal(ViT.run(fresh), before)


@pytest.mark.parametrize("given", [False, True], ids=["class", "model"])
def test_attention_in_two_places_and_tied_weights(diffusers, tmp_path, given):
    """safetensors takes no memory twice, so that nothing was saved."""

    def make():
        model = PixArt.make(diffusers)
        first, second = model.transformer_blocks
        second.attn1 = first.attn1
        second.ff.net[2].weight = first.ff.net[2].weight
        return model

    model = make()
    ptattn.replace_attention(model, window=(2, 3))
    ptattn.save_replaced(wake(model).eval(), tmp_path)
    kind = make().eval() if given else diffusers.PixArtTransformer2DModel
    loaded = ptattn.load_replaced(kind, tmp_path)
    assert_same_weights(loaded, model, PixArt.run)
    first, second = loaded.transformer_blocks
    assert (first.attn1 is second.attn1) == given
    assert (first.ff.net[2].weight is second.ff.net[2].weight) == given


def test_blocks_that_are_compiled_have_plain_names(pixart, diffusers, tmp_path):
    twin = copy.deepcopy(pixart)
    for i, block in enumerate(twin.transformer_blocks):
        twin.transformer_blocks[i] = torch.compile(block, backend="eager")
    ptattn.save_replaced(twin, tmp_path)
    model = ptattn.load_replaced(diffusers.PixArtTransformer2DModel, tmp_path)
    assert_same(model, pixart, PixArt.run)


def test_the_host_does_not_take_the_folder_for_its_own(pixart, diffusers, tmp_path):
    """It would make the old attention, with random weights."""
    ptattn.save_replaced(pixart, tmp_path)
    with pytest.raises(OSError, match="no file named diffusion_pytorch_model"):
        diffusers.PixArtTransformer2DModel.from_pretrained(tmp_path)


def test_what_is_not_saved(pixart, tmp_path):
    folder = tmp_path / "folder"
    with pytest.raises(TypeError, match=r"within a OptimizedModule: give its \._orig_mod"):
        ptattn.save_replaced(torch.compile(pixart), folder)
    with pytest.raises(TypeError, match=r"within a AveragedModel: give its \.module"):
        ptattn.save_replaced(torch.optim.swa_utils.AveragedModel(pixart), folder)
    peft = pytest.importorskip("peft")
    adapted = peft.get_peft_model(pixart, peft.LoraConfig(r=2, target_modules=["proj"]))
    for model in (adapted, pixart):
        with pytest.raises(ValueError, match="has adapters: merge them first"):
            ptattn.save_replaced(model, folder)
    merged = adapted.merge_and_unload()
    ptattn.restore_attention(merged)
    with pytest.raises(ValueError, match="no attention that replace_attention made"):
        ptattn.save_replaced(merged, folder)
    assert not folder.exists()


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        (1, r"has not all attention that .* missing: transformer_blocks\.1\.attn1$"),
        (3, r"model.safetensors does not fit .* missing: transformer_blocks\.2\.attn1\.to_k"),
    ],
)
def test_another_model_stays_as_it_was(pixart, diffusers, tmp_path, layers, message):
    ptattn.save_replaced(pixart, tmp_path)
    other = PixArt.make(diffusers, layers=layers)
    modules = dict(other.named_modules())
    with pytest.raises(ValueError, match=message):
        ptattn.load_replaced(other, tmp_path)
    assert dict(other.named_modules()) == modules
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in other.modules())


GROUP = dict(names=["attn"], window=[1, 2, 2], proxy_window=[1, 2, 2], grid=None, backend="auto")


def write_record(folder, content):
    (folder / replaced.RECORD_FILE).write_text(json.dumps(content))


def test_what_is_not_loaded(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"replaced_attention\.json"):
        ptattn.load_replaced(torch.nn.Linear(1, 1), tmp_path)
    write_record(tmp_path, {"replaced": [GROUP]})
    with pytest.raises(FileNotFoundError, match=r"replaced_model\.safetensors"):
        ptattn.load_replaced(torch.nn.Linear(1, 1), tmp_path)


@pytest.mark.parametrize(
    "content",
    [
        {},
        {"replaced": 3},
        {"replaced": []},
        {"replaced": ["attn"]},
        {"replaced": [GROUP], "version": 2},
        {"replaced": [{"names": ["attn"], "window": [1, 2, 2]}]},
        {"replaced": [{**GROUP, "windows": 3}]},
        *(
            {"replaced": [{**GROUP, key: value}]}
            for key, value in [
                *(("names", []), ("names", "attn"), ("names", [None]), ("window", ["a", 2])),
                *(("window", 3), ("proxy_window", None), ("grid", {}), ("backend", None)),
            ]
        ),
    ],
    ids=str,
)
def test_a_record_that_is_none_is_named(tmp_path, content):
    """It once was a KeyError, a TypeError, or attention like nobody's."""
    write_record(tmp_path, content)
    with pytest.raises(ValueError, match=r"^\S+replaced_attention\.json(: \w+ is| must)"):
        ptattn.load_replaced(torch.nn.Linear(1, 1), tmp_path)


def test_a_record_of_another_version_names_its_folder(pixart, diffusers, tmp_path):
    ptattn.save_replaced(pixart, tmp_path)
    record = json.loads((tmp_path / replaced.RECORD_FILE).read_text())
    record["replaced"][1]["backend"] = "vulkan"
    write_record(tmp_path, record)
    with pytest.raises(ValueError, match=rf"^{tmp_path}: backend must be .*vulkan"):
        ptattn.load_replaced(diffusers.PixArtTransformer2DModel, tmp_path)
