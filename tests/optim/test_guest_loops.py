"""A guest in the loops that people have: schedulers, scalers, autocast, clipping, averages, closures, checkpoints."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from guests import EXACT, backward, data, guest, mlp, run
from torch import nn
from torch.optim import lr_scheduler as schedulers
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.checkpoint import checkpoint

SCHEDULERS: dict[str, Any] = {
    "LambdaLR": lambda o: schedulers.LambdaLR(o, lambda k: 0.9**k),
    "MultiplicativeLR": lambda o: schedulers.MultiplicativeLR(o, lambda k: 0.9),
    "StepLR": lambda o: schedulers.StepLR(o, 2),
    "MultiStepLR": lambda o: schedulers.MultiStepLR(o, [2, 3]),
    "ConstantLR": lambda o: schedulers.ConstantLR(o, 0.5, 2),
    "LinearLR": lambda o: schedulers.LinearLR(o, 0.5, total_iters=3),
    "ExponentialLR": lambda o: schedulers.ExponentialLR(o, 0.9),
    "PolynomialLR": lambda o: schedulers.PolynomialLR(o, 6),
    "CosineAnnealingLR": lambda o: schedulers.CosineAnnealingLR(o, 6),
    "CosineAnnealingWarmRestarts": lambda o: schedulers.CosineAnnealingWarmRestarts(o, 3),
    "CyclicLR": lambda o: schedulers.CyclicLR(o, 0.001, 0.02, 2),
    "OneCycleLR": lambda o: schedulers.OneCycleLR(o, 0.02, total_steps=8),
    "ReduceLROnPlateau": lambda o: schedulers.ReduceLROnPlateau(o, patience=0),
    "SequentialLR": lambda o: schedulers.SequentialLR(
        o, [schedulers.LinearLR(o, 0.5, total_iters=2), schedulers.ExponentialLR(o, 0.9)], [2]
    ),
    "ChainedScheduler": lambda o: schedulers.ChainedScheduler(
        [schedulers.LinearLR(o, 0.5, total_iters=2), schedulers.ExponentialLR(o, 0.9)]
    ),
    "SWALR": lambda o: torch.optim.swa_utils.SWALR(o, 0.001, anneal_epochs=2),
}


def test_the_list_has_every_scheduler() -> None:
    known = {
        name
        for name, kind in vars(schedulers).items()
        if isinstance(kind, type) and issubclass(kind, schedulers.LRScheduler)
    }
    assert known - {"LRScheduler", "_LRScheduler"} <= set(SCHEDULERS)


@pytest.mark.parametrize("name", SCHEDULERS)
def test_schedulers_set_the_rates_of_the_base(name: str) -> None:
    rates = []
    for wrapped in (False, True):
        model = mlp()
        base = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
        opt = guest(model, base) if wrapped else base
        scheduler = SCHEDULERS[name](opt)
        found = []
        for step in range(6):
            x, y = data(seed=step)
            opt.zero_grad()
            if wrapped:
                backward(opt, model, x, y)  # type: ignore[arg-type]
            else:
                nn.functional.cross_entropy(model(x), y).backward()
            opt.step()
            scheduler.step(1.0) if name == "ReduceLROnPlateau" else scheduler.step()
            found.append((base.param_groups[0]["lr"], base.param_groups[0]["momentum"]))
        rates.append(found)
    assert rates[0] == rates[1]


def test_a_scaler_and_float16_autocast() -> None:
    model = mlp(dtype=torch.float32)
    opt = guest(model, torch.optim.AdamW(model.parameters(), lr=0.01))
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**15)
    losses = []
    for _ in range(25):
        x, y = data(dtype=torch.float32)
        opt.zero_grad()
        with opt.watch(), torch.autocast("cpu", torch.float16):
            z = model(x)
            loss = nn.functional.cross_entropy(z, y)
        assert z.dtype == torch.float16
        opt.observe(z)
        scaler.scale(loss).backward()
        scaler.unscale_(opt)
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        scaler.step(opt)
        scaler.update()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]
    assert opt.steps == 25


def test_a_step_that_the_scaler_skips_is_none() -> None:
    model = mlp(dtype=torch.float32)
    opt = guest(model, torch.optim.SGD(model.parameters(), lr=0.1))
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**15)
    x, y = data(dtype=torch.float32)
    with opt.watch():
        z = model(x)
        opt.observe(z)
    scaler.scale(nn.functional.cross_entropy(z, y) * torch.inf).backward()
    scaler.step(opt)
    assert opt.steps == 0
    assert opt.curvature is not None
    assert opt.curvature.added == 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_statistics_in_low_precision_are_those_in_full_up_to_rounding(dtype: torch.dtype) -> None:
    found = []
    for low in (False, True):
        model = mlp(dtype=torch.float32)
        opt = guest(model, torch.optim.SGD(model.parameters(), lr=0.1), estimator=EXACT)
        with opt.watch(), torch.autocast("cpu", dtype, enabled=low):
            z = model(data(dtype=torch.float32)[0])
        opt.observe(z)
        assert opt.curvature is not None
        opt.curvature.preconditioner.commit()
        moments = opt.curvature.preconditioner.moments
        found.append([value for kind in moments.kinds for value in moments[kind]])
    for full, half in zip(*found, strict=True):
        assert half.dtype == torch.float32
        assert float((full - half).norm()) < 0.02 * float(full.norm())


def test_exponential_and_stochastic_averages() -> None:
    model = mlp()
    opt = guest(model, torch.optim.AdamW(model.parameters(), lr=0.01))
    averages = [AveragedModel(model), AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9))]
    for step in range(5):
        opt.zero_grad()
        backward(opt, model, *data(seed=step))
        opt.step()
        for average in averages:
            average.update_parameters(model)
    assert all(torch.isfinite(p).all() for average in averages for p in average.parameters())
    copy.deepcopy(model)


def test_a_closure_runs_once_a_step() -> None:
    models = [mlp(), mlp()]
    opts = [guest(m, torch.optim.AdamW(m.parameters(), lr=0.01)) for m in models]
    x, y = data()
    for _ in range(4):

        def closure() -> torch.Tensor:
            opts[0].zero_grad()
            with opts[0].watch():
                z = models[0](x)
                opts[0].observe(z)
            loss = nn.functional.cross_entropy(z, y)
            loss.backward()
            return loss

        loss = opts[0].step(closure)
        assert loss.requires_grad
        opts[1].zero_grad()
        backward(opts[1], models[1], x, y)
        opts[1].step()
    for p, q in zip(models[0].parameters(), models[1].parameters(), strict=True):
        assert torch.allclose(p, q, atol=1e-12)


def test_own_backward_passes_serve_without_a_likelihood() -> None:
    model, other = mlp(), mlp()
    opt = guest(model, torch.optim.SGD(model.parameters(), lr=0.1), likelihood=None, scale="none", gamma=0.1)
    same = guest(other, torch.optim.SGD(other.parameters(), lr=0.1), scale="none", gamma=0.1, estimator="empirical")
    for step in range(4):
        x, y = data(seed=step)
        for o, m in ((opt, model), (same, other)):
            o.zero_grad()
            with o.watch():
                z = m(x)
                if o is same:
                    o.observe(z, y)
            nn.functional.cross_entropy(z, y).backward()
            o.step()
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.allclose(p, q, atol=1e-10)
    assert "the empirical Fisher, from your own backward pass" in opt.explain()


class Attention(nn.Module):
    """A layer that hooks cannot see into, and a part that is run again in the backward pass."""

    def __init__(self, form: str | None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(11, 8)
        self.attention = nn.MultiheadAttention(8, 2, dropout=0.1, batch_first=True)
        self.mlp = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Dropout(0.1), nn.Linear(16, 8))
        self.head = nn.Linear(8, 11)
        self.form = form

    def body(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.attention(x, x, x)[0]
        return x + self.mlp(x)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.embed(tokens)
        x = self.body(x) if self.form is None else checkpoint(self.body, x, use_reentrant=self.form == "reentrant")
        return self.head(x)


def test_checkpointed_parts_and_attention_come_to_the_same() -> None:
    found = []
    for form in (None, "plain", "reentrant"):
        model = Attention(form)
        own = set(model.attention.__dict__)
        opt = guest(model, torch.optim.AdamW(model.parameters(), lr=0.01))
        generator = torch.Generator().manual_seed(4)
        torch.manual_seed(9)
        for _ in range(4):
            tokens = torch.randint(0, 11, (6, 5), generator=generator)
            opt.zero_grad()
            with opt.watch():
                z = model(tokens)
                opt.observe(z, valid=tokens > 0)
            nn.functional.cross_entropy(z.flatten(0, 1), tokens.flatten()).backward()
            opt.step()
            assert set(model.attention.__dict__) == own
        assert {"attention.q", "mlp.0", "head", "embed"} <= {block.info.name for block in opt.network.layers}
        found.append([p.detach().clone() for p in model.parameters()])
    for a, *others in zip(*found, strict=True):
        assert all(torch.allclose(a, b, atol=1e-6) for b in others)


def test_a_second_pass_inside_a_watch_counts_for_nothing() -> None:
    found = []
    for more in (False, True):
        model = mlp()
        opt = guest(model, estimator=EXACT, gamma=0.1, scale="none")
        x, y = data()
        with opt.watch():
            z = model(x)
            if more:
                model(x + 1)
                with torch.no_grad():
                    model(x)
        opt.observe(z)
        nn.functional.cross_entropy(z, y).backward()
        opt.step()
        found.append([p.detach().clone() for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_evaluation_inside_a_loop_is_not_watched() -> None:
    model = mlp()
    opt = guest(model, torch.optim.AdamW(model.parameters(), lr=0.01))
    with torch.no_grad(), opt.watch():
        opt.observe(model(data()[0]))
    run(opt, model, 2)
    assert opt.curvature is not None
    assert opt.curvature.preconditioner.moments.updates == 2


def test_a_compiled_or_wrapped_model_is_looked_through() -> None:
    model = mlp()
    opt = guest(nn.DataParallel(model), torch.optim.SGD(model.parameters(), lr=0.1))
    assert opt.network.model is model
    run(opt, model, 1)
