"""The ahead-of-time gate: default configurations pass it, and each of its checks can fail."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

pytest.importorskip("triton")

from benchmarks import aot, checks, compiled, roofline
from benchmarks.aot import Case, Row
from benchmarks.compiled import Compiled, Hopper, Resources
from benchmarks.sass import Code, Part
from ptattn.bench.op_workloads import Operation
from ptattn.kernels import configs
from ptattn.kernels.configs import Config
from ptattn.kernels.host import Launch

ROOT = Path(__file__).parents[2]


def gate(tmp_path, *options, status=0, **variables):
    """The gate's rows; it runs by itself, as kernels of an interpreting process do not compile."""
    file = tmp_path / "rows.json"
    command = [sys.executable, "-m", "benchmarks.aot", *options, "--json", str(file)]
    known = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | variables
    done = subprocess.run(command, cwd=ROOT, env=known, capture_output=True, text=True)
    assert done.returncode == status, done.stdout + done.stderr
    return json.loads(file.read_text())


def test_good_kernels_pass_and_bad_ones_fail(tmp_path):
    """The backward as it is configured, and a forward whose tiles are too low for wgmma."""
    low = tmp_path / "low.json"
    low.write_text(json.dumps({"sm90": {"window_forward": [{"rows": 32, "warps": 4}]}}))
    only = "bf16 D64 1x4x4"
    rows = gate(tmp_path, "--arch", "sm90", "--only", only, status=1, PTATTN_CONFIGS=str(low))
    forward, *backward = rows
    assert forward["kernel"] == "window_forward"
    assert "products on wgmma; not on it: ['32x64x" in forward["failures"][0]
    assert [(row["kernel"], row["failures"]) for row in backward] == [("window_backward", [])]


def test_windows_of_xl_pass(tmp_path):
    rows = gate(tmp_path, "--arch", "sm90", "--only", "bf16 D72 1x(8x8|16x16)$")
    kernels = {row["kernel"] for row in rows}
    assert {"window_forward", "window_backward", "flash_forward", "flash_backward_kv"} <= kernels


@pytest.mark.long
@pytest.mark.parametrize("arch", list(compiled.TARGETS))
def test_every_default_configuration_passes(tmp_path, arch):
    kernels = {row["kernel"] for row in gate(tmp_path, "--arch", arch)}
    assert kernels == {*configs.table()["default"], "sum_splits"}


def test_a_pattern_that_fits_no_case_is_an_error(capsys):
    with pytest.raises(SystemExit):
        aot.main(["--only", "bf61"])
    assert "no case matches 'bf61'" in capsys.readouterr().err


def test_an_interpreting_process_compiles_nothing(monkeypatch):
    monkeypatch.setattr(compiled.host, "INTERPRETED", True)
    with pytest.raises(SystemExit, match="TRITON_INTERPRET is set"):
        aot.main(["--only", "bf16 D64 1x8x8"])


ORDERS = r"""
import json, re, torch, triton
from benchmarks import compiled
from ptattn.kernels import host, norm

def orders(channels, residual):
    x = torch.empty(1, 1024, channels, dtype=torch.bfloat16, device="meta")
    gate, *vectors = torch.empty(3, 1, channels, dtype=x.dtype, device="meta").unbind()
    with host.record("sm90") as launches:
        added = (x, gate) if residual else (None, None)
        norm.forward(x, *added, *vectors, 1e-6, x.dtype)
    options = dict(num_warps=launches[0].config.warps)
    kernel = triton.compile(
        compiled.source(launches[0]), target=compiled.TARGETS["sm90"], options=options
    )
    text = kernel.asm["ttgir"]
    layouts = dict(re.findall(r"^(#[a-z]+\d*) = (#ttg.*)$", text, re.M))
    sums = re.findall(r"^    }\) : \(tensor<(\w+), (#[a-z]+\d*)>\) -> tensor", text, re.M)
    return [(shape, layouts[name]) for shape, name in sums]

print(json.dumps([[orders(c, False), orders(c, True)] for c in (640, 1152)]))
"""


@pytest.mark.long
def test_a_norm_adds_its_rows_in_one_order_with_and_without_a_residual():
    """A backward makes a norm again from the sum, and takes it for the same bits."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", ORDERS]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for alone, with_residual in json.loads(done.stdout):
        assert len(alone) == 4  # mean and variance, of two tiles
        assert alone == with_residual


# Every check can fail.

GOOD = Compiled(
    Resources(registers=128, spilled=0, stack=0),
    shared=50_000,
    hopper=Hopper(wgmma=13, older=0, wide_loads=20, on_wgmma=4, elsewhere=(), tile_loads=20),
    code=Code(Part(10, 100, 0, 0), Part(10, 100, 0, 0)),
)


def operation(op="window", window=(1, 8, 8), head_dim=72, grid=(1, 128, 128)):
    return Operation(op, "test", "", grid, window, 16, head_dim)


def row(built, arch="sm90", kernel="window_forward", dtype="bf16"):
    launch = Launch(SimpleNamespace(__name__=kernel), 132, (), {"ROWS": 64}, Config(warps=4))
    return Row(arch, Case(operation(), dtype), launch, built)


def only_failure(*args, **kwargs):
    (text,) = checks.failures(row(*args, **kwargs))
    return text


def spilling(**resources):
    return replace(GOOD, resources=replace(GOOD.resources, **resources))


@pytest.mark.parametrize("arch", list(compiled.TARGETS))
def test_a_good_kernel_passes(arch):
    assert checks.failures(row(GOOD, arch)) == []


def test_a_kernel_that_does_not_build_fails():
    assert "boom" in only_failure("CompilationError: boom")


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
@pytest.mark.parametrize(("arch", "limit"), roofline.SHARED_LIMITS.items())
def test_too_much_shared_memory_fails(arch, limit, dtype):
    kernel = "norm_forward"  # whose occupancy is free
    assert checks.failures(row(replace(GOOD, shared=limit), arch, kernel, dtype)) == []
    built = replace(GOOD, shared=limit + 1)
    assert "shared memory" in only_failure(built, arch, kernel, dtype)


@pytest.mark.parametrize("arch", ["sm80", "sm100"])
def test_a_trap_fails(arch):
    """Triton 3.6 made one of the backward with 128 keys on sm100: 16 instructions, no error."""
    assert "trap" in only_failure(spilling(registers=4), arch, "few_keys_backward")


@pytest.mark.parametrize("resources", [{"spilled": 4}, {"stack": 8}], ids=["spill", "stack"])
@pytest.mark.parametrize("arch", list(compiled.TARGETS))
def test_a_spill_fails(arch, resources):
    assert "spills" in only_failure(spilling(**resources), arch)
    backward = checks.failures(row(spilling(**resources), arch, "window_backward"))
    assert len(backward) == (arch == "sm90")
    assert checks.failures(row(spilling(**resources), arch, dtype="fp32")) == []


@pytest.mark.parametrize(
    "change",
    [{"older": 1}, {"wgmma": 3}, {"elsewhere": ("32x64x64",)}],
    ids=["mma.sync", "too few", "tile"],
)
def test_a_product_without_wgmma_fails(change):
    assert "wgmma" in only_failure(replace(GOOD, hopper=replace(GOOD.hopper, **change)))


def test_a_narrow_load_fails():
    built = replace(GOOD, hopper=replace(GOOD.hopper, wide_loads=19))
    assert "16 bytes" in only_failure(built)


KERNELS = [kernel for kernel in configs.table()["default"] if kernel.startswith(roofline.PRODUCTS)]


@pytest.mark.parametrize("kernel", [*KERNELS, "norm_backward"])
def test_one_program_per_multiprocessor_fails(kernel):
    built = replace(GOOD, shared=120_000)
    assert "per multiprocessor" in only_failure(built, kernel=kernel)
    assert checks.failures(row(built, kernel="norm_forward")) == []
    assert checks.failures(row(built, "sm80", kernel)) == []


def test_one_program_per_multiprocessor_is_excused_by_name(monkeypatch):
    built = row(replace(GOOD, shared=120_000), kernel="flash_backward_q")
    monkeypatch.setattr(checks, "ALONE", {r"D72 flash_backward_q": "a reason"})
    assert checks.failures(built) == []
    monkeypatch.setattr(checks, "ALONE", {r"D128 flash_backward_q": "a reason"})
    assert "per multiprocessor" in checks.failures(built)[0]


def test_a_spill_is_excused_by_name_up_to_its_bytes(monkeypatch):
    def failed(spilled, arch="sm90"):
        built = spilling(spilled=spilled, stack=8)
        return checks.failures(
            row(built, arch, "window_backward" if arch == "sm90" else "flash_forward")
        )

    monkeypatch.setattr(checks, "SPILLS", {r"D72 (window_back|flash_for)": (40, "a reason")})
    assert failed(40) == []
    assert "spills 44 bytes" in failed(44)[0]
    assert "spills 40 bytes" in failed(40, "sm80")[0]
    monkeypatch.setattr(checks, "SPILLS", {r"D128 window_back": (40, "a reason")})
    assert "spills 40 bytes" in failed(40)[0]


def test_the_table_shows_what_was_found(monkeypatch):
    monkeypatch.setattr(roofline, "iterations", lambda launch: 1.0)
    shown = aot.figures(row(replace(GOOD, resources=Resources(128, 0, 0, serialized=True))))
    expected = {"width": "bf16 D72", "kernel": "window_forward", "case": "1x8x8", "tile": "64"}
    expected |= {"regs": 128, "wgmma": "serial", "16-byte": "20/20", "per SM": 4, "check": "ok"}
    assert expected.items() <= shown.items()
    assert shown["µs"] > roofline.LAUNCH * 1e6
    assert aot.figures(row("boom"))["check"] == "FAILED"


# What the compilers say is read right.

PTXAS = """\
ptxas info    : Function properties for flash_backward_kv
    32 bytes stack frame, 28 bytes spill stores, 24 bytes spill loads
ptxas info    : Used 255 registers, used 1 barriers, 32 bytes cumulative stack size
"""
SERIALIZED = (
    "ptxas info    : (C7515) Potential Performance Loss: wgmma.mma_async instructions are "
    "serialized due to non wgmma instructions\n"
)
AMDGCN = """\
    .private_segment_fixed_size: 12
    .sgpr_count:     40
    .sgpr_spill_count: 2
    .vgpr_count:     97
    .vgpr_spill_count: 3
"""
SASS = """\
 /*0a*/ HGMMA.64x64x16.F32.BF16 R24, gdesc[UR4], RZ, !UPT, gsb0 ;
 /*0b*/ HMMA.16816.F32.BF16 R4, R8, R12, R4 ;
 /*0c*/ @P0 LDG.E.128 R4, desc[UR4][R2.64] ;
 /*0d*/ LDGSTS.E.BYPASS.128 [R5], desc[UR4][R2.64], P1 ;
 /*0e*/ LDG.E.64 R4, desc[UR4][R2.64] ;
 /*0f*/ LDGDEPBAR ;
"""
TTGIR = """\
 %x0 = tt.load %p, %m, %c : tensor<64x64x!tt.ptr<bf16>, #blocked> loc(#loc)
 %x1 = tt.load %p, %m, %c : tensor<64x8x!tt.ptr<bf16>, #blocked> loc(#loc)
 %y0 = ttg.async_copy_global_to_local %p, %b mask %m : tensor<64x16x!tt.ptr<f32>, #b> -> <64x16xf32>
 %l = tt.load %p, %m, %c : tensor<64x!tt.ptr<f32>, #slice> loc(#loc)
 %s = ttng.warp_group_dot %a, %b, %c : !ttg.memdesc<64x64xbf16> * !ttg.memdesc<64x64xbf16>
 %s:3 = ttng.warp_group_dot_wait %s, %a, %b : tensor<64x64xf32, #mma>
 %d = tt.dot %a, %b, %c : tensor<32x16xbf16, #op> * tensor<16x64xbf16, #op> -> tensor<32x64xf32>
"""


def test_ptxas_is_read():
    assert compiled.parse_ptxas(PTXAS) == Resources(255, 52, 32)
    assert compiled.parse_ptxas(SERIALIZED + PTXAS) == Resources(255, 52, 32, serialized=True)


def test_amdgcn_is_read():
    assert compiled.parse_amdgcn(AMDGCN) == Resources(97, 3, 12)


@pytest.mark.parametrize("parse", [compiled.parse_ptxas, compiled.parse_amdgcn])
def test_what_cannot_be_read_raises(parse):
    with pytest.raises(ValueError, match="compiler says: nothing"):
        parse("nothing")


def test_sass_and_tiles_are_read():
    # 4 for 8 KB of x0 by 128 threads, none for 1 KB of x1, 2 for 4 KB of y0.
    expected = Hopper(1, 1, 2, on_wgmma=1, elsewhere=("32x16x64",), tile_loads=6)
    assert compiled.parse_hopper(SASS, TTGIR, 128) == expected


# The roofline.


@pytest.mark.parametrize(
    ("registers", "shared", "warps", "programs"),
    [(128, 0, 4, 4), (129, 0, 4, 3), (255, 0, 4, 2), (32, 113 * 1024, 4, 2), (24, 0, 8, 8)],
)
def test_programs_per_multiprocessor(registers, shared, warps, programs):
    assert roofline.programs_per_sm(registers, shared, warps) == programs


ROW, LSE = 2 * 16 * 72, 4 * 16  # bytes of a token: 16 heads of 72 in bf16, and in fp32 its sum


@pytest.mark.parametrize(
    ("of", "size", "blocks"),
    [
        (operation("mean", (1, 1, 1)), 2 * ROW * 128**2, 128**2 / 16),  # tokens in, means out
        (operation("cross", (1, 16, 8)), 2 * ROW * (128**2 + 128), 256),
        (operation("cross", (1, 4, 4)), 2 * ROW * (128**2 + 1024) + LSE * 128**2, 256 * 16 / 2),
        (operation("window"), 4 * ROW * 128**2, 256),
        (operation("window", (1, 16, 16)), (4 * ROW + LSE) * 128**2, 64 * 4 * 4 / 2),
        # Windows at the edges are cut to a half, in the corners to a quarter.
        (operation("shifted", (1, 16, 16)), (4 * ROW + LSE) * 128**2, 49 * 8 + 28 * 2 + 4),
    ],
    ids=str,
)
def test_a_launch_has_its_bytes_and_blocks(of, size, blocks):
    """Passes of the main loops of a head's programs: of tiles of 64 or 128 queries, by 64 keys."""
    (launch,) = compiled.launches(of, "forward", "sm90")
    assert roofline.bytes_of(launch) == size
    assert roofline.iterations(launch) * launch.programs / 16 == blocks
