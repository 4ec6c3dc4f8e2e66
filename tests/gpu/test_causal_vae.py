"""The released model's autoencoder on a GPU: the original's outputs, and memory."""

import pytest
import torch

from tests.support.gpu import DEVICE, needs_gpu

pytest.importorskip("diffusers")
from ptattn.pipelines import CausalVAE, causal_vae_layers
from tests.pipelines.test_causal_vae import CASES, SIZES, SMALL, TILES, read

pytestmark = needs_gpu


@pytest.fixture
def vae(monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    model = CausalVAE(**SIZES)
    model.load_state_dict({k: v.float() for k, v in read(SMALL, "weights.").items()})
    return model.to(DEVICE)


@pytest.mark.parametrize("slab", [2**27, 20_000], ids=["whole", "slabs"])
@pytest.mark.parametrize(("dtype", "limit"), [(torch.float32, 1e-5), (torch.bfloat16, 5e-2)])
@pytest.mark.parametrize(("path", "case"), CASES, ids=[name for _, name in CASES])
def test_outputs_are_the_original_s(vae, path, case, dtype, limit, slab, monkeypatch):
    monkeypatch.setattr(causal_vae_layers, "SLAB", slab)
    golden = {name: tensor.to(DEVICE) for name, tensor in read(path, f"{case}.").items()}
    vae.to(dtype)
    if "tiled" in case:
        vae.enable_tiling(**TILES)
    with torch.no_grad():
        if "decode" in case:
            output, expected = vae.decode(golden["latents"].to(dtype)).sample, golden["output"]
        else:
            moments = vae.encode(golden["pixels"].to(dtype)).latent_dist.parameters
            output, expected = moments, golden["moments"]
    assert ((output.float() - expected).norm() / expected.norm()).item() <= limit


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_attention_holds_no_scores(dtype):
    """Of 128² positions they would be 1 GB in float32."""
    attention = causal_vae_layers.AttnBlock(512, 32).to(DEVICE, dtype)
    x = torch.randn(1, 1, 128, 128, 512, device=DEVICE, dtype=dtype, requires_grad=True)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    attention(x).sum().backward()
    assert torch.cuda.max_memory_allocated() - before < 24 * x.nbytes < 128**4 * x.itemsize
