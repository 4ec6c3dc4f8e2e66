"""The code of docs/PIPELINES.md runs as pasted, on tiny components and for small pictures."""

import re
from pathlib import Path

import pytest

from ptattn.flow import RectifiedFlow

# First, as it skips this module where diffusers is missing.
from tests.support.components import image_vae, text_encoder, tokenizer, transformer  # isort: skip
from ptattn import pipelines  # isort: skip

PAGE = Path(__file__).resolve().parents[2] / "docs" / "PIPELINES.md"
SMALL = {"height": 16, "width": 32, "num_frames": 3}


def test_the_snippets_run_one_after_the_other(tmp_path, monkeypatch):
    pytest.importorskip("peft")
    pytest.importorskip("accelerate")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(RectifiedFlow, "steps", 2)
    for folder in ("t5", "t5/tokenizer"):
        tokenizer().save_pretrained(folder)
    for folder in ("t5", "t5/text_encoder"):
        text_encoder().save_pretrained(folder)
    monkeypatch.setattr(pipelines.pipeline, "check_cleaning", lambda: None)  # it may be missing
    monkeypatch.setattr(pipelines.pipeline, "clean", list)
    transformer().save_pretrained("qihoo-t2i")
    image_vae().save_pretrained("kl")
    pipelines.CausalVAE((8, 8, 8, 8), 1, norm_num_groups=4).save_pretrained("vae")
    code = "".join(re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL))
    for name, size in SMALL.items():
        code, count = re.subn(rf"\b{name}=\d+", f"{name}={size}", code)
        assert count, name
    # No accelerator is there to move to.
    code = re.sub(r".*enable_model_cpu_offload.*", "pipeline.set_progress_bar_config()", code)
    names = {}
    exec(compile(code, PAGE.name, "exec"), names)
    assert names["image"].size == (32, 16)
    assert len(names["views"]) == 3
    assert type(names["same"]) is type(names["pipeline"])
    assert (tmp_path / "ema" / "config.json").is_file()
