"""From a configuration to files: what `kfac inspect` does besides parsing and printing."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from kfacore.lab.diagnostics.dense import block_average
from kfacore.lab.diagnostics.inspection import Inspection, inspect_subject
from kfacore.lab.diagnostics.paper import CASES, paper_figure
from kfacore.lab.diagnostics.pictures import draw_fisher, draw_inverse, draw_quality
from kfacore.lab.diagnostics.subject import subject_at_start, subject_of_run
from kfacore.lab.training.figures import save_figure
from kfacore.lab.training.files import disk_errors, write_json

if TYPE_CHECKING:
    from kfacore.lab.config.run import RunConfig
    from kfacore.registry import Registry

__all__ = ["run_figure", "run_inspection"]

Say = Callable[[str], None]


def run_inspection(
    config: RunConfig,
    registry: Registry,
    *,
    run: Path | None = None,
    approximations: Sequence[str],
    cases: int,
    layers: tuple[int, int] | None = None,
    gamma: float | None = None,
    lam: float | None = None,
    out: Path,
    say: Say = lambda _: None,
) -> tuple[Inspection, list[Path]]:
    """Inspect a problem at its initialisation or a run, and write ``inspect.json`` and the pictures.

    Args:
        config: The configuration, of the run if there is one.
        registry: Where the components are.
        run: A run folder with a checkpoint.
        approximations: Names of what to measure.
        cases: Training cases of the exact Fisher.
        layers: First and last layer of the dense matrices.
        gamma: gamma instead of the found one.
        lam: lambda instead of the found one.
        out: Folder of the files; files of an earlier inspection are replaced.
        say: Told what is going on.

    Returns:
        What was measured, and the files.

    Raises:
        KfacError: Whatever is wrong with the configuration, the run or the data; or the disk refused.
    """
    _prepare(config, out)
    say("loading the data and the model")
    if run is None:
        subject = subject_at_start(config, registry, cases=cases, lam=lam, gamma=gamma)
    else:
        subject = subject_of_run(run, config, registry, cases=cases, lam=lam, gamma=gamma)
    built = {name: registry.build("approx", name) for name in approximations}
    if config.approx is not None and config.approx.kind in built:
        built[config.approx.kind] = registry.build("approx", config.approx)  # with the options of the configuration
    result = inspect_subject(subject, registry, built, layers=layers, say=say)
    files = [out / "inspect.json"]
    with disk_errors(files[0]):
        write_json(files[0], result.as_dict())
    title = subject.name
    files.append(save_figure(draw_quality(result.quality, subject.gamma, title), out / "quality.png"))
    if result.dense is not None and result.dense.tilde is not None:
        averages = block_average(result.dense.F_tilde_inverse, result.dense.sizes)
        files.append(save_figure(draw_fisher(result.dense, title), out / "fisher.png"))
        files.append(save_figure(draw_inverse(result.dense, averages, title), out / "inverse.png"))
    return result, files


def run_figure(
    name: str, config: RunConfig, registry: Registry, *, cases: int | None, out: Path, say: Say = lambda _: None
) -> tuple[dict[str, Any], list[Path]]:
    """Reproduce a figure of the paper: ``NAME.png`` and ``NAME.json``.

    Args:
        name: ``"figure1"`` and so on.
        config: A configuration of the problem ``mnist16-classifier``.
        registry: Where the components are.
        cases: Training cases of the expectations; `kfacore.lab.diagnostics.paper.CASES` if left out.
        out: Folder of the files.
        say: Told what is going on.

    Returns:
        The numbers, and the files.

    Raises:
        KfacError: There is no such figure, the data is missing, training failed, or the disk refused.
    """
    _prepare(config, out)
    made = paper_figure(name, config, registry, cases=cases or CASES, say=say)
    picture, numbers = out / f"{name}.png", out / f"{name}.json"
    save_figure(made.figure, picture)
    with disk_errors(numbers):
        write_json(numbers, made.numbers)
    return made.numbers, [picture, numbers]


def _prepare(config: RunConfig, out: Path) -> None:
    """Set the threads, and find out that nothing can be written before anything is computed."""
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    with disk_errors(out):
        out.mkdir(parents=True, exist_ok=True)
