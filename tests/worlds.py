"""Small worlds of processes for tests: started together, ended together, whatever happens."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

from patience import PATIENCE

__all__ = ["World", "world"]

_context = multiprocessing.get_context(os.environ.get("KFAC_TEST_START", "forkserver"))
if _context.get_start_method() == "forkserver":
    # What torch imports when the first optimizer is made, `torch.autograd.grad` first called, forward mode first used,
    # and the built-in components: seconds, which every process would pay.
    torchs = ["distributed", "_dynamo", "fx.experimental.symbolic_shapes", "_decomp.decompositions_for_jvp"]
    ours = ["kfacore.optim.kfac", "kfacore.lab.training.loop", "kfac_plugins"]
    _context.set_forkserver_preload([*(f"torch.{name}" for name in torchs), *ours])


class World:
    """What became of each process.

    Attributes:
        results: What the function returned, None where it did not.
        errors: The error of each process, None where there was none.
        codes: Exit codes; negative is a signal.
    """

    def __init__(self, results: list[Any], errors: list[str | None], codes: list[int | None]) -> None:
        self.results, self.errors, self.codes = results, errors, codes


def _live(rank: int, size: int, folder: str, function: Callable[..., Any], args: tuple[Any, ...]) -> None:
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    import torch
    from torch import distributed as dist

    torch.set_num_threads(1)
    error, result = None, None
    try:
        store = f"file://{folder}/store"
        limit = timedelta(seconds=PATIENCE)
        dist.init_process_group("gloo", init_method=store, rank=rank, world_size=size, timeout=limit)
        result = function(rank, *args)
    except BaseException as found:  # all that happens is told to the test
        error = f"{type(found).__name__}: {found}\n{traceback.format_exc()}"
    file = Path(folder) / f"{rank}.pickle"
    file.with_suffix(".new").write_bytes(pickle.dumps((result, error)))
    file.with_suffix(".new").rename(file)
    if error is None:
        dist.destroy_process_group()


def world(size: int, function: Callable[..., Any], *args: Any, fails: bool = False) -> World:
    """Run a function of a module in several processes of torch.distributed.

    Args:
        size: How many.
        function: Called with its rank and the arguments.
        args: What it is called with.
        fails: Whether errors are expected.
    """
    with tempfile.TemporaryDirectory() as folder:
        live = [
            _context.Process(target=_live, args=(rank, size, folder, function, args), daemon=True)
            for rank in range(size)
        ]
        try:
            for process in live:
                process.start()
            end = time.monotonic() + PATIENCE
            for process in live:
                process.join(max(0.1, end - time.monotonic()))
            late = [rank for rank, process in enumerate(live) if process.is_alive()]
        finally:
            for process in live:
                if process.pid is not None and process.is_alive():
                    process.kill()
                    process.join(10)
        found = [Path(folder) / f"{rank}.pickle" for rank in range(size)]
        told = [pickle.loads(file.read_bytes()) if file.exists() else (None, None) for file in found]
    assert not late, f"ranks {late} of {size} did not end within {PATIENCE} s"
    results, errors = [result for result, _ in told], [error for _, error in told]
    assert fails or not any(errors), "\n".join(error for error in errors if error)
    return World(results, errors, [process.exitcode for process in live])
