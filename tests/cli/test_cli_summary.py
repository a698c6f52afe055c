"""The last words of a run."""

from __future__ import annotations

from pathlib import Path

from kfac_cli.summary import summary
from kfacore.lab.training.outcome import Losses
from kfacore.lab.training.results import RunResult

MEASURES = {"train_loss": 0.031, "train_error": 0.0, "test_loss": None, "averaged_train_loss": 0.05}


def result(losses, **more):
    return RunResult(Path("runs/my run"), 300, 250.4, MEASURES, (Path("p.png"),), losses, **more)


def test_a_run_that_went_well():
    best = Path("runs/my run/checkpoint-best.pt")
    assert list(summary(result(Losses(2.3, 0.03, 150, 0.031, 300), best=best, rejected=1))) == [
        "done: 300 steps in 4m10s of training",
        "  training loss: first 2.3, best 0.03 (step 150), last 0.031",
        "  current parameters: train loss 0.031, train error 0",
        "  averaged parameters: train loss 0.05",
        "  1 step undone",
        "  best parameters (step 150): runs/my run/checkpoint-best.pt",
        "  p.png",
    ]


def test_a_run_that_got_worse_is_red_and_ends_with_a_command():
    best, advice = Path("runs/my run/checkpoint-best.pt"), "a larger damping, --set damping.lambda0=0.00015"
    lines = list(summary(result(Losses(2.3, 0.03, 150, 9.1, 300), best=best, rejected=20, advice=advice)))
    assert lines[0] == "\x1b[31m\x1b[1mdiverged\x1b[0m: 300 steps in 4m10s of training"
    assert "  20 steps undone" in lines
    assert lines[-2:] == [
        f"try {advice}; from the best parameters on:",
        "kfac train -c 'runs/my run/config.json' --init 'runs/my run/checkpoint-best.pt' --set damping.lambda0=0.00015",
    ]


def test_without_an_option_to_name_there_is_no_command():
    lines = list(summary(result(Losses(2.3, 2.3, 0, 9.1, 300), advice="a stronger damping or a smaller learning rate")))
    assert lines[-1] == "no evaluation was below the first; try a stronger damping or a smaller learning rate"
