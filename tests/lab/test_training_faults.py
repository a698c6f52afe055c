"""Something happens to one process of a run under torchrun: what is said, what is kept, what is left over."""

from __future__ import annotations

import os
import subprocess
import sys
import time
import uuid
from pathlib import Path

import pytest
from faulty_rank import STEP
from small_runs import events_of, run, settings, write_data
from world_training import trained
from worlds import world

from kfacore.lab.training.checkpoint import load_checkpoint

FAULTS = {
    "dies": ("rank 0 has no answer from the others", 5),
    "full": ("out of memory", 5),
    "nan": ("NaN or infinity", 5),
    "interrupted": ("stopped by", STEP),
}
"""What is said of each, and the step of the checkpoint that is left."""

_MARK = "KFAC_TEST_MARK"


def left_over(mark: str) -> list[int]:
    """Processes that were started with a mark in their environment and are alive."""
    found = []
    for entry in Path("/proc").iterdir():
        try:
            if entry.name.isdecimal() and mark.encode() in (entry / "environ").read_bytes():
                found.append(int(entry.name))
        except OSError:  # it ended, or is somebody else's
            continue
    return found


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="needs /proc")
@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_on_one_process_ends_all_with_the_checkpoint_whole(fault: str, tmp_path: Path) -> None:
    write_data(tmp_path)
    folder, mark = tmp_path / "run", uuid.uuid4().hex
    said, step = FAULTS[fault]
    sets = [word for each in settings(tmp_path, 'dtype="float64"') for word in ("--set", each)]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += [str(Path(__file__).parent.parent / "faulty_rank.py"), fault, "train", "--out", str(folder), *sets]
    environment = {**os.environ, "GLOO_SOCKET_IFNAME": "lo", "KFAC_RANK_TIMEOUT": "120", _MARK: mark}
    done = subprocess.run(command, capture_output=True, text=True, timeout=900, env=environment, check=False)
    assert done.returncode != 0
    told = [line for line in done.stderr.splitlines() if line.startswith("error: ") or "stopped by" in line]
    assert len(told) <= 1, done.stderr
    # Of a process that was killed torchrun tells first, and may end the other one before that one has found out.
    assert said in done.stderr or (fault == "dies" and "SIGKILL" in done.stderr), done.stderr
    for _ in range(600):
        if not left_over(mark):
            break
        time.sleep(0.1)
    assert not left_over(mark)
    assert load_checkpoint(folder / "checkpoint.pt").step == step
    whole = run(tmp_path, "whole", 'dtype="float64"')
    again = world(3, trained, tmp_path, "run", ['dtype="float64"'], {"resume": folder}).results
    assert [each[0] for each in again] == [whole.step] * 3
    losses = [[event["loss"] for event in events_of(each, "step")] for each in (folder, tmp_path / "whole")]
    assert losses[0] == pytest.approx(losses[1], rel=1e-7)
