"""What a generated plug-in can be: one kind a slot, with its words and its templates. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass

from kfacore.errors import ConfigError, nearest

__all__ = ["KINDS", "Kind", "kind_of"]


@dataclass(frozen=True)
class Kind:
    """The part of a generated plug-in that depends on its slot.

    Attributes:
        what: What such a component is called in sentences.
        role: Name of the class in `kfacore.roles`, the end of the generated class's name.
        summary: What the generated component does, one sentence.
        options: Lines of its config model after ``kind``.
        use: How a run uses it: arguments of ``kfac train`` with ``NAME`` for its name.
        defaults: Lines of its config model before ``kind``.
    """

    what: str
    role: str
    summary: str
    options: str
    use: str
    defaults: str = ""


KINDS: dict[str, Kind] = {
    "approx": Kind("approximation", "Approximation", "", "", "--approx NAME"),
    "damping": Kind(
        "damping strategy",
        "Damping",
        "Lambda is raised or lowered by a factor, as the reduction ratio says.",
        "    lambda0: float = 1.0\n"
        '    """First lambda."""\n'
        "    factor: float = 1.5\n"
        '    """What lambda is multiplied or divided by."""\n',
        "--damping NAME",
    ),
    "momentum": Kind(
        "momentum rule",
        "Momentum",
        "A share of the way to the minimum of the quadratic model, without momentum.",
        '    share: float = 1.0\n    """Share of the way to the minimum."""\n',
        "--momentum NAME",
    ),
    "layer": Kind(
        "layer type",
        "Layer",
        "Linear layers with a fixed gain, y = gain W x + b: one block.",
        "",
        "MINE.py:FUNCTION",
    ),
    "likelihood": Kind(
        "likelihood",
        "Likelihood",
        "Real outputs with one known spread, y ~ N(z, sigma^2).",
        '    sigma: float = 1.0\n    """Standard deviation of the outputs."""\n',
        "--problem npz --set problem.file=MINE.npz --set likelihood=NAME",
    ),
    "estimator": Kind(
        "estimator",
        "Estimator",
        "The Fisher's statistics from several sampled targets a case.",
        '    passes: int = 2\n    """Sampled targets a case, a backward pass each."""\n',
        "--set estimator=NAME",
    ),
    "problem": Kind(
        "problem",
        "Problem",
        "Noisy values of a smooth function of four numbers.",
        '    width: int = 20\n    """Units of each hidden layer."""\n',
        "--problem NAME",
        '\n    run_defaults: ClassVar[dict[str, Any]] = {"likelihood": {"kind": "gaussian"}}\n',
    ),
    "sink": Kind(
        "sink",
        "Sink",
        "The numbers of every step as comma-separated values.",
        '    file: str = "steps.csv"\n    """Name of the file in the run folder."""\n',
        "--set sink=NAME",
    ),
}
"""The kinds by slot."""


def kind_of(slot: str) -> Kind:
    """The kind of a slot.

    Raises:
        ConfigError: There is no template for it.
    """
    if slot not in KINDS:
        raise ConfigError(f"--slot {slot}: there is no template for it; {nearest(slot, KINDS)}")
    return KINDS[slot]
