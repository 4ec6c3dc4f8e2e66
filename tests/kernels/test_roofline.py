"""Predicted times: machine code is followed right, and the model holds against measurements."""

import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

pytest.importorskip("triton")

from benchmarks import against, compiled, roofline, sass, targets
from benchmarks.roofline import Start
from benchmarks.sass import GLOBAL_LATENCY, ON_CHIP_LATENCY, Code, Part
from ptattn.bench import results
from ptattn.bench.op_workloads import operations

ROOT = Path(__file__).parents[2]
RUN = ROOT / "benchmarks/results/h200-2026-11-26"
LATER = RUN.with_name("h200-2026-11-26-kernels")  # of kernels that the model was not made from


# Machine code. The upper word of an instruction has its schedule.


def listing(*instructions):
    """As cuobjdump prints them, from (text, stall, scoreboard written, scoreboards waited for)."""
    lines = []
    for index, (text, stall, written, waits) in enumerate(instructions):
        control = stall << 41 | written << 46 | 7 << 49 | waits << 52
        lines += [
            f"        /*{16 * index:04x}*/   {text} ;   /* 0x{0:016x} */",
            f"                              /* 0x{control:016x} */",
        ]
    return "\n".join(lines) + "\n"


def plain(text, stall=1):
    return text, stall, 7, 0


END = (plain("EXIT"), plain("BRA 0x1000"), plain("NOP"))


def test_code_without_loops_runs_once():
    code = sass.read(listing(plain("IADD3 R0, R1, R2", stall=4), plain("MUFU.EX2 R0, R1"), *END))
    assert code == Code(Part(instructions=4, cycles=7, tensor=0, special=1))


def test_what_cannot_be_read_raises():
    with pytest.raises(ValueError, match="cuobjdump says: nothing"):
        sass.read("nothing")


@pytest.mark.parametrize(
    ("name", "latency"), [("LDG.E.128", GLOBAL_LATENCY), ("LDS.128", ON_CHIP_LATENCY)]
)
def test_a_warp_waits_for_what_it_loads(name, latency):
    load, use = (f"@P0 {name} R4, [R2]", 1, 3, 0), ("FADD R0, R4, R4", 1, 7, 1 << 3)
    assert sass.read(listing(load, use)).once.cycles == latency + 1
    independent = plain("FADD R0, R1, R1", stall=10)
    assert sass.read(listing(load, independent, use)).once.cycles == latency + 1


def test_a_warp_waits_for_its_products():
    product = plain("HGMMA.64x64x16.F32.BF16 R24, gdesc[UR4], R24, gsb0")
    wait = plain("WARPGROUP.DEPBAR.LE gsb0, 0x0")
    once = sass.read(listing(product, product, wait)).once
    assert (once.tensor, once.cycles) == (64, ON_CHIP_LATENCY + 64 + 1)


@pytest.mark.parametrize(
    ("columns", "first", "cycles"),
    [(64, "gdesc[UR4]", 32), (64, "R8", 32), (16, "gdesc[UR4]", 20), (16, "R8", 8)],
)
def test_narrow_products_wait_for_shared_memory(columns, first, cycles):
    product = plain(f"HGMMA.64x{columns}x16.F32.BF16 R24, {first}, gdesc[UR8], R24")
    assert sass.read(listing(product)).once.tensor == cycles


@pytest.mark.parametrize(("left", "cycles"), [(0, GLOBAL_LATENCY + 167), (3, 168)])
def test_copies_ahead_hide_their_latency(left, cycles):
    body = (
        plain("LDGSTS.E.BYPASS.128 [R5], desc[UR4][R2.64]"),
        plain("LDGDEPBAR"),
        plain(f"DEPBAR.LE SB0, 0x{left:x}"),
        *(plain("FADD R0, R1, R1", stall=15) for _ in range(11)),
        plain("@P0 BRA 0x0"),
    )
    loop = sass.read(listing(*body, *END)).loop
    assert loop.cycles == pytest.approx(cycles, abs=2)


def test_the_main_loop_is_the_one_without_a_mask():
    product = plain("HGMMA.64x64x16.F32.BF16 R24, gdesc[UR4], R24, gsb0")
    text = listing(
        plain("IADD3 R0, R1, R2"),
        product,
        plain("@P0 BRA 0x10"),
        product,
        plain("SEL R0, R1, R2, P0"),
        plain("@!P1 BRA 0x30"),
        *END,
    )
    code = sass.read(text)
    assert (code.loop.instructions, code.once.instructions, code.unrolled) == (2, 3, 1)


def test_a_loop_that_only_waits_is_none():
    product = plain("HGMMA.64x64x16.F32.BF16 R24, gdesc[UR4], R24, gsb0")
    spin = plain("SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [UR4], R0"), plain("@!P0 BRA 0x10")
    code = sass.read(listing(product, *spin, plain("@P1 BRA 0x0"), *END))
    assert (code.loop.instructions, code.loop.tensor, code.once.instructions) == (4, 32, 2)


def test_an_unrolled_loop_is_counted_by_its_loads():
    load = plain("LDG.E R4, [R2]")
    text = listing(*[load] * 4, plain("@P0 BRA 0x0"), load, plain("@P1 BRA 0x50"), *END)
    code = sass.read(text)
    assert (code.loop.instructions, code.unrolled) == (5, 4)


# The model.

NOTHING = Part(0, 0, 0, 0)


def launch(once=NOTHING, loop=None, **changes):
    known = Start(roofline.MULTIPROCESSORS, 4, 1, 0, 0.0, Code(once, loop))
    return replace(known, **changes)


def cycles(*args, **changes):
    total = roofline.predict(launch(*args, **changes))
    return (total - roofline.LAUNCH) * roofline.CLOCK


def test_a_program_alone_takes_the_sum():
    code = Part(instructions=100, cycles=1000, tensor=200, special=0)
    size = int(roofline.COPY_RATE / roofline.CLOCK * 500)  # of all multiprocessors, 500 cycles
    assert cycles(code, bytes=size) == pytest.approx(1500, rel=1e-3)
    assert cycles(code, warps=8, bytes=size) == pytest.approx(1800, rel=1e-3)


def test_more_programs_hide_latency_until_a_resource_is_full():
    waits = Part(instructions=100, cycles=1000, tensor=0, special=0)
    at = {n: cycles(waits, per_sm=n, programs=132 * 16) / 16 for n in (1, 2, 4, 16)}
    assert at[1] == pytest.approx(1000)
    assert at[1] / 2 < at[2] < 1.1 * at[1] / 2
    assert at[4] < at[2]
    assert 100 < at[16] < 150


def test_iterations_count_the_loop():
    part = Part(instructions=10, cycles=50, tensor=0, special=0)
    assert cycles(part, part, iterations=8.0) == pytest.approx(450)
    code = Code(part, part, unrolled=4)
    assert cycles(code=code, iterations=8.0) == pytest.approx(150)


@pytest.mark.parametrize(("programs", "waves"), [(1, 1), (132, 1), (133, 2), (264, 2)])
def test_waves(programs, waves):
    code = Part(instructions=0, cycles=1000, tensor=0, special=0)
    assert cycles(code, programs=programs) == pytest.approx(1000 * waves)


# What an H200 measured.


def starts_of(facts):
    """Of a launches.json, what each case and task started, as it was compiled then."""

    def start(launch):
        kernel = facts["kernels"][launch["kernel"]]
        once, loop, unrolled = (kernel["code"][name] for name in ("once", "loop", "unrolled"))
        code = Code(Part(**once), loop and Part(**loop), unrolled)
        warps = kernel["warps"]
        per_sm = roofline.programs_per_sm(kernel["registers"], kernel["shared"], warps)
        programs, size, iterations = (launch[key] for key in ("programs", "bytes", "iterations"))
        return Start(programs, warps, per_sm, size, iterations, code)

    return {
        (row["case"], row["task"]): [start(launch) for launch in row["launches"]]
        for row in facts["rows"]
    }


def test_instructions_are_those_that_the_hardware_counted():
    counted = re.findall(
        r"^  (\w+) \((\d+), 1, 1\)x.*?Executed Instructions +inst +([\d,]+)\n",
        (RUN / "ncu.txt").read_text(encoding="utf-8"),
        re.MULTILINE | re.DOTALL,
    )
    facts = json.loads((RUN / "launches.json").read_text(encoding="utf-8"))
    starts, predicted = starts_of(facts), {}
    for row in facts["rows"]:
        begun = starts[row["case"], row["task"]]
        for launch, start in zip(row["launches"], begun, strict=True):
            issued = start.code.once.instructions
            if start.code.loop:
                passes = start.iterations / start.code.unrolled
                issued += passes * start.code.loop.instructions
            name = facts["kernels"][launch["kernel"]]["kernel"]
            total = start.programs * start.warps * issued
            predicted.setdefault((name, start.programs), set()).add(round(total))
    assert len(counted) == 11
    for name, programs, number in counted:
        expected = int(number.replace(",", ""))
        near = min(predicted[name, int(programs)], key=lambda n: abs(n - expected))
        # Short sums start with a part of their unrolled loop.
        tolerance = 0.25 if name == "sum_splits" else 0.015
        assert near == pytest.approx(expected, rel=tolerance), name


@pytest.mark.parametrize("run", [RUN, LATER], ids=lambda run: run.name)
def test_predictions_are_near_what_was_measured(run):
    facts = json.loads((run / "launches.json").read_text(encoding="utf-8"))
    measured, starts = results.load(run / "ops.json"), starts_of(facts)
    ratios = []
    for row in measured.rows:
        if row.baseline or row.timing is None:
            continue
        # Where the clock of that run caught the host, the quickest calls say more.
        noisy = row.timing.high > 1.5 * row.timing.low
        seconds = row.timing.low if noisy else row.timing.median
        own = starts[row.workload, row.task]
        predicted = sum(roofline.predict(one, measured.rates["copy"]) for one in own)
        ratios.append(predicted / seconds)
    assert len(ratios) == 128
    assert sum(1 / 1.5 <= ratio <= 1.5 for ratio in ratios) / len(ratios) >= 0.9
    assert all(0.5 <= ratio <= 2 for ratio in ratios)


def test_the_table_has_what_was_predicted_beside_what_was_measured():
    timing = results.Timing(10e-6, 9e-6, 11e-6, 9e-6, 10)
    row = results.Row("a", "forward", "ptattn", "ptattn", timing=timing)
    text = "\n".join(against.report([row], [20e-6]))
    assert "| a         | forward | 10.0         | 20.0          | 2.00       |" in text
    assert "within 1.5× in 0 (0%)" in text


@pytest.mark.parametrize(
    ("task", "expected"),
    [("forward", ["norm_forward"]), ("backward", ["norm_backward", "sum_splits"])],
)
def test_what_an_operation_starts_is_recorded(task, expected):
    (operation,) = (o for o in operations() if str(o) == "norm XL 1024 px w1x8x8 b1")
    launches = compiled.launches(operation, task, "sm90")
    assert [launch.kernel.__name__ for launch in launches] == expected


def test_a_pattern_that_fits_no_operation_is_an_error(capsys):
    with pytest.raises(SystemExit):
        against.main([str(RUN / "ops.json"), "--only", "windwo"])
    assert re.search("no operation of ours in .* matches 'windwo'", capsys.readouterr().err)


@pytest.mark.long
def test_a_checkout_is_held_against_a_run():
    command = [sys.executable, "-m", "benchmarks.against", str(RUN / "ops.json")]
    command += ["--only", "norm XL 1024 px w1x8x8 b1 forward"]
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (row,) = (line for line in done.stdout.splitlines() if line.startswith("| norm XL"))
    assert row.startswith("| norm XL 1024 px w1x8x8 b1 | forward | 13.1 ")
    assert "in 1 rows" in done.stdout


# The targets.


def lines_of(rows):
    """Of the targets' table, as [target, limit, measured, verdict]."""
    lines = targets.report(rows).splitlines()[2:]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def test_targets_say_whether_they_are_met():
    rows = [row for name in ("ops", "block") for row in results.load(RUN / f"{name}.json").rows]
    found = {line[0]: line[1:] for line in lines_of(rows)}
    assert len(found) == 7  # blocks of that run have no wall times
    window = "window XL 2048 px w1x16x16 b1, forward, ptattn, GPU alone"
    assert found[window] == ["≤ 75", "140 µs", "not met"]
    norm = "norm XL 2048 px w1x16x16 b1, backward, ptattn, GPU alone"
    assert found[norm] == ["≥ 60", "21 % of floor", "not met"]


def test_models_are_judged_by_their_cuda_graphs():
    facts = dict(kind="model", width=1152, parameters=1, blocks=28, depth=28)

    def row(name, baseline, mode, seconds):
        timing = results.Timing(*[seconds] * 4, 10)
        known = dict(mode=mode, timing=timing, facts=facts)
        return results.Row("model 2048 px b1", "forward", name, name, baseline, **known)

    rows = [
        row("PT-DiT/XL", False, results.EAGER, 9.0),
        row("PT-DiT/XL", False, results.GRAPH, 2.0),
        row("DiT/XL", True, results.GRAPH, 5.0),
    ]
    what = "model 2048 px b1, forward, PT-DiT/XL, CUDA graph"
    assert lines_of(rows) == [[what, "≥ 2.2", "2.50 × DiT/XL", "met"]]


def test_without_a_file_targets_say_what_they_want(capsys):
    with pytest.raises(SystemExit):
        targets.main([])
    assert "required: RESULT.json" in capsys.readouterr().err
