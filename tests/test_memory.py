"""Peak memory of a long video: no copies of the grid, no scores but those of the windows."""

import subprocess
import sys

import pytest

CODE = """
import resource, sys, torch, ptattn

torch.set_num_threads(1)
grid, window, shift = (48, 64, 64), (4, 8, 8), {shift}
packed = torch.ones(1, 48 * 64 * 64, 3, 16, 72, dtype=torch.bfloat16)
q, k, v = packed.unbind(2)
with torch.no_grad():
    out = ptattn.window_attention(q, k, v, grid, window, shift, backend="sdpa")
assert out.shape == q.shape and out.eq(1).all()
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print(peak * (1 if sys.platform == "darwin" else 1024))
"""


@pytest.mark.parametrize(
    "shift",
    [
        pytest.param((0, 0, 0), id="unshifted", marks=pytest.mark.long),
        pytest.param((2, 4, 4), id="shifted"),
    ],
)
def test_peak_memory(shift):
    """In a process of its own, as a peak covers all that a process did. Inputs are 1.4 GB of it."""
    code = CODE.format(shift=shift)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    peak = int(done.stdout)
    print(f"peak {peak / 1e9:.2f} GB")
    assert peak < 6e9
