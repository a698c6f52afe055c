"""Forests of pairs: which are chosen, the order of elimination, and what neighbours tell about each other."""

from __future__ import annotations

from itertools import combinations

import dense
import pytest
import torch

from kfacore.curvature.forest import forest, leaves_first, mutual_information, nearest
from kfacore.errors import ConfigError


def is_forest(count: int, pairs: list[tuple[int, int]]) -> bool:
    groups = list(range(count))
    for i, j in pairs:
        if groups[i] == groups[j]:
            return False
        groups = [groups[i] if g == groups[j] else g for g in groups]
    return True


def test_the_heaviest_of_all_forests() -> None:
    pairs = list(combinations(range(5), 2))
    for seed in range(5):
        weights = dense.randn(len(pairs), seed=seed).tolist()
        chosen = forest(pairs, weights)
        best = max(
            sum(weights[k] for k in range(len(pairs)) if mask >> k & 1)
            for mask in range(1 << len(pairs))
            if is_forest(5, [pairs[k] for k in range(len(pairs)) if mask >> k & 1])
        )
        assert is_forest(5, chosen)
        assert sum(weights[pairs.index(pair)] for pair in chosen) == pytest.approx(best, rel=1e-12)
        assert chosen == sorted(chosen)  # in the order in which they were given


def test_equal_weights_take_the_earlier_pair_and_nothing_is_worth_nothing() -> None:
    assert forest([(0, 1), (1, 2), (2, 0)], [1.0, 1.0, 1.0]) == [(0, 1), (1, 2)]
    assert forest([(0, 1), (1, 2)], [0.0, -1.0]) == []
    assert forest([], []) == []


def test_every_node_comes_before_its_parent() -> None:
    pairs = [(0, 3), (4, 3), (1, 4), (5, 6)]
    order = leaves_first(7, pairs)
    place = {step.node: k for k, step in enumerate(order)}
    assert sorted(place) == list(range(7))
    for step in order:
        if step.pair is None:
            assert step.parent == step.node
            continue
        assert place[step.parent] > place[step.node]
        assert pairs[step.pair] == ((step.node, step.parent) if step.down else (step.parent, step.node))
    assert {step.node for step in order if step.pair is None} == {2, 4, 6}
    assert [step.node for step in leaves_first(4, [(0, 1), (1, 2), (2, 3)])] == [0, 1, 2, 3]


@pytest.mark.parametrize("pairs", [[(0, 1), (1, 2), (2, 0)], [(0, 1), (0, 1)], [(0, 1), (1, 0)]])
def test_circles_are_refused(pairs: list[tuple[int, int]]) -> None:
    with pytest.raises(ConfigError, match="are no forest"):
        leaves_first(3, pairs)


def test_mutual_information_is_that_of_the_gaussian_pair() -> None:
    """1/2 (log det of the blocks - log det of both together), for covariances that are Kronecker products."""

    def joint(d: int, seed: int) -> torch.Tensor:
        X = dense.randn(40, 2 * d, seed=seed)
        return X.T @ X / len(X) + 0.2 * torch.ones(2 * d, 2 * d, dtype=X.dtype)

    A, G = joint(3, 0), joint(2, 1)

    def block(i: int, j: int) -> torch.Tensor:
        return torch.kron(A[3 * i : 3 * i + 3, 3 * j : 3 * j + 3], G[2 * i : 2 * i + 2, 2 * j : 2 * j + 2])

    whole = torch.cat([torch.cat([block(i, j) for j in (0, 1)], 1) for i in (0, 1)])
    wanted = 0.5 * (block(0, 0).logdet() + block(1, 1).logdet() - whole.logdet())
    s = []
    for X, d in ((G, 2), (A, 3)):
        product = torch.linalg.inv(X[:d, :d]) @ X[:d, d:] @ torch.linalg.inv(X[d:, d:]) @ X[d:, :d]
        s.append(torch.linalg.eigvals(product).real)
    assert float(mutual_information(*s)) == pytest.approx(float(wanted), rel=1e-10)


def test_the_nearest_pairs_in_execution_order() -> None:
    assert nearest(None) is None
    assert nearest([(0, 1), (0, 2), (1, 2), (0, 3), (2, 3)]) == [(0, 1), (1, 2), (2, 3)]
    assert nearest([(0, 2), (0, 3), (2, 3), (1, 3)]) == [(0, 2), (2, 3), (1, 3)]
