"""What the processes of a test world do, as functions of a module that they can find."""

from __future__ import annotations

import os
import signal
from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import torch
from patience import PATIENCE
from torch import Tensor, nn
from torch import distributed as dist

from kfacore import KFAC, Preconditioned
from kfacore.errors import KfacError
from kfacore.nest import tensors_of
from kfacore.parallel.whole import interleaved

STEPS = 20


def data(n: int, seed: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """A problem whose Fisher is well conditioned, so that rounding stays rounding."""
    generator = torch.Generator().manual_seed(seed)
    teacher = torch.randn(6, 4, generator=torch.Generator().manual_seed(99), dtype=torch.float64)
    x = torch.randn(n, 6, generator=generator, dtype=torch.float64)
    z = x @ teacher + torch.randn(n, 4, generator=generator, dtype=torch.float64)
    return x.to(dtype), z.argmax(1)


def net(dtype: torch.dtype = torch.float64, seed: int = 1) -> nn.Sequential:
    torch.manual_seed(seed)
    layers = nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 7), nn.Tanh(), nn.Linear(7, 4)
    return nn.Sequential(*layers).to(dtype)


def own(rank: int | None, sizes: Sequence[int], *tensors: Tensor) -> list[Tensor]:
    """A process's part of a mini-batch; all of it for one process alone."""
    if rank is None:
        return list(tensors)
    places = interleaved(tuple(sizes))[rank]
    return [tensor[places] for tensor in tensors]


def bits(model: nn.Module) -> list[Tensor]:
    return [p.detach().clone() for p in model.parameters()]


def kfac(
    rank: int | None,
    sizes: Sequence[int],
    options: dict[str, Any],
    steps: int = STEPS,
    first: int = 0,
    state: Any = None,
) -> dict[str, Any]:
    """Train with `KFAC`; where a state is given, from there on."""
    options = dict(options)
    lists, unit = options.pop("lists", False), options.pop("unit", 1.0)
    dtype, masked, wrap = options.pop("dtype", torch.float64), options.pop("masked", False), options.pop("wrap", False)
    model = net(dtype)
    given = nn.parallel.DistributedDataParallel(model) if wrap and rank is not None else model
    opt = KFAC(given, likelihood="categorical", weight_decay=1e-2, **options)
    if state is not None:
        model.load_state_dict(state[0])
        opt.load_state_dict(state[1])
    reports = []
    for k in range(first, first + steps):
        x, y = data(sum(sizes), k, dtype)
        x, y, valid = own(rank, sizes, unit * x, y, mask(sizes))
        if lists:
            n = len(x) // (2 if rank is None else 3 - rank)  # lists of different lengths
            masks = valid.split(n) if masked else [None] * len(x)
            report = opt.step(list(zip(x.split(n), y.split(n), masks, strict=False)))
        else:
            report = opt.step(x, y, valid if masked else None)
        reports.append((float(report.loss), float(report.error), report.batch_size, report.refreshed, report.undone))
    saved = [model.state_dict(), opt.state_dict()]
    return {"parameters": bits(model), "reports": reports, "sent": dict(opt.ranks.sent), "state": saved}


def mask(sizes: Sequence[int]) -> Tensor:
    """Every third case does not count, and none of the last process."""
    valid = torch.arange(sum(sizes)) % 3 > 0
    valid[interleaved(tuple(sizes))[-1]] = False
    return valid


def several(rank: int | None, sizes: Sequence[int], variants: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    return [kfac(rank, sizes, options) for options in variants]


def resumed(rank: int | None, sizes: Sequence[int], states: Sequence[Any], options: dict[str, Any]) -> list[Any]:
    return [kfac(rank, sizes, options, STEPS // 2, STEPS // 2, state) for state in states]


class Sequences(nn.Module):
    """Tokens, positions that see each other, a norm: nothing of it is served by the fast path."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.norm = nn.Embedding(11, 6), nn.LayerNorm(6)
        self.up, self.mix, self.head = nn.Linear(6, 8), nn.Linear(8, 6), nn.Linear(6, 5)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        x = x + self.mix(torch.tanh(self.up(self.norm(x)))).cumsum(1) / 4
        found: Tensor = self.head(x)
        return found


class Images(nn.Module):
    """Batch normalisation mixes the examples of a process; dropout draws."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3)
        self.head = nn.Linear(12, 4)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.head(torch.tanh(self.norm(self.conv(x))).flatten(1))
        return found


def anything(rank: int | None, sizes: Sequence[int], kind: str, options: dict[str, Any], steps: int = 6) -> Any:
    """Train a network that is no chain of layers."""
    torch.manual_seed(2)
    model = (Sequences() if kind == "sequences" else Images()).double()
    opt = KFAC(model, likelihood="categorical", weight_decay=1e-2, **options)
    for k in range(steps):
        generator = torch.Generator().manual_seed(k)
        n = sum(sizes)
        if kind == "sequences":
            x = torch.randint(11, (n, 4), generator=generator)
            y = x.cumsum(1) % 5
            x, y, valid = own(rank, sizes, x, y, torch.rand(n, 4, generator=generator) > 0.2)
            opt.step(x, y, valid)
        else:
            x = torch.randn(n, 1, 4, 4, generator=generator, dtype=torch.float64)
            opt.step(*own(rank, sizes, x, x.flatten(1)[:, :4].argmax(1)))
    return [*bits(model), *(buffer.clone().double() for buffer in model.buffers())]


def networks(rank: int | None, sizes: Sequence[int], cases: Sequence[tuple[str, dict[str, Any]]]) -> list[Any]:
    return [anything(rank, sizes, kind, options) for kind, options in cases]


def guest(rank: int | None, sizes: Sequence[int], options: dict[str, Any], steps: int = 12) -> dict[str, Any]:
    """Train with `Preconditioned` as a guest of AdamW, in a loop that averages gradients by DDP."""
    model = net()
    seen = model if rank is None else nn.parallel.DistributedDataParallel(model)
    base = torch.optim.AdamW(model.parameters(), lr=1e-2)
    opt = Preconditioned(seen, base, likelihood="categorical", every=5, **options)
    for k in range(steps):
        x, y = own(rank, sizes, *data(sum(sizes), k))
        with opt.watch():
            z = seen(x)
            opt.observe(z)
        nn.functional.cross_entropy(z, y).backward()
        opt.step()
        opt.zero_grad()
    return {"parameters": bits(model), "sent": dict(opt.ranks.sent)}


def guests(rank: int | None, sizes: Sequence[int], variants: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    return [guest(rank, sizes, options) for options in variants]


def contract(rank: int | None, sizes: Sequence[int]) -> dict[str, Any]:
    """Train with a rate, gradients left behind, and a model that is moved half way."""
    model = net(torch.float32)
    opt = KFAC(model, likelihood="categorical", weight_decay=1e-2, fill_grad=True)
    gradients = []
    for k in range(6):
        if k == 3:
            model.double()
        opt.param_groups[0]["lr"] = 1.0 / (k + 1)
        opt.step(*own(rank, sizes, *data(sum(sizes), k, next(model.parameters()).dtype)))
        gradients += [p.grad.clone() for p in model.parameters() if p.grad is not None]
    return {"parameters": bits(model), "gradients": gradients}


def failures(rank: int) -> dict[str, str]:
    """What each process is told when one of them has a problem."""
    told = {}
    runs = {"nan": _nan, "model": _other_model, "place": _other_place, "nothing": _nothing, "memory": _memory}
    runs |= {"lists": _lists, "rate": _other_rate, "decay": _other_decay}
    for name, run in runs.items():
        try:
            run(rank)
            told[name] = "nothing"
        except Exception as error:
            told[name] = f"{type(error).__name__}: {error}"
    return told


def _nan(rank: int) -> None:
    opt = KFAC(net(), likelihood="categorical")
    for k in range(3):
        x, y = own(rank, (10, 10), *data(20, k))
        if rank == 1 and k == 1:
            x[3, 2] = torch.nan
        opt.step(x, y)


def _other_model(rank: int) -> None:
    KFAC(net(seed=rank), likelihood="categorical").step(*own(rank, (10, 10), *data(20, 0)))


def _other_place(rank: int) -> None:
    opt = KFAC(net(), likelihood="categorical")
    opt.step(*own(rank, (10, 10), *data(20, 0)))
    if rank == 0:
        opt.state_dict()
    else:
        opt.step(*own(rank, (10, 10), *data(20, 1)))


def _nothing(rank: int) -> None:
    x, y = own(rank, (10, 10), *data(20, 0))
    KFAC(net(), likelihood="categorical").step(x, y, torch.zeros(10, dtype=torch.bool))


def _lists(rank: int) -> None:
    x, y = own(rank, (10, 10), *data(20, 0))
    opt = KFAC(net(), likelihood="categorical")
    if rank == 0:
        opt.step([(x[:5], y[:5]), (x[5:], y[5:])])
    else:
        opt.step(x, y)


def _other_rate(rank: int) -> None:
    KFAC(net(), likelihood="categorical", lr=1.0 - rank / 2).step(*own(rank, (10, 10), *data(20, 0)))


def _other_decay(rank: int) -> None:
    KFAC(net(), likelihood="categorical", weight_decay=0.1 * rank).step(*own(rank, (10, 10), *data(20, 0)))


def _memory(rank: int) -> None:
    model = net()
    opt = KFAC(model, likelihood="categorical")
    opt.step(*own(rank, (10, 10), *data(20, 0)))
    if rank == 1:

        def no_memory(module: nn.Module, inputs: Any) -> None:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB")

        model[2].register_forward_pre_hook(no_memory)
    opt.step(*own(rank, (10, 10), *data(20, 1)))


def hangs(rank: int) -> str:
    """One process does something else until the other one was told; what that is."""
    opt, store = KFAC(net(), likelihood="categorical"), dist.distributed_c10d._get_default_store()
    opt.step(*own(rank, (10, 10), *data(20, 0)))  # all is set up, however long it took
    if rank == 1:
        store.wait(["told"], timedelta(seconds=PATIENCE))
        return "nothing"
    dist.distributed_c10d._set_pg_timeout(timedelta(seconds=2))
    told = "nothing"
    try:
        opt.step(*own(rank, (10, 10), *data(20, 1)))
    except KfacError as error:
        told = f"{type(error).__name__}: {error}"
    store.set("told", told)
    return told


def dies(rank: int) -> str:
    """One process is killed in the middle; what the other one is told."""
    opt = KFAC(net(), likelihood="categorical")
    try:
        for k in range(5):
            if rank == 1 and k == 2:
                os.kill(os.getpid(), signal.SIGKILL)
            opt.step(*own(rank, (10, 10), *data(20, k)))
    except KfacError as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


def held(opt: KFAC) -> int:
    """Bytes of averages and inverse that this process holds."""
    assert opt.preconditioner is not None
    assert opt.preconditioner.inverse is not None
    kept = [value for value, _ in opt.preconditioner.moments.averages if not value.is_meta]
    kept += tensors_of(opt.preconditioner.inverse.state_dict())
    return sum({x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in kept}.values())


def divided(
    rank: int | None, sizes: Sequence[int], options: dict[str, Any], states: Sequence[Any]
) -> list[dict[str, Any]]:
    """Train with the curvature at its owners, from the start or from each of some states."""
    if not states:
        return [kfac(rank, sizes, options)]
    return [kfac(rank, sizes, options, STEPS // 2, STEPS // 2, state) for state in states]


def kept(rank: int | None, sizes: Sequence[int], options: dict[str, Any]) -> tuple[int, Any]:
    """Bytes that a process holds, and which blocks are whose."""
    opt = KFAC(net(), likelihood="categorical", **options)
    for k in range(2):
        opt.step(*own(rank, sizes, *data(sum(sizes), k)))
    return held(opt), getattr(opt.preconditioner, "groups", None)
