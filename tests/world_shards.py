"""What the processes of a test world do with sharded parameters (FSDP2), as functions of a module."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from late import Late
from torch import Tensor, nn
from torch import distributed as dist
from world_runs import data, own

from kfacore import KFAC, Preconditioned
from kfacore.errors import KfacError

fsdp, tensor = Late("torch.distributed.fsdp"), Late("torch.distributed.tensor")
checkpoint = Late("torch.distributed.checkpoint")
states = Late("torch.distributed.checkpoint.state_dict")


class Net(nn.Module):
    """Sides that no number of processes divides, a norm, and one parameter of three blocks (attention)."""

    def __init__(self, *, attends: bool = True) -> None:
        super().__init__()
        self.first, self.norm = nn.Linear(2 if attends else 6, 9), nn.LayerNorm(9)
        self.mix = nn.MultiheadAttention(9, 1, batch_first=True) if attends else None
        self.body = nn.Sequential(nn.Tanh(), nn.Linear(9, 7, bias=False), nn.Tanh())
        self.last = nn.Linear(7, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.first(x if self.mix is None else x.unflatten(1, (3, 2))))
        if self.mix is not None:
            x = (x + self.mix(x, x, x, need_weights=True)[0]).mean(1)
        found: Tensor = self.last(self.body(x))
        return found


def build(rank: int | None, options: dict[str, Any]) -> tuple[nn.Module, Preconditioned]:
    options = dict(options)
    torch.manual_seed(1)
    model = Net(attends=options.pop("attends", False)).double()
    if rank is not None:
        fsdp.fully_shard(model.body)
        fsdp.fully_shard(model)
    base = options.pop("base", "adamw")
    kinds: dict[str, Any] = {
        "adamw": lambda p: torch.optim.AdamW(p, lr=1e-2, weight_decay=0.1),
        "sgd": lambda p: torch.optim.SGD(p, lr=1e-2, momentum=0.9, weight_decay=0.1, nesterov=True),
    }
    return model, Preconditioned(model, kinds[base](model.parameters()), likelihood="categorical", every=5, **options)


def steps(rank: int | None, model: nn.Module, opt: Preconditioned, which: Sequence[int], sizes: Sequence[int]) -> None:
    for k in which:
        x, y = own(rank, sizes, *data(sum(sizes), k))
        with opt.watch():
            z = model(x)
            opt.observe(z)
        nn.functional.cross_entropy(z, y).backward()
        opt.step()
        opt.zero_grad()


def whole(model: nn.Module) -> list[Tensor]:
    return [
        p.detach().full_tensor() if isinstance(p, tensor.DTensor) else p.detach().clone() for p in model.parameters()
    ]


def sharded(rank: int | None, sizes: Sequence[int], variants: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    found = []
    for options in variants:
        model, opt = build(rank, options)
        steps(rank, model, opt, range(8), sizes)
        blocks = [block.info.name for block in opt.network.layers]
        found.append({"parameters": whole(model), "blocks": blocks, "sent": dict(opt.ranks.sent), "said": opt._said})
    return found


def saved(rank: int, sizes: Sequence[int], folder: Path) -> list[Tensor]:
    """Train, and save in the middle as torch's distributed checkpoints do."""
    model, opt = build(rank, {})
    steps(rank, model, opt, range(4), sizes)
    parameters, state = states.get_state_dict(model, opt)
    checkpoint.save({"model": parameters, "optimizer": state}, storage_writer=checkpoint.FileSystemWriter(folder))
    steps(rank, model, opt, range(4, 8), sizes)
    return whole(model)


def went_on(rank: int, sizes: Sequence[int], folder: Path) -> list[Tensor]:
    model, opt = build(rank, {})
    steps(rank, model, opt, range(4), sizes)  # so that there is something of each kind to load into
    parameters, state = states.get_state_dict(model, opt)
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
    checkpoint.load({"model": parameters, "optimizer": state}, storage_reader=checkpoint.FileSystemReader(folder))
    states.set_state_dict(model, opt, model_state_dict=parameters, optim_state_dict=state)
    steps(rank, model, opt, range(4, 8), sizes)
    return whole(model)


def refused(rank: int) -> list[str]:
    """What cannot be: other meshes, other placements, KFAC, approximations of all blocks."""
    line, square = (
        tensor.init_device_mesh("cpu", (2,)),
        tensor.init_device_mesh("cpu", (1, 2), mesh_dim_names=("dp", "tp")),
    )

    def spread(mesh: Any, *places: Any) -> nn.Module:
        model = nn.Linear(4, 6)
        model.weight = nn.Parameter(tensor.distribute_tensor(model.weight.detach(), mesh, places))
        return model

    def guest(model: nn.Module, **options: Any) -> Preconditioned:
        return Preconditioned(model, torch.optim.SGD(model.parameters(), lr=0.1), likelihood="categorical", **options)

    jobs = [
        lambda: guest(spread(square, tensor.Replicate(), tensor.Shard(0))),
        lambda: guest(spread(line, tensor.Shard(1))),
        lambda: guest(spread(line, tensor.Shard(0))),
        lambda: KFAC(build(rank, {})[0], likelihood="categorical"),
        lambda: build(rank, {"approx": "exact"}),
        lambda: build(rank, {"process_group": False}),
    ]
    said = []
    for job in jobs:
        try:
            job()
            said.append("nothing")
        except KfacError as error:
            said.append(f"{type(error).__name__}: {error}")
    dist.barrier()
    return said
