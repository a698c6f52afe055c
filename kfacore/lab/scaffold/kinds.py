"""What a generated plug-in can be: one kind a slot, with its words and its templates. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass

from kfacore.errors import ConfigError, nearest
from kfacore.schema.table import flag_of

__all__ = ["KINDS", "Kind", "command_of", "kind_of"]


@dataclass(frozen=True)
class Kind:
    """The part of a generated plug-in that depends on its slot, besides what `kfacore.schema.table.Slot` knows.

    Attributes:
        summary: What the generated component does, one sentence.
        options: Lines of its config model after ``kind``.
        command: The command that uses it, with ``NAME`` for its name; by default a run that chooses it.
        defaults: Lines of its config model before ``kind``.
    """

    summary: str
    options: str = ""
    command: str = ""
    defaults: str = ""


KINDS: dict[str, Kind] = {
    "approx": Kind(""),  # its templates are its own, and say more
    "damping": Kind(
        "Lambda is raised or lowered by a factor, as the reduction ratio says.",
        "    lambda0: float = 1.0\n"
        '    """First lambda."""\n'
        "    factor: float = 1.5\n"
        '    """What lambda is multiplied or divided by."""\n',
    ),
    "momentum": Kind(
        "A share of the way to the minimum of the quadratic model, without momentum.",
        '    share: float = 1.0\n    """Share of the way to the minimum."""\n',
    ),
    "trust": Kind(
        "Steps that raise the objective by more than a share of it are undone.",
        "    share: float = 0.1\n"
        '    """Rise of the objective, as a share of it, up to which a step is kept."""\n'
        "    settling: int = 10\n"
        '    """Steps at the start in which each step is asked about."""\n',
    ),
    "layer": Kind(
        "Linear maps whose weight is stored (inputs, outputs): one Kronecker block.",
        command="kfac train MINE.py:FUNCTION --steps 100    # whose model has the module; every layer type is asked",
    ),
    "likelihood": Kind(
        "Real outputs with one known spread, y ~ N(z, sigma^2).",
        '    sigma: float = 1.0\n    """Standard deviation of the outputs."""\n',
        command="kfac train --problem npz --set problem.file=MINE.npz --set likelihood=NAME --steps 100",
    ),
    "estimator": Kind(
        "The Fisher's statistics from several sampled targets an example.",
        '    passes: int = 2\n    """Sampled targets an example, a backward pass each."""\n',
    ),
    "problem": Kind(
        "Noisy values of a smooth function of four numbers.",
        '    width: int = 20\n    """Units of each hidden layer."""\n',
        defaults='\n    run_defaults: ClassVar[dict[str, Any]] = {"likelihood": {"kind": "gaussian"}}\n',
    ),
    "optimizer": Kind(
        "Gradient descent with heavy-ball momentum.",
        '    lr: float = 0.05\n    """Learning rate."""\n    mu: float = 0.9\n    """Momentum."""\n',
    ),
    "sink": Kind(
        "The numbers of every step as comma-separated values.",
        '    file: str = "steps.csv"\n    """Name of the file in the run folder."""\n',
    ),
    "executor": Kind(
        "A process for each run on this machine, at a chosen niceness.",
        '    niceness: int = 0\n    """How much other programs go first, from 0 to 19."""\n',
        command="kfac study run STUDY.toml --executor NAME",
    ),
}
"""The kinds by slot: every slot has one."""


def kind_of(slot: str) -> Kind:
    """The kind of a slot.

    Raises:
        ConfigError: There is no such slot.
    """
    if slot not in KINDS:
        raise ConfigError(f"--slot {slot}: there is no template for it; {nearest(slot, KINDS)}")
    return KINDS[slot]


def command_of(slot: str, name: str) -> str:
    """The command that uses a component of a slot, ready to paste."""
    return (KINDS[slot].command or f"kfac train {flag_of(slot)} --steps 100").replace("NAME", name)
