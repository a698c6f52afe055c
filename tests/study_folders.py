"""Study folders written without training: runs whose curves are formulas; shared by the tests of reports."""

from __future__ import annotations

import hashlib
import json
import math
from pathlib import Path
from typing import Any

import numpy as np

from kfacore.lab.studies.plan import PlannedRun, Study, Target, Variant, load_study
from kfacore.lab.studies.state import RunState, state_folder, write_outcome

STEPS = 40


def error_at(step: int, floor: float, rate: float) -> float:
    """10 at the start, `floor` at the end."""
    return floor + (10.0 - floor) * math.exp(-rate * step)


def write_run(folder: Path, run: PlannedRun, **options: Any) -> None:
    """A run folder as `kfac train` writes it; keywords as `Runs.add`."""
    steps, every = options.get("steps", STEPS), options.get("every", 4)
    floor, rate, averaged = options.get("floor", 1.0), options.get("rate", 0.2), options.get("averaged", True)
    rng = np.random.default_rng([run.seed, 7])  # the same luck in all variants: paired
    luck = 1.0 + 0.1 * float(rng.standard_normal())
    folder.mkdir(parents=True)
    approx = options.get("approx", "tridiag")
    config = {
        "problem": {"kind": run.problem},
        "optimizer": {"kind": "kfac" if approx else "nesterov"},
        "approx": {"kind": approx} if approx else None,
        "seed": run.seed,
        "steps": steps,
    }
    manifest = {
        "versions": {"kfacore": "0.1.0", "torch": "2.13.0"},
        "system": "Linux",
        "machine": "x86_64",
        "device": "cpu",
        "threads": 1,
        "dtype": "float32",
        "seed": run.seed,
    }
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "manifest.json").write_text(json.dumps(manifest))
    per_step = options.get("seconds", 0.5)
    events: list[dict[str, Any]] = [{"event": "start", "step": 0, "seconds": 0.0}]
    blowup = options.get("blowup")
    for step in range(steps + 1):
        value = luck * error_at(step, floor, rate) + (options["offsets"][run.seed] if "offsets" in options else 0.0)
        if blowup is not None and step >= blowup:
            value *= 10.0 ** (step - blowup)
        if step:
            event = {"event": "step", "step": step, "batch_size": 100 + 10 * step, "loss": 2.0 * value, "error": value}
            trace = {"lam": 150.0 * 0.9**step, "gamma": 10.0 * 0.95**step, "rho": 1.0 + 0.2 * float(rng.normal())}
            none = dict.fromkeys((*trace, "alpha", "mu"))
            trace |= {"alpha": 0.1 + 0.01 * step, "mu": 0.9 - 0.5**step}
            events.append({**event, **(trace if approx else none), "seconds": per_step * step})
        if step % every == 0:
            measured = {"train_error": value, "test_error": 1.1 * value, "train_loss": 2.0 * value, "test_loss": None}
            measured |= {
                f"averaged_{key}": None if number is None or not averaged or step < steps // 2 else 0.9 * number
                for key, number in measured.items()
            }
            events.append({"event": "eval", "step": step, **measured, "seconds": per_step * step})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))


def write_study(
    folder: Path,
    variants: dict[str, dict[str, Any]],
    *,
    problems: tuple[str, ...] = ("curves",),
    seeds: int = 6,
    target: Target | None = None,
    name: str = "a study",
    states: dict[tuple[str, int], tuple[str, str]] | None = None,
    **options: Any,
) -> Study:
    """A study folder, read back with the states of its runs.

    Args:
        folder: The folder.
        variants: Options of `write_run` by variant; the first is the reference.
        problems: The problems.
        seeds: How many seeds.
        target: The target.
        name: Its name.
        states: State and reason of runs by variant and seed; ``"done"`` for all others. A pending one has no files, a
            diverged one grows from step 20 on, others stop at step 12.
        options: Options for all runs.
    """
    reference = next(iter(variants))
    runs = []
    for problem in problems:
        for variant, own in variants.items():
            for seed in range(seeds):
                planned = PlannedRun(
                    hashlib.sha256(f"{problem}/{variant}/{seed}".encode()).hexdigest()[:16], variant, problem, seed
                )
                state, reason = (states or {}).get((variant, seed), ("done", ""))
                runs.append(planned)
                state_folder(folder, planned.hash).mkdir(parents=True)
                if state != "pending":
                    cut = (
                        {"steps": 30, "blowup": 20} if state == "diverged" else {"steps": 12} if state != "done" else {}
                    )
                    write_run(folder / "runs" / planned.hash, planned, **{**options, **own, **cut})
                if state in ("done", "failed", "diverged"):
                    write_outcome(folder, planned.hash, RunState(state, reason))  # type: ignore[arg-type]  # checked
    study = Study(
        name=name,
        description="What each part is worth.",
        folder=folder,
        base={"problem": {"kind": problems[0]}},
        variants=tuple(Variant(v, {} if v == reference else {"approx": {"kind": v}}) for v in variants),
        reference=reference,
        problems=problems,
        seeds=tuple(range(seeds)),
        target=target,
        budget={"steps": STEPS},
        threads=1,
        versions={"kfacore": "0.1.0"},
        runs=tuple(runs),
    )
    study.write()
    study.write_index()
    return load_study(folder)
