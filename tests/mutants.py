"""Seeded faults in the kernels, and whether the quick tests catch them: `make mutants`.

Each fault is one replacement in one file, in a copy of the package. A fault is caught when a test
fails, dies or hangs with it. A replacement that no longer fits its file exactly once, or with which
the tests cannot even be collected, is an error: a check that checks nothing must not pass.
"""

import argparse
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
WANTED = 0.95
TIME_LIMIT = 900  # seconds; the tests of one fault take less than half of it
# What would notice a fault in the kernels, the likeliest first.
TESTS = (
    "tests/kernels/test_attention.py",
    "tests/kernels/test_packed.py",
    "tests/kernels/test_norm.py",
    "tests/kernels/test_reduce.py",
    "tests/kernels/test_bounds.py",
    "tests/kernels/test_host.py",
    "tests/kernels/test_tile.py",
    "tests/kernels/test_blocks.py",
    "tests/backends/test_operators.py",
)
# And the likeliest of these: they are run first, alone, and the rest only if they notice nothing.
FIRST = {
    "few_keys": "few_keys or no_key or layouts or slices",
    "flash": "large_windows or many_keys or no_key or scales or absent or mixed or slices",
    "flash_backward": "large_windows or many_keys or no_key or scales or slices",
    "blocks": "blocks or many_keys or first_block",
    "pool": "means or norm",
    "norm": "norm",
    "reduce": "parts or slices",
    "window": "several_tiles or small_windows or bad_number or stays or slices",
    "tile": "far_elements or every_small or large_scores or small_windows or few_keys_sizes",
    "host": "align or split or small_windows or layouts or slices",
    "attention": "many_keys or launched or slices",
    "backends/operator": "double or flops or subsets",
    "backends/triton": "norm or slices or observes",
}


class Fault(NamedTuple):
    """`file` is a module of kernels/, or with its folder one of the package."""

    file: str
    name: str
    old: str
    new: str

    @property
    def path(self) -> str:
        return f"{self.file}.py" if "/" in self.file else f"kernels/{self.file}.py"


TILE = [
    Fault("tile", "dropped int64 of samples", "batch.to(tl.int64) * stride_b", "batch * stride_b"),
    Fault("tile", "dropped int64 of rows", "row.to(tl.int64) * stride", "row * stride"),
    Fault("tile", "dropped int64 of blocks", "row * stride.to(tl.int64)", "row * stride"),
    Fault("tile", "one channel too many", "WIDTH) < D)[None, :]", "WIDTH) <= D)[None, :]"),
    Fault("tile", "second tile of the wrong channels",
          "x1 = tl.load(_pointers(x, row, stride, D0, D1",
          "x1 = tl.load(_pointers(x, row, stride, 0, D1"),
    Fault("tile", "second tile not stored",
          "    if D1 > 0:\n        x1 = x1.to(", "    if D1 > 32:\n        x1 = x1.to("),
    Fault("tile", "scores of the first tile only",
          "    if D1 > 0:\n        s += tl.dot", "    if D1 > 32:\n        s += tl.dot"),
    Fault("tile", "absent keys count as score 0",
          's = tl.where(present, s, float("-inf"))', "s = tl.where(present, s, 0.0)"),
    Fault("tile", "no guard for rows without keys",
          "return p, tl.where(total == 0, 1.0, total)", "return p, total"),
    Fault("tile", "gradient of softmax without its sum",
          "p * (dp - tl.sum(p * dp, 1)[:, None])", "p * dp"),
    Fault("tile", "one window too few",
          "(length - 1 + offset) // size + 1", "(length - 1 + offset) // size"),
    Fault("tile", "one window too many",
          "(length - 1 + offset) // size + 1", "(length + offset) // size + 1"),
    Fault("tile", "window row by the wrong count", "window // nw % nh", "window // nh % nh"),
    Fault("tile", "shift along the width dropped", "window % nw * pw - ow", "window % nw * pw"),
    Fault("tile", "first window starts before the grid", "tl.maximum(start_w, 0)", "start_w"),
    Fault("tile", "last frames not cut off", "tl.minimum(start_f + pf, f) - f0", "pf"),
    Fault("tile", "last columns not cut off", "tl.minimum(start_w + pw, w) - w0", "pw"),
    Fault("tile", "division off at whole quotients",
          "(x + 0.5)", "(x + 0.0)"),
    Fault("tile", "height and width swapped",
          "(f0 + frame) * geometry[1] + h0", "(f0 + frame) * geometry[2] + h0"),
    Fault("tile", "frame by the wrong extent", "quotient(line, rows)", "quotient(line, columns)"),
    Fault("tile", "window of a token without the shift", "(row + oh) // ph", "row // ph"),
    Fault("tile", "sum of row products without the second tile",
          "    if D1 > 0:\n        s += tl.sum(", "    if D1 > 32:\n        s += tl.sum("),
]  # fmt: skip

WINDOW = [
    Fault("window", "windows of a tile see one another",
          "pair & (group[:, None] == group[None, :])", "pair"),
    Fault("window", "keys past the window",
          "pair = valid[None, :]\n", "pair = (valid | True)[None, :]\n"),
    Fault("window", "windows that share a tile taken for one alone",
          "window = tile if SLOTS == ROWS else tile * (ROWS // SLOTS) + group", "window = tile"),
    Fault("window", "first tile of a program only",
          "tl.range(first, tl.minimum(first + share, tiles),", "tl.range(first, first + 1,"),
    Fault("window", "programs that walk over each other's tiles",
          "// heads % shares * share", "// heads % shares"),
    Fault("window", "gradients of the first sample only",
          "tl.program_id(0) // heads // shares", "tl.program_id(0) // heads // shares * 0"),
    Fault("window", "no program for the tiles that are left",
          "host.cdiv(tiles, share) * heads", "max(1, tiles // share) * heads"),
    Fault("window", "one token too many", "slot < box_size(box)", "slot <= box_size(box)"),
    Fault("window", "NaN crosses windows",
          "if GROUPS > 1:\n        if not", "if GROUPS > 64:\n        if not"),
    Fault("window", "NaN not taken out", "tl.where(own, x0, 0.0)", "x0"),
    Fault("window", "gradients without the scale",
          "softmax_gradient(p, dp), pair, GROUPS) * scale",
          "softmax_gradient(p, dp), pair, GROUPS)"),
    Fault("window", "dv by the weights as they are", "_contained_product(tl.trans(p), g0",
          "_contained_product(p, g0"),
    Fault("window", "dk by the scores as they are", "_contained_product(tl.trans(ds), q0",
          "_contained_product(ds, q0"),
    Fault("window", "NaN crosses windows in dP",
          "_contained(outer(g0, g1, v0, v1, D1, PRECISION), pair, GROUPS)",
          "outer(g0, g1, v0, v1, D1, PRECISION)"),
    Fault("window", "NaN crosses windows in dS",
          "_contained(softmax_gradient(p, dp), pair, GROUPS)", "softmax_gradient(p, dp, 1)"),
    Fault("window", "NaN crosses windows in P",
          "_contained(p / total[:, None], pair, GROUPS)", "p / total[:, None]"),
    Fault("window", "tiles of the first sample only",
          "tl.program_id(0) // heads // tiles", "tl.program_id(0) // heads // tiles * 0"),
    Fault("window", "strides of q for v",
          "load_rows(v, token, v_n, valid, D, D0, D1, ALIGN)\n\n",
          "load_rows(v, token, q_n, valid, D, D0, D1, ALIGN)\n\n"),
]  # fmt: skip

FEW_KEYS = [
    Fault("few_keys", "queries past the last whole tile",
          "tl.cdiv(tl.cdiv(queries, ROWS), splits) * ROWS", "queries // ROWS // splits * ROWS"),
    Fault("few_keys", "key mask of the first sample",
          "mask + batch.to(tl.int64) * keys", "mask"),
    Fault("few_keys", "key mask ignored",
          "exists & (tl.load(row + key, mask=exists, other=0) != 0)", "exists"),
    Fault("few_keys", "parts of one split over another's",
          "head_offset(batch * splits + split", "head_offset(batch * splits"),
    Fault("few_keys", "gradient of masked keys not written",
          "store_rows(dk + own, key, dk_n, exists", "store_rows(dk + own, key, dk_n, present"),
    Fault("few_keys", "gradients without the scale",
          "softmax_gradient(p, dp) * scale", "softmax_gradient(p, dp, 1)"),
    Fault("few_keys", "weights not divided", "        p *= (1.0 / total)[:, None]\n", ""),
    Fault("few_keys", "dv by the weights as they are", "accumulate(tl.trans(p)", "accumulate(p"),
    Fault("few_keys", "dk by the scores as they are", "accumulate(tl.trans(ds)", "accumulate(ds"),
    Fault("few_keys", "dq of every tile in the place of the first",
          "start * dq_n.to(tl.int64)", "first * dq_n.to(tl.int64)"),
    Fault("few_keys", "dq by the strides of dk",
          "*into.of_queries, *part_strides", "*into.of_keys, *part_strides"),
    Fault("few_keys", "output not divided", "o0 / total[:, None], o1 / total", "o0, o1 / total"),
]  # fmt: skip

FLASH = [
    Fault("flash", "key mask ignored in whole blocks",
          "    whole = 0 if MASKED else whole\n", ""),
    Fault("flash", "v read by the strides of k", "ALIKE=k[1] == v[1]", "ALIKE=True"),
    Fault("flash", "windows of several frames taken for images",
          "windows.window[0] == 1 and ", ""),
    Fault("flash", "long lines taken for whole blocks", " and windows.window[2] <= size", ""),
    Fault("flash", "output not rescaled", "    o0 *= rescale[:, None]\n", ""),
    Fault("flash", "sum not rescaled", "total * rescale + tl.sum", "total + tl.sum"),
    Fault("flash", "sign of the scale lost", "if NEGATIVE:", "if NEGATIVE and ROWS < 0:"),
    Fault("flash", "log-sum-exp without its largest score",
          "high + tl.log2(some)", "tl.log2(some)"),
    Fault("flash", "rows without keys divided by 0",
          "some = tl.where(total == 0, 1.0, total)", "some = total"),
    Fault("flash", "log-sum-exp of another head",
          "lse += (batch.to(tl.int64) * heads + head) * queries\n    tl.store",
          "lse += batch.to(tl.int64) * heads * queries\n    tl.store"),
    Fault("flash_backward", "gradient of masked values", "tl.where(takes_part, dv0, 0.0)", "dv0"),
    Fault("flash_backward", "queries counted by every split",
          "split * share, tl.minimum((split + 1) * share, count)", "split * share, count"),
    Fault("flash_backward", "split and block swapped",
          "split, block = block // blocks, block % blocks",
          "block, split = block // blocks, block % blocks"),
    Fault("flash_backward", "dq without the scale", "dq0 * scale, dq1 * scale", "dq0, dq1 * scale"),
    Fault("flash_backward", "dk without the scale",
          "tl.where(takes_part, dk0 * scale", "tl.where(takes_part, dk0"),
    Fault("flash", "keys of a window in raster order",
          "row_offset(first, v_n, ALIGN), key,",
          "row_offset(first, v_n, ALIGN), tl.arange(0, KEYS),"),
    Fault("flash", "values of the first block in every block",
          "load_rows(v + row_offset(first, v_n, ALIGN)", "load_rows(v + row_offset(0, v_n, ALIGN)"),
    Fault("flash_backward", "delta not taken off in dk", " - delta_row[None, :])", ")"),
    Fault("flash", "no guard for a first block without keys",
          'tl.where(new_high == float("-inf"), 0.0, new_high) if MASKED else new_high', "new_high"),
]  # fmt: skip

BLOCKS = [
    Fault("blocks", "one row too many", "tl.arange(0, SIZE) < held", "tl.arange(0, SIZE) <= held"),
    Fault("blocks", "empty slots of whole blocks",
          "tl.where(count * SIZE == box_size(box), count, 0)", "count"),
    Fault("blocks", "height and width swapped", "(frame * geometry[1] + line)",
          "(frame * geometry[2] + line)"),
    Fault("blocks", "lines past the window", "tl.minimum(lines - line, height)", "height"),
    Fault("blocks", "frames past the window", "tl.minimum(frames - frame, depth)", "depth"),
    Fault("blocks", "a line past the window", "tl.minimum(columns - column, width)", "width"),
    Fault("blocks", "blocks a line apart", "0, block * height, 0", "0, block, 0"),
    Fault("blocks", "blocks a frame apart", "            frame *= depth\n", ""),
    Fault("blocks", "key mask of the first block", "mask + first + row", "mask + row"),
    Fault("host", "too few programs for frames of a block",
          "for n in (lines * columns, columns, 1)", "for n in (lines, columns, 1)"),
]  # fmt: skip

NORM = [
    Fault("pool", "mean over the whole window's size",
          "sum0 / size, sum1 / size", "sum0 / (pf * ph * pw), sum1 / (pf * ph * pw)"),
    Fault("pool", "tokens counted by every split",
          "last = tl.minimum((split + 1) * share, size)", "last = size"),
    Fault("pool", "gate of the first sample",
          "load_vector(gate, batch, gate_b", "load_vector(gate, batch * 0, gate_b"),
    Fault("norm", "absent channels count in the variance",
          "tl.where((START + tl.arange(0, WIDTH) < C)[None, :], x - mean, 0.0)", "x - mean"),
    Fault("norm", "norm without eps", "C, C1) + eps)", "C, C1))"),
    Fault("norm", "residual without its gate", "if GATED:\n            y0, y1 = y0 * gate0",
          "if False:\n            y0, y1 = y0 * gate0"),
    Fault("norm", "norm of the sum before it is rounded",
          "(x0 + y0).to(total.dtype.element_ty), (x1 + y1).to(total.dtype.element_ty)",
          "x0 + y0, x1 + y1"),
    Fault("norm", "second tile not scaled",
          "x0 * (1.0 + scale0) + shift0, x1 * (1.0 + scale1) + shift1",
          "x0 * (1.0 + scale0) + shift0, x1 * (1.0 + scale0) + shift1"),
    Fault("norm", "modulation of the first sample",
          "load_vector(shift, batch, shift_b", "load_vector(shift, batch * 0, shift_b"),
    Fault("norm", "last rows not cut off", "valid = token < tokens", "valid = token < tokens + 1"),
    Fault("norm", "gradient of the norm without its mean", "g0 - mean - x0", "g0 - x0"),
    Fault("norm", "gradient of the norm without its projection",
          "(g1 - mean - x1 * along)", "(g1 - mean)"),
    Fault("norm", "gradient of the residual dropped",
          "dx0, dx1 = dx0 + t0.to(ACC), dx1 + t1.to(ACC)", "dx0, dx1 = dx0, dx1 + t1.to(ACC)"),
    Fault("norm", "gradient without the modulation's scale",
          "d0 * (1.0 + scale0), d1 * (1.0 + scale1)", "d0, d1"),
    Fault("norm", "gradient of the mean not divided", "m0.to(ACC) / size", "m0.to(ACC)"),
    Fault("norm", "gradient of the gate by the gated branch",
          "dgate0 += tl.sum(dx0 * y0.to(ACC), 0)[None, :]",
          "dgate0 += tl.sum(dx0 * gate0 * y0.to(ACC), 0)[None, :]"),
    Fault("norm", "gradient of the scale after the modulation",
          "dscale0 += tl.sum(d0 * x0, 0)", "dscale0 += tl.sum(g0 * x0, 0)"),
    Fault("norm", "projection on the tokens before their norm",
          "along * factor / C", "along / C"),
    Fault("norm", "sums of the second tile left out",
          "mean + mean1, along + along1", "mean + mean1, along"),
    Fault("norm", "squares and gradients swapped",
          "tl.join(tl.join(a, c), tl.join(b, c))", "tl.join(tl.join(b, c), tl.join(a, c))"),
    Fault("norm", "tokens summed by every split",
          "last = tl.minimum((split + 1) * share, tokens)", "last = tokens"),
    Fault("norm", "sums of shift and scale swapped",
          "COLUMNS - 2, dshift0", "COLUMNS - 1, dshift0"),
    Fault("norm", "gated gradient without its gate",
          "valid, dx0 * gate0, dx1 * gate1,", "valid, dx0, dx1,"),
]  # fmt: skip

HOST = [
    Fault("reduce", "one part too few", "(part < splits)", "(part < splits - 1)"),
    Fault("reduce", "parts of the first tile only",
          "range(0, splits, ROWS)", "range(0, ROWS, ROWS)"),
    Fault("reduce", "parts of the first tile again",
          "part = first + tl.arange(0, ROWS)", "part = tl.arange(0, ROWS)"),
    Fault("reduce", "parts past the last", "(part < splits)[:, None] & ", ""),
    Fault("reduce", "a width that its alignment does not divide",
          "ALIGN=math.gcd(16, inner, *strides)", "ALIGN=16"),
    Fault("reduce", "parts of another sample", "row * splits + part", "row + part"),
    Fault("reduce", "sum of two parts left out",
          "        if splits == 1:\n", "        if splits <= 2:\n"),
    Fault("reduce", "lines of parts taken for one", "(row * splits + part) * lines + line",
          "row * splits + part"),
    Fault("reduce", "sums of all lines in the place of the first",
          "row * out_b + line.to(tl.int64) * out_n", "row * out_b"),
    Fault("reduce", "sums of packed gradients as if they lay alone",
          "if middle and out[1][:2] != strides:", "if False:"),
    Fault("reduce", "parts of packed gradients as if they lay alone",
          "(2 if into.packed else 1)", "1"),
    Fault("host", "gradients of packed projections as if they lay alone",
          "return (self.k or self.v or (0, 0))[:2]",
          "return (self.k or self.v or (0, 0))[1] // 2, (self.k or self.v or (0, 0))[1] // 2"),
    Fault("window", "strides of gradients not among a plan's facts", "*own, heads, scale)",
          "heads * q[0][1] * q[0][3], heads * q[0][3], heads, scale)"),
    Fault("flash_backward", "dq by the strides of dk",
          "*into.of_queries, n, m", "*into.of_keys, n, m"),
    Fault("host", "shift in the wrong direction", "*(-s % p for", "*(s for"),
    Fault("host", "alignment promised that is not there",
          "return math.gcd(16, *strides)", "return 16"),
    Fault("host", "head dim padded beyond need",
          "return (first, second) if first + second < whole else (whole, 0)", "return whole, 0"),
    Fault("host", "channels that do not lie together read as if they did",
          "t.stride(-1) == 1 or", "True or"),
    Fault("attention", "many keys taken for few", "if k.shape[1] > FEW_KEYS:",
          "if k.shape[1] > 2 * FEW_KEYS:"),
    Fault("window", "last tile of windows missing",
          "return host.cdiv(windows.num_windows, rows // slots)",
          "return max(1, windows.num_windows // (rows // slots))"),
    Fault("norm", "strides of the tokens swapped",
          "numbers = (*host.strides_of(x, y or x), *map(",
          "numbers = (*host.strides_of(y or x, x), *map("),
    Fault("norm", "strides of the vectors swapped",
          "map(stride_of, (gate, shift, scale))", "map(stride_of, (shift, gate, scale))"),
    Fault("norm", "rows beyond what is left",
          "Plan(norm_backward, b * splits,", "Plan(norm_backward, b * max(1, splits - 1),"),
]  # fmt: skip

# Of the way to a kernel, in backends/.
WAY = [
    Fault("backends/operator", "second derivative without a word",
          "if torch.is_grad_enabled() or observed(*args[: self.backward.tensors]):",
          "if observed(*args[: self.backward.tensors]):"),
    Fault("backends/operator", "nobody sees the operators", "        if observed(*tensors):\n",
          "        if observed(*tensors) and False:\n"),
    Fault("backends/operator", "no gradient of the second tensor on",
          "for t in tensors:\n", "for t in tensors[:1]:\n"),
    Fault("backends/triton", "gradients of slices stacked in another order",
          "torch.stack(own, 2)", "torch.stack(own[::-1], 2)"),
    Fault("attention", "gradients of packed keys and values swapped",
          "k, v = k.unbind(2)", "v, k = k.unbind(2)"),
    Fault("backends/triton", "gradients by the inputs of no residual",
          "normed_from = x if y is None else output[0]", "normed_from = x"),
    Fault("backends/triton", "gradient of the residual's branch not gated",
          "(dx if gate is None else dy) if need_y", "dx if need_y"),
]  # fmt: skip

FAULTS = [*TILE, *WINDOW, *FEW_KEYS, *FLASH, *BLOCKS, *NORM, *HOST, *WAY]


def run(fault: Fault | None, only: str = "") -> subprocess.CompletedProcess[str]:
    """The tests, or `only` some by pytest's -k, in a copy of the package with the fault."""
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder)
        for name in ("ptattn", "tests", "benchmarks"):
            shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
        shutil.copy(ROOT / "pyproject.toml", copy)
        if fault:
            _insert(fault, copy / "ptattn" / fault.path)
        environment = dict(os.environ, PYTHONPATH=folder, TRITON_INTERPRET="1", OMP_NUM_THREADS="1")
        command = [sys.executable, "-m", "pytest", "-xq", "-p", "no:cacheprovider"]
        return subprocess.run(
            [*command, "-m", "not long and not gpu", "-k", only, *TESTS],
            cwd=folder, env=environment, text=True, capture_output=True, timeout=TIME_LIMIT,
        )  # fmt: skip


def _insert(fault: Fault, path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    if text.count(fault.old) != 1:
        raise ValueError(
            f"{fault.file}: {fault.name}: fits {text.count(fault.old)} times, not once"
        )
    path.write_text(text.replace(fault.old, fault.new), encoding="utf-8")


def verdict(fault: Fault) -> tuple[bool, str]:
    """Whether the fault is caught, and by what."""
    try:
        done = run(fault, FIRST[fault.file])
        if done.returncode == 0:
            done = run(fault)
    except subprocess.TimeoutExpired:
        return True, "the tests hang"
    if done.returncode < 0:
        return True, f"the tests die of {signal.Signals(-done.returncode).name}"
    if done.returncode not in (0, 1) or "ERROR collecting" in done.stdout:
        raise RuntimeError(f"{fault.name}: pytest ended with {done.returncode}:\n{done.stdout}")
    failed = [line for line in done.stdout.splitlines() if line.startswith(("FAILED", "ERROR"))]
    return done.returncode == 1, failed[0][:120] if failed else ""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("-k", default="", metavar="PART", help="only faults whose name has this")
    parser.add_argument("-j", type=int, default=2, metavar="N", help="processes")
    options = parser.parse_args()
    faults = [f for f in FAULTS if options.k in f"{f.file}: {f.name}"]
    caught = 0
    with ThreadPoolExecutor(options.j) as pool:
        sound = pool.submit(run, None)
        for fault, (found, by) in zip(faults, pool.map(verdict, faults), strict=True):
            caught += found
            print(
                f"{'caught' if found else 'MISSED':7} {fault.file}: {fault.name}  {by}", flush=True
            )
    if sound.result().returncode:
        print("the tests fail without any fault", file=sys.stderr)
        return 2
    print(f"{caught} of {len(faults)} caught, {WANTED:.0%} wanted")
    return 0 if faults and caught >= WANTED * len(faults) else 1


if __name__ == "__main__":
    sys.exit(main())
