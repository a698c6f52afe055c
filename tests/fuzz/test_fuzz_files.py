"""Files that are not what they should be: configurations, studies, arrays, checkpoints: refused in our words."""

from __future__ import annotations

import hashlib
import io
import json
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fuzzing import examples, refused_or
from hypothesis import strategies as st
from small_runs import run, small_config, write_data
from small_studies import write_study

from kfac_plugins.problems.npz_file import read_arrays
from kfacore.errors import ConfigError, DataError
from kfacore.lab.config.resolve import read_saved, resolve
from kfacore.lab.config.run import SECTIONS, RunConfig
from kfacore.lab.studies.config import read_study
from kfacore.lab.studies.folder import plan_into
from kfacore.lab.training.checkpoint import load_checkpoint, read_model
from kfacore.lab.training.loop import train
from kfacore.lab.training.resume import resume_config
from kfacore.plugin import SLOTS
from kfacore.registry import get_registry
from kfacore.schema.describe import describe

# --- configurations --------------------------------------------------------------------------------------------------

WORDS = [
    "none",
    "kfac",
    "tridiag",
    "adam",
    "fixed",
    "npz",
    "auto",
    "cpu",
    "float32",
    "",
    " ",
    "\0",
    "ä",
    "a.b",
    "9" * 400,
]
NUMBERS = [0, 1, -1, 2, 10**3, 2**31, 2**63, 10**30, -0.0, 0.5, 1.0, 1e-320, 1e308, float("nan"), float("inf")]


def keys() -> list[str]:
    """Every key of a run, with all components' own."""
    registry = get_registry()
    names = set(RunConfig.model_fields)
    for section, model in SECTIONS.items():
        names |= {f"{section}.{key}" for key in model.model_fields}
    for slot in SLOTS:
        if slot in RunConfig.model_fields:
            for component in registry.components(slot):
                names |= {f"{slot}.kind", *(f"{slot}.{key.key}" for key in describe(component.config))}
    return sorted(names)


scalars = st.one_of(
    st.sampled_from(NUMBERS), st.sampled_from(WORDS), st.booleans(), st.integers(), st.floats(), st.text()
)
values = st.recursive(
    scalars,
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["kind", "steps", "x", ""]), inner, max_size=2)
    ),
    max_leaves=4,
)
known_keys = st.deferred(lambda: st.sampled_from(keys()))
any_key = st.one_of(known_keys, known_keys, known_keys, st.text(max_size=8), known_keys.map(lambda key: key + ".x"))


def toml(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, dict):
        return "{" + ", ".join(f"{json.dumps(key)} = {toml(each)}" for key, each in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(toml, value)) + "]"
    return json.dumps(value) if isinstance(value, str) else repr(value)


@examples(st.lists(st.tuples(any_key, values), min_size=1, max_size=4))
def test_assignments_make_a_configuration_or_are_refused(pairs: list[tuple[str, Any]]) -> None:
    sets = [f"{key}={toml(value)}" for key, value in pairs]
    config, refusal = refused_or(lambda: resolve(get_registry(), sets=sets))
    if refusal is not None:
        assert refusal.exit_code == 2
        return
    again = read_saved(get_registry(), json.loads(json.dumps(config.as_dict())))
    assert again.as_dict() == config.as_dict()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("fuzz")


@examples(st.dictionaries(any_key.map(lambda key: key.partition(".")[0]), values, max_size=3), st.binary(max_size=6))
def test_configuration_files(folder: Path, table: dict[str, Any], noise: bytes) -> None:
    text = "\n".join(f"{json.dumps(key)} = {toml(value)}" for key, value in table.items())
    file = folder / "config.toml"
    file.write_bytes(
        b"\xef\xbb\xbf" * (len(noise) % 2) + text.encode("utf-8", "replace") + (noise if len(noise) > 4 else b"")
    )
    _, refusal = refused_or(lambda: resolve(get_registry(), files=[file]))
    assert refusal is None or isinstance(refusal, ConfigError)


# --- runs ------------------------------------------------------------------------------------------------------------

# What a run takes that is as small as this one: sizes and lengths stay, since what is large takes long by right.
LONG = (
    "steps",
    "problem.",
    "problem",
    "preset",
    "budget",
    "optimizer.kind",
    "threads",
    "eval.every",
    "momentum.iterations",
)
small = st.one_of(
    st.sampled_from([0, 1, 2, 3, 7, 0.0, 0.5, 1.0, 2.0, 1e-30, 1e30, -1.0, "none", True, False]),
    st.sampled_from(WORDS[:8]),
)


@examples(st.lists(st.tuples(known_keys.filter(lambda key: not key.startswith(LONG)), small), min_size=1, max_size=3))
def test_what_is_a_configuration_trains_or_is_refused(folder: Path, pairs: list[tuple[str, Any]]) -> None:
    sets = ["sink=[]", "steps=2", *(f"{key}={toml(value)}" for key, value in pairs)]
    config, refusal = refused_or(lambda: small_config(folder, *sets))
    if refusal is not None:
        return
    target = folder / f"run-{hashlib.sha256(repr(sets).encode()).hexdigest()[:16]}"
    _, refusal = refused_or(lambda: train(config, registry=get_registry(), out=target))
    assert refusal is None or refusal.exit_code in (1, 2, 3)


# --- studies ---------------------------------------------------------------------------------------------------------

STUDY = ["name", "seeds", "axes", "one_at_a_time", "variants", "reference", "target", "budget", "threads", "executor",
         "problems", "base", "description", "nothing"]  # fmt: skip
COLUMNS = ["approx", "damping.lambda0", "name", "tune", "measure", "value", "steps", "kind"]
tables = st.dictionaries(st.sampled_from(COLUMNS), values, max_size=2)


@examples(
    st.dictionaries(
        st.sampled_from(STUDY), st.one_of(values, tables, st.lists(tables, max_size=2)), min_size=1, max_size=3
    )
)
def test_study_files(folder: Path, table: dict[str, Any]) -> None:
    base = write_study(folder, body="").read_text().splitlines()
    kept = [line for line in base if line.partition(" ")[0].partition(".")[0] not in table and line]
    if "base" in table:
        kept = kept[: kept.index("[base]")]
    file = folder / "fuzz.toml"
    file.write_text("\n".join([*(f"{key} = {toml(value)}" for key, value in table.items()), *kept]), encoding="utf-8")

    def plan() -> Any:
        return plan_into(get_registry(), read_study(file), folder / "planned")

    _, refusal = refused_or(plan)
    assert refusal is None or refusal.exit_code == 2


# --- arrays ----------------------------------------------------------------------------------------------------------

KINDS = ["f2", "f4", "f8", "i1", "i2", "i8", "u1", "u8", "?", "c8", "S3", "U2", "M8[s]", "O", "V4"]


@st.composite
def arrays(draw: st.DrawFn) -> np.ndarray:
    shape = tuple(draw(st.lists(st.sampled_from([0, 1, 2, 3, 10]), max_size=3)))
    kind = draw(st.sampled_from(KINDS))
    content = np.arange(int(np.prod(shape))).reshape(shape) % draw(st.sampled_from([1, 2, 3, 1000]))
    if kind in ("O", "V4", "M8[s]"):
        return np.zeros(shape, kind)
    array = content.astype(kind)
    if kind.startswith("f") and array.size:
        array.reshape(-1)[0] = draw(st.sampled_from([0.0, 0.5, -1.0, np.nan, np.inf, 1e4]))
    return array


NAMES = ["x_train", "y_train", "x_test", "y_test", "x", "X_train", "../x", ""]


@examples(
    st.dictionaries(st.sampled_from(NAMES), arrays(), max_size=4),
    st.sampled_from([None, "classifier", "regression", "autoencoder"]),
)
def test_arrays_are_read_or_refused(folder: Path, content: dict[str, np.ndarray], task: Any) -> None:
    file = folder / "arrays.npz"
    with zipfile.ZipFile(file, "w") as archive:
        for name, array in content.items():
            raw = io.BytesIO()
            np.save(raw, array, allow_pickle=True)
            archive.writestr(f"{name}.npy", raw.getvalue())
    found, refusal = refused_or(lambda: read_arrays(file, task, None))
    if refusal is None:
        assert np.isfinite(found.x_train).all()
        assert len(found.x_train)
        assert found.outputs >= 1
    else:
        assert refusal.exit_code == 2


@st.composite
def damage(draw: st.DrawFn) -> Callable[[bytes], bytes]:
    """Cut off, flip bits, repeat, or put something else in."""
    kind = draw(st.sampled_from(["cut", "flip", "flip", "flip", "zero", "insert", "double", "other"]))
    where, count = draw(st.floats(0, 1)), draw(st.integers(1, 8))
    mask = draw(st.integers(1, 255))

    def apply(data: bytes) -> bytes:
        at = min(int(where * len(data)), len(data) - 1)
        match kind:
            case "cut":
                return data[:at]
            case "flip":
                return data[:at] + bytes(each ^ mask for each in data[at : at + count]) + data[at + count :]
            case "zero":
                return data[:at] + bytes(len(data) - at)
            case "insert":
                return data[:at] + bytes([mask]) * count + data[at:]
            case "double":
                return data + data
        return [b"", b"PK\x03\x04", b"\x80\x02}q\x00.", b"not a file of ours"][count % 4]

    return apply


@examples(damage())
def test_damaged_arrays(folder: Path, change: Callable[[bytes], bytes]) -> None:
    file = folder / "damaged.npz"
    file.write_bytes(change(write_data(folder).read_bytes()))
    found, refusal = refused_or(lambda: read_arrays(file, None, None))
    assert refusal.exit_code == 2 if refusal is not None else found.x_train.shape == (60, 16)


# --- checkpoints -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(folder: Path) -> Path:
    """A run of four steps that can go on."""
    run(folder, "trained", "steps=4", "sink=[]", "checkpoint.every=2")
    return folder / "trained"


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


@examples(damage())
def test_damaged_checkpoints_are_refused_and_kept(
    trained: Path, folder: Path, change: Callable[[bytes], bytes]
) -> None:
    whole = (trained / "checkpoint.pt").read_bytes()
    broken = folder / "broken.pt"
    broken.write_bytes(change(whole))
    before = digest(broken)
    for read in (load_checkpoint, read_model):
        _, refusal = refused_or(lambda read=read: read(broken))
        assert refusal is None or isinstance(refusal, DataError)
        if refusal is None:  # the damage lies where it does no harm
            same = torch.load(trained / "checkpoint.pt", weights_only=True)["model"]
            assert all(torch.equal(same[name], value) for name, value in read_model(broken).items())
    assert digest(broken) == before


ENTRIES = [
    "model",
    "optimizer",
    "averaged",
    "step",
    "seconds",
    "evaluated",
    "data",
    "progress",
    "format",
    "config",
    "new",
]
WRONG = [None, {}, [], -1, 10**9, "x", float("nan"), True, {1: 2}, {"state": {}}, {"0.weight": torch.zeros(2)}]


@st.composite
def foreign(draw: st.DrawFn) -> Callable[[dict[str, Any]], dict[str, Any]]:
    """Other things under a checkpoint's keys, or other keys."""
    changes = draw(st.dictionaries(st.sampled_from(ENTRIES), st.sampled_from(WRONG), min_size=1, max_size=2))
    return lambda content: {**content, **changes}


@examples(foreign())
def test_checkpoints_of_something_else(
    trained: Path, folder: Path, change: Callable[[dict[str, Any]], dict[str, Any]]
) -> None:
    target = folder / "foreign"
    target.mkdir(exist_ok=True)
    for name in ("config.json", "manifest.json"):
        (target / name).write_bytes((trained / name).read_bytes())
    content = change(torch.load(trained / "checkpoint.pt", weights_only=True))
    torch.save(content, target / "checkpoint.pt")
    before = digest(target / "checkpoint.pt")

    def resume() -> Any:
        config = resume_config(get_registry(), target, sets=["steps=5"])
        return train(config, registry=get_registry(), resume=target)

    _, refusal = refused_or(resume)
    if refusal is not None:
        assert refusal.exit_code in (2, 3)
        if not (target / "traceback.txt").exists():
            assert digest(target / "checkpoint.pt") == before, "the checkpoint was replaced by a run that was refused"
