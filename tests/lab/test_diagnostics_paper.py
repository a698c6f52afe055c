"""The paper's figures on digits made up for the test: training, numbers and pictures, end to end."""

from __future__ import annotations

import json
import sys

import numpy as np
import pytest
import torch

from kfac_cli.main import main
from kfacore.errors import ConfigError, NumericalError
from kfacore.lab.config.resolve import resolve
from kfacore.lab.diagnostics import paper
from kfacore.lab.diagnostics.dense import FactorPairs, block_average, exact_fisher
from kfacore.lab.diagnostics.paper import FIGURES, paper_figure, trained_classifier
from kfacore.registry import get_registry


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    """A folder with ten kinds of 28x28 images, each with a bright square at a place of its own."""
    rng = np.random.default_rng(0)
    labels = np.arange(240) % 10
    images = rng.integers(0, 90, (240, 28, 28))
    for image, label in zip(images, labels, strict=True):
        row, column = divmod(int(label), 4)
        image[9 * row : 9 * row + 8, 7 * column : 7 * column + 6] += 150
    arrays = {"x_train": images[:200], "y_train": labels[:200], "x_test": images[200:], "y_test": labels[200:]}
    folder = tmp_path_factory.mktemp("digits")
    np.savez(folder / "mnist.npz", **{name: array.astype(np.uint8) for name, array in arrays.items()})
    return folder


@pytest.fixture(scope="module")
def config(digits):
    flags = {"problem": "mnist16-classifier", "problem.data_dir": str(digits), "problem.verify": False}
    return resolve(get_registry(), flags=flags)


@pytest.fixture(scope="module")
def trained(config):
    said = []
    found = trained_classifier(config, get_registry(), cases=80, say=said.append)
    return (*found, said)


@pytest.fixture(scope="module")
def matrices(trained):
    """Of two layers instead of four, so that they are 630 wide instead of 1470."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(paper, "_LAYERS", (4, 5))
        return paper._matrices(trained[0], get_registry())


@pytest.fixture
def small(monkeypatch, trained, matrices):
    """One training and one set of matrices for all figures."""
    monkeypatch.setattr(paper, "_LAYERS", (4, 5))
    monkeypatch.setattr(paper, "trained_classifier", lambda *_, **__: trained[:2])
    monkeypatch.setattr(paper, "_matrices", lambda *_: matrices)
    return trained[0]


def test_training_stops_at_the_papers_error(trained):
    subject, facts, said = trained
    assert facts["train_error"] <= 0.05
    assert len(said) == facts["steps"] == subject.step > 1
    assert subject.exact.cases == 80
    assert [layer.d_out for layer in subject.exact.layers] == [20, 20, 20, 20, 10]


def test_training_that_gets_nowhere_is_an_error(config, monkeypatch):
    monkeypatch.setattr(paper, "_MOST_STEPS", 1)
    with pytest.raises(NumericalError, match=r"after 1 steps, 5% are needed"):
        trained_classifier(config, get_registry(), cases=80)


def test_figure_1(small, config):
    made = paper_figure("figure1", config, get_registry())
    samples = small.exact.exact_samples()[3:]
    F, F_tilde = exact_fisher(samples), FactorPairs.of(samples).matrix()
    assert made.numbers["errors"]["F-tilde / F"]["frobenius"] == pytest.approx(float((F - F_tilde).norm() / F.norm()))
    assert set(made.numbers["errors"]) == {"F-tilde / F"}
    assert made.numbers["cumulants"]["error"] == pytest.approx(float((F - F_tilde).abs().sum()))
    assert made.numbers["cumulants"]["error"] < made.numbers["cumulants"]["bound"]
    panels = [ax for ax in made.figure.axes if ax.get_images()]
    assert len(panels) == 3
    scales = {panel.get_images()[0].get_clim() for panel in panels}
    assert len(scales) == 1  # one scale for all three, or the difference would look as large as the rest
    assert [tick.get_text() for tick in panels[0].get_xticklabels()] == ["layer 4", "layer 5"]


def test_figure_2(small, config):
    made = paper_figure("figure2", config, get_registry())
    pairs = FactorPairs.of(small.exact.exact_samples()[3:]).damped(small.gamma)
    wanted = block_average(torch.linalg.inv(pairs.matrix()), pairs.sizes())
    np.testing.assert_allclose(made.numbers["block_averages_of_inverse"], wanted.numpy(), rtol=1e-8)


@pytest.mark.parametrize("name", ["figure5", "figure6"])
def test_figures_5_and_6_have_the_tridiagonal_one_nearer(small, config, name):
    made = paper_figure(name, config, get_registry())
    errors = {key: value["frobenius"] for key, value in made.numbers["errors"].items()}
    power = "" if name == "figure5" else "^-1"
    # of two layers the tridiagonal form is exact
    assert errors[f"tridiag{power} / F-tilde{power}"] < 1e-9
    assert errors[f"blockdiag{power} / F-tilde{power}"] > 1e-3
    assert len([ax for ax in made.figure.axes if ax.get_images()]) == 6


def test_figure_7(small, config):
    made = paper_figure("figure7", config, get_registry())
    assert made.numbers["natural_gradient"]["converged"]
    rows = made.numbers["quality"]
    assert {row["approx"] for row in rows} == {"blockdiag", "tridiag"}
    weakest = min(rows, key=lambda row: row["gamma"])
    assert weakest["unscaled"] < weakest["rescaled"]  # re-scaling rescues the update where damping is too weak
    axes = made.figure.axes
    assert [ax.get_xscale() for ax in axes] == ["log"] * 3


def test_only_the_papers_figures(config):
    assert sorted(FIGURES) == ["figure1", "figure2", "figure5", "figure6", "figure7"]
    with pytest.raises(ConfigError, match="unknown figure 'figure4'"):
        paper_figure("figure4", config, get_registry())


def test_the_command(small, digits, tmp_path, capsys, monkeypatch):
    out = tmp_path / "pictures"
    arguments = ["inspect", "figure2", "--data-dir", str(digits), "--set", "problem.verify=false", "--out", str(out)]
    monkeypatch.setattr(sys, "argv", ["kfac", *arguments])
    with pytest.raises(SystemExit) as caught:
        main()
    assert not caught.value.code
    text = capsys.readouterr().out
    assert "mean absolute entry of each block" in text
    assert text.splitlines()[-2:] == [str(out / "figure2.png"), str(out / "figure2.json")]
    assert json.loads((out / "figure2.json").read_text())["layers"] == [4, 5]
    assert (out / "figure2.png").stat().st_size > 5000
