from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from late import Late
from torch import nn

from kfac_plugins.likelihoods.bernoulli import Bernoulli
from kfacore.lab.training.plots import _better_average, _title, draw_progress, draw_reconstructions, draw_trace
from kfacore.lab.training.report import draw_comparison
from kfacore.roles import Split

mpl = Late("matplotlib")


def step(k, **more):
    return {
        "event": "step",
        "step": k,
        "seconds": 0.1 * k,
        "batch_size": 10 * k,
        "loss": 100 / k,
        "error": 9 / k,
        **more,
    }


def evaluation(k, **more):
    return {"event": "eval", "step": k, "seconds": 0.1 * k, "train_loss": 90 / k, "train_error": 8 / k, **more}


def labels(ax):
    return [line.get_label() for line in ax.get_lines()]


def test_progress_has_loss_and_error_against_steps_and_seconds():
    events = [step(1), evaluation(1), step(2), evaluation(2, test_loss=60.0, averaged_train_error=5.0)]
    axes = draw_progress(events, "a run", "share misclassified").axes
    assert [ax.get_ylabel() for ax in axes] == ["loss per example", "", "share misclassified", ""]
    assert [ax.get_xlabel() for ax in axes] == ["", "", "step", "training seconds"]
    assert labels(axes[0]) == ["mini-batch", "training set", "test set"]
    assert labels(axes[2]) == ["mini-batch", "training set", "training set, averaged"]
    training = axes[3].get_lines()[1]
    np.testing.assert_allclose(training.get_xdata(), [0.1, 0.2])
    np.testing.assert_allclose(training.get_ydata(), [8, 4])


@pytest.mark.parametrize(("errors", "scale"), [((8.0, 1.0), "log"), ((8.0, 0.0), "linear"), ((8.0, 7.0), "linear")])
def test_scales_are_logarithmic_where_that_shows_more(errors, scale):
    events = [evaluation(1, train_error=errors[0]), evaluation(2, train_error=errors[1])]
    assert draw_progress(events, "", "").axes[2].get_yscale() == scale


def test_values_that_are_missing_or_not_finite_are_left_out():
    events = [step(1, rho=None), step(2, rho=float("-inf")), step(3, rho=0.5, loss=None), step(4, rho=float("nan"))]
    figure = draw_trace(events, "a run")
    panels = {ax.get_title(): ax for ax in figure.axes if ax.get_title()}
    assert set(panels) == {r"$\rho$", "examples in a mini-batch"}
    assert list(panels[r"$\rho$"].get_lines()[0].get_xdata()) == [3]
    loss = draw_progress(events, "", "").axes[0].get_lines()[0]
    assert list(loss.get_xdata()) == [1, 2, 4]
    assert all(math.isfinite(y) for y in loss.get_ydata())


def panel(figure, title):
    return next(ax for ax in figure.axes if ax.get_title() == title)


def test_one_far_value_does_not_flatten_a_panel():
    mus = [0.5 + 0.01 * (k % 50) for k in range(100)]
    mus[58] = 20.5
    ax = panel(draw_trace([step(k + 1, mu=mu) for k, mu in enumerate(mus)], "a run"), r"$\mu$")
    bottom, top = ax.get_ylim()
    assert 0.4 < bottom < 0.5
    assert 0.99 < top < 1.3
    marks = ax.get_lines()[-1]
    assert (list(marks.get_xdata()), list(marks.get_ydata())) == ([59], [1.0])
    assert marks.get_transform() == ax.get_xaxis_transform()
    assert [text.get_text() for text in ax.texts] == ["20.5"]


def test_steps_that_raised_the_objective_are_marked():
    events = [step(1, rho=0.9), step(2, rho=None, increased=True), step(3, rho=None), step(4, rho=1.0)]
    ax = panel(draw_trace(events, "a run"), r"$\rho$")
    marks = next(line for line in ax.get_lines() if "objective went up" in str(line.get_label()))
    assert (list(marks.get_xdata()), list(marks.get_ydata())) == ([2.0], [0.0])
    assert [text.get_text() for text in ax.get_legend().get_texts()] == [r"$-\infty$: the objective went up"]
    # nothing but such steps is worth a panel too
    assert panel(draw_trace([step(1, increased=True)], ""), r"$\rho$").get_lines()


def test_titles_say_what_was_run():
    start = {"event": "start", "problem": "curves", "optimizer": "kfac", "approx": "tridiag", "seed": 3}
    assert _title("a", [start]) == "a: curves, kfac/tridiag, seed 3"
    assert _title("a", [{**start, "optimizer": "adam", "approx": None}]) == "a: curves, adam, seed 3"
    assert _title("a", [step(1)]) == "a"


def test_nothing_to_draw():
    assert draw_progress([{"event": "start"}], "", "") is None
    assert draw_trace([evaluation(1)], "") is None


def test_reconstructions_are_below_their_originals():
    class Pictures:
        image_shape = (2, 3)

        def picture(self, values):
            return values * 2

    model = nn.Linear(6, 6)
    with torch.no_grad():
        model.weight.zero_()
        model.bias.zero_()
    x = torch.arange(30.0).reshape(5, 6) / 100
    figure = draw_reconstructions(Pictures(), model, Bernoulli(), Split(x, x), "title", count=3)
    images = [np.asarray(ax.get_images()[0].get_array()) for ax in figure.axes]
    assert len(images) == 6
    for image, case in zip(images[:3], (0, 2, 4), strict=True):
        np.testing.assert_allclose(image, 2 * x[case].reshape(2, 3), rtol=1e-6)
    for image in images[3:]:  # z = 0 has mean 1/2, displayed as 2 * 1/2
        np.testing.assert_allclose(image, np.ones((2, 3)))
    assert figure.axes[0].get_ylabel() == "original"
    assert figure.axes[3].get_ylabel() == "reconstruction"


def test_global_state_of_matplotlib_is_left_alone():
    before = mpl.get_backend(auto_select=False)
    draw_trace([step(1, lam=1.0)], "")
    assert mpl.get_backend(auto_select=False) == before


@pytest.mark.parametrize(("averaged", "chosen"), [(4.0, "average"), (6.0, None), (None, None)])
def test_the_better_parameters_are_shown(averaged, chosen):
    class Parts:
        class average:  # noqa: N801  # stands for an object
            model = "average"

    events = [evaluation(1, train_error=1.0), evaluation(2, train_error=5.0, averaged_train_error=averaged)]
    assert _better_average(events, Parts) == chosen


def test_undone_steps_are_marked():
    axes = draw_progress([step(1), step(2, rejected=True), step(3, rejected=True)], "", "").axes
    for ax, xs in zip(axes, ([2, 3], [0.2, 0.3], [2, 3], [0.2, 0.3]), strict=True):
        marks = next(line for line in ax.get_lines() if line.get_label() == "undone step")
        np.testing.assert_allclose(marks.get_xdata(), xs)
    assert "undone step" not in labels(draw_progress([step(1)], "", "").axes[0])


SERIES = [
    [0, 0, 0, 0],
    [1, 1e30, 1e300, 0],
    [5, -1, 1e-300, 5e-324],
    *(pytest.param(values, marks=pytest.mark.slow) for values in ([0, 1, 10, 0], [10, 1, 0.1, 0], [0], [5, -1, -2, 0])),
]


@pytest.mark.parametrize("values", SERIES)
def test_zeros_and_extremes_draw_without_a_warning(values, tmp_path):
    """Warnings are errors here, and some come only when the picture is written."""
    traces = ("loss", "error", "lam", "gamma", "rho", "alpha", "mu")
    events = [step(k + 1, **dict.fromkeys(traces, y)) for k, y in enumerate(values)]
    events += [evaluation(k + 1, train_loss=y, train_error=y, test_loss=0.0) for k, y in enumerate(values)]
    comparison = [draw_comparison(["a", "b"], [events, events[-1:]], name, name) for name in ("loss", "error")]
    for figure in (draw_progress(events, "", ""), draw_trace(events, ""), *comparison):
        figure.savefig(tmp_path / "p.png", dpi=20)  # few pixels, drawn as ever
