"""A run folder as training leaves it, written by hand."""

import json


def write_run(folder, name, errors, *, optimizer="kfac", approx="tridiag", seed=0, done=True, averaged=None):
    path = folder / name
    path.mkdir()
    config = {"problem": {"kind": "mnist"}, "optimizer": {"kind": optimizer}, "seed": seed, "approx": None}
    if approx:
        config["approx"] = {"kind": approx}
    (path / "config.json").write_text(json.dumps(config))
    events = [{"event": "start", "step": 0, "seconds": 0.0}]
    for k, error in enumerate(errors, start=1):
        events.append({"event": "step", "step": k, "batch_size": 100 * k, "seconds": 2.0 * k})
        evaluated = {"train_error": error, "test_error": error + 1, "train_loss": 10 * error, "test_loss": None}
        if averaged is not None:
            evaluated["averaged_train_error"] = averaged[k - 1]
        events.append({"event": "eval", "step": k, "seconds": 2.0 * k, **evaluated})
    if done:
        events.append({"event": "done", "step": len(errors), "seconds": 2.0 * len(errors)})
    (path / "metrics.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))
    return path
