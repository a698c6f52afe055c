from __future__ import annotations

import logging

from kfacore.lab.training.notices import NoticeLog


def test_each_layer_is_named_and_the_flood_is_held_back(caplog):
    log = NoticeLog()
    with caplog.at_level(logging.WARNING, logger="kfacore.lab.training"):
        for step in range(1, 151):
            log.take(step, ["fc1: more jitter 1e-6", "fc2: kept the inverse"] if step == 3 else ["fc1: more jitter"])
    assert log.counts == {"fc1": 150, "fc2": 1}
    assert [record.getMessage() for record in caplog.records] == [
        "step 1: fc1: more jitter",
        "step 3: fc2: kept the inverse",
        "step 10: fc1: more jitter (10 notices of this layer so far)",
        "step 100: fc1: more jitter (100 notices of this layer so far)",
    ]
