"""Config model of the problem that a user's own Python function returns, and its manifest. Imports no torch."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

from pydantic import Field

from kfacore.plugin import Component, ProblemConfig, Suggestions

if TYPE_CHECKING:
    from kfac_plugins.problems.user_answer import Answer

__all__ = ["COMPONENTS", "PythonConfig"]


class PythonConfig(ProblemConfig):
    """Model, data and likelihood from a function of your own, without a plug-in."""

    run_defaults: ClassVar[dict[str, Any]] = {"likelihood": {"kind": "gaussian"}}

    kind: Literal["python"] = "python"
    """Name of the implementation."""
    target: str = ""
    """The function, module:function or folder/file.py:function. It returns a table (or tuple) of model, data and
    likelihood, or a kfacore.roles.Problem."""
    folder: str | None = None
    """Folder from which the module is imported; by default the working folder."""
    arguments: dict[str, Any] = Field(default_factory=dict)
    """Arguments of the function, by name."""

    def suggestions(self) -> Suggestions:
        """The likelihood that the function returns, or that its targets suggest."""
        if not self.target:  # `load` says that it is missing
            return Suggestions(self.run_defaults)
        answer = self.answer()
        return Suggestions({"likelihood": dict(answer.likelihood)}, answer.reason)

    def answer(self) -> Answer:
        """What the function returns, read; it is called once however often this is asked for.

        Raises:
            KfacError: It cannot be called, or returns something else.
        """
        from kfac_plugins.problems.python_answer import answer_of

        there = self.located()
        return answer_of(there.target, there.folder, there.model_dump(mode="json")["arguments"])

    def located(self) -> Self:
        """With folder and file named from the root."""
        file, colon, function = self.target.rpartition(":")
        folder = Path(self.folder or "").expanduser()
        update = {"folder": str(folder.absolute())}
        if file.endswith(".py"):
            update["target"] = f"{(folder / Path(file).expanduser()).absolute()}{colon}{function}"
        return super().located().model_copy(update=update)


COMPONENTS = (
    Component(
        "problem",
        "python",
        PythonConfig,
        "kfac_plugins.problems.python:Python",
        "Your own function that returns model, data and likelihood.",
    ),
)
"""Manifests of this problem."""
