"""torch.compile of calls on a GPU, held without one."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

ROOT = Path(__file__).parents[1]


@pytest.mark.long
def test_every_call_on_cuda_compiles_to_its_kernels():
    """One query that torch.compile cannot trace, reached on CUDA only, once broke them all."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "tests.support.traced"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    outcomes = json.loads(done.stdout)
    failed = [f"{name}: {text}" for name, text in outcomes.items() if isinstance(text, str)]
    assert not failed, "\n\n".join(failed)
    assert outcomes.pop("auto") == ["attention"]  # in float32
    for name in ("auto, autocast", "auto of any size, autocast"):
        assert outcomes.pop(name) == ["sdpa"]
    for name, found in outcomes.items():
        forward = {operator for operator in found if not operator.endswith("_backward")}
        backward = {f"{operator}_backward" for operator in forward}
        expected = forward | backward if name.endswith("gradients") else forward
        assert forward, name
        assert set(found) == expected, name
