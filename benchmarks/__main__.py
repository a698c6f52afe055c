"""``python -m benchmarks NAME``: run one benchmark; ``python -m benchmarks`` lists them."""

from __future__ import annotations

import sys
from collections.abc import Callable

from benchmarks import (
    everything,
    graft,
    guest,
    launches,
    memory,
    pairs,
    phases,
    ranks,
    real,
    refresh,
    robust,
    spike,
    step,
    target,
    tolerance,
    width,
)
from benchmarks.gpu.command import main as gpu_main

BENCHMARKS: dict[str, tuple[Callable[[list[str]], int], str]] = {
    "all": (everything.main, "every benchmark that is quick enough for `make bench`"),
    "gpu": (
        gpu_main,
        "everything that needs CUDA, within eight minutes; benchmarks/gpu.sh runs it where nothing is installed",
    ),
    "graft": (graft.main, "steps and seconds of a guest to the final loss of the tuned optimizer that it wraps"),
    "guest": (guest.main, "cost of a guest's steps against those of the optimizer that it wraps"),
    "launches": (launches.main, "dispatched operations and waits of ordinary and refresh steps"),
    "memory": (memory.main, "peak memory of training against Adam"),
    "pairs": (pairs.main, "which pairs of blocks the tridiagonal form should couple"),
    "phases": (phases.main, "where a step's time goes"),
    "ranks": (ranks.main, "what a step costs on 1 to 1,024 ranks: a model, and the points measured here"),
    "real": (real.main, "models that people train: K-FAC, a guest, AdamW, Muon and SOAP in equal processor seconds"),
    "refresh": (refresh.main, "factors side by side against one after another, also beside other work"),
    "robust": (robust.main, "problems that nobody tuned for: does training ever fall apart, and who is ahead"),
    "spike": (spike.main, "the slowest step against the median one"),
    "step": (step.main, "cost of a K-FAC step against SGD with momentum on the same model and batch"),
    "target": (target.main, "seconds, steps and cases to a training error; takes as long as training"),
    "tolerance": (tolerance.main, "what truncating the tridiagonal inverse trades"),
    "width": (width.main, "how the cost grows with the width of the layers"),
}


def main() -> int:
    if len(sys.argv) < 2 or sys.argv[1] not in BENCHMARKS:
        for name, (_, summary) in BENCHMARKS.items():
            print(f"{name:10} {summary}")
        return 0 if len(sys.argv) < 2 else 2
    run, _ = BENCHMARKS[sys.argv[1]]
    return run(sys.argv[2:])


if __name__ == "__main__":
    sys.exit(main())
