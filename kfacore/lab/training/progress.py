"""What a run remembers of its steps and evaluations: losses, undone steps, lambda; and what it says of a failure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from kfacore.errors import NumericalError
from kfacore.lab.training.checkpoint import load_best
from kfacore.lab.training.outcome import Losses, remedy
from kfacore.lab.training.run import RunFolder

__all__ = ["Progress"]


@dataclass
class Progress:
    """What the steps and evaluations of a run have shown, kept in its checkpoints.

    Attributes:
        losses: First, best and last training loss.
        rejected: Steps that were undone.
        first_lambda: lambda of the first step, None before it or where the optimizer has none.
        last_lambda: lambda of the last step of this life.
        gamma: gamma of the last step of this life.
    """

    losses: Losses = field(default_factory=Losses)
    rejected: int = 0
    first_lambda: float | None = None
    last_lambda: float | None = None
    gamma: float | None = None

    @classmethod
    def of(cls, state: Mapping[str, Any], folder: RunFolder) -> Progress:
        """What a checkpoint knows, and what the best checkpoint holds.

        A run that was killed may have written the best checkpoint after the last one; it takes the same steps again,
        but perhaps with other evaluations.

        Args:
            state: What `as_dict` returned; empty in checkpoints of versions that did not keep it.
            folder: The run.

        Raises:
            DataError: The best checkpoint is damaged.
        """
        losses = Losses.from_dict(state.get("losses", {}))
        if folder.best_file.exists():
            best = load_best(folder.best_file)
            if losses.best is None or best.train_loss < losses.best:
                losses = replace(losses, best=best.train_loss, best_step=best.step)
        return cls(losses, int(state.get("rejected", 0)), state.get("first_lambda"))

    def as_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps, JSON types."""
        return {"losses": self.losses.as_dict(), "rejected": self.rejected, "first_lambda": self.first_lambda}

    def take(self, scalars: Mapping[str, float | None], *, rejected: bool) -> None:
        """Take in a step."""
        self.rejected += rejected
        self.last_lambda, self.gamma = scalars["lam"], scalars["gamma"]
        if self.first_lambda is None:
            self.first_lambda = self.last_lambda

    def measure(self, step: int, loss: float) -> bool:
        """Take in an evaluation.

        Args:
            step: Steps taken.
            loss: The training loss found.

        Returns:
            Whether it is the best one so far, and after a step: the start can be made again from the seed.
        """
        self.losses = self.losses.after(step, loss)
        return self.losses.best_step == step > 0

    def advice(self, options: Mapping[str, Any]) -> str:
        """What to try after a run that fell apart; the run's configuration says which options there are."""
        return remedy(options, (self.first_lambda, self.last_lambda), self.gamma)

    def explain(
        self, error: NumericalError, step: int, saved: int | None, folder: RunFolder, options: Mapping[str, Any]
    ) -> NumericalError:
        """A numerical failure with where it happened, what to try, and what is saved.

        Args:
            error: The failure.
            step: Steps that had been taken.
            saved: The step of the last checkpoint, None if there is none.
            folder: The run.
            options: The run's configuration.
        """
        message = str(error).rstrip(".")
        if "step" not in message:  # a part that does not know where it is
            message = f"step {step + 1}: {message}"
        if "--set" not in message:
            message = f"{message}; try {self.advice(options)}"
            if step <= 1:
                message = f"{message}, and look at the data and the initial parameters"
        if saved is not None:
            message = f"{message}; the checkpoint of step {saved} is kept in {folder.path}"
        if folder.best_file.exists() and self.losses.best is not None:
            message = (
                f"{message}, the parameters with the smallest training loss ({self.losses.best:.4g}, step "
                f"{self.losses.best_step}) in {folder.best_file}"
            )
        return NumericalError(message)
