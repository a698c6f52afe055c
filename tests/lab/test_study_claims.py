from __future__ import annotations

import json
import multiprocessing
import os
import signal
import subprocess
import sys

import pytest
from patience import PATIENCE, until

from kfacore.lab.studies import claims
from kfacore.lab.studies.claims import Claim, ClaimWatch, Holder, birth, here, read_holder


def write_claim(folder, number: int, **changes) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    content = {"place": here(), "pid": os.getpid(), "birth": birth(os.getpid()), "released": False, **changes}
    (folder / f"claim-{number}").write_text(json.dumps(content))


def test_one_holder_at_a_time(tmp_path) -> None:
    first = Claim.take(tmp_path / "run")
    assert first is not None
    assert Claim.take(tmp_path / "run") is None
    first.release()
    second = Claim.take(tmp_path / "run")
    assert second is not None
    assert second.number == 2
    assert [file.name for file in (tmp_path / "run").iterdir()] == ["claim-2"]
    second.release()


def test_the_claim_of_a_process_that_was_killed_is_free_at_once(tmp_path) -> None:
    script = (
        "import sys; from pathlib import Path; from kfacore.lab.studies.claims import Claim\n"
        "claim = Claim.take(Path(sys.argv[1])); print('held', flush=True); sys.stdin.read()"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", script, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert process.stdin is not None
    assert process.stdout is not None
    assert process.stdout.readline() == b"held\n"
    assert Claim.take(tmp_path) is None
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdin.close()
    process.stdout.close()
    claim = Claim.take(tmp_path)
    assert claim is not None
    claim.release()


def test_a_reused_process_id_does_not_hold(tmp_path) -> None:
    write_claim(tmp_path, 7, birth="1")  # this process's id, but another process
    claim = Claim.take(tmp_path)
    assert claim is not None
    assert claim.number == 8
    claim.release()


def test_a_process_id_of_another_machine_is_not_looked_up_here(tmp_path) -> None:
    write_claim(tmp_path, 1, place="elsewhere", pid=2**22 + 1)
    holder = read_holder(tmp_path)
    assert holder is not None
    assert not holder.gone
    assert Claim.take(tmp_path) is None


def race(folder, barrier, results) -> None:
    barrier.wait()
    claim = Claim.take(folder)
    results.put(0 if claim is None else claim.number)
    barrier.wait()  # nobody leaves, and so frees the run, before all have tried


def test_of_many_that_want_it_one_gets_it(tmp_path) -> None:
    context = multiprocessing.get_context("spawn")
    barrier, results = context.Barrier(4), context.Queue()
    processes = [context.Process(target=race, args=(tmp_path, barrier, results)) for _ in range(4)]
    for process in processes:
        process.start()
    numbers = sorted(results.get(timeout=PATIENCE) for _ in processes)
    for process in processes:
        process.join(PATIENCE)
    assert numbers == [0, 0, 0, 1]


@pytest.mark.parametrize("links", [True, False])
def test_the_name_decides_with_and_without_links(tmp_path, monkeypatch, links) -> None:
    if not links:

        def refuse(*_):
            raise OSError("no links here")

        monkeypatch.setattr(os, "link", refuse)
    assert claims._create(tmp_path, 3)
    assert not claims._create(tmp_path, 3)
    holder = read_holder(tmp_path)
    assert holder is not None
    assert (holder.number, holder.pid) == (3, os.getpid())
    assert [file.name for file in tmp_path.iterdir()] == ["claim-3"]


def test_a_name_that_was_used_before_does_not_win(tmp_path) -> None:
    # Somebody who read claim-1 long ago; claim-2 has come and gone, and claim-3 holds.
    write_claim(tmp_path, 3)
    assert not claims._create(tmp_path, 2)


def test_a_claim_being_written_belongs_to_somebody(tmp_path) -> None:
    (tmp_path / "claim-1").write_text("")
    holder = read_holder(tmp_path)
    assert holder is not None
    assert not holder.gone
    assert Claim.take(tmp_path) is None


class TestWatch:
    def holder(self, **changes) -> Holder:
        values = {"number": 1, "place": "elsewhere", "pid": 1, "birth": "5", "released": False, "beat": 10.0}
        return Holder(**{**values, **changes})

    def test_a_heartbeat_that_stands_still_is_stale_after_the_limit(self) -> None:
        now = [100.0]
        watch = ClaimWatch(60.0, clock=lambda: now[0])
        assert not watch.stale("run", self.holder())
        now[0] += 59.0
        assert not watch.stale("run", self.holder())
        now[0] += 2.0
        assert watch.stale("run", self.holder())

    def test_every_beat_starts_the_clock_again(self) -> None:
        now = [0.0]
        watch = ClaimWatch(60.0, clock=lambda: now[0])
        for beat in range(5):
            assert not watch.stale("run", self.holder(beat=float(beat)))
            now[0] += 59.0
        assert not watch.stale("run", self.holder(beat=9.0))
        now[0] += 59.0
        assert not watch.stale("run", self.holder(beat=9.0, number=2))

    def test_a_clock_of_another_machine_does_not_matter(self) -> None:
        watch = ClaimWatch(60.0, clock=lambda: 0.0)
        for beat in (-1e9, 1e12):
            assert not watch.stale("run", self.holder(beat=beat))

    def test_a_local_process_that_lives_is_never_stale(self) -> None:
        now = [0.0]
        watch = ClaimWatch(60.0, clock=lambda: now[0])
        own = self.holder(place=here(), pid=os.getpid(), birth=birth(os.getpid()))
        assert not watch.stale("run", own)
        now[0] = 1e6
        assert not watch.stale("run", own)

    def test_what_was_given_back_is_free(self) -> None:
        assert ClaimWatch().stale("run", self.holder(released=True))


def test_the_holder_beats_and_hears_that_it_was_overtaken(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(claims, "BEAT_SECONDS", 0.02)
    lost: list[str] = []
    claim = Claim.take(tmp_path, on_lost=lambda: lost.append("lost"))
    assert claim is not None
    os.utime(claim.file, (1.0, 1.0))
    until(lambda: claim.file.stat().st_mtime >= 2.0)
    write_claim(tmp_path, 2)
    until(lambda: bool(lost))
    until(lambda: claim.lost)  # after a gap in the heartbeats, and there is no further one
    claim.release()  # must not touch the new one
    holder = read_holder(tmp_path)
    assert holder is not None
    assert (holder.number, holder.released) == (2, False)


def test_birth_tells_the_living_from_the_dead() -> None:
    assert birth(os.getpid())
    process = subprocess.Popen([sys.executable, "-c", "pass"])
    process.wait()
    assert birth(process.pid) == ""
