"""Who may import whom, and what importing the package must not need or do."""

import ast
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

# The one import order of the project, quoted by the documents. A unit is a module or subpackage of
# ptattn; each imports only from lines above its own.
ORDER = [
    {"memo", "packed", "context", "capture", "files", "command_line"},
    {"geometry", "recompute", "call_grid", "state_dicts"},
    {"kernels", "checks", "parallel"},
    {"backends"},
    {"ops"},
    {"explanation"},
    {"layers"},
    {"models", "proxy_attention"},
    {"hosts"},
    {"flops", "checkpoint", "communication", "environment", "flow", "graphs", "replace"},
    {"paper", "pipelines", "replaced"},
    {"bench", "convert", "train"},
    {"cli"},
    {"__main__"},
]
RANK = {unit: rank for rank, units in enumerate(ORDER) for unit in units}


def sources():
    """Module name, relative to ptattn, and path of every file of the package; kernels/ is in it."""
    found = {}
    folder = ROOT / "ptattn"
    for path in (*sorted(folder.rglob("*.py")), *sorted((folder / "kernels").rglob("*.py"))):
        found[".".join(path.relative_to(folder).with_suffix("").parts)] = path
    return found


def imports(path, name):
    """Absolute names of all that a file imports, also inside functions; `name` is its own."""
    # A package, too, is `__init__` in its folder, so one level up is always the parent.
    parents = ["ptattn", *name.split(".")[:-1]]
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = parents[: len(parents) - node.level + 1] if node.level else []
            base = ".".join(base + ([node.module] if node.module else []))
            found |= {f"{base}.{alias.name}" for alias in node.names}
    return found


SOURCES = sources()
each_module = pytest.mark.parametrize("name", [n for n in SOURCES if n != "__init__"])


def own_imports(name):
    """The units of ptattn that a module imports."""
    units = {i.split(".")[1] for i in imports(SOURCES[name], name) if i.startswith("ptattn.")}
    return units - {"__version__"}


@each_module
def test_imports_run_one_way(name):
    unit = name.split(".")[0]
    assert unit in RANK, f"{unit} is new: give it its place in ORDER"
    for imported in own_imports(name) - {unit}:
        assert imported in RANK, f"{name} imports {imported}, which is no module of ptattn"
        assert RANK[imported] < RANK[unit], f"{name} imports {imported}"


@each_module
def test_only_the_triton_backend_imports_the_kernels(name):
    if name not in ("backends.triton", "backends.operator") and not name.startswith("kernels."):
        assert "kernels" not in own_imports(name)


def test_backends_do_not_import_one_another():
    for name, allowed in {"reference": set(), "sdpa": set(), "triton": {"operator"}}.items():
        found = imports(SOURCES[f"backends.{name}"], f"backends.{name}")
        siblings = {i.split(".")[2] for i in found if i.startswith("ptattn.backends.")}
        assert siblings <= allowed, (name, siblings)


def test_operations_do_no_math():
    """ops.py is docstring, validation and dispatch."""
    math = ("math", "einops", "numpy", "torch.nn", "triton")
    for imported in imports(SOURCES["ops"], "ops"):
        assert not any(imported == m or imported.startswith(f"{m}.") for m in math), imported


def test_the_reader_of_imports_reads(tmp_path):
    """The tests above see every form of import."""
    path = tmp_path / "module.py"
    path.write_text(
        textwrap.dedent("""
            import a.b
            from . import c
            from .d import e
            from ..f import g
            def function():
                from h import i
        """)
    )
    expected = {"a.b", "ptattn.models.c", "ptattn.models.d.e", "ptattn.f.g", "h.i"}
    assert imports(path, "models.module") == expected


def run(code):
    """Run code in a fresh process."""
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


def test_runs_without_optional_packages():
    run("""
        import sys

        BLOCKED = {"triton", "rich", "matplotlib", "safetensors", "diffusers", "transformers"}
        BLOCKED |= {"accelerate"}

        class Block:
            def find_spec(self, name, path=None, target=None):
                if name.split(".")[0] in BLOCKED:
                    raise ModuleNotFoundError(f"{name} is blocked", name=name)

        sys.meta_path.insert(0, Block())
        import torch
        import ptattn

        attn = ptattn.ProxyAttention(24, 3, (2, 3))
        torch.nn.init.normal_(attn.global_interaction.zero.weight)
        x = torch.randn(2, 5, 7, 24, requires_grad=True)
        attn(x).square().sum().backward()
        assert x.grad.isfinite().all() and x.grad.ne(0).any()
        assert not BLOCKED & {name.split(".")[0] for name in sys.modules}
    """)


def test_opens_no_socket():
    run("""
        import sys

        seen = []
        sys.addaudithook(lambda event, args: seen.append(event))
        import ptattn

        assert "import" in seen  # the hook works
        assert not [event for event in seen if event.startswith("socket.")]
    """)
