"""The pictures of a report hold the numbers of the study."""

from __future__ import annotations

import numpy as np
import pytest
from study_folders import write_study

from kfacore.lab.studies.figures import curves, differences, panel, profile, strip, trace
from kfacore.lab.studies.html import figure_html, svg_text
from kfacore.lab.studies.pens import COLORS, INK, pens
from kfacore.lab.studies.plan import Target
from kfacore.lab.studies.report_data import read_runs
from kfacore.lab.studies.report_results import analyse
from kfacore.lab.studies.statistics import t_interval

STATES = {("wild", 1): ("diverged", "nan"), ("slow", 3): ("running", ""), ("slow", 2): ("pending", "")}


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    variants = {"base": {}, "slow": {"rate": 0.1, "seconds": 0.2}, "wild": {}, "sgd": {"approx": None}}
    target = Target("train_error", 2.0)
    study = write_study(tmp_path_factory.mktemp("s"), variants, seeds=4, states=STATES, target=target)
    return analyse(study, read_runs(study))


def axes_of(draw):
    figure = panel(draw)
    assert figure is not None
    return figure.axes[0]


def lines_of(ax, group):
    return [line for line in ax.get_lines() if line.get_gid() == group and len(line.get_xdata()) > 1]


def test_pens_tell_variants_apart(results):
    styles = pens(results)
    assert styles["base"].color == INK
    assert [styles[name].group for name in ("base", "slow", "wild", "sgd")] == ["v0", "v1", "v2", "v3"]
    assert len({pen.color for pen in styles.values()}) == 4


def test_more_variants_than_colors_get_other_lines(tmp_path):
    variants = {f"v{k}": {} for k in range(2 * len(COLORS) + 2)}
    states = {(name, 0): ("pending", "") for name in variants}
    study = write_study(tmp_path, variants, seeds=1, states=states)
    styles = list(pens(analyse(study, read_runs(study))).values())
    assert len({(pen.color, pen.line) for pen in styles}) == len(styles)


@pytest.mark.parametrize(("axis", "factor"), [("step", 1.0), ("seconds", 0.5)])
def test_curve_is_the_mean_and_the_band_its_interval(results, axis, factor):
    ax = axes_of(curves(results, "curves", "train_error", axis, "error"))
    (line,) = lines_of(ax, "v0")
    runs = [run for run in results.runs if run.planned.variant == "base"]
    values = np.array([run.evals["train_error"] for run in runs])
    np.testing.assert_allclose(line.get_ydata(), values.mean(axis=0))
    np.testing.assert_allclose(line.get_xdata(), factor * runs[0].evals["step"])
    band = next(collection for collection in ax.collections if collection.get_gid() == "v0")
    ends = [t_interval(column) for column in values.T.tolist()]
    heights = band.get_paths()[0].vertices[:, 1]
    assert heights.max() == pytest.approx(max(high for _, high in ends))
    assert heights.min() == pytest.approx(min(low for low, _ in ends))


def test_runs_that_are_not_done_are_drawn_alone(results):
    ax = axes_of(curves(results, "curves", "train_error", "step", "error"))
    mean, stray = sorted(lines_of(ax, "v2"), key=lambda line: line.get_linewidth(), reverse=True)
    assert max(mean.get_ydata()) < 15.0  # the diverged run, at 1e9, is not in the mean
    assert stray.get_xdata()[-1] == 28  # its last evaluation
    top = max(float(run.evals["train_error"].max()) for run in results.runs if run.done)
    assert max(stray.get_ydata()) == pytest.approx(2.0 * top)  # cut, so that it does not squeeze the others
    ends = [line for line in ax.get_lines() if len(line.get_xdata()) == 1]
    assert sorted((line.get_gid(), line.get_marker()) for line in ends) == [("v1", ">"), ("v2", "X")]
    assert len(lines_of(ax, "v1")) == 4  # two that are done, their mean, and the one under way


def test_two_seeds_have_no_band(results):
    ax = axes_of(curves(results, "curves", "train_error", "step", "error"))
    assert {collection.get_gid() for collection in ax.collections} == {"v0", "v2", "v3"}
    thin = [line for line in ax.get_lines() if line.get_gid() == "v1" and line.get_linewidth() < 0.8]
    assert len(thin) == 2


def test_trace_is_the_median_and_optimizers_without_the_number_have_no_line(results):
    ax = axes_of(trace(results, "curves", "rho"))
    (line,) = lines_of(ax, "v0")
    runs = [run for run in results.runs if run.planned.variant == "base"]
    np.testing.assert_allclose(line.get_ydata(), np.median([run.steps["rho"] for run in runs], axis=0))
    assert lines_of(ax, "v3") == []


def test_differences_show_mean_and_interval(results):
    ax = axes_of(differences(results, "curves", "error"))
    slow = next(cell for cell in results.cells["curves"] if cell.variant.name == "slow")
    assert [text.get_text() for text in ax.get_yticklabels()] == ["slow", "wild", "sgd"]
    dots = [line.get_xdata()[0] for line in ax.get_lines() if line.get_marker() == "o"]
    assert dots[0] == slow.differences["train_error"].mean


def test_one_large_difference_does_not_hide_the_others(tmp_path):
    variants = {"base": {}, "a": {"floor": 1.01}, "b": {"floor": 1.02}, "c": {"floor": 1.03}, "huge": {"floor": 9.5}}
    study = write_study(tmp_path, variants, seeds=3)
    ax = axes_of(differences(analyse(study, read_runs(study)), "curves", "error"))
    assert ax.get_xscale() == "symlog"
    assert 0.0 in ax.get_xticks()
    assert ax.get_xlim()[1] > 7.0


def test_profile_starts_at_the_share_of_wins(tmp_path):
    study = write_study(tmp_path, {"base": {}, "slow": {"rate": 0.1}}, seeds=3, target=Target("train_error", 2.0))
    results = analyse(study, read_runs(study))
    ax = axes_of(profile(results, "step"))
    (line,) = lines_of(ax, "v1")
    assert line.get_ydata()[0] == 0.0
    assert line.get_ydata()[-1] == 1.0
    assert lines_of(ax, "v0")[0].get_ydata()[0] == 1.0


def test_nothing_to_draw_gives_no_figure(results):
    assert panel(curves(results, "curves", "averaged_test_loss", "step", "loss")) is None
    assert strip([lambda ax: False], "title", []) is None


def test_long_runs_are_thinned_with_both_ends(tmp_path):
    study = write_study(tmp_path, {"base": {}}, seeds=1, steps=1000, every=1)
    (line,) = lines_of(axes_of(curves(analyse(study, read_runs(study)), "curves", "train_error", "step", "e")), "v0")
    assert len(line.get_xdata()) < 200
    assert (line.get_xdata()[0], line.get_xdata()[-1]) == (0.0, 1000.0)


def test_a_picture_in_the_page_follows_its_colors_and_has_names_of_its_own(results):
    svg = svg_text(panel(curves(results, "curves", "train_error", "step", "error")))
    assert INK in svg
    one, other = (figure_html(svg, 'alt "quoted"', name) for name in ("one", "other"))
    assert INK not in one
    assert "var(--ink)" in one
    assert "var(--c0)" in one
    assert 'aria-label="alt &quot;quoted&quot;"' in one
    assert "xmlns" not in one
    assert 'id="one-' in one
    assert one.replace("one-", "other-") == other
    assert svg.count("<text") == one.count("<text") > 5
