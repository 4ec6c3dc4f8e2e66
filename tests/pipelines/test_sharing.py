"""Pipelines that share models, load adapters, and come from other places than a folder of ours."""

import shutil
import threading

import pytest
import torch

import ptattn
from ptattn.flow import FLOW
from ptattn.pipelines import PTDiTPipeline

# First, as it skips this module where diffusers is missing.
from tests.support.components import diffusers, pipeline, seeded  # isort: skip
from tests.test_graphs import captures  # noqa: F401

IMAGE = dict(height=16, width=24, num_inference_steps=3, output_type="pt", max_sequence_length=8)


def draw(pipe, *texts, seed=0, **changes):
    pipe.set_progress_bar_config(disable=True)
    return pipe(*texts or ["a red cat"], generator=seeded(seed), **IMAGE | changes).images


# Pipelines of one model.


def test_another_pipeline_of_the_same_models():
    """diffusers' own `from_pipe` left out the autoencoder, whose class no annotation names, and
    converts all models to float32 (huggingface/diffusers#12754)."""
    pipe = pipeline().to(torch.bfloat16)
    pipe.vae.float()
    twin = PTDiTPipeline.from_pipe(pipe)
    for name in ("text_encoder", "transformer", "vae"):
        assert getattr(twin, name) is getattr(pipe, name)
    assert (twin.transformer.dtype, twin.vae.dtype) == (torch.bfloat16, torch.float32)
    assert twin.scheduler is not pipe.scheduler
    assert torch.equal(draw(twin), draw(pipe))
    scheduler = FLOW.scheduler()
    other = PTDiTPipeline.from_pipe(pipe, scheduler=scheduler, dtype=torch.float32)
    assert other.scheduler is scheduler
    assert pipe.transformer.dtype == torch.float32


def test_components_of_another_kind_of_pipeline():
    pipe = pipeline()
    parts = pipe.components
    pixart = diffusers.PixArtSigmaPipeline(**parts)
    made = PTDiTPipeline.from_pipe(pixart)
    assert torch.equal(draw(made), draw(pipe))


def test_tiles_are_of_one_pipeline_alone(monkeypatch):
    """They stayed on in the shared autoencoder: in every other pipeline, and for good."""
    pipe, seen = pipeline(), []
    vae = pipe.vae
    decode = type(vae).decode

    def spied(self, *args, **settings):
        seen.append(self.use_tiling)
        return decode(self, *args, **settings)

    monkeypatch.setattr(type(vae), "decode", spied)
    tiled = PTDiTPipeline.from_pipe(pipe, tile_vae=True)
    for drawing in (pipe, tiled, pipe, PTDiTPipeline.from_pipe(tiled, tile_vae=False)):
        draw(drawing)
        assert not vae.use_tiling
    assert seen == [False, True, False, False]
    vae.enable_tiling()  # by hand, for all
    draw(pipe)
    draw(tiled)
    assert seen[4:] == [True, True]
    assert vae.use_tiling
    vae.disable_tiling()

    def failing(self, *args, **settings):
        raise MemoryError

    monkeypatch.setattr(type(vae), "decode", failing)
    with pytest.raises(MemoryError):
        draw(tiled)
    assert not vae.use_tiling
    del vae.use_tiling
    with pytest.raises(ValueError, match="tile_vae needs an autoencoder with tiles; AutoencoderKL"):
        PTDiTPipeline.from_pipe(pipe, tile_vae=True)


def test_threads_draw_what_each_draws_alone():
    """One scheduler for all raised IndexError, or drew with another's noise levels
    (huggingface/diffusers#9362, #7851)."""
    pipe, prompts = pipeline(), ["a red cat", "the green dog", "blue"]
    expected = [draw(pipe, text, seed=i) for i, text in enumerate(prompts)]
    pipes, drawn = [PTDiTPipeline.from_pipe(pipe) for _ in prompts], [[] for _ in prompts]

    def work(i):
        for _ in range(3):
            drawn[i].append(draw(pipes[i], prompts[i], seed=i))

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(prompts))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for own, alone in zip(drawn, expected, strict=True):
        assert len(own) == 3
        assert all(torch.equal(one, alone) for one in own)


def test_a_call_within_a_call_is_refused():
    pipe = pipeline()

    def again(pipe, step, timestep, tensors):
        draw(pipe)

    with pytest.raises(RuntimeError, match=r"in another call, .*from_pipe\(pipeline\)"):
        draw(pipe, callback_on_step_end=again)
    draw(pipe)


# Adapters.


def lora_folder(path, seed):
    """Of every linear layer, written by a twin of the pipeline's transformer."""
    peft = pytest.importorskip("peft")
    from tests.support.components import transformer

    model = transformer()
    torch.manual_seed(seed)
    layers = ["qkv", "q", "kv", "proj", "zero", "mlp.0", "caption.0"]
    model.add_adapter(peft.LoraConfig(r=2, target_modules=layers))
    for name, weight in model.named_parameters():
        if "lora" in name:
            torch.nn.init.normal_(weight, std=0.3)
    layers = peft.get_peft_model_state_dict(model)
    PTDiTPipeline.save_lora_weights(path, transformer_lora_layers=layers)
    return path


def test_adapters_are_loaded_scaled_merged_and_unloaded(tmp_path):
    folders = [lora_folder(tmp_path / str(seed), seed) for seed in (1, 2)]
    pipe = pipeline()
    plain = draw(pipe)
    for name, folder in zip("ab", folders, strict=True):
        pipe.load_lora_weights(folder, adapter_name=name)
    assert pipe.get_list_adapters() == {"transformer": ["a", "b"]}
    drawn = {}
    for names, weights in (("a", 1.0), ("a", 0.5), ("b", 1.0), (["a", "b"], [1.0, 0.5])):
        pipe.set_adapters(names, weights)
        drawn[str(names), str(weights)] = draw(pipe)
    pictures = [plain, *drawn.values()]
    assert not any(torch.equal(x, y) for i, x in enumerate(pictures) for y in pictures[:i])
    pipe.fuse_lora(adapter_names=["a", "b"])
    torch.testing.assert_close(draw(pipe), pictures[-1], rtol=1e-4, atol=1e-5)
    pipe.unfuse_lora()
    pipe.disable_lora()
    torch.testing.assert_close(draw(pipe), plain, rtol=1e-4, atol=1e-5)
    pipe.unload_lora_weights()
    torch.testing.assert_close(draw(pipe), plain, rtol=1e-4, atol=1e-5)
    assert not any("lora" in name for name in pipe.transformer.state_dict())


def test_adapters_beside_offloading(tmp_path, monkeypatch):
    """They are loaded between offloading that is taken off and put on again."""
    offload = PTDiTPipeline.enable_model_cpu_offload
    monkeypatch.setattr(
        PTDiTPipeline,
        "enable_model_cpu_offload",
        lambda self, device="cpu": offload(self, device=device),
    )
    folder = lora_folder(tmp_path, 1)
    pipe = pipeline()
    pipe.load_lora_weights(folder)
    expected = draw(pipe)
    pipe.unload_lora_weights()
    pipe.enable_model_cpu_offload()
    pipe.load_lora_weights(folder)
    assert hasattr(pipe.transformer, "_hf_hook")
    assert torch.equal(draw(pipe), expected)


def test_a_callback_may_change_the_weights(tmp_path, monkeypatch):
    """Captions were projected by the first step's weights for all steps of a call."""
    pipe = pipeline()
    pipe.load_lora_weights(lora_folder(tmp_path, 1))

    def drawn(callback=None):
        pipe.transformer.enable_adapters()
        return draw(pipe, callback_on_step_end=callback)

    def off(pipe, step, timestep, tensors):
        pipe.transformer.disable_adapters()

    changed, unchanged = drawn(off), drawn()
    assert not torch.equal(changed, unchanged)
    monkeypatch.setattr(type(pipe.transformer), "prepares_captions", False)
    torch.testing.assert_close(drawn(off), changed)


def test_adapters_of_a_graphed_transformer(captures, tmp_path):  # noqa: F811
    folder = lora_folder(tmp_path, 1)
    pipe, made = pipeline(), [0]
    model = pipe.transformer
    pipe.transformer = ptattn.graphed(model)

    def drawn_anew():
        drawn = draw(pipe)
        assert captures() > made[-1]
        made.append(captures())
        assert torch.equal(draw(PTDiTPipeline.from_pipe(pipe, transformer=model)), drawn)
        return drawn

    pictures = [drawn_anew()]
    pipe.load_lora_weights(folder, adapter_name="a")
    pictures.append(drawn_anew())
    pipe.set_adapters("a", 0.5)
    pictures.append(drawn_anew())
    pipe.fuse_lora(lora_scale=2.0)
    pictures.append(drawn_anew())
    pipe.unfuse_lora()
    pipe.unload_lora_weights()
    torch.testing.assert_close(drawn_anew(), pictures[0], rtol=1e-4, atol=1e-5)
    assert not any(torch.equal(x, y) for i, x in enumerate(pictures) for y in pictures[:i])


# Other places.


def test_diffusers_own_class_loads_it_through_one_line(tmp_path):
    pipe = pipeline()
    pipe.save_pretrained(tmp_path)
    (tmp_path / "pipeline.py").write_text("from ptattn.pipelines import PTDiTPipeline\n")
    made = diffusers.DiffusionPipeline.from_pretrained(
        tmp_path, custom_pipeline="pipeline", trust_remote_code=True
    )
    assert type(made) is PTDiTPipeline
    assert torch.equal(draw(made), draw(pipe))


def test_a_repository_on_the_hub_is_fetched_whole(tmp_path, monkeypatch):
    """diffusers' own download refuses an index with a class of another package than its own
    (huggingface/diffusers#5728)."""
    pipe, fetched = pipeline(), []
    pipe.save_pretrained(tmp_path / "hub")

    def snapshot(name, **options):
        fetched.append((name, options))
        skipped = [pattern.removesuffix("/*") for pattern in options.pop("ignore_patterns")]
        shutil.copytree(tmp_path / "hub", tmp_path / "local", ignore=lambda *_: skipped)
        return str(tmp_path / "local")

    monkeypatch.setattr("ptattn.pipelines.pipeline.snapshot_download", snapshot)
    made = PTDiTPipeline.from_pretrained("someone/views", revision="v1", vae=pipe.vae)
    assert fetched == [("someone/views", dict(revision="v1", force_download=False))]
    assert made.vae is pipe.vae
    assert not (tmp_path / "local" / "vae").exists()
    assert torch.equal(draw(made), draw(pipe))
