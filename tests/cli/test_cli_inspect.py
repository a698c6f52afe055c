"""`kfac inspect` as people use it, on a problem small enough for a test."""

from __future__ import annotations

import json

import pytest
from small_runs import run, settings, write_data


@pytest.fixture
def options(tmp_path):
    write_data(tmp_path)
    return [part for setting in settings(tmp_path) for part in ("--set", setting)]


@pytest.fixture
def not_drawn(monkeypatch):
    """Figures are made and not written, which is most of the time of an inspection this small."""
    monkeypatch.setattr("kfacore.lab.diagnostics.command.save_figure", lambda figure, path: path)


def test_at_initialisation(kfac, options, tmp_path):
    code, out, err = kfac("inspect", *options, "--approx", "blockdiag", "--approx", "tridiag", "--cases", 50)
    assert code == 0, err
    assert "npz at initialisation" in out
    assert "50 training examples" in out
    assert "iterations of conjugate gradients" in out
    assert "tridiag^-1 / F-tilde^-1" in out
    assert "equation 4" in out
    assert "natural gradient" in err
    assert "is best here" in out or "equally good here" in out
    folder = tmp_path / "inspect"
    assert sorted(file.name for file in folder.iterdir()) == [
        "fisher.png",
        "inspect.json",
        "inverse.png",
        "quality.png",
    ]
    answer = json.loads((folder / "inspect.json").read_text())
    assert answer["cases"] == 50
    assert {row["approx"] for row in answer["quality"]} == {"blockdiag", "tridiag"}
    assert answer["dense"]["cumulants"]["mismatch"] < 1e-10


@pytest.mark.usefixtures("not_drawn")
def test_a_run_in_json(kfac, tmp_path):
    run(tmp_path, "a")
    code, out, err = kfac("inspect", "a", "--approx", "blockdiag", "--layers", "2-3", "--gamma", 0.3, "--json")
    assert code == 0, err
    answer = json.loads(out)
    assert answer["step"] == 20
    assert answer["gamma"] == 0.3
    assert answer["dense"]["first_layer"] == 2
    assert answer["files"][0] == "a/inspect/inspect.json"
    assert json.loads((tmp_path / "a" / "inspect" / "inspect.json").read_text())["subject"] == answer["subject"]


@pytest.mark.usefixtures("not_drawn")
def test_an_approximation_that_fails_is_named_and_the_rest_is_printed(kfac, options, monkeypatch):
    from kfac_plugins.approx.tridiag import BlockTridiagonal

    def broken(self, moments):
        raise ZeroDivisionError("by nothing")

    monkeypatch.setattr(BlockTridiagonal, "factorise", broken)
    code, out, err = kfac("inspect", *options, "--approx", "blockdiag", "--approx", "tridiag", "--cases", 30)
    assert code == 0, err
    assert "tridiag: failed: approx 'tridiag' (kfac_plugins.approx.tridiag.BlockTridiagonal, kfacore " in out
    assert "ZeroDivisionError: by nothing" in out
    assert out.count("blockdiag^-1 / F-tilde^-1") >= 1
    assert "blockdiag was measured alone" in out


def test_all_registered_approximations_by_default(kfac, options, tmp_path):
    code, out, err = kfac("inspect", *options, "--cases", 30, "--out", "x", "--json")
    assert code == 0, err
    answer = json.loads(out)
    from kfacore.registry import get_registry

    names = {component.name for component in get_registry().components("approx")}
    assert {row["approx"] for row in answer["quality"]} | set(answer["skipped"]) >= names
    assert {"blockdiag", "tridiag"} <= {row["approx"] for row in answer["quality"]}
    assert (tmp_path / "x" / "quality.png").stat().st_size < 300_000


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--approx", "tridag"], "did you mean 'tridiag'"),
        (["--layers", "2:5"], "for example 2-5"),
        (["nowhere"], "no such folder"),
        (["figure3"], "unknown figure 'figure3'"),
        (["figure1", "--approx", "tridiag"], "leave --approx out"),
        (["figure1", "--problem", "curves"], "mnist16-classifier"),
        (["figure1", "--data-dir", "nowhere"], "nowhere"),
    ],
)
def test_mistakes(kfac, arguments, message):
    code, out, err = kfac("inspect", *arguments)
    assert code == 2
    assert out == ""
    assert message in err
    assert "Traceback" not in err


def test_layers_that_do_not_exist(kfac, options):
    code, _, err = kfac("inspect", *options, "--layers", "3-9", "--approx", "blockdiag", "--cases", 20)
    assert code == 2
    assert "layers 1 to" in err


def test_a_run_keeps_its_configuration(kfac, tmp_path):
    run(tmp_path, "a")
    code, _, err = kfac("inspect", "a", "--seed", "5")
    assert code == 2
    assert "seed" in err


def test_a_figure_that_is_not_of_curvature_names_those_that_are(kfac):
    code, out, err = kfac("inspect", "figure3")
    assert (code, out) == (2, "")
    assert err == "error: unknown figure 'figure3'; known: figure1, figure2, figure5, figure6, figure7\n"
