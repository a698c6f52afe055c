"""The command `kfac train`: one run, from a problem's name to a folder with curves."""

from __future__ import annotations

import json as jsonlib
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kfac_cli.answers import tells
from kfacore.errors import ConfigError, NumericalError
from kfacore.registry import get_registry
from kfacore.schema.table import SLOT_DEFAULTS, SLOTS, flag_of

if TYPE_CHECKING:
    from kfacore.lab.config.run import RunConfig
    from kfacore.lab.training.describe import ModelTable

__all__ = ["register"]


def _names(slot: str) -> Callable[[str], list[str]]:
    """Completion of the names in a slot."""

    def complete(incomplete: str) -> list[str]:
        return [c.name for c in get_registry().components(slot) if c.name.startswith(incomplete)]

    return complete


def _presets(incomplete: str) -> list[str]:
    """Completion of --preset."""
    from kfacore.schema.presets import PRESETS

    return [name for name in PRESETS if name.startswith(incomplete)]


def _choice(slot: str, what: str, others: str) -> Any:
    """The option that chooses a slot's component.

    Args:
        slot: The slot.
        what: What is chosen.
        others: Names besides the default, for the help.
    """
    names = f"{SLOT_DEFAULTS[slot]} (default), {others}"
    return typer.Option(metavar="NAME", help=f"{what}: {names}; kfac list {slot} has all.", autocompletion=_names(slot))


def train(
    what: Annotated[
        str | None,
        typer.Argument(
            metavar="DATA.npz|PROBLEM|MODULE:FUNCTION",
            help="The same as --problem: your arrays (.npz or .csv), a problem's name, or your own function.",
            autocompletion=_names("problem"),
            show_default=False,
        ),
    ] = None,
    problem: Annotated[str | None, _choice("problem", "What to train", "mnist, images, text, ...")] = None,
    approx: Annotated[str | None, _choice("approx", "Approximation of the Fisher", "tridiag, ...")] = None,
    damping: Annotated[str | None, _choice("damping", "Damping", "fixed")] = None,
    momentum: Annotated[str | None, _choice("momentum", "Step size and momentum", "fixed, none")] = None,
    optimizer: Annotated[str | None, _choice("optimizer", "What trains", "adam, sgd, nesterov")] = None,
    config: Annotated[
        list[Path] | None,
        typer.Option("--config", "-c", metavar="FILE", help="A TOML file of options; may be repeated."),
    ] = None,
    sets: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="One option, for example damping.lambda0=1.0; repeatable."),
    ] = None,
    steps: Annotated[int | None, typer.Option(metavar="N", help="Steps in all, also when a run is resumed.")] = None,
    seed: Annotated[int | None, typer.Option(metavar="N", help="Seed of every random draw.")] = None,
    preset: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="Options by name: default, paper or heskes.", autocompletion=_presets),
    ] = None,
    device: Annotated[str | None, typer.Option(metavar="NAME", help="auto, cpu, cuda, cuda:1, ...")] = None,
    dtype: Annotated[str | None, typer.Option(metavar="NAME", help="float32 or float64.")] = None,
    threads: Annotated[int | None, typer.Option(metavar="N", help="Threads of the CPU computation.")] = None,
    data_dir: Annotated[Path | None, typer.Option(metavar="DIR", help="Folder of the problem's data files.")] = None,
    out: Annotated[Path | None, typer.Option(metavar="DIR", help="The run folder; must not hold a run yet.")] = None,
    init: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Start from a .safetensors, .npz or .pt (checkpoint) file.")
    ] = None,
    resume: Annotated[Path | None, typer.Option(metavar="RUN", help="Continue the run in this folder.")] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show the configuration, each parameter and memory; train nothing.")
    ] = False,
    json: Annotated[bool, typer.Option("--json", help="Print every event as a line of JSON on stdout.")] = False,
) -> None:
    """Train a model and keep curves, checkpoints and pictures in a run folder.

    Ctrl-C finishes the step, saves, and prints the command that continues; a second one stops at once.
    """
    flags: dict[str, Any] = {
        "problem": _problem(what, problem),
        "approx": approx,
        "damping": damping,
        "momentum": momentum,
        "optimizer": optimizer,
        "steps": steps,
        "seed": seed,
        "device": device,
        "dtype": dtype,
        "threads": threads,
        "problem.data_dir": None if data_dir is None else str(data_dir),
    }
    run_config = _configure(flags, preset, config or [], sets or [], resume, out, init)
    if resume is None:
        _say_what_was_inferred(run_config)
    if dry_run:
        _dry_run(run_config, init, out, json=json)
    else:
        _train(run_config, out=out, resume=resume, init=init, json=json)


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command()(train)


def _configure(
    flags: Mapping[str, Any],
    preset: str | None,
    files: list[Path],
    sets: list[str],
    resume: Path | None,
    out: Path | None,
    init: Path | None,
) -> RunConfig:
    """The configuration of a new run, or of the one to continue."""
    if resume is None:
        from kfacore.lab.config.resolve import resolve

        # In one mapping a later key reaches into the table of an earlier one: --problem first, then --data-dir.
        return resolve(get_registry(), preset=preset, files=files, flags=flags, sets=sets)
    for name, value in (("--out", out), ("--init", init)):
        if value is not None:
            raise ConfigError(f"{name} {value}: a resumed run keeps its folder and parameters; leave {name} out")
    from kfacore.lab.training.resume import resume_config

    return resume_config(get_registry(), resume, flags={**flags, "preset": preset}, sets=sets, files=files)


def _problem(what: str | None, problem: str | None) -> str | None:
    """The problem, named with or without ``--problem``.

    Raises:
        ConfigError: It is named twice, or the bare word belongs to an option.
    """
    if what is None:
        return problem
    if problem is not None:
        raise ConfigError(f"--problem {problem}: the problem is named twice, also as {what}; leave one out")
    registry = get_registry()
    if not any(component.name == what for component in registry.components("problem")):
        for slot in (slot.name for slot in SLOTS.values() if slot.flag):
            if any(component.name == what for component in registry.components(slot)):
                raise ConfigError(f"kfac train: '{what}' is no problem, did you mean '{flag_of(slot, what)}'?")
    return what


def _say_what_was_inferred(config: RunConfig) -> None:
    """Where the likelihood was concluded from data, say so in one line."""
    suggestions = config.problem.suggestions()
    inferred = suggestions.reason and suggestions.values["likelihood"]["kind"] == config.likelihood.kind
    if inferred and tells():
        typer.echo(suggestions.reason, err=True)


def _train(config: RunConfig, *, out: Path | None, resume: Path | None, init: Path | None, json: bool) -> None:
    """Train with people or programs looking on."""
    from kfac_cli.live import LiveLine
    from kfac_cli.summary import summary
    from kfacore.lab.training.signals import Interrupted

    others = not tells()
    with LiveLine() as live:
        from kfacore.lab.training.loop import train

        listeners: list[Callable[[Mapping[str, Any]], None]] = [] if others else [live]
        if json and not others:
            listeners.append(_print_event)
        interrupted: Interrupted | None = None
        try:
            result = train(config, registry=get_registry(), out=out, resume=resume, init=init, listeners=listeners)
        except Interrupted as stopped:
            interrupted = stopped
    if interrupted is not None:
        if not others:
            typer.echo(str(interrupted), err=True)
        raise typer.Exit(interrupted.exit_code)
    for line in () if others else summary(result):
        typer.echo(line, err=json)  # where programs read stdout, it is theirs alone
    if result.verdict == "diverged":
        raise typer.Exit(NumericalError.exit_code)


def _print_event(event: Mapping[str, Any]) -> None:
    """One line of strict JSON, at once."""
    from kfacore.lab.training.files import plain

    sys.stdout.write(jsonlib.dumps(plain(event), ensure_ascii=False, allow_nan=False) + "\n")
    sys.stdout.flush()


def _dry_run(config: RunConfig, init: Path | None, out: Path | None, *, json: bool) -> None:
    """Show what would be trained."""
    from kfacore.lab.training.describe import describe
    from kfacore.lab.training.run import RunFolder

    if out is not None:
        RunFolder(out).check_free()

    table = describe(config, get_registry(), init)
    if json:
        from kfac_cli.answers import print_json

        print_json({"config": config.as_dict(), **_table_json(table)})
        return
    typer.echo(_config_text(config.as_dict()))
    typer.echo(_table_text(table))


def _config_text(values: Mapping[str, Any]) -> str:
    """The configuration in TOML's spelling, one line a key or table, without the slots that are not used."""
    kept = {key: value for key, value in values.items() if value is not None or key not in SLOTS}
    return "\n".join(f"{key} = {_toml(value)}" for key, value in kept.items())


def _toml(value: Any) -> str:
    if value is None:  # for which TOML has no word
        return '"none"'
    if isinstance(value, Mapping):
        return "{ " + ", ".join(f"{k} = {_toml(v)}" for k, v in value.items()) + " }"
    if isinstance(value, list):
        return "[" + ", ".join(_toml(item) for item in value) + "]"
    return jsonlib.dumps(value, ensure_ascii=False)


def _table_text(table: ModelTable) -> str:
    """What is done with every parameter, or the layers where the optimizer does not tell; and memory."""
    if table.explanation is None:
        return _layers_text(table)
    lines = [str(table.explanation)]
    if table.step is None:
        lines.append("memory of a step: not known without data")
    else:
        lines.append(
            f"memory of a step on {table.step.examples} examples, beside parameters and data: "
            f"{table.step.peak / 1e6:.1f} MB (from steps on {table.step.measured})"
        )
    return "\n".join(lines)


def _layers_text(table: ModelTable) -> str:
    """Layers with their factors and memory, aligned."""
    symbols = list(dict.fromkeys(factor.symbol for row in table.rows for factor in row.factors))
    lines = [["layer", "d_in", "d_out", "parameters", *symbols, *(["factors MB"] if symbols else [])]]
    for row in table.rows:
        shapes = {factor.symbol: "x".join(map(str, factor.shape)) for factor in row.factors}
        size = table.megabytes(sum(factor.size for factor in row.factors))
        lines.append(
            [row.name, str(row.d_in), str(row.d_out), f"{row.parameters:,}"]
            + [shapes.get(symbol, "") for symbol in symbols]
            + ([f"{size:.2f}"] if symbols else [])
        )
    total = ["total", "", "", f"{table.parameters:,}", *([""] * len(symbols))]
    lines.append(total + ([f"{table.megabytes(table.factor_entries):.2f}"] if symbols else []))
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    text = "\n".join(
        "  ".join(
            cell.ljust(width) if index == 0 else cell.rjust(width)
            for index, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )
    notes = [f"parameters: {table.megabytes(table.parameters):.1f} MB"]
    if symbols:
        notes.append(
            f"factors (running averages): {table.megabytes(table.factor_entries):.1f} MB; the inverse in use takes "
            "about as much again, and so does each further candidate of gamma while it is compared"
        )
    return text + "\n" + "\n".join(notes)


def _table_json(table: ModelTable) -> dict[str, Any]:
    explained = {} if table.explanation is None else {"explain": table.explanation.as_dict()}
    if table.step is not None:
        step = table.step
        explained["step"] = {"examples": step.examples, "peak_mb": step.peak / 1e6, "measured": step.measured}
    return {
        **explained,
        "layers": [
            {
                "name": row.name,
                "d_in": row.d_in,
                "d_out": row.d_out,
                "parameters": row.parameters,
                "factors": {factor.symbol: list(factor.shape) for factor in row.factors},
            }
            for row in table.rows
        ],
        "parameters": table.parameters,
        "parameters_mb": table.megabytes(table.parameters),
        "factors_mb": table.megabytes(table.factor_entries),
    }
