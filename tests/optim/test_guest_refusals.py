"""Wrong uses of a guest: each a clear sentence that says what was found and what to do."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from guests import backward, data, guest, mlp, run
from torch import nn

from kfacore import KFAC, ConfigError, DataError, Preconditioned, UnsupportedModelError


def watched(opt: Preconditioned, model: nn.Module, n: int = 12) -> torch.Tensor:
    with opt.watch():
        z: torch.Tensor = model(data(n)[0])
    return z


OPTIONS: list[tuple[dict[str, Any], str]] = [
    ({"scale": "grafting"}, "unknown scale 'grafting': did you mean 'graft'"),
    ({"rest": "all"}, "unknown rest 'all': known: base, diagonal"),
    ({"every": 0}, "every must be a whole number of steps, at least 1, found 0"),
    ({"damping": 0.0}, "damping must be a number above 0, found 0.0"),
    ({"gamma": float("nan")}, "gamma must be a number above 0, found nan"),
    ({"kappa": -1}, "kappa must be a number above 0, found -1"),
    ({"pi": "layers"}, "unknown pi 'layers'"),
    ({"likelihood": "categoricl"}, "did you mean 'categorical'"),
    ({"approx": "blockdiagonal"}, "did you mean 'blockdiag'"),
    ({"reduce": ["5"]}, "reduce names 5; the blocks are 0, 2, 4"),
]


@pytest.mark.parametrize(("options", "message"), OPTIONS, ids=[str(options) for options, _ in OPTIONS])
def test_wrong_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        guest(mlp(), **options)


BASES: list[tuple[Any, str]] = [
    (lambda m: "adamw", "base: a torch optimizer is needed, found a str"),
    (lambda m: torch.optim.LBFGS(m.parameters()), "LBFGS evaluates the loss several times a step"),
    (lambda m: torch.optim.SparseAdam(m.parameters()), "SparseAdam takes sparse gradients only"),
    (lambda m: torch.optim.SGD(mlp().parameters(), lr=1.0), "SGD has no parameter of this model"),
    (lambda m: guest(m), "is a Preconditioned optimizer itself"),
    (lambda m: KFAC(m, likelihood="categorical"), "KFAC preconditions already"),
]


@pytest.mark.parametrize(("base", "message"), BASES, ids=[message[:12] for _, message in BASES])
def test_wrong_bases(base: Any, message: str) -> None:
    model = mlp()
    with pytest.raises(ConfigError, match=message):
        Preconditioned(model, base(model))


def test_models_that_cannot_be_served() -> None:
    model = mlp()
    with pytest.raises(ConfigError, match=r"model: a torch.nn.Module is needed, found a function"):
        Preconditioned(lambda x: x, torch.optim.SGD(model.parameters(), lr=1.0))  # type: ignore[arg-type]
    norm = nn.LayerNorm(4)
    with pytest.raises(ConfigError, match="there is nothing to precondition"):
        guest(norm)
    with pytest.raises(UnsupportedModelError, match="bfloat16"):
        guest(mlp(dtype=torch.bfloat16))


def test_no_watch_when_due_is_noticed_once() -> None:
    model = mlp()
    opt = guest(model, torch.optim.SGD(model.parameters(), lr=0.1))
    nn.functional.cross_entropy(model(data()[0]), data()[1]).backward()
    with pytest.warns(UserWarning, match="statistics were due in step 1 and there were none: observe"):
        opt.step()
    opt.step()
    assert "notice: statistics were due in step 1" in opt.explain()


def test_observe_before_anything_was_watched() -> None:
    model = mlp()
    with pytest.raises(ConfigError, match="nothing was watched since the last step"):
        guest(model).observe(model(data()[0]))


def test_observe_twice() -> None:
    model = mlp()
    opt = guest(model)
    z = watched(opt, model)
    opt.observe(z)
    with pytest.raises(ConfigError, match="twice for one watch"):
        opt.observe(z)


def test_outputs_of_another_model_or_pass() -> None:
    model = mlp()
    opt = guest(model)
    with opt.watch():
        z = mlp(1)(data()[0])
    with pytest.raises(ConfigError, match="no layer of the optimizer's model ran while it was watched"):
        opt.observe(z)
    watched(opt, model)
    with pytest.raises(ConfigError, match="z does not come from a layer that ran while it was watched"):
        opt.observe(model(data()[0]))


def test_outputs_of_another_form() -> None:
    model = mlp()
    opt = guest(model, torch.optim.SGD(model.parameters(), lr=0.1))
    backward(opt, model, *data())
    opt.step()
    with opt.watch():
        z = model(data()[0].unsqueeze(1))
    with pytest.raises(DataError, match=r"outputs of shape \(12, 1, 3\), in earlier steps they had 2 dimensions"):
        opt.observe(z)


@pytest.mark.parametrize("kind", [tuple, list])
def test_two_outputs_at_once(kind: Any) -> None:
    model = mlp()
    opt = guest(model)
    z = watched(opt, model)
    with pytest.raises(ConfigError, match=rf"a {kind.__name__} with 2 tensors of shape \(12, 3\), each of which may"):
        opt.observe(kind([z, z]))
    with pytest.raises(UnsupportedModelError, match="found dict as its result"):
        opt.observe({"a": 1})
    opt.observe((z, z.new_ones(12, 7)))  # the first one, as of a model that returns more


def test_what_does_not_fit_the_outputs() -> None:
    model = mlp()
    opt = guest(model)
    z = watched(opt, model)
    for given, message in (
        ({"targets": data(11)[1]}, "found 11 targets for 12 examples"),
        ({"targets": torch.full((12,), 3)}, "observe: targets"),
        ({"valid": torch.zeros(12, dtype=torch.bool)}, "no position of the mini-batch counts"),
        ({"valid": torch.ones(11, dtype=torch.bool)}, "found 11 rows of the mask for 12 examples"),
    ):
        with pytest.raises(DataError, match=message):
            opt.observe(z, **given)


def test_an_empty_mini_batch() -> None:
    model = mlp()
    opt = guest(model)
    with pytest.raises(DataError, match="no examples"):
        opt.observe(watched(opt, model, 0))


def test_outputs_without_a_graph() -> None:
    model = mlp()
    opt = guest(model)
    with pytest.raises(ConfigError, match="z has no graph"):
        opt.observe(watched(opt, model).detach())
    with torch.inference_mode(), pytest.raises(ConfigError, match="inference_mode"), opt.watch():
        model(data()[0])
    watched(opt, model)
    with torch.inference_mode():
        z = model(data()[0])
    with pytest.raises(ConfigError, match="inference_mode"):
        opt.observe(z)


def test_backward_before_observe() -> None:
    model = mlp()
    opt = guest(model)
    z = watched(opt, model)
    nn.functional.cross_entropy(z, data()[1]).backward(retain_graph=True)
    opt.observe(z)  # fine: the graph is there
    opt.zero_grad()
    z = watched(opt, model)
    nn.functional.cross_entropy(z, data()[1]).backward()
    with pytest.raises(ConfigError, match=r"call observe before loss.backward\(\)"):
        opt.observe(z)


def test_a_watch_inside_a_watch() -> None:
    opt = guest(mlp())
    with pytest.raises(ConfigError, match="open already"), opt.watch(), opt.watch():
        pass


def test_observe_without_a_likelihood() -> None:
    model = mlp()
    opt = guest(model, likelihood=None)
    z = watched(opt, model)
    with pytest.raises(ConfigError, match="needs to know what z means"):
        opt.observe(z)


def test_targets_where_they_are_needed() -> None:
    model = mlp()
    for options, why in (
        ({"estimator": "empirical"}, "estimator 'empirical'"),
        ({"likelihood": nn.CrossEntropyLoss(weight=torch.ones(3).double())}, "weights"),
    ):
        opt = guest(model, **options)
        with pytest.raises(ConfigError, match=f"because of {why}"):
            opt.observe(watched(opt, model))
        opt.observe(watched(opt, model), data()[1])


def test_what_is_not_finite_is_left_out_with_a_notice() -> None:
    model = mlp()
    opt = guest(model, torch.optim.SGD(model.parameters(), lr=0.1))
    x, _ = data()
    with opt.watch():
        z = model(torch.full_like(x, torch.nan))
        with pytest.warns(UserWarning, match="left out: its outputs or gradients hold NaN"):
            opt.observe(z)
    assert opt.curvature is not None
    assert opt.curvature.added == 0
    assert all(torch.isfinite(p).all() for p in run(opt, model, 2))


class Foreign(torch.autograd.Function):
    """A reentrant checkpoint that is not torch's."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *g: torch.Tensor) -> torch.Tensor:
        return g[0]


def test_reentrant_checkpoints_of_others_are_named() -> None:
    model = mlp()
    opt = guest(model)
    foreign = type("CheckpointFunction", (Foreign,), {})
    with opt.watch():
        z = foreign.apply(model(data()[0]))
    with pytest.raises(ConfigError, match="reentrant function that is not torch's"):
        opt.observe(z)


def test_uninitialised_parameters() -> None:
    model = nn.Sequential(nn.LazyLinear(4), nn.Tanh(), nn.LazyLinear(3))
    with pytest.raises(ConfigError, match="run the model once"):
        guest(model)


def test_half_precision_without_a_likelihood() -> None:
    model = mlp(dtype=torch.float32)
    opt = guest(model, torch.optim.SGD(model.parameters(), lr=0.1), likelihood=None)
    with opt.watch(), torch.autocast("cpu", torch.float16):
        z = model(data(dtype=torch.float32)[0])
    nn.functional.cross_entropy(z, data()[1]).backward()
    with pytest.raises(ConfigError, match="in float16 carry the scaler's factor"):
        opt.step()
