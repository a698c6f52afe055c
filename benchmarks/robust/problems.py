"""All problems by name, and the choice among them. Nobody tuned for them; more are kept aside."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from benchmarks.robust.autoencoders import AUTOENCODERS
from benchmarks.robust.classifiers import CLASSIFIERS
from benchmarks.robust.inputs import INPUTS
from benchmarks.robust.nets import NETS
from benchmarks.robust.regressions import REGRESSIONS
from benchmarks.robust.task import Problem

__all__ = ["KINDS", "PROBLEMS", "QUICK", "choose"]

PROBLEMS: dict[str, Problem] = {
    problem.name: problem for problem in (*CLASSIFIERS, *REGRESSIONS, *INPUTS, *NETS, *AUTOENCODERS)
}
"""In the order in which they are run."""

KINDS = list(dict.fromkeys(problem.kind for problem in PROBLEMS.values()))

QUICK = [
    "digits-tanh",
    "moons",
    "wine",
    "cancer-bernoulli",
    "targets-x100",
    "eight-scales",
    "units-relu",
    "digits-autoencoder",
]
"""One of each sort, all small."""


def choose(names: Sequence[str] | None) -> list[Problem]:
    """The problems of these names and kinds; all if nothing is named.

    Raises:
        ValueError: A name is neither a problem nor a kind.
    """
    if not names:
        return list(PROBLEMS.values())
    unknown = [name for name in names if name not in PROBLEMS and name not in KINDS]
    if unknown:
        raise ValueError(f"no problem or kind is called {_listed(unknown)}; the kinds are {_listed(KINDS)}")
    return [problem for problem in PROBLEMS.values() if problem.name in names or problem.kind in names]


def _listed(names: Iterable[str]) -> str:
    return ", ".join(f"'{name}'" for name in names)
