"""The command `kfac inspect`: how good each approximation is on a model, and the paper's figures of curvature."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kfac_cli.answers import heading, print_json, table
from kfacore.errors import ConfigError
from kfacore.registry import get_registry

if TYPE_CHECKING:
    from kfacore.lab.config.run import RunConfig
    from kfacore.lab.diagnostics.inspection import Inspection
    from kfacore.lab.diagnostics.quality import UpdateQuality

__all__ = ["register"]

_FIGURE = re.compile(r"figure\d+")
_FIGURES = ("figure1", "figure2", "figure5", "figure6", "figure7")
_PROBLEM_OF_FIGURES = "mnist16-classifier"


def _names(slot: str) -> Callable[[str], list[str]]:
    """Completion of the names in a slot."""

    def complete(incomplete: str) -> list[str]:
        return [c.name for c in get_registry().components(slot) if c.name.startswith(incomplete)]

    return complete


def inspect(
    target: Annotated[
        str | None,
        typer.Argument(metavar="RUN|FIGURE", help="A run folder, or figure1, figure2, figure5, figure6, figure7."),
    ] = None,
    problem: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="Problem to inspect at its initialisation: curves (default), ...; kfac list problem has all.",
            autocompletion=_names("problem"),
        ),
    ] = None,
    approx: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME",
            help="Approximation to measure; repeatable (default all of kfac list approx).",
            autocompletion=_names("approx"),
        ),
    ] = None,
    config: Annotated[
        list[Path] | None,
        typer.Option("--config", "-c", metavar="FILE", help="A TOML file of options; may be repeated."),
    ] = None,
    sets: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="One option, for example damping.lambda0=1.0; repeatable."),
    ] = None,
    preset: Annotated[
        str | None, typer.Option(metavar="NAME", help="Options by name: default, paper or heskes.")
    ] = None,
    seed: Annotated[int | None, typer.Option(metavar="N", help="Seed of the model and of the examples chosen.")] = None,
    data_dir: Annotated[Path | None, typer.Option(metavar="DIR", help="Folder of the problem's data files.")] = None,
    cases: Annotated[
        int | None,
        typer.Option(metavar="N", min=1, help="Training examples of the exact Fisher (default 1000, figures 5000)."),
    ] = None,
    layers: Annotated[
        str | None, typer.Option(metavar="FIRST-LAST", help="Layers of the dense matrices, counted from 1.")
    ] = None,
    gamma: Annotated[
        float | None, typer.Option(metavar="X", min=0.0, help="gamma instead of the run's or the damping's.")
    ] = None,
    lam: Annotated[
        float | None,
        typer.Option("--lambda", metavar="X", min=0.0, help="lambda instead of the run's or the damping's."),
    ] = None,
    threads: Annotated[int | None, typer.Option(metavar="N", help="Threads of the CPU computation.")] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR", help="Folder of inspect.json and the pictures (default inspect, in the run's folder)."
        ),
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print JSON on stdout.")] = False,
) -> None:
    """Measure how far approximations of the Fisher are from the exact one and from the exact natural gradient.

    At the initialisation of a problem, or on the checkpoint of a run. Tables on stdout, pictures in a folder.
    """
    flags: dict[str, Any] = {
        "problem": problem,
        "seed": seed,
        "threads": threads,
        "problem.data_dir": None if data_dir is None else str(data_dir),
    }
    if target is not None and _FIGURE.fullmatch(target) and not Path(target).exists():
        if target not in _FIGURES:
            raise ConfigError(f"unknown figure '{target}'; known: {', '.join(_FIGURES)}")
        refused = {"--approx": approx, "--layers": layers, "--gamma": gamma, "--lambda": lam}
        given = [name for name, value in refused.items() if value is not None]
        if given:
            raise ConfigError(f"{given[0]}: {target} is drawn as in the paper; leave {given[0]} out")
        _figure(target, _configure(flags, preset, config, sets, figure=True), cases=cases, out=out, json=json)
        return
    run = None if target is None else Path(target)
    run_config = _configure(flags, preset, config, sets, run=run)
    _inspect(
        run_config,
        run,
        approximations=approx,
        cases=cases,
        layers=_layers(layers),
        gamma=gamma,
        lam=lam,
        out=out,
        json=json,
    )


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command()(inspect)


def _configure(
    flags: Mapping[str, Any],
    preset: str | None,
    files: list[Path] | None,
    sets: list[str] | None,
    *,
    run: Path | None = None,
    figure: bool = False,
) -> RunConfig:
    """The configuration at initialisation, of the run, or of the net of the figures."""
    if run is not None:
        from kfacore.lab.training.resume import resume_config

        return resume_config(get_registry(), run, flags={**flags, "preset": preset}, sets=sets or [], files=files or [])
    from kfacore.lab.config.resolve import resolve

    if figure:
        if flags["problem"] not in (None, _PROBLEM_OF_FIGURES):
            raise ConfigError(
                f"--problem {flags['problem']}: the paper's figures are of {_PROBLEM_OF_FIGURES}; leave it out"
            )
        flags = {**flags, "problem": _PROBLEM_OF_FIGURES}
    return resolve(get_registry(), preset=preset, files=files or [], flags=flags, sets=sets or [])


def _layers(text: str | None) -> tuple[int, int] | None:
    """``2-5`` or ``3``."""
    if text is None:
        return None
    found = re.fullmatch(r"(\d{1,6})(?:-(\d{1,6}))?", text.strip())
    if found is None:
        raise ConfigError(f"--layers {text}: write the first and the last layer, for example 2-5")
    first = int(found[1])
    return first, int(found[2] or first)


def _say(message: str) -> None:
    typer.echo(message, err=True)


def _inspect(
    config: RunConfig,
    run: Path | None,
    *,
    approximations: list[str] | None,
    cases: int | None,
    layers: tuple[int, int] | None,
    gamma: float | None,
    lam: float | None,
    out: Path | None,
    json: bool,
) -> None:
    registry = get_registry()
    wanted = approximations or [component.name for component in registry.components("approx")]
    for name in wanted:
        registry.find("approx", name)  # a slip is answered before anything expensive
    out = out or (Path("inspect") if run is None else run / "inspect")
    from kfacore.lab.diagnostics.command import run_inspection

    result, files = run_inspection(
        config,
        registry,
        run=run,
        approximations=list(dict.fromkeys(wanted)),
        cases=cases or 1000,
        layers=layers,
        gamma=gamma,
        lam=lam,
        out=out,
        say=_say,
    )
    if json:
        print_json({**result.as_dict(), "files": [str(file) for file in files]})
        return
    typer.echo(_text(result))
    for file in files:
        typer.echo(str(file))


def _figure(name: str, config: RunConfig, *, cases: int | None, out: Path | None, json: bool) -> None:
    from kfacore.lab.diagnostics.command import run_figure

    numbers, files = run_figure(name, config, get_registry(), cases=cases, out=out or Path("inspect"), say=_say)
    if json:
        print_json({**numbers, "files": [str(file) for file in files]})
        return
    training = numbers["training"]
    typer.echo(heading(f"{name}: {numbers['what']}"))
    typer.echo(
        f"trained {training['steps']} steps to {100 * training['train_error']:.1f}% training error; "
        f"{numbers['cases']:,} examples, gamma {numbers['gamma']:.3g}"
    )
    if "errors" in numbers:
        typer.echo(table(_error_rows(numbers["errors"])))
    if "cumulants" in numbers:
        typer.echo(_cumulants(numbers["cumulants"]))
    if "block_averages_of_inverse" in numbers:
        typer.echo("mean absolute entry of each block of the inverse of F-tilde:")
        typer.echo(table([[_number(x) for x in row] for row in numbers["block_averages_of_inverse"]]))
    if "quality" in numbers:
        typer.echo(table(_quality_rows(numbers["quality"])))
    for file in files:
        typer.echo(str(file))


def _text(result: Inspection) -> str:
    """All tables."""
    exact, natural = result.subject.exact, result.natural
    lines = [
        heading(result.subject.name),
        f"  {exact.parameters:,} parameters in {len(exact.layers)} layers, {exact.cases:,} training examples",
        f"  lambda {_number(exact.lam)}, weight decay {_number(exact.weight_decay)}, "
        f"gamma {_number(result.subject.gamma)}; statistics: {result.statistics}",
        "",
        heading("exact natural gradient"),
        f"  {natural.iterations} iterations of conjugate gradients, relative residual {natural.residual:.1e}"
        f"{'' if natural.converged else ' (stopped before the tolerance)'}, damping {_number(natural.damping)}",
        f"  best decrease of the quadratic model {_number(natural.decrease)}",
        "",
        heading("updates, as shares of that decrease"),
        table(_quality_rows([row.as_dict() for row in result.at_gamma()])),
        "",
        "  best gamma of each, by the re-scaled decrease:",
        table(_quality_rows([_best(result.quality, name) for name in dict.fromkeys(r.approx for r in result.quality)])),
    ]
    if result.dense is not None:
        dense = result.dense.as_dict()
        last = dense["first_layer"] + len(dense["layers"]) - 1
        lines += [
            "",
            heading(f"dense matrices of layers {dense['first_layer']} to {last}, {dense['parameters']:,} parameters"),
            table(_error_rows(dense["errors"])),
            *(f"  {name}: {reason}" for name, reason in dense["refused"].items()),
        ]
        if dense["cumulants"] is not None:
            lines.append(_cumulants(dense["cumulants"]))
    if result.invariance:
        rows = [["approximation", "undamped, first step", "worst", "damped, first step", "worst", ""]]
        for report in result.invariance:
            note = f"{len(report.notices)} undamped factors are singular" if report.notices else ""
            rows.append(
                [
                    report.approx,
                    *(f"{x:.1e}" for x in (report.undamped.first, report.undamped.worst)),
                    *(f"{x:.1e}" for x in (report.damped.first, report.damped.worst)),
                    note,
                ]
            )
        lines += ["", heading("distance to a reparameterised net, as a share of the way travelled"), table(rows)]
    if result.failed:
        lines += ["", heading("failed"), *(f"  {name}: failed: {reason}" for name, reason in result.failed.items())]
    if result.skipped:
        lines += ["", heading("left out"), *(f"  {name}: {reason}" for name, reason in result.skipped.items())]
    return "\n".join([*lines, "", result.verdict(), ""])


def _best(rows: list[UpdateQuality], name: str) -> dict[str, Any]:
    return max((row for row in rows if row.approx == name), key=lambda row: row.rescaled).as_dict()


def _quality_rows(rows: list[dict[str, Any]]) -> list[list[str]]:
    header = ["approximation", "gamma", "cosine", "re-scaled", "as it is", "alpha", "h falls by", "as it is"]
    keys = ("cosine", "rescaled", "unscaled", "alpha", "improvement_rescaled", "improvement_unscaled")
    return [header, *([row["approx"], _number(row["gamma"]), *(_number(row[key]) for key in keys)] for row in rows)]


def _error_rows(errors: Mapping[str, Mapping[str, float | None]]) -> list[list[str]]:
    keys = ("frobenius", "spectral", "diagonal_blocks", "off_diagonal_blocks")
    header = ["relative error of", "Frobenius", "spectral", "diagonal blocks", "other blocks"]
    return [header, *([name, *(_number(error[key]) for key in keys)] for name, error in errors.items())]


def _cumulants(report: Mapping[str, float]) -> str:
    return (
        f"  sum of |F - F-tilde| {_number(report['error'])}; as cumulants (equation 3) {_number(report['identity'])}, "
        f"relative mismatch {report['mismatch']:.0e}; bound (equation 4) {_number(report['bound'])}"
    )


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"
