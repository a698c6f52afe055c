"""A run on several processes: joined when `torchrun`, or SLURM, has started them; one of them owns the folder."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta

import torch
from torch import distributed as dist

from kfacore.errors import ConfigError
from kfacore.parallel.ranks import ALONE, Ranks, find_ranks

__all__ = ["WAITING", "device_of", "joined", "started", "told_first"]

WAITING = "KFAC_RANK_TIMEOUT"
"""Environment variable: seconds after which a process that does not answer counts as dead; 600 if it is not set."""

_NEEDED = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def started(environment: Mapping[str, str] | None = None) -> int:
    """How many processes were started together, by the variables that torchrun sets.

    Raises:
        ConfigError: Only some of the variables are set.
    """
    found = os.environ if environment is None else environment
    size = found.get("WORLD_SIZE", "1")
    if size.isdecimal() and int(size) > 1:
        missing = [name for name in _NEEDED if name not in found]
        if missing:
            raise ConfigError(
                f"WORLD_SIZE is {size} but {', '.join(missing)} is not set; start the processes with torchrun "
                "--nproc-per-node N -m kfac_cli train ..., or unset WORLD_SIZE"
            )
        return int(size)
    return 1


@contextmanager
def joined(device: str = "auto") -> Iterator[Ranks]:
    """The processes of this run; one alone where nobody started several.

    Args:
        device: That of the run: CUDA devices speak NCCL, processors gloo.

    Raises:
        ConfigError: The environment is not whole, or the waiting time is no number.
    """
    if dist.is_available() and dist.is_initialized():
        yield find_ranks()
        return
    if started() == 1:
        yield ALONE
        return
    cuda = device.startswith("cuda") or (device == "auto" and torch.cuda.is_available())
    if cuda:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    text = os.environ.get(WAITING, "600")
    try:
        limit = timedelta(seconds=float(text))
    except ValueError as error:
        raise ConfigError(f"{WAITING} must be a number of seconds, found {text!r}") from error
    dist.init_process_group("nccl" if cuda else "gloo", timeout=limit)
    ranks = find_ranks()
    if ranks.rank > 0:
        logging.getLogger("kfacore").setLevel(logging.ERROR)  # what all find out is said once
    yield ranks
    dist.destroy_process_group()  # not after a failure: it would wait for processes that are gone


def device_of(name: str) -> str:
    """The device of this process of several: its own GPU of the machine."""
    local = os.environ.get("LOCAL_RANK", "0")
    return f"cuda:{local}" if name in ("auto", "cuda") and torch.cuda.is_available() and started() > 1 else name


def told_first() -> bool:
    """Whether this process is the first to tell why the run ended: the others keep quiet."""
    if not dist.is_available() or started() == 1:
        return True
    try:
        if dist.is_initialized():
            store = dist.distributed_c10d._get_default_store()
        elif os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":  # torchrun keeps it, whoever of us is gone
            host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
            wait = timedelta(seconds=60)
            store = dist.TCPStore(host, port, is_master=False, timeout=wait)  # type: ignore[attr-defined]  # it is there
        else:
            return os.environ.get("RANK", "0") == "0"
        return int(store.add("kfac/told", 1)) == 1
    except (RuntimeError, ValueError, KeyError, ConfigError):  # whoever kept the store is gone
        return True
