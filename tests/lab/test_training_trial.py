"""What a step takes in memory, told from a few examples, is what it takes; and large vocabularies are cheap."""

from __future__ import annotations

import os
from itertools import accumulate
from typing import Any

import pytest
import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile
from vocabularies import KINDS, Kind, Words, sentences

from kfacore import KFAC
from kfacore.lab.training.trial import step_memory

V, WIDTH = 2000, 16


def optimizer(kind: Kind, **options: Any) -> KFAC:
    approx = {"kind": "blockdiag", "max_dim": 500}
    shares = {"estimator": {"kind": "monte-carlo", "tau1": 0.25, "min_cases": 1}}
    return KFAC(Words(kind, V, WIDTH), likelihood="categorical", approx=approx, **shares, **options)


def run(opt: KFAC, kind: Kind, examples: int, steps: int) -> tuple[list[float], list[int]]:
    """Losses, and the sizes of all allocations and (below zero) of what was freed."""
    x, y = sentences(kind, examples, V)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        losses = [opt.step(x, y).loss for _ in range(steps)]
    events = profiler.profiler.kineto_results.events()  # type: ignore[union-attr]
    return [float(loss) for loss in losses], [event.nbytes() for event in events if event.name() == "[memory]"]


@pytest.mark.parametrize("kind", KINDS)
def test_predicted_within_a_fifth_and_no_vocabulary_squared(kind: Kind) -> None:
    x, y = sentences(kind, 16, V)
    found = step_memory(lambda: optimizer(kind), x, y, 48, 0.25)
    assert (found.examples, found.measured) == (48, 8)
    losses, sizes = run(optimizer(kind), kind, 48, 21)
    assert found.peak == pytest.approx(max(accumulate(sizes)), rel=0.2)
    assert losses[10] < 0.9 * losses[0]
    assert max(sizes) < V * V  # a quarter of a matrix of that many numbers


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_kept_grows_with_words_times_width(kind: Kind) -> None:
    opt = optimizer(kind)
    run(opt, kind, 8, 2)
    memory = opt.explain().memory
    size = sum(p.numel() for p in opt.linearizer.parameters)
    assert memory.moments + memory.factors < 4 * (20 * V + 20 * (2 * WIDTH + 1) ** 2)
    assert memory.vectors < 4 * 8 * 1.6 * size
    sides = {row.parameter: (row.input_side, row.output_side) for row in opt.explain()}
    wanted = {"embedding": ("diagonal", "full"), "tied": ("full", "diagonal"), "untied": ("diagonal", "full")}
    assert sides["emb.weight"] == wanted[kind]
    if kind == "untied":
        assert sides["head.weight"] == ("full", "diagonal")


def test_the_profiler_says_nothing_and_others_are_heard(capfd: pytest.CaptureFixture[str]) -> None:
    x, y = torch.randn(5, 3), torch.randint(0, 2, (5,))
    heard: list[int] = []

    def speak(*_: object) -> None:
        heard.append(1)
        os.write(2, b"another\n[W CPUAllocator.cpp:249] of the profiler\n")

    def build() -> KFAC:
        os.write(2, b"a word\n")
        optimizer = KFAC(nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)), likelihood="categorical")
        optimizer.linearizer.model.register_forward_hook(speak)
        return optimizer

    step_memory(build, x, y, 3)
    said = capfd.readouterr().err.splitlines()
    assert sorted(said) == ["a word", *["another"] * len(heard)]


def test_few_examples_are_measured_as_they_are() -> None:
    x, y = torch.randn(5, 3), torch.randint(0, 2, (5,))

    def build() -> KFAC:
        return KFAC(nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)), likelihood="categorical")

    assert step_memory(build, x, y, 3).measured == 3
    assert step_memory(build, x[:1], y[:1], 4).measured == 1
    exact = step_memory(build, x, y, 4)
    assert exact.examples == exact.measured == 4


def test_wide_layers_are_told_at_any_size() -> None:
    x, y = torch.randn(400, 40), torch.randint(0, 3, (400,))

    def build() -> KFAC:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(40, 300), nn.Tanh(), nn.Linear(300, 3))
        return KFAC(model, likelihood="categorical", preset="paper", trust="undo")

    told = step_memory(build, x[:16], y[:16], 400, 0.125)
    opt = build()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        for _ in range(20):
            opt.step(x, y)
    events = profiler.profiler.kineto_results.events()  # type: ignore[union-attr]
    true = max(accumulate(event.nbytes() for event in events if event.name() == "[memory]"))
    assert told.peak == pytest.approx(true, rel=0.2)
