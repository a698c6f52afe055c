"""A factorisation that fails before any gamma is tried is treated as if every gamma had failed."""

from __future__ import annotations

from typing import Any

import dense
import pytest
import torch

from kfac_plugins.approx.blockdiag import BlockDiagonal
from kfacore.curvature.preconditioner import Preconditioner
from kfacore.errors import NumericalError


class Failing(BlockDiagonal):
    """An eigenproblem fails from the second refresh on."""

    calls = 0

    def factorise(self, moments: Any) -> Any:
        self.calls += 1
        if self.calls > 1:
            raise NumericalError("0: the eigenproblem of A failed")
        return super().factorise(moments)


def preconditioner(approx: BlockDiagonal) -> Preconditioner:
    model = dense.net((3, 2))
    made = Preconditioner(approx, dense.infos(model), dense.randn(1), 0.95)
    made.update(dense.case_samples(model, dense.randn(5, 3), dense.randn(1, 5, 2)))
    return made


def test_the_inverse_in_use_is_kept_and_the_layer_is_named_once() -> None:
    gammas = [torch.tensor(g, dtype=dense.Float) for g in (0.1, 0.2, 0.3)]
    approx = Failing()
    found = preconditioner(approx)
    made, notices = found.refresh(gammas, pi="layer")
    assert [float(gamma) for gamma, _ in made] == [0.1, 0.2, 0.3]
    assert approx.calls == 1  # one factorisation serves all candidates
    assert notices == []
    found.use(made[0][1])
    made, notices = found.refresh(gammas, pi="layer")
    assert made == []
    assert [str(n) for n in notices] == ["0: the eigenproblem of A failed (the previous inverse was kept)"]
    assert approx.calls == 2
    assert found.inverse is not None


def test_without_an_earlier_inverse_it_is_an_error() -> None:
    approx = Failing()
    approx.calls = 1
    with pytest.raises(NumericalError, match="0: the eigenproblem of A failed"):
        preconditioner(approx).refresh([torch.tensor(0.1, dtype=dense.Float)], pi="layer")
