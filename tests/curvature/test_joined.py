"""Who serves what, which pairs are left, and whose fault it is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import dense
import pytest
import torch
from kinds import BLOCKS, samples
from torch import Tensor

from kfac_plugins.approx.blockdiag import BlockDiagonal, BlockDiagonalInverse
from kfac_plugins.approx.diagonal import Diagonal, DiagonalMoment
from kfac_plugins.approx.exact import DenseMoment, Exact
from kfac_plugins.approx.tridiag import BlockTridiagonal
from kfacore.curvature.cases import case_gradients
from kfacore.curvature.joined import Joined, JoinedMoments
from kfacore.curvature.moments import InputCross
from kfacore.curvature.preconditioner import Preconditioner
from kfacore.errors import ConfigError, NumericalError, PluginError, UnsupportedModelError
from kfacore.roles import Approximation
from kfacore.roles.block import Block
from kfacore.roles.inverse import Inverse
from kfacore.roles.moment import Moments

Float = torch.float64
LIKE = torch.zeros((), dtype=Float)
GAMMA = torch.tensor(0.3, dtype=Float)
PLAIN = [Block("a", 4, 3, True), Block("b", 4, 2, True)]


def test_with_plain_blocks_alone_the_approximation_stands_by_itself() -> None:
    joint = Joined(BlockDiagonal(), PLAIN)
    moments = joint.start(LIKE)
    assert type(moments) is Moments
    moments.update([samples(block) for block in PLAIN], 0.9)
    inverse = joint.damped(joint.factorise(moments), GAMMA, "layer")
    assert isinstance(inverse, BlockDiagonalInverse)
    own = BlockDiagonal().factorise(moments).damped(GAMMA)
    assert torch.equal(inverse.dense(), own.dense())


def test_the_approximation_sees_only_what_it_serves() -> None:
    blocks = [PLAIN[0], BLOCKS["full"], PLAIN[1], BLOCKS["groups"], BLOCKS["raw"]]
    seen = []

    class Looking(BlockTridiagonal):
        def check_layers(self, layers: Sequence[Block]) -> None:
            seen.append([block.name for block in layers])

        def factorise(self, moments: Moments) -> Any:
            seen.append(([block.name for block in moments.layers], moments.pairs))
            return super().factorise(moments)

    found = Preconditioner(Looking(), blocks, LIKE, 0.95, [(0, 2), (0, 1), (2, 3)])
    found.update([samples(block) for block in blocks])
    ((_, inverse),), _ = found.refresh([GAMMA], pi="layer")
    assert seen == [["a", "b"], (["a", "b"], [(0, 1)])]
    assert len(found.moments[InputCross]) == 1
    assert float(inverse.dense()[12:17, :12].abs().max()) == 0  # norms stand alone


def test_only_neighbours_are_coupled_unless_told_otherwise() -> None:
    moments = Joined(BlockTridiagonal(), [*PLAIN, BLOCKS["full"], Block("c", 2, 3, False)]).start(LIKE)
    assert isinstance(moments, JoinedMoments)
    assert moments.each[0].pairs == [(0, 1)]  # b and c do not follow each other


def test_a_net_without_a_block_for_the_approximation() -> None:
    blocks = [BLOCKS["full"], BLOCKS["raw"]]
    found = Preconditioner(BlockTridiagonal(), blocks, LIKE, 0.95)
    found.update([samples(block) for block in blocks])
    ((_, inverse),), _ = found.refresh([GAMMA], pi="net")
    found.use(inverse)
    v = [dense.randn(*block.shape) for block in blocks]
    assert all(dense.relative(a, b) < 1e-12 for a, b in zip(inverse.multiply(found.solve(v)), v, strict=True))


def test_diagonal_serves_every_kind() -> None:
    blocks = list(BLOCKS.values())
    moments = Joined(Diagonal(), blocks).start(LIKE)
    assert type(moments) is Moments
    s = [samples(block) for block in blocks]
    moments.update(s, 0.9)
    for block, value, x in zip(blocks, moments[DiagonalMoment], s, strict=True):
        if block.kind == "diagonal":
            wanted = x.gradients.square().sum((0, 1)).reshape(1, -1) / x.cases
        else:
            wanted = case_gradients(block, x).square().sum((0, 1)) / x.cases
        assert dense.relative(value, wanted) < 1e-12


def test_gradients_of_cases_are_sums_over_their_rows() -> None:
    for name in ("plain", "groups", "embedding", "tied"):
        block, s = BLOCKS[name], samples(BLOCKS[name])
        found = case_gradients(block, s)
        assert found.shape == (2, s.cases, *block.shape)
        k, n = 1, 3
        wanted = torch.zeros(block.groups, block.d_out, block.d_in, dtype=Float)
        for r in range(3 * n, 3 * n + 3):
            for group in range(block.groups):
                if name == "tied":
                    assert s.head is not None
                    wanted[0] += torch.outer(s.head.gradients[k, r], s.head.inputs[r])
                    wanted[0, s.inputs[r]] += s.gradients[k, r]
                elif name == "embedding":
                    wanted[0, :, s.inputs[r]] += s.gradients[k, r]
                else:
                    g, x = (
                        t.reshape(*t.shape[:-1], 1, -1) if block.groups == 1 else t for t in (s.gradients, s.inputs)
                    )
                    wanted[group] += torch.outer(g[k, r, group], x[r, group])
        assert dense.relative(found[k, n].reshape(wanted.shape), wanted) < 1e-13


def test_exact_serves_what_has_gradients_of_cases() -> None:
    names = ["plain", "groups", "embedding", "full", "channels", "tied", "raw"]
    blocks = [BLOCKS[name] for name in names]
    joint = Joined(Exact(), blocks)
    moments = joint.start(LIKE)
    s = [samples(block) for block in blocks]
    moments.update(s, 0.9)
    rows = [case_gradients(block, x).mT.flatten(2).flatten(0, 1) for block, x in zip(blocks[:-1], s[:-1], strict=True)]
    wanted = torch.cat(rows, 1).T @ torch.cat(rows, 1) / 5
    assert dense.relative(moments[DenseMoment][0], wanted) < 1e-12
    inverse = joint.damped(joint.factorise(moments), GAMMA, "layer")
    damped = wanted + 0.09 * torch.eye(len(wanted), dtype=Float)
    assert dense.relative(inverse.dense()[: len(wanted), : len(wanted)], torch.linalg.inv(damped)) < 1e-9
    v = [dense.randn(*block.shape) for block in blocks]
    assert all(dense.relative(a, b) < 1e-9 for a, b in zip(inverse.multiply(inverse.solve(v)), v, strict=True))


def test_exact_says_which_rows_belong_to_no_case() -> None:
    moments = Joined(Exact(), PLAIN).start(LIKE)
    with pytest.raises(UnsupportedModelError, match=r"^a: its rows do not belong to examples"):
        moments.update([replace(samples(block), positions=None, total=5) for block in PLAIN], 0.9)


def test_a_state_of_other_blocks_is_refused() -> None:
    mixed, alone = [PLAIN[0], BLOCKS["full"]], PLAIN[:1]
    states = {}
    for name, blocks in (("mixed", mixed), ("alone", alone), ("other", PLAIN[1:])):
        moments = Joined(BlockDiagonal(), blocks).start(LIKE)
        moments.update([samples(block) for block in blocks], 0.9)
        states[name] = moments.state_dict()
    with pytest.raises(ConfigError, match="are of 1 kinds of blocks, this model has 2: a, full are served apart"):
        Joined(BlockDiagonal(), mixed).start(LIKE).load_state_dict(states["alone"])
    with pytest.raises(ConfigError, match="those of several kinds of blocks; this approximation needs InputFactor"):
        Joined(BlockDiagonal(), alone).start(LIKE).load_state_dict(states["mixed"])
    with pytest.raises(ConfigError, match=r"OutputFactor have the shapes \[\(2, 2\)\], this model's have \[\(3, 3\)\]"):
        Joined(BlockDiagonal(), alone).start(LIKE).load_state_dict(states["other"])
    del states["alone"]["counts"]
    with pytest.raises(ConfigError, match="earlier version"):
        Joined(BlockDiagonal(), alone).start(LIKE).load_state_dict(states["alone"])


# --- faults -------------------------------------------------------------------------------------------------------


class Wrong(Inverse):
    """Solves as it was told to."""

    def __init__(self, layers: Sequence[Block], solve: Any) -> None:
        self.layers, self._solve = layers, solve

    def solve(self, blocks: Sequence[Tensor]) -> list[Tensor]:
        return self._solve(blocks)

    def multiply(self, blocks: Sequence[Tensor]) -> list[Tensor]:
        return list(blocks)

    def state_dict(self) -> dict[str, Any]:
        return {}

    def _like(self) -> Tensor:
        return LIKE


def preconditioner(solve: Any = None, factorise: Any = None, blocks: Sequence[Block] = PLAIN) -> Preconditioner:
    class Faulty(BlockDiagonal):
        def factorise(self, moments: Moments) -> Any:
            if factorise is not None:
                factorise()
            real = super().factorise(moments)
            real.damped = lambda gamma, pi="layer": Wrong(moments.layers, solve)  # type: ignore[method-assign]
            return real

        def load_inverse(self, state: Mapping[str, Any], layers: Sequence[Block]) -> Any:
            return Wrong(layers, solve)

    approx: Approximation = Faulty()
    found = Preconditioner(approx, blocks, LIKE, 0.95)
    found.update([samples(block) for block in blocks])
    return found


def broken() -> None:
    raise ZeroDivisionError("division by zero")


FAULTS = {
    "factorise": (
        None,
        broken,
        PluginError,
        r"approx 'blockdiag' \(.*Faulty\): factorise failed on the blocks a, b: Zero",
    ),
    "solve": (lambda v: v[5], None, PluginError, r"approx 'blockdiag' \(.*Faulty\): solve failed .*IndexError"),
    "number": (lambda v: v[:1], None, PluginError, r"Faulty\): solve returned 1 tensors for 2 blocks"),
    "shape": (lambda v: [v[0], v[1].T], None, PluginError, r"returned \(4, 2\), .* for the block b, which is \(2, 4\)"),
    "dtype": (lambda v: [v[0].float(), v[1]], None, PluginError, r"returned \(3, 4\), torch.float32 for the block a"),
    "NaN": (lambda v: [v[0], v[1] * torch.nan], None, NumericalError, r"^b: approx 'blockdiag' \(.*\) made NaN or inf"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_name_the_component_and_the_block(fault: str) -> None:
    solve, factorise, kind, message = FAULTS[fault]
    with pytest.raises(kind, match=message):
        preconditioner(solve, factorise).refresh([GAMMA], pi="layer")


def test_a_solution_can_be_looked_into_later() -> None:
    found = preconditioner(lambda v: list(v), blocks=[*PLAIN, BLOCKS["full"]])
    ((_, inverse),), _ = found.refresh([GAMMA], pi="layer")
    v = [dense.randn(*block.shape) for block in found.layers]
    solved = inverse.solve(v)
    found.examine(solved, v)
    solved[2][0, 0] = torch.inf
    with pytest.raises(NumericalError, match=r"^full: built-in curvature made NaN or infinity"):
        found.examine(solved, v)
    v[2][0, 0] = torch.nan  # then it is the gradient's fault, which others report
    found.examine(solved, v)


def test_lack_of_memory_stays_what_it_is() -> None:
    def full() -> None:
        raise MemoryError

    with pytest.raises(MemoryError):
        preconditioner(None, full).refresh([GAMMA], pi="layer")
