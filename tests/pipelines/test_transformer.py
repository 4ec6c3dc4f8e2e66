"""PTDiT as one of diffusers' models: configuration, adapters, quantized and offloaded weights."""

import copy
import inspect
import json

import pytest
import torch
from torch.testing import assert_close

from ptattn import checkpoint
from ptattn.models import ModelConfig
from ptattn.pipelines import PTDiTTransformer

# First, as it skips this module where diffusers is missing.
from tests.support.components import WIDTH, diffusers, transformer  # isort: skip

CPU = torch.device("cpu")


@pytest.fixture
def inputs():
    return torch.randn(1, 4, 8, 12), torch.tensor([500.0]), torch.randn(1, 5, WIDTH)


# Configuration.


def test_the_signature_is_the_configuration_s():
    own = list(inspect.signature(PTDiTTransformer).parameters.values())
    assert own == list(inspect.signature(ModelConfig).parameters.values())


def test_the_component_and_the_checkpoint_read_each_other_s_folders(tmp_path):
    model = transformer(window=(2, 3), proxy_window=(1, 1, 3))
    model.save_pretrained(tmp_path / "theirs")
    checkpoint.save_model(model, tmp_path / "ours")
    for folder in ("theirs", "ours"):
        for back in (
            checkpoint.load_model(tmp_path / folder),
            PTDiTTransformer.from_pretrained(tmp_path / folder),
        ):
            assert back.model_config == model.model_config
            states = back.state_dict(), model.state_dict()
            torch.testing.assert_close(*states, rtol=0, atol=0)
    half = PTDiTTransformer.from_pretrained(tmp_path / "ours", dtype=torch.bfloat16)
    assert half.dtype == torch.bfloat16


def test_the_configuration_is_diffusers_own_mapping():
    """It was our dataclass: `from_config(model.config)` looked on the Hub for a model of the name
    "ModelConfig(depth=1, ...)", and what diffusers writes into a configuration failed."""
    model = transformer(window=[2, 3])
    assert isinstance(model.config, diffusers.configuration_utils.FrozenDict)
    assert model.config["window"] == model.config.window == model.model_config.window == (2, 3)
    twin = PTDiTTransformer.from_config(model.config)
    assert twin.model_config == model.model_config
    twin.register_to_config(**model.config, note=1)
    assert twin.config["note"] == 1
    assert twin.model_config == model.model_config


def test_averaged_weights_are_saved_and_read(tmp_path, inputs):
    """As diffusers' training scripts do; their folder is also one of ours."""
    from diffusers.training_utils import EMAModel

    model = transformer()
    ema = EMAModel(model.parameters(), model_cls=PTDiTTransformer, model_config=model.config)
    with torch.no_grad():
        expected = model(*inputs)
        for parameter in model.parameters():
            parameter.mul_(2)
    ema.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["decay"] == 0.9999
    back = EMAModel.from_pretrained(tmp_path, PTDiTTransformer)
    assert back.decay == ema.decay
    back.copy_to(model.parameters())
    for averaged in (model, checkpoint.load_model(tmp_path)):
        with torch.no_grad():
            assert_close(averaged(*inputs), expected)


# Training.


def test_the_component_trains_as_diffusers_models_do(tmp_path):
    """Checkpointed by diffusers' name, and with an adapter that is saved and loaded."""
    peft = pytest.importorskip("peft")
    model = transformer(depth=2)
    inputs = torch.randn(1, 4, 8, 12), torch.tensor([500.0]), torch.randn(1, 5, WIDTH)
    assert not model.is_gradient_checkpointing
    model.enable_gradient_checkpointing()
    assert model.is_gradient_checkpointing
    assert model.blocks.checkpointed
    with pytest.raises(ValueError, match="must be None"):
        model.enable_gradient_checkpointing(lambda module, *args: module(*args))
    plain = model(*inputs)
    twin = transformer(depth=2)
    twin.load_state_dict(model.state_dict())
    model.add_adapter(peft.LoraConfig(r=2, target_modules=["qkv", "q", "kv", "proj", "zero"]))
    with pytest.raises(ValueError, match="no place for adapters: merge them first"):
        checkpoint.to_official(model)
    for name, weight in model.named_parameters():
        assert weight.requires_grad == ("lora" in name)
        if "lora" in name:
            torch.nn.init.normal_(weight, std=0.2)
    adapted = model(*inputs)
    assert not torch.allclose(adapted, plain, rtol=1e-2)
    adapted.sum().backward()
    assert all(w.grad.any() for w in model.parameters() if w.requires_grad)
    model.save_lora_adapter(tmp_path)
    twin.load_lora_adapter(tmp_path, prefix=None, use_safetensors=True)
    torch.testing.assert_close(twin(*inputs), adapted)
    model.disable_gradient_checkpointing()
    assert not model.is_gradient_checkpointing
    model.disable_adapters()
    torch.testing.assert_close(model(*inputs), plain)


def test_weights_of_another_configuration_are_refused(tmp_path):
    transformer().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="caption"):
        PTDiTTransformer.from_pretrained(tmp_path, caption_channels=8, low_cpu_mem_usage=True)


# Compiled, quantized and offloaded.


def test_the_backend_is_chosen_by_diffusers_name():
    """Its own did nothing, and said nothing: it looks for attention layers of diffusers."""
    model = transformer()
    model.set_attention_backend("reference")
    chosen = {module.backend for module in model.modules() if hasattr(module, "backend")}
    assert chosen == {"reference"}
    with pytest.raises(ValueError, match="reference, sdpa, triton, auto; got 'flash'"):
        model.set_attention_backend("flash")
    model.reset_attention_backend()
    assert model.blocks[0].text_attn.backend == model.output.backend == "auto"


def test_blocks_are_what_is_compiled(monkeypatch):
    compiled = []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, **options: compiled.append(self))
    model = transformer(depth=3)
    model.compile_repeated_blocks(fullgraph=True)
    assert compiled == list(model.blocks)


@pytest.mark.long
def test_compiled_blocks_are_two_graphs(inputs):
    """Whatever the depth: the first one's stream has no branch to add."""
    from torch._dynamo.testing import CompileCounterWithBackend

    torch.compiler.reset()
    model, counter = transformer(depth=4), CompileCounterWithBackend("eager")
    with torch.no_grad():
        expected = model(*inputs)
        model.compile_repeated_blocks(fullgraph=True, backend=counter)
        assert_close(model(*inputs), expected)
    assert counter.frame_count == 2


def test_quantized_weights_are_made_saved_and_read(tmp_path, inputs):
    """`from_pretrained` writes what it did into `config`, which could not be written to."""
    quantization = pytest.importorskip("torchao.quantization")
    int8 = diffusers.TorchAoConfig(quantization.Int8WeightOnlyConfig())
    model = transformer(depth=2)
    model.save_pretrained(tmp_path / "full")
    small = PTDiTTransformer.from_pretrained(
        tmp_path / "full", quantization_config=int8, dtype=torch.bfloat16
    )
    assert type(small.blocks[0].mlp[0].weight).__name__ == "Int8Tensor"
    given = [x.bfloat16() for x in inputs]
    with torch.no_grad():
        out, expected = small(*given), model(*inputs)
    assert 0 < (out - expected).norm() < 0.05 * expected.norm()
    small.save_pretrained(tmp_path / "small")
    back = PTDiTTransformer.from_pretrained(tmp_path / "small", dtype=torch.bfloat16)
    with torch.no_grad():
        assert torch.equal(back(*given), out)
    with pytest.raises(ValueError, match="unknown: quantization_config"):
        checkpoint.load_model(tmp_path / "small")


def test_a_device_map_is_found_and_keeps_blocks_whole(tmp_path, inputs):
    pytest.importorskip("accelerate")
    model = transformer(depth=3)
    model.save_pretrained(tmp_path)
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    spread = PTDiTTransformer.from_pretrained(
        tmp_path, device_map="auto", max_memory={"cpu": size // 2}, offload_folder=tmp_path / "off"
    )
    places = spread.hf_device_map
    assert set(places.values()) == {"cpu", "disk"}
    assert not any(name.startswith("blocks") and name.count(".") > 1 for name in places), places
    assert not spread.prepares_captions
    with torch.no_grad():
        assert_close(spread(*inputs), model(*inputs))


@pytest.mark.parametrize("kind", ["block_level", "leaf_level"])
def test_groups_of_weights_are_offloaded(kind, tmp_path, inputs):
    """To the disk: what is not brought back before it is read is not there."""
    model = transformer(depth=2)
    off = copy.deepcopy(model)
    blocks = dict(num_blocks_per_group=1) if kind == "block_level" else {}
    off.enable_group_offload(CPU, CPU, kind, offload_to_disk_path=str(tmp_path), **blocks)
    latents, timestep, caption = inputs
    with torch.no_grad():
        expected = model(*inputs)
        for _ in range(2):
            assert_close(off(*inputs), expected)
        if off.prepares_captions:
            assert_close(off(latents, timestep, off.prepare_caption(caption)), expected)
    assert off.prepares_captions == (kind == "leaf_level")


def test_weights_stored_in_8_bits(inputs):
    model = transformer(depth=2)
    with torch.no_grad():
        expected = model(*inputs)
        model.enable_layerwise_casting(torch.float8_e4m3fn, torch.float32)
        assert model.blocks[0].mlp[0].weight.dtype == torch.float8_e4m3fn
        out = model(*inputs)
    assert 0 < (out - expected).norm() < 0.1 * expected.norm()
