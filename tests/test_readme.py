"""The README's code runs as pasted, and its links lead somewhere."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
SNIPPETS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


def test_first_snippet_runs(capsys):
    exec(compile(SNIPPETS[0], "README.md", "exec"), {})
    assert capsys.readouterr().out == "torch.Size([2, 32, 48, 384])\n"


def test_model_snippet_runs():
    (snippet,) = (code for code in SNIPPETS if "create_model" in code)
    names = {}
    exec("import torch, ptattn", names)
    exec(compile(snippet, "README.md", "exec"), names)
    assert names["out"].shape == (1, 8, 48, 64)


@pytest.mark.parametrize(
    "page",
    ["README.md", "CONTRIBUTING.md", *(f"docs/{p.name}" for p in (ROOT / "docs").glob("*.md"))],
)
def test_links_lead_to_files(page):
    path = ROOT / page
    for target in re.findall(r"\]\(([^)#]+)", path.read_text(encoding="utf-8")):
        if not target.startswith("http"):
            assert (path.parent / target).exists(), target
