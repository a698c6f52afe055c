"""Factors of twenty nets from the layer types' rows, against values made of per-case Jacobians by plain loops.

``golden_layers.npz`` holds, for every net, its parameters, a mini-batch, and block by block the factors A and G of the
Fisher (exact, and for one draw of targets), its exact diagonal block, and F of norms. Only the Kronecker product of A
and G is determined.
"""

from __future__ import annotations

from functools import cache

import pytest
import torch
from golden_nets import NETS, golden, golden_model
from layer_rows import Seen, exact_vectors, passes, watch
from torch import Tensor

from kfac_plugins.likelihoods.categorical import Categorical
from kfac_plugins.likelihoods.gaussian import Gaussian
from kfacore.roles import Likelihood

TOLERANCE = 1e-9


class Run:
    """A net of the file, its uses, and both kinds of backward passes."""

    def __init__(self, name: str) -> None:
        self.case = golden()[name]
        self.model = golden_model(name)
        self.z, self.seen = watch(self.model, lambda: self.model(self.case["x0"]))
        self.valid: Tensor | None = self.case.get("mask")
        self.S = float(self.case["S"])
        self.likelihood: Likelihood = {"categorical": Categorical, "gaussian": Gaussian}[self.case["likelihood"]]()

    @property
    def exact(self) -> dict[str, Tensor]:
        return passes(self.seen, self.z, exact_vectors(self.likelihood, self.z, self.valid))

    @property
    def drawn(self) -> dict[str, Tensor]:
        z, y = self.z.detach(), self.case["y_drawn"]
        flat = self.likelihood.residual(z.flatten(0, -2), y.flatten(0, len(z.shape) - 2)).view_as(z)
        if self.valid is not None:
            flat = flat * self.valid[..., None]
        return passes(self.seen, self.z, flat[None])


@cache
def run_of(name: str) -> Run:
    return Run(name)


def relative(found: Tensor, wanted: Tensor) -> float:
    return float((found - wanted).norm() / wanted.norm())


def factors(seen: Seen, gradients: Tensor, valid: Tensor | None, S: float, reduce: bool) -> tuple[Tensor, Tensor]:
    """A (groups, d_in, d_in) and G (groups, d_out, d_out)."""
    X, counts = seen.rows(valid)
    g = gradients * counts[..., None, None]
    total = counts.sum()
    if reduce:
        X, g, total = X.mean(1, keepdim=True), g.sum(2, keepdim=True), torch.tensor(len(X))
    return torch.einsum("nrgi,nrgj->gij", X, X) / total, torch.einsum("knrgi,knrgj->gij", g, g) / S


def check_product(A: Tensor, G: Tensor, wanted_A: Tensor, wanted_G: Tensor) -> None:
    assert A.shape == wanted_A.shape
    assert G.shape == wanted_G.shape
    for parts in zip(A, G, wanted_A, wanted_G, strict=True):
        a, g, wanted_a, wanted_g = parts
        assert relative(torch.kron(g, a), torch.kron(wanted_g, wanted_a)) < TOLERANCE


def blocks_of(name: str) -> list[str]:
    kinds = {k.split("/")[1]: v for k, v in golden()[name].items() if k.startswith("block/") and k.endswith("/kind")}
    return [block for block, kind in kinds.items() if kind != "diagonal"]  # raw parameters belong to no layer


ALL = [(name, block) for name in NETS for block in blocks_of(name)]


def test_every_net_of_the_file_is_here() -> None:
    assert set(golden()) == set(NETS)
    assert len(NETS) == 20


@pytest.mark.parametrize("name", NETS)
def test_the_net_is_that_of_the_file(name: str) -> None:
    run = run_of(name)
    assert relative(run.z.detach(), run.case["z"]) < 1e-12
    found = {block for block, seen in run.seen.items() if seen.uses} - ({"head"} if name.startswith("tied") else set())
    assert found == set(blocks_of(name))


@pytest.mark.parametrize(("name", "block"), ALL, ids=[f"{n}/{b}" for n, b in ALL])
def test_factors(name: str, block: str) -> None:
    run = run_of(name)
    kind, seen = run.case[f"block/{block}/kind"], run.seen[block]
    for gradients, end in ((run.exact, ""), (run.drawn, "_drawn")):
        want = {k.rpartition("/")[2]: v for k, v in run.case.items() if k.startswith(f"block/{block}/")}
        if kind == "full":
            g = gradients[block].sum((2, 3)).flatten(0, 1)
            assert relative(g.T @ g / run.S, want[f"F{end}"]) < TOLERANCE
        elif kind == "tied":
            head = factors(run.seen["head"], gradients["head"], run.valid, run.S, reduce=False)
            check_product(*head, want["A"], want[f"G{end}"])
            embedding = factors(seen, gradients[block], run.valid, run.S, reduce=False)
            check_product(*embedding, want["A_emb"], want[f"G_emb{end}"])
        else:
            A, G = factors(seen, gradients[block], run.valid, run.S, reduce=kind.endswith("reduce"))
            check_product(A, G, want["A"], want[f"G{end}"])


@pytest.mark.parametrize(("name", "block"), ALL, ids=[f"{n}/{b}" for n, b in ALL])
def test_the_exact_block_of_the_fisher(name: str, block: str) -> None:
    """(1 / S) sum over cases, positions and terms of the case's gradient, which is the sum over rows of g abar^T."""
    run = run_of(name)
    seen = run.seen[block]
    if seen.block.kind == "full" or name.startswith("tied"):
        return
    X, counts = seen.rows(run.valid)
    g = run.exact[block] * counts[..., None, None]
    rows = torch.einsum("knrgo,nrgi->kgoi", g, X)  # one case a pass
    for group in range(seen.block.groups):
        each = rows[:, group].flatten(1)
        F = each.T @ each / run.S
        i, j = torch.tril_indices(len(F), len(F))
        assert relative(F[i, j], run.case[f"block/{block}/fisher{group}"]) < TOLERANCE
