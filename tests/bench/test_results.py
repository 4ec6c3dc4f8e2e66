"""What rows say: speed-ups, equal models, regressions; and their file."""

import dataclasses
import json

import pytest

from ptattn.bench import results
from ptattn.bench.results import COMPILED, EAGER, ERROR, FAILED, GPU_ALONE, GRAPH, NOT_REACHED, OK
from ptattn.command_line import UsageError
from tests.support.measured import H200, compared, result, timed


def test_a_speed_up_is_over_the_fastest_baseline_of_the_mode():
    facts = dict(width=640, parameters=1, depth=12, blocks=1)
    known = dict(model="DiT/B", baseline=True, facts=facts)
    group = [timed(4.0, **known), timed(3.0, **known), timed(2.0, mode=COMPILED, **known)]
    ours = {mode: timed(1.0, mode=mode, facts=facts) for mode in (EAGER, COMPILED, GRAPH)}
    found = {mode: results.speedup(row, group, "DiT/B") for mode, row in ours.items()}
    assert found == {EAGER: 3.0, COMPILED: 2.0, GRAPH: None}
    assert results.speedup(group[0], group, "DiT/B") is None  # of a baseline there is none
    assert results.speedup(dataclasses.replace(ours[EAGER], timing=None), group, "DiT/B") is None


@pytest.mark.parametrize(
    ("models", "how"),
    [
        (("pt-dit-xl", "dit-xl"), "width"),  # 1.13 B and 0.68 B
        (("pt-dit-l", "pixart-alpha"), "parameters"),
        (("pt-dit-xl", "dit-b"), None),
    ],
)
def test_models_are_equal_in_width_or_within_ten_percent_of_parameters(models, how):
    ours, theirs = rows = compared({256: (1.0, 2.0)}, *models)
    assert results.equal(ours, theirs) == how
    ratio = results.speedup(ours, rows, theirs.model)
    assert (ratio is None) == (how is None)
    if how == "parameters":  # of whole models, whose depths differ
        depths = theirs.facts["depth"] / ours.facts["depth"]
        assert ratio == pytest.approx(2.0 * depths)
        for share, same in ((1.099, "parameters"), (1.101, None)):
            ours.facts["parameters"] = share * theirs.facts["parameters"]
            assert results.equal(ours, theirs) == same


@pytest.mark.parametrize(
    ("seconds", "spread", "slower"),
    [(1.0, 0.01, 0), (1.02, 0.001, 0), (1.1, 0.01, 1), (1.1, 0.2, 0), (0.5, 0.01, 0)],
)
def test_a_regression_lies_beyond_the_noise(seconds, spread, slower):
    found, common = results.regressions(result(timed(1.0)), result(timed(seconds, spread)))
    assert (len(found), common) == (slower, 1)


def test_times_of_one_mode_are_compared_and_a_result_now_wrong_counts():
    now = result(timed(9.0, mode=COMPILED), timed(9.0, name="DiT/B", baseline=True))
    was = result(timed(1.0), timed(1.0, name="DiT/B", baseline=True))
    assert results.regressions(was, now) == ([], 0)
    now = dataclasses.replace(timed(1.0), timing=None, status=FAILED, note="error 1")
    found, _ = results.regressions(result(timed(1.0)), result(now))
    assert found == ["block 256 px b1 forward PT-DiT/B eager: FAILED, error 1"]


def test_what_was_left_out_is_named_once_per_reason():
    def left_out(status, note, **known):
        return dataclasses.replace(timed(1.0, **known), timing=None, status=status, note=note)

    rows = [timed(1.0), left_out(NOT_REACHED, "the budget is used up", workload="A")]
    rows += [left_out(NOT_REACHED, "the budget is used up", workload="B")]
    named = "PT-DiT/B not reached: A forward and 1 more: the budget is used up"
    assert results.omissions(rows) == [named]
    assert results.summary(rows) == "1 ok, 2 not reached"
    assert results.status(rows) == 0
    assert results.status([left_out(ERROR, "RuntimeError: x", baseline=True)]) == 0
    assert results.status([left_out(ERROR, "RuntimeError: x")]) == 1


def test_round_trip_of_a_result(tmp_path):
    path = tmp_path / "block.json"
    whole = result(timed(1.0), *compared({64: (1, 2)}, "dit-s", "dit-b"))
    path.write_text(whole.to_json())
    assert results.load(path) == whole
    assert json.loads(path.read_text())["schema"] == results.SCHEMA == "ptattn.bench/2"


@pytest.mark.parametrize(("name", "rows"), [("ops", 588), ("block", 95)])
def test_files_of_the_first_run_on_a_gpu_are_read(name, rows):
    found = results.load(H200 / f"{name}.json")
    assert len(found.rows) == rows
    assert {row.mode for row in found.rows} == {GPU_ALONE}
    ours = [row for row in found.rows if row.status == OK and not row.baseline]
    assert results.regressions(found, found) == ([], len(ours))


@pytest.mark.parametrize(
    ("content", "part"),
    [
        ('{"schema": 1}', "schema ptattn.bench/2; got schema 1"),
        ('{"schema": "ptattn.bench/1"}', "got schema 'ptattn.bench/1'"),
        ("[]", "got schema None"),
        ('{"schema": "ptattn.bench/2"}', "earlier.json is damaged: KeyError: 'rows'"),
        ("no json", "cannot read"),
        (None, "cannot read"),
    ],
)
def test_a_file_of_something_else_is_named(content, part, tmp_path):
    path = tmp_path / "earlier.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(UsageError, match=rf".*{part}"):
        results.load(path)
