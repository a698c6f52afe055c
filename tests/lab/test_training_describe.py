from __future__ import annotations

import pytest
from small_runs import small_config

from kfacore.errors import DataError
from kfacore.lab.config.resolve import resolve
from kfacore.lab.training.describe import describe
from kfacore.registry import get_registry


def test_tridiag_lists_factors_and_cross_factors(tmp_path):
    table = describe(small_config(tmp_path, "approx=tridiag"), get_registry())
    assert [(row.name, row.d_in, row.d_out, row.parameters) for row in table.rows] == [
        ("0", 17, 8, 136), ("2", 9, 3, 27), ("3", 4, 8, 32), ("5", 9, 16, 144),
    ]  # fmt: skip
    assert {f.symbol: f.shape for f in table.rows[0].factors} == {
        "A": (17, 17), "G": (8, 8), "Ax": (17, 9), "Gx": (8, 3),
    }  # fmt: skip
    assert {f.symbol: f.shape for f in table.rows[3].factors} == {"A": (9, 9), "G": (16, 16)}
    assert table.parameters == 339
    entries = 17**2 + 9**2 + 4**2 + 9**2 + 8**2 + 3**2 + 8**2 + 16**2 + 17 * 9 + 9 * 4 + 4 * 9 + 8 * 3 + 3 * 8 + 8 * 16
    assert table.factor_entries == entries
    assert table.megabytes(entries) == pytest.approx(4e-6 * entries)


def test_blockdiag_has_no_cross_factors_and_float64_takes_twice(tmp_path):
    table = describe(small_config(tmp_path, "approx=blockdiag", "dtype=float64"), get_registry())
    assert {factor.symbol for row in table.rows for factor in row.factors} == {"A", "G"}
    assert table.megabytes(1_000_000) == 8.0


def test_other_optimizers_have_layers_but_no_factors(tmp_path):
    table = describe(small_config(tmp_path, "optimizer=adam"), get_registry())
    assert [(row.d_in, row.d_out, row.factors) for row in table.rows][:2] == [(17, 8, ()), (9, 3, ())]
    assert table.parameters == 339


def test_generated_problems_need_no_data(tmp_path, monkeypatch):
    monkeypatch.setenv("KFAC_DATA", str(tmp_path))
    table = describe(resolve(get_registry()), get_registry())
    assert table.rows[0].d_in == 785
    assert table.rows[-1].d_out == 784
    assert list(tmp_path.iterdir()) == []


def test_given_parameters_are_checked(tmp_path):
    with pytest.raises(DataError, match="no such file"):
        describe(small_config(tmp_path), get_registry(), tmp_path / "none.npz")
