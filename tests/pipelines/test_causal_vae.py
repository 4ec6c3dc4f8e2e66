"""The released model's autoencoder: the original's outputs and gradients, and what breaks them."""

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open

# First, as it skips this module where diffusers is missing.
from tests.support.components import diffusers  # isort: skip

from ptattn.pipelines import CausalVAE, causal_vae_layers
from ptattn.pipelines.causal_vae_tiling import Tiling

GOLDEN = Path(__file__).resolve().parents[1] / "golden_vae"
SMALL, EDGES = (GOLDEN / f"causal_vae_small{end}.safetensors" for end in ("", "_edges"))
SIZES = dict(block_out_channels=(16, 32, 64, 64), norm_num_groups=8)
TILES = dict(
    tile_sample_min_size=32,
    tile_sample_min_num_frames=5,
    tile_latent_min_num_frames=3,
    tile_overlap_factor=0.25,
)
CASES = [
    *((SMALL, name) for name in ("decode_image", "decode_video", "encode_image", "encode_video")),
    *((EDGES, name) for name in ("decode_two_frames", "encode_uneven")),
    *((EDGES, name) for name in ("tiled_decode", "tiled_encode")),
]
each_case = pytest.mark.parametrize(("path", "case"), CASES, ids=[name for _, name in CASES])


def read(path, prefix=""):
    with safe_open(path, "pt") as file:
        names = [name for name in file.keys() if name.startswith(prefix)]  # noqa: SIM118
        return {name.removeprefix(prefix): file.get_tensor(name) for name in names}


@pytest.fixture(scope="module")
def weights():
    return {name: tensor.float() for name, tensor in read(SMALL, "weights.").items()}


@pytest.fixture
def vae(weights):
    model = CausalVAE(**SIZES)
    model.load_state_dict(weights)  # strictly
    return model


def relative_error(ours, theirs):
    return ((ours - theirs).norm() / theirs.norm()).item()


def run(vae, path, case, dtype=torch.float32):
    """The output and what it is wanted to be, and the input."""
    golden = read(path, f"{case}.")
    vae.disable_tiling()
    if "tiled" in case:
        vae.enable_tiling(**TILES)
    if "decode" in case:
        x = golden["latents"].to(dtype)
        return vae.decode(x).sample, golden["output"], x
    x = golden["pixels"].to(dtype)
    return vae.encode(x).latent_dist.parameters, golden["moments"], x


def error(vae, path, case):
    with torch.no_grad():
        output, expected, _ = run(vae, path, case)
    return relative_error(output, expected)


def test_every_case_of_the_golden_files_is_run():
    known = []
    for path in (SMALL, EDGES):
        with safe_open(path, "pt") as file:
            config = json.loads(file.metadata()["config"])
        known += [(path, name) for name in config["cases"]]
        assert config["base_channels"] == SIZES["block_out_channels"][0]
        assert config["norm_groups"] == SIZES["norm_num_groups"]
    assert known == CASES
    assert config["tiling"] == dict(
        tile_pixels=32, tile_latents=4, overlap=0.25, tile_frames=5, tile_latent_frames=3
    )


@pytest.mark.parametrize(
    "slab", [2**27, pytest.param(20_000, marks=pytest.mark.long)], ids=["whole", "slabs"]
)
@each_case
def test_outputs_are_the_original_s(vae, path, case, slab, monkeypatch):
    monkeypatch.setattr(causal_vae_layers, "SLAB", slab)
    assert error(vae, path, case) <= 1e-5


@pytest.mark.parametrize(
    ("case", "checkpointed"),
    [(name, False) for path, name in CASES if path == SMALL]
    + [("decode_image", True), ("encode_video", True)],
)
def test_gradients_are_the_original_s(vae, case, checkpointed):
    if checkpointed:
        vae.enable_gradient_checkpointing()
    golden = read(SMALL, f"{case}.")
    x = golden["latents" if "decode" in case else "pixels"].requires_grad_()
    if "decode" in case:
        output, name = vae.decode(x).sample, "output"
    else:
        output, name = vae.encode(x).latent_dist.parameters, "moments"
    assert relative_error(output, golden[name]) <= 1e-5
    (output * golden[f"{name}_probe"]).sum().backward()
    wanted = {n.removeprefix("grad."): g for n, g in golden.items() if n.startswith("grad.")}
    assert len(wanted) >= 10
    for name, gradient in wanted.items():
        ours = x.grad if name in ("latents", "pixels") else vae.get_parameter(name).grad
        assert relative_error(ours, gradient) <= 1e-4, name


def test_the_distribution_is_the_original_s(vae):
    golden = read(SMALL, "encode_video.")
    with torch.no_grad():
        found = vae.encode(golden["pixels"]).latent_dist
    assert relative_error(found.mean, golden["mean"]) <= 1e-5
    assert relative_error(found.logvar, golden["logvar"]) <= 1e-5
    assert torch.equal(found.mode(), found.mean)
    noise = torch.randn(found.mean.shape, generator=torch.Generator().manual_seed(3))
    sample = found.sample(torch.Generator().manual_seed(3))
    torch.testing.assert_close(sample, found.mean + (found.logvar / 2).exp() * noise)


def test_a_gradient_goes_through_tiles(vae):
    """By finite differences, in float64: blending writes in place."""
    vae.double().requires_grad_(False)
    vae.enable_tiling(16, 5, 2, 0.5)
    torch.manual_seed(0)
    z, along = torch.randn(2, 1, 4, 2, 2, 3, dtype=torch.float64)
    z.requires_grad_()
    out = vae.decode(z).sample
    probe = torch.randn_like(out)
    (gradient,) = torch.autograd.grad((out * probe).sum(), z)
    step = 1e-5
    with torch.no_grad():
        ahead, back = (vae.decode(z + s * along).sample for s in (step, -step))
    expected = ((ahead - back) * probe).sum() / (2 * step)
    torch.testing.assert_close((gradient * along).sum(), expected, rtol=1e-5, atol=1e-6)


# What people get wrong, each in a case that shows it. Correct code is below 1e-5 in all of them.


def _zeros_in_front(self, x, **settings):
    """Padding in time by zeros, not by the first frame."""
    whole = causal_vae_layers.Plain(x) if isinstance(x, torch.Tensor) else x
    rows = whole.read(0, whole.shape[2])
    front = torch.zeros_like(rows[:, :1]).repeat(1, self.conv.kernel_size[0] - 1, 1, 1, 1)
    padded = torch.cat([front, rows], 1)
    added, repeated = front.shape[1], settings.pop("plus", None)
    settings.pop("into", None)
    out = causal_vae_layers.convolve(self.conv, padded, **settings)
    # The correct padding of the padded clip is seen by its first frames alone.
    out = out[:, added // self.conv.stride[0] :] if added else out
    return out if repeated is None else out + repeated(0, out.shape[2])


def _no_first_frame(x):
    """All frames enlarged among themselves."""
    y = F.interpolate(x.movedim(-1, 1), scale_factor=(2, 1, 1), mode="trilinear").movedim(1, -1)
    return y[:, 1:]


def _norm_per_frame(self, x, silu=True):
    y = F.group_norm(
        x.flatten(0, 1).movedim(-1, 1), self.num_groups, self.weight, self.bias, self.eps
    )
    y = y.movedim(1, -1).unflatten(0, x.shape[:2])
    return causal_vae_layers.Plain(F.silu(y) if silu else y)


def _blend_with_raw(tile, neighbour, dim, most):
    """Weights that end at 1, as of torch.linspace."""
    extent = min(most, tile.shape[dim], neighbour.shape[dim])
    weight = torch.linspace(0, 1, extent).view(-1, *(1,) * (4 - dim))
    begin = tile.narrow(dim, 0, extent)
    end = neighbour.narrow(dim, neighbour.shape[dim] - extent, extent)
    begin.copy_(end * (1 - weight) + begin * weight)


def _attention_over_frames(self, x):
    h = self.norm(x, silu=False).read(0, x.shape[2])
    q, k, v = (layer(h).flatten(1, 3)[:, None] for layer in (self.q, self.k, self.v))
    return x + self.proj_out(F.scaled_dot_product_attention(q, k, v).view_as(x))


LAYERS, TILING = "ptattn.pipelines.causal_vae_layers", "ptattn.pipelines.causal_vae_tiling"
FAULTS = {
    "zeros in front": (
        f"{LAYERS}.CausalConv3d.forward",
        _zeros_in_front,
        EDGES,
        "decode_two_frames",
    ),
    "first frame not alone": (
        f"{LAYERS}._twice_the_frames",
        _no_first_frame,
        EDGES,
        "decode_two_frames",
    ),
    "norm of each frame": (
        f"{LAYERS}.GroupNorm.forward",
        _norm_per_frame,
        EDGES,
        "decode_two_frames",
    ),
    "attention over frames": (
        f"{LAYERS}.AttnBlock.forward",
        _attention_over_frames,
        EDGES,
        "decode_two_frames",
    ),
    "no blending": (f"{TILING}._blend", lambda *_: None, EDGES, "tiled_encode"),
    "blending to 1": (f"{TILING}._blend", _blend_with_raw, EDGES, "tiled_decode"),
}


@pytest.mark.parametrize(("where", "wrong", "path", "case"), FAULTS.values(), ids=FAULTS)
def test_the_golden_files_show_what_is_wrong(vae, where, wrong, path, case, monkeypatch):
    monkeypatch.setattr(where, wrong)
    assert error(vae, path, case) > 1e-2


@pytest.mark.parametrize("change", [dict(eps=1e-5), dict(num_groups=4)], ids=["eps", "groups"])
def test_another_norm_shows(vae, change):
    for module in vae.modules():
        if isinstance(module, causal_vae_layers.GroupNorm):
            vars(module).update(change)
    assert error(vae, SMALL, "encode_image") > 1e-2


def test_padding_on_the_other_side_shows(vae, monkeypatch):
    """Down-sampling pads on the right and bottom."""
    convolve = causal_vae_layers.convolve

    def turned(conv, x, *, pad=None, **settings):
        if pad != (0, 1):
            return convolve(conv, x, pad=pad, **settings)
        flipped = convolve(Flipped(conv), x.flip(2, 3), pad=pad, **settings)
        return flipped.flip(2, 3)

    class Flipped:
        """A mirrored kernel on a mirrored clip pads on the left and top."""

        def __init__(self, conv):
            self.weight, self.bias, self.stride = conv.weight.flip(-2, -1), conv.bias, conv.stride

    monkeypatch.setattr(f"{LAYERS}.convolve", turned)
    assert error(vae, SMALL, "encode_image") > 1e-2


# Ways that must not change the result.


def test_slabs_leave_no_trace(vae, monkeypatch):
    """Of a batch of odd frames and sides, at every height of slabs."""
    torch.manual_seed(0)
    z, x = torch.randn(2, 4, 2, 3, 2), torch.randn(2, 3, 6, 21, 19)
    with torch.no_grad():
        before = z.clone(), x.clone()
        pixels, moments = vae.decode(z).sample, vae.encode(x).latent_dist.parameters
        for slab in (1, 40_000):
            monkeypatch.setattr(causal_vae_layers, "SLAB", slab)
            assert relative_error(vae.decode(z).sample, pixels) <= 1e-5
            assert relative_error(vae.encode(x).latent_dist.parameters, moments) <= 1e-5
    assert torch.equal(z, before[0])
    assert torch.equal(x, before[1])


def test_what_hooks_are_given_stays_as_it_was(vae, monkeypatch):
    """Each block wrote its result into its input, another block's output that a hook had kept."""
    monkeypatch.setattr(causal_vae_layers, "SLAB", 2**12)
    x, kept = torch.randn(1, 3, 5, 16, 16), []

    def keep(module, given, made):
        kept.extend((t, t.clone()) for t in (*given, made) if isinstance(t, torch.Tensor))

    with torch.no_grad():
        expected = vae(x).sample
        hooks = [m.register_forward_hook(keep) for m in vae.modules()]
        assert torch.equal(vae(x).sample, expected)
        assert len(kept) > 100
        assert all(torch.equal(now, then) for now, then in kept)
        for hook in hooks:
            hook.remove()

        block, x = vae.decoder.mid.block_1, torch.randn(1, 2, 8, 8, 64)
        given = x.clone()
        made = block(x)
        assert torch.equal(x, given)
        assert torch.equal(block(x, overwrite=True), made)
        assert torch.equal(x, made)  # the memory of its input


def test_a_batch_is_its_samples(vae):
    torch.manual_seed(0)
    x = torch.randn(3, 3, 2, 16, 24)
    with torch.no_grad():
        whole = vae.encode(x).latent_dist.parameters
        vae.enable_slicing()
        sliced = vae.encode(x).latent_dist.parameters
        assert relative_error(sliced, whole) <= 1e-5
        assert relative_error(vae.decode(whole[:, :4]).sample, vae.decode(whole[:, :4]).sample) == 0
        one = vae.decode(whole[1:2, :4]).sample
        assert torch.equal(vae.decode(whole[:, :4]).sample[1:2], one)


def test_a_norm_far_from_zero_keeps_its_digits(monkeypatch):
    """A mean of 1,000 deviations: a variance as E[x²] - E[x]² would be noise."""
    monkeypatch.setattr(causal_vae_layers, "SLAB", 4_000)
    torch.manual_seed(0)
    norm = causal_vae_layers.GroupNorm(2, 8)
    x = torch.randn(1, 3, 16, 16, 8) + 1000
    expected = F.group_norm(x.double().movedim(-1, 1), 2, eps=1e-6).movedim(1, -1)
    with torch.no_grad():
        got = norm(x, silu=False).read(0, 16)
    assert relative_error(got.double(), expected) < 1e-3


@pytest.mark.parametrize("case", ["decode_image", "encode_image"])  # of videos, CPUs are slow
def test_bf16_errs_no_more_than_the_plain_way(vae, weights, case, monkeypatch):
    """A frame's kernels are summed before they are rounded, norms are rounded once."""
    path = SMALL
    with torch.no_grad():
        exact, _, _ = run(vae.double(), path, case, torch.float64)
        vae.load_state_dict(weights)
        ours, _, _ = run(vae.bfloat16(), path, case, torch.bfloat16)
    plain = run(vae.requires_grad_(), path, case, torch.bfloat16)[0]  # norms by torch
    assert relative_error(ours.double(), exact) <= 1.1 * relative_error(plain.double(), exact)
    assert relative_error(ours.double(), exact) < 4e-2


# Tiles.


def test_nothing_beyond_a_tile_is_coded_in_one_pass(vae):
    """The release raises there."""
    torch.manual_seed(0)
    z, x = torch.randn(1, 4, 1, 4, 4), torch.randn(1, 3, 5, 32, 32)
    with torch.no_grad():
        pixels, moments = vae.decode(z).sample, vae.encode(x).latent_dist.parameters
        vae.enable_tiling(**TILES)
        assert torch.equal(vae.decode(z).sample, pixels)
        assert torch.equal(vae.encode(x).latent_dist.parameters, moments)
        assert not torch.equal(vae.decode(torch.randn(1, 4, 1, 4, 5)).sample[..., :32], pixels)
        vae.disable_tiling()


@pytest.mark.parametrize("size", [(1, 8, 58), (9, 33, 26), (6, 32, 57)])
def test_tiles_cover_every_size(vae, size):
    """Also where the last tile would be too narrow for a latent."""
    frames, height, width = size
    x = torch.randn(1, 3, *size)
    with torch.no_grad():
        shape = vae.encode(x).latent_dist.mean.shape
        vae.enable_tiling(**TILES)
        latents = vae.encode(x).latent_dist.mean
        assert latents.shape == shape == (1, 4, (frames + 3) // 4, height // 8, width // 8)
        pixels = vae.decode(latents).sample
    assert pixels.shape == (1, 3, 4 * shape[2] - 3, 8 * shape[3], 8 * shape[4])
    assert pixels.isfinite().all()


def test_tiles_are_the_release_s_by_default(vae):
    vae.enable_tiling()
    assert vae._tile(pixels=True) == (29, 512)
    assert vae._tile(pixels=False) == (8, 64)
    assert vae.tile_overlap_factor == 1 / 8
    calls = []
    vae._pixels = lambda z: (
        calls.append(z.shape[2:]) or z.new_zeros(1, 3, 1, 8 * z.shape[3], 8 * z.shape[4])
    )
    vae.decode(torch.zeros(1, 4, 1, 128, 128))
    assert [tuple(call) for call in calls[:3]] == [(1, 64, 64), (1, 64, 64), (1, 64, 16)]
    assert len(calls) == 9


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(tile_sample_min_size=4), "tile_sample_min_size must be a multiple of 8; got 4"),
        (dict(tile_sample_min_size=100), "tile_sample_min_size must be a multiple of 8; got 100"),
        (dict(tile_sample_min_num_frames=4), "1 more than a multiple of 4; got 4"),
        (dict(tile_sample_min_num_frames=1), "1 more than a multiple of 4; got 1"),
        (dict(tile_latent_min_num_frames=1), "tile_latent_min_num_frames must be 2 or more; got 1"),
        (dict(tile_latent_min_num_frames=2.5), r"num_frames must be a positive integer; got 2\.5"),
        (dict(tile_sample_min_size=512.0), r"min_size must be a positive integer; got 512\.0"),
        (dict(tile_overlap_factor=1.0), "below 1, and a whole number of the 64"),
        (dict(tile_overlap_factor=0.3), "a whole number of the 64 latents .* got 0.3"),
    ],
)
def test_tiles_of_no_whole_latents_are_refused(vae, settings, message):
    with pytest.raises(ValueError, match=message):
        vae.enable_tiling(**settings)
    assert not vae.use_tiling
    assert vae.tile_sample_min_size == Tiling.tile_sample_min_size == 512


# The full size, and diffusers.


def test_the_full_size_has_the_published_tensors():
    with torch.device("meta"):
        model = CausalVAE()
    state = model.state_dict()
    assert len(state) == 248
    assert sum(tensor.numel() for tensor in state.values()) == 239_189_991
    parts = (model.encoder, model.decoder, model.quant_conv, model.post_quant_conv)
    counts = [sum(p.numel() for p in part.parameters()) for part in parts]
    assert counts == [94_399_368, 144_790_531, 72, 20]
    assert model.config.scaling_factor == 0.18215


def test_it_is_saved_and_read_as_any_model_of_diffusers(vae, tmp_path):
    vae.save_pretrained(tmp_path)
    same = CausalVAE.from_pretrained(tmp_path)
    assert same.config.block_out_channels == [16, 32, 64, 64]
    assert error(same, SMALL, "decode_image") <= 1e-5
    assert CausalVAE.from_pretrained(tmp_path, dtype=torch.bfloat16).dtype == torch.bfloat16


def test_it_goes_from_pixels_to_pixels(vae):
    x = torch.rand(1, 3, 5, 16, 16) * 2 - 1
    with torch.no_grad():
        again = vae(x).sample
        assert torch.equal(again, vae.decode(vae.encode(x).latent_dist.mode()).sample)
        (drawn,) = vae(x, sample_posterior=True, return_dict=False, generator=torch.Generator())
    assert again.shape == drawn.shape == x.shape
    assert not torch.equal(drawn, again)


def test_offloaded_and_cast_weights_give_the_same(vae):
    """Their hooks act on a layer's call: nothing may read its weights from outside."""
    accelerate = pytest.importorskip("accelerate")
    accelerate.cpu_offload(vae, torch.device("cpu"))
    assert all(p.is_meta for p in vae.parameters())
    for path, case in (CASES[0], CASES[3]):
        assert error(vae, path, case) <= 1e-5


def test_layerwise_casting(vae):
    vae.enable_layerwise_casting(torch.bfloat16, torch.float32)  # the weights are exact in bf16
    assert vae.encoder.mid.attn_1.q.conv.weight.dtype == torch.bfloat16
    assert error(vae, SMALL, "encode_image") <= 1e-5


def test_autocast(vae):
    with torch.autocast("cpu", torch.bfloat16):
        assert error(vae, SMALL, "encode_image") < 5e-2


@pytest.mark.parametrize(
    ("method", "x", "message"),
    [
        (
            "decode",
            torch.zeros(1, 4, 8, 8),
            r"z must have shape \(B, 4, F, H, W\) with B and F of at least 1; got \(1, 4, 8, 8\)",
        ),
        (
            "decode",
            torch.zeros(1, 3, 1, 8, 8),
            r"z must have shape \(B, 4, .* got \(1, 3, 1, 8, 8\)",
        ),
        ("decode", torch.zeros(1, 4, 0, 8, 8), r"got \(1, 4, 0, 8, 8\)"),
        (
            "encode",
            torch.zeros(1, 3, 64, 64),
            r"x must have shape \(B, 3, F, H, W\) with .* H and W of",
        ),
        ("encode", torch.zeros(1, 3, 1, 64, 7), r"at least 8; got \(1, 3, 1, 64, 7\)"),
        ("encode", torch.zeros(1, 1, 1, 64, 64), r"x must have shape \(B, 3, "),
        (
            "encode",
            torch.zeros(1, 3, 1, 8, 8, dtype=torch.uint8),
            "x must be torch.float32, as the weights are, or use torch.autocast; got torch.uint8",
        ),
        (
            "decode",
            torch.zeros(1, 4, 1, 8, 8).double(),
            "z must be torch.float32, .* torch.float64",
        ),
        (
            "decode",
            torch.zeros(1, 4, 1, 8, 8).bfloat16(),
            "z must be torch.float32, .* torch.bfloat16",
        ),
        ("encode", torch.zeros(1, 3, 1, 8, 8, device="meta"), "x must be cpu, .* got meta"),
        ("encode", torch.zeros(0, 3, 1, 8, 8), r"B and F of at least 1, H and W .* got \(0, 3, 1"),
    ],
)
def test_inputs_that_do_not_fit_are_named(vae, method, x, message):
    with pytest.raises(ValueError, match=message):
        getattr(vae, method)(x)
    with pytest.raises(TypeError, match="must be a tensor; got list"):
        getattr(vae, method)([x])


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        (dict(block_out_channels=(32, 64)), r"block_out_channels must be 4; got \(32, 64\)"),
        (dict(block_out_channels=(16, 32, 64, 64)), "multiples of norm_num_groups, 32; got"),
        (
            dict(block_out_channels=(32, 32, 0, 32)),
            r"block_out_channels\[2\] must be a positive int",
        ),
        (dict(norm_num_groups=0), "norm_num_groups must be a positive integer; got 0"),
        (dict(latent_channels=0), "latent_channels must be a positive integer; got 0"),
        (dict(layers_per_block=1.5), r"layers_per_block must be a positive integer; got 1\.5"),
    ],
)
def test_sizes_that_do_not_fit_are_named(sizes, message):
    with pytest.raises(ValueError, match=message):
        CausalVAE(**sizes)


def test_it_works_with_what_the_pipelines_ask(vae):
    from ptattn.pipelines import compression, decode, encode

    assert isinstance(vae, diffusers.ModelMixin)
    assert compression(vae) == (4, 8)
    x = torch.rand(1, 3, 5, 16, 24) * 2 - 1
    with torch.no_grad():
        latents = encode(vae, x, torch.Generator().manual_seed(0))
        raw = vae.encode(x).latent_dist.sample(torch.Generator().manual_seed(0))
        torch.testing.assert_close(latents, 0.18215 * raw)
        torch.testing.assert_close(
            decode(vae, latents), vae.decode(raw).sample, rtol=1e-4, atol=1e-4
        )
