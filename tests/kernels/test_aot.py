"""The ahead-of-time gate: default configurations pass it, and each of its checks can fail."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from itertools import product
from pathlib import Path

import pytest

pytest.importorskip("triton")

from benchmarks import aot, checks, compiled, roofline, tables
from benchmarks.compiled import Compiled, Instructions, Resources, Tiles
from benchmarks.sass import Code, Part
from ptattn.geometry import WindowGrid

ROOT = Path(__file__).parents[2]


def gate(tmp_path, *options):
    """The gate's rows; it runs by itself, as kernels of an interpreting process do not compile."""
    file = tmp_path / "rows.json"
    command = [sys.executable, "-m", "benchmarks.aot", *options, "--json", str(file)]
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(file.read_text())


# The head dim of PT-DiT/XL and the pools completely; of 64, which is cheaper in all, each kernel.
@pytest.mark.parametrize("only", ["bf16 (D72|C)", r"bf16 D64 (1x8x8|16384 to (128|256)$)"])
def test_default_configurations_pass_on_hopper(tmp_path, only):
    rows = gate(tmp_path, "--arch", "sm90", "--only", only, "--ptx", "--processes", "1")
    assert set(roofline.PRODUCTS) <= {row["kernel"] for row in rows}


@pytest.mark.long
def test_every_kernel_builds_elsewhere(tmp_path):
    archs = ("sm80", "sm100", "gfx942")
    only = r"bf16 (D64 (1x8x8|16384 to (64|256)$)|C1152 (norm 1x8x8|norm 1x1x1|mean 1x8x8))"
    rows = gate(tmp_path, "--arch", *archs, "--only", only, "--processes", "1")
    kernels = {*roofline.PRODUCTS, "pool_forward", "norm_forward", "norm_backward", "sum_splits"}
    assert {(row["arch"], row["kernel"]) for row in rows} == set(product(archs, kernels))


@pytest.mark.long
@pytest.mark.parametrize("arch", list(compiled.TARGETS))
def test_every_default_configuration_passes(tmp_path, arch):
    gate(tmp_path, "--arch", arch, "--processes", "1")


@pytest.mark.long
def test_ptx_and_sass_agree(tmp_path):
    options = ("--arch", "sm90", "--only", "bf16 D64 .* to 64", "--processes", "1")
    counts = [
        [row["compiled"]["instructions"] for row in gate(tmp_path, *options, *dialect)]
        for dialect in ((), ("--ptx",))
    ]
    assert counts[0] == counts[1]


def test_a_pattern_that_fits_no_case_is_an_error():
    with pytest.raises(SystemExit, match="no case matches 'bf61'"):
        aot.select(aot.parse(["--only", "bf61"]))


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
    seconds=1.0,
    instructions=Instructions(wgmma=13, other_products=0, wide_loads=20),
    tiles=Tiles(on_wgmma=4, elsewhere=(), wide_loads=20),
)


def row(built, arch="sm90", kernel="window_forward", dtype="bf16", error=""):
    case = aot.Case("window", dtype, 72, (1, 8, 8))
    job = aot.Job(arch, kernel, (aot.Use(case, 0),))
    return aot.Row(job, "64", 4, 1, built, error)


def only_failure(*args, **kwargs):
    (text,) = aot.failures(row(*args, **kwargs))
    return text


def spilling(**resources):
    return replace(GOOD, resources=replace(GOOD.resources, **resources))


@pytest.mark.parametrize("arch", list(compiled.TARGETS))
def test_a_good_kernel_passes(arch):
    assert aot.failures(row(GOOD, arch)) == []


def test_a_kernel_that_does_not_build_fails():
    assert "boom" in only_failure(None, error="boom")


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
@pytest.mark.parametrize(("arch", "limit"), roofline.SHARED_LIMITS.items())
def test_too_much_shared_memory_fails(arch, limit, dtype):
    kernel = "norm_forward"  # whose occupancy is free
    assert aot.failures(row(replace(GOOD, shared=limit), arch, kernel, dtype)) == []
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
    backward = aot.failures(row(spilling(**resources), arch, "window_backward"))
    assert len(backward) == (arch == "sm90")
    assert aot.failures(row(spilling(**resources), arch, dtype="fp32")) == []


@pytest.mark.parametrize(
    "change",
    [
        {"instructions": replace(GOOD.instructions, other_products=1)},
        {"instructions": replace(GOOD.instructions, wgmma=3)},
        {"tiles": replace(GOOD.tiles, elsewhere=("32x64x64 (32 rows, wgmma takes 64)",))},
    ],
    ids=["mma.sync", "too few", "tile"],
)
def test_a_product_without_wgmma_fails(change):
    assert "wgmma" in only_failure(replace(GOOD, **change))


def test_serialized_wgmma_is_shown():
    serial = row(spilling(serialized=True))
    assert aot.failures(serial) == []
    assert "serial" in tables.table([replace(serial, timings=(timing(),))], aot.COLUMNS, 200)


def test_a_narrow_load_fails():
    built = replace(GOOD, instructions=replace(GOOD.instructions, wide_loads=19))
    assert "16 bytes" in only_failure(built)


@pytest.mark.parametrize("kernel", [*roofline.PRODUCTS, "norm_backward"])
def test_one_program_per_multiprocessor_fails(kernel):
    built = replace(GOOD, shared=120_000)
    assert "per multiprocessor" in only_failure(built, kernel=kernel)
    assert aot.failures(row(built, kernel="norm_forward")) == []
    assert aot.failures(row(built, "sm80", kernel)) == []


def test_one_program_per_multiprocessor_is_excused_by_name(monkeypatch):
    built = row(replace(GOOD, shared=120_000), kernel="flash_backward_q")
    monkeypatch.setattr(checks, "ALONE", {r"D72 flash_backward_q": "a reason"})
    assert aot.failures(built) == []
    monkeypatch.setattr(checks, "ALONE", {r"D128 flash_backward_q": "a reason"})
    assert "per multiprocessor" in aot.failures(built)[0]


def test_a_spill_is_excused_by_name_up_to_its_bytes(monkeypatch):
    def failed(spilled, arch="sm90"):
        built = spilling(spilled=spilled, stack=8)
        return aot.failures(
            row(built, arch, "window_backward" if arch == "sm90" else "flash_forward")
        )

    monkeypatch.setattr(checks, "SPILLS", {r"D72 (window_back|flash_for)": (40, "a reason")})
    assert failed(40) == []
    assert "spills 44 bytes" in failed(44)[0]
    assert "spills 40 bytes" in failed(40, "sm80")[0]
    monkeypatch.setattr(checks, "SPILLS", {r"D128 window_back": (40, "a reason")})
    assert "spills 40 bytes" in failed(40)[0]


def test_instructions_per_block_count_all_warps():
    code = Code(Part(50, 100, 0, 0), Part(300, 900, 0, 0), unrolled=2)
    built = replace(row(replace(GOOD, code=code)), timings=(timing(),), warps=8)
    assert replace(built, tile="128x64").per_block == 300 * 8 / 2 / 2
    assert replace(built, tile="64").per_block == 300 * 8 / 2
    rows = replace(timing(), work=roofline.Work(1, 0, 0, 0, 1.0))
    assert replace(built, tile="4", timings=(rows,)).per_block == 300 * 8 / 2 / 4
    assert replace(built, compiled=GOOD).per_block is None


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
PTX = """\
 wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 {%f1}, %rd1, %rd2, 1, 1, 1, 0, 0;
 mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%f1}, {%r1}, {%r2}, {%f1};
 @%p1 ld.global.v4.b32 { %r1, %r2, %r3, %r4 }, [ %rd3 + 0 ];
 cp.async.cg.shared.global [ %r5 + 0 ], [ %rd6 + 0 ], 0x10, %r7;
 @%p1 ld.global.v2.b32 { %r1, %r2 }, [ %rd3 + 0 ];
 cp.async.ca.shared.global [ %r5 + 0 ], [ %rd6 + 0 ], 0x8, %r7;
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


@pytest.mark.parametrize(("text", "dialect"), [(SASS, "sass"), (PTX, "ptx")])
def test_instructions_are_counted(text, dialect):
    assert compiled.count_instructions(text, dialect) == Instructions(1, 1, 2)


def test_ttgir_is_read():
    # 4 for 8 KB of x0 by 128 threads, none for 1 KB of x1, 2 for 4 KB of y0.
    expected = Tiles(1, ("32x16x64 (32 rows, wgmma takes 64)",), 6)
    assert compiled.parse_ttgir(TTGIR, 128) == expected


# The roofline.


@pytest.mark.parametrize(
    ("registers", "shared", "warps", "programs"),
    [(128, 0, 4, 4), (129, 0, 4, 3), (255, 0, 4, 2), (32, 113 * 1024, 4, 2), (24, 0, 8, 8)],
)
def test_programs_per_multiprocessor(registers, shared, warps, programs):
    assert roofline.programs_per_sm(registers, shared, warps) == programs


def forward(case):
    return case.launches("sm90")[0]


def test_work_of_whole_windows_has_no_padding():
    work = roofline.work(forward(aot.Case("mean", "bf16", 1152, (1, 1, 1))))
    assert (work.useful, work.padded, work.exponentials) == (0, 0, 0)
    assert work.bytes == 2 * 2 * 128 * 128 * 1152  # tokens in, means out
    dense = roofline.work(forward(aot.Case("dense", "bf16", 64, queries=128**2, keys=128)))
    assert dense.useful == dense.padded == 2 * 2 * 16 * 128**2 * 128 * 64
    assert dense.exponentials == 16 * 128**2 * 128
    assert dense.bytes == 2 * 2 * 16 * 64 * (128**2 + 128)


@pytest.mark.parametrize("window", [(1, 4, 4), (4, 16, 16)])
def test_work_of_windows_counts_the_tiles(window):
    case = aot.Case("window", "bf16", 72, window)
    work = roofline.work(forward(case))
    tokens = 128**2 if window[0] == 1 else 8 * 64 * 64
    assert work.bytes == 4 * 2 * 16 * 72 * tokens + (0 if window[0] == 1 else 4 * 16 * tokens)
    pairs = WindowGrid(case.grid, window).shifted().num_pairs
    assert work.useful == 2 * 2 * 16 * 72 * pairs
    assert 0 < work.useful_share <= 72 / 80


# The terminal.


@pytest.mark.parametrize(("width", "columns"), [(80, 8), (250, 19)])
def test_the_table_fits_the_terminal(width, columns):
    text = tables.table([replace(row(GOOD), timings=(timing(),))], aot.COLUMNS, width)
    head = text.splitlines()[0]
    for title in (column.title for column in aot.COLUMNS):
        head = head.replace(title, title.replace(" ", "-"))
    assert len(head.split()) == columns
    assert len(head.rstrip()) <= width


def timing():
    code = Code(Part(10, 100, 0, 0), Part(10, 100, 0, 0))
    predicted = roofline.predict(roofline.Start(132, 4, 2, 1, 1.0, code))
    return aot.Timing("case", 132, roofline.Work(1, 1, 1, 1, 1.0), predicted)
