"""The benchmarks: the suite runs, and its comparison with a baseline warns of what is worse and of nothing else."""

import dataclasses
import json
import os
import sys
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest

from benchmarks import bound, picture, regression, report
from benchmarks.apart import ApartError, apart
from benchmarks.growth import __main__ as growth
from benchmarks.growth import chart, measure
from benchmarks.growth.axes import AXES
from benchmarks.growth.slopes import Curve
from benchmarks.options import Options
from benchmarks.rows import Row, throughput, timed
from tests import zygote

ROOT = Path(__file__).parents[2]


def row(ratio, low=None, high=None, **changes):
    base = Row("overhead", "mlp", "Lumen: donate", "step", "µs", 500.0, ratio, low, high)
    return dataclasses.replace(base, **changes)


def bench(*arguments, cwd):
    command = [sys.executable, "-m", "benchmarks", *arguments]
    return zygote.run(command, cwd=cwd, env={**os.environ, "PYTHONPATH": str(ROOT)}, timeout=200)


# ------------------------------------------------------------------------------------------- rows


def test_a_ratio_is_the_median_over_rounds_of_pairs():
    times = {"raw": [1.0, 2.0, 4.0], "ours": [0.5, 2.0, 8.0]}
    raw, ours = timed("p", "c", times, "raw", unit="ms")
    assert (raw.ratio, raw.low, raw.high, raw.value) == (1.0, 1.0, 1.0, 2e3)
    assert (ours.ratio, ours.low, ours.high, ours.value) == (1.0, 0.75, 1.5, 2e3)


def test_throughput_is_higher_where_time_is_shorter():
    _, ours = throughput("p", "c", {"raw": [2.0, 2.0], "ours": [0.5, 0.5]}, "raw", unit="rows/s", amount=10)
    assert (ours.ratio, ours.value, ours.higher) == (4.0, 20.0, True)


# ------------------------------------------------------------------------------------------- the comparison


@pytest.mark.parametrize(
    ("now", "before", "warns"),
    [
        (row(1.30), row(1.00), True),
        (row(1.04), row(1.00), False),  # below the floor
        (row(0.70), row(1.00), False),  # better
        (row(1.30, 1.20, 1.40), row(1.00, 0.92, 1.08), False),  # the spreads of both explain it
        (row(1.30, 1.28, 1.32), row(1.00, 0.98, 1.02), True),
        (row(6.0, higher=True), row(8.0, higher=True), True),
        (row(10.0, higher=True), row(8.0, higher=True), False),
        (row(1.30, variant="Accelerate"), row(1.00, variant="Accelerate"), False),  # not ours to mend
    ],
)
def test_what_is_worse_beyond_the_noise_is_warned_of(now, before, warns):
    verdict = regression.compare([now], [before])
    assert bool(verdict.warnings) is warns
    if warns:
        assert f"{now.ratio:.2f}" in verdict.warnings[0]
        assert f"{before.ratio:.2f}" in verdict.warnings[0]


def test_what_can_no_longer_be_measured_is_warned_of_and_what_is_new_is_not():
    broken = row(None, value=None, note="ImportError: no")
    assert "ImportError: no" in regression.compare([broken], [row(1.0)]).warnings[0]
    verdict = regression.compare([row(9.0, case="gpt")], [row(1.0)])
    assert (list(verdict.warnings), verdict.compared, verdict.unknown) == ([], 0, 1)


def test_a_new_baseline_keeps_the_parts_that_did_not_run():
    old, new = {"parts": {"a": 1, "b": 2}}, {"quick": False, "parts": {"b": 3}}
    assert regression.merged(old, new) == {"parts": {"a": 1, "b": 3}}


def test_the_baseline_is_a_report_of_whole_runs():
    rows = regression.rows_of(regression.load(regression.BASELINE))
    assert len({each.key for each in rows}) == len(rows)


# ------------------------------------------------------------------------------------------- the bound


def test_the_bound_counts_state_gradients_and_activations():
    units = [bound.Unit(10, 0, 0), bound.Unit(20, 100, 5), bound.Unit(30, 7, 7)]
    assert bound.least(units) == 4 * (180 + 100 + 30)  # activations of the second and the gradient of the third
    assert bound.least(units, remat=True) == 4 * (180 + 30 + 100)  # before the second: it was computed again
    assert bound.least(units[:1]) == 4 * (30 + 10)
    assert bound.least(units, processes=2) == 4 * (90 + 50 + 30 + 30)  # the third gathered, and its gradient whole
    assert bound.least(units, keeps_old=True) == 4 * 360
    assert bound.least(units, microbatches=10) == int(4 * (180 + 60 + 10.7))


# ------------------------------------------------------------------------------------------- what is written


def test_the_picture_has_a_dot_for_each_ratio_and_the_page_a_line():
    rows = [row(1.0, 0.9, 1.1), row(2.0, variant="Fabric & co"), row(None, value=None, note="not installed")]
    drawn = ET.fromstring(picture.svg(rows))
    assert len(drawn.findall("{http://www.w3.org/2000/svg}circle")) == 2
    page = report.markdown({"parts": {"overhead": {"rows": [each.as_json() for each in rows]}}})
    assert page.count("\n| mlp |") == 3
    assert "not installed" in page


# ------------------------------------------------------------------------------------------- growth


def grown(*powers):
    """The curve of a cost that is proportional to a power of the size, a power for each round."""
    sizes = (1_000, 10_000, 100_000, 1_000_000)
    return Curve(sizes, [[7.0 * size**power for power in powers] for size in sizes])


def test_a_slope_is_the_power_and_has_the_quartiles_of_the_rounds():
    slope = grown(1.0, 2.0, 1.5).slope()
    assert (slope.low, slope.middle, slope.high) == pytest.approx((1.25, 1.5, 1.75))
    bent = Curve((1, 10, 100, 1_000), [[1.0], [1.0], [10.0], [100.0]])
    assert bent.slope(3).middle == pytest.approx(1.0)
    assert bent.slope().middle < 0.8


def test_growth_that_is_steeper_than_expected_is_warned_of():
    assert list(growth.warnings({"params": (grown(1.0, 1.1), grown(0.5, 0.5)), "rows": (grown(0.1), grown(0.0))})) == []
    (line,) = growth.warnings({"rows": (grown(0.1), grown(0.5))})
    assert "rows: the slope of memory is 0.50, and at most 0 is expected" in line


def test_the_picture_of_growth_has_a_panel_for_each_axis_that_was_measured():
    drawn = ET.fromstring(chart.svg(AXES, {"rows": (grown(0.0, 0.1), grown(0.0)), "params": (grown(1.0), grown(1.0))}))
    assert len(drawn.findall("{http://www.w3.org/2000/svg}circle")) == 2 * 2 * 4


def test_an_axis_is_measured_at_each_size():
    seconds, size = measure.times("rows", (100, 1_000), 1), measure.memory("rows", (100, 1_000))
    assert len(seconds.medians) == len(size.medians) == 2
    assert min(seconds.medians) > 0
    assert min(size.medians) >= measure.FLOOR


def test_options_pick_by_globs():
    options = Options(cases=("mlp*",), only=("*donate",), quick=True)
    assert options.wants("MLP, 2")
    assert not options.wants("gpt")
    assert list(options.chosen({"raw": 1, "Lumen: donate": 2, "Lumen: compile": 3}, "raw")) == ["raw", "Lumen: donate"]


def _dies():
    os._exit(3)


def test_a_call_apart_gives_its_value_its_error_or_its_death():
    assert apart(divmod, 7, 2) == (3, 1)
    with pytest.raises(ApartError, match="ZeroDivisionError"):
        apart(divmod, 1, 0)
    with pytest.raises(ApartError, match="exit code 3"):
        apart(_dies)


@pytest.mark.timeout(240)
def test_a_quick_run_reports_and_compares(tmp_path):
    parts = ["leaves", "runner"]
    better = row(0.01, part="leaves", case="1 params")
    machine = {"cpu": "another", "threads": 2, "python": "3.11.7", "versions": {"torch": "2.13.0"}}
    baseline = tmp_path / "baseline.json"
    baseline.write_text(json.dumps({"parts": {"leaves": {"machine": machine, "rows": [better.as_json()]}}}))
    asked = ["--quick", "--rounds", "2", "--cases", "1 *", "5*", "--output", str(tmp_path)]
    done = bench(*parts, *asked, "--baseline", str(baseline), "--strict", cwd=tmp_path)
    assert done.returncode == 1, done.stderr[-3000:]
    assert "warning: leaves, 1 params, Lumen: donate (step)" in done.stdout
    assert "1 ratios compared with the baseline, 1 worse" in done.stdout
    assert "the baseline's another" in done.stdout

    found = json.loads((tmp_path / "report.json").read_text())
    assert list(found["parts"]) == parts
    assert {"cpu", "date", "versions"} <= found["parts"]["leaves"]["machine"].keys()
    rows = regression.rows_of(found)
    assert {each.case for each in rows} == {"1 params", "500 steps of nothing"}
    assert all(each.value for each in rows if each.metric == "step")
    ET.parse(tmp_path / "report.svg")


def test_an_unknown_part_is_named(tmp_path):
    done = bench("leafs", cwd=tmp_path)
    assert done.returncode == 2
    assert "there is no part leafs" in done.stderr
